"""Ranks that generate one video together: how they share it, and how they exchange tensors.

A rank is a process with a device. `Layout` assigns each rank a part of guidance and a part of the tokens. All exchanges
are point-to-point messages. So parts may differ in length, ranks without data are skipped, no sum depends on the order
of arrival, and any subset of ranks can exchange without its own communicator. All ranks must make the same exchanges in
the same order, from one thread at a time. A single rank exchanges nothing.

Uses torch.distributed: NCCL between GPUs, gloo between CPUs, and gloo through host memory between GPUs if NCCL does not
work, as with two ranks on one GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

FOREVER = timedelta(days=7)  # heartbeats detect hangs, so messages need no timeout


def shares(count: int, ranks: int) -> tuple[int, ...]:
    """Split `count` items as evenly as possible; the first ranks get one more."""
    each, more = divmod(count, ranks)
    return tuple(each + (rank < more) for rank in range(ranks))


def starts(sizes: Sequence[int]) -> tuple[int, ...]:
    """The start of each share, and the end of the last one."""
    return (0, *accumulate(sizes))


@dataclass(frozen=True)
class Layout:
    """How ranks share a video: guidance x ring x ulysses, numbered with ulysses fastest.

    guidance: 1, or 2 if each half of the ranks computes one of the two velocities. ulysses: ranks that exchange tokens
    for heads (arXiv 2309.14509); must divide the number of heads. ring: number of Ulysses groups that pass keys and
    values around (arXiv 2310.01889).
    """

    guidance: int = 1
    ring: int = 1
    ulysses: int = 1

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self.guidance * self.ring * self.ulysses

    @property
    def sequence(self) -> int:
        """Ranks that share the tokens."""
        return self.ring * self.ulysses

    def __str__(self) -> str:
        return f"guidance={self.guidance},ring={self.ring},ulysses={self.ulysses}"


class Pending:
    """Messages in flight. Keeps sent tensors alive; they must not be modified before `wait`."""

    def __init__(
        self, works: Iterable[Any], kept: Iterable[Tensor], copies: Iterable[tuple[Tensor, Tensor]] = ()
    ) -> None:
        self._works, self._kept, self._copies = list(works), list(kept), list(copies)

    def wait(self) -> None:
        """Wait for the messages: on a GPU the current stream waits, on a CPU the calling thread."""
        for work in self._works:
            work.wait()
        for to, staged in self._copies:
            to.copy_(staged)
        self._works, self._kept, self._copies = [], [], []


@dataclass
class Counted:
    """Traffic that this rank has sent to others."""

    bytes: int = 0
    messages: int = 0


@dataclass(frozen=True)
class Mesh:
    """The ranks of a job, from the view of one of them. The default is a job with a single rank.

    group: their process group; None for one rank. device: of this rank's tensors. staged: GPU tensors go through host
    memory, since gloo supports only CPU tensors. per_host: ranks per host, None for a single host. counted: traffic
    that this rank has sent.
    """

    rank: int = 0
    size: int = 1
    group: Any = None
    device: torch.device = torch.device("cpu")
    staged: bool = False
    per_host: int | None = None
    counted: Counted = field(default_factory=Counted)

    @classmethod
    def of_group(cls, group: Any = None, device: torch.device | str = "cpu") -> Mesh:
        """The mesh of an initialized process group of torch.distributed; None: the default group."""
        group = dist.group.WORLD if group is None else group
        device = torch.device(device)
        staged = device.type != "cpu" and dist.get_backend(group) == "gloo"
        return cls(dist.get_rank(group), dist.get_world_size(group), group, device, staged)

    def exchange(self, sends: Iterable[tuple[int, Tensor]], receives: Iterable[tuple[int, Tensor]]) -> Pending:
        """Start sending tensors and receiving into others. Both lists hold (rank, contiguous tensor).

        Any two ranks must list the messages between them in the same order. Empty tensors are skipped on both sides. A
        message to the rank itself is a copy.
        """
        sends = [(to, x) for to, x in sends if x.numel()]
        receives = [(source, x) for source, x in receives if x.numel()]
        self_messages = [x for to, x in sends if to == self.rank], [x for source, x in receives if source == self.rank]
        for x, into in zip(*self_messages, strict=True):
            into.copy_(x)
        operations, kept, copies = [], [], []
        for to, x in sends:
            if to != self.rank:
                x = x.contiguous()
                self.counted.bytes += x.nbytes
                self.counted.messages += 1
                x = x.cpu() if self.staged else x
                kept.append(x)
                operations.append(dist.P2POp(dist.isend, x, group=self.group, group_peer=to))
        for source, x in receives:
            if source != self.rank:
                assert x.is_contiguous()  # otherwise data would be received into a temporary copy
                into = torch.empty_like(x, device="cpu") if self.staged else x
                copies += [(x, into)] if self.staged else []
                kept.append(into)
                operations.append(dist.P2POp(dist.irecv, into, group=self.group, group_peer=source))
        return Pending(dist.batch_isend_irecv(operations) if operations else (), kept, copies)

    def gather(self, x: Tensor, sizes: Sequence[int], dim: int, ranks: Sequence[int] | None = None) -> Tensor:
        """Concatenate the parts of `ranks` (None: all) along a dimension. x: this rank's part.

        sizes: the length of each rank's part along that dimension; all other dimensions must be equal. `ranks` must
        include this rank.
        """
        ranks = range(self.size) if ranks is None else ranks
        assert x.shape[dim] == sizes[list(ranks).index(self.rank)], (x.shape, dim, sizes)
        x = x.contiguous()
        shapes = [(*x.shape[:dim], size, *x.shape[dim + 1 :]) for size in sizes]
        parts = [x if rank == self.rank else x.new_empty(shape) for rank, shape in zip(ranks, shapes, strict=True)]
        others = [(rank, part) for rank, part in zip(ranks, parts, strict=True) if rank != self.rank]
        self.exchange([(rank, x) for rank, _ in others], others).wait()
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)

    def broadcast(self, x: Tensor | None = None, source: int = 0, device: torch.device | str | None = None) -> Tensor:
        """Send the tensor x of the rank `source` to all ranks, and return it. Other ranks pass no x; they receive its
        shape and dtype. device: where this rank receives it, by default its own device."""
        if self.size == 1:
            assert x is not None
            return x
        hosts = replace(self, staged=False) if self.staged else self  # the header is already in host memory
        device = self.device if device is None else torch.device(device)
        header_device = torch.device("cpu") if self.staged else device
        others = [rank for rank in range(self.size) if rank != source]
        if self.rank == source:
            assert x is not None
            header = _header(x).to(header_device)
            hosts.exchange([(rank, header) for rank in others], []).wait()
            self.exchange([(rank, x) for rank in others], []).wait()
            return x
        header = torch.empty(HEADER, dtype=torch.int64, device=header_device)
        hosts.exchange([], [(source, header)]).wait()
        kind, ndim, *shape = header.tolist()
        received = torch.empty(shape[:ndim], dtype=DTYPES[kind], device=device)
        self.exchange([], [(source, received)]).wait()
        return received


HEADER = 10  # dtype, number of dimensions, and up to eight dimensions
DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.uint8,
    torch.int64,
    torch.int32,
    torch.bool,
)


def _header(x: Tensor) -> Tensor:
    assert x.ndim <= HEADER - 2
    shape = [*x.shape, *[0] * (HEADER - 2 - x.ndim)]
    return torch.tensor([DTYPES.index(x.dtype), x.ndim, *shape], dtype=torch.int64)


@dataclass(frozen=True)
class RankView:
    """A rank's coordinates in a layout: its half of guidance, its position in the ring and in its Ulysses group."""

    mesh: Mesh
    layout: Layout

    def __post_init__(self) -> None:
        assert self.layout.size == self.mesh.size, (self.layout, self.mesh.size)

    @property
    def guidance(self) -> int:
        return self.mesh.rank // self.layout.sequence

    @property
    def sequence(self) -> int:
        """This rank's index among those that share the tokens."""
        return self.mesh.rank % self.layout.sequence

    @property
    def ring(self) -> int:
        return self.sequence // self.layout.ulysses

    @property
    def ulysses(self) -> int:
        return self.sequence % self.layout.ulysses

    def rank(self, *, guidance: int | None = None, ring: int | None = None, ulysses: int | None = None) -> int:
        """The rank with these coordinates. Omitted ones are this rank's."""
        guidance = self.guidance if guidance is None else guidance
        ring = self.ring if ring is None else ring
        ulysses = self.ulysses if ulysses is None else ulysses
        return (guidance * self.layout.ring + ring) * self.layout.ulysses + ulysses

    def both(
        self, cond: Callable[[], Tensor], uncond: Callable[[], Tensor] | None, like: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The two velocities of guidance (or only the first, if uncond is None) on all ranks. With guidance=2 each half
        of the ranks computes one and sends it to the other half. like: a tensor with their shape and dtype."""
        if self.layout.guidance == 1:
            return cond(), None if uncond is None else uncond()
        partner, first = self.rank(guidance=1 - self.guidance), self.guidance == 0
        compute = cond if first else uncond
        computed = compute().contiguous() if compute is not None else None
        other = (
            torch.empty_like(like, memory_format=torch.contiguous_format) if uncond is not None or not first else None
        )
        sends = [] if computed is None else [(partner, computed)]
        self.mesh.exchange(sends, [] if other is None else [(partner, other)]).wait()
        velocity, unguided = (computed, other) if first else (other, computed)
        assert velocity is not None
        return velocity, unguided

    @property
    def sharers(self) -> tuple[int, ...]:
        """The ranks that share the tokens with this one, including itself, in the order of their shares."""
        first = self.guidance * self.layout.sequence
        return tuple(range(first, first + self.layout.sequence))
