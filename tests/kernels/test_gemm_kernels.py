"""linear, linear_gelu_tanh, patch_embed and head: their meanings in float64 written a second time, then the kernels.

Kernels run in Triton's interpreter in a child process, with blocks so small that a few of them make a case, in fp32 and
fp16 (its bf16 is wrong); on a GPU, in every type and at the sizes of the models. What they give may be off from float64
by twice what eager PyTorch is off, with a floor of a rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import run_interpreted
from kernel_cases import NAN, apart, check, error, laid_out, random
from torch import Tensor

from fastvid.ops import reference, transformer

HALVES = (torch.float32, torch.float16)
DTYPES = (*HALVES, torch.bfloat16)
SIZES = st.sampled_from((1, 2, 13, 15, 16, 17, 31, 32, 33, 49))


def doubles(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if one is None else one.double() for one in tensors]


# Meanings, a second time


def exact_linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    x, weight, bias = doubles(x, weight, bias)
    y = torch.einsum("...k,nk->...n", x, weight) + (0 if bias is None else bias)
    return y / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))) if gelu else y


def exact_patch_embed(latents: Tensor, weight: Tensor, bias: Tensor | None, known: Tensor | None) -> Tensor:
    """A convolution whose stride is its kernel, in float64."""
    latents, weight, bias, known = doubles(latents.to(weight.dtype), weight, bias, known)
    x = latents if known is None else torch.cat((latents, known.to(latents)), 1)
    return torch.nn.functional.conv3d(x, weight, bias, weight.shape[2:]).flatten(2).transpose(1, 2)


def exact_head(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    index: Tensor,
    weight: Tensor,
    bias: Tensor,
    grid: tuple[int, int, int],
    patch: tuple[int, int, int],
    eps: float,
) -> Tensor:
    """Feature by feature, in float64."""
    x, shift, scale, weight, bias = doubles(x, shift, scale, weight, bias)
    B, N, d = x.shape
    off = x - x.mean(-1, keepdim=True)
    y = off / (off.square().mean(-1, keepdim=True) + eps).sqrt()
    rows = index.repeat_interleave(N // index.shape[1], 1)
    made = (y * (1 + scale[rows]) + shift[rows]) @ weight.T + bias
    (t, h, w), (pt, ph, pw) = grid, patch
    C = len(weight) // (pt * ph * pw)
    out = torch.full((B, C, t * pt, h * ph, w * pw), NAN, dtype=torch.float64, device=x.device)
    for i in range(pt):
        for j in range(ph):
            for k in range(pw):
                cell = made[..., ((i * ph + j) * pw + k) * C :][..., :C]
                out[:, :, i::pt, j::ph, k::pw] = cell.reshape(B, t, h, w, C).permute(0, 4, 1, 2, 3)
    return out


def make_head(
    B: int,
    grid: tuple[int, int, int],
    patch: tuple[int, int, int],
    C: int,
    d: int,
    groups: int,
    dtype: torch.dtype = torch.float32,
    rows: int = 3,
    device: str = "cpu",
) -> tuple:
    """Arguments of head, tokens far from a mean of 0 among them."""
    tokens, features = math.prod(grid), C * math.prod(patch)
    x = random(B, tokens, d, device=device) * 3 + random(B, tokens, 1, seed=1, device=device) * 5
    shift, scale = (random(rows, d, seed=seed, device=device) for seed in (2, 3))
    index = torch.randint(rows, (B, groups), generator=torch.Generator().manual_seed(4)).to(device)
    weight, bias = random(features, d, seed=5, device=device) / d**0.5, random(features, seed=6, device=device)
    return x.to(dtype), shift, scale, index, weight.to(dtype), bias.to(dtype), grid, patch, 1e-6


@pytest.mark.parametrize("bias", [None, random(7, seed=2)])
def test_linear_is_its_formula(bias: Tensor | None) -> None:
    x, weight = random(2, 3, 5), random(7, 5, seed=1)
    assert error(reference.linear(x, weight, bias), exact_linear(x, weight, bias, False)) < 1e-6
    assert error(reference.linear_gelu_tanh(x, weight, bias), exact_linear(x, weight, bias, True)) < 1e-6


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 3, 1)])
@pytest.mark.parametrize("behind", [0, 3])
def test_patch_embed_is_a_convolution(patch: tuple[int, int, int], behind: int) -> None:
    latents, known = random(2, 4, 4, 6, 6), random(2, behind, 4, 6, 6, seed=1) if behind else None
    weight, bias = random(9, 4 + behind, *patch, seed=2), random(9, seed=3)
    made = reference.patch_embed(latents, weight, bias, known)
    assert error(made, exact_patch_embed(latents, weight, bias, known)) < 1e-6
    # Types that differ: all are those of the weight.
    halves = reference.patch_embed(latents, weight.half(), bias.half(), known)
    known = None if known is None else known.half()
    assert torch.equal(halves, reference.patch_embed(latents.half(), weight.half(), bias.half(), known))


@pytest.mark.parametrize("groups", [1, 2, 24])
@pytest.mark.parametrize("rows", [1, 3])
def test_head_is_its_formula(groups: int, rows: int) -> None:
    args = make_head(2, (2, 3, 4), (1, 2, 3), 5, 11, groups, rows=rows)
    assert error(reference.head(*args), exact_head(*args)) < 1e-6
    assert reference.head(*args, dtype=torch.float16).dtype == torch.float16


def refused(run: Callable[..., Tensor], *args: object) -> None:
    with pytest.raises(ValueError, match="takes"):
        run(*args)


def test_what_does_not_fit_is_refused() -> None:
    linear, embed = transformer.BACKENDS["linear"]["triton"], transformer.BACKENDS["patch_embed"]["triton"]
    refused(linear, random(2, 5), random(7, 6), None)
    refused(linear, random(2, 5), random(7, 5), random(6))
    refused(linear, random(2, 5), random(7, 5).half(), None)
    latents, weight = random(1, 4, 2, 4, 4), random(8, 4, 1, 2, 2)
    refused(embed, latents[..., :3], weight, None)
    refused(embed, latents, weight[:, :3], None)
    refused(embed, latents, weight, None, latents)
    refused(embed, latents[:, :2], weight, None, latents[:, 2:, :1])
    head, args = transformer.BACKENDS["head"]["triton"], make_head(2, (2, 3, 4), (1, 2, 2), 5, 11, 2)
    for at, bad in (
        (0, args[0][:, 1:]),
        (1, args[1][:1]),
        (3, args[3][:1]),
        (3, args[3][:, :0]),
        (4, args[4][1:]),
        (6, (2, 3)),
        (7, (7,)),
    ):
        refused(head, *args[:at], bad, *args[at + 1 :])


# The kernels, interpreted


def poisoned_linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool, **tile: object) -> Tensor:
    from fastvid.kernels.linear_gelu import Config, linear

    tile = {"block_m": 16, "block_n": 32, "block_k": 16, "warps": 4, "stages": 2, "group_m": 2, **tile}
    room = torch.full((len(x) + 2, len(weight) + 8), NAN, dtype=x.dtype)
    out = room[1:-1, : len(weight)]
    linear(x, weight, bias, out, gelu, Config(**tile))
    assert bool(room[0].isnan().all() and room[-1].isnan().all() and room[:, len(weight) :].isnan().all())
    return out


@pytest.mark.interpret
@settings(max_examples=25)
@given(
    M=SIZES, N=SIZES, K=SIZES, dtype=st.sampled_from(HALVES), gelu=st.booleans(), bias=st.booleans(), odd=st.booleans()
)
def test_linear(M: int, N: int, K: int, dtype: torch.dtype, gelu: bool, bias: bool, odd: bool) -> None:
    x, weight = random(M, K, dtype=dtype), random(N, K, dtype=dtype, seed=1)
    if odd:  # of any strides
        x, weight = x.T.contiguous().T, weight.repeat_interleave(2, 1)[:, ::2]
    added = random(N, dtype=dtype, seed=2) if bias else None
    eager = (reference.linear_gelu_tanh if gelu else reference.linear)(x, weight, added)
    check(poisoned_linear(x, weight, added, gelu), eager, exact_linear(x, weight, added, gelu))


@pytest.mark.interpret
@settings(max_examples=25)
@given(M=SIZES, N=SIZES, K=SIZES, dtype=st.sampled_from(HALVES), gelu=st.booleans(), parts=st.sampled_from((1, 2)))
def test_linear_by_descriptors(M: int, N: int, K: int, dtype: torch.dtype, gelu: bool, parts: int) -> None:
    N, K = math.ceil(N / 8) * 8, math.ceil(K / 8) * 8  # rows start on 16 bytes
    x, weight, added = random(M, K, dtype=dtype), random(N, K, dtype=dtype, seed=1), random(N, dtype=dtype, seed=2)
    eager = (reference.linear_gelu_tanh if gelu else reference.linear)(x, weight, added)
    made = poisoned_linear(x, weight, added, gelu, tma=True, parts=parts)
    check(made, eager, exact_linear(x, weight, added, gelu))


@pytest.mark.interpret
def test_gelu_at_its_ends() -> None:
    """Far below 0 the result is 0 or a little less, far above x itself; infinity and NaN do as they do eagerly."""
    x = torch.tensor([-1e30, -1e4, -50.0, -11.0, -5.0, -1e-30, 0.0, 1e-30, 3.0, 1e4, 1e30, math.inf, NAN])
    values, eye = x[:, None], torch.ones(1, 1)
    made = transformer.linear_gelu_tanh_triton(values, eye, None)[:, 0]
    exact = x.double() * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x.double() + 0.044715 * x.double() ** 3))
    torch.testing.assert_close(made[:11].double(), exact[:11], rtol=2e-5, atol=1e-37)
    assert made[11] == math.inf and bool(made[12].isnan())


@pytest.mark.interpret
@pytest.mark.parametrize("which", ["x", "weight", "out"])
def test_linear_has_64_bit_offsets(which: str) -> None:
    """Rows, or columns, 2^31 elements apart or more; what lies between them is never touched."""
    from fastvid.kernels.linear_gelu import linear

    far, x, weight = 2**30 + 8, random(3, 4, dtype=torch.float16), random(5, 4, dtype=torch.float16, seed=1)
    expected = reference.linear(x, weight, None)
    if which == "x":
        x = apart((3, 4), (far, 1)).copy_(x)
    elif which == "weight":
        weight = apart((5, 4), (2, far)).copy_(weight)
    out = apart((3, 5), (far, 1)) if which == "out" else torch.full((3, 5), NAN, dtype=torch.float16)
    linear(x, weight, None, out, False)
    torch.testing.assert_close(out, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.interpret
def test_linear_of_nothing_and_of_what_it_does_not_take() -> None:
    from fastvid.kernels.linear_gelu import Config, linear

    x, weight = random(4, 8), random(6, 8, seed=1)
    assert transformer.linear_triton(x[:0], weight, None).shape == (0, 6)
    assert torch.equal(transformer.linear_triton(x[:, :0], weight[:, :0], random(6)), random(6).expand(4, 6))
    with pytest.raises(ValueError, match="bias must be contiguous"):
        linear(x, weight, random(12)[::2], torch.empty(4, 6), False)
    with pytest.raises(ValueError, match="fp32, fp16 or bf16"):
        linear(x.double(), weight.double(), None, torch.empty(4, 6), False)
    with pytest.raises(ValueError, match="start on 16 bytes"):
        linear(x, weight, None, torch.empty(4, 6), False, Config(16, 16, 16, 4, 2, tma=True))


@pytest.mark.interpret
def test_linear_of_a_slice_of_a_batch() -> None:
    x, weight, bias = random(2, 7, 8)[:, 1:5], random(6, 8, seed=1), random(6, seed=2)
    torch.testing.assert_close(transformer.linear_triton(x, weight, bias), reference.linear(x, weight, bias))


GRIDS = st.tuples(st.integers(1, 2), st.integers(1, 4), st.integers(1, 5))
PATCHES = st.sampled_from(((1, 2, 2), (2, 1, 3), (1, 1, 1)))


@pytest.mark.interpret
@settings(max_examples=25)
@given(
    B=st.integers(1, 2),
    grid=GRIDS,
    patch=PATCHES,
    channels=st.sampled_from((1, 3, 16)),
    behind=st.sampled_from((0, 1, 5)),
    d=SIZES,
    dtype=st.sampled_from(HALVES),
    block_k=st.sampled_from((0, 16)),
    layout=st.sampled_from(("plain", "channels last", "slice of frames", "expanded")),
)
def test_patch_embed(
    B: int,
    grid: tuple[int, int, int],
    patch: tuple[int, int, int],
    channels: int,
    behind: int,
    d: int,
    dtype: torch.dtype,
    block_k: int,
    layout: str,
) -> None:
    from fastvid.kernels.patch_embed import Config, patch_embed

    size = tuple(n * p for n, p in zip(grid, patch, strict=True))
    latents = laid_out(random(B, channels, *size), layout)
    known = laid_out(random(B, behind, *size, seed=1), layout).to(dtype) if behind else None
    weight = random(d, channels + behind, *patch, dtype=dtype, seed=2)
    bias = None if d == 13 else random(d, dtype=dtype, seed=3)
    out = torch.full((B, math.prod(grid), d), NAN, dtype=dtype)
    patch_embed(latents, weight, bias, known, out, Config(16, 16, 4, 2, block_k))
    check(out, reference.patch_embed(latents, weight, bias, known), exact_patch_embed(latents, weight, bias, known))


@pytest.mark.interpret
@pytest.mark.parametrize("which", ["latents", "known"])
def test_patch_embed_has_64_bit_offsets(which: str) -> None:
    near, far = random(1, 3, 2, 2, 4, dtype=torch.float16), apart((1, 3, 2, 2, 4), (1, 2**30, 64, 8, 1))
    weight = random(8, 6, 1, 2, 2, dtype=torch.float16, seed=1)
    pair = (near, far.copy_(random(1, 3, 2, 2, 4, seed=2))) if which == "known" else (far.copy_(near), near)
    made = transformer.patch_embed_triton(pair[0], weight, None, pair[1])
    check(
        made, reference.patch_embed(pair[0], weight, None, pair[1]), exact_patch_embed(pair[0], weight, None, pair[1])
    )


@pytest.mark.interpret
def test_patch_embed_with_more_features_than_are_kept_on_chip() -> None:
    latents, weight = random(1, 200, 1, 4, 4), random(5, 200, 1, 2, 2, dtype=torch.float16, seed=1)
    made = transformer.patch_embed_triton(latents, weight, None)
    check(made, reference.patch_embed(latents, weight, None), exact_patch_embed(latents, weight, None, None))


@pytest.mark.interpret
def test_patch_embed_of_nothing_and_of_what_it_does_not_take() -> None:
    from fastvid.kernels.patch_embed import patch_embed

    latents, weight = random(1, 4, 1, 2, 2), random(8, 4, 1, 2, 2)
    assert transformer.patch_embed_triton(latents[:0], weight, None).shape == (0, 1, 8)
    with pytest.raises(ValueError, match="must be contiguous"):
        patch_embed(latents, weight.transpose(3, 4), None, None, torch.empty(1, 1, 8))
    with pytest.raises(ValueError, match="fp32, fp16 or bf16"):
        patch_embed(latents.double(), weight, None, None, torch.empty(1, 1, 8))


@pytest.mark.interpret
@settings(max_examples=25)
@given(
    B=st.integers(1, 2),
    grid=GRIDS,
    patch=PATCHES,
    C=st.sampled_from((1, 4, 16)),
    d=SIZES,
    groups=st.sampled_from(("one", "frames", "tokens")),
    dtype=st.sampled_from(HALVES),
    latents=st.sampled_from((None, torch.float32)),
)
def test_head(
    B: int,
    grid: tuple[int, int, int],
    patch: tuple[int, int, int],
    C: int,
    d: int,
    groups: str,
    dtype: torch.dtype,
    latents: torch.dtype | None,
) -> None:
    from fastvid.kernels.head import Config, head

    count = {"one": 1, "frames": grid[0], "tokens": math.prod(grid)}[groups]
    args = make_head(B, grid, patch, C, d, count, dtype, rows=1 if d == 16 else 3)
    eager, exact = reference.head(*args, dtype=latents), exact_head(*args)
    out = torch.full(exact.shape, NAN, dtype=eager.dtype)
    head(*args, out, Config(16, 16, 4, 2))
    # A type of its own for what comes out does not show in eager, which rounds before.
    assert error(out, exact) <= max(2 * error(eager, exact), torch.finfo(dtype).eps), (error(out, exact), d)


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("groups", [1, 2, 128])
def test_head_with_tokens_far_from_a_mean_of_0(groups: int, dtype: torch.dtype) -> None:
    """Means a hundred times the spread, and a token that is the same everywhere."""
    args = make_head(1, (2, 8, 8), (1, 2, 2), 4, 48, groups)
    x = (args[0] / 5 + 100).to(dtype)
    x[:, 5] = 7.0
    args = (x, *args[1:4], args[4].to(dtype), args[5].to(dtype), *args[6:])
    check(transformer.head_triton(*args), reference.head(*args), exact_head(*args))


@pytest.mark.interpret
def test_head_reads_and_writes_any_strides() -> None:
    from fastvid.kernels.head import head

    x, shift, scale, index, *rest = make_head(2, (2, 3, 4), (1, 2, 2), 4, 20, 2)
    x = torch.cat((x, x), 2)[:, :, :20]
    pair = torch.stack((shift, scale), 1)
    args = (x, *pair.unbind(1), index.T.contiguous().T.int(), *rest)
    out = torch.full((2, 2, 6, 8, 4), NAN).permute(0, 4, 1, 2, 3)
    head(*args, out)
    check(out, reference.head(x, shift, scale, index, *rest), exact_head(x, shift, scale, index, *rest))


@pytest.mark.interpret
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("which", ["x", "out"])
def test_head_has_64_bit_offsets(which: str, groups: int) -> None:
    from fastvid.kernels.head import head

    args = make_head(1, (1, 2, 2), (1, 1, 1), 3, 20, groups, torch.float16)
    exact, eager = exact_head(*args), reference.head(*args)
    x = apart((1, 4, 20), (1, 2**30 + 8, 1)).copy_(args[0]) if which == "x" else args[0]
    out = torch.empty_like(eager) if which == "x" else apart(tuple(eager.shape), (1, 2**30, 64, 8, 1))
    head(x, *args[1:], out.fill_(NAN))
    check(out, eager, exact)


@pytest.mark.interpret
def test_head_of_nothing_and_of_what_it_does_not_take() -> None:
    from fastvid.kernels.head import head

    x, shift, scale, index, weight, bias, grid, patch, eps = make_head(1, (1, 2, 2), (1, 2, 2), 3, 20, 1)
    assert transformer.head_triton(x[:0], shift, scale, index[:0], weight, bias, grid, patch, eps).shape == (
        0,
        3,
        1,
        4,
        4,
    )
    out = torch.empty(1, 3, 1, 4, 4)
    for bad, message in (
        ({"x": x.double()}, "fp32, fp16 or bf16"),
        ({"x": x.transpose(1, 2).contiguous().transpose(1, 2)}, "contiguous rows"),
        ({"scale": scale[:, :8].repeat(1, 5)[:, ::2]}, "contiguous"),
        ({"index": index.float()}, "int32 or int64"),
        ({"weight": weight.half()}, "weight, torch.float32 as x"),
        ({"bias": bias.repeat(2)[::2]}, "bias must be contiguous"),
    ):
        given = dict(x=x, shift=shift, scale=scale, index=index, weight=weight, bias=bias, out=out) | bad
        with pytest.raises(ValueError, match=message):
            head(**given, grid=grid, patch=patch, eps=eps)


@pytest.mark.interpret
def test_operators_of_torch() -> None:
    x, weight, bias = random(2, 3, 16), random(8, 16, seed=1), random(8, seed=2)
    torch.library.opcheck(transformer.linear_triton, (x, weight, bias))
    torch.library.opcheck(transformer.linear_gelu_tanh_triton, (x, weight, None))
    latents, weight = random(1, 4, 1, 4, 4), random(8, 6, 1, 2, 2, seed=1)
    torch.library.opcheck(transformer.patch_embed_triton, (latents, weight, bias, latents[:, :2]))
    torch.library.opcheck(transformer.head_triton, (*make_head(1, (1, 2, 2), (1, 2, 2), 3, 20, 1), torch.float16))


@pytest.mark.slow
def test_under_the_interpreter() -> None:
    run_interpreted(__file__)


def test_features_are_cut_into_powers_of_2() -> None:
    pytest.importorskip("triton")
    from fastvid.kernels.gemm import power_of_2_parts

    assert power_of_2_parts(64) == (64, 0) and power_of_2_parts(144) == (128, 16) and power_of_2_parts(192) == (128, 64)
    for size in range(1, 600):
        first, second = power_of_2_parts(size)
        assert size <= first + second < max(2 * size, 33) and first >= 16
        assert all(part & (part - 1) == 0 for part in (first, second))


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(
    ("M", "N", "K"),
    [(1, 8, 8), (512, 1536, 4096), (2049, 1536, 1536), (4097, 8960, 1536), (3000, 137, 1151), (257, 5120, 1280)],
)
def test_linear_on_a_gpu(dtype: torch.dtype, gelu: bool, M: int, N: int, K: int) -> None:
    x, weight = random(M, K, dtype=dtype, device="cuda"), random(N, K, dtype=dtype, seed=1, device="cuda") / K**0.5
    bias = random(N, dtype=dtype, seed=2, device="cuda")
    name = "linear_gelu_tanh" if gelu else "linear"
    back = transformer.BACKENDS[name]
    exact = exact_linear(x, weight, bias, gelu)
    check(back["triton"](x, weight, bias), back["reference"](x, weight, bias), exact)
    if K % 2:
        return
    odd = x.T.contiguous().T
    check(back["triton"](odd, weight, None), back["reference"](x, weight, None), exact_linear(x, weight, None, gelu))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("size", "channels", "behind", "d"),
    [((1, 2, 2), 16, 0, 64), ((5, 30, 46), 16, 0, 1536), ((3, 60, 104), 16, 20, 5120), ((4, 44, 80), 48, 0, 3072)],
)
def test_patch_embed_on_a_gpu(
    dtype: torch.dtype, size: tuple[int, int, int], channels: int, behind: int, d: int
) -> None:
    weight = random(d, channels + behind, 1, 2, 2, dtype=dtype, device="cuda") / 8
    bias = random(d, dtype=dtype, seed=1, device="cuda")
    for latents_dtype in {dtype, torch.float32}:
        latents = random(2, channels, *size, dtype=latents_dtype, seed=2, device="cuda")
        known = random(2, behind, *size, dtype=latents_dtype, seed=3, device="cuda") if behind else None
        made = transformer.patch_embed_triton(latents, weight, bias, known)
        rounded = None if known is None else known.to(dtype)
        exact = exact_patch_embed(latents, weight, bias, rounded)
        check(made, reference.patch_embed(latents, weight, bias, known), exact)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("C", "d"), [(16, 1536), (16, 5120), (48, 3072), (5, 137)])
@pytest.mark.parametrize("groups", ["one", "frames", "tokens"])
def test_head_on_a_gpu(dtype: torch.dtype, C: int, d: int, groups: str) -> None:
    grid = (3, 15, 26)
    count = {"one": 1, "frames": 3, "tokens": math.prod(grid)}[groups]
    args = make_head(2, grid, (1, 2, 2), C, d, count, dtype, device="cuda")
    exact = exact_head(*args)
    check(transformer.head_triton(*args), reference.head(*args), exact)
    widened = transformer.head_triton(*args, dtype=torch.float32)
    assert error(widened, exact) <= max(2 * error(reference.head(*args), exact), torch.finfo(dtype).eps)


@pytest.mark.gpu
def test_more_than_2_31_elements_on_a_gpu() -> None:
    rows = 2**31 // 8960 + 77
    x = torch.randn(rows, 64, device="cuda", dtype=torch.bfloat16)
    weight = random(8960, 64, dtype=torch.bfloat16, device="cuda")
    out = transformer.linear_triton(x, weight, None)
    for at in (slice(0, 300), slice(rows - 300, rows)):
        check(out[at], reference.linear(x[at], weight, None), exact_linear(x[at], weight, None, False))
