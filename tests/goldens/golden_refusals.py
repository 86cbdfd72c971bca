"""Cases of the area "refusals": wrong calls in Python. Those on the command line are in `golden_cli`."""

from __future__ import annotations

from typing import Any

import golden_inputs as given
import numpy as np
from golden_cli import refusals as on_the_command_line
from golden_pipes import GIB, path_of, pipe
from golden_record import Case

import fastvid

CLIP, PICTURE = given.clip(5), given.picture()
FILM: dict[str, Any] = {"prompt": "a", "num_inference_steps": 1, "size": "64x64", "num_frames": 5}


# What `Request.make` refuses in "generate". Name of the case: arguments beside a prompt.
WRONG: dict[str, dict[str, Any]] = {
    "steps 0": {"num_inference_steps": 0},
    "steps 2.5": {"num_inference_steps": 2.5},
    "steps text": {"num_inference_steps": "many"},
    "steps true": {"num_inference_steps": True},
    "width small": {"width": 8},
    "width large": {"width": 5000},
    "size word": {"size": "large"},
    "size twice": {"size": "64x64", "width": 64},
    "video too large": {"size": "2048x2048", "num_frames": 5},
    "frames 0": {"num_frames": 0},
    "frames and seconds": {"num_frames": 3, "seconds": 1},
    "seconds 0": {"seconds": 0},
    "seconds huge": {"seconds": 1e6, "fps": 200},
    "fps": {"fps": 1000},
    "seed": {"seed": -5},
    "guidance nan": {"guidance_scale": float("nan")},
    "flow shift": {"flow_shift": 0},
    "sigmas rise": {"sigmas": [0.5, 0.7]},
    "sigmas empty": {"sigmas": []},
    "sigmas and shift": {"sigmas": [0.5], "flow_shift": 3},
    "sigmas and steps": {"sigmas": [0.5], "num_inference_steps": 2},
    "solver": {"solver": "unpic"},
    "schedule": {"schedule": "stagered"},
    "prompt list": {"prompt": ["a"]},
    "prompt nul": {"prompt": "a\0b"},
    "prompt long": {"prompt": "a" * 100_001},
    "prompt and embeds": {"prompt_embeds": np.zeros((1, 2, 3))},
    "unknown": {"stpes": 3},
    "alias": {"steps": 3},
    "not of this verb": {"strength": 0.5},
    "aspect": {"aspect": "wide"},
    "budget": {"budget": "481p"},
    "aspect and width": {"aspect": "1:1", "width": 64},
    "image": {"image": 7},
    "keyframes": {"keyframes": {}},
    "mask alone": {"mask": given.still_mask()},
    "draft": {"draft": 1},
    "latents": {"latents": [1, 2]},
    "conditioning scale": {"conditioning_scale": 1000},
    "reference images": {"reference_images": []},
}


def cases() -> dict[str, Case]:
    return {**requests(), **on_models(), **loading(), **clips(), **checkpoints(), **on_the_command_line()}


def requests() -> dict[str, Case]:
    """What can be refused without a model."""
    found: dict[str, Case] = {f"make/{name}": make("generate", {"prompt": "a", **w}) for name, w in WRONG.items()}
    return found | {
        "make/no prompt": make("generate", {}),
        "make/no clip": make("extend", {"seconds": 1}),
        "make/direction": make("extend", {"video": CLIP, "direction": "up"}),
        "make/second clip": make("blend", {"video": CLIP}),
        "make/strength": make("edit", {"prompt": "a", "video": CLIP, "strength": 1.5}),
        "make/shots": make("storyboard", {"shots": [("a",)]}),
        "make/no shots": make("storyboard", {}),
        "make/verb": make("finalise", {"prompt": "a"}),
        "recipe/foreign": lambda lab: fastvid.Request.from_recipe({"a": 1}),
        "recipe/verb": lambda lab: fastvid.Request.from_recipe({"fastvid": "0", "verb": "dance"}),
        "recipe/tensor": lambda lab: fastvid.Request.from_recipe(
            {"fastvid": "0", "prompt": "a", "latents": {"shape": [1], "sha256": "0" * 64}}
        ),
    }


def make(verb: str, options: dict[str, Any]) -> Case:
    return lambda lab: repr(fastvid.Request.make(verb, **options))


def on_models() -> dict[str, Case]:
    """What only a model can tell. Name of the case: (model, options)."""
    wrong: dict[str, tuple[str, dict[str, Any]]] = {
        "scale of a second expert": ("embedded", {**FILM, "guidance_scale_2": 2.0}),
        "latents of another shape": ("t2v", {**FILM, "latents": given.noise(1, 16, 3, 8, 8)}),
        "embeds of another width": ("t2v", {**FILM, "prompt": None, "prompt_embeds": given.noise(1, 4, 7)}),
        "keyframe behind the end": ("embedded", {**FILM, "keyframes": {9: PICTURE}}),
        "keyframe and image": ("embedded", {**FILM, "keyframes": {0: PICTURE}, "image": PICTURE}),
        "float picture": ("embedded", {**FILM, "image": PICTURE / 255}),
        "grey picture": ("embedded", {**FILM, "image": PICTURE[..., 0]}),
        "missing picture": ("embedded", {**FILM, "image": "missing.png"}),
        "missing clip": ("embedded", {"verb": "extend", "video": "missing.mp4"}),
        "control of no control model": ("t2v", {**FILM, "video": CLIP}),
        "mask of another length": ("t2v", {"verb": "edit", "prompt": "a", "video": CLIP, "mask": given.moving_mask(3)}),
        "no image": ("i2v", FILM),
        "two images": ("i2v", {**FILM, "image": PICTURE, "last_image": PICTURE}),
        "mask": ("i2v", {"verb": "edit", "prompt": "a", "video": CLIP, "mask": given.still_mask()}),
        "staggered": ("two", {**FILM, "schedule": "staggered"}),
        "layers of control": ("vace", {**FILM, "video": CLIP, "conditioning_scale": [1, 1, 1]}),
        "draft of a clip": ("embedded", {"verb": "finalize", "prompt": "a", "video": CLIP, "strength": 2}),
        "clip without prompt": ("embedded", {"verb": "edit", "video": CLIP}),
    }
    found: dict[str, Case] = {f"plan/{name}": plan(*given_) for name, given_ in wrong.items()}
    return found | {
        "stream/unknown": lambda lab: pipe(lab, "embedded").stream("a", verb="generate", steps=3),
        "stream/checkpoint_every": lambda lab: pipe(lab, "embedded").stream("a", checkpoint="a", checkpoint_every=-1),
        "change_prompt": lambda lab: pipe(lab, "embedded").stream("a").change_prompt(7),
        "encode": lambda lab: pipe(lab, "embedded").encode(given.clip(4)),
        "encode size": lambda lab: pipe(lab, "embedded").encode(given.clip(5, 66, 66)),
        "decode": lambda lab: pipe(lab, "embedded").decode(given.noise(1, 3, 2, 8, 8)),
        "expand": lambda lab: pipe(lab, "t2v").generate(expand_prompt=True, **FILM),
        "set_loras": lambda lab: pipe(lab, "t2v").set_loras(["missing.safetensors"]),
    }


def plan(model: str, options: dict[str, Any]) -> Case:
    return lambda lab: f"accepted: {pipe(lab, model).plan(**options).num_frames} frames"


def loading() -> dict[str, Case]:
    """What `load` and `blueprint` refuse."""
    wrong: dict[str, dict[str, Any]] = {
        "model": {"model": "embeded"},
        "folder": {"model": "no/such/folder/here"},
        "model empty": {"model": ""},
        "device": {"device": "tpu"},
        "dtype": {"dtype": "float23"},
        "vae dtype": {"vae_dtype": "half"},
        "backend": {"backend": "tritn"},
        "attention": {"attention": "flush"},
        "offload": {"offload": "block"},
        "parallel": {"parallel": "guidence=2"},
        "parallel 0": {"parallel": 0},
        "part": {"parts": {"vea": "a"}},
        "part missing": {"parts": {"vae": "missing.safetensors"}},
        "lora missing": {"loras": ["missing.safetensors"]},
        "max running": {"max_running": 0},
        "graphs": {"cuda_graphs": True},
        "link": {"link": "wifi", "parallel": 2},
    }
    found: dict[str, Case] = {f"load/{name}": load(options) for name, options in wrong.items()}
    return found | {
        "load/lora of two": lambda lab: fastvid.load(path_of(lab, "t2v"), loras=[("a.safetensors", 1.0, "middle")]),
        "blueprint/name": lambda lab: fastvid.blueprint("wan2.1-t2v-15b"),
        "blueprint/estimate": lambda lab: fastvid.blueprint(device_memory=GIB * 8).plan("a", estimate=True),
        "blueprint/memory": lambda lab: fastvid.blueprint("wan2.1-t2v-14b", device_memory=4 * GIB).plan(
            "a", size="832x480", num_frames=81
        ),
    }


def load(options: dict[str, Any]) -> Case:
    return lambda lab: fastvid.load(**{"device": "cpu", **options})


def clips() -> dict[str, Case]:
    wrong: dict[str, Any] = {
        "missing": "missing.mp4",
        "number": 7,
        "float": CLIP / 255,
        "flat": CLIP[..., 0],
        "empty": CLIP[:0],
        "mixed": [PICTURE, given.picture(0, 70, 70)],
    }
    found: dict[str, Case] = {f"open_clip/{name}": clip(value) for name, value in wrong.items()}
    return found | {
        "save/kind": lambda lab: fastvid.Video(CLIP, 16.0, 0).save("out.mp5"),
        "save/folder": lambda lab: fastvid.Video(CLIP, 16.0, 0).save("none/out.mp4"),
        "save/frames": lambda lab: fastvid.Video(CLIP, 16.0, 0).save("out.png"),
        "Video": lambda lab: fastvid.Video(CLIP / 255, 16.0, 0),
        "clip/read": lambda lab: fastvid.open_clip(CLIP).read(3, 9).shape,
        "clip/resampled": lambda lab: fastvid.open_clip(CLIP).resampled(0),
    }


def clip(value: Any) -> Case:
    return lambda lab: str(fastvid.open_clip(value))


def checkpoints() -> dict[str, Case]:
    return {
        "resume/missing": lambda lab: pipe(lab, "embedded").resume("missing.ckpt"),
        "resume/other weights": other_weights,
        "resume/checkpoint there": twice,
        "unknown name": lambda lab: fastvid.Clip,
    }


def other_weights(lab: Any) -> Any:
    leave_checkpoint(pipe(lab, "embedded"), "other.ckpt")
    return pipe(lab, "t2v").resume("other.ckpt")


def twice(lab: Any) -> Any:
    leave_checkpoint(pipe(lab, "embedded"), "twice.ckpt")
    return list(pipe(lab, "embedded").stream("b", num_frames=5, checkpoint="twice.ckpt"))


def leave_checkpoint(loaded: Any, path: str) -> None:
    """A request that ends after its first step."""
    stream = loaded.stream("a", num_inference_steps=3, num_frames=5, checkpoint=path, checkpoint_every=0, seed=1)
    for event in stream:
        if isinstance(event, fastvid.Step):
            break
    stream.close()
