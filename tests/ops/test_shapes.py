"""Shape classes: every operation has some, they read shapes alone, and differ where speeds do."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvid.ops import dispatch, reference, sparse
from fastvid.ops.shapes import CLASSES, dtype_of, octave, shape_class


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_every_operation_has_classes() -> None:
    assert set(CLASSES) == set(dispatch.implementations())


@pytest.mark.parametrize("op", sorted(CLASSES))
def test_classes_take_the_arguments_of_the_operation(op: str) -> None:
    """By position, and optional ones by name, as models pass them."""
    wanted = inspect.signature(getattr(reference, op)).parameters.values()
    taken = inspect.signature(CLASSES[op])
    by_position = [one.name for one in wanted if one.kind == one.POSITIONAL_OR_KEYWORD]
    by_name = {one.name: None for one in wanted if one.kind == one.KEYWORD_ONLY}
    taken.bind(*by_position, **by_name)
    needed = [one.name for one in wanted if one.default is one.empty]
    taken.bind(*needed, **{one.name: None for one in wanted if one.default is not one.empty})


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (1, "2^0"), (2, "2^1"), (3, "2^1"), (16383, "2^13"), (16384, "2^14"), (32767, "2^14")]
)
def test_octave(count: int, text: str) -> None:
    assert octave(count) == text


def attention(N: int, M: int, H: int = 12, D: int = 128, **options: Any) -> str:
    q, k = meta(1, N, H, D), meta(1, M, H, D)
    return shape_class("attention", (q, k, k), options)


def test_attention() -> None:
    assert attention(32760, 32760) == "dense self 2^14x2^14 heads 2^3 d128"
    assert attention(32760, 512) == "dense cross 2^14x2^9 heads 2^3 d128"
    assert attention(32760, 32760, return_lse=True) == "dense self 2^14x2^14 heads 2^3 d128 lse"
    blocks = sparse.full((1, 2, 2), (1, 1, 2))
    assert attention(4, 4, 2, 8, blocks=blocks) == "sparse self 2^2x2^2 heads 2^1 d8"
    classes = {attention(N, N, H) for N in (32760, 75600) for H in (12, 40)}
    assert len(classes) == 4


def test_linears_tell_their_sizes_and_an_octave_of_rows() -> None:
    weight = meta(8960, 1536)
    assert shape_class("linear", (meta(2, 32760, 1536), weight, None), {}) == "1536 to 8960 rows 2^15"
    assert shape_class("linear_gelu_tanh", (meta(7, 1536), weight, None), {}) == "1536 to 8960 rows 2^2"


def test_norms_tell_one_timestep_from_several() -> None:
    x, index = meta(1, 1000, 64), meta(1, 10, dtype=torch.int64)
    one, many = (meta(K, 64, dtype=torch.float32) for K in (1, 3))
    for op, args in (
        ("modulated_layer_norm", lambda rows: (x, rows, rows, index, 1e-6)),
        ("gated_residual", lambda rows: (x, x, rows, index)),
        ("residual_norm", lambda rows: (x, x, rows, rows, index, 1e-6)),
        ("head", lambda rows: (x, rows, rows, index, meta(64, 64), meta(64), (1, 10, 100), (1, 2, 2), 1e-6)),
    ):
        single, several = (shape_class(op, args(rows), {}) for rows in (one, many))
        assert several == single + " timesteps" and "rows 2^9" in single


def test_patches_count_tokens() -> None:
    latents, known, weight = meta(1, 16, 21, 60, 104), meta(1, 20, 21, 60, 104), meta(1536, 36, 1, 2, 2)
    tokens = 21 * 30 * 52
    assert shape_class("patch_embed", (latents, weight, None, known), {}) == (
        f"36 to 1536 patch 1x2x2 rows {octave(tokens)} known"
    )


def test_a_vae_tells_channels_kernel_and_what_it_adds() -> None:
    x, weight, gamma, past = meta(1, 96, 4, 64, 80), meta(96, 96, 3, 3, 3), meta(96, 1, 1, 1), meta(1, 96, 2, 64, 80)
    base = "96 to 96 kernel 3x3x3 pixels 2^14"
    op = "vae_norm_silu_conv3d"
    assert shape_class(op, (x, past, gamma, weight, meta(96)), {"edges": (0, 1)}) == base
    assert shape_class(op, (x, None, gamma, weight, meta(96), x), {}) == base + " start residual"
    assert (
        shape_class("vae_upsample_conv2d", (x, meta(48, 96, 3, 3), meta(48)), {}) == "96 to 48 kernel 3x3 pixels 2^14"
    )


def test_the_dtype_is_the_one_computed_in() -> None:
    latents = meta(1, 16, 1, 4, 4, dtype=torch.float32)
    assert dtype_of("patch_embed", (latents, meta(8, 16, 1, 2, 2), None)) == "bfloat16"
    assert dtype_of("to_rgb", (meta(3, 1, 4, 4, dtype=torch.float16),)) == "float16"
