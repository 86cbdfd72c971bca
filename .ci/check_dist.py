"""Looks at what `python -m build` made of a checkout: python check_dist.py FOLDER.

The source distribution has every file that a build, the tests and lint read; the wheel has every file of the packages,
and with FASTVID_BUILD_CUDA=1 a binary on which auditwheel finds nothing but the C and C++ libraries of the system.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = (".ci", "benchmarks", "csrc", "fastvid", "kernels", "tests", "docs")
BESIDE = ("MANIFEST.in", "constraints.txt", "pyproject.toml", "setup.py")
BINARY = re.compile(r"fastvid/_C\.[\w-]+\.so")


def main(folder: str) -> None:
    (sdist,), (wheel,) = Path(folder).glob("*.tar.gz"), Path(folder).glob("*.whl")
    check_sdist(sdist)
    binaries = check_wheel(wheel)
    assert len(binaries) == (os.environ.get("FASTVID_BUILD_CUDA") == "1"), f"{wheel.name} has {binaries or 'no binary'}"
    if binaries:
        check_binary(wheel)


def files(folder: str) -> set[str]:
    """Of a folder of the checkout, without what Python and builds leave there."""
    paths = [path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix not in (".pyc", ".so")]
    return {path.relative_to(ROOT).as_posix() for path in paths}


def check_sdist(path: Path) -> None:
    with tarfile.open(path) as archive:
        held = {member.name.partition("/")[2] for member in archive if member.isfile()}
    missing = set().union(BESIDE, *map(files, SOURCES)) - held
    assert not missing, f"{path.name} lacks {sorted(missing)}: see MANIFEST.in"
    print(f"{path.name}: {len(held)} files, {path.stat().st_size / 1e6:.1f} MB")


def check_wheel(path: Path) -> list[str]:
    """The wheel has what the checkout's packages have, no more and no less; returns its binaries."""
    held = {name for name in zipfile.ZipFile(path).namelist() if ".dist-info/" not in name}
    beside = {f"fastvid/{name}" for folder in ("benchmarks", "kernels") for name in files(folder)}
    wanted = files("fastvid") | {name for name in beside if re.fullmatch(r"fastvid/(\w+/)+\w+\.py", name)}
    binaries = sorted(filter(BINARY.fullmatch, held))
    wrong = (held - set(binaries)) ^ wanted
    assert not wrong, f"{path.name} lacks {sorted(wrong - held)} and has {sorted(wrong & held)} beyond the packages"
    print(f"{path.name}: {len(held)} files, {path.stat().st_size / 1e6:.1f} MB")
    return binaries


def check_binary(path: Path) -> None:
    """No library beyond those that every system has, and a manylinux tag no later than this machine's glibc."""
    command = [sys.executable, "-m", "auditwheel", "show", "--json", str(path)]
    told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert not told["external_libs"], f"it needs {told['external_libs']}"
    tag = re.fullmatch(r"manylinux_2_(\d+)_\w+", told["overall_tag"])
    newest = int(platform.libc_ver()[1].split(".")[1])
    assert tag and int(tag[1]) <= newest, f"{told['overall_tag']}: glibc here is 2.{newest}"
    print(f"auditwheel: {told['overall_tag']}, with {', '.join(sorted(told['versioned_symbols']))}")


if __name__ == "__main__":
    main(sys.argv[1])
