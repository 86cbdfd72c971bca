"""The transformers' operations, as plain PyTorch has them, each against its formula in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvid.layers.embeddings import rotary_table
from fastvid.layers.linear import Linear, linear_gelu_tanh
from fastvid.ops import onednn, reference


def error(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||"""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def steps(x: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """The row of every token of x [B, N, d], written out."""
    return rows[index.repeat_interleave(x.shape[1] // index.shape[1], dim=1)]


def within_torch(ours: Tensor, torchs: Tensor, truth: Tensor) -> bool:
    """At most twice the error that plain PyTorch makes in the same type, or what rounding alone allows."""
    return error(ours, truth) <= max(2 * error(torchs, truth), 3e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "groups", "distinct"), [(1, 1, 1), (13, 1, 2), (137, 137, 5), (138, 6, 3)])
@pytest.mark.parametrize("grad", [False, True])
def test_modulation_against_its_formula(
    dtype: torch.dtype, tokens: int, groups: int, distinct: int, grad: bool
) -> None:
    torch.manual_seed(tokens)
    x, y = torch.randn(2, tokens, 72).to(dtype), torch.randn(2, tokens, 144).to(dtype)[..., ::2]
    shift, scale, gate = torch.randn(3, distinct, 72).unbind(0)
    index = torch.randint(distinct, (2, groups))

    def norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(x, (72,), eps=1e-6) * (1 + steps(x, index, scale)) + steps(x, index, shift)

    with torch.set_grad_enabled(grad):
        normed = reference.modulated_layer_norm(x, shift, scale, index, 1e-6)
        gated = reference.gated_residual(x, y, gate, index)
    assert normed.dtype == gated.dtype == dtype and normed.shape == gated.shape == x.shape
    truth = norm(x.double(), shift.double(), scale.double())
    assert within_torch(normed, norm(x.float(), shift, scale).to(dtype), truth)
    truth = x.double() + y.double() * steps(x, index, gate).double()
    assert within_torch(gated, (x.float() + y.float() * steps(x, index, gate)).to(dtype), truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "heads", "head_dim"), [(1, 1, 24), (137, 3, 34), (64, 2, 128)])
def test_norm_and_rotation_against_their_formula(dtype: torch.dtype, tokens: int, heads: int, head_dim: int) -> None:
    torch.manual_seed(tokens)
    x = torch.randn(2, tokens, 2 * heads * head_dim).to(dtype)[..., : heads * head_dim]
    weight = torch.randn(heads * head_dim).to(dtype)
    cos, sin = rotary_table((tokens, 1, 1), head_dim, offset=3, device=torch.device("cpu"))

    def formula(x: Tensor) -> Tensor:
        kind = x.dtype
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight.to(kind)
        even, odd = y.view(2, tokens, heads, -1, 2).unbind(-1)
        c, s = cos[:, None].to(kind), sin[:, None].to(kind)
        return torch.stack((even * c - odd * s, even * s + odd * c), -1).flatten(-2)

    before = x.clone()
    made = reference.rms_norm_rope(x, weight, cos, sin, 1e-6)
    assert made.dtype == dtype and made.shape == (2, tokens, heads, head_dim)
    assert within_torch(made, formula(x.float()).to(dtype), formula(x.double()))
    assert torch.equal(x, before), "an operation must not write into its inputs"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "context"), [(1, 1), (13, 137), (130, 512)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_against_its_formula(dtype: torch.dtype, tokens: int, context: int, scale: float | None) -> None:
    torch.manual_seed(tokens)
    q = torch.randn(2, tokens, 3, 24).to(dtype)
    k, v = torch.randn(2, context, 3, 2, 24).to(dtype).unbind(3)

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * (scale or 24**-0.5)
        return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v)

    made = reference.attention(q, k, v, scale=scale)
    assert made.shape == q.shape and made.dtype == dtype
    truth = formula(q.double(), k.double(), v.double())
    assert within_torch(made, formula(q.float(), k.float(), v.float()).to(dtype), truth)
    with pytest.raises(ValueError, match="attention takes"):
        reference.attention(q, k[:, :, :2], v)


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 1, 3)])
def test_patches_are_cut_and_put_back(patch: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    conv = torch.nn.Conv3d(4, 10, patch, patch)
    latents = torch.randn(2, 4, 4, 6, 12)
    made = reference.patch_embed(latents, conv.weight, conv.bias)
    assert error(made, conv(latents).flatten(2).transpose(1, 2)) < 1e-6
    identity = torch.eye(4 * patch[0] * patch[1] * patch[2])
    # Rows of a patch hold the channel first; a projection to patches holds it last.
    order = identity.view(4, -1, identity.shape[0]).transpose(0, 1).reshape(-1, 4, *patch)
    tokens = reference.patch_embed(latents, order, torch.zeros(len(identity)))
    grid = (4 // patch[0], 6 // patch[1], 12 // patch[2])
    assert torch.equal(reference._unpatchify(tokens, grid, patch), latents)
    with pytest.raises(ValueError, match="do not divide"):
        reference.patch_embed(latents[..., :11], conv.weight, conv.bias)


@pytest.mark.parametrize(("rows", "bias"), [(63, True), (64, True), (137, False)])
@torch.no_grad()
def test_linear_layers_by_any_route(rows: int, bias: bool) -> None:
    torch.manual_seed(rows)
    layer = Linear(48, 100, bias=bias)
    for x in (torch.randn(1, rows, 48), torch.randn(rows, 1, 96)[..., ::2].transpose(0, 1)):
        truth = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
        plain = F.linear(x, layer.weight, layer.bias)
        assert layer(x).shape == truth.shape and within_torch(layer(x), plain, truth)
        gelu = linear_gelu_tanh(reference, layer, x)
        assert within_torch(gelu, F.gelu(plain, approximate="tanh"), F.gelu(truth, approximate="tanh"))


def test_onednn_stands_back_for_gradients() -> None:
    layer, x = Linear(8, 8), torch.randn(100, 8)
    assert not onednn.applies(x, layer.weight)
    assert not onednn.applies(x.bfloat16(), layer.weight.bfloat16().detach())
    layer(x).sum().backward()
    assert layer.weight.grad is not None
