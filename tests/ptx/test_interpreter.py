"""The interpreter on a few lines of PTX each, by hand: arithmetic, branches, barriers, and what it has to refuse."""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np
import pytest
import torch
from ptx.formats import E4M3, bf16_of, e4m3_of, f16_of
from ptx.machine import Launch, Machine
from ptx.memory import Fault, Global
from ptx.parse import parse
from ptx.tma import Map
from ptx.wgmma import addresses
from torch import Tensor

HEADER = """
.extern .shared .align 1024 .b8 memory[];
.visible .entry kernel(.param .u64 out, .param .u64 in, .param .align 64 .b8 map[128])
.maxntid 384, 1, 1
{
.reg .pred %p<20>; .reg .b16 %h<20>; .reg .b32 %r<40>; .reg .f32 %f<40>; .reg .b64 %d<20>;
ld.param.u64 %d0, [out];
ld.param.u64 %d1, [in];
mov.u32 %r0, %tid.x;
mul.wide.u32 %d2, %r0, 4;
add.s64 %d0, %d0, %d2;
add.s64 %d1, %d1, %d2;
"""


def run(
    code: str,
    given: Tensor | None = None,
    threads: int = 32,
    seed: int = 0,
    tensor: Map | None = None,
    cluster: int = 1,
) -> Tensor:
    """int32 [threads], what the threads of each block store at [%d0]; [%d1] is their own value of `given`."""
    out = torch.full((threads * cluster,), -7, dtype=torch.int32)
    given = torch.zeros(threads, dtype=torch.int32) if given is None else given
    kernel = parse(HEADER + code + "\nret;\n}", "kernel")
    params = struct.pack("<QQ", out.data_ptr(), given.data_ptr()).ljust(64, b"\0")
    params += tensor.encode() if tensor else bytes(128)
    launch = Launch(kernel, (cluster, 1, 1), (threads, 1, 1), 8192, params, cluster)
    Machine(launch, Global([out, given]), seed).run()
    return out


def lines(*code: str) -> str:
    return "".join(f"{line};\n" for line in code)


# Arithmetic

INTEGERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "div.s32 %r2, %r1, 7": lambda x: (np.sign(x) * (np.abs(x.astype(np.int64)) // 7)).astype(np.int32),
    "rem.s32 %r2, %r1, 7": lambda x: np.fmod(x, 7),
    "shr.s32 %r2, %r1, 40": lambda x: x >> 31,
    "shr.u32 %r2, %r1, 40": lambda x: x * 0,
    "shl.b32 %r2, %r1, 5": lambda x: x << 5,
    "mul.hi.s32 %r2, %r1, 123456789": lambda x: (x.astype(np.int64) * 123456789 >> 32).astype(np.int32),
    "bfe.u32 %r2, %r1, 4, 9": lambda x: x >> 4 & 511,
    "bfe.s32 %r2, %r1, 4, 9": lambda x: x << 19 >> 23,
    "bfi.b32 %r2, %r1, -1, 4, 9": lambda x: (x & 511) << 4 | ~(511 << 4),
    "prmt.b32 %r2, %r1, 0, 0x0123": lambda x: x.byteswap(),
    "cvt.s32.s8 %r2, %r1": lambda x: x.astype(np.int8).astype(np.int32),
    "cvt.u32.u16 %r2, %r1": lambda x: x & 0xFFFF,
    "lop3.b32 %r2, %r1, 255, 15, 0xEA": lambda x: x & 255 | 15,
}


@pytest.mark.parametrize("line", INTEGERS)
def test_integers(line: str) -> None:
    given = torch.randint(-(2**31), 2**31 - 1, (32,), dtype=torch.int32)
    made = run(lines("ld.global.u32 %r1, [%d1]", line, "st.global.u32 [%d0], %r2"), given)
    assert np.array_equal(made.numpy(), INTEGERS[line](given.numpy()))


FLOATS: dict[str, Callable[[Tensor], Tensor]] = {
    "fma.rn.f32 %f2, %f1, %f1, %f1": lambda x: x * x + x,
    "div.rn.f32 %f2, 0f3F800000, %f1": lambda x: 1 / x,
    "ex2.approx.ftz.f32 %f2, %f1": torch.exp2,
    "sqrt.rn.f32 %f2, %f1": torch.sqrt,
    "max.f32 %f2, %f1, 0f00000000": lambda x: x.clamp(min=0),
    "cvt.rni.f32.f32 %f2, %f1": torch.round,
    "cvt.sat.f32.f32 %f2, %f1": lambda x: x.clamp(0, 1),
}


@pytest.mark.parametrize("line", FLOATS)
def test_floats(line: str) -> None:
    given = torch.randn(32) * 4
    made = run(lines("ld.global.f32 %f1, [%d1]", line, "st.global.f32 [%d0], %f2"), given).view(torch.float32)
    torch.testing.assert_close(made.double(), FLOATS[line](given.double()), rtol=1e-7, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize(("mode", "toward"), (("rm", -np.inf), ("rp", np.inf)))
def test_directed_rounding(mode: str, toward: float) -> None:
    given = torch.randn(32)
    code = lines("ld.global.f32 %f1, [%d1]", f"fma.{mode}.f32 %f2, %f1, 0f3F000000, 0f4B400001")
    made = run(code + lines("st.global.f32 [%d0], %f2"), given).view(torch.float32).double()
    exact = given.double() * 0.5 + 12582913
    assert torch.equal(made, exact.floor() if toward < 0 else exact.ceil())


def test_small_floats_round_as_torch_does() -> None:
    x = np.concatenate([np.random.default_rng(0).standard_normal(2000) * 10.0**k for k in range(-6, 4)])
    given = torch.from_numpy(np.append(x, [0, -0.0, 448, 464, 1e9, 2**-10, 3 * 2**-10, np.nan]).astype(np.float32))
    for kind, make in ((torch.bfloat16, bf16_of), (torch.float16, f16_of)):
        assert torch.equal(
            torch.from_numpy(make(given.numpy()).view(np.int16))[:-1], given.to(kind).view(torch.int16)[:-1]
        )
    saturated = given.clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(torch.from_numpy(e4m3_of(given.numpy()).astype(np.uint8)), saturated.view(torch.uint8))
    codes = torch.arange(256, dtype=torch.uint8)
    assert np.array_equal(E4M3, codes.view(torch.float8_e4m3fn).float().numpy(), equal_nan=True)


# Lanes and branches


def test_lanes_that_part_meet_again() -> None:
    code = """
    and.b32 %r1, %r0, 3;
    mov.u32 %r2, 0;
    setp.eq.s32 %p1, %r1, 0;
    @%p1 bra LAST;
    LOOP:
    add.s32 %r2, %r2, 10;
    sub.s32 %r1, %r1, 1;
    setp.ne.s32 %p2, %r1, 0;
    @%p2 bra LOOP;
    LAST:
    shfl.sync.bfly.b32 %r3|%p3, %r2, 1, 31, -1;
    st.global.u32 [%d0], %r3;
    """
    assert run(code).tolist() == [10, 0, 30, 20] * 8


def test_what_all_lanes_do_is_not_done_by_some() -> None:
    code = """
    setp.lt.s32 %p1, %r0, 16;
    @%p1 bra OTHER;
    bar.sync 0;
    bra.uni LAST;
    OTHER:
    bar.sync 0;
    LAST:
    """
    with pytest.raises(Fault, match="a part of a warp"):
        run(code)


@pytest.mark.parametrize(
    ("line", "wanted"),
    (
        ("shfl.sync.idx.b32 %r2, %r0, 5, 31, -1", [5] * 32),
        ("shfl.sync.down.b32 %r2, %r0, 2, 31, -1", [*range(2, 32), 30, 31]),
        ("shfl.sync.up.b32 %r2, %r0, 1, 0, -1", [0, *range(31)]),
        ("shfl.sync.bfly.b32 %r2, %r0, 4, 31, -1", [i ^ 4 for i in range(32)]),
        ("vote.sync.ballot.b32 %r2, %p1, -1", [0xFF] * 32),
        ("elect.sync %r2|%p2, -1", [0] * 32),
    ),
)
def test_between_lanes(line: str, wanted: list[int]) -> None:
    assert run(lines("setp.lt.u32 %p1, %r0, 8", line, "st.global.u32 [%d0], %r2")).tolist() == wanted


def test_atomics_count_every_thread() -> None:
    code = """
    mov.u32 %r3, memory;
    setp.ne.s32 %p1, %r0, 0;
    @%p1 bra LAST;
    st.shared.u32 [%r3], 0;
    LAST:
    bar.sync 0;
    atom.shared.add.u32 %r4, [%r3], 1;
    bar.sync 0;
    ld.shared.u32 %r5, [%r3];
    st.global.u32 [%d0], %r5;
    """
    assert run(code, threads=96).tolist() == [96] * 96


# Barriers

HANDED_OVER = """
mov.u32 %r1, memory;
shl.b32 %r2, %r0, 2;
add.s32 %r2, %r1, %r2;
setp.ge.u32 %p1, %r0, 32;
@%p1 bra SECOND;
add.s32 %r3, %r0, 100;
st.shared.u32 [%r2], %r3;
{first}
bra.uni LAST;
SECOND:
{second}
ld.shared.u32 %r4, [%r2+-128];
st.global.u32 [%d0], %r4;
LAST:
"""


def handed_over(first: str, second: str) -> list[list[int]]:
    """What the second warp finds, on several schedules."""
    code = HANDED_OVER.format(first=lines(first) if first else "", second=lines(second) if second else "")
    return [run(code, threads=64, seed=seed)[32:].tolist() for seed in range(8)]


def test_named_barriers_order_warps() -> None:
    assert all(made == list(range(100, 132)) for made in handed_over("bar.arrive 1, 64", "bar.sync 1, 64"))


def test_without_a_barrier_a_schedule_shows_it() -> None:
    assert any(made != list(range(100, 132)) for made in handed_over("", ""))


@pytest.mark.parametrize(
    ("first", "second", "why"),
    (
        ("bar.arrive 1, 96", "bar.sync 1, 96", "wait for ever"),
        ("bar.arrive 2, 64", "bar.sync 1, 64", "wait for ever"),
        ("bar.arrive 1, 64", "bar.sync 1, 96", "expects"),
        ("bar.arrive 1, 80", "bar.sync 1, 80", "multiple of 32"),
        ("bar.arrive 1, 64;\nbar.arrive 1, 64", "nanosleep.u32 9", "twice"),
    ),
)
def test_barriers_misused(first: str, second: str, why: str) -> None:
    with pytest.raises(Fault, match=why):
        for _ in range(4):
            handed_over(first, second)


WAIT = """
{.reg .pred p;
WAIT:
mbarrier.try_wait.parity.shared::cta.b64 p, [%r1], 0;
@!p bra WAIT;
}
"""
LOADED = """
mov.u32 %r1, memory;
add.s32 %r2, %r1, 1024;
mov.b64 %d4, map;
cvta.param.u64 %d4, %d4;
setp.ne.s32 %p1, %r0, 0;
@%p1 bra MEET;
mbarrier.init.shared::cta.b64 [%r1], {count};
mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], {bytes};
cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r2], [%d4, {{{x}, {y}}}], [%r1];
MEET:
bar.sync 0;
{wait}
shl.b32 %r3, %r0, 2;
add.s32 %r3, %r3, %r2;
ld.shared.u32 %r4, [%r3];
st.global.u32 [%d0], %r4;
"""


def loaded(
    count: int = 1, size: int = 256, wait: str = WAIT, first: tuple[int, int] = (0, 0), swizzle: int = 0, seed: int = 0
) -> list[int]:
    """A box of 4 x 16 words of a matrix [6, 20] of 0 to 119, in the order in which shared memory has it."""
    source = torch.arange(120, dtype=torch.int32)
    tensor = Map(source.data_ptr(), 4, swizzle, (20, 6), (80,), (16, 4), (1, 1))
    code = LOADED.format(count=count, bytes=size, wait=wait, x=first[0], y=first[1])
    return run(code, source, 64, seed, tensor).tolist()


def test_boxes_are_loaded() -> None:
    matrix = np.arange(120).reshape(6, 20)
    assert loaded() == matrix[:4, :16].ravel().tolist()
    beyond = np.zeros((4, 16), int)
    beyond[1:, 3:] = matrix[:3, :13]
    assert loaded(first=(-3, -1)) == beyond.ravel().tolist()


def test_the_swizzle_of_64_bytes_mixes_bits_4_and_5_with_7_and_8() -> None:
    plain, made = loaded(), loaded(swizzle=64)
    assert [made[(4 * i ^ (4 * i >> 7 & 3) << 4) // 4] for i in range(64)] == plain


def test_who_does_not_wait_for_a_load_finds_nothing() -> None:
    """Unless it comes at once; or the block ends before it comes."""
    with pytest.raises(Fault, match="has ended"):
        for seed in range(8):
            made = loaded(wait="", seed=seed)
            assert made == loaded() or set(made) == {-1}


@pytest.mark.parametrize(("count", "size"), ((2, 256), (1, 255), (1, 272)))
def test_barriers_that_never_end(count: int, size: int) -> None:
    with pytest.raises(Fault, match="wait for ever"):
        loaded(count, size)


def test_more_arrivals_than_a_phase_has() -> None:
    code = """
    mov.u32 %r1, memory;
    setp.eq.s32 %p1, %r0, 0;
    @%p1 mbarrier.init.shared::cta.b64 [%r1], 40;
    bar.sync 0;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 16;
    """
    with pytest.raises(Fault, match="more arrivals"):
        run(code, threads=64)


# Clusters

SHARED_BY_TWO = """
mov.u32 %r10, %cluster_ctarank;
mul.wide.u32 %d5, %r10, 256;
add.s64 %d0, %d0, %d5;
mov.u32 %r1, memory;
add.s32 %r2, %r1, 1024;
add.s32 %r5, %r1, 8;
mapa.shared::cluster.u32 %r6, %r5, 0;
mov.b64 %d4, map;
cvta.param.u64 %d4, %d4;
setp.ne.s32 %p1, %r0, 0;
@%p1 bra MEET;
mbarrier.init.shared::cta.b64 [%r1], 1;
mbarrier.init.shared::cta.b64 [%r5], 2;
mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 256;
MEET:
bar.sync 0;
barrier.cluster.arrive.release.aligned;
barrier.cluster.wait.acquire.aligned;
or.b32 %r7, %r10, %r0;
setp.eq.s32 %p2, %r7, 0;
mov.u32 %r8, 0;
mov.u16 %h1, {mask};
@%p2 cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%r2], [%d4, {{%r8, %r8}}], [%r1], %h1;
@!%p1 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r6];
{wait}
setp.ne.s32 %p3, %r10, 0;
@%p3 bra LOAD;
{both}
LOAD:
shl.b32 %r3, %r0, 2;
add.s32 %r3, %r3, %r2;
ld.shared.u32 %r4, [%r3];
st.global.u32 [%d0], %r4;
"""  # noqa: E501


@pytest.mark.parametrize("mask", (3, 1))
def test_a_load_for_two_blocks(mask: int) -> None:
    """Both find it, if both are named; the first waits until both have arrived at its own barrier."""
    source = torch.arange(120, dtype=torch.int32)
    tensor = Map(source.data_ptr(), 4, 0, (20, 6), (80,), (16, 4), (1, 1))
    both = WAIT.replace("%r1", "%r5").replace("WAIT", "BOTH")
    code = SHARED_BY_TWO.format(mask=mask, wait=WAIT, both=both)
    for seed in range(4):
        if mask == 3:
            made = run(code, source, 64, seed, tensor, cluster=2).view(2, 64).tolist()
            assert made == [source.view(6, 20)[:4, :16].flatten().tolist()] * 2
        else:
            with pytest.raises(Fault, match="wait for ever"):
                run(code, source, 64, seed, tensor, cluster=2)


# Registers


@pytest.mark.parametrize(("least", "most", "fits"), ((40, 232, True), (24, 240, True), (40, 240, False)))
def test_registers_are_handed_over(least: int, most: int, fits: bool) -> None:
    code = f"""
    setp.ge.u32 %p1, %r0, 256;
    @%p1 bra LESS;
    setmaxnreg.inc.sync.aligned.u32 {most};
    bra.uni LAST;
    LESS:
    setmaxnreg.dec.sync.aligned.u32 {least};
    LAST:
    """
    for seed in range(4):
        if fits:
            run(code, threads=384, seed=seed)
        else:
            with pytest.raises(Fault, match="wait for ever"):
                run(code, threads=384, seed=seed)


# Descriptors, against other words for the same layouts: what CuTe calls a swizzle of 3, 2 or 1 bits


@pytest.mark.parametrize(("mode", "bits"), ((1, 3), (2, 2), (3, 1)))
@pytest.mark.parametrize("size", (1, 2))
def test_descriptors_of_rows_along_k(mode: int, bits: int, size: int) -> None:
    row = 16 << bits
    descriptor = 0x4000 >> 4 | (8 * row >> 4) << 32 | mode << 62
    at = addresses(descriptor, 64, 32 // size, size, False)
    for outer, k in ((0, 0), (1, 0), (7, 3), (8, 1), (63, 32 // size - 1)):
        offset = outer * row + k * size
        assert at[outer, k, 0] == 0x4000 + (offset ^ (offset >> 7 & (1 << bits) - 1) << 4)


def test_memory_outside_of_tensors_is_found() -> None:
    with pytest.raises(Fault, match="outside"):
        run(lines("st.global.u32 [%d0+4], %r0"))
    with pytest.raises(Fault, match="not aligned"):
        run(lines("st.global.u32 [%d0+2], %r0"))
