"""Decoded frames [3, T, H, W] -> uint8 [T, H, W, 3] in one pass over memory.

    byte = rint((clamp(x, -1, 1) * 0.5 + 0.5) * 255), ties to even, NaN -> 0, in IEEE fp32

A program takes BLOCK groups of GROUP neighboring pixels of one row. With GROUP = 4 three 32-bit words hold a group,
so that nothing is written a byte at a time; GROUP = 1 is for rows that do not start on a word.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvid.kernels.ahead import Variant

BLOCK = 256


@triton.jit
def rgb_bytes(x):
    """Frames in [-1, 1] -> integers 0..255. Adding 1.5 * 2^23 rounds to an integer, ties to even, in the low bits:
    exact only if the product before it is rounded too, so a minimum that changes nothing keeps the two from becoming a
    fused multiply-add."""
    x = x.to(tl.float32)
    x = tl.where(x == x, x, -1.0)
    unit = tl.minimum(tl.maximum(x, -1.0), 1.0) * 0.5 + 0.5
    return (tl.minimum(unit * 255.0, 255.0) + 12582912.0).to(tl.int32, bitcast=True) & 255


@triton.jit
def _load_group(src_ptr, pixels, width, stride_w):
    """The four pixels of each group, of one plane: four tensors [BLOCK]."""
    offsets = pixels[:, None] + tl.arange(0, 4)[None, :]
    plane = rgb_bytes(tl.load(src_ptr + offsets * stride_w, mask=offsets < width, other=0.0))
    even, odd = tl.split(plane.reshape(plane.shape[0], 2, 2))
    p0, p2 = tl.split(even)
    p1, p3 = tl.split(odd)
    return p0, p1, p2, p3


@triton.jit
def rgb_kernel(
    src_ptr,
    dst_ptr,
    height,
    width,
    col_blocks,
    stride_c,
    stride_t,
    stride_h,
    stride_w,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    row = (tl.program_id(0) // col_blocks).to(tl.int64)
    first = (tl.program_id(0) % col_blocks).to(tl.int64) * (BLOCK * GROUP)
    pixels = first + tl.arange(0, BLOCK) * GROUP
    src_ptr += (row // height) * stride_t + (row % height) * stride_h
    inside = pixels < width
    if GROUP == 4:
        r0, r1, r2, r3 = _load_group(src_ptr, pixels, width, stride_w)
        src_ptr += stride_c  # one at a time: 2 * stride_c may not fit its 32 bits
        g0, g1, g2, g3 = _load_group(src_ptr, pixels, width, stride_w)
        src_ptr += stride_c
        b0, b1, b2, b3 = _load_group(src_ptr, pixels, width, stride_w)
        words_ptr = dst_ptr.to(tl.pointer_type(tl.int32)) + (row * width + pixels) // 4 * 3
        tl.store(words_ptr, r0 | (g0 << 8) | (b0 << 16) | (r1 << 24), mask=inside)
        tl.store(words_ptr + 1, g1 | (b1 << 8) | (r2 << 16) | (g2 << 24), mask=inside)
        tl.store(words_ptr + 2, b2 | (r3 << 8) | (g3 << 16) | (b3 << 24), mask=inside)
    else:
        for c in tl.static_range(3):
            x = tl.load(src_ptr + pixels * stride_w, mask=inside, other=0.0)
            tl.store(dst_ptr + (row * width + pixels) * 3 + c, rgb_bytes(x).to(tl.uint8), mask=inside)
            src_ptr += stride_c


def variants() -> list[Variant]:
    """Whole words, then rows that do not start on one."""
    types = {"src_ptr": "*bf16", "dst_ptr": "*u8", "height": "i32", "width": "i32", "col_blocks": "i32"}
    types |= dict.fromkeys(("stride_c", "stride_t", "stride_h"), "i64")
    aligned = ("src_ptr", "dst_ptr", "width", "stride_c", "stride_t", "stride_h")
    return [
        Variant(
            f"rgb {'words' if group == 4 else 'bytes'} {dtype}",
            rgb_kernel,
            types | {"src_ptr": f"*{dtype}"},
            {"stride_w": 1, "BLOCK": BLOCK, "GROUP": group},
            aligned,
        )
        for dtype in ("bf16", "fp32")
        for group in (4, 1)
    ]


def to_rgb(frames: Tensor, out: Tensor) -> None:
    """Write frames [3, T, H, W] in [-1, 1], of any strides, as 8-bit RGB into out, uint8 [T, H, W, 3], contiguous.

    fastvid/ops/rgb.py checks frames and allocates out.
    """
    _, T, H, W = frames.shape
    if out.numel() == 0:
        return
    stride_c, stride_t, stride_h, stride_w = frames.stride()
    if stride_w == 1 and stride_h == W:  # rows that follow one another are one long row
        H, W = 1, H * W
    group = 4 if W % 4 == 0 and out.data_ptr() % 4 == 0 else 1
    col_blocks = triton.cdiv(W, BLOCK * group)
    with torch.cuda.device_of(frames):  # the device guard; nothing for the interpreter's CPU tensors
        rgb_kernel[(T * H * col_blocks,)](
            *(frames, out, H, W, col_blocks, stride_c, stride_t, stride_h, stride_w, BLOCK, group),
            enable_fp_fusion=True,
        )
