"""The VAEs' operations: their meanings in float64 written a second time, then the kernels, then whole networks.

Kernels run in Triton's interpreter in a child process, with blocks so small that a few of them make a case, in fp32 and
fp16 (its bf16 is wrong); on a GPU, in every type. What they give may be off from float64 by twice what eager PyTorch is
off, with a floor of a rounding. Results are written into the middle of NaN, which has to stay around them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exact_vae import exact_conv, exact_double, exact_downsample, exact_norm, exact_upsample
from interpreted import run_interpreted
from kernel_cases import NAN, apart, check, error, laid_out, random
from torch import Tensor

from fastvid.models.common.vae_stream import Stream
from fastvid.models.wan.config import WanVAEConfig
from fastvid.models.wan.vae import WanVAE
from fastvid.models.wan.vae22 import WanVAE22
from fastvid.models.wan.vae_layers import SpatialAttention
from fastvid.ops import reference, rgb, vae, vae_gpu, vae_kernels

HALF = torch.float16
LAST = torch.channels_last_3d
FORMS = sorted(vae_gpu.BACKENDS)


def taken(op: str, *given: Any) -> dict[str, Any]:
    """What the reference and Triton make of it, the first of several results."""
    made = {}
    for name in ("reference", "triton"):
        own = (one.clone() if isinstance(one, Tensor) else one for one in given)  # some are written to
        with torch.no_grad():
            made[name] = vae_gpu.BACKENDS[op][name](*own)
    return {name: one[0] if isinstance(one, tuple) else one for name, one in made.items()}


# The kernels, interpreted


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Channels-last memory for [B, C, T, H, W] within a room of NaN: (it, the room [B, T, H, W, C] around it)."""
    B, C, T, H, W = shape
    room = torch.full((B, T + 2, H + 2, W + 2, C + 3), NAN, dtype=dtype)
    return room[:, 1:-1, 1:-1, 1:-1, :C].permute(0, 4, 1, 2, 3), room


def stayed(out: Tensor, room: Tensor) -> None:
    """Nothing was written but the result."""
    assert int(room.isfinite().sum()) == out.numel() and bool(out.isfinite().all())


CONVOLUTIONS = {
    # dtype, channels in and out, (T, H, W), kernel, past, edges, (block_m, block_n, block_k), layout
    "a tile and a bit": (torch.float32, 5, 19, (1, 3, 6), (3, 3, 3), True, (0, 0), (16, 16, 16), "plain"),
    "no past": (torch.float32, 16, 3, (3, 4, 4), (3, 3, 3), False, (0, 0), (16, 16, 16), "channels last"),
    "one frame, no past": (HALF, 3, 16, (1, 3, 5), (3, 3, 3), False, (0, 0), (16, 16, 16), "plain"),
    "two products": (HALF, 33, 49, (1, 3, 4), (3, 3, 3), True, (0, 0), (16, 48, 32), "channels last"),
    "edges": (torch.float32, 3, 5, (2, 5, 4), (3, 3, 3), True, (1, 1), (16, 16, 16), "slice of frames"),
    "an edge above": (HALF, 16, 16, (1, 4, 3), (3, 3, 3), True, (1, 0), (16, 16, 16), "plain"),
    "an edge below": (HALF, 16, 16, (1, 4, 3), (3, 3, 3), True, (0, 1), (16, 16, 16), "expanded"),
    "in time alone": (torch.float32, 48, 33, (3, 3, 7), (3, 1, 1), True, (0, 0), (16, 32, 16), "plain"),
    "a pixel": (torch.float32, 5, 7, (2, 1, 1), (3, 3, 3), True, (0, 0), (16, 16, 16), "plain"),
}


@pytest.mark.interpret
@pytest.mark.parametrize(("name", "B"), [*((name, 1) for name in CONVOLUTIONS), ("no past", 2), ("in time alone", 2)])
def test_causal_conv3d(name: str, B: int) -> None:
    from fastvid.kernels.vae_conv import Config, Form, conv

    dtype, C, N, (T, H, W), kernel, behind, edges, block, layout = CONVOLUTIONS[name]
    x = laid_out(random(B, C, T, H, W, dtype=dtype), layout)
    past = random(B, C, 2, H, W, dtype=dtype, seed=1) if behind else None
    weight, bias = random(N, C, *kernel, dtype=dtype, seed=2) / C**0.5, random(N, dtype=dtype, seed=3)
    pad = (kernel[1] // 2, kernel[2] // 2)
    eager, _ = vae.causal_conv3d(x, past, weight, bias, pad, edges)
    out, room = poisoned((B, N, T, H - sum(edges), W), dtype)
    form = Form(pad, edges[0])
    conv(x, past, None, None, weight.contiguous(memory_format=LAST), bias, out, 2, form, Config(*block, 4, 2))
    stayed(out, room)
    check(out, eager, exact_conv(x, 2 if past is None else past, weight, bias, pad, edges))


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("dtype", "C", "N", "T", "behind", "edges", "added", "layout"),
    [
        (torch.float32, 5, 16, 2, True, (0, 0), True, "plain"),
        (HALF, 16, 5, 1, True, (1, 0), True, "channels last"),
        (HALF, 33, 16, 1, False, (0, 1), False, "slice of frames"),
        (torch.float32, 3, 3, 3, False, (1, 1), False, "plain"),
    ],
)
def test_norm_silu_conv3d(
    dtype: torch.dtype, C: int, N: int, T: int, behind: bool, edges: tuple[int, int], added: bool, layout: str
) -> None:
    """Also far from 1, and (in fp32; eager gives NaN in fp16) of a pixel of zeros."""
    x = laid_out(random(1, C, T, 4, 3, dtype=dtype) * 50, layout).clone(memory_format=torch.preserve_format)
    x[:, :, :, 1, 1] *= dtype != torch.float32
    past = random(1, C, 2, 4, 3, dtype=dtype, seed=1) if behind else None
    gamma, bias = random(C, 1, 1, 1, dtype=dtype, seed=2), random(N, dtype=dtype, seed=3)
    weight = random(N, C, 3, 3, 3, dtype=dtype, seed=4) / C**0.5
    residual = random(1, N, T, 4 - sum(edges), 3, dtype=dtype, seed=5) if added else None
    exact = exact_conv(exact_norm(x, gamma), 2 if past is None else past, weight, bias, (1, 1), edges)
    exact += 0 if residual is None else residual.double()
    made = taken("vae_norm_silu_conv3d", x, past, gamma, weight, bias, residual, edges)
    check(made["triton"], made["reference"], exact)


@pytest.mark.interpret
def test_a_residual_is_added_to_where_it_lies() -> None:
    x, gamma, weight, bias = random(1, 4, 1, 3, 3), torch.ones(4, 1, 1, 1), random(4, 4, 3, 3, 3), random(4)
    kept = random(1, 4, 1, 3, 3, seed=1)
    residual = kept.clone(memory_format=LAST)
    wanted, _ = vae.norm_silu_conv3d(x, None, gamma, weight, bias, kept.clone())
    made, _ = vae_gpu.norm_silu_conv3d(x, None, gamma, weight, bias, residual)
    assert made is residual and error(made, wanted.double()) < 1e-6
    again, _ = vae_gpu.norm_silu_conv3d(x, None, gamma, weight, bias, kept)
    assert torch.equal(again, made), "one in another order is copied"


@pytest.mark.interpret
def test_chunks_are_the_whole() -> None:
    """The past is what the call before has left: of a normed convolution, and of one that is not."""
    x, gamma, bias = random(1, 5, 4, 3, 4), random(5, 1, 1, 1, seed=1), random(6, seed=2)
    weight = random(6, 5, 3, 3, 3, seed=3)
    runs: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
        "normed": lambda x, past: vae_gpu.norm_silu_conv3d(x, past, gamma, weight, bias),
        "plain": lambda x, past: vae_gpu.causal_conv3d(x, past, weight, bias, (1, 1)),
        "doubled": lambda x, past: vae_gpu.double_frames(x, past, weight[..., 1:2, 1:2], bias),
    }
    for name, run in runs.items():
        whole, last = run(x, None)
        past, parts = None, []
        for part in x.split([1, 2, 1], dim=2):
            made, past = run(part, past)
            parts.append(made)
        assert torch.equal(torch.cat(parts, 2), whole) and torch.equal(past, last), name


@pytest.mark.interpret
def test_the_past_kept_is_that_of_the_reference() -> None:
    gamma, weight, bias = random(5, 1, 1, 1, seed=1), random(4, 5, 3, 3, 3, seed=2), random(4)
    line = weight[..., :1, :1]
    for T in (1, 2, 3):
        for past in (None, random(1, 5, 2, 2, 3, seed=3)):
            x = random(1, 5, T, 2, 3, seed=4)
            wanted = vae.causal_conv3d(x, past, line, bias, (0, 0))[1]
            assert torch.equal(vae_gpu.causal_conv3d(x, past, line, bias, (0, 0))[1], wanted)
            if T < 3:
                wanted = vae.norm_silu_conv3d(x, past, gamma, weight, bias)[1]
                torch.testing.assert_close(vae_gpu.norm_silu_conv3d(x, past, gamma, weight, bias)[1], wanted)


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("edges", [(0, 0), (1, 0), (1, 1)])
def test_upsample_conv2d(dtype: torch.dtype, edges: tuple[int, int]) -> None:
    x, bias = laid_out(random(2, 5, 2, 3, 5, dtype=dtype), "slice of frames"), random(7, dtype=dtype, seed=1)
    weight = random(7, 5, 3, 3, dtype=dtype, seed=2) / 4
    made = taken("vae_upsample_conv2d", x, weight, bias, edges)
    check(made["triton"], made["reference"], exact_upsample(x, weight, bias, edges))


@pytest.mark.interpret
@pytest.mark.parametrize(("H", "W", "bottom"), [(4, 6, 0), (5, 4, 1), (5, 5, 0), (2, 2, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_downsample_conv2d(H: int, W: int, bottom: int, dtype: torch.dtype) -> None:
    x, bias = random(1, 5, 2, H, W, dtype=dtype), random(17, dtype=dtype, seed=1)
    weight = random(17, 5, 3, 3, dtype=dtype, seed=2) / 4
    made = taken("vae_downsample_conv2d", x, weight, bias, bottom)
    check(made["triton"], made["reference"], exact_downsample(x, weight, bias, bottom))


@pytest.mark.interpret
@pytest.mark.parametrize("behind", [True, False])
@pytest.mark.parametrize(("dtype", "C", "T"), [(torch.float32, 3, 2), (HALF, 17, 3), (HALF, 16, 1)])
def test_double_frames(dtype: torch.dtype, C: int, T: int, behind: bool) -> None:
    x, past = random(2, C, T, 3, 2, dtype=dtype), random(2, C, 2, 3, 2, dtype=dtype, seed=1) if behind else None
    weight, bias = random(2 * C, C, 3, 1, 1, dtype=dtype, seed=2) / 4, random(2 * C, dtype=dtype, seed=3)
    made = taken("vae_double_frames", x, past, weight, bias)
    check(made["triton"], made["reference"], exact_double(x, past, weight, bias))


@pytest.mark.interpret
@pytest.mark.parametrize(("T", "behind"), [(3, False), (5, False), (4, False), (2, True), (4, True), (5, True)])
def test_halve_frames(T: int, behind: bool) -> None:
    x, past = random(1, 5, T, 3, 2), random(1, 5, 1, 3, 2, seed=1) if behind else None
    weight, bias = random(6, 5, 3, 1, 1, seed=2), random(6, seed=3)
    made = taken("vae_halve_frames", x, past, weight, bias)
    check(made["triton"], made["reference"], exact_conv(x, past, weight, bias, stride=(2, 1, 1)))


@pytest.mark.interpret
@pytest.mark.parametrize(("kernel", "pad", "stride_t"), [((1, 1, 1), (0, 0), 1), ((3, 3, 3), (1, 0), 2)])
def test_conv3d(kernel: tuple[int, int, int], pad: tuple[int, int], stride_t: int) -> None:
    x, weight, bias = random(1, 5, 5, 3, 4), random(6, 5, *kernel, seed=1), random(6, seed=2)
    made = taken("vae_conv3d", x, weight, bias, pad, stride_t)
    check(made["triton"], made["reference"], exact_conv(x, None, weight, bias, pad, stride=(stride_t, 1, 1)))


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_bytes_are_those_of_to_rgb(dtype: torch.dtype) -> None:
    """Of values inside, beyond both ends, halfway between two bytes, and NaN."""
    x, past = random(2, 5, 2, 5, 4, dtype=dtype), random(2, 5, 2, 5, 4, dtype=dtype, seed=1)
    gamma, weight = random(5, 1, 1, 1, dtype=dtype, seed=2), random(3, 5, 3, 3, 3, dtype=dtype, seed=3) / 6
    bias = torch.tensor([0.0, 0.1, -0.2], dtype=dtype)
    x[0, :, 1, 2, 2] = NAN
    given = (x, past, gamma, weight, bias)
    frames, kept = vae_gpu.norm_silu_conv3d(*given, None, (1, 0))
    assert 0.02 < (frames.abs() > 1).float().mean() < 0.6 and bool(frames.isnan().any())
    made, also = vae_gpu.norm_silu_conv3d_rgb(*given, (1, 0))
    wanted = torch.stack([rgb.reference(one.clamp(-1, 1)) for one in frames])
    assert torch.equal(made.permute(0, 2, 3, 4, 1), wanted)
    torch.testing.assert_close(also, kept, rtol=0, atol=0, equal_nan=True)
    # A convolution of nothing but its bias gives ties.
    ties = ((torch.arange(256) + 0.5) / 127.5 - 1).to(dtype)
    for start in (0, 85, 170):
        level = ties[start : start + 3]
        made, _ = vae_gpu.norm_silu_conv3d_rgb(x[:1, :, :1], None, gamma, torch.zeros_like(weight), level)
        assert torch.equal(made[0, :, 0, 3, 3], rgb.reference(level.view(3, 1, 1, 1)).view(3))


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("C", [1, 3, 16, 48, 100])
def test_rms_norm(C: int, dtype: torch.dtype) -> None:
    x, gamma = random(2, C, 2, 3, 5, dtype=dtype) * 30, random(C, 1, 1, 1, dtype=dtype, seed=1)
    made = taken("vae_rms_norm", x, gamma)
    check(made["triton"], made["reference"], exact_norm(x, gamma, silu=False))
    assert not vae_gpu.rms_norm(torch.zeros_like(x), gamma).any()
    flat = laid_out(x, "channels last")[:, :, 1]
    made = vae_gpu.rms_norm(flat, gamma[..., 0])
    check(made, vae.rms_norm(flat, gamma[..., 0]), exact_norm(x, gamma, silu=False)[:, :, 1])


@pytest.mark.interpret
def test_statistics_are_written_where_they_belong() -> None:
    from fastvid.kernels.vae_norm import norm

    x, gamma = laid_out(random(2, 5, 3, 3, 5), "slice of frames"), random(5, seed=1)
    scale, (out, room) = torch.full((2, 3, 3, 5), NAN), poisoned((2, 5, 2, 3, 5), torch.float32)
    norm(x, gamma, scale, out, True, block=4)
    stayed(out, room)
    exact = 5**0.5 / x.double().norm(dim=1)
    assert error(scale, exact) < 1e-6 and error(out, exact_norm(x, gamma)[:, :, 1:]) < 1e-6


@pytest.mark.interpret
@pytest.mark.parametrize("which", ["x", "past", "out", "scale"])
def test_64_bit_offsets(which: str) -> None:
    """Channels, frames or pixels 2^31 elements apart or more; what lies between them is never touched."""
    from fastvid.kernels.vae_conv import Form, conv
    from fastvid.kernels.vae_norm import norm

    far, size = 2**30 + 8, (1, 3, 2, 1, 3)
    x, past, bias = random(*size, dtype=HALF), random(*size, dtype=HALF, seed=1), random(4, dtype=HALF)
    weight = random(4, 3, 3, 1, 1, dtype=HALF, seed=2).contiguous(memory_format=LAST)
    exact, eager = exact_conv(x, past, weight, bias), vae.causal_conv3d(x, past, weight, bias, (0, 0))[0]
    if which == "scale":
        x = apart((1, 3, 1, 1, 3), (1, 1, 1, 1, far)).copy_(x[:, :, :1])
        scale, out = torch.full((1, 1, 1, 3), NAN), apart((1, 3, 1, 1, 3), (1, 1, 1, 1, far)).fill_(NAN)
        norm(x, bias[:3].clone(), scale, out, True)
        assert error(scale, 3**0.5 / x.double().norm(dim=1)) < 1e-6
        assert error(out, exact_norm(x, bias[:3])) < 1e-3
        return
    x = apart(size, (1, far, 64, 8, 1)).copy_(x) if which == "x" else x
    past = apart(size, (1, 1, 4, 4, far)).copy_(past) if which == "past" else past
    out = torch.full((1, 4, 2, 1, 3), NAN, dtype=HALF).contiguous(memory_format=LAST)
    out = apart(tuple(out.shape), (1, 1, 4, 4, far)).fill_(NAN) if which == "out" else out
    conv(x, past, None, None, weight, bias, out, 2, Form())
    check(out, eager, exact)


# What is refused


@pytest.mark.parametrize("op", FORMS)
def test_what_does_not_fit_is_refused(op: str) -> None:
    """Before anything is launched, so that Triton is not needed."""
    run = vae_gpu.BACKENDS[op]["triton"]
    x, past, gamma = random(1, 4, 3, 4, 4), random(1, 4, 2, 4, 4), torch.ones(4, 1, 1, 1)
    weight, bias = random(4, 4, 3, 3, 3), random(4)
    flat, rgb_weight, line = weight[:, :, 0], random(3, 4, 3, 3, 3), weight[..., 1:2, 1:2]
    fine: dict[str, tuple[Any, ...]] = {
        "vae_rms_norm": (x, gamma),
        "vae_conv3d": (x, weight, bias),
        "vae_causal_conv3d": (x, past, weight, bias, (1, 1), (0, 0)),
        "vae_norm_silu_conv3d": (x, past, gamma, weight, bias, None, (0, 0)),
        "vae_norm_silu_conv3d_rgb": (x, past, gamma, rgb_weight, bias[:3], (0, 0)),
        "vae_upsample_conv2d": (x, flat, bias, (0, 0)),
        "vae_downsample_conv2d": (x, flat, bias, 0),
        "vae_double_frames": (x, past, line, bias),
        "vae_halve_frames": (x, past[:, :, :1], line, bias),
    }
    bad: dict[str, list[tuple[int, Any]]] = {
        "vae_rms_norm": [(0, x[0]), (0, x.double()), (1, gamma[1:])],
        "vae_conv3d": [(0, x[:, 1:]), (0, x[:, :, :2]), (1, weight.half()), (2, bias[1:])],
        "vae_causal_conv3d": [(1, past[:, :, :1]), (1, past.half()), (4, (0, 1)), (5, (2, 0)), (5, (1,))],
        "vae_norm_silu_conv3d": [(2, gamma[1:]), (3, line), (5, x[:, 1:]), (5, x.half()), (6, (0, -1))],
        "vae_norm_silu_conv3d_rgb": [(3, weight[:2]), (1, past[..., 1:]), (4, bias)],
        "vae_upsample_conv2d": [(1, flat[..., :1]), (0, x[:, :, 0]), (3, (1, 2))],
        "vae_downsample_conv2d": [(1, flat[..., :2]), (2, bias.half()), (3, 2)],
        "vae_double_frames": [(2, weight), (1, past[:, :, :1]), (2, line[:, 1:])],
        "vae_halve_frames": [(1, past), (0, x[:, :, :1]), (2, weight)],
    }
    for at, wrong in bad[op]:
        given = (*fine[op][:at], wrong, *fine[op][at + 1 :])
        with pytest.raises(ValueError, match=rf"{op} (takes|makes)"):
            run(*given)


@pytest.mark.interpret
def test_what_the_kernels_do_not_take() -> None:
    from fastvid.kernels.vae_conv import Form, conv
    from fastvid.kernels.vae_norm import norm

    x, weight, bias = random(1, 4, 2, 3, 3), random(6, 4, 3, 1, 1).contiguous(memory_format=LAST), random(6)
    out = torch.empty(1, 6, 2, 3, 3).contiguous(memory_format=LAST)
    scale = torch.empty(1, 2, 3, 3)
    for change, message in (
        ({"x": x.double()}, "fp32, fp16 or bf16"),
        ({"weight": random(6, 4, 3, 3, 1)}, "in the order"),
        ({"bias": random(12)[::2]}, "must be contiguous"),
        ({"out": torch.empty(1, 6, 2, 3, 3)}, "must be contiguous"),
    ):
        given = dict(x=x, past=None, scale=None, gamma=None, weight=weight, bias=bias, out=out, history=2, form=Form())
        with pytest.raises(ValueError, match=message):
            conv(**given | change)
    for change, message in (
        ({"x": x.double()}, "fp32, fp16 or bf16"),
        ({"gamma": random(8)[::2]}, "a contiguous gamma"),
    ):
        with pytest.raises(ValueError, match=message):
            norm(**dict(x=x, gamma=bias[:4], scale=scale, out=None, silu=True) | change)


@pytest.mark.interpret
def test_nothing_gives_nothing() -> None:
    x, weight, bias = random(1, 4, 2, 0, 3), random(6, 4, 3, 3, 3), random(6)
    assert vae_gpu.causal_conv3d(x, None, weight, bias, (1, 1))[0].shape == (1, 6, 2, 0, 3)
    assert vae_gpu.norm_silu_conv3d(x, None, bias[:4], weight, bias)[1].shape == (1, 4, 2, 0, 3)


@pytest.mark.interpret
def test_operators_of_torch() -> None:
    x, weight, bias = random(1, 4, 2, 3, 3), random(6, 4, 3, 1, 1).contiguous(memory_format=LAST), random(6)
    out, scale = torch.zeros(1, 6, 2, 3, 3).contiguous(memory_format=LAST), torch.zeros(1, 2, 3, 3)
    how = (2, (0, 0), 0, 1, 1, False, False, False)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(vae_kernels.conv_triton, (x, None, None, None, weight, bias, out, *how), test_utils=tests)
    kept = torch.zeros(1, 4, 2, 3, 3).contiguous(memory_format=LAST)
    torch.library.opcheck(vae_kernels.norm_triton, (x, bias[:4].clone(), scale, kept, True), test_utils=tests)


# Whole networks

KERNELS = SimpleNamespace(**{op: of["triton"] for op, of in vae_gpu.BACKENDS.items()}, to_rgb=rgb.reference)
SMALL = {"base_dim": 4, "z_dim": 3, "num_res_blocks": 0, "dim_mult": (1, 1), "temperal_downsample": (True,)}
STATS = {"latents_mean": (0.1, 0.2, 0.3), "latents_std": (0.5, 1.5, 1.0)}


def networks(kind: type[WanVAE], config: Any) -> tuple[WanVAE, WanVAE]:
    """The same on the reference and on the kernels."""
    torch.manual_seed(0)
    plain, fast = (kind(config, *ops).eval().requires_grad_(False) for ops in ((), (KERNELS,)))
    for parameter in plain.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    fast.load_state_dict(plain.state_dict())
    vae_gpu.channels_last(fast)
    assert all(p.is_contiguous(memory_format=LAST) for p in fast.parameters() if p.ndim == 5)
    return plain, fast


@pytest.mark.interpret
@pytest.mark.parametrize("verb", ["decode", "encode"])
def test_a_network_in_chunks_and_stripes(verb: str) -> None:
    """The first chunk whole, the second in stripes over the first one's cache: both are the reference's whole clip."""
    plain, fast = networks(WanVAE, WanVAEConfig(**SMALL, **STATS))
    x = random(1, 3, 2, 3, 2) if verb == "decode" else random(1, 3, 3, 6, 4).clamp(-1, 1)
    want, want_cache = getattr(plain, verb)(x)
    first, cache = getattr(fast, verb)(x[:, :, :1])
    places = [part.data_ptr() for part in cache]
    rest, cache = getattr(fast, verb)(x[:, :, 1:], cache, stripes=2, reuse=True)
    assert [part.data_ptr() for part in cache] == places
    assert error(torch.cat((first, rest), 2), want.double()) < 1e-5
    assert all(error(a, b.double()) < 1e-5 for a, b in zip(cache, want_cache, strict=True))
    assert all(part.stride(1) == 1 for part in cache[1:]), "channels-last, but for what came from outside"


@pytest.mark.interpret
def test_attentions_products_are_of_the_kernels() -> None:
    """Norm and both 1x1 convolutions around attention are operations; nothing of them is left to torch's."""
    torch.manual_seed(0)
    plain, called = SpatialAttention(13, reference).requires_grad_(False), []
    wrapped = {
        op: lambda *given, op=op: called.append(op) or vars(KERNELS)[op](*given)
        for op in ("vae_rms_norm", "vae_conv3d")
    }
    fast = SpatialAttention(13, SimpleNamespace(**wrapped)).requires_grad_(False)
    for parameter in plain.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    fast.load_state_dict(plain.state_dict())
    x = random(2, 13, 3, 3, 5)
    made = fast(x, Stream(None))
    assert called == ["vae_rms_norm", "vae_conv3d", "vae_conv3d"]
    wanted = SpatialAttention(13, reference).double().requires_grad_(False)
    wanted.load_state_dict(plain.state_dict())
    true = wanted(x.double(), Stream(None))
    assert error(made, true) <= 2 * error(plain(x, Stream(None)), true)


@pytest.mark.interpret
def test_a_network_to_rgb() -> None:
    plain, fast = networks(WanVAE, WanVAEConfig(**SMALL, **STATS))
    latents = random(2, 3, 1, 2, 2)
    made, _ = fast.decode_rgb(latents)
    frames = plain.decode(latents)[0]
    wanted = torch.stack([rgb.reference(one) for one in frames])
    assert (frames.abs() < 1).float().mean() > 0.05 and made.shape == (2, 1, 4, 4, 3)
    assert int((made.int() - wanted.int()).abs().max()) <= 1 and bool((made == wanted).float().mean() > 0.9)


@pytest.mark.interpret
def test_the_other_network() -> None:
    sizes = {**SMALL, "decoder_base_dim": 4, "patch_size": 2}
    plain, fast = networks(WanVAE22, WanVAEConfig(**sizes, **STATS, is_residual=True))
    latents = random(1, 3, 1, 2, 1)
    want, made = plain.decode(latents)[0], fast.decode(latents)[0]
    assert error(made, want.double()) < 1e-5


@pytest.mark.parametrize("kind", [WanVAE, WanVAE22])
@pytest.mark.parametrize("stripes", [1, 3])
def test_rgb_of_the_reference_is_to_rgb_of_its_frames(kind: type[WanVAE], stripes: int) -> None:
    torch.manual_seed(0)
    residual = {"decoder_base_dim": 4, "patch_size": 2, "is_residual": True} if kind is WanVAE22 else {}
    config = WanVAEConfig(**SMALL, **STATS, **residual)
    network = kind(config).eval().requires_grad_(False)
    latents = random(2, 3, 3, 3, 2)
    frames, cache = network.decode(latents[:, :, :1])
    made, also = network.decode_rgb(latents[:, :, :1], stripes=stripes)
    more, _ = network.decode(latents[:, :, 1:], cache)
    rest, _ = network.decode_rgb(latents[:, :, 1:], also, stripes)
    wanted = torch.stack([rgb.reference(one) for one in torch.cat((frames, more), 2)])
    whole = torch.cat((made, rest), 1)
    assert whole.dtype == torch.uint8 and int((whole.int() - wanted.int()).abs().max()) <= (stripes > 1)


@pytest.mark.slow
@pytest.mark.interpret
def test_a_pipeline_hands_its_operations_to_the_vae() -> None:
    import fastvid

    backend = ",".join(f"{op}=triton" for op in FORMS)
    parts = fastvid.load("embedded", device="cpu", backend=backend)._model
    assert all(parts.ops.bound[op] == "triton" for op in FORMS)
    users = [module for module in parts.vae.modules() if hasattr(module, "ops")]
    assert len(users) > 30 and all(module.ops is parts.ops for module in users)
    weights = [weight for weight in parts.vae.parameters() if weight.ndim == 5]
    assert weights and all(weight.is_contiguous(memory_format=LAST) for weight in weights)


@pytest.mark.slow
def test_under_the_interpreter() -> None:
    run_interpreted(__file__)


# The choice of tiles


def test_tiles_fit_the_networks() -> None:
    pytest.importorskip("triton")
    from fastvid.kernels.vae_conv import choose

    for dtype in (torch.bfloat16, torch.float32):
        for arch in (80, 90, 100):
            for C in (96, 160, 192, 256, 320, 384, 512, 640, 1024):
                config = choose(arch, dtype, C, C, True)
                assert C % config.block_n == 0 and C % config.block_k == 0, (arch, C, config)
    assert (
        choose(90, torch.bfloat16, 96, 3, True).block_n == 32 and choose(90, torch.bfloat16, 3, 96, False).block_k == 16
    )


@pytest.mark.slow
def test_loads_from_two_places_stay_asynchronous() -> None:
    """Shared memory for tiles of x that are on their way: without any, a step waits for what it loads."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton interprets in this process")
    from fastvid.kernels.ahead import compile_ahead
    from fastvid.kernels.vae_conv import variants

    variant = next(one for one in variants() if one.name == "vae block 96 bf16 sm_90")
    tile = 2 * variant.constants["BLOCK_M"] * variant.constants["BLOCK_K"]
    assert "past_ptr" in variant.types and compile_ahead(variant, 90).shared >= 3 * tile


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("C", "N"), [(96, 96), (192, 384), (16, 384), (96, 3), (160, 160), (37, 51)])
@pytest.mark.parametrize("behind", [True, False])
def test_convolutions_on_a_gpu(dtype: torch.dtype, C: int, N: int, behind: bool) -> None:
    size, edges = (2, C, 3, 19, 33), (1, 1)
    x = random(*size, dtype=dtype, device="cuda").contiguous(memory_format=LAST)
    past = random(2, C, 2, 19, 33, dtype=dtype, seed=1, device="cuda") if behind else None
    weight = random(N, C, 3, 3, 3, dtype=dtype, seed=2, device="cuda") / (27 * C) ** 0.5
    gamma, bias = (random(n, dtype=dtype, seed=3, device="cuda") for n in (C, N))
    gamma, flat = gamma.view(-1, 1, 1, 1), weight[:, :, 1]
    before = 2 if past is None else past
    made = taken("vae_causal_conv3d", x, past, weight, bias, (1, 1), edges)
    check(made["triton"], made["reference"], exact_conv(x, before, weight, bias, (1, 1), edges))
    residual = random(2, N, 3, 17, 33, dtype=dtype, seed=4, device="cuda")
    made = taken("vae_norm_silu_conv3d", x, past, gamma, weight, bias, residual, edges)
    exact = exact_conv(exact_norm(x, gamma), before, weight, bias, (1, 1), edges) + residual.double()
    check(made["triton"], made["reference"], exact)
    made = taken("vae_upsample_conv2d", x, flat, bias, edges)
    check(made["triton"], made["reference"], exact_upsample(x, flat, bias, edges))
    made = taken("vae_downsample_conv2d", x, flat, bias, 1)
    check(made["triton"], made["reference"], exact_downsample(x, flat, bias, 1))
    if N % 2 == 0:
        made = taken("vae_double_frames", x, past, weight[..., 1:2, 1:2], bias)
        check(made["triton"], made["reference"], exact_double(x, past, weight[..., 1:2, 1:2], bias))
    if N == 3:
        frames, _ = vae_gpu.norm_silu_conv3d(x, past, gamma, weight, bias)
        wanted = torch.stack([rgb.reference(one) for one in frames])
        made, _ = vae_gpu.norm_silu_conv3d_rgb(x, past, gamma, weight, bias)
        assert torch.equal(made.permute(0, 2, 3, 4, 1), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("verb", ["decode", "encode"])
def test_a_network_on_a_gpu(verb: str, dtype: torch.dtype) -> None:
    config = WanVAEConfig(base_dim=32, z_dim=3, num_res_blocks=1, **STATS)
    exact, fast = (network.to("cuda") for network in networks(WanVAE, config))
    x = random(1, 3, 3, 5, 7) if verb == "decode" else random(1, 3, 9, 40, 56).clamp(-1, 1)
    want = getattr(exact.double(), verb)(x.double().cuda())[0]
    eager = getattr(exact.to(dtype), verb)(x.to("cuda", dtype))[0]
    made, cache, parts = None, None, x.split([1, 2] if verb == "decode" else [1, 8], dim=2)
    for part in parts:
        done, cache = getattr(fast.to(dtype), verb)(part.to("cuda", dtype), cache, stripes=2)
        made = done if made is None else torch.cat((made, done), 2)
    assert error(made, want) <= max(2 * error(eager, want), 1e-5)


@pytest.mark.gpu
def test_more_than_2_31_elements_on_a_gpu() -> None:
    x = torch.randn(1, 96, 12, 1088, 1920, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=LAST)
    weight, bias = torch.randn(3, 96, 3, 1, 1, device="cuda").bfloat16() / 17, torch.zeros(3, device="cuda").bfloat16()
    assert x.numel() > 2**31
    made, _ = vae_gpu.causal_conv3d(x, None, weight, bias, (0, 0))
    tail = x[:, :, -3:, -2:].float()
    torch.testing.assert_close(made[:, :, -1:, -2:].float(), F.conv3d(tail, weight.float()), rtol=2e-2, atol=2e-2)
