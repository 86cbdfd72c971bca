"""Pillow's resampling of 8-bit pictures in PyTorch, to the last bit: models were trained and are run with pictures that
Pillow resized, and fastvid does not need Pillow.

Shapes: pictures uint8 [..., H, W, C]. Maths: Pillow `src/libImaging/Resample.c` (MIT-CMU): first along the rows, then
along the columns, each rounded to 8 bits, with the filter widened when shrinking and weights of 22 fractional bits.
Pillow 13 (2026) turns the two passes around where the height shrinks much more than the width; the models are older.
"""

from __future__ import annotations

import torch
from torch import Tensor

PRECISION = 22  # fractional bits of a weight
SUPPORT = {"bicubic": 2.0, "lanczos": 3.0}  # how far each filter reaches, in pixels


def resize(pictures: Tensor, height: int, width: int, method: str = "lanczos") -> Tensor:
    """Pictures uint8 [..., H, W, C] -> uint8 [..., height, width, C]; method is "lanczos" or "bicubic".

    Raises ValueError for another dtype, layout, size or method.
    """
    if pictures.dtype != torch.uint8 or pictures.ndim < 3 or 0 in pictures.shape or height < 1 or width < 1:
        raise ValueError(
            f"resize takes uint8 [..., H, W, C] and a size of at least 1x1, not {pictures.dtype} "
            f"{list(pictures.shape)} and {height}x{width}"
        )
    if method not in SUPPORT:
        raise ValueError(f"method is {method!r}; it can be {', '.join(SUPPORT)}")
    return _along(_along(pictures, -2, width, method), -3, height, method)


def _along(pictures: Tensor, dim: int, size: int, method: str) -> Tensor:
    """Resize one dimension; left as it is if it has that size already, as Pillow does."""
    if pictures.shape[dim] == size:
        return pictures
    weights = _weights(pictures.shape[dim], size, method).to(pictures.device)
    # Integers below 2^53, so sums in fp64 are exact in any order.
    sums = pictures.movedim(dim, -1).double() @ weights.T
    rounded = ((sums + 2 ** (PRECISION - 1)) / 2**PRECISION).floor()
    return rounded.clamp(0, 255).to(torch.uint8).movedim(-1, dim)


def _weights(before: int, after: int, method: str) -> Tensor:
    """What every old pixel gives to every new one: whole numbers in fp64 [after, before]."""
    scale = before / after
    widen = max(scale, 1.0)
    reach = SUPPORT[method] * widen
    center = (torch.arange(after, dtype=torch.float64)[:, None] + 0.5) * scale
    index = torch.arange(before, dtype=torch.float64)
    inside = (index >= (center - reach + 0.5).trunc()) & (index < (center + reach + 0.5).trunc())
    values = torch.where(inside, _filter((index - center + 0.5) / widen, method), 0.0)
    values = values / values.sum(1, keepdim=True) * 2**PRECISION
    return (values + values.sign() * 0.5).trunc()


def _filter(x: Tensor, method: str) -> Tensor:
    """The weight at a distance of x pixels."""
    if method == "lanczos":
        return torch.where((x >= -3) & (x < 3), torch.sinc(x) * torch.sinc(x / 3), 0.0)
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1  # Keys' cubic with a = -0.5
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
