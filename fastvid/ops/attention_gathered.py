"""Block-sparse attention by a library's dense attention: each tile of queries with the keys of its list, gathered.

Work and time fall with the share of pairs that is kept, on any device. On a CPU the gathered keys and values of a call
stay in its cache. On GPUs it is what runs where no kernel for block lists has been shown to be right and faster.

Shapes: q [B, N, H, D], k and v [B, M, H, D]; log-sum-exp [B, H, N].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastvid.ops.sparse import Blocks

Result = Tensor | tuple[Tensor, Tensor]
Group = tuple[Tensor, Tensor]
"""Queries [R, m] and keys [R, M], int64: the tokens of R tiles of a list that have as many of both."""

CPU_CHUNK, GPU_CHUNK = 2**18, 2**26
"""Values of keys that are gathered at once."""
MOST_KEPT = 2**24
"""Indices of tokens that are kept for later calls with the same lists."""


def gathered(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, with_lse: bool, blocks: Blocks, dense: Callable[..., Any]
) -> Result:
    """out, or (out, log-sum-exp), of attention to the tiles that `blocks` lists; without any, out is 0 and the
    log-sum-exp -inf. dense(q, k, v, scale=, return_lse=): attention of a few tiles, one a sample."""
    B, N, H, D = q.shape
    M, lists = k.shape[1], blocks.lists
    # Heads one after another, so that the keys of one are near each other in memory.
    queries, keys, values = (x.transpose(1, 2).reshape(-1, D) for x in (q, k, v))
    out, lse = torch.zeros_like(queries), None
    if with_lse:
        lse = q.new_full((B * H * N,), -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    most = GPU_CHUNK if q.is_cuda else CPU_CHUNK
    for head in range(B * H):
        for rows, columns in _groups(blocks, head % lists):
            each = max(1, most // (columns.shape[1] * D))
            for some, seen in zip(rows.split(each), columns.split(each), strict=True):
                places, found = (some + head * N).flatten(), (seen + head * M).flatten()
                parts = queries.index_select(0, places), keys.index_select(0, found), values.index_select(0, found)
                shaped = [x.view(len(some), -1, 1, D) for x in parts]
                made = dense(shaped[0], shaped[1], shaped[2], scale=scale, return_lse=with_lse)
                if lse is not None:
                    made, sums = made
                    lse.index_copy_(0, places, sums.flatten())
                out.index_copy_(0, places, made.reshape(-1, D))
    out = out.view(B, H, N, D).transpose(1, 2)
    return out if lse is None else (out, lse.view(B, H, N))


def _groups(blocks: Blocks, number: int) -> list[Group]:
    """The groups of one list; they are kept with the blocks where that takes little memory."""
    pairs = blocks.indices.numel() * blocks.largest[1]
    if pairs > MOST_KEPT:
        return list(_make_groups(blocks, number))
    return blocks.once(("gathered", number), lambda: list(_make_groups(blocks, number)))


def _make_groups(blocks: Blocks, number: int) -> Iterator[Group]:
    tiles = blocks.query_tiles.numel() - 1
    rows = blocks.rows[number * tiles : (number + 1) * tiles + 1]
    listed = blocks.indices[int(rows[0]) : int(rows[-1])].long()
    rows = rows - rows[0]
    starts, sizes = blocks.key_tiles[:-1].long()[listed], blocks.key_tiles.diff().long()[listed]
    tokens = _ranges(starts, sizes)  # the keys of all rows, row after row
    ends = torch.cat((sizes.new_zeros(1), sizes.cumsum(0)))[rows]
    shapes = torch.stack((blocks.query_tiles.diff().long(), ends.diff()), dim=1)
    kinds, kind = torch.unique(shapes, dim=0, return_inverse=True)
    for at, (m, M) in enumerate(kinds.tolist()):
        if m and M:
            members = (kind == at).nonzero()[:, 0]
            queries = blocks.query_tiles[:-1].long()[members, None] + torch.arange(m, device=members.device)
            yield queries, tokens[ends[:-1][members, None] + torch.arange(M, device=members.device)]


def _ranges(starts: Tensor, sizes: Tensor) -> Tensor:
    """start, start + 1, ... for each start, `size` of them, one after another."""
    ends = sizes.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    shift = torch.repeat_interleave(starts - (ends - sizes), sizes, output_size=total)
    return torch.arange(total, device=starts.device) + shift
