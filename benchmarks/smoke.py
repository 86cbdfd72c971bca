"""The first contact of the kernels with a GPU: one small call of each, compared with float64, in 20 seconds in all.

    python benchmarks/smoke.py [--device cuda] [--seconds 20] [--again] [attention_1 ...]
    python benchmarks/smoke.py attention_1 --backend cuda     # this one, in this process

Each call has a process and a limit of its own, so that a kernel that hangs or faults costs no other its result. Every
result is recorded at once; what was right before, from the same source, is not run again. On a CPU Triton's
interpreter stands in for the GPU, and the reference for everything else.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import result_of, save
from limited import FINE, run, tail
from torch import Tensor

from fastvid.ops import attention, attention_gpu, dispatch
from fastvid.ops.sources import file_of, source_hash

HALVES = {"cuda": torch.bfloat16, "cpu": torch.float16}  # Triton's interpreter multiplies no matrices of bfloat16
ALLOWED = 1e-2  # relative error in bfloat16; one wrong block or row of a small call is far above it
JOBS = min(os.cpu_count() or 1, 16)
OUT_OF_TIME = 3  # exit status


class CannotRun(Exception):
    """Why a back end cannot run here."""


@dataclass(frozen=True)
class Call:
    """One call of an operation: its arguments on a device, and by how much the result may be off."""

    op: str
    args: Callable[[torch.device], tuple[Any, ...]]
    allowed: float = ALLOWED


def rgb(device: torch.device) -> tuple[Any, ...]:
    """[3, T, H, W], with values outside of [-1, 1]."""
    return (random(device, 3, 2, 13, 22),)


def vae_norm(device: torch.device) -> tuple[Any, ...]:
    return pixels(device, 96), random(device, 96, 1, 1, 1)


def attention_1(device: torch.device) -> tuple[Any, ...]:
    """One block of queries and one step over the keys."""
    return tuple(random(device, 1, 128, 2, 128) for _ in range(3))


def attention_2(device: torch.device) -> tuple[Any, ...]:
    """Two steps over the keys."""
    return tuple(random(device, 1, n, 2, 128) for n in (128, 256, 256))


def conv_1x1(device: torch.device) -> tuple[Any, ...]:
    return pixels(device, 96), random(device, 64, 96, 1, 1, 1) / 10, random(device, 64)


def conv_3x3x3(device: torch.device) -> tuple[Any, ...]:
    """With the two frames before."""
    weight, past = random(device, 96, 96, 3, 3, 3) / 50, pixels(device, 96)[:, :, :2]
    return pixels(device, 96), past, weight, random(device, 96), (1, 1)


def random(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape).to(device, HALVES.get(device.type))


def pixels(device: torch.device, channels: int) -> Tensor:
    """[1, C, T, H, W], channels last."""
    return random(device, 1, channels, 3, 16, 16).contiguous(memory_format=torch.channels_last_3d)


CALLS = {
    "rgb": Call("to_rgb", rgb, allowed=0.501),  # of a byte
    "vae_norm": Call("vae_rms_norm", vae_norm),
    "attention_1": Call("attention", attention_1),
    "attention_2": Call("attention", attention_2),
    "conv_1x1": Call("vae_conv3d", conv_1x1),
    "conv_3x3x3": Call("vae_causal_conv3d", conv_3x3x3),
}
QUANTIZE = ("quantize_fp8", "quantize_int8")  # a step of the 8-bit attentions, and no operation of its own
CASES = (*CALLS, *QUANTIZE)


def plan(device: torch.device) -> list[tuple[str, str, str]]:
    """(case, back end, source): kernels of csrc/ first."""
    backends = ("cuda", "triton") if device.type == "cuda" else ("triton", "reference")
    table, found = dispatch.implementations(), []
    for backend in backends:
        for case, call in CALLS.items():
            if backend in table[call.op]:
                found.append((case, backend, source_hash(backend, file_of(call.op, backend)) or "not built"))
        if backend == "cuda":
            found += [(case, backend, source_hash(backend, "quantize.cu") or "not built") for case in QUANTIZE]
    return found


# ---------------------------------------------------------------- one case, in its own process


def check(case: str, backend: str, device: torch.device) -> dict[str, float]:
    """Run a case. Returns {"error", "allowed"}; raises CannotRun."""
    torch.manual_seed(len(case))
    kind = case.removeprefix("quantize_")
    call = CALLS.get(case)
    function = dispatch.implementations()[call.op][backend] if call else attention.BACKENDS[f"cuda_{kind}"]
    if reason := dispatch.why_not(backend, device) or dispatch.lacks(function, device):
        raise CannotRun(reason)
    if call is None:
        return {"error": quantize(kind, device), "allowed": 1.0}
    args = call.args(device)
    poison(device)
    first, second = (outputs(function(*map(copy, args))) for _ in range(2))
    same = all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    return {"error": off(call.op, args, first) if same else float("inf"), "allowed": call.allowed}


def off(op: str, args: tuple[Any, ...], made: list[Tensor]) -> float:
    """Largest error of the outputs, against float64: relative, or for to_rgb in values of a byte."""
    args = tuple(one.double() if isinstance(one, Tensor) else one for one in args)
    if op == "to_rgb":
        wanted = (args[0].clamp(-1, 1) * 0.5 + 0.5) * 255
        return float((made[0].double() - wanted.permute(1, 2, 3, 0)).abs().max())  # bytes are never NaN
    right = outputs(dispatch.implementations()[op]["reference"](*args))
    errors = [(one.double() - exact).norm() / exact.norm() for one, exact in zip(made, right, strict=True)]
    return float(torch.stack(errors).nan_to_num(nan=torch.inf).max())


def quantize(kind: str, device: torch.device) -> float:
    """Error of queries, keys and values that were quantized and are read again, as a share of what rounding allows."""
    q, k, v = (random(device, 1, n, 2, 128) for n in (128, 256, 256))
    poison(device)
    launch = attention_gpu.quantize_cuda
    (q8, k8, v8), (scales, _, factors) = attention_gpu.quantized(
        q, k, v, None, False, lambda *given: launch(*given, kind=kind)
    )
    read = torch.int8 if kind == "int8" else torch.float8_e4m3fn
    blocks = (1, 2, 2, 128, 128)  # B, H, blocks, keys, D
    k64 = (k.double() - k.mean(1, dtype=torch.float32, keepdim=True).double()).transpose(1, 2).reshape(blocks)
    v64 = v.double().transpose(1, 2).reshape(blocks)
    pairs = [
        (q8.view(read).double() * scales.double()[..., None], q.double().transpose(1, 2), kind),
        (k8.view(read).double().reshape(blocks) * factors[..., 0].double()[..., None, None], k64, kind),
        # The keys of a block of values are in another order.
        ((v8.view(torch.float8_e4m3fn).double() * factors[..., 1].double().exp2()[..., None, None]).sort(-1).values,
         v64.transpose(-1, -2).sort(-1).values, "fp8"),
    ]  # fmt: skip
    return max(share_of_rounding(made, exact, of) for made, exact, of in pairs)


def share_of_rounding(made: Tensor, exact: Tensor, kind: str) -> float:
    """Largest error over the largest that rounding makes: half a step of int8, or of e4m3's 3 bits of fraction (there
    is a smallest step too)."""
    most = exact.abs().amax((-1, -2), keepdim=True)
    step = most / 127 / 2 if kind == "int8" else (exact.abs() / 16).clamp(min=most / 448 / 2**9)
    error = (made - exact).abs() / (1.01 * step)
    return float(error.nan_to_num(nan=torch.inf).max())


def poison(device: torch.device) -> None:
    """Freed memory full of NaN, for outputs that are not written whole."""
    for size in (2**14, 2**18, 2**22):
        torch.full((size,), torch.nan, device=device)


def outputs(made: Any) -> list[Tensor]:
    return list(made) if isinstance(made, tuple) else [made]


def copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


# ---------------------------------------------------------------- all of them


def run_case(case: str, backend: str, device: torch.device, seconds: float) -> dict[str, Any]:
    """Run a case in a process of its own. Returns {"ended", "seconds"} and error and allowed, or why it cannot run."""
    command = [sys.executable, __file__, case, "--backend", backend, "--device", device.type]
    env = {**os.environ, "TRITON_INTERPRET": "1"} if device.type == "cpu" else None
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log.txt")
        ended = run(command, seconds, log, env=env)
        said = tail(log)
    last = said.strip().splitlines()[-1:] or [""]
    told = json.loads(last[0]) if last[0].startswith("{") else {"said": said[-600:]}
    return {"ended": ended.how, "seconds": round(ended.seconds, 1), **told}


def one(case: str, backend: str, device: torch.device) -> int:
    """Run a case here and print its result as a line of JSON; 0 if it is right."""
    try:
        with torch.inference_mode():
            told: dict[str, Any] = check(case, backend, device)
    except CannotRun as reason:
        told = {"cannot": str(reason)}
    print(json.dumps(told), flush=True)
    return 0 if "cannot" in told or told["error"] <= told["allowed"] else 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"those alone: {', '.join(CASES)}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", help="this one alone, in this process")
    parser.add_argument("--seconds", type=float, default=20, help="in all (default: 20)")
    parser.add_argument("--each", type=float, help="limit of a case (default: three quarters of --seconds)")
    parser.add_argument("--again", action="store_true", help="what was right before too")
    args = parser.parse_args()
    device = torch.device(args.device)
    if unknown := set(args.cases) - set(CASES):
        parser.error(f"there is no case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    if args.backend:
        sys.exit(max(one(case, args.backend, device) for case in args.cases or CASES))
    sys.exit(everything(args, device))


def everything(args: argparse.Namespace, device: torch.device) -> int:
    """Run the cases side by side and record each; returns the exit status."""
    until, lock, each = time.monotonic() + args.seconds, threading.Lock(), args.each or 0.75 * args.seconds
    known = (result_of("smoke", device) or {}).get("cases", {})
    todo = [one for one in plan(device) if not args.cases or one[0] in args.cases]

    def run_and_save(case: str, backend: str, source: str) -> str:
        name, left = f"{case} {backend}", until - time.monotonic()
        before = known.get(name, {})
        if fine(before) and before["source"] == source and not args.again:
            return "right"
        if left < 1:
            return "no time"
        outcome = run_case(case, backend, device, min(each, left)) | {"source": source}
        if "stopped" in outcome["ended"] and left < each:
            return "no time"
        with lock:
            known[name] = outcome
            print(f"{name}: {described(outcome)}", flush=True)
            save("smoke", {}, device, cases=dict(sorted(known.items())))
        return "right" if fine(outcome) else "cannot" if "cannot" in outcome else "wrong"

    with ThreadPoolExecutor(JOBS) as pool:
        found = list(pool.map(lambda one: run_and_save(*one), todo))
    print(", ".join(f"{found.count(kind)} {kind}" for kind in ("right", "wrong", "cannot", "no time")))
    if "wrong" in found or "right" not in found and "no time" not in found:
        return 1
    return OUT_OF_TIME if "no time" in found else 0


def fine(outcome: dict[str, Any]) -> bool:
    """Whether a case ran and was right."""
    return outcome.get("ended") == FINE and "error" in outcome


def described(outcome: dict[str, Any]) -> str:
    if "cannot" in outcome:
        return f"cannot run: {outcome['cannot']}"
    if "error" not in outcome:
        return f"{outcome['ended']}\n{outcome['said']}"
    right = "right" if fine(outcome) else "WRONG"
    return f"{right}, off by {outcome['error']:.2e} of {outcome['allowed']:.2e}, {outcome['seconds']} s"


if __name__ == "__main__":
    main()
