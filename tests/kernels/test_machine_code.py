"""The machine code of csrc/ for sm_90a, where there are nvcc and cuobjdump: the recorded instruction counts, and in
attention's main loop the order of products, waits and exponentials."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from compiled_host import ROOT
from kernel_mutations import MUTATIONS, NO_EDGE, mutate

sys.path.insert(0, str(ROOT / "benchmarks"))
import cuda_resources
import machine_code
import sass

NVCC = cuda_resources.build().find_nvcc()
needs_nvcc = pytest.mark.skipif(
    NVCC is None or sass.disassembler() is None or shutil.which("c++filt") is None,
    reason="there is no nvcc, cuobjdump or c++filt",
)
Rows = dict[str, dict[str, object]]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Rows]:
    """File -> its rows, as the table has them."""
    folder = tmp_path_factory.mktemp("csrc")

    @cache
    def compile_once(file: str) -> Rows:
        cuda_resources.compile_file(file, folder / f"{file}.o", [machine_code.ARCH])
        return machine_code.rows_of(folder / f"{file}.o")

    return compile_once


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("file", cuda_resources.files())
def test_the_table_is_of_these_sources(file: str, compiled: Callable[[str], Rows]) -> None:
    table = machine_code.read()
    if table["nvcc"] != cuda_resources.build().cuda_version(NVCC):
        pytest.skip(f"the table is of nvcc {table['nvcc']}")
    assert compiled(file) == table["kernels"][file], "run benchmarks/machine_code.py"


def test_the_table_has_every_file_and_what_was_before() -> None:
    table = machine_code.read()
    assert sorted(table["kernels"]) == sorted(cuda_resources.read()["kernels"]) == cuda_resources.files()
    assert table["revision"] and table["before"].keys() <= table["kernels"].keys()
    for file, rows in cuda_resources.read()["kernels"].items():
        assert table["kernels"][file].keys() == rows.keys()


# Attention: one kernel for dense and for listed keys


def softmax_beside_products(order: list[str]) -> int:
    """How many exponentials an iteration has between its products, of which those of values still run, and the wait
    for these. Raises AssertionError unless the order is products, wait 1, exponentials, wait 0 and at most two
    exponentials elsewhere: of a scale."""
    around = [one for one in order if not one.endswith("exponentials") or int(one.split()[0]) > 2]
    first = next(i for i, one in enumerate(around) if one.endswith("products"))
    around = around[first:] + around[:first]  # an iteration may begin anywhere
    kinds = [one.split()[-1] if one[0].isdigit() else one for one in around]
    kinds = [kind for kind, before in zip(kinds, ["", *kinds], strict=False) if kind != before]
    assert kinds == ["products", "wait 1", "exponentials", "wait 0"], order
    return int(around[-2].split()[0])


ATTENTION = [
    (f"attention_kernel<{d}, {keys}, {b}>", (d + keys) // 16, keys // 2 + 2, keys // 16 + (2 if keys > 128 else 1))
    for d, keys in ((64, 128), (128, 128), (128, 176))
    for b in ("false", "true")
]
PAIRS = [(f"attention_pair_kernel<{b}>", 19, 90, 11) for b in ("false", "true")]
EIGHT = [
    (f"attention_eight_kernel<{d}, {i}, {b}>", d // 32 + 4, 67, 9)
    for d in (64, 128)
    for i in ("false", "true")
    for b in ("false", "true")
]


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize(("name", "products", "exponentials", "chain"), ATTENTION + PAIRS + EIGHT)
def test_softmax_runs_beside_the_products_of_values(
    name: str, products: int, exponentials: int, chain: int, compiled: Callable[[str], Rows]
) -> None:
    """64 or 88 scores of a thread and the scales of two rows; with 8 bits a scale of the step, wherever it comes."""
    row = compiled(name.split("_kernel")[0] + ".cu")[name]
    assert softmax_beside_products(row["order"]) >= exponentials
    assert row["loop"]["products"] == products and "local memory" not in row["loop"]
    assert row["chain of maxima"] <= chain  # one after the other, 64 scores would be 19


@pytest.mark.slow
@needs_nvcc
def test_without_the_second_wait_for_values_it_does_not(tmp_path: Path) -> None:
    """What the check above sees if nothing ends a basic block there."""
    (mutation,) = (one for one in MUTATIONS if one.name == NO_EDGE)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    changed = tmp_path / "csrc" / mutation.file
    changed.write_text(mutate(changed.read_text(), mutation))
    for file in ("attention.cu", "attention_pair.cu", "attention_eight.cu"):
        cuda_resources.compile_file(file, tmp_path / "made.o", [machine_code.ARCH], tmp_path)
        for row in machine_code.rows_of(tmp_path / "made.o").values():
            with pytest.raises(AssertionError, match="wait 0"):
                softmax_beside_products(row["order"])


# Reading machine code

LISTING = """
        Function : _Z4workv
        /*0000*/                   S2R R0, SR_TID.X ;                 /* 0x00 */
        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R8 ;
        /*0020*/              @!P0 BRA 0x90 ;
        /*0030*/                   HGMMA.64x64x16.F32 R24, gdesc[UR4], R24 ;
        /*0040*/                   HGMMA.64x64x16.F32 R24, gdesc[UR8], R24 ;
        /*0050*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0060*/                   MUFU.EX2 R4, R5 ;
        /*0070*/              @!P1 BRA 0x10 ;
        /*0080*/                   EXIT ;
        /*0090*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R8 ;
        /*00a0*/              @!P0 BRA 0x90 ;
        /*00b0*/                   CALL.REL.NOINC 0xd0 ;
        /*00c0*/                   BRA 0x30 ;
        /*00d0*/                   IMAD R30, R1, R2, R3 ;
        /*00e0*/                   RET.REL.NODEC R6 0x0 ;
        /*00f0*/                   BRA 0xf0 ;
"""


CHAINS = """
        /*0000*/                   FMNMX R4, R5, R6, !PT ;
        /*0010*/                   FMNMX R7, R8, R9, !PT ;
        /*0020*/                   UMOV UR4, URZ ;
        /*0030*/                   FMNMX R4, R4, R7, !PT ;
        /*0040*/                   FMNMX.FTZ R10, R4.reuse, R11, !PT ;
        /*0050*/                   SHFL.BFLY PT, R12, R10, 0x2, 0x1f ;
        /*0060*/                   FMNMX R12, R12, R5, !PT ;
"""


def test_a_listing_is_read() -> None:
    """The main loop has the piece that lies behind the end, in the order in which it runs."""
    code = sass.parse(LISTING)
    assert [one.at for one in code] == list(range(0, 0x100, 16))
    loop = sass.hottest(code)
    assert sorted(one.at for one in loop) == [*range(0x10, 0x80, 16), *range(0x90, 0xD0, 16)]
    assert sass.order(loop) == ["2 products", "wait 1", "1 exponentials"]
    assert sass.count(loop) == {
        "products": 2, "exponentials": 1, "waits for products": 1, "waits for barriers": 2, "all": 11,
    }  # fmt: skip
    assert sass.chain(sass.parse(CHAINS), "FMNMX") == 3
    assert sass.registers(code) == 31 and sass.registers(loop) == 25
    assert [one.at for one in sass.reached(code, 9)] == [one.at for one in code if one.at not in (0x0, 0xF0)]


def test_the_order_that_is_looked_for() -> None:
    assert softmax_beside_products(["16 products", "wait 1", "66 exponentials", "wait 0"]) == 66
    assert softmax_beside_products(["1 exponentials", "6 products", "wait 1", "67 exponentials", "wait 0"]) == 67
    split = ["3 products", "1 exponentials", "5 products", "wait 1", "67 exponentials", "wait 0"]
    assert softmax_beside_products(split) == 67
    assert softmax_beside_products(["wait 0", "6 products", "wait 1", "67 exponentials"]) == 67
    for wrong in (
        ["16 products", "wait 1", "wait 0", "66 exponentials"],
        ["8 products", "wait 1", "1 exponentials", "wait 0", "67 exponentials"],
        ["8 products", "wait 0", "66 exponentials", "8 products", "wait 0"],
        ["16 products", "wait 1", "33 exponentials", "wait 0", "33 exponentials"],
    ):
        with pytest.raises(AssertionError):
            softmax_beside_products(wrong)
