"""Ranks that work on one video: how they share it out, and how tensors get from one to another. Nothing at size one.

A rank is a process with a device. `Layout` says what ranks are for: which half of guidance they compute, and which part
of a video's tokens they hold (guidance x ring x Ulysses, counted with Ulysses fastest). What is moved goes from rank to
rank, each message of its own: what a collective would do is the messages of all ranks together. So parts may be of
different lengths, ranks with nothing to say are left out, no sum depends on an order of arrival, and any group of ranks
can exchange without a communicator of its own. Every rank makes the same exchanges in the same order, from one thread
at a time.

Imports nothing of fastvid: torch.distributed alone (NCCL between GPUs, gloo between CPUs, and between GPUs through host
memory where NCCL cannot be had, as with two ranks on one GPU).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

FOREVER = timedelta(days=7)  # hangs are seen by heartbeats, not by a limit on how long a message may take


def shares(count: int, ranks: int) -> tuple[int, ...]:
    """`count` things over so many ranks, as evenly as they go: the first ones have one more."""
    each, more = divmod(count, ranks)
    return tuple(each + (rank < more) for rank in range(ranks))


def starts(sizes: Sequence[int]) -> tuple[int, ...]:
    """Where each share begins, and where the last one ends."""
    ends = [0]
    for size in sizes:
        ends.append(ends[-1] + size)
    return tuple(ends)


@dataclass(frozen=True)
class Layout:
    """How ranks share a video: guidance (1, or 2: each half makes one of the two velocities) x ring x ulysses.

    ulysses: ranks that exchange tokens for heads (arXiv 2309.14509), a divisor of the number of heads. ring: groups of
    such ranks whose keys and values go around (arXiv 2310.01889).
    """

    guidance: int = 1
    ring: int = 1
    ulysses: int = 1

    @property
    def size(self) -> int:
        """All ranks."""
        return self.guidance * self.ring * self.ulysses

    @property
    def sequence(self) -> int:
        """Ranks that share the tokens."""
        return self.ring * self.ulysses

    def __str__(self) -> str:
        return f"guidance={self.guidance},ring={self.ring},ulysses={self.ulysses}"


class Pending:
    """Messages on their way. What is sent is kept alive, and must not be written to, until `wait`."""

    def __init__(
        self, works: Iterable[Any], kept: Iterable[Tensor], copies: Iterable[tuple[Tensor, Tensor]] = ()
    ) -> None:
        self._works, self._kept, self._copies = list(works), list(kept), list(copies)

    def wait(self) -> None:
        """What was to be received is there: on a GPU for what the current stream does next, on a CPU now."""
        for work in self._works:
            work.wait()
        for to, staged in self._copies:
            to.copy_(staged, non_blocking=False)
        self._works, self._kept, self._copies = [], [], []


@dataclass
class Counted:
    """What this rank has sent to others, in bytes and messages."""

    bytes: int = 0
    messages: int = 0


@dataclass(frozen=True)
class Mesh:
    """The ranks of a job, seen from one of them. The default is a job of one rank, which exchanges nothing.

    group: their process group; None at size one. device: where this rank's tensors are. staged: tensors of a GPU go
    through host memory, since the group (gloo) takes those of a CPU alone. per_host: ranks on each host, None if all
    are on one. counted: what this rank has sent.
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
        """That of an initialised process group of torch.distributed; None: of the default one."""
        group = dist.group.WORLD if group is None else group
        device = torch.device(device)
        staged = device.type != "cpu" and dist.get_backend(group) == "gloo"
        return cls(dist.get_rank(group), dist.get_world_size(group), group, device, staged)

    def exchange(self, sends: Iterable[tuple[int, Tensor]], receives: Iterable[tuple[int, Tensor]]) -> Pending:
        """Starts sending tensors to ranks and receiving into others: (rank, contiguous tensor).

        Between two ranks messages arrive in the order in which both list them, over all exchanges. Empty tensors are
        left out on both sides. A message to itself is a copy.
        """
        sends = [(to, x) for to, x in sends if x.numel()]
        receives = [(source, x) for source, x in receives if x.numel()]
        own = [x for to, x in sends if to == self.rank], [x for source, x in receives if source == self.rank]
        for x, into in zip(*own, strict=True):
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
                assert x.is_contiguous()  # a copy would be received into, and lost
                into = torch.empty_like(x, device="cpu") if self.staged else x
                copies += [(x, into)] if self.staged else []
                kept.append(into)
                operations.append(dist.P2POp(dist.irecv, into, group=self.group, group_peer=source))
        return Pending(dist.batch_isend_irecv(operations) if operations else (), kept, copies)

    def gather(self, x: Tensor, sizes: Sequence[int], dim: int, ranks: Sequence[int] | None = None) -> Tensor:
        """The parts of these ranks (None: of all), which are x here, one after the other along a dimension.

        sizes: the length of each rank's part along it; other lengths are the same everywhere. This rank is one of them.
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
        """The tensor x of the rank `source`, on all ranks; others give no x. Shape and type travel with it. device: on
        which a rank wants it, if not on its own."""
        if self.size == 1:
            assert x is not None
            return x
        hosts = replace(self, staged=False) if self.staged else self  # a header that is on the host already
        device = self.device if device is None else torch.device(device)
        where = torch.device("cpu") if self.staged else device
        others = [rank for rank in range(self.size) if rank != source]
        if self.rank == source:
            header = _header(x).to(where)
            hosts.exchange([(rank, header) for rank in others], []).wait()
            self.exchange([(rank, x) for rank in others], []).wait()
            return x
        header = torch.empty(HEADER, dtype=torch.int64, device=where)
        hosts.exchange([], [(source, header)]).wait()
        kind, ndim, *shape = header.tolist()
        made = torch.empty(shape[:ndim], dtype=DTYPES[kind], device=device)
        self.exchange([], [(source, made)]).wait()
        return made


HEADER = 10  # a type, the number of dimensions, and at most eight of them
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
    """A rank's place in a layout: which half of guidance it is of, and where it is in ring and Ulysses group."""

    mesh: Mesh
    layout: Layout

    def __post_init__(self) -> None:
        assert self.layout.size == self.mesh.size, (self.layout, self.mesh.size)

    @property
    def guidance(self) -> int:
        return self.mesh.rank // self.layout.sequence

    @property
    def sequence(self) -> int:
        """Which of the ranks that share the tokens."""
        return self.mesh.rank % self.layout.sequence

    @property
    def ring(self) -> int:
        return self.sequence // self.layout.ulysses

    @property
    def ulysses(self) -> int:
        return self.sequence % self.layout.ulysses

    def rank(self, *, guidance: int | None = None, ring: int | None = None, ulysses: int | None = None) -> int:
        """The rank at a place: this one's, but for what is given."""
        at = [
            mine if given is None else given
            for given, mine in ((guidance, self.guidance), (ring, self.ring), (ulysses, self.ulysses))
        ]
        return (at[0] * self.layout.ring + at[1]) * self.layout.ulysses + at[2]

    def both(
        self, cond: Callable[[], Tensor], uncond: Callable[[], Tensor] | None, like: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The two velocities of guidance, or the first alone, on all ranks: with guidance=2 each half of the ranks
        makes one and gives it to the other. They are as `like` is."""
        if self.layout.guidance == 1:
            return cond(), None if uncond is None else uncond()
        partner, first = self.rank(guidance=1 - self.guidance), self.guidance == 0
        makes = cond if first else uncond
        mine = makes().contiguous() if makes is not None else None
        other = (
            torch.empty_like(like, memory_format=torch.contiguous_format) if uncond is not None or not first else None
        )
        sends = [] if mine is None else [(partner, mine)]
        self.mesh.exchange(sends, [] if other is None else [(partner, other)]).wait()
        return (mine, other) if first else (other, mine)

    @property
    def sharers(self) -> tuple[int, ...]:
        """The ranks that share the tokens with this one, itself among them, in the order of their shares."""
        first = self.guidance * self.layout.sequence
        return tuple(range(first, first + self.layout.sequence))


def choose(size: int, heads: int, guided: bool, per_host: int | None = None) -> Layout:
    """The layout of so many ranks for a model with so many heads, if nothing is known of how long each would take.

    Both velocities of guidance at once where there are two and the ranks are even: it exchanges next to nothing. The
    rest is Ulysses as far as heads can be divided, and no further than a host goes (its exchanges all meet at once, the
    ring's follow each other and hide behind attention), then ring. per_host: ranks of a host, None if all are on one.
    """
    guidance = 2 if guided and size % 2 == 0 else 1
    sequence = size // guidance
    local = sequence if per_host is None or per_host >= sequence else math.gcd(per_host, sequence)
    ulysses = math.gcd(heads, local)
    return Layout(guidance, sequence // ulysses, ulysses)
