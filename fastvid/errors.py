"""Every error and warning of fastvid's own. Imports nothing of fastvid, so that any module may use it."""

from __future__ import annotations

LONGEST = 4000  # characters of a message


class Error(Exception):
    """Base of all of fastvid's own errors.

    Messages quote what is in files and requests of strangers: they are cut, and half characters are escaped, so that
    they can be printed and sent.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(tidy(each) if isinstance(each, str) else each for each in args))


def tidy(text: str) -> str:
    """A message that can be printed and sent: cut, and with half characters escaped."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST - 200]} ... {text[-100:]}"
    return text if text.isascii() else text.encode(errors="backslashreplace").decode()


class FastvidWarning(UserWarning):
    """Something was asked for that is not done, or not quite as asked; the message says what and why."""


class InvalidRequest(Error, ValueError):
    """The request is not possible; the message names the nearest valid value."""


class OutOfMemory(Error, MemoryError):
    """The request does not fit into memory; the message says what does not fit and by how much."""


class Cancelled(Error):
    """The caller cancelled the request."""


class CheckpointError(Error, ValueError):
    """A model's files or a request's checkpoint are missing, damaged or inconsistent."""


class BackendUnavailable(Error):
    """An explicitly requested back end or device cannot run here; the message says why."""


class MediaError(Error, OSError):
    """A picture or video file cannot be read or written. errno: the system's reason, if it has one."""

    def __init__(self, message: str = "", errno: int | None = None) -> None:
        super().__init__(message)
        self.errno = errno

    def __reduce__(self) -> tuple[type[MediaError], tuple[str, int | None]]:
        return MediaError, (str(self), self.errno)


class PromptError(Error):
    """A prompt could not be expanded: the endpoint is unreachable, refuses, or does not answer with a prompt."""


class PoolFull(Error):
    """A pool's queue is full; the message says how many jobs it holds."""


class WorkerFailed(Error):
    """A worker process of a pipeline on several ranks has died or hangs. All workers of the pipeline are stopped; the
    next request starts new ones.

    rank, pid: of the failed worker. cause: how it ended.
    """

    def __init__(self, rank: int, pid: int, cause: str) -> None:
        super().__init__(f"rank {rank} (process {pid}) failed: {cause}")
        self.rank, self.pid, self.cause = rank, pid, cause
