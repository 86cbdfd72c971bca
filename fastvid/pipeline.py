"""Pipeline: a loaded model and what can be asked of it. Thin: it hands a request from plan to engine to decoder.

pipe = fastvid.load("embedded")
video = pipe.generate("a red circle moving right on a white background", seed=1)
video.save("out.mp4")
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvid import pieces, prompts
from fastvid.errors import InvalidRequest
from fastvid.events import Event, Finished, Frames, Started, Step
from fastvid.loading import Parts, change_loras, load_parts, outline, read_checkpoint, read_loras
from fastvid.plan import Plan
from fastvid.preparing import Prepared, prepare
from fastvid.rates import find as find_rates
from fastvid.session import Session
from fastvid.video import Video

AGAIN = "again"
CUDA_TAKES = 2**30  # bytes of a card: an allowance for its context and libraries

__all__ = [
    "Blueprint",
    "Finished",
    "Frames",
    "Pipeline",
    "Started",
    "Step",
    "Stream",
    "Video",
    "blueprint",
    "inspect",
    "load",
]


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


class Pipeline:
    """A model ready to run. Make one with `fastvid.load`. It keeps no state between requests."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def generate(self, prompt: str | None = None, **options: Any) -> Video:
        """Make a video from a prompt, and perhaps from pictures.

        Args:
            prompt: what to show. An empty one is allowed.
            options: negative_prompt, height, width (pixels) or size="832x480" or aspect and budget, num_frames or
                seconds, fps, seed, num_inference_steps, guidance_scale, guidance_scale_2 (low noise, in models with two
                experts; default: guidance_scale if that is given), flow_shift or sigmas, solver ("unipc", "euler",
                "dpm++", "redraw"), image, last_image, keyframes (the first and the last frame, and {frame: picture}: a
                file, a uint8 array [H, W, 3] or a Pillow image), latents (initial noise [1, C, T, h, w]), prompt_embeds
                and negative_prompt_embeds ([1, L, text_dim]), draft (True: half the size, fewer steps; see `finalize`).
                What is left out is as the model's recipe says.
                For VACE: video (depth, pose, or frames to keep: a file, uint8 [F, H, W, 3], or pictures; frames are
                taken one for one, and are as many as come out if num_frames is left out), mask (of the video: a file,
                bool or uint8 0 and 255 [F, H, W], or one picture for all frames; white is made by the model, black
                stays), reference_images (pictures of what the video shows; latents then have one frame more for each,
                in front), conditioning_scale (how much all of this counts: a number, or one for each control layer).
                expand_prompt=True has the prompt written out first (`fastvid.prompts`; prompt_endpoint, prompt_model
                and prompt_key say by whom); the recipe holds both, as prompt and original_prompt.

        Raises:
            InvalidRequest: an option is out of range; the message names the nearest valid one.
            OutOfMemory: the request does not fit.
            PromptError: the prompt could not be expanded.
        """
        return self._video("generate", prompt=prompt, **options)

    def image(self, prompt: str | None = None, **options: Any) -> Video:
        """Make a picture, up to 2048x2048: a video of one frame. Options as `generate` takes them."""
        return self._video("image", prompt=prompt, **options)

    def extend(self, video: Any, prompt: str | None = None, **options: Any) -> Video:
        """A clip, and what comes after it, or before it, or on both sides.

        Args:
            video: a file, uint8 frames [T, H, W, 3], or a Video. Its frames come out as they are.
            prompt: what to show; left out, that of the video's own recipe.
            options: direction ("after", "before", "both"), seconds or num_frames to add on each side (default: a
                second), and how to sample, as in `generate`.
        """
        return self._video("extend", video=video, prompt=prompt, **options)

    def loop(self, video: Any, prompt: str | None = None, **options: Any) -> Video:
        """A clip, and a bridge of `seconds` or num_frames that leads from its end back to its start."""
        return self._video("loop", video=video, prompt=prompt, **options)

    def blend(self, a: Any, b: Any, prompt: str | None = None, **options: Any) -> Video:
        """A clip, a bridge of `seconds` or num_frames, and another clip, which is brought to the first one's size and
        rate."""
        return self._video("blend", video=a, video_2=b, prompt=prompt, **options)

    def edit(self, video: Any, prompt: str | None = None, **options: Any) -> Video:
        """A clip made anew after a prompt.

        Args:
            video: a file, uint8 frames [T, H, W, 3], or a Video.
            prompt: what it shall show.
            options: strength (0 to 1, the share of the steps that are run: how far it goes from the clip),
                mask (white, or True, where it may change; a file, [T, H, W] or [H, W]; the other pixels stay as they
                are), source_prompt (what the clip shows now: the edit then follows the difference, FlowEdit, which
                keeps motion and layout), width and height (larger than the clip's: what is around it is made), and how
                to sample, as in `generate`.
        """
        return self._video("edit", video=video, prompt=prompt, **options)

    def storyboard(self, shots: Any, **options: Any) -> Video:
        """A video of several shots, [(prompt, seconds), ...], each going on from the one before."""
        return self._video("storyboard", shots=shots, **options)

    def finalize(self, draft: Any, prompt: str | None = None, **options: Any) -> Video:
        """A draft (see `generate`) at its full size, or at width and height, with all steps of `strength`."""
        return self._video("finalize", video=draft, prompt=prompt, **options)

    def _video(self, verb: str, **options: Any) -> Video:
        frames: list[np.ndarray] = []
        for event in self._start(verb, options, keep_frames=True, keep_latents=True):
            if isinstance(event, Frames):
                frames.append(event.frames)
        # The loop only ends after Finished: everything else raises.
        return Video(np.concatenate(frames), event.fps, event.seed, event.latents, event.recipe)

    def stream(
        self, prompt: Any = None, *, verb: str = "generate", keep_latents: bool = True, **options: Any
    ) -> Stream:
        """Any verb, as events: Started, Step, Frames, Finished. Frames come out while later ones are still made.

        The request is checked and planned before this returns; nothing is computed until the first event is asked for.
        verb: "generate", "image", "extend", "loop", "blend", "edit", "storyboard" or "finalize", with its options.
        keep_latents: whether Finished has them; without, memory does not grow with the video.
        """
        options = options if prompt is None else {"prompt": prompt, **options}
        return self._start(verb, options, keep_frames=False, keep_latents=keep_latents)

    def _start(self, verb: str, options: dict[str, Any], keep_frames: bool, keep_latents: bool) -> Stream:
        options = prompts.expanded(options, self._parts.recipe.name, verb)
        prepared, cancelled = self._prepare(verb, options, keep_frames), threading.Event()
        return Stream(self._run(prepared, cancelled, keep_latents), cancelled)

    def plan(
        self, prompt: str | None = None, *, verb: str = "generate", estimate: bool = False, **options: Any
    ) -> Plan:
        """What a request would cost, without running it. The prompt may be left out. estimate: also how long it takes,
        by this machine's rates, which are measured (2 s) if that was not done before."""
        return _plan(self._parts, prompt, verb, options, estimate=estimate)

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
            "offload": parts.offload,
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

    def _prepare(self, verb: str, options: dict[str, Any], keep_frames: bool = False) -> Prepared:
        return prepare(self._parts, verb, options, keep_frames)

    # ------------------------------------------------------------ running

    def _run(self, prepared: Prepared, cancelled: threading.Event, keep_latents: bool) -> Iterator[Event]:
        job, session = prepared.job, Session(self._parts, prepared.job, cancelled, keep_latents)
        request, timeline = job.request, job.timeline
        yield Started(
            plan=prepared.plan,
            seed=request.seed,
            num_frames=timeline.num_frames,
            height=prepared.plan.height,
            width=prepared.plan.width,
            fps=request.fps,
            total_steps=session.total_steps,
            recipe=prepared.recipe,
        )
        yield from session.run()
        clean = torch.cat(session.latents, dim=2) if keep_latents else None
        yield Finished(request.seed, timeline.num_frames, request.fps, clean, prepared.recipe, session.seconds)


def _plan(
    parts: Parts,
    prompt: str | None,
    verb: str,
    options: dict[str, Any],
    *,
    estimate: bool | str,
    free: int | None = None,
    keep_frames: bool = True,
) -> Plan:
    options = {name: value for name, value in options.items() if name not in prompts.OPTIONS}
    if "prompt_embeds" not in options and verb != "storyboard":
        options["prompt"] = prompt or ""
    rates = find_rates(parts.ops, parts.device, parts.dtype, again=estimate == AGAIN) if estimate else None
    return prepare(parts, verb, options, keep_frames, free=free, rates=rates).plan


class Blueprint:
    """A model without its weights, to plan with. Make one with `fastvid.blueprint`."""

    def __init__(self, parts: Parts, free: int | None = None) -> None:
        self._parts, self._free = parts, free

    def plan(
        self,
        prompt: str | None = None,
        *,
        verb: str = "generate",
        estimate: bool | str = False,
        keep_frames: bool = True,
        **options: Any,
    ) -> Plan:
        """What a request would cost. The prompt may be left out.

        estimate: also how long it takes, by this machine's rates, which are measured (2 s) if that was not done before;
        "again": in any case. keep_frames: all frames stay in memory, as with `generate`; False: as with `stream`.
        Raises InvalidRequest, MediaError, and OutOfMemory if it does not fit.
        """
        if estimate and self._free is not None:
            raise InvalidRequest("estimate: nothing is known of another card's rates; leave device_memory out, or it")
        given = {"estimate": estimate, "free": self._free, "keep_frames": keep_frames}
        return _plan(self._parts, prompt, verb, options, **given)


def blueprint(
    model: str = "embedded",
    *,
    device_memory: int | None = None,
    **options: Any,
) -> Blueprint:
    """A model to plan with: nothing but configurations and file headers are read.

    Args:
        model: as `load` takes it, but nothing is downloaded; or the name of a published model, such as
            "wan2.1-t2v-14b", without any files.
        device_memory: bytes, of a card that is not here; all but 1 GiB of it, for CUDA itself, can be taken.
        options: device, dtype, backend, attention, loras, offload and parts, as `load` takes them.

    Raises as `load` does.
    """
    free = None if device_memory is None else max(0, device_memory - CUDA_TAKES)
    return Blueprint(outline(model, **options, free=free), free)


def load(
    model: str = "embedded",
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    backend: str = "auto",
    attention: str = "auto",
    loras: Sequence[Any] = (),
    offload: str = "auto",
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
        offload: which weights are in host memory while they are not used. "none"; "text": those of the encoders, and of
            two experts the other one; "blocks": those, and the blocks of transformer and text encoder, two of which are
            on the device at a time; "auto": the least with which what the model makes by default fits. On the CPU,
            which has but one memory, "auto" is "none", and the others cost memory instead.
        parts: where parts come from that the model does not have or that are to be others: names (transformer_2, vae,
            text_encoder, image_encoder, tokenizer) to files, folders or hub files; "base" names a whole folder that a
            single file takes everything else from.

    Raises:
        CheckpointError: the model is missing, broken or of an unsupported kind, or a LoRA does not fit it.
        InvalidRequest: an option that does not exist.
        BackendUnavailable: a back end or device asked for by name cannot run here.
    """
    given = {"device": device, "dtype": dtype, "backend": backend, "attention": attention}
    return Pipeline(load_parts(model, **given, loras=loras, offload=offload, parts=parts))


def inspect(model: str, loras: Sequence[Any] = (), parts: Mapping[str, str | Path] | None = None) -> dict[str, Any]:
    """What a checkpoint is, read from its configurations and file headers, without loading it; whether LoRAs fit it."""
    checkpoint = read_checkpoint(model, parts)
    described = [{**lora.to_dict(), "problems": checkpoint.lora_problems(lora)} for lora in read_loras(loras)]
    return checkpoint.to_dict() | ({"loras": described} if described else {})
