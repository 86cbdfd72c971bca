"""`linear_quantized` on CPUs: dequantized strips of the weight, or 8-bit products by oneDNN.

exact    strips of rows are dequantized into one buffer, which stays in the cache, and multiplied at once, with bias and
         GELU in the product
int8     blocks of activations are quantized while they are in the cache, and multiplied by oneDNN's product of bytes;
         their zero point is 128, because signed activations take a loop that is a thousand times slower. oneDNN wants
         the codes in blocks of its own (`pack`): they take the place of the plain ones (`QuantizedTensor.keep`)
fp8      and int8 where oneDNN's product is not exact: the same sums, of codes as 16 or 32-bit floats
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvid.ops import formats_rows, onednn
from fastvid.ops.formats_rows import INT8, SMALLEST
from fastvid.ops.quantized import QuantizedTensor, rotate

PRODUCT = 2**20  # weights that are multiplied at once
FILL = 2**19  # weights that are dequantized at once
QUANTIZE = 2**17  # activations that are quantized at once
SUMS = 2**21  # sums of 8-bit products that are computed at once
ROWS = 2048  # activations whose values are held at once, where products are those of values
ZERO = 128


def linear(x: Tensor, weight: QuantizedTensor, bias: Tensor | None, gelu: bool) -> Tensor:
    """quantized.linear, without gradients."""
    N, K = weight.shape
    y = x.new_empty((*x.shape[:-1], N))
    if y.numel() == 0:
        return y
    rows, out = x.reshape(-1, K), y.view(-1, N)
    if not weight.eight_bit:
        _exact(rows, weight, bias, gelu, out)
    elif weight.format == INT8 and why_not_bytes() is None:
        _bytes(rows, weight, bias, gelu, out)
    else:
        _values(rows, weight, bias, gelu, out)
    return y


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


def _packed(weight: QuantizedTensor) -> Tensor:
    codes = weight.data["codes"]
    if codes.is_mkldnn:
        return codes
    packed = pack(codes)
    if weight.keep is not None:
        weight.keep("codes", packed)
    return packed


def _bytes(x: Tensor, weight: QuantizedTensor, bias: Tensor | None, gelu: bool, out: Tensor) -> None:
    (M, K), N, packed = x.shape, weight.shape[0], _packed(weight)
    scale, added = weight.data["scale"].expand(N).contiguous(), None if bias is None else bias.float()
    size = min(M, max(128, SUMS // N // 64 * 64))
    codes, factors = torch.empty((size, K), dtype=torch.int8), torch.empty((size, 1), dtype=torch.float32)
    for start in range(0, M, size):
        stop = min(start + size, M)
        count = stop - start
        quantize(x[start:stop], weight, codes[:count], factors[:count])
        sums = multiply(codes[:count], packed, scale)
        finish(sums.mul_(factors[:count]), added, gelu, out[start:stop])


def quantize(x: Tensor, weight: QuantizedTensor, codes: Tensor, factors: Tensor) -> None:
    """quantized.quantized_rows of x [M, K]: the same numbers, in pieces that stay in the cache. The codes' values go
    into codes [M, K], of any type that holds them, and the scales into factors [M, 1]."""
    step = max(1, QUANTIZE // x.shape[1])
    buffer = torch.empty((min(step, len(x)), x.shape[1]), dtype=torch.float32)
    for start in range(0, len(x), step):
        part = buffer[: min(step, len(x) - start)]
        part.copy_(x[start : start + step])
        part = rotate(part, weight.rotation) if weight.rotation else part
        factor = factors[start : start + step]
        torch.maximum(part.amax(-1, keepdim=True), part.amin(-1, keepdim=True).neg_(), out=factor)
        factor.clamp_(min=SMALLEST).div_(formats_rows.LARGEST[weight.format])
        part.div_(factor)
        codes[start : start + step] = part.round_() if weight.format == INT8 else _to_e4m3(part)


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


def finish(sums: Tensor, bias: Tensor | None, gelu: bool, out: Tensor) -> None:
    """Bias and GELU of fp32 [M, N], rounded into out. Overwrites sums."""
    if bias is not None:
        sums.add_(bias)
    if not gelu:
        out.copy_(sums)
        return
    step = max(1, QUANTIZE // sums.shape[1])
    for start in range(0, len(sums), step):
        y = sums[start : start + step]
        # y sigmoid(2 u), u = sqrt(2 / pi) (y + 0.044715 y^3): as y / 2 (1 + tanh u), in half of the time
        turn = (y * y).mul_(0.07135481627159729).add_(1.5957691216057308).mul_(y).sigmoid_()
        out[start : start + step] = turn.mul_(y)


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


def _values(x: Tensor, weight: QuantizedTensor, bias: Tensor | None, gelu: bool, out: Tensor) -> None:
    """Codes have at most 8 bits, so bf16 holds their values."""
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    weight = weight.plain
    values = QuantizedTensor(
        weight.format, weight.shape, {**weight.data, "scale": torch.ones(1, dtype=torch.float32)}, dtype
    )
    scale, added = weight.data["scale"].expand(weight.shape[0]), None if bias is None else bias.float()
    size = min(ROWS, len(x))
    held, factors = torch.empty((size, x.shape[1]), dtype=dtype), torch.empty((size, 1), dtype=torch.float32)
    for begin in range(0, len(x), size):
        count = min(size, len(x) - begin)
        codes, factor, rows = held[:count], factors[:count], out[begin : begin + count]
        quantize(x[begin : begin + count], weight, codes, factor)
        for start, stop, part in _strips(values, dtype):
            sums = F.linear(codes, part).float().mul_(factor).mul_(scale[start:stop])
            finish(sums, None if added is None else added[start:stop], gelu, rows[:, start:stop])
