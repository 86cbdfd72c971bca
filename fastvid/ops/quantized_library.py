"""Back ends of `linear_quantized`: "library", PyTorch's libraries, for what they have here, and csrc/'s
dequantization before them ("cuda").

CPUs    quantized_cpu.py: oneDNN
CUDA    quantized_gpu.py: cuBLAS and what PyTorch has beside it
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastvid.ops import quantized_cpu, quantized_cuda, quantized_gpu, reference
from fastvid.ops.quantized import QuantizedTensor


def library(x: Tensor, weight: QuantizedTensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """reference.linear_quantized."""
    run = LINEARS.get(x.device.type, reference.linear_quantized)
    if torch.is_grad_enabled() and x.requires_grad:
        run = reference.linear_quantized
    return run(x, weight, bias, gelu)


LINEARS: Mapping[str, Callable[..., Tensor]] = {"cpu": quantized_cpu.linear, "cuda": quantized_gpu.linear}
"""Kind of device -> what runs there."""


def described(device: torch.device) -> str:
    """What `library` runs on a device, in words."""
    if device.type == "cuda":
        return "cuBLAS; 8-bit products of PyTorch where they prove right"
    why = quantized_cpu.why_not_bytes()
    return "oneDNN" if why is None else f"oneDNN; 8-bit products by values: {why}"


BACKENDS: Mapping[str, Mapping[str, Callable[..., Any]]] = {
    "linear_quantized": {"reference": reference.linear_quantized, "library": library, "cuda": quantized_cuda.linear},
}
