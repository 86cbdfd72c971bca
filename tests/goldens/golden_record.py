"""How a result is written down: JSON types, hashes, and names instead of paths of this machine."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import golden_models
import numpy as np

import fastvid

Case = Callable[["Lab"], Any]


@dataclass
class Lab:
    """Where cases run and what they leave. models: the tiny checkpoints; work: the current folder, made for this run.

    pipes: models that were loaded already; frames: by area/case, for frames.npz.
    """

    models: Path
    work: Path
    pipes: dict[Any, Any] = field(default_factory=dict)
    frames: dict[str, np.ndarray] = field(default_factory=dict)
    current: str = ""

    def keep(self, frames: np.ndarray, suffix: str = "") -> None:
        """Put frames into frames.npz under the name of the current case."""
        self.frames[self.current + suffix] = frames

    def plain(self, value: Any) -> Any:
        """A value as JSON has it, without paths, versions and times of this machine."""
        text = json.dumps(value, sort_keys=True, default=simple)
        return json.loads(self.text(text))

    def text(self, text: str) -> str:
        places = {self.models / golden_models.content_hash(): "MODELS", self.work: "WORK"}
        for path, name in (places | {Path(fastvid.__file__).parent: "FASTVID"}).items():
            for known in {str(path), str(path.resolve())}:
                text = text.replace(known, name)
        text = text.replace(f'"fastvid": "{fastvid.__version__}"', '"fastvid": "VERSION"')
        return re.sub(r"0x[0-9a-f]{6,}", "0xADDRESS", text)


def simple(value: Any) -> Any:
    """What json does not know."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, tuple | set | frozenset):
        return sorted(value) if not isinstance(value, tuple) else list(value)
    return str(value)


def sha256(values: Any) -> str | None:
    """Of an array's or a tensor's bytes, in C order."""
    if values is None:
        return None
    array = values.detach().cpu().contiguous().numpy() if hasattr(values, "detach") else np.ascontiguousarray(values)
    return hashlib.sha256(array.tobytes()).hexdigest()


def run_case(lab: Lab, name: str, case: Case) -> Any:
    """The record of a case, or of the error that it raised."""
    lab.current = name
    try:
        return lab.plain(case(lab))
    except Exception as error:
        return {"error": type(error).__name__, "message": lab.text(str(error))}


def video_record(lab: Lab, video: Any) -> dict[str, Any]:
    """A Video, as a verb returns it."""
    lab.keep(video.frames)
    return {
        "shape": list(video.frames.shape),
        "fps": video.fps,
        "seed": video.seed,
        "frames_sha256": sha256(video.frames),
        "latents_shape": None if video.latents is None else list(video.latents.shape),
        "latents_sha256": sha256(video.latents),
        "recipe": video.recipe,
    }


def stream_record(lab: Lab, events: Iterable[Any]) -> dict[str, Any]:
    """All that a stream says."""
    frames, told, event = [], [], None
    for event in events:
        told.append(event_record(event))
        if isinstance(event, fastvid.Frames):
            frames.append(event.frames)
    video = fastvid.Video(np.concatenate(frames), event.fps, event.seed, event.latents, event.recipe)
    return video_record(lab, video) | {"events": told}


def event_record(event: Any) -> list[Any]:
    """An event as a short list: its type and what it says, without times."""
    kind = type(event).__name__
    if isinstance(event, fastvid.Started):
        return [kind, event.total_steps, event.num_frames, event.height, event.width, event.fps, event.seed]
    if isinstance(event, fastvid.Step):
        return [kind, event.step, event.total, round(float(event.sigma), 6)]
    if isinstance(event, fastvid.Frames):
        return [kind, event.start, event.start + len(event.frames)]
    return [kind, event.num_frames, event.fps, event.seed, sorted(event.seconds)]
