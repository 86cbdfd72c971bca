"""Step caches: calls of the transformer that reuse what the blocks made in an earlier step (see `step_methods` for when
and how). A cache belongs to one segment of one request. Each expert and prompt has a branch of its own; all are
forgotten where another window begins, and those of an expert where another takes over. Calls that fill a KV cache
always run all blocks.

Ranks that share the tokens add up what a decision depends on, in the order of their shares, and so decide alike.

Shapes: B batch, N tokens (of this rank), d width.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastvid.distributed.mesh import RankView
from fastvid.engine.step_methods import Branch, Method
from fastvid.layers.residual import Stream
from fastvid.sampling.noise_table import TableRow

log = logging.getLogger("fastvid.engine")

NEGATIVE = -1  # the number of the negative prompt (see `engine.conditioning`)
Key = tuple[int, int]  # expert, and prompt's number
FIRST = "now"  # what the first block has added in the current call; not kept


@dataclass
class Count:
    """Calls of the transformer that ran all blocks, and that did not."""

    computed: int = 0
    reused: int = 0


@dataclass
class StepCache:
    """The branches of a segment. step: the number of the current row in its window, from 0; window: its columns."""

    method: Method
    ranks: RankView
    branches: dict[Key, Branch] = field(default_factory=dict)
    step: int = -1
    window: tuple[int, int] = (-1, -1)
    count: Count = field(default_factory=Count)
    _row: TableRow | None = None

    def of_call(self, row: TableRow, expert: int, prompt: int) -> CachedCall | None:
        """The blocks of one call; None where it runs all of them and nothing is kept."""
        if row.write_cache:
            return None
        if row is not self._row:
            self._begin(row)
        self.branches = {key: branch for key, branch in self.branches.items() if key[0] == expert}
        branch = self.branches.setdefault((expert, prompt), Branch(prompt == NEGATIVE))
        return CachedCall(self, branch)

    def _begin(self, row: TableRow) -> None:
        window = row.start, row.stop
        if window != self.window:
            self.branches, self.step = {}, -1
        self.step, self.window, self._row = self.step + 1, window, row

    def agree(self, sums: Tensor) -> list[float]:
        """Sums [k] over this rank's tokens -> over those of all ranks that share them, on the host."""
        count, ranks = len(sums), self.ranks.sharers
        if len(ranks) == 1:
            return [float(one) for one in sums.tolist()]
        parts = self.ranks.mesh.gather(sums, [count] * len(ranks), 0, ranks).tolist()
        return [math.fsum(parts[index::count]) for index in range(count)]

    # ------------------------------------------------------------ checkpoints

    def saved(self) -> dict[str, Tensor]:
        """All that is kept, as named tensors."""
        named = {"step": torch.tensor(self.step), "window": torch.tensor(self.window)}
        for (expert, prompt), branch in self.branches.items():
            name = f"{expert}.{prompt}"
            named[f"{name}.last"] = torch.tensor(branch.last)
            named[f"{name}.error"] = torch.tensor(branch.error, dtype=torch.float64)
            named |= {f"{name}.{key}": one for key, one in branch.tensors.items() if key != FIRST}
        return named

    def restore(self, named: Mapping[str, Tensor], device: torch.device) -> None:
        """What `saved` returned and `fits` has checked."""
        self.step, self.window, self._row = int(named["step"]), (int(named["window"][0]), int(named["window"][1])), None
        self.branches = {}
        for name, one in named.items():
            if (key := _key_of(name)) is None:
                continue
            branch = self.branches.setdefault(key, Branch(key[1] == NEGATIVE))
            entry = name.split(".")[2]
            if entry == "last":
                branch.last = int(one)
            elif entry == "error":
                branch.error = float(one)
            else:
                branch.tensors[entry] = one.to(device)

    def fits(self, named: Mapping[str, Tensor], rows: int, window: tuple[int, int], like: Tensor) -> bool:
        """Whether this is what such a cache has kept after so many rows of a window. like: the most tokens of a call
        [1, N, d], of their dtype, without values."""
        step, place = named.get("step"), named.get("window")
        if not _is_whole(step, []) or not _is_whole(place, [2]) or len(named) > 2 + MOST_BRANCHES * MOST_ENTRIES:
            return False
        assert step is not None and place is not None
        if int(step) != rows - 1 or tuple(place.tolist()) != window:
            return False
        branches: dict[Key, dict[str, Tensor]] = {}
        for name in named.keys() - {"step", "window"}:
            if (key := _key_of(name)) is None:
                return False
            branches.setdefault(key, {})[name.split(".")[2]] = named[name]
        return all(self._fits(branch, rows, like) for branch in branches.values())

    def _fits(self, entries: Mapping[str, Tensor], rows: int, like: Tensor) -> bool:
        last, error = entries.get("last"), entries.get("error")
        if not _is_whole(last, []) or error is None or error.dtype != torch.float64 or error.ndim:
            return False
        assert last is not None
        tensors = {name: one for name, one in entries.items() if name not in ("last", "error", "sums")}
        sums = entries.get("sums")
        if sums is not None and (sums.shape != (3,) or sums.dtype != torch.float32 or not bool(sums.isfinite().all())):
            return False
        if not -1 <= int(last) < rows or not float(error) >= 0 or not set(tensors) <= set(self.method.names):
            return False
        one = next(iter(tensors.values()), like)
        fits = one.ndim == 3 and one.shape[0] > 0 and one.shape[1] <= like.shape[1]
        fits = fits and one.shape[2] == like.shape[2] and one.dtype == like.dtype
        same = all(other.shape == one.shape and other.dtype == one.dtype for other in tensors.values())
        return fits and same and all(bool(other.isfinite().all()) for other in tensors.values())


MOST_BRANCHES, MOST_ENTRIES = 3, 8


def _is_whole(one: Tensor | None, shape: list[int]) -> bool:
    return one is not None and one.dtype == torch.int64 and list(one.shape) == shape


def _key_of(name: str) -> Key | None:
    """(expert, prompt) of a tensor's name; None if it is no branch's."""
    expert, _, rest = name.partition(".")
    prompt, _, entry = rest.partition(".")
    numbers = (expert in ("0", "1"), prompt.removeprefix("-").isdecimal(), len(prompt) < 10, entry.isidentifier())
    return (int(expert), int(prompt)) if all(numbers) else None


class CachedCall:
    """The blocks of one call (a `layers.levers.CachedBlocks`)."""

    def __init__(self, cache: StepCache, branch: Branch) -> None:
        self._cache, self._branch, self._method, self._step = cache, branch, cache.method, cache.step
        self._whole: Callable[[Stream], Tensor] | None = None
        self._start: Tensor | None = None  # what the first block sees
        self._base: Tensor | None = None  # to which is added what the left out blocks would make
        self._out: Tensor | None = None

    def run(self, start: Stream, blocks: Callable[[Stream], Stream], whole: Callable[[Stream], Tensor]) -> Tensor:
        method, branch = self._method, self._branch
        branch.fit(x := whole(start))
        if method.PEEKS:
            self._whole, self._start = whole, x
        else:
            self._base = x
            self._out = method.predict(branch, self._step, x, self._cache.agree)
        del x
        if self._out is None:
            stream = blocks(start)
            if self._out is None:
                return self._keep(whole(stream))
        branch.tensors.pop(FIRST, None)
        self._cache.count.reused += 1
        return self._out

    def is_enough(self, stream: Stream) -> bool:
        if self._start is None or self._whole is None:
            return False
        x = self._base = self._whole(stream)
        branch = self._branch
        branch.tensors[FIRST], self._start = x - self._start, None
        self._out = self._method.predict(branch, self._step, x, self._cache.agree)
        return self._out is not None

    def _keep(self, out: Tensor) -> Tensor:
        assert self._base is not None
        self._method.keep(self._branch, self._step, self._base, out)
        self._branch.tensors.pop(FIRST, None)
        self._cache.count.computed += 1
        return out
