"""Records which operations a model calls, by running it on the meta device with `ops` that write calls down.

So the classes of calls come from the model itself: one step of the transformer, the text's keys and values, the first
and a later chunk of the VAE in both directions, and the solver's step.

Shapes: C channels, T latent frames, h/w latent height and width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastvid.device.precision import computing
from fastvid.engine.decode import decode_chunk
from fastvid.engine.windows import window_columns
from fastvid.models.loaded import CHANNELS, CONTROL, DRIVEN, LoadOptions, Model, way_of
from fastvid.models.wan.vae import CPU_CHUNK
from fastvid.ops import dispatch, reference, shapes, vae_gpu
from fastvid.ops.dispatch import Ops
from fastvid.pipeline.load import outline
from fastvid.pipeline.prepare import planned
from fastvid.pipeline.verbs import lay_out, rules_of
from fastvid.planning.memory import count_tokens
from fastvid.requests.request import Resolved
from fastvid.requests.timeline import Segment, window_of
from fastvid.sampling.guidance import Velocities
from fastvid.sampling.sigmas import find_solver
from fastvid.tuning.calls import Call, cost, like, named

STEPS = 3  # of the solver, until its history is full
PICTURE_TOKENS = 257  # of CLIP, for one picture


class Recorder:
    """Operations that record their calls and forward to the reference. times: how often what is called now happens in a
    request."""

    def __init__(self) -> None:
        self.times, self._inside = 1.0, ""
        self.calls: dict[tuple[str, str, str], Call] = {}
        functions = {op: self._recording(op) for op in dispatch.implementations()}
        self.ops = Ops(functions, dict.fromkeys(functions, "recording"), dict.fromkeys(functions, ""))

    def _recording(self, op: str) -> Callable[..., Any]:
        function = getattr(reference, op)

        def record(*args: Any, **kwargs: Any) -> Any:
            outer, self._inside = self._inside, op
            out = function(*args, **kwargs)
            self._inside = outer
            if op == "to_rgb" and outer:  # of a convolution, whose result is channels-last
                args = (args[0].permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),)
            self._add(op, args, kwargs, out)
            return out

        record.op = op  # type: ignore[attr-defined]
        return record

    def _add(self, op: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        given = {name: like(value) for name, value in named(op, args, kwargs).items()}
        kind, dtype = shapes.shape_class(op, args, kwargs), shapes.dtype_of(op, args)
        call = Call(op, dtype, kind, given, self.times, *cost(op, given, out))
        before = self.calls.get(call.name)
        if before is not None:  # the larger one stands for the class
            larger = max(before, call, key=lambda one: (one.flops, one.bytes))
            call = replace(larger, count=before.count + call.count)
        self.calls[call.name] = call


@dataclass(frozen=True)
class Subject:
    """What is tuned for: a model at a size. size: (width, height); None: the model's own, and so are frames."""

    model: str
    size: tuple[int, int] | None = None
    frames: int | None = None

    @property
    def title(self) -> str:
        size = "" if self.size is None else " {}x{}".format(*self.size)
        return f"{self.model}{size}" + ("" if self.frames is None else f", {self.frames} frames")


def record(subject: Subject, options: LoadOptions) -> list[Call]:
    """The classes of calls of a request for a subject's video. Raises as `fastvid.blueprint` does."""
    with computing():
        model = outline(subject.model, options)
        request = request_of(model, subject)
        segment = lay_out(request, rules_of(model, request)).segments[0]
        window = window_of(segment, window_columns(model, segment))
        recorder = Recorder()
        _record_transformer(recorder, model, request, window)
        _record_solver(recorder, model, request, window)
        _record_vae(recorder, model, segment)
    return list(recorder.calls.values())


def request_of(model: Model, subject: Subject) -> Resolved:
    """A request for the subject's video."""
    size = {} if subject.size is None else {"width": subject.size[0], "height": subject.size[1]}
    frames = {} if subject.frames is None else {"num_frames": subject.frames}
    return planned("generate", None, {"solver": model.preset.solver, **size, **frames}).resolve(model.preset)


def _record_transformer(recorder: Recorder, model: Model, request: Resolved, window: Segment) -> None:
    """One call of the transformer, and the keys and values of its text."""
    transformer, config, guided = model.transformer, model.transformer.config, 1 + (request.guidance_scale != 1)
    rollout, way = model.preset.rollout, way_of(model)
    C, T, h, w = window.latent_shape(config.out_channels)
    T -= model.takes_reference  # whose tokens stand in front
    columns = T if rollout is None else min(T, rollout.frames_per_block)
    known = _empty(1, config.in_channels - C, columns, h, w) if way in (CHANNELS, DRIVEN) else None
    _rebind(transformer, recorder.ops)
    text, pictures, control = _empty(1, model.tokenizer.text_length, config.text_dim, dtype=model.dtype), None, {}
    if config.image_dim:
        pictures = _empty(1, config.pos_embed_seq_len or PICTURE_TOKENS, config.image_dim, dtype=model.dtype)
    if way == CONTROL:
        control = {
            "control": _empty(1, cast(Any, transformer).vace_config.vace_in_channels, columns, h, w, dtype=model.dtype)
        }
    if model.takes_reference:
        control = {"reference": _empty(1, C, h, w, dtype=model.dtype)}
    if way == DRIVEN:
        face = _empty(1, 3, 1, model.face_side, model.face_side, dtype=model.dtype)
        control = {"pose": _empty(1, C, columns - 1, h, w, dtype=model.dtype), "face": face}
    recorder.times = guided
    context = transformer.prepare_context(text, pictures, **control)
    recorder.times = guided * steps_of(request) * math.ceil(T / columns)
    transformer(_empty(1, C, columns, h, w), torch.tensor([500.0]), context, known=known)
    if rollout is not None:  # what the cache holds, on average half of the window and at most all of it
        tokens = count_tokens(window, config)
        q, k = (
            _empty(1, n, config.num_attention_heads, config.attention_head_dim, dtype=model.dtype)
            for n in (tokens * columns // T, tokens)
        )
        recorder.times *= config.num_layers
        recorder.ops.attention(q, k, k)


def steps_of(request: Resolved) -> int:
    return len(request.sigmas) if request.sigmas is not None else int(request.num_inference_steps)


def _record_solver(recorder: Recorder, model: Model, request: Resolved, window: Segment) -> None:
    """The solver's steps until it has a full history; each later one is like the last of them."""
    solver = find_solver(request.solver)
    if solver.fused is None:
        return
    solver = replace(solver, operation=recorder.ops.solver_step)
    shape = 1, *window.latent_shape(model.transformer.config.out_channels)
    x, uncond = _empty(*shape), None if request.guidance_scale == 1 else _empty(*shape)
    state, columns = solver.init(), torch.ones(shape[2], dtype=torch.float64)
    for step in range(STEPS):
        velocities = Velocities(_empty(*shape), uncond, float(request.guidance_scale))
        recorder.times = 1 if step + 1 < STEPS else max(1, steps_of(request) - STEPS + 1)
        sigma, after = (columns * (0.9 - 0.2 * number) for number in (step, step + 1))
        x, state = solver.fused_step(x, velocities, sigma, after, state)


def _record_vae(recorder: Recorder, model: Model, segment: Segment) -> None:
    vae, config = model.vae, model.vae.config
    _rebind(vae, recorder.ops)
    vae_gpu.channels_last(vae)  # as activations are in a real run, on CPUs and GPUs
    space, time = config.spatial_scale, config.temporal_scale
    h, w = segment.model_height // space, segment.model_width // space
    chunk = decode_chunk(segment)
    if model.device.type == "cpu":
        chunk = min(chunk, max(1, CPU_CHUNK // (h * w * space**2 * config.widest * time)))
    size, encodes, cache = (h * space, w * space), way_of(model) in (CHANNELS, CONTROL, DRIVEN), None
    for count, recorder.times in _chunks(segment.columns, chunk):
        _, cache = vae.decode_rgb(_empty(1, config.z_dim, count, h, w), cache)
    cache, kind = None, model.placement.vae_dtype
    for count, times in _chunks(segment.columns, chunk):
        recorder.times = times if encodes else 1.0
        frames = time * count - (time - 1 if cache is None else 0)
        _, cache = vae.encode(_empty(1, 3, frames, *size, dtype=kind), cache)


def _chunks(columns: int, size: int) -> list[tuple[int, int]]:
    """(latent frames, how often) of the first chunk, of those like the second, and of the rest."""
    whole, rest = divmod(columns, size)
    chunks = [(size, 1), (size, whole - 1), (rest, 1)] if whole else [(rest, 1)]
    return [(count, times) for count, times in chunks if count and times]


def _rebind(module: nn.Module, ops: Ops) -> None:
    for part in module.modules():
        if hasattr(part, "ops"):
            part.ops = ops  # type: ignore[assignment]


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
