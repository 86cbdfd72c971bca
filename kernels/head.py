"""The end of a transformer in one pass over its tokens: modulated LayerNorm, projection, patches put back in place.

    y = LN(x) * (1 + scale) + shift, with the row of scale and shift of each token
    out[b, c, t pt + i, h ph + j, w pw + k] = weight[((i ph + j) pw + k) C + c] . y[b, n] + bias, n = (t, h, w)

head_kernel         for groups of many tokens that share a row, in 16 bits. With w' = weight * (1 + scale), rounded,
                        weight . y = rstd * (w' . x - mean * sum(w')) + weight . shift
                    so x is read once and goes into the matrix units as it is, and mean and rstd are made beside the
                    product. What rounding w' adds is multiplied by x - mean, as with rounding y, and cancels of the
                    mean: only fp32 sums lose by it, mean / deviation times their own rounding, far below that of 16
                    bits. Statistics of blocks of columns are merged (Chan, Golub, LeVeque 1979).
head_tokens_kernel  for a row a token, or a few, and for fp32: statistics first, then y, made on the way into the
                    product.

The features are cut into two powers of 2 (192 = 128 + 64). Products are stored with the tokens fastest, which lie side
by side in the latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvid.kernels.ahead import Variant
from fastvid.kernels.devices import Arch, architecture, entry, takers
from fastvid.kernels.gemm import check_types, describe, power_of_2_parts


@dataclass(frozen=True)
class Config:
    """BLOCK_M tokens of a program, BLOCK_K columns at a time."""

    block_m: int
    block_k: int
    warps: int
    stages: int


# (architecture, shape class) -> config; not measured yet. "tokens", "fp32": head_tokens_kernel; "wide": more than 64
# features. Those of sm_86 and sm_90 are so small because Triton 3.6 needs more registers than 3.9; with it only "wide"
# spills.
CONFIGS: Mapping[tuple[Arch, str], Config] = MappingProxyType(
    {
        (80, "groups"): Config(64, 64, 4, 3),
        (80, "groups wide"): Config(32, 32, 8, 3),
        (80, "tokens"): Config(32, 64, 4, 3),
        (80, "fp32"): Config(16, 16, 8, 3),
        (86, "groups"): Config(64, 32, 8, 3),
        (90, "groups"): Config(64, 64, 8, 3),
        (90, "groups wide"): Config(32, 32, 8, 3),
        (90, "tokens"): Config(64, 32, 8, 3),
        (90, "fp32"): Config(16, 16, 8, 3),
        (100, "groups"): Config(128, 64, 8, 4),
        (100, "groups wide"): Config(64, 32, 8, 4),
        (100, "tokens"): Config(64, 32, 8, 3),
        (100, "fp32"): Config(16, 16, 8, 3),
    }
)
WIDE = 64
LEAST_GROUP = 64  # of tokens that share a row, for head_kernel


@triton.jit
def _merged(x, real, seen, here, mean, spread):
    """Mean and sum of squared differences from it, of rows seen before and of `here` more columns x [tokens, columns],
    those that are real."""
    block_mean = tl.sum(x, 1) / here
    off = tl.where(real[None, :], x - block_mean[:, None], 0.0)
    change, total = block_mean - mean, (seen + here).to(tl.float32)
    mean += change * (here / total)
    spread += tl.sum(off * off, 1) + change * change * (seen * (here / total))
    return mean, spread


@triton.jit
def _store_patches(
    value,
    features,
    n,
    inside,
    out_ptr,
    b,
    grid_h,
    grid_w,
    channels,
    P,
    stride_b,
    stride_c,
    stride_t,
    stride_h,
    stride_w,
    PT: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
):
    """value [tokens, features] into the latents, tokens fastest."""
    c, cell = (features % channels).to(tl.int64), features // channels
    within = c * stride_c + (cell // (PH * PW)).to(tl.int64) * stride_t
    within += (cell // PW % PH).to(tl.int64) * stride_h + (cell % PW).to(tl.int64) * stride_w
    corner = b * stride_b + (n // (grid_h * grid_w)).to(tl.int64) * (PT * stride_t)
    corner += (n // grid_w % grid_h).to(tl.int64) * (PH * stride_h) + (n % grid_w).to(tl.int64) * (PW * stride_w)
    mask = (features < P)[:, None] & inside[None, :]
    tl.store(out_ptr + within[:, None] + corner[None, :], value.T.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _scaled_weight(w_ptr, features, ks, scale, shift, P, d, dtype: tl.constexpr, EVEN: tl.constexpr):
    """w' [columns, features], and what it and weight * shift sum up to over these columns."""
    mask = (features < P)[None, :] if EVEN else (ks < d)[:, None] & (features < P)[None, :]
    w = tl.load(w_ptr + features[None, :].to(tl.int64) * d + ks[:, None], mask=mask, other=0.0).to(tl.float32)
    scaled = (w * scale[:, None]).to(dtype)
    return scaled, tl.sum(scaled.to(tl.float32), 0), tl.sum(w * shift[:, None], 0)


@triton.jit
def _bias(bias_ptr, features, P):
    return tl.load(bias_ptr + features, mask=features < P, other=0.0).to(tl.float32)


@triton.jit
def head_kernel(
    x_ptr,
    shift_ptr,
    scale_ptr,
    index_ptr,
    w_ptr,
    bias_ptr,
    out_ptr,
    groups,
    group_tokens,
    d,
    P,
    channels,
    grid_h,
    grid_w,
    eps,
    stride_xb,
    stride_xn,
    stride_shift,
    stride_scale,
    stride_ib,
    stride_ig,
    stride_b,
    stride_c,
    stride_t,
    stride_h,
    stride_w,
    PT: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    P1: tl.constexpr,
    P2: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    blocks = tl.cdiv(group_tokens, BLOCK_M)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    b, g = group // groups, group % groups
    at = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = at < group_tokens
    n = g * group_tokens + at
    row = tl.load(index_ptr + b * stride_ib + g * stride_ig).to(tl.int64)
    shift_ptr += row * stride_shift
    scale_ptr += row * stride_scale
    x_ptrs = x_ptr + b * stride_xb + n * stride_xn
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    f1, f2 = tl.arange(0, P1), P1 + tl.arange(0, P2 if P2 > 0 else 1)
    acc1, sum1, const1 = tl.zeros((BLOCK_M, P1), tl.float32), tl.zeros((P1,), tl.float32), _bias(bias_ptr, f1, P)
    if P2 > 0:
        acc2, sum2, const2 = tl.zeros((BLOCK_M, P2), tl.float32), tl.zeros((P2,), tl.float32), _bias(bias_ptr, f2, P)
    mean, spread = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    for k in range(0, d, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        real = ks < d
        mask = inside[:, None] if EVEN else inside[:, None] & real[None, :]
        x = tl.load(x_ptrs[:, None] + ks[None, :], mask=mask, other=0.0)
        scale = 1.0 + tl.load(scale_ptr + ks, mask=real, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + ks, mask=real, other=0.0).to(tl.float32)
        w, total, const = _scaled_weight(w_ptr, f1, ks, scale, shift, P, d, dtype, EVEN)
        acc1 = tl.dot(x, w, acc1, input_precision="ieee")
        sum1 += total
        const1 += const
        if P2 > 0:
            w_more, total_more, const_more = _scaled_weight(w_ptr, f2, ks, scale, shift, P, d, dtype, EVEN)
            acc2 = tl.dot(x, w_more, acc2, input_precision="ieee")
            sum2 += total_more
            const2 += const_more
        mean, spread = _merged(x.to(tl.float32), real, k, tl.minimum(d - k, BLOCK_K), mean, spread)
    rstd = 1.0 / tl.sqrt_rn(spread / d + eps)
    value = rstd[:, None] * (acc1 - mean[:, None] * sum1[None, :]) + const1[None, :]
    _store_patches(
        value, f1, n, inside, out_ptr, b, grid_h, grid_w, channels, P, stride_b, stride_c, stride_t, stride_h, stride_w,
        PT, PH, PW,
    )  # fmt: skip
    if P2 > 0:
        value2 = rstd[:, None] * (acc2 - mean[:, None] * sum2[None, :]) + const2[None, :]
        _store_patches(
            value2, f2, n, inside, out_ptr, b, grid_h, grid_w, channels, P, stride_b, stride_c, stride_t, stride_h,
            stride_w, PT, PH, PW,
        )  # fmt: skip


@triton.jit
def head_tokens_kernel(
    x_ptr,
    shift_ptr,
    scale_ptr,
    index_ptr,
    w_ptr,
    bias_ptr,
    out_ptr,
    group_tokens,
    tokens_each,
    d,
    P,
    channels,
    grid_h,
    grid_w,
    eps,
    stride_xb,
    stride_xn,
    stride_shift,
    stride_scale,
    stride_ib,
    stride_ig,
    stride_b,
    stride_c,
    stride_t,
    stride_h,
    stride_w,
    PT: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    P1: tl.constexpr,
    P2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    blocks = tl.cdiv(tokens_each, BLOCK_M)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    n = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = n < tokens_each
    row = tl.load(index_ptr + b * stride_ib + n // group_tokens * stride_ig, mask=inside, other=0).to(tl.int64)
    x_ptrs = x_ptr + b * stride_xb + n * stride_xn
    mean, spread = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    for k in range(0, d, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        real = ks < d
        x = tl.load(x_ptrs[:, None] + ks[None, :], mask=inside[:, None] & real[None, :], other=0.0).to(tl.float32)
        mean, spread = _merged(x, real, k, tl.minimum(d - k, BLOCK_K), mean, spread)
    rstd = 1.0 / tl.sqrt_rn(spread / d + eps)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    f1, f2 = tl.arange(0, P1), P1 + tl.arange(0, P2 if P2 > 0 else 1)
    acc1 = tl.zeros((BLOCK_M, P1), tl.float32)
    if P2 > 0:
        acc2 = tl.zeros((BLOCK_M, P2), tl.float32)
    for k in range(0, d, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        mask = inside[:, None] & (ks < d)[None, :]
        x = tl.load(x_ptrs[:, None] + ks[None, :], mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + (row * stride_scale)[:, None] + ks[None, :], mask=mask, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + (row * stride_shift)[:, None] + ks[None, :], mask=mask, other=0.0).to(tl.float32)
        y = ((x - mean[:, None]) * rstd[:, None] * (1.0 + scale) + shift).to(dtype)
        w_ptrs = w_ptr + ks[:, None]
        w = tl.load(w_ptrs + f1[None, :].to(tl.int64) * d, mask=(ks < d)[:, None] & (f1 < P)[None, :], other=0.0)
        acc1 = tl.dot(y, w, acc1, input_precision="ieee")
        if P2 > 0:
            w = tl.load(w_ptrs + f2[None, :].to(tl.int64) * d, mask=(ks < d)[:, None] & (f2 < P)[None, :], other=0.0)
            acc2 = tl.dot(y, w, acc2, input_precision="ieee")
    _store_patches(
        acc1 + _bias(bias_ptr, f1, P)[None, :], f1, n, inside, out_ptr, b, grid_h, grid_w, channels, P, stride_b,
        stride_c, stride_t, stride_h, stride_w, PT, PH, PW,
    )  # fmt: skip
    if P2 > 0:
        _store_patches(
            acc2 + _bias(bias_ptr, f2, P)[None, :], f2, n, inside, out_ptr, b, grid_h, grid_w, channels, P, stride_b,
            stride_c, stride_t, stride_h, stride_w, PT, PH, PW,
        )  # fmt: skip


def head(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    index: Tensor,
    weight: Tensor,
    bias: Tensor,
    grid: tuple[int, int, int],
    patch: tuple[int, int, int],
    eps: float,
    out: Tensor,
    config: Config | None = None,
) -> None:
    """Write the patches that tokens x [B, N, d] become into out [B, C, T, H, W], of any strides and type.

    shift, scale: [K, d]; index: [B, G], the row of each group of N // G tokens. weight [pt ph pw C, d], contiguous, of
    x's type; bias [pt ph pw C]. Rows of x, shift and scale are contiguous, with any strides between them.
    grid: tokens along t, h, w. config: chosen when None. Raises ValueError for types and strides that it does not take.
    """
    _check_layout(x, shift, scale, index, weight, bias)
    if out.numel() == 0:
        return
    (B, N, d), channels = x.shape, out.shape[1]
    groups = 1 if len(shift) == 1 else index.shape[1]
    shared = x.dtype != torch.float32 and (groups == 1 or N // groups >= LEAST_GROUP)
    config = config or choose(architecture(x.device), x.dtype, shared, len(weight))
    # One row is everyone's, whatever the index says of groups.
    strides = (*x.stride()[:2], shift.stride(0), scale.stride(0), *index.stride(), *out.stride())
    P = weight.shape[0]
    p1, p2 = power_of_2_parts(P)
    sizes = (d, P, channels, *grid[1:], eps, *strides)
    options = {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True}
    tile = {"BLOCK_M": config.block_m, "BLOCK_K": config.block_k, "P1": p1, "P2": p2, **options}
    tensors = (x, shift, scale, index, weight, bias, out)
    with torch.cuda.device_of(x):  # the device guard; nothing for the interpreter's CPU tensors
        if shared:
            programs = B * groups * triton.cdiv(N // groups, config.block_m)
            even = d % config.block_k == 0
            head_kernel[(programs,)](*tensors, groups, N // groups, *sizes, *patch, EVEN=even, **tile)
        else:
            programs = B * triton.cdiv(N, config.block_m)
            head_tokens_kernel[(programs,)](*tensors, N // groups, N, *sizes, *patch, **tile)


def choose(arch: Arch, dtype: torch.dtype, shared: bool, P: int) -> Config:
    """The config of a launch. shared: by head_kernel. P: features."""
    if dtype == torch.float32:
        return entry(CONFIGS, arch, "fp32")
    return entry(CONFIGS, arch, ("groups wide" if P > WIDE else "groups") if shared else "tokens")


def _check_layout(x: Tensor, shift: Tensor, scale: Tensor, index: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Raises ValueError for types and strides that the kernels do not take."""
    check_types(x, shift, scale, weight, bias)
    if x.stride(2) != 1 or shift.stride(1) != 1 or scale.stride(1) != 1:
        raise ValueError(f"x, shift and scale must have contiguous rows, not {describe(x, shift, scale)}")
    if index.dtype not in (torch.int32, torch.int64) or index.device != x.device:
        raise ValueError(f"index must hold int32 or int64 on {x.device}, not {describe(index)}")
    if not weight.is_contiguous() or weight.dtype != x.dtype or bias.stride(0) != 1:
        raise ValueError(f"weight, {x.dtype} as x, and bias must be contiguous, not {describe(weight, bias)}")


def variants() -> list[Variant]:
    """16 channels in patches of 1 x 2 x 2, then 48; bf16 into fp32 latents."""
    made = []
    for (arch, shapes), config in CONFIGS.items():
        features = {"groups": (64,), "groups wide": (192,)}.get(shapes, (64, 192))
        kernel = head_kernel if "groups" in shapes else head_tokens_kernel
        made += [_variant(arch, shapes, config, P, kernel) for P in features]
    return sorted(made, key=lambda variant: (variant.archs[0] != 90, "192" in variant.name, "fp32" in variant.name))


def _variant(arch: Arch, shapes: str, config: Config, P: int, kernel: object) -> Variant:
    dtype = "fp32" if shapes == "fp32" else "bf16"
    types = dict.fromkeys(("x_ptr", "w_ptr", "bias_ptr"), f"*{dtype}")
    types |= dict.fromkeys(("shift_ptr", "scale_ptr", "out_ptr"), "*fp32") | {"index_ptr": "*i64", "eps": "fp32"}
    types |= dict.fromkeys(("group_tokens", "d", "P", "channels", "grid_h", "grid_w", "stride_xb", "stride_xn"), "i32")
    types |= dict.fromkeys(("stride_shift", "stride_scale", "stride_ib", "stride_b", "stride_c", "stride_t"), "i32")
    types |= {"stride_h": "i32"}
    p1, p2 = power_of_2_parts(P)
    constants = {"stride_w": 1, "stride_ig": 1, "PT": 1, "PH": 2, "PW": 2, "P1": p1, "P2": p2}
    constants |= {"BLOCK_M": config.block_m, "BLOCK_K": config.block_k}
    if kernel is head_kernel:
        types |= {"groups": "i32"}
        constants |= {"EVEN": True}
    else:
        types |= {"tokens_each": "i32"}
    aligned: tuple[str, ...] = ("x_ptr", "shift_ptr", "scale_ptr", "index_ptr", "w_ptr", "bias_ptr", "out_ptr")
    aligned += ("d", "P", "channels", "stride_xb", "stride_xn", "stride_shift", "stride_scale")
    name = f"head {'groups' if kernel is head_kernel else 'tokens'} {P} {dtype} sm_{arch}"
    options = {"num_warps": config.warps, "num_stages": config.stages}
    return Variant(name, kernel, types, constants, aligned, options, takers(CONFIGS, arch, shapes))
