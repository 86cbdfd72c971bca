"""Whether a back end is right, before anybody asks whether it is fast.

A class of calls is looked at in several cases: a few uneven rows, a single one, large magnitudes, the model's own shape
and, where a GPU's memory allows, offsets beyond 2^31. In each of them

    values      parts of the result (`pieces`) are compared with double precision (`truth`), all with the reference
    NaN         memory that the call will get was filled with NaN; what the reference has finite must be finite
    inputs      are as before, but for those that the operation may overwrite
    repeats     give equal bits, 100 times where a call is short
    other       values in the same memory give another result, and leave the first as it was (on a few uneven rows)

The error bound is twice the error of the reference in the same dtype, and never more than a fixed limit.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastvid.ops import reference
from fastvid.ops.sparse import Blocks
from fastvid.tuning import inputs, pieces
from fastvid.tuning.calls import MAY_WRITE, Call, split
from fastvid.tuning.inputs import Given
from fastvid.tuning.pieces import Outputs, Piece
from fastvid.tuning.truth import outputs, truth
from fastvid.tuning.weights import tensors

TIMES = 2.0  # the reference's error
FLOOR = {torch.float32: 1e-5, torch.float16: 2.5e-4, torch.bfloat16: 2e-3, torch.uint8: 5e-3}
"""Errors that are not looked at, of values relative to the whole: about what rounding the result makes of it."""
LIMIT = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Errors that are too large whatever the reference's is; large magnitudes are judged by the reference's alone."""
WHOLE = 2.0  # times what is right on parts, next to the reference, whose error comes on top
WORST = 8.0  # the largest error of one value, in errors of the whole, beyond what the reference's is
REPEATS, FEWEST = 100, 2
REPEAT_SECONDS = 0.1
UNEVEN, KEYS = 137, 151  # rows of tokens, keys
UNEVEN_BAND = 5
SMALL = ("uneven rows", "a single row", "large magnitudes")
OFFSETS = 2**31  # elements
SLICE = 2**24  # elements that are compared at a time


class Wrong(Exception):
    """A back end is not right; the message says how."""


class Spoiled(Wrong):
    """The same, and it has changed what other back ends would be given."""


@dataclass
class Case:
    """Inputs, and what has to come out. parts: with the truth of each. errors: of the reference, for each of its
    results the error of the whole and of the worst value."""

    name: str
    given: Given
    parts: list[tuple[Piece, Outputs]]
    expected: Outputs
    errors: list[tuple[float, float]]
    limit: float | None
    seconds: float = REPEAT_SECONDS
    checksums: dict[str, int] = field(default_factory=dict)


def run(op: str, function: Callable[..., Any], given: Given) -> Outputs:
    """The results of a call."""
    args, kwargs = split(op, given)
    return outputs(function(*args, **kwargs))


def fresh(op: str, given: Given) -> Given:
    """The arguments, with copies of those that the operation may overwrite."""
    written = {name: given[name].clone() for name in MAY_WRITE.get(op, ()) if given.get(name) is not None}
    return given | written


# ---------------------------------------------------------------- cases


def small_cases(call: Call, device: torch.device) -> list[Case]:
    """The cases with few rows."""
    op, whole = call.op, inputs.make(call, device)
    few, one = small(op, whole, UNEVEN, UNEVEN_BAND), small(op, inputs.make(call, device, seed=1), 1, 1)
    del whole
    made = [case(op, SMALL[0], few), case(op, SMALL[1], one)]
    made.append(case(op, SMALL[2], inputs.large(few), limited=False))
    for other in made[1:]:
        other.seconds = 0.0
    return made


def whole_case(call: Call, device: torch.device) -> Case:
    """The case of the model's own shape."""
    return case(call.op, "the model's shape", inputs.make(call, device), slices=True)


def far_case(op: str, few: Given, device: torch.device) -> Case | None:
    """The case of offsets beyond 2^31, made of the rows of a small one; None where memory does not allow it."""
    far = far_offsets(op, few, device)
    if far is None:
        return None
    made = case(op, "offsets beyond 2^31", far, slices=True)
    made.seconds = 0.0
    return made


def small(op: str, given: Given, rows: int, band: int) -> Given:
    """The call on few rows."""
    count, kind = pieces.rows_of(op, given)
    if kind == "rows":
        return inputs.copied(pieces.band(op, given, 0, min(band, count)).given)
    made = pieces.tokens(op, given, torch.arange(min(rows, count), device=pieces.given_device(given))).given
    if op == "attention":
        made |= {name: made[name][:, :KEYS] for name in ("k", "v")}
    return inputs.copied(made)


def far_offsets(op: str, few: Given, device: torch.device) -> Given | None:
    """The call on so many rows of tokens that offsets do not fit into 32 bits; None where memory does not allow it, and
    for bands."""
    if pieces.rows_of(op, few)[1] != "tokens" or "order" in few:
        return None
    main = next(few[name] for name in ("q", "qkv", "x") if name in few)
    width = main.numel() // max(1, pieces.rows_of(op, few)[0] * main.shape[0])
    rows = OFFSETS // width + UNEVEN
    needed = 6 * rows * width * main.element_size()
    if device.type != "cuda" or needed > torch.cuda.mem_get_info(device)[0]:
        return None
    return repeated(op, few, rows)


def repeated(op: str, few: Given, rows: int) -> Given:
    """The call on its rows, over and over."""
    count = pieces.rows_of(op, few)[0]
    chosen = torch.arange(rows, device=pieces.given_device(few)) % count
    if op == "attention":
        return few | {"q": few["q"].index_select(1, chosen)}
    return pieces.tokens(op, few, chosen).given


def case(op: str, name: str, given: Given, *, slices: bool = False, limited: bool = True) -> Case:
    """A case, with the truth of its parts and the errors of the reference."""
    expected = run(op, getattr(reference, op), fresh(op, given))
    chosen = pieces.pieces(op, given) if slices else [Piece(given, lambda outs: outs)]
    parts = [(piece, truth(op, piece.given)) for piece in chosen]
    errors = [(0.0, 0.0)] * len(expected)
    for piece, exact in parts:
        found = [error(a, b) for a, b in zip(piece.of(expected), exact, strict=True)]
        errors = [(max(a, c), max(b, d)) for (a, b), (c, d) in zip(errors, found, strict=True)]
    limit = LIMIT[coarsest(given)] if limited and not _coded(op, given) else None
    return Case(name, given, parts, expected, errors, limit, checksums=checksums(op, given))


def _coded(op: str, given: Given) -> bool:
    """Whether results are codes, whose rounding is part of the operation."""
    return op in ("quantize_rows", "quantized_norm") or given.get("rows") is not None


def coarsest(given: Given) -> torch.dtype:
    """The dtype of a call's floating inputs that has the fewest digits."""
    order = list(LIMIT)
    kinds = [
        one.dtype
        for value in given.values()
        for one in (value if isinstance(value, tuple) else (value,))
        if isinstance(one, Tensor) and one.dtype in LIMIT
    ]
    return max(kinds, key=order.index, default=torch.float32)


# ---------------------------------------------------------------- checks


def check(op: str, function: Callable[..., Any], made: Case) -> None:
    """Raises Wrong, with what is wrong, unless a back end is right in a case."""
    given = fresh(op, made.given)
    inputs.poison(max(out.numel() * out.element_size() for out in made.expected), pieces.given_device(given))
    outs = run(op, function, given)
    if changed := [name for name, value in checksums(op, made.given).items() if value != made.checksums[name]]:
        raise Spoiled(f"it writes into its input {', '.join(changed)}")
    check_form(outs, made.expected)
    if op == "to_rgb" and not torch.equal(outs[0], made.expected[0]):
        raise Wrong("its bytes are not those of the reference")
    check_values(outs, made)
    check_repeats(op, function, made, outs)


def check_form(outs: Outputs, expected: Outputs) -> None:
    forms = [[(tuple(one.shape), one.dtype) for one in of] for of in (outs, expected)]
    if forms[0] != forms[1]:
        raise Wrong(f"its results are {forms[0]}, not {forms[1]}")


def check_values(outs: Outputs, made: Case) -> None:
    for piece, exact in made.parts:
        for out, true, (whole, worst) in zip(piece.of(outs), exact, made.errors, strict=True):
            bound, furthest = bound_of(out, whole, made.limit), worst_of(out, whole, worst, made.limit)
            far, farthest = error(out, true)
            if not far <= bound:
                raise Wrong(
                    f"it is {far:.2g} off double precision, the reference {whole:.2g}; at most {bound:.2g} is right"
                )
            if not farthest <= furthest:
                raise Wrong(f"one value is {farthest:.2g} off double precision, with the reference at most {worst:.2g}")
    for out, expected, (whole, worst) in zip(outs, made.expected, made.errors, strict=True):
        bound, furthest = bound_of(out, whole, made.limit), worst_of(out, whole, worst, made.limit)
        check_whole(out, expected, 2 * WHOLE * bound, 2 * WHOLE * furthest)


def bound_of(out: Tensor, whole: float, limit: float | None) -> float:
    """The largest error that is right, for a reference with this one."""
    bound = max(TIMES * whole, FLOOR.get(out.dtype, 0.0))
    return bound if limit is None else min(bound, limit)


def worst_of(out: Tensor, whole: float, worst: float, limit: float | None) -> float:
    """The largest error of one value that is right."""
    bytes_off = 1.0 if out.dtype == torch.uint8 else 0.0
    return max(TIMES * 2 * worst, WORST * bound_of(out, whole, limit), bytes_off)


def check_whole(out: Tensor, expected: Tensor, bound: float, furthest: float) -> None:
    """The whole result, next to the reference's: slice by slice and value by value, so that no part of it can be wrong
    unseen. (A single row in ten thousand hardly shows in the error of all.)"""
    for a, b in slices(out, expected):
        if out.dtype == torch.uint8:
            if (a.int() - b.int()).abs().max() > 1:
                raise Wrong("a byte is more than 1 off the reference")
            continue
        if not torch.equal(a.isfinite(), b.isfinite()):
            raise Wrong("NaN or infinity where the reference has none")
        far, farthest = error(a, b)
        if far > bound:
            raise Wrong(f"a part of the result is {far:.2g} off the reference; at most {bound:.2g} is right")
        if farthest > furthest:
            raise Wrong(f"one value is {farthest:.2g} off the reference; at most {furthest:.2g} is right")


def slices(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Tensors of one shape, in parts of at most SLICE elements along their longest dimension."""
    shape = tensors[0].shape
    if not tensors[0].numel():
        return []
    dim = max(range(len(shape)), key=lambda d: shape[d]) if len(shape) else 0
    size = max(1, SLICE * shape[dim] // tensors[0].numel()) if len(shape) else 1
    return list(zip(*(one.split(size, dim) if len(shape) else (one,) for one in tensors), strict=True))


def check_repeats(op: str, function: Callable[..., Any], made: Case, first: Outputs) -> None:
    end, done, held = time.monotonic() + made.seconds, 1, allocated(first[0].device)
    while done < REPEATS and (done < FEWEST or time.monotonic() < end):
        again = run(op, function, fresh(op, made.given))
        if not all(same_bits(a, b) for a, b in zip(first, again, strict=True)):
            raise Wrong(f"equal calls give other bits (call {done + 1})")
        del again
        done += 1
    kept = (allocated(first[0].device) - held) / (done - 1)  # a workspace is allocated by the first call
    if kept > sum(out.numel() * out.element_size() for out in first) / 2:
        raise Wrong(f"each call keeps {kept:,.0f} bytes of memory")


def allocated(device: torch.device) -> int:
    """Bytes of a GPU that tensors hold; 0 on a CPU, where nobody counts them."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def check_other_values(op: str, function: Callable[..., Any], made: Case) -> None:
    """Raises Wrong if a back end goes by what its inputs held in an earlier call, such as weights that it keeps, or
    writes a later result over an earlier one."""
    given = inputs.copied(made.given)
    first = run(op, function, given)
    kept = [one.clone() for one in first]
    inputs.change(given)
    overwritten = {one.untyped_storage().data_ptr() for value in given.values() for one in tensors(value)}
    expected = run(op, getattr(reference, op), fresh(op, given))
    outs = run(op, function, given)
    check_form(outs, expected)
    for out, like, (whole, worst) in zip(outs, expected, made.errors, strict=True):
        bound, furthest = bound_of(out, whole, made.limit), worst_of(out, whole, worst, made.limit)
        try:
            check_whole(out, like, 2 * WHOLE * bound, 2 * WHOLE * furthest)
        except Wrong as error:
            raise Wrong(f"other values in the same memory are not seen: {error}") from None
    for out, was in zip(first, kept, strict=True):
        if out.untyped_storage().data_ptr() not in overwritten and not same_bits(out, was):
            raise Wrong("a later call writes over an earlier result")


def same_bits(a: Tensor, b: Tensor) -> bool:
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.view(kind), b.view(kind))


def checksums(op: str, given: Given) -> dict[str, int]:
    """A number for each tensor that has to stay as it is."""
    found = {}
    for name, value in given.items():
        if name in MAY_WRITE.get(op, ()):
            continue
        several = tensors(value)
        for number, one in enumerate(several):
            if one.numel():
                kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
                found[f"{name} {number}" if len(several) > 1 else name] = int(one.view(kind).sum(dtype=torch.int64))
    return found


def error(a: Tensor, b: Tensor) -> tuple[float, float]:
    """(||a - b|| / ||b||, largest |a - b|: relative to b's root mean square, or in bytes). Values that are infinite
    alike are equal. NaN anywhere makes both infinite."""
    if not b.numel():
        return 0.0, 0.0
    in_bytes, a, b = a.dtype == torch.uint8, a.double(), b.double()
    alike = (a == b) & ~b.isfinite()
    difference = torch.where(alike, 0.0, a - b)
    size = torch.where(b.isfinite(), b, 0.0).square().mean().sqrt().clamp_min(1e-30)
    far, worst = difference.square().mean().sqrt() / size, difference.abs().max() / (1.0 if in_bytes else size)
    values = torch.stack((far, worst)).nan_to_num(torch.inf, torch.inf).tolist()
    return values[0], values[1]


# ---------------------------------------------------------------- attention's empty lists


def check_empty_lists(function: Callable[..., Any], given: Given) -> None:
    """Queries whose list of tiles is empty get 0, and -inf as their log-sum-exp. A back end that takes no lists passes.

    given: a call of attention on few rows.
    """
    q, k, v = (given[name] for name in ("q", "k", "v"))
    starts = [torch.tensor([0, n // 2, n], dtype=torch.int32, device=q.device) for n in (q.shape[1], k.shape[1])]
    rows, kept = torch.tensor([0, 0, 1], device=q.device), torch.tensor([1], dtype=torch.int32, device=q.device)
    largest = (q.shape[1] - q.shape[1] // 2, k.shape[1] - k.shape[1] // 2)
    blocks = Blocks(starts[0], starts[1], rows, kept, largest)
    try:
        out, lse = function(q, k, v, return_lse=True, blocks=blocks)
    except ValueError:
        return
    empty = q.shape[1] // 2
    if out[:, :empty].count_nonzero() or not (lse[..., :empty] == -torch.inf).all():
        raise Wrong("queries without keys do not get 0 and a log-sum-exp of -inf")
    true, _ = reference.attention(q, k, v, return_lse=True, blocks=blocks)
    if error(out, true)[0] > 2 * LIMIT[coarsest(given)]:
        raise Wrong("block-sparse attention with an empty list is wrong")
