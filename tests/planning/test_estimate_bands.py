"""What bands of the VAEs exchange, as plans predict it: the bytes that ranks send over gloo, and how long it takes."""

from __future__ import annotations

import random

import pytest
import torch
from ranks import run_ranks
from test_bands import networks

import fastvid
from fastvid.distributed.cost_model import LOOPBACK, NVLINK, Link
from fastvid.distributed.mesh import Mesh
from fastvid.models.wan.vae_bands import Bands
from fastvid.planning import speed
from fastvid.planning.estimate_bands import Halos, Shared, count_halos

FREE = Link("none", 1e30, 0.0)
POINTS = ((1e6, 1e-4), (1e9, 1e-2), (1e10, 0.05))
RATES = speed.Rates(POINTS, POINTS, POINTS)


def bytes_sent(mesh: Mesh, seed: str) -> None:
    """Streams of any length, size and chunks, also of fewer rows than ranks: all that is sent, to the byte, and the
    most that one rank sends."""
    numbers = random.Random(int(seed))
    dtype = numbers.choice((torch.float32, torch.float64))
    for vae in networks(dtype):
        scale, time = vae.config.spatial_scale, vae.config.temporal_scale
        halos = {decode: count_halos(vae, decode) for decode in (True, False)}
        for rows in (2, numbers.randrange(1, 4) * mesh.size, numbers.randrange(3, 12)):
            count, width = numbers.randrange(1, 4), numbers.randrange(1, 4)
            latents = torch.randn(1, 4, count, rows, width).to(dtype)
            frames = torch.rand(1, 3, time * (count - 1) + 1, rows * scale, width * scale).to(dtype)
            for decode, x in ((True, latents), (False, frames)):
                made, each, chunks = stream(mesh, vae, x, decode, numbers.randrange(1, count + 1))
                said = Shared(halos[decode], count, rows, width, chunks, mesh.size, dtype.itemsize, made)
                assert sum(each) == said.moved, (type(vae), decode, each, said)
                if rows % mesh.size == 0:
                    assert max(each) == pytest.approx(said.sent, rel=1e-9), (type(vae), decode, each, said)


def stream(mesh: Mesh, vae, x: torch.Tensor, decode: bool, at_once: int) -> tuple[int, list[int], int]:
    """Bytes of what comes out, bytes that each rank has sent for it, and the number of chunks."""
    method, parts = vae.encode, [x]
    if decode:
        method, parts = vae.decode_rgb if x.dtype == torch.float32 else vae.decode, x.split(at_once, dim=2)
    elif x.shape[2] > 1:
        parts = [x[:, :, :1], *x[:, :, 1:].split(vae.config.temporal_scale * at_once, dim=2)]
    before, cache, made = mesh.counted.bytes, None, 0
    for part in parts:
        out, cache = method(part, cache, bands=Bands(mesh))
        made += out.nbytes
    sent = torch.tensor([mesh.counted.bytes - before])
    return made, mesh.gather(sent, (1,) * mesh.size, 0).tolist(), len(parts)


@pytest.mark.parametrize("size", [2, 3])
def test_bytes_are_those_that_are_counted(size: int) -> None:
    run_ranks(size, bytes_sent, str(random.randrange(2**31)))


def test_seconds() -> None:
    """Ten rows on four ranks: three are the most; exchanges of a chunk wait, one after the other."""
    halos = Halos(rows=(20, 40), one_way=(10, 20), keys=(6, 6), layers=5)
    made = Shared(halos, 3, 10, 7, chunks=2, ranks=4, itemsize=2, made=1000)
    assert made.share == 0.3 and made.seconds(8.0, FREE) == pytest.approx(2.4)
    assert made.moved == (20 + 2 * 40 + 10 * 3 * 6) * 7 * 2 * 3 + 3 * 1000
    sent = (20 + 2 * 40) * 7 * 2 + 0.3 * 10 * 3 * 6 * 7 * 2 * 3 + 0.3 * 1000 * 3
    assert made.sent == pytest.approx(sent)
    assert made.seconds(8.0, Link("", 1e3, 0.5)) == pytest.approx(2.4 + 2 * 7 * 0.5 + sent / 1e3)
    # Of two rows, two ranks hold one each, and the others only receive; one rank is alone with it.
    few = Shared(halos, 1, 2, 1, chunks=1, ranks=4, itemsize=1, made=100)
    assert few.moved == 20 + 2 * 6 + 300 and few.sent == 10 + 6 + 150
    lone = Shared(halos, 1, 2, 1, chunks=1, ranks=1, itemsize=1, made=100)
    assert lone.moved == lone.sent == 0 and lone.seconds(8.0, LOOPBACK) == 8.0
    row = Shared(halos, 1, 1, 1, chunks=1, ranks=2, itemsize=1, made=100)
    assert row.moved == row.sent == 100 and row.seconds(1.0, Link("", 1e30, 0.5)) == 1.5


def test_plans_count_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastvid.pipeline.pipeline.find_rates", lambda *_, again: RATES)
    given = {"num_frames": 17, "height": 64, "width": 96, "estimate": True}

    def decoding(**options: object) -> float:
        return fastvid.blueprint("embedded", device="cpu", **options).plan(**given).seconds_parts["decode"]

    alone, three, fast = decoding(), decoding(parallel=3), decoding(parallel=3, link="nvlink")
    vae = fastvid.blueprint("embedded", device="cpu")._parts.vae
    scale, time = vae.config.spatial_scale, vae.config.temporal_scale
    h, w, latents = 64 // scale, 96 // scale, 16 // time + 1
    chunk = max(1, min(latents, (1 << 17) // (64 * 96 * time)))
    shared = Shared(count_halos(vae), latents, h, w, -(-latents // chunk), 3, 4, 3 * 17 * 64 * 96)
    assert three == pytest.approx(shared.seconds(alone, LOOPBACK)) and fast == pytest.approx(
        shared.seconds(alone, NVLINK)
    )
    assert alone * shared.share < fast < three
