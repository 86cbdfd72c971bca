"""Queries and keys as attention takes them: RMS norm over the whole width, then the rotation of every head's pairs.

    y           = x / sqrt(mean(x^2) + eps) * w
    out[2i]     = y[2i] * cos[i] - y[2i + 1] * sin[i]
    out[2i + 1] = y[2i] * sin[i] + y[2i + 1] * cos[i]

x [B, N, H * D], w [H * D], cos and sin [N, D // 2] in fp32 -> [B, N, H, D], any strides; or all of a fused projection
[B, N, 3 * H * D] at once, values passed on, and tokens in another order: position p takes token order[p].

A program takes one token. It reads everything before it computes, so that all of it is on its way at once, and holds
heads in two pieces of MAIN and TAIL (12 and 40 heads are 8 + 4 and 32 + 8), of D_BLOCK >= D values each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvid.kernels.ahead import Variant
from fastvid.kernels.devices import architecture
from fastvid.kernels.row_norms import (
    DTYPES,
    INDEX_DTYPES,
    MAX_WIDTH,
    MIN_TAIL,
    check_tensor,
    choose,
    main_and_tail,
)


@triton.jit
def _load(ptr, heads, H: tl.constexpr, D: tl.constexpr, D_BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """One piece of a row as it is stored: [heads, D_BLOCK], 0 outside."""
    dims = tl.arange(0, D_BLOCK)[None, :]
    mask = (heads < H) & (dims < D) if MASKED else None
    return tl.load(ptr + heads * D + dims, mask=mask, other=0.0 if MASKED else None, cache_modifier=".cg")


@triton.jit
def _store(ptr, x, heads, stride, H: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr):
    dims = tl.arange(0, x.shape[1])[None, :]
    mask = (heads < H) & (dims < D) if MASKED else None
    tl.store(ptr + heads.to(tl.int64) * stride + dims, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _inverse(main, tail, eps, H: tl.constexpr, D: tl.constexpr, TAIL: tl.constexpr):
    """1 / sqrt(mean(x^2) + eps) of a row in two pieces. They are added up in TAIL heads, which stay where they are, so
    that there is one sum over threads."""
    main = main.to(tl.float32)
    square = main * main
    if TAIL:
        tail = tail.to(tl.float32)
        square = tl.sum(square.reshape(main.shape[0] // TAIL, TAIL, main.shape[1]), 0) + tail * tail
    mean = tl.div_rn(tl.sum(square.reshape(square.shape[0] * square.shape[1]), 0), H * D + 0.0)
    return tl.div_rn(1.0, tl.sqrt_rn(mean + eps))


@triton.jit
def _turned(x, inverse, weight_ptr, cos, sin, heads, H: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr):
    """Norm and rotation of one piece [heads, D_BLOCK]; cos and sin [1, D_BLOCK // 2]."""
    dims = tl.arange(0, x.shape[1])[None, :]
    mask = (heads < H) & (dims < D) if MASKED else None
    weight = tl.load(weight_ptr + heads * D + dims, mask=mask, eviction_policy="evict_last").to(tl.float32)
    y = x.to(tl.float32) * inverse * weight
    even, odd = tl.split(y.reshape(x.shape[0], x.shape[1] // 2, 2))
    pairs = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    return pairs.reshape(x.shape[0], x.shape[1])


@triton.jit
def qk_norm_rope_kernel(
    x_ptr,
    weight_q_ptr,
    weight_k_ptr,
    cos_ptr,
    sin_ptr,
    order_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    tokens,
    x_batch,
    x_row,
    cos_row,
    sin_row,
    out_batch,
    out_row,
    out_head,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """RAGGED: the pieces hold more than H heads of D values. k_ptr None: x is one row, for q_ptr alone."""
    batch = (tl.program_id(0) // tokens).to(tl.int64)
    position = (tl.program_id(0) % tokens).to(tl.int64)
    token = position
    if order_ptr is not None:
        token = tl.load(order_ptr + position).to(tl.int64)
    x_ptr += batch * x_batch + token * x_row
    q_ptr += batch * out_batch + position * out_row
    M: tl.constexpr = RAGGED and (TAIL == 0 or D != D_BLOCK)  # whether the first piece is masked
    main, tail = tl.arange(0, MAIN)[:, None], MAIN + tl.arange(0, TAIL or 1)[:, None]

    q = _load(x_ptr, main, H, D, D_BLOCK, M)
    q_tail = q
    if TAIL:
        q_tail = _load(x_ptr, tail, H, D, D_BLOCK, RAGGED)
    if k_ptr is not None:
        k_ptr += batch * out_batch + position * out_row
        v_ptr += batch * out_batch + position * out_row
        k = _load(x_ptr + H * D, main, H, D, D_BLOCK, M)
        v = _load(x_ptr + 2 * H * D, main, H, D, D_BLOCK, M)
        k_tail = k
        if TAIL:
            k_tail = _load(x_ptr + H * D, tail, H, D, D_BLOCK, RAGGED)
            v_tail = _load(x_ptr + 2 * H * D, tail, H, D, D_BLOCK, RAGGED)

    pairs = tl.arange(0, D_BLOCK // 2)[None, :]
    cos = tl.load(cos_ptr + token * cos_row + pairs, mask=pairs < D // 2 if D != D_BLOCK else None)
    sin = tl.load(sin_ptr + token * sin_row + pairs, mask=pairs < D // 2 if D != D_BLOCK else None)
    inverse = _inverse(q, q_tail, eps, H, D, TAIL)
    _store(q_ptr, _turned(q, inverse, weight_q_ptr, cos, sin, main, H, D, M), main, out_head, H, D, M)
    if TAIL:
        q_tail = _turned(q_tail, inverse, weight_q_ptr, cos, sin, tail, H, D, RAGGED)
        _store(q_ptr, q_tail, tail, out_head, H, D, RAGGED)
    if k_ptr is not None:
        inverse = _inverse(k, k_tail, eps, H, D, TAIL)
        _store(k_ptr, _turned(k, inverse, weight_k_ptr, cos, sin, main, H, D, M), main, out_head, H, D, M)
        _store(v_ptr, v, main, out_head, H, D, M)
        if TAIL:
            k_tail = _turned(k_tail, inverse, weight_k_ptr, cos, sin, tail, H, D, RAGGED)
            _store(k_ptr, k_tail, tail, out_head, H, D, RAGGED)
            _store(v_ptr, v_tail, tail, out_head, H, D, RAGGED)


def _blocks(heads: int, head_dim: int) -> dict[str, int]:
    """The constants that follow from the sizes."""
    block = triton.next_power_of_2(head_dim)
    main, tail = main_and_tail(heads, max(1, MIN_TAIL // block))
    ragged = (main + tail, block) != (heads, head_dim)
    return {"H": heads, "D": head_dim, "D_BLOCK": block, "MAIN": main, "TAIL": tail, "RAGGED": ragged}


def variants() -> list[Variant]:
    """The fused projection of Wan 14B, then that of 1.3B and 5B, in order and in another; queries alone; odd sizes."""
    cases = [(True, False, heads, 128, "bf16") for heads in (40, 12, 24)]
    cases += [(True, True, 12, 128, "bf16"), (False, False, 12, 128, "bf16"), (False, False, 40, 128, "bf16")]
    cases += [(True, True, 12, 128, "fp16"), (True, True, 12, 128, "fp32"), (True, True, 3, 34, "bf16")]
    return [_variant(*case) for case in cases]


def _variant(fused: bool, ordered: bool, heads: int, head_dim: int, dtype: str) -> Variant:
    absent = (() if fused else ("weight_k_ptr", "k_ptr", "v_ptr")) + (() if ordered else ("order_ptr",))
    rows = ("x_ptr", "weight_q_ptr", "weight_k_ptr", "q_ptr", "k_ptr", "v_ptr")
    pointers = dict.fromkeys(rows, f"*{dtype}") | {"cos_ptr": "*fp32", "sin_ptr": "*fp32", "order_ptr": "*i64"}
    pointers = {name: kind for name, kind in pointers.items() if name not in absent}
    strides = ("x_batch", "x_row", "cos_row", "sin_row", "out_batch", "out_row", "out_head")
    return Variant(
        f"{'qkv' if fused else 'q'}{', ordered' if ordered else ''} {heads} x {head_dim} {dtype}",
        qk_norm_rope_kernel,
        pointers | dict.fromkeys((*strides, "tokens"), "i32") | {"eps": "fp32"},
        dict.fromkeys(absent) | _blocks(heads, head_dim),
        [*pointers, *strides] if head_dim % 32 == 0 else list(pointers),
        {"enable_fp_fusion": True, **choose(90, heads * head_dim)},
    )


def norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, out: Tensor) -> None:
    """Norm and rotation of x [B, N, H * D] into out [B, N, H, D], of any strides but for the last one, which is 1.

    weight [H * D]; cos and sin [N, D // 2] in fp32. Raises ValueError for what does not fit together.
    """
    check_tensor("x", x, (out.shape[0], out.shape[1], out.shape[2] * out.shape[3]), DTYPES, x)
    _launch(x, (weight, None), (cos, sin), None, (out, None, None), eps)


def qkv_norm_rope(
    qkv: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    order: Tensor | None,
    out: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Of the fused projection qkv [B, N, 3 * H * D]: q and k with norm and rotation and v as it is, into three tensors
    [B, N, H, D] of the same strides, whatever they are but for the last one, which is 1.

    order [N], a permutation in int32 or int64: position p of the results has token order[p], and that token's cos and
    sin; it is not looked through for numbers that are none of 0 ... N - 1. Raises ValueError for what does not fit.
    """
    B, N, H, D = out[0].shape
    check_tensor("qkv", qkv, (B, N, 3 * H * D), DTYPES, qkv)
    if order is not None:
        check_tensor("order", order, (N,), INDEX_DTYPES, qkv)
    _launch(qkv, (weight_q, weight_k), (cos, sin), order, out, eps)


def _launch(
    x: Tensor,
    weights: tuple[Tensor, Tensor | None],
    rotary: tuple[Tensor, Tensor],
    order: Tensor | None,
    out: tuple[Tensor, Tensor | None, Tensor | None],
    eps: float,
) -> None:
    B, N, H, D = out[0].shape
    if D % 2 or H * D > MAX_WIDTH:
        raise ValueError(f"{H} heads of {D}: D has to be even, and H * D at most {MAX_WIDTH}")
    for name, table in zip(("cos", "sin"), rotary, strict=True):
        check_tensor(name, table, (N, D // 2), (torch.float32,), x)
    for weight, result in zip((*weights, None), out, strict=True):
        if weight is not None:
            check_tensor("weight", weight, (H * D,), DTYPES, x)
        if result is not None:
            check_tensor("out", result, (B, N, H, D), (x.dtype,), x)
            if result.stride() != out[0].stride():
                raise ValueError(f"results have the strides {result.stride()} and {out[0].stride()}; one is allowed")
    if out[0].numel() == 0:
        return
    with torch.cuda.device_of(x):  # the device guard; nothing for the interpreter's CPU tensors
        qk_norm_rope_kernel[(B * N,)](
            *(x, *weights, *rotary, order, *out),
            *(N, *x.stride()[:2], *(table.stride(0) for table in rotary), *out[0].stride()[:3], eps),
            **_blocks(H, D),
            enable_fp_fusion=True,
            **choose(architecture(x.device), H * D),
        )
