"""The package as it is installed: light to import, all of its names and files there, the build's variables checked."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
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
    beside = {"fastvid.kernels", "fastvid.benchmarks", "fastvid.benchmarks.quality"}
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


def test_wheels_are_built_for_every_python_that_is_named() -> None:
    named = {line.split()[-1] for line in pyproject()["project"]["classifiers"] if "Python :: 3." in line}
    wheels = pyproject()["tool"]["cibuildwheel"]["build"]
    assert wheels == f"cp3{{{','.join(sorted(version.removeprefix('3.') for version in named))}}}-manylinux_*"


def pyproject() -> dict:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())
