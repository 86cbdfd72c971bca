"""The GPU ladder works on a machine that has no ftfy, wcwidth, diffusers or av: nothing on its way imports them
early."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MISSING = ("ftfy", "wcwidth", "diffusers", "av")

BLOCK = f"""
import sys


class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {MISSING}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)


sys.meta_path.insert(0, Missing())
"""

IMPORT_ALL = """
import importlib, pkgutil, fastvid
for module in pkgutil.walk_packages(fastvid.__path__, "fastvid."):
    if not module.name.startswith("fastvid.benchmarks."):
        importlib.import_module(module.name)
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """In a process with this environment, and `-p blocked` for pytest, those packages cannot be imported."""
    (tmp_path / "blocked.py").write_text(BLOCK)
    return {**os.environ, "PYTHONPATH": str(tmp_path)}


def gpu_files() -> list[str]:
    text = (ROOT / "benchmarks" / "gpu_tests.py").read_text()
    return sorted(set(re.findall(r"tests/\w+/test_\w+\.py", text)))


@pytest.mark.slow
def test_the_gpu_tests_are_collected(environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "blocked", "-q", "--collect-only", "-m", "gpu", *gpu_files()]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert len(gpu_files()) > 10 and all(file in done.stdout for file in gpu_files())


@pytest.mark.parametrize("blocked", [True, False])
def test_every_module_imports_without_them(environment: dict[str, str], blocked: bool) -> None:
    check = "" if blocked else "import ftfy, av"  # proves that blocking works
    done = subprocess.run(
        [sys.executable, "-c", f"import blocked\n{check}\n{IMPORT_ALL}"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode == 0) == blocked, done.stderr[-3000:]


@pytest.mark.slow
def test_benchmarks_import_without_them(environment: dict[str, str]) -> None:
    names = sorted(path.stem for path in (ROOT / "benchmarks").glob("bench_*.py"))
    environment["PYTHONPATH"] += f"{os.pathsep}{ROOT / 'benchmarks'}"
    code = "import blocked, importlib\n" + "".join(f"importlib.import_module({name!r})\n" for name in names)
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
