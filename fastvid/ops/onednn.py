"""Linear layers by oneDNN's routines on CPUs, which torch.compile also calls.

On x86 CPUs F.linear calls MKL in fp32, which is 10 to 20 % slower on AMD than oneDNN in the same wheel; and oneDNN
applies bias and GELU while results are in the cache. Both are IEEE fp32 (relative errors of 2e-7 and 4e-7).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

# Undocumented, so a release of torch may drop or rename them.
NAMES = ("_linear_pointwise", "_reorder_linear_weight", "_convolution_pointwise", "_reorder_convolution_weight")
# Below this many rows the start-up of a oneDNN call (10 us) costs more than it gains.
MIN_ROWS = 64
GELU_TANH = ("gelu", "tanh")


def available() -> bool:
    """Whether all routines exist and oneDNN is not disabled (torch.backends.mkldnn.flags). Not while torch.compile
    traces: it finds its own way to oneDNN from plain operations, and cannot lower these."""
    return not torch.compiler.is_compiling() and bool(torch.backends.mkldnn.enabled) and _built_in()


@functools.cache
def _built_in() -> bool:
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in NAMES)


def applies(x: Tensor, weight: Tensor) -> bool:
    """Whether F.linear would call MKL and oneDNN can replace it: fp32 on an x86 CPU, without gradients."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() >= MIN_ROWS * x.shape[-1]
        and not needs_gradients(x, weight)
        and available()
        and torch.backends.mkl.is_available()
    )


def fuses(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN, which F.linear calls for bf16 anyway, can apply GELU to its fp32 sums: one rounding and two
    passes over memory less, 1.15 times as fast at 1,950 x 1,536 x 8,960."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.bfloat16
        and x.numel() >= MIN_ROWS * x.shape[-1]
        and not needs_gradients(x, weight)
        and available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def needs_gradients(x: Tensor, weight: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: tuple[str, str] = ("none", "")) -> Tensor:
    """A linear layer and perhaps an activation (GELU_TANH). weight: [n, K], or as `pack` gives it."""
    # What torch.compile emits for a linear layer on the CPU; the same signature since torch 2.0.
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation[0], [], activation[1])


def pack(weight: Tensor) -> Tensor:
    """weight [n, K] in the blocks that oneDNN multiplies, as a tensor that only `linear` understands."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
