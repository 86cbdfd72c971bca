"""Registers of a warp as arrays of the type that an instruction takes, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from ptx.memory import Fault
from ptx.parse import Kernel, Not
from ptx.wgmma import Pending

if TYPE_CHECKING:
    from ptx.machine import Warp

UINT = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


def reader(kernel: Kernel, slot: object, kind: type) -> Callable[[list[NDArray]], NDArray]:
    """Of a register as a type, of which it has at least the bits: the lowest ones."""
    if isinstance(slot, Not):
        negated = slot.slot
        return lambda r: ~r[negated]
    assert isinstance(slot, int)
    held, wanted = UINT[kernel.widths[slot]], np.dtype(kind)
    if held is kind:
        return lambda r: _checked(r[slot])
    if np.dtype(held).itemsize == wanted.itemsize:
        return lambda r: r[slot].view(kind)
    low = UINT[wanted.itemsize * 8]
    if np.dtype(held).itemsize < wanted.itemsize:
        return lambda r: r[slot].astype(low).view(kind)
    return lambda r: r[slot].astype(low).view(kind)


def _checked(value: NDArray) -> NDArray:
    if value.__class__ is Pending:
        raise AttributeError("Pending")
    return value


def put(kernel: Kernel, slot: object, kind: type) -> Callable[[Warp, NDArray], None]:
    """Into a register, for the lanes that are active; a wider one is filled up by the type's sign."""
    if slot is None:
        return lambda warp, value: None
    assert isinstance(slot, int)
    held = UINT[kernel.widths[slot]]
    same = np.dtype(held).itemsize == np.dtype(kind).itemsize
    if slot in kernel.constants or slot in kernel.special or slot in kernel.symbols:
        raise Fault("an instruction writes what is no register")

    def store(warp: Warp, value: NDArray) -> None:
        made = value.view(held) if same else value.astype(held)
        warp.r[slot] = made if warp.full else merge(warp, warp.r[slot], made)

    return store


def merge(warp: Warp, old: NDArray, new: NDArray) -> NDArray:
    return np.where(warp.mask, new, _checked(old))
