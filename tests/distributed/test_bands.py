"""The VAEs with their rows shared among ranks, over gloo: they make what one rank makes; what neighbours send each
other, and what each holds."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from live_memory import LiveMemory
from ranks import run_ranks
from sharing import relative

from fastvid.distributed.mesh import Mesh
from fastvid.engine import decode
from fastvid.errors import InvalidRequest
from fastvid.models.common.vae_stream import Stream, Window
from fastvid.models.registry import build_vae
from fastvid.models.wan import vae as wan_vae
from fastvid.models.wan.config import WAN22_VAE, WanVAEConfig
from fastvid.models.wan.vae import WanVAE
from fastvid.models.wan.vae22 import WanVAE22
from fastvid.models.wan.vae_bands import Band, Bands, BandStream
from fastvid.ops import reference, rgb, vae_library, winograd
from fastvid.ops import vae as vae_ops
from fastvid.planning.memory import decoder_bytes, encoder_bytes

BAR = {torch.float32: 1e-5, torch.float64: 1e-12}
SMALL = {"base_dim": 8, "z_dim": 4, "num_res_blocks": 1, "latents_mean": (0.1,) * 4, "latents_std": (1.5,) * 4}


@dataclass(frozen=True)
class Cut(Bands):
    """Bands of any sizes, perhaps of no rows."""

    sizes: tuple[int, ...] = ()

    def of(self, rows: int) -> Band:
        assert sum(self.sizes) == rows
        return Band(self.mesh, self.sizes)


def drawn(numbers: random.Random, mesh: Mesh, rows: int) -> Cut:
    cuts = sorted(numbers.randrange(rows + 1) for _ in range(mesh.size - 1))
    ends = [0, *cuts, rows]
    return Cut(mesh, tuple(b - a for a, b in zip(ends[:-1], ends[1:], strict=True)))


LIBRARIES = SimpleNamespace(**vae_library.OPERATIONS, to_rgb=rgb.reference)


def networks(dtype: torch.dtype, ops: Any = reference) -> list[WanVAE]:
    torch.manual_seed(3)
    made = [WanVAE(WanVAEConfig(**SMALL), ops), WanVAE22(replace(WAN22_VAE, decoder_base_dim=8, **SMALL), ops)]
    return [scaled(vae).to(dtype) for vae in made]


def scaled(vae: WanVAE) -> WanVAE:
    """Random weights with which values keep their size from layer to layer."""
    for parameter in vae.parameters():
        if parameter.ndim > 1 and parameter[0].numel() > 1:
            torch.nn.init.normal_(parameter, std=1.5 / parameter[0].numel() ** 0.5)
    return vae.requires_grad_(False)


def compare(vae: WanVAE, latents: torch.Tensor, parts: list[int], bands: Bands, reuse: bool) -> None:
    """Decoding, to 8 bits too, and encoding, in chunks with a cache, against one rank."""
    scale, time, bar = vae.config.spatial_scale, vae.config.temporal_scale, BAR[latents.dtype]
    said = type(vae).__name__, tuple(latents.shape), parts, bands.of(latents.shape[3]).sizes
    # 8-bit frames are made of fp32, at most.
    for method in (vae.decode, vae.decode_rgb)[: 1 + (latents.dtype != torch.float64)]:
        alone = cache = None
        for part in latents.split(parts, dim=2):
            true, alone = method(part, alone)
            made, cache = method(part, cache, reuse=reuse and cache is not None, bands=bands)
            assert made.dtype == true.dtype and made.shape == true.shape
            if made.dtype == torch.uint8:
                assert (made.int() - true.int()).abs().max() <= 1, said
            else:
                assert relative(made, true) < bar, (*said, relative(made, true))
    count = time * sum(parts) - time + 1
    size = latents.shape[3] * scale, latents.shape[4] * scale
    frames = torch.rand(len(latents), 3, count, *size).to(latents.dtype) * 2 - 1
    alone = cache = None
    first = time * parts[0] - time + 1
    for part in (frames[:, :, :first], frames[:, :, first:]):
        true, alone = vae.encode(part, alone)
        made, cache = vae.encode(part, cache, reuse=reuse and cache is not None, bands=bands)
        assert relative(made, true) < bar, (*said, relative(made, true))


def any_split(mesh: Mesh, numbers: random.Random, dtype: torch.dtype) -> None:
    """Odd sizes, the split that pipelines take and others, frames of fewer rows than ranks, more than one at once."""
    for vae in networks(dtype):
        for i, rows in enumerate((1, 2, *numbers.sample(range(3, 11), 4))):
            shape = numbers.choice((1, 1, 2)), 4, numbers.randrange(2, 4), rows, numbers.randrange(1, 5)
            first = numbers.randrange(1, shape[2])
            torch.manual_seed(numbers.randrange(2**31))
            bands = Bands(mesh) if i % 2 == 0 else drawn(numbers, mesh, rows)
            compare(vae, torch.randn(shape).to(dtype), [first, shape[2] - first], bands, numbers.random() < 0.5)


def tiled(mesh: Mesh, numbers: random.Random) -> None:
    """The form that works in tiles of four rows, with bands that end amid a tile."""
    config = WanVAEConfig(
        base_dim=64,
        z_dim=4,
        dim_mult=(1, 1),
        num_res_blocks=1,
        temperal_downsample=(False,),
        latents_mean=(0.0,) * 4,
        latents_std=(1.0,) * 4,
    )
    vae, latents = scaled(WanVAE(config)), torch.randn(1, 4, 18, 11, 13)
    with mock.patch.object(winograd, "norm_silu_conv3d", wraps=winograd.norm_silu_conv3d) as run:
        compare(vae, latents, [15, 3], Bands(mesh), reuse=True)
    assert run.called


class Noted(Stream):
    """What each layer of a whole frame would be given of other rows at a cut, and what it sees of all: values."""

    halos: list[int] = []
    wholes: list[int] = []

    def window(self, x: torch.Tensor, above: int = 0, below: int = 0, **options) -> Window | None:
        B, C, T, _, W = x.shape
        self.halos.append((above + below) * B * C * T * W)
        return super().window(x, above, below, **options)

    def whole(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        self.wholes.append(x.numel())
        return x


@dataclass
class Messages:
    """Of one rank: what it sends before each layer, most of all, and the most that it sends before one."""

    mesh: Mesh
    most: int = 0
    counts: list[int] = field(default_factory=list)

    def watch(self, plain):
        def window(stream: BandStream, *args, **options) -> Window:
            before = self.mesh.counted.messages
            made = plain(stream, *args, **options)
            self.most = max(self.most, self.mesh.counted.messages - before)
            return made

        return window


def bytes_sent(mesh: Mesh, rows: int) -> None:
    """A row each way for every layer that sees one, at every cut, in a message each; keys and values to all that hold
    rows, the result to all, and a number by which ranks agree."""
    torch.manual_seed(1)
    for vae in networks(torch.float32):
        latents, frames = torch.randn(1, 4, 3, rows, 3), torch.rand(1, 3, 9, rows * vae.config.spatial_scale, 48)
        for method, x in ((vae.decode_rgb, latents), (vae.encode, frames)):
            Noted.halos, Noted.wholes = [], []
            with mock.patch.object(wan_vae, "stream_of", lambda cache, reuse, band: Noted(cache, reuse)):
                true, _ = method(x)
            before, messages = mesh.counted.bytes, Messages(mesh)
            with mock.patch.object(BandStream, "window", messages.watch(BandStream.window)):
                method(x, bands=Bands(mesh))
            sent = mesh.gather(torch.tensor([mesh.counted.bytes - before]), (1,) * mesh.size, 0).sum().item()
            cuts = min(rows, mesh.size) - 1
            wanted = 4 * sum(Noted.halos) * cuts + 4 * sum(Noted.wholes) * cuts + true.nbytes * (mesh.size - 1)
            if method == vae.decode_rgb:  # each rank tells all others whether its rows are finite
                wanted += 8 * mesh.size * (mesh.size - 1)
            assert cuts * sum(Noted.halos) > 0 and sent == wanted, (sent, wanted)
            here = (mesh.rank > 0) + (mesh.rank < cuts) if mesh.rank <= cuts else 0
            assert messages.most == here


def memory(mesh: Mesh) -> None:
    """What a rank holds is at most what plans say, with the forms for CPUs and as on a GPU."""
    rows, width = 8 * mesh.size, 4
    for config in (WanVAEConfig(base_dim=16), replace(WAN22_VAE, base_dim=16, decoder_base_dim=16)):
        vae, scale = build_vae(config), config.spatial_scale
        frames = torch.rand(1, 3, 5, rows * scale, width * scale)
        chunks = {
            vae.decode_rgb: [torch.randn(1, config.z_dim, 1, rows, width) for _ in range(2)],
            vae.encode: [frames[:, :, :1], frames[:, :, 1:]],
        }
        says = {
            vae.decode_rgb: decoder_bytes(config, rows * scale, width * scale, 4, bands=mesh.size),
            vae.encode: encoder_bytes(config, rows * scale, width * scale, 4, 0, bands=mesh.size),
        }
        for form in (vae_ops.channels_last, lambda *tensors: False):
            for method, given in chunks.items():
                cache = None
                with mock.patch.object(vae_ops, "channels_last", form), LiveMemory() as seen:
                    for chunk in given:
                        reuse = cache is not None and method == vae.decode_rgb  # as pipelines do
                        _, cache = method(chunk, cache, reuse=reuse, bands=Bands(mesh))
                peaks = mesh.gather(torch.tensor([seen.peak]), (1,) * mesh.size, 0)
                assert 0.7 <= peaks.max().item() / says[method] <= 1.01, (config, method, peaks, says[method])


def pipelines(mesh: Mesh) -> None:
    """The embedded VAE, as pipelines use it; the text encoder on one rank."""
    from fastvid.pipeline.load import load_model
    from fastvid.pipeline.pipeline import Pipeline

    alone, pipe = Pipeline(load_model("embedded")), Pipeline(load_model("embedded", mesh=mesh))
    frames = np.random.default_rng(0).integers(0, 255, (9, 96, 80, 3), dtype=np.uint8)
    latents = alone.encode(frames)
    before = mesh.counted.bytes
    assert relative(pipe.encode(frames), latents) < BAR[torch.float32] and mesh.counted.bytes > before
    before = mesh.counted.bytes
    made, true = pipe.decode(latents), alone.decode(latents)
    assert np.abs(made.astype(int) - true).max() <= 1 and mesh.counted.bytes > before
    assert torch.equal(pipe.embed("a red circle"), alone.embed("a red circle"))
    held = [p.device.type for p in pipe._model.text_encoder.parameters()]
    assert set(held) == {"cpu" if mesh.rank == 0 else "meta"}  # one rank reads the text
    with pytest.raises(AssertionError):  # messages of two threads would meet
        decode.Decoder(pipe._model, None, None, beside=True)


def everything(mesh: Mesh, seed: str) -> None:
    torch.set_num_threads(1)
    numbers = random.Random(int(seed))
    with torch.no_grad():
        any_split(mesh, numbers, torch.float32)
        bytes_sent(mesh, rows=7)
        bytes_sent(mesh, rows=2)
        tiled(mesh, numbers)
        if mesh.size == 2:
            any_split(mesh, numbers, torch.float64)
        if mesh.size == 3:  # ranks with one neighbour and with two
            memory(mesh)
    pipelines(mesh)


def briefly(mesh: Mesh) -> None:
    with torch.no_grad():
        for vae in (*networks(torch.float32), *networks(torch.float32, LIBRARIES)):
            compare(
                vae, torch.randn(1, 4, 2, 3, 2, generator=torch.Generator().manual_seed(1)), [1, 1], Bands(mesh), True
            )


def test_two_ranks() -> None:
    run_ranks(2, briefly)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks(size: int) -> None:
    """One start for all: most of the time goes into that."""
    run_ranks(size, everything, str(random.randrange(2**31)))


def test_one_rank_has_it_all() -> None:
    vae, latents = networks(torch.float32)[0], torch.randn(1, 4, 2, 3, 2)
    made, cache = vae.decode(latents, bands=Bands(Mesh()))
    assert torch.equal(made, vae.decode(latents)[0]) and len(cache) > 0


@pytest.mark.parametrize("kind", [0, 1])
def test_bands_take_no_stripes(kind: int) -> None:
    vae, bands = networks(torch.float32)[kind], Bands(Mesh())
    scale = vae.config.spatial_scale
    for method, x in (
        (vae.decode, torch.randn(1, 4, 1, 3, 2)),
        (vae.decode_rgb, torch.randn(1, 4, 1, 3, 2)),
        (vae.encode, torch.randn(1, 3, 1, 3 * scale, 2 * scale)),
    ):
        with pytest.raises(InvalidRequest, match="stripes is 2; ranks that share a frame's rows take 1"):
            method(x, stripes=2, bands=bands)
