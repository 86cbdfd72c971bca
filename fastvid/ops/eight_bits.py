"""Back ends of `quantize_rows` and `quantized_norm`: activations as 8-bit products take them, made once for all layers
that read them, and in the pass of the norm before.

library   on CPUs in pieces that stay in the cache (quantized_cpu.py); on GPUs one compiled pass with the norm
triton    kernels/linear_eight.py and the end of kernels/row_norms.py
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastvid.ops import compiled, compiling, formats_rows, quantized_cpu, quantized_gpu, reference
from fastvid.ops.formats_rows import FLOATS, INT8

Pair = tuple[Tensor, Tensor]
Triple = tuple[Tensor, Tensor, Tensor]


# ---------------------------------------------------------------- libraries


def quantize_rows(x: Tensor, format: str, rotation: int = 0) -> Pair:
    """reference.quantize_rows."""
    if x.device.type == "cpu":
        return quantized_cpu.quantize_rows(x, format, rotation)
    if x.device.type == "cuda":
        return quantized_gpu.quantize_rows(x, format, rotation)
    return reference.quantize_rows(x, format, rotation)


def quantized_norm(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    index: Tensor | None,
    eps: float,
    format: str,
) -> Triple:
    """reference.quantized_norm."""
    given = x, y, gate, shift, scale, index, eps, format
    modulated = scale.ndim == 2
    form = None if index is None else (y is not None, gate is not None, modulated)
    if x.device.type != "cuda" or form not in BODIES or compiling.why_not(x.device):
        return _eager(*given)
    tokens = [one for one in (x, y) if one is not None]
    rows = [one for one in (gate, *((shift, scale) if modulated else ())) if one is not None]
    more = () if modulated else (scale, shift)

    def eager(*_: Any) -> tuple[Tensor, ...]:
        return _eager(*given)[y is None :]

    assert index is not None
    made: tuple[Tensor, ...] = compiled.by_rows(eager, BODIES[form], tokens, rows, index, eps, format, more=more)
    total, codes, scales = made if y is not None else (x, *made)
    return total, codes, scales


def _eager(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    index: Tensor | None,
    eps: float,
    format: str,
) -> Triple:
    """The norm by the reference, and the codes of its result."""
    if x.device.type != "cpu":
        return reference.quantized_norm(x, y, gate, shift, scale, index, eps, format)
    x, normed = reference.norm_of_sum(x, y, gate, shift, scale, index, eps)
    return x, *quantized_cpu.quantize_rows(normed, format)


def _coded(normed: Tensor, format: str) -> Pair:
    return formats_rows.quantize(normed, format)


def _plain(*given: Any) -> Pair:
    *rest, format = given
    return _coded(compiled._modulated_layer_norm(*rest), format)


def _added(*given: Any) -> Triple:
    *rest, format = given
    total, normed = compiled._residual_norm(*rest)
    return total, *_coded(normed, format)


def _gated(*given: Any) -> Triple:
    *rest, format = given
    total, normed = compiled._gated_residual_norm(*rest)
    return total, *_coded(normed, format)


def _gated_layer(*given: Any) -> Triple:
    *rest, format = given
    total, normed = compiled._gated_residual_layer_norm(*rest)
    return total, *_coded(normed, format)


BODIES: Mapping[Any, Callable[..., Any]] = {
    (False, False, True): _plain,
    (True, False, True): _added,
    (True, True, True): _gated,
    (True, True, False): _gated_layer,
}
"""(whether something is added, gated, modulated) -> what is compiled for it."""


# ---------------------------------------------------------------- Triton


@torch.library.custom_op("fastvid::quantize_rows_triton", mutates_args=())
def _quantize_rows_triton(x: Tensor, format: str, rotation: int) -> Pair:
    from fastvid.kernels.linear_eight import quantize_rows as run

    codes, factors = run(x.reshape(-1, x.shape[-1]).contiguous(), format, rotation)
    return codes.view(x.shape), factors.view(*x.shape[:-1], 1)


@torch.library.custom_op("fastvid::quantized_norm_triton", mutates_args=())
def _quantized_norm_triton(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    index: Tensor | None,
    eps: float,
    format: str,
) -> Triple:
    from fastvid.kernels.codes import Codes
    from fastvid.kernels.row_norms import row_norm

    total, codes, factors = _norm_results(x, y, gate, shift, scale, index, eps, format)
    modulated = scale.ndim == 2
    used = index if modulated or gate is not None else None
    options: dict[str, Any] = {"weight": scale, "bias": shift, "index": used, "modulated": modulated}
    options |= {} if y is None else {"y": y, "gate": gate, "total": total}
    row_norm(x, Codes(codes, factors), eps=eps, **options)
    return total, codes, factors


@_quantize_rows_triton.register_fake
def _codes_of(x: Tensor, format: str, rotation: int = 0) -> Pair:
    codes = torch.empty(x.shape, dtype=torch.int8 if format == INT8 else torch.uint8, device=x.device)
    return codes, torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)


@_quantized_norm_triton.register_fake
def _norm_results(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    index: Tensor | None,
    eps: float,
    format: str,
) -> Triple:
    total = torch.empty((0,) if y is None else x.shape, dtype=x.dtype, device=x.device)
    return total, *_codes_of(x, format)


def _typed(codes: Tensor, format: str) -> Tensor:
    return codes if format == INT8 else codes.view(FLOATS[format])


def quantize_rows_triton(x: Tensor, format: str, rotation: int = 0) -> Pair:
    """The Triton kernel."""
    codes, scale = _quantize_rows_triton(x, format, rotation)
    return _typed(codes, format), scale


def quantized_norm_triton(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    index: Tensor | None,
    eps: float,
    format: str,
) -> Triple:
    """The Triton kernel: a row stays in registers from the first read to the codes."""
    total, codes, factors = _quantized_norm_triton(x, y, gate, shift, scale, index, eps, format)
    return x if y is None else total, _typed(codes, format), factors


BACKENDS: Mapping[str, Mapping[str, Callable[..., Any]]] = {
    "quantize_rows": {
        "reference": reference.quantize_rows,
        "library": quantize_rows,
        "triton": quantize_rows_triton,
    },
    "quantized_norm": {
        "reference": reference.quantized_norm,
        "library": quantized_norm,
        "triton": quantized_norm_triton,
    },
}
