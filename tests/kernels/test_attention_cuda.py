"""csrc/'s attention: on the CPU, the kernel's own code over interpreted TMA, mbarriers and wgmma, against float64; its
index maths one by one; on a GPU, the kernel. Results lie in the middle of NaN."""

from __future__ import annotations

import ctypes
import itertools
import math
import random as chance
from functools import partial

import pytest
import torch
from attention_cases import HALVES, assert_edges_untouched, check, fake_blocks, make, on_gpu, poisoned, random_blocks
from attention_host import addresses, attention_host, library, words
from compiled_host import CXX
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastvid.errors import BackendUnavailable
from fastvid.ops import attention, attention_gpu, sparse
from fastvid.ops.dispatch import bind
from fastvid.ops.sparse import Blocks

pytestmark = pytest.mark.skipif(CXX is None, reason="no C++ compiler is found")
cuda = attention.BACKENDS["cuda"]
LAYOUTS = ("token-major", "head-major", "one of three")
EDGES = (1, 63, 64, 65, 127, 128, 129, 175, 176, 177, 255, 256, 257, 352, 353, 384, 513)
LENGTHS = st.one_of(st.integers(1, 300), st.sampled_from(EDGES))
TILE_SIZES = st.lists(st.integers(1, 200), min_size=1, max_size=4)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Blocks | None = None,
    scale: float | None = None,
    grid: int = 3,
    pairs: bool = False,
) -> tuple[Tensor, Tensor]:
    B, N, H, _ = q.shape
    (buffer, out), (edges, lse) = poisoned(q.shape, q.dtype), poisoned((B, H, N), torch.float32)
    attention_host(q, k, v, out, lse, blocks, scale, grid, pairs)
    assert_edges_untouched(buffer)
    assert_edges_untouched(edges)
    return out, lse


# The kernel, interpreted


@pytest.mark.slow
@given(
    n=LENGTHS,
    m=LENGTHS,
    heads=st.sampled_from(((1, 1), (2, 1), (1, 3), (2, 2))),
    head_dim=st.sampled_from((64, 128)),
    dtype=st.sampled_from(HALVES),
    layout=st.sampled_from(LAYOUTS),
    scale=st.sampled_from((None, 0.3)),
    grid=st.sampled_from((1, 2, 3, 132)),
)
def test_dense(
    n: int,
    m: int,
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    layout: str,
    scale: float | None,
    grid: int,
) -> None:
    B, H = heads
    seed = chance.randrange(2**31)
    q, k, v = (make((B, size, H, head_dim), dtype, seed + i, layout) for i, size in enumerate((n, m, m)))
    check(q, k, v, run(q, k, v, scale=scale, grid=grid), scale)


@pytest.mark.slow
@given(
    sizes=st.tuples(TILE_SIZES, TILE_SIZES),
    heads=st.sampled_from(((1, 1, 1), (1, 2, 1), (1, 2, 2), (2, 1, 1), (2, 1, 2), (2, 2, 4))),
    density=st.sampled_from((0.0, 0.4, 0.8, 1.0)),
    head_dim=st.sampled_from((64, 128)),
    dtype=st.sampled_from(HALVES),
    layout=st.sampled_from(LAYOUTS),
    grid=st.sampled_from((1, 4, 132)),
)
def test_sparse(
    sizes: tuple[list[int], list[int]],
    heads: tuple[int, int, int],
    density: float,
    head_dim: int,
    dtype: torch.dtype,
    layout: str,
    grid: int,
) -> None:
    pytest.importorskip("triton")
    B, H, lists = heads
    seed = chance.randrange(2**31)
    blocks = random_blocks(sizes, lists, density, seed)
    q, k, v = (make((B, sum(sizes[i > 0]), H, head_dim), dtype, seed + i, layout) for i in range(3))
    check(q, k, v, run(q, k, v, blocks, grid=grid), blocks=blocks)


@pytest.mark.slow
def test_patterns_of_a_video() -> None:
    pytest.importorskip("triton")
    grid, tile = (3, 6, 11), (2, 4, 4)
    tiles = sparse.tile_offsets(grid, tile)
    q, k, v = (make((1, math.prod(grid), 2, 64), torch.bfloat16, chance.randrange(99)) for _ in range(3))
    for blocks in (
        sparse.full(grid, tile),
        sparse.window(grid, tile, (1, 2, 1)),
        sparse.radial(grid, tile),
        sparse.top_k(q, k, tiles, math.prod(tile), 3),
    ):
        check(q, k, v, run(q, k, v, blocks), blocks=blocks)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128])
def test_rings_go_round_many_times(head_dim: int) -> None:
    """Long keys, several works a block: each stage is filled again and again, in works of different lengths."""
    pytest.importorskip("triton")
    q, k, v = (make((2, n, 2, head_dim), torch.float16, i) for i, n in enumerate((400, 2000, 2000)))
    check(q, k, v, run(q, k, v, grid=2))
    blocks = random_blocks(([130, 20, 250], [300, 7, 128, 565, 1000]), 4, 0.6, chance.randrange(99))
    check(q, k, v, run(q, k, v, blocks, grid=2), blocks=blocks)


@pytest.mark.parametrize(("n", "m", "grid"), [(256, 300, 2), (200, 1500, 4), (1000, 177, 3)])
def test_pairs_of_blocks(n: int, m: int, grid: int) -> None:
    """Keys and values that two blocks load for each other: the same bits as without."""
    q, k, v = (make((2, size, 1, 128), torch.bfloat16, chance.randrange(99)) for size in (n, m, m))
    made = run(q, k, v, grid=grid, pairs=True)
    check(q, k, v, made)
    assert all(torch.equal(a, b) for a, b in zip(made, run(q, k, v, grid=grid), strict=True))


@pytest.mark.slow
@given(
    tiles=st.integers(1, 3),
    short=st.integers(0, 127),
    m=LENGTHS,
    heads=st.sampled_from(((1, 1), (2, 1), (1, 3))),
    dtype=st.sampled_from(HALVES),
    layout=st.sampled_from(LAYOUTS),
    grid=st.sampled_from((1, 2, 5, 132)),
)
def test_pairs_of_blocks_of_all_sizes(
    tiles: int, short: int, m: int, heads: tuple[int, int], dtype: torch.dtype, layout: str, grid: int
) -> None:
    B, H = heads
    seed = chance.randrange(2**31)
    q, k, v = (make((B, n, H, 128), dtype, seed + i, layout) for i, n in enumerate((256 * tiles - short, m, m)))
    check(q, k, v, run(q, k, v, grid=grid, pairs=True))


def test_which_calls_are_made_by_pairs() -> None:
    """Even tiles of 128 queries, in wide steps, and only if that is asked for."""
    blocks = random_blocks(([256], [4]), 1, 1.0, 0)
    for n, head_dim, lists, asked, wanted in (
        (256, 128, None, 1, 1), (129, 128, None, 1, 1), (128, 128, None, 1, 0), (300, 128, None, 1, 0),
        (256, 64, None, 1, 0), (256, 128, blocks, 1, 0), (256, 128, None, 0, 0),
    ):  # fmt: skip
        q = make((1, n, 1, head_dim), torch.float16)
        steps = [] if lists is None else attention_gpu.exact_steps(q, lists)
        call, _ = attention_gpu.prepare(q, q, q, lists, steps)
        assert library().attention_paired(words(call | {"pairs": asked})) == wanted


def test_blocks_take_uneven_works_from_a_counter() -> None:
    """Tiles with no keys up to all of them: each is taken once, by whoever is free."""
    pytest.importorskip("triton")
    q, k, v = (make((1, n, 2, 64), torch.bfloat16, i) for i, n in enumerate((900, 700, 700)))
    blocks = random_blocks(([64] * 10 + [260], [300, 1, 128, 271]), 2, 0.4, chance.randrange(99))
    out, lse = torch.empty_like(q), torch.empty(1, 2, 900)
    call, walked = attention_gpu.prepare(q, k, v, blocks, attention_gpu.exact_steps(q, blocks))
    pointers, why = [ctypes.c_void_p(x.data_ptr()) for x in (q, k, v, out, lse)], ctypes.create_string_buffer(1000)
    told, at = words(call), addresses(walked)
    assert not library().attention_emulate(told, at, ctypes.c_float(0.125), *pointers, 1, 3, why, len(why)), why.value
    check(q, k, v, (out, lse), blocks=blocks)
    assert walked[-1].item() == library().attention_works(told, at)  # each is followed by a question


def test_scores_far_apart() -> None:
    """A row whose highest score comes last, one whose first is far above all, and scores that are all alike."""
    q, k, v = (torch.zeros(1, n, 1, 64, dtype=torch.float16) for n in (130, 400, 400))
    q[0, 0, 0, 0], q[0, 1, 0, 0], k[0, :, 0, 0] = 8, -8, torch.linspace(-60, 60, 400)
    q[0, 2:, 0, 1:] = torch.randn(128, 63)
    k[0, :, 0, 1:] = torch.randn(400, 63) * 10
    v.normal_()
    check(q, k, v, run(q, k, v), None)


def test_nan_stays_in_its_row() -> None:
    q, k, v = (make((1, 200, 2, 64), torch.bfloat16, i) for i in range(3))
    q[0, 17, 1] = float("nan")
    out, lse = run(q, k, v)
    bad = torch.zeros(1, 200, 2, dtype=torch.bool)
    bad[0, 17, 1] = True
    assert torch.equal(out.isnan().all(-1), bad) and torch.equal(out.isnan().any(-1), bad)
    assert torch.equal(lse.isnan(), bad.transpose(1, 2))


# Its index maths


def works(q: Tensor, k: Tensor, blocks: Blocks | None) -> list[tuple[int, int, range, list[int]]]:
    """(batch, head, queries, keys in the order in which they are walked over) of every work of a launch."""
    steps = [] if blocks is None else attention_gpu.exact_steps(q, blocks)
    call, walked = attention_gpu.prepare(q, k, k, blocks, steps)
    lib, room, made = library(), 4 + 2 * 400, []
    told, at = words(call), addresses(walked)
    to = (ctypes.c_int * room)()
    for number in range(lib.attention_works(told, at)):
        steps = lib.attention_work(told, at, ctypes.c_int64(number), to, room)
        assert 4 + 2 * steps <= room
        pairs = [(to[4 + 2 * i], to[5 + 2 * i]) for i in range(steps)]
        assert all(1 <= count <= lib.attention_keys_of_step(told) for _, count in pairs)
        keys = [key for first, count in pairs for key in range(first, first + count)]
        made.append((to[0], to[1], range(to[2], max(to[3], to[2])), keys))
    return made


@pytest.mark.slow
@given(
    sizes=st.tuples(TILE_SIZES, TILE_SIZES),
    heads=st.sampled_from(((1, 1, 1), (2, 3, 1), (2, 3, 3), (2, 3, 6))),
    density=st.sampled_from((0.0, 0.5, 1.0)),
)
def test_works_are_the_token_mask(
    sizes: tuple[list[int], list[int]], heads: tuple[int, int, int], density: float
) -> None:
    """Every query of every head once, and with it exactly the keys that its list has, each once."""
    pytest.importorskip("triton")
    B, H, lists = heads
    blocks = random_blocks(sizes, lists, density, chance.randrange(2**31))
    q, k = (torch.empty(B, sum(size), H, 64, dtype=torch.float16) for size in sizes)
    mask = sparse.token_mask(blocks)
    seen = torch.zeros(B, H, q.shape[1], dtype=torch.int)
    for b, h, queries, keys in works(q, k, blocks):
        assert len(queries) <= 128
        for query in queries:
            seen[b, h, query] += 1
            row = mask[(b * H + h) % blocks.lists, query]
            assert sorted(keys) == row.nonzero()[:, 0].tolist()
    assert (seen == 1).all()


@given(
    n=st.integers(1, 700),
    m=st.integers(1, 700),
    B=st.integers(1, 2),
    H=st.integers(1, 3),
    head_dim=st.sampled_from((64, 128)),
)
def test_dense_works_are_everything_once(n: int, m: int, B: int, H: int, head_dim: int) -> None:
    q, k = (torch.empty(B, size, H, head_dim, dtype=torch.float16) for size in (n, m))
    made = works(q, k, None)
    assert all(keys == list(range(m)) for *_, keys in made)
    assert sorted((b, h, query) for b, h, queries, _ in made for query in queries) == list(
        itertools.product(range(B), range(H), range(n))
    )


def test_swizzle_and_descriptors() -> None:
    """The 128-byte swizzle: a sixteen of bytes goes to the place that is its number XOR its row's, modulo 8."""
    lib, base = library(), 1024 * chance.randint(0, 200)
    for row, chunk, byte in itertools.product(range(8), range(8), range(16)):
        assert lib.sm90_swizzled(base + row * 128 + chunk * 16 + byte) == base + row * 128 + (chunk ^ row) * 16 + byte
    address, panel = 16 * chance.randint(0, 2**14 - 1), 16 * chance.randint(1, 2**14 - 1)
    along, across = lib.sm90_descriptor(address), lib.sm90_transposed(address, panel)
    for told in (along, across):
        assert (told & 0x3FFF) * 16 == address and (told >> 32 & 0x3FFF) * 16 == 1024
        assert told >> 62 == 1 and told >> 46 & 0xFFFF == 0  # base offset 0, no bits that are not used
    assert (across >> 16 & 0x3FFF) * 16 == panel


def test_registers_hold_a_tile() -> None:
    """Of the 64 x 176 scores each in one register of one thread, by the PTX manual's table for m64nNk16."""
    lib, to, places = library(), (ctypes.c_int * 2)(), set()
    for thread, value in itertools.product(range(128), range(88)):
        lib.sm90_place(thread, value, to)
        warp, lane = divmod(thread, 32)
        assert to[0] == 16 * warp + lane // 4 + 8 * (value // 2 % 2)
        assert to[1] == 8 * (value // 4) + 2 * (lane % 4) + value % 2
        places.add(tuple(to))
    assert len(places) == 64 * 176


@pytest.mark.parametrize(("keys", "head_dim"), [(128, 64), (128, 128), (176, 128)])
def test_shared_memory(keys: int, head_dim: int) -> None:
    lib, told = library(), (keys, head_dim, 2)
    stages, row = lib.attention_stages(*told), head_dim * 2
    assert stages >= 2 and lib.attention_barriers_at(*told) == (128 + 2 * stages * keys) * row
    assert lib.attention_barriers_at(*told) + 8 * 6 * stages <= lib.attention_smem(*told) <= 227 * 1024
    assert keys * 128 % 1024 == 0  # where panels of 64 columns begin


def test_dense_steps_are_wide() -> None:
    """176 keys a step fit the registers of 128 columns; lists are cut into 128."""
    blocks = random_blocks(([4], [4]), 1, 1.0, 0)
    for head_dim, lists, keys in ((128, None, 176), (64, None, 128), (128, blocks, 128), (64, blocks, 128)):
        q = make((1, 4, 1, head_dim), torch.float16)
        steps = [] if lists is None else attention_gpu.exact_steps(q, lists)
        call, _ = attention_gpu.prepare(q, q, q, lists, steps)
        assert library().attention_keys_of_step(words(call)) == keys


# What is refused


@pytest.mark.parametrize(
    ("head_dim", "layout", "message"),
    [
        (96, None, r"head_dim is 96; .*\(nearest: 64\)"),
        (256, None, r"nearest: 128"),
        (64, "expanded", "positive multiples of 8"),
        (64, "padded", "positive multiples of 8"),
        (64, "shifted", "16 bytes"),
        (64, "scale", "softmax_scale is -1"),
    ],
)
def test_what_is_refused(head_dim: int, layout: str | None, message: str) -> None:
    q = k = make((2, 20, 3, head_dim), torch.float16)
    if layout == "expanded":
        k = k[:1].expand(2, -1, -1, -1)
    elif layout == "padded":
        k = torch.nn.functional.pad(k, (0, 4))[..., :head_dim]
    elif layout == "shifted":
        k = torch.nn.functional.pad(k, (1, 7))[..., 1 : head_dim + 1]
    with pytest.raises(ValueError, match=message):
        attention_host(q, k, q, torch.empty_like(q), None, scale=-1.0 if layout == "scale" else None)


def test_a_dimension_of_one_may_have_any_stride() -> None:
    q, k, v = (make((1, 70, 1, 64), torch.float16, i) for i in range(3))
    odd = [x.as_strided(x.shape, (0, 64, 3, 1)) for x in (q, k, v)]
    check(q, k, v, run(*odd))


FORMS = [(return_lse, sparse) for return_lse in (False, True) for sparse in (False, True)]


@pytest.mark.parametrize("name", ["cuda", "cuda_pair", "cuda_fp8", "cuda_int8"])
@pytest.mark.parametrize(("return_lse", "tiled"), FORMS)
def test_wrong_tensors_are_refused(name: str, return_lse: bool, tiled: bool) -> None:
    blocks = random_blocks(([4], [4]), 1, 1.0, 0) if tiled else None
    function = partial(attention.BACKENDS[name], return_lse=return_lse, blocks=blocks)
    q = make((1, 4, 2, 64), torch.float16)
    with pytest.raises(ValueError, match="one CUDA device"):
        function(q, q, q)
    with pytest.raises(ValueError, match="nearest: bfloat16"):
        function(q.float(), q.float(), q.float())


def test_asked_for_by_name_it_works_or_says_why_not() -> None:
    with pytest.raises(BackendUnavailable, match=r"CUDA device|not built"):
        bind(attention="cuda")
    assert bind().bound["attention"] in ("sdpa", "library")  # never chosen by itself


@pytest.mark.parametrize("name", ["triton", "cuda", "cuda_pair", "cuda_fp8", "cuda_int8"])
@pytest.mark.parametrize(("return_lse", "tiled"), FORMS)
def test_fakes_have_the_shapes_of_the_reference(name: str, return_lse: bool, tiled: bool) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        q, k = (mode.from_tensor(make((2, n, 3, 64), torch.bfloat16)) for n in (7, 9))
    blocks = random_blocks(([5, 2], [3, 6]), 1, 1.0, 0)
    with mode:
        options = {"blocks": fake_blocks(mode, blocks)} if tiled else {}
        made = attention.BACKENDS[name](q, k, k, return_lse=return_lse, **options)
    out, *lse = made if return_lse else (made,)
    assert out.shape == q.shape and out.dtype == torch.bfloat16 and out.is_contiguous()
    assert [(x.shape, x.dtype) for x in lse] == [((2, 3, 7), torch.float32)] * return_lse


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("n", "m"), [(1, 1), (127, 129), (1000, 512), (2049, 4111), (256, 128)])
def test_on_a_gpu(n: int, m: int, layout: str, head_dim: int, dtype: torch.dtype) -> None:
    q, k, v = (on_gpu(make((2, size, 3, head_dim), dtype, chance.randrange(2**31), layout)) for size in (n, m, m))
    check(q, k, v, cuda(q, k, v, return_lse=True))
    assert torch.equal(cuda(q, k, v), cuda(q, k, v, return_lse=True)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("lists", [1, 3, 6])
def test_sparse_on_a_gpu(lists: int, head_dim: int, dtype: torch.dtype) -> None:
    for density in (0.0, 0.3, 1.0):
        sizes = tuple([chance.randint(1, 400) for _ in range(7)] for _ in range(2))
        blocks = random_blocks(sizes, lists, density, chance.randrange(2**31)).to("cuda")
        q, k, v = (make((2, sum(sizes[i > 0]), 3, head_dim), dtype, i).cuda() for i in range(3))
        check(q, k, v, cuda(q, k, v, return_lse=True, blocks=blocks), blocks=blocks)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("n", "m"), [(256, 128), (200, 1), (4000, 4111), (1024, 352)])
def test_pairs_on_a_gpu(n: int, m: int, dtype: torch.dtype) -> None:
    q, k, v = (on_gpu(make((2, size, 3, 128), dtype, chance.randrange(2**31))) for size in (n, m, m))
    made = attention.BACKENDS["cuda_pair"](q, k, v, return_lse=True)
    check(q, k, v, made)
    for _ in range(100):
        for a, b in zip(made, cuda(q, k, v, return_lse=True), strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_thousand_runs_give_the_same_bits(head_dim: int) -> None:
    q, k, v = (make((1, n, 4, head_dim), torch.bfloat16, i).cuda() for i, n in enumerate((3000, 2500, 2500)))
    first, lse = cuda(q, k, v, return_lse=True)
    for _ in range(1000):
        again = cuda(q, k, v, return_lse=True)
        assert torch.equal(first, again[0]) and torch.equal(lse, again[1])
