"""setup.py: what it makes of the environment and the compiler, and what it compiles anew."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OLD_NVCC = r"""#!/bin/sh
case "$*" in
    --version) echo "Cuda compilation tools, release 12.4, V12.4.131" ;;
    --list-gpu-code) printf "sm_80\nsm_89\nsm_90\n" ;;
    *=compute_80,* | *=compute_89,* | *=compute_90,* | *=compute_90a,*) echo "#$ TOP=/opt/toolkit" >&2 ;;
    *) echo "nvcc fatal   : Unsupported gpu architecture 'compute_nn'" >&2; exit 1 ;;
esac
"""


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
    ("choice", "nvcc", "gpu", "runtime", "built"),
    [
        (None, True, True, True, True),
        ("auto", True, True, True, True),
        ("auto", True, True, False, False),
        ("auto", True, False, True, False),
        ("auto", False, True, False, False),
        ("1", True, False, True, True),
        ("1", True, True, False, True),  # and the build says what is missing
        ("0", True, True, True, False),
    ],
)
def test_when_the_extension_is_built(
    setup_py: types.ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    choice: str | None,
    nvcc: bool,
    gpu: bool,
    runtime: bool,
    built: bool,
) -> None:
    if choice is not None:
        monkeypatch.setenv("FASTVID_BUILD_CUDA", choice)
    monkeypatch.setattr(setup_py, "find_nvcc", lambda: "/cuda/bin/nvcc" if nvcc else None)
    monkeypatch.setattr(setup_py, "has_gpu", lambda: gpu)
    monkeypatch.setattr(setup_py, "cuda_version", lambda nvcc: "12.0")
    monkeypatch.setattr(setup_py, "cuda_root", lambda nvcc: tmp_path)
    if runtime:
        (tmp_path / "lib").mkdir()
        (tmp_path / "lib" / "libcudart_static.a").touch()
    assert setup_py.wants_cuda() is built


def test_an_nvcc_that_is_too_old(setup_py: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_py, "find_nvcc", lambda: "/usr/bin/nvcc")
    monkeypatch.setattr(setup_py, "has_gpu", lambda: True)
    monkeypatch.setattr(setup_py, "cuda_version", lambda nvcc: "11.8")
    assert setup_py.wants_cuda() is False  # the package is installed without the extension
    monkeypatch.setenv("FASTVID_BUILD_CUDA", "1")
    with pytest.raises(SystemExit, match=r"needs nvcc 12\.0 or later, and /usr/bin/nvcc is 11\.8"):
        setup_py.wants_cuda()


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
        setup_py.cuda_archs("nvcc")


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


@pytest.fixture
def old_nvcc(tmp_path: Path) -> str:
    """A compiler that knows 80, 89, 90 and 90a."""
    path = tmp_path / "nvcc"
    path.write_text(OLD_NVCC)
    path.chmod(0o755)
    return str(path)


def test_the_default_is_cut_to_what_nvcc_knows(
    setup_py: types.ModuleType, monkeypatch: pytest.MonkeyPatch, old_nvcc: str
) -> None:
    assert setup_py.DEFAULT_ARCHS == "80;90a;100;120"
    assert setup_py.cuda_archs(old_nvcc) == ["80", "90a"]
    assert setup_py.left_out(["80", "90a"]) == " (without 100, 120, which nvcc does not know)"
    assert setup_py.left_out(["80", "90a", "100", "120"]) == ""
    monkeypatch.setenv("FASTVID_CUDA_ARCHS", "")  # as if it was not set
    assert setup_py.cuda_archs(old_nvcc) == ["80", "90a"]
    monkeypatch.setenv("FASTVID_CUDA_ARCHS", "90a, 80;90a")
    assert setup_py.cuda_archs(old_nvcc) == ["90a", "80"] and setup_py.left_out(["90a", "80"]) == ""
    monkeypatch.delenv("FASTVID_CUDA_ARCHS")
    monkeypatch.setattr(setup_py, "DEFAULT_ARCHS", "100a;120")
    with pytest.raises(SystemExit, match="the default holds '100a', which nvcc 12.4 does not know"):
        setup_py.cuda_archs(old_nvcc)


@pytest.mark.parametrize(
    ("asked", "unknown", "near"),
    [
        ("80;100a", "100a", "90a"),
        ("100", "100", "90"),
        ("90;88", "88", "89"),
        ("90f", "90f", "90a"),
        ("70", "70", "80"),
    ],
)
def test_an_architecture_that_nvcc_does_not_know(
    setup_py: types.ModuleType, monkeypatch: pytest.MonkeyPatch, old_nvcc: str, asked: str, unknown: str, near: str
) -> None:
    monkeypatch.setenv("FASTVID_CUDA_ARCHS", asked)
    told = rf"holds '{unknown}', which nvcc 12\.4 does not know; it knows 80, 89, 90, 90a \(nearest: {near}\)"
    with pytest.raises(SystemExit, match=told):
        setup_py.cuda_archs(old_nvcc)


def test_the_nvcc_of_this_machine(setup_py: types.ModuleType) -> None:
    nvcc = setup_py.find_nvcc()
    if nvcc is None:
        pytest.skip("there is no nvcc")
    known = setup_py.known_archs(nvcc)
    assert {"80", "90", "90a"} <= set(known) and not {"80a", "999"} & set(known)
    assert setup_py.cuda_archs(nvcc) == [arch for arch in ("80", "90a", "100", "120") if arch in known]
    assert (setup_py.cudart_folder(setup_py.cuda_root(nvcc)) / "libcudart_static.a").is_file()


def test_it_is_said_before_anything_else(monkeypatch: pytest.MonkeyPatch, old_nvcc: str) -> None:
    pytest.importorskip("setuptools")
    path = f"{Path(old_nvcc).parent}{os.pathsep}{os.environ['PATH']}"
    given = {"PATH": path, "FASTVID_BUILD_CUDA": "1", "FASTVID_CUDA_ARCHS": "80;100a", "CUDA_HOME": "", "CUDA_PATH": ""}
    command = [sys.executable, "setup.py", "--version"]
    bad = subprocess.run(command, cwd=ROOT, env={**os.environ, **given}, capture_output=True, text=True)
    assert bad.returncode != 0 and "nearest: 90a" in bad.stderr


def test_the_static_runtime_is_found(setup_py: types.ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="has no libcudart_static.a: install"):
        setup_py.cudart_folder(tmp_path)
    for folder in ("targets/sbsa-linux/lib", "lib64"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "libcudart_static.a").touch()
        assert setup_py.cudart_folder(tmp_path) == tmp_path / folder


# What a result of a kernel is valid for


def test_a_header_changes_the_hashes_of_the_files_that_include_it(setup_py: types.ModuleType, tmp_path: Path) -> None:
    folder = shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    before = setup_py.source_hashes(folder)
    assert set(before) == {path.name for path in folder.glob("*.cu")}
    assert len(set(before.values())) == len(before)
    for path in sorted(folder.iterdir()):
        text = path.read_text()
        path.write_text(text + "// changed\n")
        after = setup_py.source_hashes(folder)
        path.write_text(text)
        assert {file for file in before if after[file] != before[file]} == includers(folder, path.name), path.name
    assert setup_py.source_hashes(folder) == before
    assert includers(folder, "rgb.h") == {"rgb.cu"} and len(includers(folder, "sm90_layout.h")) > 2


def includers(folder: Path, name: str) -> set[str]:
    """The .cu files that the C++ preprocessor reads a file for."""
    found = set()
    for file in folder.glob("*.cu"):
        command = ["g++", "-MM", "-MG", "-x", "c++", "-I", str(folder), str(file)]
        read = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        if name in {Path(word).name for word in read.split()}:
            found.add(file.name)
    return found


# What is compiled anew

HEADER = "#pragma once\ninline int {0}() { return 1; }\n"
DEVICE = '#include "{0}.h"\n__global__ void {0}_kernel() {}\nint {0}_of() { return {0}(); }\n'


@pytest.fixture
def project(setup_py: types.ModuleType, tmp_path: Path) -> Path:
    """setup.py with a csrc of its own: two .cu files with a header each, and bindings that include nothing."""
    if setup_py.find_nvcc() is None or not (shutil.which("ninja") and shutil.which("g++")):
        pytest.skip("there is no nvcc, no ninja or no g++")
    (tmp_path / "csrc").mkdir()
    shutil.copy(ROOT / "setup.py", tmp_path)
    for name in ("one", "two"):
        (tmp_path / f"csrc/{name}.h").write_text(HEADER.replace("{0}", name))
        (tmp_path / f"csrc/{name}.cu").write_text(DEVICE.replace("{0}", name))
    (tmp_path / "csrc/bindings.cpp").write_text(
        "struct Source { const char *file, *hash; };\nSource sources[] FASTVID_SOURCE_HASHES;\n"
    )
    return tmp_path


BUILD = ("build_ext", "--build-lib", "build/lib", "--build-temp", "build/temp")


def compiled_anew(project: Path, command: tuple[str, ...] = BUILD) -> set[str]:
    """Build; which object files, and whether the library, were written."""
    before = {path: path.stat().st_mtime_ns for path in project.rglob("build/**/*")}
    given = {"FASTVID_BUILD_CUDA": "1", "FASTVID_CUDA_ARCHS": "80"}
    called = [sys.executable, "setup.py", "-q", *command]
    done = subprocess.run(called, cwd=project, env={**os.environ, **given}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    written = {path for path in project.rglob("build/**/*") if path.stat().st_mtime_ns != before.get(path)}
    return {path.stem.split(".")[0] for path in written if path.suffix in (".o", ".so")}


@pytest.mark.slow
def test_only_what_changed_is_compiled_anew(project: Path) -> None:
    assert compiled_anew(project) == {"one", "two", "bindings", "_C"}
    assert compiled_anew(project) == set()
    (project / "csrc/one.h").touch()
    assert compiled_anew(project) == {"one", "_C"}
    (project / "csrc/two.cu").touch()
    assert compiled_anew(project) == {"two", "_C"}
    # What the files hold goes into SOURCE_HASHES, and that into the bindings alone.
    with open(project / "csrc/two.h", "a") as file:
        file.write("// more\n")
    assert compiled_anew(project) == {"two", "bindings", "_C"}
    (project / "csrc/notes.h").write_text("// included by nobody\n")
    assert compiled_anew(project) == set()


@pytest.mark.slow
def test_an_editable_installation_keeps_its_object_files(project: Path) -> None:
    pytest.importorskip("setuptools", "70.1")  # from then on it makes wheels by itself
    (project / "fastvid").mkdir()
    (project / "pyproject.toml").write_text(
        '[project]\nname = "fastvid"\nversion = "0"\n[tool.setuptools]\npackages = []\n'
    )
    editable = ("editable_wheel", "--dist-dir", "dist")
    assert compiled_anew(project, editable) == {"one", "two", "bindings"}
    (project / "csrc/one.h").touch()
    assert compiled_anew(project, editable) == {"one"}
    assert list((project / "fastvid").glob("_C.*.so"))
