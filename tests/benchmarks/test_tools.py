"""The drawn world and its measuring: what is drawn is what is measured, at any size, length and moment."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvid.benchmarks.quality.clips import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    MOTIONS,
    SHAPES,
    Scene,
    bounce,
    draw,
    path,
    random_scene,
)
from fastvid.benchmarks.quality.measure import classify_motion, measure, same_motion
from fastvid.benchmarks.quality.plot_strength import plot
from fastvid.benchmarks.quality.verb_cases import BRIDGE, changes, drawn, kind, loop_lengths, named_kind


def to_uint8(clip: torch.Tensor) -> np.ndarray:
    return ((clip + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def test_there_are_enough_words():
    assert len(COLOURS) >= 8 and len(SHAPES) >= 4 and len(MOTIONS) >= 8 and len(BACKGROUNDS) >= 5


@pytest.mark.parametrize("size", [(64, 64), (96, 160), (80, 64)])
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_what_is_drawn_is_what_is_measured(size, seed):
    scene = random_scene(torch.Generator().manual_seed(seed))
    shown = measure(to_uint8(draw(scene, 17, *size)))
    assert (shown.background, shown.colour, shown.shape) == (scene.background, scene.colour, scene.shape)
    assert same_motion(scene.shape, scene.motion, shown.motion)


@pytest.mark.parametrize("motion", DIRECTIONS)
def test_things_that_move_cross_at_least_0_3_of_the_frame(motion):
    for along in (0.0, 1.0):
        x, y, _, _ = path(Scene("red", "circle", motion, "white", along=along), 17, 64, 96)
        dx, dy = DIRECTIONS[motion]
        assert dx * (x[-1] - x[0]) / 96 + dy * (y[-1] - y[0]) / 64 >= 0.3


@settings(max_examples=50)
@given(st.floats(-1e3, 1e3), st.floats(0, 1), st.floats(0.01, 5))
def test_bounce_stays_inside_and_is_continuous(position, low, span):
    at, near = bounce(torch.tensor([position, position + 1e-3], dtype=torch.float64), low, low + span)
    assert low - 1e-9 <= at <= low + span + 1e-9
    assert abs(near - at) <= 1e-3 + 1e-9


def test_speed_is_per_second_and_things_turn_at_the_border():
    scene = Scene("red", "circle", "moving right", "white")
    fast, slow = path(scene, 9, 64, 64, fps=8)[0], path(scene, 17, 64, 64, fps=16)[0]
    torch.testing.assert_close(fast, slow[::2])
    far = path(scene, 200, 64, 64)[0]
    assert far.min() > 10 and far.max() < 54 and (far.diff() < 0).any()


def test_motion_is_read_from_the_path():
    still, area = np.full((17, 2), 0.5), np.ones(17)
    assert classify_motion(still, area, 0.0) == "standing still"
    assert classify_motion(still, area, 1.0) == "spinning"
    assert classify_motion(still, np.linspace(1, 3, 17), 0.0) == "growing"
    assert classify_motion(still - np.linspace(0, 0.3, 17)[:, None] * [1, 0], area, 0.0) == "moving left"
    assert classify_motion(still, np.zeros(17), 0.0) == "lost"


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.sampled_from([(0, 17), (17, 33), (17, 25)]))
def test_a_stretch_of_a_drawn_clip_has_the_kind_of_motion_that_it_is_named_after(seed, part):
    scene = random_scene(torch.Generator().manual_seed(seed), mid_stream=seed % 2 == 1)
    assert kind(drawn(scene, 33)[slice(*part)], scene.shape) == named_kind(scene)


@given(st.integers(0, 10_000))
def test_a_loop_s_bridge_leads_back_to_where_the_clip_begins(seed):
    scene = random_scene(torch.Generator().manual_seed(seed), mid_stream=True)
    frames, bridge = loop_lengths(scene)
    assert BRIDGE[0] <= bridge <= BRIDGE[1]
    whole = drawn(scene, frames + bridge + 1)
    assert changes(whole[[0, -1]])[0] <= max(1.0, 0.6 * changes(whole).max())


def test_strengths_are_plotted():
    from xml.etree import ElementTree

    row = {"cases": 4, "changed_0.5": 0.25, "changed_1": 1.0, "path_0.5": 1.0, "path_1": 0.5}
    drawing = ElementTree.fromstring(plot(row))
    lines = [e for e in drawing.iter() if e.tag.endswith("polyline")]
    assert len(lines) == 2 and all(len(line.get("points").split()) == 2 for line in lines)
    with pytest.raises(ValueError, match="no curve"):
        plot({"cases": 4})
