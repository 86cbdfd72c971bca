"""Reference of attention with 8-bit products in eager PyTorch.

Works block by block like csrc/quantize.h and csrc/attention_eight.h. For their tests, and to evaluate the approximation
on any device. Shapes as in fastvid/ops/attention.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastvid.ops.attention import check
from fastvid.ops.sparse import Blocks

KEYS = 128  # of a block
LIMITS = {"int8": 127.0, "fp8": 448.0}
SMALLEST, LOWEST_EXPONENT, BELOW, UP = 1e-12, -100, 80, 8


def round_e4m3(x: Tensor) -> Tensor:
    """Round to the nearest e4m3 value, ties to even, saturating at 448; keeps x's dtype."""
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype)


def quantize(x: Tensor, kind: str, most: Tensor) -> tuple[Tensor, Tensor]:
    """x -> its 8-bit values in fp32, and the scale that maps `most` to the largest 8-bit value."""
    most = most.clamp(min=SMALLEST)
    limit = torch.full_like(
        most, LIMITS[kind]
    )  # a number by a tensor would be its reciprocal, rounded, times the number
    x = x * (limit / most)
    return x.round() if kind == "int8" else round_e4m3(x), most / limit


def quantize_queries(q: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """q [B, N, H, D] -> its values, and scales [B, N, H, 1]."""
    return quantize(q.float(), kind, q.float().abs().amax(-1, keepdim=True))


def quantize_keys(k: Tensor, kind: str, mean: Tensor) -> tuple[Tensor, Tensor]:
    """A block of keys [B, up to 128, H, D] less the mean [B, H, D] -> its values, and scales [B, 1, H, 1]."""
    k = k.float() - mean[:, None]
    return quantize(k, kind, k.abs().amax((1, 3), keepdim=True))


def quantize_values(v: Tensor) -> tuple[Tensor, Tensor]:
    """A block of values [B, up to 128, H, D] -> its e4m3 values as fp32 numbers, and exponents [B, 1, H, 1]."""
    v = v.float()
    most = v.abs().amax((1, 3), keepdim=True)
    part, power = torch.frexp(most)
    exponent = torch.where(part <= 0.875, power - 9, power - 8)  # 448 is 0.875 * 2^9
    exponent = exponent.masked_fill(most == 0, LOWEST_EXPONENT).clamp(min=LOWEST_EXPONENT).float()
    return round_e4m3(v * torch.exp2(-exponent)), exponent


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    blocks: Blocks | None = None,
    kind: str = "fp8",
) -> Tensor | tuple[Tensor, Tensor]:
    """Like `ops.attention`. kind: "fp8" or "int8", the type of the q k products."""
    check(q, k, v, blocks)
    B, N, H, D = q.shape
    scale = D**-0.5 if scale is None else scale
    mean = k.mean(1, dtype=torch.float32)
    q8, q_scale = quantize_queries(q, kind)
    shift = torch.einsum("bnhd,bhd->bhn", q.float(), mean) * scale
    cut = _cut([0, k.shape[1]] if blocks is None else blocks.key_tiles.tolist())
    keys = {part: quantize_keys(k[:, slice(*part)], kind, mean) for tile in cut for part in tile}
    values = {part: quantize_values(v[:, slice(*part)]) for tile in cut for part in tile}
    out, lse = torch.zeros_like(q), torch.full((B, H, N), -torch.inf, device=q.device)
    for b, h, queries, tiles in _walks(q, blocks):
        parts = [part for tile in tiles for part in cut[tile]]
        parts.sort(key=lambda part: part[1] - part[0] < KEYS)  # whole blocks first, in their order
        highest = torch.full((len(queries), 1), -torch.inf, device=q.device)
        total, made = torch.zeros_like(highest), torch.zeros(len(queries), D, device=q.device)
        rows, row_scale = q8[b, queries.start : queries.stop, h], q_scale[b, queries.start : queries.stop, h]
        most = unit = before = None
        for part in parts:
            (k8, k_scale), (v8, exponents) = keys[part], values[part]
            scores = rows @ k8[b, :, h].T * (row_scale * k_scale[b, :, h] * scale)
            found = torch.maximum(highest, scores.amax(-1, keepdim=True))
            shrink = torch.exp(highest - found)
            exponent = exponents[b, :, h]
            most = exponent if most is None else torch.maximum(most, exponent)
            before, unit = unit, torch.maximum(exponent, most - BELOW)
            up = torch.exp2(exponent - unit + UP)
            weights = torch.exp(scores - found) * up
            total = total * shrink + weights.sum(-1, keepdim=True) / up
            rebase = 1.0 if before is None else torch.exp2(before - unit)
            made = made * (shrink * rebase) + round_e4m3(weights) @ v8[b, :, h]
            highest = found
        if parts:
            out[b, queries.start : queries.stop, h] = (made / total * torch.exp2(unit - UP)).to(q.dtype)
            lse[b, h, queries.start : queries.stop] = (highest + total.log())[:, 0]
    return (out, lse + shift) if return_lse else out


def _cut(tiles: list[int]) -> list[list[tuple[int, int]]]:
    """The blocks of every tile, as (start, end)."""
    ends = zip(tiles[:-1], tiles[1:], strict=True)
    return [[(i, min(i + KEYS, end)) for i in range(first, end, KEYS)] for first, end in ends]


def _walks(q: Tensor, blocks: Blocks | None) -> Iterator[tuple[int, int, range, list[int]]]:
    """Yield (sample, head, queries, key tiles) for the whole result."""
    B, N, H, _ = q.shape
    for b, h in ((b, h) for b in range(B) for h in range(H)):
        if blocks is None:
            yield b, h, range(N), [0]
            continue
        starts, rows, indices = blocks.query_tiles.tolist(), blocks.rows.tolist(), blocks.indices.tolist()
        for tile in range(len(starts) - 1):
            row = (b * H + h) % blocks.lists * (len(starts) - 1) + tile
            yield b, h, range(starts[tile], starts[tile + 1]), indices[rows[row] : rows[row + 1]]
