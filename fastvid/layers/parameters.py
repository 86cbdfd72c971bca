"""Parameters with normal initial values, which cost nothing where a module is built on the meta device to be filled
from a file: normal_ on a meta tensor is written in Python and loads torch._dynamo and sympy, over a second of start-up.
"""

from __future__ import annotations

import torch
from torch import nn


def normal_parameter(*shape: int, std: float) -> nn.Parameter:
    """A parameter drawn from N(0, std^2)."""
    values = torch.empty(*shape)
    return nn.Parameter(values if values.is_meta else values.normal_(std=std))


class Embedding(nn.Embedding):
    """nn.Embedding: the same parameter and the same result."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()
