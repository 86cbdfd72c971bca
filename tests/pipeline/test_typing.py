"""What editors and type checkers see of the verbs: a misspelt keyword or a wrong type is reported, and help names
all."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from fastvid import checks
from fastvid.api import Blueprint
from fastvid.cli.flags import FLAGS
from fastvid.pipeline.pipeline import Pipeline
from fastvid.requests import options
from fastvid.requests.arguments import ARGUMENTS, DIRECTIONS, OPTIONS, VERBS
from fastvid.requests.request import Request

ROOT = Path(__file__).parents[2]
START = """import numpy as np
import fastvid
pipe = fastvid.load("embedded")
video = pipe.generate("a")
"""
GOOD = (
    'made: fastvid.Video = pipe.generate("a", seed=1, size="64x64", image="a.png", solver="unipc", guidance_scale=3)',
    'pipe.generate("a", keyframes={3: np.zeros((4, 4, 3), np.uint8)}, mask=[np.ones((4, 4))], seed=None)',
    'pipe.extend(video, seconds=1.0, direction="both")',
    'pipe.blend(video, "b.mp4", "a", num_frames=3)',
    'pipe.storyboard([("a", 1.0), ("b", 2)], checkpoint="job", checkpoint_every=0)',
    'pipe.edit(video, "x", strength=0.3, aspect="16:9", budget="480p")',
    'for event in pipe.stream(verb="loop", video=video): started: bool = isinstance(event, fastvid.Started)',
    'memory: int = fastvid.blueprint("wan2.1-t2v-14b").plan(seconds=3).bytes_device',
    'pipe.generate(**fastvid.Request.make(prompt="a").arguments())',
    'async def f() -> fastvid.Video: return await pipe.agenerate("a", seed=3)',
    'pipe.resume("job", image="a.png")',
)
BAD = {
    'pipe.generate("a", sede=1)': 'Unexpected keyword argument "sede"',
    'pipe.generate("a", seed="1")': 'Argument "seed".*expected "int | None"',
    'pipe.generate("a", solver="unpic")': 'Argument "solver"',
    'pipe.extend("a.mp4", direction="up")': 'Argument "direction"',
    'pipe.extend("a.mp4", width=64)': 'Unexpected keyword argument "width"',
    'pipe.storyboard("a")': 'Argument 1 to "storyboard"',
    'pipe.stream("a", secnds=1)': 'Unexpected keyword argument "secnds"',
    'pipe.plan("a", num_frames="x")': 'Argument "num_frames"',
    'fastvid.blueprint("a").plan("a", sede=3)': 'Unexpected keyword argument "sede"',
    'async def g() -> None: await pipe.agenerate("a", sede=3)': 'Unexpected keyword argument "sede"',
    'async def h() -> None: await pipe.agenerate("a", seed="3")': 'Argument "seed"',
    'other: int = pipe.generate("a")': "Incompatible types in assignment",
    'pipe.resume("job", imge="a.png")': 'Unexpected keyword argument "imge"',
    'fastvid.blueprint("a", divice="cpu")': 'Unexpected keyword argument "divice"',
    'fastvid.Pool("a").submit("generate", sede=1)': 'Unexpected keyword argument "sede"',
    'fastvid.open("a")': 'Module has no attribute "open"',
}


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What mypy says of all lines together. torch is left aside: reading its stubs takes most of the time."""
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed")
    folder = tmp_path_factory.mktemp("typing")
    (folder / "snippets.py").write_text(START + "\n".join((*GOOD, *BAD)) + "\n")
    (folder / "mypy.ini").write_text(
        "[mypy]\nignore_missing_imports = true\nfollow_imports = silent\n[mypy-torch.*]\nfollow_imports = skip\n"
    )
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--strict", "snippets.py"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=folder, env={**os.environ, "MYPYPATH": str(ROOT)})
    return run.stdout + run.stderr


def test_wrong_calls_are_reported_and_no_others(reported: str) -> None:
    source = (START + "\n".join((*GOOD, *BAD))).splitlines()
    found = {source[int(line) - 1]: text for line, text in re.findall(r"snippets.py:(\d+): error: (.*)", reported)}
    assert set(found) == set(BAD), reported
    for line, says in BAD.items():
        assert re.search(says, found[line]), found[line]


@pytest.mark.slow
def test_public_modules_are_strict(tmp_path: Path) -> None:
    """As pyproject.toml configures it: what users import is checked strictly."""
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_signatures_and_help_name_every_option(verb: str) -> None:
    names = set(OPTIONS[verb].__annotations__)
    for method in (getattr(Pipeline, verb), getattr(Pipeline, f"a{verb}")):
        found = inspect.signature(method).parameters
        assert names <= set(found) and "options" not in found and list(found)[0] == "self"
        assert all(found[name].default is None and found[name].annotation for name in names)
        assert all(f"    {name}: " in method.__doc__ for name in names)
    assert "--" not in getattr(Pipeline, verb).__doc__, "flags are of the command line"


@pytest.mark.parametrize("method", [Pipeline.stream, Pipeline.astream, Pipeline.plan, Blueprint.plan])
def test_streams_and_plans_name_the_options_of_all_verbs(method: Callable[..., Any]) -> None:
    assert {name for names in VERBS.values() for name in names} <= set(inspect.signature(method).parameters)


def test_the_table_the_types_and_the_request_agree() -> None:
    fields = set(Request.__dataclass_fields__) - {"verb"}
    assert fields | {"size"} == set(ARGUMENTS) == set(options.AnyOptions.__annotations__) | {"prompt"}
    assert get_args(options.Solver) == checks.SOLVERS and get_args(options.Schedule) == checks.SCHEDULES
    assert get_args(options.Direction) == DIRECTIONS
    assert {name for name, row in ARGUMENTS.items() if row.flag} == set(FLAGS) - {"shots_file"}
    assert all(row.help and row.help == row.help.strip() for row in ARGUMENTS.values())
    given_again = set(options.GivenAgain.__annotations__)
    assert given_again == {name for name, field in Request.__dataclass_fields__.items() if not field.compare}
