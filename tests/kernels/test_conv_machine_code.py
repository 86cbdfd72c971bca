"""What nvcc makes of csrc/'s convolution for sm_90a, where there is one: nothing spilled, products that are not waited
for one by one, and the instructions that were meant."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest
from compiled_host import ROOT
from conv_host import library

from fastvid.ops import dispatch

WIDTHS = (96, 128, 192)


def find_nvcc() -> str | None:
    spec = importlib.util.spec_from_file_location("fastvid_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.find_nvcc()


NVCC = find_nvcc()
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
    assert spilled == [("0", "0", "0")] * (2 * len(WIDTHS))
    assert not re.search(r"C75\d\d|serializ", told)  # ptxas fences or serialises wgmma
    for number, used in re.findall(r"conv_kernelILi(\d+)E[^\n]*for 'sm_90a'.*?Used (\d+) registers", told, re.DOTALL):
        blocks = 2 if int(number) <= 128 else 1
        # Registers are handed to warps by 256, 8 a thread; a block has 9 warps.
        assert blocks * 9 * 32 * -(-int(used) // 8) * 8 <= 65536
        assert library().conv_stages(int(number)) >= 3


@pytest.mark.slow
def test_instructions(compiled: tuple[str, Path]) -> None:
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip("there is no cuobjdump")
    code = subprocess.run([tool, "-sass", compiled[1]], capture_output=True, text=True, check=True).stdout
    for width in WIDTHS:
        for kind in (r"F32 ", r"F32\.BF16 "):
            # Steps of 4, 3, 2 and 1 products.
            assert len(re.findall(rf"HGMMA\.64x{width}x16\.{kind}", code)) == 4 + 3 + 2 + 1
    assert len(re.findall(r"UTMALDG\.5D", code)) == len(re.findall(r"UTMALDG\.3D", code)) == 2 * len(WIDTHS)
    assert not re.search(r"\b(STL|LDL)\b", code)


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
