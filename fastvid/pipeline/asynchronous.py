"""Async versions of a pipeline's verbs, for services. Every running request has its own thread, so the event loop never
blocks on a model. Cancelling the task cancels the request before its next step, and frees everything the request holds
before the task ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Concatenate, ParamSpec, TypeVar

from fastvid import notices
from fastvid.engine.events import Event
from fastvid.engine.queue import Ticket

P = ParamSpec("P")
T = TypeVar("T")


class RequestThread:
    """`await run(call, *args)`, of `async with RequestThread(...) as run`, runs a call in a thread of its own.

    When the block ends, for whatever reason, the request is cancelled and `close` is called in the thread, after the
    current call. So it is where the block never ends, because its event loop did: no async generator is needed here,
    of which the loop would close several at once.
    """

    def __init__(self, ticket: Ticket, close: Callable[[], None] = lambda: None) -> None:
        self._ticket, self._close, self._ended = ticket, close, False
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="fastvid-request")

    async def __aenter__(self) -> Callable[..., Awaitable[Any]]:
        return self._run

    async def _run(self, call: Callable[..., Any], *args: Any) -> Any:
        """Runs a call in the thread. Its warnings are given here, where they point at the line that awaits."""
        texts: list[str] = []

        def collecting() -> Any:
            with notices.collected() as found:
                try:
                    return call(*args)
                finally:
                    texts.extend(found)

        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, collecting)
        finally:
            notices.warn_all(texts)

    async def __aexit__(self, *_: object) -> None:
        self._ended = True
        self._ticket.cancel()
        closing = asyncio.get_running_loop().run_in_executor(self._pool, self._close)
        try:
            await asyncio.shield(closing)  # a second cancellation does not wait, but does not stop the closing
        finally:
            self._pool.shutdown(wait=closing.done())

    def __del__(self) -> None:
        if not self._ended:
            self._ticket.cancel()
            with contextlib.suppress(RuntimeError):  # the interpreter ends
                self._pool.submit(self._close)
            self._pool.shutdown(wait=False)


async def events(ticket: Ticket, start: Callable[[], Iterator[Event]]) -> AsyncGenerator[Event, None]:
    """The events of the ticket's request, which `start` starts; each is computed when it is pulled."""
    streams: list[Any] = []

    def close() -> None:
        for stream in streams:
            stream.close()

    async with RequestThread(ticket, close) as run:
        await run(lambda: streams.append(start()))
        while (event := await run(next, streams[0], None)) is not None:
            yield event


def twin(method: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]:
    """The async version of a pipeline's verb, with the same arguments and result."""

    @functools.wraps(method)
    async def call(pipe: Any, /, *args: P.args, **options: P.kwargs) -> T:
        ticket = pipe.new_ticket()
        async with RequestThread(ticket) as run:
            result: T = await run(functools.partial(method, pipe.with_ticket(ticket), *args, **options))
            return result

    call.__name__ = call.__qualname__ = f"a{method.__name__}"
    call.__doc__ = (
        f"`{method.__name__}` as a coroutine. Cancelling its task stops it before the next step.\n\n{method.__doc__}"
    )
    return call
