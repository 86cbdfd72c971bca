"""Stands in for fastvid.ops.shapes."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def shape_class(op: str, args: Any, kwargs: Any) -> str:
    tensors = [one for one in args if isinstance(one, Tensor)]
    octave = tensors[0].numel().bit_length() - 1
    if op == "attention":
        return f"{'self' if tensors[0].shape[1] == tensors[1].shape[1] else 'cross'} d{tensors[0].shape[-1]} 2^{octave}"
    weight = next((one for one in tensors[1:] if one.ndim in (2, 4, 5) and op != "solver_step"), None)
    widths = "x".join(map(str, weight.shape)) if weight is not None else str(tensors[0].shape[-1])
    return f"{widths} 2^{octave}"
