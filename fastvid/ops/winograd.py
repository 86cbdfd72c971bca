"""Winograd convolution of chunks of frames on the CPU: F(4x4, 3x3) in space, direct sums in time.

A 6x6 tile d of pixels gives 4x4 pixels y = A^T [(G g G^T) * (B^T d B)] A, with 36 products instead of 144. The
interpolation points are 0, +-1/sqrt(2), +-sqrt(2) and infinity. Their fp32 error is 1.6 times that of a direct
convolution (relative 8.7e-7 instead of 5.3e-7 at 96 channels, against fp64); with the usual points 0, +-1, +-2 it is
3.6 times.

Processes one row of tiles at a time, so that its data stays in the cache: normalize 4 new rows, transform, multiply,
transform back. All transforms and products are GEMMs or grouped oneDNN convolutions, whose kernel height is the taps in
time.

Source: Lavin and Gray, "Fast algorithms for convolutional neural networks", 2015. Shapes: T frames, S frames including
the past, H and W height and width, K tiles in a row, C and N channels in and out; channels are the last dimension.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TILE, WINDOW = 4, 6  # side of a tile's output and of its input, in pixels

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
    """Whether Winograd pays off for T * H * W pixels: transforming the kernels costs as much as 2,000 pixels save."""
    return min(weight.shape[:2]) >= 64 and pixels >= 8192


def norm_silu(x: Tensor, gamma: Tensor) -> Tensor:
    """silu(rms_norm(x)) over the last dimension, as a new contiguous tensor: [..., C] -> [..., C]."""
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
    """ops.vae.norm_silu_conv3d, written or added to `out` [B, N, T, H, W]. Returns the past of the next call.

    x has `edges` more rows than `out` at the top and at the bottom.
    """
    if past is None and x.shape[2] > 1:
        past = torch.zeros_like(x[:, :, :1]).expand(-1, -1, 2, -1, -1)
    B, C, _, H, W = x.shape
    kept = x.new_zeros(B, 2, H, W, C).permute(0, 4, 1, 2, 3)
    conv = _RowConvolution(weight if past is not None else weight[:, :, -1:], bias, frames=x.shape[2], width=x.shape[4])
    for b in range(x.shape[0]):
        before = None if past is None else _pixels(past[b])
        _run(conv, _pixels(x[b]), before, gamma, _pixels(out[b]), _pixels(kept[b]), add, edges[0])
    return kept


def _pixels(x: Tensor) -> Tensor:
    """[C, T, H, W] as [T, H, W, C]."""
    return x.permute(1, 2, 3, 0)


def _run(
    conv: _RowConvolution,
    x: Tensor,
    past: Tensor | None,
    gamma: Tensor,
    out: Tensor,
    kept: Tensor,
    add: bool,
    above: int,
) -> None:
    """Convolve one sample, a row of tiles at a time: x [T, h, W, C] -> out [T, H, W, N], last frames -> kept
    [2, h, W, C].

    Row 0 of `out` corresponds to row `above` of x; x is zero-padded at the bottom.
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


class _RowConvolution:
    """Convolves a window of 6 input rows to 4 output rows. Holds the buffers and transformed kernels."""

    def __init__(self, weight: Tensor, bias: Tensor, frames: int, width: int) -> None:
        self.N, C, taps = weight.shape[:3]
        self.T, self.S, self.width = frames, frames + taps - 1, width
        # One extra tile, so that the tiles of all rows form one sequence with a constant stride.
        self.K = -(-width // TILE) + 1
        self.bias = bias
        pixels = self.S * self.K * TILE
        # Two extra pixels, read by the last tile, whose result is dropped.
        self._window = weight.new_zeros(WINDOW * pixels + 2, C)
        self._half = weight.new_zeros(WINDOW * pixels + 2, C)
        self._tiles = weight.new_empty(WINDOW * self.S * self.K, WINDOW, C)
        self._back = weight.new_empty(WINDOW, frames * self.K, TILE, self.N)
        self._out = weight.new_empty(TILE, frames * self.K * TILE * self.N)
        self._window_rows = self._window[:-2].view(WINDOW, self.S, self.K * TILE, C)
        self._to_tiles, self._from_tiles = weight.new_tensor(_IN), weight.new_tensor(_OUT)
        self._kernels = _pack(weight, (self.S, self.K))

    def clear(self) -> None:
        """Fill the window with zeros, the padding above the first row."""
        self._window_rows.zero_()

    def advance(self) -> None:
        """Move the last two rows of the window to its start."""
        self._window_rows[: WINDOW - TILE] = self._window_rows[TILE:]

    def fill(self, row: int, frames: Tensor, past: Tensor | None) -> None:
        """Write rows [T, h, W, C] and those of the past into the window at `row`, and zeros after them."""
        end = row + frames.shape[1]
        target = self._window_rows[row:end, :, 1 : self.width + 1].transpose(0, 1)
        target[self.S - self.T :] = frames
        if past is not None:
            target[: self.S - self.T] = past
        self._window_rows[end:] = 0

    def rows(self) -> Tensor:
        """Compute the 4 output rows, [T, 4, W, N]; valid until the next call."""
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
        """Multiply tiles [6, S, K, 6, C] with the kernels, sum over the taps in time, and transform columns back."""
        back = self._from_tiles.expand(self.T * self.K, -1, -1)
        tiles = self._tiles.view(WINDOW, 1, self.S, self.K, -1).permute(0, 1, 4, 2, 3)
        for i, kernel in enumerate(self._kernels):
            products = _convolve(tiles[i], kernel)
            torch.bmm(back, products.permute(0, 2, 3, 1).view(self.T * self.K, WINDOW, self.N), out=self._back[i])


def _pack(weight: Tensor, size: tuple[int, int]) -> list[Tensor]:
    """G g G^T of weights [N, C, taps, 3, 3]: for each of 6 rows, a kernel [6N, C, taps, 1] with 6 groups, in oneDNN's
    layout."""
    N, C, taps = weight.shape[:3]
    transform = torch.tensor(_KERNEL, dtype=torch.float64)
    # fp64, so that it is rounded to fp32 only once.
    transform = torch.kron(transform, transform).float()
    kernels = torch.mm(transform, weight.reshape(-1, 9).t()).view(WINDOW, WINDOW * N, C, taps, 1)
    shape = [1, WINDOW * C, *size]
    return [torch.ops.mkldnn._reorder_convolution_weight(k, [0, 0], [1, 1], [1, 1], WINDOW, shape) for k in kernels]


def _convolve(x: Tensor, kernel: Tensor) -> Tensor:
    # What torch.compile emits for a convolution on the CPU.
    return torch.ops.mkldnn._convolution_pointwise(x, kernel, None, [0, 0], [1, 1], [1, 1], WINDOW, "none", [], "")
