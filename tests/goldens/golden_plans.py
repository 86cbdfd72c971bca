"""Cases of the area "plans": `Plan.to_dict()` over a grid of requests on models that need no weights.

Left out: seconds, seconds_parts, efficiency (from measured rates), and bytes_free of plans for this machine (the memory
that is free now). Plans for another card (`device_memory=`) keep bytes_free, which follows from what is said.
"""

from __future__ import annotations

import itertools
from typing import Any

import golden_inputs as given
from golden_pipes import GIB, pipe
from golden_record import Case, Lab

import fastvid

MEASURED = ("seconds", "seconds_parts", "efficiency")
SIZES = ("832x480", "1280x720", "500x333")
FRAMES = (17, 81, 333)
CARDS = (8, 24, 80)
PUBLISHED = ("wan2.1-t2v-1.3b", "wan2.1-t2v-14b")


def cases() -> dict[str, Case]:
    return {**embedded(), **grid(), **verbs(), **offloads(), **ranks(), **others(), **loaded()}


def planned(model: str, options: dict[str, Any], **said: Any) -> Case:
    """A case: the plan of a request on a blueprint."""

    def run(lab: Lab) -> dict[str, Any]:
        key = ("blueprint", model, repr(sorted(said.items())))
        if key not in lab.pipes:
            lab.pipes[key] = fastvid.blueprint(model, **said)
        return fields(lab.pipes[key].plan(**options), here="device_memory" not in said)

    return run


def fields(plan: Any, here: bool) -> dict[str, Any]:
    left_out = (*MEASURED, "bytes_free") if here else MEASURED
    return {name: value for name, value in plan.to_dict().items() if name not in left_out}


def embedded() -> dict[str, Case]:
    """Every verb on the embedded model, in several sizes, lengths and numbers of steps."""
    found = {}
    for size, frames, steps in itertools.product(("64x64", "160x96", "333x201"), (1, 17, 60, 960), (4, 20)):
        options = {"prompt": "a", "size": size, "num_frames": frames, "num_inference_steps": steps}
        found[f"embedded/{size}/{frames}/{steps}"] = planned("embedded", options, device="cpu")
    for name, options in of_verbs().items():
        found[f"embedded/{name}"] = planned("embedded", options, device="cpu")
        found[f"embedded/{name}/stream"] = planned("embedded", {**options, "keep_frames": False}, device="cpu")
    return found


def of_verbs() -> dict[str, dict[str, Any]]:
    clip, picture = given.clip(9), given.picture()
    edit = {"verb": "edit", "prompt": "a", "video": clip}
    return {
        "seconds": {"prompt": "a", "seconds": 3, "fps": 12},
        "guidance off": {"prompt": "a", "guidance_scale": 1.0},
        "aspect": {"prompt": "a", "aspect": "16:9", "budget": "240p"},
        "sigmas": {"prompt": "a", "sigmas": [1.0, 0.7, 0.3]},
        "draft": {"prompt": "a", "draft": True, "size": "160x96"},
        "staggered": {"prompt": "a", "schedule": "staggered", "num_frames": 40},
        "picture": {"prompt": "a", "image": picture},
        "pictures": {"prompt": "a", "image": picture, "last_image": picture, "keyframes": {8: picture}},
        "image": {"verb": "image", "prompt": "a", "size": "128x128"},
        "extend": {"verb": "extend", "video": clip, "seconds": 1},
        "extend before": {"verb": "extend", "video": clip, "seconds": 2, "direction": "before"},
        "extend both": {"verb": "extend", "video": clip, "num_frames": 30, "direction": "both"},
        "loop": {"verb": "loop", "video": clip, "num_frames": 7},
        "blend": {"verb": "blend", "video": clip, "video_2": clip, "seconds": 1},
        "edit": edit,
        "edit strength": {**edit, "strength": 0.8},
        "edit source": {**edit, "source_prompt": "b"},
        "edit mask": {**edit, "mask": given.still_mask()},
        "edit larger": {**edit, "width": 128, "height": 96},
        "storyboard": {"verb": "storyboard", "shots": [("a", 1), ("b", 2)]},
        "finalize": {"verb": "finalize", "video": clip, "width": 128, "height": 128},
    }


def grid() -> dict[str, Case]:
    """The published models on cards of three sizes. Those that do not fit are recorded as refused."""
    found = {}
    for model, size, frames, card in itertools.product(PUBLISHED, SIZES, FRAMES, CARDS):
        options = {"prompt": "a", "size": size, "num_frames": frames}
        found[f"{model}/{size}/{frames}/{card} GiB"] = planned(model, options, device_memory=card * GIB)
    return found


def verbs() -> dict[str, Case]:
    """Every verb on a published model."""
    said = {"device_memory": 48 * GIB}
    return {
        f"{model}/{name}": planned(model, options, **said)
        for model in PUBLISHED
        for name, options in of_verbs().items()
    }


def offloads() -> dict[str, Case]:
    """Ways of offloading, types and CUDA graphs."""
    options = {"prompt": "a", "size": "832x480", "num_frames": 81, "num_inference_steps": 30}
    ways: list[dict[str, Any]] = [{"offload": mode} for mode in ("none", "text", "blocks")]
    ways += [{"dtype": "float32"}, {"dtype": "float16"}, {"vae_dtype": "bfloat16"}]
    ways += [{"cuda_graphs": False}, {"cuda_graphs": True, "offload": "none"}]
    found = {}
    for model, way in itertools.product(PUBLISHED, ways):
        said = ",".join(f"{name}={value}" for name, value in way.items())
        found[f"{model}/{said}"] = planned(model, options, **way, device_memory=80 * GIB)
    return found


def ranks() -> dict[str, Case]:
    """On several cards, joined in several ways."""
    found = {}
    ways = (2, 4, 8, "guidance=2,ulysses=4", "ring=2", "ulysses=2,ring=2")
    for model, parallel, link in itertools.product(PUBLISHED, ways, ("nvlink", "pcie", "nvlink,infiniband")):
        options = {"prompt": "a", "size": "832x480", "num_frames": 81}
        said = {"parallel": parallel, "link": link, "device_memory": 80 * GIB}
        found[f"{model}/{parallel} ranks/{link}"] = planned(model, options, **said)
    found["embedded/2 ranks"] = planned("embedded", {"prompt": "a"}, parallel=2, device="cpu")
    return found


def others() -> dict[str, Case]:
    """Every other published model once, with what it needs."""
    picture, found = given.picture(), {}
    needs: dict[str, dict[str, Any]] = {
        "wan2.1-i2v-14b-480p": {"image": picture},
        "wan2.1-i2v-14b-720p": {"image": picture},
        "wan2.1-flf2v-14b": {"image": picture, "last_image": picture},
        "wan2.2-i2v-a14b": {"image": picture},
        "wan2.1-vace-1.3b": {"video": given.clip(33), "reference_images": [picture]},
        "wan2.1-vace-14b": {},
    }
    names = ("wan2.2-t2v-a14b", "wan2.2-ti2v-5b", "fastwan2.1-t2v-1.3b", "self-forcing-1.3b", "longlive-1.3b")
    for name in (*needs, *names, "longlive2-5b", "causvid-1.3b", "causal-forcing-framewise-1.3b"):
        options = {"prompt": "a", "size": "832x480", "num_frames": 33, **needs.get(name, {})}
        found[f"{name}/33"] = planned(name, options, device_memory=80 * GIB)
        found[f"{name}/defaults"] = planned(name, {"prompt": "a", **needs.get(name, {})}, device_memory=80 * GIB)
    return found


def loaded() -> dict[str, Case]:
    """The same through `pipe.plan`, and what the pipelines say of themselves."""
    found: dict[str, Case] = {}
    for model in ("embedded", "t2v", "two", "ti2v", "vace"):
        found[f"loaded/{model}"] = by_pipe(model, {"prompt": "a", "size": "96x64", "num_frames": 9})
        found[f"loaded/{model}/edit"] = by_pipe(model, {"verb": "edit", "prompt": "a", "video": given.clip(9)})
        found[f"loaded/{model}/describe"] = lambda lab, model=model: pipe(lab, model).describe()
        found[f"loaded/{model}/inspect"] = lambda lab, model=model: pipe(lab, model).inspect()
    return found


def by_pipe(model: str, options: dict[str, Any]) -> Case:
    return lambda lab: fields(pipe(lab, model).plan(**options), here=True)
