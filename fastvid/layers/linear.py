"""Linear layers by the fastest exact route in PyTorch, and parameters that cost nothing on the meta device.

On x86 CPUs F.linear calls MKL in fp32, which is 10 to 20 % slower on AMD than oneDNN in the same wheel; and oneDNN
applies bias and GELU while results are in the cache. Both are IEEE fp32 (relative errors of 2e-7 and 4e-7).
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvid.ops import onednn, reference

# Below this many rows the start-up of a oneDNN call (10 us) costs more than it gains.
MIN_ROWS = 64


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


class Embedding(nn.Embedding):
    """nn.Embedding, but nothing is drawn on the meta device; see `normal_parameter`."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class Linear(nn.Linear):
    """nn.Linear: the same parameters and the same result."""

    def forward(self, x: Tensor) -> Tensor:
        if onednn_applies(x, self.weight):
            return _onednn(x, self.weight, self.bias, "none", "")
        return F.linear(x, self.weight, self.bias)


def linear(ops: Any, layer: nn.Module, x: Tensor) -> Tensor:
    """ops.linear of a layer; by oneDNN where it applies, unless a kernel is bound."""
    affine = cast(Affine, layer)  # torch's lists of modules do not tell which kind they hold
    if ops.linear is reference.linear and onednn_applies(x, affine.weight):
        return _onednn(x, affine.weight, affine.bias, "none", "")
    return ops.linear(x, affine.weight, affine.bias)


def linear_gelu_tanh(ops: Any, layer: nn.Linear, x: Tensor) -> Tensor:
    """ops.linear_gelu_tanh of a layer; by oneDNN where it applies, unless a kernel is bound."""
    if ops.linear_gelu_tanh is reference.linear_gelu_tanh and onednn_applies(x, layer.weight):
        return _onednn(x, layer.weight, layer.bias, "gelu", "tanh")
    return ops.linear_gelu_tanh(x, layer.weight, layer.bias)


def onednn_applies(x: Tensor, weight: Tensor) -> bool:
    """Whether F.linear would call MKL and oneDNN can replace it: fp32 on an x86 CPU, without gradients."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() >= MIN_ROWS * x.shape[-1]
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and torch.backends.mkl.is_available()
        and onednn.available()
    )


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, algorithm: str) -> Tensor:
    # What torch.compile emits for a linear layer on the CPU; the same signature since torch 2.0.
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], algorithm)


class FeedForward(nn.Module):
    """Linear, GELU, Linear: GELU in its tanh form in the blocks, exact in the image embedder."""

    def __init__(self, inputs: int, inner: int, outputs: int, ops: Any, *, exact: bool = False) -> None:
        super().__init__()
        self.ops, self.exact = ops, exact
        first = nn.ModuleDict({"proj": Linear(inputs, inner)})
        self.net = nn.ModuleList([first, nn.Identity(), Linear(inner, outputs)])

    def forward(self, x: Tensor) -> Tensor:
        first = cast(Linear, cast(nn.ModuleDict, self.net[0])["proj"])
        inner = F.gelu(linear(self.ops, first, x)) if self.exact else linear_gelu_tanh(self.ops, first, x)
        return linear(self.ops, self.net[2], inner)


class TwoLinears(nn.Module):
    """Linear, an activation, Linear, under the names that diffusers gives them."""

    def __init__(self, inputs: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = Linear(inputs, dim)
        self.linear_2 = Linear(dim, dim)
