"""Mistakes made in the PTX of csrc's kernels: the interpreter finds each of them."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from importlib.util import find_spec

import pytest
import torch
from compiled_host import CXX
from ptx.cases import attention_is_right, conv_is_right, eight_is_right
from ptx.from_csrc import NVCC, extension
from ptx.mutate import Mistake, is_caught
from ptx.runs import How

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NVCC is None or not find_spec("setuptools"), reason="no nvcc, or no setuptools"),
]
CHAOS = "more arrivals|wait for ever|overwrites|comes twice|has ended"
ENDED = "there is no barrier|has ended"
BY_DESCRIPTORS = r"(mma_async[^;]*\}), (%rd\d+), (%rd\d+), p"
BY_REGISTERS = r"(mma_async[^;]*\}, \{)(%r\d+), (%r\d+), (%r\d+), (%r\d+)\}"
NO_WAIT = {"pattern": r"mbarrier\.try_wait[^;]*;\s*selp\.u32 (%r\d+), 1, 0, p;", "replacement": r"mov.u32 \1, 1;"}
NO_WAIT |= {"fault": CHAOS, "wrong": True}
PRODUCER, CONSUMERS = r"setmaxnreg\.dec", r"setmaxnreg\.inc"

ATTENTION = (
    Mistake("queries and keys swapped", BY_DESCRIPTORS, r"\1, \3, \2, p"),
    Mistake("keys transposed", r"p, 1, 1, 0, 0;", r"p, 1, 1, 0, 1;"),
    Mistake("values not transposed", r"(mma_async[^;]*\}, %rd\d+, p, 1, 1), 1;", r"\1, 0;"),
    Mistake("weights of other rows", BY_REGISTERS, r"\1\3, \2, \4, \5}"),
    Mistake("weights of other keys", BY_REGISTERS, r"\1\2, \4, \3, \5}"),
    Mistake("results in another order", r"(mma_async\S+ \{)(%f\d+), (%f\d+)", r"\1\3, \2", fault="are others"),
    Mistake("no fence", r"wgmma\.fence\S*;", "", 0, fault="no wgmma.fence"),
    Mistake("no commit", r"wgmma\.commit_group\S*;", "", fault="unfinished|nobody waited"),
    Mistake("scores not waited for", r"(wgmma\.wait_group\S*) 1;", r"\1 2;", fault="unfinished"),
    Mistake("results not waited for", r"(wgmma\.wait_group\S*) 0;", r"\1 1;", 0, fault="unfinished"),
    Mistake("nobody waits for stages that are free", **NO_WAIT, count=3, behind=PRODUCER),
    Mistake("nobody waits for queries and keys", **NO_WAIT, count=2, behind=CONSUMERS),
    Mistake("more registers than there are", r"(setmaxnreg\.inc\S*) \d+;", r"\1 256;", fault="wait for ever"),
    Mistake("fewer registers given back", r"(setmaxnreg\.dec\S*) \d+;", r"\1 152;", fault="wait for ever"),
    Mistake("turns of fewer threads", r"bar\.arrive (%r\d+), %r\d+;", r"bar.arrive \1, 128;", fault="expects"),
    Mistake("a turn not passed on", r"bar\.arrive [^;]*;", "", behind=r"commit_group", fault="wait for ever"),
    Mistake("arrivals of seven warps", r"(mov\.u32 \s*%r\d+), 8;", r"\1, 7;", fault=CHAOS, wrong=True),
    Mistake("more bytes than come", r"(mov\.[bu]32 \s*%r\d+), 16384;", r"\1, 16400;", 0, PRODUCER, "wait for ever"),
    Mistake("maxima of other rows", r"(shfl\.sync\.bfly\.b32 \s*[^;]*), (%r\d+), (%r\d+), (%r\d+);", r"\1, 4, \3, \4;"),
    Mistake("rows and heads swapped", r"(bulk\.tensor\.4d[^{]*\{%r\d+), (%r\d+), (%r\d+)", r"\1, \3, \2", 0),
)  # fmt: skip


@cache
def mutated(mistake: Mistake, file: str, kernels: str) -> str:
    """A file's PTX with a mistake in each of the kernels whose names contain `kernels`."""
    first, *parts = re.split(r"(?=\.entry )", extension().texts[file])
    found = [part for part in parts if kernels in part.split("(")[0]]
    assert found
    return "".join([first, *(mistake.make(part) if part in found else part for part in parts)])


@pytest.mark.parametrize("mistake", ATTENTION, ids=str)
def test_in_attention(mistake: Mistake) -> None:
    """Five steps, on four stages."""
    how = How(text=mutated(mistake, "attention", "attention_kernelILi64E"))
    is_caught(mistake, lambda seed: attention_is_right((128, 640, 1, 64), replace(how, seed=seed)), seeds=6)


MEETING = r"barrier\.cluster\.arrive\S*;\s*barrier\.cluster\.wait\S*;"
PAIRS = (
    Mistake("blocks do not meet at first", MEETING, "", fault=ENDED),
    Mistake("blocks do not meet at last", MEETING, "", 0, PRODUCER, ENDED),
    Mistake("stages given back to one block", r"(mapa\S*\s+\S+ %r\d+), %r\d+;", r"\1, 0;", 0, fault=CHAOS, wrong=True),
    Mistake("loads into one block", r"(multicast[^;]*), %rs\d+;", r"\1, 1;", 0, fault=CHAOS, wrong=True),
)  # fmt: skip


@pytest.mark.parametrize("mistake", PAIRS, ids=str)
def test_in_pairs_of_blocks(mistake: Mistake) -> None:
    """Four steps, on fewer stages."""
    how = How(text=mutated(mistake, "attention_pair", "attention_pair_kernel"), pairs=True)
    is_caught(mistake, lambda seed: attention_is_right((256, 600, 1, 128), replace(how, seed=seed)), seeds=8)


ROW64, ROW128 = (eights << 32 | 1 << 16 | mode << 62 for eights, mode in ((32, 2), (64, 1)))  # in descriptors
EIGHT = (
    Mistake("queries and keys swapped", BY_DESCRIPTORS, r"\1, \3, \2, p", 0),
    Mistake("weights of other rows", BY_REGISTERS, r"\1\3, \2, \4, \5}", 0),
    Mistake("weights of other keys", BY_REGISTERS, r"\1\2, \4, \3, \5}", 0),
    Mistake("neighbouring weights swapped", r"(e4m3x2\.f32 \s*%rs\d+), (%f\d+), (%f\d+)", r"\1, \3, \2", 0),
    Mistake("rows of 64 bytes read as those of 128", f"{ROW64 - (1 << 64)};", f"{ROW64 - (1 << 63) + (1 << 62)};", 0),
    Mistake("rows of 128 bytes read as those of 64", f"{ROW128};", f"{ROW128 - (3 << 62)};", 0),
    Mistake("scores not waited for", r"(wgmma\.wait_group\S*) 1;", r"\1 2;", 0, fault="unfinished"),
)  # fmt: skip


@pytest.mark.skipif(CXX is None, reason="no C++ compiler is found")
@pytest.mark.parametrize("kind", ("fp8", "int8"))
@pytest.mark.parametrize("mistake", EIGHT, ids=str)
def test_in_attention_of_8_bits(mistake: Mistake, kind: str) -> None:
    """Two steps, the second of which is ragged."""
    how = How(text=mutated(mistake, "attention_eight", "eight_kernelILi64E"))
    is_caught(mistake, lambda seed: eight_is_right(kind, 64, replace(how, seed=seed)), seeds=2)


CONV = (
    Mistake("pixels of other rows", BY_REGISTERS, r"\1\3, \2, \4, \5}", 0),
    Mistake("pixels' channels swapped", BY_REGISTERS, r"\1\2, \4, \3, \5}", 0),
    Mistake("blocks read in another order", r"(ldmatrix[^{]*\{)(%r\d+), (%r\d+)", r"\1\3, \2", 0),
    Mistake("blocks written in another order", r"(stmatrix[^{]*\{)(%r\d+), (%r\d+)", r"\1\3, \2", 0),
    Mistake("a sign", r"(mma_async[^;]*p, 1), 1, 0;", r"\1, -1, 0;", 0),
    Mistake("no fence", r"wgmma\.fence\S*;", "", 0, fault="no wgmma.fence"),
    Mistake("results not waited for", r"(wgmma\.wait_group\S*) 0;", r"\1 1;", 0, fault="unfinished|before the product"),
    Mistake("nobody waits for boxes", **NO_WAIT, count=0, behind=CONSUMERS),
    Mistake("nobody waits for stages that are free", **NO_WAIT, count=3, behind=PRODUCER),
    Mistake("rows and frames swapped", r"(bulk\.tensor\.5d[^{]*\{%r\d+, %r\d+), (%r\d+), (%r\d+)", r"\1, \3, \2"),
    Mistake("taps and channels swapped", r"(bulk\.tensor\.3d[^{]*\{)(%r\d+), (%r\d+)", r"\1\3, \2"),
    Mistake("results stored without a fence", r"fence\.proxy\.async\S*;", "", 0, r"setmaxnreg", "without fence"),
    Mistake("stores not waited for", r"cp\.async\.bulk\.wait_group\S*\s+\d;", "", 0, fault="nobody waited", wrong=True),
)  # fmt: skip


@pytest.mark.parametrize("mistake", CONV, ids=str)
def test_in_convolutions(mistake: Mistake) -> None:
    """27 taps, fewer stages."""
    how = How(text=mutated(mistake, "conv", "conv_kernelILi96ELb1E"))
    is_caught(mistake, lambda seed: conv_is_right((3, 3, 3), 24, 96, torch.bfloat16, replace(how, seed=seed)), seeds=6)


def test_what_is_right_is_not_called_wrong() -> None:
    """The same sizes, as they are."""
    assert all(attention_is_right((128, 640, 1, 64), How(seed)) for seed in range(3))
    assert CXX is None or all(eight_is_right(kind, 64, How(1)) for kind in ("fp8", "int8"))
    assert all(conv_is_right((3, 3, 3), 24, 96, torch.bfloat16, How(seed)) for seed in range(3))
