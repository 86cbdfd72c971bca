"""Quantized weights by csrc/dequantize.cu: strips of rows become numbers on the GPU, which cuBLAS multiplies.

A strip takes a small share of its product's time: 5120 x 13824 weights are 0.2 GB of memory moved, and a product with
32,760 tokens is 4.6 TFLOP.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvid.errors import BackendUnavailable
from fastvid.ops import formats_blocks
from fastvid.ops.quantized import Activations, QuantizedRows, QuantizedTensor, rotate

# As csrc/dequantize_call.h numbers them.
NUMBERS: Mapping[str, int] = {
    name: number
    for number, name in enumerate(
        (
            *("fp8_e4m3", "fp8_e5m2", "int8", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl"),
            *("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs", "mxfp8", "nvfp4", "nvfp4_low", "nf4", "nf4_double"),
        )
    )
} | {"fp4": 18, "fp4_double": 19}
STRIP = 2**26  # weights that are numbers at once: 128 MiB in 16 bits
Dequantize = Callable[..., None]


def matrix_of(weight: QuantizedTensor, start: int, stop: int) -> dict[str, int]:
    """Rows start to stop - 1 of a weight, as `fastvid._C.dequantize` takes them: addresses and sizes."""
    data, columns = weight.data, weight.shape[1]
    codes, scale = data["codes"], data.get("scale")
    scales = 1
    if weight.format in ("mxfp8", "nvfp4", "nvfp4_low"):
        group = 32 if weight.format == "mxfp8" else 16
        scales = -(-columns // group)
    elif "map" in data:
        scales = formats_blocks.block_of(data, weight.shape).bit_length() - 1
    elif scale is not None:
        scales = scale.numel()
    values = data.get("map", data.get("scale_2"))
    nested = {name: data.get(name) for name in ("nested_map", "nested_scale", "nested_offset")}
    tensors = {"codes": codes, "scale": scale, "values": values, **nested}
    sizes = {"start": start, "rows": stop - start, "columns": columns, "scales": scales}
    sizes["row_bytes"] = codes.stride(0) if codes.ndim == 2 else 0
    return sizes | {name: 0 if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()}


def dequantize(weight: QuantizedTensor, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Rows start to stop - 1 of a weight, in dtype; the same bits as its format's `dequantize`."""
    device = weight.device
    out = torch.empty((stop - start, weight.shape[1]), dtype=dtype, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream
    _run(importlib.import_module("fastvid._C").dequantize, weight, start, out, device.index or 0, stream)
    return out


def dequantize_host(weight: QuantizedTensor, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """The same on a CPU, to test its arithmetic and index maths."""
    out = torch.empty((stop - start, weight.shape[1]), dtype=dtype, device="cpu")
    _run(importlib.import_module("fastvid._C").dequantize_host, weight, start, out)
    return out


def _run(function: Dequantize, weight: QuantizedTensor, start: int, out: Tensor, *where: int) -> None:
    function(
        NUMBERS[weight.format],
        matrix_of(weight, start, start + len(out)),
        out.data_ptr(),
        str(out.dtype).removeprefix("torch."),
        *where,
    )


def linear(
    x: Activations,
    weight: QuantizedTensor,
    bias: Tensor | None = None,
    gelu: bool = False,
    rows: str | None = None,
) -> Tensor:
    """`linear_quantized` with exact products. A rotated weight is rotated in fp32, as the reference does."""
    if weight.eight_bit or rows is not None or isinstance(x, QuantizedRows):
        raise BackendUnavailable("linear_quantized=cuda computes no products in 8 bits; ask for library")
    N, K = weight.shape
    y, strip = x.new_empty((*x.shape[:-1], N)), max(1, STRIP // K)
    for start in range(0, N, strip):
        stop = min(start + strip, N)
        part = F.linear(x, _rows(weight, start, stop, x.dtype), None if bias is None else bias[start:stop])
        y[..., start:stop] = F.gelu(part, approximate="tanh") if gelu else part
    return y


def _rows(weight: QuantizedTensor, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    if not weight.rotation:
        return dequantize(weight, start, stop, dtype)
    return rotate(dequantize(weight, start, stop, torch.float32), weight.rotation).to(dtype)
