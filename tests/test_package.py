"""The package as it is installed: light to import, all of its names and files there, the build's variables checked."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

import fastvid

ROOT = Path(__file__).parents[1]

IMPORT = """
import json, os, sys, time
environ = dict(os.environ)
start = time.perf_counter()
import fastvid
seconds = time.perf_counter() - start
heavy = sorted({"torch", "numpy", "triton", "av", "multiprocessing", "huggingface_hub"} & set(sys.modules))
import multiprocessing
facts = dict(seconds=seconds, heavy=heavy, environ=environ == dict(os.environ),
             start_method=multiprocessing.get_start_method(allow_none=True))
sys.stderr.write("facts " + json.dumps(facts))
"""

IMPORT_ALL = """
import importlib, multiprocessing, os, pkgutil, random, sys, threading, warnings
import numpy, torch
def state():
    b = torch.backends
    return (dict(os.environ), os.getcwd(), multiprocessing.get_start_method(allow_none=True), sys.getrecursionlimit(),
            torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_num_threads(), torch.initial_seed(),
            torch.get_default_dtype(), torch.get_default_device(), torch.are_deterministic_algorithms_enabled(),
            b.cuda.matmul.allow_tf32, b.cudnn.allow_tf32, b.cudnn.benchmark, torch.get_float32_matmul_precision(),
            hash(random.getstate()), numpy.get_printoptions(), threading.active_count())
print(state())
import fastvid
for module in pkgutil.walk_packages(fastvid.__path__, "fastvid."):
    if not module.name.startswith("fastvid.benchmarks."):  # scripts
        importlib.import_module(module.name)
print(state())
"""


def test_import_is_light_and_leaves_no_trace() -> None:
    runs = [
        subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True) for _ in range(3)
    ]
    facts = [json.loads(run.stderr.removeprefix("facts ")) for run in runs]
    assert all(run.stdout == "" and run.stderr.startswith("facts ") for run in runs)
    assert min(fact.pop("seconds") for fact in facts) < 0.1
    assert facts[0] == {"heavy": [], "environ": True, "start_method": None}


def test_importing_all_of_it_changes_no_global_state() -> None:
    run = subprocess.run([sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    before, after = run.stdout.splitlines()
    assert before == after


def test_every_public_name_is_there() -> None:
    assert set(fastvid.__all__) <= set(dir(fastvid))
    for name in fastvid.__all__:
        assert getattr(fastvid, name).__module__.startswith("fastvid."), name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'lood'"):
        _ = fastvid.lood


def test_version_is_that_of_the_installed_package() -> None:
    assert fastvid.__version__ == importlib.metadata.version("fastvid")


def test_kernels_are_a_part_of_the_package() -> None:
    assert importlib.util.find_spec("fastvid.kernels").submodule_search_locations
    assert importlib.util.find_spec("fastvid.kernels.rgb")


def test_every_folder_of_modules_is_packaged() -> None:
    listed = pyproject()["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "fastvid").rglob("*.py")}
    beside = {"fastvid.kernels", "fastvid.benchmarks"}
    assert {".".join(folder.parts) for folder in folders} | beside == set(listed)


def test_data_files_are_there() -> None:
    package = Path(fastvid.__file__).parent
    assert json.loads((package / "ops" / "verified.json").read_text())["kernels"] == []
    assert (package / "py.typed").is_file()
    assert (package / "embedded" / "model_index.json").is_file()


def test_constraints_pin_every_dependency_but_triton() -> None:
    pins = [line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    project = pyproject()["project"]
    extras = [line for name in ("test", "bench", "dev") for line in project["optional-dependencies"][name]]
    needed = {line.split(">=")[0].split(";")[0].strip() for line in [*project["dependencies"], *extras]}
    assert needed - set(pins) == {"triton"}
    assert "triton" not in pins


def test_the_build_needs_no_torch() -> None:
    names = {line.split(">=")[0] for line in pyproject()["build-system"]["requires"]}
    assert names == {"setuptools", "pybind11", "ninja"}


# What setup.py makes of the environment


@pytest.fixture
def setup_py(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    pytest.importorskip("setuptools")
    for name in ("FASTVID_BUILD_CUDA", "FASTVID_CUDA_ARCHS", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("fastvid_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("choice", "nvcc", "gpu", "built"),
    [
        (None, True, True, True),
        ("auto", True, True, True),
        ("auto", True, False, False),
        ("auto", False, True, False),
        ("1", True, False, True),
        ("0", True, True, False),
    ],
)
def test_when_the_extension_is_built(
    setup_py: types.ModuleType, monkeypatch: pytest.MonkeyPatch, choice: str | None, nvcc: bool, gpu: bool, built: bool
) -> None:
    if choice is not None:
        monkeypatch.setenv("FASTVID_BUILD_CUDA", choice)
    monkeypatch.setattr(setup_py, "find_nvcc", lambda: "/cuda/bin/nvcc" if nvcc else None)
    monkeypatch.setattr(setup_py, "has_gpu", lambda: gpu)
    assert setup_py.wants_cuda() is built


def test_building_without_nvcc_fails_clearly(setup_py: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTVID_BUILD_CUDA", "1")
    monkeypatch.setattr(setup_py, "find_nvcc", lambda: None)
    with pytest.raises(SystemExit, match="needs nvcc"):
        setup_py.wants_cuda()


def test_other_choices_are_refused(setup_py: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTVID_BUILD_CUDA", "yes")
    with pytest.raises(SystemExit, match="'yes'; it takes auto, 1 or 0"):
        setup_py.wants_cuda()
    monkeypatch.setenv("FASTVID_CUDA_ARCHS", "80;hopper")
    with pytest.raises(SystemExit, match="'hopper'"):
        setup_py.cuda_archs()


def test_nvcc_is_found_under_cuda_home(
    setup_py: types.ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho '#$ TOP=/opt/toolkit/bin/..' >&2\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert setup_py.find_nvcc() == str(nvcc)
    assert setup_py.cuda_root(str(nvcc)) == Path("/opt/toolkit")


def test_setup_py_runs_on_its_own() -> None:
    pytest.importorskip("setuptools")
    command = [sys.executable, "setup.py", "--version"]
    bad = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "FASTVID_BUILD_CUDA": "2"}, capture_output=True, text=True
    )
    assert bad.returncode != 0 and "it takes auto, 1 or 0" in bad.stderr


def pyproject() -> dict:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())
