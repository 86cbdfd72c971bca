"""Dense spacetime attention: softmax(q k^T * scale) v over all keys, and the logarithm of what the softmax divides by.

    out[b, n, h] = sum_m p[m] v[b, m, h] / sum_m p[m],  p[m] = exp(scale * q[b, n, h] . k[b, m, h])
    lse[b, h, n] = log(sum_m p[m])

q [B, N, H, D], k and v [B, M, H, D], D up to 128 and contiguous, all other strides free; out [B, N, H, D], contiguous.
A program takes BLOCK_M queries of one head and walks over the keys, BLOCK_N at a time, with a running maximum, sum and
output in fp32 (flash attention, arXiv 2205.14135 and 2307.08691); exponentials are powers of two. Blocks of keys that
are full know no masks; what is left over (RAGGED) is a block of its own behind them. With TMA, blocks come by tensor
descriptor (sm_90 and later): what lies outside of a tensor is read as zero there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastvid.kernels.ahead import Variant
from fastvid.kernels.devices import Arch, architecture, entry, takers

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 128
WITH_TMA = (90, 100)  # the architectures on which blocks come by descriptor
LN_2: tl.constexpr = tl.constexpr(math.log(2))


@dataclass(frozen=True)
class Config:
    """How a kernel is cut: queries a program, keys a step, warps, stages of the pipeline of loads, and whether loads,
    products and softmax get warps of their own (sm_100 only: on sm_90 Triton does not do it)."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    specialize: bool = False

    @property
    def options(self) -> dict[str, int | bool]:
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


# (architecture, bits of a number, head_dim padded: 64 or less, or 128) -> configuration. Chosen by what
# benchmarks/resources.py says of them: the largest tiles that neither spill nor leave an SM with a single warp group.
# Those of sm_86 are for the cards at home (up to sm_120), and spill neither with Triton 3.6 nor with 3.9. In fp32,
# which has no matrix units, heads of 128 spill on sm_80, and this is what spills least of such tiles.
CONFIGS: dict[tuple[Arch, ...], Config] = {
    (80, 16, 64): Config(128, 64, 4, 3),
    (80, 16, 128): Config(128, 64, 8, 2),
    (90, 16, 64): Config(128, 128, 8, 3),
    (90, 16, 128): Config(128, 128, 8, 2),
    (100, 16, 64): Config(128, 128, 4, 3, specialize=True),
    (100, 16, 128): Config(128, 128, 8, 3, specialize=True),
    (80, 32, 64): Config(32, 32, 8, 2),
    (80, 32, 128): Config(32, 32, 8, 2),
    (86, 16, 64): Config(128, 32, 4, 3),
    (86, 32, 64): Config(32, 16, 8, 2),
    (86, 32, 128): Config(16, 16, 8, 2),
}


@triton.jit
def attend(q, k, v, inside, acc, total, peak, scale, MASKED: tl.constexpr):
    """One block of keys more: q [BLOCK_M, D], k and v [BLOCK_N, D], inside [BLOCK_N] says which keys are there.

    acc [BLOCK_M, D] and total [BLOCK_M] are the output and the sum so far, both times 2^-peak; scale > 0 is that of the
    softmax times log2(e).
    """
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        scores = tl.where(inside[None, :], scores, float("-inf"))
    higher = tl.maximum(peak, tl.max(scores, 1) * scale)
    p = tl.exp2(scores * scale - higher[:, None])
    shrink = tl.exp2(peak - higher)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, total, higher


@triton.jit
def load_rows(ptr, rows, stride, end, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Rows [len(rows), BLOCK_D] of a matrix [end, D]; zero beyond D, and if MASKED beyond end."""
    cols = tl.arange(0, BLOCK_D)
    places = ptr + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    if MASKED and D != BLOCK_D:
        block = tl.load(places, mask=(rows < end)[:, None] & (cols < D)[None, :], other=0.0)
    elif MASKED:
        block = tl.load(places, mask=(rows < end)[:, None], other=0.0)
    elif D != BLOCK_D:
        block = tl.load(places, mask=(cols < D)[None, :], other=0.0)
    else:
        block = tl.load(places)
    return block


@triton.jit
def store_rows(out_ptr, lse_ptr, rows, stride, end, acc, total, peak, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write acc / total at rows before end of out [end, D], and the natural logarithm of the sum, if asked for."""
    cols = tl.arange(0, BLOCK_D)
    inside = rows < end
    if lse_ptr is not None:
        tl.store(lse_ptr + rows, (peak + tl.log2(total)) * LN_2, mask=inside)
    mask = inside[:, None] & (cols < D)[None, :]
    out = acc / tl.where(total > 0, total, 1.0)[:, None]  # no keys at all: zero, and a logarithm of -inf
    tl.store(out_ptr + rows.to(tl.int64)[:, None] * stride + cols[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def attention_kernel(
    q,
    k,
    v,
    out_ptr,
    lse_ptr,
    scale,
    H,
    N,
    M,
    stride_qb,
    stride_qn,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RAGGED: tl.constexpr,
    TMA: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):
    """q, k, v: pointers, or with TMA descriptors of [B, H, tokens, D] in blocks [1, 1, BLOCK, BLOCK_D]."""
    row_blocks = tl.cdiv(N, BLOCK_M)
    first = tl.program_id(0) % row_blocks * BLOCK_M
    batch = tl.program_id(0) // row_blocks // H
    head = tl.program_id(0) // row_blocks % H
    b, h = batch.to(tl.int64), head.to(tl.int64)
    rows = first + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    full = M // BLOCK_N * BLOCK_N

    if TMA:
        query = q.load([batch, head, first, 0]).reshape(BLOCK_M, BLOCK_D)
    else:
        k += b * stride_kb + h * stride_kh
        v += b * stride_vb + h * stride_vh
        query = load_rows(q + b * stride_qb + h * stride_qh, rows, stride_qn, N, D, BLOCK_D, True)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for start in tl.range(0, full, BLOCK_N, warp_specialize=SPECIALIZE):
        if TMA:
            keys = k.load([batch, head, start, 0]).reshape(BLOCK_N, BLOCK_D)
            values = v.load([batch, head, start, 0]).reshape(BLOCK_N, BLOCK_D)
        else:
            keys = load_rows(k, start + cols, stride_kn, M, D, BLOCK_D, False)
            values = load_rows(v, start + cols, stride_vn, M, D, BLOCK_D, False)
        acc, total, peak = attend(query, keys, values, None, acc, total, peak, scale, False)
    if RAGGED:
        if TMA:
            keys = k.load([batch, head, full, 0]).reshape(BLOCK_N, BLOCK_D)
            values = v.load([batch, head, full, 0]).reshape(BLOCK_N, BLOCK_D)
        else:
            keys = load_rows(k, full + cols, stride_kn, M, D, BLOCK_D, True)
            values = load_rows(v, full + cols, stride_vn, M, D, BLOCK_D, True)
        acc, total, peak = attend(query, keys, values, full + cols < M, acc, total, peak, scale, True)

    out_ptr += (b * N * H + h) * D
    if lse_ptr is not None:
        lse_ptr += (b * H + h) * N
    store_rows(out_ptr, lse_ptr, rows, H * D, N, acc, total, peak, D, BLOCK_D)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None = None,
    softmax_scale: float | None = None,
    config: Config | None = None,
    tma: bool | None = None,
) -> None:
    """Write attention of q [B, N, H, D] to k and v [B, M, H, D] into out [B, N, H, D], lse [B, H, N] (fp32) beside it.

    softmax_scale is 1 / sqrt(D) when None. config and tma: instead of what is chosen here, for benchmarks and tests.
    Raises ValueError for what the kernel does not take: see `check`.
    """
    check(q, k, v, softmax_scale)
    (B, N, H, D), M = q.shape, k.shape[1]
    if out.numel() == 0:
        return
    config = config or config_of(CONFIGS, q)
    tma = takes_tma(q, k, v) if tma is None else tma
    blocks = (config.block_m, config.block_n, config.block_n)
    inputs = [descriptor(x, block) for x, block in zip((q, k, v), blocks, strict=True)] if tma else (q, k, v)
    with torch.cuda.device_of(q):  # the device guard; nothing for the interpreter's CPU tensors
        attention_kernel[(B * H * triton.cdiv(N, config.block_m),)](
            *inputs,
            out,
            lse,
            log2_scale(softmax_scale, D),
            H,
            N,
            M,
            *(stride for x in (q, k, v) for stride in x.stride()[:3]),
            D=D,
            BLOCK_D=padded(D),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            RAGGED=M % config.block_n != 0,
            TMA=tma,
            SPECIALIZE=config.specialize,
            **config.options,
        )


def check(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None) -> None:
    """Raises ValueError for types, strides, head_dim or a scale that the kernels do not take. fastvid.ops has checked
    the shapes and allocated the outputs."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in DTYPES or x.device != q.device:
            raise ValueError(f"{name} is {x.dtype} on {x.device}; q, k, v are fp32, fp16 or bf16, on one device")
        if x.numel() and x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(f"the last dimension of {name} has stride {x.stride(-1)}; it must have 1")
    if not 1 <= q.shape[-1] <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim is {q.shape[-1]}; the kernel takes 1 to {MAX_HEAD_DIM}")
    if softmax_scale is not None and not 0 < softmax_scale < math.inf:
        raise ValueError(f"softmax_scale is {softmax_scale}; the kernel takes positive numbers")


def config_of(configs: Mapping[tuple[Arch, ...], Config], q: Tensor, *more: int) -> Config:
    """The entry for q's device, type and head_dim; more: what else the table is keyed by."""
    return entry(configs, architecture(q.device), 8 * q.element_size(), max(padded(q.shape[-1]), 64), *more)


def takes_tma(*tensors: Tensor) -> bool:
    """Whether all can be read by descriptor: numbers of 16 bits on sm_90 or sm_100, addresses and strides that are
    multiples of 16 bytes."""
    return all(
        x.dtype != torch.float32
        and architecture(x.device) in WITH_TMA
        and x.data_ptr() % 16 == 0
        and all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in _strides(x))
        for x in tensors
    )


def descriptor(x: Tensor, block: int) -> TensorDescriptor:
    """x [B, tokens, H, D] as [B, H, tokens, D], read in blocks [1, 1, block, D padded]."""
    B, N, H, D = x.shape
    b, n, h = _strides(x)
    return TensorDescriptor(x, [B, H, N, D], [b, h, n, 1], [1, 1, block, padded(D)])


def _strides(x: Tensor) -> tuple[int, ...]:
    """Strides of the first three dimensions; of one that has a single entry, a fit one, since its own means nothing."""
    return tuple(stride if size > 1 else MAX_HEAD_DIM for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True))


def padded(head_dim: int) -> int:
    """The next power of two, 16 at least: what the matrix units take."""
    return max(16, triton.next_power_of_2(head_dim))


def log2_scale(softmax_scale: float | None, head_dim: int) -> float:
    """The scale times log2(e), so that exponentials are powers of two."""
    return (head_dim**-0.5 if softmax_scale is None else softmax_scale) * math.log2(math.e)


def variants() -> list[Variant]:
    """Of Wan's heads (128 wide, keys that do not fill their last block), then other widths, types and layouts."""
    return [
        _variant("bf16", 128, 90),
        _variant("bf16", 128, 100),
        _variant("bf16", 128, 80),
        _variant("bf16", 128, 90, tma=False),
        _variant("bf16", 128, 90, lse=True),
        _variant("bf16", 64, 90),
        _variant("bf16", 64, 100),
        _variant("bf16", 64, 80),
        _variant("bf16", 64, 86),
        _variant("fp16", 96, 80),
        _variant("fp32", 128, 80),
        _variant("fp32", 64, 80),
        _variant("fp32", 128, 86),
        _variant("fp32", 64, 86),
    ]


def _variant(dtype: str, head_dim: int, arch: int, tma: bool | None = None, lse: bool = False) -> Variant:
    tma = arch in WITH_TMA if tma is None else tma
    key = (int(dtype[-2:]), max(padded(head_dim), 64))
    config = CONFIGS[(arch, *key)]
    types, constants, aligned = arguments(dtype, head_dim, config, tma, lse)
    words = [
        "attention",
        dtype,
        str(head_dim),
        f"sm_{arch}",
        *["pointers"] * (arch in WITH_TMA and not tma),
        *["lse"] * lse,
    ]
    types |= dict.fromkeys(("H", "N", "M"), "i32")
    return Variant(
        " ".join(words),
        attention_kernel,
        types,
        constants | {"RAGGED": True},
        aligned,
        config.options,
        takers(CONFIGS, arch, *key),
    )


def arguments(
    dtype: str, head_dim: int, config: Config, tma: bool, lse: bool
) -> tuple[dict[str, str], dict[str, Any], tuple[str, ...]]:
    """Types, constants and aligned arguments that variants of dense and of sparse attention have in common."""
    block_d = padded(head_dim)
    blocks = {"q": config.block_m, "k": config.block_n, "v": config.block_n}
    types = {x: f"tensordesc<{dtype}[1, 1, {n}, {block_d}]>" if tma else f"*{dtype}" for x, n in blocks.items()}
    strides = [f"stride_{x}{axis}" for x in "qkv" for axis in "bnh"]
    types |= {"out_ptr": f"*{dtype}", "scale": "fp32", **dict.fromkeys(strides, "i64")}
    constants: dict[str, Any] = {"D": head_dim, "BLOCK_D": block_d, "BLOCK_M": config.block_m}
    constants |= {"BLOCK_N": config.block_n, "TMA": tma, "SPECIALIZE": config.specialize}
    if lse:
        types["lse_ptr"] = "*fp32"
    else:
        constants["lse_ptr"] = None
    return types, constants, (*strides, "out_ptr", *(() if tma else blocks))
