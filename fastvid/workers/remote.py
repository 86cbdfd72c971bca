"""A pipeline whose ranks are other processes: the same verbs, streams and services, each event fetched from all ranks.

Requests stand in line here as they do in one process (`fastvid.engine.queue`); workers do one thing after another. The
program that holds such a pipeline loads no weights.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from fastvid.device.devices import find_device
from fastvid.distributed import layout
from fastvid.distributed.layout import Parallelism
from fastvid.engine.events import Event, Started, Step
from fastvid.engine.queue import RUNNING, Ticket
from fastvid.engine.session import PromptChanges
from fastvid.errors import Error, InvalidRequest, WorkerFailed
from fastvid.loaders.checkpoint import open_checkpoint
from fastvid.pipeline.pipeline import Pipeline, Stream
from fastvid.requests.request import Request
from fastvid.workers import torchrun
from fastvid.workers.team import Workers

# A step that takes longer than this counts as hung: far below what any device does, since a limit must never be met by
# work. The first one of a request also reads texts and clips; on a GPU all of a shape's first request may compile and
# tune kernels: the decoder's, say, come last.
SLOWEST = {"cpu": 2e8, "cuda": 1e12}  # floating point operations a second
LEAST, FIRST = 120.0, 1800.0  # seconds, of any step, and more of those
DECODE_FLOPS = 1e7  # for each pixel of a frame


def ranks_for(asked: Parallelism, device: Any) -> Parallelism:
    """How many ranks there will be. Raises InvalidRequest for more than there are GPUs, or than torchrun started."""
    if asked.ranks == 1:
        return asked
    if world := torchrun.world_size():
        if asked.ranks not in (None, world):
            raise InvalidRequest(
                f"parallel={asked.ranks}: {world} processes were started together; the nearest is parallel={world}"
            )
        return Parallelism(world, asked.layout)
    where = find_device(device)
    shared = where.type != "cuda" or where.index is not None  # by all of them
    here = torch.cuda.device_count() if where.type == "cuda" else 1
    if asked.ranks is None:
        return Parallelism(1 if shared else max(here, 1), asked.layout)
    if not shared and asked.ranks > here:
        raise InvalidRequest(f"parallel={asked.ranks}: there are {here} GPUs here; the nearest is parallel={here}")
    return asked


def load(model: Any, asked: Parallelism, options: dict[str, Any], max_running: int) -> Pipeline:
    """A pipeline on several ranks; see `fastvid.load`. Of those that torchrun has started, only rank 0 returns."""
    checkpoint = open_checkpoint(model, options.get("parts"), download=True).check()  # once, and before any process
    config = checkpoint.configs["transformer"]
    heads = getattr(config, "transformer", config).num_attention_heads
    layout.layouts_for(asked.layout, asked.ranks, heads, 1 << 30, guided=True)
    options = {name: _plain(value) for name, value in options.items() if value is not None}
    given = asked.ranks, None if asked.layout is None else str(asked.layout), str(model), options
    workers = torchrun.join(*given) if torchrun.world_size() else Workers(*given)
    workers.start()
    return RemotePipeline(workers, max_running)


def _plain(value: Any) -> Any:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype | torch.device) else value


class RemotePipeline(Pipeline):
    """A model that other processes hold, each a rank of the mesh. Make one with `fastvid.load(..., parallel=)`.

    When a worker dies or hangs, running streams and the call that waits raise WorkerFailed; the next request starts new
    workers. `close`, or the end of the program, ends them.
    """

    def __init__(self, workers: Workers, max_running: int = RUNNING) -> None:
        self._workers, self._ids = workers, itertools.count(1)
        self._set_up(max_running)
        self._left: deque[tuple[int, int]] = deque()  # (start, stream) to be let go of
        self._warm: set[tuple[int, ...]] = set()  # (start, shape) of what a whole request has been through

    def close(self) -> None:
        """End the workers. A pipeline that is closed makes nothing any more."""
        self._workers.close()

    # ------------------------------------------------------------ requests

    @property
    def _variant(self) -> str:
        self._workers.start()
        return str(self._workers.described["variant"])

    def _run(self, request: Request, keep_frames: bool, keep_latents: bool) -> Stream:
        self._workers.start()
        kept = {"keep_frames": keep_frames, "keep_latents": keep_latents}
        checkpointed = request.checkpoint is not None
        return self._open(checkpointed, "start", verb=request.verb, options=request.arguments(), **kept)

    def resume(
        self,
        path: Any,
        *,
        keep_latents: bool = True,
        checkpoint_every: float | None = None,
        keep_checkpoint: bool = False,
        **given: Any,
    ) -> Stream:
        """See Pipeline.resume."""
        options = {"keep_latents": keep_latents, "checkpoint_every": checkpoint_every, **given}
        return self._open(True, "resume", path=str(path), options={"keep_checkpoint": keep_checkpoint, **options})

    def _open(self, checkpointed: bool, do: str, **values: Any) -> Stream:
        ticket, changes = self._ticket or self.new_ticket(), PromptChanges()
        self._let_go()
        number = next(self._ids)
        self._workers.command(do, id=number, folder=os.getcwd(), **values)
        events = Events(self, self._workers.generation, number, ticket, changes)
        return Stream(events, ticket, None if checkpointed else changes)

    def _let_go(self) -> None:
        """Closes what nobody holds any more."""
        left = [self._left.popleft() for _ in range(len(self._left))]
        ids = [number for generation, number in left if self._workers.running(generation)]
        if ids:
            self._workers.command("close", ids=ids)

    # ------------------------------------------------------------ the rest

    def set_loras(self, loras: Sequence[Any] = ()) -> None:
        """See Pipeline.set_loras. Workers that are started later have them too."""
        self._call("set_loras", list(loras))
        self._workers.options["loras"] = [_absolute(lora) for lora in loras]

    def _call(self, name: str, *given: Any, **options: Any) -> Any:
        self._let_go()
        return self._workers.command("call", name=name, given=list(given), options=options, folder=os.getcwd())


def _absolute(lora: Any) -> Any:
    """A LoRA as it is given, where it is found also from another folder; hub ids stay."""
    if isinstance(lora, tuple | list):
        return (_absolute(lora[0]), *lora[1:]) if lora else lora
    return os.path.abspath(lora) if isinstance(lora, str | os.PathLike) and os.path.exists(lora) else lora


class Events:
    """The events of a stream that the workers have open; closed here, it is closed there."""

    def __init__(
        self, pipe: RemotePipeline, generation: int, number: int, ticket: Ticket, changes: PromptChanges
    ) -> None:
        self._workers, self._left, self._warm = pipe._workers, pipe._left, pipe._warm
        self._at, self._ticket, self._changes = (generation, number), ticket, changes
        self._open, self._events = True, self._made()

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        try:
            return next(self._events)
        except BaseException:  # its end, too
            self._shut()
            raise

    def close(self) -> None:
        """Let go of it."""
        self._events.close()
        self._shut()

    def __del__(self) -> None:
        if getattr(self, "_open", False):
            self._left.append(self._at)  # whoever comes next closes it: nothing may wait here

    def _shut(self) -> None:
        if self._open:
            self._open = False
            try:
                if self._workers.running(self._at[0]):
                    self._workers.command("close", ids=[self._at[1]])
            except Error:
                pass  # the workers are gone, and it with them

    def _made(self) -> Iterator[Event]:
        # Nothing is sent from here at its end: it may come with a collection of garbage, amid another command.
        started = self._next(LEAST + FIRST)
        yield started
        deadline, shape = deadline_of(started), (self._at[0], *shape_of(started))
        made = torch.device(started.plan.device).type == "cpu"  # all kernels that it needs
        with self._ticket.admitted():
            event, limit = started, deadline + FIRST
            while event is not None:
                with self._ticket.step():
                    event = self._next(limit)
                if isinstance(event, Step):
                    limit = deadline if made or shape in self._warm else deadline + FIRST
                if event is not None:
                    yield event
        self._warm.add(shape)

    def _next(self, deadline: float) -> Event:
        generation, number = self._at
        if not self._workers.running(generation):
            raise self._workers.failure(generation) or Error("this pipeline was closed; load the model again")
        return self._workers.command("next", deadline, id=number, prompt=self._changes.take(0))


def deadline_of(started: Started) -> float:
    """Seconds that a step of a request, or the decoding of a chunk, takes at most."""
    plan = started.plan
    denoise = plan.flops_denoise / max(started.total_steps, 1)
    decode = DECODE_FLOPS * plan.model_height * plan.model_width * 4 * (plan.decode_chunk + 1)
    return LEAST + (2 * denoise + decode) / SLOWEST[torch.device(plan.device).type]


def shape_of(started: Started) -> tuple[int, ...]:
    """What decides which kernels a request needs."""
    plan = started.plan
    return plan.model_height, plan.model_width, plan.model_frames, plan.tokens, plan.windows


__all__ = ["RemotePipeline", "WorkerFailed", "deadline_of", "load", "ranks_for"]
