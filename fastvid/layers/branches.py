"""What LoRAs add to the layers of a module while it is in use, beside the weights, which stay as they are.

    y = W x + b + sum over pieces of (s * C x)[rows]

C is never added to W: it is kept as the small matrices it is made of. A piece changes all rows of a layer's output, or
those of one of several layers that are one product (queries, keys and values). Two kinds of pieces:

    Change          s * C x
    Decomposition   DoRA: outer * (G (W + inner C) - W) x, with G a diagonal on the left (rows) or the right (columns)

What is no weight of a linear layer (biases, norms, tables, convolutions) is small; it is replaced meanwhile.

Shapes: M rows of the input x [M, K], n rows of the output that a piece changes, r rank.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fastvid.ops.quantized import dense

STRIP = 2**26  # elements of a weight that are looked at in one go


class Operator:
    """A matrix C [n, K] that is kept in factors. source: what they were made of, which lives as long as this does."""

    def __init__(self, *factors: Tensor, source: Any = None) -> None:
        self.factors, self.source = factors, source
        self._copies: weakref.WeakValueDictionary[torch.device, Operator] = weakref.WeakValueDictionary()

    @property
    def nbytes(self) -> int:
        return sum(factor.nbytes for factor in self.factors)

    def to(self, device: torch.device) -> Operator:
        """The same on a device. Requests that use it at the same time share the copy."""
        if self.factors[0].device == device:
            return self
        if (copy := self._copies.get(device)) is None:
            moved = (factor.to(device, non_blocking=True) for factor in self.factors)
            self._copies[device] = copy = type(self)(*moved, source=self)
        return copy

    def pinned(self) -> Operator:
        """The same in page-locked memory, from which a GPU copies without waiting."""
        return type(self)(*(factor.pin_memory() for factor in self.factors), source=self.source)

    def add(self, y: Tensor, x: Tensor, scale: float) -> None:
        """y [M, n] += scale * C x, for x [M, K]. In place; y may be some columns of a tensor."""
        raise NotImplementedError


class LowRank(Operator):
    """up [n, r] @ down [r, K]."""

    def add(self, y: Tensor, x: Tensor, scale: float) -> None:
        up, down = self.factors
        y.addmm_(x @ down.T, up.T, alpha=scale)


class Dense(Operator):
    """The matrix itself."""

    def add(self, y: Tensor, x: Tensor, scale: float) -> None:
        y.addmm_(x, self.factors[0].T, alpha=scale)


class Kronecker(Operator):
    """The Kronecker product of left [a, c] and right [b, d]: [a b, c d]."""

    def add(self, y: Tensor, x: Tensor, scale: float) -> None:
        left, right = self.factors
        (a, c), (b, d) = left.shape, right.shape
        grid = x.unflatten(1, (c, d))
        right_first = b * c * (d + a) <= a * d * (c + b)  # the order with fewer products
        made = left @ (grid @ right.T) if right_first else (left @ grid) @ right.T
        y.add_(made.flatten(1), alpha=scale)


# ---------------------------------------------------------------- pieces


@dataclass(eq=False)
class Change:
    """scale * C x, in these rows of the output."""

    rows: slice
    operator: Operator
    scale: float

    @property
    def nbytes(self) -> int:
        return self.operator.nbytes

    def settle(self, layer: nn.Module, device: torch.device, stays: bool) -> None:
        """Called once, before the first use. device: where the layer computes; stays: whether its weights stay
        there."""
        self.operator = _settled(self.operator, device, stays)

    def gains(self) -> Tensor | None:
        """Factors less 1 of the rows of W x, fp32 [n]."""
        return None

    def add(self, layer: nn.Module, y: Tensor, x: Tensor) -> None:
        self.operator.to(y.device).add(y[:, self.rows], x, self.scale)


@dataclass(eq=False)
class Decomposition:
    """outer * (G (W + inner f C) - W): the rows or columns of W + inner f C get the lengths `magnitude`.

    axis: 0 for rows (magnitude [n]), 1 for columns ([K]). f: the change's own factor. dense: makes f C, fp32 [n, K].
    """

    rows: slice
    operator: Operator
    magnitude: Tensor
    axis: int
    inner: float
    outer: float
    factor: float
    dense: Callable[[], Tensor]
    _factors: Tensor | None = field(default=None, init=False)  # G, fp32

    @property
    def nbytes(self) -> int:
        return self.operator.nbytes + self.magnitude.nbytes

    def settle(self, layer: nn.Module, device: torch.device, stays: bool) -> None:
        change = self.dense()
        start, sums = self.rows.start, []
        step = max(1, STRIP // change.shape[1])
        for first in range(0, len(change), step):
            strip = change[first : first + step]
            weight = weight_rows(layer, start + first, start + first + len(strip))
            whole = weight.double() + self.inner * strip.to(weight.device).double()
            sums.append(whole.square().sum(1 - self.axis))
        norms = (torch.cat(sums) if self.axis == 0 else torch.stack(sums).sum(0)).sqrt()
        norms = norms.clamp_min(torch.finfo(torch.float32).tiny)
        self._factors = (self.magnitude.to(norms) / norms).float().to(device)
        self.operator = _settled(self.operator, device, stays)

    def gains(self) -> Tensor | None:
        assert self._factors is not None
        return self.outer * (self._factors - 1) if self.axis == 0 else None

    def add(self, layer: nn.Module, y: Tensor, x: Tensor) -> None:
        assert self._factors is not None
        part, factors = y[:, self.rows], self._factors
        operator, scale = self.operator.to(y.device), self.outer * self.inner * self.factor
        if self.axis == 0:
            made = torch.zeros_like(part, memory_format=torch.contiguous_format)
            operator.add(made, x, scale)
            part.add_(made.mul_(factors))
        else:
            weight = weight_rows(layer, self.rows.start, self.rows.start + part.shape[1], x.dtype)
            part.addmm_((x * (factors - 1)).to(x.dtype), weight.T, alpha=self.outer)
            operator.add(part, (x * factors).to(x.dtype), scale)


Piece = Change | Decomposition


def _settled(operator: Operator, device: torch.device, stays: bool) -> Operator:
    if stays:
        return operator.to(device)
    return operator.pinned() if device.type == "cuda" else operator


def weight_rows(layer: nn.Module, start: int, stop: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of a layer's weight [stop - start, K]; of a quantized one, dequantized."""
    weight = cast(Any, layer).weight
    if isinstance(weight, Tensor):
        return weight.detach()[start:stop].to(dtype)
    return cast(Tensor, weight.rows(start, stop, dtype))


class Branch:
    """The pieces of one layer."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces = tuple(pieces)

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)

    def settle(self, layer: nn.Module, device: torch.device, stays: bool) -> None:
        for piece in self.pieces:
            piece.settle(layer, device, stays)

    def add(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """y [..., N] = W x + b, changed in place, for x [..., K]."""
        y = y.contiguous()
        flat, inputs = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
        self._scale_rows(layer, flat)
        for piece in self.pieces:
            piece.add(layer, flat, inputs)
        return y

    def _scale_rows(self, layer: nn.Module, y: Tensor) -> None:
        """Multiplies W x, which is y - b, by what the pieces say of its rows."""
        gained = [(piece.rows, gains) for piece in self.pieces if (gains := piece.gains()) is not None]
        if not gained:
            return
        total = torch.zeros(y.shape[1], dtype=torch.float32, device=y.device)
        for rows, gains in gained:
            total[rows] += gains
        bias = cast(Any, layer).bias
        y.mul_(1 + total)
        if bias is not None:
            y.sub_(total * bias)


def with_branch(layer: Any, x: Tensor, y: Tensor) -> Tensor:
    """A layer's result y = W x + b, with what its branch adds."""
    branch: Branch | None = layer.branch
    return y if branch is None else branch.add(layer, x, y)


def plain_weight(layer: Any) -> Tensor:
    """A layer's weight [N, K] for an operation that takes it itself, as LoRAs change it at the moment."""
    replacement: Tensor | None = getattr(layer, "replacement", None)
    return dense(layer.weight) if replacement is None else replacement


# ---------------------------------------------------------------- the layers of a module


class Value(NamedTuple):
    """A small weight that is replaced while the module is in use: a parameter of `owner`, or the weight of a quantized
    layer. make: its new value, from the one before."""

    owner: nn.Module
    attribute: str
    make: Callable[[Tensor], Tensor]

    @property
    def is_parameter(self) -> bool:
        return self.attribute in self.owner._parameters

    def read(self) -> Tensor:
        """Its value now; a quantized one in fp32."""
        return dense(getattr(self.owner, self.attribute), torch.float32).detach()

    def put(self, value: Any) -> Any:
        """Puts a value in place; returns the one before."""
        holder = self.owner._parameters if self.is_parameter else self.owner.__dict__
        name = self.attribute if self.is_parameter else "replacement"
        before, holder[name] = holder.get(name), value
        return before


@dataclass(eq=False)
class Branches:
    """What is added to one module: branches of its linear layers, by name, and other values for small parameters.

    values are computed once, when the module is first used. stays: whether the module's weights stay on the device. If
    not, branches wait in host memory as well, and each is copied when its layer computes.
    """

    layers: Mapping[str, Branch] = field(default_factory=dict)
    values: Sequence[Value] = ()
    stays: bool = True
    _ready: tuple[list[Any], list[Any]] | None = field(default=None, init=False, repr=False)

    def __bool__(self) -> bool:
        return bool(self.layers or self.values)

    @property
    def nbytes(self) -> int:
        return sum(branch.nbytes for branch in self.layers.values())

    @property
    def value_bytes(self) -> int:
        """Bytes of the replaced values, which are on the device."""
        sizes = {(id(one.owner), one.attribute): getattr(one.owner, one.attribute) for one in self.values}
        return sum(weight.nbytes for weight in sizes.values())

    def held(self, device: torch.device) -> int:
        """Bytes of them that are in a device's memory by now."""
        settled = self._ready is not None
        layers = self.nbytes if device.type == "cpu" or (settled and self.stays) else 0
        return layers + (self.value_bytes if settled else 0)

    @contextmanager
    def attached(self, module: nn.Module, device: torch.device) -> Iterator[None]:
        """The module has these branches inside the block, in which nobody else may use it. Its weights are on the
        device, or come there one block after another."""
        if not self:
            yield
            return
        layers, values = self._ready = self._ready or self._settle(module, device)
        with ExitStack() as stack:
            if (within := getattr(getattr(module, "run", None), "within", None)) is not None:
                stack.enter_context(within(weakref.ref(self)))  # graphs know branches by their addresses
            for layer, branch in layers:
                stack.callback(setattr, layer, "branch", None)
                layer.branch = branch
            for place, value in values:
                stack.callback(place.put, place.put(value))
            yield

    @torch.no_grad()
    def _settle(self, module: nn.Module, device: torch.device) -> tuple[list[Any], list[Any]]:
        layers = [(module.get_submodule(name), branch) for name, branch in self.layers.items()]
        for layer, branch in layers:
            branch.settle(layer, device, self.stays)
        made: dict[tuple[int, str], tuple[Value, Tensor]] = {}
        for value in self.values:
            key = id(value.owner), value.attribute
            before = made[key][1] if key in made else value.read()
            made[key] = value, value.make(before).to(device)
        return layers, [(place, _as_held(place, value)) for place, value in made.values()]


def _as_held(place: Value, value: Tensor) -> Tensor:
    if place.is_parameter:
        return nn.Parameter(value, requires_grad=False)
    return value.to(cast(Any, place.owner).dtype)


__all__ = [
    "Branch",
    "Branches",
    "Change",
    "Decomposition",
    "Dense",
    "Kronecker",
    "LowRank",
    "Operator",
    "Piece",
    "Value",
    "plain_weight",
    "with_branch",
]
