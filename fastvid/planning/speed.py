"""Estimates how long a request takes, from its FLOPs and this machine's measured speed.

`Rates` holds the seconds of linear layers, attention and convolutions at a few sizes. They are measured once, with the
functions that models call, and stored in the user's cache folder. Times between two sizes are interpolated on a log-log
scale; beyond the largest size the speed is constant; below the smallest size the time is constant. Norms, rotations,
loading weights and the text encoder are ignored.
"""

from __future__ import annotations

import contextlib
import json
import math
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastvid.device.devices import cpu_name
from fastvid.device.precision import computing
from fastvid.distributed import cost_model
from fastvid.distributed.cards import Card
from fastvid.distributed.cost_model import Work
from fastvid.distributed.links import device_of
from fastvid.distributed.mesh import Layout
from fastvid.engine.between import encoded_again
from fastvid.engine.decode import decode_chunk
from fastvid.engine.tiles import tiles_of
from fastvid.engine.windows import count_calls, window_columns
from fastvid.files import cache_folder
from fastvid.layers.attention import self_attention
from fastvid.layers.linear import Linear
from fastvid.layers.quantized import QuantizedLinear
from fastvid.models.loaded import CHANNELS, CONTROL, DRIVEN, Model, way_of
from fastvid.models.wan.config import WanTransformerConfig
from fastvid.models.wan.vae import WanVAE
from fastvid.ops.dispatch import Ops
from fastvid.ops.formats_rows import INT8, quantize_weight
from fastvid.ops.quantized import Spec
from fastvid.planning.levers import ALL, Share
from fastvid.planning.memory import Needs, count_tokens
from fastvid.requests.levers import small_steps
from fastvid.requests.request import Resolved
from fastvid.requests.timeline import Segment, Timeline, window_of

SIDE = 8  # height and width of the latents on which a VAE's FLOPs are counted
BUDGET = 0.6  # seconds to measure each kind of work
SHARES = 4  # each size is measured for at least BUDGET / SHARES seconds
RUNS = 3  # minimum of each size
LONG = 5e-3  # seconds; longer runs are assumed to use all threads
KINDS = ("linear", "attention", "convolution")
HERE = "this machine's rates"
Points = tuple[tuple[float, float], ...]  # (operations of a call, its seconds), ascending

# (rows, width); (tokens, heads, head_dim); (channels, frames, height, width).
LINEAR = ((80, 256), (256, 1024), (1560, 1536), (4096, 3072), (8192, 5120), (32768, 5120))
ATTENTION = ((80, 4, 64), (320, 8, 64), (1560, 12, 128), (8192, 24, 128), (32768, 40, 128))
CONVOLUTION = ((32, 4, 16, 16), (96, 2, 16, 16), (96, 4, 64, 64), (192, 4, 96, 96), (96, 4, 480, 832))


@dataclass(frozen=True)
class Rates:
    """Points of each kind of work: (floating point operations of a call, its seconds), ascending. source: whose.
    eight: of linear layers whose products are computed in 8 bits; empty where a model's are not."""

    linear: Points
    attention: Points
    convolution: Points
    source: str = HERE
    eight: Points = ()

    @property
    def layers(self) -> str:
        """The kind of work that linear layers of blocks are."""
        return "eight" if self.eight else "linear"

    def seconds(self, kind: str, flops: float, calls: float = 1) -> float:
        """Seconds of `calls` calls with `flops` operations each. kind: the name of a field."""
        return calls * interpolate(getattr(self, kind), flops)


def interpolate(points: Points, flops: float) -> float:
    """Seconds of a call with `flops` operations."""
    if flops <= points[0][0]:
        return points[0][1] if flops > 0 else 0.0
    for (less, fast), (more, slow) in pairwise(points):
        if flops <= more:
            share = math.log(flops / less) / math.log(more / less)
            return fast * (slow / fast) ** share
    return points[-1][1] * flops / points[-1][0]


# ---------------------------------------------------------------- work


@dataclass(frozen=True)
class Calls:
    """`count` calls of the transformer, in each of which `tokens` attend to `keys` tokens and `rows` of text. left: the
    share of that work which levers leave."""

    count: int
    tokens: int
    keys: int
    rows: int
    left: Share = ALL


def calls_of(model: Model, request: Resolved, segment: Segment, sigmas: np.ndarray, left: Share = ALL) -> Calls:
    """The number of model calls for a segment, and their sizes."""
    window = window_of(segment.seen, window_columns(model, segment))
    tokens = count_tokens(window, model.transformer.config)
    count = count_calls(model, segment, sigmas, request) * len(tiles_of(segment))
    return Calls(count, tokens, max(tokens, cached_tokens(model, segment)), model.tokenizer.text_length, left)


def stages_of(
    model: Model, request: Resolved, segment: Segment, sigmas: np.ndarray, left: Share = ALL
) -> tuple[Calls, ...]:
    """The model calls for a segment: of a progressive request those at half the size, and those at full size."""
    if segment.half is None:
        return (calls_of(model, request, segment, sigmas, left),)
    first, full = small_steps(request, len(sigmas)), replace(segment, half=None)
    request = replace(request, progressive=None)  # each stage by itself
    small = calls_of(model, request, segment.small, sigmas[:first], left)
    return small, calls_of(model, request, full, sigmas[first:], left)


def cached_tokens(model: Model, segment: Segment) -> int:
    """Tokens in the full KV cache of a causal model; 0 for other models."""
    if (rollout := model.preset.rollout) is None:
        return 0
    columns = min(rollout.window or segment.columns, segment.columns)
    return count_tokens(window_of(segment, columns), model.transformer.config)


def denoise_flops(call: Calls, config: WanTransformerConfig, control_layers: int = 0, face_layers: int = 0) -> float:
    """Floating point operations of one call. control_layers: layers of the control branch. face_layers: blocks that
    look at the few tokens of a face, by two projections.

    A layer with N tokens, K keys, width d, feed-forward f and L rows of text takes 2N(6d^2 + 2df) in linear layers,
    4NKd in self-attention and 4NLd in cross-attention.
    """
    n, d, f = call.tokens, config.dim, config.ffn_dim
    layer = 2 * n * (6 * d * d + 2 * d * f) + 4 * n * call.keys * d * call.left.attention + 4 * n * call.rows * d
    # The input of the control branch is projected once, its output in every layer.
    control = control_layers * layer + (control_layers + 1) * 2 * n * d * d if control_layers else 0
    return call.left.blocks * float(config.num_layers * layer + control + face_layers * 4 * n * d * d)


def attention_flops(call: Calls, config: WanTransformerConfig, control_layers: int = 0) -> float:
    """The part of `denoise_flops` that is attention."""
    keys = call.keys * call.left.attention + call.rows
    return call.left.blocks * (config.num_layers + control_layers) * 4.0 * call.tokens * keys * config.dim


@dataclass(frozen=True)
class Convolutions:
    """A VAE's floating point operations per pixel of a frame, and its number of convolutions per chunk."""

    flops: float
    count: int


@torch.no_grad()
def count_vae(vae: WanVAE, decode: bool = True) -> Convolutions:
    """Count the work of decoding or encoding. vae: with or without weights."""
    from torch.utils.flop_counter import FlopCounterMode  # which imports Triton, 0.1 s

    config = vae.config
    with torch.device("meta"):
        empty = type(vae)(config)
    side, frames = SIDE * config.spatial_scale, config.temporal_scale
    flops = []
    for latents in (2, 3):  # all latent frames after the first cost the same
        with FlopCounterMode(display=False) as counter:
            if decode:
                empty.decode(torch.empty(1, config.z_dim, latents, SIDE, SIDE, device="meta"))
            else:
                empty.encode(torch.empty(1, 3, frames * (latents - 1) + 1, side, side, device="meta"))
        flops.append(counter.get_total_flops())
    half = empty.decoder if decode else empty.encoder
    count = sum(isinstance(module, nn.Conv2d | nn.Conv3d) for module in half.modules())
    return Convolutions((flops[1] - flops[0]) / (side**2 * frames), count)


def frames_encoded(model: Model, segment: Segment) -> int:
    """Frames that are encoded for a segment. With a control branch: the kept and the changed frames, and the source."""
    if way_of(model) == CONTROL:
        return (2 + (segment.source is not None)) * segment.model_frames + segment.lead
    if way_of(model) == DRIVEN:
        return 2 * segment.model_frames + segment.lead  # what is known, and the pose
    config = model.transformer.config
    if way_of(model) == CHANNELS:  # a control's frames, and the known ones
        return segment.model_frames * ((config.in_channels - config.out_channels) // config.out_channels)
    if segment.source is not None:
        return segment.model_frames
    return segment.left + segment.right + len(segment.pictures)


# ---------------------------------------------------------------- estimates


def estimate(
    model: Model,
    timeline: Timeline,
    needs: Needs,
    calls: Sequence[Calls],
    work: Work,
    layout: Layout,
    rates: Rates,
    steps: int = 0,
) -> dict[str, Any]:
    """A plan's seconds, seconds_parts and efficiency. On several ranks the estimate covers only denoising. steps: of a
    window."""
    config, control = model.transformer.config, model.control_layers
    parts = {"denoise": sum(denoise_seconds(each, config, control, rates, model.face_layers) for each in calls)}
    share = None
    if layout.size > 1:
        share = efficiency(model, work, layout, max(calls, key=lambda each: each.tokens), rates)
        parts["denoise"] /= layout.size * share
    else:
        again = sum(encoded_again(segment, steps) for segment in timeline.segments)
        encoded = sum(frames_encoded(model, segment) for segment in timeline.segments) + again
        decoded = sum(segment.model_frames for segment in timeline.segments) + again
        window = needs.segment
        parts["encode"] = vae_seconds(model.vae, window, encoded, decode_chunk(window), rates, decode=False)
        parts["decode"] = vae_seconds(model.vae, window, decoded, needs.chunk, rates, decode=True)
    return {"seconds": sum(parts.values()), "seconds_parts": parts, "efficiency": share, "rates": rates.source}


def denoise_seconds(
    calls: Calls, config: WanTransformerConfig, control_layers: int, rates: Rates, face_layers: int = 0
) -> float:
    """Seconds of all calls."""
    d, n, layers = config.dim, calls.tokens, config.num_layers + control_layers
    linear = rates.seconds(rates.layers, 2.0 * n * d * d, 6) + rates.seconds(
        rates.layers, 2.0 * n * d * config.ffn_dim, 2
    )
    attention = calls.left.attention * rates.seconds("attention", 4.0 * n * calls.keys * d)
    attention += rates.seconds("attention", 4.0 * n * calls.rows * d)
    hints = rates.seconds("linear", 2.0 * n * d * d, control_layers + 1) if control_layers else 0.0
    faces = rates.seconds("linear", 2.0 * n * d * d, 2 * face_layers) if face_layers else 0.0
    return calls.count * calls.left.blocks * (layers * (linear + attention) + hints + faces)


def vae_seconds(vae: WanVAE, window: Segment, frames: int, chunk: int, rates: Rates, decode: bool) -> float:
    """Seconds of decoding or encoding `frames` frames of a window's size, `chunk` latent frames at a time."""
    if not frames:
        return 0.0
    work, pixels = count_vae(vae, decode), window.model_height * window.model_width
    at_once = window.temporal * chunk * pixels
    return frames * pixels / at_once * rates.seconds("convolution", work.flops * at_once / work.count, work.count)


def efficiency(model: Model, work: Work, layout: Layout, call: Calls, rates: Rates) -> float:
    """The parallel efficiency of a step in a layout, from this machine's rates and the links between ranks."""
    links, dim = model.links, model.transformer.config.dim
    linear, attention = 2.0 * call.tokens * dim**2, 4.0 * call.tokens * call.keys * dim
    device = cost_model.Device(
        "this", linear / rates.seconds(rates.layers, linear), attention / rates.seconds("attention", attention)
    )
    per_host = links.per_host or layout.size
    return cost_model.predict(work, layout, device, links.near, links.far, per_host).efficiency


# ---------------------------------------------------------------- rates of a card that is not here

CONVOLVED = 0.18  # of what is published: 0.275 PFLOP in 1.56 s, of a Wan 2.1 decoder on an H200 (TurboWan)


def assumed(card: Card, dtype: torch.dtype, vae_dtype: torch.dtype, eight: str | None = None) -> Rates:
    """What a card is assumed to reach, for models in these types; not measured. In fp32 without its matrix units.
    eight: the format in which linear layers multiply in 8 bits: they gain what the data sheet says that products do."""
    device = device_of(card)
    share = 1.0 if dtype.itemsize == 2 else card.fp32 / card.bf16
    convolution = CONVOLVED * 1e12 * (card.bf16 if vae_dtype.itemsize == 2 else card.fp32)
    rates = (device.linear * share, device.attention * share, convolution)
    linears, attentions, convolutions = (((rate * device.launch, device.launch),) for rate in rates)
    eights: Points = ()
    said = f"rates assumed from the data sheet of {card.name}, not measured"
    if eight is not None:
        rate = device.linear * (card.int8 if eight == INT8 else card.fp8) / card.bf16
        eights = ((rate * device.launch, device.launch),)
    return Rates(linears, attentions, convolutions, source=said, eight=eights)


# ---------------------------------------------------------------- rates in the cache folder


def find_rates(
    ops: Ops, device: torch.device, dtype: torch.dtype, again: bool = False, eight: str | None = None
) -> Rates:
    """This machine's rates, from the user's cache folder. Measures them (about 2 s) if they are missing or `again`.
    eight: the format in which linear layers multiply in 8 bits, if they do."""
    key = _key(ops, device, dtype) | ({} if eight is None else {"eight": eight})
    path = cache_folder() / f"rates-{sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}.json"
    if not again and (stored := _read(path, key)) is not None:
        return stored
    rates = measure(ops, device, dtype, eight)
    with contextlib.suppress(OSError):  # without a writable folder they are measured again next time
        path.parent.mkdir(parents=True, exist_ok=True)
        measured = {kind: getattr(rates, kind) for kind in kinds_of(key)}
        part = path.with_name(f"{secrets.token_hex(4)}.partial")
        part.write_text(json.dumps({"key": key, "rates": measured}, indent=1), encoding="utf-8")
        part.replace(path)
    return rates


def _key(ops: Ops, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    return {
        "version": 2,
        "device": torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        "threads": 0 if on_gpu else torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "attention": ops.bound["attention"],
        "choices": {op: [one.to_dict() for one in found] for op, found in ops.choices.items()},
    }


def _read(path: Path, key: dict[str, Any]) -> Rates | None:
    """The rates in a file; None if they are invalid or belong to another machine."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        points = [tuple((float(w), float(s)) for w, s in content["rates"][kind]) for kind in kinds_of(key)]
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return None
    valid = all(one and one == tuple(sorted(one)) and all(0 < n < math.inf for p in one for n in p) for one in points)
    if not valid or content.get("key") != key:
        return None
    measured: dict[str, Any] = dict(zip(kinds_of(key), points, strict=True))
    return Rates(**measured)


def kinds_of(key: dict[str, Any]) -> tuple[str, ...]:
    """The kinds of work in the rates of a key."""
    return (*KINDS, "eight") if "eight" in key else KINDS


# ---------------------------------------------------------------- measuring


def measure(ops: Ops, device: torch.device, dtype: torch.dtype, eight: str | None = None) -> Rates:
    """Measure this machine's rates, from small to large sizes, within the time budget."""
    own = [device] if device.type == "cuda" else []
    with computing(), torch.random.fork_rng(own):  # the caller's random numbers stay what they would have been
        return Rates(
            _points(_linear(device, dtype), device),
            _points(_attention(ops, device, dtype), device),
            _points(_convolution(ops, device), device),
            eight=_points(_eight(ops, device, dtype, eight), device) if eight else (),
        )


Case = tuple[float, Callable[[], Any]]  # floating point operations, and the call that does them


def _points(cases: Iterator[Case], device: torch.device) -> Points:
    end = time.perf_counter() + BUDGET
    points: list[tuple[float, float]] = []
    for flops, run in cases:
        points.append((flops, _time(run, device)))
        # The next size has about ten times the work.
        if time.perf_counter() + 10 * points[-1][1] * RUNS > end:
            break
    return tuple(points)


def _time(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest run, since other load can only slow it down. Short runs are timed in batches of 1 ms,
    since clocks are coarse."""
    run()
    count = max(1, min(1000, int(1e-3 / _clock(run, device, 1))))
    end = time.perf_counter() + BUDGET / SHARES
    seconds: list[float] = []
    while len(seconds) < RUNS or time.perf_counter() < end:
        seconds.append(_clock(run, device, count))
    return min(seconds)


def _clock(run: Callable[[], Any], device: torch.device, count: int) -> float:
    """Seconds of a run. For long CPU runs at most the CPU time per thread, which excludes other load on the machine;
    short runs may not use all threads."""
    _wait(device)
    start, used = time.perf_counter(), time.process_time()
    for _ in range(count):
        run()
    _wait(device)
    passed, used = time.perf_counter() - start, time.process_time() - used
    if device.type == "cpu" and passed > LONG * count:
        passed = min(passed, used / torch.get_num_threads())
    return passed / count


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _linear(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    for rows, width in LINEAR:
        layer = Linear(width, width, device=device, dtype=dtype)
        x = torch.randn(1, rows, width, device=device, dtype=dtype)
        yield 2.0 * rows * width**2, partial(layer, x)


def _eight(ops: Ops, device: torch.device, dtype: torch.dtype, format: str) -> Iterator[Case]:
    """Products in 8 bits, with the quantization of what they multiply."""
    for rows, width in LINEAR:
        spec = Spec.of(format, (width, width), eight_bit=True)
        layer = QuantizedLinear(spec, False, ops, dtype)
        layer.fill(quantize_weight(torch.randn(width, width, device=device, dtype=dtype), format), device)
        x = torch.randn(1, rows, width, device=device, dtype=dtype)
        yield 2.0 * rows * width**2, partial(layer, x)


def _attention(ops: Ops, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    for tokens, heads, width in ATTENTION:
        q, k, v = torch.randn(3, 1, tokens, heads, width, device=device, dtype=dtype)
        yield 4.0 * tokens**2 * heads * width, partial(self_attention, ops, q, k, v)


def _convolution(ops: Ops, device: torch.device) -> Iterator[Case]:
    """Convolutions of the VAE's residual blocks, in fp32."""
    for channels, frames, height, width in CONVOLUTION:
        make: dict[str, Any] = {"dtype": torch.float32, "device": device}
        x, past = (torch.randn(1, channels, t, height, width, **make) for t in (frames, 2))
        weight, bias = torch.randn(channels, channels, 3, 3, 3, **make) / 50, torch.zeros(channels, **make)
        gamma = torch.ones(channels, 1, 1, 1, **make)
        work = 2.0 * weight.numel() * frames * height * width
        yield work, partial(ops.vae_norm_silu_conv3d, x, past, gamma, weight, bias)
