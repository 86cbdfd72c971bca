"""Guidance, clean latents and a solver's update in one pass over latents [B, C, T, H, W].

    v    = uncond + guidance * (cond - uncond), or cond
    x0   = x - sigma[t] * v
    in   = (x, x0, history ...)
    out_o = sum_j weights[o, j, t] * in_j   where column t moves, else in_keep(o), bit for bit

The outputs of a solver with n tensors of history: the next x; x0; for n = 3 also the second of its history and where
the next step starts from. A program works within one plane (b, c, t), so everything of a column is a scalar. Sums are
chains of fused multiply-adds in one order, in fp32, that start at -0: a weight of 1 alone copies its input, a weight of
0 keeps it out whatever it holds, and a column's bits depend on nothing but the column.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvid.kernels.ahead import Variant
from fastvid.kernels.gemm import check_types

BLOCK = 1024
WARPS = 4


@triton.jit
def _plus(acc, weights_ptr, value):
    """acc + weight * value, where the weight is not 0."""
    weight = tl.load(weights_ptr)
    return tl.where(weight != 0.0, tl.fma(tl.full(acc.shape, weight, tl.float32), value.to(tl.float32), acc), acc)


@triton.jit
def _update(weights_ptr, columns, x, x0, first, second, third, HISTORY: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of one output; weights_ptr is that of its first input."""
    acc = tl.full((BLOCK,), -0.0, tl.float32)
    acc = _plus(acc, weights_ptr, x)
    acc = _plus(acc, weights_ptr + columns, x0)
    if HISTORY > 0:
        acc = _plus(acc, weights_ptr + 2 * columns, first)
    if HISTORY > 1:
        acc = _plus(acc, weights_ptr + 3 * columns, second)
        acc = _plus(acc, weights_ptr + 4 * columns, third)
    return acc


@triton.jit
def solver_step_kernel(
    x_ptr,
    cond_ptr,
    uncond_ptr,
    first_ptr,
    second_ptr,
    third_ptr,
    table_ptr,
    next_ptr,
    x0_ptr,
    older_ptr,
    start_ptr,
    guidance,
    channels,
    columns,
    plane,
    stride_xb,
    stride_xc,
    stride_xt,
    stride_cb,
    stride_cc,
    stride_ct,
    stride_ub,
    stride_uc,
    stride_ut,
    stride_1b,
    stride_1c,
    stride_1t,
    stride_2b,
    stride_2c,
    stride_2t,
    stride_3b,
    stride_3c,
    stride_3t,
    HISTORY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(plane, BLOCK)
    number = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < plane
    t = number % columns
    c = number // columns % channels
    b = number // columns // channels
    table_ptr += t
    sigma, moves = tl.load(table_ptr), tl.load(table_ptr + columns) != 0.0

    x = tl.load(x_ptr + b * stride_xb + c * stride_xc + t * stride_xt + at, mask=inside, other=0.0)
    v = tl.load(cond_ptr + b * stride_cb + c * stride_cc + t * stride_ct + at, mask=inside, other=0.0).to(tl.float32)
    if uncond_ptr is not None:
        uncond = tl.load(uncond_ptr + b * stride_ub + c * stride_uc + t * stride_ut + at, mask=inside, other=0.0)
        uncond = uncond.to(tl.float32)
        v = tl.fma(tl.full((BLOCK,), guidance, tl.float32), v - uncond, uncond)
    x0 = tl.fma(tl.full((BLOCK,), -sigma, tl.float32), v, x.to(tl.float32)).to(x.dtype)

    first, second, third = x, x, x
    if HISTORY > 0:
        first = tl.load(first_ptr + b * stride_1b + c * stride_1c + t * stride_1t + at, mask=inside, other=0.0)
    if HISTORY > 1:
        second = tl.load(second_ptr + b * stride_2b + c * stride_2c + t * stride_2t + at, mask=inside, other=0.0)
        third = tl.load(third_ptr + b * stride_3b + c * stride_3c + t * stride_3t + at, mask=inside, other=0.0)

    weights_ptr = table_ptr + 2 * columns
    to_next = (2 + HISTORY) * columns  # from the weights of an output to those of the next one
    to = number * plane + at
    made = _update(weights_ptr, columns, x, x0, first, second, third, HISTORY, BLOCK)
    tl.store(next_ptr + to, tl.where(moves, made.to(x.dtype), x), mask=inside)
    if HISTORY == 0:
        tl.store(x0_ptr + to, x0, mask=inside)
    else:
        tl.store(x0_ptr + to, tl.where(moves, x0, first), mask=inside)
    if HISTORY > 1:
        tl.store(older_ptr + to, tl.where(moves, first, second), mask=inside)
        made = _update(weights_ptr + to_next, columns, x, x0, first, second, third, HISTORY, BLOCK)
        tl.store(start_ptr + to, tl.where(moves, made.to(x.dtype), third), mask=inside)


def solver_step(
    x: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    guidance_scale: float,
    table: Tensor,
    history: Sequence[Tensor],
    outs: Sequence[Tensor],
) -> None:
    """Write the outputs into outs, contiguous, of x's shape and type.

    x, history: [B, C, T, H, W] of one type; cond, uncond: the same shape, of any type; all with planes [H, W] that are
    contiguous, any strides between them. table: fp32 [rows, T] on x's device, contiguous: a row of sigma, one that is 0
    where a column rests, and the weights [O, 2 + len(history), T]: O is 1 (the next x), or 2 for three tensors of
    history (where the next step starts from). Raises ValueError for types that it does not take.
    """
    check_types(x, cond, uncond, *history, table)
    if x.numel() == 0:
        return
    B, C, T, H, W = x.shape
    blank = (None,) * (3 - len(history))
    read = [x, cond, uncond, *history, *blank]
    strides = [stride for one in read for stride in ((0, 0, 0) if one is None else one.stride()[:3])]
    missing = (None,) * (4 - len(outs))
    programs = B * C * T * triton.cdiv(H * W, BLOCK)
    with torch.cuda.device_of(x):  # the device guard; nothing for the interpreter's CPU tensors
        solver_step_kernel[(programs,)](
            *read, table, *outs, *missing, float(guidance_scale), C, T, H * W, *strides, len(history),
            BLOCK, num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip


def variants() -> list[Variant]:
    """UniPC with guidance on fp32 latents, then DPM++ and Euler, each without guidance too."""
    return [_variant(history, guided) for history in (3, 1, 0) for guided in (True, False)]


def _variant(history: int, guided: bool) -> Variant:
    types = {"x_ptr": "*fp32", "cond_ptr": "*fp32", "table_ptr": "*fp32"}
    types |= {"next_ptr": "*fp32", "x0_ptr": "*fp32", "guidance": "fp32", "channels": "i32", "columns": "i32"}
    types |= {"plane": "i32"} | {f"stride_{name}{axis}": "i32" for name in "xc" for axis in "bct"}
    constants: dict[str, object] = {"HISTORY": history, "BLOCK": BLOCK}
    optional = {"uncond_ptr": guided, "first_ptr": history > 0, "second_ptr": history > 1, "third_ptr": history > 1}
    optional |= {"older_ptr": history > 1, "start_ptr": history > 1}
    for name, there in optional.items():
        types |= {name: "*fp32"} if there else {}
        constants |= {} if there else {name: None}
    types |= {f"stride_{name}{axis}": "i32" for name in "u123" for axis in "bct"}
    aligned = [name for name in types if name.endswith("_ptr") or name.startswith("stride_")] + ["plane"]
    solver = {0: "euler", 1: "dpm++", 3: "unipc"}[history]
    name = f"{solver} step{' guided' if guided else ''}"
    options = {"num_warps": WARPS, "enable_fp_fusion": False}
    return Variant(name, solver_step_kernel, types, constants, aligned, options)
