"""Ranks and what they exchange, over gloo."""

from __future__ import annotations

import pytest
import torch
from ranks import run_ranks
from sharing import SIZES

from fastvid.distributed.layout import default_layout
from fastvid.distributed.mesh import Layout, Mesh, RankView, shares, starts


def on_each(mesh: Mesh) -> None:
    generator = torch.Generator().manual_seed(1)
    sizes = shares(11, mesh.size)
    whole = torch.randn(3, 11, 5, generator=generator)
    begin, end = starts(sizes)[mesh.rank : mesh.rank + 2]
    before = mesh.counted.bytes
    assert torch.equal(mesh.gather(whole[:, begin:end], sizes, 1), whole)
    assert mesh.counted.bytes - before == (mesh.size - 1) * whole[:, begin:end].nbytes
    # Several messages to the same rank, empty ones among them, arrive in order; one to itself too.
    told = [torch.full((n,), float(mesh.rank * 10 + n)) for n in (3, 0, 2)]
    heard = [(rank, torch.empty(n)) for rank in range(mesh.size) for n in (3, 0, 2)]
    mesh.exchange([(rank, x) for rank in range(mesh.size) for x in told], heard).wait()
    for rank, x in heard:
        assert torch.equal(x, torch.full((len(x),), float(rank * 10 + len(x)))), (rank, x)
    for kind in (torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.bool):
        x = torch.randn(2, 3, generator=generator).mul(3).abs().to(kind)
        last = mesh.size - 1
        assert torch.equal(mesh.broadcast(x if mesh.rank == last else None, last), x)
    assert mesh.broadcast(torch.tensor(7.0) if mesh.rank == 0 else None).item() == 7
    if mesh.size > 2 and mesh.rank < 2:  # some of the ranks alone
        assert mesh.gather(torch.full((1,), mesh.rank), (1, 1), 0, (0, 1)).tolist() == [0, 1]


@pytest.mark.parametrize("size", [1, *SIZES])
def test_exchanges(size: int) -> None:
    if size == 1:
        mesh = Mesh()
        x = torch.randn(3, 4)
        assert torch.equal(mesh.gather(x, (4,), 1), x) and mesh.broadcast(x) is x
        assert mesh.counted.bytes == 0
    else:
        run_ranks(size, on_each)


def test_places_are_counted_with_ulysses_fastest() -> None:
    layout = Layout(2, 3, 2)
    places = [RankView(Mesh(rank, 12), layout) for rank in range(12)]
    assert [(p.guidance, p.ring, p.ulysses) for p in places] == [
        (g, r, u) for g in range(2) for r in range(3) for u in range(2)
    ]
    assert places[7].rank() == 7 and places[7].rank(guidance=0) == 1 and places[0].rank(ring=2, ulysses=1) == 5
    assert places[8].sharers == (6, 7, 8, 9, 10, 11)


@pytest.mark.parametrize(
    ("size", "heads", "guided", "per_host", "expected"),
    [
        (1, 12, True, None, (1, 1, 1)),
        (8, 12, False, None, (1, 2, 4)),
        (8, 12, True, None, (2, 1, 4)),
        (8, 40, False, None, (1, 1, 8)),
        (3, 40, True, None, (1, 3, 1)),
        (5, 40, False, None, (1, 1, 5)),
        (7, 12, False, None, (1, 7, 1)),
        (16, 40, False, 8, (1, 2, 8)),
        (64, 40, True, 8, (2, 4, 8)),
        (6, 4, False, 4, (1, 3, 2)),
    ],
)
def test_layouts_chosen(size: int, heads: int, guided: bool, per_host: int | None, expected: tuple) -> None:
    layout = default_layout(size, heads, guided, per_host)
    assert (layout.guidance, layout.ring, layout.ulysses) == expected
    assert layout.size == size and heads % layout.ulysses == 0


def test_shares_are_even() -> None:
    assert shares(11, 4) == (3, 3, 3, 2) and shares(2, 4) == (1, 1, 0, 0) and starts((3, 3, 2)) == (0, 3, 6, 8)
