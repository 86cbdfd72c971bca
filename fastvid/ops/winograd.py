"""Winograd convolution of chunks of frames on the CPU: 3x3 in space by F(4x4, 3x3), time by plain sums.

A tile of 6x6 pixels d gives 4x4 pixels y = A^T [(G g G^T) * (B^T d B)] A: 36 products instead of 144. The points of
the underlying polynomial are 0, +-1/sqrt(2), +-sqrt(2) and infinity. With the usual 0, +-1, +-2 the fp32 error is 3.6
times that of a direct convolution, with these 1.6 times (relative 8.7e-7 and 5.3e-7 at 96 channels, against fp64).

One row of tiles at a time, so that all that is worked on stays in the cache: normalise 4 new rows, transform, multiply,
transform back. All three are plain GEMMs or grouped convolutions of oneDNN, the taps in time being its kernel height.

Source: Lavin and Gray, "Fast algorithms for convolutional neural networks", 2015. Shapes: T frames, S frames with
their past, H and W height and width, K tiles in a row, C and N channels in and out; pixels last but for channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TILE, WINDOW = 4, 6  # pixels a side that a tile gives, and that it reads

_A, _B = 0.5**0.5, 2.0**0.5
_OUT = [[1, 1, 1, 1, 1, 0], [0, _A, -_A, _B, -_B, 0], [0, 0.5, 0.5, 2, 2, 0], [0, _A**3, -(_A**3), _B**3, -(_B**3), 1]]
_IN = [
    [1, 0, -2.5, 0, 1, 0],
    [0, -2 * _A, -2, _A, 1, 0],
    [0, 2 * _A, -2, -_A, 1, 0],
    [0, -_B / 2, -0.5, _B, 1, 0],
    [0, _B / 2, -0.5, -_B, 1, 0],
    [0, 1, 0, -2.5, 0, 1],
]
_KERNEL = [
    [1, 0, 0],
    [-1 / 1.5, -_A / 1.5, -0.5 / 1.5],
    [-1 / 1.5, _A / 1.5, -0.5 / 1.5],
    [1 / 6, _B / 6, 2 / 6],
    [1 / 6, -_B / 6, 2 / 6],
    [0, 0, 1],
]


def worthwhile(pixels: int, weight: Tensor) -> bool:
    """Whether T * H * W pixels are enough: transforming the kernels costs what 2,000 pixels save."""
    return min(weight.shape[:2]) >= 64 and pixels >= 8192


def norm_silu(x: Tensor, gamma: Tensor) -> Tensor:
    """silu(rms_norm(x)) over the last dimension: [..., C] -> new and contiguous [..., C]."""
    C = x.shape[-1]
    scale = C**0.5 / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min_(1e-12)
    return F.silu((x * scale).mul_(gamma.view(C)), inplace=True)


def norm_silu_conv3d(
    x: Tensor,
    past: Tensor | None,
    gamma: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    add: bool,
    edges: tuple[int, int] = (0, 0),
) -> Tensor:
    """ops.vae.norm_silu_conv3d into `out` [B, N, T, H, W], or added to it; returns the past of the next call.

    x has as many rows more than `out` as `edges` says, at its top and at its bottom.
    """
    if past is None and x.shape[2] > 1:
        past = torch.zeros_like(x[:, :, :1]).expand(-1, -1, 2, -1, -1)
    B, C, _, H, W = x.shape
    kept = x.new_zeros(B, 2, H, W, C).permute(0, 4, 1, 2, 3)
    conv = _Rows(weight if past is not None else weight[:, :, -1:], bias, frames=x.shape[2], width=x.shape[4])
    for b in range(x.shape[0]):
        before = None if past is None else _pixels(past[b])
        _run(conv, _pixels(x[b]), before, gamma, _pixels(out[b]), _pixels(kept[b]), add, edges[0])
    return kept


def _pixels(x: Tensor) -> Tensor:
    """[C, T, H, W] as [T, H, W, C]."""
    return x.permute(1, 2, 3, 0)


def _run(
    conv: _Rows, x: Tensor, past: Tensor | None, gamma: Tensor, out: Tensor, kept: Tensor, add: bool, above: int
) -> None:
    """One picture, a row of tiles at a time: x [T, h, W, C] -> out [T, H, W, N], last frames -> kept [2, h, W, C].

    The first row of `out` is that of x's row `above`; after the last row that x has are zeros.
    """
    h, H = x.shape[1], out.shape[1]
    new = min(2, x.shape[0])
    if past is not None and new == 1:
        kept[:1] = past[1:]

    def fill(row: int, top: int, bottom: int) -> None:
        rows = norm_silu(x[:, top:bottom], gamma)
        kept[2 - new :, top:bottom] = rows[-new:]
        conv.fill(row, rows, None if past is None else past[:, top:bottom])

    conv.clear()
    fill(WINDOW - 1 - above, 0, 1 + above)
    for top in range(0, H, TILE):
        conv.advance()
        first = top + above + 1
        fill(WINDOW - TILE, min(first, h), min(first + TILE, h))
        done = conv.rows()[:, : H - top]
        target = out[:, top : top + TILE]
        target.add_(done) if add else target.copy_(done)


class _Rows:
    """Convolves the window of 6 rows that it holds to 4 rows; buffers and transformed kernels for one convolution."""

    def __init__(self, weight: Tensor, bias: Tensor, frames: int, width: int) -> None:
        self.N, C, taps = weight.shape[:3]
        self.T, self.S, self.width = frames, frames + taps - 1, width
        # A tile more than needed, so that the tiles of all rows are one sequence with one stride.
        self.K = -(-width // TILE) + 1
        self.bias = bias
        pixels = self.S * self.K * TILE
        # Two pixels after the end: the last tile, which is dropped, reads them.
        self._window = weight.new_zeros(WINDOW * pixels + 2, C)
        self._half = weight.new_zeros(WINDOW * pixels + 2, C)
        self._tiles = weight.new_empty(WINDOW * self.S * self.K, WINDOW, C)
        self._back = weight.new_empty(WINDOW, frames * self.K, TILE, self.N)
        self._out = weight.new_empty(TILE, frames * self.K * TILE * self.N)
        self._window_rows = self._window[:-2].view(WINDOW, self.S, self.K * TILE, C)
        self._to_tiles, self._from_tiles = weight.new_tensor(_IN), weight.new_tensor(_OUT)
        self._kernels = _pack(weight, (self.S, self.K))

    def clear(self) -> None:
        """Before the first row: zeros above it."""
        self._window_rows.zero_()

    def advance(self) -> None:
        """The last two rows become the first two."""
        self._window_rows[: WINDOW - TILE] = self._window_rows[TILE:]

    def fill(self, row: int, frames: Tensor, past: Tensor | None) -> None:
        """Put rows [T, h, W, C] and those of the past in at a row; zeros in the rows after them."""
        end = row + frames.shape[1]
        target = self._window_rows[row:end, :, 1 : self.width + 1].transpose(0, 1)
        target[self.S - self.T :] = frames
        if past is not None:
            target[: self.S - self.T] = past
        self._window_rows[end:] = 0

    def rows(self) -> Tensor:
        """The 4 rows of results, [T, 4, W, N]; valid until the next call."""
        C = self._window.shape[1]
        half = self._half[:-2]
        torch.mm(self._to_tiles, self._window[:-2].view(WINDOW, -1), out=half.view(WINDOW, -1))
        count = len(self._tiles)
        columns = self._half.as_strided((count, WINDOW, C), (TILE * C, C, 1))
        torch.bmm(self._to_tiles.expand(count, -1, -1), columns, out=self._tiles)
        self._multiply()
        torch.mm(self._from_tiles, self._back.view(WINDOW, -1), out=self._out)
        rows = self._out.view(TILE, self.T, self.K * TILE, self.N).add_(self.bias)
        return rows[:, :, : self.width].transpose(0, 1)

    def _multiply(self) -> None:
        """tiles [6, S, K, 6, C] times the kernels, summed over the taps in time, columns transformed back."""
        back = self._from_tiles.expand(self.T * self.K, -1, -1)
        tiles = self._tiles.view(WINDOW, 1, self.S, self.K, -1).permute(0, 1, 4, 2, 3)
        for i, kernel in enumerate(self._kernels):
            products = _convolve(tiles[i], kernel)
            torch.bmm(back, products.permute(0, 2, 3, 1).view(self.T * self.K, WINDOW, self.N), out=self._back[i])


def _pack(weight: Tensor, size: tuple[int, int]) -> list[Tensor]:
    """G g G^T of [N, C, taps, 3, 3], one kernel [6N, C, taps, 1] in 6 groups for each of 6 rows, in oneDNN's layout."""
    N, C, taps = weight.shape[:3]
    transform = torch.tensor(_KERNEL, dtype=torch.float64)
    # In fp64, since it is rounded to fp32 just once.
    transform = torch.kron(transform, transform).float()
    kernels = torch.mm(transform, weight.reshape(-1, 9).t()).view(WINDOW, WINDOW * N, C, taps, 1)
    shape = [1, WINDOW * C, *size]
    return [torch.ops.mkldnn._reorder_convolution_weight(k, [0, 0], [1, 1], [1, 1], WINDOW, shape) for k in kernels]


def _convolve(x: Tensor, kernel: Tensor) -> Tensor:
    # What torch.compile emits for a convolution on the CPU.
    return torch.ops.mkldnn._convolution_pointwise(x, kernel, None, [0, 0], [1, 1], [1, 1], WINDOW, "none", [], "")
