"""Convolutions of the video compression networks as one implicit matrix product, channels side by side in memory.

    out[b, t, h, w, n] = bias[n] + sum over taps (i, j, k) and c of
                         weight[n, i, j, k, c] * y[b, t s_t + i - P, h s + j + top - p_h, w s + k - p_w, c]

y is x, or SiLU(RMS norm(x)) made as x is loaded from the statistics that vae_norm.py leaves; before x's first frame
come the P frames of `past`, which are taken as they are and read where they lie, or zeros; beyond the frame come zeros.
Nothing is padded, concatenated or gathered in memory. The same kernel, by what it is told of the result:

  doubled      nearest upsampling and a 3x3 kernel: for each of the 4 places in a doubled pixel a 2x2 kernel (4 products
               instead of 9), whose results are stored every second row and column
  interleaved  2C channels as two frames: the first half of the channels goes to the even frames, the second to the odd
  add          out is added to: a residual in its epilogue
  bytes        [-1, 1] to 8 bits: clamp and rounding of `rgb.py`

A program makes BLOCK_M pixels of one frame, so that frames are chosen by scalars, and N1 + N2 channels: powers of 2
whose sum fits 96 and 192 without waste. Products are summed in fp32 and rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvid.kernels.ahead import Variant
from fastvid.kernels.devices import ARCHITECTURES, Arch, architecture
from fastvid.kernels.gemm import check_types, describe, power_of_2_parts
from fastvid.kernels.rgb import rgb_bytes
from fastvid.kernels.vae_norm import MOST_PIXELS, normalized


@dataclass(frozen=True)
class Config:
    """A tile: pixels, channels of the result (the larger power of 2 is one product, the rest another), and channels of
    the input a step."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Form:
    """What a convolution reads for a result, and where that goes.

    pad: rows and columns of zeros before the frame. top: rows of x that are there only to be seen. stride, stride_t: in
    space and in time. doubled: weight holds the kernels of the 4 places, one after the other. interleaved, add: see the
    top of this file.
    """

    pad: tuple[int, int] = (0, 0)
    top: int = 0
    stride: int = 1
    stride_t: int = 1
    doubled: bool = False
    interleaved: bool = False
    add: bool = False


@triton.jit
def _finish(
    acc,
    cols,
    bias_ptr,
    out_ptr,
    at,
    inside,
    N,
    stride_half,
    SPLIT: tl.constexpr,
    ADD: tl.constexpr,
    BYTES: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Bias, residual and the store of columns `cols`."""
    real = cols < N
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + cols, mask=real, other=0.0).to(tl.float32)[None, :]
    to = tl.where(cols < N // 2, cols.to(tl.int64), cols - N // 2 + stride_half) if SPLIT else cols
    ptrs = out_ptr + at[:, None] + to[None, :]
    mask = inside[:, None] & real[None, :]
    if ADD:
        acc += tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    if BYTES:
        tl.store(ptrs, rgb_bytes(acc.to(DTYPE)).to(tl.uint8), mask=mask)
    else:
        tl.store(ptrs, acc.to(DTYPE), mask=mask)


@triton.jit
def _weights(ptrs, real, EVEN: tl.constexpr):
    """A step's weights [channels in, channels out]; EVEN: all of its channels are real."""
    return tl.load(ptrs) if EVEN else tl.load(ptrs, mask=real[:, None], other=0.0)


@triton.jit
def vae_conv_kernel(
    x_ptr,
    past_ptr,
    scale_ptr,
    gamma_ptr,
    w_ptr,
    bias_ptr,
    out_ptr,
    frames_in,
    frames,
    H,
    W,
    out_h,
    out_w,
    C,
    N,
    history,
    first_h,
    first_w,
    stride_xb,
    stride_xc,
    stride_xt,
    stride_xh,
    stride_xw,
    stride_pb,
    stride_pc,
    stride_pt,
    stride_ph,
    stride_pw,
    stride_ob,
    stride_ot,
    stride_oh,
    stride_ow,
    stride_half,
    stride_down,
    stride_right,
    KT: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE_T: tl.constexpr,
    STRIDE: tl.constexpr,
    PLACES: tl.constexpr,
    SPLIT: tl.constexpr,
    ADD: tl.constexpr,
    BYTES: tl.constexpr,
    EVEN_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    pixels = out_h * out_w
    tiles_m, tiles_n = tl.cdiv(pixels, BLOCK_M), tl.cdiv(N, N1 + N2)
    # Programs that read the same pixels follow one another.
    number = tl.program_id(0)
    tile_n, number = number % tiles_n, number // tiles_n
    place, number = number % PLACES, number // PLACES
    tile_m, frame = number % tiles_m, number // tiles_m
    b, t = (frame // frames).to(tl.int64), frame % frames

    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < pixels
    to_h, to_w = rows // out_w, rows % out_w
    h0 = to_h * STRIDE + first_h + place // 2
    w0 = to_w * STRIDE + first_w + place % 2
    corner = h0.to(tl.int64) * stride_xh + w0.to(tl.int64) * stride_xw
    x_ptr += b * stride_xb
    t0 = t * STRIDE_T - history
    if past_ptr is not None:
        past_ptr += b * stride_pb
        # A product with it costs less than a choice, behind which the compiler no longer sees 16 bytes side by side.
        past_shift = h0.to(tl.int64) * stride_ph + w0.to(tl.int64) * stride_pw - corner
    if gamma_ptr is not None:
        scale_ptr += b * frames_in * H * W
        scale_corner = h0.to(tl.int64) * W + w0

    # Which taps of a frame a pixel sees, a bit each.
    sees = tl.zeros((BLOCK_M,), dtype=tl.int32)
    for seat in tl.static_range(KH * KW):
        h, w = h0 + seat // KW, w0 + seat % KW
        sees |= tl.where(inside & (h >= 0) & (h < H) & (w >= 0) & (w < W), 1 << seat, 0)

    ks = tl.arange(0, BLOCK_K)
    steps = tl.cdiv(C, BLOCK_K)
    K = KT * KH * KW * C
    cols1 = tile_n * (N1 + N2) + tl.arange(0, N1)
    cols2 = tile_n * (N1 + N2) + N1 + tl.arange(0, N2 if N2 > 0 else 1)
    # Columns beyond the end read the last one, which costs less than a mask; they are not stored.
    w1_ptrs = w_ptr + (place * N + tl.minimum(cols1, N - 1)).to(tl.int64)[None, :] * K + ks[:, None]
    w2_ptrs = w_ptr + (place * N + tl.minimum(cols2, N - 1)).to(tl.int64)[None, :] * K + ks[:, None]
    acc1 = tl.zeros((BLOCK_M, N1), dtype=tl.float32)
    acc2 = tl.zeros((BLOCK_M, N2 if N2 > 0 else 1), dtype=tl.float32)
    # Without a past, taps before the first frame see zeros: they are left out.
    start = tl.maximum(-t0, 0) * (KH * KW) * steps if past_ptr is None else 0
    for step in range(start, KT * KH * KW * steps):
        tap, c = step // steps, step % steps * BLOCK_K
        spot, ti = tap % (KH * KW), (t0 + tap // (KH * KW)).to(tl.int64)
        j, k, cs = (spot // KW).to(tl.int64), (spot % KW).to(tl.int64), c + ks
        seen = (sees >> spot) & 1 != 0
        mask = seen[:, None] if EVEN_C else seen[:, None] & (cs < C)[None, :]
        base, at, stride_c = x_ptr + (ti * stride_xt + j * stride_xh + k * stride_xw), corner, stride_xc
        if past_ptr is not None:
            old = ti < 0
            base = tl.where(old, past_ptr + ((ti + history) * stride_pt + j * stride_ph + k * stride_pw), base)
            at, stride_c = at + old.to(tl.int64) * past_shift, tl.where(old, stride_pc, stride_c)
        x = tl.load(base + at[:, None] + cs.to(tl.int64)[None, :] * stride_c, mask=mask, other=0.0)
        if gamma_ptr is not None:
            gamma = tl.load(gamma_ptr + cs, mask=cs < C, other=0.0).to(tl.float32)
            # Of a past frame that of the first one is read, and not used.
            here = scale_ptr + (tl.maximum(ti, 0) * H * W + j * W + k)
            scale = tl.load(here + scale_corner, mask=seen, other=0.0)
            y = normalized(x.to(tl.float32), scale, gamma, True).to(dtype)
            x = y if past_ptr is None else tl.where(old, x, y)
        along = tap * C + c
        acc1 = tl.dot(x, _weights(w1_ptrs + along, cs < C, EVEN_C), acc1, input_precision="ieee")
        if N2 > 0:
            acc2 = tl.dot(x, _weights(w2_ptrs + along, cs < C, EVEN_C), acc2, input_precision="ieee")

    out_ptr += b * stride_ob + t.to(tl.int64) * stride_ot
    out_ptr += (place // 2).to(tl.int64) * stride_down + (place % 2).to(tl.int64) * stride_right
    to = to_h.to(tl.int64) * stride_oh + to_w.to(tl.int64) * stride_ow
    _finish(acc1, cols1, bias_ptr, out_ptr, to, inside, N, stride_half, SPLIT, ADD, BYTES, dtype)
    if N2 > 0:
        _finish(acc2, cols2, bias_ptr, out_ptr, to, inside, N, stride_half, SPLIT, ADD, BYTES, dtype)


LARGE = (90, 100)  # architectures with room for large tiles
WIDTHS = (192, 160, 128, 96, 64, 48, 32)  # channels of the result that a program makes


def choose(arch: Arch, dtype: torch.dtype, C: int, N: int, normalizes: bool) -> Config:
    """The config of a launch from C channels to N; none is measured yet: sizes are what compiles without spills and
    fills the units. normalizes: whether x is made as it is loaded, which takes registers.
    """
    if dtype == torch.float32:  # no matrix unit
        return Config(64, _fitting(N, (64, 32, 16)), 16, 4, 3)
    width, block_k = _fitting(N, WIDTHS if arch in LARGE else WIDTHS[2:]), _fitting(C, (64, 32, 16))
    if width == 32 or arch not in LARGE:  # no width below 32: a tile of weights that is deeper than wide spills
        return Config(128, width, min(block_k, 32), 4 if width == 32 else 8, 3)
    return Config(256 if width <= 96 else 128, width, block_k, 8, 3 if normalizes else 4)


def _fitting(size: int, blocks: tuple[int, ...]) -> int:
    """The largest block among those that leave the least over."""
    return min(blocks, key=lambda block: (-size % block, -block))


def conv(
    x: Tensor,
    past: Tensor | None,
    scale: Tensor | None,
    gamma: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    history: int,
    form: Form,
    config: Config | None = None,
) -> None:
    """Write, or add, the convolution of x [B, C, T, H, W] after its past [B, C, history, H, W], both of any strides,
    into out [B, N, T', H', W'], whose channels are contiguous and whose size says what is made.

    weight [N, C, kt, kh, kw], contiguous in the order (N, kt, kh, kw, C), 4 N if doubled, 2 N if interleaved; bias of N
    or 2 N. scale [B, T, H, W] in fp32 and gamma [C] where x is normalized as it is loaded, None where it is not.
    past None: zeros. out in uint8: 8-bit values. config: chosen when None. Raises ValueError for what it
    does not take.
    """
    step, halves, places = 1 + form.doubled, 1 + form.interleaved, 4 if form.doubled else 1
    check_types(x, past, scale, gamma, weight, bias)
    _check_layout(x, weight, bias, out)
    if out.numel() == 0:
        return
    B, C, T, H, W = x.shape
    N, (kt, kh, kw) = weight.shape[0] // places, weight.shape[2:]
    if config is None:
        config = choose(architecture(x.device), x.dtype, C, N, scale is not None)
        if x.device.type == "cpu":  # Triton's interpreter, whose steps take as long if they are small
            config = replace(config, block_m=min(4096, triton.next_power_of_2(max(16, out.shape[3] * out.shape[4]))))
    n1, n2 = power_of_2_parts(config.block_n)
    frames = out.shape[2] // halves
    out_h, out_w = out.shape[3] // step, out.shape[4] // step
    stride_b, _, stride_t, stride_h, stride_w = out.stride()
    tiles = triton.cdiv(out_h * out_w, config.block_m) * triton.cdiv(N, config.block_n)
    with torch.cuda.device_of(x):  # the device guard; nothing for the interpreter's CPU tensors
        vae_conv_kernel[(B * frames * tiles * places,)](
            *(x, past, scale, gamma, weight, bias, out, T, frames, H, W, out_h, out_w, C, N, history),
            *(form.top - form.pad[0], -form.pad[1], *x.stride(), *(x if past is None else past).stride()),
            *(stride_b, halves * stride_t, step * stride_h, step * stride_w, stride_t, stride_h, stride_w),
            KT=kt,
            KH=kh,
            KW=kw,
            STRIDE_T=form.stride_t,
            STRIDE=form.stride,
            PLACES=places,
            SPLIT=form.interleaved,
            ADD=form.add,
            BYTES=out.dtype == torch.uint8,
            EVEN_C=C % config.block_k == 0,
            BLOCK_M=config.block_m,
            N1=n1,
            N2=n2,
            BLOCK_K=config.block_k,
            num_warps=config.warps,
            num_stages=config.stages,
            enable_fp_fusion=True,
        )


def _check_layout(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Raises ValueError for strides and sizes that the kernel does not take."""
    if not weight.permute(0, 2, 3, 4, 1).is_contiguous():
        raise ValueError(
            f"weight must be contiguous in the order (N, kt, kh, kw, C); its strides are {weight.stride()}"
        )
    if (bias is not None and not bias.is_contiguous()) or (out.stride(1) != 1 and out.shape[1] > 1):
        raise ValueError(f"bias and the channels of out must be contiguous: {describe(bias, out)}")
    if max(x.shape[3] * x.shape[4], out.shape[3] * out.shape[4]) > MOST_PIXELS:
        raise ValueError(f"frames of more than {MOST_PIXELS} pixels: {describe(x, out)}")


def variants() -> list[Variant]:
    """The layers of Wan 2.1: residual blocks, the last one, upsampling, the first one, the encoder's halving."""
    layers = {
        "block 96": (96, 96, True, Form(pad=(1, 1), add=True), (3, 3, 3)),
        "block 192": (192, 192, True, Form(pad=(1, 1)), (3, 3, 3)),
        "block 384": (384, 384, True, Form(pad=(1, 1)), (3, 3, 3)),
        "to rgb": (96, 3, True, Form(pad=(1, 1)), (3, 3, 3)),
        "first": (16, 384, False, Form(pad=(1, 1)), (3, 3, 3)),
        "double": (192, 96, False, Form(pad=(1, 1), doubled=True), (1, 2, 2)),
        "double frames": (384, 768, False, Form(interleaved=True), (3, 1, 1)),
        "halve": (96, 96, False, Form(stride=2), (1, 3, 3)),
    }
    chosen = [(name, "bf16") for name in layers] + [("block 96", "fp32"), ("to rgb", "fp32")]
    return [_variant(arch, dtype, name, *layers[name]) for name, dtype in chosen for arch in (90, 100, 80)]


def _variant(
    arch: Arch, dtype: str, name: str, C: int, N: int, normed: bool, form: Form, kernel: tuple[int, int, int]
) -> Variant:
    """One that knows its past where its kernel looks back, and takes 32-bit strides."""
    config = choose(arch, torch.float32 if dtype == "fp32" else torch.bfloat16, C, N, normed)
    there = {"x_ptr": dtype, "w_ptr": dtype, "bias_ptr": dtype, "out_ptr": "u8" if name == "to rgb" else dtype}
    there |= {"scale_ptr": "fp32", "gamma_ptr": dtype} if normed else {}
    there |= {"past_ptr": dtype} if kernel[0] > 1 else {}
    n1, n2 = power_of_2_parts(config.block_n)
    constants = dict.fromkeys({"past_ptr", "scale_ptr", "gamma_ptr"} - set(there))
    constants |= {"stride_xc": 1, "stride_pc": 1, **dict(zip(("KT", "KH", "KW"), kernel, strict=True))}
    constants |= {"STRIDE_T": form.stride_t, "STRIDE": form.stride, "PLACES": 4 if form.doubled else 1}
    constants |= {"SPLIT": form.interleaved}
    constants |= {"ADD": form.add, "BYTES": name == "to rgb", "EVEN_C": C % config.block_k == 0}
    constants |= {"BLOCK_M": config.block_m, "N1": n1, "N2": n2, "BLOCK_K": config.block_k}
    numbers = [one for one in vae_conv_kernel.arg_names if one not in constants and one not in there]
    types = {one: f"*{kind}" for one, kind in there.items()} | dict.fromkeys(numbers, "i32")
    aligned = [*there, "C", *(("N",) if N % 32 == 0 else ()), *(n for n in numbers if n.startswith("stride_"))]
    options = {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True}
    archs = (arch,) if arch in LARGE else tuple(one for one in ARCHITECTURES if one not in LARGE)
    return Variant(f"vae {name} {dtype} sm_{arch}", vae_conv_kernel, types, constants, aligned, options, archs)
