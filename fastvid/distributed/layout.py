"""Parses `parallel=` and lists the possible layouts of a request.

Impossible layouts are refused; the error names the nearest possible one. `agree` makes ranks use the same values for
all decisions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from fastvid.checks import entries, guarded, refuse, whole
from fastvid.distributed.mesh import Layout, Mesh
from fastvid.errors import InvalidRequest

AUTO = "auto"
MOST = 1024  # ranks
GROUPS = 2  # of heads: attention of one group overlaps with the exchange of the next
NAMES = tuple(field.name for field in fields(Layout))
ALLOWED = f"'auto', a number of ranks, or degrees such as 'ulysses=4,ring=2' ({', '.join(NAMES)})"
_RANKS = whole(1, MOST, " (or 'auto', or degrees such as 'ulysses=4,ring=2')")


@dataclass(frozen=True)
class Parallelism:
    """A parsed `parallel=`. ranks: None for one per device. layout: None to choose one for each request."""

    ranks: int | None = None
    layout: Layout | None = None


def parse_parallel(parallel: Any) -> Parallelism:
    """Parse `parallel=` of `fastvid.load`: "auto", a number, "ulysses=4,ring=2", {"ulysses": 4} or a Layout.

    Raises InvalidRequest.
    """
    if isinstance(parallel, Layout):
        degrees = {name: getattr(parallel, name) for name in NAMES}
    elif isinstance(parallel, Mapping):
        degrees = dict(entries("parallel", parallel, ALLOWED, len(NAMES)))
    elif isinstance(parallel, str) and "=" in parallel:
        pairs = [part.partition("=") for part in re.split(r"[,x ]+", parallel.strip()) if part]
        degrees = {name.strip(): _number(value) for name, _, value in pairs}
        if len(degrees) < len(pairs):
            refuse("parallel", parallel, f"{ALLOWED}, each once")
    elif parallel is None or isinstance(parallel, str) and parallel == AUTO:
        return Parallelism()
    else:
        return Parallelism(_degree("parallel", _number(parallel)))
    for name in degrees:
        if name not in NAMES:
            refuse("parallel", name, ALLOWED)
    layout = Layout(**{name: _degree(f"parallel: {name}", value) for name, value in degrees.items()})
    if layout.guidance > 2:
        raise InvalidRequest(f"parallel: guidance={layout.guidance}; there are two velocities, so the nearest is 2")
    if layout.size > MOST:
        raise InvalidRequest(
            f"parallel: {layout} is {layout.size} ranks; allowed is 1 to {MOST}, the nearest is {MOST}"
        )
    return Parallelism(layout.size, layout)


def _number(value: Any) -> Any:
    """A number for text of digits; all else stays as it is."""
    return int(value) if isinstance(value, str) and value.strip().isdecimal() and len(value) < 20 else value


def _degree(name: str, value: Any) -> int:
    return refuse(name, value, ALLOWED) if isinstance(value, str) else _RANKS(name, value)


@guarded(ALLOWED)
def check_parallel(name: str, parallel: Any) -> int | str:
    """`parallel=` as a number, degrees or "auto". Raises InvalidRequest."""
    asked = parse_parallel(parallel)
    return AUTO if asked.ranks is None else asked.ranks if asked.layout is None else str(asked.layout)


def layouts_for(
    asked: Layout | None, size: int, heads: int, tokens: int, guided: bool, per_host: int | None = None
) -> list[Layout]:
    """The layouts in which `size` ranks can share a request: only `asked`, or all with the default one first.

    heads: of the model. tokens: in a latent frame. guided: with guidance. per_host: ranks per host, None for a single
    host. Raises InvalidRequest for an impossible layout, naming the nearest possible one.
    """
    possible = [layout for layout in every(size, heads, guided) if layout.sequence <= tokens]
    if asked is None:
        default = default_layout(size, heads, guided, per_host)
        if possible:
            return sorted(possible, key=lambda one: (one != default, -one.guidance, -one.ulysses))
        fewer = _fewer_ranks(size, heads, tokens, guided)
        raise InvalidRequest(
            f"parallel={size}: a latent frame has {tokens} tokens here, which is less than the ranks that would share "
            f"them; the nearest is parallel={fewer}"
        )
    if asked.size != size:
        raise InvalidRequest(f"parallel: {asked} is a layout of {asked.size} ranks, and there are {size}")
    if asked in possible:
        return [asked]
    reasons = {
        f"ulysses={asked.ulysses} does not divide the {heads} heads": heads % asked.ulysses != 0,
        "guidance=2 needs a request with guidance": asked.guidance == 2 and not guided,
        f"a latent frame has {tokens} tokens for {asked.sequence} ranks": asked.sequence > tokens,
    }
    why = "; ".join(reason for reason, holds in reasons.items() if holds)
    near = min(possible, key=lambda layout: _distance(layout, asked), default=None)
    nearest = near or f"parallel={_fewer_ranks(size, heads, tokens, guided)}"
    raise InvalidRequest(f"parallel: {asked} cannot be: {why}; the nearest is {nearest}")


def every(size: int, heads: int, guided: bool) -> list[Layout]:
    """All layouts of `size` ranks for a model with `heads` heads."""
    divisors = [n for n in range(1, size + 1) if size % n == 0]
    return [
        Layout(guidance, size // guidance // ulysses, ulysses)
        for guidance in ((1, 2) if guided else (1,))
        for ulysses in divisors
        if size % guidance == 0 and size // guidance % ulysses == 0 and heads % ulysses == 0
    ]


def default_layout(size: int, heads: int, guided: bool, per_host: int | None = None) -> Layout:
    """The layout of `size` ranks if no times are predicted.

    First splits guidance, if there is any and `size` is even: it exchanges almost nothing. Then Ulysses as far as it
    divides the heads, within a host, since it exchanges everything at once. The rest is ring, whose exchanges are
    spread out and overlap with attention. per_host: ranks per host, None for a single host.
    """
    guidance = 2 if guided and size % 2 == 0 else 1
    sequence = size // guidance
    local = sequence if per_host is None or per_host >= sequence else math.gcd(per_host, sequence)
    ulysses = math.gcd(heads, local)
    return Layout(guidance, sequence // ulysses, ulysses)


def _fewer_ranks(size: int, heads: int, tokens: int, guided: bool) -> int:
    """The largest number of ranks below `size` that can share `tokens` tokens."""
    counts = range(size - 1, 0, -1)
    return next(n for n in counts if any(one.sequence <= tokens for one in every(n, heads, guided)))


def _distance(layout: Layout, asked: Layout) -> int:
    return sum(abs(getattr(layout, name) - getattr(asked, name)) for name in NAMES)


def agree(mesh: Mesh, value: int, how: Callable[[list[int]], int] = min) -> int:
    """Reduce a number of each rank to one that all ranks use; by default the minimum."""
    if mesh.group is None:  # a single rank, or a plan for ranks that do not run
        return value
    own_value = torch.tensor([value], dtype=torch.int64, device=mesh.device)
    return how(mesh.gather(own_value, (1,) * mesh.size, 0).tolist())


def first(values: list[int]) -> int:
    """Rank 0's value, for `agree`."""
    return values[0]
