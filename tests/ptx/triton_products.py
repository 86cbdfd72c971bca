"""Products that Triton compiles to TMA and wgmma, of every type and swizzle that csrc/ has."""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl

from fastvid.kernels.ahead import Variant


@triton.jit
def product_kernel(
    a_desc,
    b_desc,
    out_ptr,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TURNED: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """out [M, N] = a [M, K] b, with b [K, N] as it stands if TURNED, else as [N, K]; out is whole in its tiles."""
    row, col = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32 if WHOLE else tl.float32)
    for k in tl.range(0, K, BLOCK_K):
        a = a_desc.load([row, k])
        if TURNED:  # noqa: SIM108  # a constant: Triton compiles one of the two
            b = b_desc.load([k, col])
        else:
            b = b_desc.load([col, k]).T
        acc = tl.dot(a, b, acc)
    rows, cols = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
    tl.store(out_ptr + rows[:, None] * N + cols[None, :], acc)


def product(dtype: str, block: tuple[int, int, int], turned: bool = False) -> Variant:
    m, n, k = block
    whole = dtype == "i8"
    shape = f"{k}, {n}" if turned else f"{n}, {k}"
    types: Mapping[str, str] = {
        "a_desc": f"tensordesc<{dtype}[{m}, {k}]>",
        "b_desc": f"tensordesc<{dtype}[{shape}]>",
        "out_ptr": "*i32" if whole else "*fp32",
        "N": "i32",
        "K": "i32",
    }
    constants = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "TURNED": turned, "WHOLE": whole}
    options = {"num_warps": 4, "num_stages": 2}
    return Variant(f"product {dtype}", product_kernel, types, constants, ("out_ptr", "N", "K"), options, (90,))
