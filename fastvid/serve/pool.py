"""Many requests on many machines: a pool of pipelines on Ray, each on its own GPUs, and a line of jobs before them.

    with Pool("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", groups=4, parallel=2, folder="/shared/jobs") as pool:
        jobs = [pool.submit(prompt=prompt) for prompt in prompts]
        videos = [job.result() for job in jobs]

A group is a Ray actor that holds one pipeline (`fastvid.load`, with `parallel` ranks of its own). A job waits until one
is free; when as many wait as may, `submit` waits too, or says so. If a group's process dies, or a rank of it, the job
goes on from its last checkpoint on the next free group, which may be another machine where `folder` is on a disk that
all see; the video is what it would have been. What is handed to Ray is JSON and bytes (`fastvid.workers.messages`).

Ray comes with the extra: pip install fastvid[ray].
"""

from __future__ import annotations

import collections
import contextlib
import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from fastvid import checks
from fastvid.distributed.layout import parse_parallel
from fastvid.engine.events import Finished, Frames, Step
from fastvid.errors import BackendUnavailable, Cancelled, CheckpointError, Error, InvalidRequest, PoolFull, WorkerFailed
from fastvid.media.video import Video
from fastvid.requests.arguments import documented
from fastvid.requests.options import AnyOptions
from fastvid.requests.request import DATA, Request
from fastvid.workers import messages
from fastvid.workers.team import error_of

WAITING_EACH = 2  # jobs that wait for each group, unless it is said
GROUPS, WAITING, RETRIES = checks.whole(1, 4096), checks.whole(1, 1 << 20), checks.whole(0, 100)


class Group:
    """What an actor holds: a pipeline, and the jobs that run on it. Everything in and out is JSON and bytes."""

    def __init__(self, model: str, header: dict[str, Any], payload: bytes) -> None:
        from fastvid.api import load

        self._failed: dict[str, str] | None = None
        try:
            self._pipe = load(model, **messages.unpack(messages.Message(header, payload)))
        except Exception as error:  # told by `ready`: Ray would make another error of it
            self._failed = {"kind": type(error).__name__, "text": str(error)}
        self._streams: dict[str, Any] = {}
        self._steps: dict[str, tuple[int, int]] = {}
        self._cancelled: set[str] = set()

    def ready(self) -> tuple[int, dict[str, str] | None]:
        """The process it is in, once the model is loaded, or the error that loading has raised."""
        return os.getpid(), self._failed

    def run(self, job: str, folder: str, header: dict[str, Any], payload: bytes) -> tuple[dict[str, Any], bytes]:
        """A job to its end, from its checkpoint if there is one: the video, or the error, or what this group lacks."""
        if self._failed:  # one that was started again: the pool sees to it
            return tuple(messages.pack({"lacks": f"{self._failed['kind']}: {self._failed['text']}"}))
        try:
            values = messages.unpack(messages.Message(header, payload))
            made = messages.pack({"made": self._run(job, folder, values["verb"], values["options"])})
        except Exception as error:
            made = messages.pack({"error": {"kind": type(error).__name__, "text": str(error)}})
        finally:
            for held in (self._streams, self._steps):
                held.pop(job, None)
            self._cancelled.discard(job)
        return tuple(made)

    def _run(self, job: str, folder: str, verb: str, options: dict[str, Any]) -> Video:
        stream = self._open(folder, verb, options)
        self._streams[job] = stream
        if job in self._cancelled:
            stream.cancel()
        frames = []
        with contextlib.closing(stream):
            for event in stream:
                if isinstance(event, Frames):
                    frames.append(event.frames)
                elif isinstance(event, Step):
                    self._steps[job] = event.step, event.total
                elif isinstance(event, Finished):
                    finished = event
        return Video(np.concatenate(frames), finished.fps, finished.seed, finished.latents, finished.recipe)

    def _open(self, folder: str, verb: str, options: dict[str, Any]) -> Any:
        if Path(folder, "request.json").exists():
            given = {name: options[name] for name in DATA if options.get(name) is not None}
            with contextlib.suppress(CheckpointError):  # damaged: it is made anew
                return self._pipe.resume(folder, **given)
        shutil.rmtree(folder, ignore_errors=True)
        return self._pipe.stream(verb=verb, **options, checkpoint=folder)

    def steps(self, job: str) -> tuple[int, int]:
        """How far a job is: steps done, and in all; (0, 0) before the first."""
        return self._steps.get(job, (0, 0))

    def cancel(self, job: str) -> None:
        """Ends it before its next step."""
        self._cancelled.add(job)
        if job in self._streams:
            self._streams[job].cancel()


class Job:
    """A request in the pool. attempts: how often it was begun."""

    def __init__(self, pool: Pool, verb: str, options: dict[str, Any]) -> None:
        self.name, self.verb, self.options, self.attempts = secrets.token_hex(8), verb, options, 0
        self.message = messages.pack({"verb": verb, "options": options})
        self.group: Any = None
        self._pool, self._done, self._made, self._error = pool, threading.Event(), None, None
        self.cancelled = False

    def result(self, timeout: float | None = None) -> Video:
        """The video, when it is done. Raises what the request raised; WorkerFailed if its groups died too often;
        TimeoutError after so many seconds."""
        if not self._done.wait(timeout):
            raise TimeoutError(f"the job was not done in {timeout:g} seconds; it goes on")
        if self._error is not None:
            raise self._error
        return self._made

    def done(self) -> bool:
        """Whether there is a result, or an error."""
        return self._done.is_set()

    def steps(self) -> tuple[int, int]:
        """Steps done, and in all; (0, 0) while it waits."""
        group = self.group
        if group is None:
            return (0, 0)
        ray = _ray()
        try:
            return tuple(ray.get(group.steps.remote(self.name), timeout=5))
        except Exception:  # it died a moment ago: whoever runs the job sees why
            return (0, 0)

    def cancel(self) -> None:
        """Ends it: at once while it waits, else before its next step. `result` then raises Cancelled."""
        self.cancelled = True
        self._pool._drop(self)
        if (group := self.group) is not None:
            group.cancel.remote(self.name)

    def _end(self, made: Video | None, error: BaseException | None = None) -> None:
        self._made, self._error = made, error
        self._done.set()


class Pool:
    """Groups, and the line before them. A context; `close` ends both.

    model, options: as `fastvid.load` takes them. groups: pipelines; parallel: ranks of each. waiting: jobs that may
    wait (default: two for each group). retries: how often a job is begun again after its group has died. folder: for
    checkpoints, on a disk that all machines see where there are several; a temporary one if it is left out. cpus: that
    Ray sets aside for a group; gpus: the same, by default one for each rank if Ray knows of any.

    Uses the Ray cluster that the program is connected to, or starts a local one.
    """

    def __init__(
        self,
        model: str = "embedded",
        *,
        groups: int = 1,
        parallel: Any = 1,
        waiting: int | None = None,
        retries: int = 2,
        folder: str | Path | None = None,
        cpus: float = 1,
        gpus: float | None = None,
        **options: Any,
    ) -> None:
        self.groups, self.retries = GROUPS("groups", groups), RETRIES("retries", retries)
        self.waiting = WAITING("waiting", WAITING_EACH * groups if waiting is None else waiting)
        ranks = parse_parallel(parallel).ranks or 1
        ray = _ray()
        if not ray.is_initialized():
            with _no_reports():
                local = {"_node_ip_address": "127.0.0.1", "include_dashboard": False}
                ray.init(**local, log_to_driver=False, configure_logging=False)
        gpus = (ranks if ray.cluster_resources().get("GPU") else 0) if gpus is None else gpus
        self._own = None if folder else tempfile.TemporaryDirectory(prefix="fastvid-jobs-")
        self._folder = Path(folder or self._own.name)
        self._folder.mkdir(parents=True, exist_ok=True)
        load = messages.pack({**options, **({"parallel": parallel} if parallel != 1 else {})})
        actor = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_concurrency=8)(Group)
        self._start = lambda: actor.remote(model, *load)
        self._line: collections.deque[Job] = collections.deque()
        self._change, self._closed = threading.Condition(), False
        self._actors: list[Any] = [self._start() for _ in range(self.groups)]
        self._wait_for_models()
        self._threads = [
            threading.Thread(target=self._serve, args=(number,), name="fastvid-pool", daemon=True)
            for number in range(self.groups)
        ]
        for thread in self._threads:
            thread.start()

    def _wait_for_models(self) -> None:
        ray = _ray()
        try:
            failed = [failed for _, failed in ray.get([actor.ready.remote() for actor in self._actors]) if failed]
        except ray.exceptions.RayError as error:
            self._kill()
            raise Error(f"a group's process ended while it loaded the model: {error}") from None
        if failed:
            self._kill()
            raise error_of(failed[0])

    @documented
    def submit(
        self,
        verb: str = "generate",
        *,
        prompt: str | None = None,
        wait: bool = True,
        timeout: float | None = None,
        **options: Unpack[AnyOptions],
    ) -> Job:
        """Put a request in line: any verb of a pipeline, with its options.

        wait: until there is room in the line, at most `timeout` seconds; False: not at all. Raises PoolFull if there is
        none, InvalidRequest for what no request can be.
        """
        if Request.make(verb, prompt=prompt, **options).checkpoint is not None:
            raise InvalidRequest("checkpoint: a pool keeps one for every job; leave it out")
        if options.get("seed") is None:  # begun again, it is the same video
            options["seed"] = secrets.randbelow(2**32)
        job = Job(self, verb, {"prompt": prompt, **options})
        with self._change:
            room = self._change.wait_for(lambda: self._closed or len(self._line) < self.waiting, timeout if wait else 0)
            if self._closed:
                raise Error("this pool was closed; make a new one")
            if not room:
                raise PoolFull(f"{len(self._line)} jobs wait already; wait for one, or allow more with waiting=")
            self._line.append(job)
            self._change.notify_all()
        return job

    def close(self) -> None:
        """Ends all groups. Jobs that are not done raise Cancelled."""
        with self._change:
            self._closed = True
            left = list(self._line)
            self._line.clear()
            self._change.notify_all()
        for job in left:
            job._end(None, Cancelled("the pool was closed"))
        self._kill()
        for thread in self._threads:
            thread.join()
        if self._own is not None:
            self._own.cleanup()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    # ------------------------------------------------------------ a thread a group

    def _serve(self, number: int) -> None:
        while (job := self._next()) is not None:
            try:
                self._work(number, job)
            except BaseException as error:  # nobody waits for ever
                job._end(None, error)

    def _next(self) -> Job | None:
        with self._change:
            self._change.wait_for(lambda: self._closed or self._line)
            if self._closed:
                return None
            job = self._line.popleft()
            self._change.notify_all()
            return job

    def _work(self, number: int, job: Job) -> None:
        ray = _ray()
        job.attempts += 1
        job.group = actor = self._actors[number]
        folder = str(self._folder / f"{job.name}.ckpt")
        try:
            header, payload = ray.get(actor.run.remote(job.name, folder, *job.message))
            told = messages.unpack(messages.Message(header, payload))
            if "made" in told:
                job._end(told["made"])
                return
            if "lacks" in told:
                error = WorkerFailed(
                    -1, -1, f"a group that was started again could not load the model: {told['lacks']}"
                )
                self._replace(number)
            elif told["error"]["kind"] == "WorkerFailed":
                error = WorkerFailed(-1, -1, told["error"]["text"])
            else:
                error = error_of(told["error"])
        except ray.exceptions.RayError as gone:  # killed, out of memory, or its machine is gone
            error = WorkerFailed(-1, -1, f"the group's process ended: {' '.join(str(gone).split()):.300}")
            self._replace(number)
        finally:
            job.group = None
        self._again(job, error, folder)

    def _replace(self, number: int) -> None:
        """A new group for one that is gone or of no use."""
        _ray().kill(self._actors[number])
        with self._change:
            if not self._closed:
                self._actors[number] = self._start()

    def _again(self, job: Job, error: Exception, folder: str) -> None:
        """Back to the head of the line if its group died, and it may; else it is over."""
        with self._change:
            if self._closed:
                error = Cancelled("the pool was closed")
            elif isinstance(error, WorkerFailed) and job.attempts <= self.retries and not job.cancelled:
                self._line.appendleft(job)
                self._change.notify_all()
                return
        if isinstance(error, WorkerFailed):
            error = WorkerFailed(error.rank, error.pid, f"{error.cause}; it was begun {job.attempts} times")
        shutil.rmtree(folder, ignore_errors=True)
        job._end(None, Cancelled("the job was cancelled") if job.cancelled else error)

    def _drop(self, job: Job) -> None:
        with self._change:
            if job not in self._line:
                return
            self._line.remove(job)
            self._change.notify_all()
        job._end(None, Cancelled("the job was cancelled"))

    def _kill(self) -> None:
        ray = _ray()
        for actor in self._actors:
            ray.kill(actor)


@contextlib.contextmanager
def _no_reports() -> Iterator[None]:
    """A cluster that is started meanwhile tells nobody how it is used, unless the program has said that it may."""
    name = "RAY_USAGE_STATS_ENABLED"
    said = os.environ.get(name)
    os.environ.setdefault(name, "0")
    try:
        yield
    finally:
        if said is None:
            os.environ.pop(name, None)


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise BackendUnavailable("a pool runs on Ray, which is not installed: pip install fastvid[ray]") from None
    return ray


__all__ = ["Group", "Job", "Pool"]
