"""Pipeline: a loaded model and its verbs. A thin layer over request, plan and session.

pipe = fastvid.load("embedded")
video = pipe.generate("a red circle moving right on a white background", seed=1)
video.save("out.mp4")
"""

from __future__ import annotations

import copy
import functools
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Unpack, cast

import numpy as np
from torch import Tensor, nn

from fastvid import checks
from fastvid.device.precision import Computed, computes, eager
from fastvid.engine import resume
from fastvid.engine.events import Event, Plan
from fastvid.engine.queue import RUNNING, Scheduler, Ticket
from fastvid.engine.resume import Resume
from fastvid.engine.session import PromptChanges, Session
from fastvid.media.video import Video
from fastvid.models.loaded import Model
from fastvid.pipeline import asynchronous, batches, load_arguments, running, steps, warmup
from fastvid.pipeline.calibrate import calibrate
from fastvid.pipeline.loras import change_loras
from fastvid.pipeline.prepare import (
    Prepared,
    estimate_of,
    files_in,
    given_again,
    make_request,
    plan_of,
    planned,
    prepare,
)
from fastvid.pipeline.request_warnings import warn_of_prompt, warn_of_prompts
from fastvid.pipeline.stream import Stream
from fastvid.pipeline.tensors import as_tensor
from fastvid.requests.arguments import checked, documented
from fastvid.requests.batch import is_batch
from fastvid.requests.options import (
    AnyOptions,
    BridgeOptions,
    Clip,
    EditOptions,
    ExtendOptions,
    FinalizeOptions,
    GenerateOptions,
    GivenAgain,
    ImageOptions,
    InterpolateOptions,
    Path,
    Shots,
    StoryboardOptions,
    UpscaleOptions,
)
from fastvid.requests.request import Request

__all__ = ["Pipeline", "Stream", "Video"]

CALLS: Mapping[str, Callable[..., Any]] = {
    "plan": plan_of,
    "embed": steps.embed,
    "encode": steps.encode,
    "decode": steps.decode,
    "describe": steps.describe,
    "inspect": steps.inspect,
    "calibrate": calibrate,
}


class Pipeline:
    """A model ready to run. Create one with `fastvid.load`. It keeps no state between requests.

    Any number of threads and tasks may send requests. They start first come, first served, at most `max_running` at
    once, and share the device round robin, step by step (see `fastvid.engine.queue`). Every verb has an async
    version: `await pipe.agenerate(...)`, `async for event in pipe.astream(...)`.

    A subclass whose model runs in other processes overrides `_variant`, `_run`, `_call`, `_resume`, `_set_loras`,
    `close` and `__repr__`; the verbs stay the same.
    """

    def __init__(self, model: Model, max_running: int = RUNNING) -> None:
        self._model = model
        self._set_up(max_running)

    def _set_up(self, max_running: int) -> None:
        self._ticket: Ticket | None = None
        self._scheduler = Scheduler(load_arguments.CHECKS["max_running"]("max_running", max_running))

    def __repr__(self) -> str:
        return f"<Pipeline {self._model.name:.60} on {self._model.device}>"

    # ------------------------------------------------------------ verbs

    @documented
    def generate(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> Video:
        """Make a video from a prompt, optionally with pictures.

        A picture is a file, a uint8 array [H, W, 3] or a Pillow image; a clip is a file, uint8 frames [F, H, W, 3], a
        Video, or a list of pictures. The last picture and keyframes come out unchanged, where the model takes them as
        latents (as the embedded one does). VACE models take frames of `video` one for one; without num_frames or
        seconds the result is as long as `video`. A mask is a file, or an array [F, H, W] or [H, W]: bool, or uint8 with
        0 and 255.

        `checkpoint` names a folder from which `resume` continues if the process ends early. It is removed when the
        video is done, and kept if the request fails or is cancelled.

        Args:
            prompt: what to show; may be empty.

        Raises:
            InvalidRequest: an option is out of range; the message names the nearest valid one.
            OutOfMemory: the request does not fit into memory.
            MediaError: a picture or clip cannot be read.
            PromptError: the prompt could not be expanded.
        """
        return self._video("generate", prompt=prompt, **options)

    @documented
    def image(self, prompt: str | None = None, **options: Unpack[ImageOptions]) -> Video:
        """Make a picture, up to 2048x2048: a video of one frame."""
        return self._video("image", prompt=prompt, **options)

    @documented
    def extend(self, video: Clip, prompt: str | None = None, **options: Unpack[ExtendOptions]) -> Video:
        """Continue a clip after its end, before its start, or on both sides. The result contains the clip.

        Args:
            video: a file, uint8 frames [T, H, W, 3], or a Video. Its frames are output unchanged.
            prompt: what to show; default: the prompt in the video's recipe.
        """
        return self._video("extend", video=video, prompt=prompt, **options)

    @documented
    def loop(self, video: Clip, prompt: str | None = None, **options: Unpack[BridgeOptions]) -> Video:
        """A clip, followed by a bridge of `seconds` or num_frames from its end back to its start."""
        return self._video("loop", video=video, prompt=prompt, **options)

    @documented
    def blend(self, a: Clip, b: Clip, prompt: str | None = None, **options: Unpack[BridgeOptions]) -> Video:
        """Join two clips by a bridge of `seconds` or num_frames. The second is converted to the size and frame rate
        of the first."""
        return self._video("blend", video=a, video_2=b, prompt=prompt, **options)

    @documented
    def edit(self, video: Clip, prompt: str | None = None, **options: Unpack[EditOptions]) -> Video:
        """Change a clip by a prompt.

        With a source_prompt the edit follows the difference of the two prompts (FlowEdit). With a size larger than the
        clip's, the area around it is generated (outpainting), with a default strength of 1.

        Args:
            video: a file, uint8 frames [T, H, W, 3], or a Video.
            prompt: what the result shows.
        """
        return self._video("edit", video=video, prompt=prompt, **options)

    @documented
    def storyboard(self, shots: Shots, **options: Unpack[StoryboardOptions]) -> Video:
        """A video of several shots, [(prompt, seconds), ...], each continuing the one before."""
        return self._video("storyboard", shots=shots, **options)

    @documented
    def finalize(self, draft: Clip, prompt: str | None = None, **options: Unpack[FinalizeOptions]) -> Video:
        """Make the final video of a draft (see `generate`): at full size, or at width and height, with the full
        number of steps. `strength` limits how much it changes."""
        return self._video("finalize", video=draft, prompt=prompt, **options)

    @documented
    def interpolate(self, video: Clip, prompt: str | None = None, **options: Unpack[InterpolateOptions]) -> Video:
        """Make frames between a clip's frames: factor times as many a second. Its own frames and its sound stay."""
        return self._video("interpolate", video=video, prompt=prompt, **options)

    @documented
    def upscale(self, video: Clip, prompt: str | None = None, **options: Unpack[UpscaleOptions]) -> Video:
        """Make a clip, or a picture, larger: in tiles that overlap where it exceeds what the model was trained on."""
        return self._video("upscale", video=video, prompt=prompt, **options)

    @eager
    def _video(self, verb: str, **options: Any) -> Video:
        if is_batch(options):
            return cast(Video, batches.videos(self, verb, options))  # a list, which the verbs' types do not tell
        return running.collect(self._start(verb, options, keep_frames=True, keep_latents=True), files_in(options))

    @documented
    def stream(
        self,
        prompt: str | None = None,
        *,
        verb: str = "generate",
        keep_latents: bool = True,
        **options: Unpack[AnyOptions],
    ) -> Stream:
        """Any verb, as events: Started, Step, Frames, Finished. Frames come out while later ones are still being made.

        The request is checked and planned before this returns. Nothing is computed until the first event is asked for.
        After Started the request may have to wait for others. On a GPU, decoding runs beside denoising if both fit;
        frames then come out one step later.

        A checkpoint is removed when the loop over the stream ends, not at Finished: if handling Finished fails, the
        request can still be resumed.

        Args:
            verb: "generate", "image", "extend", "loop", "blend", "edit", "storyboard", "finalize", "interpolate" or
                "upscale", with its options.
            keep_latents: whether Finished holds the latents. If False, memory does not grow with the video.
        """
        keep_latents = checks.flag("keep_latents", keep_latents)
        return self._start(verb, {"prompt": prompt, **options}, keep_frames=False, keep_latents=keep_latents)

    @eager
    def _start(self, verb: str, options: dict[str, Any], keep_frames: bool, keep_latents: bool) -> Stream:
        return self._run(make_request(verb, options, lambda: self._variant), keep_frames, keep_latents)

    # ------------------------------------------------------------ for services

    @documented
    def astream(
        self,
        prompt: str | None = None,
        *,
        verb: str = "generate",
        keep_latents: bool = True,
        **options: Unpack[AnyOptions],
    ) -> AsyncGenerator[Event, None]:
        """`stream` as an async generator: the same options and events, computed in a thread when they are pulled.

        Errors in the request are raised with the first event. Cancelling the task, or `aclose()`, stops the request
        before its next step, and returns after everything it held is freed.
        """
        ticket = self.new_ticket()
        arguments: dict[str, Any] = {"verb": verb, "keep_latents": keep_latents, **options}
        run = functools.partial(self.with_ticket(ticket).stream, prompt, **arguments)
        return asynchronous.events(ticket, run)

    agenerate = asynchronous.twin(generate)
    aimage = asynchronous.twin(image)
    aextend = asynchronous.twin(extend)
    aloop = asynchronous.twin(loop)
    ablend = asynchronous.twin(blend)
    aedit = asynchronous.twin(edit)
    astoryboard = asynchronous.twin(storyboard)
    afinalize = asynchronous.twin(finalize)
    ainterpolate = asynchronous.twin(interpolate)
    aupscale = asynchronous.twin(upscale)

    def new_ticket(self) -> Ticket:
        """A ticket for one request, with which it can be cancelled (see `fastvid.engine.queue`)."""
        return Ticket(self._scheduler)

    def with_ticket(self, ticket: Ticket) -> Pipeline:
        """A copy of this pipeline that runs its next request with this ticket."""
        other = copy.copy(self)
        other._ticket = ticket
        return other

    # ------------------------------------------------------------ without running

    @documented
    def plan(
        self,
        prompt: str | None = None,
        *,
        verb: str = "generate",
        estimate: bool = False,
        **options: Unpack[AnyOptions],
    ) -> Plan:
        """The cost of a request, without running it. The prompt may be left out.

        Args:
            verb: as for `stream`.
            estimate: also estimate its time, from this machine's rates. They are measured once (about 2 s).
        """
        request = planned(verb, prompt, {**options})
        again = estimate_of("estimate", estimate)
        return cast(Plan, self._call("plan", verb=request.verb, estimate=again, **request.arguments()))

    def warmup(self, sizes: Any = None, **options: Unpack[AnyOptions]) -> dict[str, float]:
        """Run what the first request of each size would pay for (compiling, tuning, CUDA graphs, primitives, memory),
        without making a video. Returns the seconds of each size.

        Args:
            sizes: one size or several: "832x480", (width, height), (width, height, frames), or a mapping of a verb's
                arguments, {"verb": "image", "size": "1024x1024"}; default: the model's default size.
            options: arguments that the requests will have, such as a solver or a LoRA, for all sizes. Pictures that
                the model needs may be left out; clips of verbs that work on one are needed.

        Raises InvalidRequest and OutOfMemory as the requests would, before anything is run. See docs/serving.md.
        """
        return self._warm(sizes, {**options})

    awarmup = asynchronous.twin(warmup)

    def embed(self, prompt: str) -> Tensor:
        """A prompt's text embeddings [1, L, text_dim], as `prompt_embeds=` takes them."""
        embeddings: Tensor = self._call("embed", checks.text("prompt", prompt))
        return embeddings

    def encode(self, frames: Any) -> Tensor:
        """Encode uint8 RGB frames [T, H, W, 3] to normalized latents [1, C, T', H/8, W/8], fp32; T is 4k + 1, T' is k
        + 1.

        H and W are multiples of the VAE's scale (8; 16 for Wan 2.2's 5B). Raises InvalidRequest for other sizes.
        """
        latents: Tensor = self._call("encode", as_tensor("frames", frames))
        return latents

    def decode(self, latents: Any) -> np.ndarray:
        """Decode normalized latents [1, C, T, h, w], such as `video.latents`, to uint8 RGB frames [4T - 3, 8h, 8w,
        3]."""
        frames: np.ndarray = self._call("decode", as_tensor("latents", latents))
        return frames

    def describe(self) -> dict[str, Any]:
        """How the model was loaded, and the back end of every operation."""
        return cast(dict[str, Any], self._call("describe"))

    def inspect(self) -> dict[str, Any]:
        """The contents of the checkpoint: parts, parameters, dtypes, preset."""
        return cast(dict[str, Any], self._call("inspect"))

    def calibrate(self, measured: str = "cache", **options: Any) -> dict[str, Any]:
        """Measure the model once for `cache="magcache"`, on a few videos of which none is kept, and write a file.

        measured: "cache". options: prompts (a list; default: some of fastvid's own), output (the file; default: where
        requests look), and options of `generate`. Returns the file's place and what it holds.
        """
        return cast(dict[str, Any], self._call("calibrate", checks.text("measured", measured), **options))

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    # ------------------------------------------------------------ with the model

    @property
    def transformer(self) -> nn.Module:
        """The transformer, of two the one for high noise: for torch.compile, see docs/performance.md."""
        return self._model.experts.modules[0]

    @property
    def transformer_2(self) -> nn.Module | None:
        """The transformer for low noise, if there are two."""
        return next(iter(self._model.experts.modules[1:]), None)

    @property
    def _variant(self) -> str:
        """The name of the model's preset."""
        return self._model.preset.name

    @computes
    def _call(self, name: str, *args: Any, **options: Any) -> Any:
        """Calls one of `CALLS`."""
        return CALLS[name](self._model, *args, **options)

    @computes
    def _run(self, request: Request, keep_frames: bool, keep_latents: bool) -> Stream:
        prepared = prepare(self._model, request, keep_frames)
        warn_of_prompts(self._model, request, prepared.job.request)
        arguments, settings = request.video_arguments(), request.checkpoint_options()
        saving = resume.begin(prepared.model, request.verb, arguments, prepared.recipe, settings, prepared.job.layout)
        return self._stream(prepared, keep_latents, saving)

    def resume(
        self,
        path: Path,
        *,
        keep_latents: bool = True,
        checkpoint_every: float | None = None,
        keep_checkpoint: bool = False,
        **given: Unpack[GivenAgain],
    ) -> Stream:
        """Continue the request whose checkpoint is at `path` (see `generate`), after its process has ended.

        All frames come out, from the first on, as they would have without the interruption: finished ones are decoded
        again, then the next step is computed. Steps continue their count; Finished.seconds are those of this process.

        Args:
            keep_latents: see `stream`.
            checkpoint_every, keep_checkpoint: see `generate`.
            given: the same pictures, clips and tensors, by the same names, if they were not passed as files. Files are
                read from the same paths.

        Raises:
            CheckpointError: there is no checkpoint, it is damaged, or the request is still running.
            InvalidRequest: the checkpoint was made with other weights, another version of fastvid or torch, another
                kind of device (on a CPU: another number of threads) or another dtype, or the inputs differ from the
                original ones; the message says which.
        """
        settings = {"checkpoint_every": checkpoint_every, "keep_checkpoint": keep_checkpoint}
        keep = checks.flag("keep_latents", keep_latents)
        return self._resume(checks.path("path", path), keep, checked(settings), given_again({**given}))

    @computes
    def _resume(self, path: str, keep_latents: bool, settings: dict[str, Any], given: dict[str, Any]) -> Stream:
        saved = resume.read(path)
        resume.check(saved, self._model)
        verb, options = resume.options(saved, given)
        request = make_request(verb, options, lambda: self._variant)
        prepared = prepare(self._model, request, layout=resume.layout_of(saved, self._model))
        resume.check_request(saved, prepared.recipe, prepared.model)
        resume.check_files(saved, self._model, prepared.job.timeline)
        prepared = replace(prepared, recipe=saved.about["recipe"])
        return self._stream(prepared, keep_latents, resume.open_saved(saved, self._model, settings))

    def set_loras(self, loras: Sequence[Any] = ()) -> None:
        """Replace the LoRAs by these, given as for `fastvid.load`. An empty list removes all.

        Changed weights of 16 and 32 bits are read again from the model's files, so nothing of earlier LoRAs is left.
        Quantized weights stay as they are, and LoRAs beside them. Finish running streams first: they would continue
        with the new weights. Raises as `fastvid.load` does; then nothing changes. LoRAs of one request: its `loras`.
        """
        self._set_loras(load_arguments.CHECKS["loras"]("loras", loras))

    @computes
    def _set_loras(self, loras: tuple[Any, ...]) -> None:
        self._model = change_loras(self._model, loras)

    def close(self) -> None:
        """End the processes of a pipeline on several ranks. Does nothing for a pipeline in this process."""

    def _stream(self, prepared: Prepared, keep_latents: bool, saving: Resume | None) -> Stream:
        ticket = self._ticket or self.new_ticket()
        changes = PromptChanges(functools.partial(warn_of_prompt, self._model))
        session = Session(prepared.model, prepared.job, ticket, keep_latents, saving, changes)
        events = Computed(running.events(prepared, session, saving), self._model.device)
        return Stream(events, ticket, changes if saving is None else None, prepared.job.request.verb)

    @computes
    def _warm(self, sizes: Any, options: dict[str, Any]) -> dict[str, float]:
        return warmup.run(self._model, self._ticket or self.new_ticket(), sizes, options)

    @computes
    def _fitting(self, request: Request, wanted: int) -> int:
        return batches.fitting(self._model, request, wanted)

    @computes
    def _run_together(self, requests: Sequence[Request], keep_frames: bool, keep_latents: bool) -> Any:
        """The numbered events of requests that differ in prompts and seed alone."""
        ticket = self._ticket or self.new_ticket()
        events = running.together(self._model, requests, ticket, keep_frames, keep_latents)
        return Stream(events, ticket, None, f"{len(requests)} requests")
