"""Pipeline: a loaded model and what can be asked of it. Thin: it hands a request from plan to engine to decoder.

pipe = fastvid.load("embedded")
video = pipe.generate("a red circle moving right on a white background", seed=1)
video.save("out.mp4")
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvid import checks
from fastvid.distributed.mesh import Layout
from fastvid.engine import resume
from fastvid.engine.events import Event, Finished, Frames, Plan, Started, Step
from fastvid.engine.queue import RUNNING, Scheduler, Ticket
from fastvid.engine.resume import Resume
from fastvid.engine.session import PromptChanges, Session
from fastvid.errors import InvalidRequest
from fastvid.media.video import Video
from fastvid.models.loaded import Model
from fastvid.pipeline import asynchronous, steps
from fastvid.pipeline.load import change_loras
from fastvid.pipeline.prepare import Prepared, prepare
from fastvid.planning.speed import find as find_rates
from fastvid.requests import prompts

AGAIN = "again"

__all__ = [
    "Finished",
    "Frames",
    "Pipeline",
    "Started",
    "Step",
    "Stream",
    "Video",
    "plan_of",
]

MAX_RUNNING = checks.whole(1, 1000)


class Stream:
    """The events of one running request. Iterate over it; `cancel()`, from any thread, ends it with Cancelled."""

    def __init__(self, events: Iterator[Event], ticket: Ticket, changes: PromptChanges | None = None) -> None:
        self._events, self._ticket, self._changes = events, ticket, changes

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Event:
        with self._ticket.pulled():
            return next(self._events)

    def change_prompt(self, prompt: str) -> None:
        """Show this from the next window, block or segment of frames on; from any thread. Frames that are begun, and a
        video of one window, stay as they are; a storyboard's next shot has its own prompt again. What was changed, and
        from which frame on, is in Finished.recipe as "changed_prompts".

        Raises InvalidRequest for what is no prompt, and for a request with a checkpoint, which could not be resumed.
        """
        if self._changes is None:
            raise InvalidRequest("a request with a checkpoint keeps its prompts; leave checkpoint out")
        self._changes.ask(checks.text("prompt", prompt))

    def cancel(self) -> None:
        """Stop before the next step or chunk, or while it waits; the iteration then raises fastvid.Cancelled."""
        self._ticket.cancel()

    def close(self) -> None:
        """Free what the request holds, once what it is at in other threads has ended. Not while it is iterated over."""
        self._events.close()


class Pipeline:
    """A model ready to run. Make one with `fastvid.load`. It keeps no state between requests.

    Requests may be made from many threads and tasks: they begin in the order in which they came, at most `max_running`
    at once, and take turns step by step (see `fastvid.engine.queue`). Every verb has an async twin: `await
    pipe.agenerate(...)`, `async for event in pipe.astream(...)`.
    """

    def __init__(self, parts: Model, max_running: int = RUNNING) -> None:
        self._model, self._ticket = parts, None
        self._scheduler = Scheduler(MAX_RUNNING("max_running", max_running))

    def generate(self, prompt: str | None = None, **options: Any) -> Video:
        """Make a video from a prompt, and perhaps from pictures.

        Args:
            prompt: what to show. An empty one is allowed.
            options: negative_prompt, height, width (pixels) or size="832x480" or aspect and budget, num_frames or
                seconds, fps, seed, num_inference_steps, guidance_scale, guidance_scale_2 (low noise, in models with two
                experts; default: guidance_scale if that is given), known_guidance_scale (in edits, and in windows in
                which some latents are known, from pictures, clips or the window before; the same default), flow_shift
                or sigmas, solver ("unipc", "euler", "dpm++", "redraw"), image, last_image, keyframes (the first and the
                last frame, and {frame: picture}: a file, a uint8 array [H, W, 3] or a Pillow image; those behind the
                first frame come out as they are), latents (initial noise [1, C, T, h, w]), prompt_embeds and
                negative_prompt_embeds ([1, L, text_dim]), schedule ("windows", one stretch of frames after another; or
                "staggered", diffusion forcing: frames come early), draft (True: half the size, fewer steps; see
                `finalize`).
                What is left out is as the model's recipe says.
                For VACE: video (depth, pose, or frames to keep: a file, uint8 [F, H, W, 3], or pictures; frames are
                taken one for one, and are as many as come out if num_frames is left out), mask (of the video: a file,
                bool or uint8 0 and 255 [F, H, W], or one picture for all frames; white is made by the model, black
                stays), reference_images (pictures of what the video shows; latents then have one frame more for each,
                in front), conditioning_scale (how much all of this counts: a number, or one for each control layer).
                expand_prompt=True has the prompt written out first (`fastvid.requests.prompts`; prompt_endpoint,
                prompt_model and prompt_key say by whom); the recipe holds both, as prompt and original_prompt.
                checkpoint="job.ckpt" (all verbs take it) keeps a folder from which `resume` goes on if the process ends
                before the video is done: after every step, but not more often than every checkpoint_every seconds
                (default 1). It is removed when the request is done (keep_checkpoint=True: not); one that failed or was
                cancelled keeps it.

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
            options: strength (0 to 1, the share of the steps that are run: how far it goes from the clip; default: as
                the model's recipe says, or 0.6), mask (white, or True, where it may change; a file, [T, H, W] or
                [H, W]; the other pixels stay as they are), source_prompt (what the clip shows now: the edit then
                follows the difference, FlowEdit, which keeps motion and layout), width and height (larger than the
                clip's: what is around it is made, with a strength of 1), and how to sample, as in `generate`.
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
        # Closed also where an exception's traceback keeps the stream: others wait for its turn to end.
        with contextlib.closing(self._start(verb, options, keep_frames=True, keep_latents=True)) as stream:
            for event in stream:
                if isinstance(event, Frames):
                    frames.append(event.frames)
        # The loop only ends after Finished: everything else raises.
        return Video(np.concatenate(frames), event.fps, event.seed, event.latents, event.recipe)

    def stream(
        self, prompt: Any = None, *, verb: str = "generate", keep_latents: bool = True, **options: Any
    ) -> Stream:
        """Any verb, as events: Started, Step, Frames, Finished. Frames come out while later ones are still made.

        The request is checked and planned before this returns; nothing is computed until the first event is asked for.
        After Started it may have to wait for others. On a GPU decoding runs beside denoising, if both fit: frames then
        come out with the step after that in which they were decoded.
        verb: "generate", "image", "extend", "loop", "blend", "edit", "storyboard" or "finalize", with its options.
        keep_latents: whether Finished has them; without, memory does not grow with the video.
        A checkpoint goes once what comes after Finished was asked for, that is when a loop over the stream ends: what
        the caller does with Finished may fail, and is safe.
        """
        options = options if prompt is None else {"prompt": prompt, **options}
        return self._start(verb, options, keep_frames=False, keep_latents=keep_latents)

    def resume(
        self,
        path: Any,
        *,
        keep_latents: bool = True,
        checkpoint_every: float | None = None,
        keep_checkpoint: bool = False,
        **given: Any,
    ) -> Stream:
        """Go on with the request whose checkpoint is at `path` (see `generate`), after its process is gone.

        All frames come out, from the first on, as they would have without the interruption: those that were made are
        decoded again, then the next step is done. Steps are counted on; Finished.seconds are those of this process.

        Args:
            given: pictures, clips and tensors that were not given as files, once more, by the same names. Files are
                found where they were.
            keep_latents: see `stream`. checkpoint_every, keep_checkpoint: see `generate`.

        Raises:
            CheckpointError: there is no checkpoint there, or it is damaged, or the request is still running.
            InvalidRequest: it was made with other weights, another version of fastvid or torch, on another kind of
                device (on a CPU: with another number of threads) or in another precision, or what is given is not what
                was given then; the message says which.
        """
        saved = resume.read(path)
        resume.check(saved, self._model)
        prepared = self._prepare(*resume.options(saved, given), layout=resume.layout_of(saved, self._model))
        resume.check_request(saved, prepared.recipe)
        prepared = replace(prepared, recipe=saved.about["recipe"])
        said = {"checkpoint_every": checkpoint_every, "keep_checkpoint": keep_checkpoint}
        return self._stream(prepared, keep_latents, resume.go_on(saved, self._model, said))

    def _start(self, verb: str, options: dict[str, Any], keep_frames: bool, keep_latents: bool) -> Stream:
        said, options = resume.split(options)
        options = prompts.expanded(options, self._model.preset.name, verb)
        prepared = self._prepare(verb, options, keep_frames)
        return self._stream(
            prepared,
            keep_latents,
            resume.begin(self._model, verb, options, prepared.recipe, said, prepared.job.layout),
        )

    def _stream(self, prepared: Prepared, keep_latents: bool, saving: Resume | None) -> Stream:
        ticket, changes = self._ticket or self.new_ticket(), PromptChanges()
        events = self._run(prepared, ticket, keep_latents, saving, changes)
        return Stream(events, ticket, changes if saving is None else None)

    # ------------------------------------------------------------ for services

    async def astream(self, prompt: Any = None, **options: Any) -> AsyncIterator[Event]:
        """`stream` as an async generator: the same options and events, made in a thread as they are asked for.

        What is wrong with the request is raised with the first event. Cancelling the task, or `aclose()`, stops the
        request before its next step; when that is done, all that it held is free.
        """
        ticket = self.new_ticket()
        run = functools.partial(self.with_ticket(ticket).stream, prompt, **options)
        async with contextlib.aclosing(asynchronous.events(ticket, run)) as events:
            async for event in events:
                yield event

    agenerate = asynchronous.twin(generate)
    aimage = asynchronous.twin(image)
    aextend = asynchronous.twin(extend)
    aloop = asynchronous.twin(loop)
    ablend = asynchronous.twin(blend)
    aedit = asynchronous.twin(edit)
    astoryboard = asynchronous.twin(storyboard)
    afinalize = asynchronous.twin(finalize)

    def new_ticket(self) -> Ticket:
        """A ticket for one more request, with which it can be stopped (see `fastvid.engine.queue`)."""
        return Ticket(self._scheduler)

    def with_ticket(self, ticket: Ticket) -> Pipeline:
        """This pipeline, for the one request that has this ticket."""
        other = copy.copy(self)
        other._ticket = ticket
        return other

    # ------------------------------------------------------------ without running

    def plan(
        self, prompt: str | None = None, *, verb: str = "generate", estimate: bool = False, **options: Any
    ) -> Plan:
        """What a request would cost, without running it. The prompt may be left out. estimate: also how long it takes,
        by this machine's rates, which are measured (2 s) if that was not done before."""
        return plan_of(self._model, prompt, verb, options, estimate=estimate)

    def embed(self, prompt: str) -> Tensor:
        """Text embeddings [1, L, text_dim] of a prompt, as `prompt_embeds=` takes them."""
        return steps.embed(self._model, prompt)

    def encode(self, frames: Any) -> Tensor:
        """Normalised latents [1, C, T', H/8, W/8], fp32, of uint8 RGB frames [T, H, W, 3]; T is 4k + 1, T' is k + 1.

        H and W are multiples of the VAE's scale (8; 16 for Wan 2.2's 5B). Raises InvalidRequest for other sizes.
        """
        return steps.encode(self._model, frames)

    def decode(self, latents: Any) -> np.ndarray:
        """Frames, uint8 RGB [4T - 3, 8h, 8w, 3], of normalised latents [1, C, T, h, w] such as `video.latents`."""
        return steps.decode(self._model, latents)

    def describe(self) -> dict[str, Any]:
        """What was loaded and what every operation runs on."""
        parts = self._model
        return {
            "model": parts.model,
            "variant": parts.preset.name,
            "device": str(parts.device),
            "dtype": str(parts.dtype).removeprefix("torch."),
            "vae_dtype": str(parts.vae_dtype).removeprefix("torch."),
            "backends": dict(parts.ops.bound),
            "reasons": dict(parts.ops.reasons),
            "loras": [list(pair) for pair in parts.loras],
            "offload": parts.offload,
            "cuda_graphs": parts.graphs_why,
            "parallel": parts.settings.get("parallel", "1"),
            "parts": dict(parts.sources),
        }

    def inspect(self) -> dict[str, Any]:
        """What the checkpoint is: parts, parameters, types, recipe."""
        return self._model.checkpoint.to_dict()

    def set_loras(self, loras: Sequence[Any] = ()) -> None:
        """Use these LoRAs, as `fastvid.load` takes them, in place of those that were loaded; none takes all away.

        What they change is read again from the model's files, so nothing of former ones is left. Finish running
        streams first: they go on with the new weights. Raises as `fastvid.load` does, and then nothing is changed.
        """
        self._model = change_loras(self._model, loras)

    def close(self) -> None:
        """End the processes of a pipeline on several ranks. There is nothing to do for one in this process."""

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    # ------------------------------------------------------------ before running

    def _prepare(
        self, verb: str, options: dict[str, Any], keep_frames: bool = False, layout: Layout | None = None
    ) -> Prepared:
        return prepare(self._model, verb, options, keep_frames, layout=layout)

    # ------------------------------------------------------------ running

    def _run(
        self,
        prepared: Prepared,
        ticket: Ticket,
        keep_latents: bool,
        saving: Resume | None,
        changes: PromptChanges,
    ) -> Iterator[Event]:
        with saving or contextlib.nullcontext():
            yield from self._events(prepared, Session(self._model, prepared.job, ticket, keep_latents, saving, changes))

    def _events(self, prepared: Prepared, session: Session) -> Iterator[Event]:
        request, timeline = prepared.job.request, prepared.job.timeline
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
        with session.ticket.admitted():
            yield from session.run()
        clean = torch.cat(session.latents, dim=2) if session.keep_latents else None
        changed = {"changed_prompts": [list(pair) for pair in session.changes.taken]} if session.changes.taken else {}
        recipe = prepared.recipe | changed
        yield Finished(request.seed, timeline.num_frames, request.fps, clean, recipe, session.seconds)


def plan_of(
    parts: Model,
    prompt: str | None,
    verb: str,
    options: dict[str, Any],
    *,
    estimate: bool | str,
    free: int | None = None,
    keep_frames: bool = True,
) -> Plan:
    others = (*prompts.OPTIONS, *resume.OPTIONS)
    options = {name: value for name, value in options.items() if name not in others}
    if "prompt_embeds" not in options and verb != "storyboard":
        options["prompt"] = prompt or ""
    rates = find_rates(parts.ops, parts.device, parts.dtype, again=estimate == AGAIN) if estimate else None
    return prepare(parts, verb, options, keep_frames, free=free, rates=rates).plan
