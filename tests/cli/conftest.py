"""The command line's tests run in an empty folder, without FASTVID_ variables."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path

import pytest
from fake_pipe import FakePipe


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakePipe:
    made = FakePipe()
    fake = types.ModuleType("fastvid.api")
    fake.load, fake.inspect = made.load, made.inspect  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fastvid.api", fake)
    monkeypatch.setattr("fastvid.api", fake, raising=False)
    for name in [name for name in os.environ if name.startswith("FASTVID_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return made
