"""The table of all arguments of all verbs: each with its check, its help text and its command-line flag.

`Request.make` validates with this table, the command line builds its flags from it, and `documented` adds it to the
signatures and docstrings of the verbs. Types are in `fastvid.requests.options`. To add an argument, add a row here, its
type there, and a field of `Request`.
"""

from __future__ import annotations

import inspect
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from fastvid import checks
from fastvid.checks import Check, number, one_of, text, whole
from fastvid.requests import levers, loras, methods, options
from fastvid.requests.batch import one_video

RANDOM = -1  # the seed that asks for a random one
DIRECTIONS = ("after", "before", "both")
MODES = ("animate", "replace")
STRENGTH = {"edit": 0.6, "finalize": 0.6, "interpolate": 0.4, "upscale": 0.2}
"""Default strengths: the share of the denoising steps that are run, unless the request or the model's preset sets
it."""


@dataclass(frozen=True)
class Argument:
    """A row of the table. flag: the flag and its metavar, such as "--seed N"; empty if there is no flag. verbs: help
    texts of verbs for which the argument means something else."""

    check: Check
    help: str
    flag: str = ""
    verbs: Mapping[str, str] = field(default_factory=dict)

    def help_for(self, verb: str) -> str:
        return self.verbs.get(verb, self.help)


def random_seed() -> int:
    """A seed for a request that leaves it to chance."""
    return secrets.randbelow(2**32)


def _one_or_five(name: str, value: Any) -> int:
    if (count := whole(1, 5)(name, value)) not in (1, 5):
        checks.refuse(name, count, "1 or 5", 1 if count < 3 else 5)
    return count


_side = whole(checks.MIN_SIDE, checks.MAX_SIDE, " pixels")
_guidance = number(0.0, 1000.0)
_seed = whole(RANDOM, checks.MAX_SEED, " (-1, or left out: a random one)")
_bridge = dict.fromkeys(("loop", "blend"), "length of the bridge in frames") | {
    "extend": "frames to add on each extended side"
}
_bridge_seconds = {verb: words.replace("frames", "seconds") + " (default: 1)" for verb, words in _bridge.items()}
_outpaint = "width and height, such as 832x480; larger than the clip: fill in the area around it (outpainting)"

ARGUMENTS: Mapping[str, Argument] = {
    "prompt": Argument(one_video(text, "one string"), "what to show"),
    "negative_prompt": Argument(one_video(text, "one string"), "what not to show", "--negative-prompt TEXT"),
    "expand_prompt": Argument(
        checks.flag, "expand the prompt into a long caption first; the recipe records both", "--expand-prompt"
    ),
    "prompt_endpoint": Argument(
        text,
        "endpoint that expands prompts, with OpenAI's chat protocol (not for the embedded model)",
        "--prompt-endpoint URL",
    ),
    "prompt_model": Argument(
        text, "the language model's name at the endpoint; its key is FASTVID_PROMPT_KEY", "--prompt-model NAME"
    ),
    "prompt_key": Argument(text, "the endpoint's key; no recipe and no error shows it"),
    "original_prompt": Argument(text, "the prompt before expansion; only recorded"),
    "shots": Argument(checks.shots, "a shot: its prompt and its length; repeat for each shot", "--shot PROMPT:SECONDS"),
    "direction": Argument(
        one_of(DIRECTIONS),
        "where to add frames: {0} the clip, {1} it, or {2} (default: {0})".format(*DIRECTIONS),
        "--direction WHERE",
    ),
    "width": Argument(_side, "width in pixels, 64 to 2048 (a video: within 1920x1080 or 1080x1920)", "--width N"),
    "height": Argument(_side, "height in pixels, as --width", "--height N"),
    "size": Argument(
        checks.size,
        "width and height, such as 832x480",
        "--size WxH",
        {"finalize": "width and height (default: the draft's full size)", "edit": _outpaint},
    ),
    "aspect": Argument(checks.aspect, "aspect ratio, such as 16:9: the nearest size within --budget", "--aspect W:H"),
    "budget": Argument(
        checks.budget,
        f"area: {', '.join(checks.BUDGETS)} or a number of pixels (default: that of the model's default size)",
        "--budget AREA",
    ),
    "num_frames": Argument(
        whole(1, checks.MAX_FRAMES), f"number of frames, 1 to {checks.MAX_FRAMES}", "--num-frames N", _bridge
    ),
    "seconds": Argument(
        number(0.0, checks.MAX_FRAMES / checks.MIN_FPS),
        "length in seconds instead of --num-frames: round(seconds x fps)",
        "--seconds S",
        _bridge_seconds,
    ),
    "fps": Argument(
        number(checks.MIN_FPS, checks.MAX_FPS, " frames a second"),
        "frames per second, 0.1 to 240",
        "--fps N",
        {"interpolate": "frames per second of the result, instead of --factor: 2, 3, ... times the clip's"},
    ),
    "factor": Argument(
        whole(2, methods.MOST_FACTOR),
        f"how many times as many frames a second, 2 to {methods.MOST_FACTOR} (default: {methods.FACTOR})",
        "--factor N",
    ),
    "scale": Argument(
        number(1.0, 8.0), f"how many times as large, 1 to 8 (default: {methods.SCALE:g}); or --size", "--scale X"
    ),
    "tile": Argument(
        lambda name, value: "{}x{}".format(*checks.size(name, value)),
        "the largest part of a frame that is made at once; larger frames are made in tiles that overlap (default: a "
        "size that the model was trained on)",
        "--tile WxH",
    ),
    "method": Argument(
        one_of(dict.fromkeys(name for names in methods.METHODS.values() for name in names)),
        "how it is made: diffusion, by the model itself (the default)",
        "--method NAME",
    ),
    "draft": Argument(checks.flag, "a preview: half the size and fewer steps; see fastvid finalize", "--draft"),
    "seed": Argument(
        one_video(
            lambda name, value: random_seed() if (seed := _seed(name, value)) == RANDOM else seed, "one whole number"
        ),
        "seed of the noise, 0 to 2^63-1 (default, and -1: a random one, which is shown)",
        "--seed N",
    ),
    "strength": Argument(
        number(0.0, 1.0),
        "how much the clip changes, 0 to 1",
        "--strength X",
        {
            "edit": f"how much the clip changes, 0 to 1 (default: {STRENGTH['edit']}; embedded: 0.4; outpainting: 1)",
            "finalize": f"how much the draft changes, 0 to 1 (default: {STRENGTH['finalize']})",
            "interpolate": f"how freely new frames are made, 0 to 1 (default: {STRENGTH['interpolate']})",
            "upscale": f"how much detail is made anew, 0 to 1 (default: {STRENGTH['upscale']})",
        },
    ),
    "source_prompt": Argument(
        text, "what the clip shows now; preserves motion and layout better (FlowEdit)", "--source-prompt TEXT"
    ),
    "image": Argument(
        checks.picture,
        "a picture to use as the first frame (I2V, TI2V, VACE, Fun, SkyReels V2 DF, embedded), or of the character "
        "(Animate)",
        "--image FILE",
    ),
    "last_image": Argument(
        checks.picture,
        "a picture to use as the last frame (FLF2V, I2V-A14B, VACE, Fun-InP, Fun-Control 2.2, embedded), or to lead up "
        "to (SkyReels V2 DF)",
        "--last-image FILE",
    ),
    "keyframes": Argument(
        checks.keyframes,
        "a picture to use as frame FRAME, counted from 0 (VACE, Fun-InP, embedded); may be repeated",
        "--keyframe FRAME=FILE",
    ),
    "video": Argument(
        checks.clip,
        "a control video: depth, pose (VACE, Fun-Control), or frames to keep (VACE, Fun-InP)",
        "--video FILE",
    ),
    "video_2": Argument(checks.clip, "the second clip of a blend"),
    "mask": Argument(
        checks.clip,
        "mask of the control video: white is generated, black is kept; a picture applies to all frames",
        "--mask FILE",
        {"edit": "white may change, black is kept; a picture applies to all frames"},
    ),
    "reference_images": Argument(
        checks.pictures,
        "a picture of a subject of the video (VACE, Fun-Control); for VACE may be repeated",
        "--reference-image FILE",
    ),
    "conditioning_scale": Argument(
        checks.scale,
        "weight of control video and reference pictures (default: 1); A,B,...: one for each control layer",
        "--conditioning-scale X",
    ),
    "pose_video": Argument(
        checks.clip,
        "the skeletons of a video's person, frame by frame (Animate); gives the size, and the length",
        "--pose-video FILE",
    ),
    "face_video": Argument(checks.clip, "that person's face, cut out, frame by frame (Animate)", "--face-video FILE"),
    "mode": Argument(
        one_of(MODES),
        "{0} the character, or {1} the video's person by it (Animate; default: {0})".format(*MODES),
        "--mode NAME",
    ),
    "background_video": Argument(
        checks.clip, "the video without its person (Animate, mode replace)", "--background-video FILE"
    ),
    "mask_video": Argument(
        checks.clip,
        "where that person was: white is generated, black is kept (Animate, mode replace); a picture applies to all "
        "frames",
        "--mask-video FILE",
    ),
    "segment_frame_length": Argument(
        whole(5, 1025), "frames that are made at once (Animate), 4k + 1 (default: 77)", "--segment-frame-length N"
    ),
    "prev_segment_conditioning_frames": Argument(
        _one_or_five,
        "frames of the segment before that a segment sees (Animate): 1 or 5 (default: 1)",
        "--prev-segment-conditioning-frames N",
    ),
    "audio": Argument(
        checks.flag,
        "keep the sound of clips where their frames stay (default: if there is any); new frames are silent",
        "--no-audio",
    ),
    "num_inference_steps": Argument(whole(1, checks.MAX_STEPS), "denoising steps, 1 to 1000", "--steps N"),
    "guidance_scale": Argument(
        _guidance, "classifier-free guidance scale, 0 to 1000; up to 1: no guidance", "--guidance-scale X"
    ),
    "guidance_scale_2": Argument(
        _guidance,
        "guidance scale at low noise, for models with two experts (default: --guidance-scale if that is given)",
        "--guidance-scale-2 X",
    ),
    "known_guidance_scale": Argument(
        _guidance,
        "guidance scale in edits and in windows with known frames: pictures, clips, frames of an earlier window "
        "(default: --guidance-scale if that is given)",
        "--known-guidance-scale X",
    ),
    "boundary_ratio": Argument(
        number(0.0, 1.0),
        "noise level at which the low-noise expert takes over, 0 to 1, for models with two experts (default: the "
        "model's own)",
        "--boundary-ratio X",
    ),
    "flow_shift": Argument(number(0.01, 100.0), "timestep shift of the noise schedule, 0.01 to 100", "--flow-shift X"),
    "sigmas": Argument(
        checks.sigmas,
        "noise levels instead of --steps and --flow-shift: descending, in (0, 1]",
        "--sigmas A,B,...",
    ),
    "solver": Argument(one_of(checks.SOLVERS), f"one of {', '.join(checks.SOLVERS)}", "--solver NAME"),
    "schedule": Argument(
        one_of(checks.SCHEDULES),
        "how a long video is denoised: {0} (one window after another) or {1} (noise levels rise from left to right) "
        "(default: {0})".format(*checks.SCHEDULES),
        "--schedule NAME",
    ),
    "ar_step": Argument(
        whole(0, checks.MAX_STEPS),
        "steps that each block of latent frames lags behind the one before it; 0: all at once (SkyReels V2 DF; "
        "default: 0)",
        "--ar-step N",
    ),
    "causal_block_size": Argument(
        whole(1, checks.MAX_FRAMES), "latent frames in a block (SkyReels V2 DF; default: 1)", "--causal-block-size N"
    ),
    "causal_attention": Argument(
        checks.flag,
        "whether attention is causal, so that blocks do not see later ones; the flag turns it off (SkyReels V2 DF; "
        "default: on for blocks of several frames)",
        "--no-causal-attention",
    ),
    "base_num_frames": Argument(
        whole(5, checks.MAX_FRAMES),
        "frames that are generated at once; longer videos follow in parts (SkyReels V2 DF; default: 97 at 540p, 121 at "
        "720p)",
        "--base-num-frames N",
    ),
    "overlap_history": Argument(
        whole(1, checks.MAX_FRAMES),
        "last frames of a clip or part that the next part sees (SkyReels V2 DF; default: 17)",
        "--overlap-history N",
    ),
    "addnoise_condition": Argument(
        number(0.0, 1000.0),
        "noise on the known frames at the start, in thousandths (SkyReels V2 DF; default: 20)",
        "--addnoise-condition X",
    ),
    "quality": Argument(
        one_of(levers.QUALITIES),
        "how much work may be left out: {0} (none), {1} or {2}; other options override what it sets (default: "
        "{0})".format(*levers.QUALITIES),
        "--quality NAME",
    ),
    "cache": Argument(
        levers.check_cache,
        "reuse of what the blocks made in earlier steps: a speed-up such as 1.5, or a method such as first_block, "
        "first_block:threshold=0.1, taylorseer, easycache, magcache, off",
        "--cache SPEEDUP|NAME",
    ),
    "guidance_interval": Argument(
        levers.check_interval,
        "noise levels between which there is guidance, 0 to 1; no negative prompt is needed at others",
        "--guidance-interval LOW,HIGH",
    ),
    "guidance_every": Argument(
        whole(1, 100),
        "how often the negative prompt's velocity is computed: in every N-th step; others reuse the difference",
        "--guidance-every N",
    ),
    "guidance_batch": Argument(
        checks.flag,
        "both prompts of guidance in one call of the model, which is faster for small videos; rounding differs",
        "--guidance-batch",
    ),
    "progressive": Argument(
        number(0.0, 0.95),
        "the share of the steps, from the first on, that are made at half the size (0: none)",
        "--progressive SHARE",
    ),
    "attention": Argument(
        levers.check_attention,
        "what self-attention looks at: dense, sparse, or sparse with settings: sparse:keep=0.3,dense_steps=0.25",
    ),
    "preset": Argument(
        text,
        "steps, solver, shift and guidance of a few-step method in one word, such as lightning; auto: the LoRA's own",
        "--preset NAME",
    ),
    "latents": Argument(
        checks.tensor, "initial noise [1, C, T, h, w]; T is one larger for each reference picture, and for Animate"
    ),
    "prompt_embeds": Argument(
        checks.tensor, "embeddings instead of the prompt: [1, L, text_dim], as `Pipeline.embed` returns"
    ),
    "negative_prompt_embeds": Argument(checks.tensor, "embeddings instead of the negative prompt"),
    "loras": Argument(
        loras.check_of_request,
        "LoRAs of this request alone, beside those that the model was loaded with: files, folders or hub names, each "
        "alone, as (file, scale), or as (file, scale, expert) with expert high or low",
    ),
    "batch_size": Argument(
        whole(1, 256),
        "how many videos of a batch of prompts and seeds are made together, which is faster for small ones; rounding "
        "differs (default: 1)",
        "--batch-size N",
    ),
    "checkpoint": Argument(checks.path, "save progress in FOLDER, for `fastvid resume FOLDER`", "--checkpoint FOLDER"),
    "checkpoint_every": Argument(
        number(0.0, 86400.0, " seconds"),
        "least seconds between saves (default: 1; 0: after every step)",
        "--checkpoint-every S",
    ),
    "keep_checkpoint": Argument(
        checks.flag, "do not remove the checkpoint when the video is done", "--keep-checkpoint"
    ),
}
"""In the order of the help texts."""

DRIVING = ("pose_video", "face_video", "background_video", "mask_video")
"""The clips that drive a character."""
EXPANSION = ("expand_prompt", "prompt_endpoint", "prompt_model", "prompt_key")
CHECKPOINT = ("checkpoint", "checkpoint_every", "keep_checkpoint")
RUN = (*EXPANSION, *CHECKPOINT, "batch_size")
"""Arguments about how a request is run. They do not describe the video, so recipes leave them out."""

CLIPS = {
    "extend": ("video",),
    "loop": ("video",),
    "blend": ("video", "video_2"),
    "edit": ("video",),
    "finalize": ("video",),
    "interpolate": ("video",),
    "upscale": ("video",),
}
"""The clips that each verb requires."""

PROMPT_OF_CLIP = ("extend", "loop", "blend", "finalize", "interpolate", "upscale")
"""Verbs whose prompt defaults to the one in the clip's recipe."""

OPTIONS: Mapping[str, Any] = {
    "generate": options.GenerateOptions,
    "image": options.ImageOptions,
    "extend": options.ExtendOptions,
    "loop": options.BridgeOptions,
    "blend": options.BridgeOptions,
    "edit": options.EditOptions,
    "storyboard": options.StoryboardOptions,
    "finalize": options.FinalizeOptions,
    "interpolate": options.InterpolateOptions,
    "upscale": options.UpscaleOptions,
}


def _arguments_of(verb: str) -> Iterator[str]:
    shots = ("shots",) if verb == "storyboard" else ()
    names = {"prompt", *CLIPS.get(verb, ()), *shots, *OPTIONS[verb].__annotations__}
    return (name for name in ARGUMENTS if name in names)


VERBS: Mapping[str, tuple[str, ...]] = {verb: tuple(_arguments_of(verb)) for verb in OPTIONS}
"""The arguments that each verb takes."""


# ---------------------------------------------------------------- signatures and docstrings

Method = TypeVar("Method", bound=Callable[..., Any])


def checked(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """These arguments, each checked; None stays None. Raises InvalidRequest."""
    return {name: value if value is None else ARGUMENTS[name].check(name, value) for name, value in arguments.items()}


def type_of(name: str) -> str:
    """An option's type, as written in `fastvid.requests.options`."""
    hint = options.AnyOptions.__annotations__.get(name, "")
    return str(getattr(hint, "__forward_arg__", hint))


def documented(method: Method) -> Method:
    """Lists a verb's options in its signature and docstring, in place of `**options`."""
    signature, verb = inspect.signature(method), method.__name__
    explicit = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    allowed = OPTIONS.get(verb, options.AnyOptions).__annotations__
    names = [name for name in ARGUMENTS if name in allowed and name not in signature.parameters]
    keywords = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=type_of(name))
        for name in names
    ]
    cast(Any, method).__signature__ = signature.replace(
        parameters=[*explicit, *keywords]
    )  # what inspect.signature reads
    rows = [f"    {name}: {_in_python(ARGUMENTS[name].help_for(verb))}" for name in names]
    title = "Options (None: the model's preset decides):"
    method.__doc__ = "\n".join((inspect.cleandoc(method.__doc__ or ""), "", title, *rows))
    return method


def _in_python(help: str) -> str:
    """A help text with argument names in place of flags."""
    spelled = {row.flag.split(" ")[0]: name for name, row in ARGUMENTS.items() if row.flag}
    return re.sub(r"--[a-z0-9-]+", lambda match: spelled.get(match[0], match[0]), help)
