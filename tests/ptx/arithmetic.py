"""Instructions that make registers of registers: opcode -> (types of the operands, type of the result, function of
arrays of 32).

Approximations (ex2, lg2, rcp, division, square roots, tanh) are made exactly, and rounded; a fused multiply-add is made
in fp64 and rounded once more.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from ptx import formats
from ptx.memory import Fault

DTYPES: dict[str, type] = {"pred": np.bool_, "f32": np.float32, "f64": np.float64, "b8": np.uint8, "f16x2": np.uint32}
DTYPES |= {
    f"{kind}{bits}": getattr(np, f"{'' if kind == 's' else 'u'}int{bits}") for kind in "us" for bits in (8, 16, 32, 64)
}
DTYPES |= {f"b{bits}": getattr(np, f"uint{bits}") for bits in (16, 32, 64)} | {"bf16x2": np.uint32, "f16": np.uint16}
DTYPES |= {"bf16": np.uint16}
Function = Callable[..., NDArray]
Meaning = tuple[tuple[type, ...], type, Function]
TINY = np.float32(2.0**-126)
WIDER = {np.uint8: np.uint16, np.int8: np.int16, np.uint16: np.uint32, np.int16: np.int32, np.uint32: np.uint64}
WIDER |= {np.int32: np.int64}


def meaning(opcode: tuple[str, ...]) -> Meaning | None:
    """None for what is no arithmetic."""
    name = opcode[0]
    if name == "cvt":
        return conversion(opcode)
    if name == "setp":
        return comparison(opcode)
    kind = DTYPES.get(opcode[-1])
    if kind is None:
        return None
    if name in SHIFTS:
        return (kind, np.uint32), kind, SHIFTS[name]
    if name == "selp":
        return (kind, kind, np.bool_), kind, lambda a, b, p: np.where(p, a, b)
    if name in ("mul", "mad") and opcode[1] == "wide":
        wide = WIDER[kind]
        if name == "mul":
            return (kind, kind), wide, lambda a, b: a.astype(wide) * b.astype(wide)
        return (kind, kind, wide), wide, lambda a, b, c: a.astype(wide) * b.astype(wide) + c
    if kind is np.float32:
        return floating(opcode)
    if name in BITS:
        return BITS[name]
    if name in INTEGERS and opcode[-1] not in ("f16", "bf16", "f16x2", "bf16x2", "f64"):
        return integer(opcode, kind)
    return None


# Integers


def divide(a: NDArray, b: NDArray) -> NDArray:
    """Towards zero; by zero all ones."""
    safe = np.where(b == 0, 1, b).astype(b.dtype)
    made = a // safe
    if a.dtype.kind == "i":
        made = made + ((made < 0) & (made * safe != a)).astype(a.dtype)
    return np.where(b == 0, np.array(-1).astype(a.dtype), made)


def high(a: NDArray, b: NDArray) -> NDArray:
    bits = a.itemsize * 8
    return np.array([int(x) * int(y) >> bits for x, y in zip(a, b, strict=True)], a.dtype)


INTEGERS: dict[str, tuple[int, Function]] = {
    "add": (2, np.add),
    "sub": (2, np.subtract),
    "mul": (2, np.multiply),
    "mad": (3, lambda a, b, c: a * b + c),
    "div": (2, divide),
    "rem": (2, lambda a, b: a - divide(a, b) * b),
    "min": (2, np.minimum),
    "max": (2, np.maximum),
    "and": (2, np.bitwise_and),
    "or": (2, np.bitwise_or),
    "xor": (2, np.bitwise_xor),
    "not": (1, np.invert),
    "neg": (1, np.negative),
    "abs": (1, np.abs),
}


def integer(opcode: tuple[str, ...], kind: type) -> Meaning:
    count, function = INTEGERS[opcode[0]]
    if opcode[0] == "mul" and opcode[1] == "hi":
        function = high
    elif opcode[0] in ("mul", "mad") and opcode[1] != "lo":
        raise Fault(f"not interpreted: {'.'.join(opcode)}")
    return (kind,) * count, kind, function


def shift_left(a: NDArray, b: NDArray) -> NDArray:
    bits = a.itemsize * 8
    return np.where(b >= bits, 0, a << np.minimum(b, bits - 1).astype(a.dtype)).astype(a.dtype)


def shift_right(a: NDArray, b: NDArray) -> NDArray:
    bits = a.itemsize * 8
    made = a >> np.minimum(b, bits - 1).astype(a.dtype)
    return made if a.dtype.kind == "i" else np.where(b >= bits, 0, made).astype(a.dtype)


SHIFTS: dict[str, Function] = {"shl": shift_left, "shr": shift_right}


def permute(a: NDArray, b: NDArray, selector: NDArray) -> NDArray:
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    made = np.zeros(32, np.uint64)
    for i in range(4):
        pick = (selector >> np.uint32(4 * i)).astype(np.uint64)
        byte = both >> (pick & np.uint64(7)) * np.uint64(8) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        made |= np.where(pick & np.uint64(8), sign, byte) << np.uint64(8 * i)
    return made.astype(np.uint32)


def extract(a: NDArray, start: NDArray, count: NDArray) -> NDArray:
    signed = a.dtype.kind == "i"
    made = []
    for value, first, length in zip(a.view(np.uint32), start & 255, count & 255, strict=True):
        field = int(value) >> int(first) & (1 << int(length)) - 1
        top = min(int(first) + int(length) - 1, 31)
        if signed and length and int(value) >> top & 1:
            field |= -1 << (top - int(first) + 1)
        made.append(field & 0xFFFFFFFF)
    return np.array(made, np.uint32).view(a.dtype)


def insert(field: NDArray, into: NDArray, start: NDArray, count: NDArray) -> NDArray:
    made = []
    for value, held, first, length in zip(field, into, start & 255, count & 255, strict=True):
        mask = (1 << int(length)) - 1 << int(first) & 0xFFFFFFFF
        made.append(int(held) & ~mask | int(value) << int(first) & mask)
    return np.array(made, np.uint32)


def funnel(right: bool) -> Function:
    def shift(low: NDArray, high: NDArray, count: NDArray) -> NDArray:
        both = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
        by = (count & np.uint32(31)).astype(np.uint64)
        return (both >> by if right else both << by >> np.uint64(32)).astype(np.uint32)

    return shift


def logic(a: NDArray, b: NDArray, c: NDArray, table: NDArray) -> NDArray:
    made = np.zeros(32, np.uint32)
    for i in range(8):
        if int(table[0]) >> i & 1:
            made |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return made


U32 = np.uint32
BITS: dict[str, Meaning] = {
    "prmt": ((U32, U32, U32), U32, permute),
    "lop3": ((U32, U32, U32, U32), U32, logic),
    "bfi": ((U32, U32, U32, U32), U32, insert),
    "popc": ((U32,), U32, lambda a: np.bitwise_count(a).astype(U32)),
    "clz": ((U32,), U32, lambda a: np.array([32 - int(x).bit_length() for x in a], U32)),
}


# fp32


def rounded(x: NDArray, mode: str) -> NDArray[np.float32]:
    """fp64 to fp32, to nearest or downward, upward, to zero."""
    made = x.astype(np.float32)
    if mode == "rn":
        return made
    lower, upper = np.nextafter(made, np.float32(-np.inf)), np.nextafter(made, np.float32(np.inf))
    down = np.where(made > x, lower, made)
    up = np.where(made < x, upper, made)
    return {"rm": down, "rp": up, "rz": np.where(x > 0, down, up)}[mode].astype(np.float32)


def fused(a: NDArray, b: NDArray, c: NDArray) -> NDArray:
    return a.astype(np.float64) * b + c


FLOATS: dict[str, tuple[int, Function]] = {
    "add": (2, lambda a, b: a.astype(np.float64) + b),
    "sub": (2, lambda a, b: a.astype(np.float64) - b),
    "mul": (2, lambda a, b: a.astype(np.float64) * b),
    "fma": (3, fused),
    "div": (2, lambda a, b: a.astype(np.float64) / b),
    "rcp": (1, lambda a: 1 / a.astype(np.float64)),
    "sqrt": (1, lambda a: np.sqrt(a.astype(np.float64))),
    "rsqrt": (1, lambda a: 1 / np.sqrt(a.astype(np.float64))),
    "ex2": (1, lambda a: np.exp2(a.astype(np.float64))),
    "lg2": (1, lambda a: np.log2(a.astype(np.float64))),
    "tanh": (1, lambda a: np.tanh(a.astype(np.float64))),
    "sin": (1, lambda a: np.sin(a.astype(np.float64))),
    "cos": (1, lambda a: np.cos(a.astype(np.float64))),
    "min": (2, np.fmin),
    "max": (2, np.fmax),
    "neg": (1, np.negative),
    "abs": (1, np.abs),
}
PLAIN = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}  # the same to nearest, faster
EXACT = ("min", "max", "neg", "abs")


def floating(opcode: tuple[str, ...]) -> Meaning | None:
    if opcode[0] not in FLOATS:
        return None
    count, function = FLOATS[opcode[0]]
    mode = next((part for part in opcode if part in ("rm", "rp", "rz")), "rn")
    if "NaN" in opcode:
        function = {"min": np.minimum, "max": np.maximum}[opcode[0]]
    if opcode[0] in EXACT or (opcode[0] in PLAIN and mode == "rn"):
        exact = PLAIN.get(opcode[0], function)
    else:

        def exact(*values: NDArray) -> NDArray:
            return rounded(function(*values), mode)

    return (np.float32,) * count, np.float32, finished(exact, opcode)


def finished(function: Function, opcode: tuple[str, ...]) -> Function:
    """With what opcodes ask for beside: numbers below the normal ones become zero, or all lie in [0, 1]."""
    if "ftz" in opcode:

        def flushed(*values: NDArray) -> NDArray:
            made = function(*(np.where(np.abs(x) < TINY, x * np.float32(0), x) for x in values))
            return np.where(np.abs(made) < TINY, made * np.float32(0), made)

        return flushed
    if "sat" in opcode:
        return lambda *values: np.clip(np.nan_to_num(function(*values), nan=0.0), 0, 1).astype(np.float32)
    return function


# Comparisons

COMPARE: dict[str, Function] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}


def comparison(opcode: tuple[str, ...]) -> Meaning:
    """With a third operand where its result is combined with another predicate."""
    name, kind = opcode[1], DTYPES[opcode[-1]]
    if name.endswith("u") and name[:-1] in COMPARE:  # true of NaN too
        ordered = COMPARE[name[:-1]]

        def function(a: NDArray, b: NDArray) -> NDArray:
            return ordered(a, b) | np.isnan(a) | np.isnan(b)

    elif name == "ne" and kind is np.float32:

        def function(a: NDArray, b: NDArray) -> NDArray:
            return (a != b) & ~(np.isnan(a) | np.isnan(b))

    else:
        function = COMPARE[name]
    joins = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
    join = next((joins[part] for part in opcode[2:] if part in joins), None)
    if join is None:
        return (kind, kind), np.bool_, function
    return (kind, kind, np.bool_), np.bool_, lambda a, b, p: join(function(a, b), p)


# Conversions

TO_HALF = {"bf16": formats.bf16_of, "f16": formats.f16_of, "e4m3": formats.e4m3_of}
FROM_HALF = {"bf16": formats.from_bf16, "f16": formats.from_f16}
FROM_EIGHT = {"e4m3x2": formats.from_e4m3, "e5m2x2": formats.from_e5m2}
TO_WHOLE = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def conversion(opcode: tuple[str, ...]) -> Meaning:
    to, source = opcode[-2], opcode[-1]
    if source in FROM_EIGHT:
        return (np.uint16,), np.uint32, lambda pair: halves_of(pair, FROM_EIGHT[source])
    if to.endswith("x2"):
        make, bits = TO_HALF[to[:-2]], 8 if to.startswith("e") else 16
        word = np.uint16 if bits == 8 else np.uint32
        if bits == 8 and "satfinite" not in opcode:
            raise Fault(f"not interpreted: {'.'.join(opcode)}")
        return (np.float32,) * 2, word, lambda a, b: make(a).astype(word) << word(bits) | make(b).astype(word)
    if to in TO_HALF and source == "f32":
        return (np.float32,), np.uint16, TO_HALF[to]
    if source in FROM_HALF and to == "f32":
        return (np.uint16,), np.float32, FROM_HALF[source]
    made, given = DTYPES[to], DTYPES[source]
    whole = next((TO_WHOLE[part] for part in opcode if part in TO_WHOLE), None)
    if made in (np.float32, np.float64):
        if whole:
            return (given,), made, whole
        return (given,), made, finished(lambda a: a.astype(made), opcode)
    if given in (np.float32, np.float64):
        assert whole is not None
        return (given,), made, clamped(whole, made)
    if "sat" in opcode:
        raise Fault(f"not interpreted: {'.'.join(opcode)}")
    return (given,), made, lambda a: a.astype(made)


def halves_of(pair: NDArray, values: Function) -> NDArray:
    """Two 8-bit floats of 16 bits as two fp16 numbers of 32."""
    low, high = (formats.f16_of(values((pair >> 8 * i & 0xFF).astype(np.uint8))).astype(np.uint32) for i in (0, 1))
    return high << 16 | low


def clamped(whole: Function, made: type) -> Function:
    """To an integer: what is beyond becomes the last one, NaN zero."""
    least, most = int(np.iinfo(made).min), int(np.iinfo(made).max)

    def convert(x: NDArray) -> NDArray:
        value = whole(np.nan_to_num(x.astype(np.float64), nan=0.0, posinf=2.0**70, neginf=-(2.0**70)))
        return np.array([min(max(int(one), least), most) for one in value], made)

    return convert
