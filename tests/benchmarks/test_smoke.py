"""The smoke test of a GPU: right kernels pass, wrong ones do not, and what was right is not run again.

csrc/'s own code runs here over the emulated hardware of tests/csrc; Triton's kernels in its interpreter.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_eight_host import quantize_host
from attention_host import attention_host
from compiled_host import CXX
from conv_host import conv_host, norm_host
from torch import Tensor

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import smoke  # noqa: E402

from fastvid.ops import dispatch, vae_gpu  # noqa: E402
from fastvid.ops.vae_kernels import Kernels  # noqa: E402

CPU = torch.device("cpu")
on_host = pytest.mark.skipif(CXX is None, reason="no C++ compiler is found")


def attention_cuda(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = torch.full_like(q, torch.nan)
    attention_host(q, k, v, out, None)
    return out


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """The table of operations, with csrc/'s kernels on the host in the place of `cuda`."""
    table = dispatch.implementations()
    kernels = Kernels(conv_host, norm_host, on_load=False)
    table["attention"]["cuda"] = attention_cuda
    for name in ("rms_norm", "conv3d", "causal_conv3d"):
        operation = getattr(vae_gpu, name)
        table[f"vae_{name}"]["cuda"] = lambda *args, run=operation: run(*args, kernels=kernels)
    monkeypatch.setattr(dispatch, "implementations", lambda: table)
    monkeypatch.setattr(dispatch, "why_not", lambda *_: None)
    monkeypatch.setattr(dispatch, "lacks", lambda *_: None)
    monkeypatch.setattr(smoke.attention_gpu, "quantize_cuda", quantize_host)
    return table


@on_host
@pytest.mark.parametrize("case", [case for case in smoke.CASES if case != "rgb"])
def test_what_csrc_computes_is_right(case: str, host: dict[str, dict[str, Any]]) -> None:
    found = smoke.check(case, "cuda", CPU)
    assert 0 < found["error"] <= found["allowed"]


@on_host
@pytest.mark.parametrize("case", ["attention_1", "attention_2", "conv_1x1", "conv_3x3x3", "vae_norm"])
@pytest.mark.parametrize("kind", ["a token or a channel", "a NaN", "another each time", "a scale"])
def test_a_wrong_kernel_is_found(case: str, kind: str, host: dict[str, dict[str, Any]]) -> None:
    functions, count = host[smoke.CALLS[case].op], iter(range(9))
    right: Callable[..., Any] = functions["cuda"]

    def wrong(*args: Any) -> Any:
        made = right(*args)
        out, *rest = smoke.outputs(made)
        out = out.clone()
        if kind == "a token or a channel":
            out[0, 5] = 0
        elif kind == "a NaN":
            out[(0,) * out.ndim] = torch.nan
        elif kind == "another each time":
            out[(0,) * out.ndim] += next(count)
        else:
            out *= 1.02
        return (out, *rest) if rest else out

    functions["cuda"] = wrong
    found = smoke.check(case, "cuda", CPU)
    assert not found["error"] <= found["allowed"]


@on_host
@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize("part", ["queries", "keys", "values"])
def test_wrong_quantization_is_found(
    kind: str, part: str, host: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(which: str, x: Tensor, mean: Tensor | None, made: tuple[Tensor | None, ...], **how: Any) -> None:
        quantize_host(which, x, mean, made, **how)
        if which == part:
            made[0].view(-1)[3] ^= 0x40  # a bit of one value

    monkeypatch.setattr(smoke.attention_gpu, "quantize_cuda", wrong)
    assert smoke.quantize(kind, CPU) > 1


def test_a_wrong_byte_of_rgb_is_found(host: dict[str, dict[str, Any]]) -> None:
    right = host["to_rgb"]["reference"]
    assert smoke.check("rgb", "reference", CPU)["error"] <= smoke.CALLS["rgb"].allowed

    def wrong(frames: Tensor) -> Tensor:
        out = right(frames)
        out[1, 2, 3, 0] += 1
        return out

    host["to_rgb"]["reference"] = wrong
    assert smoke.check("rgb", "reference", CPU)["error"] > smoke.CALLS["rgb"].allowed


def test_what_cannot_run_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert smoke.one("attention_1", "cuda", CPU) == 0
    assert json.loads(capsys.readouterr().out)["cannot"]


# ---------------------------------------------------------------- all of them

RIGHT = {"ended": "done", "seconds": 1.0, "error": 1e-3, "allowed": 1e-2}
WRONG = RIGHT | {"ended": "status 1", "error": 1.0}
HUNG = {"ended": "stopped after 15 s", "seconds": 15.0, "said": ""}
CANNOT = {"ended": "done", "seconds": 1.0, "cannot": "it is not built"}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Outcomes of cases, in the place of processes; those that ran are noted in the order."""
    outcomes: dict[str, Any] = {"ran": []}

    def run_case(case: str, backend: str, device: torch.device, seconds: float) -> dict[str, Any]:
        outcomes["ran"].append(f"{case} {backend}")
        return outcomes.get(f"{case} {backend}", RIGHT)

    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setitem(smoke.result_of.__globals__["earlier"].__globals__, "RESULTS", tmp_path / "none")
    monkeypatch.setattr(smoke, "run_case", run_case)
    return outcomes


def everything(*cases: str, seconds: float = 20, again: bool = False) -> int:
    args = smoke.argparse.Namespace(cases=list(cases), seconds=seconds, each=15, again=again)
    return smoke.everything(args, CPU)


def test_only_what_was_not_right_runs_again(calls: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    names = {f"{case} {backend}" for case in smoke.CALLS for backend in ("triton", "reference")}
    calls["rgb triton"], calls["conv_1x1 triton"], calls["vae_norm triton"] = WRONG, HUNG, CANNOT
    assert everything() == 1 and set(calls["ran"]) == names
    recorded = smoke.result_of("smoke", CPU)["cases"]
    assert set(recorded) == names and recorded["rgb triton"]["error"] == 1.0
    calls["ran"].clear()
    del calls["rgb triton"], calls["conv_1x1 triton"]
    assert everything() == 0 and set(calls["ran"]) == {"rgb triton", "conv_1x1 triton", "vae_norm triton"}
    calls["ran"].clear()
    assert everything("rgb", again=True) == 0 and set(calls["ran"]) == {"rgb triton", "rgb reference"}
    calls["ran"].clear()
    monkeypatch.setattr(smoke, "source_hash", lambda *_: "another")
    assert everything() == 0 and set(calls["ran"]) == names


def test_without_time_it_says_so(calls: dict[str, Any]) -> None:
    assert everything("rgb") == 0
    assert everything("rgb", "vae_norm", seconds=0) == smoke.OUT_OF_TIME and len(calls["ran"]) == 2
    calls["conv_1x1 triton"] = calls["conv_1x1 reference"] = HUNG
    assert everything("conv_1x1", seconds=10) == smoke.OUT_OF_TIME  # cut off by the end of the call
    assert not [name for name in smoke.result_of("smoke", CPU)["cases"] if "conv" in name]
    assert everything("conv_1x1", seconds=60) == 1
    calls["conv_1x1 triton"] = calls["conv_1x1 reference"] = CANNOT
    assert everything("conv_1x1") == 1  # nothing at all was right


@pytest.mark.slow
def test_each_case_has_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    fine = smoke.run_case("attention_2", "triton", CPU, 120)
    assert fine["ended"] == "done" and 0 < fine["error"] < fine["allowed"]
    hung = smoke.run_case("attention_2", "triton", CPU, 0.5)
    assert hung["ended"].startswith("stopped") and "error" not in hung
