"""The position of a denoising loop as named tensors, and back, for checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from fastvid.sampling.loop import Position
from fastvid.sampling.solvers import SolverState


def position_to_tensors(position: Position) -> dict[str, Tensor]:
    """A position as named tensors, without the solver's noise source, which the loop supplies."""
    return dict(_named_tensors("", position))


def _named_tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, int):
        yield name, torch.tensor(value)
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from _named_tensors(f"{name}.{i}", item)
    elif isinstance(value, Position | SolverState):
        for entry in fields(value):
            yield from _named_tensors(f"{name}.{entry.name}".strip("."), getattr(value, entry.name))
    else:
        assert value is None or name == "state.fresh", name


def position_from_tensors(tensors: Mapping[str, Tensor], device: torch.device) -> Position:
    """The position that `position_to_tensors` took apart. Latents go to the device; noise levels and orders stay on the
    CPU, where solvers expect them."""
    moved = {name: tensor.to(device) if tensor.ndim == 5 else tensor for name, tensor in tensors.items()}
    lists = {n: tuple(moved[k] for k in sorted(moved) if k.startswith(f"state.{n}.")) for n in ("sigmas", "x0s")}
    state = SolverState(moved.get("state.order"), lists["sigmas"], lists["x0s"], moved.get("state.x"))
    direct = {name: tensor for name, tensor in moved.items() if "." not in name}
    values: dict[str, Any] = {n: int(tensor) if tensor.ndim == 0 else tensor for n, tensor in direct.items()}
    return Position(state=state, **values)
