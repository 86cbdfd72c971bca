"""Predicts the time of a denoising step on several GPUs from the speed of a GPU and its links. Plans use it to choose
layouts.

A rank's time is the sum of:
- linear layers on its own tokens;
- attention from its ring block's tokens to all tokens, for its share of the heads;
- memory traffic of norms, rotations, residuals and merging in a ring;
- exchanges that no computation hides: sending the first group of heads, returning the last one, and the part of a ring
  step that exceeds the concurrent attention.

A layer takes at least as long as launching its kernels. The rank with the most tokens determines the total.
docs/gpus.md has the formulas.

Units: seconds, bytes, floating point operations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from fastvid.distributed.layout import GROUPS, every
from fastvid.distributed.mesh import Layout, shares
from fastvid.errors import InvalidRequest

VELOCITY_BYTES = 4  # velocities are exchanged in fp32
PASSES = 24  # values per token and channel that a layer reads or writes outside linear layers and attention
KERNELS = 14  # launched by a layer
MERGED, MERGING = 16, 6  # bytes per value, and kernels, to merge one more ring block (in fp32)


@dataclass(frozen=True)
class Link:
    """How ranks are connected. bandwidth: bytes per second that each rank sends while all send; latency: seconds per
    exchange."""

    name: str
    bandwidth: float
    latency: float

    def seconds(self, sent: float) -> float:
        """Seconds of an exchange in which each rank sends `sent` bytes; 0 if there is nothing to send."""
        return self.latency + sent / self.bandwidth if sent > 0 else 0.0


# The vendors' bandwidth for one direction, of which we assume that 75 % are reached (all-to-all of large messages).
# Latencies are assumptions too. Sources: NVIDIA H200 data sheet (NVLink, 900 GB/s for both directions), PCI Express 5.0
# x16, InfiniBand NDR (400 Gb/s).
REACHED = 0.75
NVLINK = Link("NVLink 4", 450e9 * REACHED, 15e-6)
PCIE = Link("PCIe 5 x16", 63e9 * REACHED, 25e-6)
INFINIBAND = Link("InfiniBand NDR", 50e9 * REACHED, 30e-6)
# Measured between two processes with one core each: benchmarks/results/scaling-cpu-amd-epyc.json.
LOOPBACK = Link("gloo over loopback", 8.62e08, 2.4e-04)
LINKS = {"nvlink": NVLINK, "pcie": PCIE, "infiniband": INFINIBAND, "loopback": LOOPBACK}  # fastest first


@dataclass(frozen=True)
class Device:
    """The speed of a rank. linear, attention: operations per second; memory: bytes per second; launch: minimum seconds
    between the starts of two kernels."""

    name: str
    linear: float
    attention: float
    memory: float = math.inf
    launch: float = 0.0


# The project's targets for an H200: linear layers at 85 % of the achievable 790 TFLOP/s (dense bf16), attention at
# cuDNN's 595 TFLOP/s, memory at 85 % of 4.3 TB/s. 5 us between kernels is an assumption.
H200 = Device("H200", 0.85 * 790e12, 595e12, 0.85 * 4.3e12, 5e-6)
# One of two concurrent processes with one core each, in fp32; measured together with LOOPBACK.
CORE = Device("a core of an AMD EPYC", 1.017e11, 7.48e10, 7.9e10)


@dataclass(frozen=True)
class Work:
    """The sizes of a denoising step.

    grid: (t, h, w) of the tokens. dim, ffn_dim, heads, layers: of the transformer. velocity: output values per token.
    guided: with guidance, so two calls. text_rows: text tokens. itemsize: bytes per element in the model.
    """

    grid: tuple[int, int, int]
    dim: int
    ffn_dim: int
    heads: int
    layers: int
    velocity: int
    guided: bool
    text_rows: int = 512
    itemsize: int = 2

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)


@dataclass(frozen=True)
class Prediction:
    """The time of one step in a layout.

    seconds: the total of linear, attention, other (norms, merging, kernel launches) and exposed (exchanges that no
    computation hides). sent: most bytes that a rank sends. efficiency: the time on one rank, divided by the number of
    ranks times this time.
    """

    layout: Layout
    seconds: float
    linear: float
    attention: float
    other: float
    exposed: float
    sent: float
    efficiency: float


def predict(
    work: Work, layout: Layout, device: Device, link: Link, far: Link | None = None, per_host: int = 8
) -> Prediction:
    """Predict a step in a layout. link: within a host; far: between hosts of per_host ranks, None if the same."""
    step = _step(work, layout, device, link, far or link, per_host)
    single_rank = step if layout.size == 1 else _step(work, Layout(), device, link, link, per_host)
    seconds = sum(step[:-1])
    return Prediction(layout, seconds, *step, efficiency=sum(single_rank[:-1]) / layout.size / seconds)


def _step(
    work: Work, layout: Layout, device: Device, link: Link, far: Link, per_host: int
) -> tuple[float, float, float, float, float]:
    """(linear seconds, attention seconds, other seconds, seconds of exposed exchanges, bytes sent), see
    `Prediction`."""
    (t, h, w), d, f, U, R = work.grid, work.dim, work.ffn_dim, layout.ulysses, layout.ring
    per_frame = shares(h * w, layout.sequence)
    own_tokens = t * max(per_frame)
    block = t * max(sum(per_frame[r * U : (r + 1) * U]) for r in range(R))
    linear = 2.0 * own_tokens * (6 * d * d + 2 * d * f) / device.linear
    attention = 4.0 * block * work.tokens * d / U / device.attention
    cross = 4.0 * own_tokens * work.text_rows * d / device.attention
    moved = (PASSES + (2 if U > 1 else 0)) * own_tokens * d * work.itemsize + (R - 1) * MERGED * block * d / U
    kernels = KERNELS + (U > 1) * GROUPS * 3 + (R - 1) * MERGING * (GROUPS if U > 1 else 1)
    busy = linear + attention + cross + moved / device.memory
    other = moved / device.memory + max(0.0, kernels * device.launch - busy)
    near, around = (link if _on_one_host(count, layout.size, per_host) else far for count in (U, layout.sequence))
    exposed, sent = _exchanges(layout, own_tokens, block, d * work.itemsize, attention, near, around)
    calls = 2 if work.guided and layout.guidance == 1 else 1
    each = work.velocity * VELOCITY_BYTES
    gathered, swapped = own_tokens * each * (layout.sequence - 1), (work.tokens * each if layout.guidance == 2 else 0)
    ends = calls * around.seconds(gathered) + (link if layout.size <= per_host else far).seconds(swapped)
    many = calls * work.layers
    return (
        many * linear,
        many * (attention + cross),
        many * other,
        many * exposed + ends,
        many * sent + calls * gathered + swapped,
    )


def _on_one_host(count: int, size: int, per_host: int) -> bool:
    """Whether each group of `count` consecutive ranks is on one host."""
    return size <= per_host or per_host % count == 0


def _exchanges(
    layout: Layout, own_tokens: int, block: int, token: int, attention: float, near: Link, around: Link
) -> tuple[float, float]:
    """For one layer: (seconds of exchanges that attention does not hide, bytes that a rank sends). token: its bytes."""
    U, R = layout.ulysses, layout.ring
    exposed, sent = 0.0, 0.0
    if U > 1:
        out, back = 3 * own_tokens * token * (U - 1) / U, own_tokens * token * (U - 1) / U
        first, last = near.seconds(out / GROUPS), near.seconds(back / GROUPS)
        hidden = attention * (GROUPS - 1) / GROUPS
        between = (GROUPS - 1) * (first + last)
        exposed += first + last + max(0.0, between - hidden)
        sent += out + back
    if R > 1:
        hop = 2 * block * token / U
        each, beside = around.seconds(hop), attention / R
        exposed += (R - 1) * max(0.0, each - beside)
        sent += (R - 1) * hop
    return exposed, sent


def candidates(size: int, work: Work) -> list[Layout]:
    """The possible layouts of `size` ranks. If there is none, raises InvalidRequest with the nearest possible number of
    ranks."""
    tokens = work.grid[1] * work.grid[2]
    for n in range(size, 0, -1):
        layouts = [one for one in every(n, work.heads, work.guided) if one.sequence <= tokens]
        if layouts and n == size:
            return layouts
        if layouts:
            raise InvalidRequest(f"parallel={size}: {tokens} tokens a frame are too few; the nearest is parallel={n}")
    raise AssertionError("one rank always has a layout")


def best(size: int, work: Work, device: Device, link: Link, far: Link | None = None, per_host: int = 8) -> Prediction:
    """The fastest layout of `size` ranks. Raises InvalidRequest if there is none."""
    return ranked(candidates(size, work), work, device, link, far, per_host)[0]


def ranked(
    layouts: Iterable[Layout], work: Work, device: Device, link: Link, far: Link | None = None, per_host: int = 8
) -> list[Prediction]:
    """Predict a step in each layout, fastest first; ties keep the order of `layouts`."""
    predicted = [predict(work, one, device, link, far, per_host) for one in layouts]
    return sorted(predicted, key=lambda one: one.seconds)


def curve(
    work: Work, device: Device, link: Link, far: Link | None = None, per_host: int = 8, most: int = 64
) -> Iterable[Prediction]:
    """The fastest layouts of 1, 2, 4, ... ranks, up to `most`."""
    size = 1
    while size <= most:
        yield best(size, work, device, link, far, per_host)
        size *= 2
