"""A product whose loads are a warpgroup's of its own, as Triton compiles it for sm_90: registers handed over by
setmaxnreg, barriers of warps by number and count, a ring of mbarriers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import triton
from ptx.from_triton import Compiled
from triton.backends.compiler import GPUTarget
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma

from fastvid.kernels.ahead import Variant

M, N, K, STAGES = 128, 128, 64, 2  # of a tile


@gluon.jit
def produce(a_desc, b_desc, a_ring, b_ring, full, empty, row, size, STEP: gl.constexpr, COUNT: gl.constexpr):
    stage = 0
    phase = 1
    for k in range(0, size, STEP):
        mbarrier.wait(empty.index(stage), phase)
        mbarrier.expect(full.index(stage), a_desc.block_type.nbytes + b_desc.block_type.nbytes)
        tma.async_load(a_desc, [row, k], full.index(stage), a_ring.index(stage))
        tma.async_load(b_desc, [0, k], full.index(stage), b_ring.index(stage))
        stage += 1
        if stage == COUNT:
            stage = 0
            phase ^= 1


@gluon.jit
def consume(
    a_ring,
    b_ring,
    full,
    empty,
    out_ptr,
    row,
    size,
    ROWS: gl.constexpr,
    COLS: gl.constexpr,
    STEP: gl.constexpr,
    COUNT: gl.constexpr,
):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, COLS, 16])
    acc = gl.zeros((ROWS, COLS), gl.float32, layout)
    stage = 0
    phase = 0
    for _k in range(0, size, STEP):
        mbarrier.wait(full.index(stage), phase)
        acc = warpgroup_mma(a_ring.index(stage), b_ring.index(stage).permute((1, 0)), acc)
        mbarrier.arrive(empty.index(stage))
        stage += 1
        if stage == COUNT:
            stage = 0
            phase ^= 1
    rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    cols = gl.arange(0, COLS, gl.SliceLayout(0, layout))
    gl.store(out_ptr + rows[:, None] * COLS + cols[None, :], acc)


@gluon.jit
def specialized_kernel(
    a_desc,
    b_desc,
    out_ptr,
    size,
    ROWS: gl.constexpr,
    COLS: gl.constexpr,
    STEP: gl.constexpr,
    COUNT: gl.constexpr,
):
    """out [M, COLS] = a [M, size] b [COLS, size]^T"""
    row = gl.program_id(0) * ROWS
    a_ring = gl.allocate_shared_memory(a_desc.dtype, [COUNT, ROWS, STEP], a_desc.layout)
    b_ring = gl.allocate_shared_memory(b_desc.dtype, [COUNT, COLS, STEP], b_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    gl.warp_specialize(
        [
            (consume, (a_ring, b_ring, full, empty, out_ptr, row, size, ROWS, COLS, STEP, COUNT)),
            (produce, (a_desc, b_desc, a_ring, b_ring, full, empty, row, size, STEP, COUNT)),
        ],
        [4],
        [40],
    )


def described() -> tuple[dict[str, str], dict[str, int]]:
    """Types and constants of the kernel's arguments."""
    layout = repr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
    types = {"a_desc": f"tensordesc<bf16[{M}, {K}],{layout}>", "b_desc": f"tensordesc<bf16[{N}, {K}],{layout}>"}
    types |= {"out_ptr": "*fp32", "size": "i32"}
    return types, {"ROWS": M, "COLS": N, "STEP": K, "COUNT": STAGES}


def compile_here() -> dict[str, object]:
    types, constants = described()
    source = GluonASTSource(specialized_kernel, types | dict.fromkeys(constants, "constexpr"), constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8, "enable_fp_fusion": True})
    meta = made.metadata
    return {"text": made.asm["ptx"], "shared": meta.shared, "warps": meta.num_warps, "boxes": meta.tensordesc_meta}


def compile_specialized() -> Compiled:
    """In a process of its own: Gluon's compiler reports what it leaks when the process ends."""
    child = [sys.executable, "-m", "ptx.gluon_products"]
    told = subprocess.run(child, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True).stdout
    variant = Variant("specialized", specialized_kernel, *described())
    return Compiled(variant=variant, **json.loads(told))


if __name__ == "__main__":
    print(json.dumps(compile_here()))
