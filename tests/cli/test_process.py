"""The process of the command line: streams that are closed, and the threads that torch starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fastvid import env
from fastvid.workers.team import worker_environment


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_error(closed: str, tmp_path: Path) -> None:
    shell = ["/bin/sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-m", "fastvid"]
    known = subprocess.run([*shell, "--version"], capture_output=True, text=True, timeout=60)
    assert known.returncode == 0 and (known.stdout.startswith("fastvid ") or ">&-" in closed) and not known.stderr
    wrong = subprocess.run([*shell, "generate", "--height", "1", "a"], capture_output=True, text=True, timeout=60)
    assert wrong.returncode == 2 and "Traceback" not in wrong.stdout + wrong.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
def test_a_video_is_whole_where_all_streams_are_closed(tmp_path: Path) -> None:
    shell = ["/bin/sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-m", "fastvid"]
    words = ["generate", "a red circle", "-o", "a.npy", "--num-frames", "5", "--steps", "1", "--json"]
    assert subprocess.run([*shell, *words], cwd=tmp_path, timeout=120).returncode == 0
    import numpy as np

    assert np.load(tmp_path / "a.npy").shape == (5, 64, 64, 3)


def test_idle_threads_sleep_unless_the_caller_says_otherwise() -> None:
    assert env.thread_variables({})["OMP_WAIT_POLICY"] == "PASSIVE"
    for name in env.WAITING:
        assert "OMP_WAIT_POLICY" not in env.thread_variables({name: "ACTIVE"})
    assert worker_environment({}, [])["OMP_WAIT_POLICY"] == "PASSIVE"
    assert worker_environment({"OMP_WAIT_POLICY": "ACTIVE"}, [])["OMP_WAIT_POLICY"] == "ACTIVE"
    assert "OMP_WAIT_POLICY" not in worker_environment({"GOMP_SPINCOUNT": "5"}, [])


@pytest.mark.parametrize(
    ("limit", "cores"),
    [("max 100000", None), ("150000 100000", 1.5), ("50000 100000", 0.5), ("", None), ("x y z", None), ("1 0", None)],
)
def test_a_containers_quota_is_seen(tmp_path: Path, monkeypatch, limit: str, cores: float | None) -> None:
    (tmp_path / "cpu.max").write_text(limit + "\n")
    assert env._cores_of_quota(tmp_path) == cores
    monkeypatch.setattr(env, "_cores_of_affinity", lambda: 8)
    monkeypatch.setattr(env, "_cores_of_quota", lambda: cores)
    wanted = 8 if cores is None else max(1, round(cores + 0.49))
    assert env.available_cores() == wanted
    threads = env.thread_variables({}).get("OMP_NUM_THREADS")
    assert threads == (None if wanted == 8 else str(wanted))
    assert "OMP_NUM_THREADS" not in env.thread_variables({"OMP_NUM_THREADS": "3"})


def test_the_quota_of_the_older_control_groups(tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    for name, value in (("quota", "-1"), ("period", "100000")):
        (tmp_path / "cpu" / f"cpu.cfs_{name}_us").write_text(value)
    assert env._cores_of_quota(tmp_path) is None
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("200000")
    assert env._cores_of_quota(tmp_path) == 2


def test_the_library_sets_no_variable() -> None:
    script = (
        "import os; before = dict(os.environ); import fastvid, torch; fastvid.load; print(dict(os.environ) == before)"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "True\n"
    script = (
        "import os, sys, fastvid.__main__ as m; sys.argv = ['fastvid', '--version']; m.main(); "
        "print(os.environ['OMP_WAIT_POLICY'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={"PATH": ""})
    assert done.stdout.endswith("PASSIVE\n"), done.stderr
