"""What a LoRA adds to one parameter, as a formula over the tensors that its file holds.

    Whole        the change itself                                        diff, diff_b, diff_m, w_norm, b_norm
    Pair         up @ down; with a middle part sum_mn middle[m, n] up[:, m] down[n, :]         LoRA, LoCon (Tucker)
    Hadamard     first * second, both pairs                                                    LoHa
    Kronecker    left (x) right, each a pair or whole                                          LoKr
    Decomposed   magnitude * (W + change) / norm(W + change) - W                               DoRA

Papers: LoRA arXiv 2106.09685, LoHa (FedPara) 2108.06098, LoKr and Tucker forms (LyCORIS) 2309.14859, DoRA 2402.09353.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]


class Misfit(ValueError):
    """Tensors that cannot be multiplied."""


@dataclass(frozen=True, eq=False)
class Whole:
    """factor * tensor."""

    tensor: Tensor
    factor: float = 1.0
    rank = None

    @property
    def shape(self) -> Shape:
        return tuple(self.tensor.shape)

    @property
    def size(self) -> int:
        """The number of values that it is made of."""
        return self.tensor.numel()

    def fits(self, shape: Shape) -> bool:
        return self.shape == shape

    def product(self, dtype: torch.dtype) -> Tensor:
        return self.tensor.to(dtype)

    def delta(self, weight: Tensor, scale: float) -> Tensor:
        """What it adds to a weight, in the weight's dtype."""
        return (scale * self.factor) * self.product(weight.dtype)


@dataclass(frozen=True, eq=False)
class Pair:
    """factor * up @ down. up: [out, rank, 1, ...]; down: [rank, in, *kernel]. With middle [m, n, *kernel]: up [out, m],
    down [n, in]. Raises Misfit."""

    up: Tensor
    down: Tensor
    factor: float = 1.0
    middle: Tensor | None = None

    def __post_init__(self) -> None:
        tensors = [self.up, self.down, *([] if self.middle is None else [self.middle])]
        named = ", ".join(str(list(tensor.shape)) for tensor in tensors)
        if any(tensor.ndim < 2 for tensor in tensors) or any(0 in tensor.shape for tensor in tensors):
            raise Misfit(f"shapes {named}; matrices of rank 1 or more are needed")
        inner = self.down.shape[0] if self.middle is None else self.middle.shape[0]
        outer = inner if self.middle is None else self.middle.shape[1]
        pointwise = self.middle is None or math.prod(self.down.shape[2:]) == 1
        if math.prod(self.up.shape[1:]) != inner or self.down.shape[0] != outer or not pointwise:
            raise Misfit(f"shapes {named}, which do not multiply")

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])

    @property
    def shape(self) -> Shape:
        columns = self.down.shape[1:] if self.middle is None else (self.down.shape[1], *self.middle.shape[2:])
        return (self.up.shape[0], *columns)

    @property
    def size(self) -> int:
        return self.up.numel() + self.down.numel() + (0 if self.middle is None else self.middle.numel())

    def fits(self, shape: Shape) -> bool:
        return _same_matrix(self.shape, shape)

    def product(self, dtype: torch.dtype) -> Tensor:
        up, down = self.up.flatten(1).to(dtype), self.down.flatten(1).to(dtype)
        if self.middle is None:
            return up @ down
        return torch.einsum("mn...,om,ni->oi...", self.middle.to(dtype), up, down)

    def delta(self, weight: Tensor, scale: float) -> Tensor:
        return (scale * self.factor) * self.product(weight.dtype).reshape(weight.shape)


@dataclass(frozen=True, eq=False)
class Hadamard:
    """factor * (first * second), element by element. Raises Misfit."""

    first: Pair
    second: Pair
    factor: float = 1.0

    def __post_init__(self) -> None:
        if self.first.shape != self.second.shape:
            raise Misfit(f"products of shapes {list(self.first.shape)} and {list(self.second.shape)}, which differ")

    @property
    def rank(self) -> int:
        return self.first.rank

    @property
    def shape(self) -> Shape:
        return self.first.shape

    @property
    def size(self) -> int:
        return self.first.size + self.second.size

    def fits(self, shape: Shape) -> bool:
        return _same_matrix(self.shape, shape)

    def product(self, dtype: torch.dtype) -> Tensor:
        return self.first.product(dtype) * self.second.product(dtype)

    def delta(self, weight: Tensor, scale: float) -> Tensor:
        return (scale * self.factor) * self.product(weight.dtype).reshape(weight.shape)


@dataclass(frozen=True, eq=False)
class Kronecker:
    """factor * the Kronecker product of left [a, c] and right [b, d, *kernel]: [a b, c d, *kernel]. Raises Misfit."""

    left: Whole | Pair
    right: Whole | Pair
    factor: float = 1.0

    def __post_init__(self) -> None:
        left, right = self.left.shape, self.right.shape
        if len(left) != 2 or len(right) < 2 or 0 in (*left, *right):
            raise Misfit(f"shapes {list(left)} and {list(right)}; two matrices are needed")

    @property
    def rank(self) -> int | None:
        """Of the factors that are pairs; both have the same."""
        return self.left.rank if self.right.rank is None else self.right.rank

    @property
    def shape(self) -> Shape:
        left, right = self.left.shape, self.right.shape
        return (left[0] * right[0], left[1] * right[1], *right[2:])

    @property
    def size(self) -> int:
        return self.left.size + self.right.size

    def fits(self, shape: Shape) -> bool:
        return _same_matrix(self.shape, shape)

    def product(self, dtype: torch.dtype) -> Tensor:
        left, right = self.left.product(dtype), self.right.product(dtype)
        return torch.kron(left.reshape(*left.shape, *[1] * (right.ndim - 2)), right.contiguous())

    def delta(self, weight: Tensor, scale: float) -> Tensor:
        return (scale * self.factor) * self.product(weight.dtype).reshape(weight.shape)


@dataclass(frozen=True, eq=False)
class Decomposed:
    """DoRA: the direction of W + change, with learned lengths of its rows, or columns (LyCORIS' wd_on_out=False).

    magnitude: one length a row ([out], or [out, 1, ...], or peft's [1, out, 1, ...] of convolutions), or one a column
    [1, in, 1, ...]. scales_change: whether the LoRA's scale is inside the norm, as in peft; otherwise it scales the
    difference to W, as in ComfyUI. At scale 1 both are the same.
    """

    change: Pair | Hadamard | Kronecker
    magnitude: Tensor
    scales_change: bool

    @property
    def factor(self) -> float:
        return self.change.factor

    @property
    def rank(self) -> int | None:
        return self.change.rank

    @property
    def shape(self) -> Shape:
        return self.change.shape

    @property
    def size(self) -> int:
        return self.change.size + self.magnitude.numel()

    def fits(self, shape: Shape) -> bool:
        return self.change.fits(shape) and self.axis(shape) is not None

    def delta(self, weight: Tensor, scale: float) -> Tensor:
        inner, outer = (scale, 1.0) if self.scales_change else (1.0, scale)
        changed = weight + self.change.delta(weight, inner)
        axis = self.axis(weight.shape)
        assert axis is not None
        along = [dim for dim in range(weight.ndim) if dim != axis]
        norm = torch.linalg.vector_norm(changed, dim=along, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
        magnitude = self.magnitude.to(weight.dtype).reshape(norm.shape)
        return outer * (changed * (magnitude / norm) - weight)

    def axis(self, shape: Sequence[int]) -> int | None:
        """Whose lengths they are: 0 rows, 1 columns, None neither."""
        given = tuple(self.magnitude.shape)
        others = math.prod(given) == max(given, default=1)  # only one dimension is more than 1
        if not others or len(shape) < 2:
            return None
        if given in ((shape[0],), (shape[0], *[1] * (len(given) - 1))) or (
            self.scales_change and math.prod(given) == shape[0]
        ):
            return 0
        return 1 if given[:2] == (1, shape[1]) else None


Term = Whole | Pair | Hadamard | Kronecker | Decomposed


def _same_matrix(made: Shape, shape: Shape) -> bool:
    """Whether a product can be reshaped to a weight: the same rows, and as many columns."""
    return len(shape) >= 2 and made[0] == shape[0] and math.prod(made[1:]) == math.prod(shape[1:])
