"""Requests: the validated arguments of one call of a verb, before anything is allocated or loaded.

`Request.make(verb, **arguments)` checks everything that does not depend on the model. `request.resolve(preset)` fills
in defaults and computes frame counts and sizes. `resolved.to_recipe()` and `Request.from_recipe()` save a request to
JSON and read it back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from typing import Any

from fastvid import checks
from fastvid.checks import shown
from fastvid.errors import InvalidRequest
from fastvid.requests import forcing, levers
from fastvid.requests import recipe as recipes
from fastvid.requests.arguments import ARGUMENTS, CHECKPOINT, RUN, STRENGTH, VERBS, random_seed
from fastvid.requests.request_checks import check_name, check_pictures, check_together, split_size
from fastvid.requests.sizes import check_frames, check_size, nearest_size, round_up

SIZE = ("height", "width", "aspect", "budget")
DRAFT_SIDE, DRAFT_STEPS = 0.5, 0.4
"""A draft's sides and number of steps, relative to the full video's."""

check_verb = checks.one_of(VERBS)


def _data() -> Any:
    """A field for pictures, clips or tensors, left out of comparisons and repr."""
    return field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Request:
    """The arguments of one call of a verb. None means the model preset's default.

    Create it with `Request.make`, which validates; the constructor does not. Sides are in pixels, fps in frames per
    second. num_frames and seconds count generated frames (in extend, loop and blend: without the clips).
    """

    verb: str = "generate"
    prompt: str | None = None
    original_prompt: str | None = None
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    aspect: Fraction | None = None
    budget: int | None = None
    num_frames: int | None = None
    seconds: float | None = None
    fps: float | None = None
    seed: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None
    known_guidance_scale: float | None = None
    boundary_ratio: float | None = None
    flow_shift: float | None = None
    sigmas: tuple[float, ...] | None = None
    solver: str | None = None
    schedule: str | None = None
    image: Any = _data()
    last_image: Any = _data()
    keyframes: Any = _data()
    video: Any = _data()
    video_2: Any = _data()
    mask: Any = _data()
    reference_images: Any = _data()
    conditioning_scale: float | tuple[float, ...] | None = None
    ar_step: int | None = None
    causal_block_size: int | None = None
    causal_attention: bool | None = None
    base_num_frames: int | None = None
    overlap_history: int | None = None
    addnoise_condition: float | None = None
    pose_video: Any = _data()
    face_video: Any = _data()
    mode: str | None = None
    background_video: Any = _data()
    mask_video: Any = _data()
    segment_frame_length: int | None = None
    prev_segment_conditioning_frames: int | None = None
    direction: str | None = None
    strength: float | None = None
    factor: int | None = None
    scale: float | None = None
    tile: str | None = None
    method: str | None = None
    source_prompt: str | None = None
    shots: tuple[tuple[str, float], ...] | None = None
    draft: bool | None = None
    audio: bool | None = None
    latents: Any = _data()
    prompt_embeds: Any = _data()
    negative_prompt_embeds: Any = _data()
    loras: tuple[Any, ...] | None = None
    quality: str | None = None
    cache: str | None = None
    guidance_interval: tuple[float, float] | None = None
    guidance_every: int | None = None
    guidance_batch: bool | None = None
    progressive: float | None = None
    attention: str | None = None
    preset: str | None = None
    expand_prompt: bool | None = None
    prompt_endpoint: str | None = None
    prompt_model: str | None = None
    prompt_key: str | None = field(default=None, repr=False)
    batch_size: int | None = None
    checkpoint: Any = None
    checkpoint_every: float | None = None
    keep_checkpoint: bool | None = None

    @classmethod
    def make(cls, verb: str = "generate", **arguments: Any) -> Request:
        """Validates and converts the arguments. Raises InvalidRequest, which names what is allowed and the nearest
        valid value."""
        verb = check_verb("verb", verb)
        for name, value in arguments.items():
            check_name(verb, name, value)
        values = split_size({name: value for name, value in arguments.items() if value is not None})
        request = cls(verb=verb, **{name: ARGUMENTS[name].check(name, value) for name, value in values.items()})
        check_together(request)
        return request

    def __repr__(self) -> str:
        values = {name: value for name, value in self.arguments().items() if name != "prompt_key"}
        return f"Request({', '.join([self.verb, *(f'{name}={shown(value)}' for name, value in values.items())]):.300})"

    def arguments(self) -> dict[str, Any]:
        """The arguments that are set, as keywords for the pipeline's verb and `Request.make`."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "verb"}
        return {name: value for name, value in values.items() if value is not None}

    def video_arguments(self) -> dict[str, Any]:
        """The arguments that describe the video: all but those about prompt expansion and checkpoints."""
        return {name: value for name, value in self.arguments().items() if name not in RUN}

    def checkpoint_options(self) -> dict[str, Any]:
        """The arguments about checkpoints."""
        return {name: value for name, value in self.arguments().items() if name in CHECKPOINT}

    @classmethod
    def from_recipe(cls, recipe: dict[str, Any], **overrides: Any) -> Request:
        """The request that a recipe (see `Resolved.to_recipe`) records, with overrides applied.

        An override also drops the entries that contradict it: `seconds` drops num_frames, `size` drops width and
        height, and so on. Raises InvalidRequest for a recipe of another program, and for one with pictures, clips or
        tensors that are not among the overrides.
        """
        verb, arguments = recipes.arguments_of(recipe, overrides)
        return cls.make(verb, **arguments)

    # ------------------------------------------------------------ defaults

    def resolve(self, preset: Any) -> Resolved:
        """Fills in the preset's defaults and computes sizes and counts. Raises InvalidRequest if the result exceeds a
        limit.

        preset: the model's. It has num_inference_steps, flow_shift, guidance_scale, fps, num_frames, height, width,
        negative_prompt, solver, spatial_multiple and temporal, and may have guidance_scale_2 (models with two experts),
        known_guidance_scale, sigmas (few-step models), scheduler (its folder's), edit_strength and forcing.
        """
        set_by_quality = levers.fill(self, preset)
        if also := {name: set_by_quality.pop(name) for name in levers.ALSO if name in set_by_quality}:
            return replace(self, **also).resolve(preset)
        fps = float(self.fps if self.fps is not None else preset.fps * (self.factor or 1))
        num_frames = self._count_frames(fps, preset.num_frames)
        full = self._full_size(preset, num_frames)
        width, height = self._draft_size(full, preset.spatial_multiple) if self.draft else full
        check_size(width, height, num_frames)
        check_pictures(self, num_frames)
        computed = {"width": width, "height": height, "num_frames": num_frames, "fps": fps, "verb": self.verb}
        names = {f.name for f in fields(Request)}
        filled = {f.name: self._or_preset(f.name, preset) for f in fields(Resolved) if f.name in names}
        if self.prompt_embeds is not None:
            filled["prompt"] = self.prompt
        return Resolved(
            **{**filled, **set_by_quality, **computed, **self._sampling(preset)},
            full_size=full if self.draft else None,
            model_width=round_up(width, preset.spatial_multiple),
            model_height=round_up(height, preset.spatial_multiple),
            model_frames=round_up(num_frames - 1, preset.temporal) + 1,
        )

    def _or_preset(self, name: str, preset: Any) -> Any:
        value = getattr(self, name)
        return getattr(preset, name, None) if value is None else value

    def _sampling(self, preset: Any) -> dict[str, Any]:
        """Values that depend on several arguments: seed, guidance, noise levels, solver, strength."""
        values: dict[str, Any] = {"seed": random_seed() if self.seed is None else self.seed}
        values |= self._guidance(preset)
        values |= forcing.resolve({name: getattr(self, name) for name in forcing.FORCING}, preset)
        values["boundary_ratio"] = self._boundary(preset)
        sigmas = self._or_preset("sigmas", preset)
        if self.num_inference_steps is not None or self.flow_shift is not None:
            sigmas = self.sigmas  # the preset's noise levels are for its own number of steps
        values["sigmas"] = sigmas
        if sigmas is not None:
            values["num_inference_steps"] = len(sigmas)
        elif self.draft and self.num_inference_steps is None:
            values["num_inference_steps"] = max(1, round(preset.num_inference_steps * DRAFT_STEPS))
        if self.source_prompt is not None and self.solver is None:
            values["solver"] = "euler"  # FlowEdit does not follow one ODE, as multistep solvers assume
        elif self.solver is None:
            values |= self._scheduled(preset, values)
        if self.verb in STRENGTH and self.strength is None:
            use_preset = self.verb == "edit" and self.source_prompt is None
            strength = getattr(preset, "edit_strength", None) if use_preset else None
            values["strength"] = STRENGTH[self.verb] if strength is None else strength
        return values

    def _scheduled(self, preset: Any, values: Mapping[str, Any]) -> dict[str, Any]:
        """The noise levels of the model's own scheduler, where they are not the solver's."""
        scheduler = getattr(preset, "scheduler", None)
        if scheduler is None:
            return {}
        steps = values.get("num_inference_steps") or self._or_preset("num_inference_steps", preset)
        levels = scheduler.sigmas(steps, float(self._or_preset("flow_shift", preset)))
        if levels is None or values["sigmas"] is not None:
            return {}
        return {"sigmas": levels, "num_inference_steps": len(levels)}

    def _guidance(self, preset: Any) -> dict[str, float | None]:
        """Guidance scales. guidance_scale also replaces the preset's other scales, which are tuned to go together."""
        two_experts = getattr(preset, "guidance_scale_2", None) is not None
        if self.guidance_scale_2 is not None and not two_experts:
            raise InvalidRequest(f"guidance_scale_2={self.guidance_scale_2:g}: this model has one expert; leave it out")
        if self.guidance_scale is None:
            return {}
        scales: dict[str, float | None] = {"known_guidance_scale": self.known_guidance_scale}
        if two_experts and self.guidance_scale_2 is None:
            scales["guidance_scale_2"] = self.guidance_scale
        return scales

    def _boundary(self, preset: Any) -> float | None:
        if self.boundary_ratio is not None and getattr(preset, "boundary_ratio", None) is None:
            raise InvalidRequest(
                f"boundary_ratio={self.boundary_ratio:g}: this model has one transformer, not two experts; leave it out"
            )
        return self.boundary_ratio

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
            return max(1, round(fps))  # one second
        return default if self.num_frames is None else self.num_frames

    def _draft_size(self, full: tuple[int, int], multiple: int) -> tuple[int, int]:
        half = [max(checks.MIN_SIDE, round(side * DRAFT_SIDE / multiple) * multiple) for side in full]
        return min(half[0], full[0]), min(half[1], full[1])

    def _full_size(self, preset: Any, num_frames: int) -> tuple[int, int]:
        if self.aspect is None and self.budget is None:
            return self.width or preset.width, self.height or preset.height
        ratio = self.aspect or Fraction(preset.width, preset.height)
        area = self.budget or preset.width * preset.height
        return nearest_size(ratio, area, num_frames, preset.spatial_multiple, may_exceed=self.budget is None)


DATA = tuple(f.name for f in fields(Request) if not f.compare)
"""Arguments that are pictures, clips or tensors; recipes record only their fingerprints."""


# ---------------------------------------------------------------- with defaults filled in


@dataclass(frozen=True)
class Resolved:
    """A request with all defaults filled in. The model generates model_frames frames of model_width x model_height; the
    output is cropped to the first num_frames and the top left width x height."""

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
    boundary_ratio: float | None
    flow_shift: float
    sigmas: tuple[float, ...] | None
    solver: str
    schedule: str | None
    verb: str
    direction: str | None
    strength: float | None
    factor: int | None
    tile: str | None
    method: str | None
    source_prompt: str | None
    shots: tuple[tuple[str, float], ...] | None
    full_size: tuple[int, int] | None
    audio: bool | None
    image: Any = field(compare=False, repr=False)
    keyframes: Any = field(compare=False, repr=False)
    video_2: Any = field(compare=False, repr=False)
    last_image: Any = field(compare=False, repr=False)
    video: Any = field(compare=False, repr=False)
    mask: Any = field(compare=False, repr=False)
    reference_images: Any = field(compare=False, repr=False)
    conditioning_scale: float | tuple[float, ...] | None
    ar_step: int | None
    causal_block_size: int | None
    causal_attention: bool | None
    base_num_frames: int | None
    overlap_history: int | None
    addnoise_condition: float | None
    pose_video: Any = field(compare=False, repr=False)
    face_video: Any = field(compare=False, repr=False)
    mode: str | None
    background_video: Any = field(compare=False, repr=False)
    mask_video: Any = field(compare=False, repr=False)
    segment_frame_length: int | None
    prev_segment_conditioning_frames: int | None
    latents: Any = field(compare=False, repr=False)
    prompt_embeds: Any = field(compare=False, repr=False)
    negative_prompt_embeds: Any = field(compare=False, repr=False)
    loras: tuple[Any, ...] | None
    quality: str | None
    cache: str | None
    guidance_interval: tuple[float, float] | None
    guidance_every: int | None
    guidance_batch: bool | None
    progressive: float | None
    attention: str | None
    preset: str | None
    model_height: int
    model_width: int
    model_frames: int

    def guidance_scales(self, experts: int, known: bool = False) -> tuple[float, ...]:
        """The guidance scale of each expert, high noise first. known: for windows with known frames, and edits.

        As in diffusers' WanPipeline, guidance_scale decides whether there is guidance at all: up to 1 there is none,
        and all scales come out as 1.
        """
        known_scale = self.known_guidance_scale if known else None
        scale = self.guidance_scale if known_scale is None else known_scale
        if scale <= 1:
            return (1.0,) * experts
        second = self.guidance_scale_2 if known_scale is None and experts == 2 else None
        return (scale,) * experts if second is None else (scale, second)

    def guided(self, experts: int) -> bool:
        """Whether any guidance scale uses the negative prompt."""
        return any(scale != 1 for known in (False, True) for scale in self.guidance_scales(experts, known))

    @property
    def prompts(self) -> tuple[str | None, ...]:
        """The prompt, or all shots' prompts."""
        return tuple(prompt for prompt, _ in self.shots) if self.shots else (self.prompt,)

    @property
    def is_animated(self) -> bool:
        """Whether a pose and a face drive the video: of a model whose preset has segments."""
        return self.segment_frame_length is not None

    @property
    def known_pictures(self) -> dict[int, Any]:
        """The first, last and keyframe pictures, by frame number. What drives a character has none."""
        if self.is_animated:
            return {}
        ends = ((0, self.image), (self.num_frames - 1, self.last_image))
        return {frame: picture for frame, picture in ends if picture is not None} | (self.keyframes or {})

    def to_recipe(self, *, model: str = "", version: str = "", **settings: Any) -> dict[str, Any]:
        """Everything needed to reproduce the video, as JSON types. Tensors are recorded by shape and sha256.

        model: the argument of `fastvid.load`. settings: what else determines the bytes (dtype, backend, ...).
        """
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _NOT_RECORDED}
        values |= levers.recorded(self)
        if self.sigmas is not None:
            values |= {"num_inference_steps": None, "flow_shift": None, "sigmas": list(self.sigmas)}
        values |= dict.fromkeys(_DERIVED.get(self.verb, ("num_frames",)))
        values |= {"fps": None} if "fps" not in VERBS[self.verb] else {}
        if hasattr(self.video, "mask"):  # an outpainting mask follows from the size
            values["mask"] = None
        recipe: dict[str, Any] = {"fastvid": version, "verb": self.verb, "model": model, "settings": settings}
        return recipe | {name: recipes.recordable(value) for name, value in values.items() if value is not None}


_NOT_RECORDED = ("model_height", "model_width", "model_frames", "verb")
_DERIVED: Mapping[str, tuple[str, ...]] = {"generate": ()} | dict.fromkeys(
    ("extend", "loop", "blend"), ("width", "height", "fps")
)
_DERIVED = {**_DERIVED, "interpolate": ("num_frames", "width", "height", "fps")}
"""Arguments that are not recorded, by verb, because they follow from the clip, the shots or the verb."""


def default_request(preset: Any) -> Resolved:
    """The request for a preset's default video."""
    return Request(prompt="", solver=preset.solver).resolve(preset)
