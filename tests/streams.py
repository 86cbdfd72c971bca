"""Streams in tests: all that one says, whether two say the same, and what a kill after each step would leave."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from fastvid.engine.events import Event, Finished, Frames, Started, Step


def frames_of(events: Iterable[Event]) -> np.ndarray:
    return np.concatenate([event.frames for event in events if isinstance(event, Frames)])


def run(stream: Iterable[Event]) -> SimpleNamespace:
    """All that a stream says: frames, latents, numbers of steps, how many there are, recipe."""
    events = list(stream)
    made = [e for e in events if isinstance(e, Frames)]
    assert [e.start for e in made] == np.cumsum([0, *(len(e.frames) for e in made)])[:-1].tolist()
    started, finished = events[0], events[-1]
    assert isinstance(finished, Finished) and isinstance(started, Started)
    return SimpleNamespace(
        frames=frames_of(made),
        latents=finished.latents,
        steps=[e.step for e in events if isinstance(e, Step)],
        total=started.total_steps,
        recipe=finished.recipe,
    )


def same(one: SimpleNamespace, other: SimpleNamespace) -> bool:
    return np.array_equal(one.frames, other.frames) and torch.equal(one.latents, other.latents)


def snapshots(stream: Iterable[Event], path: Path, into: Path) -> list[Any]:
    """Copies of a checkpoint's folder while its request runs: what a kill after each step would leave."""
    copies: list[Any] = []
    for event in stream:
        if isinstance(event, Started | Step):
            copies.append(shutil.copytree(path, into / f"at-{len(copies)}"))
    return copies
