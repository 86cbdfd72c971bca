"""Warnings about requests that can be made, but may not show what is asked for."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fastvid import notices
from fastvid.checks import shown
from fastvid.distributed.mesh import Layout
from fastvid.engine.guidance import unused
from fastvid.engine.windows import window_columns
from fastvid.models.common.tokenizer import TextTokenizer
from fastvid.models.loaded import Model
from fastvid.models.wan.skyreels import FPS
from fastvid.planning.plan import largest_segment
from fastvid.requests.request import Request, Resolved
from fastvid.requests.timeline import Timeline, window_of

BEYOND = 1.2
"""A frame's area over the largest that the model was trained at: above this, things repeat or fall apart."""
BELOW = 0.2
"""The same under the smallest. A draft, which has a quarter of the area, gets no warning."""

MOST_NOISE = 60
"""Above this, SkyReels-V2's own script warns too (`generate_video_df.py`)."""


def warn_of_prompts(model: Model, request: Request, resolved: Resolved) -> None:
    """Warns of prompts that are empty, cut, or hold words that the model does not know, and of a negative prompt that
    nothing reads. Only what the caller wrote counts, not the preset's own negative prompt."""
    for name, prompt in _written(request, resolved):
        warn_of_prompt(model, prompt, name)
    _warn_of_second_scale(request, resolved)
    negative = request.negative_prompt is not None or request.negative_prompt_embeds is not None
    if negative and not resolved.guided(len(model.experts)):
        notices.warn(
            f"negative_prompt is not used: there is no guidance at guidance_scale={resolved.guidance_scale:g}; "
            "give one above 1"
        )


def _warn_of_second_scale(request: Request, resolved: Resolved) -> None:
    scale, second = resolved.guidance_scale, request.guidance_scale_2
    if second is None or second == 1:
        return
    if scale <= 1:
        notices.warn(
            f"guidance_scale_2={second:g} is not used: there is no guidance at guidance_scale={scale:g}; "
            "give one above 1"
        )
    elif second < 1:
        notices.warn(
            f"guidance_scale_2={second:g}: below 1 the second expert follows the negative prompt more than the prompt, "
            "as in diffusers; 1 turns its guidance off"
        )


def warn_of_forcing(model: Model, request: Resolved) -> None:
    """Warns of much noise on known frames, and of a frame rate that a model takes for another."""
    if (request.addnoise_condition or 0) > MOST_NOISE:
        notices.warn(
            f"addnoise_condition={request.addnoise_condition:g}: so much noise lets parts of a video differ; its "
            "authors recommend 20, and at most 50"
        )
    if model.transformer.config.inject_sample_info and request.fps not in FPS:
        notices.warn(
            f"fps={request.fps:g}: {model.preset.name} knows {FPS[0]} and {FPS[1]} frames a second; it takes this for "
            f"{FPS[1]}"
        )


def warn_of_guidance(
    model: Model, request: Request, resolved: Resolved, timeline: Timeline, sigmas: np.ndarray, layout: Layout
) -> None:
    """Warns of levers of guidance that the caller has named, and that are not used as asked."""
    segment = largest_segment(model, timeline)
    window = window_of(segment, window_columns(model, segment))
    for name, why in unused(model, resolved, sigmas, window, layout).items():
        if getattr(request, name) is not None:
            notices.warn(f"{name} is not used: {why}")
    fewer = resolved.guidance_interval is not None or resolved.guidance_every is not None
    if fewer and layout.guidance > 1:
        notices.warn(
            f"parallel={layout}: half of the ranks wait in the steps that need one velocity; guidance=1 is faster"
        )


def _written(request: Request, resolved: Resolved) -> Iterator[tuple[str, str]]:
    """(name, text) of each prompt."""
    if request.shots:
        yield from ((f"shots[{i}]", prompt) for i, (prompt, _) in enumerate(request.shots))
    elif resolved.prompt is not None and request.prompt_embeds is None:
        yield "prompt", resolved.prompt
    if request.source_prompt is not None:
        yield "source_prompt", request.source_prompt
    if request.negative_prompt:
        yield "negative_prompt", request.negative_prompt


def warn_of_prompt(model: Model, prompt: str, name: str = "prompt") -> None:
    """Warns of one prompt that is empty, cut, or holds unknown words. name: the argument's."""
    tokenizer = model.tokenizer
    if not isinstance(tokenizer, TextTokenizer):  # a model that is only planned with
        return
    if not prompt.strip():
        notices.warn(f"{name} is empty: the model shows what it likes; say what to show")
        return
    unknown, dropped = tokenizer.unknown_words(prompt), tokenizer.dropped(prompt)
    if unknown:
        words = ", ".join(map(shown, unknown[:20])) + (", ..." if len(unknown) > 20 else "")
        known = tokenizer.words()
        hint = f"it knows {', '.join(known)}" if known else "write it in other words"
        notices.warn(f"{name}: the model does not know {words}; {hint}")
    if dropped:
        notices.warn(
            f"{name}: the model reads {tokenizer.text_length} tokens; what comes after them is dropped, from "
            f"{shown(dropped[:60])} on; write less"
        )


def warn_of_size(model: Model, request: Resolved) -> None:
    """Warns of a frame much larger or smaller than those that the model was trained at."""
    trained = [(int(width), int(height)) for width, height in (size.split("x") for size in model.preset.sizes)]
    areas = [width * height for width, height in trained]
    area = request.width * request.height
    if not trained or min(areas) * BELOW <= area <= max(areas) * BEYOND:
        return
    nearest = min(trained, key=lambda size: _distance(size, (request.width, request.height)))
    notices.warn(
        f"{request.width}x{request.height} is {'larger' if area > max(areas) else 'smaller'} than what "
        f"{model.preset.name} was trained at; the nearest size that it was trained at is {nearest[0]}x{nearest[1]}"
    )


def _distance(one: tuple[int, int], other: tuple[int, int]) -> float:
    return sum(max(a, b) / min(a, b) for a, b in zip(one, other, strict=True))
