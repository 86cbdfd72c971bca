"""Attention, dense or block-sparse, optionally with its log-sum-exp: definition and back ends.

    attention(q, k, v, *, scale=None, return_lse=False, blocks=None) -> out, or (out, lse)

    out[b, n, h] = sum_m p[m] v[b, m, h] / sum_m p[m],  p[m] = exp(scale * q[b, n, h] . k[b, m, h])
    lse[b, h, n] = log(sum_m p[m])

q [B, N, H, D], k and v [B, M, H, D]; scale defaults to 1 / sqrt(D). out has the shape and dtype of q, lse is fp32
(fp64 for fp64). With `blocks` (sparse.py), m runs only over the listed tiles of keys; for an empty list out is 0 and
lse -inf. `merge` combines attention to two sets of keys (the ranks of a ring).

All share this signature: `reference` and `sdpa` are PyTorch, `library` is the best library for each call, the others
are one library each (attention_library.py) or the registered operators of attention_gpu.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvid import notices
from fastvid.ops import attention_gpu
from fastvid.ops.attention_gathered import gathered
from fastvid.ops.attention_library import HALVES, LIBRARIES, Library, preferred, worth
from fastvid.ops.sparse import Blocks, token_mask

Result = Tensor | tuple[Tensor, Tensor]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EIGHT_BIT_KEYS = 2**17  # of 8-bit attention, to which benchmarks/eight_bits.py has measured its error
SLAB = 2**26  # scores that the reference computes at a time


def check(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks | None = None) -> None:
    """Raise ValueError unless q is [B, N, H, D], k and v are [B, M, H, D] with M > 0 and q's dtype, and blocks fit."""
    if q.ndim != 4 or k.shape != v.shape or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(f"attention takes q [B, N, H, D] and k, v [B, M, H, D], not {_shapes(q, k, v)}")
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise ValueError(f"q, k, v are of one floating type, not {q.dtype}, {k.dtype}, {v.dtype}")
    if k.shape[1] == 0:
        raise ValueError(f"there are no keys to attend to: q, k, v are {_shapes(q, k, v)}")
    if blocks is not None and blocks.lists not in {1, q.shape[2], q.shape[0] * q.shape[2]}:
        fit = f"1, {q.shape[2]} or {q.shape[0] * q.shape[2]} fit {_shapes(q, k, v)}"
        raise ValueError(f"blocks have {blocks.lists} lists; {fit}")


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(tuple(x.shape)) for x in tensors)


# PyTorch


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    blocks: Blocks | None = None,
) -> Result:
    """The reference for all back ends: PyTorch's attention if it supports this call, else eager scores in fp32."""
    check(q, k, v, blocks)
    if blocks is None and not return_lse:
        return _sdpa(q, k, v, scale)
    out, lse = _by_slabs(q, k, v, scale, None if blocks is None else token_mask(blocks))
    return (out, lse) if return_lse else out


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    blocks: Blocks | None = None,
) -> Result:
    """scaled_dot_product_attention, and its variants that return the log-sum-exp. Block-sparse attention, which PyTorch
    lacks, is made of calls with gathered keys."""
    check(q, k, v, blocks)
    if blocks is not None:
        return gathered(q, k, v, scale, return_lse, blocks, sdpa)
    return _sdpa_lse(q, k, v, scale) if return_lse else _sdpa(q, k, v, scale)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def _sdpa_lse(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    aten, scale = torch.ops.aten, q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, scale=scale)
    elif q.dtype in HALVES:
        out, lse = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)[:2]
    else:
        out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=scale)[:2]
    return out.transpose(1, 2), lse[..., : q.shape[2]]  # the efficient kernel pads rows to a multiple of 32


def _by_slabs(q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention in fp32 or fp64, some queries at a time. mask: bool [lists, N, M]; head h of sample b uses list
    (b * H + h) % lists."""
    B, N, H, D = q.shape
    M = k.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    scale = D**-0.5 if scale is None else scale
    keys, values = k.permute(0, 2, 3, 1).to(dtype), v.transpose(1, 2).to(dtype)
    out, lse = q.new_empty(B, H, N, D), q.new_empty(B, H, N, dtype=dtype)
    rows = max(SLAB // (B * H * M), 1)
    for start in range(0, N, rows):
        slab = slice(start, start + rows)
        scores = q[:, slab].transpose(1, 2).to(dtype) @ keys * scale
        if mask is not None:
            kept = mask[:, slab].repeat(B * H // len(mask), 1, 1).view(scores.shape)
            scores = scores.masked_fill_(~kept, -torch.inf)
        total = lse[:, :, slab] = scores.logsumexp(-1)
        weights = torch.exp(scores - total.masked_fill(total == -torch.inf, 0)[..., None])
        out[:, :, slab] = (weights @ values).to(out.dtype)
    return out.transpose(1, 2).contiguous(), lse


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Combine attention to two sets of keys: (out, lse) of each -> (out, lse) of the union."""
    lse = torch.logaddexp(lse_a, lse_b)
    total: Any = 0  # a Tensor after the first iteration
    for out, part in ((out_a, lse_a), (out_b, lse_b)):
        weight = torch.where(part == -torch.inf, 0.0, torch.exp(part - lse))  # avoids exp(-inf + inf) without any keys
        total = total + out.to(weight.dtype) * weight.transpose(1, 2)[..., None]
    return total.to(out_a.dtype), lse


# Libraries


@dataclass(frozen=True)
class Dense:
    """A library's dense attention as a back end. Raises ValueError for blocks, and for calls that it cannot take."""

    library: Library

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        return_lse: bool = False,
        blocks: Blocks | None = None,
    ) -> Result:
        check(q, k, v, blocks)
        if blocks is not None:
            raise ValueError(
                f"{self.library.name} has no block-sparse attention; load with attention='auto' or 'triton'"
            )
        if reason := self.library.refuses(q, k):
            raise ValueError(reason)
        out, lse = self.library.run(q, k, v, scale, return_lse)
        return (out, lse) if return_lse and lse is not None else out

    def why_not(self, device: torch.device) -> str | None:
        """Why it cannot run on a device; None if it can."""
        return self.library.why_not(device)


def library(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    blocks: Blocks | None = None,
) -> Result:
    """The best library that takes the call: cuDNN where it is new enough, then aten's flash operator, on CPUs with
    AVX512-BF16 `brgemm` for larger calls in bf16, then `sdpa`, which takes everything: fp32 by aten's efficient
    operator. Block lists by gathering keys. torch.compile always gets `sdpa`, which it knows."""
    if blocks is not None:
        check(q, k, v, blocks)
        return gathered(q, k, v, scale, return_lse, blocks, _any_size)
    if not torch.compiler.is_compiling():
        for name in _preferred(q.device):
            if LIBRARIES[name].refuses(q, k) is None and worth(name, q, k):
                return DENSE[name](q, k, v, scale=scale, return_lse=return_lse)
    return sdpa(q, k, v, scale=scale, return_lse=return_lse)


def _any_size(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, return_lse: bool) -> Result:
    """The first library that takes the call, worth it alone or not: one of many small ones."""
    for name in _preferred(q.device):
        if LIBRARIES[name].refuses(q, k) is None:
            return DENSE[name](q, k, v, scale=scale, return_lse=return_lse)
    return sdpa(q, k, v, scale=scale, return_lse=return_lse)


_preferred = functools.cache(preferred)
DENSE = {name: Dense(one) for name, one in LIBRARIES.items()}


# Kernels


@dataclass(frozen=True)
class Kernel:
    """A registered operator as a back end.

    operator(q, k, v, lists, largest, scale, with_lse) -> (out, lse); lse is empty unless with_lse.
    steps: splits block lists for the operator (attention_gpu.py).
    needs: the architecture that it requires ("90a"), None for any. dtypes: supported dtypes.
    measured: the name and the most keys for which an approximation's error is known.
    """

    operator: Callable[..., tuple[Tensor, Tensor]]
    steps: Callable[[Tensor, Blocks], list[Tensor]]
    needs: str | None = None
    dtypes: tuple[torch.dtype, ...] = DTYPES
    measured: tuple[str, int] | None = None

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        return_lse: bool = False,
        blocks: Blocks | None = None,
    ) -> Result:
        check(q, k, v, blocks)
        if self.measured is not None:
            warn_beyond(*self.measured, k.shape[1])
        lists, largest = ([], []) if blocks is None else (blocks.tensors + self.steps(q, blocks), blocks.largest)
        out, lse = self.operator(q, k, v, lists, largest, scale, return_lse)
        return (out, lse) if return_lse else out


def warn_beyond(name: str, most: int, keys: int) -> None:
    """Says that an approximation is used for more keys than its error was measured for."""
    if keys > most:
        notices.warn(
            f"attention={name} attends to {keys:,} keys, and its error was measured up to {most:,}; compare with "
            "attention='auto', or make a shorter or smaller video"
        )


def _eight(kind: str) -> Kernel:
    operator = partial(attention_gpu.attention_eight, kind)
    return Kernel(operator, attention_gpu.padded_steps, "90a", HALVES, (f"cuda_{kind}", EIGHT_BIT_KEYS))


BACKENDS: Mapping[str, Callable[..., Any]] = {
    "reference": reference,
    "sdpa": sdpa,
    "library": library,
    **DENSE,
    "triton": Kernel(attention_gpu.attention_triton, attention_gpu.triton_steps),
    "cuda": Kernel(attention_gpu.attention_cuda, attention_gpu.exact_steps, "90a", HALVES),
    "cuda_pair": Kernel(attention_gpu.attention_pair, attention_gpu.exact_steps, "90a", HALVES),
    "cuda_fp8": _eight("fp8"),
    "cuda_int8": _eight("int8"),
}
