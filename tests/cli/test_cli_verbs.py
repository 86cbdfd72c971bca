"""The commands of all verbs: words, flags, recipes; with a pipeline that is not real."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_pipe import FakePipe, failed, run

from fastvid.cli import flags
from fastvid.media.metadata import read_recipe, read_video
from fastvid.media.video import Video


@pytest.fixture(autouse=True)
def clips(pipe: FakePipe) -> None:
    """Two clips and a mask in the working folder."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        Video(rng.integers(0, 256, (5, 64, 80, 3), np.uint8), 16.0, 1, recipe={"prompt": name}).save(f"{name}.npy")
    Video(np.full((1, 64, 80, 3), 255, np.uint8), 16.0, 1).save("mask.png")
    Path("shots.json").write_text(json.dumps([["one", 0.25], {"prompt": "two", "seconds": 0.5}]))


@pytest.mark.parametrize(
    ("words", "verb", "expected"),
    [
        ("extend a.npy -o o.npy --seconds 0.5 --direction before", "extend", {"direction": "before", "prompt": None}),
        ("extend -o o.npy a.npy p --num-frames 3", "extend", {"num_frames": 3, "prompt": "p"}),
        ("extend a.npy --num-frames 3 p -o o.npy", "extend", {"video": "a.npy", "prompt": "p"}),
        ("loop a.npy -o o.npy", "loop", {"video": "a.npy"}),
        ("blend a.npy b.npy p -o o.npy", "blend", {"video": "a.npy", "video_2": "b.npy", "prompt": "p"}),
        ("edit a.npy p -o o.npy --strength 0.7 --mask mask.png", "edit", {"strength": 0.7, "mask": "mask.png"}),
        ("edit a.npy p -o o.npy --source-prompt q --seed 0", "edit", {"source_prompt": "q", "seed": 0}),
        ("storyboard --shot a:b:0.5 --shot c:1 -o o.npy", "storyboard", {"shots": (("a:b", 0.5), ("c", 1.0))}),
        ("storyboard --shots shots.json -o o.npy", "storyboard", {"shots": (("one", 0.25), ("two", 0.5))}),
        ("finalize a.npy -o o.npy --size 96x64", "finalize", {"width": 96, "height": 64}),
        ("interpolate a.npy -o o.npy --factor 3", "interpolate", {"factor": 3, "prompt": None}),
        ("upscale a.npy p -o o.npy --scale 1.5 --tile 64x64", "upscale", {"scale": 1.5, "tile": "64x64"}),
        ("image p -o o.png", "image", {"prompt": "p"}),
        ("generate p -o o.npy --draft", "generate", {"draft": True}),
        ("generate p -o o.npy --keyframe 2=mask.png --keyframe 0=mask.png", "generate", {}),
    ],
)
def test_a_command_is_a_request(
    capsys: pytest.CaptureFixture[str],
    pipe: FakePipe,
    words: str,
    verb: str,
    expected: dict[str, Any],
) -> None:
    status, _, err = run(capsys, *words.split())
    assert status == 0, err
    request = pipe.streamed[-1]
    assert request.verb == verb and {name: getattr(request, name) for name in expected} == expected
    made = "o.png" if verb == "image" else "o.npy"
    assert read_recipe(made)["verb"] == verb
    if "--keyframe" in words:
        assert request.keyframes == {2: "mask.png", 0: "mask.png"}


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ("extend a.npy -o o.npy --strength 1", "--strength: extend does not take it; these do: edit, finalize"),
        ("plan extend a.npy --strength 1", "--strength: plan extend does not take it"),
        ("generate p -o o.npy --direction after", "these do: extend"),
        ("extend a.npy -o o.npy --stregnth 1", "unknown flag --stregnth"),
        ("extend -o o.npy", "no CLIP given: fastvid extend CLIP [PROMPT] -o PATH"),
        ("blend a.npy -o o.npy", "no B given"),
        ("edit a.npy -o o.npy", "no prompt given"),
        ("storyboard -o o.npy", "no shots given; give --shot PROMPT:SECONDS"),
        ("storyboard a -o o.npy --shot p:1", "unexpected 'a'"),
        ("storyboard -o o.npy --shot p", "'p' is not PROMPT:SECONDS"),
        ("storyboard -o o.npy --shot p:x", "'x' is not a number"),
        ("storyboard -o o.npy --shot p:1 --shots shots.json", "--shot and --shots are both given"),
        ("storyboard -o o.npy --shots mask.png", "is no JSON"),
        ("storyboard -o o.npy --shot p:-1", "--shot[0] seconds=-1"),
        ("generate p -o o.npy --keyframe mask.png", "is not FRAME=FILE"),
        ("generate p -o o.npy --keyframe 1=a --keyframe 1=b", "--keyframe 1 is given twice"),
        ("generate p -o o.npy --keyframe 1.5=a", "--keyframe frame=1.5"),
        ("extend a.npy -o o.npy --direction up", "--direction='up': allowed is one of after, before, both"),
        ("edit a.npy p -o o.npy --strength 2", "--strength=2: allowed is a number from 0 to 1; the nearest is 1"),
        ("image p -o o.gif --num-frames 3", "--num-frames: image does not take it"),
        ("extend a.npy p q -o o.npy", "unexpected 'q'; put a prompt of several words in quotes"),
        ("plan --device-memory many", "'MANY' is not a number"),
        ("plan --device-memory 0GB", "no size of a card's memory"),
    ],
)
def test_bad_words(capsys: pytest.CaptureFixture[str], pipe: FakePipe, words: str, match: str) -> None:
    assert match in failed(capsys, 2, *words.split()) and pipe.loaded == []


@pytest.mark.parametrize(
    "words",
    [
        "extend a.npy -o o.npy --seed 3 --direction before",
        "blend a.npy b.npy p -o o.npy --seconds 0.5",
        "edit a.npy p -o o.npy --mask mask.png",
        "edit a.npy p -o o.npy --size 96x80",
        "finalize a.npy -o o.npy --size 96x64",
        "storyboard --shots shots.json -o o.npy",
        "generate p -o o.npy --draft --size 128x160 --steps 3",
        "generate p -o o.npy --keyframe 2=mask.png --image mask.png",
    ],
)
def test_a_recipe_makes_the_same_again(capsys: pytest.CaptureFixture[str], words: str) -> None:
    """What a recipe does not hold, clips and pictures, is given again."""
    status, _, err = run(capsys, *words.split())
    assert status == 0, err
    files = [word for word in words.split() if word in ("a.npy", "b.npy")]
    for flag in ("--mask", "--keyframe", "--image"):
        given = words.split()
        files += given[given.index(flag) : given.index(flag) + 2] if flag in given else []
    status, _, err = run(capsys, words.split()[0], *files, "--recipe", "o.npy", "-o", "again.npy")
    assert status == 0, err
    assert read_recipe("o.npy") == read_recipe("again.npy")
    assert np.array_equal(read_video("o.npy")[0], read_video("again.npy")[0])


def test_a_recipe_knows_its_clips(capsys: pytest.CaptureFixture[str], pipe: FakePipe) -> None:
    assert run(capsys, "extend", "a.npy", "-o", "o.npy")[0] == 0
    loaded = len(pipe.loaded)
    message = failed(capsys, 2, "extend", "b.npy", "--recipe", "o.npy", "-o", "x.npy")
    assert "CLIP is not what this recipe was made with (5x64x80x3 both, but other pixels)" in message
    Video(np.zeros((4, 64, 80, 3), np.uint8), 16.0, 1).save("short.npy")
    message = failed(capsys, 2, "extend", "short.npy", "--recipe", "o.npy", "-o", "x.npy")
    assert "5x64x80x3 against 4x64x80x3" in message
    assert "give CLIP" in failed(capsys, 2, "extend", "--recipe", "o.npy", "-o", "x.npy")
    message = failed(capsys, 2, "loop", "a.npy", "--recipe", "o.npy", "-o", "x.npy")
    assert "o.npy was made by extend: fastvid extend CLIP [PROMPT]" in message
    assert len(pipe.loaded) == loaded, "found before the model is loaded"


def test_a_size_beside_a_recipe_leaves_its_clip_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    """The print is of the clip at the recipe's size."""
    assert run(capsys, "edit", "a.npy", "p", "-o", "o.npy")[0] == 0
    assert run(capsys, "edit", "a.npy", "--recipe", "o.npy", "--size", "96x80", "-o", "x.npy")[0] == 0
    assert "other pixels" in failed(capsys, 2, "edit", "b.npy", "--recipe", "o.npy", "--size", "96x80", "-o", "y.npy")


def test_errors_name_words_and_flags() -> None:
    spelled = flags.with_flags("video and fps are both given; give video again (image=)", "extend")
    assert spelled == "CLIP and --fps are both given; give CLIP again (--image=)"
    assert flags.with_flags("num_inference_steps=0: bad") == "--steps=0: bad"
    assert flags.with_flags("the video is small") == "the video is small"
