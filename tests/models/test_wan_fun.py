"""VideoX-Fun's models against diffusers' Wan transformer, whose patch embedding is given what Fun's models add."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn

from fastvid.distributed.mesh import Layout, Mesh, RankView
from fastvid.errors import InvalidRequest
from fastvid.models.wan.config import WanFunConfig
from fastvid.models.wan.fun import WanFunTransformer

SIZES: dict[str, Any] = {
    **{"num_attention_heads": 4, "attention_head_dim": 24, "in_channels": 52, "out_channels": 16, "text_dim": 32},
    **{"ffn_dim": 80, "num_layers": 2},
}


class Patch(nn.Module):
    """The reference's tokens in place of the first frame's."""

    def __init__(self, conv: nn.Module, ref_conv: nn.Module, reference: torch.Tensor) -> None:
        super().__init__()
        self.conv, self.ref_conv, self.reference = conv, ref_conv, reference

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat((self.ref_conv(self.reference)[:, :, None], self.conv(x[:, :, 1:])), 2)


def both(image: bool = False) -> tuple[Any, WanFunTransformer]:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    sizes = SIZES | ({"image_dim": 40, "added_kv_proj_dim": 96} if image else {})
    theirs = WanTransformer3DModel(**sizes).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    ours = WanFunTransformer(WanFunConfig.from_dict({**sizes, "add_ref_conv": True}))
    weights = theirs.state_dict() | {f"ref_conv.{k}": v for k, v in nn.Conv2d(16, 96, 2, 2).state_dict().items()}
    ours.load_state_dict({name: value for name, value in weights.items() if "norm_added_q" not in name})
    return theirs, ours.eval()


@pytest.mark.parametrize("levels", ["one", "frame", "token"])
@pytest.mark.parametrize("image", [False, True])
@torch.no_grad()
def test_a_reference_is_one_more_frame_in_front(levels: str, image: bool) -> None:
    theirs, ours = both(image)
    latents, reference, text = torch.randn(2, 52, 3, 4, 6), torch.randn(2, 16, 4, 6), torch.randn(2, 512, 32)
    pictures = torch.randn(2, 5, 40) if image else None
    frames = torch.tensor([[0.0, 500.0, 700.0], [0.0, 400.0, 900.0]])
    times = {"one": torch.tensor([500.0, 20.0]), "frame": frames, "token": frames.repeat_interleave(6, 1)}[levels]
    if levels == "token":
        times[:, 8] = 0.0
    theirs.patch_embedding = Patch(theirs.patch_embedding, ours.ref_conv, reference)
    more = torch.cat((torch.full((2, 52, 1, 4, 6), torch.nan), latents), 2)
    spread = frames.repeat_interleave(6, 1) if levels == "frame" else times
    timestep = times if levels == "one" else torch.cat((spread[:, -1:].expand(-1, 6), spread), 1)
    wanted = theirs(more, timestep, text, pictures).sample[:, :, 1:]
    context = ours.prepare_context(text, pictures, reference=reference)
    given = ours(latents[:, :16], times, context, known=latents[:, 16:])
    torch.testing.assert_close(given, wanted, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_without_a_picture_the_reference_is_zeros_and_still_counts() -> None:
    _, ours = both()
    latents, text = torch.randn(1, 52, 2, 4, 6), torch.randn(1, 9, 32)
    made = [
        ours(latents, torch.tensor([500.0]), ours.prepare_context(text, reference=scale * torch.ones(1, 16, 4, 6)))
        for scale in (0.0, 0.0, 1.0)
    ]
    assert torch.equal(made[0], made[1]) and (made[0] - made[2]).abs().max() > 1e-3


@pytest.mark.parametrize("shape", [None, (1, 16, 4, 5), (1, 8, 4, 6), (2, 16, 4, 6), (16, 4, 6)])
def test_other_references_are_refused(shape: tuple[int, ...] | None) -> None:
    _, ours = both()
    with pytest.raises(InvalidRequest, match="a reference"):
        ours.prepare_context(torch.randn(1, 9, 32), reference=None if shape is None else torch.randn(shape))


def test_a_reference_of_another_size_than_the_video_is_refused() -> None:
    _, ours = both()
    context = ours.prepare_context(torch.randn(1, 9, 32), reference=torch.randn(1, 16, 4, 8))
    with pytest.raises(InvalidRequest, match="the reference has 8 tokens; one of latents of this size has 6"):
        ours(torch.randn(1, 52, 2, 4, 6), torch.tensor([500.0]), context)


@torch.no_grad()
def shared_by_ranks(mesh: Mesh) -> None:
    """Two ranks that share the tokens, the reference's too, make what one does."""
    torch.manual_seed(0)
    ours = WanFunTransformer(WanFunConfig.from_dict({**SIZES, "add_ref_conv": True})).eval()
    latents, text, reference = torch.randn(1, 52, 3, 4, 6), torch.randn(1, 9, 32), torch.randn(1, 16, 4, 6)
    context = ours.prepare_context(text, reference=reference)
    for layout in (Layout(ulysses=2), Layout(ring=2)):
        for times in (torch.tensor([500.0]), torch.tensor([[0.0, 300.0, 900.0]]), 900 * torch.rand(1, 18)):
            true = ours(latents, times, context)
            made = ours(latents, times, context, view=RankView(mesh, layout))
            torch.testing.assert_close(made, true, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_ranks_share_the_reference() -> None:
    run_ranks(2, shared_by_ranks)
