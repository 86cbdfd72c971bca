"""Cases of the area "frames": every verb on the embedded model and a tiny one. For other kinds see `golden_kinds`."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import golden_inputs as given
import golden_kinds
import golden_models
import numpy as np
from golden_inputs import BLUE, GREEN, RED
from golden_pipes import path_of, pipe
from golden_record import Case, Lab, sha256, stream_record, video_record

import fastvid

FEW = {"num_inference_steps": 2, "seed": 3}
SHORT = {**FEW, "num_frames": 9, "size": "64x64"}
SHOTS = [(RED, 0.5), (BLUE, 0.4)]


def made(model: str, verb: str = "generate", load: dict[str, Any] | None = None, **options: Any) -> Case:
    """A case: the events of a verb. Options that can be called are called with the lab first."""

    def run(lab: Lab) -> dict[str, Any]:
        filled = {name: value(lab) if callable(value) else value for name, value in options.items()}
        return stream_record(lab, pipe(lab, model, **(load or {})).stream(verb=verb, **filled))

    return run


def cases() -> dict[str, Case]:
    found: dict[str, Case] = {}
    for model in ("embedded", "t2v"):
        for group in (generated, sampled, pictured, continued, edited, told_in_shots, long):
            found |= {f"{model}/{name}": case for name, case in group(model).items()}
        found |= {f"{model}/method/{name}": case for name, case in methods(model).items()}
    return found | embedded_only() | loaded_otherwise() | golden_kinds.cases()


def generated(model: str) -> dict[str, Case]:
    """Sizes and lengths."""
    return {
        "generate": made(model, prompt=RED, **SHORT),
        "odd size": made(model, prompt=RED, **FEW, size="90x70", num_frames=6),
        "large odd size": made(model, prompt=RED, size="480x270", num_frames=3, num_inference_steps=1, seed=3),
        "tall": made(model, prompt=RED, **FEW, height=100, width=65, num_frames=2),
        "one frame": made(model, prompt=RED, **FEW, size="64x64", num_frames=1),
        "seconds": made(model, prompt=RED, **FEW, size="64x64", seconds=0.7, fps=12),
        "aspect": made(model, prompt=RED, **FEW, aspect="3:2", budget=6144, num_frames=5),
        "image": made(model, "image", prompt=GREEN, **FEW, size="72x80"),
        "draft": made(model, prompt=RED, seed=3, size="160x128", num_frames=5, draft=True, num_inference_steps=1),
        "no latents": made(model, prompt=RED, **SHORT, keep_latents=False),
    }


def sampled(model: str) -> dict[str, Case]:
    """Solvers, levels, guidance, noise and embeddings that are given."""
    steps = {"prompt": RED, "num_frames": 5, "size": "64x64", "seed": 4}
    embeds = {
        "prompt_embeds": lambda lab: pipe(lab, model).embed(BLUE),
        "negative_prompt_embeds": embedded_empty(model),
    }
    return {
        **{f"solver {name}": made(model, **steps, num_inference_steps=4, solver=name) for name in solvers()},
        "sigmas": made(model, **steps, sigmas=[1.0, 0.8, 0.45], solver="euler"),
        "flow shift": made(model, **steps, num_inference_steps=3, flow_shift=7.5),
        "guidance off": made(model, **steps, num_inference_steps=2, guidance_scale=1.0),
        "guidance": made(model, **steps, num_inference_steps=2, guidance_scale=6.5, negative_prompt=BLUE),
        "latents": made(model, **steps, num_inference_steps=2, latents=given.noise(1, 16, 2, 8, 8)),
        "embeds": made(model, num_frames=5, size="64x64", seed=4, num_inference_steps=2, **embeds),
        "no prompt": made(model, **{**steps, "prompt": ""}, num_inference_steps=2),
        "known guidance": made(model, **steps, **image(), num_inference_steps=2, known_guidance_scale=2.5),
    }


def solvers() -> tuple[str, ...]:
    return ("unipc", "euler", "dpm++", "redraw")


def embedded_empty(model: str) -> Any:
    return lambda lab: pipe(lab, model).embed("")


def image() -> dict[str, Any]:
    return {"image": given.picture(0)}


def pictured(model: str) -> dict[str, Case]:
    last, middle = given.picture(1), given.picture(2)
    return {
        "first picture": made(model, prompt=RED, **SHORT, **image()),
        "last picture": made(model, prompt=RED, **SHORT, last_image=last),
        "both pictures": made(model, prompt=RED, **SHORT, **image(), last_image=last),
        "keyframes": made(model, prompt=RED, **SHORT, keyframes={2: middle, 7: last}),
        "picture and keyframe": made(model, prompt=RED, **SHORT, **image(), keyframes={4: middle}),
        "picture of another size": made(model, prompt=RED, **FEW, image=given.picture(0, 70, 90), num_frames=5),
    }


def continued(model: str) -> dict[str, Case]:
    """extend, loop and blend."""
    clip, odd = given.clip(9), given.clip(6, 70, 66)
    other = fastvid.Video(given.clip(5, 80, 96, (30, 30, 220)), 8.0, 0)
    return {
        "extend after": made(model, "extend", prompt=RED, video=clip, num_frames=6, **FEW),
        "extend before": made(model, "extend", prompt=RED, video=clip, num_frames=6, direction="before", **FEW),
        "extend both": made(model, "extend", prompt=RED, video=clip, num_frames=5, direction="both", **FEW),
        "extend odd": made(model, "extend", prompt=RED, video=odd, seconds=0.3, **FEW),
        "extend a picture": made(model, "extend", prompt=RED, video=given.clip(1), num_frames=4, **FEW),
        "extend far": made(model, "extend", prompt=RED, video=clip, num_frames=40, num_inference_steps=1, seed=3),
        "loop": made(model, "loop", prompt=RED, video=clip, num_frames=7, **FEW),
        "loop at a rate": made(model, "loop", prompt=RED, video=fastvid.Video(clip, 8.0, 0), seconds=0.5, **FEW),
        "blend": made(model, "blend", prompt=RED, video=clip, video_2=other, num_frames=7, **FEW),
    }


def edited(model: str) -> dict[str, Case]:
    clip, odd = given.clip(9), given.clip(5, 70, 66)
    steps = {"num_inference_steps": 5, "seed": 3}
    return {
        "edit": made(model, "edit", prompt=BLUE, video=clip, **steps),
        "edit strength": made(model, "edit", prompt=BLUE, video=clip, strength=0.8, **steps),
        "edit whole": made(model, "edit", prompt=BLUE, video=odd, strength=1.0, **FEW),
        "edit a mask": made(model, "edit", prompt=BLUE, video=clip, mask=given.still_mask(), **steps),
        "edit a moving mask": made(model, "edit", prompt=BLUE, video=clip, mask=given.moving_mask(), **steps),
        "edit a source prompt": made(model, "edit", prompt=BLUE, video=clip, source_prompt=RED, **steps),
        "edit a source prompt dpm++": made(
            model, "edit", prompt=BLUE, video=odd, source_prompt=RED, solver="dpm++", **steps
        ),
        "edit larger": made(model, "edit", prompt=RED, video=odd, width=100, height=80, **FEW),
        "edit smaller": made(model, "edit", prompt=BLUE, video=given.clip(5, 96, 80), width=64, height=64, **steps),
        "finalize": made(model, "finalize", prompt=RED, video=clip, width=96, height=96, **steps),
    }


def told_in_shots(model: str) -> dict[str, Case]:
    return {
        "storyboard": made(model, "storyboard", shots=SHOTS, size="64x64", **FEW),
        "storyboard picture": made(model, "storyboard", shots=SHOTS, size="64x64", fps=10, **image(), **FEW),
    }


def long(model: str) -> dict[str, Case]:
    """Several windows."""
    frames = 45 if model == "embedded" else 93
    one = {"size": "64x64", "num_frames": frames, "seed": 3, "num_inference_steps": 1}
    return {
        "windows": made(model, prompt=RED, **one),
        "windows with a picture": made(model, prompt=RED, **one, **image()),
        "windows edited": made(model, "edit", prompt=BLUE, video=given.clip(frames), strength=1.0, **FEW),
        "another prompt": lambda lab: change_prompt(lab, model, one),
    }


def change_prompt(lab: Lab, model: str, options: dict[str, Any]) -> dict[str, Any]:
    """The prompt is changed before anything is made: it counts from the next window on."""
    stream = pipe(lab, model).stream(RED, **options)
    stream.change_prompt(BLUE)
    return stream_record(lab, stream)


# ---------------------------------------------------------------- through the methods


def methods(model: str) -> dict[str, Case]:
    """Each verb by its own method, which returns a Video."""
    clip, few = given.clip(5), {"num_inference_steps": 1, "seed": 9}
    calls: dict[str, Any] = {
        "generate": lambda p: p.generate(RED, num_frames=5, size="64x64", **few),
        "image": lambda p: p.image(RED, size="64x64", **few),
        "extend": lambda p: p.extend(clip, RED, num_frames=4, **few),
        "loop": lambda p: p.loop(clip, RED, num_frames=4, **few),
        "blend": lambda p: p.blend(clip, clip[::-1], RED, num_frames=4, **few),
        "edit": lambda p: p.edit(clip, BLUE, strength=1.0, **few),
        "storyboard": lambda p: p.storyboard([(RED, 0.3), (BLUE, 0.3)], size="64x64", **few),
        "draft and finalize": lambda p: p.finalize(draft_of(p), **few),
        "extend what was made": lambda p: p.extend(draft_of(p), num_frames=3, **few),
        "agenerate": lambda p: asyncio.run(p.agenerate(RED, num_frames=5, size="64x64", **few)),
    }
    return {name: by_method(model, call) for name, call in calls.items()}


def by_method(model: str, call: Any) -> Case:
    return lambda lab: video_record(lab, call(pipe(lab, model)))


def draft_of(loaded: Any) -> Any:
    return loaded.generate(RED, size="128x96", num_frames=5, draft=True, num_inference_steps=1, seed=2)


# ---------------------------------------------------------------- for one model alone


def embedded_only() -> dict[str, Case]:
    options = {"prompt": RED, "size": "64x64", "num_inference_steps": 2, "seed": 3}
    return {
        "embedded/defaults": made("embedded", prompt=RED, seed=1),
        "embedded/staggered": made("embedded", **options, num_frames=25, schedule="staggered"),
        "embedded/staggered with a picture": made(
            "embedded", **options, **image(), num_frames=21, schedule="staggered"
        ),
        "embedded/astream": lambda lab: stream_record(lab, asyncio.run(collect(lab))),
        "embedded/two at once": two_at_once,
        "embedded/expanded prompt": made(
            "embedded", **{**options, "prompt": "red ball"}, num_frames=5, expand_prompt=True
        ),
        "embedded/encode and decode": encode_and_decode,
    }


async def collect(lab: Lab) -> list[Any]:
    options = {"num_frames": 5, "size": "64x64", "num_inference_steps": 2, "seed": 3}
    return [event async for event in pipe(lab, "embedded").astream(RED, **options)]


def two_at_once(lab: Lab) -> dict[str, Any]:
    """Two streams on one pipeline, one event of each in turn: each is as it would be alone."""
    loaded, options = pipe(lab, "embedded"), {"num_frames": 9, "size": "64x64", "num_inference_steps": 3}
    streams = [loaded.stream(prompt, seed=seed, **options) for prompt, seed in ((RED, 1), (BLUE, 2))]
    events: list[list[Any]] = [[], []]
    running = [0, 1]
    while running:
        for number in list(running):
            with contextlib.suppress(StopIteration):
                events[number].append(next(streams[number]))
                continue
            running.remove(number)
    return {f"stream {number}": stream_record(lab, each) for number, each in enumerate(events)}


def encode_and_decode(lab: Lab) -> dict[str, Any]:
    loaded, clip = pipe(lab, "embedded"), given.clip(9)
    latents = loaded.encode(clip)
    decoded = loaded.decode(latents)
    lab.keep(decoded)
    embeds = loaded.embed(RED)
    hashes = {"latents": sha256(latents), "frames": sha256(decoded), "embeds": sha256(embeds)}
    return hashes | {"shapes": [list(latents.shape), list(np.shape(decoded)), list(embeds.shape)]}


# ---------------------------------------------------------------- loaded in other ways


def loaded_otherwise() -> dict[str, Case]:
    """Other types, back ends, ways of offloading, a LoRA, two ranks."""
    ways: dict[str, dict[str, Any]] = {
        "bfloat16": {"dtype": "bfloat16"},
        "vae bfloat16": {"vae_dtype": "bfloat16"},
        "reference": {"backend": "reference", "attention": "reference"},
        "offload text": {"offload": "text"},
        "offload blocks": {"offload": "blocks"},
        "vae of another": {"parts": lambda lab: {"vae": path_of(lab, "two") + "/vae"}},
        "lora": {"loras": lambda lab: [(str(golden_models.ensure_lora(lab.models)), 0.8)]},
    }
    found = {f"t2v/{name}": loaded_so(way) for name, way in ways.items()}
    return found | {"t2v/set_loras": set_loras, "t2v/two ranks": two_ranks}


def loaded_so(way: dict[str, Any]) -> Case:
    def run(lab: Lab) -> dict[str, Any]:
        options = {name: value(lab) if callable(value) else value for name, value in way.items()}
        return stream_record(lab, pipe(lab, "t2v", **options).stream("a red circle", **SHORT))

    return run


def set_loras(lab: Lab) -> dict[str, Any]:
    """With a LoRA, and without it again."""
    loaded = fastvid.load(path_of(lab, "t2v"), device="cpu")
    loaded.set_loras([str(golden_models.ensure_lora(lab.models))])
    with_one = video_record(lab, loaded.generate("a red circle", **SHORT))
    loaded.set_loras()
    return {"with": with_one, "without": video_record(lab, loaded.generate("a red circle", **SHORT))}


def two_ranks(lab: Lab) -> dict[str, Any]:
    with fastvid.load(path_of(lab, "t2v"), device="cpu", parallel=2) as loaded:
        return stream_record(lab, loaded.stream("a red circle", **SHORT))
