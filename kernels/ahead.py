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

from fastvid.kernels.devices import ARCHITECTURES, Arch, options

# What the units look like in PTX, or AMD's assembly; `tma` are bulk copies by descriptor.
UNITS = {
    "mma": r"\bmma\.sync",
    "mfma": r"\bv_mfma_",
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
    archs: tuple[Arch, ...] = ARCHITECTURES


@dataclass(frozen=True)
class Resources:
    """What a kernel takes: registers a thread, bytes a thread that were spilled, bytes of shared memory a block; and
    the units that it uses."""

    registers: int
    spilled: int
    shared: int
    units: tuple[str, ...]


def compile_ahead(variant: Variant, arch: Arch) -> Resources:
    """Compile for an architecture. Raises what Triton raises."""
    made = compiled(variant, arch)
    on_nvidia = "cubin" in made.asm
    text = made.asm["ptx" if on_nvidia else "amdgcn"]
    registers, spilled = _usage(made.asm["cubin"]) if on_nvidia else _usage_on_amd(text)
    units = tuple(name for name, pattern in UNITS.items() if re.search(pattern, text))
    return Resources(registers, spilled, made.metadata.shared, units)


def compiled(variant: Variant, arch: Arch) -> Any:
    """What Triton compiles a variant to for an architecture. Raises what Triton raises."""
    names = variant.kernel.arg_names
    if set(names) != {*variant.types, *variant.constants}:
        raise ValueError(f"{variant.name}: types and constants do not name the arguments {names}")
    signature = {name: variant.types.get(name, "constexpr") for name in names}
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned}
    source = ASTSource(variant.kernel, signature, constexprs=dict(variant.constants), attrs=attrs)
    wanted = {"enable_fp_fusion": True, **variant.options}  # as the launchers ask for, whatever this Triton's default
    target = GPUTarget("hip", arch, 64) if isinstance(arch, str) else GPUTarget("cuda", arch, 32)
    return triton.compile(source, target=target, options=options(arch, wanted))


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


def _usage_on_amd(text: str) -> tuple[int, int]:
    """(registers, bytes of stack) of the one kernel of an assembly text."""
    registers, stack = (re.search(rf"\.{name}:\s*(\d+)", text) for name in ("vgpr_count", "private_segment_fixed_size"))
    if registers is None or stack is None:
        raise RuntimeError(f"the assembly says nothing of registers: {text[-300:]}")
    return int(registers[1]), int(stack[1])


@functools.cache
def tool(name: str) -> str:
    """The path of a CUDA tool that Triton's wheel contains."""
    import triton.backends.nvidia

    return str(Path(triton.backends.nvidia.__file__).with_name("bin") / name)
