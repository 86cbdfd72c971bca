"""Predicts how long a denoising step takes on several GPUs, from how fast a GPU computes and how fast its links are.

Plans choose layouts with it. A rank's time is that of linear layers on its own tokens; of attention of its ring block's
tokens to all tokens, for its share of the heads; of the memory traffic of norms, rotations, residuals and a ring's
merging; and of those exchanges that no computation hides: the first group of heads on its way out, the last one on its
way back, and what a ring's step takes longer than the attention beside it. A layer takes no less time than starting its
kernels. The rank with the most tokens sets the pace. docs/gpus.md has the formulas.

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
KERNELS = 14  # started by a layer
MERGED, MERGING = 16, 6  # bytes per value, and kernels, of merging one more block of a ring (in fp32)


@dataclass(frozen=True)
class Link:
    """How ranks are connected. bandwidth: bytes a second that one rank sends while all do; latency: seconds that each
    exchange adds."""

    name: str
    bandwidth: float
    latency: float

    def seconds(self, sent: float) -> float:
        """Seconds of an exchange in which each rank sends so many bytes; 0 if there is nothing to send."""
        return self.latency + sent / self.bandwidth if sent > 0 else 0.0


# What vendors state for one direction, of which 75 % are assumed to be reached (all-to-all of large messages);
# latencies are assumed too. Sources: NVIDIA H200 data sheet (NVLink, 900 GB/s both ways), PCI Express 5.0 x16, InfiniBand NDR
# (400 Gb/s).
REACHED = 0.75
NVLINK = Link("NVLink 4", 450e9 * REACHED, 15e-6)
PCIE = Link("PCIe 5 x16", 63e9 * REACHED, 25e-6)
INFINIBAND = Link("InfiniBand NDR", 50e9 * REACHED, 30e-6)
# Measured between two processes with a core each: benchmarks/results/scaling-cpu-amd-epyc.json.
LOOPBACK = Link("gloo over loopback", 8.62e08, 2.4e-04)
LINKS = {"nvlink": NVLINK, "pcie": PCIE, "infiniband": INFINIBAND, "loopback": LOOPBACK}  # fastest first


@dataclass(frozen=True)
class Device:
    """How fast a rank computes: operations a second in linear layers and in attention; bytes a second of its memory;
    least seconds from one kernel's start to the next one's."""

    name: str
    linear: float
    attention: float
    memory: float = math.inf
    launch: float = 0.0


# The project's targets for an H200: linear layers at 85 % of the 790 TFLOP/s of dense bf16 that it is known to reach,
# attention at cuDNN's 595, memory at 85 % of 4.3 TB/s; 5 us from one kernel to the next is assumed.
H200 = Device("H200", 0.85 * 790e12, 595e12, 0.85 * 4.3e12, 5e-6)
# A process with one core, while two are at work, in fp32; measured together with LOOPBACK.
CORE = Device("a core of an AMD EPYC", 1.017e11, 7.48e10, 7.9e10)


@dataclass(frozen=True)
class Work:
    """The sizes of a denoising step.

    grid: (t, h, w) of the tokens. dim, ffn_dim, heads, layers: of the transformer. velocity: values of the result per
    token. guided: with guidance, so two calls. text_rows: tokens of text. itemsize: bytes of a value in the model.
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

    seconds: in all, of which linear, attention, other (norms, merging, waiting for kernels to start) and exposed
    (exchanges that nothing hides). sent: bytes that a rank sends at most. efficiency: one rank's time, divided by the
    number of ranks times this one.
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
    """Predict a step in a layout. link: within a host; far: between hosts of per_host ranks, None for the same."""
    step = _step(work, layout, device, link, far or link, per_host)
    alone = step if layout.size == 1 else _step(work, Layout(), device, link, link, per_host)
    seconds = sum(step[:-1])
    return Prediction(layout, seconds, *step, efficiency=sum(alone[:-1]) / layout.size / seconds)


def _step(
    work: Work, layout: Layout, device: Device, link: Link, far: Link, per_host: int
) -> tuple[float, float, float, float, float]:
    """Seconds of linear layers, attention, all else that a rank does, and exposed exchanges; bytes sent."""
    (t, h, w), d, f, U, R = work.grid, work.dim, work.ffn_dim, layout.ulysses, layout.ring
    per_frame = shares(h * w, layout.sequence)
    mine = t * max(per_frame)
    block = t * max(sum(per_frame[r * U : (r + 1) * U]) for r in range(R))
    linear = 2.0 * mine * (6 * d * d + 2 * d * f) / device.linear
    attention = 4.0 * block * work.tokens * d / U / device.attention
    cross = 4.0 * mine * work.text_rows * d / device.attention
    moved = (PASSES + (2 if U > 1 else 0)) * mine * d * work.itemsize + (R - 1) * MERGED * block * d / U
    kernels = KERNELS + (U > 1) * GROUPS * 3 + (R - 1) * MERGING * (GROUPS if U > 1 else 1)
    busy = linear + attention + cross + moved / device.memory
    other = moved / device.memory + max(0.0, kernels * device.launch - busy)
    near, around = (link if _on_one_host(count, layout.size, per_host) else far for count in (U, layout.sequence))
    exposed, sent = _exchanges(layout, mine, block, d * work.itemsize, attention, near, around)
    calls = 2 if work.guided and layout.guidance == 1 else 1
    each = work.velocity * VELOCITY_BYTES
    gathered, swapped = mine * each * (layout.sequence - 1), (work.tokens * each if layout.guidance == 2 else 0)
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
    layout: Layout, mine: int, block: int, token: int, attention: float, near: Link, around: Link
) -> tuple[float, float]:
    """Of one layer: seconds of exchanges that attention does not hide, and bytes that a rank sends. token: bytes."""
    U, R = layout.ulysses, layout.ring
    exposed, sent = 0.0, 0.0
    if U > 1:
        out, back = 3 * mine * token * (U - 1) / U, mine * token * (U - 1) / U
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
    """The possible layouts of `size` ranks. Raises InvalidRequest if there is none, with the nearest number of ranks
    that has one."""
    tokens = work.grid[1] * work.grid[2]
    for n in range(size, 0, -1):
        found = [one for one in every(n, work.heads, work.guided) if one.sequence <= tokens]
        if found and n == size:
            return found
        if found:
            raise InvalidRequest(f"parallel={size}: {tokens} tokens a frame are too few; the nearest is parallel={n}")
    raise AssertionError("one rank can do anything")


def best(size: int, work: Work, device: Device, link: Link, far: Link | None = None, per_host: int = 8) -> Prediction:
    """The fastest layout of `size` ranks. Raises InvalidRequest if there is none."""
    return ranked(candidates(size, work), work, device, link, far, per_host)[0]


def ranked(
    layouts: Iterable[Layout], work: Work, device: Device, link: Link, far: Link | None = None, per_host: int = 8
) -> list[Prediction]:
    """Predict a step in each layout, the fastest first; ties keep the order that is given."""
    predicted = [predict(work, one, device, link, far, per_host) for one in layouts]
    return sorted(predicted, key=lambda one: one.seconds)


def curve(
    work: Work, device: Device, link: Link, far: Link | None = None, per_host: int = 8, most: int = 64
) -> Iterable[Prediction]:
    """The fastest layout of 1, 2, 4 ... ranks, up to `most`."""
    size = 1
    while size <= most:
        yield best(size, work, device, link, far, per_host)
        size *= 2
