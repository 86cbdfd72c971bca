"""Linear layers with quantized weights as their files have them: [M, K] x [N, K]^T -> [M, N], with bias and GELU.

linear_weight_kernel  a tile of the weight at a time becomes numbers in registers, in the type of x

Formats whose scales belong to whole rows take them after the sums, for codes are exact in 16 bits. Blocks of GGUF are
taken 32 weights at a time: a tile then has one scale a column (Q6_K two), and its place in the block is the same for
all. Products in 8 bits: linear_eight.py.
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
from fastvid.kernels.gemm import NAMES, check_types, describe, gelu_tanh, tile_at

ROWS = {"int8": 1.0, "fp8_e4m3": 256.0, "fp8_e5m2": 1.0}
"""Formats with a scale for each row -> what their codes' values are multiplied by beside it."""
BLOCKS = {"q8_0": (32, 34), "q4_k": (256, 144), "q6_k": (256, 210)}
"""Formats in blocks -> weights and bytes of a block."""
FLAT = ("nf4", "fp4")
FORMATS = (*ROWS, *BLOCKS, *FLAT)


@dataclass(frozen=True)
class Config:
    """A tile and how it is worked on."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group_m: int = 8


# (architecture, class) -> config. None is measured yet: sizes are what compiles without spills and fills the units.
CONFIGS: Mapping[tuple[Arch, str], Config] = MappingProxyType(
    {
        (80, "weight"): Config(128, 64, 32, 4, 3),
        (80, "fp32"): Config(64, 32, 32, 4, 2),
        (90, "weight"): Config(128, 128, 32, 8, 4),
    }
)


# ---------------------------------------------------------------- numbers of codes


@triton.jit
def e4m3(codes):
    """A 256th of the numbers, as fp16: uint8 moved to where fp16 has its bits."""
    bits = codes.to(tl.int8, bitcast=True).to(tl.int16)
    return ((bits << 7) & -16385).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def e5m2(codes):
    return (codes.to(tl.int16) << 8).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _half(bytes_ptr):
    return tl.load(bytes_ptr.to(tl.pointer_type(tl.float16))).to(tl.float32)


@triton.jit
def _byte(bytes_ptr):
    return tl.load(bytes_ptr).to(tl.int32)


@triton.jit
def _q8_0(row_ptr, k, i):
    """32 weights from k on, fp32 [32, n]. row_ptr [1, n]; i = 0 to 31 [32, 1]."""
    block = row_ptr + (k // 32) * 34
    codes = tl.load(block + 2 + i).to(tl.int8, bitcast=True)
    return _half(block) * codes.to(tl.float32)


@triton.jit
def _q4_k(row_ptr, k, i):
    block, sub = row_ptr + (k // 256) * 144, (k % 256) // 32
    codes = (_byte(block + 16 + 32 * (sub // 2) + i) >> (4 * (sub % 2))) & 15
    before, here, after = (
        _byte(block + 4 + tl.maximum(sub - 4, 0)),
        _byte(block + 4 + sub),
        _byte(block + 8 + sub),
    )
    scale = tl.where(sub < 4, here & 63, (after & 15) | ((before >> 6) << 4)).to(tl.float32)
    least = tl.where(sub < 4, after & 63, (after >> 4) | ((here >> 6) << 4)).to(tl.float32)
    return (_half(block) * scale) * codes.to(tl.float32) - _half(block + 2) * least


@triton.jit
def _q6_k(row_ptr, k, i):
    block, within = row_ptr + (k // 256) * 210, k % 256
    half, place = within // 128, within % 128
    low = (_byte(block + 64 * half + place % 64 + i) >> (4 * (place // 64))) & 15
    high = (_byte(block + 128 + 32 * half + i) >> (2 * (place // 32))) & 3
    scale = tl.load(block + 192 + within // 16 + i // 16).to(tl.int8, bitcast=True)
    codes = (low | (high << 4)) - 32
    return (_half(block + 208) * scale.to(tl.float32)) * codes.to(tl.float32)


@triton.jit
def _flat(codes_ptr, scale_ptr, map_ptr, place, inside, PER_SCALE: tl.constexpr):
    """Weights at places of the matrix read row by row, the first of two in the high half of a byte."""
    byte = tl.load(codes_ptr + place // 2, mask=inside, other=0).to(tl.int32)
    code = tl.where(place % 2 == 0, byte >> 4, byte & 15)
    return tl.load(map_ptr + code) * tl.load(scale_ptr + place // PER_SCALE, mask=inside, other=0.0)


# ---------------------------------------------------------------- the kernel


@triton.jit
def store_tile(acc, bias_ptr, out_ptr, rows, cols, M, N, stride_om, GELU: tl.constexpr):
    """Bias, GELU and one rounding of sums [BLOCK_M, BLOCK_N]."""
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    if GELU:
        acc = gelu_tanh(acc)
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    tl.store(out_ptr + rows[:, None] * stride_om + cols[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def linear_weight_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    map_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_om,
    row_bytes,
    factor,
    FORMAT: tl.constexpr,
    SCALES: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """SCALES: of row formats 1 if each row has its own, 0 if all share one; of flat ones how many weights share one."""
    tile_m, tile_n = tile_at(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows and columns beyond the end read the last one; they are not stored.
    x_row, col = x_ptr + tl.minimum(rows, M - 1)[:, None] * stride_xm, tl.minimum(cols, N - 1)[None, :]
    i = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        inside = k + i < K
        x = tl.load(x_row + (k + i)[None, :], mask=inside[None, :], other=0.0)
        if FORMAT == "q8_0":
            w = _q8_0(codes_ptr + col * row_bytes, k, i[:, None])
        elif FORMAT == "q4_k":
            w = _q4_k(codes_ptr + col * row_bytes, k, i[:, None])
        elif FORMAT == "q6_k":
            w = _q6_k(codes_ptr + col * row_bytes, k, i[:, None])
        elif FORMAT == "nf4":
            w = _flat(codes_ptr, scale_ptr, map_ptr, col * K + (k + i)[:, None], inside[:, None], SCALES)
        else:
            codes = tl.load(codes_ptr + col * row_bytes + (k + i)[:, None], mask=inside[:, None], other=0)
            if FORMAT == "int8":
                w = codes
            elif FORMAT == "fp8_e4m3":
                w = e4m3(codes)
            else:
                w = e5m2(codes)
        acc = tl.dot(x, w.to(x.dtype), acc, input_precision="ieee")
    if SCALES < 2 and scale_ptr is not None:
        acc *= (tl.load(scale_ptr + tl.minimum(cols, N - 1) * SCALES) * factor)[None, :]
    store_tile(acc, bias_ptr, out_ptr, rows, cols, M, N, stride_om, GELU)


def linear(
    x: Tensor,
    format: str,
    data: Mapping[str, Tensor],
    bias: Tensor | None,
    out: Tensor,
    gelu: bool,
    config: Config | None = None,
) -> None:
    """Write x [M, K] times a quantized weight, through GELU if `gelu`, into out [M, N]. Rows are contiguous.

    data: the tensors of the weight, as fastvid.ops has them. config: chosen when None.
    Raises ValueError for formats and types that it does not take.
    """
    check_rows(x, bias, out)
    if format not in FORMATS:
        raise ValueError(f"there are kernels for {', '.join(FORMATS)}, not for {format}")
    (M, K), N = x.shape, out.shape[1]
    if out.numel() == 0:
        return
    config = config or entry(CONFIGS, architecture(x.device), "fp32" if x.dtype == torch.float32 else "weight")
    codes, scale = data["codes"], data.get("scale")
    if format in BLOCKS:
        weights, size = BLOCKS[format]
        row_bytes, scales = K // weights * size, 0
        if K % weights or config.block_k != 32:
            raise ValueError(f"{format} has blocks of {weights}, taken 32 at a time, not {K} by {config.block_k}")
    elif format in FLAT:
        assert scale is not None
        row_bytes, scales = K, 1 << max(0, -(-N * K // scale.numel()) - 1).bit_length()
    else:
        assert scale is not None
        row_bytes, scales = K, int(scale.numel() > 1)
    blocks = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
    options = {"GROUP_M": config.group_m, "num_warps": config.warps, "num_stages": config.stages}
    given = (x, codes, scale, data.get("map"), bias, out, M, N, K, x.stride(0), out.stride(0), row_bytes)
    kind = FLAT[0] if format in FLAT else format
    with torch.cuda.device_of(x):  # the device guard; nothing for the interpreter's CPU tensors
        grid = (triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n),)
        linear_weight_kernel[grid](
            *given, ROWS.get(format, 1.0), FORMAT=kind, SCALES=scales, GELU=gelu, **blocks, **options
        )


def check_rows(x: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Raises ValueError unless types fit and rows are contiguous."""
    check_types(x, bias, out)
    if x.stride(1) != 1 or out.stride(1) != 1 or (bias is not None and bias.stride(0) != 1):
        raise ValueError(f"rows and bias must be contiguous, not {describe(x, bias, out)}")


# ---------------------------------------------------------------- ahead of time


def variants() -> list[Variant]:
    """Every format on every architecture; in fp32 two of them."""
    made = []
    for (arch, shapes), config in CONFIGS.items():
        dtype = torch.float32 if shapes == "fp32" else torch.bfloat16
        formats = ("q4_k", "int8") if shapes == "fp32" else (*ROWS, *BLOCKS, FLAT[0])
        archs = takers(CONFIGS, arch, shapes)
        made += [_weight_variant(arch, format, config, NAMES[dtype], archs) for format in formats]
    return made


def _weight_variant(arch: Arch, format: str, config: Config, dtype: str, archs: tuple[Arch, ...]) -> Variant:
    types = dict.fromkeys(("x_ptr", "bias_ptr", "out_ptr"), f"*{dtype}")
    types |= {"codes_ptr": "*i8" if format == "int8" else "*u8", "factor": "fp32"}
    types |= dict.fromkeys(("M", "N", "K", "stride_xm", "stride_om", "row_bytes"), "i32")
    constants = {"FORMAT": format, "SCALES": 64 if format in FLAT else int(format in ROWS), "GELU": True}
    pointers = {"scale_ptr": format not in BLOCKS, "map_ptr": format in FLAT}
    types |= {name: "*fp32" for name, there in pointers.items() if there}
    constants |= {name: None for name, there in pointers.items() if not there}
    aligned: tuple[str, ...] = ("x_ptr", "codes_ptr", "bias_ptr", "out_ptr", "N", "K", "stride_xm", "stride_om")
    if format not in BLOCKS:  # rows of blocks are of any even size
        aligned += ("row_bytes",)
    name = f"weight {format} {dtype} sm_{arch}"
    return Variant(name, linear_weight_kernel, types, constants | blocks_of(config), aligned, options_of(config), archs)


def blocks_of(config: Config) -> dict[str, int]:
    sizes = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
    return sizes | {"GROUP_M": config.group_m}


def options_of(config: Config) -> dict[str, int]:
    return {"num_warps": config.warps, "num_stages": config.stages}
