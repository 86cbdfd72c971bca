"""Video: what a verb returns, and that it can be saved and named."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastvid.errors import InvalidRequest, MediaError
from fastvid.media.metadata import read_recipe, read_video
from fastvid.media.video import Video

FRAMES = np.arange(5 * 64 * 66 * 3).reshape(5, 64, 66, 3).astype(np.uint8)
RECIPE = {"fastvid": "0.1.0", "prompt": "é", "seed": 3, "fps": 16.0}


def video(**changes: Any) -> Video:
    return Video(**{"frames": FRAMES, "fps": 16.0, "seed": 3, "recipe": RECIPE, **changes})


def test_says_what_it_is() -> None:
    made = video()
    assert (len(made), made.num_frames, made.width, made.height, made.seconds) == (5, 5, 66, 64, 5 / 16)
    assert repr(made) == "Video(5 frames, 66x64, 16 fps, seed 3)"
    with pytest.raises(FrozenInstanceError):
        made.fps = 8  # type: ignore[misc]


def test_two_videos_are_compared_by_identity() -> None:
    assert video() != video() and len({video(), video()}) == 2


@pytest.mark.parametrize("name", ["out.npy", "out.mp4", "out.webm", "out.gif", "frames/"])
def test_saves_with_the_recipe(name: str, tmp_path: Path) -> None:
    path = video().save(f"{tmp_path}/{name}")
    frames, fps = read_video(path)
    assert path.is_absolute() and frames.shape == FRAMES.shape and fps == 16 and read_recipe(path) == RECIPE


def test_saves_one_frame_as_a_picture(tmp_path: Path) -> None:
    path = video(frames=FRAMES[:1]).save(tmp_path / "out.png")
    assert np.array_equal(read_video(path)[0], FRAMES[:1])
    with pytest.raises(InvalidRequest, match="one frame"):
        video().save(tmp_path / "out.png")


def test_says_where_it_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="no folder"):
        video().save(tmp_path / "none" / "out.mp4")
    with pytest.raises(InvalidRequest, match="at most 50 fps"):
        video(fps=60.0).save(tmp_path / "out.gif")
    with pytest.raises(InvalidRequest, match="unknown kind"):
        video().save(tmp_path / "out.mp3")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("frames", [FRAMES[0], FRAMES.astype(np.float32), FRAMES[..., :1]])
def test_frames_of_another_kind_are_refused(frames: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8"):
        video(frames=frames)
