"""Sequence parallelism: attention and whole models shared among ranks give what one rank gives, over gloo."""

from __future__ import annotations

import functools
import itertools
import random

import pytest
import torch
from ranks import run_ranks
from sharing import SIZES, bytes_of_a_step, relative

from fastvid.distributed.mesh import Layout, Mesh, RankView, shares, starts
from fastvid.layers.attention import self_attention
from fastvid.layers.kv_cache import KVCache
from fastvid.layers.sequence_parallel import SequenceParallel
from fastvid.ops import sparse as sparsity
from fastvid.ops.dispatch import bind

BAR = 1e-5  # relative, in fp32


def layouts(size: int, heads: int) -> list[Layout]:
    """All of them without guidance."""
    return [Layout(1, size // u, u) for u in range(1, size + 1) if size % u == 0 and heads % u == 0]


def token_counts() -> list[int]:
    """A hundred, the same on every rank; primes and few tokens among them."""
    draw = random.Random(int(torch.initial_seed()) % 2**32)
    primes = [n for n in range(2, 400) if all(n % k for k in range(2, int(n**0.5) + 1))]
    return [1, 2, 3, *draw.sample(primes, 50), *(draw.randrange(4, 400) for _ in range(47))]


def check(mesh: Mesh, layout: Layout, tokens: int, heads: int, batch: int, groups: int, draw: torch.Generator) -> None:
    """Dense attention of so many tokens; counts what was sent."""
    view, ops = RankView(mesh, layout), bind()
    q, k, v = torch.randn(3, batch, tokens, heads, 8, generator=draw).unbind(0)
    parallel = SequenceParallel(view, shares(tokens, layout.sequence), 1, groups)
    mine = slice(*starts(parallel.counts)[view.sequence : view.sequence + 2])
    before = mesh.counted.bytes
    made = self_attention(ops, q[:, mine], k[:, mine], v[:, mine], parallel=parallel)
    sent = torch.tensor([mesh.counted.bytes - before])
    true = self_attention(ops, q, k, v)
    whole = mesh.gather(made, parallel.counts, 1)
    assert relative(whole, true) < BAR, (layout, tokens, heads, relative(whole, true))
    again = self_attention(ops, q[:, mine], k[:, mine], v[:, mine], parallel=parallel)
    assert torch.equal(made, again)
    if layout.ring == 1:  # q, k, v there, the result back: 4 N d (P - 1) / P elements, summed over the ranks
        total = mesh.gather(sent, (1,) * mesh.size, 0).sum().item()
        # each rank keeps what is its own: n_p d / P of each of the four
        assert total == 4 * 4 * batch * tokens * heads * 8 * (mesh.size - 1) // mesh.size, (layout, tokens)
    if layout.ulysses == 1:  # keys and values go around: each rank sends all blocks but the one that comes to it last
        total = mesh.gather(sent, (1,) * mesh.size, 0).sum().item()
        assert total == 2 * 4 * batch * tokens * heads * 8 * (mesh.size - 1), (layout, tokens)


def dense(mesh: Mesh, seed: str) -> None:
    torch.manual_seed(int(seed))
    draw = torch.Generator().manual_seed(int(seed))
    for number, tokens in enumerate(token_counts()):
        heads, batch, groups = (12, 4, 6)[number % 3], 1 + number % 2, 1 + number % 3
        for layout in layouts(mesh.size, heads):
            check(mesh, layout, tokens, heads, batch, groups, draw)


def sparse(mesh: Mesh, seed: str) -> None:
    draw, numbers = torch.Generator().manual_seed(int(seed)), random.Random(int(seed))
    ops = bind()
    for _ in range(25):
        grid = tuple(numbers.randrange(2, 7) for _ in range(3))
        tile = tuple(numbers.randrange(1, 4) for _ in range(3))
        heads, batch = numbers.choice([4, 12]), numbers.choice([1, 2])
        tokens = grid[0] * grid[1] * grid[2]
        q, k, v = torch.randn(3, batch, tokens, heads, 8, generator=draw).unbind(0)
        tiles = sparsity.tile_offsets(grid, tile)
        largest, count = int(tiles.diff().max()), numbers.randrange(1, tiles.numel())
        blocks = numbers.choice(
            [
                sparsity.window(grid, tile, (2, 2, 2)),
                sparsity.radial(grid, tile),
                sparsity.top_k(q, k, tiles, largest, count),
            ]
        )
        true = self_attention(ops, q, k, v, blocks=blocks)
        for layout in layouts(mesh.size, heads):
            view = RankView(mesh, layout)
            # Shares end where tiles do.
            cuts = [0, *(int(tiles[at]) for at in starts(shares(tiles.numel() - 1, layout.sequence))[1:])]
            parallel = SequenceParallel(view, tuple(b - a for a, b in itertools.pairwise(cuts)), 1, 1 + heads % 3)
            mine = slice(*starts(parallel.counts)[view.sequence : view.sequence + 2])
            made = self_attention(ops, q[:, mine], k[:, mine], v[:, mine], parallel=parallel, blocks=blocks)
            whole = mesh.gather(made, parallel.counts, 1)
            assert relative(whole, true) < BAR, (layout, grid, tile)
        if mesh.size > 1 and tiles.numel() > 2 and layout.ring > 1:
            off = [size for size in parallel.sizes]
            off[0], off[1] = off[0] + off[1] - 1, 1
            if off[0] not in tiles.tolist():
                with pytest.raises(ValueError, match="no end of a tile, where shares have to be cut; the nearest is"):
                    self_attention(
                        ops,
                        q[:, mine],
                        k[:, mine],
                        v[:, mine],
                        parallel=SequenceParallel(view, tuple(off)),
                        blocks=blocks,
                    )


def cached(mesh: Mesh, seed: str) -> None:
    """Frames that come in chunks, and attend to what is kept of earlier ones."""
    draw, numbers, ops = torch.Generator().manual_seed(int(seed)), random.Random(int(seed)), bind()
    for _ in range(6):
        heads, chunk, per_frame = numbers.choice([4, 12]), numbers.randrange(1, 4), numbers.randrange(mesh.size, 20)
        capacity, sink = chunk * 3, numbers.randrange(2)
        for layout in layouts(mesh.size, heads):
            view = RankView(mesh, layout)
            parallel = SequenceParallel(view, shares(per_frame, layout.sequence), chunk)
            whole, own = KVCache(1, capacity, sink), KVCache(1, capacity, sink)
            for start in range(0, 6 * chunk, chunk):
                for _ in range(2):  # the same frames again take the place of what they left
                    q, k, v = torch.randn(3, 2, chunk * per_frame, heads, 8, generator=draw).unbind(0)
                    for cache in (whole, own):
                        cache.begin(start, chunk)
                    true = self_attention(ops, q, k, v, whole.layers[0])
                    mine = (parallel.shard_rows(x, 1) for x in (q, k, v))
                    made = self_attention(ops, *mine, own.layers[0], parallel)
                    assert relative(made, parallel.shard_rows(true, 1)) < BAR, (layout, start)


# Whole models


def models(mesh: Mesh, seed: str) -> None:
    from fastvid.models.wan.config import WanTransformerConfig, WanVACEConfig
    from fastvid.models.wan.transformer import WanTransformer
    from fastvid.models.wan.vace import WanVACETransformer

    torch.manual_seed(int(seed))
    numbers, ops = random.Random(int(seed)), bind()
    small = {"attention_head_dim": 12, "text_dim": 16, "freq_dim": 8, "ffn_dim": 32, "num_layers": 2}
    for number in range(8):
        heads = numbers.choice([4, 6])
        channels = (4, 8)[number % 2]
        config = WanTransformerConfig(num_attention_heads=heads, in_channels=channels, out_channels=4, **small)
        vace = number % 4 == 0
        model = WanVACETransformer(WanVACEConfig(config, (0, 1), 6), ops) if vace else WanTransformer(config, ops)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
            t, h, w = numbers.randrange(1, 4), 2 * numbers.randrange(2, 5), 2 * numbers.randrange(2, 5)
            x, known = torch.randn(1, 4, t, h, w), torch.randn(1, 4, t, h, w) if channels == 8 else None
            text = torch.randn(1, 5, 16)
            control = {"control": torch.randn(1, 6, max(t - 1, 1), h, w)} if vace else {}
            times = (torch.rand(1), torch.rand(1, t), torch.rand(1, t * h * w // 4))[number % 3] * 1000
            given = (x, times, model.prepare_context(text, **control))
            true = model(*given, known=known)
            for layout in layouts(mesh.size, heads):
                view = RankView(mesh, layout)
                made = model(*given, known=known, view=view)
                assert relative(made, true) < BAR, (layout, number)
                assert torch.equal(made, model(*given, known=known, view=view))


def steps(mesh: Mesh, seed: str) -> None:
    """What a step sends, in all layouts, and in another type than the latents'."""
    from fastvid.distributed.layout import every
    from fastvid.models.wan.config import WanTransformerConfig
    from fastvid.models.wan.transformer import WanTransformer

    torch.manual_seed(int(seed))
    small = {"attention_head_dim": 8, "text_dim": 16, "freq_dim": 8, "ffn_dim": 32, "num_layers": 3}
    config = WanTransformerConfig(num_attention_heads=12, in_channels=4, out_channels=4, **small)
    for dtype in (torch.float32, torch.bfloat16):
        model = WanTransformer(config, bind()).to(dtype)
        for layout in every(mesh.size, 12, True):
            view, x, text = RankView(mesh, layout), torch.randn(1, 4, 3, 6, 10), torch.randn(1, 5, 16)
            before = mesh.counted.bytes
            with torch.no_grad():
                call = functools.partial(model, x, torch.rand(1), model.prepare_context(text), view=view)
                cond, uncond = view.both(call, call, x)
            assert cond.shape == uncond.shape == x.shape
            total = mesh.gather(torch.tensor([mesh.counted.bytes - before]), (1,) * mesh.size, 0).sum().item()
            assert total == bytes_of_a_step(layout, 3 * 3 * 5, config.dim, 3, 4 * 2 * 2, dtype.itemsize), (
                layout,
                dtype,
            )


def everything(mesh: Mesh, seed: str) -> None:
    for part in (dense, sparse, cached, models, steps):
        part(mesh, seed)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_ranks(size: int) -> None:
    """One start for all parts: most of the time goes into that."""
    run_ranks(size, everything, str(random.randrange(2**31)))
