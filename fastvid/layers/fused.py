"""Linear layers with the same input as one matrix product, saved and loaded under the names of the single layers.

There is one parameter to compute with, train, move and offload, and one entry a layer in a state dict.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastvid.layers.branches import Branch


class FusedLinear(nn.Module):
    """`count` linear layers as one: weight [count * outputs, inputs] and bias [count * outputs], layer after layer.

    It saves and loads nothing itself. Each of `layers()` saves and loads its own rows, under the name that it is
    registered by. branch: what LoRAs add to it at the moment.
    """

    branch: Branch | None = None

    def __init__(self, inputs: int, outputs: int, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count * outputs, inputs))
        self.bias = nn.Parameter(torch.empty(count * outputs))
        self.count = count
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initializes as nn.Linear does, in the order in which single layers would draw."""
        if self.weight.is_meta:
            return
        bound = 1 / math.sqrt(self.weight.shape[1])
        with torch.no_grad():
            for weight, bias in zip(self.weight.chunk(self.count), self.bias.chunk(self.count), strict=True):
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
                bias.uniform_(-bound, bound)

    def layers(self) -> tuple[FusedLayer, ...]:
        """The single layers, for loading and saving."""
        return tuple(FusedLayer(self, number) for number in range(self.count))

    def put(self, name: str, number: int, rows: Tensor, assign: bool) -> None:
        """Fills one layer's rows of "weight" or "bias". assign: the parameter takes the rows' type and device, as in
        load_state_dict(assign=True); else the rows are converted."""
        own = getattr(self, name)
        if assign and (own.dtype, own.device) != (rows.dtype, rows.device):
            fresh = torch.empty(own.shape, dtype=rows.dtype, device=rows.device)
            if not own.is_meta and not fresh.is_meta:
                fresh.copy_(own.detach())  # of the other layers
            own = nn.Parameter(fresh, own.requires_grad)
            setattr(self, name, own)
        with torch.no_grad():
            own.chunk(self.count)[number].copy_(rows)

    def _save_to_state_dict(self, *_: Any) -> None:
        pass

    def _load_from_state_dict(self, *_: Any) -> None:
        pass


class FusedLayer(nn.Module):
    """One layer of a FusedLinear in a state dict: its "weight" and "bias" are views of the fused ones."""

    def __init__(self, whole: FusedLinear, number: int) -> None:
        super().__init__()
        self._whole, self.number = (whole,), number  # in a tuple: it is no child of this module

    @property
    def whole(self) -> FusedLinear:
        return self._whole[0]

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        for name, parameter in self._whole[0].named_parameters():
            rows = parameter.chunk(self._whole[0].count)[self.number]
            destination[prefix + name] = rows if keep_vars else rows.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        (whole,) = self._whole
        known = dict(whole.named_parameters())
        for name, parameter in known.items():
            shape = (len(parameter) // whole.count, *parameter.shape[1:])
            rows = state_dict.get(prefix + name)
            if rows is None:
                missing_keys += [prefix + name] if strict else []
            elif tuple(rows.shape) != shape:
                error_msgs.append(f"size mismatch for {prefix + name}: {list(rows.shape)} for {list(shape)}")
            else:
                whole.put(name, self.number, rows, local_metadata.get("assign_to_params_buffers", False))
        if strict:
            unexpected_keys += [key for key in state_dict if key.startswith(prefix) and key[len(prefix) :] not in known]
