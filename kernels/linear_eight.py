"""Products of 8-bit rows: [M, K] x [N, K]^T -> [M, N], with both scales, bias and GELU after the sums.

quantize_rows_kernel  rows of activations to int8 or e4m3 with a scale for each, rotated on the way if the weight is
                      (ConvRot): a row stays in registers from the first read to the last write
linear_eight_kernel   int8 x int8, or e4m3 x e4m3. Where there is no product of 8-bit floats (before sm_89) they are
                      multiplied in fp16, which holds them exactly
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvid.kernels.ahead import Variant
from fastvid.kernels.codes import codes_of, scale_of
from fastvid.kernels.devices import AMD, Arch, architecture, entry, takers
from fastvid.kernels.gemm import check_types, describe, tile_at
from fastvid.kernels.linear_quantized import Config, blocks_of, check_rows, e4m3, options_of, store_tile

EIGHT = ("int8", "fp8_e4m3")
LONGEST = 2**14  # values of a row that are quantized

# (architecture, kind of product, or rows to quantize) -> config. None is measured yet.
CONFIGS: Mapping[tuple[Arch, str], Config] = MappingProxyType(
    {
        (80, "int8"): Config(128, 128, 64, 8, 3),
        (80, "fp16"): Config(128, 64, 32, 4, 3),
        (80, "rows"): Config(1, 1, LONGEST, 8, 1),
        (80, "fp8"): Config(128, 128, 64, 8, 3),  # of sm_89 and sm_120
        (90, "int8"): Config(128, 128, 128, 8, 3),
        (90, "fp8"): Config(128, 128, 128, 8, 3),
        (100, "fp8"): Config(128, 128, 128, 8, 3),
        (100, "int8"): Config(128, 128, 64, 8, 3),
    }
)


@triton.jit
def _rotated(x, DIGITS: tl.constexpr, BLOCK: tl.constexpr):
    """Groups of 4^DIGITS values times ConvRot's matrix: for each digit of an index, the sum over it less twice the
    value at its mirror."""
    for digit in tl.static_range(DIGITS):
        parts = tl.reshape(x, (BLOCK // (4 * 4**digit), 4, 4**digit))
        x = tl.reshape(tl.sum(parts, 1, keep_dims=True) - 2.0 * tl.flip(parts, 1), (BLOCK,))
    return x * (0.5**DIGITS)


@triton.jit
def quantize_rows_kernel(
    x_ptr,
    codes_ptr,
    factor_ptr,
    K,
    stride_xm,
    FLOATS: tl.constexpr,
    DIGITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """codes [M, K]: int8, or e4m3 as uint8."""
    row, ks = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride_xm + ks, mask=ks < K, other=0.0).to(tl.float32)
    if DIGITS > 0:
        x = _rotated(x, DIGITS, BLOCK)
    factor = scale_of(tl.max(tl.abs(x), 0), FLOATS)
    tl.store(codes_ptr + row * K + ks, codes_of(x, factor, FLOATS), mask=ks < K)
    tl.store(factor_ptr + row, factor)


@triton.jit
def linear_eight_kernel(
    x_ptr,
    factor_ptr,
    w_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    stride_om,
    SCALES: tl.constexpr,
    KIND: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """KIND: "int8"; "fp8", e4m3 as uint8; "fp16", the same codes multiplied in fp16."""
    tile_m, tile_n = tile_at(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    i = tl.arange(0, BLOCK_K)
    x_row = x_ptr + tl.minimum(rows, M - 1)[:, None] * K
    w_row = w_ptr + tl.minimum(cols, N - 1)[None, :] * K
    if KIND == "int8":
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        inside = k + i < K
        x = tl.load(x_row + (k + i)[None, :], mask=inside[None, :], other=0)
        w = tl.load(w_row + (k + i)[:, None], mask=inside[:, None], other=0)
        if KIND == "fp16":
            x, w = e4m3(x), e4m3(w)
        elif KIND == "fp8":
            x, w = x.to(tl.float8e4nv, bitcast=True), w.to(tl.float8e4nv, bitcast=True)
        acc = tl.dot(x, w, acc, out_dtype=acc.dtype)
    made = acc.to(tl.float32)
    if KIND == "fp16":
        made *= 65536.0
    scale = tl.load(scale_ptr + tl.minimum(cols, N - 1) * SCALES)
    made *= tl.load(factor_ptr + tl.minimum(rows, M - 1))[:, None] * scale[None, :]
    store_tile(made, bias_ptr, out_ptr, rows, cols, M, N, stride_om, GELU)


def quantize_rows(x: Tensor, format: str, rotation: int) -> tuple[Tensor, Tensor]:
    """(codes [M, K], scales [M]) of x [M, K]: int8, or e4m3 as uint8. rotation: the size of the groups, or 0."""
    check_types(x)
    M, K = x.shape
    digits = (rotation.bit_length() - 1) // 2
    if format not in EIGHT or K > LONGEST or x.stride(1) != 1 or (rotation and (K % rotation or 4**digits != rotation)):
        raise ValueError(
            f"rows of up to {LONGEST} values are quantized to {' or '.join(EIGHT)}, in groups of a power of 4 "
            f"that divides them, not {describe(x)} to {format} in groups of {rotation}"
        )
    codes = torch.empty((M, K), dtype=torch.int8 if format == "int8" else torch.uint8, device=x.device)
    factors = torch.empty(M, dtype=torch.float32, device=x.device)
    block = max(triton.next_power_of_2(K), rotation)
    config = entry(CONFIGS, architecture(x.device), "rows")
    with torch.cuda.device_of(x):
        quantize_rows_kernel[(M,)](
            x,
            codes,
            factors,
            K,
            x.stride(0),
            FLOATS=format != "int8",
            DIGITS=digits,
            BLOCK=block,
            num_warps=config.warps,
        )
    return codes, factors


def linear_eight(
    x: Tensor,
    format: str,
    data: Mapping[str, Tensor],
    rotation: int,
    bias: Tensor | None,
    out: Tensor,
    gelu: bool,
    config: Config | None = None,
) -> None:
    """Write x [M, K] times an 8-bit weight, through GELU if `gelu`, into out [M, N]. Rows of x are rotated in groups of
    `rotation`, then quantized. data: the weight's codes and scale. config: chosen when None."""
    check_rows(x, bias, out)
    if out.numel():
        multiply_rows(quantize_rows(x, format, rotation), format, data, bias, out, gelu, config)


def multiply_rows(
    rows: tuple[Tensor, Tensor],
    format: str,
    data: Mapping[str, Tensor],
    bias: Tensor | None,
    out: Tensor,
    gelu: bool,
    config: Config | None = None,
) -> None:
    """The same of rows that are quantized already: codes [M, K] and scales, fp32 [M] or [M, 1]; contiguous."""
    codes, factors = rows
    (M, K), N = codes.shape, out.shape[1]
    fits = data["codes"].shape == (N, K) and factors.numel() == M == len(out) and factors.dtype == torch.float32
    if not fits or not (codes.is_contiguous() and factors.is_contiguous()) or codes.element_size() != 1:
        raise ValueError(
            f"codes [M, {data['codes'].shape[1]}] and fp32 scales [M], contiguous, are multiplied into [M, N], not "
            f"{describe(codes)} and {describe(factors)} into {describe(out)}"
        )
    if out.numel() == 0:
        return
    codes = codes if format == "int8" else codes.view(torch.uint8)
    kind, weight = kind_of(format, architecture(out.device)), data["codes"]
    if out.device.type != "cuda" and kind == "fp8":
        kind = "fp16"
    config = config or entry(CONFIGS, architecture(out.device), kind)
    blocks = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
    options = {"GROUP_M": config.group_m, "num_warps": config.warps, "num_stages": config.stages}
    scales = int(data["scale"].numel() > 1)
    given = (codes, factors, weight, data["scale"], bias, out, M, N, K, out.stride(0))
    with torch.cuda.device_of(out):
        grid = (triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n),)
        linear_eight_kernel[grid](*given, SCALES=scales, KIND=kind, GELU=gelu, **blocks, **options)


def kind_of(format: str, arch: Arch) -> str:
    """How an architecture multiplies codes of a format."""
    if format == "int8":
        return "int8"
    return "fp16" if arch in (80, 86, AMD) else "fp8"  # AMD's 8-bit floats have other exponents


# ---------------------------------------------------------------- ahead of time


def variants() -> list[Variant]:
    """The quantization of rows, and the products that an architecture has."""
    made = []
    for (arch, shapes), config in CONFIGS.items():
        if shapes == "rows":
            made += [_rows_variant(format, digits, config) for format in EIGHT for digits in (4, 0)]
            continue
        format = "int8" if shapes == "int8" else "fp8_e4m3"
        archs = tuple(one for one in takers(CONFIGS, arch, shapes) if kind_of(format, one) == shapes)
        made.append(_eight_variant(arch, shapes, config, archs))
    return made


def _rows_variant(format: str, digits: int, config: Config) -> Variant:
    types = {"x_ptr": "*bf16", "codes_ptr": "*i8" if format == "int8" else "*u8", "factor_ptr": "*fp32"}
    types |= {"K": "i32", "stride_xm": "i32"}
    constants = {"FLOATS": format != "int8", "DIGITS": digits, "BLOCK": config.block_k}
    name = f"rows to {format}{' rotated' if digits else ''}"
    aligned = ("x_ptr", "codes_ptr", "factor_ptr", "K", "stride_xm")
    return Variant(name, quantize_rows_kernel, types, constants, aligned, {"num_warps": config.warps})


def _eight_variant(arch: Arch, kind: str, config: Config, archs: tuple[Arch, ...]) -> Variant:
    codes = {"int8": "*i8", "fp8": "*u8", "fp16": "*u8"}[kind]
    types = {"x_ptr": codes, "w_ptr": codes, "factor_ptr": "*fp32", "scale_ptr": "*fp32"}
    types |= {"bias_ptr": "*bf16", "out_ptr": "*bf16", **dict.fromkeys(("M", "N", "K", "stride_om"), "i32")}
    constants = {"SCALES": 1, "KIND": kind, "GELU": True} | blocks_of(config)
    aligned = ("x_ptr", "w_ptr", "factor_ptr", "scale_ptr", "bias_ptr", "out_ptr", "N", "K", "stride_om")
    return Variant(f"8-bit {kind} sm_{arch}", linear_eight_kernel, types, constants, aligned, options_of(config), archs)
