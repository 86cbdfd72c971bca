"""Both Wan VAEs against diffusers' on random weights; chunks against whole clips; CPU forms against plain ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from vae_cases import (
    NETWORKS,
    SMALL,
    Network,
    diffusers_vae,
    draw_frames,
    draw_latents,
    error,
    in_chunks,
    nbytes,
    ours,
    their_decoding,
    their_encoding,
)

from fastvid.errors import CheckpointError
from fastvid.models.wan.config import WanVAEConfig
from fastvid.models.wan.vae import WanVAE
from fastvid.ops import vae as ops
from fastvid.ops import winograd

# Latent frames, height, width.
SIZES = [
    *(("2.1", size) for size in ((1, 1, 1), (1, 5, 3), (2, 3, 5), (3, 1, 7), (5, 4, 2))),
    *(("2.2", size) for size in ((1, 1, 1), (1, 5, 3), (2, 3, 5), (3, 1, 4), (4, 3, 2))),
]


@pytest.fixture(scope="module", params=NETWORKS)
def net(request: pytest.FixtureRequest) -> Network:
    return NETWORKS[request.param]


@pytest.fixture
def vae() -> WanVAE:
    return NETWORKS["2.1"].vae


# ---------------------------------------------------------------- both networks


@pytest.mark.parametrize(("name", "size"), SIZES)
def test_decode_equals_diffusers(name: str, size: tuple[int, int, int]) -> None:
    net, latents = NETWORKS[name], draw_latents(*size, batch=2)
    want = their_decoding(net.theirs, latents)
    assert (want.abs() == 1).float().mean() < 0.2
    assert error(net.vae.decode(latents)[0], want) < 1e-5


@pytest.mark.parametrize(("name", "size"), SIZES)
def test_encode_equals_diffusers(name: str, size: tuple[int, int, int]) -> None:
    net = NETWORKS[name]
    frames = net.frames(*size, batch=2)
    assert error(net.vae.encode(frames)[0], their_encoding(net.theirs, frames)) < 1e-5


@pytest.mark.parametrize(
    ("name", "latents", "frames"),
    [("2.1", (3, 9, 7), (3, 9, 7)), ("2.1", (2, 10, 13), (2, 10, 13)), ("2.2", (3, 7, 6), (3, 5, 6))],
)
def test_winograd_equals_diffusers(name: str, latents: Any, frames: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    net, used, real = NETWORKS[name], [], winograd.norm_silu_conv3d
    monkeypatch.setattr(winograd, "norm_silu_conv3d", lambda *args: (used.append(1), real(*args))[1])
    latents, frames = draw_latents(*latents), net.frames(*frames)
    want = their_decoding(net.their_wide, latents)
    assert (want.abs() == 1).float().mean() < 0.2
    assert error(net.wide_vae.decode(latents)[0], want) < 1e-5
    assert used, "no layer was big enough: this test would show nothing"
    used.clear()
    assert error(net.wide_vae.encode(frames)[0], their_encoding(net.their_wide, frames)) < 1e-5
    assert used


def test_bf16_is_as_near_to_fp32_as_diffusers_is(net: Network) -> None:
    low = diffusers_vae(net.small).bfloat16()
    vae_low = ours(low).bfloat16()
    latents, frames = draw_latents(3, 3, 5), net.frames(3, 3, 5)
    exact = net.vae.decode(latents)[0]
    theirs_off = error(their_decoding(low, latents.bfloat16()), exact)
    assert error(vae_low.decode(latents.bfloat16())[0], exact) < 2 * theirs_off < 0.2
    exact = net.vae.encode(frames)[0]
    theirs_off = error(their_encoding(low, frames.bfloat16()), exact)
    assert error(vae_low.encode(frames.bfloat16())[0], exact) < 2 * theirs_off < 0.2


lengths_of_chunks = st.lists(st.integers(1, 3), min_size=1, max_size=4)


@given(lengths_of_chunks)
@settings(deadline=None)
def test_any_chunks_decode_alike(net: Network, lengths: list[int]) -> None:
    latents = draw_latents(sum(lengths), 2, 1)
    assert error(in_chunks(net.vae.decode, latents, lengths), net.vae.decode(latents)[0]) < 1e-5


@given(lengths_of_chunks)
@settings(deadline=None)
def test_any_chunks_encode_alike(net: Network, lengths: list[int]) -> None:
    frames = net.frames(sum(lengths), 2, 1)
    parts = [4 * lengths[0] - 3, *(4 * n for n in lengths[1:])]
    assert error(in_chunks(net.vae.encode, frames, parts), net.vae.encode(frames)[0]) < 1e-5


def test_the_steps_within_a_chunk_do_not_matter(net: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    latents, frames = draw_latents(5, 2, 3), net.frames(5, 2, 3)
    whole = net.vae.decode(latents)[0], net.vae.encode(frames)[0]
    monkeypatch.setattr("fastvid.models.wan.vae.CPU_CHUNK", 1)
    assert error(net.vae.decode(latents)[0], whole[0]) < 1e-5
    assert error(net.vae.encode(frames)[0], whole[1]) < 1e-5


@pytest.mark.parametrize("width", ["small", "wide"])
def test_the_cache_does_not_grow(net: Network, width: str) -> None:
    vae = net.vae if width == "small" else net.wide_vae
    decoding, encoding = set(), set()
    for t in (2, 3, 6) if width == "small" else (2, 3):
        _, cache = vae.decode(draw_latents(t, 4, 3))
        decoding.add(nbytes(cache))
        _, cache = vae.decode(draw_latents(1, 4, 3), cache)
        decoding.add(nbytes(cache))
        _, cache = vae.encode(net.frames(t, 4, 3))
        encoding.add(nbytes(cache))
        _, cache = vae.encode(net.frames(2, 4, 3)[:, :, 1:], cache)
        encoding.add(nbytes(cache))
    assert len(decoding) == len(encoding) == 1


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last_3d], ids=["rows", "channels"])
@pytest.mark.parametrize("width", ["small", "wide"])
def test_neither_input_nor_cache_is_written_to(net: Network, width: str, order: torch.memory_format) -> None:
    """Also in the layout that the CPU forms hold tensors in, so that they have no reason to copy."""
    vae = net.vae if width == "small" else net.wide_vae
    for step, x in ((vae.decode, draw_latents(3, 3, 4)), (vae.encode, net.frames(2, 3, 4))):
        x = x.contiguous(memory_format=order)
        before = x.clone()
        _, cache = step(x[:, :, :1])
        kept = [t.clone() for t in cache]
        again = [step(x[:, :, 1:], cache)[0] for _ in range(2)]
        assert torch.equal(*again) and torch.equal(x, before)
        assert all(torch.equal(a, b) for a, b in zip(cache, kept, strict=True))


def test_the_future_is_not_seen(net: Network) -> None:
    latents = draw_latents(4, 1, 2)
    other = latents.clone()
    other[:, :, 2:] += 1
    a, b = net.vae.decode(latents)[0], net.vae.decode(other)[0]
    assert error(a[:, :, :5], b[:, :, :5]) < 1e-5
    assert error(a[:, :, 5:], b[:, :, 5:]) > 1e-3


@pytest.mark.parametrize("width", ["small", "wide"])
def test_under_autograd_it_computes_the_same(net: Network, width: str) -> None:
    vae = ours(net.theirs if width == "small" else net.their_wide)
    frames = net.frames(2, 9, 7) if net.scale == 8 else net.frames(2, 4, 3)
    latents, _ = vae.encode(frames)
    decoded, _ = vae.decode_raw(latents)
    vae.requires_grad_(True)
    assert not ops.channels_last(frames, vae.encoder.conv_in.weight)
    assert error(vae.encode(frames)[0].detach(), latents) < 1e-5
    assert error(vae.decode_raw(latents)[0].detach(), decoded) < 1e-5


def test_gradients_are_those_of_finite_differences(net: Network) -> None:
    vae, frames = ours(net.theirs).double(), net.frames(2, 1, 1).double()
    weight = vae.encoder.conv_in.weight.requires_grad_(True)

    def loss() -> Tensor:
        return vae.decode_raw(vae.encode(frames)[0])[0].square().mean()

    loss().backward()
    step = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    want, h = (weight.grad * step).sum().item(), 1e-6
    with torch.no_grad():
        weight += h * step
        up = loss().item()
        weight -= 2 * h * step
        down = loss().item()
    assert (up - down) / (2 * h) == pytest.approx(want, rel=1e-4)


# ---------------------------------------------------------------- the 2.1 network


def test_winograd_chunks_equal_the_whole() -> None:
    latents, vae = draw_latents(4, 9, 7), NETWORKS["2.1"].wide_vae
    whole, _ = vae.decode(latents)
    assert error(in_chunks(vae.decode, latents, [1, 2, 1]), whole) < 1e-5


def test_in_fp64_only_the_order_of_sums_differs() -> None:
    theirs = diffusers_vae(SMALL).double()
    vae = ours(theirs).double()
    latents, frames = draw_latents(3, 2, 3).double(), draw_frames(2, 2, 3).double()
    # diffusers rounds to fp32 where it upsamples.
    assert error(vae.decode(latents)[0], their_decoding(theirs, latents)) < 3e-7
    assert error(vae.encode(frames)[0], their_encoding(theirs, frames)) < 1e-12


def test_a_small_mistake_would_be_seen() -> None:
    theirs = NETWORKS["2.1"].theirs
    latents = draw_latents(3, 3, 5)
    right = their_decoding(theirs, latents)
    wrong = ours(theirs)
    wrong.decoder.up_blocks[0].upsamplers[0].time_conv.bias[0] += 0.05
    assert error(wrong.decode(latents)[0], right) > 1e-5


def test_the_names_and_shapes_are_those_of_published_files() -> None:
    with torch.device("meta"):
        theirs, own = AutoencoderKLWan(), WanVAE(WanVAEConfig())
    want = {name: value.shape for name, value in theirs.state_dict().items()}
    assert {name: value.shape for name, value in own.state_dict().items()} == want


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ((1, 3, 5, 12, 16), "12x16"),
        ((1, 3, 5, 16, 20), "multiples of 8"),
        ((1, 3, 4, 16, 16), "4k\\+1"),
        ((1, 3, 0, 16, 16), "0 frames"),
    ],
)
def test_what_cannot_be_encoded_is_refused(vae: WanVAE, shape: tuple[int, ...], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        vae.encode(torch.zeros(shape))


def test_a_later_chunk_needs_whole_groups(vae: WanVAE) -> None:
    _, cache = vae.encode(draw_frames(1, 1, 1))
    with pytest.raises(ValueError, match="4k after the start"):
        vae.encode(torch.zeros(1, 3, 5, 8, 8), cache)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"patch_size": 2}, "2.2"),
        ({"attn_scales": [1.0]}, "attn_scales"),
        ({"latents_mean": [0.0] * 3}, "z_dim=4"),
        ({"latents_std": [1.0] * 16}, "z_dim=4"),
    ],
)
def test_configurations_that_it_cannot_do_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        WanVAEConfig.from_dict({**SMALL, **changes})


class TestOps:
    """Each operation's CPU form against its plain one, in fp64."""

    @given(st.integers(1, 3), st.integers(1, 11), st.integers(1, 11), st.booleans(), st.booleans())
    @settings(max_examples=25, deadline=None)
    def test_winograd(self, frames: int, height: int, width: int, past: bool, add: bool) -> None:
        g = torch.Generator().manual_seed(frames + 10 * height + 100 * width)
        x = torch.randn(2, 8, frames, height, width, generator=g)
        weight = torch.randn(6, 8, 3, 3, 3, generator=g) / 15
        gamma, bias = torch.rand(8, 1, 1, 1, generator=g) + 0.5, torch.randn(6, generator=g)
        before = torch.randn(2, 8, 2, height, width, generator=g) if past else None
        residual = torch.randn(2, 6, frames, height, width, generator=g)
        out = residual.clone() if add else torch.full_like(residual, torch.nan)
        kept = winograd.norm_silu_conv3d(x, before, gamma, weight, bias, out, add)
        want, want_kept = ops.norm_silu_conv3d(
            x.double(),
            before if before is None else before.double(),
            gamma.double(),
            weight.double(),
            bias.double(),
            residual.double() if add else None,
        )
        assert error(out, want) < 2e-6
        assert error(kept, want_kept) < 1e-6

    @given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 9), st.booleans())
    @settings(max_examples=25, deadline=None)
    def test_stripes(self, frames: int, height: int, width: int, past: bool) -> None:
        g = torch.Generator().manual_seed(frames + 10 * height + 100 * width)
        x = torch.randn(1, 5, frames, height, width, generator=g)
        weight, bias = torch.randn(7, 5, 3, 3, 3, generator=g) / 10, torch.randn(7, generator=g)
        gamma = torch.rand(5, 1, 1, 1, generator=g) + 0.5
        before = torch.randn(1, 5, 2, height, width, generator=g) if past else None
        stripe, ops.STRIPE = ops.STRIPE, 1
        try:
            out, kept = ops.norm_silu_conv3d(x, before, gamma, weight, bias)
        finally:
            ops.STRIPE = stripe
        doubles = [None if t is None else t.double() for t in (x, before, gamma, weight, bias)]
        want, want_kept = ops.norm_silu_conv3d(*doubles)
        assert error(out, want) < 1e-6
        assert error(kept, want_kept) < 1e-6

    @given(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7))
    @settings(max_examples=15, deadline=None)
    def test_upsample(self, frames: int, height: int, width: int) -> None:
        g = torch.Generator().manual_seed(frames + 10 * height + 100 * width)
        x = torch.randn(2, 4, frames, height, width, generator=g)
        weight, bias = torch.randn(3, 4, 3, 3, generator=g), torch.randn(3, generator=g)
        want = ops.upsample_conv2d(x.double(), weight.double(), bias.double())
        assert error(ops.upsample_conv2d(x, weight, bias), want) < 1e-6

    def test_without_onednn_the_plain_forms_run(self) -> None:
        x = torch.zeros(1, 4, 2, 8, 8)
        assert ops.channels_last(x)
        with torch.backends.mkldnn.flags(enabled=False):
            assert not ops.channels_last(x)
        assert not ops.channels_last(x.double())
        assert not ops.channels_last(x.requires_grad_())
