"""Attention in causal blocks on ranks that share every frame's tokens is what one rank makes."""

from __future__ import annotations

import torch
from ranks import run_ranks

from fastvid.distributed.mesh import Layout, Mesh, RankView
from fastvid.layers.attention import self_attention
from fastvid.layers.causal_blocks import CausalBlocks
from fastvid.layers.sequence_parallel import SequenceParallel
from fastvid.ops import reference

GRID = (5, 3, 3)  # 9 tokens a frame: five and four on two ranks


def attend(mesh: Mesh) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 45, 4, 8).unbind(0)
    blocks = CausalBlocks(GRID[0], 2)
    wanted = self_attention(reference, q, k, v, blocks)
    parallel = SequenceParallel.of_grid(RankView(mesh, Layout(ulysses=mesh.size)), GRID)
    own = self_attention(reference, *(parallel.shard_rows(x, 1) for x in (q, k, v)), blocks, parallel)
    torch.testing.assert_close(own, parallel.shard_rows(wanted, 1))
    assert (wanted - self_attention(reference, q, k, v)).abs().max() > 0.1


def test_two_ranks() -> None:
    run_ranks(2, attend)
