"""What the tests share: which of them run on this machine."""

from __future__ import annotations

import importlib.util
import os

import pytest

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests marked `gpu` where there is none (skipped), and those marked `interpret` unless Triton
    interprets (deselected: they run in a child process that the file's own test starts)."""
    for item in items:
        if item.get_closest_marker("gpu") and not _has_gpu():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    left_out = [item for item in items if item.get_closest_marker("interpret") and not INTERPRETING]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if importlib.util.find_spec("hypothesis"):
    from hypothesis import settings

    # A shared, slow machine must not fail a test for its speed, and a run must be repeatable.
    settings.register_profile("fastvid", deadline=None, derandomize=True, max_examples=25)
    settings.load_profile("fastvid")
