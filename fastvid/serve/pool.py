"""Many requests on many machines: a pool of pipelines on Ray, each on its own GPUs, behind one queue of jobs.

    with Pool("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", groups=4, parallel=2, folder="/shared/jobs") as pool:
        jobs = [pool.submit(prompt=prompt) for prompt in prompts]
        videos = [job.result() for job in jobs]

A group is a Ray actor that holds one pipeline (`fastvid.load`, with `parallel` ranks of its own). A job waits in the
queue until a group is free; when the queue is full, `submit` waits too, or raises PoolFull. If a group's process or one
of its ranks dies, the job goes on from its last checkpoint on the next free group, which may be on another machine if
`folder` is on a shared disk. The video is the same as without the failure. Ray gets JSON and bytes
(`fastvid.workers.messages`), no pickled values.

Ray comes with the extra: pip install fastvid[ray].
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from fastvid import checks, notices
from fastvid.distributed.layout import parse_parallel
from fastvid.engine import resume_files
from fastvid.engine.events import Finished, Frames, Started, Step
from fastvid.errors import BackendUnavailable, Cancelled, CheckpointError, Error, InvalidRequest, PoolFull, WorkerFailed
from fastvid.media.video import Video
from fastvid.pipeline import load_arguments
from fastvid.requests.arguments import documented, random_seed
from fastvid.requests.loras import absolute
from fastvid.requests.options import AnyOptions
from fastvid.requests.request import DATA, Request
from fastvid.serve.loopback import local_only
from fastvid.workers.channel import Message
from fastvid.workers.messages import pack, pack_error, unpack, unpack_error

log = logging.getLogger("fastvid.pool")
WAITING_PER_GROUP = 2
GROUPS, WAITING, RETRIES = checks.whole(1, 4096), checks.whole(1, 1 << 20), checks.whole(0, 100)
DEVICES = checks.number(0.0, 1024.0)  # processors or GPUs of a group
SECONDS = checks.number(0.0, 1e9, " seconds (left out: no limit)")

Packed = tuple[dict[str, Any], bytes]
"""What goes through Ray: the header and the payload of a message."""


def _plain(values: dict[str, Any]) -> Packed:
    message = pack(values)
    return message.header, message.payload


class Group:
    """The Ray actor: a pipeline, and the jobs that run on it. All arguments and results are JSON and bytes."""

    def __init__(self, model: str, header: dict[str, Any], payload: bytes) -> None:
        from fastvid.api import load

        self._load_error: dict[str, str] | None = None
        self._streams: dict[str, Any] = {}
        self._steps: dict[str, tuple[int, int]] = {}
        self._cancelled: set[str] = set()
        with notices.collected() as self._load_warnings:
            try:
                self._pipe = load(model, **unpack(Message(header, payload)))
            except Exception as error:  # returned by `ready`: Ray would wrap it in an error of its own
                self._load_error = pack_error(error)

    def ready(self) -> tuple[int, dict[str, str] | None, list[str]]:
        """The process id, once the model is loaded, the error if it could not be, and the warnings."""
        return os.getpid(), self._load_error, self._load_warnings

    def run(self, job: str, folder: str, header: dict[str, Any], payload: bytes) -> Packed:
        """Run a job to its end, from its checkpoint if there is one. Returns its "video" and "warnings", or its
        "error", or why to "retry" it, perhaps on another group that has to "replace" this one."""
        try:
            if self._load_error:
                reason = "{kind}: {text}".format(**self._load_error)
                text = f"a group that was started again could not load the model: {reason}"
                return _plain({"retry": text, "replace": True})
            with notices.collected() as texts:
                video = self._run(job, folder, **unpack(Message(header, payload)))
            return _plain({"video": video, "warnings": texts})
        except WorkerFailed as error:
            return _plain({"retry": str(error)})
        except Exception as error:
            return _plain({"error": pack_error(error)})
        finally:
            self._streams.pop(job, None)
            self._steps.pop(job, None)
            self._cancelled.discard(job)

    def _run(self, job: str, folder: str, verb: str, options: dict[str, Any]) -> Video:
        self._streams[job] = stream = self._open(folder, verb, options)
        if job in self._cancelled:
            stream.cancel()
        frames, sound = [], None
        with contextlib.closing(stream):
            for event in stream:
                if isinstance(event, Frames):
                    frames.append(event.frames)
                elif isinstance(event, Started):
                    sound = event.sound
                elif isinstance(event, Step):
                    self._steps[job] = event.step, event.total
        assert isinstance(event, Finished), "everything else raises"
        audio = None if sound is None else sound.read()
        return Video(np.concatenate(frames), event.fps, event.seed, event.latents, event.recipe, audio)

    def _open(self, folder: str, verb: str, options: dict[str, Any]) -> Any:
        if Path(folder, "request.json").exists():
            data = {name: options[name] for name in DATA if options.get(name) is not None}
            with contextlib.suppress(CheckpointError):  # a damaged one: start again
                return self._pipe.resume(folder, **data)
        if os.path.isdir(folder):
            resume_files.remove(Path(folder))
        return self._pipe.stream(verb=verb, **options, checkpoint=folder)

    def warmup(self, header: dict[str, Any], payload: bytes) -> Packed:
        """Warm the pipeline up. Returns the "seconds", or the "error"."""
        try:
            values = unpack(Message(header, payload))
            return _plain({"seconds": self._pipe.warmup(values["sizes"], **values["options"])})
        except Exception as error:
            return _plain({"error": pack_error(error)})

    def steps(self, job: str) -> tuple[int, int]:
        """See Job.steps."""
        return self._steps.get(job, (0, 0))

    def cancel(self, job: str) -> None:
        """Stop a job before its next step."""
        self._cancelled.add(job)
        if job in self._streams:
            self._streams[job].cancel()


class Job:
    """A request in the pool. attempts: how often it was started. warnings: what its group warned of, which `result`
    gives."""

    def __init__(self, pool: Pool, verb: str, options: dict[str, Any]) -> None:
        self.name, self.verb, self.options, self.attempts = secrets.token_hex(8), verb, options, 0
        self.message = _plain({"verb": verb, "options": options})
        self.group: Any = None
        self.cancelled = False
        self.warnings: list[str] = []
        self._pool, self._future = pool, Future[Video]()

    def result(self, timeout: float | None = None) -> Video:
        """The video, when it is done. Raises what the request raised; WorkerFailed if its groups died too often;
        TimeoutError after so many seconds."""
        timeout = None if timeout is None else SECONDS("timeout", timeout)
        try:
            video = self._future.result(timeout)
        except TimeoutError:
            if self._future.done():
                raise
            raise TimeoutError(f"the job was not done in {timeout:g} seconds; it goes on") from None
        notices.warn_all(self.warnings)
        return video

    def done(self) -> bool:
        """Whether there is a result, or an error."""
        return self._future.done()

    def steps(self) -> tuple[int, int]:
        """Steps done, and in all; (0, 0) while it waits."""
        ray, group = _ray(), self.group
        if group is None:
            return (0, 0)
        try:
            done, total = ray.get(group.steps.remote(self.name), timeout=5)
        except Exception:  # the group died a moment ago, which the thread that runs the job reports
            return (0, 0)
        return done, total

    def cancel(self) -> None:
        """Stop it: at once while it waits, else before its next step. `result` then raises Cancelled."""
        self.cancelled = True
        self._pool._remove(self)
        if (group := self.group) is not None:
            group.cancel.remote(self.name)

    def __repr__(self) -> str:
        state = "done" if self.done() else "running" if self.group is not None else "waiting"
        return f"<Job {self.name}: {self.verb}, {state}>"

    def _finish(self, result: Video | BaseException) -> None:
        if isinstance(result, BaseException):
            self._future.set_exception(result)
        else:
            self._future.set_result(result)


class Pool:
    """Groups, and the queue of jobs for them. A context; `close` ends both.

    model, options: as `fastvid.load` takes them. groups: pipelines; parallel: ranks of each. waiting: jobs that may
    wait (default: two for each group). retries: how often a job is started again after its group has died. folder: for
    checkpoints, on a shared disk where there are several machines; a temporary one if it is left out. cpus: that Ray
    sets aside for a group; gpus: the same, by default one for each rank if Ray knows of any.

    Uses the Ray cluster that the program is connected to or that RAY_ADDRESS names, or starts a local one, which
    listens on this machine's loopback address alone.
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
        self.waiting = WAITING("waiting", WAITING_PER_GROUP * self.groups if waiting is None else waiting)
        cpus, gpus = DEVICES("cpus", cpus), None if gpus is None else DEVICES("gpus", gpus)
        if gpus is not None and gpus > 1 and gpus != round(gpus):
            checks.refuse("gpus", gpus, "a part of one GPU, or a whole number", round(gpus))
        folder = None if folder is None else checks.path("folder", folder)
        options = load_arguments.checked({"model": model, "parallel": parallel, **options})
        model, ranks = options.pop("model"), parse_parallel(options["parallel"]).ranks or 1
        message = _plain({name: value for name, value in options.items() if value is not None})
        ray = _connected_ray()
        if gpus is None:
            gpus = ranks if ray.cluster_resources().get("GPU") else 0
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        if folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="fastvid-jobs-")
            folder = self._temporary.name
        self._folder = Path(folder)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidRequest(
                f"folder={checks.shown(folder)}: no folder can be made there: {error.strerror or error}"
            ) from None
        actor = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_concurrency=8)(Group)
        self._start: Callable[[], Any] = lambda: actor.remote(model, *message)
        self._queue: collections.deque[Job] = collections.deque()
        self._change, self._closed = threading.Condition(), False
        self._warm: Packed | None = None  # what `warmup` was asked for
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
            loaded = ray.get([actor.ready.remote() for actor in self._actors])
        except ray.exceptions.RayError as error:
            self._kill()
            raise Error(f"a group's process ended while it loaded the model: {error}") from None
        notices.warn_all(text for _, _, texts in loaded for text in texts)
        if errors := [error for _, error, _ in loaded if error]:
            self._kill()
            raise unpack_error(errors[0])

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
        """Put a request in the queue: any verb of a pipeline, with its options. The queue keeps a checkpoint itself.

        wait: until there is room in the queue, at most `timeout` seconds; False: not at all. Raises PoolFull if there
        is none, InvalidRequest for what no request can be.
        """
        wait, timeout = checks.flag("wait", wait), None if timeout is None else SECONDS("timeout", timeout)
        request = Request.make(verb, prompt=prompt, **options)
        if request.checkpoint is not None:
            raise InvalidRequest("checkpoint: a pool keeps one for every job; leave it out")
        arguments = {"seed": random_seed(), **request.arguments()}  # the same seed for every attempt
        arguments |= {"loras": absolute(request.loras)} if request.loras else {}
        job = Job(self, request.verb, arguments)
        with self._change:
            self._change.wait_for(lambda: self._closed or len(self._queue) < self.waiting, timeout if wait else 0)
            if self._closed:
                raise Error("this pool was closed; make a new one")
            if len(self._queue) >= self.waiting:
                raise PoolFull(f"{len(self._queue)} jobs wait already; wait for one, or allow more with waiting=")
            self._queue.append(job)
            self._change.notify_all()
        return job

    def warmup(self, sizes: Any = None, **options: Unpack[AnyOptions]) -> dict[str, float]:
        """`Pipeline.warmup` on all groups, and on those that replace them later. Returns the seconds of each size, in
        the slowest group."""
        ray, message = _ray(), _plain({"sizes": sizes, "options": {**options}})
        try:
            packed = ray.get([actor.warmup.remote(*message) for actor in self._actors])
        except ray.exceptions.RayError as error:
            raise WorkerFailed(-1, -1, f"a group's process ended while it warmed up: {error}") from None
        answers = [unpack(Message(*one)) for one in packed]
        if errors := [answer["error"] for answer in answers if "error" in answer]:
            raise unpack_error(errors[0])
        self._warm = message
        return {name: max(one["seconds"][name] for one in answers) for name in answers[0]["seconds"]}

    def close(self) -> None:
        """End all groups. Jobs that are not done raise Cancelled."""
        with self._change:
            self._closed = True
            waiting = list(self._queue)
            self._queue.clear()
            self._change.notify_all()
        for job in waiting:
            job._finish(Cancelled("the pool was closed"))
        self._kill()
        for thread in self._threads:
            thread.join()
        if self._temporary is not None:
            self._temporary.cleanup()

    def __repr__(self) -> str:
        return f"<Pool of {self.groups} groups, {len(self._queue)} jobs waiting>"

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    # ------------------------------------------------------------ one thread for each group

    def _serve(self, number: int) -> None:
        while (job := self._next_job()) is not None:
            try:
                self._run(number, job)
            except BaseException as error:  # nobody may wait for ever
                job._finish(error)

    def _next_job(self) -> Job | None:
        with self._change:
            self._change.wait_for(lambda: self._closed or self._queue)
            if self._closed:
                return None
            job = self._queue.popleft()
            self._change.notify_all()
            return job

    def _run(self, number: int, job: Job) -> None:
        ray, folder = _ray(), str(self._folder / f"{job.name}.ckpt")
        job.attempts += 1
        job.group = actor = self._actors[number]
        try:
            answer = unpack(Message(*ray.get(actor.run.remote(job.name, folder, *job.message))))
        except ray.exceptions.RayError as error:  # killed, out of memory, or its machine is gone
            text = f"the group's process ended: {' '.join(str(error).split()):.300}"
            answer = {"retry": text, "replace": True}
        finally:
            job.group = None
        if "replace" in answer:
            self._replace(number)
        if "video" in answer:
            for text in answer["warnings"]:
                log.warning("job %s: %s", job.name, text)
            job.warnings = answer["warnings"]
            job._finish(answer["video"])
        elif (result := self._retry_or_error(job, answer)) is not None:
            shutil.rmtree(folder, ignore_errors=True)
            job._finish(result)

    def _replace(self, number: int) -> None:
        """A new group for one that is dead or has no model."""
        _ray().kill(self._actors[number])
        with self._change:
            if not self._closed:
                self._actors[number] = self._start()
                if self._warm is not None:
                    self._actors[number].warmup.remote(*self._warm)  # ahead of its first job

    def _retry_or_error(self, job: Job, answer: dict[str, Any]) -> Exception | None:
        """Put a job whose group died back to the head of the queue, if it may be started again; else its error."""
        with self._change:
            if self._closed:
                return Cancelled("the pool was closed")
            if job.cancelled:
                return Cancelled("the job was cancelled")
            if "error" in answer:
                return unpack_error(answer["error"])
            if job.attempts > self.retries:
                return WorkerFailed(-1, -1, f"{answer['retry']}; it was begun {job.attempts} times")
            self._queue.appendleft(job)
            self._change.notify_all()
            return None

    def _remove(self, job: Job) -> None:
        with self._change:
            if job not in self._queue:
                return
            self._queue.remove(job)
            self._change.notify_all()
        job._finish(Cancelled("the job was cancelled"))

    def _kill(self) -> None:
        ray = _ray()
        for actor in self._actors:
            ray.kill(actor)


def _connected_ray() -> Any:
    """Ray, on the cluster that the program is connected to or that RAY_ADDRESS names, or on a local one of its own."""
    ray = _ray()
    if ray.is_initialized():
        return ray
    quiet = {"log_to_driver": False, "configure_logging": False}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**quiet)
        return ray
    with local_only(ray):
        ray.init("local", _node_ip_address="127.0.0.1", include_dashboard=False, **quiet)
    return ray


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise BackendUnavailable("a pool runs on Ray, which is not installed: pip install fastvid[ray]") from None
    return ray


__all__ = ["Group", "Job", "Pool"]
