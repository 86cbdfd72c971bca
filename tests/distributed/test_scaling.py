"""The model of what many GPUs take: its bytes are those that ranks send, its times add up, its choices can be had."""

from __future__ import annotations

import random

import pytest
from sharing import bytes_of_a_step

from fastvid.distributed.cost_model import (
    INFINIBAND,
    NVLINK,
    PCIE,
    Device,
    Link,
    best,
    candidates,
    curve,
    predict,
)
from fastvid.distributed.layout import every
from fastvid.distributed.mesh import Layout
from fastvid.errors import InvalidRequest
from fastvid.models.wan.config import WanTransformerConfig
from fastvid.planning.layout import work_of

H200 = Device("H200", 650e12, 550e12)
WAN_14B = WanTransformerConfig()
WAN_1_3B = WanTransformerConfig(num_attention_heads=12, ffn_dim=8960, num_layers=30)
FREE = Link("none", 1e30, 0.0)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 8, 12])
def test_bytes_are_those_that_are_counted(size: int) -> None:
    """Where shares are even every rank sends as much, so that all of them send what tests/distributed/test_split.py
    counts."""
    config = WanTransformerConfig(num_attention_heads=12, attention_head_dim=8, ffn_dim=32, num_layers=3)
    work = work_of(config, (3, 4 * size, 6), guided=True)
    for layout in every(size, 12, True):
        sent = predict(work, layout, H200, NVLINK).sent * size
        assert sent == bytes_of_a_step(layout, work.tokens, config.dim, 3, config.out_channels * 4, 2), layout


def test_one_rank_sends_nothing_and_is_its_own_measure() -> None:
    made = predict(work_of(WAN_14B, (21, 45, 80), guided=True), Layout(), H200, NVLINK)
    assert made.efficiency == 1 and made.sent == made.exposed == 0
    # Two calls of 40 layers: 2 N (6 d^2 + 2 d f) and 4 N^2 d + 4 N L d.
    N, d, f = 75600, 5120, 13824
    assert made.linear == pytest.approx(2 * 40 * 2 * N * (6 * d * d + 2 * d * f) / 650e12)
    assert made.attention == pytest.approx(2 * 40 * 4 * N * (N + 512) * d / 550e12)


def test_without_a_price_for_exchanges_only_uneven_shares_cost() -> None:
    for size in (2, 4, 5, 8):
        made = best(size, work_of(WAN_14B, (21, 45, 80), guided=True), H200, FREE)
        assert made.efficiency == pytest.approx(1, abs=1e-9) and made.exposed < 1e-20
    uneven = predict(work_of(WAN_14B, (21, 9, 11), guided=False), Layout(ring=7), H200, FREE)
    assert uneven.efficiency == pytest.approx(99 / 7 / 15, rel=1e-6)


def test_slower_links_never_help() -> None:
    numbers = random.Random(random.randrange(2**31))
    for _ in range(50):
        config = numbers.choice([WAN_14B, WAN_1_3B])
        work = work_of(
            config,
            (numbers.randrange(1, 22), numbers.randrange(8, 46), numbers.randrange(8, 81)),
            numbers.random() < 0.5,
        )
        size = numbers.choice([2, 3, 4, 8, 16, 64])
        fast, slow = (best(size, work, H200, link, INFINIBAND) for link in (NVLINK, PCIE))
        assert fast.seconds <= slow.seconds
        for layout in candidates(size, work):
            made = predict(work, layout, H200, NVLINK, INFINIBAND)
            assert made.seconds >= fast.seconds and 0 < made.efficiency <= 1 + 1e-9
            assert config.num_attention_heads % layout.ulysses == 0 and layout.size == size


def test_more_ranks_are_faster_and_less_efficient() -> None:
    made = list(curve(work_of(WAN_14B, (21, 45, 80), guided=True), H200, NVLINK, INFINIBAND))
    assert [one.layout.size for one in made] == [1, 2, 4, 8, 16, 32, 64]
    assert all(a.seconds > b.seconds and a.efficiency >= b.efficiency for a, b in zip(made[:-1], made[1:], strict=True))


def test_what_cannot_be_shared_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="6 tokens a frame are too few; the nearest is parallel=12"):
        best(64, work_of(WAN_14B, (5, 2, 3), guided=True), H200, NVLINK)
