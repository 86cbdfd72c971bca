"""`linear_quantized` on CUDA devices: PyTorch's 8-bit products where they have proved right, else dequantized strips.

int8    torch._int_mm: sums of whole numbers; more than 16 rows, N and K multiples of 8
fp8     torch._scaled_mm: sm_90 and newer with a scale for each row and column, sm_89 with one for all and the others
        after it; N and K multiples of 16
else    the weight, or with 8-bit products the values of codes, a strip of rows at a time, times the activations

What is done around the products is compiled where torch.compile can (compiling.py). The routines are undocumented, so
each is tried once on a device, next to double precision, before it counts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvid.ops import compiling, formats_rows
from fastvid.ops.formats_rows import E4M3, INT8
from fastvid.ops.quantized import Activations, QuantizedRows, QuantizedTensor, rotate

STRIP = 2**24  # weights that are dequantized at once
SUMS = 2**27  # sums that are held at once beside the result
FEWEST = 32  # rows of an 8-bit product; fewer are filled up
PER_ROW, PER_TENSOR = "a scale for each row", "one scale"
ALLOWED = {INT8: 0.0, E4M3: 1.1 * 2.0**-8}  # relative error of a row of sums: exact, and a rounding to bf16


def linear(
    x: Activations, weight: QuantizedTensor, bias: Tensor | None, gelu: bool, rows: str | None = None
) -> Activations:
    """quantized.linear, without gradients."""
    N, K = weight.shape
    if isinstance(x, QuantizedRows):
        x.check(weight)
    weight = weight.plain
    form = why_not(weight, x.device) if weight.eight_bit else "dequantized"
    if rows is not None and form is None and x.numel():
        return _to_rows(x, weight, Finish(bias, gelu, x.dtype, rows))
    y = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)
    if y.numel():
        out = y.view(-1, N)
        if form is None:
            _eight_bit(x, weight, Finish(bias, gelu, x.dtype), out)
        elif weight.eight_bit:
            _values(x, weight, Finish(bias, gelu, x.dtype), out)
        else:
            assert isinstance(x, Tensor)
            for start, stop, part in _strips(weight, x.dtype):
                made = F.linear(x.reshape(-1, K), part, None if bias is None else bias[start:stop])
                out[:, start:stop] = F.gelu(made, approximate="tanh") if gelu else made
    return y if rows is None else QuantizedRows(rows, *quantize_rows(y, rows), y.dtype)


def _strips(weight: QuantizedTensor, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    """(start, stop, these rows of the weight)."""
    N, K = weight.shape
    size = max(64, STRIP // K // 64 * 64)
    for start in range(0, N, size):
        yield start, min(start + size, N), weight.rows(start, min(start + size, N), dtype)


def _values(x: Activations, weight: QuantizedTensor, finish: Finish, out: Tensor) -> None:
    """bf16 holds the values of codes."""
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    one = torch.ones(1, dtype=torch.float32, device=x.device)
    values = QuantizedTensor(weight.format, weight.shape, {**weight.data, "scale": one}, dtype)
    size = max(1, SUMS // max(weight.shape))
    for begin, end, codes, factor in _blocks(x, weight, size):
        for start, stop, part in _strips(values, dtype):
            added = None if finish.bias is None else finish.bias[start:stop]
            sums, own = F.linear(codes.to(dtype), part), _columns(weight)[start:stop]
            out[begin:end, start:stop] = replace(finish, bias=added)(sums, (factor, own))


def _columns(weight: QuantizedTensor) -> Tensor:
    return weight.data["scale"].expand(weight.shape[0])


# ---------------------------------------------------------------- products in 8 bits


def why_not(weight: QuantizedTensor, device: torch.device) -> str | None:
    """Why an 8-bit product of PyTorch does not take a weight there; None if it does."""
    multiple = 8 if weight.format == INT8 else 16
    if any(size % multiple for size in weight.shape):
        return f"N and K must be multiples of {multiple}, not {list(weight.shape)}"
    made = product_of(weight.format, device)
    return made if isinstance(made, str) else None


@dataclass(frozen=True)
class Product:
    """An 8-bit product. scales: what it multiplies by. fast: with less exact sums, which have to prove right."""

    format: str
    scales: str | None = None
    fast: bool = False

    def __call__(self, codes: Tensor, weight: Tensor, scale: Tensor, own: Tensor) -> tuple[Tensor, bool]:
        """codes [M, K] x weight [N, K] -> (sums [M, N], whether scales [M, 1] and [N] are in them)."""
        count = len(codes)
        if count < FEWEST:
            empty = (0, 0, 0, FEWEST - count)
            codes, scale = F.pad(codes.view(torch.int8), empty), F.pad(scale, empty)
        if self.format == INT8:
            return torch._int_mm(codes, weight.t())[:count], False
        one = torch.ones((), dtype=torch.float32, device=codes.device)
        a, b = (scale, own[None]) if self.scales == PER_ROW else (one, one)
        kind = torch.bfloat16 if self.scales == PER_ROW else torch.float32
        codes, other = codes.view(torch.float8_e4m3fn), weight.view(torch.float8_e4m3fn).t()
        made = torch._scaled_mm(codes, other, scale_a=a, scale_b=b, out_dtype=kind, use_fast_accum=self.fast)
        return made[:count], self.scales == PER_ROW


@functools.cache
def product_of(format: str, device: torch.device) -> Product | str:
    """The product that is right on a device; else why there is none."""
    if device.type != "cuda":
        return f"it needs a CUDA device, and the device is {device}"
    if format == INT8:
        return _first_right([Product(INT8)], device)
    if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 9):
        return "8-bit floats are multiplied from sm_89 on"
    forms = (PER_ROW, PER_TENSOR) if torch.cuda.get_device_capability(device) >= (9, 0) else (PER_TENSOR,)
    return _first_right([Product(E4M3, scales, fast) for scales in forms for fast in (True, False)], device)


def _first_right(products: list[Product], device: torch.device) -> Product | str:
    reasons = []
    for product in products:
        if (reason := _proved(product, device)) is None:
            return product
        reasons.append(reason)
    return reasons[-1]


@torch.no_grad()
def _proved(product: Product, device: torch.device) -> str | None:
    """One run on random numbers, with rows and columns of very different sizes, next to double precision."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 512, generator=generator, dtype=torch.float32) for n in (40, 48))
    x, w = (one * torch.logspace(-2, 2, len(one), dtype=torch.float32)[:, None] for one in (x, w))
    (codes, scale), (weight, own) = (formats_rows.quantize(one, product.format) for one in (x, w))
    exact = codes.double() @ weight.double().T
    try:
        given = (one.to(device) for one in (codes, weight, scale, own[:, 0].contiguous()))
        made, scaled = product(*given)
    except (RuntimeError, TypeError, AttributeError) as error:
        return f"its product fails here: {str(error).splitlines()[0]}"
    exact = exact * scale.double() * own[:, 0].double() if scaled else exact
    rows = torch.linalg.vector_norm(exact, dim=1)
    off = (torch.linalg.vector_norm(made.double().cpu() - exact, dim=1) / rows).max().item()
    return None if off <= ALLOWED[product.format] else f"its product is off by {off:.0e} here"


def _eight_bit(x: Activations, weight: QuantizedTensor, finish: Finish, out: Tensor) -> None:
    for start, stop, sums, factors in _sums(x, weight):
        out[start:stop] = finish(sums, factors)


def _to_rows(x: Activations, weight: QuantizedTensor, finish: Finish) -> QuantizedRows:
    """The result's rows as codes, in the pass that makes them of the sums."""
    assert finish.rows is not None
    made = [finish.to_rows(sums, factors) for _, _, sums, factors in _sums(x, weight)]
    codes, scale = (parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*made, strict=True))
    shape = x.shape[:-1]
    return QuantizedRows(finish.rows, codes.view(*shape, -1), scale.view(*shape, 1), x.dtype)


def _sums(x: Activations, weight: QuantizedTensor) -> Iterator[tuple[int, int, Tensor, tuple[Tensor, Tensor] | None]]:
    """(start, stop, sums of these rows, the scales that are not in them)."""
    product, own = product_of(weight.format, x.device), _columns(weight).contiguous()
    assert isinstance(product, Product)
    for start, stop, codes, scale in _blocks(x, weight, max(FEWEST, SUMS // max(weight.shape))):
        sums, scaled = product(codes, weight.data["codes"], scale, own)
        yield start, stop, sums, None if scaled else (scale, own)


def _blocks(x: Activations, weight: QuantizedTensor, size: int) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """(start, stop, codes [M, K], scale [M, 1]) of so many rows at a time."""
    given = x.flat() if isinstance(x, QuantizedRows) else None
    rows = x.reshape(-1, weight.shape[1]) if isinstance(x, Tensor) else x.flat()[0]
    for start in range(0, len(rows), size):
        stop = min(start + size, len(rows))
        part = rows[start:stop]
        made = (part, given[1][start:stop]) if given else quantize_rows(part, weight.format, weight.rotation)
        yield start, stop, *made


# ---------------------------------------------------------------- around them


def quantize_rows(x: Tensor, format: str, rotation: int = 0) -> tuple[Tensor, Tensor]:
    """quantized.quantize_rows."""
    if rotation:
        x = rotate(x.float(), rotation)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    codes, scale = _run(_to_codes, ("R.",), (rows,), (format,))
    return codes.view(x.shape), scale.view(*x.shape[:-1], 1)


def _to_codes(x: Tensor, format: str) -> tuple[Tensor, Tensor]:
    return formats_rows.quantize(x, format)


def _run(body: Callable[..., Any], spec: Sequence[str], tensors: Sequence[Tensor], static: tuple[Any, ...]) -> Any:
    """body(*tensors, *static), compiled where that can be."""

    def eager() -> Any:
        return body(*tensors, *static)

    if tensors[0].device.type != "cuda" or compiling.why_not(tensors[0].device):
        return eager()
    return compiling.run(body, spec, tensors, static, eager)


@dataclass(frozen=True)
class Finish:
    """What is done with sums in fp32: scales of rows [M, 1] and columns [N], bias [N], GELU; rounded once to dtype, and
    then to codes of the format `rows`."""

    bias: Tensor | None
    gelu: bool
    dtype: torch.dtype
    rows: str | None = None

    def __call__(self, sums: Tensor, scales: tuple[Tensor, Tensor] | None) -> Tensor:
        made: Tensor = self._made(_scaled, sums, scales)
        return made

    def to_rows(self, sums: Tensor, scales: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        codes, scale = self._made(_scaled_codes, sums, scales, self.rows)
        return codes, scale

    def _made(self, body: Callable[..., Any], sums: Tensor, scales: tuple[Tensor, Tensor] | None, *more: Any) -> Any:
        form = (scales is not None, self.bias is not None, self.gelu, self.dtype, *more)
        spec = ["R.", *(("R.", ".") if scales else ()), *(["."] if self.bias is not None else ())]
        given = (sums, *(scales or ()), *(() if self.bias is None else (self.bias,)))
        return _run(body, spec, [one.contiguous() for one in given], form)


def _scaled(sums: Tensor, *rest: Any) -> Tensor:
    """rest: the scales, if there are any, and the bias; then whether there are scales and a bias, whether GELU follows,
    and the dtype."""
    *tensors, scaled, biased, gelu, dtype = rest
    y = sums.float()
    if scaled:
        y = y * tensors[0] * tensors[1]
    if biased:
        y = y + tensors[-1].float()
    return (F.gelu(y, approximate="tanh") if gelu else y).to(dtype)


def _scaled_codes(sums: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *given, format = rest
    return formats_rows.quantize(_scaled(sums, *given), format)
