"""Products with quantized weights on a CPU beside bf16, and a step and loading of a 1.3B beside stable-diffusion.cpp.

    python benchmarks/bench_quantized.py linears [--threads 1] [--rounds 5]
    python benchmarks/bench_quantized.py block [--threads 1] [--rounds 5]
    python benchmarks/bench_quantized.py step --models FOLDER [--sd-cli FILE] [--threads 1] [--rounds 3] [--flags ...]

linears: the layers of a 1.3B block at 416x240, 17 frames (1,950 tokens), in turn. block: a whole block of random
weights, with the share of each operation, and its error against products in double precision. step: FOLDER is what
quantized_models.py writes; every program runs in a process of its own, in turn. Seconds are those of the processor
(user and system), which other work on the machine changes less than those of the clock; both are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from harness import _path, machine
from torch import Tensor

from fastvid.layers.quantized import install
from fastvid.layers.residual import Stream
from fastvid.models.wan.config import WanTransformerConfig
from fastvid.models.wan.transformer import Block, Modulation
from fastvid.ops import dispatch, reference
from fastvid.ops.formats_rows import quantize_weight
from fastvid.ops.quantized import QuantizedTensor, Spec
from fastvid.tuning import weights

TOKENS, D, FF = 1950, 1536, 8960
LAYERS = {"1536 to 1536": (D, D, False, 6), "1536 to 8960, GELU": (D, FF, True, 1), "8960 to 1536": (FF, D, False, 1)}
"""Inputs, outputs, whether GELU follows, how many a block has for its tokens."""
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "int8, products in 8 bits": ("int8", {"eight_bit": True}),
    "int8 rotated, products in 8 bits": ("int8", {"eight_bit": True, "rotation": 256}),
    "fp8, products in 8 bits": ("fp8_e4m3", {"eight_bit": True}),
    **{name: (name, {}) for name in ("int8", "fp8_e4m3", "mxfp8", "nvfp4", "nf4", "q8_0", "q6_k", "q5_k", "q4_k")},
    **{name: (name, {}) for name in ("iq4_xs", "q3_k", "q2_k", "q5_0", "q4_0")},
}
SIZE = {"height": 240, "width": 416, "num_frames": 17}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("linears", "block", "step", "child"))
    parser.add_argument("kind", nargs="?")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--sd-cli", type=Path)
    parser.add_argument("--flags", nargs="*", default=[], help="more flags of sd-cli, without their dashes")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    {"linears": linears, "block": block, "step": step, "child": child}[args.what](args)


# ---------------------------------------------------------------- linear layers


@torch.no_grad()
def linears(args: argparse.Namespace) -> None:
    ops, found = dispatch.bind(), {}
    for title, (K, N, gelu, _) in LAYERS.items():
        runs = dict(_runs(ops, K, N, gelu))
        times: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(args.rounds + 1):
            for name, run in runs.items():
                start = time.process_time()
                run()
                times[name] += [time.process_time() - start] if number else []
        found[title] = {name: round(1e3 * statistics.median(taken), 2) for name, taken in times.items()}
        print(title, found[title], flush=True)
    block = {name: sum(LAYERS[title][3] * found[title][name] for title in LAYERS) for name in found["8960 to 1536"]}
    speed = {name: round(block["bf16"] / taken, 3) for name, taken in block.items()}
    print("speed of a block's layers, bf16 = 1:", speed)
    _save("quantized-linears", args, milliseconds=found, speed_of_a_block=speed, tokens=TOKENS)


def _runs(ops: Any, K: int, N: int, gelu: bool) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, TOKENS, K, generator=generator).bfloat16()
    dense, bias = (torch.randn(*size, generator=generator).bfloat16() for size in ((N, K), (N,)))
    plain = ops.linear_gelu_tanh if gelu else ops.linear
    yield "bf16", lambda: plain(x, dense, bias)
    for name, (format, options) in KINDS.items():
        spec = Spec.of(format, (N, K), **options)
        data = weights.draw(spec, generator)
        of = QuantizedTensor(format, (N, K), data, torch.bfloat16, spec.rotation, spec.eight_bit, keep=data.__setitem__)
        yield name, lambda of=of: ops.linear_quantized(x, of, bias, gelu)


# ---------------------------------------------------------------- a block


class Timed:
    """Operations, and the seconds of the processor that each takes."""

    def __init__(self) -> None:
        self._ops, self.taken = dispatch.bind(), dict[str, float]()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._ops, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            made = function(*args, **kwargs)
            self.taken[name] = self.taken.get(name, 0.0) + time.process_time() - start
            return made

        return run


@torch.no_grad()
def block(args: argparse.Namespace) -> None:
    kinds = ("bf16", "int8", "fp8_e4m3")
    exact = _run_block(_block("float64"), torch.float64)
    blocks, errors = {kind: _block(kind) for kind in kinds}, {}
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    shares: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for number in range(args.rounds + 1):
        for kind, module in blocks.items():
            module.ops.taken.clear()
            start = time.process_time()
            made = _run_block(module, torch.bfloat16)
            if number:
                times[kind].append(time.process_time() - start)
                shares[kind].append(dict(module.ops.taken))
            errors[kind] = [float((a.double() - b).norm() / b.norm()) for a, b in zip(made, exact, strict=True)]
    facts = {
        kind: {
            "milliseconds": round(1e3 * statistics.median(times[kind]), 1),
            "speed, bf16 = 1": round(statistics.median(times["bf16"]) / statistics.median(times[kind]), 3),
            "operations": {
                name: round(1e3 * statistics.median(one[name] for one in shares[kind]), 1) for name in shares[kind][0]
            },
            "relative error of the stream, of the feed-forward": errors[kind],
        }
        for kind in kinds
    }
    print(json.dumps(facts, indent=1))
    _save("quantized-block", args, tokens=TOKENS, kinds=facts)


def _block(kind: str) -> Any:
    """A block of the 1.3B's shape, with the same weights for every kind."""
    config = WanTransformerConfig(num_attention_heads=12, attention_head_dim=128, ffn_dim=FF, num_layers=1)
    exact = kind == "float64"
    dtype, ops = (torch.float64 if exact else torch.bfloat16), (reference if exact else Timed())
    generator, made = torch.Generator().manual_seed(0), Block(config, ops)
    for name, one in made.named_parameters():
        drawn = torch.randn(one.shape, generator=generator)
        around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        one.data = (drawn * (one.shape[-1] ** -0.5 if one.ndim == 2 else 0.02) + around).bfloat16()
    state = {name: one.detach().clone() for name, one in made.state_dict().items()}
    made.to(dtype)
    made.scale_shift_table.data = made.scale_shift_table.data.float()
    if kind in ("int8", "fp8_e4m3"):
        chosen = {name: one for name, one in state.items() if one.ndim == 2 and name.endswith("weight")}
        specs = {name: Spec.of(kind, (one.shape[0], one.shape[1]), eight_bit=True) for name, one in chosen.items()}
        install(made, specs, ops, lambda _: torch.bfloat16)
        for name, one in chosen.items():
            layer: Any = made.get_submodule(name.removesuffix(".weight"))
            layer.fill(quantize_weight(one, kind), torch.device("cpu"))
            layer.bias = torch.nn.Parameter(state[f"{name.removesuffix('weight')}bias"], requires_grad=False)
    return made


def _run_block(module: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The residual stream, and what the feed-forward will add."""
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(1, TOKENS, D, generator=generator).bfloat16().to(dtype) for _ in range(2))
    rows, gate = (0.1 * torch.randn(*size, generator=generator) for size in ((1, 6, D), (1, D)))
    context = tuple(torch.randn(1, 512, 12, 128, generator=generator).bfloat16().to(dtype) for _ in range(2))
    angles = 6 * torch.rand(TOKENS, 64, generator=generator)
    modulation = Modulation(rows, torch.zeros(1, 1, dtype=torch.int64))
    stream, made, _ = module(Stream(x, y, gate), modulation, context, (angles.cos(), angles.sin())).take()
    return stream, made


# ---------------------------------------------------------------- a step beside stable-diffusion.cpp


def step(args: argparse.Namespace) -> None:
    kinds = ["bf16", "int8", "Q8_0"]
    runs: dict[str, Callable[[], dict[str, float]]] = {
        f"fastvid {kind}": lambda kind=kind: _ours(kind, args) for kind in kinds
    }
    if args.sd_cli:
        runs["stable-diffusion.cpp Q8_0"] = lambda: _theirs(args)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, run in runs.items():
            found[name].append(run())
            print(name, found[name][-1], flush=True)
    medians = {
        name: {key: round(statistics.median(one[key] for one in taken), 2) for key in taken[0]}
        for name, taken in found.items()
    }
    print(json.dumps(medians, indent=1))
    _save("quantized-step", args, medians=medians, all=found, flags=args.flags, size=SIZE)


def _environment(args: argparse.Namespace) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(args.threads)}


def _ours(kind: str, args: argparse.Namespace) -> dict[str, float]:
    words = [sys.executable, __file__, "child", kind, "--threads", str(args.threads), "--models", str(args.models)]
    made = subprocess.run(words, env=_environment(args), check=True, capture_output=True, text=True)
    return dict(json.loads(made.stdout.splitlines()[-1]))


def child(args: argparse.Namespace) -> None:
    """Loads a model and takes two steps; the second counts, as int8 packs its weights in the first."""
    import fastvid

    _ = fastvid.load  # what it imports belongs to no model
    more = {"bf16": {}, "int8": {"quantize": "int8"}, "Q8_0": {"transformer": args.models / "wan-1.3b-Q8_0.gguf"}}
    marks = [_now()]
    pipe = fastvid.load(args.models / "bf16", dtype="bfloat16", device="cpu", **more[args.kind])
    marks.append(_now())
    embeds = torch.randn(1, 512, 4096, generator=torch.Generator().manual_seed(3))
    request = {**SIZE, "num_inference_steps": 2, "guidance_scale": 1.0, "prompt_embeds": embeds, "seed": 1}
    stream = pipe.stream(None, **request)
    for event in stream:
        marks += [_now()] if type(event).__name__ == "Step" else []
        if len(marks) == 4:
            stream.cancel()
            break
    (load, load_clock), (step, step_clock) = (
        (round(b[0] - a[0], 2), round(b[1] - a[1], 2)) for a, b in ((marks[0], marks[1]), (marks[2], marks[3]))
    )
    print(json.dumps({"load": load, "load_clock": load_clock, "step": step, "step_clock": step_clock, "peak": _peak()}))


def _now() -> tuple[float, float]:
    return sum(os.times()[:2]), time.perf_counter()


def _peak(pid: int | str = "self") -> float:
    """GiB that a process has held at most."""
    found = re.search(r"VmHWM:\s*(\d+)", Path(f"/proc/{pid}/status").read_text())
    return round(int(found[1]) / 2**20, 2) if found else 0.0


def _theirs(args: argparse.Namespace) -> dict[str, float]:
    """One step of sd-cli, which tells when it has loaded, and when it has sampled."""
    words = [str(args.sd_cli), "-M", "vid_gen", "-v", "-p", "x", "--cfg-scale", "1", "--sampling-method", "euler"]
    words += ["--diffusion-model", str(args.models / "wan-1.3b-Q8_0.gguf"), "--steps", "1", "-t", str(args.threads)]
    words += ["--vae", str(args.models / "Wan2.1_VAE.safetensors"), "-W", "416", "-H", "240", "--video-frames", "17"]
    words += ["--flow-shift", "3.0", "-o", os.devnull, *(f"--{flag}" for flag in args.flags)]
    start, marks, peak = time.perf_counter(), {}, 0.0
    with subprocess.Popen(
        words, env=_environment(args), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            for name in ("loading tensors completed", "generate_video", "sampling completed"):
                if name in line:
                    marks[name], peak = (_processor(process.pid), time.perf_counter()), _peak(process.pid)
            if "sampling completed" in line:
                process.kill()
    loaded, began, done = (
        marks[name] for name in ("loading tensors completed", "generate_video", "sampling completed")
    )
    times = {"load": loaded[0], "load_clock": loaded[1] - start, "step": done[0] - began[0]}
    times |= {"step_clock": done[1] - began[1], "peak": peak}
    return {name: round(value, 2) for name, value in times.items()}


def _processor(pid: int) -> float:
    """Seconds of a running process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _save(name: str, args: argparse.Namespace, **facts: Any) -> None:
    path = _path(f"{name}-{args.threads}-threads", torch.device("cpu"))
    record = {"benchmark": name, "machine": machine(torch.device("cpu")), "threads": args.threads, **facts}
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
