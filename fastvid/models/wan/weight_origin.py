"""What a tensor of one layout is made of in the other: see `weight_names`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, cat

from fastvid.errors import CheckpointError

DIFFUSERS, ORIGINAL = "diffusers", "original"
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Origin:
    """What one tensor is made of: `names` joined along dimension 0, of that part number `part` of `parts`, transposed
    or with leading ones added (`lead` > 0) or dropped (`lead` < 0), and likewise ones behind (`trail`). Never
    arithmetic: values stay as they are.
    """

    names: tuple[str, ...]
    part: int = 0
    parts: int = 1
    lead: int = 0
    transpose: bool = False
    trail: int = 0

    @property
    def is_copy(self) -> bool:
        return len(self.names) == 1 and self.parts == 1 and self.lead == self.trail == 0 and not self.transpose

    def shape(self, shapes: Mapping[str, Sequence[int]]) -> Shape:
        """Shape of the tensor, given the shapes of what it is made of. Raises CheckpointError if they do not fit."""
        first, *rest = (tuple(shapes[name]) for name in self.names)
        if self.is_copy:
            return first
        if not first or any(other[1:] != first[1:] for other in rest):
            given = ", ".join(f"{name} {list(shapes[name])}" for name in self.names)
            raise CheckpointError(f"shapes that do not fit together: {given}")
        rows = sum(int(shapes[name][0]) for name in self.names)
        dropped, behind = first[: max(0, -self.lead)], first[len(first) - max(0, -self.trail) :]
        ones = (*dropped, *behind)
        if rows % self.parts or any(n != 1 for n in ones) or len(first) < len(ones) + self.transpose:
            raise CheckpointError(f"{self.names[0]} has shape {list(first)}, which this layout does not know")
        kept = (rows // self.parts, *first[1:])[len(dropped) : len(first) - len(behind)]
        whole = (1,) * max(0, self.lead) + kept + (1,) * max(0, self.trail)
        return whole[::-1] if self.transpose else whole

    def make(self, read: Callable[[str], Tensor]) -> Tensor:
        """The tensor, from a function that gives the tensors it is made of."""
        tensors = [read(name) for name in self.names]
        shape = self.shape({name: tensor.shape for name, tensor in zip(self.names, tensors, strict=True)})
        joined = cat(tensors) if len(tensors) > 1 else tensors[0]
        rows = joined.shape[0] // self.parts
        piece = joined[self.part * rows : (self.part + 1) * rows] if self.parts > 1 else joined
        return piece.T if self.transpose else piece.reshape(shape)
