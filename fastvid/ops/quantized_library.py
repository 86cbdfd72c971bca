"""Back ends of `linear_quantized`.

library   PyTorch's libraries: oneDNN on CPUs (quantized_cpu.py), cuBLAS and 8-bit products on GPUs (quantized_gpu.py)
triton    kernels/linear_quantized.py, which reads weights as their files have them, and linear_eight.py
cuda      csrc/dequantize.cu before a library's product (quantized_cuda.py)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastvid.errors import BackendUnavailable
from fastvid.ops import eight_bits, quantized_cpu, quantized_cuda, quantized_gpu, reference
from fastvid.ops.quantized import Activations, QuantizedRows, QuantizedTensor, Spec


def library(
    x: Activations,
    weight: QuantizedTensor,
    bias: Tensor | None = None,
    gelu: bool = False,
    rows: str | None = None,
) -> Activations:
    """reference.linear_quantized."""
    run = LINEARS.get(x.device.type, reference.linear_quantized)
    if torch.is_grad_enabled() and x.requires_grad:
        run = reference.linear_quantized
    return run(x, weight, bias, gelu, rows)


def packs(ops: Any, spec: Spec, device: torch.device) -> bool:
    """Whether a weight gets the form that its product takes (`quantized_cpu.pack`) when its layer is filled: if
    `library` computes it, on the device where the weight is."""
    there = getattr(ops, "device", None) == device == torch.device("cpu")
    return there and getattr(ops, "linear_quantized", None) is library and quantized_cpu.packs(spec)


def triton(
    x: Activations,
    weight: QuantizedTensor,
    bias: Tensor | None = None,
    gelu: bool = False,
    rows: str | None = None,
) -> Activations:
    """The Triton kernels. Raises BackendUnavailable for formats that have none."""
    if torch.is_grad_enabled() and x.requires_grad:
        return reference.linear_quantized(x, weight, bias, gelu, rows)
    out = torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device)
    _triton(x, weight, bias, gelu, out)
    return out if rows is None else QuantizedRows(rows, *eight_bits.quantize_rows_triton(out, rows), out.dtype)


def _triton(x: Activations, weight: QuantizedTensor, bias: Tensor | None, gelu: bool, out: Tensor) -> None:
    from fastvid.kernels import linear_eight, linear_quantized

    (N, K), data = weight.shape, weight.plain.data
    given = bias, out.view(-1, N), gelu
    if isinstance(x, QuantizedRows):
        x.check(weight)
        linear_eight.multiply_rows(x.flat(), weight.format, data, *given)
        return
    rows = x.reshape(-1, K).contiguous()
    if weight.eight_bit:
        linear_eight.linear_eight(rows, weight.format, data, weight.rotation, *given)
    elif weight.rotation or weight.format not in linear_quantized.FORMATS:
        what = f"rotated {weight.format}" if weight.rotation else weight.format
        raise BackendUnavailable(
            f"Triton has no kernel for {what} weights, only for {', '.join(linear_quantized.FORMATS)}: ask for "
            "linear_quantized=library"
        )
    else:
        linear_quantized.linear(rows, weight.format, data, *given)


LINEARS: Mapping[str, Callable[..., Activations]] = {"cpu": quantized_cpu.linear, "cuda": quantized_gpu.linear}
"""Kind of device -> what runs there."""


def described(device: torch.device) -> str:
    """What `library` runs on a device, in words."""
    if device.type == "cuda":
        return "cuBLAS; 8-bit products of PyTorch where they prove right"
    why = quantized_cpu.why_not_bytes()
    return "oneDNN" if why is None else f"oneDNN; 8-bit products by values: {why}"


BACKENDS: Mapping[str, Mapping[str, Callable[..., Any]]] = {
    "linear_quantized": {
        "reference": reference.linear_quantized,
        "library": library,
        "triton": triton,
        "cuda": quantized_cuda.linear,
    },
}
