"""Cases of the area "resume": requests that are cut and gone on with. The frames are those of the whole request."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import golden_inputs as given
from golden_inputs import BLUE, RED
from golden_pipes import causal, pipe
from golden_record import Case, Lab, sha256, stream_record

import fastvid

SIZE = {"size": "64x64", "seed": 5}


def cases() -> dict[str, Case]:
    """Name: (model, verb, options, names of options that are given again)."""
    told: dict[str, tuple[str, str, dict[str, Any], tuple[str, ...]]] = {
        "generate": ("embedded", "generate", {"prompt": RED, "num_inference_steps": 4, **SIZE}, ()),
        "windows": ("embedded", "generate", {"prompt": RED, "num_inference_steps": 2, "num_frames": 45, **SIZE}, ()),
        "redraw": ("t2v", "generate", {"prompt": "a", "num_inference_steps": 4, "solver": "redraw", **SIZE}, ()),
        "picture": ("i2v", "generate", {"prompt": "a", "image": given.picture(), **FEW, **SIZE}, ("image",)),
        "extend": ("embedded", "extend", {"prompt": RED, "video": given.clip(5), "seed": 5, **BOTH}, ("video",)),
        "edit": (
            "t2v",
            "edit",
            {"prompt": BLUE, "video": given.clip(5), "strength": 1.0, "seed": 5, **FEW},
            ("video",),
        ),
        "storyboard": ("embedded", "storyboard", {"shots": [(RED, 0.5), (BLUE, 0.5)], **FEW, **SIZE}, ()),
        "two experts": ("two", "generate", {"prompt": "a", "num_inference_steps": 4, **SIZE}, ()),
        "rollout": ("longlive-1.3b", "generate", {"prompt": "a", "num_frames": 45, **SIZE}, ()),
    }
    for _, verb, options, _ in told.values():
        if verb == "generate":
            options.setdefault("num_frames", 9)
    found: dict[str, Case] = {f"{name}/cancel": cut(name, *told_, close=False) for name, told_ in told.items()}
    found["generate/close"] = cut("closed", *told["generate"], close=True)
    return found | {"generate/twice": twice, "generate/kept": kept}


FEW = {"num_inference_steps": 3}
BOTH = {"direction": "both", "num_frames": 5, "num_inference_steps": 2}


def loaded(lab: Lab, model: str) -> Any:
    return causal(lab, model) if model.endswith("b") and "-" in model else pipe(lab, model)


def cut(name: str, model: str, verb: str, options: dict[str, Any], again: tuple[str, ...], *, close: bool) -> Case:
    """Cut after half of the steps, then resumed."""

    def case(lab: Lab) -> dict[str, Any]:
        made, path = loaded(lab, model), f"{name}.ckpt".replace(" ", "-")
        whole = stream_record(lab, made.stream(verb=verb, **options))
        stream = made.stream(verb=verb, **options, checkpoint=path, checkpoint_every=0)
        ended = stop_halfway(stream, close)
        resumed = stream_record(lab, made.resume(path, **{name: options[name] for name in again}))
        same = {name: resumed[name] == whole[name] for name in ("frames_sha256", "latents_sha256", "recipe")}
        return {"ended": ended, "same": same, "removed": not exists(path), "resumed": resumed}

    return case


def stop_halfway(stream: Any, close: bool) -> str:
    """How a stream ends that is stopped after half of its steps."""
    try:
        for event in stream:
            if isinstance(event, fastvid.Step) and event.step == (event.total + 1) // 2:
                stream.close() if close else stream.cancel()
    except fastvid.Error as error:
        return f"{type(error).__name__}: {error}"
    return "closed"


def exists(path: str) -> bool:
    return Path(path).exists()


OPTIONS: dict[str, Any] = {"prompt": RED, "num_inference_steps": 4, "num_frames": 9, **SIZE}


def twice(lab: Lab) -> dict[str, Any]:
    """Cut, gone on with from a copy, and gone on with once more."""
    made = pipe(lab, "embedded")
    stop_halfway(made.stream(**OPTIONS, checkpoint="twice-cut.ckpt", checkpoint_every=0), close=False)
    shutil.copytree("twice-cut.ckpt", "copy.ckpt")
    one, other = (list(made.resume(path)) for path in ("twice-cut.ckpt", "copy.ckpt"))
    return {"first": stream_record(lab, one), "second": stream_record(lab, other)}


def kept(lab: Lab) -> dict[str, Any]:
    """A checkpoint that is kept when the request is done gives the same frames again."""
    made = pipe(lab, "embedded")
    first = list(made.stream(**OPTIONS, checkpoint="kept.ckpt", checkpoint_every=0, keep_checkpoint=True))
    again = list(made.resume("kept.ckpt"))
    hashes = [sha256(events[-1].latents) for events in (first, again)]
    return {"same": hashes[0] == hashes[1], "again": stream_record(lab, again), "removed": not exists("kept.ckpt")}
