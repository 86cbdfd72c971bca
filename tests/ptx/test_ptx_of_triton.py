"""The interpreter on what Triton compiles for sm_90, which is known to be right on the hardware: products of every type
and swizzle by TMA and wgmma, the linear layer with its stores by TMA, attention with its left matrices in registers.
Then with mistakes made in that PTX: each of them has to be found."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from ptx.from_triton import Compiled, compile_variant, launch
from ptx.machine import Machine
from ptx.memory import Global
from ptx.mutate import Mistake, is_caught
from ptx.triton_products import product
from torch import Tensor

from fastvid.kernels import attention, linear_gelu

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8e4nv": torch.float8_e4m3fn, "i8": torch.int8}
CASES = (
    ("bf16", (64, 64, 64), False),
    ("bf16", (128, 128, 64), True),
    ("bf16", (64, 64, 32), True),
    ("fp16", (64, 128, 64), True),
    ("fp16", (64, 64, 16), False),
    ("fp8e4nv", (64, 128, 128), False),
    ("fp8e4nv", (64, 64, 64), False),
    ("fp8e4nv", (64, 64, 32), False),
    ("i8", (64, 64, 64), False),
    ("i8", (64, 128, 128), False),
)
Case = tuple[str, tuple[int, int, int], bool]


@cache
def compiled_product(case: Case) -> Compiled:
    return compile_variant(product(*case))


def drawn(dtype: str, *shape: int) -> Tensor:
    if dtype == "i8":
        return torch.randint(-127, 128, shape, dtype=torch.int8)
    return torch.randn(shape).to(TYPES[dtype])


def multiply(case: Case, K: int, seed: int, text: str = "") -> tuple[Tensor, Tensor]:
    """(made, exact)"""
    dtype, (m, n, _), turned = case
    torch.manual_seed(seed)
    a, b = drawn(dtype, 2 * m, K), drawn(dtype, K, n) if turned else drawn(dtype, n, K)
    out = torch.full((2 * m, n), -1, dtype=torch.int32) if dtype == "i8" else torch.full((2 * m, n), math.nan)
    made = compiled_product(case)
    given = [x.view(torch.uint8) if x.element_size() == 1 else x for x in (a, b)]  # numpy knows no float8
    values = {"a_desc": given[0], "b_desc": given[1], "out_ptr": out, "N": n, "K": K}
    Machine(launch(replace(made, text=text or made.text), values, 2), Global([*given, out]), seed).run()
    return out, a.double() @ (b.double() if turned else b.double().T)


def is_right(made: Tensor, exact: Tensor) -> bool:
    if made.dtype == torch.int32:
        return torch.equal(made.double(), exact)
    return bool((made.double() - exact).abs().max() <= 1e-6 * exact.abs().max())


@pytest.mark.parametrize("case", CASES[:1], ids=str)
def test_a_product(case: Case) -> None:
    assert is_right(*multiply(case, 160, 0))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES[1:], ids=str)
def test_products(case: Case) -> None:
    for seed in range(2):
        assert is_right(*multiply(case, 160, seed))


CONSTANT = 1 << 62 | 1024 // 16 << 32  # or-ed to the addresses in descriptors
PRODUCT = r"(wgmma\.mma_async[^;]*\}), (%rd\d+), (%rd\d+), (%p\d+), (-?\d), (-?\d), (\d), (\d);"
CHAOS = "there is no barrier|more arrivals|wait for ever|has ended"
MISTAKES = (
    Mistake("operands swapped", PRODUCT, r"\1, \3, \2, \4, \5, \6, \7, \8;"),
    Mistake("one of A's signs", PRODUCT, r"\1, \2, \3, \4, -1, \6, \7, \8;"),
    Mistake("B not transposed", PRODUCT, r"\1, \2, \3, \4, \5, \6, \7, 0;"),
    Mistake("A transposed", PRODUCT, r"\1, \2, \3, \4, \5, \6, 1, \8;"),
    Mistake("results forgotten", r"mov\.pred (\s*%p\d+), -1;", r"mov.pred \1, 0;"),
    Mistake("A's next columns", r"add\.s32 (\s*%r\d+, %r\d+), 2;", r"add.s32 \1, 4;"),
    Mistake("B's next rows", r"add\.s32 (\s*%r\d+, %r\d+), 128;", r"add.s32 \1, 64;"),
    Mistake("no swizzle", rf"(or\.b64[^;]*), {CONSTANT};", rf"\1, {CONSTANT - (1 << 62)};"),
    Mistake("half a swizzle", rf"(or\.b64[^;]*), {CONSTANT};", rf"\1, {CONSTANT + (1 << 62)};"),
    Mistake("eights of rows", rf"(or\.b64[^;]*), {CONSTANT};", rf"\1, {CONSTANT - (32 << 32)};"),
    Mistake("registers swapped", r"(mma_async\S+ \{)(%r\d+),(%r\d+)", r"\1\3,\2", fault="registers are others"),
    Mistake("no wgmma.fence", r"wgmma\.fence\S*;", "", fault="no wgmma.fence"),
    Mistake("written behind the fence", r"(wgmma\.fence\S*;)", r"\1 mov.b32 %r139, %r139;", fault="last wgmma.fence"),
    Mistake("no wait for products", r"wgmma\.wait_group\S* \d;", "", 0, fault="unfinished|nobody waited"),
    Mistake("the last wait leaves one", r"(wgmma\.wait_group\S*) 0;", r"\1 1;", fault="unfinished"),
    Mistake("no commit", r"wgmma\.commit_group\S*;", "", fault="unfinished"),
    Mistake("stages taken too early", r"(wgmma\.wait_group\S*) 1;", r"\1 2;"),
    Mistake("no wait for a load", r"@!complete bra\S* waitLoop;", "", fault=CHAOS, wrong=True),
    Mistake("the wrong phase", r"xor\.b32 (\s*%r\d+), (%r\d+), %r\d+;", r"mov.b32 \1, \2;", fault=CHAOS, wrong=True),
    Mistake("bytes forgotten", r"(expect_tx[^;]*), 16384;", r"\1, 16368;", 0, fault="wait for ever"),
    Mistake("an arrival too many", r"(mbarrier\.init[^;]*), 1;", r"\1, 2;", fault="wait for ever"),
    Mistake("the same box twice", r"(\[%rd14, \{)(%r\d+)", r"\1%r12", 2),
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES, ids=str)
def test_mistakes_in_a_product_are_found(mistake: Mistake) -> None:
    case = ("bf16", (64, 64, 64), True)
    text = mistake.make(compiled_product(case).text)
    is_caught(mistake, lambda seed: is_right(*multiply(case, 320, seed, text)), seeds=8)


# Warpgroups of different work


@cache
def compiled_specialized() -> Compiled:
    gluon_products = pytest.importorskip("ptx.gluon_products", reason="this Triton has no Gluon")
    return gluon_products.compile_specialized()


def specialized_is_right(seed: int, text: str = "") -> bool:
    torch.manual_seed(seed)
    a, b, out = torch.randn(128, 400).bfloat16(), torch.randn(128, 400).bfloat16(), torch.full((128, 128), math.nan)
    made = compiled_specialized()
    values = {"a_desc": a, "b_desc": b, "out_ptr": out, "size": 400}
    Machine(launch(replace(made, text=text or made.text), values, 1), Global([a, b, out]), seed).run()
    return is_right(out, a.double() @ b.double().T)


@pytest.mark.slow
def test_a_product_of_two_warpgroups() -> None:
    assert all(specialized_is_right(seed) for seed in range(4))


TWO = (
    Mistake("no registers given back", r"setmaxnreg\.dec\S*\s+24;", "", 0, fault="wait for ever"),
    Mistake("too few given back", r"(setmaxnreg\.dec\S*\s+)24;", r"\1 152;", 0, fault="wait for ever"),
    Mistake("a barrier of too many", r"bar\.sync\s+2, 128;", "bar.sync 2, 160;", fault="wait for ever"),
    Mistake("two barriers with one number", r"bar\.sync\s+2, 128;", "bar.sync 0, 128;", 0, fault="twice|expects|ever"),
    Mistake("stages not given back", r"@%p\d+ mbarrier\.arrive\.shared[^;]*;", "", fault="wait for ever"),
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("mistake", TWO, ids=str)
def test_mistakes_between_warpgroups_are_found(mistake: Mistake) -> None:
    text = mistake.make(compiled_specialized().text)
    is_caught(mistake, lambda seed: specialized_is_right(seed, text), seeds=8)


# The linear layer, whose results go by shared memory and TMA


@cache
def compiled_linear() -> Compiled:
    return compile_variant(next(v for v in linear_gelu.variants() if v.name == "linear gelu few bf16 sm_90"))


def linear_is_right(seed: int, text: str = "") -> bool:
    """With ragged sizes on two blocks that take more than one tile."""
    torch.manual_seed(seed)
    M, N, K = 100, 144, 208
    x, weight, bias = (torch.randn(*shape).bfloat16() for shape in ((M, K), (N, K), (N,)))
    out = torch.full((M, N), math.nan).bfloat16()
    made = compiled_linear()
    values = {"x_desc": x, "w_desc": weight, "out_desc": out, "bias_ptr": bias, "M": M, "N": N, "K": K}
    Machine(launch(replace(made, text=text or made.text), values, 2), Global([x, weight, bias, out]), seed).run()
    exact = torch.nn.functional.gelu(x.double() @ weight.double().T + bias.double(), approximate="tanh")
    return bool(((out.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-4).all())


@pytest.mark.slow
def test_a_linear_layer() -> None:
    assert all(linear_is_right(seed) for seed in range(3))


STORES = (
    Mistake("no fence before a store", r"fence\.proxy\.async\S*;", "", 0, fault="without fence.proxy.async"),
    Mistake("no wait for the last store", r"cp\.async\.bulk\.wait_group\s+0;", "", 0, fault="nobody waited"),
    Mistake("matrices in another order", r"(stmatrix[^{]*\{)(%r\d+), (%r\d+),", r"\1\3, \2,", 0),
    Mistake(
        "the block does not meet",
        r"(fence\.proxy\.async\S*;\s*)bar\.sync[^;]*;",
        r"\1",
        0,
        fault="without fence",
        wrong=True,
    ),
)


@pytest.mark.slow
@pytest.mark.parametrize("mistake", STORES, ids=str)
def test_mistakes_in_stores_are_found(mistake: Mistake) -> None:
    text = mistake.make(compiled_linear().text)
    is_caught(mistake, lambda seed: linear_is_right(seed, text), seeds=8)


# Attention


@cache
def compiled_attention(name: str) -> Compiled:
    return compile_variant(next(v for v in attention.variants() if v.name == name))


def attention_is_right(name: str, D: int, seed: int, text: str = "") -> bool:
    torch.manual_seed(seed)
    H, N, M = 2, 100, 300
    q, k, v = (torch.randn(1, n, H, D).bfloat16() for n in (N, M, M))
    out, lse = torch.full((1, N, H, D), math.nan).bfloat16(), torch.full((1, H, N), math.nan)
    values: dict[str, object] = {x: t.transpose(1, 2) for x, t in zip("qkv", (q, k, v), strict=True)}
    values |= {
        f"stride_{x}{a}": n
        for x, t in zip("qkv", (q, k, v), strict=True)
        for a, n in zip("bnh", t.stride()[:3], strict=True)
    }
    values |= {"out_ptr": out, "lse_ptr": lse, "scale": D**-0.5 * math.log2(math.e), "H": H, "N": N, "M": M}
    made = compiled_attention(name)
    launched = launch(replace(made, text=text or made.text), values, H)
    Machine(launched, Global([q, k, v, out, lse]), seed).run()
    scores = torch.einsum("bnhd,bmhd->bhnm", q.double(), k.double()) * D**-0.5
    exact = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v.double())
    right = bool((out.double() - exact).abs().max() < 0.01)
    return right and ("lse_ptr" not in made.variant.types or bool((lse - scores.logsumexp(-1)).abs().max() < 1e-5))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "D"), (("attention bf16 64 sm_90", 64), ("attention bf16 128 sm_90 lse", 128)))
def test_attention(name: str, D: int) -> None:
    assert all(attention_is_right(name, D, seed) for seed in range(2))


LEFT = r"(mma_async[^;]*\}, \{)(%r\d+), ?(%r\d+), ?(%r\d+), ?(%r\d+)(\}, %rd\d+, %p\d+, 1, 1), (\d);"
WEIGHTS = (
    Mistake("rows of the left matrix swapped", LEFT, r"\1\3,\2,\4,\5\6, \7;"),
    Mistake("columns of the left matrix swapped", LEFT, r"\1\2,\4,\3,\5\6, \7;"),
    Mistake("values not transposed", LEFT, r"\1\2,\3,\4,\5\6, 0;"),
    Mistake("halves of words swapped", r"(cvt\.rn\.bf16x2\.f32 \s*%r\d+), (%r\d+), (%r\d+);", r"\1, \3, \2;", 0),
)


@pytest.mark.slow
@pytest.mark.parametrize("mistake", WEIGHTS, ids=str)
def test_mistakes_in_attention_are_found(mistake: Mistake) -> None:
    name = "attention bf16 64 sm_90"
    text = mistake.make(compiled_attention(name).text)
    is_caught(mistake, lambda seed: attention_is_right(name, 64, seed, text), seeds=2)
