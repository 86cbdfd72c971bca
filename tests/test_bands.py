"""The VAEs with their rows shared among ranks: what one rank makes, over gloo; and what neighbours send each other."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from ranks import run_ranks

from fastvid.distributed import Mesh
from fastvid.models import vae_bands
from fastvid.models.vae_bands import Bands
from fastvid.models.vae_stream import Stream, Window
from fastvid.models.wan_vae import WanVAE, WanVAEConfig
from fastvid.models.wan_vae22 import WanVAE22, WanVAE22Config

BAR = {"float32": 1e-5, "float64": 1e-12}
SMALL = {"base_dim": 8, "z_dim": 4, "num_res_blocks": 1, "latents_mean": (0.1,) * 4, "latents_std": (1.5,) * 4}


def networks(dtype: torch.dtype) -> list[WanVAE]:
    torch.manual_seed(3)
    made = [WanVAE(WanVAEConfig(**SMALL)), WanVAE22(WanVAE22Config(decoder_base_dim=8, **SMALL))]
    for vae in made:
        for parameter in vae.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=1.5 / parameter[0].numel() ** 0.5 if parameter.numel() else 0)
    return [vae.to(dtype).requires_grad_(False) for vae in made]


def relative(made: torch.Tensor, true: torch.Tensor) -> float:
    return ((made.double() - true.double()).norm() / true.double().norm()).item()


def bands(mesh: Mesh, seed: str, name: str) -> None:
    """Decoding, to 8 bits too, and encoding, in chunks with a cache; odd sizes, and frames of fewer rows than ranks."""
    numbers, dtype = random.Random(int(seed)), getattr(torch, name)
    bar = BAR[name]
    torch.set_num_threads(1)
    with torch.no_grad():
        for vae in networks(dtype):
            scale = vae.config.spatial_scale
            for rows in (1, 2, 3, *numbers.sample(range(4, 12), 3)):
                width, parts = numbers.randrange(1, 6), [numbers.randrange(1, 3) for _ in range(2)]
                torch.manual_seed(numbers.randrange(2**31))
                latents = torch.randn(1, 4, sum(parts), rows, width).to(dtype)
                caches: list = [None] * 6
                for part in latents.split(parts, dim=2):
                    # 8-bit frames are made of fp32, at most.
                    for i, method in enumerate((vae.decode, vae.decode_rgb)[: 1 + (dtype != torch.float64)]):
                        true, caches[i] = method(part, caches[i])
                        made, caches[i + 2] = method(part, caches[i + 2], bands=Bands(mesh))
                        if i == 0:
                            assert relative(made, true) < bar, (type(vae), rows, width, relative(made, true))
                        else:
                            assert made.dtype == torch.uint8 and made.shape == true.shape
                            assert (made.int() - true.int()).abs().max() <= 1
                count = 4 * sum(parts) - 3
                frames = torch.rand(1, 3, count, rows * scale, width * scale).to(dtype) * 2 - 1
                first = 4 * parts[0] - 3
                for part in (frames[:, :, :first], frames[:, :, first:]):
                    true, caches[4] = vae.encode(part, caches[4])
                    made, caches[5] = vae.encode(part, caches[5], bands=Bands(mesh))
                    assert relative(made, true) < bar, (type(vae), rows, width, relative(made, true))


class Noted(Stream):
    """What each layer of a whole frame would be given of other rows, were it cut once: values a cut."""

    seen: list[int] = []
    whole_values: list[int] = []

    def window(self, x: torch.Tensor, above: int = 0, below: int = 0, **options) -> Window | None:
        B, C, T, _, W = x.shape
        self.seen.append((above + below) * B * C * T * W)
        return super().window(x, above, below, **options)

    def whole(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        self.whole_values.append(x.numel())
        return x


def bytes_sent(mesh: Mesh) -> None:
    """A row each way for every layer that sees one, at every cut; keys and values, and the result, to all others."""
    torch.set_num_threads(1)
    torch.manual_seed(1)
    with torch.no_grad():
        for vae in networks(torch.float32):
            latents, frames = torch.randn(1, 4, 3, 7, 3), torch.rand(1, 3, 9, 7 * vae.config.spatial_scale, 48)
            for call in (lambda **k: vae.decode_rgb(latents, **k), lambda **k: vae.encode(frames, **k)):  # noqa: B023
                Noted.seen, Noted.whole_values = [], []
                plain = vae_bands.stream_of
                module = __import__("fastvid.models.wan_vae", fromlist=["stream_of"])
                module.stream_of = lambda cache, reuse, band: Noted(cache, reuse)
                true, _ = call()
                module.stream_of = plain
                before = mesh.counted.bytes
                call(bands=Bands(mesh))
                total = mesh.gather(torch.tensor([mesh.counted.bytes - before]), (1,) * mesh.size, 0).sum().item()
                ranks = mesh.size
                wanted = 4 * sum(Noted.seen) * (ranks - 1) + (4 * sum(Noted.whole_values) + true.nbytes) * (ranks - 1)
                assert total == wanted, (total, wanted)


def pipelines(mesh: Mesh) -> None:
    """The embedded VAE, as pipelines use it."""
    from fastvid.loading import load_parts
    from fastvid.pipeline import Pipeline

    alone, pipe = Pipeline(load_parts("embedded")), Pipeline(load_parts("embedded", mesh=mesh))
    frames = np.random.default_rng(0).integers(0, 255, (9, 96, 80, 3), dtype=np.uint8)
    latents = alone.encode(frames)
    before = mesh.counted.bytes
    assert relative(pipe.encode(frames), latents) < BAR["float32"] and mesh.counted.bytes > before
    before = mesh.counted.bytes
    made, true = pipe.decode(latents), alone.decode(latents)
    assert np.abs(made.astype(int) - true).max() <= 1 and mesh.counted.bytes > before
    assert torch.equal(pipe.embed("a red circle"), alone.embed("a red circle"))
    held = [p.device.type for p in pipe._parts.text_encoder.parameters()]
    assert set(held) == {"cpu" if mesh.rank == 0 else "meta"}  # one rank reads the text


@pytest.mark.parametrize("size", [2, 3, 4])
def test_bands(size: int) -> None:
    run_ranks(size, bands, str(random.randrange(2**31)), "float32")


def test_bands_in_double_precision() -> None:
    run_ranks(3, bands, str(random.randrange(2**31)), "float64")


@pytest.mark.parametrize("size", [2, 3])
def test_what_neighbours_send(size: int) -> None:
    run_ranks(size, bytes_sent)


@pytest.mark.parametrize("size", [2, 4])
def test_pipelines(size: int) -> None:
    run_ranks(size, pipelines)


def test_one_rank_has_it_all() -> None:
    vae, latents = networks(torch.float32)[0], torch.randn(1, 4, 2, 3, 2)
    made, cache = vae.decode(latents, bands=Bands(Mesh()))
    assert torch.equal(made, vae.decode(latents)[0]) and len(cache) > 0
    with pytest.raises(ValueError, match="stripes is 2; ranks that share a frame's rows take 1"):
        vae.decode(latents, stripes=2, bands=Bands(Mesh()))
