"""Builds the CUDA extension `fastvid._C` from csrc/; everything else about the package is in pyproject.toml.

FASTVID_BUILD_CUDA   auto (default): build where nvcc (12.0 or later) and a GPU are found; 1: wherever nvcc is; 0: never
FASTVID_CUDA_ARCHS   what to build for; default: those of "80;90a;100;120" that nvcc knows

Neither torch nor its headers are needed: nvcc compiles csrc/*.cu, the C++ compiler the pybind11 bindings, and the CUDA
runtime is linked statically, so that one wheel serves every torch version and imports where there is no driver.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

DEFAULT_ARCHS = "80;90a;100;120"
OLDEST_CUDA = 12  # the first with sm_90a and tensor maps


def wants_cuda() -> bool:
    choice, nvcc = os.environ.get("FASTVID_BUILD_CUDA", "auto"), find_nvcc()
    if choice not in ("auto", "1", "0"):
        raise SystemExit(f"FASTVID_BUILD_CUDA is {choice!r}; it takes auto, 1 or 0")
    if choice == "1" and nvcc is None:
        raise SystemExit("FASTVID_BUILD_CUDA=1 needs nvcc: put it on PATH or set CUDA_HOME, or use auto or 0")
    if choice == "0" or nvcc is None or (choice == "auto" and not has_gpu()):
        return False
    old = int(cuda_version(nvcc).split(".")[0]) < OLDEST_CUDA
    if old and choice == "1":
        raise SystemExit(
            f"FASTVID_BUILD_CUDA=1 needs nvcc {OLDEST_CUDA}.0 or later, and {nvcc} is {cuda_version(nvcc)}: "
            "set CUDA_HOME to a later one, or use auto or 0"
        )
    return not old and (choice == "1" or find_cudart(cuda_root(nvcc)) is not None)


def find_nvcc() -> str | None:
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    named = [shutil.which("nvcc", path=os.path.join(root, "bin")) for root in roots if root]
    return next(filter(None, [*named, shutil.which("nvcc"), shutil.which("nvcc", path="/usr/local/cuda/bin")]), None)


def has_gpu() -> bool:
    if glob.glob("/dev/nvidia[0-9]*"):
        return True
    smi = shutil.which("nvidia-smi")
    return smi is not None and "GPU" in subprocess.run([smi, "-L"], capture_output=True, text=True).stdout


def cuda_root(nvcc: str) -> Path:
    """The toolkit that nvcc itself uses: the nvcc on PATH may be a link or a script that starts another."""
    dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", dry, re.MULTILINE)
    return Path(top.group(1) if top else Path(nvcc).resolve().parents[1]).resolve()


def cuda_version(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release ([\d.]+)", text).group(1)


def cuda_archs(nvcc: str) -> list[str]:
    """What is built for: those of FASTVID_CUDA_ARCHS, all of which nvcc must know, or those of the default it knows."""
    given = os.environ.get("FASTVID_CUDA_ARCHS")
    archs = list(dict.fromkeys(part.strip() for part in re.split("[;,]", given or DEFAULT_ARCHS)))
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}[af]?", arch):
            raise SystemExit(f"FASTVID_CUDA_ARCHS holds {arch!r}; it takes a list such as {DEFAULT_ARCHS!r}")
    known = [arch for arch in archs if knows(nvcc, arch)]
    if not known or (given and known != archs):
        unknown = next(arch for arch in archs if arch not in known)
        others = known_archs(nvcc)
        near = f" (nearest: {nearest(unknown, others)})" if others else ""
        raise SystemExit(
            f"{'FASTVID_CUDA_ARCHS' if given else 'the default'} holds {unknown!r}, which nvcc {cuda_version(nvcc)} "
            f"does not know; it knows {', '.join(others) or 'none of these'}{near}"
        )
    return known


def left_out(archs: list[str]) -> str:
    """(without 120, which nvcc does not know), if the default has more than is built for."""
    missing = [] if os.environ.get("FASTVID_CUDA_ARCHS") else [a for a in DEFAULT_ARCHS.split(";") if a not in archs]
    return f" (without {', '.join(missing)}, which nvcc does not know)" if missing else ""


def knows(nvcc: str, arch: str) -> bool:
    """Asked by a dry run: nvcc's own list has no a or f."""
    command = [nvcc, "--dryrun", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-x", "cu", "-c", os.devnull]
    return "Unsupported gpu architecture" not in subprocess.run(command, capture_output=True, text=True).stderr


def known_archs(nvcc: str) -> list[str]:
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout
    numbers = sorted(map(int, re.findall(r"^sm_(\d+)$", listed, re.MULTILINE)))
    return [arch for number in numbers for arch in (f"{number}", f"{number}a", f"{number}f") if knows(nvcc, arch)]


def nearest(arch: str, others: list[str]) -> str:
    """By number; then what has the same letter, or one at all if this one has."""

    def distance(other: str) -> tuple[int, bool, bool]:
        (number, letter), (wanted, wished) = (re.fullmatch(r"(\d+)(.?)", one).groups() for one in (other, arch))
        return abs(int(number) - int(wanted)), letter != wished, bool(letter) != bool(wished)

    return min(others, key=distance)


def find_cudart(root: Path) -> Path | None:
    """Where the static CUDA runtime lies, which depends on who packaged it."""
    folders = [root / "lib64", root / "lib", *sorted(root.glob("targets/*/lib"))]
    return next((folder for folder in folders if (folder / "libcudart_static.a").is_file()), None)


def cudart_folder(root: Path) -> Path:
    """The same; SystemExit where there is none."""
    found = find_cudart(root)
    if found is None:
        raise SystemExit(f"{root} has no libcudart_static.a: install the CUDA runtime's files (cuda-cudart-devel)")
    return found


def pybind11_include() -> str:
    """pybind11's headers, or the copy that torch carries (a machine without a package index may have no other)."""
    if importlib.util.find_spec("pybind11"):
        return importlib.import_module("pybind11").get_include()
    torch = importlib.util.find_spec("torch")
    folder = os.path.join(os.path.dirname(torch.origin), "include") if torch else ""
    if not os.path.isdir(os.path.join(folder, "pybind11")):
        raise SystemExit("the CUDA extension needs pybind11 to build: pip install pybind11")
    return folder


def source_hashes(folder: Path) -> dict[str, str]:
    """{"attention.cu": hash, ...}: of each .cu file and the headers that it includes. A benchmark result of a file's
    kernels is valid for this hash."""
    hashes = {}
    for source in sorted(folder.glob("*.cu")):
        digest = hashlib.sha256()
        for name in sorted(included(folder, source.name)):
            digest.update(name.encode() + b"\0" + (folder / name).read_bytes())
        hashes[source.name] = digest.hexdigest()
    return hashes


def included(folder: Path, file: str) -> set[str]:
    """A file and those of the same folder that it includes, and that those include."""
    found, todo = set(), [file]
    while todo:
        name = todo.pop()
        if name not in found and (folder / name).is_file():
            found.add(name)
            todo += re.findall(r'^\s*#\s*include\s*"([^"]+)"', (folder / name).read_text(), re.MULTILINE)
    return found


class BuildCuda(build_ext):
    """Compiles by a generated build.ninja (incremental, parallel), or step by step where there is no ninja."""

    def build_extension(self, ext: Extension) -> None:
        # An editable installation's own folder is a new one each time: nothing in it could be kept.
        build = Path("build/editable" if self.editable_mode else self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        steps = self.steps([Path(source).resolve() for source in ext.sources], build, target)
        ninja = shutil.which("ninja")
        if ninja is None:
            for inputs, _, command in steps:
                print(command, flush=True)
                subprocess.run(command.replace("$in", shlex.join(map(str, inputs))), shell=True, check=True)
            return
        (build / "build.ninja").write_text(ninja_file(steps))
        subprocess.run([ninja, "-v", "-C", str(build)], check=True)

    def steps(self, sources: list[Path], build: Path, target: Path) -> list[tuple[list[Path], Path, str]]:
        """(inputs, output, command) of each object file and of the library; `$in` stands for the inputs."""
        nvcc = find_nvcc()
        archs = cuda_archs(nvcc)
        print(f"fastvid._C for {';'.join(archs)}{left_out(archs)}, by nvcc {cuda_version(nvcc)}", flush=True)
        cxx = os.environ.get("CXX", "g++")
        hashes = ",".join(f'{{"{name}","{digest}"}}' for name, digest in source_hashes(Path("csrc")).items())
        defines = {
            "ARCHS": f'"{";".join(archs)}"',
            "CUDA_VERSION": f'"{cuda_version(nvcc)}"',
            "SOURCE_HASHES": f"{{{hashes}}}",  # initializes a map
        }
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        device = [
            nvcc,
            "-O3",
            "-std=c++17",
            "-cudart=static",
            "-lineinfo",
            *codes,
            "-Xcompiler=-fPIC,-fvisibility=hidden",
        ]
        includes = [f"-I{path}" for path in (pybind11_include(), sysconfig.get_path("include"))]
        host = [cxx, "-O2", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", *includes]
        host += [f"-DFASTVID_{name}={value}" for name, value in defines.items()]
        steps = []
        for source in sources:
            output = build / (source.name + ".o")
            compiler = device if source.suffix == ".cu" else host
            steps.append(
                (
                    [source],
                    output,
                    shlex.join([*compiler, "-MD", "-MF", f"{output}.d", "-c"]) + f" $in -o {shlex.quote(str(output))}",
                )
            )
        objects = [output for _, output, _ in steps]
        libraries = [f"-L{cudart_folder(cuda_root(nvcc))}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        link = f"{shlex.quote(cxx)} -shared -s -o {shlex.quote(str(target))} $in {shlex.join(libraries)}"
        return [*steps, (objects, target, link)]


def ninja_file(steps: list[tuple[list[Path], Path, str]]) -> str:
    lines = ["ninja_required_version = 1.3"]
    for i, (inputs, output, command) in enumerate(steps):
        deps = [f"  depfile = {escape(output)}.d", "  deps = gcc"] if output.suffix == ".o" else []
        lines += [f"rule step{i}", f"  command = {command}", *deps]
        lines += [f"build {escape(output)}: step{i} {' '.join(map(escape, inputs))}"]
    return "\n".join([*lines, ""])


def escape(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


if __name__ == "__main__":
    sources = sorted(glob.glob("csrc/*.cu")) + ["csrc/bindings.cpp"]
    cuda = wants_cuda()
    if cuda:
        cuda_archs(find_nvcc())  # a wrong one is said before pip downloads what fastvid depends on
    setup(
        ext_modules=[Extension("fastvid._C", sources)] if cuda else [],
        cmdclass={"build_ext": BuildCuda},
    )
