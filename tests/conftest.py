"""What the tests share: threads, which tests run on this machine, and how many examples hypothesis draws.

Two tiers: `pytest -n 2` runs the fast one; `pytest -n 2 -m slow --hypothesis-profile thorough` the rest.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import tempfile

# Before torch is imported, and for every child process: one thread, and no spinning on a core that others need.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# What this user has measured (`fastvid tune`) would choose back ends. Workers inherit the folder.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="fastvid-tests-")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

import pytest

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is none. Deselect those marked `interpret` unless Triton interprets: they run
    in a child process that the file's own test starts."""
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

    # No deadline, since a shared machine may be slow; derandomized, so that a run can be repeated.
    settings.register_profile("thorough", deadline=None, derandomize=True, max_examples=25)
    settings.register_profile("fastvid", parent=settings.get_profile("thorough"), max_examples=5)
    settings.load_profile("fastvid")
