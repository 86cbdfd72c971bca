"""What a pipeline's `stream` returns: the events of one running request."""

from __future__ import annotations

from typing import Protocol

from fastvid import checks
from fastvid.device.precision import eager
from fastvid.engine.events import Event
from fastvid.engine.queue import Ticket
from fastvid.engine.session import PromptChanges
from fastvid.errors import InvalidRequest


class Events(Protocol):
    """The source of a stream's events: a generator, or other processes."""

    def __next__(self) -> Event: ...
    def close(self) -> None: ...


class Stream:
    """The events of one running request. Iterate over it; `cancel()`, from any thread, ends the iteration with
    Cancelled."""

    def __init__(
        self, events: Events, ticket: Ticket, changes: PromptChanges | None = None, verb: str = "a request"
    ) -> None:
        self._events, self._ticket, self._changes, self._verb = events, ticket, changes, verb

    def __repr__(self) -> str:
        return f"<Stream of {self._verb}{', cancelled' if self._ticket.cancelled else ''}>"

    def __iter__(self) -> Stream:
        return self

    @eager
    def __next__(self) -> Event:
        with self._ticket.pulled():
            return next(self._events)

    def change_prompt(self, prompt: str) -> None:
        """Use this prompt from the next window, block or segment of frames on. May be called from any thread.

        Frames that are already begun keep the old prompt, and so does a video of one window. A storyboard's next shot
        has its own prompt again. Finished.recipe["changed_prompts"] says what changed, and from which frame on.

        Raises InvalidRequest if this is no prompt, or if the request has a checkpoint: it could not be resumed.
        """
        if self._changes is None:
            raise InvalidRequest("a request with a checkpoint keeps its prompts; leave checkpoint out")
        self._changes.request(checks.text("prompt", prompt))

    def cancel(self) -> None:
        """Stop the request, running (before its next step or chunk) or waiting; the iteration raises
        fastvid.Cancelled."""
        self._ticket.cancel()

    def close(self) -> None:
        """Free everything the request holds, after waiting for its other threads. Do not call it during the
        iteration."""
        self._events.close()
