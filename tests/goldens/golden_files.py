"""Cases of the area "files": a video goes into a file of each kind, and frames and recipe come out of it again."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import golden_inputs as given
import numpy as np
from golden_cli import run
from golden_inputs import RED
from golden_pipes import pipe
from golden_record import Case, Lab, sha256, video_record

import fastvid

KINDS = ("out.mp4", "out.webm", "out.gif", "out.npy", "frames/")
FEW = {"num_inference_steps": 1, "seed": 3}


def cases() -> dict[str, Case]:
    found: dict[str, Case] = {f"save/{name}": saved(name) for name in (*KINDS, "one.png", "odd.mp4", "odd.gif")}
    found |= {f"clip/{name}": opened(name) for name in (*KINDS, "one.png", "odd.mp4")}
    found |= {f"again/{name}": by_recipe(name) for name in (*KINDS, "one.png")}
    found |= {f"prompt/{name}": by_prompt(name) for name in ("out.mp4", "out.gif", "out.npy")}
    return found | {f"clip of {name}": changed(name, way) for name, way in ways().items()} | {"refused": refused}


def video_for(lab: Lab, name: str) -> Any:
    """The video that is saved under a name: made once."""
    size = "70x66" if name.startswith("odd") else "64x64"
    frames = 1 if name == "one.png" else 7
    key = ("video", size, frames)
    if key not in lab.pipes:
        lab.pipes[key] = pipe(lab, "embedded").generate(RED, size=size, num_frames=frames, fps=12, **FEW)
    return lab.pipes[key]


def saved(name: str) -> Case:
    def case(lab: Lab) -> dict[str, Any]:
        video = video_for(lab, name)
        path = video.save(name)
        return {"path": path, "files": listing(Path(name)), "container": container(Path(name)), **read(lab, name)}

    return case


def read(lab: Lab, name: str) -> dict[str, Any]:
    """What open_clip makes of a file."""
    with fastvid.open_clip(name) as clip:
        frames = clip.read()
        lab.keep(frames)
        about = {"num_frames": clip.num_frames, "fps": clip.fps, "height": clip.height, "width": clip.width}
    return {**about, "shape": list(frames.shape), "frames_sha256": sha256(frames)}


def listing(path: Path) -> list[str]:
    return sorted(one.name for one in path.iterdir()) if path.is_dir() else [path.name]


def container(path: Path) -> dict[str, Any]:
    """Codec, pixel format and names of the metadata of a file that PyAV opens."""
    if path.suffix not in (".mp4", ".webm", ".gif"):
        return {}
    import av

    with av.open(str(path)) as opened:
        stream = opened.streams.video[0]
        about = {"codec": stream.codec_context.name, "pixels": stream.codec_context.pix_fmt}
        about |= {"rate": str(stream.average_rate), "metadata": sorted(opened.metadata)}
    return about


# ---------------------------------------------------------------- clips


def opened(name: str) -> Case:
    """Parts of a clip, at another rate and size."""

    def case(lab: Lab) -> dict[str, Any]:
        video_for(lab, name).save(name)
        with fastvid.open_clip(name) as clip:
            other = clip.resampled(24).resized(80, 48)
            frames = other.read()
            lab.keep(frames)
            parts = {"head_sha256": sha256(clip.head(1)), "tail_sha256": sha256(clip.tail(1))}
            texts = {"text": str(clip), "other": str(other), "chunks": [len(chunk) for chunk in clip.chunks(3)]}
        return {**parts, **texts, "frames_sha256": sha256(frames)}

    return case


def ways() -> dict[str, Any]:
    clip = given.clip(7, 66, 90)
    return {
        "an array": lambda: fastvid.open_clip(clip),
        "pictures": lambda: fastvid.open_clip(list(clip)),
        "one picture": lambda: fastvid.open_clip(clip[0]),
        "a video": lambda: fastvid.open_clip(fastvid.Video(clip, 10.0, 0)),
        "a faster video": lambda: fastvid.open_clip(fastvid.Video(clip, 10.0, 0)).resampled(25),
        "a slower video": lambda: fastvid.open_clip(fastvid.Video(clip, 10.0, 0)).resampled(4),
        "a wider video": lambda: fastvid.open_clip(clip).resized(64, 160),
        "a smaller video": lambda: fastvid.open_clip(clip).resized(64, 64),
    }


def changed(name: str, way: Any) -> Case:
    def case(lab: Lab) -> dict[str, Any]:
        with way() as clip:
            frames = clip.read()
            lab.keep(frames)
            return {"text": str(clip), "fps": clip.fps, "frames_sha256": sha256(frames)}

    return case


# ---------------------------------------------------------------- recipes


def by_recipe(name: str) -> Case:
    """`--recipe FILE` makes the same frames as those that were saved, and one flag beside it changes them."""

    def case(lab: Lab) -> dict[str, Any]:
        video = video_for(lab, name)
        video.save(name)
        statuses = []
        for more, path in (("", "again.npy"), ("--seed 4", "other.npy")):
            words = f"generate --recipe {name} -o {path} {more} --quiet"
            statuses.append(run(*shlex.split(words))[::2])
        again, other = np.load("again.npy"), np.load("other.npy")
        lab.keep(other)
        same = bool(np.array_equal(again, video.frames))
        return {"statuses": statuses, "same": same, "other_sha256": sha256(other)}

    return case


def by_prompt(name: str) -> Case:
    """A clip that is extended without a prompt has that of the recipe in its file."""

    def case(lab: Lab) -> dict[str, Any]:
        video_for(lab, name).save(name)
        return video_record(lab, pipe(lab, "embedded").extend(name, num_frames=3, **FEW))

    return case


def refused(lab: Lab) -> dict[str, Any]:
    """A file that is there stays as it is if another one cannot be written."""
    video_for(lab, "out.mp4").save("there.npy")
    before = Path("there.npy").read_bytes()
    status, out, err = run(*shlex.split("generate a --steps 0 -o there.npy"))
    return {"status": status, "out": out, "err": err, "stays": Path("there.npy").read_bytes() == before}
