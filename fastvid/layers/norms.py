"""The norms in front of a block's linear layers, which write what those take: tensors, or codes for 8-bit products.

Shapes: see `ops.reference`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from fastvid.layers.quantized import takes_rows
from fastvid.ops.quantized import Activations, QuantizedRows


class Norm(NamedTuple):
    """A layer norm: LN(s) * (1 + scale) + shift with scale and shift [K, d], LN(s) * scale + shift with [d]. rows
    [B, G]: the row of each group of tokens."""

    shift: Tensor
    scale: Tensor
    rows: Tensor
    eps: float


def normed(
    ops: Any, layer: nn.Module, x: Tensor, y: Tensor | None, gate: Tensor | None, norm: Norm
) -> tuple[Tensor, Activations]:
    """(s, its norm as `layer` takes it) with s = x, x + y, or x + y * gate."""
    shift, scale, index, eps = norm
    if (format := takes_rows(layer, x)) is not None:
        total, codes, scales = ops.quantized_norm(x, y, gate, shift, scale, index, eps, format)
        return total, QuantizedRows(format, codes, scales, x.dtype)
    made: tuple[Tensor, Tensor]
    if y is None:
        return x, ops.modulated_layer_norm(x, shift, scale, index, eps)
    if gate is None:
        made = ops.residual_norm(x, y, shift, scale, index, eps)
    elif scale.ndim == 1:
        made = ops.gated_residual_layer_norm(x, y, gate, index, scale, shift, eps)
    else:
        made = ops.gated_residual_norm(x, y, gate, shift, scale, index, eps)
    return made
