"""Cases of the area "frames" on other kinds of models: two experts, pictures, control, Wan 2.2's VAE, rollouts."""

from __future__ import annotations

from typing import Any

import golden_inputs as given
import numpy as np
from golden_pipes import causal, pipe
from golden_record import Case, Lab, stream_record

PROMPT = "a red circle moving right"
SHORT = {"prompt": PROMPT, "num_inference_steps": 3, "seed": 3, "num_frames": 9, "size": "64x64"}
STEPS = {"prompt": PROMPT, "num_inference_steps": 3, "seed": 3}
FIRST, LAST = given.picture(0), given.picture(1)


def made(model: str, verb: str = "generate", **options: Any) -> Case:
    return lambda lab: stream_record(lab, pipe(lab, model).stream(verb=verb, **options))


def cases() -> dict[str, Case]:
    groups = {
        "two": two,
        "ti2v": ti2v,
        "i2v": i2v,
        "i2v-two": i2v_two,
        "flf2v": flf2v,
        "vace": vace,
        "causal": rollouts,
    }
    return {f"{group}/{name}": case for group, found in groups.items() for name, case in found().items()}


def two() -> dict[str, Case]:
    """As Wan 2.2 T2V-A14B. The boundary is at 0.6875."""
    return {
        "generate": made("two", **SHORT),
        "two scales": made("two", **SHORT, guidance_scale=4.0, guidance_scale_2=1.5),
        "second scale off": made("two", **SHORT, guidance_scale_2=1.0),
        "sigmas": made("two", **{**SHORT, "num_inference_steps": 4}, sigmas=[1.0, 0.8, 0.6875, 0.4], solver="euler"),
        "image": made("two", **SHORT, image=FIRST),
        "extend": made("two", "extend", **STEPS, video=given.clip(5), num_frames=4),
        "edit": made("two", "edit", **STEPS, video=given.clip(5), strength=0.7),
        "offloaded": lambda lab: stream_record(lab, pipe(lab, "two", offload="text").stream(**SHORT)),
    }


def ti2v() -> dict[str, Case]:
    """As Wan 2.2 TI2V-5B."""
    return {
        "generate": made("ti2v", **SHORT),
        "odd size": made("ti2v", **STEPS, size="90x70", num_frames=2),
        "image": made("ti2v", **SHORT, image=FIRST),
        "last image": made("ti2v", **SHORT, last_image=LAST),
        "picture": made("ti2v", "image", **STEPS, size="64x96"),
        "windows": made("ti2v", **{**STEPS, "num_inference_steps": 1}, num_frames=101, size="64x64"),
        "extend before": made("ti2v", "extend", **STEPS, video=given.clip(9), num_frames=6, direction="before"),
        "loop": made("ti2v", "loop", **STEPS, video=given.clip(9), num_frames=6),
        "edit a mask": made("ti2v", "edit", **STEPS, video=given.clip(5), mask=given.still_mask(), strength=0.9),
        "edit larger": made("ti2v", "edit", **STEPS, video=given.clip(5), width=96, height=80),
        "finalize": made("ti2v", "finalize", **STEPS, video=given.clip(5), width=128, height=128),
    }


def i2v() -> dict[str, Case]:
    return {
        "image": made("i2v", **SHORT, image=FIRST),
        "odd size": made("i2v", **STEPS, size="90x70", num_frames=6, image=given.picture(0, 70, 90)),
        "windows": made("i2v", **{**STEPS, "num_inference_steps": 1}, num_frames=93, size="64x64", image=FIRST),
        "extend": made("i2v", "extend", **STEPS, video=given.clip(5), num_frames=6),
        "storyboard": made(
            "i2v",
            "storyboard",
            shots=[(PROMPT, 0.5), ("a blue square", 0.4)],
            image=FIRST,
            size="64x64",
            seed=3,
            num_inference_steps=2,
        ),  # fmt: skip
        "no image": made("i2v", **SHORT),
        "last image": made("i2v", **SHORT, image=FIRST, last_image=LAST),
    }


def i2v_two() -> dict[str, Case]:
    """As Wan 2.2 I2V-A14B."""
    return {
        "image": made("i2v-two", **SHORT, image=FIRST),
        "both": made("i2v-two", **SHORT, image=FIRST, last_image=LAST),
        "loop": made("i2v-two", "loop", **STEPS, video=given.clip(5), num_frames=7),
        "blend": made("i2v-two", "blend", **STEPS, video=given.clip(5), video_2=given.clip(5)[::-1], num_frames=7),
    }


def flf2v() -> dict[str, Case]:
    return {
        "both": made("flf2v", **SHORT, image=FIRST, last_image=LAST),
        "wrong length": made("flf2v", **{**SHORT, "num_frames": 7}, image=FIRST, last_image=LAST),
        "no last image": made("flf2v", **SHORT, image=FIRST),
    }


def vace() -> dict[str, Case]:
    clip, mask = given.clip(9), given.moving_mask(9)
    references = [given.picture(7, 48, 40), given.picture(8, 66, 135)]
    video = {"video": clip, "mask": mask}
    return {
        "text": made("vace", **SHORT),
        "video": made("vace", **STEPS, size="64x64", video=clip),
        "mask": made("vace", **SHORT, **video),
        "soft mask": made("vace", **SHORT, video=clip, mask=soft_mask()),
        "reference": made("vace", **SHORT, reference_images=references[0]),
        "all": made("vace", **SHORT, **video, reference_images=references),
        "half": made("vace", **SHORT, **video, conditioning_scale=0.5),
        "layers": made("vace", **SHORT, **video, conditioning_scale=[0.3, 1.4]),
        "image": made("vace", **SHORT, image=FIRST, last_image=LAST),
        "picture": made("vace", "image", **STEPS, size="64x64", reference_images=references),
        "extend": made("vace", "extend", **STEPS, video=given.clip(5), num_frames=6),
        "edit a mask": made("vace", "edit", **STEPS, video=clip, mask=given.still_mask()),
        "edit larger": made("vace", "edit", **STEPS, video=given.clip(5), width=96, height=80),
        "windows": made("vace", **{**STEPS, "num_inference_steps": 1}, size="64x64", video=given.clip(90)),
    }


def soft_mask() -> np.ndarray:
    """A bar that moves, white with a soft edge: uint8 [F, H, W]."""
    x = np.arange(64)[None, None] - 6 * np.arange(9)[:, None, None]
    return np.broadcast_to(np.clip(40 * (20 - np.abs(x - 20)), 0, 255), (9, 64, 64)).astype(np.uint8)


# ---------------------------------------------------------------- rollouts and few steps


def rollouts() -> dict[str, Case]:
    """Models that make a video block by block, and those of three steps."""
    size = {"size": "64x64", "seed": 3}
    shots = [(PROMPT, 2.0), ("a blue square", 1.5)]
    found: dict[str, Case] = {}
    for name in ("self-forcing-1.3b", "causal-forcing-framewise-1.3b", "causvid-1.3b", "longlive-1.3b", "longlive2-5b"):
        found[name] = rollout(name, prompt=PROMPT, num_frames=61, **size)
        found[f"{name} image"] = rollout(name, prompt=PROMPT, num_frames=21, image=FIRST, **size)
        found[f"{name} extend"] = rollout(name, "extend", prompt=PROMPT, video=given.clip(13), num_frames=20, seed=3)
        found[f"{name} storyboard"] = rollout(name, "storyboard", shots=shots, **size)
    return found | {
        "rolling window": rollout("self-forcing-1.3b", prompt=PROMPT, num_frames=121, **size),
        "another prompt": change_prompt,
        "before": rollout("self-forcing-1.3b", "extend", prompt=PROMPT, video=given.clip(5), direction="before"),
        "fastwan": rollout("fastwan2.1-t2v-1.3b", prompt=PROMPT, num_frames=9, **size),
        "fastwan extend": rollout("fastwan2.1-t2v-1.3b", "extend", prompt=PROMPT, video=given.clip(5), seed=3),
    }


def rollout(name: str, verb: str = "generate", **options: Any) -> Case:
    return lambda lab: stream_record(lab, causal(lab, name).stream(verb=verb, **options))


def change_prompt(lab: Lab) -> dict[str, Any]:
    stream = causal(lab, "longlive-1.3b").stream(PROMPT, num_frames=45, size="64x64", seed=3)
    stream.change_prompt("a blue square")
    return stream_record(lab, stream)
