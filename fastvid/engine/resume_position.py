"""A walk's position as named tensors, and back: what a checkpoint's state file holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from fastvid.sampling import SolverState
from fastvid.sampling.loop import Position


def flat(position: Position) -> dict[str, Tensor]:
    """A position as named tensors; where noise comes from is not among them, the walk knows it."""
    return dict(_flat("", position))


def _flat(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, int):
        yield name, torch.tensor(value)
    elif isinstance(value, tuple):
        for i, one in enumerate(value):
            yield from _flat(f"{name}.{i}", one)
    elif isinstance(value, Position | SolverState):
        for each in fields(value):
            yield from _flat(f"{name}.{each.name}".strip("."), getattr(value, each.name))
    else:
        assert value is None or name == "state.fresh", name


def unflat(tensors: Mapping[str, Tensor], device: torch.device) -> Position:
    """The position of these tensors, latents on the device; levels and orders stay on the CPU, where solvers want
    them."""
    here = {name: one.to(device) if one.ndim == 5 else one for name, one in tensors.items()}
    several = {n: tuple(here[k] for k in sorted(here) if k.startswith(f"state.{n}.")) for n in ("sigmas", "x0s")}
    state = SolverState(here.get("state.order"), several["sigmas"], several["x0s"], here.get("state.x"))
    own = {name: int(one) if one.ndim == 0 else one for name, one in here.items() if "." not in name}
    return Position(state=state, **own)
