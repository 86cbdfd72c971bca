"""The async twins of what a pipeline does, for services: every running request has a thread of its own, so the event
loop never waits for a model. Cancelling the task cancels the request before its next step; then, before the task ends,
all that the request holds is freed.
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
    """await run(call, *args) in a thread for one request. When the block ends, however it does, the request is stopped
    and `close` is called in the thread, after what it was at."""
    pool, loop = ThreadPoolExecutor(1, thread_name_prefix="fastvid-request"), asyncio.get_running_loop()
    run = functools.partial(loop.run_in_executor, pool)
    try:
        yield run
    finally:
        ticket.cancel()
        closing = run(close)
        try:
            await asyncio.shield(closing)  # who cancels twice does not wait, and it is closed all the same
        finally:
            pool.shutdown(wait=closing.done())


async def events(ticket: Ticket, start: Callable[[], Iterator[Event]]) -> AsyncGenerator[Event, None]:
    """The events of the request that has this ticket and that `start` starts; each is made when it is asked for."""
    opened: list[Any] = []

    def close() -> None:
        for stream in opened:
            stream.close()

    async with thread_of(ticket, close) as run:
        await run(lambda: opened.append(start()))
        while (event := await run(next, opened[0], None)) is not None:
            yield event


def twin(method: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]:
    """A verb of a pipeline as a coroutine, with the same arguments and result."""

    @functools.wraps(method)
    async def call(pipe: Any, /, *args: P.args, **options: P.kwargs) -> T:
        ticket = pipe.new_ticket()
        async with thread_of(ticket, lambda: None) as run:
            made: T = await run(functools.partial(method, pipe.with_ticket(ticket), *args, **options))
            return made

    call.__name__ = call.__qualname__ = f"a{method.__name__}"
    call.__doc__ = (
        f"`{method.__name__}` as a coroutine. Cancelling its task stops it before the next step.\n\n{method.__doc__}"
    )
    return call
