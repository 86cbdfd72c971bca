"""A pipeline whose model is in other processes, the ranks: the same verbs, streams and services.

Requests wait and take turns here, as they do in one process (`fastvid.engine.queue`); the ranks do one command after
another, and each event is a command. The program that holds such a pipeline loads no weights.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Generator, Iterator
from typing import Any

import torch
from torch import nn

from fastvid.device.devices import find_device
from fastvid.distributed import layout
from fastvid.distributed.layout import Parallelism
from fastvid.engine.events import Event, Started, Step
from fastvid.engine.queue import RUNNING, Ticket
from fastvid.engine.session import PromptChanges
from fastvid.errors import Error, InvalidRequest
from fastvid.loaders.checkpoint import open_checkpoint
from fastvid.pipeline.pipeline import Pipeline, Stream
from fastvid.requests.loras import absolute
from fastvid.requests.request import Request
from fastvid.workers import torchrun
from fastvid.workers.group import WorkerGroup
from fastvid.workers.team import Team, current_folder

# A step that takes longer than its deadline counts as hung. Real work must never take that long, so the rates below are
# far under those of any device. The first step of a request also reads texts and clips; on a GPU the whole first
# request of a shape may compile and tune kernels.
SLOWEST_RATE = {"cpu": 2e8, "cuda": 1e12}  # floating point operations a second
STEP_SECONDS = 120.0  # for any step, beside its work
FIRST_STEP_SECONDS = 1800.0  # more for first steps
DECODE_FLOPS = 1e7  # for each pixel of a frame


def ranks_for(asked: Parallelism, device: Any) -> Parallelism:
    """How many ranks there will be. Raises InvalidRequest for more than there are GPUs, or than torchrun started."""
    if asked.ranks == 1:
        return asked
    if asked.ranks is None and torchrun.alone():
        return Parallelism(1, asked.layout)
    if world := torchrun.world_size():
        if asked.ranks not in (None, world):
            raise InvalidRequest(
                f"parallel={asked.ranks}: {world} processes were started together (WORLD_SIZE={world}); the nearest is "
                f"parallel={world}"
            )
        return Parallelism(world, asked.layout)
    first = find_device(device)
    shared = first.type != "cuda" or first.index is not None  # one device for all ranks
    count = torch.cuda.device_count() if first.type == "cuda" else 1
    if asked.ranks is None:
        return Parallelism(1 if shared else max(count, 1), asked.layout)
    if not shared and asked.ranks > count:
        raise InvalidRequest(f"parallel={asked.ranks}: there are {count} GPUs here; the nearest is parallel={count}")
    return asked


def load(model: Any, asked: Parallelism, options: dict[str, Any], max_running: int) -> Pipeline:
    """A pipeline on several ranks; see `fastvid.load`. Of those that torchrun has started, only rank 0 returns."""
    assert asked.ranks is not None, "ranks_for has counted them"
    # Once, before any process starts.
    checkpoint = open_checkpoint(model, options.get("parts"), True, options.get("variant")).check()
    config = checkpoint.configs["transformer"]
    heads = getattr(config, "transformer", config).num_attention_heads
    layout.layouts_for(asked.layout, asked.ranks, heads, 1 << 30, guided=True)
    options = {name: _plain(value) for name, value in options.items() if value is not None}
    start = torchrun.join if torchrun.world_size() else Team
    team = start(asked.ranks, None if asked.layout is None else str(asked.layout), str(model), options)
    team.start()
    return RemotePipeline(team, max_running)


def _plain(value: Any) -> Any:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype | torch.device) else value


class RemotePipeline(Pipeline):
    """A model that other processes hold, each a rank of the mesh. Make one with `fastvid.load(..., parallel=)`.

    When a worker dies or hangs, running streams and the call that waits raise WorkerFailed; the next request starts new
    workers. `close`, or the end of the program, ends them.
    """

    def __init__(self, team: Team, max_running: int = RUNNING) -> None:
        self._team, self._numbers = team, itertools.count(1)
        self._set_up(max_running)
        self._abandoned: deque[tuple[WorkerGroup, int]] = deque()  # streams that nobody holds, still open there

    def __repr__(self) -> str:
        return f"<Pipeline {self._team.model:.60} on {self._team.ranks} ranks>"

    def close(self) -> None:
        """End the workers. A pipeline that is closed makes nothing any more."""
        self._team.close()

    @property
    def transformer(self) -> nn.Module:
        raise InvalidRequest("transformer: the weights are in other processes; load with parallel=1 to have them here")

    @property
    def transformer_2(self) -> nn.Module:
        return self.transformer

    @property
    def _variant(self) -> str:
        self._team.start()
        return str(self._team.description["variant"])

    def _call(self, name: str, *given: Any, **options: Any) -> Any:
        self._close_abandoned()
        return self._team.command("call", name=name, args=list(given), options=options, folder=current_folder())

    def _run(self, request: Request, keep_frames: bool, keep_latents: bool) -> Stream:
        keep = {"keep_frames": keep_frames, "keep_latents": keep_latents}
        options = request.arguments()
        return self._open("start", request.checkpoint is not None, verb=request.verb, options=options, **keep)

    def _warm(self, sizes: Any, options: dict[str, Any]) -> dict[str, float]:
        seconds: dict[str, float] = self._call("warmup", sizes, **options)
        return seconds

    def _fitting(self, request: Request, wanted: int) -> int:
        raise InvalidRequest(
            f"batch_size={wanted}: on several ranks the videos of a batch are made one after another; leave it out"
        )

    def _resume(self, path: str, keep_latents: bool, settings: dict[str, Any], given: dict[str, Any]) -> Stream:
        return self._open("resume", True, path=path, options={"keep_latents": keep_latents, **settings, **given})

    def _open(self, do: str, has_checkpoint: bool, **values: Any) -> Stream:
        ticket, changes = self._ticket or self.new_ticket(), PromptChanges()
        self._close_abandoned()
        group, number = self._team.start(), next(self._numbers)
        self._team.command(do, group=group, id=number, folder=current_folder(), **values)
        events = RemoteEvents(self, group, number, ticket, changes)
        return Stream(events, ticket, None if has_checkpoint else changes, values.get("verb", "a resumed request"))

    def _close_abandoned(self) -> None:
        abandoned = [self._abandoned.popleft() for _ in range(len(self._abandoned))]
        current = self._team.group
        numbers = [number for group, number in abandoned if group is current]
        if current is not None and numbers:
            self._close_streams(current, numbers)

    def _close_streams(self, group: WorkerGroup, numbers: list[int]) -> None:
        with contextlib.suppress(Error):  # where the workers are gone, so are the streams
            self._team.command("close", group=group, ids=numbers)

    def _set_loras(self, loras: tuple[Any, ...]) -> None:
        """Workers that are started later have them too."""
        self._call("set_loras", list(loras))
        self._team.options["loras"] = absolute(loras)


class RemoteEvents:
    """The events of a stream that is open in the workers. Closing it, or its end, closes it there."""

    def __init__(
        self, pipe: RemotePipeline, group: WorkerGroup, number: int, ticket: Ticket, changes: PromptChanges
    ) -> None:
        self._pipe, self._group, self._number = pipe, group, number
        self._ticket, self._changes = ticket, changes
        self._open, self._events = True, self._fetch_all()

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        self._pipe._team.check_process()
        try:
            return next(self._events)
        except BaseException:  # StopIteration, too
            self._close_there()
            raise

    def close(self) -> None:
        self._events.close()
        self._close_there()

    def __del__(self) -> None:
        # Nothing may be sent here: garbage may be collected amid another command. The next command closes it.
        if getattr(self, "_open", False):
            self._pipe._abandoned.append((self._group, self._number))

    def _close_there(self) -> None:
        if self._open:
            self._open = False
            self._pipe._close_streams(self._group, [self._number])

    def _fetch_all(self) -> Generator[Event, None, None]:
        started = self._fetch(STEP_SECONDS + FIRST_STEP_SECONDS)
        assert isinstance(started, Started)
        yield started
        deadline, shape = step_deadline(started), shape_of(started)
        compiles = torch.device(started.plan.device).type != "cpu" and shape not in self._group.warm_shapes
        with self._ticket.admitted():
            limit = deadline + FIRST_STEP_SECONDS
            while True:
                with self._ticket.step():
                    event = self._fetch(limit)
                if event is None:
                    break
                if isinstance(event, Step) and not compiles:
                    limit = deadline
                yield event
        self._group.warm_shapes.add(shape)

    def _fetch(self, deadline: float) -> Event | None:
        prompt = self._changes.take(0)
        event: Event | None = self._pipe._team.command("next", deadline, self._group, id=self._number, prompt=prompt)
        return event


def step_deadline(started: Started) -> float:
    """Seconds that a step of a request, or the decoding of a chunk, takes at most."""
    plan = started.plan
    denoise = plan.flops_denoise / max(started.total_steps, 1)
    decode = DECODE_FLOPS * plan.model_height * plan.model_width * 4 * (plan.decode_chunk + 1)
    return STEP_SECONDS + (2 * denoise + decode) / SLOWEST_RATE[torch.device(plan.device).type]


def shape_of(started: Started) -> tuple[int, ...]:
    """What decides which kernels a request needs."""
    plan = started.plan
    return plan.model_height, plan.model_width, plan.model_frames, plan.tokens, plan.windows


__all__ = ["RemotePipeline", "load", "ranks_for"]
