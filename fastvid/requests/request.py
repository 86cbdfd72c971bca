"""What can be asked of a pipeline's verbs, validated whole before anything is allocated or loaded.

`Request.make(verb, **kwargs)` checks everything that can be known without the model; `request.resolve(recipe)` fills
in what was not given from the model's recipe and counts frames and sizes; `resolved.to_recipe()` and
`Request.from_recipe()` carry a request through a file.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass, field, fields
from fractions import Fraction
from typing import Any, Protocol

from fastvid import checks as limits
from fastvid.checks import check_frames, check_size, nearest_name, nearest_size, number, round_up, shown, whole
from fastvid.errors import InvalidRequest

SAMPLING = (
    *("prompt", "negative_prompt", "seed", "num_inference_steps", "guidance_scale", "guidance_scale_2", "flow_shift"),
    *("sigmas", "solver", "latents", "prompt_embeds", "negative_prompt_embeds", "conditioning_scale"),
    *("original_prompt", "schedule", "known_guidance_scale"),
)
SIZE = ("height", "width", "aspect", "budget")
LENGTH = ("num_frames", "seconds")
PICTURES = ("image", "last_image", "keyframes")
VERBS: dict[str, tuple[str, ...]] = {
    "generate": (*SAMPLING, *SIZE, *LENGTH, *PICTURES, "fps", "draft", "video", "mask", "reference_images"),
    "image": (*SAMPLING, *SIZE, "draft", "reference_images"),
    "extend": (*SAMPLING, *LENGTH, "video", "direction"),
    "loop": (*SAMPLING, *LENGTH, "video"),
    "blend": (*SAMPLING, *LENGTH, "video", "video_2"),
    "edit": (*SAMPLING, *SIZE, "video", "mask", "strength", "source_prompt"),
    "storyboard": (*SAMPLING, *SIZE, "shots", "fps", "image", "draft"),
    "finalize": (*SAMPLING, *SIZE, "video", "strength"),
}
"""The arguments that each verb takes."""
CLIPS = {
    "extend": ("video",),
    "loop": ("video",),
    "blend": ("video", "video_2"),
    "edit": ("video",),
    "finalize": ("video",),
}
"""The clips that a verb works on: it cannot do without."""
TOLD = ("extend", "loop", "blend", "finalize")
"""Verbs whose prompt, where none is given, is that which the clip was made with."""
DIRECTIONS = ("after", "before", "both")

ALIASES = {
    "cfg": "guidance_scale",
    "control_video": "video",
    "duration": "seconds",
    "frame_rate": "fps",
    "frames": "num_frames",
    "generator": "seed",
    "length": "num_frames",
    "reference_image": "reference_images",
    "resolution": "size",
    "sampler": "solver",
    "scheduler": "solver",
    "shift": "flow_shift",
    "steps": "num_inference_steps",
}
"""What other programs call an argument, where spelling alone would name the wrong one."""


class RecipeLike(Protocol):
    """What `resolve` reads of a model's recipe (`fastvid.models.registry.Recipe`)."""

    num_inference_steps: int
    flow_shift: float
    guidance_scale: float
    # guidance_scale_2 (float | None) of models with two experts, known_guidance_scale (the same), and sigmas, of models
    # with few steps, may be left out
    fps: float
    num_frames: int
    height: int
    width: int
    negative_prompt: str
    solver: str
    spatial_multiple: int
    temporal: int


def asked(check: limits.Check, *, data: bool = False) -> Any:
    """A field that may be left out; `data` marks tensors, which do not compare or print."""
    return field(default=None, compare=not data, repr=not data, metadata={"check": check})


@dataclass(frozen=True)
class Request:
    """One call of a verb, as it was given. None means: as the model's recipe says.

    Make it with `Request.make(verb, **kwargs)`, which checks; the constructor does not. `size="832x480"` may be given
    to `make` instead of width and height. Sides in pixels, fps in frames a second; num_frames and seconds count what
    is made (in extend, loop and blend: beside the clips).
    """

    verb: str = "generate"
    prompt: str | None = asked(limits.text)
    original_prompt: str | None = asked(limits.text)  # what `prompt` was expanded from, if it was; only recorded
    negative_prompt: str | None = asked(limits.text)
    height: int | None = asked(whole(limits.MIN_SIDE, limits.MAX_SIDE, " pixels"))
    width: int | None = asked(whole(limits.MIN_SIDE, limits.MAX_SIDE, " pixels"))
    aspect: Fraction | None = asked(limits.aspect)
    budget: int | None = asked(limits.budget)
    num_frames: int | None = asked(whole(1, limits.MAX_FRAMES))
    seconds: float | None = asked(number(0.0, limits.MAX_FRAMES / limits.MIN_FPS))
    fps: float | None = asked(number(limits.MIN_FPS, limits.MAX_FPS, " frames a second"))
    seed: int | None = asked(whole(0, limits.MAX_SEED, " (left out: a random one)"))
    num_inference_steps: int | None = asked(whole(1, limits.MAX_STEPS))
    guidance_scale: float | None = asked(number(0.0, 1000.0))
    guidance_scale_2: float | None = asked(number(0.0, 1000.0))
    known_guidance_scale: float | None = asked(number(0.0, 1000.0))
    flow_shift: float | None = asked(number(0.01, 100.0))
    sigmas: tuple[float, ...] | None = asked(limits.sigmas)
    solver: str | None = asked(limits.one_of(limits.SOLVERS))
    schedule: str | None = asked(limits.one_of(limits.SCHEDULES))
    image: Any = asked(limits.picture, data=True)
    last_image: Any = asked(limits.picture, data=True)
    keyframes: Any = asked(limits.keyframes, data=True)
    video: Any = asked(limits.clip, data=True)
    video_2: Any = asked(limits.clip, data=True)
    mask: Any = asked(limits.clip, data=True)
    reference_images: Any = asked(limits.pictures, data=True)
    conditioning_scale: float | tuple[float, ...] | None = asked(limits.scale)
    direction: str | None = asked(limits.one_of(DIRECTIONS))
    strength: float | None = asked(number(0.0, 1.0))
    source_prompt: str | None = asked(limits.text)
    shots: tuple[tuple[str, float], ...] | None = asked(limits.shots)
    draft: bool | None = asked(limits.flag)
    latents: Any = asked(limits.tensor, data=True)
    prompt_embeds: Any = asked(limits.tensor, data=True)
    negative_prompt_embeds: Any = asked(limits.tensor, data=True)

    @classmethod
    def make(cls, verb: str = "generate", **kwargs: Any) -> Request:
        """Check and convert. Raises InvalidRequest, which says what is allowed and what is nearest."""
        checks: dict[str, limits.Check] = {f.name: f.metadata["check"] for f in fields(cls) if f.metadata}
        takes = VERBS[verb]
        for name in kwargs:
            if name not in checks and name != "size":
                near = nearest_name(name, (*takes, "size", *ALIASES))
                raise InvalidRequest(f"there is no argument {shown(name)}; the nearest is {ALIASES.get(near, near)}")
            if kwargs[name] is not None and name not in takes and not (name == "size" and "width" in takes):
                verbs = ", ".join(other for other, names in VERBS.items() if name in names)
                raise InvalidRequest(f"{name}: {verb} does not take it ({verbs or 'generate'} does); leave it out")
        given = _unfold_size({name: value for name, value in kwargs.items() if value is not None})
        request = cls(verb=verb, **{name: checks[name](name, value) for name, value in given.items()})
        _check_together(request)
        return request

    def arguments(self) -> dict[str, Any]:
        """What was given, as keywords for the pipeline's verb and `Request.make`."""
        return {f.name: value for f in fields(self) if f.metadata and (value := getattr(self, f.name)) is not None}

    def resolve(self, recipe: RecipeLike) -> Resolved:
        """Fill in what was not given and count. Raises InvalidRequest where the whole breaks a limit."""
        fps = float(self.fps if self.fps is not None else recipe.fps)
        num_frames = self._count_frames(fps, recipe.num_frames)
        full = self._full_size(recipe, num_frames)
        width, height = self._draft_size(full, recipe.spatial_multiple) if self.draft else full
        check_size(width, height, num_frames)
        experts = 1 if getattr(recipe, "guidance_scale_2", None) is None else 2
        if self.guidance_scale_2 is not None and experts == 1:
            raise InvalidRequest(f"guidance_scale_2={self.guidance_scale_2:g}: this model has one expert; leave it out")
        filled = {
            f.name: given if (given := getattr(self, f.name)) is not None else getattr(recipe, f.name, None)
            for f in fields(Resolved)
            if f.name in Request.__dataclass_fields__
        }
        filled |= {
            "full_size": full if self.draft else None,
            "width": width,
            "height": height,
            "num_frames": num_frames,
            "fps": fps,
            "verb": self.verb,
        }
        filled["seed"] = secrets.randbelow(2**32) if self.seed is None else self.seed
        if experts > 1 and self.guidance_scale is not None and self.guidance_scale_2 is None:
            filled["guidance_scale_2"] = self.guidance_scale
        if self.guidance_scale is not None:
            filled["known_guidance_scale"] = self.known_guidance_scale  # the recipe's goes with the recipe's other one
        if self.num_inference_steps is not None or self.flow_shift is not None:
            filled["sigmas"] = self.sigmas  # a recipe's own levels are for its own number of steps
        if filled["sigmas"] is not None:
            filled["num_inference_steps"] = len(filled["sigmas"])
        elif self.draft and self.num_inference_steps is None:
            filled["num_inference_steps"] = max(1, round(recipe.num_inference_steps * DRAFT_STEPS))
        if self.source_prompt is not None and self.solver is None:
            filled["solver"] = "euler"  # FlowEdit's path is not one that a multistep solver's history is of
        if self.verb in STRENGTH and self.strength is None:
            own = recipe.edit_strength if self.verb == "edit" and self.source_prompt is None else None
            filled["strength"] = STRENGTH[self.verb] if own is None else own
        return Resolved(
            **filled,
            model_width=round_up(width, recipe.spatial_multiple),
            model_height=round_up(height, recipe.spatial_multiple),
            model_frames=round_up(num_frames - 1, recipe.temporal) + 1,
        )

    def _count_frames(self, fps: float, default: int) -> int:
        if self.verb == "image":
            return 1
        if self.shots is not None:
            count = round(sum(seconds for _, seconds in self.shots) * fps)
            check_frames(count, f"shots at {fps:g} fps")
            return count
        if self.seconds is not None:
            count = round(self.seconds * fps)
            check_frames(count, f"seconds={self.seconds:g} at {fps:g} fps")
            return count
        if self.num_frames is None and self.verb in ("extend", "loop", "blend"):
            return max(1, round(fps))  # a second
        return default if self.num_frames is None else self.num_frames

    def _draft_size(self, full: tuple[int, int], multiple: int) -> tuple[int, int]:
        half = [max(limits.MIN_SIDE, round(side * DRAFT_SIDE / multiple) * multiple) for side in full]
        return min(half[0], full[0]), min(half[1], full[1])

    def _full_size(self, recipe: RecipeLike, num_frames: int) -> tuple[int, int]:
        if self.aspect is None and self.budget is None:
            return self.width or recipe.width, self.height or recipe.height
        ratio = self.aspect or Fraction(recipe.width, recipe.height)
        area = self.budget or recipe.width * recipe.height
        return nearest_size(ratio, area, num_frames, recipe.spatial_multiple, may_exceed=self.budget is None)

    @classmethod
    def from_recipe(cls, recipe: dict[str, Any], **overrides: Any) -> Request:
        """The request that a recipe (see `Resolved.to_recipe`) was written for, with what is given beside it changed.

        An override also drops what contradicts it: `seconds` the recipe's num_frames, `size` its sides, and so on.
        Raises InvalidRequest for a recipe of another program, or one that needs tensors it cannot hold.
        """
        if not isinstance(recipe, dict) or "fastvid" not in recipe:
            raise InvalidRequest("this is not a fastvid recipe: it has no 'fastvid' entry")
        verb = recipe.get("verb", "generate")
        if verb not in VERBS:
            raise InvalidRequest(f"this recipe is of {shown(verb)}; this version knows {', '.join(VERBS)}")
        if recipe.get("changed_prompts"):
            raise InvalidRequest(
                "this video's prompt was changed while it was made, which a recipe cannot repeat; make a storyboard"
            )
        overrides = {name: value for name, value in overrides.items() if value is not None}
        dropped = {name for given in overrides for name in _DISPLACES.get(given, ())}
        kept = {**recipe, **_draft_again(recipe)}
        kept = {k: v for k, v in kept.items() if k not in RECIPE_CONTEXT and k not in dropped and k not in overrides}
        for name, value in kept.items():
            if prints := prints_of(value):
                what = " and ".join(f"of shape {one.get('shape')} (sha256 {one['sha256']})" for one in prints)
                raise InvalidRequest(
                    f"this recipe was made with {name}= {what}, which a file does not hold; give {name}= again"
                )
        return cls.make(verb, **kept, **overrides)


def prints_of(value: Any) -> list[dict[str, Any]]:
    """The prints (shape and sha256) that a recipe has in place of a tensor, a clip, or several of them."""
    ones = value if isinstance(value, list) else [value]
    if isinstance(value, dict) and "sha256" not in value:
        ones = list(value.values())  # keyframes
    return [one for one in ones if isinstance(one, dict) and "sha256" in one]


def _draft_again(recipe: dict[str, Any]) -> dict[str, Any]:
    """A draft is asked for by what it is a draft of."""
    full = recipe.get("full_size")
    if not isinstance(full, list | tuple) or len(full) != 2:
        return {}
    return {"width": full[0], "height": full[1], "draft": True}


RECIPE_CONTEXT = ("fastvid", "verb", "model", "settings", "full_size")
"""Entries of a recipe that are not arguments: version, verb, model as loaded, dtype and back ends, and for a draft the
size that finalize brings it to."""

DRAFT_SIDE, DRAFT_STEPS = 0.5, 0.4
"""Of a draft's sides and steps, against what it is a draft of."""

SAMPLED = 5
"""Frames of a clip that a recipe knows it by."""

STRENGTH = {"edit": 0.6, "finalize": 0.6}
"""The defaults. A model's recipe may say another for edits; what is around a clip on a larger frame is made whole."""
"""The share of the steps that are run, where it is not said."""

_DISPLACES = {
    "seconds": ("num_frames",),
    "num_frames": ("seconds",),
    "size": ("width", "height"),
    "aspect": ("width", "height"),
    "budget": ("width", "height"),
    "sigmas": ("num_inference_steps", "flow_shift"),
    "num_inference_steps": ("sigmas",),
    "flow_shift": ("sigmas",),
    "prompt": ("prompt_embeds", "original_prompt"),
    "prompt_embeds": ("prompt", "original_prompt"),
    "negative_prompt": ("negative_prompt_embeds",),
    "negative_prompt_embeds": ("negative_prompt",),
}


def _unfold_size(given: dict[str, Any]) -> dict[str, Any]:
    if "size" not in given:
        return given
    clash = [name for name in ("width", "height", "aspect", "budget") if name in given]
    if clash:
        raise InvalidRequest(f"size and {clash[0]} are both given; give one of them")
    width, height = limits.size("size", given["size"])
    return {name: value for name, value in given.items() if name != "size"} | {"width": width, "height": height}


def _check_together(request: Request) -> None:
    """What single values cannot show: arguments that contradict each other, and the whole's size."""
    for one, other in (
        ("num_frames", "seconds"),
        ("aspect", "width"),
        ("aspect", "height"),
        ("budget", "width"),
        ("budget", "height"),
        ("sigmas", "flow_shift"),
        ("prompt", "prompt_embeds"),
        ("negative_prompt", "negative_prompt_embeds"),
    ):
        if getattr(request, one) is not None and getattr(request, other) is not None:
            raise InvalidRequest(f"{one} and {other} are both given; give one of them")
    if missing := [name for name in CLIPS.get(request.verb, ()) if getattr(request, name) is None]:
        raise InvalidRequest(f"{missing[0]} is missing: {request.verb} works on a clip; give a file or frames")
    if request.verb == "storyboard":
        if request.shots is None:
            raise InvalidRequest('shots is missing: give [("a prompt", seconds), ...]')
        return
    if request.mask is not None and request.video is None:
        raise InvalidRequest("mask says what of a video stays; give video too, or leave mask out")
    if request.prompt is None and request.prompt_embeds is None and request.verb not in TOLD:
        raise InvalidRequest("prompt is missing: give one string (an empty one is allowed)")
    steps, levels = request.num_inference_steps, request.sigmas
    if levels is not None and steps is not None and steps != len(levels):
        raise InvalidRequest(f"num_inference_steps={steps} but sigmas has {len(levels)} values; leave one of them out")
    if request.seconds is not None and (request.fps is not None or request.seconds == 0):
        check_frames(round(request.seconds * (request.fps or 1)), f"seconds={request.seconds:g}")
    if request.num_frames and request.width and request.height:
        check_size(request.width, request.height, request.num_frames)


@dataclass(frozen=True)
class Resolved:
    """A request with nothing left open. The model makes model_frames of model_width x model_height, of which the
    first num_frames and the top left width x height come out."""

    prompt: str | None
    original_prompt: str | None
    negative_prompt: str | None
    height: int
    width: int
    num_frames: int
    fps: float
    seed: int
    num_inference_steps: int
    guidance_scale: float
    guidance_scale_2: float | None
    known_guidance_scale: float | None
    flow_shift: float
    sigmas: tuple[float, ...] | None
    solver: str
    schedule: str | None
    verb: str
    direction: str | None
    strength: float | None
    source_prompt: str | None
    shots: tuple[tuple[str, float], ...] | None
    full_size: tuple[int, int] | None
    image: Any = field(compare=False, repr=False)
    keyframes: Any = field(compare=False, repr=False)
    video_2: Any = field(compare=False, repr=False)
    last_image: Any = field(compare=False, repr=False)
    video: Any = field(compare=False, repr=False)
    mask: Any = field(compare=False, repr=False)
    reference_images: Any = field(compare=False, repr=False)
    conditioning_scale: float | tuple[float, ...] | None
    latents: Any = field(compare=False, repr=False)
    prompt_embeds: Any = field(compare=False, repr=False)
    negative_prompt_embeds: Any = field(compare=False, repr=False)
    model_height: int
    model_width: int
    model_frames: int

    def guidance_scales(self, experts: int, known: bool = False) -> tuple[float, ...]:
        """The scale of each of so many experts, high noise first. known: where frames are, or a clip is edited."""
        if known and self.known_guidance_scale is not None:
            return (self.known_guidance_scale,) * experts
        return (self.guidance_scale,) if experts == 1 else (self.guidance_scale, float(self.guidance_scale_2))

    def guided(self, experts: int) -> bool:
        """Whether the negative prompt has a say anywhere."""
        return any(scale != 1 for known in (False, True) for scale in self.guidance_scales(experts, known))

    @property
    def prompts(self) -> tuple[str | None, ...]:
        """The prompt, or those of all shots."""
        return tuple(prompt for prompt, _ in self.shots) if self.shots else (self.prompt,)

    @property
    def known_pictures(self) -> dict[int, Any]:
        """The pictures by the number of their frame."""
        placed = {0: self.image, self.num_frames - 1: self.last_image, **(self.keyframes or {})}
        return {frame: picture for frame, picture in placed.items() if picture is not None}

    def to_recipe(self, *, model: str = "", version: str = "", **settings: Any) -> dict[str, Any]:
        """Everything needed to make the video again, as JSON types. Tensors are recorded by shape and sha256.

        `model` is what `fastvid.load` was given; `settings` what else decides the bytes (dtype, backend, ...).
        """
        skip = ("model_height", "model_width", "model_frames", "verb")
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in skip}
        if self.sigmas is not None:
            values |= {"num_inference_steps": None, "flow_shift": None, "sigmas": list(self.sigmas)}
        if self.verb != "generate":  # counted from the clip, the shots, or always one
            counted = {"extend": (), "loop": (), "blend": ()}.get(self.verb, ("num_frames",))
            sized = ("width", "height", "fps") if self.verb in ("extend", "loop", "blend") else ()
            values |= dict.fromkeys((*counted, *sized))
            values |= {"fps": None} if "fps" not in VERBS[self.verb] else {}
        if hasattr(self.video, "mask"):  # that of what is around a clip follows from the size
            values["mask"] = None
        recipe = {"fastvid": version, "verb": self.verb, "model": model, "settings": settings}
        return recipe | {name: recordable(value) for name, value in values.items() if value is not None}


def recordable(value: Any) -> Any:
    """A value as a recipe holds it: JSON types, and of arrays and clips a print."""
    if isinstance(value, dict):
        return {str(frame): recordable(one) for frame, one in sorted(value.items())}
    if hasattr(value, "num_frames"):
        return _clip_print(value)
    if isinstance(value, tuple):
        return [recordable(one) for one in value]
    return fingerprint(value) if hasattr(value, "shape") else value


def _clip_print(clip: Any) -> dict[str, Any]:
    """What a clip is known by: its size, and the sha256 of a few of its frames, since it may be long."""
    digest, count = hashlib.sha256(), clip.num_frames
    for frame in sorted({round(i * (count - 1) / (SAMPLED - 1)) for i in range(SAMPLED)}):
        digest.update(clip.read(frame, frame + 1).tobytes())
    shape = [count, clip.height, clip.width, 3]
    return {"shape": shape, "fps": clip.fps, "sha256": digest.hexdigest(), "sampled": SAMPLED}


def fingerprint(value: Any) -> dict[str, Any]:
    """Shape, type and sha256 of a tensor's values as little-endian float64 in C order (exact for every float type)."""
    digest = hashlib.sha256()
    for part in value if len(value.shape) > 1 else [value]:  # a clip in float64 is large, a frame is not
        host = part.detach().cpu().double().contiguous().numpy() if hasattr(part, "detach") else part
        digest.update(host.astype("<f8").tobytes())
    return {
        "shape": [int(n) for n in value.shape],
        "dtype": str(value.dtype).removeprefix("torch."),
        "sha256": digest.hexdigest(),
    }
