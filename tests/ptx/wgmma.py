"""Products of warpgroups, by the PTX manual: descriptors of matrices in shared memory, where registers lie in matrices,
and when results are there.

A product takes place at any time after all four warps have asked for it, at the latest when one waits for it. Until
then its registers are `Pending`: whoever uses one gets an error. Sums are fp32, in another order than the hardware's;
those of 8-bit floats keep fewer bits there. Sums of integers are exact.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from ptx.formats import FACTORS
from ptx.memory import Fault

if TYPE_CHECKING:
    from ptx.machine import Block, Warp

SWIZZLES = {0: 0, 1: 3, 2: 2, 3: 1}  # mode of a descriptor -> bits of an address that are mixed


@dataclass(frozen=True)
class Shape:
    """m64 n k, and the kinds of A, B and D; transposed A and B have their rows along K."""

    n: int
    k: int
    kinds: tuple[str, str]
    result: str
    transposed: tuple[bool, bool]


class Pending:
    """What a register holds while a product uses it; value: of a left matrix's."""

    __array_ufunc__ = None

    def __init__(self, product: Product, value: NDArray | None = None) -> None:
        self.product, self.value = product, value


@dataclass(eq=False)
class Product:
    """a: a descriptor, or None where the left matrix is in registers. registers: of the result, by slots. before: whose
    result it adds to, if that is still pending. Held by warp: `added` and `left`, registers as [count, 32]."""

    shape: Shape
    a: int | None
    b: int
    add: bool
    signs: tuple[int, int]
    registers: tuple[int, ...]
    what: str
    before: Product | None = None
    added: dict[int, NDArray] = field(default_factory=dict)
    left: dict[int, NDArray] = field(default_factory=dict)
    asked: int = 0
    result: NDArray | None = None


@dataclass
class Asked:
    """A warp's part of a product: what its result's registers hold, and the registers of the left matrix."""

    product: Product
    token: Pending
    left: tuple[int, ...]


class Warpgroup:
    """Four warps that do the same instructions, and their products in order."""

    def __init__(self, block: Block, index: int) -> None:
        self.block, self.index = block, index
        self.log: list[object] = []
        self.made: dict[int, Product] = {}  # by their place in the log
        self.queue: list[Product] = []

    def same(self, warp: Warp, did: object) -> int:
        """Fault unless the other warps did the same at this place, whose number is returned."""
        if not warp.mask.all():
            raise Fault(f"{warp.where()}: by a part of a warp")
        place = warp.place
        warp.place += 1
        if place == len(self.log):
            self.log.append(did)
        elif self.log[place] != did:
            raise Fault(f"{warp.where()}: another warp of the warpgroup did {self.log[place]} instead of {did}")
        return place

    def finish(self, product: Product) -> None:
        """Makes it and all before it; all four warps have to have asked."""
        while product.result is None:
            first = self.queue.pop(0)
            first.result = multiply(self.block, first)


def fence(warp: Warp) -> None:
    warp.warpgroup.same(warp, "fence")
    warp.fenced = list(warp.r)


def commit(warp: Warp) -> None:
    warp.warpgroup.same(warp, "commit")
    warp.products.append([])


def ask(warp: Warp, product: Product, left: tuple[int, ...]) -> None:
    """A warp comes to a product. left: the slots of its left matrix."""
    group, r, result = warp.warpgroup, warp.r, product.registers
    for slot in (*result, *left):
        _check_fenced(warp, slot, product.what)
    before = _before(warp, product)
    key = (product.shape, product.a, product.b, product.add, product.signs, result, left)
    place = group.same(warp, key)
    product = group.made.setdefault(place, product)
    if product.asked == 0:
        product.before = before
        group.queue.append(product)
    elif product.before is not before:
        raise Fault(f"{product.what}: warps add to different products")
    if before is None:
        product.added[warp.index % 4] = np.array([r[slot] for slot in result])
    values = [r[slot].value if r[slot].__class__ is Pending else r[slot] for slot in left]
    product.left[warp.index % 4] = np.array(values)
    token = Pending(product)
    for slot in result:
        r[slot] = token
    for slot, value in zip(left, values, strict=True):
        r[slot] = Pending(product, value)
    warp.products[-1].append(Asked(product, token, left))
    product.asked += 1
    if product.asked == 4:
        group.block.machine.events.append(lambda: group.finish(product))


def _before(warp: Warp, product: Product) -> Product | None:
    """The unfinished product whose registers these are."""
    result = product.registers
    first = warp.r[result[0]]
    if first.__class__ is not Pending:
        if any(warp.r[slot].__class__ is Pending for slot in result):
            raise Fault(f"{product.what}: some of its registers belong to an unfinished product")
        return None
    if any(warp.r[slot] is not first for slot in result) or first.value is not None:
        raise Fault(f"{product.what}: its registers belong to several unfinished products")
    if (first.product.registers, first.product.shape.result) != (result, product.shape.result):
        raise Fault(f"{product.what}: adds to an unfinished product whose registers are others")
    return first.product


def _check_fenced(warp: Warp, slot: int, what: str) -> None:
    if warp.fenced is None:
        raise Fault(f"{what}: no wgmma.fence before it")
    held, then = warp.r[slot], warp.fenced[slot]
    if held.__class__ is Pending and held.value is None:
        return
    held = held.value if held.__class__ is Pending else held
    then = then.value if then.__class__ is Pending else then
    if held is not then:
        raise Fault(f"{what}: a register of it was written after the last wgmma.fence")


def wait_group(warp: Warp, pending: int) -> None:
    """Until all but the last `pending` groups are there; the warp comes again if it has to wait for another one."""
    groups = warp.products
    waited = groups[: max(len(groups) - 1 - pending, 0)]
    late = next((one.product for made in waited for one in made if one.product.asked < 4), None)
    if late is not None:
        return warp.wait(lambda: late.asked == 4, again=True)
    warp.warpgroup.same(warp, ("wait", pending))
    for made in waited:
        for one in made:
            warp.warpgroup.finish(one.product)
            _deliver(warp, one)
    warp.products = groups[len(waited) :]
    return None


def _deliver(warp: Warp, asked: Asked) -> None:
    """Registers become values, unless a later product has them."""
    r, product = warp.r, asked.product
    later = r[product.registers[0]]
    if later.__class__ is not Pending or any(r[slot] is not later for slot in product.registers):
        raise Fault(f"{product.what}: a register of its result was written before the product was waited for")
    if later is asked.token:
        rows, columns = places(product.shape.n)
        values = product.result[rows[warp.index % 4], columns[warp.index % 4]].view(np.uint32)
        for slot, value in zip(product.registers, values, strict=True):
            r[slot] = warp.fenced[slot] = value
    for slot in asked.left:
        held = r[slot]
        if held.__class__ is not Pending:
            raise Fault(f"{product.what}: a register of its left matrix was written before the product was waited for")
        if held.product is product:
            r[slot] = held.value


# Where values lie


@functools.cache
def places(n: int) -> tuple[NDArray, NDArray]:
    """Rows and columns of m64n's accumulators: [warp, register, lane]."""
    warp, i, lane = np.ogrid[:4, : n // 2, :32]
    row = 16 * warp + lane // 4 + i // 2 % 2 * 8
    column = i // 4 * 8 + lane % 4 * 2 + i % 2
    return np.broadcast_arrays(row, column)  # type: ignore[return-value]


@functools.cache
def left_places(size: int) -> tuple[NDArray, NDArray]:
    """The same of a left matrix in registers: [warp, register, value of a register, lane]; size: bytes of a value."""
    warp, i, j, lane = np.ogrid[:4, :4, : 4 // size, :32]
    row = 16 * warp + lane // 4 + i % 2 * 8
    column = i // 2 * (16 // size) + lane % 4 * (4 // size) + j
    return np.broadcast_arrays(row, column)  # type: ignore[return-value]


@functools.lru_cache(maxsize=1024)
def addresses(descriptor: int, outer: int, k: int, size: int, transposed: bool) -> NDArray:
    """Byte addresses [outer, k, size] of a matrix by its descriptor; outer: rows of A, columns of B.

    K-major: eights of rows of 16, 32, 64 or 128 bytes (by the swizzle), the stride from one eight to the next.
    Transposed: eights of rows along K; of as many columns as a row holds, the leading offset from those to the next.
    Without a swizzle a row has 16 bytes, and the other offset goes from one such matrix to its neighbour.
    """
    start, leading, stride = descriptor & 0x3FFF, descriptor >> 16 & 0x3FFF, descriptor >> 32 & 0x3FFF
    if descriptor >> 49 & 7:
        raise Fault("a descriptor with a base offset, which is not interpreted")
    bits = SWIZZLES[descriptor >> 62]
    unit, row = 16 // size, 16 << bits  # values of 16 bytes, bytes of a swizzled row
    o, i = np.ogrid[:outer, :k]
    if not transposed:
        chunk = i // unit
        inside = chunk * 16 if bits else chunk * leading * 16
        at = o // 8 * stride * 16 + o % 8 * row + inside + i % unit * size
    elif bits:
        wide = row // size
        at = o // wide * leading * 16 + i // 8 * stride * 16 + i % 8 * row + o % wide * size
    else:
        at = o // unit * stride * 16 + i // 8 * leading * 16 + i % 8 * 16 + o % unit * size
    at = at + start * 16
    at = at ^ (at >> 7 & (1 << bits) - 1) << 4
    return at[..., None] + np.arange(size)


def matrix(block: Block, descriptor: int, outer: int, shape: Shape, side: int, what: str) -> NDArray[np.float32]:
    size, widen = FACTORS[shape.kinds[side]]
    at = addresses(descriptor, outer, shape.k, size, shape.transposed[side])
    found = block.shared.read_async(at, what)
    return widen(found.view(np.uint16)[..., 0] if size == 2 else found[..., 0])


def left_matrix(product: Product) -> NDArray[np.float32]:
    size, widen = FACTORS[product.shape.kinds[0]]
    words = np.array([product.left[warp] for warp in range(4)])  # [warp, register, lane]
    values = words[..., None].view(np.uint16 if size == 2 else np.uint8)  # the lowest first
    made = np.zeros((64, product.shape.k), np.float32)
    made[left_places(size)] = widen(np.ascontiguousarray(values.transpose(0, 1, 3, 2)))
    return made


def multiply(block: Block, product: Product) -> NDArray:
    shape = product.shape
    a = left_matrix(product) if product.a is None else matrix(block, product.a, 64, shape, 0, product.what)
    b = matrix(block, product.b, shape.n, shape, 1, product.what)
    made = product.signs[0] * product.signs[1] * (a @ b.T)
    if shape.result == "s32":
        made = made.astype(np.int32)  # below 2^24: exact
    if not product.add:
        return made
    if product.before is not None:
        return product.before.result + made
    kind = np.int32 if shape.result == "s32" else np.float32
    added = np.zeros((64, shape.n), kind)
    added[places(shape.n)] = np.array([product.added[warp] for warp in range(4)]).view(kind)
    return added + made
