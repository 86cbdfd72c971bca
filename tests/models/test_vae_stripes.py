"""Both VAEs in stripes of rows against the whole frame: any sizes, chunks, stripes; what a layer waits for; memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from vae_cases import OTHER_22, SMALL, SMALL_22, WIDE, diffusers_vae, error, ours

from fastvid.errors import InvalidRequest
from fastvid.models.common.vae_stream import Cache, Stream
from fastvid.models.wan.vae import WanVAE

NETWORKS = {"2.1": SMALL, "2.2": SMALL_22, "other": OTHER_22, "wide": WIDE}
EXACT = ["2.1", "2.2", "other"]


@pytest.fixture(scope="module")
def networks() -> dict[str, WanVAE]:
    """In fp64, but for the one that is wide enough for the Winograd form, which is for fp32."""
    made = {name: ours(diffusers_vae(config)) for name, config in NETWORKS.items()}
    return {name: vae if name == "wide" else vae.double() for name, vae in made.items()}


def draw(vae: WanVAE, verb: str, t: int, h: int, w: int) -> Tensor:
    """Latents or frames for t latent frames."""
    g, dtype = torch.Generator().manual_seed(t * 100 + h * 10 + w), vae.quant_conv.weight.dtype
    if verb == "decode":
        return torch.randn(1, 4, t, h, w, generator=g, dtype=dtype)
    space, time = vae.config.spatial_scale, vae.config.temporal_scale
    return torch.rand(1, 3, time * (t - 1) + 1, space * h, space * w, generator=g, dtype=dtype) * 2 - 1


def parts(vae: WanVAE, verb: str, lengths: list[int]) -> list[int]:
    if verb == "decode":
        return lengths
    time = vae.config.temporal_scale
    return [time * (lengths[0] - 1) + 1, *(time * n for n in lengths[1:])]


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("verb", ["decode", "encode"])
@given(st.data())
@settings(max_examples=10, deadline=None)
def test_stripes_are_the_whole_frame(networks: dict[str, WanVAE], name: str, verb: str, data: st.DataObject) -> None:
    vae = networks[name]
    step: Callable[..., tuple[Tensor, Cache]] = getattr(vae, verb)
    h, w = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 3))
    lengths = data.draw(st.lists(st.integers(1, 2), min_size=1, max_size=3))
    x = draw(vae, verb, sum(lengths), h, w)
    want, want_cache = step(x)
    cache, out = None, []
    for part in x.split(parts(vae, verb, lengths), dim=2):
        options = {"stripes": data.draw(st.integers(1, h)), "reuse": data.draw(st.booleans())}
        done, cache = step(part, cache, **options)
        out.append(done)
    assert error(torch.cat(out, dim=2), want) < 1e-12
    assert all((a - b).abs().max() < 1e-10 for a, b in zip(cache, want_cache, strict=True))


@pytest.mark.parametrize("stripes", [2, 3, 9])
@pytest.mark.parametrize("verb", ["decode", "encode"])
def test_with_winograd(networks: dict[str, WanVAE], verb: str, stripes: int) -> None:
    x = draw(networks["wide"], verb, 3, 9, 7)
    step = getattr(networks["wide"], verb)
    assert error(step(x, stripes=stripes)[0], step(x)[0]) < 1e-6


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("verb", ["decode", "encode"])
def test_no_more_rows_are_taken_than_are_seen(networks: dict[str, WanVAE], verb: str, name: str) -> None:
    """Of the input, the first stripe takes what its result depends on by the gradient, and what pairs add."""
    vae, config = networks[name], networks[name].config
    layers, channels, height = vae.decoder._up, config.decoder_dim * config.dim_mult[-1], 24
    if verb == "encode":
        layers, channels, height = vae.encoder._down, config.frame_channels, 24 * 8
    x = torch.randn(1, channels, 1, height, 8, dtype=torch.float64, requires_grad=True)
    took = []

    def watch(rows: Tensor, stream: Stream) -> Tensor:
        took.append(rows.shape[3])
        return layers(rows, stream)

    Stream(None).in_stripes(watch, x.detach(), 8)
    out = Stream(None).in_stripes(layers, x, 1)
    (slope,) = torch.autograd.grad(out[:, :, :, : out.shape[3] // 8].abs().sum(), x)
    seen = int(slope.abs().amax((0, 1, 2, 4)).nonzero().max()) + 1
    assert seen < height and sum(took) == height
    # Pairs of rows at each of three sizes; 2.2's encoder also needs pairs for its shortcuts.
    spare = 3 if verb == "decode" else 0 if name == "2.1" else 7
    assert seen <= took[1] <= seen + spare


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("verb", ["decode", "encode"])
def test_a_row_less_in_any_layer_would_be_seen(
    networks: dict[str, WanVAE], verb: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae, real, layers = networks[name], Stream.window, set()
    x = draw(vae, verb, 1, 24, 1)

    def short(stream: Stream, x: Tensor, above: int = 0, below: int = 0, **options: Any) -> Any:
        if stream._planning and below:
            layers.add(stream._place)
        return real(stream, x, above, 0 if stream._place == at else below, **options)

    monkeypatch.setattr(Stream, "window", short)
    at = -1
    want = getattr(vae, verb)(x, stripes=4)[0]
    assert len(layers) > 8
    for at in sorted(layers)[:: 2 if name == "2.1" else 3]:
        assert error(getattr(vae, verb)(x, stripes=4)[0], want) > 1e-9, at


@pytest.mark.parametrize("stripes", [2, 5])
def test_neither_input_nor_cache_is_written_to(networks: dict[str, WanVAE], stripes: int) -> None:
    for name in ("2.2", "wide"):
        vae = networks[name]
        x = draw(vae, "decode", 2, 6, 7).contiguous(memory_format=torch.channels_last_3d)
        before = x.clone()
        _, cache = vae.decode(x[:, :, :1], stripes=stripes)
        kept = [t.clone() for t in cache]
        again = [vae.decode(x[:, :, 1:], cache, stripes=stripes)[0] for _ in range(2)]
        assert torch.equal(*again) and torch.equal(x, before)
        assert all(torch.equal(a, b) for a, b in zip(cache, kept, strict=True))


def test_a_reused_cache_is_the_same_memory(networks: dict[str, WanVAE]) -> None:
    vae = networks["2.1"]
    x = draw(vae, "decode", 2, 4, 2)
    for stripes in (1, 3):
        _, cache = vae.decode(x[:, :, :1])
        _, new = vae.decode(x[:, :, 1:], cache, stripes=stripes, reuse=True)
        assert [t.data_ptr() for t in new] == [t.data_ptr() for t in cache]


@pytest.mark.parametrize("stripes", [0, 5, -1, 2.0])
def test_numbers_of_stripes_that_cannot_be_are_refused(networks: dict[str, WanVAE], stripes: Any) -> None:
    for verb in ("decode", "encode"):
        with pytest.raises(InvalidRequest, match="stripes is .* 1 to 4"):
            getattr(networks["2.1"], verb)(draw(networks["2.1"], verb, 1, 4, 1), stripes=stripes)
