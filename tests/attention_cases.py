"""Cases and checks for tests of attention: tensors in all layouts, random lists of tiles, the truth in fp64."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvid.ops import attention
from fastvid.ops.sparse import Blocks

HALVES = (torch.float16, torch.bfloat16)
LAYOUTS = ("token-major", "head-major", "one of three", "expanded", "aligned to nothing")


def make(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0, layout: str = "token-major"
) -> Tensor:
    """Random [B, tokens, H, D] in memory that is laid out in some way; the last dimension is contiguous."""
    B, N, H, D = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).to(dtype)
    if layout == "head-major":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "one of three":
        return torch.stack((x, x + 1, x - 1), 2)[:, :, 0]
    if layout == "expanded":
        return x[:1].expand(B, -1, -1, -1)
    if layout == "aligned to nothing":
        return torch.nn.functional.pad(x, (1, 2))[..., 1 : D + 1]
    return x


def numpy_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, blocks: Blocks | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """In fp64, written a second time: out [B, N, H, D] and lse [B, H, N]."""
    if blocks is not None:
        return _numpy_sparse(q, k, v, blocks, scale)
    q, k, v = (x.double().cpu().numpy() for x in (q, k, v))
    scores = np.einsum("bnhd,bmhd->bhnm", q, k) * scale
    highest = scores.max(-1, keepdims=True)
    weights = np.exp(scores - highest)
    total = weights.sum(-1, keepdims=True)
    return np.einsum("bhnm,bmhd->bnhd", weights / total, v), (np.log(total) + highest)[..., 0]


def error(x: Tensor, true: np.ndarray) -> float:
    """||x - true|| / ||true||."""
    return float(np.linalg.norm(x.double().cpu().numpy() - true) / np.linalg.norm(true))


def assert_as_good_as(x: Tensor, eager: Tensor, true: np.ndarray) -> None:
    """At most twice as far from the truth as eager PyTorch is, and one unit in the last place."""
    allowed = 2 * error(eager, true) + torch.finfo(eager.dtype).eps
    assert error(x, true) <= allowed, (error(x, true), allowed, x.dtype, tuple(x.shape))


def assert_log_as_good_as(lse: Tensor, eager: Tensor, true: np.ndarray) -> None:
    """The same of logarithms, in shares of themselves or of 1: where the sum is near 1 they are near 0."""
    off = [np.abs(x.double().cpu().numpy() - true) / np.maximum(np.abs(true), 1) for x in (lse, eager)]
    assert off[0].max() <= 2 * off[1].max() + 4 * torch.finfo(torch.float32).eps, [one.max() for one in off]


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(buffer full of NaN, its middle as a contiguous tensor)."""
    buffer = torch.full((int(np.prod(shape)) + 64,), float("nan"), dtype=dtype)
    return buffer, buffer[32:-32].view(shape)


def assert_edges_untouched(buffer: Tensor) -> None:
    assert buffer[:32].isnan().all() and buffer[-32:].isnan().all()


def random_blocks(sizes: tuple[list[int], list[int]], lists: int, density: float, seed: int) -> Blocks:
    """Any tiles may be listed, or none at all; tiles of all sizes."""
    query_tiles, key_tiles = (torch.tensor([0, *size]).cumsum(0).int() for size in sizes)
    mask = torch.rand(lists * len(sizes[0]), len(sizes[1]), generator=torch.Generator().manual_seed(seed)) < density
    rows = torch.cat((torch.zeros(1, dtype=torch.long), mask.sum(1).cumsum(0)))
    return Blocks(query_tiles, key_tiles, rows, mask.nonzero()[:, 1].int(), (max(sizes[0]), max(sizes[1])))


def _numpy_sparse(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """In fp64, each tile with the keys of its list alone: out [B, N, H, D] and lse [B, H, N]."""
    B, N, H, _ = q.shape
    out, lse = np.zeros(q.shape), np.full((B, H, N), -np.inf)
    queries, keys, rows, indices = (
        x.tolist() for x in (blocks.query_tiles, blocks.key_tiles, blocks.rows, blocks.indices)
    )
    for b, h, tile in product(range(B), range(H), range(len(queries) - 1)):
        number = (b * H + h) % blocks.lists * (len(queries) - 1) + tile
        listed = indices[rows[number] : rows[number + 1]]
        tokens = [token for key in listed for token in range(keys[key], keys[key + 1])]
        if tokens:
            own = slice(queries[tile], queries[tile + 1])
            parts = q[b : b + 1, own, h : h + 1], *(x[b : b + 1, tokens, h : h + 1] for x in (k, v))
            made, total = numpy_attention(*parts, scale)
            out[b, own, h], lse[b, h, own] = made[0, :, 0], total[0, 0]
    return out, lse


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    made: tuple[Tensor, Tensor],
    scale: float | None = None,
    blocks: Blocks | None = None,
) -> None:
    """(out, lse) are as near to the truth as the reference; zero and -inf where nothing is attended to."""
    true, total = numpy_attention(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale, blocks)
    eager, eager_lse = attention.reference(q, k, v, scale=scale, return_lse=True, blocks=blocks)
    nothing = torch.from_numpy(np.isneginf(total)).to(made[0].device)
    assert torch.equal(made[1] == -torch.inf, nothing) and torch.equal(eager_lse == -torch.inf, nothing)
    assert (made[0].transpose(1, 2)[nothing] == 0).all() and (eager.transpose(1, 2)[nothing] == 0).all()
    if not nothing.all():
        assert_as_good_as(made[0], eager, true)
        assert_log_as_good_as(made[1][~nothing], eager_lse[~nothing], total[~nothing.cpu().numpy()])


# Shape and strides of tensors whose last element lies 2^31 elements or more behind the first. No stride is itself in
# 2^31..2^32 - 1: Triton's interpreter reads such an argument wrongly.
FAR = {
    "samples": ((3, 17, 1, 16), (2**30 + 16, 16, 16)),
    "tokens": ((1, 18, 1, 16), (16, 2**27, 16)),
    "heads": ((1, 17, 3, 16), (16, 16, 2**30 + 16)),
}


def far_apart(x: Tensor, strides: tuple[int, int, int]) -> Tensor:
    """The same numbers in memory with gaps that are never touched, so that the system never provides them."""
    size = sum((n - 1) * stride for n, stride in zip(x.shape, (*strides, 1), strict=True)) + 1
    assert size > 2**31
    return torch.empty(size, dtype=x.dtype).as_strided(x.shape, (*strides, 1)).copy_(x)


def on_gpu(x: Tensor) -> Tensor:
    """On the GPU with the strides that it has here."""
    size = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) + 1
    flat = x.as_strided((size,), (1,)).cuda()
    return flat.as_strided(x.shape, x.stride())


def fake_blocks(mode: Any, blocks: Blocks) -> Blocks:
    names = ("query_tiles", "key_tiles", "rows", "indices")
    return replace(blocks, **{name: mode.from_tensor(getattr(blocks, name)) for name in names})
