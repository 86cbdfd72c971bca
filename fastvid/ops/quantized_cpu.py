"""`linear_quantized` on CPUs: dequantized strips of the weight, or 8-bit products by oneDNN.

exact    strips of rows are dequantized into one buffer, which stays in the cache, and multiplied at once, with bias and
         GELU in the product
int8     blocks of activations are quantized while they are in the cache, and multiplied by oneDNN's product of bytes;
         their zero point is 128, because signed activations take a loop that is a thousand times slower. Scales, bias,
         GELU and the codes of the next product are made of its sums while those are in the cache. oneDNN wants the
         weight's codes in blocks of its own (`pack`): they take the place of the plain ones (`QuantizedTensor.keep`)
fp8      and int8 where oneDNN's product is not exact: the same sums, of codes as 16 or 32-bit floats
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvid.ops import formats_rows, onednn
from fastvid.ops.formats_rows import INT8, SMALLEST
from fastvid.ops.quantized import Activations, QuantizedRows, QuantizedTensor, Spec, rotate

PRODUCT = 2**20  # weights that are multiplied at once
FILL = 2**19  # weights that are dequantized at once
QUANTIZE = 2**17  # activations that are quantized, and sums that are finished, at once
SUMS = 2**21  # sums of 8-bit products that are computed at once
ROWS = 2048  # activations whose values are held at once, where products are those of values
ZERO = 128


def linear(
    x: Activations, weight: QuantizedTensor, bias: Tensor | None, gelu: bool, rows: str | None = None
) -> Activations:
    """quantized.linear, without gradients."""
    N, K = weight.shape
    if isinstance(x, QuantizedRows):
        x.check(weight)
    in_bytes = weight.eight_bit and weight.format == INT8 and why_not_bytes() is None
    if rows == INT8 and in_bytes:
        return _to_rows(x, weight, bias, gelu)
    y = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)
    if y.numel():
        out = y.view(-1, N)
        if in_bytes:
            _bytes(x, weight, Finish(bias, gelu), out)
        elif weight.eight_bit:
            _values(x, weight, bias, gelu, out)
        else:
            assert isinstance(x, Tensor)
            _exact(x.reshape(-1, K), weight, bias, gelu, out)
    return y if rows is None else QuantizedRows(rows, *quantize_rows(y, rows), y.dtype)


def quantize_rows(x: Tensor, format: str, rotation: int = 0) -> tuple[Tensor, Tensor]:
    """quantized.quantize_rows: the same numbers."""
    codes = torch.empty(x.shape, dtype=torch.int8 if format == INT8 else torch.float32, device=x.device)
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    if x.numel():
        flat = x.reshape(-1, x.shape[-1])
        quantize(flat, format, rotation, codes.view(flat.shape), scale.view(-1, 1))
    return (codes if format == INT8 else codes.to(formats_rows.FLOATS[format])), scale


# ---------------------------------------------------------------- dequantized weights


def _exact(x: Tensor, weight: QuantizedTensor, bias: Tensor | None, gelu: bool, out: Tensor) -> None:
    fused, activation = _fuses(x), onednn.GELU_TANH if gelu else ("none", "")
    for start, stop, part in _strips(weight.plain, x.dtype):
        added = None if bias is None else bias[start:stop]
        if fused:
            out[:, start:stop] = onednn.linear(x, part, added, activation)
        else:
            made = F.linear(x, part, added)
            out[:, start:stop] = F.gelu(made, approximate="tanh") if gelu else made


def _fuses(x: Tensor) -> bool:
    """Whether oneDNN multiplies in this type here."""
    if not onednn.available() or x.dtype == torch.float16:
        return False
    return x.dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _strips(weight: QuantizedTensor, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    """(start, stop, these rows of the weight), one after the other in the same memory."""
    N, K = weight.shape
    size = min(N, max(64, PRODUCT // K // 64 * 64))
    buffer = torch.empty((size, K), dtype=dtype, device="cpu")
    step = max(1, FILL // K)
    for start in range(0, N, size):
        stop = min(start + size, N)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            buffer[first - start : last - start] = weight.rows(first, last, torch.float32)
        yield start, stop, buffer[: stop - start]


# ---------------------------------------------------------------- products of bytes


def pack(codes: Tensor) -> Tensor:
    """int8 [N, K] in oneDNN's blocks."""
    return torch.ops.onednn.qlinear_prepack(codes.detach(), None)


def packs(spec: Spec) -> bool:
    """Whether products with a weight are of bytes."""
    return spec.eight_bit and spec.format == INT8 and why_not_bytes() is None


def _packed(weight: QuantizedTensor) -> Tensor:
    codes = weight.data["codes"]
    if codes.is_mkldnn:
        return codes
    packed = pack(codes)
    if weight.keep is not None:
        weight.keep("codes", packed)
    return packed


@dataclass(frozen=True)
class Finish:
    """What is done with sums: bias [N], GELU."""

    bias: Tensor | None
    gelu: bool

    def __call__(self, sums: Tensor, factors: Tensor | None, out: Tensor) -> None:
        """Sums fp32 [M, N], times factors [M, 1], rounded into out [M, N]. Overwrites sums. In pieces that stay in the
        cache."""
        bias = None if self.bias is None else self.bias.float()
        step = max(1, QUANTIZE // sums.shape[1])
        turn = torch.empty((min(step, len(sums)), sums.shape[1]), dtype=torch.float32, device=sums.device)
        first = torch.full_like(turn, 1.5957691216057308) if self.gelu else turn
        for start in range(0, len(sums), step):
            y = sums[start : start + step]
            if factors is not None:
                y.mul_(factors[start : start + step])
            if bias is not None:
                y.add_(bias)
            if self.gelu:
                # y sigmoid(2 u), u = sqrt(2 / pi) (y + 0.044715 y^3): as y / 2 (1 + tanh u), in half of the time
                part = turn[: len(y)]
                torch.addcmul(first[: len(y)], y, y, value=0.07135481627159729, out=part)
                y = part.mul_(y).sigmoid_().mul_(y)
            out[start : start + step] = y


def _bytes(x: Activations, weight: QuantizedTensor, finish: Finish, out: Tensor) -> None:
    for start, stop, sums, factors in _sums(x, weight):
        finish(sums, factors, out[start:stop])


def _to_rows(x: Activations, weight: QuantizedTensor, bias: Tensor | None, gelu: bool) -> QuantizedRows:
    """The result's rows as codes: a block of it is quantized while it is in the cache."""
    N = weight.shape[0]
    codes = torch.empty((*x.shape[:-1], N), dtype=torch.int8, device=x.device)
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    held, out, finish = codes.view(-1, N), scale.view(-1, 1), Finish(bias, gelu)
    if codes.numel():
        for start, _, sums, factors in _sums(x, weight):
            step = max(1, QUANTIZE // N)
            part = torch.empty((min(step, len(sums)), N), dtype=x.dtype, device=x.device)
            for first in range(0, len(sums), step):
                last = min(first + step, len(sums))
                rounded = part[: last - first]
                finish(sums[first:last], factors[first:last], rounded)
                to = slice(start + first, start + last)
                quantize(rounded, INT8, 0, held[to], out[to])
    return QuantizedRows(INT8, codes, scale, x.dtype)


def _sums(x: Activations, weight: QuantizedTensor) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """(start, stop, sums fp32 of these rows with the columns' scales, factors of the rows)."""
    N, packed = weight.shape[0], _packed(weight)
    scale = weight.data["scale"].expand(N).contiguous()
    for start, stop, codes, factors in _blocks(x, weight, max(128, SUMS // N // 64 * 64), torch.int8):
        yield start, stop, multiply(codes, packed, scale), factors


def _blocks(
    x: Activations, weight: QuantizedTensor, size: int, dtype: torch.dtype
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """(start, stop, codes of these rows, factors), one after the other in the same memory. Codes may be overwritten."""
    given = x.flat() if isinstance(x, QuantizedRows) else None
    rows = x.reshape(-1, weight.shape[1]) if isinstance(x, Tensor) else x.flat()[0]
    size = min(size, len(rows))
    codes = torch.empty((size, rows.shape[1]), dtype=dtype)
    factors = torch.empty((size, 1), dtype=torch.float32)
    for start in range(0, len(rows), size):
        stop = min(start + size, len(rows))
        own, factor = codes[: stop - start], factors[: stop - start]
        if given is None:
            quantize(rows[start:stop], weight.format, weight.rotation, own, factor)
        else:
            own.copy_(rows[start:stop])
            factor = given[1][start:stop]
        yield start, stop, own, factor


def quantize(x: Tensor, format: str, rotation: int, codes: Tensor, factors: Tensor) -> None:
    """quantized.quantize_rows of x [M, K]: the same numbers, in pieces that stay in the cache. The codes' values go
    into codes [M, K], of any type that holds them, and the scales into factors [M, 1]."""
    step = max(1, QUANTIZE // x.shape[1])
    buffer = torch.empty((min(step, len(x)), x.shape[1]), dtype=torch.float32)
    for start in range(0, len(x), step):
        part = buffer[: min(step, len(x) - start)]
        part.copy_(x[start : start + step])
        part = rotate(part, rotation) if rotation else part
        factor = factors[start : start + step]
        torch.maximum(part.amax(-1, keepdim=True), part.amin(-1, keepdim=True).neg_(), out=factor)
        factor.clamp_(min=SMALLEST).div_(formats_rows.LARGEST[format])
        part.div_(factor)
        codes[start : start + step] = part.round_() if format == INT8 else _to_e4m3(part)


def _to_e4m3(x: Tensor) -> Tensor:
    """fp32 up to 448 -> the nearest values of e4m3, in place. PyTorch's conversion takes ten times as long on a CPU."""
    power = (x.view(torch.int32) & 0x7F800000).view(torch.float32)  # 2^floor(log2(|x|))
    far = power.clamp_(min=2.0**-6).mul_(1.5 * 2**20)  # numbers of this size are multiples of power / 8
    return x.add_(far).sub_(far)


def multiply(codes: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """codes [M, K] (int8; they are overwritten) x a packed weight -> fp32 [M, N], columns times scale [N]."""
    shifted = codes.view(torch.uint8).bitwise_xor_(ZERO)  # + 128
    zeros = torch.zeros(len(scale), dtype=torch.int32)
    form = (None, 1.0, 0, torch.float32, "none", list[float](), "")
    return torch.ops.onednn.qlinear_pointwise(shifted, 1.0, ZERO, packed, scale, zeros, *form)


@functools.cache
def why_not_bytes() -> str | None:
    """Why oneDNN does not multiply bytes here; None if it does, exactly. One run at both ends of the range: without
    VNNI pairs of products are rounded down to 16 bits."""
    if not onednn.available() or not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return f"torch {torch.__version__} has no onednn::qlinear_pointwise here"
    generator = torch.Generator().manual_seed(0)
    codes, weight = (torch.randint(-127, 128, (n, 96), generator=generator, dtype=torch.int8) for n in (33, 40))
    codes[:4], weight[:4] = 127, 127
    weight[4:8] = -127
    try:
        packed = pack(weight)
        made = multiply(codes.clone(), packed, torch.ones(len(weight), dtype=torch.float32))
        same = torch.equal(unpack(packed), weight) and torch.equal(made.long(), codes.long() @ weight.long().T)
    except (RuntimeError, TypeError) as error:
        return f"onednn::qlinear_pointwise fails here: {str(error).splitlines()[0]}"
    return None if same else "onednn::qlinear_pointwise is not exact here"


def unpack(packed: Tensor) -> Tensor:
    """What `pack` was given."""
    return packed.to_dense().t().contiguous()


# ---------------------------------------------------------------- products of the codes' values


def _values(x: Activations, weight: QuantizedTensor, bias: Tensor | None, gelu: bool, out: Tensor) -> None:
    """Codes have at most 8 bits, so bf16 holds their values."""
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    weight = weight.plain
    values = QuantizedTensor(
        weight.format, weight.shape, {**weight.data, "scale": torch.ones(1, dtype=torch.float32)}, dtype
    )
    scale = weight.data["scale"].expand(weight.shape[0])
    for begin, end, codes, factors in _blocks(x, weight, ROWS, dtype):
        for start, stop, part in _strips(values, dtype):
            sums = F.linear(codes, part).float().mul_(scale[start:stop])
            finish = Finish(None if bias is None else bias[start:stop], gelu)
            finish(sums, factors, out[begin:end, start:stop])
