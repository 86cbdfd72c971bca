"""Parts of calls: a call on some rows of another call's inputs, and where its result is in that call's.

Every operation works row by row (of tokens, of latents, or of pixels with the row above and below), so a part of a call
says what a part of its result has to be, at a part of the cost. Rows of tokens may be chosen in any order and number,
and more than once; rows of pixels are bands.

Shapes: see `fastvid.ops.reference` and `fastvid.ops.vae`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastvid.tuning.inputs import Given

Outputs = tuple[Tensor, ...]
SPREAD = 48  # tokens or pixels that are looked at, beside both ends
ENDS = 8
HEADS = 3
LATENT_BAND, PIXEL_BAND = 2, 2  # rows


@dataclass(frozen=True)
class Piece:
    """given: the part's arguments. of: (outputs of the whole call) -> outputs of the part."""

    given: Given
    of: Callable[[Outputs], Outputs]


def pieces(op: str, given: Given) -> list[Piece]:
    """Parts that together show both ends and some of the middle of a call's result."""
    rows, kind = rows_of(op, given)
    if kind == "tokens":
        return [tokens(op, given, spread(rows, given_device(given)))]
    size = PIXEL_BAND if op.startswith("vae_") else LATENT_BAND
    starts = sorted({0, max(0, (rows - size) // 2), max(0, rows - size)})
    return [band(op, given, start, min(start + size, rows)) for start in starts]


def spread(rows: int, device: torch.device) -> Tensor:
    """Numbers of rows: both ends, and some between them."""
    if rows <= SPREAD + 2 * ENDS:
        return torch.arange(rows, device=device)
    middle = torch.linspace(ENDS, rows - ENDS - 1, SPREAD, dtype=torch.float64).round().long()
    ends = torch.arange(ENDS)
    return torch.cat((ends, middle, rows - ENDS + ends)).unique().to(device)


def given_device(given: Given) -> torch.device:
    for value in given.values():
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, Tensor):
                return one.device
    return torch.device("cpu")


def rows_of(op: str, given: Given) -> tuple[int, str]:
    """How many rows a call's result has, and of what: "tokens", or bands of "rows"."""
    if op == "attention":
        return given["q"].shape[1], "tokens"
    if op == "qkv_norm_rope":
        return given["qkv"].shape[1], "tokens"
    if op == "patch_embed":
        return given["latents"].shape[3] // given["weight"].shape[3], "rows"
    if op == "head":
        return given["grid"][1], "rows"
    if op == "to_rgb":
        return given["frames"].shape[2], "rows"
    x = given["x"]
    if op == "solver_step" or op.startswith("vae_"):
        return x.shape[3] // (2 if op == "vae_downsample_conv2d" else 1), "rows"
    return (x.shape[-2] if x.ndim > 1 else 1), "tokens"


# ---------------------------------------------------------------- tokens


def tokens(op: str, given: Given, rows: Tensor) -> Piece:
    """The part of a call on these tokens, in this order."""
    if op == "attention":
        return _queries(given, rows)
    made, main = dict(given), "qkv" if op == "qkv_norm_rope" else "x"
    dim = given[main].ndim - 2
    if dim < 0:
        return Piece(made, lambda outs: outs)
    chosen = rows
    if given.get("order") is not None:
        chosen = given["order"].long()[rows]
        del made["order"]
    for name in ("x", "y", "qkv"):
        if made.get(name) is not None:
            made[name] = made[name].index_select(dim, chosen)
    if made.get("index") is not None:
        made["index"] = per_token(made["index"], given[main].shape[1]).index_select(1, chosen)
    for name in ("cos", "sin"):
        if name in made:
            made[name] = made[name].index_select(0, chosen)
    return Piece(made, lambda outs: tuple(out.index_select(dim, rows) for out in outs))


def per_token(index: Tensor, count: int) -> Tensor:
    """[B, G] -> [B, N]: the row of each token."""
    return index.repeat_interleave(count // index.shape[1], 1)


def _queries(given: Given, rows: Tensor) -> Piece:
    """Some queries of some heads."""
    number = given["q"].shape[2]
    heads = torch.tensor(sorted({0, number // 2, number - 1})[:HEADS], device=rows.device)
    made = given | {name: given[name].index_select(2, heads) for name in ("k", "v")}
    made["q"] = given["q"].index_select(1, rows).index_select(2, heads)

    def of(outs: Outputs) -> Outputs:
        out = outs[0].index_select(1, rows).index_select(2, heads)
        return (out, *(lse.index_select(1, heads).index_select(2, rows) for lse in outs[1:]))

    return Piece(made, of)


# ---------------------------------------------------------------- bands of rows


def band(op: str, given: Given, a: int, b: int) -> Piece:
    """The part of a call whose result is its rows a to b - 1 (of patches, where latents are cut into some)."""
    cut = {"patch_embed": _patches, "head": _head, "vae_downsample_conv2d": _halved}.get(op)
    if cut is not None:
        return cut(given, a, b)
    if op in ("solver_step", "to_rgb", "vae_rms_norm", "vae_halve_frames", "vae_double_frames"):
        return _rowwise(op, given, a, b)
    if op == "vae_conv3d":
        return _rowwise(op, given, a, b) if not any(given.get("padding", (0, 0))) else Piece(given, lambda outs: outs)
    return _seen(op, given, a, b)


def _rows(x: Any, dim: int, a: int, b: int) -> Any:
    if isinstance(x, tuple):
        return tuple(_rows(one, dim, a, b) for one in x)
    return x if x is None else x.narrow(dim, a, b - a)


def _rowwise(op: str, given: Given, a: int, b: int) -> Piece:
    """Results need their own row alone."""
    dim = 2 if op == "to_rgb" else 3
    names = ("x", "past", "cond", "uncond", "history", "frames")
    made = {name: _rows(value, dim, a, b) if name in names else value for name, value in given.items()}
    return Piece(made, lambda outs: tuple(out.narrow(1 if op == "to_rgb" else 3, a, b - a) for out in outs))


def _seen(op: str, given: Given, a: int, b: int) -> Piece:
    """A 3x3 convolution, which sees a row above and one below: edges say that they are there."""
    x, edges = given["x"], given.get("edges", (0, 0))
    if tuple(edges) != (0, 0) or (op == "vae_causal_conv3d" and given["weight"].shape[3] == 1):
        if tuple(edges) != (0, 0):
            return Piece(given, lambda outs: outs)
        return _rowwise(op, given, a, b)
    top, bottom = max(a - 1, 0), min(b + 1, x.shape[3])
    made = given | {"x": _rows(x, 3, top, bottom), "edges": (a - top, bottom - b)}
    if "past" in given:
        made["past"] = _rows(given["past"], 3, top, bottom)
    if "residual" in given:
        made["residual"] = _rows(given["residual"], 3, a, b)
    scale = 2 if op == "vae_upsample_conv2d" else 1

    def of(outs: Outputs) -> Outputs:
        kept = tuple(out.narrow(3, top, bottom - top) for out in outs[1:])
        return (outs[0].narrow(3, scale * a, scale * (b - a)), *kept)

    return Piece(made, of)


def _halved(given: Given, a: int, b: int) -> Piece:
    x, last = given["x"], given.get("bottom", 0)
    seen = int(2 * b < x.shape[3] - last) or last
    made = given | {"x": _rows(x, 3, 2 * a, 2 * b + seen), "bottom": seen}
    return Piece(made, lambda outs: tuple(out.narrow(3, a, b - a) for out in outs))


def _patches(given: Given, a: int, b: int) -> Piece:
    (T, H, W), (pt, ph, pw) = given["latents"].shape[2:], given["weight"].shape[2:]
    made = given | {"latents": _rows(given["latents"], 3, a * ph, b * ph)}
    if "known" in given:
        made["known"] = _rows(given["known"], 3, a * ph, b * ph)
    return Piece(made, lambda outs: tuple(_grid(out, (T // pt, H // ph, W // pw), a, b) for out in outs))


def _head(given: Given, a: int, b: int) -> Piece:
    t, h, w = grid = tuple(given["grid"])
    made = given | {"x": _grid(given["x"], grid, a, b), "grid": (t, b - a, w)}
    made["index"] = _grid(per_token(given["index"], t * h * w)[..., None], grid, a, b)[..., 0]
    ph = given["patch"][1]
    return Piece(made, lambda outs: tuple(out.narrow(3, a * ph, (b - a) * ph) for out in outs))


def _grid(x: Tensor, grid: Sequence[int], a: int, b: int) -> Tensor:
    """Tokens [B, t h w, d] -> those of rows a to b - 1."""
    return x.unflatten(1, tuple(grid)).narrow(2, a, b - a).flatten(1, 3)
