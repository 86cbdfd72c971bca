"""What nvcc makes of csrc/'s convolution for sm_90a, where there is one: nothing spilled, products that are not waited
for one by one, and the instructions that were meant."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from compiled_host import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import sass

from fastvid.ops import dispatch

WIDTHS = (96, 128)


def find_nvcc() -> str | None:
    spec = importlib.util.spec_from_file_location("fastvid_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.find_nvcc()


NVCC = find_nvcc()
NUMBERS = re.search(r"kProducerRegisters = (\d+), kConsumerRegisters = (\d+)", (ROOT / "csrc/conv.h").read_text())
PRODUCER, CONSUMER = map(int, NUMBERS.groups())
pytestmark = pytest.mark.skipif(NVCC is None, reason="there is no nvcc")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What ptxas says, and the object file."""
    target = tmp_path_factory.mktemp("conv") / "conv.cubin.o"
    code = "-gencode=arch=compute_90a,code=sm_90a"
    command = [NVCC, "-O3", "-std=c++17", code, "-Xptxas=-v", "-c", str(ROOT / "csrc/conv.cu"), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr, target


@pytest.mark.slow
def test_nothing_spills_and_no_product_is_serialised(compiled: tuple[str, Path]) -> None:
    told, _ = compiled
    spilled = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", told)
    assert spilled == [("0", "0", "0")] * (2 * 3 * len(WIDTHS))
    assert not re.search(r"C75\d\d|serializ|setmaxnreg", told)  # ptxas fences or serialises wgmma
    used = {int(number) for number in re.findall(r"Used (\d+) registers", told)}
    # What the consumers take is what the producer gives, or less.
    assert len(used) == 1 and 640 * max(used) <= 65536
    assert 640 * max(used) >= 512 * CONSUMER + 128 * PRODUCER


def count_of(code: sass.Code, pattern: str) -> int:
    return sum(one.is_a(pattern) for one in code)


@pytest.mark.slow
@pytest.mark.skipif(sass.disassembler() is None, reason="there is no cuobjdump")
def test_instructions(compiled: tuple[str, Path]) -> None:
    kernels = sass.functions(compiled[1])
    assert len(kernels) == 2 * 3 * len(WIDTHS)
    for name, code in kernels.items():
        width, bf16, kind = map(int, re.search(r"ILi(\d+)ELb([01])ELNS\w+?4KindE(\d)E", name).groups())
        added, split = kind == 1, kind == 2
        count = partial(count_of, code)
        # Taps of 4, 3, 2 and 1 products, with as many reads of left matrices; panels, sixteen channels at once.
        assert count(rf"HGMMA\.64x{width}x16\.F32{r'.BF16' if bf16 else ''}$") == count("HGMMA") == 4 + 3 + 2 + 1
        assert count("LDSM") == 4 + 3 + 2 + 1 + added * width // 16
        assert count("STSM") == width // 16 and count("STG") == 0
        assert count(r"UTMASTG\.5D") == width // 32 * (1 + split)
        assert count(r"UTMALDG\.3D") == 1 and count(r"LDG") == width // 8  # weights; bias
        assert count(r"LDL|STL") == 0
        (takes,) = (i for i, one in enumerate(code) if one.is_a(r"USETMAXREG\.TRY_ALLOC"))
        (gives,) = (i for i, one in enumerate(code) if one.is_a(r"USETMAXREG\.DEALLOC"))
        assert sass.registers(sass.reached(code, takes)) <= CONSUMER
        assert sass.registers(sass.reached(code, gives)) <= PRODUCER
        # In the loop over taps nothing but reads, products, and the wait for them.
        assert sass.order(sass.hottest(code)) == ["4 products", "wait 0"] and len(sass.hottest(code)) < 64


def test_what_the_binding_refuses() -> None:
    """Where the extension is built: clear errors of the binding and the launcher, without a launch."""
    if isinstance(dispatch.extension(), str):
        pytest.skip("fastvid._C is not built")
    from fastvid import _C

    call = {
        "x": (1, 64, 1, 4, 4), "x_strides": (1024, 1024, 256, 64), "past_strides": (0, 0, 0, 0),
        "out": (1, 64, 1, 4, 4), "out_strides": (1024, 1024, 256, 64), "kernel": (1, 1, 1), "history": 0, "past": 0,
        "pad": (0, 0), "top": 0, "stride": 1, "stride_t": 1, "doubled": 0, "interleaved": 0, "add": 0,
    }  # fmt: skip
    with pytest.raises(RuntimeError, match="CUDA: "):
        _C.vae_conv(16, 0, 16, 16, 16, "bfloat16", call, 10**6, 0)
    with pytest.raises(ValueError, match="nearest: bfloat16"):
        _C.vae_conv(16, 0, 16, 16, 16, "float32", call, 0, 0)
    with pytest.raises(ValueError, match="16 bytes"):
        _C.vae_conv(18, 0, 16, 16, 16, "float16", call, 0, 0)
    with pytest.raises(ValueError, match="multiple of 8"):
        _C.vae_conv(16, 0, 16, 16, 16, "float16", call | {"x": (1, 12, 1, 4, 4)}, 0, 0)
    with pytest.raises(ValueError, match=r"C is 20.*nearest: 24"):
        _C.vae_norm(16, 16, 16, "float16", (1, 1, 4, 4), 20, (0, 0, 0, 0), (0, 0, 0, 0), True, 0, 0)
