"""Plans a request before it runs: sizes, model calls, FLOPs, memory and the choices made.

A request that does not fit into memory is refused; the error names the nearest request that fits.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np

from fastvid.checks import MIN_SIDE
from fastvid.device.devices import available_bytes
from fastvid.device.mapped import bytes_mapped
from fastvid.distributed.layout import agree
from fastvid.distributed.mesh import Layout
from fastvid.engine import decode, guidance
from fastvid.engine.events import Plan
from fastvid.engine.known_latents import lead_in
from fastvid.engine.tiles import words as tiling
from fastvid.engine.windows import spans, window_columns
from fastvid.models.description import quantized_text
from fastvid.models.loaded import CHANNELS, CONTROL, DRIVEN, Model, way_of
from fastvid.planning import levers, speed, step_cache
from fastvid.planning.layout import Choice, choose_layout, layouts_of, step_work
from fastvid.planning.memory import STRIPES, ModelFacts, Needs, count_tokens, refuse
from fastvid.planning.speed import Calls, Rates
from fastvid.requests.after import Between
from fastvid.requests.request import Resolved
from fastvid.requests.sizes import nearest_size, round_up
from fastvid.requests.timeline import Segment, Timeline, window_of

log = logging.getLogger("fastvid.plan")

SHRINK = 0.96
"""Of the area, from one size to the next that is tried where a request does not fit."""


def plan_request(
    model: Model,
    request: Resolved,
    timeline: Timeline,
    sigmas: np.ndarray,
    keep: bool = False,
    free: int | None = None,
    rates: Rates | None = None,
    layout: Layout | None = None,
) -> tuple[Plan, Layout]:
    """The plan of a request, and the layout in which ranks share it.

    keep: all frames stay in memory. free: available bytes on the device, None to query it; ranks use the minimum of
    all. rates: this machine's speed, to estimate the time. layout: None to choose one. Raises OutOfMemory if the
    request does not fit, InvalidRequest if the requested layout is impossible.
    """
    free = available_bytes(model.device, bytes_mapped(model.placement.mapped)) if free is None else free
    free, capacity = (agree(model.mesh, count) for count in (free, free + model.bytes_held))
    frames, needs, asked = timeline.num_frames, needs_of(model, request, timeline, keep), layout or model.layout
    needs = replace(needs, reused=step_cache.tensors(model, request, sigmas, needs.texts))
    window, work = needs.segment, step_work(model, request, needs.segment.seen)

    def taken(layout: Layout) -> int:
        return bytes_taken(model, shared_by(layout, model, request, needs), frames)

    layouts = layouts_of(model, request, timeline, asked)
    choice = choose_layout(model, work, layouts, asked is not None, taken, capacity)
    needs = shared_by(choice.layout, model, request, needs)
    needs = replace(needs, stripes=choose_stripes(model, needs, frames, capacity))
    needs = replace(needs, chunk=choose_chunk(model, needs, frames, capacity))
    check_fits(model, request, needs, frames, capacity)

    lever = levers.Asked(model, request, timeline, sigmas, window, choice.layout)
    left = levers.share(lever)
    calls = [each for part in timeline.segments for each in speed.stages_of(model, request, part, sigmas, left)]
    plan = Plan(
        **_sizes(model, request, timeline, window),
        decode_chunk=needs.chunk,
        **_arithmetic(model, calls, len(sigmas)),
        **_memory(model, needs, frames, capacity),
        **_ranks(model, choice),
        **(speed.estimate(model, timeline, needs, calls, work, choice.layout, rates, len(sigmas)) if rates else {}),
        bytes_free=free,
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        backends=model.ops.bound,
        quantized={part.name: quantized_text(part) for part in model.checkpoint.parts if part.quantized},
        quality=request.quality or "exact",
        levers=levers.words(lever),
    )
    log.info("offload=%s, decoded in %d stripe(s): %s", plan.offload, plan.decode_stripes, "; ".join(plan.choices))
    if plan.parallel:
        log.info("parallel=%s: %s", plan.parallel, plan.parallel_why)
    return plan, choice.layout


# ---------------------------------------------------------------- requirements


def needs_of(model: Model, request: Resolved, timeline: Timeline, keep: bool) -> Needs:
    """The quantities of a request that determine its memory. keep: all frames stay in memory."""
    largest = largest_segment(model, timeline)
    window = window_of(largest, window_columns(model, largest))
    return Needs(
        ModelFacts.of(model),
        window,
        texts=1 + request.guided(len(model.experts)) + (request.source_prompt is not None),
        pictures=_pictures(model, timeline),
        encoded=_encoded(timeline, window),
        frames=timeline.num_frames if keep else 0,
        cached=speed.cached_tokens(model, largest),
        bands=model.mesh.size,
    )


def shared_by(layout: Layout, model: Model, request: Resolved, needs: Needs) -> Needs:
    """The needs of a request in a layout."""
    needs = replace(needs, sharers=layout.sequence)
    if not guidance.is_paired(model, request, needs.segment, layout):
        return needs
    return replace(needs, batch=2, texts=needs.texts + 2)  # both prompts' keys and values once more, as a batch


def largest_segment(model: Model, timeline: Timeline) -> Segment:
    return max(timeline.segments, key=lambda segment: window_columns(model, segment))


def _pictures(model: Model, timeline: Timeline) -> int:
    """The number of pictures that condition the model, limited to what it supports."""
    if way_of(model) == DRIVEN:
        return 1  # the character
    pictures = max(len(segment.pictures) + bool(segment.left) + bool(segment.right) for segment in timeline.segments)
    return min(pictures, 2 if way_of(model) in (CHANNELS, CONTROL) else 1)


def _encoded(timeline: Timeline, window: Segment) -> int:
    """The most frames that the VAE encodes at once."""
    segments = timeline.segments
    known = max(max(one.left, one.right and one.right + lead_in(one)) for one in segments)
    sources = [one.source for one in segments if one.source is not None]
    at_once = [window.model_frames if isinstance(source, Between) else window.temporal for source in sources]
    return max([known, *at_once])


def with_frames(needs: Needs, frames: int) -> Needs:
    """The needs of the same request with at most `frames` frames."""
    window = needs.segment
    if frames < window.model_frames:
        window = window_of(window, -(-(frames - 1) // window.temporal) + 1 + window.lead)
    return replace(needs, segment=window, frames=min(needs.frames, frames))


def bytes_taken(model: Model, needs: Needs, frames: int) -> int:
    """Device bytes that a request of `frames` frames needs. On a CPU includes the host bytes: it is the same memory."""
    needs = with_frames(needs, frames)
    memory = needs.memory(model.offload)
    return memory.device + (memory.host + needs.cost().frames if model.device.type == "cpu" else 0)


def choose_stripes(model: Model, needs: Needs, frames: int, capacity: int) -> int:
    """The smallest number of stripes with which decoding fits; the largest if none does. On several ranks 1: they share
    the rows instead."""
    rows = needs.segment.model_height // needs.segment.spatial if model.mesh.size == 1 else 1
    possible = [count for count in STRIPES if count <= rows]
    fits = (n for n in possible if bytes_taken(model, replace(needs, stripes=n), frames) <= capacity)
    return next(fits, possible[-1])


def choose_chunk(model: Model, needs: Needs, frames: int, capacity: int) -> int:
    """The most latent frames per decoded chunk, of `decode_chunks`, with which decoding fits, if possible beside
    denoising; the least if none does, or if rows are decoded in stripes."""
    counts = decode.decode_chunks(needs.segment, model.device, needs.bands)
    if needs.stripes > 1 or len(counts) == 1:
        return counts[-1]
    options = {count: with_frames(replace(needs, chunk=count), frames) for count in counts}
    for taken in (_bytes_beside, lambda model, needs: bytes_taken(model, needs, frames)):
        if fitting := [count for count, each in options.items() if taken(model, each) <= capacity]:
            return fitting[0]
    return counts[-1]


def _bytes_beside(model: Model, needs: Needs) -> int:
    """Device bytes of decoding and denoising at once."""
    return needs.memory(model.offload).phases["denoising"] + needs.cost().decoder


def check_fits(model: Model, request: Resolved, needs: Needs, frames: int, capacity: int) -> None:
    """Raise OutOfMemory if a request needs more than `capacity`, naming the nearest number of frames or size that fits.

    frames: of the whole video. In verbs that add to a clip, num_frames counts the new ones, and the size is the clip's.
    """
    if (needed := bytes_taken(model, needs, frames)) > capacity:
        temporal = needs.segment.temporal
        length = request.segment_frame_length or frames
        most = most_frames(length, temporal, lambda count: bytes_taken(model, needs, count) <= capacity)
        adds = request.verb in ("extend", "loop", "blend")
        new = request.num_frames - (frames - most) if adds else most
        if request.is_animated and 2 * most > length:  # fewer frames would still be made in whole segments
            hint = f"the nearest that fits is segment_frame_length={most}"
        elif most and new > 0 and not request.is_animated:
            hint = f"the nearest that fits is num_frames={new}"
        elif size := largest_size(model, needs, frames, capacity):
            hint = f"the nearest size that fits is {size[0]}x{size[1]}" + ("; scale the clip to it" if adds else "")
        elif frames == 1:
            hint = "no size fits; take a smaller model"
        else:
            hint = "no size of as many frames fits; ask for fewer, or take a smaller model"
        refuse(with_frames(needs, frames), model.offload, needed, capacity, frames, hint)


def largest_size(model: Model, needs: Needs, frames: int, capacity: int) -> tuple[int, int] | None:
    """The largest smaller (width, height) of nearly the same shape that fits; None if there is none."""
    window, multiple = needs.segment, model.preset.spatial_multiple
    ratio, area = Fraction(window.width, window.height), window.width * window.height
    areas = (int(area * SHRINK**step) for step in range(1, 200) if area * SHRINK**step >= MIN_SIDE**2)
    sizes = list(dict.fromkeys(nearest_size(ratio, smaller, frames, multiple) for smaller in areas))

    def fits(size: tuple[int, int]) -> bool:
        sides: dict[str, Any] = {"width": size[0], "height": size[1]}
        sides |= {f"model_{name}": round_up(side, multiple) for name, side in sides.items()}
        smaller = replace(needs, segment=replace(window, **sides))
        smaller = replace(smaller, stripes=choose_stripes(model, smaller, frames, capacity))
        return bytes_taken(model, smaller, frames) <= capacity

    first = bisect_left(sizes, True, key=fits)
    return sizes[first] if first < len(sizes) else None


def most_frames(frames: int, temporal: int, fits: Callable[[int], bool]) -> int:
    """The largest temporal * k + 1 <= frames for which `fits` is true; 0 if there is none."""
    low, high = 0, (frames - 1) // temporal + 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits((middle - 1) * temporal + 1) else (low, middle - 1)
    return (low - 1) * temporal + 1 if low else 0


# ---------------------------------------------------------------- fields of the plan


def _sizes(model: Model, request: Resolved, timeline: Timeline, window: Segment) -> dict[str, Any]:
    config, segments = model.transformer.config, timeline.segments
    return {
        "height": window.height,
        "width": window.width,
        "num_frames": timeline.num_frames,
        "model_height": window.model_height,
        "model_width": window.model_width,
        "model_frames": sum(segment.model_frames - segment.left - segment.right for segment in segments),
        "fps": request.fps,
        "latent_shape": largest_segment(model, timeline).latent_shape(config.out_channels),
        "segments": len(segments),
        "windows": sum(len(spans(model, segment)) for segment in segments),
        "tokens": count_tokens(window.seen, config),
    }


def _arithmetic(model: Model, calls: Sequence[Calls], steps: int) -> dict[str, Any]:
    config, layers = model.transformer.config, (model.control_layers, model.face_layers)
    return {
        "steps": steps,
        "model_calls": sum(each.count for each in calls),
        "flops_denoise": sum(each.count * speed.denoise_flops(each, config, *layers) for each in calls),
        "flops_attention": sum(each.count * speed.attention_flops(each, config, layers[0]) for each in calls),
    }


def _memory(model: Model, needs: Needs, frames: int, capacity: int) -> dict[str, Any]:
    needs = with_frames(needs, frames)
    cost, memory = needs.cost(), needs.memory(model.offload)
    # Decoding in parallel with denoising has the highest peak. Several ranks decode together, so it does not apply.
    both = _bytes_beside(model, needs)
    beside = decode.faster_beside(model.device) and both <= capacity and model.mesh.size == 1
    choices = (
        memory.choices
        + tiling(needs.segment)
        + (("decoding runs beside denoising, on a stream of its own",) if beside else ())
    )
    return {
        "decode_stripes": needs.stripes,
        "bytes_weights": needs.model.sizes.total,
        "bytes_activations": cost.activations,
        "bytes_decoder": cost.decoder,
        "bytes_latents": cost.latents,
        "bytes_frames": cost.frames,
        "bytes_encoder": cost.encoder,
        "bytes_context": cost.context,
        "bytes_graphs": cost.graphs,
        "bytes_device": max(memory.device, both) if beside else memory.device,
        "bytes_host": memory.host,
        "offload": memory.offload,
        "choices": choices,
        "decode_beside": beside,
    }


def _ranks(model: Model, choice: Choice) -> dict[str, Any]:
    shared = choice.layout.size > 1
    return {
        "parallel": str(choice.layout) if shared else "",
        "layouts": choice.seconds,
        "parallel_why": choice.why(model.links.device.name),
        "link": str(model.links) if shared else "",
    }
