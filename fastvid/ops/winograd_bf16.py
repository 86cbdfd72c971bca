"""Winograd convolution of chunks of frames on the CPU in bf16: F(2x2, 3x3) in space, direct sums in time.

A 4x4 tile d of pixels gives 2x2 pixels y = A^T [(G g G^T) * (B^T d B)] A, with 16 products instead of 36. Tiles and
kernels are rounded to bf16; products, their sums over channels and time, and A are fp32 (brgemm.py). Larger tiles, as
winograd.py has, would amplify these roundings: F(4x4) is off by 6.8 times as much as the single rounding of a direct
convolution, F(2x2) by 2.5 times, and by 1.6 to 1.9 times with the norm before it, which both round.

A band of rows at a time in each thread, two rows of pixels and some columns of tiles at a time, so that data stays in
the cache. Shapes as in winograd.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvid.ops import brgemm
from fastvid.ops.winograd import norm_silu

TILE, WINDOW = 2, 4  # side of a tile's output and of its input, in pixels
ROWS = 256  # of the matrices: tiles times frames
_KERNEL = [[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]]


def worthwhile(pixels: int, weight: Tensor) -> bool:
    """Whether it is faster than a direct convolution of T * H * W pixels: kernels are transformed at each call."""
    return min(weight.shape[:2]) >= 64 and weight.shape[1] % 2 == 0 and pixels >= 8192


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
    """winograd.norm_silu_conv3d, in bf16."""
    if past is None and x.shape[2] > 1:
        past = torch.zeros_like(x[:, :, :1]).expand(-1, -1, 2, -1, -1)
    B, C, _, h, W = x.shape
    kept = x.new_zeros(B, 2, h, W, C).permute(0, 4, 1, 2, 3)
    if past is not None and x.shape[2] == 1:
        kept[:, :, :1] = past[:, :, 1:]
    kernels = _pack(weight if past is not None else weight[:, :, -1:])
    frames, results, states = (_pixels(one) for one in (x, out, kept))
    before = None if past is None else _pixels(past)
    H = out.shape[3]
    bands = min(torch.get_num_threads(), -(-H // TILE))
    rows = -(-H // TILE // bands) * TILE

    def run(number: int) -> None:
        b, band = divmod(number, bands)
        top, bottom = band * rows, min((band + 1) * rows, H)
        if top < bottom:
            earlier = None if before is None else before[b]
            conv = _Band(kernels, bias, gamma, frames[b], earlier, states[b], edges[0])
            conv.run(results[b], top, bottom, add)

    brgemm.spread(run, B * bands)
    return kept


def _pixels(x: Tensor) -> Tensor:
    """[B, C, T, H, W] as [B, T, H, W, C]."""
    return x.permute(0, 2, 3, 4, 1)


def _pack(weight: Tensor) -> Tensor:
    """G g G^T of weights [N, C, taps, 3, 3], rounded once and packed for `brgemm`: [4, 4, taps, C / 2, N, 2]."""
    N, C, taps = weight.shape[:3]
    transform = torch.tensor(_KERNEL, dtype=torch.float32)
    made = torch.mm(torch.kron(transform, transform), weight.float().reshape(-1, 9).t())
    pairs = made.to(torch.bfloat16).view(WINDOW, WINDOW, N, C // 2, 2, taps)
    return pairs.permute(0, 1, 5, 3, 2, 4).contiguous()


class _Band:
    """Convolves rows of one sample: frames [T, h, W, C], before [2, h, W, C], state [2, h, W, C]: the past of
    the next call. Row r of the result lies at row r + above of the frames."""

    def __init__(
        self,
        kernels: Tensor,
        bias: Tensor,
        gamma: Tensor,
        frames: Tensor,
        before: Tensor | None,
        state: Tensor,
        above: int,
    ) -> None:
        self.T, self.h, self.width, C = frames.shape
        self.N, taps = kernels.shape[4], kernels.shape[2]
        self.S, self.K = self.T + taps - 1, -(-self.width // TILE)
        self.kernels, self.bias, self.gamma = kernels, bias, gamma
        self.frames, self.before, self.state, self.above = frames, before, state, above
        self._window = frames.new_zeros(WINDOW, self.S, TILE * (self.K + 1), C)
        self._half = torch.empty_like(self._window)
        step = max(ROWS // self.T, 1)
        self._chunks = [(at, min(at + step, self.K)) for at in range(0, self.K, step)]
        self._made = {size: _Chunk(self, size) for size in {stop - start for start, stop in self._chunks}}

    def run(self, out: Tensor, top: int, bottom: int, add: bool) -> None:
        """Compute rows of out [T, H, W, N]."""
        self._fill(0, top - 1, own=top == 0)
        self._fill(1, top, own=True)
        for row in range(top, bottom, TILE):
            more = row + TILE < bottom or bottom == out.shape[1]
            self._fill(2, row + 1, own=True)
            self._fill(3, row + 2, own=more)
            self._transform()
            target = out[:, row : min(row + TILE, bottom)]
            for start, stop in self._chunks:
                self._made[stop - start].run(start, target[:, :, TILE * start : TILE * stop], add)
            self._window[:2] = self._window[2:]

    def _fill(self, place: int, row: int, own: bool) -> None:
        """Write a row of the result's frame, normed, into the window. own: whether this band keeps it as the past."""
        at = row + self.above
        target = self._window[place, :, 1 : self.width + 1]
        if not 0 <= at < self.h:
            target.zero_()
            return
        made = norm_silu(self.frames[:, at], self.gamma)
        target[self.S - self.T :] = made
        if self.before is not None:
            target[: self.S - self.T] = self.before[:, at]
        if own:
            new = min(2, self.T)
            self.state[2 - new :, at] = made[-new:]

    def _transform(self) -> None:
        """B^T along the rows."""
        window, half = self._window, self._half
        torch.sub(window[0], window[2], out=half[0])
        torch.add(window[1], window[2], out=half[1])
        torch.sub(window[2], window[1], out=half[2])
        torch.sub(window[1], window[3], out=half[3])


class _Chunk:
    """The buffers for some columns of tiles."""

    def __init__(self, band: _Band, size: int) -> None:
        self.band, self.size, self.rows = band, size, band.T * size
        C, N = band.frames.shape[-1], band.N
        self._tiles = band.frames.new_empty(WINDOW, WINDOW, band.S, size, C)
        self._products = torch.empty(WINDOW, WINDOW, self.rows, N, dtype=torch.float32)
        self._half = torch.empty(TILE, WINDOW, self.rows, N, dtype=torch.float32)
        self._done = torch.empty(TILE, TILE, self.rows, N, dtype=torch.float32)

    def run(self, start: int, target: Tensor, add: bool) -> None:
        """Write to or add to target [T, up to 2 rows, up to 2 * size columns, N]."""
        pairs = self.band._half.unflatten(2, (-1, TILE))[:, :, start : start + self.size + 1]
        even, odd, tiles = pairs[:, :, :, 0], pairs[:, :, :, 1], self._tiles
        torch.sub(even[:, :, :-1], even[:, :, 1:], out=tiles[:, 0])
        torch.add(odd[:, :, :-1], even[:, :, 1:], out=tiles[:, 1])
        torch.sub(even[:, :, 1:], odd[:, :, :-1], out=tiles[:, 2])
        torch.sub(odd[:, :, :-1], odd[:, :, 1:], out=tiles[:, 3])
        self._multiply()
        _combine(self._products, self._half)
        _combine(self._half.transpose(0, 1), self._done.transpose(0, 1))
        done = self._done.view(TILE, TILE, self.band.T, self.size, -1).permute(2, 0, 3, 1, 4)
        done = done[:, : target.shape[1]]
        if target.shape[2] == TILE * self.size:
            target = target.unflatten(2, (self.size, TILE))
        else:
            done = done.flatten(2, 3)[:, :, : target.shape[2]]
        target.copy_(done.add_(target) if add else done)

    def _multiply(self) -> None:
        band, tiles, products, kernels = self.band, self._tiles, self._products, self.band.kernels
        # Both outputs of a tile add product 1 in both directions, so the bias is put there.
        products[1, 1] = band.bias
        product, C, N = brgemm.product(), tiles.shape[-1], band.N
        first, second = tiles.stride(1) * 2, self.size * C * 2  # bytes from tile to tile, and from tap to tap
        a, b, c = tiles.data_ptr(), kernels.data_ptr(), products.data_ptr()
        for number in range(WINDOW * WINDOW):
            for tap in range(kernels.shape[2]):
                at = a + number * first + tap * second
                product(self.rows, N, C, C, N, N, tap > 0 or number == WINDOW + 1, at, b, c, True)
                b += C * N * 2
            c += self.rows * N * 4


def _combine(products: Tensor, out: Tensor) -> None:
    """A^T over the first dimension: 4 -> 2."""
    torch.add(products[1], products[2], out=out[0]).add_(products[0])
    torch.sub(products[1], products[2], out=out[1]).sub_(products[3])
