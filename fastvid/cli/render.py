"""A plan as text, for `fastvid plan`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastvid.cli.progress import duration

PARTS = {
    "weights": "bytes_weights",
    "activations": "bytes_activations",
    "decoder": "bytes_decoder",
    "encoder": "bytes_encoder",
    "text's keys and values": "bytes_context",
    "latents": "bytes_latents",
    "frames": "bytes_frames",
    "CUDA graphs": "bytes_graphs",
}


def lines(plan: Any, model: str, videos: int = 1) -> Iterator[str]:
    """The lines of a plan: the video, the work, the time, the memory. videos: of a batch."""
    generated = f"{plan.model_frames} of {plan.model_width}x{plan.model_height}"
    output = f"{plan.num_frames} frames of {plan.width}x{plan.height} at {plan.fps:g} fps"
    yield _line("video", f"{output}; the model makes {generated}")
    if videos > 1:
        time = "" if plan.seconds is None else f", about {duration(videos * plan.seconds)} one after another"
        yield _line("batch", f"{videos} such videos{time}; what follows is of one")
    yield _line("model", f"{model}, {plan.dtype} on {plan.device}")
    windows = f"{plan.windows} window{'s' * (plan.windows != 1)} of up to {plan.tokens:,} tokens"
    yield _line("work", f"{windows}, {plan.steps} steps, {plan.model_calls} model calls")
    share = plan.flops_attention / plan.flops_denoise if plan.flops_denoise else 0
    yield _line("operations", f"{_flops(plan.flops_denoise)} of denoising, {share:.0%} of them attention")
    if plan.quality != "exact":
        yield _line("quality", plan.quality)
    for name, said in plan.levers.items():
        yield _line(name.replace("_", " "), said)
    if plan.parallel:
        efficiency = "" if plan.efficiency is None else f"; predicted efficiency of a step {plan.efficiency:.0%}"
        yield _line("ranks", f"shared by {plan.parallel}{efficiency}")
        yield _line("  why", plan.parallel_why)
        yield _line("  joined by", plan.link)
    if plan.seconds is not None:
        parts = [f"{name} {duration(spent)}" for name, spent in plan.seconds_parts.items() if spent]
        yield _line("time", f"about {duration(plan.seconds)} by {plan.rates} ({', '.join(parts)})")
    free = f"{size(plan.bytes_free)} are free"
    where = "memory" if plan.device.startswith("cpu") else "device memory"
    yield _line(where, f"{size(plan.bytes_device)} at the peak, weights included; {free}")
    for name, field in PARTS.items():
        count = getattr(plan, field)
        if name == "weights" and plan.bytes_host:
            stays = size(max(0, count - plan.bytes_host))
            yield _line(f"  {name}", f"{stays} all the time; the rest comes from the host when it is used")
        elif count:
            yield _line(f"  {name}", size(count))
    if plan.bytes_host:
        yield _line("host memory", f"{size(plan.bytes_host)} of weights, of {size(plan.bytes_weights)} in all")
    for name, held in plan.quantized.items():
        yield _line(name.replace("_", " "), held)
    yield _line("offload", "; ".join((plan.offload, *plan.choices)))
    if plan.decode_stripes > 1:
        yield _line("decoding", f"in {plan.decode_stripes} stripes of rows")


def _line(name: str, text: str) -> str:
    return f"{name:<24} {text}"


def size(count: int) -> str:
    """Formats bytes as GiB, MiB or KiB."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= factor:
            return f"{count / factor:.{1 if count < 100 * factor else 0}f} {unit}"
    return f"{count / 2**10:.0f} KiB"


def _flops(count: float) -> str:
    for unit, factor in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count / 1e6:.3g} MFLOP"
