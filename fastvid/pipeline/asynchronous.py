"""Async versions of a pipeline's verbs, for services. Every running request has its own thread, so the event loop never
blocks on a model. Cancelling the task cancels the request before its next step, and frees everything the request holds
before the task ends.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, Concatenate, ParamSpec, TypeVar

from fastvid.engine.events import Event
from fastvid.engine.queue import Ticket

Run = Callable[..., Awaitable[Any]]
P = ParamSpec("P")
T = TypeVar("T")


@asynccontextmanager
async def thread_of(ticket: Ticket, close: Callable[[], None]) -> AsyncIterator[Run]:
    """Yields `run`: `await run(call, *args)` runs a call in a thread of its own. When the block ends, for whatever
    reason, the request is cancelled and `close` is called in the thread, after the current call."""
    pool, loop = ThreadPoolExecutor(1, thread_name_prefix="fastvid-request"), asyncio.get_running_loop()
    run = functools.partial(loop.run_in_executor, pool)
    try:
        yield run
    finally:
        ticket.cancel()
        closing = run(close)
        try:
            await asyncio.shield(closing)  # a second cancellation does not wait, but does not stop the closing
        finally:
            pool.shutdown(wait=closing.done())


async def events(ticket: Ticket, start: Callable[[], Iterator[Event]]) -> AsyncGenerator[Event, None]:
    """The events of the ticket's request, which `start` starts; each is computed when it is pulled."""
    streams: list[Any] = []

    def close() -> None:
        for stream in streams:
            stream.close()

    async with thread_of(ticket, close) as run:
        await run(lambda: streams.append(start()))
        while (event := await run(next, streams[0], None)) is not None:
            yield event


def twin(method: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]:
    """The async version of a pipeline's verb, with the same arguments and result."""

    @functools.wraps(method)
    async def call(pipe: Any, /, *args: P.args, **options: P.kwargs) -> T:
        ticket = pipe.new_ticket()
        async with thread_of(ticket, lambda: None) as run:
            result: T = await run(functools.partial(method, pipe.with_ticket(ticket), *args, **options))
            return result

    call.__name__ = call.__qualname__ = f"a{method.__name__}"
    call.__doc__ = (
        f"`{method.__name__}` as a coroutine. Cancelling its task stops it before the next step.\n\n{method.__doc__}"
    )
    return call
