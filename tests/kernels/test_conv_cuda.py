"""csrc/'s convolutions and norm: on the CPU, the kernels' own code over interpreted TMA, mbarriers and wgmma, against
float64; what the compiler makes of them for sm_90a; on a GPU, the kernels. Operations are those of `ops/vae_gpu.py`,
with the same meanings as in test_vae_kernels.py, whose exact forms judge here too. Results lie in the middle of NaN.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import operator
import random as chance
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from compiled_host import CXX
from conv_host import NormPlan, conv_host, library, norm_host, norm_plan, words
from exact_vae import exact_conv, exact_double, exact_downsample, exact_norm, exact_upsample
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastvid.errors import BackendUnavailable
from fastvid.ops import vae, vae_gpu, vae_kernels
from fastvid.ops.dispatch import bind

pytestmark = pytest.mark.skipif(CXX is None, reason="no C++ compiler is found")
LAST = torch.channels_last_3d
HALF, BF16 = torch.float16, torch.bfloat16
ROUNDING = {HALF: 2.0**-10, BF16: 2.0**-7}
HOST = vae_kernels.Kernels(conv_host, norm_host, on_load=False)
CUDA = vae_kernels.CUDA
on_gpu = pytest.mark.gpu
WIDTHS = (96, 128)


def drawn(*shape: int, dtype: torch.dtype = HALF, device: str = "cpu") -> Tensor:
    """Fresh values, channels-last where there are frames."""
    made = torch.randn(shape).to(device, dtype)
    return made.contiguous(memory_format=LAST) if len(shape) == 5 else made


def check(made: Tensor, eager: Tensor, exact: Tensor) -> None:
    """At most twice as far from float64 as eager PyTorch is, or a rounding of the largest value."""
    assert made.shape == exact.shape and bool(made.isfinite().all())
    off, allowed = ((one.double() - exact).abs().max() for one in (made, eager))
    assert off <= max(2 * allowed, ROUNDING[made.dtype] * exact.abs().max()), f"{off:.2e} off, eager {allowed:.2e}"
    # The largest error says little of a few wrong pixels among large ones: all of it, too.
    assert (made.double() - exact).norm() <= 2 * ROUNDING[made.dtype] * exact.norm()


def run_all(
    kernels: vae_kernels.Kernels, C: int, N: int, T: int, H: int, W: int, dtype: torch.dtype, device: str
) -> None:
    """Every operation on one size: with a past and without one, with edges, with a residual."""
    draw = partial(drawn, dtype=dtype, device=device)
    x, past, gamma = draw(1, C, T, H, W), draw(1, C, 2, H, W), draw(C, 1, 1, 1)
    cube = (draw(N, C, 3, 3, 3) / (27 * C) ** 0.5).contiguous(memory_format=LAST)
    line, dot, square = cube[..., 1:2, 1:2] * 3, cube[:, :, :1, 1:2, 1:2] * 5, cube[:, :, 1] * 2
    bias, residual = draw(N), draw(1, N, T, H - 1, W)
    for before in (past, None):
        behind = 2 if before is None else before
        edges = (1, 0) if before is None else (0, 1)
        made, kept = vae_gpu.causal_conv3d(x, before, cube, bias, (1, 1), edges, kernels=kernels)
        eager, wanted = vae.causal_conv3d(x, before, cube, bias, (1, 1), edges)
        check(made, eager, exact_conv(x, behind, cube, bias, (1, 1), edges))
        assert torch.equal(kept, wanted)

        given = (x, before, gamma, cube, bias)
        normed = exact_norm(x, gamma).to(dtype)
        eager, wanted = vae.norm_silu_conv3d(*given, residual, edges)
        made, kept = vae_gpu.norm_silu_conv3d(*given, residual.clone(), edges, kernels=kernels)
        check(made, eager, exact_conv(normed, behind, cube, bias, (1, 1), edges) + residual.double())
        torch.testing.assert_close(kept, wanted, rtol=4 * ROUNDING[dtype], atol=4 * ROUNDING[dtype])
        assert kept.untyped_storage().nbytes() == 2 * C * H * W * dtype.itemsize

        made, kept = vae_gpu.double_frames(x, before, line, bias, kernels=kernels)
        eager, wanted = vae.double_frames(x, before, line, bias)
        check(made, eager, exact_double(x, before, line, bias))
        assert torch.equal(kept, wanted)
    check(vae_gpu.conv3d(x, dot, bias, kernels=kernels), vae.conv3d(x, dot, bias), exact_conv(x, None, dot, bias))
    made = vae_gpu.upsample_conv2d(x, square, bias, (0, 1), kernels=kernels)
    check(made, vae.upsample_conv2d(x, square, bias, (0, 1)), exact_upsample(x, square, bias, (0, 1)))
    made = vae_gpu.downsample_conv2d(x, square, bias, 1, kernels=kernels)
    check(made, vae.downsample_conv2d(x, square, bias, 1), exact_downsample(x, square, bias, 1))
    if T >= 2:
        made = vae_gpu.halve_frames(x, past[:, :, 1:], line, bias, kernels=kernels)
        whole = torch.cat((past[:, :, 1:], x), 2)
        check(
            made, vae.halve_frames(x, past[:, :, 1:], line, bias), exact_conv(whole, None, line, bias, stride=(2, 1, 1))
        )
    made = vae_gpu.rms_norm(x, gamma, kernels=kernels)
    check(made, vae.rms_norm(x, gamma), exact_norm(x, gamma, False))


@pytest.mark.slow
@settings(max_examples=4, deadline=None)
@given(
    C=st.sampled_from((8, 24, 64, 72, 96)),
    N=st.sampled_from((16, 96, 112, 208)),
    T=st.integers(1, 3),
    H=st.integers(3, 11),
    W=st.integers(3, 19),
    dtype=st.sampled_from((HALF, BF16)),
)
def test_all_operations(C: int, N: int, T: int, H: int, W: int, dtype: torch.dtype) -> None:
    run_all(HOST, C, N, T, H, W, dtype, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("behind", [True, False])
def test_every_width_and_strides(width: int, behind: bool) -> None:
    """Two batches, tails in every direction; x and past parts of larger tensors, out within NaN, which stays."""
    C, N, (T, H, W) = 88, width + 24, (2, 9, 18)  # of the last 24 channels 8 are half of a sixteen
    x = drawn(2, C + 8, T + 2, H + 1, W + 2)[:, 8:, 1:-1, 1:, :-2]
    past = drawn(2, C, 4, H, W + 1)[:, :, 1:3, :, 1:] if behind else None
    weight, bias = drawn(N, C, 3, 3, 3) / 50, drawn(N)
    room = torch.full((2, T + 2, H + 2, W + 2, N + 16), float("nan"), dtype=HALF)
    out = room[:, 1:-1, 1:-1, 1:-1, 8 : N + 8].permute(0, 4, 1, 2, 3)
    how = (2, (1, 1), 0, 1, 1, False, False, False)
    conv_host(x, past, None, None, weight.contiguous(memory_format=LAST), bias, out, *how, width=width)
    exact = exact_conv(x, past if behind else 2, weight, bias, (1, 1))
    check(out, vae.causal_conv3d(x, past, weight, bias, (1, 1))[0], exact)
    assert int(room.isfinite().sum()) == out.numel()


def host_call(**changed: Any) -> ctypes.Array:
    given = {
        "x": (1, 64, 3, 50, 70), "x_strides": (0, 0, 0, 0), "past_strides": (0, 0, 0, 0), "out": (1, 96, 3, 50, 70),
        "out_strides": (3 * 50 * 70 * 96, 50 * 70 * 96, 70 * 96, 96), "kernel": (3, 3, 3), "history": 2, "past": 1,
        "pad": (1, 1), "top": 0, "stride": 1, "stride_t": 1, "doubled": 0, "interleaved": 0, "add": 0,
    }  # fmt: skip
    return words(given | changed)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["added to", "doubled", "interleaved"])
@pytest.mark.parametrize("size", [(3, 5, 6), (2, 33, 17), (1, 2, 70)])
def test_what_becomes_of_tiles(form: str, size: tuple[int, int, int]) -> None:
    """Results within NaN, which stays: tiles and panels that reach beyond the border, halves that share a panel."""
    C, N, (T, H, W) = 24, 104, size
    down, later = 1 + (form == "doubled"), 1 + (form == "interleaved")
    x, taps = drawn(1, C, T, H, W), {"added to": (3, 3, 3), "doubled": (1, 2, 2), "interleaved": (3, 1, 1)}[form]
    weight, bias = drawn(N * down**2 * later, C, *taps).contiguous(memory_format=LAST) / 9, drawn(N * later)
    room = torch.full((1, later * T + 1, down * H + 1, down * W + 2, N + 16), float("nan"), dtype=HALF)
    out = room[:, 1:, :-1, 1:-1, 8 : N + 8].permute(0, 4, 1, 2, 3)
    before = drawn(*out.shape)
    if form == "added to":
        out.copy_(before)
    history, pad = taps[0] - 1, (taps[1] // 2,) * 2
    how = (history, pad, 0, 1, 1, form == "doubled", form == "interleaved", form == "added to")
    conv_host(x, None, None, None, weight, bias, out, *how)
    assert int(room.isfinite().sum()) == out.numel()
    if form == "added to":
        exact = exact_conv(x, 2, weight, bias, (1, 1)) + before.double()
    elif form == "interleaved":
        exact = exact_double(x, None, weight, bias)
    else:
        places = [exact_conv(shifted(x, i), None, w, bias, (0, 0)) for i, w in enumerate(weight.split(N))]
        exact = torch.empty(out.shape, dtype=torch.double)
        for i, place in enumerate(places):
            exact[..., i // 2 :: 2, i % 2 :: 2] = place
    check(out, exact.to(HALF), exact)


def shifted(x: Tensor, place: int) -> Tensor:
    """What a kernel of 2x2 sees of x in one of the four places of a doubled pixel."""
    top, left = 1 - place // 2, 1 - place % 2
    return torch.nn.functional.pad(x, (left, 1 - left, top, 1 - top))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["plain", "doubled", "interleaved"])
def test_every_value_is_stored_once(form: str) -> None:
    """All panels of all tiles, by the maps of out: each value of the result once, and no other."""
    B, N, T, H, W = 2, 104, 4, 18, 22
    strides = (T * H * W * N, H * W * N, W * N, N)
    call = host_call(
        x=(B, 64, T, H, W), out=(B, N, T, H, W), out_strides=strides, **({} if form == "plain" else {form: 1})
    )
    lib, tile, told, shape = library(), (ctypes.c_int * 6)(), (ctypes.c_int64 * 10)(), (ctypes.c_int * 6)()
    lib.conv_shape(call, shape)
    halves = 1 + (form == "interleaved")
    seen = []
    for number in range(lib.conv_tiles(call, 96)):
        lib.conv_tile(call, 96, ctypes.c_int64(number), tile)
        n, place, w, h, t, b = tile
        for which in range(halves):
            lib.conv_out(call, which if halves == 2 else place, told)
            extents, bytes_apart = told[1:6], told[6:10]
            sides = (96, shape[0], 256 // shape[0], 1, 1)
            places = [
                torch.tensor(range(max(0, at), min(at + side, extent)), dtype=torch.int64)
                for at, side, extent in zip((n - which * N, w, h, t, b), sides, extents, strict=True)
            ]
            offsets = torch.tensor([told[0]])
            for at, apart in zip(places, (2, *bytes_apart), strict=True):
                offsets = (offsets[:, None] + at * (apart // 2)).flatten()
            seen.append(offsets)
    assert torch.equal(torch.cat(seen).sort().values, torch.arange(B * N * T * H * W))


def test_offsets_have_64_bits() -> None:
    """A minute at 1080p: the map's strides, and the last tile."""
    T, H, W, N = 1440, 1080, 1920, 96
    call = host_call(out=(1, N, T, H, W), out_strides=(T * H * W * N, H * W * N, W * N, N), x=(1, 64, T, H, W))
    lib, tile, told = library(), (ctypes.c_int * 6)(), (ctypes.c_int64 * 10)()
    lib.conv_out(call, 0, told)
    assert list(told) == [0, N, W, H, T, 1, 2 * N, 2 * N * W, 2 * N * W * H, 2 * N * W * H * T]
    last = lib.conv_tiles(call, 96) - 1
    lib.conv_tile(call, 96, ctypes.c_int64(last), tile)
    assert list(tile)[4:] == [T - 1, 0] and 0 <= W - tile[2] <= 64 and 0 <= H - tile[3] <= 32
    lib.conv_out(host_call(out=(1, N, T, H, W), out_strides=tuple(told[6:10])[::-1], doubled=1), 3, told)
    assert told[0] == 2 * N * W + 2 * N and list(told)[1:4] == [N, W // 2, H // 2]


def test_tiles_boxes_and_shared_memory() -> None:
    lib, shape = library(), (ctypes.c_int * 6)()
    for N in (96, 192, 384, 128, 256, 512, 1024):
        assert N % lib.conv_width(N) == 0  # what the Wan decoders have leaves nothing over
    sizes = [(480, 832), (90, 160), (1, 1), (1080, 1920), *[(chance.randint(1, 300),) * 2 for _ in range(20)]]
    for height, width in sizes:
        w = lib.conv_tile_w(height, width)
        made = {one: -(-width // one) * -(-height // (256 // one)) for one in (8, 16, 32, 64)}
        assert made[w] == min(made.values())
        for kernel, stride in itertools.product(((3, 3, 3), (1, 1, 1), (3, 1, 1), (1, 2, 2), (1, 9, 9)), (1, 2)):
            call = host_call(out=(1, 96, 3, height, width), kernel=kernel, stride=stride)
            lib.conv_shape(call, shape)
            w, span_h, span_w, box_h, box_w, stages = shape
            rows = (256 // w + kernel[1] - 1) * (w + kernel[2] - 1)
            spans = kernel[1:] if stride == 1 and rows <= 512 else (1, 1)  # so that two boxes fit
            assert (span_h, span_w) == spans and (kernel[1:] != (3, 3) or stride == 2 or spans == (3, 3))
            assert (box_h, box_w) == (256 // w + spans[0] - 1, w + spans[1] - 1)
            assert 2 <= stages <= 4 and stages * -(-box_h * box_w // 8) * 1024 <= 128 * 1024
            assert stride * max(box_h, box_w) <= 256  # elements of a side that TMA takes
    assert all(lib.conv_weight_stages(width) * width * 128 <= 96 * 1024 for width in WIDTHS)
    assert lib.conv_smem() <= 227 * 1024


def test_swizzle_and_descriptor() -> None:
    """The swizzle is a permutation of each 1,024 bytes in which 8 rows of a column lie in 8 different sixteens."""
    lib = library()
    for base in (0, 1024 * chance.randint(1, 200)):
        places = [lib.conv_swizzled(base + i) for i in range(1024)]
        assert sorted(places) == list(range(base, base + 1024))
        for chunk in range(8):
            assert len({places[row * 128 + chunk * 16] % 128 for row in range(8)}) == 8
    address = 16 * chance.randint(0, 2**14 - 1)
    told = lib.conv_descriptor(address)
    assert (told & 0x3FFF) * 16 == address and (told >> 32 & 0x3FFF) * 16 == 1024 and told >> 62 == 1


def test_norm_of_every_width() -> None:
    for C, dtype in itertools.product((8, 16, 40, 96, 128, 192, 264, 1024, 1032, 2200), (HALF, BF16)):
        x, gamma = drawn(2, C, 2, 3, 5, dtype=dtype) * 30, drawn(C, dtype=dtype)
        x[:, :, 0, 1, 1] = 0
        out = torch.full_like(x, float("nan"))
        off = chance.uniform(-1, 1)
        norm_host(x, gamma, out, True, off)
        exact = exact_norm(x, gamma.view(-1, 1, 1, 1))
        eager = torch.nn.functional.silu(vae.rms_norm(x, gamma.view(-1, 1, 1, 1)))
        check(out, eager.nan_to_num(), exact)  # eager gives NaN of a pixel of zeros in fp16


def views(C: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs of x and out whose pixels lie in all manners; out within NaN."""
    whole, room = drawn(2, C + 8, 4, 6, 7), torch.full((2, 4, 6, 7, C + 16), float("nan"), dtype=HALF)
    room = room.permute(0, 4, 1, 2, 3)[:, 8:-8]
    return {
        "one block": (whole[:, :C].contiguous(memory_format=LAST), torch.empty_like(whole[:, :C], memory_format=LAST)),
        "part of channels": (whole[:, 8:], room),
        "part of a row": (whole[:, :-8, :, :, 1:-1], room[..., 2:]),
        "part of a frame": (whole[:, 8:, :, 1:-1], room[:, :, :, 2:]),
        "some frames": (whole[:, 8:, 1:3], room[:, :, ::2]),
        "every second pixel": (whole[:, 8:, ::2, ::3, ::2], room[:, :, 1:3, :2, 1:5]),
        "one frame for all": (whole[:1, 8:, :1].expand(2, -1, 4, -1, -1), room),
        "a pixel": (whole[:1, 8:, :1, 2:3, 3:4], room[:1, :, :1, :1, :1]),
    }


@pytest.mark.parametrize("kind", views(8))
def test_norm_of_views(kind: str) -> None:
    x, out = views(96)[kind]
    gamma, before = drawn(96), out.clone()
    storage = torch.empty(0, dtype=HALF).set_(out.untyped_storage())
    storage.fill_(float("nan"))
    norm_host(x, gamma, out, False)
    check(out, vae.rms_norm(x, gamma.view(-1, 1, 1, 1)), exact_norm(x, gamma.view(-1, 1, 1, 1), False))
    assert before.shape == out.shape and int(storage.isfinite().sum()) == out.numel()
    plan, (B, _, T, H, W) = norm_plan(x, out), x.shape
    assert plan.flat == (kind in ("one block", "part of channels", "a pixel")) and plan.pixels == B * T * H * W
    assert (plan.log_lanes, plan.many, plan.wide) == (2, 3, 0)  # 12 vectors of 96 channels, 3 for each of 4 lanes


def test_norm_counts_in_as_many_bits_as_it_takes() -> None:
    """Against the strides' own sums: offsets beyond 2^32 from pixels below 2^31, and pixels beyond."""
    lib, told = library(), (ctypes.c_int64 * 2)()
    for size in ((3, 1440, 1080, 1920), (1, 21, 1080, 1920), (2, 5, 6, 7)):
        C, wide = 96, torch.Size(size).numel() >= 2**31
        B, T, H, W = size
        for gap in (0, 8):  # behind each row
            x = (T * H * (W * C + gap), H * (W * C + gap), W * C + gap, C)
            out = tuple(3 * stride for stride in x)
            shape = (ctypes.c_int64 * 14)(*size, C, *x, *out, 1)
            plan = NormPlan()
            lib.norm_plan(shape, ctypes.byref(plan))
            assert plan.wide == wide and plan.flat == (gap == 0)
            for _ in range(50):
                b, t, h, w = place = [chance.randrange(extent) for extent in size]
                pixel = ((b * T + t) * H + h) * W + w
                for bits in (1,) if wide else (0, 1):
                    lib.norm_offsets(shape, ctypes.c_int64(pixel), bits, told)
                    assert list(told) == [sum(map(operator.mul, place, strides)) for strides in (x, out)]
    for C, expected in (
        (8, (0, 3)),
        (32, (0, 4)),
        (96, (2, 3)),
        (192, (3, 3)),
        (256, (3, 4)),
        (384, (4, 3)),
        (1024, (5, 4)),
    ):
        x = drawn(1, C, 1, 2, 2)
        plan = norm_plan(x, x)
        assert (plan.log_lanes, plan.many) == expected and not plan.wide
    assert norm_plan(drawn(1, 1032, 1, 2, 2), drawn(1, 1032, 1, 2, 2)).wide


@pytest.mark.parametrize("off", [-1, 0, 1])
def test_silu_of_the_special_function_unit(off: float) -> None:
    """At most (|y| + 4) 2^-23 off float64, whatever errors of its parts the manual allows; tiny values may be zeros."""
    values = torch.cat((torch.linspace(-100, 100, 4001), torch.randn(2000) * 3, torch.randn(500).mul(20).exp()))
    values = torch.cat((values, -values[-500:], torch.tensor([0.0, -0.0, 65504.0, -65504.0, 3e38, -3e38])))
    silu = library().norm_silu
    made = torch.tensor([silu(y, off) for y in values.tolist()]).double()
    y = values.double()
    exact = y * torch.sigmoid(y)
    assert ((made - exact).abs() <= (y.abs() + 4) * 2.0**-23 * exact.abs() + 1e-35).all()
    assert silu(float("inf"), off) == float("inf") and math.isnan(silu(float("nan"), off))


@pytest.mark.parametrize(
    ("C", "N", "layout", "message"),
    [
        (12, 96, None, r"C is 12; .* multiple of 8 \(nearest: 16\)"),
        (16, 3, None, r"result are 3; .*\(nearest: 8\)"),
        (16, 96, "planar", "channels-last copy"),
        (16, 96, "expanded", "positive multiples of 8"),
        (16, 96, "not aligned", "16 bytes"),
        (16, 96, "out not aligned", "out has strides"),
    ],
)
def test_what_is_refused(C: int, N: int, layout: str | None, message: str) -> None:
    x = drawn(1, C, 2, 4, 5)
    if layout == "planar":
        x = torch.randn(1, C, 2, 4, 5).to(HALF)
    elif layout == "expanded":
        x = x[:, :, :1].expand(-1, -1, 2, -1, -1)
    elif layout == "not aligned":
        x = drawn(1, C + 8, 2, 4, 5)[:, 1 : C + 1]
    out = torch.empty(1, N, 2, 4, 5, dtype=HALF).contiguous(memory_format=LAST)
    if layout == "out not aligned":
        out = torch.empty(1, 2, 4, 5, N + 4, dtype=HALF)[..., :N].permute(0, 4, 1, 2, 3)
    weight, how = drawn(N, C, 3, 3, 3), (2, (1, 1), 0, 1, 1, False, False, False)
    with pytest.raises(ValueError, match=message):
        conv_host(x, None, None, None, weight, drawn(N), out, *how)


def test_sizes_that_do_not_fit() -> None:
    x, weight = drawn(1, 16, 2, 4, 5), drawn(96, 16, 3, 3, 3)
    for shape in [(1, 88, 2, 4, 5), (1, 96, 3, 4, 5), (2, 96, 2, 4, 5)]:
        out = torch.empty(shape, dtype=HALF).contiguous(memory_format=LAST)
        with pytest.raises(ValueError, match="do not fit"):
            vae_kernels.call_of(x, None, weight, out, 2, (1, 1), 0, 1, 1, False, False, False)


def test_channels_that_make_no_eights_are_padded() -> None:
    """As the first layer of an encoder has them; a plain layout is copied."""
    x, past = torch.randn(1, 3, 2, 5, 6).to(HALF), torch.randn(1, 3, 2, 5, 6).to(HALF)
    weight, bias = drawn(16, 3, 3, 3, 3) / 9, drawn(16)

    def padded(x: Tensor, past: Tensor, scale: None, gamma: None, weight: Tensor, *rest: Any) -> None:
        groups = map(vae_kernels.channel_groups, (x, past, weight))
        x, past, weight = groups
        assert x.shape[1] == past.shape[1] == weight.shape[1] == 8
        conv_host(x, past, None, None, weight, *rest)

    kernels = vae_kernels.Kernels(padded, norm_host, on_load=False)
    made, _ = vae_gpu.causal_conv3d(x, past, weight, bias, (1, 1), kernels=kernels)
    check(made, vae.causal_conv3d(x, past, weight, bias, (1, 1))[0], exact_conv(x, past, weight, bias, (1, 1)))


@pytest.mark.parametrize("first", [0, 4, 8])
def test_a_residual_is_overwritten_where_tma_can_store(first: int) -> None:
    x, past, gamma = drawn(1, 16, 1, 4, 5), drawn(1, 16, 2, 4, 5), drawn(16, 1, 1, 1)
    weight, bias, wide = drawn(16, 16, 3, 3, 3).contiguous(memory_format=LAST) / 20, drawn(16), drawn(1, 32, 1, 4, 5)
    residual = wide[:, first : first + 16]
    given, before = (x, past, gamma, weight, bias), residual.clone()
    made, _ = vae_gpu.norm_silu_conv3d(*given, residual, kernels=HOST)
    assert (made.data_ptr() == residual.data_ptr()) is (first % 8 == 0)
    eager, _ = vae.norm_silu_conv3d(*given, before)
    check(made, eager, exact_conv(exact_norm(x, gamma).to(HALF), past, weight, bias, (1, 1)) + before.double())


def test_asked_for_by_name_it_works_or_says_why_not() -> None:
    with pytest.raises(BackendUnavailable, match=r"CUDA device|not built"):
        bind("vae_causal_conv3d=cuda")
    with pytest.raises(BackendUnavailable, match="no cuda back end.*vae_norm_silu_conv3d_rgb"):
        bind("vae_norm_silu_conv3d_rgb=cuda")


def test_wrong_tensors_are_refused() -> None:
    x, weight, bias = drawn(1, 16, 2, 4, 5), drawn(96, 16, 3, 3, 3), drawn(96)
    function: Callable[..., Any] = vae_gpu.BACKENDS["vae_causal_conv3d"]["cuda"]
    with pytest.raises(ValueError, match="one CUDA device"):
        function(x, None, weight, bias, (1, 1))
    with pytest.raises(ValueError, match="float16 or bfloat16"):
        function(x.float(), None, weight.float(), bias.float(), (1, 1))


# On a GPU


@on_gpu
@pytest.mark.parametrize("dtype", [HALF, BF16])
@pytest.mark.parametrize("C", [8, 72, 96, 192, 384, 1024])
@pytest.mark.parametrize("N", [16, 96, 208, 256, 384])
def test_on_a_gpu(C: int, N: int, dtype: torch.dtype) -> None:
    run_all(CUDA, C, N, *(chance.randint(low, high) for low, high in ((1, 4), (3, 40), (3, 60))), dtype, "cuda")


@on_gpu
def test_a_thousand_runs_give_the_same_bits() -> None:
    x, past = drawn(1, 96, 4, 40, 52, device="cuda"), drawn(1, 96, 2, 40, 52, device="cuda")
    weight, bias, gamma = drawn(96, 96, 3, 3, 3, device="cuda") / 50, drawn(96, device="cuda"), drawn(96, device="cuda")
    function = vae_gpu.BACKENDS["vae_norm_silu_conv3d"]["cuda"]
    first, _ = function(x, past, gamma, weight, bias)
    assert all(torch.equal(first, function(x, past, gamma, weight, bias)[0]) for _ in range(1000))
