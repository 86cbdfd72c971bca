"""Lays out each verb's request as a timeline, and checks whether the model supports it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from fastvid.errors import InvalidRequest
from fastvid.models.loaded import CHANNELS, Model, way_of
from fastvid.models.preset import REFUSED
from fastvid.requests import forcing, timeline
from fastvid.requests.arguments import VERBS
from fastvid.requests.request import Request, Resolved
from fastvid.requests.timeline import Rules, Segment, Stretch, Timeline


def rules_of(model: Model, request: Resolved | None = None) -> Rules:
    """The sizes and lengths that a model can generate. A model of diffusion forcing takes its windows from the
    request."""
    preset, vae, window, context = model.preset, model.vae.config, model.preset.window, model.preset.context
    if request is not None and request.base_num_frames is not None and request.overlap_history is not None:
        counts = request.base_num_frames, request.overlap_history
        window, context = (forcing.columns(count, preset.temporal) for count in counts)
    return Rules(
        spatial=vae.spatial_scale,
        temporal=preset.temporal,
        multiple=preset.spatial_multiple,
        window=window,
        overlap=preset.overlap,
        context=context,
        block=preset.rollout.frames_per_block if preset.rollout else 1,
        picture_in_block=preset.rollout is not None and preset.rollout.picture_in_block,
        carries=preset.carries,
        picture_behind=preset.forcing is not None,
        references_lead=not model.takes_reference,
    )


def lay_out(request: Resolved, rules: Rules) -> Timeline:
    """The timeline of a request."""
    stretch = Stretch(
        num_frames=request.num_frames,
        height=request.height,
        width=request.width,
        pictures=request.known_pictures,
        prompts=_prompts(request),
        lead=len(request.reference_images or ()) if rules.references_lead else 0,
    )
    return _LAYOUTS[request.verb](request, stretch, rules)


def _prompts(request: Resolved) -> tuple[tuple[int, int], ...]:
    """(first frame, prompt number) of each prompt."""
    if not request.shots:
        return ((0, 0),)
    start, prompts = 0.0, []
    for number, (_, seconds) in enumerate(request.shots):
        prompts.append((round(start * request.fps), number))
        start += seconds
    return tuple(prompts)


def _generate(request: Resolved, stretch: Stretch, rules: Rules) -> Timeline:
    if request.is_animated:
        return timeline.generate(replace(stretch, lead=1), _segment_rules(request, rules))  # the character's column
    return timeline.generate(stretch, rules)


def _segment_rules(request: Resolved, rules: Rules) -> Rules:
    """The rules of a driven model for the segments that a request asks for."""
    length, seen = request.segment_frame_length, request.prev_segment_conditioning_frames
    assert length is not None and seen is not None
    columns, context = ((frames - 1) // rules.temporal + 1 for frames in (length, seen))
    return replace(rules, window=columns, context=context, whole=True)


def _extend(request: Resolved, stretch: Stretch, rules: Rules) -> Timeline:
    return timeline.extend(request.video, request.num_frames, request.direction or "after", stretch, rules)


def _loop(request: Resolved, stretch: Stretch, rules: Rules) -> Timeline:
    return timeline.loop(request.video, request.num_frames, stretch, rules)


def _blend(request: Resolved, stretch: Stretch, rules: Rules) -> Timeline:
    return timeline.blend(request.video, request.video_2, request.num_frames, stretch, rules)


def _edit(request: Resolved, stretch: Stretch, rules: Rules) -> Timeline:
    return timeline.generate(replace(stretch, source=request.video), rules)


_LAYOUTS: Mapping[str, Callable[[Resolved, Stretch, Rules], Timeline]] = {
    "generate": _generate,
    "image": _generate,
    "storyboard": _generate,
    "extend": _extend,
    "loop": _loop,
    "blend": _blend,
    "edit": _edit,
    "finalize": _edit,
    "interpolate": _edit,
    "upscale": _edit,
}


# ---------------------------------------------------------------- what the model supports


def patterns_of(segment: Segment, request: Resolved) -> set[str]:
    """The patterns of known frames (fields of `Patterns`) in a segment."""
    patterns = set()
    if segment.left and segment.right:
        patterns.add("both_ends")
    elif segment.right:
        patterns.add("suffix")
    elif segment.left:
        patterns.add("first" if segment.left == 1 else "prefix")
    frames = set(segment.pictures)
    if frames == {0}:
        patterns.add("first")
    elif frames:
        patterns.add("both_ends" if frames <= {0, segment.num_frames - 1} and 0 in frames else "keyframe")
    if segment.source is not None and request.mask is not None:
        patterns.add("spatial_mask")
    return patterns


def check(model: Model, request: Resolved, layout: Timeline) -> None:
    """Raises InvalidRequest for inputs that the model does not support, or requires but does not get."""
    name, supported = model.preset.name, model.preset.patterns
    for segment in layout.segments:
        for pattern in sorted(patterns_of(segment, request)):
            if getattr(supported, pattern) == REFUSED:
                names = ("first", "prefix", "suffix", "both_ends", "keyframe")
                allowed = [p for p in names if getattr(supported, p) != REFUSED]
                raise InvalidRequest(
                    f"{request.verb}: {name} cannot take {_WORDS[pattern]}; it can take "
                    + (", ".join(_WORDS[p] for p in allowed) or "text alone")
                )
    if request.schedule == "staggered":
        _check_staggered(model, request, layout)
    _check_forcing(request, layout)
    if request.known_guidance_scale is not None and model.preset.rollout is not None:
        raise InvalidRequest(
            f"known_guidance_scale: {name} has known frames in its cache, beside every block; use guidance_scale"
        )
    if way_of(model) == CHANNELS and not model.preset.pictures_optional:
        _check_channels(model, request, layout.segments[0])


_WORDS = {
    "first": "a first picture (image=)",
    "prefix": "a clip to go on from",
    "suffix": "a clip to lead up to",
    "both_ends": "what stands before and after",
    "keyframe": "pictures in between",
    "spatial_mask": "a region to keep (mask=)",
}


def _check_staggered(model: Model, request: Resolved, layout: Timeline) -> None:
    """Raises InvalidRequest unless the staggered schedule is possible: its noise levels rise from left to right, so
    frames may be known on the left only."""
    if model.preset.patterns.staggered == REFUSED or model.preset.rollout is not None:
        raise InvalidRequest(f"schedule='staggered': {model.preset.name} has one level in all frames; leave it out")
    if len(layout.segments) > 1 or any(
        s.right or s.source is not None or set(s.pictures) - {0} for s in layout.segments
    ):
        raise InvalidRequest(
            "schedule='staggered': only a first picture or a clip to go on from may be known; leave it out"
        )


def _check_forcing(request: Resolved, layout: Timeline) -> None:
    """Raises InvalidRequest for blocks that do not go with the rest of a request."""
    lag, block, causal = request.ar_step or 0, request.causal_block_size, bool(request.causal_attention)
    if request.schedule == "staggered" and (lag or causal):
        raise InvalidRequest(
            f"schedule='staggered' shifts single frames, ar_step={lag} and causal_block_size={block} blocks: leave one "
            "of them out"
        )
    if lag and any(segment.source is not None for segment in layout.segments):
        raise InvalidRequest(f"ar_step={lag}: {request.verb} starts all frames at one noise level; leave it out")
    if causal and any(segment.right or set(segment.pictures) - {0} for segment in layout.segments):
        raise InvalidRequest(
            f"causal_block_size={block}: causal blocks do not see what comes later, a last picture or a clip to lead "
            "up to; turn that off (causal_attention=False, --no-causal-attention)"
        )


def _check_channels(model: Model, request: Resolved, first: Segment) -> None:
    """Raises InvalidRequest without the pictures that an I2V model needs: the first, for FLF2V models also the last."""
    config, name = model.transformer.config, model.preset.name
    first_and_last = bool(config.pos_embed_seq_len)
    if not first.left and 0 not in first.pictures:
        if "image" not in VERBS[request.verb]:
            raise InvalidRequest(f"{name} makes videos from pictures; {request.verb} needs a T2V, TI2V or VACE model")
        raise InvalidRequest(f"{name} makes videos from pictures: give image=")
    if first_and_last and not first.right and len(first.pictures) < 2:
        raise InvalidRequest(f"{name} makes videos from pictures: give last_image=")
    if request.last_image is not None and config.image_dim and not first_and_last:
        raise InvalidRequest(f"{name} takes image= alone; leave last_image out (FLF2V models take both)")
    if request.last_image is not None and request.num_frames != request.model_frames:
        raise InvalidRequest(
            f"num_frames={request.num_frames}: with last_image it must be one that the model makes as it is; the "
            f"nearest is {request.model_frames}"
        )


# ---------------------------------------------------------------- driven models

NEEDED = ("image", "pose_video", "face_video")
REPLACING = ("background_video", "mask_video")
DRIVING_OPTIONS = (*NEEDED[1:], "mode", *REPLACING, "segment_frame_length", "prev_segment_conditioning_frames")


def check_driving(model: Model, given: Request, request: Resolved, complete: bool = True) -> None:
    """Raises InvalidRequest for options of driven models that do not fit the model, or that it needs and does not get.
    given: without defaults. complete: False for a plan, whose cost does not depend on the clips."""
    name = model.preset.name
    if not model.face_layers:
        if options := [option for option in DRIVING_OPTIONS if getattr(given, option) is not None]:
            raise InvalidRequest(f"{name} has no face blocks; leave {options[0]} out (Wan-Animate models take it)")
        return
    if request.verb != "generate":
        raise InvalidRequest(f"{name} moves a character as a video shows it; {request.verb} needs another model")
    if pictures := [option for option in ("last_image", "keyframes") if getattr(given, option) is not None]:
        raise InvalidRequest(f"{name} takes one picture, that of the character (image=); leave {pictures[0]} out")
    _check_mode(request, complete)
    length = request.segment_frame_length
    assert length is not None
    if length % model.preset.temporal != 1:
        near = max(5, round((length - 1) / model.preset.temporal) * model.preset.temporal + 1)
        raise InvalidRequest(f"segment_frame_length={length}: it is 4k + 1; the nearest is {near}")
    if (seen := request.prev_segment_conditioning_frames or 1) >= length:
        raise InvalidRequest(
            f"prev_segment_conditioning_frames={seen}: a segment has {length} frames; the nearest is 1"
        )
    if request.pose_video is not None and len(request.pose_video) < request.num_frames:
        count = len(request.pose_video)
        raise InvalidRequest(f"num_frames={request.num_frames}: pose_video has {count} frames; the nearest is {count}")


def _check_mode(request: Resolved, complete: bool) -> None:
    replaces = request.mode == "replace"
    missing = [name for name in (*NEEDED, *(REPLACING if replaces else ())) if getattr(request, name) is None]
    if missing and complete:
        raise InvalidRequest(f"{missing[0]} is missing: {_NEEDS[missing[0]]}")
    if not replaces and (options := [name for name in REPLACING if getattr(request, name) is not None]):
        raise InvalidRequest(f"{options[0]} is for mode='replace'; give that, or leave {options[0]} out")


_NEEDS = {
    "image": "this model needs a picture of the character",
    "pose_video": "this model needs the skeletons of a video's person, which a pose detector draws",
    "face_video": "this model needs that person's face, cut out of the video",
    "background_video": "mode='replace' needs the video without its person",
    "mask_video": "mode='replace' needs where that person is in the video, white",
}
