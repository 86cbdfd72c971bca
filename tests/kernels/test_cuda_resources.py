"""What nvcc makes of csrc/, where there is one: nothing spills or grows unseen, and attention for sm_90a is made of the
instructions that were meant, in registers that its warpgroups have."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from compiled_host import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import cuda_resources
import sass

from fastvid.ops import dispatch

SETUP = cuda_resources.build()
SIZES = [(64, 128), (128, 128), (128, 176)]  # head_dim, keys of a step
needs_nvcc = pytest.mark.skipif(
    SETUP.find_nvcc() is None or shutil.which("c++filt") is None, reason="there is no nvcc or c++filt"
)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[str, Path]]:
    """File -> what ptxas says, and the object file."""
    folder = tmp_path_factory.mktemp("csrc")

    @cache
    def compile_once(file: str) -> tuple[str, Path]:
        target = folder / f"{file}.o"
        return cuda_resources.compile_file(file, target), target

    return compile_once


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("file", cuda_resources.files())
def test_kernels_take_what_is_recorded(file: str, compiled: Callable[[str], tuple[str, Path]]) -> None:
    table = cuda_resources.read()
    same = table["nvcc"] == SETUP.cuda_version(SETUP.find_nvcc())
    wrong = list(cuda_resources.worse(compiled(file)[0], table["kernels"].get(file, {}), same))
    assert not wrong, "\n".join(wrong)


def test_every_file_is_in_the_table() -> None:
    kernels = cuda_resources.read()["kernels"]
    assert sorted(kernels) == cuda_resources.files()
    for file, rows in kernels.items():
        for name, row in rows.items():
            assert sorted(row) == sorted(SETUP.DEFAULT_ARCHS.split(";")), (file, name)
            assert all(one["spilled"] == 0 for one in row.values()), (file, name)


def test_what_is_worse_is_said() -> None:
    said = (
        "ptxas info    : Compiling entry function '_Z6kernelILi64EEvv' for 'sm_90a'\n"
        "ptxas info    : Function properties for _Z6kernelILi64EEvv\n"
        "    0 bytes stack frame, {0} bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used {1} registers, {2} bytes smem\n"
    )
    recorded = {"kernel<64>": {"90a": {"registers": 40, "spilled": 0, "shared": 1000}}}
    if shutil.which("c++filt") is None:
        pytest.skip("there is no c++filt")
    assert not list(cuda_resources.worse(said.format(0, 44, 1100), recorded, True))
    for changed in ((8, 40, 1000), (0, 45, 1000), (0, 40, 1101)):
        assert len(list(cuda_resources.worse(said.format(*changed), recorded, True))) == 1, changed
    assert not list(cuda_resources.worse(said.format(0, 60, 1101), recorded, False))
    assert list(cuda_resources.worse(said.format(8, 40, 1000), {}, False))
    warned = "ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored to maintain minimum registers\n"
    assert list(cuda_resources.worse(said.format(0, 40, 1000) + warned, recorded, True))


def functions(target: Path) -> dict[str, sass.Code]:
    """Kernel's mangled name -> its instructions for sm_90a."""
    if sass.disassembler() is None:
        pytest.skip("there is no cuobjdump")
    return sass.functions(target)


@pytest.fixture(scope="module")
def code(compiled: Callable[[str], tuple[str, Path]]) -> dict[tuple[int, int, str], sass.Code]:
    """(head_dim, keys of a step, type) -> the instructions of attention's kernel for sm_90a."""
    made = {}
    for name, lines in functions(compiled("attention.cu")[1]).items():
        head_dim, keys, bf16 = re.search(r"attention_kernelILi(\d+)ELi(\d+)ELb([01])E", name).groups()
        made[int(head_dim), int(keys), "BF16" if bf16 == "1" else "F16"] = lines
    assert len(made) == 2 * len(SIZES)
    return made


@pytest.fixture(scope="module")
def code_eight(compiled: Callable[[str], tuple[str, Path]]) -> dict[tuple[int, str], list[sass.Code]]:
    """(head_dim, kind) -> the instructions of the kernels with 8-bit products, of either type of result."""
    made: dict[tuple[int, str], list[sass.Code]] = {}
    for name, lines in functions(compiled("attention_eight.cu")[1]).items():
        head_dim, int8 = re.search(r"attention_eight_kernelILi(\d+)ELb([01])E", name).groups()
        made.setdefault((int(head_dim), "int8" if int8 == "1" else "fp8"), []).append(lines)
    return made


def count(code: sass.Code, pattern: str) -> int:
    return sum(one.is_a(pattern) for one in code)


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize(("head_dim", "keys"), SIZES)
@pytest.mark.parametrize("kind", ["BF16", "F16"])
def test_instructions_of_attention(
    head_dim: int, keys: int, kind: str, code: dict[tuple[int, int, str], sass.Code]
) -> None:
    lines = code[head_dim, keys, kind]
    typed = r"F32\.BF16" if kind == "BF16" else "F32"
    # The first scores and those of the loop; the values of the loop and the last ones: keys in sixteens.
    wanted = {keys: 2 * head_dim // 16}
    wanted[head_dim] = wanted.get(head_dim, 0) + 2 * keys // 16
    for columns, number in wanted.items():
        assert count(lines, rf"HGMMA\.64x{columns}x16\.{typed}$") == number
    assert count(lines, "HGMMA") == sum(wanted.values())
    assert count(lines, r"UTMALDG\.4D") == 3 * head_dim // 64
    assert count(lines, r"\b(STL|LDL)\b") == 0
    # Products are waited for where the kernel does: once before the loop, twice in it, once behind it.
    assert count(lines, r"WARPGROUP\.DEPBAR") == 4


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_instructions_of_8_bit_attention(
    head_dim: int, kind: str, code_eight: dict[tuple[int, str], list[sass.Code]]
) -> None:
    assert len(code_eight[head_dim, kind]) == 2
    for lines in code_eight[head_dim, kind]:
        # Before the loop and in it: queries and keys in thirty-twos. In it and behind it: 128 keys of values.
        scores, values = 2 * head_dim // 32, 2 * 128 // 32
        if kind == "int8":
            assert count(lines, r"IGMMA\.64x128x32\.S8\.S8") == scores
            assert count(lines, rf"QGMMA\.64x{head_dim}x32\.F32\.E4M3\.E4M3") == count(lines, "QGMMA") == values
        else:
            assert count(lines, r"QGMMA\.64x128x32\.F32\.E4M3\.E4M3") == scores + values * (head_dim == 128)
            assert count(lines, "QGMMA") == scores + values
        assert count(lines, "HGMMA") == 0
        assert count(lines, r"UTMALDG\.4D") == 3
        assert count(lines, r"\b(STL|LDL)\b") == 0
        # As in 16 bits: products are waited for once before the loop, twice in it, once behind it.
        assert count(lines, r"WARPGROUP\.DEPBAR") == 4


@pytest.mark.slow
@needs_nvcc
def test_instructions_of_pairs(compiled: Callable[[str], tuple[str, Path]]) -> None:
    """Queries alone, keys and values into both blocks; the blocks meet at the beginning and before they end."""
    made = functions(compiled("attention_pair.cu")[1])
    assert len(made) == 2
    for lines in made.values():
        assert count(lines, r"UTMALDG\.4D$") == 2 and count(lines, r"UTMALDG\.4D\.MULTICAST$") == 4
        assert count(lines, "UCGABAR_ARV") == count(lines, "UCGABAR_WAIT") == 2
        assert count(lines, r"MEMBAR.*GPU") == 2  # with the meetings, none in the loop
        assert count(lines, r"SYNCS\.ARRIVE\.TRANS64\.RED") == 4  # stages that are read: of keys twice, of values twice
        assert not any(one.is_a("MEMBAR") for one in sass.hottest(lines))


@pytest.mark.slow
@needs_nvcc
def test_warpgroups_stay_within_their_registers(
    code: dict[tuple[int, int, str], sass.Code],
    code_eight: dict[tuple[int, str], list[sass.Code]],
    compiled: Callable[[str], tuple[str, Path]],
) -> None:
    """What follows setmaxnreg uses no register that its warpgroup has not got."""
    pairs = list(functions(compiled("attention_pair.cu")[1]).values())
    sixteen, eight = [*code.values(), *pairs], [lines for made in code_eight.values() for lines in made]
    for lines in sixteen:
        check_registers(lines)
    assert {check_registers(lines) for lines in eight} == {(24, 240)}
    assert check_registers(code[128, 176, "BF16"]) == (24, 240)


def check_registers(code: sass.Code) -> tuple[int, int]:
    """(of a thread of the producer, of a consumer)"""
    (takes,) = (i for i, one in enumerate(code) if one.is_a(r"USETMAXREG\.TRY_ALLOC"))
    (gives,) = (i for i, one in enumerate(code) if one.is_a(r"USETMAXREG\.DEALLOC"))
    producer, consumer = (int(code[i].rest.split(", ")[-1], 16) for i in (gives, takes))
    consumers, producers = sass.reached(code, takes), sass.reached(code, gives)
    assert count(consumers, "[HIQ]GMMA") and not count(consumers, "UTMALDG")
    assert count(producers, "UTMALDG") and not count(producers, "[HIQ]GMMA")
    assert sass.registers(consumers) <= consumer and sass.registers(producers) <= producer
    # 384 threads begin with 168; if they asked for more than that together, they would wait for ever.
    assert producer + 2 * consumer <= 3 * 168
    return producer, consumer


def test_what_the_binding_refuses() -> None:
    """Where the extension is built: clear errors of the binding and the launcher, without a launch."""
    if isinstance(dispatch.extension(), str):
        pytest.skip("fastvid._C is not built")
    from fastvid import _C

    call = {
        "batch": 1, "queries": 100, "keys": 200, "heads": 2, "head_dim": 64, "q_strides": (12800, 128, 64),
        "k_strides": (25600, 128, 64), "v_strides": (25600, 128, 64), "tiles": 0, "largest": 0, "lists": 1, "pairs": 0,
    }  # fmt: skip
    with pytest.raises(RuntimeError, match="CUDA: "):
        _C.attention(16, 16, 16, 16, 0, "bfloat16", call, [], 0.125, 10**6, 0)
    with pytest.raises(ValueError, match="nearest: bfloat16"):
        _C.attention(16, 16, 16, 16, 0, "float32", call, [], 0.125, 0, 0)
    with pytest.raises(ValueError, match=r"head_dim is 80; .*nearest: 64"):
        _C.attention(16, 16, 16, 16, 0, "float16", call | {"head_dim": 80}, [], 0.125, 0, 0)
    with pytest.raises(ValueError, match="16 bytes"):
        _C.attention(16, 18, 16, 16, 0, "float16", call, [], 0.125, 0, 0)
    with pytest.raises(ValueError, match="6 lists with a counter, or none"):
        _C.attention(16, 16, 16, 16, 0, "float16", call, [16], 0.125, 0, 0)
    with pytest.raises(ValueError, match="given with tiles"):
        _C.attention(16, 16, 16, 16, 0, "float16", call | {"tiles": 1, "largest": 9}, [], 0.125, 0, 0)


def test_what_the_binding_of_8_bit_attention_refuses() -> None:
    if isinstance(dispatch.extension(), str):
        pytest.skip("fastvid._C is not built")
    from fastvid import _C

    call = {
        "batch": 1, "queries": 100, "keys": 200, "heads": 2, "head_dim": 64, "q_strides": (12800, 128, 64),
        "k_strides": (25600, 128, 64), "v_strides": (25600, 128, 64), "tiles": 0, "largest": 0, "lists": 1, "pairs": 0,
    }  # fmt: skip
    held, scales = [16, 16, 16], [16, 0, 16]

    def attention(blocks: int = 2, kind: str = "fp8", scale: float = 0.125, device: int = 0, **changed: int) -> None:
        _C.attention_eight(held, scales, blocks, 16, 0, kind, "float16", call | changed, [], scale, device, 0)

    with pytest.raises(RuntimeError, match="CUDA: "):
        attention(device=10**6)
    with pytest.raises(ValueError, match="it can be fp8 or int8"):
        attention(kind="fp4")
    with pytest.raises(ValueError, match="1 blocks of 128 keys do not hold 200 keys"):
        attention(blocks=1)
    with pytest.raises(ValueError, match="takes 1e-6 to 1e6"):
        attention(scale=1e-9)
    with pytest.raises(ValueError, match="nearest: 64"):
        attention(head_dim=80)
    source = {"batch": 1, "tokens": 100, "heads": 2, "head_dim": 64, "strides": (12800, 128, 64), "count": 1, "each": 1}
    with pytest.raises(RuntimeError, match="CUDA: "):
        _C.quantize("keys", 16, 16, 16, 16, 0, "int8", "bfloat16", source, 0, 10**6, 0)
    with pytest.raises(ValueError, match="multiples of 8"):
        _C.quantize("keys", 16, 16, 16, 16, 0, "int8", "bfloat16", source | {"strides": (1, 100, 64)}, 0, 0, 0)
    with pytest.raises(ValueError, match="queries, keys or values"):
        _C.quantize("weights", 16, 16, 16, 16, 0, "int8", "bfloat16", source, 0, 0, 0)
