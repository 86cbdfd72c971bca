"""to_rgb: the reference against NumPy, then every back end against the reference, byte for byte.

The CUDA arithmetic and index maths run on the host through fastvid._C (skipped where it is not built), the Triton
kernel in Triton's interpreter, in a child process; both are compiled for three architectures. On a GPU, both run.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import run_interpreted
from torch import Tensor

from fastvid.ops import dispatch, rgb

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZES = st.sampled_from((1, 2, 3, 4, 5, 8, 13, 16, 31, 64, 137))
needs_extension = pytest.mark.skipif(
    isinstance(dispatch.extension(), str), reason="fastvid._C is not built (FASTVID_BUILD_CUDA=1, where nvcc is)"
)
FAR = [(64, 2**30), (2**30, 64)]
ToRgb = Callable[[Tensor], Tensor]


def numpy_rgb(frames: Tensor) -> np.ndarray:
    """The formula in IEEE fp32, written a second time."""
    x = frames.float().numpy()
    x = np.where(np.isnan(x), np.float32(-1), np.clip(x, np.float32(-1), np.float32(1)))
    unit = x * np.float32(0.5) + np.float32(0.5)
    return np.rint(unit * np.float32(255)).astype(np.uint8).transpose(1, 2, 3, 0)


def make_frames(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """[3, *shape] around [-1, 1] and beyond it, with NaN, infinities, and values halfway between two bytes."""
    frames = torch.randn((3, *shape), generator=torch.Generator().manual_seed(seed))
    ties = (torch.arange(255) + 0.5) / 255 * 2 - 1
    odd = torch.cat((torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0, -1.0, 0.0, -0.0, 1e-40]), ties))
    places = torch.randperm(frames.numel(), generator=torch.Generator().manual_seed(seed))[: odd.numel()]
    frames.view(-1)[places] = odd[: places.numel()]
    return frames.to(dtype)


def every_16_bit_value(dtype: torch.dtype) -> Tensor:
    """All the values of a 16-bit type as frames [3, 1, 1, 21848]."""
    bits = torch.arange(-(2**15), 2**15 + 8, dtype=torch.int32).to(torch.int16)
    return bits.view(dtype).view(3, 1, 1, -1)


def layouts(frames: Tensor) -> dict[str, Tensor]:
    """The same kind of frames in other strides: [T, 3, H, W], [T, H, W, 3], every second row, a crop, mirrored ends."""
    T, H, W = frames.shape[1:]
    return {
        "planar": frames,
        "frames first": frames.transpose(0, 1).contiguous().transpose(0, 1),
        "channels last": frames.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
        "every second row": frames[:, :, ::2],
        "crop": frames[:, :, : (H + 1) // 2, : (W + 1) // 2],
        "transposed": frames.transpose(2, 3),
        "one frame, repeated": frames[:, :1].expand(-1, T, -1, -1),
        "not aligned": frames[:, :, :, 1:] if W > 1 else frames,
    }


def check(to_rgb: ToRgb, frames: Tensor) -> None:
    for name, x in layouts(frames).items():
        out = to_rgb(x)
        assert out.dtype == torch.uint8 and out.is_contiguous()
        assert torch.equal(out.cpu(), rgb.reference(x).cpu()), (name, tuple(x.shape), x.dtype)


def far_apart(stride_c: int, stride_t: int) -> Tensor:
    """fp16 frames [3, 3, 2, 8] whose last element lies 2^31 elements or more behind the first.

    The 4 GiB between them are never touched, so the system never provides them. No stride is itself in 2^31..2^32 - 1:
    Triton's interpreter reads such an argument wrongly.
    """
    size = 2 * stride_c + 2 * stride_t + 16
    assert size > 2**31
    frames = torch.empty(size, dtype=torch.float16).as_strided((3, 3, 2, 8), (stride_c, stride_t, 8, 1))
    return frames.copy_(make_frames((3, 2, 8)))


# The reference


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 13), (3, 16, 32)])
def test_reference_is_the_formula(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    for frames in layouts(make_frames(shape, dtype)).values():
        np.testing.assert_array_equal(rgb.reference(frames).numpy(), numpy_rgb(frames))


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_reference_of_every_16_bit_value(dtype: torch.dtype) -> None:
    np.testing.assert_array_equal(
        rgb.reference(every_16_bit_value(dtype)).numpy(), numpy_rgb(every_16_bit_value(dtype))
    )


def test_bytes_survive_the_way_to_frames_and_back() -> None:
    levels = torch.arange(256, dtype=torch.float32) / 255 * 2 - 1
    assert torch.equal(rgb.reference(levels.expand(3, 1, 1, 256))[0, 0, :, 0], torch.arange(256, dtype=torch.uint8))


def test_rounding_is_to_even_and_nan_is_black() -> None:
    values = torch.tensor([0.0, float("nan"), float("inf"), -float("inf"), 7.0, -7.0])  # 0.0 is 127.5
    assert rgb.reference(values.expand(3, 1, 1, 6))[0, 0, :, 0].tolist() == [128, 0, 255, 0, 255, 0]


def test_no_frames_give_no_frames() -> None:
    assert rgb.reference(torch.empty(3, 0, 4, 4)).shape == (0, 4, 4, 3)


def test_frames_are_left_alone() -> None:
    frames = make_frames((2, 4, 4)).requires_grad_()
    before = frames.detach().clone()
    assert not rgb.reference(frames).requires_grad
    assert torch.equal(frames.detach().nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize(
    "bad", [torch.zeros(4, 1, 2, 2), torch.zeros(3, 2, 2), torch.zeros(3, 1, 2, 2, dtype=torch.uint8)]
)
@pytest.mark.parametrize("to_rgb", [rgb.reference, rgb.triton])
def test_other_frames_are_refused(to_rgb: ToRgb, bad: Tensor) -> None:
    with pytest.raises(ValueError, match=r"\[3, T, H, W\]"):
        to_rgb(bad)


# CUDA C++, its arithmetic and index maths on the host


def host(frames: Tensor) -> Tensor:
    """fastvid._C.to_rgb_host into a poisoned buffer; nothing beside the frames may be written."""
    from fastvid import _C

    T, H, W = frames.shape[1:]
    buffer = torch.full((T * H * W * 3 + 64,), 0xA5, dtype=torch.uint8)
    out = buffer[32:-32]
    _C.to_rgb_host(frames.data_ptr(), out.data_ptr(), str(frames.dtype)[6:], (T, H, W), frames.stride())
    assert (buffer[:32] == 0xA5).all() and (buffer[-32:] == 0xA5).all()
    return out.view(T, H, W, 3)


@needs_extension
@given(frames=SIZES, height=SIZES, width=SIZES, dtype=st.sampled_from(DTYPES))
def test_extension_on_the_host(frames: int, height: int, width: int, dtype: torch.dtype) -> None:
    check(host, make_frames((min(frames, 5), height, width), dtype))


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_extension_on_every_16_bit_value(dtype: torch.dtype) -> None:
    check(host, every_16_bit_value(dtype))


@needs_extension
@pytest.mark.parametrize("strides", FAR)
def test_extension_has_64_bit_offsets(strides: tuple[int, int]) -> None:
    frames = far_apart(*strides)
    assert torch.equal(host(frames), rgb.reference(frames))


@needs_extension
def test_extension_refuses_what_it_cannot_do() -> None:
    from fastvid import _C

    with pytest.raises(ValueError, match="float64; float32, float16 and bfloat16"):
        _C.to_rgb_host(0, 0, "float64", (1, 1, 1), (1, 1, 1, 1))
    with pytest.raises(ValueError, match="at least 1"):
        _C.to_rgb(0, 0, "float32", (1, 0, 1), (1, 1, 1, 1), 0, 0)
    with pytest.raises(RuntimeError, match="CUDA: "):
        _C.to_rgb(0, 0, "float32", (1, 1, 1), (1, 1, 1, 1), 10**6, 0)


@needs_extension
def test_extension_knows_what_it_was_built_from() -> None:
    from fastvid import _C

    assert set(_C.SOURCE_HASHES) == {path.name for path in (Path(__file__).parents[2] / "csrc").glob("*.cu")}
    assert all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in _C.SOURCE_HASHES.values())
    assert re.fullmatch(r"\d+\.\d+", _C.CUDA_VERSION)
    assert dispatch.runs_on(_C.ARCHS, (9, 0)) or "90a" not in _C.ARCHS


# Triton


def poisoned(frames: Tensor) -> Tensor:
    from fastvid.kernels.rgb import to_rgb

    out = torch.full((*frames.shape[1:], 3), 0xA5, dtype=torch.uint8)
    to_rgb(frames, out)
    return out


@pytest.mark.interpret
@settings(max_examples=12)
@given(
    frames=st.integers(1, 2),
    height=SIZES.filter(lambda n: n < 20),
    width=SIZES.filter(lambda n: n < 40),
    dtype=st.sampled_from(DTYPES),
)
def test_triton(frames: int, height: int, width: int, dtype: torch.dtype) -> None:
    check(poisoned, make_frames((frames, height, width), dtype))


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_triton_on_every_16_bit_value(dtype: torch.dtype) -> None:
    assert torch.equal(poisoned(every_16_bit_value(dtype)), rgb.reference(every_16_bit_value(dtype)))


@pytest.mark.interpret
@pytest.mark.parametrize("width", [1023, 1024, 1025, 1028])
def test_triton_beside_the_block(width: int) -> None:
    frames = make_frames((1, 1, width))
    assert torch.equal(poisoned(frames), rgb.reference(frames))


@pytest.mark.interpret
@pytest.mark.parametrize("strides", FAR)
def test_triton_has_64_bit_offsets(strides: tuple[int, int]) -> None:
    frames = far_apart(*strides)
    assert torch.equal(poisoned(frames), rgb.reference(frames))


@pytest.mark.interpret
def test_triton_as_an_operator_of_torch() -> None:
    torch.library.opcheck(rgb.triton, (make_frames((2, 4, 8)),))
    assert rgb.triton(torch.empty(3, 0, 4, 4)).shape == (0, 4, 4, 3)


@pytest.mark.slow
def test_under_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_triton_compiles_ahead_of_time(arch: int, dtype: str, group: int) -> None:
    triton = pytest.importorskip("triton")
    compiler = pytest.importorskip("triton.compiler")
    from triton.backends.compiler import GPUTarget

    from fastvid.kernels.rgb import rgb_kernel

    if not hasattr(rgb_kernel, "cache_key"):
        pytest.skip("Triton interprets in this process")
    types = [f"*{dtype}", "*u8", "i32", "i32", "i32", "i64", "i64", "i64", "constexpr", "constexpr", "constexpr"]
    signature = dict(zip(rgb_kernel.arg_names, types, strict=True))
    aligned = {(i,): [["tt.divisibility", 16]] for i in (0, 1, 3, 5, 6, 7)}
    source = compiler.ASTSource(
        rgb_kernel, signature, constexprs={"stride_w": 1, "BLOCK": 256, "GROUP": group}, attrs=aligned
    )
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"enable_fp_fusion": False})
    except RuntimeError as error:
        if "ptxas" in str(error):
            pytest.skip(f"this Triton's ptxas does not know sm_{arch}")
        raise
    ptx = compiled.asm["ptx"]
    assert "fma" not in ptx  # one rounding too few, and halves come out wrong
    assert ".local" not in ptx
    if group == 4:
        assert "ld.global.v4.b32" in ptx if dtype == "fp32" else "ld.global.v2.b32" in ptx


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", "cuda"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    to_rgb = rgb.BACKENDS[name]
    for shape in [(1, 1, 1), (2, 5, 13), (3, 137, 64), (2, 480, 832), (5, 31, 1151)]:
        check(to_rgb, make_frames(shape, dtype).cuda())
    if dtype != torch.float32:
        check(to_rgb, every_16_bit_value(dtype).cuda())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_more_than_2_31_elements_on_a_gpu(name: str) -> None:
    frames = torch.empty((3, 360, 1080, 1920), dtype=torch.bfloat16, device="cuda").uniform_(-1.1, 1.1)
    assert frames.numel() > 2**31
    out = rgb.BACKENDS[name](frames)
    for t in (0, 200, 359):
        assert torch.equal(out[t], rgb.reference(frames[:, t : t + 1])[0])


@pytest.mark.gpu
def test_operator_of_torch_on_a_gpu() -> None:
    torch.library.opcheck(rgb.cuda, (make_frames((2, 4, 8)).cuda(),))
