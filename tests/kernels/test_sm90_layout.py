"""csrc/'s reading of sm_90a against NVIDIA's own: what CuTe says of the tiles that the kernels use, as numbers.

The emulator is written by those who wrote the kernels, so it can't show what both misread. These tables come from
elsewhere: they are what CuTe printed (github.com/NVIDIA/cutlass, commit 7107b05535f8977f5ecb9d01ee203205b1fd9bc4;
`tile_to_shape` of `Layout_K_SW128_Atom` and `Layout_MN_SW128_Atom`, fragments of `partition_A` and `partition_B`,
`MMA_Traits` of the SM90 instructions, operands of `mma_sm90_gmma.hpp`). Both the kernels' code and the emulator are
held against them.

A layout is shape:stride, as CuTe prints it: the first of a mode's numbers goes fastest.
"""

from __future__ import annotations

import ast
import ctypes
import functools
import itertools
import random as chance
import re
from typing import Any

import numpy as np
import pytest
from compiled_host import CXX, ROOT, compile_host

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CXX is None, reason="no C++ compiler is found")]

# Tiles in shared memory, in values of 16 bits, and in bytes Swizzle<3,4,3>: (row, column) of rows along K...
ALONG_K = {
    (96, 64): "((8,12),(64,1)):((64,512),(1,0))",
    (128, 64): "((8,16),(64,1)):((64,512),(1,0))",
    (128, 128): "((8,16),(64,2)):((64,512),(1,8192))",
    (192, 64): "((8,24),(64,1)):((64,512),(1,0))",
}
# ... and (n, k) of values: N, the head dimension, is contiguous.
ALONG_N = {
    (64, 128): "((64,1),(8,16)):((1,0),(64,512))",
    (128, 128): "((64,2),(8,16)):((1,8192),(64,512))",
}
# Bytes at which CuTe finds elements of a tile that begins at 0.
PLACES_K = {
    (0, 0): 0, (1, 0): 144, (1, 8): 128, (7, 63): 910, (8, 0): 1024, (9, 17): 1202, (37, 45): 4746, (63, 63): 8078,
    (5, 31): 750, (66, 7): 8494, (64, 64): 24576, (100, 99): 29190, (127, 127): 32654, (127, 64): 32752,
}  # fmt: skip
PLACES_N = {
    (0, 0): 0, (1, 0): 2, (1, 8): 1026, (7, 63): 8190, (8, 0): 16, (9, 17): 2178, (37, 45): 5786, (63, 63): 8078,
    (5, 31): 4090, (64, 64): 24576, (100, 99): 29176, (127, 127): 32654, (127, 64): 24702, (66, 7): 17396,
}  # fmt: skip

# Descriptors of tiles that begin at 0, for each step of 16 along K. Their leading offset counts nowhere but between
# panels of 64 columns of values.
ROWS = 0x4000004000010000  # base offset 0, 1,024 bytes between eights of rows, 128-byte swizzle
STEPS = {64: (0x0, 0x2, 0x4, 0x6), 128: (0x0, 0x2, 0x4, 0x6, 0x400, 0x402, 0x404, 0x406)}
SECOND_ROWS = 0x200  # rows 64 to 127 of a left matrix
PANELS = {64: 0x4000004000000000, 128: 0x4000004004000000}
PANEL_STEPS = (0x0, 0x80, 0x100, 0x180, 0x200, 0x280, 0x300, 0x380)
LEADING = 0x3FFF << 16
# Of 176 keys, not printed by CuTe but by its rule: panels of 64 columns lie 176 * 128 bytes apart, 0x580 sixteens.
WIDE_STEPS = (0x0, 0x2, 0x4, 0x6, 0x580, 0x582, 0x584, 0x586)
WIDE_PANELS = {128: 0x4000004005800000}
WIDE_PANEL_STEPS = (*PANEL_STEPS, 0x400, 0x480, 0x500)
OF_KEYS = {128: (STEPS[128], PANELS, PANEL_STEPS), 176: (WIDE_STEPS, WIDE_PANELS, WIDE_PANEL_STEPS)}

# (thread, value) -> row + 64 * column of m64nNk16: the accumulators, and a left matrix in registers.
ACCUMULATORS = "((4,8,4),(2,2,{eights})):((128,1,16),(64,8,512))"
LEFT = "((4,8,4),(2,2,2)):((128,1,16),(64,8,512))"

# The same of 8 bits, which are along K alone: bytes of a row -> layout, places, descriptor, its rows from 64 on. A step
# has 32 values. 128 bytes are swizzled as above, 64 by Swizzle<2,4,3>: bits 7 and 8 are mixed into bits 4 and 5.
ALONG_K8 = {
    64: "((8,16),(64,1)):((64,512),(1,0))",
    128: "((8,16),(128,1)):((128,1024),(1,0))",
}
PLACES_K8 = {
    64: {(0, 0): 0, (1, 0): 64, (9, 17): 593, (5, 31): 383, (66, 7): 4247},
    128: {
        (0, 0): 0, (1, 0): 144, (1, 8): 152, (7, 63): 975, (8, 0): 1024, (9, 17): 1153, (37, 45): 4861, (63, 63): 8143,
        (64, 64): 8256, (100, 99): 12835, (127, 127): 16271, (127, 64): 16304, (5, 31): 719, (66, 7): 8487,
    },
}  # fmt: skip
ROWS8 = {64: 0x8000002000010000, 128: ROWS}
SECOND_ROWS8 = {64: 0x100, 128: SECOND_ROWS}
LEFT8 = "((4,8,4),(4,2,2)):((256,1,16),(64,8,1024))"

# What follows the predicate of an instruction; K is 0, MN is 1. Of 8 bits there is one layout alone, and integers have
# no signs.
OPERANDS = {
    "shared": ("scale a", "scale b", "major a", "major b"),
    "registers": ("scale a", "scale b", "major b"),
    "8 bits": ("scale a", "scale b"),
}
K, MN = 0, 1


def place(layout: str, *coordinate: Any) -> Any:
    """Where a layout has a coordinate, a number for each of its modes, or arrays of them."""
    shape, stride = (ast.literal_eval(part) for part in layout.split(":"))
    total = 0
    for mode, steps, number in zip(shape, stride, coordinate, strict=True):
        for size, step in zip(mode, steps, strict=True):
            total, number = total + number % size * step, number // size
        assert np.all(number == 0), f"{coordinate} lies outside {layout}"
    return total


def byte(layout: str, *coordinate: Any) -> Any:
    """Of an element of 16 bits, with Swizzle<3,4,3>: bits 7 to 9 are mixed into bits 4 to 6."""
    plain = 2 * place(layout, *coordinate)
    return plain ^ (plain >> 3 & 0x70)


def byte8(row: int, *coordinate: Any) -> Any:
    """Of a value of 8 bits, in rows of 64 bytes or of 128."""
    plain = place(ALONG_K8[row], *coordinate)
    return plain ^ (plain >> 3 & (0x30 if row == 64 else 0x70))


@functools.cache
def library() -> ctypes.CDLL:
    return compile_host("layout_probe.cpp")


def told(function: Any, *arguments: int) -> list[int]:
    room = (ctypes.c_uint64 * 64)()
    return list(room[: function(*arguments, room)])


def numbered(eights: int) -> np.ndarray:
    """[128 threads, values] of accumulators that hold row + 64 * column."""
    made = place(ACCUMULATORS.format(eights=eights), *np.ogrid[:128, : 4 * eights])
    assert np.array_equal(np.sort(made, None), np.arange(64 * 8 * eights))
    return made.astype(np.float32)


def bits(wide: np.ndarray) -> np.ndarray:
    """bfloat16 as it was before it was widened."""
    return (wide.view(np.uint32) >> 16).astype(np.uint16)


def test_layouts_are_read_as_cute_reads_them() -> None:
    for layouts, places in ((ALONG_K, PLACES_K), (ALONG_N, PLACES_N)):
        for sizes, layout in layouts.items():
            held = {at: where for at, where in places.items() if at[0] < sizes[0] and at[1] < sizes[1]}
            assert len(held) >= 9 and {at: byte(layout, *at) for at in held} == held
    for row, places in PLACES_K8.items():
        assert {at: byte8(row, *at) for at in places} == places


# The kernels


@pytest.mark.parametrize(("keys", "head_dim"), [(128, 64), (128, 128), (176, 128)])
@pytest.mark.parametrize("group", [0, 1])
def test_attention_multiplies_what_cute_would(keys: int, head_dim: int, group: int) -> None:
    lib, tile, before = library(), keys * head_dim * 2, 128 * head_dim * 2
    stages, (key_steps, panels, panel_steps) = lib.probe_attention_stages(keys, head_dim, 2), OF_KEYS[keys]
    for stage in range(stages):
        base = 1024 * chance.randint(0, (2**18 - before - 2 * stages * tile) // 1024 - 1)
        queries, first = ROWS + base // 16 + group * SECOND_ROWS, ROWS + (base + before + stage * tile) // 16
        pairs = zip(STEPS[head_dim], key_steps, strict=False)
        wanted = [(queries + step, first + key_step, int(i > 0)) for i, (step, key_step) in enumerate(pairs)]
        assert told(lib.probe_attention, keys, head_dim, 0, group, stage, base) == [*itertools.chain(*wanted)]

        values = panels[head_dim] + (base + before + (stages + stage) * tile) // 16
        made = told(lib.probe_attention, keys, head_dim, 1, group, stage, base)
        assert made[::2] == list(range(keys // 16))
        unread = LEADING if head_dim == 64 else 0  # of one panel
        assert [one & ~unread for one in made[1::2]] == [values + step for step in panel_steps]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("group", [0, 1])
def test_attention_in_8_bits_multiplies_what_cute_would(head_dim: int, group: int) -> None:
    lib, tile = library(), 128 * head_dim
    stages = lib.probe_attention_stages(128, head_dim, 1)
    for stage in range(stages):
        base = 1024 * chance.randint(0, (2**18 - (1 + 2 * stages) * tile) // 1024 - 1)
        queries = ROWS8[head_dim] + base // 16 + group * SECOND_ROWS8[head_dim]
        keys = ROWS8[head_dim] + (base + (1 + stage) * tile) // 16
        wanted = [(queries + 2 * k, keys + 2 * k, int(k > 0)) for k in range(head_dim // 32)]
        assert told(lib.probe_attention8, head_dim, 0, group, stage, base) == [*itertools.chain(*wanted)]
        values = ROWS8[128] + (base + (1 + stages + stage) * tile) // 16
        wanted = [(k, values + 2 * k, int(k > 0)) for k in range(4)]
        assert told(lib.probe_attention8, head_dim, 1, group, stage, base) == [*itertools.chain(*wanted)]


@pytest.mark.parametrize("width", [96, 128])
def test_convolution_multiplies_what_cute_would(width: int) -> None:
    for depth in range(1, 5):
        base = 1024 * chance.randint(0, 90)
        wanted = [(k, ROWS + base // 16 + step) for k, step in enumerate(STEPS[64][:depth])]
        assert told(library().probe_conv, width, depth, base) == [*itertools.chain(*wanted)]


@pytest.mark.parametrize("group", range(4))
@pytest.mark.parametrize("tile_w", [8, 16, 32, 64])
def test_pixels_lie_as_a_left_matrix(group: int, tile_w: int) -> None:
    """Registers of a tap: for each of its steps of 16 channels, which pixel of the box and which channel they hold."""
    box_w, threads, steps, values = tile_w + 2, *np.ogrid[:128, :4, :8]
    at = place(LEFT, threads, values)
    pixel, channel = at % 64 + 64 * group, at // 64 + 16 * steps
    for _ in range(4):
        rows = chance.randint(200, 256)  # a box of as many as a load takes here; rows beyond it are not looked at
        box = np.arange(rows * 64, dtype=np.uint16).reshape(rows, 64)
        row, left = pixel // tile_w * box_w + pixel % tile_w, np.zeros((128, 16), np.uint32)
        shift = -int(row.min()) + chance.randint(0, rows - int(np.ptp(row)) - 1)
        library().probe_conv_left(box.ctypes, rows, tile_w, box_w, group, shift, left.ctypes)
        assert np.array_equal(left.view(np.uint16).reshape(128, 4, 8), box[row + shift, channel])


def test_weights_lie_as_a_left_matrix() -> None:
    """Registers of a step of 16 keys: which score each half of them holds."""
    scores, weights = numbered(22), np.zeros((128, 44), np.uint32)
    library().probe_weights(scores.ctypes, weights.ctypes)
    threads, steps, values = np.ogrid[:128, :11, :8]
    assert np.array_equal(weights.view(np.uint16).reshape(128, 11, 8), place(LEFT, threads, values) + 64 * 16 * steps)


def test_weights_of_8_bits_meet_their_keys() -> None:
    """A place of a left matrix has the weight of the key whose values lie at that place of a row."""
    order = np.array([library().probe_key_of_slot(slot) for slot in range(128)])
    threads, steps, values = np.ogrid[:128, :4, :16]
    at = place(LEFT8, threads, values)
    row, slot = np.broadcast_to(at % 64, (128, 4, 16)), at // 64 + 32 * steps
    accumulators = numbered(16)  # row + 64 * key
    for given, wanted in ((accumulators % 64, row), (accumulators // 64, order[slot])):
        weights = np.zeros((128, 16), np.uint32)
        library().probe_weights8(np.ascontiguousarray(given).ctypes, weights.ctypes)
        assert np.array_equal(weights.view(np.uint8).reshape(128, 4, 16), wanted)


@pytest.mark.parametrize("group", range(4))
@pytest.mark.parametrize(("kernel", "columns"), [("attention", 64), ("attention", 128), ("conv", 96), ("conv", 128)])
def test_accumulators_are_stored_where_they_belong(kernel: str, columns: int, group: int) -> None:
    groups = {"attention": 2, "conv": 4}[kernel]
    out, group = np.full((64 * groups, columns), 2**16 - 1, np.uint16), group % groups
    getattr(library(), f"probe_{kernel}_store")(columns, group, numbered(columns // 8).ctypes, out.ctypes)
    half = out[64 * group : 64 * group + 64]
    assert np.array_equal(half, np.arange(64)[:, None] + 64 * np.arange(columns))
    assert (np.delete(out, range(64 * group, 64 * group + 64), 0) == 2**16 - 1).all()


def test_operands_of_instructions() -> None:
    """Signs of both matrices positive, and of values alone the columns are along N."""
    meant = {
        ("attention", "SCORES"): ("shared", {"major a": K, "major b": K}),
        ("attention", "VALUES"): ("registers", {"major b": MN}),
        ("conv", "WGMMA"): ("registers", {"major b": K}),
        ("attention_eight", "VALUES8"): ("8 bits", {}),
    }
    for (kernel, macro), (left, majors) in meant.items():
        text = (ROOT / f"csrc/{kernel}_sm90.h").read_text()
        body = re.search(rf"#define FASTVID_{macro}\(.*?[^\\]\n", text, re.DOTALL)[0]
        after = re.findall(r"\bp, ([-\d, ]+);", body.split("mma_async")[1])
        assert len(after) == 1
        flags = dict(zip(OPERANDS[left], map(int, after[0].split(", ")), strict=True))
        assert flags == {"scale a": 1, "scale b": 1} | majors
    text = (ROOT / "csrc/attention_eight_sm90.h").read_text()
    flags = dict(re.findall(r'FASTVID_SCORES8\("(\S+)", "(.*?)"', text))
    assert flags == {"f32.e4m3.e4m3": ", 1, 1", "s32.s8.s8": ""}


# The emulator


@pytest.mark.parametrize(("rows", "columns"), ALONG_K)
def test_emulated_loads_and_reads_along_k(rows: int, columns: int) -> None:
    lib, base = library(), 1024 * chance.randint(1, 50)
    tensor = np.arange(rows * columns, dtype=np.uint16).reshape(rows, columns)
    lies = np.zeros(rows * columns, np.uint16)
    lib.probe_loaded(tensor.ctypes, rows, columns, base, lies.ctypes)
    assert np.array_equal(lies[byte(ALONG_K[rows, columns], *np.ogrid[:rows, :columns]) // 2], tensor)
    for i, step in enumerate(STEPS[columns]):
        for first, count in ((0, rows), (64, 64)) if rows == 128 else ((0, rows),):
            made = np.zeros((count, 16), np.float32)
            descriptor = ctypes.c_uint64(ROWS + base // 16 + step + (SECOND_ROWS if first else 0))
            lib.probe_read(tensor.ctypes, rows, columns, base, descriptor, 0, count, made.ctypes)
            assert np.array_equal(bits(made), tensor[first : first + count, 16 * i : 16 * i + 16])


@pytest.mark.parametrize(("columns", "rows"), ALONG_N)
def test_emulated_loads_and_reads_along_n(columns: int, rows: int) -> None:
    """Values [keys, head dimension]: loaded in the same way, read transposed."""
    lib, base = library(), 1024 * chance.randint(1, 50)
    tensor = np.arange(rows * columns, dtype=np.uint16).reshape(rows, columns)
    lies = np.zeros(rows * columns, np.uint16)
    lib.probe_loaded(tensor.ctypes, rows, columns, base, lies.ctypes)
    assert np.array_equal(lies[byte(ALONG_N[columns, rows], *np.ogrid[:columns, :rows]) // 2], tensor.T)
    for i, step in enumerate(PANEL_STEPS):
        made = np.zeros((16, columns), np.float32)
        descriptor = ctypes.c_uint64(PANELS[columns] + base // 16 + step)
        lib.probe_read(tensor.ctypes, rows, columns, base, descriptor, 1, columns, made.ctypes)
        assert np.array_equal(bits(made), tensor[16 * i : 16 * i + 16])


@pytest.mark.parametrize("columns", [64, 128])
def test_emulated_loads_and_reads_of_8_bits(columns: int) -> None:
    lib, base, rows = library(), 1024 * chance.randint(1, 50), 128
    tensor = np.random.default_rng(chance.randrange(2**32)).integers(0, 256, (rows, columns), np.uint8)
    for step in range(columns // 32):
        lies, made = np.zeros(rows * columns, np.uint8), np.zeros((rows, 32), np.uint8)
        descriptor = ctypes.c_uint64(ROWS8[columns] + base // 16 + 2 * step)
        lib.probe_loaded8(tensor.ctypes, rows, columns, base, descriptor, lies.ctypes, made.ctypes)
        assert np.array_equal(lies[byte8(columns, *np.ogrid[:rows, :columns])], tensor)
        assert np.array_equal(made, tensor[:, 32 * step : 32 * step + 32])


def test_emulated_registers() -> None:
    lib, to, layout = library(), (ctypes.c_int * 4)(), ACCUMULATORS.format(eights=24)
    for row, column in itertools.product(range(64), range(192)):
        lib.probe_holders(row, column, to)
        assert place(layout, to[0], to[1]) == row + 64 * column
        # A register holds two values, of even k the lower one.
        assert place(LEFT, to[2], 2 * to[3] + column % 2) == row + 64 * (column % 16)
    for row, k in itertools.product(range(64), range(32)):
        lib.probe_left_holder8(row, k, to)
        assert place(LEFT8, to[0], 4 * to[1] + k % 4) == row + 64 * k
