"""RMS norm over the channels of each pixel of video features [B, C, T, H, W], any strides: statistics, and results.

    scale[b, t, h, w] = sqrt(C / max(sum over c of x^2, 1e-24))        fp32, one a pixel
    out = x * scale * gamma, or SiLU of it                             of the frames from `first` on

A convolution that normalizes what it loads (vae_conv.py) needs the first alone, and of the second the last two frames:
what the next chunk looks back on. A program holds some pixels with all their channels, and reads them once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvid.kernels.ahead import Variant
from fastvid.kernels.gemm import check_types, describe

TILE = 4096  # values that a program of 4 warps holds: 32 a thread
MOST_PIXELS = 2**31 - 2**16  # of a frame: they are counted in 32 bits, to the end of a tile; offsets have 64


@triton.jit
def normalized(x, scale, gamma, SILU: tl.constexpr):
    """fp32 x [pixels, channels] by scale [pixels] and gamma [channels], then SiLU. All kernels round it as this one."""
    y = x * scale[:, None] * gamma[None, :]
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    return y


@triton.jit
def vae_norm_kernel(
    x_ptr,
    gamma_ptr,
    scale_ptr,
    out_ptr,
    frames,
    first,
    width,
    pixels,
    C,
    stride_xb,
    stride_xc,
    stride_xt,
    stride_xh,
    stride_xw,
    stride_ob,
    stride_ot,
    stride_oh,
    stride_ow,
    SILU: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tiles = tl.cdiv(pixels, BLOCK)
    frame = tl.program_id(0) // tiles
    b, t = (frame // frames).to(tl.int64), (frame % frames).to(tl.int64)
    rows = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    h, w = (rows // width).to(tl.int64), (rows % width).to(tl.int64)
    cs = tl.arange(0, BLOCK_C)
    inside = rows < pixels
    mask = inside[:, None] & (cs < C)[None, :]
    x_ptr += b * stride_xb + t * stride_xt
    at = h * stride_xh + w * stride_xw
    x = tl.load(x_ptr + at[:, None] + cs.to(tl.int64)[None, :] * stride_xc, mask=mask, other=0.0).to(tl.float32)
    scale = tl.sqrt(C / tl.maximum(tl.sum(x * x, 1), 1e-24))
    if scale_ptr is not None:
        tl.store(scale_ptr + frame.to(tl.int64) * pixels + rows, scale, mask=inside)
    if out_ptr is not None and t >= first:
        gamma = tl.load(gamma_ptr + cs, mask=cs < C, other=0.0).to(tl.float32)
        out_ptr += b * stride_ob + (t - first) * stride_ot
        to = h * stride_oh + w * stride_ow
        y = normalized(x, scale, gamma, SILU).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + to[:, None] + cs[None, :], y, mask=mask)


def norm(
    x: Tensor, gamma: Tensor, scale: Tensor | None, out: Tensor | None, silu: bool, block: int | None = None
) -> None:
    """Write statistics of x [B, C, T, H, W] into scale [B, T, H, W], and the result of its last frames into out
    [B, C, n, H, W], n <= T. x of any strides; gamma [C] contiguous; scale contiguous, fp32; out's channels contiguous.

    block: pixels a program, chosen when None. Raises ValueError for what it does not take.
    """
    check_types(x, gamma, scale, out)
    if x.shape[3] * x.shape[4] > MOST_PIXELS or not gamma.is_contiguous():
        raise ValueError(f"at most {MOST_PIXELS} pixels and a contiguous gamma are needed, not {describe(x, gamma)}")
    B, C, T, H, W = x.shape
    if x.numel() == 0 or (scale is None and out is None):
        return
    block_c = triton.next_power_of_2(C)
    block = block or max(1, TILE // block_c)
    n, strides = (0, (0, 0, 0, 0)) if out is None else (out.shape[2], (out.stride(0), *out.stride()[2:]))
    grid = (B * T * triton.cdiv(H * W, block),)
    with torch.cuda.device_of(x):  # the device guard; nothing for the interpreter's CPU tensors
        vae_norm_kernel[grid](
            *(x, gamma, scale, out, T, T - n, W, H * W, C, *x.stride(), *strides),
            SILU=silu,
            BLOCK=block,
            BLOCK_C=block_c,
            enable_fp_fusion=True,
        )


def variants() -> list[Variant]:
    """Statistics with the last frames, and the norm alone, of the widths of Wan 2.1."""
    made = []
    for dtype in ("bf16", "fp32"):
        for C, stats in ((96, True), (192, True), (384, True), (384, False)):
            types = {"x_ptr": f"*{dtype}", "gamma_ptr": f"*{dtype}", "out_ptr": f"*{dtype}"}
            types |= dict.fromkeys(("frames", "first", "width", "pixels", "C"), "i32")
            strides = ("stride_xb", "stride_xt", "stride_xh", "stride_xw", "stride_ob", "stride_ot", "stride_oh")
            types |= dict.fromkeys((*strides, "stride_ow"), "i32")
            block_c = triton.next_power_of_2(C)
            constants = {"stride_xc": 1, "SILU": stats, "BLOCK": TILE // block_c, "BLOCK_C": block_c}
            if stats:
                types["scale_ptr"] = "*fp32"
            else:
                constants["scale_ptr"] = None
            aligned = [name for name in types if name.endswith("_ptr")] + ["C", *strides, "stride_ow"]
            name = f"vae norm {'silu' if stats else 'alone'} {C} {dtype}"
            made.append(Variant(name, vae_norm_kernel, types, constants, aligned, {"enable_fp_fusion": True}))
    return made
