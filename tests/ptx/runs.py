"""csrc's operations by their PTX: the arguments of the operators in fastvid/ops, by `fastvid._C`, interpreted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ptx.from_csrc import extension, interpret
from torch import Tensor

from fastvid.ops import quantized_cuda
from fastvid.ops.attention_gpu import KEYS, exact_steps, padded_steps, prepare, quantized, source_of
from fastvid.ops.quantized import QuantizedTensor
from fastvid.ops.sparse import Blocks
from fastvid.ops.vae_kernels import call_of


@dataclass(frozen=True)
class How:
    """seed: of the schedule. processors: of the device, at most as many blocks as which attention has. pairs: attention
    by pairs of blocks. text: PTX in the place of what nvcc made."""

    seed: int = 0
    processors: int = 132
    pairs: bool = False
    text: str = ""


PLAIN = How()
WHERE = (0, 0)  # device and stream


def run(call: Callable[[Any], None], tensors: Sequence[Tensor | None], how: How) -> None:
    """Raises Fault for what the hardware would not do, and what `fastvid._C` raises."""
    interpret(extension().record(call, how.processors, how.text), tensors, how.seed)


def dtype_of(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if x is None else x.data_ptr() for x in tensors]


def scale_of(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    blocks: Blocks | None = None,
    scale: float | None = None,
    how: How = PLAIN,
) -> None:
    call, walked = prepare(q, k, v, blocks, [] if blocks is None else exact_steps(q, blocks))
    call["pairs"] = int(how.pairs)
    tensors = [q, k, v, out, lse]
    given = (*addresses(tensors), dtype_of(q), call, addresses(walked), scale_of(q, scale), *WHERE)
    run(lambda c: c.attention(*given), [*tensors, *walked], how)


def quantize(
    part: str,
    x: Tensor,
    mean: Tensor | None,
    made: tuple[Tensor | None, ...],
    kind: str,
    blocks: Blocks | None = None,
    how: How = PLAIN,
) -> None:
    call, tiles = source_of(x, None if part == "queries" else blocks)
    given = (part, *addresses((x, mean, *made)), kind, dtype_of(x), call, *addresses([tiles]), *WHERE)
    run(lambda c: c.quantize(*given), [x, mean, *made, tiles], how)


def attention_eight(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    kind: str,
    blocks: Blocks | None = None,
    how: How = PLAIN,
) -> None:
    call, walked = prepare(q, k, v, blocks, [] if blocks is None else padded_steps(q, blocks))
    held, scales = quantized(
        q, k, v, blocks, lse is not None, lambda part, x, mean, made: quantize(part, x, mean, made, kind, blocks)
    )
    given = (addresses(held), addresses(scales), held[1].shape[2] // KEYS, *addresses([out, lse]), kind, dtype_of(q))
    given += (call, addresses(walked), scale_of(q, None), *WHERE)
    run(lambda c: c.attention_eight(*given), [*held, *scales, out, lse, *walked], how)


def conv(
    x: Tensor,
    past: Tensor | None,
    scale: None,
    gamma: None,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    *form: object,
    how: How = PLAIN,
) -> None:
    """Arguments of `vae_kernels.conv_cuda`."""
    assert scale is None and gamma is None and weight.permute(0, 2, 3, 4, 1).is_contiguous()
    if out.numel():
        tensors = [x, past, weight, bias, out]
        given = (*addresses(tensors), dtype_of(x), call_of(x, past, weight, out, *form), *WHERE)  # type: ignore[arg-type]
        run(lambda c: c.vae_conv(*given), tensors, how)


def norm(x: Tensor, gamma: Tensor, out: Tensor, silu: bool, how: How = PLAIN) -> None:
    """The same of `vae_kernels.norm_cuda`."""
    B, C, T, H, W = x.shape
    strides = [(one.stride(0), *one.stride()[2:]) for one in (x, out)]
    given = (*addresses([x, gamma, out]), dtype_of(x), (B, T, H, W), C, *strides, silu, *WHERE)
    run(lambda c: c.vae_norm(*given), [x, gamma, out], how)


def rgb(frames: Tensor, out: Tensor, how: How = PLAIN) -> None:
    """frames [3, T, H, W] into out, uint8 [T, H, W, 3]."""
    given = (*addresses([frames, out]), dtype_of(frames), tuple(frames.shape[1:]), frames.stride(), *WHERE)
    run(lambda c: c.to_rgb(*given), [frames, out], how)


def dequantize(weight: QuantizedTensor, start: int, stop: int, out: Tensor, how: How = PLAIN) -> None:
    """Rows start to stop - 1 of a weight into out [stop - start, K]."""
    matrix = quantized_cuda.matrix_of(weight, start, stop)
    given = (quantized_cuda.NUMBERS[weight.format], matrix, out.data_ptr(), dtype_of(out), *WHERE)
    run(lambda c: c.dequantize(*given), [*weight.data.values(), out], how)
