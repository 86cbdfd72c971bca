"""Cases and checks for tests of kernels: tensors in all layouts, errors against float64."""

from __future__ import annotations

import torch
from torch import Tensor

NAN = float("nan")


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def error(made: Tensor, exact: Tensor) -> float:
    return (torch.linalg.vector_norm(made.double() - exact) / torch.linalg.vector_norm(exact)).item()


def check(made: Tensor, eager: Tensor, exact: Tensor) -> None:
    """At most twice the error of eager, or one rounding of the type."""
    assert made.shape == exact.shape and bool(torch.isfinite(made).all())
    floor = torch.finfo(made.dtype).eps / 2
    assert error(made, exact) <= max(2 * error(eager, exact), floor), (error(made, exact), error(eager, exact))


def apart(shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """fp16 of that shape in storage that the system provides only where it is touched."""
    size = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1
    assert size > 2**31
    return torch.empty(size, dtype=torch.float16).as_strided(shape, strides)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """x, or something like it, in other strides."""
    if layout == "channels last":
        return x.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)
    if layout == "slice of frames":
        return torch.cat((x, x), 2)[:, :, 1 : 1 + x.shape[2]]
    return x[:, :, :1].expand_as(x) if layout == "expanded" else x
