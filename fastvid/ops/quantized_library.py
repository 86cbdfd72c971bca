"""Back ends of `linear_quantized`: "library", PyTorch's libraries, for what they have here.

CPUs    quantized_cpu.py: oneDNN
CUDA    quantized_gpu.py: cuBLAS and what PyTorch has beside it
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastvid.ops import quantized_cpu, reference
from fastvid.ops.quantized import QuantizedTensor


def library(x: Tensor, weight: QuantizedTensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """reference.linear_quantized."""
    if x.device.type == "cpu" and not (torch.is_grad_enabled() and x.requires_grad):
        return quantized_cpu.linear(x, weight, bias, gelu)
    return reference.linear_quantized(x, weight, bias, gelu)


def described(device: torch.device) -> str:
    """What `library` runs on a device, in words."""
    if device.type != "cpu":
        return "PyTorch's libraries"
    why = quantized_cpu.why_not_bytes()
    return "oneDNN" if why is None else f"oneDNN; 8-bit products by values: {why}"


BACKENDS: Mapping[str, Mapping[str, Callable[..., Any]]] = {
    "linear_quantized": {"reference": reference.linear_quantized, "library": library},
}
