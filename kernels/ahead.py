"""Kernels compiled ahead of time, for a GPU that need not be here: what they take of it, and which units they use.

A file of kernels lists in `variants()` the ways in which its kernels are launched; the first of each kernel is the most
common one. `compile_ahead` makes the binary of one and reads from it what limits speed: registers, spills, shared
memory, and whether the matrix units of the architecture are used.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 90, 100)
# What the units look like in PTX; `tma` are bulk copies by descriptor.
UNITS = {
    "mma": r"\bmma\.sync",
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma",
    "tma": r"\bcp\.async\.bulk\.tensor",
}


@dataclass(frozen=True)
class Variant:
    """One way to compile a kernel.

    name: of the variant, unique in its file. types: the types of the arguments that are no constants ("*fp16", "i32",
    "i64", "fp32"), in any order. constants: the constexpr arguments, and arguments that are always 1 or None.
    aligned: arguments that are multiples of 16 (bytes, for pointers). options: num_warps, num_stages and the like.
    archs: the architectures that it is for.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: Sequence[str] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    archs: tuple[int, ...] = ARCHITECTURES


@dataclass(frozen=True)
class Resources:
    """What a kernel takes: registers a thread, bytes a thread that were spilled, bytes of shared memory a block; and
    the units that it uses."""

    registers: int
    spilled: int
    shared: int
    units: tuple[str, ...]


def compile_ahead(variant: Variant, arch: int) -> Resources:
    """Compile for sm_<arch>. Raises what Triton raises."""
    made = compiled(variant, arch)
    registers, spilled = _usage(made.asm["cubin"])
    units = tuple(name for name, pattern in UNITS.items() if re.search(pattern, made.asm["ptx"]))
    return Resources(registers, spilled, made.metadata.shared, units)


def compiled(variant: Variant, arch: int) -> Any:
    """What Triton compiles a variant to for sm_<arch>. Raises what Triton raises."""
    names = variant.kernel.arg_names
    if set(names) != {*variant.types, *variant.constants}:
        raise ValueError(f"{variant.name}: types and constants do not name the arguments {names}")
    signature = {name: variant.types.get(name, "constexpr") for name in names}
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned}
    source = ASTSource(variant.kernel, signature, constexprs=dict(variant.constants), attrs=attrs)
    options = {"enable_fp_fusion": True, **variant.options}  # as the launchers ask for, whatever this Triton's default
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) of the one kernel of a binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool("cuobjdump"), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of registers: {text[:300]}")
    return int(found[1]), int(found[2])


@functools.cache
def tool(name: str) -> str:
    """The path of a CUDA tool that Triton's wheel contains."""
    import triton.backends.nvidia

    return str(Path(triton.backends.nvidia.__file__).with_name("bin") / name)
