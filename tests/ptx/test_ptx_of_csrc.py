"""csrc/'s kernels as nvcc compiles them for sm_90a, launched by their own launchers, interpreted instruction by
instruction on random schedules: against float64, and with mistakes made in the PTX, each of which has to be found.

What is not seen here: what ptxas makes of the PTX, the hardware's own rounding of sums and of approximations, and that
a launch is accepted (registers, a driver).
"""

from __future__ import annotations

import importlib.util
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from attention_cases import check, make
from attention_eight_host import eights
from compiled_host import CXX
from dequantize_cases import CASES, same_bits, weight_of
from exact_vae import exact_norm
from ptx import runs
from ptx.cases import attend, conv_is_right, eight_is_right
from ptx.from_csrc import NVCC, ROOT
from ptx.runs import How

from fastvid.ops import vae_kernels
from fastvid.ops.attention_gpu import quantized

pytestmark = [
    pytest.mark.slow,  # nvcc alone takes some seconds a file, the first time
    pytest.mark.skipif(NVCC is None or not find_spec("setuptools"), reason="no nvcc, or no setuptools"),
]
HALF, BF16 = torch.float16, torch.bfloat16
on_host = pytest.mark.skipif(CXX is None, reason="no C++ compiler is found")


# Pointwise kernels


@pytest.mark.parametrize("dtype", (torch.float32, HALF, BF16))
@pytest.mark.parametrize("width", (40, 37))
def test_rgb(dtype: torch.dtype, width: int) -> None:
    frames = torch.randn(3, 2, 5, width).to(dtype)
    frames[:, 1, 2, 3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    out = torch.zeros(2, 5, width, 3, dtype=torch.uint8)
    runs.rgb(frames, out)
    exact = ((frames.float().nan_to_num(nan=-1).clamp(-1, 1) * 0.5 + 0.5) * 255).round().to(torch.uint8)
    assert torch.equal(out, exact.permute(1, 2, 3, 0))


@pytest.mark.parametrize(("channels", "dtype", "silu"), ((8, BF16, True), (96, HALF, True), (384, BF16, False)))
def test_vae_norm(channels: int, dtype: torch.dtype, silu: bool) -> None:
    x = torch.randn(1, channels, 2, 3, 5).to(dtype).contiguous(memory_format=torch.channels_last_3d)
    gamma = torch.randn(channels).to(dtype)
    out = torch.full_like(x, torch.nan)
    runs.norm(x, gamma, out, silu)
    exact = exact_norm(x, gamma.view(-1, 1, 1, 1), silu)
    assert (out.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize(("format", "shape"), CASES)
def test_dequantize(format: str, shape: tuple[int, int]) -> None:
    """Bit for bit what the format says, and nothing beside it."""
    weight, last = weight_of(format, shape, seed=2), shape[0]
    for dtype in (torch.float32, HALF, BF16):
        edge = torch.full((shape[0] + 1, shape[1]), torch.nan, dtype=dtype)
        runs.dequantize(weight, 1, last, edge[1:last])
        assert same_bits(edge[1:last], weight.rows(1, last, dtype)), dtype
        assert edge[0].isnan().all() and edge[last:].isnan().all()


@on_host
@pytest.mark.parametrize(("kind", "head_dim", "dtype"), (("fp8", 64, HALF), ("int8", 128, BF16)))
def test_quantize(kind: str, head_dim: int, dtype: torch.dtype) -> None:
    """Bit for bit as the host makes it, but for the order of a sum."""
    q, k, v = (make((1, n, 2, head_dim), dtype, i) for i, n in enumerate((100, 200, 200)))
    quantize = partial(quantized, q, k, v, None, True)
    tensors, scales = quantize(lambda part, x, mean, made: runs.quantize(part, x, mean, made, kind))
    wanted, wanted_scales = eights(q, k, v, kind, None, True)
    assert all(torch.equal(a, b) for a, b in zip(tensors, wanted, strict=True))
    assert torch.equal(scales[0], wanted_scales[0]) and torch.equal(scales[2], wanted_scales[2])
    torch.testing.assert_close(scales[1], wanted_scales[1], rtol=1e-5, atol=1e-6)


# Convolutions


@pytest.mark.parametrize(
    ("kernel", "C", "N", "dtype"),
    (
        ((1, 1, 1), 64, 96, BF16),
        ((1, 1, 1), 136, 208, HALF),
        ((3, 3, 3), 16, 96, HALF),
        ((3, 3, 3), 72, 112, BF16),
        ((3, 1, 1), 200, 192, BF16),
    ),
)
def test_conv(kernel: tuple[int, int, int], C: int, N: int, dtype: torch.dtype) -> None:
    assert conv_is_right(kernel, C, N, dtype, How(seed=C))


def test_conv_without_a_past() -> None:
    assert conv_is_right((3, 3, 3), 24, 96, BF16, How(), past=False)


def test_operations_of_the_vae() -> None:
    """All that test_conv_cuda.py does: with a residual, interleaved frames, doubled pixels, strides."""
    spec = importlib.util.spec_from_file_location("conv_cases", ROOT / "tests/kernels/test_conv_cuda.py")
    assert spec is not None and spec.loader is not None
    cases = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cases)
    kernels = vae_kernels.Kernels(runs.conv, runs.norm, on_load=False)
    cases.run_all(kernels, 16, 96, 2, 4, 5, BF16, "cpu")


# Attention


@pytest.mark.parametrize("dtype", (HALF, BF16))
@pytest.mark.parametrize("head_dim", (64, 128))
@pytest.mark.parametrize("keys", (128, 256))
def test_attention_of_one_block(keys: int, head_dim: int, dtype: torch.dtype) -> None:
    for seed in range(2):
        given, made, _ = attend((128, keys, 1, head_dim), dtype, How(seed))
        check(*given, made)


@pytest.mark.parametrize(
    ("sizes", "processors"),
    (((200, 300, 2, 64), 2), ((1, 1, 1, 128), 1), ((130, 700, 1, 64), 1), ((130, 600, 1, 128), 2)),
)
def test_attention_goes_round_its_rings(sizes: tuple[int, int, int, int], processors: int) -> None:
    """Ragged ends, several works a block, more steps than stages."""
    given, made, _ = attend(sizes, BF16, How(1, processors))
    check(*given, made)


@pytest.mark.parametrize("sizes", ((256, 176, 1, 128), (250, 400, 1, 128), (512, 900, 1, 128)))
def test_attention_by_pairs_of_blocks(sizes: tuple[int, int, int, int]) -> None:
    for seed in range(2):
        given, made, _ = attend(sizes, BF16, How(seed, processors=2 + seed, pairs=True))
        check(*given, made)


@pytest.mark.parametrize(("head_dim", "lists"), ((64, 1), (128, 2)))
def test_attention_by_lists(head_dim: int, lists: int) -> None:
    given, made, blocks = attend((270, 370, 2, head_dim), BF16, How(2, 3), lists)
    check(*given, made, None, blocks)


@on_host
@pytest.mark.parametrize("kind", ("fp8", "int8"))
@pytest.mark.parametrize(("head_dim", "dtype"), ((64, BF16), (128, HALF)))
def test_attention_of_8_bits(kind: str, head_dim: int, dtype: torch.dtype) -> None:
    assert eight_is_right(kind, head_dim, How(processors=2), dtype)
