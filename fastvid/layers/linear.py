"""Linear layers by the fastest exact route in PyTorch, and parameters that cost nothing on the meta device."""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvid.layers.branches import Branch, with_branch
from fastvid.layers.quantized import JoinedLinear, QuantizedLinear, takes_rows
from fastvid.ops import reference
from fastvid.ops.quantized import Activations


def normal_parameter(*shape: int, std: float) -> nn.Parameter:
    """A parameter drawn from N(0, std^2); on the meta device nothing is drawn.

    `normal_` on a meta tensor imports torch._dynamo and sympy, more than a second of start-up, for values that a
    checkpoint replaces anyway.
    """
    values = torch.empty(*shape)
    return nn.Parameter(values if values.is_meta else values.normal_(std=std))


class Affine(Protocol):
    """A layer that multiplies by a weight and adds a bias."""

    @property
    def weight(self) -> Tensor: ...

    @property
    def bias(self) -> Tensor | None: ...

    @property
    def branch(self) -> Branch | None: ...


class Embedding(nn.Embedding):
    """nn.Embedding, but nothing is drawn on the meta device; see `normal_parameter`."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class Linear(nn.Linear):
    """nn.Linear: the same parameters and the same result. branch: what LoRAs add to it at the moment."""

    branch: Branch | None = None

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # see `normal_parameter`
            super().reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        return linear(reference, self, x)


def linear(ops: Any, layer: nn.Module, x: Activations) -> Tensor:
    """ops.linear of a layer, and what its branch adds. x: quantized, if `takes_rows` says that the layer takes that."""
    if isinstance(layer, QuantizedLinear | JoinedLinear):
        return cast(Tensor, layer(x))
    affine = cast(Affine, layer)  # torch's lists of modules do not tell which kind they hold
    return with_branch(layer, cast(Tensor, x), ops.linear(x, affine.weight, affine.bias))


def linear_gelu_tanh(ops: Any, layer: nn.Module, x: Activations) -> Tensor:
    """ops.linear_gelu_tanh of a layer; in two steps if it has a branch."""
    affine = cast(Affine, layer)
    if affine.branch is not None:
        return F.gelu(linear(ops, layer, x), approximate="tanh")
    if isinstance(layer, QuantizedLinear):
        return cast(Tensor, layer.gelu_tanh(x))
    return ops.linear_gelu_tanh(x, affine.weight, affine.bias)


class FeedForward(nn.Module):
    """Linear, GELU, Linear: GELU in its tanh form in the blocks, exact in the image embedder."""

    def __init__(self, inputs: int, inner: int, outputs: int, ops: Any, *, exact: bool = False) -> None:
        super().__init__()
        self.ops, self.exact = ops, exact
        first = nn.ModuleDict({"proj": Linear(inputs, inner)})
        self.net = nn.ModuleList([first, nn.Identity(), Linear(inner, outputs)])

    @property
    def first(self) -> nn.Module:
        return cast(nn.ModuleDict, self.net[0])["proj"]

    def forward(self, x: Activations) -> Tensor:
        return linear(self.ops, self.net[2], self._inner(x))

    def _inner(self, x: Activations) -> Activations:
        first = self.first
        if self.exact:
            return F.gelu(linear(self.ops, first, x))
        if isinstance(first, QuantizedLinear) and first.branch is None:
            return first.gelu_tanh(x, takes_rows(self.net[2], x))
        return linear_gelu_tanh(self.ops, first, x)


class TwoLinears(nn.Module):
    """Linear, an activation, Linear, under the names that diffusers gives them."""

    def __init__(self, inputs: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = Linear(inputs, dim)
        self.linear_2 = Linear(dim, dim)
