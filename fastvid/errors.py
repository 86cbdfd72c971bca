"""Every error that fastvid raises on purpose. Imports nothing, so that any module may use it."""

from __future__ import annotations


class Error(Exception):
    """Base of all of fastvid's own errors."""


class InvalidRequest(Error, ValueError):
    """What the caller asked for is not possible; the message names the nearest request that is."""


class OutOfMemory(Error, MemoryError):
    """The request does not fit; the message says what does not fit and by how much."""


class Cancelled(Error):
    """The caller cancelled the request."""


class CheckpointError(Error, ValueError):
    """A model's files, or a request's checkpoint, are missing, broken, or do not hold what they say they do."""


class BackendUnavailable(Error):
    """A back end asked for by name cannot run here; the message says why."""


class MediaError(Error):
    """A picture or video file cannot be read or written."""


class PromptError(Error):
    """A prompt could not be expanded: the endpoint is unreachable, refuses, or does not answer with a prompt."""


class PoolFull(Error):
    """As many jobs wait in a pool as may; the message says how many."""


class WorkerFailed(Error):
    """A worker process of a pipeline on several ranks has died or hangs. All its workers are stopped; the next request
    starts new ones.

    rank, pid: whose; cause: how it ended.
    """

    def __init__(self, rank: int, pid: int, cause: str) -> None:
        super().__init__(f"rank {rank} (process {pid}) failed: {cause}")
        self.rank, self.pid, self.cause = rank, pid, cause
