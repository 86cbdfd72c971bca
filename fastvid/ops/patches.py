"""Both ends of a video transformer: latents to tokens, `patch_embed`, and tokens to latents, `head`.

Shapes as in `ops.reference`; C2 channels of what is known of a video, T/H/W latent frames, height and width.
`reference.py` has the meaning; `triton` is kernels/patch_embed.py and kernels/head.py, one kernel each, which read
latents and tokens where they lie.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fastvid.ops import reference


@torch.library.custom_op("fastvid::patch_embed_triton", mutates_args=())
def patch_embed_triton(latents: Tensor, weight: Tensor, bias: Tensor | None, known: Tensor | None = None) -> Tensor:
    """The Triton kernel, which makes no copy of the patches."""
    from fastvid.kernels.patch_embed import patch_embed as run

    out = _tokens_of(latents, weight, bias, known)
    run(latents, weight, bias, known, out)
    return out


@torch.library.custom_op("fastvid::head_triton", mutates_args=())
def head_triton(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    index: Tensor,
    weight: Tensor,
    bias: Tensor,
    grid: Sequence[int],
    patch: Sequence[int],
    eps: float,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The Triton kernel, which reads the tokens once (twice where each has a row of its own)."""
    from fastvid.kernels.head import head as run

    out = _latents_of(x, shift, scale, index, weight, bias, grid, patch, eps, dtype)
    t, h, w = grid
    pt, ph, pw = patch
    run(x, shift, scale, index, weight, bias, (t, h, w), (pt, ph, pw), eps, out)
    return out


BACKENDS: Mapping[str, Mapping[str, Callable[..., Tensor]]] = {
    "patch_embed": {"reference": reference.patch_embed, "triton": patch_embed_triton},
    "head": {"reference": reference.head, "triton": head_triton},
}


@patch_embed_triton.register_fake
def _tokens_of(latents: Tensor, weight: Tensor, bias: Tensor | None, known: Tensor | None = None) -> Tensor:
    """The result, not filled in. Raises ValueError for shapes that do not fit together."""
    given = [tensor for tensor in (latents, weight, known, bias) if tensor is not None]
    fits = latents.ndim == weight.ndim == 5 and (bias is None or bias.shape == weight.shape[:1])
    if fits and known is not None:
        fits = known.ndim == 5 and (known.shape[0], *known.shape[2:]) == (latents.shape[0], *latents.shape[2:])
    if fits:
        channels = latents.shape[1] + (0 if known is None else known.shape[1])
        sizes = zip(latents.shape[2:], weight.shape[2:], strict=True)
        fits = channels == weight.shape[1] and all(n % p == 0 for n, p in sizes)
    if not fits:
        raise ValueError(
            "patch_embed takes latents [B, C, T, H, W], weight [d, C + C2, pt, ph, pw] whose patch divides T, H and W, "
            f"known [B, C2, T, H, W] and bias [d], not {_shapes(given)}"
        )
    B, _, T, H, W = latents.shape
    d, _, pt, ph, pw = weight.shape
    return weight.new_empty((B, (T // pt) * (H // ph) * (W // pw), d))


@head_triton.register_fake
def _latents_of(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    index: Tensor,
    weight: Tensor,
    bias: Tensor,
    grid: Sequence[int],
    patch: Sequence[int],
    eps: float,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The result, not filled in. Raises ValueError for shapes that do not fit together."""
    fits = x.ndim == 3 and len(grid) == len(patch) == 3 and x.shape[1] == grid[0] * grid[1] * grid[2]
    fits = fits and shift.ndim == 2 and shift.shape == scale.shape and shift.shape[1] == x.shape[2]
    fits = fits and index.ndim == 2 and index.shape[0] == x.shape[0] and x.shape[1] % max(index.shape[1], 1) == 0
    fits = fits and weight.ndim == 2 and weight.shape[1] == x.shape[2] and bias.shape == weight.shape[:1]
    if not fits or weight.shape[0] % (patch[0] * patch[1] * patch[2]):
        raise ValueError(
            "head takes x [B, N, d], shift and scale [K, d], index [B, G], weight [n pt ph pw, d], bias [n pt ph pw], "
            f"a grid of N tokens and a patch, not {_shapes([x, shift, scale, index, weight, bias])}, {tuple(grid)} "
            f"and {tuple(patch)}"
        )
    (t, h, w), (pt, ph, pw) = grid, patch
    size = (x.shape[0], weight.shape[0] // (pt * ph * pw), t * pt, h * ph, w * pw)
    return x.new_empty(size, dtype=dtype or x.dtype)


def _shapes(tensors: Sequence[Tensor]) -> str:
    return ", ".join(f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in tensors)
