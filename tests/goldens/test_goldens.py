"""Every verb makes the frames that it made when small.json and small.npz were written, within one level of 255.

To write them anew, after a change that is meant to change frames: `python make.py . --small` in this folder.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

HERE = Path(__file__).parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

import compare  # noqa: E402
import golden_small  # noqa: E402
from golden_record import Lab, run_case  # noqa: E402

CASES = golden_small.cases()
GOLDEN: dict[str, Any] = json.loads((HERE / "small.json").read_text())["small"]
TOLERANCE = 1


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """One thread, as the files were made with."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("goldens")
    yield Lab(folder / "models", folder)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def frames() -> dict[str, np.ndarray]:
    return compare.load(HERE)


def test_every_case_is_written() -> None:
    assert set(GOLDEN) == set(CASES)
    assert sum((HERE / name).stat().st_size for name in ("small.json", "small.npz")) <= 400_000


@pytest.mark.parametrize("name", CASES)
def test_frames_are_as_they_were(name: str, lab: Lab, frames: dict[str, np.ndarray]) -> None:
    key = f"small/{name}"
    record = run_case(lab, key, CASES[name])
    assert "error" not in record, record
    told = list(compare.differences_of(GOLDEN[name], record, name, TOLERANCE))
    made = list(compare.frame_differences({key: frames[key]}, {key: lab.frames[key]}, TOLERANCE))
    assert told + made == []
