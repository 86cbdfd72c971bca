"""Patches of video latents projected to tokens, straight from the latents: [B, C, T, H, W] -> [B, N, d].

    out[b, n, :] = weight[d, C + C2, pt, ph, pw] . patch n of (latents, known) + bias, N = T/pt * H/ph * W/pw tokens

A product of [B N, K] with [K, d], K = (C + C2) pt ph pw, whose first matrix is never in memory: a program gathers the
patches of BLOCK_M tokens once, from latents and known ones behind them, keeps them on chip, and goes through the tiles
of d. Neighboring lanes take neighboring tokens, hence pixels that lie side by side. K is cut into two powers of 2
(144 = 128 + 16), so that little of the matrix units' work is on padding. What is made is far more than what is read:
the time is that of writing out.

In fp32 there is no matrix unit, and a product has to hold all of a block's K in registers: there the patches are
gathered anew for every tile, BLOCK_K of K at a time.
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
from fastvid.kernels.gemm import check_types, describe, power_of_2_parts, processors


@dataclass(frozen=True)
class Config:
    """A tile. block_k: how much of K is gathered at a time; 0 for all of it, once."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    block_k: int = 0


# (architecture, shape class) -> config; not measured yet.
CONFIGS: Mapping[tuple[Arch, str], Config] = MappingProxyType(
    {
        (80, "16 bits"): Config(64, 64, 4, 2),
        (80, "fp32"): Config(32, 32, 4, 2, 16),
        (90, "16 bits"): Config(128, 128, 8, 2),
        (90, "fp32"): Config(32, 64, 4, 2, 16),
        (100, "16 bits"): Config(128, 128, 8, 2),
        (100, "fp32"): Config(32, 64, 4, 2, 16),
    }
)
LARGEST_K = 512  # of patches kept on chip; beyond it they are gathered in blocks


@triton.jit
def _gather(
    x_ptr,
    corner,
    inside,
    channel,
    dt,
    dh,
    dw,
    stride_c,
    stride_t,
    stride_h,
    stride_w,
    first,
    channels,
):
    """Elements [K, tokens] of the patches of one tensor, whose channels are `first` and on; 0 in other channels."""
    own = (channel >= first) & (channel < first + channels)
    within = (channel - first).to(tl.int64) * stride_c + dt.to(tl.int64) * stride_t
    within += dh.to(tl.int64) * stride_h + dw.to(tl.int64) * stride_w
    return tl.load(x_ptr + within[:, None] + corner[None, :], mask=own[:, None] & inside[None, :], other=0.0)


@triton.jit
def _patches(
    x_ptr,
    known_ptr,
    corner,
    known_corner,
    inside,
    ks,
    channels,
    known_channels,
    stride_c,
    stride_t,
    stride_h,
    stride_w,
    known_stride_c,
    known_stride_t,
    known_stride_h,
    known_stride_w,
    PT: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Features ks of the tokens: [K, tokens]."""
    channel, dt = ks // (PT * PH * PW), ks // (PH * PW) % PT
    dh, dw = ks // PW % PH, ks % PW
    x = _gather(x_ptr, corner, inside, channel, dt, dh, dw, stride_c, stride_t, stride_h, stride_w, 0, channels).to(
        DTYPE
    )
    if known_ptr is not None:
        x += _gather(
            known_ptr,
            known_corner,
            inside,
            channel,
            dt,
            dh,
            dw,
            known_stride_c,
            known_stride_t,
            known_stride_h,
            known_stride_w,
            channels,
            known_channels,
        ).to(DTYPE)
    return x


@triton.jit
def patch_embed_kernel(
    x_ptr,
    known_ptr,
    w_ptr,
    bias_ptr,
    out_ptr,
    tokens,
    tokens_each,
    grid_h,
    grid_w,
    d,
    K,
    channels,
    known_channels,
    tiles_each,
    stride_b,
    stride_c,
    stride_t,
    stride_h,
    stride_w,
    known_stride_b,
    known_stride_c,
    known_stride_t,
    known_stride_h,
    known_stride_w,
    PT: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < tokens
    n = (rows % tokens_each).to(tl.int32)
    b = rows // tokens_each
    at_t = (n // (grid_h * grid_w)).to(tl.int64) * PT
    at_h = (n // grid_w % grid_h).to(tl.int64) * PH
    at_w = (n % grid_w).to(tl.int64) * PW
    corner = b * stride_b + at_t * stride_t + at_h * stride_h + at_w * stride_w
    known_corner = corner
    if known_ptr is not None:
        known_corner = b * known_stride_b + at_t * known_stride_t + at_h * known_stride_h + at_w * known_stride_w
    dtype: tl.constexpr = w_ptr.dtype.element_ty
    first = tl.program_id(1) * tiles_each
    k1, k2 = tl.arange(0, K1), K1 + tl.arange(0, K2 if K2 > 0 else 1)
    if BLOCK_K == 0:
        x1 = _patches(
            x_ptr, known_ptr, corner, known_corner, inside, k1, channels, known_channels, stride_c, stride_t, stride_h,
            stride_w, known_stride_c, known_stride_t, known_stride_h, known_stride_w, PT, PH, PW, dtype,
        ).T  # fmt: skip
        if K2 > 0:
            x2 = _patches(
                x_ptr, known_ptr, corner, known_corner, inside, k2, channels, known_channels, stride_c, stride_t,
                stride_h, stride_w, known_stride_c, known_stride_t, known_stride_h, known_stride_w, PT, PH, PW, dtype,
            ).T  # fmt: skip
    for tile in range(first, tl.minimum(first + tiles_each, tl.cdiv(d, BLOCK_N))):
        cols = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        row_ptrs = w_ptr + cols.to(tl.int64)[None, :] * K
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if BLOCK_K == 0:
            w1 = tl.load(row_ptrs + k1[:, None], mask=(k1 < K)[:, None] & (cols < d)[None, :], other=0.0)
            acc = tl.dot(x1, w1, acc, input_precision="ieee")
            if K2 > 0:
                w2 = tl.load(row_ptrs + k2[:, None], mask=(k2 < K)[:, None] & (cols < d)[None, :], other=0.0)
                acc = tl.dot(x2, w2, acc, input_precision="ieee")
        else:
            for k in range(0, K, BLOCK_K):
                ks = k + tl.arange(0, BLOCK_K)
                x = _patches(
                    x_ptr, known_ptr, corner, known_corner, inside, ks, channels, known_channels, stride_c, stride_t,
                    stride_h, stride_w, known_stride_c, known_stride_t, known_stride_h, known_stride_w, PT, PH, PW,
                    dtype,
                ).T  # fmt: skip
                w = tl.load(row_ptrs + ks[:, None], mask=(ks < K)[:, None] & (cols < d)[None, :], other=0.0)
                acc = tl.dot(x, w, acc, input_precision="ieee")
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + cols, mask=cols < d, other=0.0).to(tl.float32)[None, :]
        mask = inside[:, None] & (cols < d)[None, :]
        tl.store(out_ptr + rows[:, None] * d + cols[None, :], acc.to(dtype), mask=mask)


def patch_embed(
    latents: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    known: Tensor | None,
    out: Tensor,
    config: Config | None = None,
) -> None:
    """Write the tokens of latents [B, C, T, H, W] and known [B, C2, T, H, W], behind them in channels, of any strides
    and types, into out [B, N, d], contiguous, of the type of weight [d, C + C2, pt, ph, pw], contiguous.

    config: chosen when None. Raises ValueError for types and strides that it does not take.
    """
    check_types(latents, weight, bias, known)
    if not weight.is_contiguous() or (bias is not None and bias.stride(0) != 1):
        raise ValueError(f"weight and bias must be contiguous, not {describe(weight, bias)}")
    if out.numel() == 0:
        return
    B, C, T, H, W = latents.shape
    d, channels, pt, ph, pw = weight.shape
    grid = (T // pt, H // ph, W // pw)
    tokens_each, K = grid[0] * grid[1] * grid[2], channels * pt * ph * pw
    shapes = "fp32" if weight.dtype == torch.float32 else "16 bits"
    config = config or entry(CONFIGS, architecture(latents.device), shapes)
    blocks, tiles = triton.cdiv(B * tokens_each, config.block_m), triton.cdiv(d, config.block_n)
    # Programs keep their patches for as many tiles as leave a few programs for every processor.
    parts = min(tiles, triton.cdiv(4 * processors(latents.device), blocks))
    tiles_each = triton.cdiv(tiles, parts)
    block_k = config.block_k if K <= LARGEST_K else config.block_k or 32
    k1, k2 = power_of_2_parts(K) if block_k == 0 else (16, 0)
    strides = (*latents.stride(), *(latents if known is None else known).stride())
    with torch.cuda.device_of(latents):  # the device guard; nothing for the interpreter's CPU tensors
        patch_embed_kernel[(blocks, triton.cdiv(tiles, tiles_each))](
            latents, known, weight, bias, out, B * tokens_each, tokens_each, *grid[1:], d, K, C, channels - C,
            tiles_each, *strides, pt, ph, pw, k1, k2, block_k, config.block_m, config.block_n, num_warps=config.warps,
            num_stages=config.stages, enable_fp_fusion=True,
        )  # fmt: skip


def variants() -> list[Variant]:
    """Wan 1.3B's latents, then 36 channels (with known ones behind), then fp32."""
    made = []
    for channels, behind in ((16, 0), (16, 20)):
        for (arch, shapes), config in CONFIGS.items():
            made.append(_variant(arch, shapes, config, channels, behind))
    return sorted(made, key=lambda variant: (variant.archs[0] != 90, "known" in variant.name))


def _variant(arch: Arch, shapes: str, config: Config, channels: int, behind: int) -> Variant:
    dtype = "fp32" if shapes == "fp32" else "bf16"
    types = dict.fromkeys(("w_ptr", "bias_ptr", "out_ptr"), f"*{dtype}") | {"x_ptr": "*fp32"}
    types |= dict.fromkeys(("tokens", "tokens_each", "grid_h", "grid_w", "d", "K", "channels", "known_channels"), "i32")
    types |= dict.fromkeys(("tiles_each", "stride_b", "stride_c", "stride_t", "stride_h"), "i32")
    names = ("b", "c", "t", "h", "w")
    known: dict[str, object] = {f"known_stride_{name}": 1 for name in names} | {"known_ptr": None}
    if behind:
        types |= {f"known_stride_{name}": "i32" for name in names[:4]} | {"known_ptr": "*fp32"}
        known = {"known_stride_w": 1}
    K = (channels + behind) * 4
    k1, k2 = power_of_2_parts(K) if config.block_k == 0 else (16, 0)
    constants = {"stride_w": 1, "PT": 1, "PH": 2, "PW": 2, "K1": k1, "K2": k2, "BLOCK_K": config.block_k}
    constants |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, **known}
    aligned = [name for name in ("x_ptr", "known_ptr", "w_ptr", "bias_ptr", "out_ptr", "d", "K") if name in types]
    options = {"num_warps": config.warps, "num_stages": config.stages}
    archs = takers(CONFIGS, arch, shapes)
    name = f"patches {'with known ' if behind else ''}{dtype} sm_{arch}"
    return Variant(name, patch_embed_kernel, types, constants, aligned, options, archs)
