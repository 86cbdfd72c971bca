"""Linear layers with their bias, and GELU in its tanh form, in one pass: `linear`, `linear_gelu_tanh`.

`reference.py` has the meaning; `triton` is kernels/linear_gelu.py, which sums in fp32 and rounds once, after the GELU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fastvid.ops import reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@torch.library.custom_op("fastvid::linear_triton", mutates_args=())
def linear_triton(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The Triton kernel."""
    return _launch(x, weight, bias, gelu=False)


@torch.library.custom_op("fastvid::linear_gelu_tanh_triton", mutates_args=())
def linear_gelu_tanh_triton(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The Triton kernel, GELU in its epilogue."""
    return _launch(x, weight, bias, gelu=True)


BACKENDS: Mapping[str, Mapping[str, Callable[..., Tensor]]] = {
    "linear": {"reference": reference.linear, "triton": linear_triton},
    "linear_gelu_tanh": {"reference": reference.linear_gelu_tanh, "triton": linear_gelu_tanh_triton},
}


def _launch(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    from fastvid.kernels.linear_gelu import linear as run

    out = _empty(x, weight, bias)
    # Rows that cannot be seen as one matrix (a slice of a batch, say) are copied.
    rows = out.shape[:-1].numel()
    run(x.reshape(rows, x.shape[-1]), weight, bias, out.view(rows, out.shape[-1]), gelu)
    return out


@linear_triton.register_fake
@linear_gelu_tanh_triton.register_fake
def _empty(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The result, not filled in. Raises ValueError for what does not fit together."""
    _check(x, weight, bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    given = [tensor for tensor in (x, weight, bias) if tensor is not None]
    fits = x.ndim >= 1 and weight.ndim == 2 and x.shape[-1] == weight.shape[1] and x.dtype in DTYPES
    if not fits or (bias is not None and bias.shape != weight.shape[:1]) or len({t.dtype for t in given}) > 1:
        raise ValueError(
            "linear takes x [..., K], weight [n, K] and bias [n] of one type, float32, float16 or bfloat16, not "
            + ", ".join(f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in given)
        )
