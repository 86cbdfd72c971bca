"""What a measured row is valid for: an edit changes exactly the hashes of the kernels that it reaches."""

from __future__ import annotations

import shutil
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

from fastvid.ops import dispatch, sources

ROOT = Path(__file__).parents[2]
HEX = set("0123456789abcdef")


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of kernels/ that `source_hash` reads."""
    folder = shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    spec = ModuleSpec("fastvid.kernels", None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda _: spec)
    return folder


def hashes(folder: Path) -> dict[str, str | None]:
    return {path.name: sources.source_hash("triton", path.name) for path in sorted(folder.glob("[!_]*.py"))}


@pytest.mark.parametrize(
    ("edited", "changed"),
    [
        ("rgb.py", {"rgb.py", "vae_conv.py"}),
        ("row_norms.py", {"row_norms.py", "qk_norm_rope.py"}),
        ("attention.py", {"attention.py", "sparse_attention.py"}),
        ("sparse_attention.py", {"sparse_attention.py"}),
        ("ahead.py", set()),
        ("__init__.py", set()),
    ],
)
def test_an_edit_changes_the_file_and_what_imports_it(kernels: Path, edited: str, changed: set[str]) -> None:
    before = hashes(kernels)
    with open(kernels / edited, "a") as file:
        file.write("# changed\n")
    after = hashes(kernels)
    assert {name for name in before if after[name] != before[name]} == changed


def test_imports_are_followed_in_all_their_forms(kernels: Path) -> None:
    (kernels / "one.py").write_text("def f():\n    from fastvid.kernels import two\n")
    (kernels / "two.py").write_text("import fastvid.kernels.three as three\nimport torch\n")
    (kernels / "three.py").write_text("from fastvid.kernels.one import f\n")  # a circle ends
    assert sources.kernel_files("one.py", kernels) == {"one.py", "two.py", "three.py"}
    first = sources.source_hash("triton", "one.py")
    (kernels / "three.py").write_text("from fastvid.kernels.one import f  # changed\n")
    assert sources.source_hash("triton", "one.py") != first


def test_what_is_not_there_has_no_hash() -> None:
    assert sources.source_hash("triton", "gone.py") is None and sources.source_hash("triton", "") is None
    assert sources.source_hash("triton", "rgb.py+gone.py") is None
    assert sources.source_hash("cuda", "gone.cu") is None


def test_no_file_elsewhere_is_read() -> None:
    for name in ("../kernels/rgb.py", "/etc/passwd", "../../../etc/passwd", ".", "rgb.py+../version.py"):
        assert sources.source_hash("triton", name) is None


def test_a_cuda_file_has_the_hash_that_was_compiled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    built = types.ModuleType("fastvid._C")
    built.SOURCE_HASHES = {"attention.cu": "a" * 64, "conv.cu": "b" * 64, "vae_norm.cu": "c" * 64}
    monkeypatch.setitem(sys.modules, "fastvid._C", built)
    assert sources.source_hash("cuda", "attention.cu") == "a" * 64
    both = sources.source_hash("cuda", "conv.cu+vae_norm.cu")
    assert both is not None and both not in built.SOURCE_HASHES.values() and set(both) <= HEX
    built.SOURCE_HASHES["vae_norm.cu"] = "d" * 64
    assert sources.source_hash("cuda", "conv.cu+vae_norm.cu") != both
    assert sources.source_hash("cuda", "rgb.cu") is None


def test_a_library_s_is_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"triton": "3.6.0", "flash_attn_3": "3.0"}

    def version(name: str) -> str:
        if name not in versions:
            raise sources.importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(sources.importlib.metadata, "version", version)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91501)
    own = f"torch {torch.__version__}"
    assert sources.source_hash("aten_flash") == sources.source_hash("onednn") == own
    assert sources.source_hash("cudnn") == sources.source_hash("channels_last") == f"{own}, cuDNN 91501"
    assert sources.source_hash("compiled") == f"{own}, triton 3.6.0"
    assert sources.source_hash("flash3") == f"{own}, flash_attn_3 3.0"
    assert sources.source_hash("flash") is None and sources.source_hash("sage") is None


def test_every_kernel_of_an_operation_has_its_file() -> None:
    """What the table of files says exists, and nothing that dispatch can run is left out."""
    for op, functions in dispatch.implementations().items():
        for backend in ("triton", *sources.CUDA):
            assert bool(sources.file_of(op, backend)) == (backend in functions), (op, backend)
    for files in sources.FILES.values():
        for backend, file in files.items():
            folder = ROOT / ("kernels" if backend == "triton" else "csrc")
            assert all((folder / name).is_file() for name in file.split("+"))
    assert sources.file_of("attention", "triton", "sparse d128 2^15") == "sparse_attention.py"
    assert sources.file_of("attention", "triton", "self d128 2^15") == "attention.py"
