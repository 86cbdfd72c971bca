"""Pipeline: a loaded model and what can be asked of it. Thin: it hands a request from plan to engine to decoder.

pipe = fastvid.load("embedded")
video = pipe.generate("a red circle moving right on a white background", seed=1)
video.save("out.mp4")
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastvid
from fastvid import engine, pictures, pieces, plan
from fastvid.errors import Cancelled, InvalidRequest
from fastvid.events import Event, Finished, Frames, Started, Step
from fastvid.loading import Parts, change_loras, load_parts, read_checkpoint, read_loras
from fastvid.plan import Plan
from fastvid.precision import ieee_fp32
from fastvid.requests import Request, Resolved
from fastvid.sampling import (
    Denoise,
    Velocity,
    check_sigmas,
    denoiser,
    find_solver,
    guided,
    known,
    latent_noise,
    make_sigmas,
    switched,
    timesteps,
)
from fastvid.timeline import Timeline
from fastvid.video import Video

__all__ = ["Finished", "Frames", "Pipeline", "Started", "Step", "Stream", "Video", "inspect", "load"]


class Stream:
    """The events of one running request. Iterate over it; `cancel()`, from any thread, ends it with Cancelled."""

    def __init__(self, events: Iterator[Event], cancelled: threading.Event) -> None:
        self._events, self._cancelled = events, cancelled

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Event:
        return next(self._events)

    def cancel(self) -> None:
        """Stop before the next step or chunk; the iteration then raises fastvid.Cancelled."""
        self._cancelled.set()

    def close(self) -> None:
        """Stop at once and free what the request holds."""
        self._events.close()


@dataclass(frozen=True)
class Prepared:
    """A request that was checked and planned, with everything that belongs to it alone."""

    request: Resolved
    plan: Plan
    timeline: Timeline
    sigmas: np.ndarray
    recipe: dict[str, Any]


class Pipeline:
    """A model ready to run. Make one with `fastvid.load`. It keeps no state between requests."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def generate(self, prompt: str | None = None, **options: Any) -> Video:
        """Make a video from a prompt.

        Args:
            prompt: what to show. An empty one is allowed.
            options: negative_prompt, height, width (pixels) or size="832x480" or aspect and budget, num_frames or
                seconds, fps, seed, num_inference_steps, guidance_scale, guidance_scale_2 (low noise, in models with two
                experts; default: guidance_scale if that is given), flow_shift or sigmas, solver ("unipc", "euler",
                "dpm++"), image, last_image (the first and the last frame, in models that take them: a file, a uint8
                array [H, W, 3] or a Pillow image), latents (initial noise [1, C, T, h, w]), prompt_embeds and
                negative_prompt_embeds ([1, L, text_dim]). What is left out is as the model's recipe says.

        Raises:
            InvalidRequest: an option is out of range; the message names the nearest valid one.
            OutOfMemory: the request does not fit.
        """
        frames: list[np.ndarray] = []
        for event in self.stream(prompt, **options):
            if isinstance(event, Frames):
                frames.append(event.frames)
        # The loop only ends after Finished: everything else raises.
        return Video(np.concatenate(frames), event.fps, event.seed, event.latents, event.recipe)

    def stream(self, prompt: str | None = None, **options: Any) -> Stream:
        """Like `generate`, as events: Started, Step, Frames, Finished. Frames come out while later ones are decoded.

        The request is checked and planned before this returns; nothing is computed until the first event is asked for.
        """
        prepared, cancelled = self._prepare(prompt, options), threading.Event()
        return Stream(self._run(prepared, cancelled), cancelled)

    def plan(self, prompt: str | None = None, **options: Any) -> Plan:
        """What the request would cost, without running it. The prompt may be left out."""
        return self._prepare("" if prompt is None and "prompt_embeds" not in options else prompt, options).plan

    def embed(self, prompt: str) -> Tensor:
        """Text embeddings [1, L, text_dim] of a prompt, as `prompt_embeds=` takes them."""
        return pieces.embed(self._parts, prompt)

    def encode(self, frames: Any) -> Tensor:
        """Normalised latents [1, C, T', H/8, W/8], fp32, of uint8 RGB frames [T, H, W, 3]; T is 4k + 1, T' is k + 1.

        H and W are multiples of the VAE's scale (8; 16 for Wan 2.2's 5B). Raises InvalidRequest for other sizes.
        """
        return pieces.encode(self._parts, frames)

    def decode(self, latents: Any) -> np.ndarray:
        """Frames, uint8 RGB [4T - 3, 8h, 8w, 3], of normalised latents [1, C, T, h, w] such as `video.latents`."""
        return pieces.decode(self._parts, latents)

    def describe(self) -> dict[str, Any]:
        """What was loaded and what every operation runs on."""
        parts = self._parts
        return {
            "model": parts.model,
            "variant": parts.recipe.name,
            "device": str(parts.device),
            "dtype": str(parts.dtype).removeprefix("torch."),
            "backends": dict(parts.ops.bound),
            "reasons": dict(parts.ops.reasons),
            "loras": [list(pair) for pair in parts.loras],
            "parts": dict(parts.sources),
        }

    def inspect(self) -> dict[str, Any]:
        """What the checkpoint is: parts, parameters, types, recipe."""
        return self._parts.checkpoint.to_dict()

    def set_loras(self, loras: Sequence[Any] = ()) -> None:
        """Use these LoRAs, as `fastvid.load` takes them, in place of those that were loaded; none takes all away.

        What they change is read again from the model's files, so nothing of former ones is left. Finish running
        streams first: they go on with the new weights. Raises as `fastvid.load` does, and then nothing is changed.
        """
        self._parts = change_loras(self._parts, loras)

    # ------------------------------------------------------------ before running

    def _prepare(self, prompt: str | None, options: dict[str, Any]) -> Prepared:
        parts = self._parts
        request = pictures.read(Request.make(prompt=prompt, **options)).resolve(parts.recipe)
        pictures.check(parts, request)
        solver = request.solver
        sigmas = (
            make_sigmas(request.num_inference_steps, request.flow_shift, solver)
            if request.sigmas is None
            else check_sigmas(request.sigmas)
        )
        timeline = plan.lay_out(request, parts.vae.config)
        self._check_tensors(request, timeline)
        recipe = request.to_recipe(model=parts.model, version=fastvid.__version__, **parts.settings)
        return Prepared(request, self._plan(request, timeline, sigmas), timeline, sigmas, recipe)

    def _plan(self, request: Resolved, timeline: Timeline, sigmas: np.ndarray) -> Plan:
        parts = self._parts
        config, itemsize = parts.transformer.config, parts.dtype.itemsize

        def need(t: Timeline) -> plan.Cost:
            return plan.cost(t, config, parts.vae.config, itemsize)

        free = plan.available_bytes(parts.device)
        cost = need(timeline)
        if cost.total > free:
            plan.check_fits(cost, free, timeline, plan.most_frames(timeline, lambda t: need(t).total <= free))
        scales, times = request.guidance_scales(len(parts.experts)), timesteps(sigmas, request.solver)
        calls = sum(1 if scales[parts.experts.choose(t)] == 1 else 2 for t in times)
        tokens = plan.count_tokens(timeline, config)
        return Plan(
            height=timeline.height,
            width=timeline.width,
            num_frames=timeline.num_frames,
            model_height=timeline.made_height,
            model_width=timeline.made_width,
            model_frames=timeline.made_frames,
            fps=request.fps,
            latent_shape=timeline.latent_shape(config.out_channels),
            tokens=tokens,
            steps=len(sigmas),
            model_calls=calls,
            decode_chunk=plan.decode_chunk(timeline),
            flops_denoise=calls * plan.denoise_flops(tokens, parts.tokenizer.text_length, config),
            bytes_weights=parts.weight_bytes,
            bytes_activations=cost.activations,
            bytes_decoder=cost.decoder,
            bytes_latents=cost.latents,
            bytes_frames=cost.frames,
            bytes_free=free,
            device=str(parts.device),
            dtype=str(parts.dtype).removeprefix("torch."),
            backends=parts.ops.bound,
        )

    def _check_tensors(self, request: Resolved, timeline: Timeline) -> None:
        config = self._parts.transformer.config
        shape = (1, *timeline.latent_shape(config.out_channels))
        if request.latents is not None:
            _check_tensor("latents", request.latents, shape)
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            value = getattr(request, name)
            if value is not None:
                rows = value.shape[1] if len(value.shape) == 3 else self._parts.tokenizer.text_length
                _check_tensor(name, value, (1, max(1, int(rows)), config.text_dim))

    # ------------------------------------------------------------ running

    def _run(self, prepared: Prepared, cancelled: threading.Event) -> Iterator[Event]:
        request, timeline = prepared.request, prepared.timeline
        seconds = {"text": 0.0, "denoise": 0.0, "decode": 0.0}
        yield self._started(prepared)
        mark = time.perf_counter()
        denoise = self._denoiser(request, timeline)
        table = engine.whole_clip(prepared.sigmas, timeline.columns)
        latents = self._initial(request, timeline)
        seconds["text"] = time.perf_counter() - mark
        out, cache, start = [], None, 0
        walked = engine.walk(table, latents, find_solver(request.solver), denoise)
        mark = time.perf_counter()
        for row in _until(walked, cancelled):
            spent, mark = time.perf_counter() - mark, time.perf_counter()
            seconds["denoise"] += spent
            yield Step(row.row + 1, len(table), row.sigma, spent)
            if row.ready is None:
                continue
            out.append(row.ready)
            for chunk in _until(row.ready.split(prepared.plan.decode_chunk, dim=2), cancelled):
                mark = time.perf_counter()
                frames, cache = self._decode(chunk, cache, timeline, start)
                seconds["decode"] += time.perf_counter() - mark
                if len(frames):
                    yield Frames(start, frames)
                start += len(frames)
            mark = time.perf_counter()
        clean = torch.cat(out, dim=2)
        yield Finished(request.seed, request.num_frames, request.fps, clean, prepared.recipe, seconds)

    def _started(self, prepared: Prepared) -> Started:
        t = prepared.timeline
        return Started(
            plan=prepared.plan,
            seed=prepared.request.seed,
            num_frames=t.num_frames,
            height=t.height,
            width=t.width,
            fps=prepared.request.fps,
            total_steps=len(prepared.sigmas),
            recipe=prepared.recipe,
        )

    def _initial(self, request: Resolved, timeline: Timeline) -> Tensor:
        """The noise [1, C, T, h, w] that sampling starts from, fp32 on the device."""
        if request.latents is not None:
            return torch.as_tensor(request.latents).to(self._parts.device, torch.float32, copy=True)
        shape = timeline.latent_shape(self._parts.transformer.config.out_channels)
        return latent_noise(request.seed, shape).to(self._parts.device)

    @torch.no_grad()
    def _denoiser(self, request: Resolved, timeline: Timeline) -> Denoise:
        """The request's denoiser: guidance over the velocity for the prompt and for the negative prompt, of the expert
        that a noise level belongs to, with what is known of the video in its place."""
        given = pictures.prepare(self._parts, request, timeline)
        experts, solver = self._parts.experts, request.solver
        scales = request.guidance_scales(len(experts))
        texts = [self._embed(request.prompt, request.prompt_embeds)]
        if any(scale != 1 for scale in scales):
            texts.append(self._embed(request.negative_prompt, request.negative_prompt_embeds))
        velocities = []
        for number, scale in enumerate(scales):
            made = [self._velocity(number, text, solver, given) for text in texts]
            velocities.append(guided(made[0], made[-1], scale))
        chosen = switched(velocities, lambda sigma: experts.choose(timesteps(sigma.numpy(), solver).max()))
        if given.first is None:
            return denoiser(chosen)
        return known(denoiser(chosen), given.first, given.known(timeline.columns))

    def _embed(self, prompt: str | None, embeds: Any) -> Tensor:
        parts = self._parts
        if embeds is not None:
            return torch.as_tensor(embeds).to(parts.device, parts.dtype)
        with ieee_fp32():
            return parts.embed(prompt or "")

    def _velocity(self, number: int, text: Tensor, solver: str, given: pictures.Conditions) -> Velocity:
        """One expert's velocity for a text. What it makes of the text is made in its first call, when it has to be on
        the device anyway."""
        experts, context = self._parts.experts, []

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            times = torch.from_numpy(timesteps(given.levels(sigma).numpy(), solver)).to(x.device)
            with experts.use(number) as transformer, ieee_fp32():
                if not context:
                    context.append(transformer.prepare_context(text, given.embeds))
                return transformer(given.input(x), times[None], context[0])

        return velocity

    @torch.no_grad()
    def _decode(self, latents: Tensor, cache: Any, timeline: Timeline, start: int) -> tuple[np.ndarray, Any]:
        """The next latents to cropped uint8 frames [n, H, W, 3] from frame `start` on, and the decoder's new cache."""
        parts = self._parts
        with ieee_fp32():
            frames, cache = parts.vae.decode(latents.to(parts.vae_dtype), cache)
        rgb = timeline.crop(parts.ops.to_rgb(frames[0]), start)
        return rgb.contiguous().cpu().numpy(), cache


def _until(items: Any, cancelled: threading.Event) -> Iterator[Any]:
    """The items, as long as nobody cancelled: asked before each is computed."""
    source = iter(items)
    while True:
        if cancelled.is_set():
            raise Cancelled("the request was cancelled")
        try:
            item = next(source)
        except StopIteration:
            return
        yield item


def _check_tensor(name: str, value: Any, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != shape:
        raise InvalidRequest(f"{name} has shape {list(value.shape)}; for this request it must be {list(shape)}")
    tensor = torch.as_tensor(value)
    if not tensor.is_floating_point():
        raise InvalidRequest(f"{name} is {tensor.dtype}; it must be floating point, such as float32")
    if not bool(torch.isfinite(tensor).all()):
        raise InvalidRequest(f"{name} holds NaN or infinity; all values must be finite")


def load(
    model: str = "embedded",
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    backend: str = "auto",
    attention: str = "auto",
    loras: Sequence[Any] = (),
    parts: Mapping[str, str | Path] | None = None,
) -> Pipeline:
    """Load a model.

    Args:
        model: "embedded" (the small model that comes with the package), or a folder in diffusers' or in the original
            layout, or a transformer's single file, whose other parts are found in the folders beside it as ComfyUI has
            them, or a hub id (org/name, or org/name/path/to/file.safetensors), which is downloaded once into
            huggingface_hub's cache.
        device: "cuda", "cuda:1", "cpu"; the default is a GPU if there is one.
        dtype: "float32", "bfloat16" or "float16" for the transformer and the text encoder; the default is bfloat16 on a
            GPU and float32 on the CPU.
        backend, attention: what runs the operations (see `fastvid doctor`).
        loras: LoRA files, or (file, scale), merged into the transformer; in models with two into both, or with (file,
            scale, "high") or (file, scale, "low") into one; see `Pipeline.set_loras`.
        parts: where parts come from that the model does not have or that are to be others: names (transformer_2, vae,
            text_encoder, image_encoder, tokenizer) to files, folders or hub files; "base" names a whole folder that a
            single file takes everything else from.

    Raises:
        CheckpointError: the model is missing, broken or of an unsupported kind, or a LoRA does not fit it.
        InvalidRequest: an option that does not exist.
        BackendUnavailable: a back end or device asked for by name cannot run here.
    """
    options = {"device": device, "dtype": dtype, "backend": backend, "attention": attention}
    return Pipeline(load_parts(model, **options, loras=loras, parts=parts))


def inspect(model: str, loras: Sequence[Any] = (), parts: Mapping[str, str | Path] | None = None) -> dict[str, Any]:
    """What a checkpoint is, read from its configurations and file headers, without loading it; whether LoRAs fit it."""
    checkpoint = read_checkpoint(model, parts)
    described = [{**lora.to_dict(), "problems": checkpoint.lora_problems(lora)} for lora in read_loras(loras)]
    return checkpoint.to_dict() | ({"loras": described} if described else {})
