"""Linear layers with bias and GELU in the product's epilogue: [M, K] x [N, K]^T -> [M, N].

    out = act(x @ weight^T + bias), act = GELU in its tanh form or nothing, summed in fp32, rounded once

linear_tma_kernel  sm_90 and sm_100: tiles come and go by tensor descriptors; as many programs as fit, each of which
                   takes one tile after another, so that the loads of the next one run beside the epilogue
linear_kernel      everywhere, for any strides: one tile a program, pointers

Tiles are taken in groups of GROUP_M rows for the sake of the L2 cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastvid.kernels.ahead import Variant
from fastvid.kernels.devices import Arch, architecture, entry, takers
from fastvid.kernels.gemm import check_types, describe, gelu_tanh, processors, tile_at


@dataclass(frozen=True)
class Config:
    """A tile and how it is worked on. tma: by linear_tma_kernel; parts: how many pieces its epilogue is done in."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    tma: bool = False
    parts: int = 1
    specialize: bool = False
    group_m: int = 8


FEW_ROWS = 2048  # up to here (texts, pictures) small tiles keep all processors at work

# (architecture, shape class) -> config. Classes: "many" and "few" rows; "odd" has strides that descriptors do not
# take; "fp32" has no matrix unit. None is measured yet: sizes are what compiles without spills and fills the units.
CONFIGS: Mapping[tuple[Arch, str], Config] = MappingProxyType(
    {
        (80, "many"): Config(128, 128, 32, 8, 4),
        (80, "few"): Config(64, 64, 64, 4, 4),
        (80, "odd"): Config(128, 64, 32, 8, 3),
        (80, "fp32"): Config(64, 64, 16, 4, 3),
        (90, "many"): Config(128, 256, 64, 8, 3, tma=True, parts=2),
        (90, "few"): Config(64, 128, 64, 4, 5, tma=True),
        (90, "odd"): Config(128, 128, 32, 8, 3),
        (90, "fp32"): Config(64, 64, 16, 4, 3),
        (100, "many"): Config(128, 256, 64, 8, 3, tma=True, parts=2),
        (100, "few"): Config(64, 128, 64, 4, 5, tma=True),
        (100, "odd"): Config(128, 128, 32, 8, 3),
        (100, "fp32"): Config(64, 64, 16, 4, 3),
    }
)


@triton.jit
def _finish(acc, bias_ptr, cols, N, GELU: tl.constexpr):
    """Bias and GELU of a tile [BLOCK_M, n] whose columns are cols."""
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    if GELU:
        acc = gelu_tanh(acc)
    return acc


@triton.jit
def linear_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_om,
    GELU: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    tile_m, tile_n = tile_at(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K).to(tl.int64)
    # Rows and columns beyond the end read the last one, which costs less than a mask; they are not stored.
    x_ptrs = x_ptr + tl.minimum(rows, M - 1)[:, None] * stride_xm + ks[None, :] * stride_xk
    w_ptrs = w_ptr + tl.minimum(cols, N - 1)[None, :] * stride_wn + ks[:, None] * stride_wk
    step = tl.full((), BLOCK_K, tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, tl.cdiv(K, BLOCK_K)):
        if EVEN_K:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            left = K - k * BLOCK_K
            x = tl.load(x_ptrs, mask=ks[None, :] < left, other=0.0)
            w = tl.load(w_ptrs, mask=ks[:, None] < left, other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        x_ptrs += step * stride_xk
        w_ptrs += step * stride_wk
    acc = _finish(acc, bias_ptr, cols, N, GELU)
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    tl.store(out_ptr + rows[:, None] * stride_om + cols[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def linear_tma_kernel(
    x_desc,
    w_desc,
    bias_ptr,
    out_desc,
    M,
    N,
    K,
    GELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(
        tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=not SPECIALIZE, warp_specialize=SPECIALIZE
    ):
        tile_m, tile_n = tile_at(tile, tiles_m, tiles_n, GROUP_M)
        row, col = tile_m * BLOCK_M, tile_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(tl.cdiv(K, BLOCK_K)):
            x = x_desc.load([row, k * BLOCK_K])
            w = w_desc.load([col, k * BLOCK_K])
            acc = tl.dot(x, w.T, acc)
        if PARTS == 1:
            cols = col + tl.arange(0, BLOCK_N)
            out_desc.store([row, col], _finish(acc, bias_ptr, cols, N, GELU).to(out_desc.dtype))
        else:
            left, right = tl.split(acc.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1))
            cols = col + tl.arange(0, BLOCK_N // 2)
            out_desc.store([row, col], _finish(left, bias_ptr, cols, N, GELU).to(out_desc.dtype))
            cols += BLOCK_N // 2
            out_desc.store([row, col + BLOCK_N // 2], _finish(right, bias_ptr, cols, N, GELU).to(out_desc.dtype))


def choose(arch: Arch, M: int, dtype: torch.dtype, described: bool) -> Config:
    """The config of a launch. described: whether descriptors take the strides."""
    if dtype == torch.float32:
        return entry(CONFIGS, arch, "fp32")
    if not described:
        return entry(CONFIGS, arch, "odd")
    return entry(CONFIGS, arch, "few" if M <= FEW_ROWS else "many")


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, gelu: bool, config: Config | None = None
) -> None:
    """Write x [M, K] @ weight [N, K]^T + bias [N], through GELU if `gelu`, into out [M, N], whose rows are contiguous.

    x, weight and out are of one type, x and weight of any strides. config: chosen when None.
    Raises ValueError for types and strides that it does not take.
    """
    check_types(x, weight, bias)
    if bias is not None and bias.stride(0) != 1:
        raise ValueError(f"bias must be contiguous, not {describe(bias)} with strides {bias.stride()}")
    (M, K), N = x.shape, len(weight)
    if out.numel() == 0:
        return
    described = all(_described(tensor) for tensor in (x, weight, out)) and K > 0
    config = config or choose(architecture(x.device), M, x.dtype, described)
    if config.tma and not described:
        raise ValueError(
            f"{config} needs rows that are contiguous and start on 16 bytes; strides are {x.stride()}, "
            f"{weight.stride()} and {out.stride()} elements"
        )
    blocks = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
    blocks |= {"GROUP_M": config.group_m, "num_warps": config.warps, "num_stages": config.stages}
    tiles = triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n)
    with torch.cuda.device_of(x):  # the device guard; nothing for the interpreter's CPU tensors
        if config.tma:
            x_desc = TensorDescriptor.from_tensor(x, [config.block_m, config.block_k])
            w_desc = TensorDescriptor.from_tensor(weight, [config.block_n, config.block_k])
            out_desc = TensorDescriptor.from_tensor(out, [config.block_m, config.block_n // config.parts])
            grid = (min(tiles, processors(x.device)),)
            more = {"PARTS": config.parts, "SPECIALIZE": config.specialize, "enable_fp_fusion": True}
            linear_tma_kernel[grid](x_desc, w_desc, bias, out_desc, M, N, K, GELU=gelu, **blocks, **more)
        else:
            strides = (*x.stride(), *weight.stride(), out.stride(0))
            even = K % config.block_k == 0
            more = {"EVEN_K": even, "enable_fp_fusion": True}
            linear_kernel[(tiles,)](x, weight, bias, out, M, N, K, *strides, GELU=gelu, **blocks, **more)


def _described(tensor: Tensor) -> bool:
    """Whether a tensor descriptor takes a matrix: contiguous rows that start on 16 bytes."""
    size = tensor.element_size()
    return tensor.stride(1) == 1 and tensor.data_ptr() % 16 == 0 and tensor.stride(0) * size % 16 == 0


def variants() -> list[Variant]:
    """Every config with GELU; the two largest without it too."""
    made = []
    for gelu in (True, False):
        for (arch, shapes), config in CONFIGS.items():
            if gelu or shapes == "many":
                make = _tma_variant if config.tma else _pointer_variant
                made.append(make(arch, shapes, config, "fp32" if shapes == "fp32" else "bf16", gelu))
    return sorted(made, key=lambda variant: (variant.archs[0] == 80, variant.kernel is linear_kernel))


def _name(arch: Arch, shapes: str, dtype: str, gelu: bool) -> str:
    return f"linear{' gelu' if gelu else ''} {shapes} {dtype} sm_{arch}"


def _tma_variant(arch: Arch, shapes: str, config: Config, dtype: str, gelu: bool) -> Variant:
    m, n, k = config.block_m, config.block_n, config.block_k
    types = {
        "x_desc": f"tensordesc<{dtype}[{m}, {k}]>",
        "w_desc": f"tensordesc<{dtype}[{n}, {k}]>",
        "out_desc": f"tensordesc<{dtype}[{m}, {n // config.parts}]>",
        "bias_ptr": f"*{dtype}",
        **dict.fromkeys("MNK", "i32"),
    }
    constants = {"GELU": gelu, "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": config.group_m}
    constants |= {"PARTS": config.parts, "SPECIALIZE": config.specialize}
    options = {"num_warps": config.warps, "num_stages": config.stages}
    name = _name(arch, shapes, dtype, gelu)
    return Variant(
        name, linear_tma_kernel, types, constants, ("bias_ptr", "N", "K"), options, takers(CONFIGS, arch, shapes)
    )


def _pointer_variant(arch: Arch, shapes: str, config: Config, dtype: str, gelu: bool) -> Variant:
    types = dict.fromkeys(("x_ptr", "w_ptr", "bias_ptr", "out_ptr"), f"*{dtype}")
    types |= dict.fromkeys(("M", "N", "K", "stride_xm", "stride_wn", "stride_om"), "i32")
    constants = {"stride_xk": 1, "stride_wk": 1, "GELU": gelu, "EVEN_K": shapes != "odd", "GROUP_M": config.group_m}
    constants |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
    aligned: tuple[str, ...] = ("bias_ptr",)
    if shapes != "odd":
        aligned = ("x_ptr", "w_ptr", "bias_ptr", "out_ptr", "N", "K", "stride_xm", "stride_wn", "stride_om")
    options = {"num_warps": config.warps, "num_stages": config.stages}
    return Variant(
        _name(arch, shapes, dtype, gelu),
        linear_kernel,
        types,
        constants,
        aligned,
        options,
        takers(CONFIGS, arch, shapes),
    )
