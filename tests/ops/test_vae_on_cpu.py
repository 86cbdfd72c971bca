"""The VAEs' operations on a CPU by name: "aten", "onednn" and "winograd" mean the same; "reference" is one of them, bit
for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exact_vae import exact_conv, exact_double, exact_norm, exact_upsample
from kernel_cases import error, laid_out, random
from torch import Tensor

from fastvid.ops import brgemm, vae, vae_gpu, winograd, winograd_bf16

NORMED = "vae_norm_silu_conv3d"


def cases(C: int, size: int) -> dict[str, tuple[tuple[Any, ...], Tensor]]:
    """Arguments of every operation with several implementations, and the result in float64."""
    x, past = laid_out(random(1, C, 3, size, 5), "channels last"), random(1, C, 2, size, 5, seed=1)
    weight, bias = random(C, C, 3, 3, 3, seed=2) / C**0.5, random(C, seed=3)
    gamma, line, flat = random(C, 1, 1, 1, seed=4), weight[..., 1:2, 1:2], weight[:, :, 0]
    causal = exact_conv(x, past, weight, bias, (1, 1), (0, 1))
    normed = exact_conv(exact_norm(x, gamma), past, weight, bias, (1, 1), (1, 0))
    residual = random(*normed.shape, seed=5)
    return {
        "vae_conv3d": ((x, weight, bias, (1, 1)), exact_conv(x, None, weight, bias, (1, 1))),
        "vae_causal_conv3d": ((x, past, weight, bias, (1, 1), (0, 1)), causal),
        NORMED: ((x, past, gamma, weight, bias, residual, (1, 0)), normed + residual),
        "vae_upsample_conv2d": ((x, flat, bias, (1, 1)), exact_upsample(x, flat, bias, (1, 1))),
        "vae_double_frames": ((x, past, line, bias), exact_double(x, past, line, bias)),
        "vae_halve_frames": (
            (x, past[:, :, :1], line, bias),
            exact_conv(x, past[:, :, :1], line, bias, stride=(2, 1, 1)),
        ),
    }


def run(op: str, name: str, given: tuple[Any, ...]) -> Tensor:
    own = (one.clone() if isinstance(one, Tensor) else one for one in given)  # a residual is written to
    with torch.no_grad():
        made = vae_gpu.BACKENDS[op][name](*own)
    return made[0] if isinstance(made, tuple) else made


@pytest.mark.parametrize("op", cases(4, 4))
def test_all_mean_the_same(op: str) -> None:
    given, exact = cases(64, 8)[op]
    made = {name: run(op, name, given) for name in ("reference", *vae.ON_CPU[getattr(vae, op.removeprefix("vae_"))])}
    assert {"aten", "onednn"} < set(made) and ("winograd" in made) == (op == NORMED)
    for name, one in made.items():
        assert error(one, exact) < 2e-6, name
    assert torch.equal(made["reference"], made["onednn"]), "small, in fp32 on a CPU"
    assert not torch.equal(made["aten"], made["onednn"]) or op in ("vae_causal_conv3d", "vae_conv3d")
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(run(op, "reference", given), run(op, "aten", given))


def test_the_reference_takes_winograd_for_large_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    given, exact = cases(64, 8)[NORMED]
    monkeypatch.setattr(winograd, "worthwhile", lambda pixels, weight: True)
    made = run(NORMED, "reference", given)
    assert torch.equal(made, run(NORMED, "winograd", given))
    assert not torch.equal(made, run(NORMED, "onednn", given)) and error(made, exact) < 2e-6


needs_products = pytest.mark.skipif(brgemm.why_not() is not None, reason=str(brgemm.why_not()))


def halved(given: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(one.bfloat16() if isinstance(one, Tensor) else one for one in given)


@needs_products
@pytest.mark.parametrize("op", cases(4, 4))
def test_bf16_is_as_exact_as_pytorch(op: str) -> None:
    """By float64 of the same rounded arguments: at most twice PyTorch's error."""
    given = halved(cases(64, 9)[op][0])
    exact = run(op, "aten", tuple(one.double() if isinstance(one, Tensor) else one for one in given))
    plain = error(run(op, "aten", given), exact)
    for name in vae.ON_CPU[getattr(vae, op.removeprefix("vae_"))][1:]:
        assert error(run(op, name, given), exact) <= 2 * plain, name


@needs_products
@pytest.mark.parametrize("frames", [1, 2, 4])
@torch.no_grad()
def test_parts_and_threads_give_the_bits_of_the_whole_in_bf16(monkeypatch: pytest.MonkeyPatch, frames: int) -> None:
    x, gamma, bias = random(2, 64, frames, 12, 7), random(64, 1, 1, 1, seed=2), random(66, seed=3)
    weight, past = random(66, 64, 3, 3, 3, seed=4) / 40, random(2, 64, 2, 12, 7, seed=5)
    x, past, gamma, weight, bias = halved((x, past, gamma, weight, bias))
    whole, kept = vae.norm_silu_conv3d(x, past, gamma, weight, bias, how="winograd")
    monkeypatch.setattr(winograd_bf16, "worthwhile", lambda pixels, weight: True)
    assert vae.row_grain(x, gamma, weight, 10) == winograd_bf16.TILE
    parts = []
    for rows, edges in ((slice(0, 7), (0, 1)), (slice(5, 12), (1, 0))):
        part, own = vae.norm_silu_conv3d(x[:, :, :, rows], past[:, :, :, rows], gamma, weight, bias, None, edges, 99)
        assert torch.equal(own, kept[:, :, :, rows])
        parts.append(part)
    assert torch.equal(torch.cat(parts, 3), whole)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    again, own = vae.norm_silu_conv3d(x, past, gamma, weight, bias, how="winograd")
    assert torch.equal(again, whole) and torch.equal(own, kept)


def test_bytes_of_each() -> None:
    x, gamma = random(1, 8, 2, 5, 4), random(8, 1, 1, 1, seed=2)
    given = (x, None, gamma, random(3, 8, 3, 3, 3, seed=3) / 6, random(3))
    made = [run("vae_norm_silu_conv3d_rgb", name, given) for name in ("aten", "onednn", "winograd")]
    assert all(int((one.int() - made[0].int()).abs().max()) <= 1 for one in made)


@pytest.mark.parametrize("name", ["onednn", "winograd"])
def test_what_does_not_apply_is_refused(name: str) -> None:
    x, gamma, weight, bias = random(1, 4, 1, 3, 3), torch.ones(4, 1, 1, 1), random(4, 4, 3, 3, 3), random(4)
    function = vae_gpu.BACKENDS[NORMED][name]
    with pytest.raises(
        ValueError, match=f"{name} takes float32 on a CPU with oneDNN, or bfloat16 .*, without gradients, not .*float16"
    ):
        function(*(one.half() if one is not None else None for one in (x, None, gamma, weight, bias)))
    with pytest.raises(ValueError, match=name), torch.backends.mkldnn.flags(enabled=False):
        function(x, None, gamma, weight, bias)
    with pytest.raises(ValueError, match=name), torch.enable_grad():
        function(x, None, gamma, weight.requires_grad_(), bias)
