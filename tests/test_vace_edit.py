"""Edits of a region on VACE: what stays of the clip is seen by the control branch, grey where it changes; against
diffusers' WanVACEPipeline on the same random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_image_to_video import SIGMAS, run_theirs
from test_vace_pipeline import HEIGHT, WIDTH, clip, region, same, write

import fastvid
from fastvid import control, session
from fastvid.cli import main
from fastvid.media import read_video
from fastvid.sampling import latent_noise

OPTIONS = {"negative_prompt": "blue square", "solver": "euler", "sigmas": SIGMAS, "guidance_scale": 4.0}
PROMPT = "a red circle moving left"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vace")


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return write(folder)


@pytest.fixture(scope="module")
def pipe(theirs: Any, folder: Path) -> fastvid.Pipeline:
    return fastvid.load(str(folder), device="cpu")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(frames, mask) of every control video that is made."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    lay_out = control.lay_out
    monkeypatch.setattr(control, "lay_out", lambda *given: found.append(lay_out(*given)) or found[-1])
    return found


def edit(pipe: fastvid.Pipeline, frames: np.ndarray, **options: Any) -> np.ndarray:
    return pipe.edit(frames, PROMPT, seed=5, **{"strength": 1.0, **OPTIONS, **options}).frames


def test_equals_diffusers_where_it_changes_and_the_clip_elsewhere(theirs: Any, pipe: fastvid.Pipeline) -> None:
    frames, changed = clip(9), region(9) > 127
    made = edit(pipe, frames, mask=changed)
    video = torch.from_numpy(frames / 255.0).float().movedim(-1, 1)
    mask = torch.from_numpy(changed)[:, None].float()
    given = {"video": (video * (1 - mask) + 0.5 * mask)[None], "mask": mask.expand(-1, 3, -1, -1)[None]}
    wanted = run_theirs(theirs, latent_noise(5, (16, 3, HEIGHT // 8, WIDTH // 8)), **given)
    assert same(made[changed], wanted[changed]) >= 0.999 and wanted[changed].std() > 5
    assert np.array_equal(made[~changed], frames[~changed])
    # What stays counts for what is made: of another clip it is something else.
    assert same(edit(pipe, 255 - frames, mask=changed)[changed], made[changed]) < 0.9


def test_the_control_branch_sees_grey_where_the_clip_changes(pipe: fastvid.Pipeline, seen: list) -> None:
    height = HEIGHT + 10  # the model makes 16 more
    changed = region(6, height) > 127
    frames = clip(6, height, WIDTH)
    edit(pipe, frames, mask=changed, sigmas=SIGMAS[-1:])
    ((shown, mask),) = seen
    assert shown.shape == (9, 3, HEIGHT + 16, WIDTH) and mask.shape == (9, 1, HEIGHT + 16, WIDTH)
    assert torch.equal(mask[:6, 0, :-6], torch.from_numpy(changed).float())
    assert torch.equal(mask[:, :, -6:], mask[:, :, -7:-6].expand(-1, -1, 6, -1)), "the edge of what is cropped off"
    assert torch.equal(mask[6:], mask[5:6].expand(3, -1, -1, -1))
    signed = torch.from_numpy(frames).movedim(-1, 1) / 127.5 - 1
    assert not shown[mask.expand_as(shown) == 1].any()
    stays = ~torch.from_numpy(changed)[:, None].expand(-1, 3, -1, -1)
    assert torch.allclose(shown[:6, :, :-6][stays], signed[stays], atol=1e-6)


def test_a_larger_frame(pipe: fastvid.Pipeline, seen: list) -> None:
    frames = clip(5)
    made = edit(pipe, frames, width=WIDTH + 32, height=HEIGHT, sigmas=SIGMAS[-2:])
    assert made.shape == (5, HEIGHT, WIDTH + 32, 3) and np.array_equal(made[:, :, 16:-16], frames)
    ((shown, mask),) = seen
    assert mask[..., :16].all() and mask[..., -16:].all() and not mask[..., 16:-16].any()
    assert not shown[..., :16].any() and not shown[..., -16:].any() and shown[..., 16:-16].std() > 0.1
    assert made[:, :, :16].std() > 5


def test_an_edit_of_everything_sees_nothing_of_the_clip(pipe: fastvid.Pipeline, seen: list) -> None:
    edit(pipe, clip(5), strength=0.5, sigmas=SIGMAS)
    ((shown, mask),) = seen
    assert not shown.any() and mask.all()


def test_a_clip_of_several_segments(pipe: fastvid.Pipeline, seen: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later ones are shown what was made before them, and their own part of the clip and of its mask."""
    recipe = replace(pipe._parts.recipe, window=3, overlap=1, context=1)
    short = type(pipe)(replace(pipe._parts, recipe=recipe))
    made_by: list[session.SegmentMaker] = []
    run = session.SegmentMaker.run
    monkeypatch.setattr(session.SegmentMaker, "run", lambda self: made_by.append(self) or run(self))
    frames, changed = clip(17), region(17) > 127
    made = edit(short, frames, mask=changed, sigmas=SIGMAS[-2:])
    assert len(made) == 17 and np.array_equal(made[~changed], frames[~changed])
    assert len(seen) == len(made_by) > 1
    first = made_by[0].segment
    at, segment = first.num_frames, made_by[1].segment
    shown, mask = seen[1]
    assert segment.left == segment.skip > 0 and not mask[: segment.left].any()
    before = torch.from_numpy(made[at - segment.left : at]).movedim(-1, 1) / 127.5 - 1
    assert torch.allclose(shown[: segment.left], before, atol=1e-6)
    there = slice(segment.left, segment.left + segment.num_frames)
    assert torch.equal(mask[there, 0], torch.from_numpy(changed[at : at + segment.num_frames]).float())


def test_from_the_command_line_and_its_plan(
    pipe: fastvid.Pipeline, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    fastvid.Video(clip(5), 16.0, 0).save(tmp_path / "in.npy")
    Image.fromarray(region(1)[0]).save(tmp_path / "mask.png")
    words = ["edit", str(tmp_path / "in.npy"), PROMPT, "--mask", str(tmp_path / "mask.png"), "--model", str(folder)]
    words += ["--device", "cpu", "--steps", "2", "--seed", "5"]
    assert main([*words, "-o", str(tmp_path / "out.npy"), "--quiet"]) == 0
    assert main(["plan", *words, "--json"]) == 0
    capsys.readouterr()
    stays = region(1)[0] <= 127
    made = np.load(tmp_path / "out.npy") if (tmp_path / "out.npy").exists() else read_video(tmp_path / "out.npy")[0]
    assert np.array_equal(made[:, stays], clip(5)[:, stays]) and not np.array_equal(made, clip(5))
