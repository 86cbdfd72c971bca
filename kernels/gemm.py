"""What kernels share: the order of tiles of a matrix product, GELU, the processors of a device, checks of types."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@triton.jit
def tile_at(number, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(row, column) of a tile. GROUP_M rows of tiles are visited column by column, so that consecutive programs find
    what they read in the L2 cache."""
    group = number // (GROUP_M * tiles_n)
    first = group * GROUP_M
    rows = tl.minimum(tiles_m - first, GROUP_M)
    within = number % (GROUP_M * tiles_n)
    return first + within % rows, within // rows


@triton.jit
def gelu_tanh(x):
    """x / (1 + exp(-2 u)) with u = sqrt(2 / pi) (x + 0.044715 x^3), which is x / 2 (1 + tanh u) with nothing that
    cancels where x is far below 0."""
    return x / (1.0 + tl.exp(x * (-1.5957691216057308 - 0.07135481627159729 * x * x)))


def processors(device: torch.device) -> int:
    """How many programs of a kernel that fills a processor run at a time."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def describe(*tensors: Tensor | None) -> str:
    """Shapes and types of tensors, for messages."""
    return ", ".join("None" if x is None else f"{x.dtype} {tuple(x.shape)} on {x.device}" for x in tensors)


def check_types(*tensors: Tensor | None) -> None:
    """Raises ValueError unless all are in fp32, fp16 or bf16 on one device. fastvid.ops has checked the shapes."""
    given = [x for x in tensors if x is not None]
    if any(x.dtype not in DTYPES for x in given) or len({x.device for x in given}) > 1:
        raise ValueError(f"tensors in fp32, fp16 or bf16 on one device are needed, not {describe(*given)}")


def power_of_2_parts(size: int, least: int = 16) -> tuple[int, int]:
    """Two powers of 2, the second perhaps 0, that hold `size` with little left over: 64 -> 64, 0; 144 -> 128, 16."""
    whole = triton.next_power_of_2(size)
    first = max(whole if whole == size else whole // 2, least)
    rest = size - first
    return (first, max(triton.next_power_of_2(rest), least)) if rest > 0 else (first, 0)
