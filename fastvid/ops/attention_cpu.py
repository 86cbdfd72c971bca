"""Dense attention in bf16 on CPUs, head by head: products of brgemm.py, softmax for a strip of queries in the cache.

Scores, softmax and the output's sums are fp32; only the weights are rounded to bf16, as in PyTorch's kernel. On a core
with AVX512-BF16 it takes 0.56 of SDPA's time at 1,950 tokens and head_dim 128, and 0.61 with 512 keys. No result
depends on the size of a strip or the number of threads.

Shapes: q [B, N, H, D]; k and v [B, M, H, D]; log-sum-exp fp32 [B, H, N].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvid.ops import brgemm

STRIP = 2**18  # scores of a strip: 2.5 MB with the weights in both types
ROWS = (32, 256)  # of a strip, at least and at most
WORTH = 2**16, 2**28  # scores of a head and products of a call below which PyTorch's own attention is as fast
PARTS = 2**19  # scores below which a head is not divided among threads, each of which packs its keys


def refuses(q: Tensor, k: Tensor) -> str | None:
    """Why it cannot take this call; None if it can."""
    if q.dtype != torch.bfloat16:
        return f"brgemm takes bf16, not {str(q.dtype).removeprefix('torch.')}"
    if q.numel() == 0:
        return "brgemm takes at least one query"
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return "brgemm has no gradients: ask for sdpa"
    return "brgemm cannot be traced by torch.compile: ask for sdpa" if torch.compiler.is_compiling() else None


def why_not(device: torch.device) -> str | None:
    """Why it cannot run on a device; None if it can."""
    return brgemm.why_not() if device.type == "cpu" else f"it needs a CPU, and the device is {device}"


def preferred() -> bool:
    """Whether it is what `auto` takes on CPUs. With AMX, PyTorch's own attention multiplies by the same kernels."""
    return brgemm.why_not() is None and not torch.cpu._is_amx_tile_supported()


def worth(q: Tensor, k: Tensor) -> bool:
    """Whether it is faster than PyTorch's own attention."""
    scores = q.shape[1] * k.shape[1]
    return scores >= WORTH[0] and scores * q.shape[0] * q.shape[2] * q.shape[3] >= WORTH[1]


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None, with_lse: bool) -> tuple[Tensor, Tensor | None]:
    """Attention and its log-sum-exp, if asked for."""
    B, N, H, D = q.shape
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty((B, H, N), dtype=torch.float32) if with_lse else None
    rows = _rows(k.shape[1])
    strips = -(-N // rows)
    parts = min(-(-2 * torch.get_num_threads() // (B * H)), strips, max(N * k.shape[1] // PARTS, 1))
    part = -(-strips // parts) * rows
    scale = D**-0.5 if scale is None else scale

    def run(number: int) -> None:
        head, first = number // parts, number % parts * part
        b, h = divmod(head, H)
        span = slice(first, min(first + part, N))
        if first < N:
            sums = None if lse is None else lse[b, h, span]
            _head(q[b, span, h], k[b, :, h], v[b, :, h], scale, rows, out[b, span, h], sums)

    brgemm.spread(run, B * H * parts)
    return out, lse


def _rows(keys: int) -> int:
    return min(max(STRIP // keys // 16 * 16, ROWS[0]), ROWS[1])


def _head(q: Tensor, k: Tensor, v: Tensor, scale: float, rows: int, out: Tensor, lse: Tensor | None) -> None:
    """One head: q and out [N, D], k and v [M, D], lse [N]."""
    (N, D), M = q.shape, k.shape[0]
    if D % 2:
        q, k = F.pad(q, (0, 1)), F.pad(k, (0, 1))
    q = q if q.stride(1) == 1 else q.contiguous()
    keys, values = brgemm.pack_transposed(k), brgemm.pack(v)
    rows = min(rows, N)
    scores, exact = q.new_empty(2, rows, M, dtype=torch.float32)
    weights = q.new_zeros(rows, 2 * values.shape[0])  # an odd number of keys gets a weight of zero
    sums = q.new_empty(rows, D, dtype=torch.float32)
    for first in range(0, N, rows):
        count = min(rows, N - first)
        at = slice(first, first + count)
        s, p = scores[:count], exact[:count]
        brgemm.matmul(q[at], keys, s)
        torch.softmax(s.mul_(scale), -1, out=p)
        weights[:count, :M] = p
        brgemm.matmul(weights[:count], values, sums[:count])
        out[at] = sums[:count]
        if lse is not None:  # the largest weight is 1 / sum(exp(s - max s))
            lse[at] = s.amax(-1) - p.amax(-1).log_()
