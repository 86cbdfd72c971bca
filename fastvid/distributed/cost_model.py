"""What a denoising step takes on many GPUs, predicted from measured parts: how fast a GPU multiplies
and attends, how fast its links are. It chooses layouts, and says what a number of GPUs is worth.

For each rank: linear layers on its own tokens; attention of its ring block's tokens to all, for its share of the heads;
what norms, rotations, residuals and a ring's merging move through memory; what it sends (docs/parallel.md has the
formulas). Of what is sent, that counts which nothing hides: the first group of heads on its way out and the last one on
its way back, and of a ring's steps what takes longer than the attention beside it. A layer takes no less than starting
its kernels does. Ranks with one token a frame more than others set the pace.

Units: seconds, bytes, floating point operations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from fastvid.distributed.layout import GROUPS, every
from fastvid.distributed.mesh import Layout, shares
from fastvid.errors import InvalidRequest
from fastvid.models.wan.config import WanTransformerConfig

VELOCITY_BYTES = 4  # velocities are exchanged in fp32
PASSES = 24  # values a token and channel that a layer reads or writes beside its products and attention, fused
KERNELS = 14  # that a layer starts
MERGED, MERGING = 16, 6  # bytes a value, and kernels, of merging one more block of a ring (in fp32)


@dataclass(frozen=True)
class Link:
    """How ranks are connected. bandwidth: bytes a second that one rank sends while all do; latency: seconds of an
    exchange beside that."""

    name: str
    bandwidth: float
    latency: float

    def seconds(self, sent: float) -> float:
        """Of an exchange in which each rank sends so many bytes; of none where there is nothing to send."""
        return self.latency + sent / self.bandwidth if sent > 0 else 0.0


# What vendors state for one direction, of which 75 % are assumed to be had (all-to-all of large messages); latencies
# are assumed too. Sources: NVIDIA H200 data sheet (NVLink, 900 GB/s both ways), PCI Express 5.0 x16, InfiniBand NDR
# (400 Gb/s).
HAD = 0.75
NVLINK = Link("NVLink 4", 450e9 * HAD, 15e-6)
PCIE = Link("PCIe 5 x16", 63e9 * HAD, 25e-6)
INFINIBAND = Link("InfiniBand NDR", 50e9 * HAD, 30e-6)
# Between two processes with a core each, measured: benchmarks/results/scaling-cpu-amd-epyc.json.
LOOPBACK = Link("gloo over loopback", 8.62e08, 2.4e-04)
LINKS = {"nvlink": NVLINK, "pcie": PCIE, "infiniband": INFINIBAND, "loopback": LOOPBACK}  # fastest first


@dataclass(frozen=True)
class Device:
    """Floating point operations a second that a rank does in linear layers and in attention; bytes a second that it
    moves in its memory; seconds from one kernel's start to the next one's, at least."""

    name: str
    linear: float
    attention: float
    memory: float = math.inf
    launch: float = 0.0


# By the project's targets for an H200: linear layers reach 85 % of the 790 TFLOP/s of dense bf16 that one is known to
# do, attention cuDNN's 595; memory 85 % of 4.3 TB/s; 5 us from one kernel to the next is assumed.
H200 = Device("H200", 0.85 * 790e12, 595e12, 0.85 * 4.3e12, 5e-6)
# Of a process with a core, two of them at work, in fp32; measured with LOOPBACK.
CORE = Device("a core of an AMD EPYC", 1.017e11, 7.48e10, 7.9e10)


@dataclass(frozen=True)
class Work:
    """A step: a model, a grid (t, h, w) of tokens, guidance or not, rows of text, bytes of a value inside the model."""

    config: WanTransformerConfig
    grid: tuple[int, int, int]
    guided: bool
    text_rows: int = 512
    itemsize: int = 2

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)


@dataclass(frozen=True)
class Prediction:
    """Of one step. seconds in all; linear, attention: of these; other: norms, merging, waiting for kernels to start;
    exposed: of exchanges that nothing hides; sent: bytes that the rank with the most sends. efficiency: the time of one
    rank, over ranks times this."""

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
    """A step in a layout. link: between the ranks of a host; far: between hosts of per_host ranks, None: the same."""
    made = _step(work, layout, device, link, far or link, per_host)
    alone = made if layout.size == 1 else _step(work, Layout(), device, link, link, per_host)
    *parts, sent = made
    whole = sum(parts)
    return Prediction(layout, whole, *parts, sent, sum(alone[:-1]) / layout.size / whole)


def _step(
    work: Work, layout: Layout, device: Device, link: Link, far: Link, per_host: int
) -> tuple[float, float, float, float, float]:
    """Seconds of linear layers, of attention, of all else that a rank does, and of exchanges that nothing hides; bytes
    sent."""
    config, (t, h, w) = work.config, work.grid
    d, f, layers, U, R = config.dim, config.ffn_dim, config.num_layers, layout.ulysses, layout.ring
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
    near, around = (link if _together(count, layout.size, per_host) else far for count in (U, layout.sequence))
    exposed, sent = _exchanges(layout, mine, block, d * work.itemsize, attention, near, around)
    calls = 2 if work.guided and layout.guidance == 1 else 1
    each = config.out_channels * math.prod(config.patch_size) * VELOCITY_BYTES
    leaving, apart = mine * each * (layout.sequence - 1), (work.tokens * each if layout.guidance == 2 else 0)
    ends = calls * around.seconds(leaving) + (link if layout.size <= per_host else far).seconds(apart)
    many = calls * layers
    return (
        many * linear,
        many * (attention + cross),
        many * other,
        many * exposed + ends,
        many * sent + calls * leaving + apart,
    )


def _together(count: int, size: int, per_host: int) -> bool:
    """Whether groups of so many ranks, one group after the other, are all on one host each."""
    return size <= per_host or per_host % count == 0


def _exchanges(
    layout: Layout, mine: int, block: int, token: int, attention: float, near: Link, around: Link
) -> tuple[float, float]:
    """Of one layer: seconds of exchanges that attention does not hide, and bytes that a rank sends."""
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
    """The layouts of so many ranks that this work can have. Raises InvalidRequest if there is none, with the nearest
    number of ranks that has one."""
    tokens = work.grid[1] * work.grid[2]
    for n in range(size, 0, -1):
        found = [one for one in every(n, work.config.num_attention_heads, work.guided) if one.sequence <= tokens]
        if found and n == size:
            return found
        if found:
            raise InvalidRequest(f"parallel={size}: {tokens} tokens a frame are too few; the nearest is parallel={n}")
    raise AssertionError("one rank can do anything")


def best(size: int, work: Work, device: Device, link: Link, far: Link | None = None, per_host: int = 8) -> Prediction:
    """The fastest layout of so many ranks. Raises InvalidRequest if there is none."""
    return ranked(candidates(size, work), work, device, link, far, per_host)[0]


def ranked(
    layouts: Iterable[Layout], work: Work, device: Device, link: Link, far: Link | None = None, per_host: int = 8
) -> list[Prediction]:
    """A step in each of these layouts, the fastest first; of those that take as long, in the order they are given."""
    made = [predict(work, one, device, link, far, per_host) for one in layouts]
    return sorted(made, key=lambda one: one.seconds)


def curve(
    work: Work, device: Device, link: Link, far: Link | None = None, per_host: int = 8, most: int = 64
) -> Iterable[Prediction]:
    """The fastest layout of 1, 2, 4 ... ranks."""
    size = 1
    while size <= most:
        yield best(size, work, device, link, far, per_host)
        size *= 2
