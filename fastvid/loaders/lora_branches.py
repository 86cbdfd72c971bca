"""From what a LoRA's file holds to branches beside the weights (`fastvid.layers.branches`).

    Pair         low rank; a middle part (Tucker) is multiplied into `up`
    LoHa         (A1 B1) * (A2 B2) has rank r1 r2: columns of A1 and A2, and rows of B1 and B2, multiplied pairwise; a
                 matrix where that is smaller
    LoKr         the Kronecker product, one factor after the other
    DoRA         factors of the rows or columns of the weight and of its change
    Whole        a matrix, of which a warning says how large it is

A change of what is no weight of a linear layer (bias, norm, table, convolution) is added to a copy of it.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastvid import notices
from fastvid.errors import CheckpointError
from fastvid.layers import branches
from fastvid.layers.branches import Branch, Branches, Change, Decomposition, Dense, LowRank, Operator, Piece, Value
from fastvid.layers.fused import FusedLayer
from fastvid.loaders.lora import Lora, merge
from fastvid.loaders.lora_files import is_finite
from fastvid.loaders.lora_terms import Decomposed, Hadamard, Kronecker, Pair, Term, Whole

Plain = Whole | Pair | Hadamard | Kronecker
LARGE = 2**20  # bytes of a matrix that a warning is worth


@dataclass(frozen=True)
class Place:
    """Where a parameter is. layer: the name of the module that computes with it, which may be several layers in one,
    and rows its part of that. linear: whether it is the weight of a linear layer that can have a branch."""

    layer: str
    owner: nn.Module
    attribute: str
    rows: slice
    linear: bool


def find_place(module: nn.Module, name: str) -> Place:
    """The place of a parameter, by its name in a state dict."""
    stem, _, attribute = name.rpartition(".")
    owner, number, count = module.get_submodule(stem), 0, 1
    if isinstance(owner, FusedLayer):
        number, count = owner.number, owner.whole.count
        owner = owner.whole
        stem = next(name for name, one in module.named_modules() if one is owner)
    length = int(getattr(owner, attribute).shape[0]) // count
    linear = attribute == "weight" and hasattr(owner, "branch") and stem not in getattr(module, "DIRECT", ())
    return Place(stem, owner, attribute, slice(number * length, (number + 1) * length), linear)


class Builder:
    """Makes the branches of LoRAs. Matrices that are still in use are shared: LoRAs that were read once have the same
    terms."""

    def __init__(self) -> None:
        self._made: weakref.WeakValueDictionary[tuple[Any, ...], Operator] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()  # requests are prepared in threads of their own

    def build(self, module: nn.Module, loras: Sequence[Lora], stays: bool = True) -> Branches:
        """The branches of one module. loras: fitted, of its expert. stays: see `Branches`. Raises CheckpointError for
        values that its dtype does not have."""
        pieces: dict[str, list[Piece]] = {}
        values: list[Value] = []
        dense: Counter[str] = Counter()
        for name in dict.fromkeys(name for lora in loras for name in lora.terms):
            place = find_place(module, name)
            if not place.linear:
                values.append(Value(place.owner, place.attribute, partial(_merged, name, place.rows, loras)))
                continue
            for lora in loras:
                for term in lora.terms.get(name, ()):
                    piece = self._piece(lora, name, term, place)
                    pieces.setdefault(place.layer, []).append(piece)
                    dense[lora.path.name] += piece.nbytes if isinstance(piece.operator, Dense) else 0
        _warn_of_dense(dense)
        return Branches({layer: Branch(own) for layer, own in pieces.items()}, values, stays)

    def _piece(self, lora: Lora, name: str, term: Term, place: Place) -> Piece:
        weight = cast(Any, place.owner).weight
        shape = (place.rows.stop - place.rows.start, int(weight.shape[1]))
        if not isinstance(term, Decomposed):
            return Change(place.rows, self._operator(lora, name, term, weight.dtype, shape), lora.scale * term.factor)
        operator = self._operator(lora, name, term.change, weight.dtype, shape)
        inner, outer = (lora.scale, 1.0) if term.scales_change else (1.0, lora.scale)
        axis = term.axis(shape)
        assert axis is not None, "checked by lora_fit"
        full = partial(_full, term.change, shape)
        return Decomposition(
            place.rows, operator, term.magnitude.flatten().float(), axis, inner, outer, term.factor, full
        )

    def _operator(self, lora: Lora, name: str, term: Plain, dtype: torch.dtype, shape: tuple[int, int]) -> Operator:
        key = id(term), dtype, shape
        with self._lock:
            if (operator := self._made.get(key)) is not None:
                return operator
            operator = make_operator(term, dtype, shape)
            if not all(map(is_finite, operator.factors)):
                raise CheckpointError(
                    f"{lora.path.name}: its values of {name} are not finite in {str(dtype)[6:]}; load the model with "
                    "dtype='bfloat16'"
                )
            self._made[key] = operator
        return operator


def make_operator(term: Plain, dtype: torch.dtype, shape: tuple[int, int]) -> Operator:
    """A change of a weight [n, K] without its factor, as the fewest values."""
    if isinstance(term, Kronecker):
        factors = [side.product(torch.float32).flatten(1) for side in (term.left, term.right)]
        return branches.Kronecker(*(factor.to(dtype) for factor in factors), source=term)
    if isinstance(term, Pair) and term.middle is None:  # in the file's own memory, if it has the dtype
        return LowRank(*(one.flatten(1).to(dtype).contiguous() for one in (term.up, term.down)), source=term)
    if (pair := _as_pair(term, shape)) is not None:
        return LowRank(*(factor.to(dtype).contiguous() for factor in pair), source=term)
    return Dense(term.product(torch.float32).reshape(shape).to(dtype), source=term)


def _as_pair(term: Plain, shape: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
    """(up [n, r], down [r, K]); None if it is a matrix, or smaller as one."""
    if isinstance(term, Pair):
        return _factors(term)
    if not isinstance(term, Hadamard):
        return None
    first, second = _factors(term.first), _factors(term.second)
    if first is None or second is None or first[0].shape[1] * second[0].shape[1] * sum(shape) >= math.prod(shape):
        return None
    (a, b), (c, d) = first, second
    return (a[:, :, None] * c[:, None, :]).flatten(1), (b[:, None, :] * d[None, :, :]).flatten(0, 1)


def _factors(pair: Pair) -> tuple[Tensor, Tensor] | None:
    """(up, down) in fp32, the middle part multiplied in; None if that is larger than a point."""
    up, down = pair.up.flatten(1).float(), pair.down.flatten(1).float()
    if pair.middle is None:
        return up, down
    if math.prod(pair.middle.shape[2:]) != 1:
        return None
    return up @ pair.middle.flatten(1).float(), down


def _full(term: Plain, shape: tuple[int, int]) -> Tensor:
    return term.factor * term.product(torch.float32).reshape(shape)


def _merged(name: str, rows: slice, loras: Sequence[Lora], value: Tensor) -> Tensor:
    """A parameter with the changes of its rows merged in, as `lora.merge` does it."""
    made = value.clone()
    made[rows] = merge(name, value[rows], loras, value.dtype).to(value.dtype)
    return made


def _warn_of_dense(sizes: Mapping[str, int]) -> None:
    for file, size in sizes.items():
        if size >= LARGE:
            notices.warn(
                f"lora {file}: {size / 2**20:,.0f} MiB of its changes are whole matrices, which are kept beside the "
                "weights as they are; those of low rank take a few percent of that"
            )


__all__ = ["Builder", "find_place", "make_operator"]
