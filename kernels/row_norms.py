"""Norms of rows and the residual stream in front of them, in one pass over memory.

    s   = x                  or  x + y  or  x + y * gate, rounded to the type it is written in: the new residual stream
    out = (s - mean(s)) / sqrt(var(s) + eps) * w + b      layer norm
    out = s / sqrt(mean(s^2) + eps) * w                   RMS norm (not CENTERED)

or out as codes with a scale for each row (codes.py), for 8-bit products.

w, b are weight and bias [d], or 1 + scale and shift: rows of tables [K, d] in fp32, one for each group of tokens, as
gate is. x, y [B, N, d]; index [B, G] says which row of the tables a group of N // G neighboring tokens takes.

A program holds one row in registers, in two pieces of MAIN and TAIL columns: every width that models have (1536, 3072,
5120) is a sum of two powers of two, so that no lane idles and nothing is masked. Several rows a program would share
what they read of the tables, but then both have to change their layout in shared memory (20 to 40 barriers in place of
7 or none); so the tables are read by every program, from the L1 cache, which everything else leaves to them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvid.kernels.ahead import Variant
from fastvid.kernels.codes import Codes, codes_of, scale_of
from fastvid.kernels.devices import Arch, architecture, entry, options

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INDEX_DTYPES = (torch.int32, torch.int64)
MAX_WIDTH = 16384
MIN_TAIL = 256  # columns that the 32 lanes of a warp take in accesses of 16 bytes


# (architecture, widest row) -> how this kernel and that of qk_norm_rope.py are launched. Up to 48 values a thread at
# 6144 columns, in accesses of 16 bytes; without a limit the compiler stays just below 64 or 80 registers in narrow
# rows, at the price of spilling two. Chosen by what the compiler makes of them; not tuned on a GPU yet.
CONFIGS = {
    (80, 2048): {"num_warps": 2, "maxnreg": 128},
    (80, 8192): {"num_warps": 4},
    (80, MAX_WIDTH): {"num_warps": 8},
}
WIDTHS = sorted({width for _, width in CONFIGS})


def choose(arch: Arch, width: int) -> dict[str, int]:
    """The options for rows of a width."""
    return options(arch, entry(CONFIGS, arch, next(widest for widest in WIDTHS if widest >= width)))


def main_and_tail(size: int, least: int) -> tuple[int, int]:
    """(main, tail): powers of two that hold size together, with little to spare; tail is 0, or at least `least`."""
    whole = triton.next_power_of_2(size)
    main = whole // 2
    tail = max(triton.next_power_of_2(size - main), least)
    return (main, tail) if main + tail < whole else (whole, 0)


@triton.jit
def _load(ptr, columns, width, MASKED: tl.constexpr, STREAM: tl.constexpr):
    """One piece of a row in fp32 [piece], 0 outside. STREAM: it is read this once, and stays out of L1."""
    mask = columns < width if MASKED else None
    other = 0.0 if MASKED else None
    if STREAM:
        x = tl.load(ptr + columns, mask=mask, other=other, cache_modifier=".cg")
    else:
        x = tl.load(ptr + columns, mask=mask, other=other, eviction_policy="evict_last")
    return x.to(tl.float32)


@triton.jit
def _stream(x_ptr, y_ptr, gate_ptr, sum_ptr, columns, width, MASKED: tl.constexpr):
    """One piece of the residual stream; written, if it is new."""
    s = _load(x_ptr, columns, width, MASKED, True)
    if y_ptr is not None:
        y = _load(y_ptr, columns, width, MASKED, True)
        if gate_ptr is not None:
            y *= _load(gate_ptr, columns, width, MASKED, False)
        new = (s + y).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + columns, new, mask=columns < width if MASKED else None)
        s = new.to(tl.float32)
    return s


@triton.jit
def _result(s, inverse, weight_ptr, bias_ptr, columns, width, ONE: tl.constexpr, MASKED: tl.constexpr):
    """One piece of the result from values s. ONE: the weight is 1 + what the table says."""
    weight = _load(weight_ptr, columns, width, MASKED, False)
    out = s * inverse * (1.0 + weight if ONE else weight)
    if bias_ptr is not None:
        out += _load(bias_ptr, columns, width, MASKED, False)
    return out


@triton.jit
def _write(out_ptr, out, columns, width, MASKED: tl.constexpr):
    tl.store(out_ptr + columns, out.to(out_ptr.dtype.element_ty), mask=columns < width if MASKED else None)


@triton.jit
def _folded(s, t, TAIL: tl.constexpr):
    """s [MAIN], or what adding it up in TAIL columns makes of it and t, so that there is one sum over threads."""
    return tl.sum(s.reshape(s.shape[0] // TAIL, TAIL), 0) + t if TAIL else s


@triton.jit
def row_norm_kernel(
    x_ptr,
    y_ptr,
    gate_ptr,
    weight_ptr,
    bias_ptr,
    index_ptr,
    sum_ptr,
    out_ptr,
    scale_ptr,
    tokens,
    group_size,
    width,
    x_batch,
    x_row,
    y_batch,
    y_row,
    sum_batch,
    sum_row,
    out_batch,
    out_row,
    gate_row,
    weight_row,
    bias_row,
    index_batch,
    index_group,
    eps,
    CENTERED: tl.constexpr,
    FLOATS: tl.constexpr,
    ONE: tl.constexpr,
    MASKED: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
):
    batch = (tl.program_id(0) // tokens).to(tl.int64)
    token = (tl.program_id(0) % tokens).to(tl.int64)
    if index_ptr is not None:
        row = tl.load(index_ptr + batch * index_batch + token // group_size * index_group).to(tl.int64)
        if gate_ptr is not None:
            gate_ptr += row * gate_row
        if ONE:
            weight_ptr += row * weight_row
            bias_ptr += row * bias_row
    x_ptr += batch * x_batch + token * x_row
    if y_ptr is not None:
        y_ptr += batch * y_batch + token * y_row
        sum_ptr += batch * sum_batch + token * sum_row
    main, tail = tl.arange(0, MAIN), MAIN + tl.arange(0, TAIL or 1)
    MASKED_MAIN: tl.constexpr = MASKED and TAIL == 0
    s = _stream(x_ptr, y_ptr, gate_ptr, sum_ptr, main, width, MASKED_MAIN)
    t = s
    if TAIL:
        t = _stream(x_ptr, y_ptr, gate_ptr, sum_ptr, tail, width, MASKED)
    if out_ptr is not None:
        out_ptr += batch * out_batch + token * out_row
        if CENTERED:
            mean = tl.div_rn(tl.sum(_folded(s, t, TAIL), 0), width + 0.0)
            s = tl.where(main < width, s - mean, 0.0) if MASKED_MAIN else s - mean
            if TAIL:
                t = tl.where(tail < width, t - mean, 0.0) if MASKED else t - mean
        square = tl.div_rn(tl.sum(_folded(s * s, t * t, TAIL), 0), width + 0.0)
        inverse = tl.div_rn(1.0, tl.sqrt_rn(square + eps))
        s = _result(s, inverse, weight_ptr, bias_ptr, main, width, ONE, MASKED_MAIN)
        if TAIL:
            t = _result(t, inverse, weight_ptr, bias_ptr, tail, width, ONE, MASKED)
        if scale_ptr is not None:
            kind = x_ptr.dtype.element_ty  # of the result, were it no codes
            s, t = s.to(kind).to(tl.float32), t.to(kind).to(tl.float32)
            most = tl.max(tl.abs(s), 0)
            if TAIL:
                most = tl.maximum(most, tl.max(tl.abs(t), 0))
            scale = scale_of(most, FLOATS)
            tl.store(scale_ptr + tl.program_id(0), scale)
            s, t = codes_of(s, scale, FLOATS), codes_of(t, scale, FLOATS)
        _write(out_ptr, s, main, width, MASKED_MAIN)
        if TAIL:
            _write(out_ptr, t, tail, width, MASKED)


PLAIN = ("y_ptr", "gate_ptr", "sum_ptr")
ABSENT = {  # what an operation has no use for
    "gated, modulated": ("scale_ptr",),
    "modulated": (*PLAIN, "scale_ptr"),
    "gated": ("weight_ptr", "bias_ptr", "out_ptr", "scale_ptr"),
    "gated, layer": ("scale_ptr",),
    "added, modulated": ("gate_ptr", "scale_ptr"),
    "layer": (*PLAIN, "index_ptr", "scale_ptr"),
    "rms": (*PLAIN, "index_ptr", "bias_ptr", "scale_ptr"),
    "gated, modulated, to int8": (),
    "gated, modulated, to e4m3": (),
}


def variants() -> list[Variant]:
    """Everything in one pass, at the width of Wan 14B; each operation at that of 1.3B; other widths and types."""
    cases = [("gated, modulated", 5120, "bf16")]
    cases += [(norm, 1536, "bf16") for norm in ABSENT]
    cases += [("gated, modulated", width, "bf16") for width in (100, 3072, MAX_WIDTH)]
    cases += [(norm, 1536, dtype) for norm in ("gated, modulated", "rms") for dtype in ("fp16", "fp32")]
    return [_variant(*case) for case in cases]


def _variant(norm: str, width: int, dtype: str) -> Variant:
    modulated, absent = "modulated" in norm, ABSENT[norm]
    main, tail = main_and_tail(width, MIN_TAIL)
    pointers = dict.fromkeys(("x_ptr", "y_ptr", "sum_ptr", "out_ptr"), f"*{dtype}")
    pointers |= {"gate_ptr": "*fp32", "scale_ptr": "*fp32"}
    if "to" in norm:
        pointers["out_ptr"] = "*i8" if "int8" in norm else "*u8"
    pointers |= dict.fromkeys(("weight_ptr", "bias_ptr"), "*fp32" if modulated else f"*{dtype}")
    pointers = {name: kind for name, kind in pointers.items() if name not in absent}
    strides = [f"{name}_{step}" for name in ("x", "y", "sum", "out") for step in ("batch", "row")]
    strides += ["gate_row", "weight_row", "bias_row"]
    types = (
        pointers | dict.fromkeys((*strides, "width", "tokens", "group_size", "index_batch"), "i32") | {"eps": "fp32"}
    )
    constants = {"CENTERED": "bias_ptr" not in absent, "FLOATS": "e4m3" in norm, "ONE": modulated}
    constants |= {"MASKED": width != main + tail}
    return Variant(
        f"{norm} {width} {dtype}",
        row_norm_kernel,
        types if "index_ptr" in absent else types | {"index_ptr": "*i64"},
        dict.fromkeys(absent) | constants | {"MAIN": main, "TAIL": tail, "index_group": 1},
        [*pointers, *strides, "width"] if width % 16 == 0 else list(pointers),
        {"enable_fp_fusion": True, **choose(90, width)},
    )


def row_norm(
    x: Tensor,
    out: Tensor | Codes | None,
    *,
    eps: float = 0.0,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    total: Tensor | None = None,
    index: Tensor | None = None,
    modulated: bool = False,
) -> None:
    """Write the norm of x, or of x + y * gate, into out, and that sum into total; x, y, out, total [B, N, d].

    weight and bias [d]; without a bias it is the RMS norm. modulated: they are scale and shift [K, d] in fp32, and the
    weight is 1 + scale. gate [K, d] in fp32, or None for x + y. index [B, G]: the tables' row of each group of tokens.
    out None: only the sum; Codes: the norm, rounded to x's type, as codes. Raises ValueError for shapes, types, strides
    and devices that do not go together.
    """
    assert (y is None) == (total is None) and (out is None) == (weight is None), "what is to be written?"
    assert (index is None) == (gate is None and not modulated) and (bias is not None or not modulated)
    out, scales = (out.codes, out.scales) if isinstance(out, Codes) else (out, None)
    _check(x, out, y, total, scales)
    _check_tables(x, index, gate, weight, bias, modulated)
    B, N, d = x.shape
    if x.numel() == 0:
        return
    main, tail = main_and_tail(d, MIN_TAIL)
    rows = [s for t in (x, y, total, out) for s in ((0, 0) if t is None else t.stride()[:2])]
    tables = [0 if t is None or t.ndim == 1 else t.stride(0) for t in (gate, weight, bias)]
    groups = (0, 0) if index is None else index.stride()
    with torch.cuda.device_of(x):  # the device guard; nothing for the interpreter's CPU tensors
        row_norm_kernel[(B * N,)](
            *(x, y, gate, weight, bias, index, total, out, scales),
            *(N, N if index is None else N // index.shape[1], d),
            *(*rows, *tables, *groups, eps),
            CENTERED=bias is not None,
            FLOATS=out is not None and out.dtype == torch.uint8,
            ONE=modulated,
            MASKED=d != main + tail,
            MAIN=main,
            TAIL=tail,
            enable_fp_fusion=True,
            **choose(architecture(x.device), d),
        )


def check_tensor(
    name: str, x: Tensor, shape: Sequence[int | None], dtypes: Sequence[torch.dtype], like: Tensor
) -> None:
    """ValueError unless x has the shape (None: any size), one of the types, the device of `like` and dense rows."""
    sizes = [size if want is None else want for want, size in zip(shape, x.shape, strict=False)]
    fits = x.ndim == len(shape) and sizes == list(x.shape) and (x.shape[-1] <= 1 or x.stride(-1) == 1)
    if not fits or x.dtype not in dtypes or x.device != like.device:
        wanted = f"[{', '.join('any' if size is None else str(size) for size in shape)}]"
        raise ValueError(
            f"{name} is {list(x.shape)} {x.dtype} on {x.device}, strides {x.stride()}; {wanted} "
            f"{' or '.join(map(str, dtypes))} on {like.device} is needed, with 1 as its last stride"
        )


def _check(x: Tensor, out: Tensor | None, y: Tensor | None, total: Tensor | None, scales: Tensor | None = None) -> None:
    check_tensor("x", x, (None, None, None), DTYPES, x)
    if x.shape[2] > MAX_WIDTH:
        raise ValueError(f"rows of x are {x.shape[2]} wide; at most {MAX_WIDTH} is allowed")
    if scales is not None:
        check_tensor("scales", scales, (*x.shape[:2], 1), (torch.float32,), x)
        if not scales.is_contiguous():
            raise ValueError(f"scales have strides {scales.stride()}; they must be contiguous")
    kinds = (x.dtype,) if scales is None else (torch.int8, torch.uint8)
    for name, tensor, types in (("out", out, kinds), ("total", total, (x.dtype,))):
        if tensor is not None:
            check_tensor(name, tensor, x.shape, types, x)
    if y is not None:
        check_tensor("y", y, x.shape, DTYPES, x)


def _check_tables(
    x: Tensor, index: Tensor | None, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None, modulated: bool
) -> None:
    names = ("scale", "shift") if modulated else ("weight", "bias")
    for name, tensor in zip(("gate", *names), (gate, weight, bias), strict=True):
        if tensor is not None and (modulated or name == "gate"):
            check_tensor(name, tensor, (None, x.shape[2]), (torch.float32,), x)
        elif tensor is not None:
            check_tensor(name, tensor, (x.shape[2],), DTYPES, x)
    if index is None:
        return
    fits = index.ndim == 2 and index.shape[0] == x.shape[0] and index.shape[1] > 0 and x.shape[1] % index.shape[1] == 0
    if not fits or index.dtype not in INDEX_DTYPES or index.device != x.device:
        raise ValueError(
            f"index is {list(index.shape)} {index.dtype} on {index.device}; [{x.shape[0]}, G] in int32 or int64 on "
            f"{x.device} is needed, with G a divisor of {x.shape[1]}"
        )
