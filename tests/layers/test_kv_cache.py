"""A causal rollout on a KV cache is attention over the whole video under a block-causal mask."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvid.layers.kv_cache import KVCache
from fastvid.models.wan.config import WanTransformerConfig
from fastvid.models.wan.transformer import WanTransformer
from fastvid.ops import reference

CONFIG = WanTransformerConfig(
    num_attention_heads=3, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=8, ffn_dim=40, num_layers=3
)
HEIGHT, WIDTH = 4, 6
TOKENS = HEIGHT * WIDTH // 4


def model(ops=reference) -> WanTransformer:
    torch.manual_seed(0)
    made = WanTransformer(CONFIG, ops).eval().requires_grad_(False)
    for parameter in made.parameters():  # biases and norms that are seen
        if parameter.ndim == 1:
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def visible(frames: int, block: int, window: int | None, sink: int) -> torch.Tensor:
    """bool [frames, frames]: whether a frame attends to another, as the papers say it."""
    see = torch.zeros(frames, frames, dtype=torch.bool)
    for frame in range(frames):
        end = min(frames, (frame // block + 1) * block)
        for other in range(end):
            recent = window is None or other >= end - (window - sink)
            see[frame, other] = recent or other < sink
    return see


def masked(see: torch.Tensor) -> SimpleNamespace:
    """The reference's operations with self-attention under that mask, by plain products."""
    mask = see.repeat_interleave(TOKENS, 0).repeat_interleave(TOKENS, 1)

    def attention(q, k, v, **_):
        if q.shape[1] != k.shape[1]:
            return reference.attention(q, k, v)
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * q.shape[-1] ** -0.5
        return torch.einsum("bhnm,bmhd->bnhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)

    return SimpleNamespace(**{**vars(reference), "attention": attention})


def rolled(net, clean, noisy, text, times, block, window, sink):
    """Every block: noisy ones at their levels, then the clean one for the cache. What the noisy calls returned."""
    frames = clean.shape[2]
    cache, out = KVCache(CONFIG.num_layers, min(window or frames, frames), sink), []
    for start in range(0, frames, block):
        part = slice(start, min(start + block, frames))
        count = part.stop - start
        for step, time in enumerate(times):
            cache.begin(start, count)
            x = noisy[step][:, :, part]
            out.append((step, part, net(x, torch.full((1, count), time), text, rope_offset=start, cache=cache)))
        cache.begin(start, count)
        net(clean[:, :, part], torch.zeros(1, count), text, rope_offset=start, cache=cache)
    return out


def head_major(*args):
    """Queries, keys and values as kernels lay them out: [B, H, N, D] in memory."""
    return tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in reference.qkv_norm_rope(*args))


@torch.no_grad()
def test_keys_and_values_may_lie_head_by_head() -> None:
    clean, *noisy = torch.randn(3, 1, 4, 7, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1))
    text = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(2))
    given = clean, noisy, text, (900.0, 400.0), 2, 4, 1
    nets = model(), model(SimpleNamespace(**{**vars(reference), "qkv_norm_rope": head_major}))
    wanted, found = (rolled(net, *given) for net in nets)
    for (_, _, a), (_, _, b) in zip(found, wanted, strict=True):
        assert (a - b).norm() / b.norm() < 1e-6


@pytest.mark.parametrize(
    ("frames", "block", "window", "sink"), [(9, 3, None, 0), (12, 3, 6, 0), (14, 2, 8, 2), (11, 3, 9, 3), (7, 1, 3, 1)]
)
@torch.no_grad()
def test_a_rollout_is_a_dense_block_causal_mask(frames, block, window, sink):
    clean = torch.randn(1, 4, frames, HEIGHT, WIDTH)
    times = [900.0, 400.0]
    noisy = [torch.randn_like(clean) for _ in times]
    text = torch.randn(1, 5, 8)
    dense = model(masked(visible(frames, block, window, sink)))
    for step, part, got in rolled(model(), clean, noisy, text, times, block, window, sink):
        mixed, levels = clean.clone(), torch.zeros(1, frames)
        mixed[:, :, part], levels[:, part] = noisy[step][:, :, part], times[step]
        wanted = dense(mixed, levels, text)[:, :, part]
        error = (got - wanted).norm() / wanted.norm()
        assert error < 1e-5, (step, part, error)


@torch.no_grad()
def test_the_clean_pass_is_what_later_blocks_see():
    """Without it the cache holds the last noisy call, and the next block's output is another."""
    clean, noisy, text = torch.randn(1, 4, 4, HEIGHT, WIDTH), torch.randn(1, 4, 4, HEIGHT, WIDTH), torch.randn(1, 5, 8)
    net, results = model(), []
    for fill in (True, False):
        cache = KVCache(CONFIG.num_layers, 4)
        cache.begin(0, 2)
        net(noisy[:, :, :2], torch.full((1, 2), 500.0), text, cache=cache)
        if fill:
            cache.begin(0, 2)
            net(clean[:, :, :2], torch.zeros(1, 2), text, cache=cache)
        cache.begin(2, 2)
        results.append(net(noisy[:, :, 2:], torch.full((1, 2), 500.0), text, rope_offset=2, cache=cache))
    assert not torch.allclose(*results, atol=1e-4)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 8), st.integers(0, 4), st.integers(1, 4), st.integers(1, 30))
def test_slots_hold_the_sink_and_the_latest(recent, sink, block, frames):
    block = min(block, recent)
    cache = KVCache(1, sink + recent, sink)
    held: dict[int, int] = {}
    for start in range(0, frames, block):
        cache.begin(start, block)
        held |= {slot: frame for slot, frame in zip(cache.slots, range(start, start + block), strict=True)}
        end = start + block
        assert set(held.values()) == set(range(min(sink, end))) | set(
            range(max(0, end - recent if end > sink else 0), end)
        )
        assert set(held) == set(range(cache.filled))


def test_frames_that_do_not_follow_or_do_not_fit_are_refused():
    cache = KVCache(1, 6, 2)
    with pytest.raises(ValueError, match="do not fit"):
        cache.begin(0, 7)
    cache.begin(0, 3)
    cache.begin(0, 3)
    cache.begin(3, 3)
    for start, frames in ((0, 3), (3, 2), (7, 3)):
        with pytest.raises(ValueError, match="do not follow"):
            cache.begin(start, frames)
    with pytest.raises(ValueError, match="sink"):
        KVCache(1, 3, 3)
