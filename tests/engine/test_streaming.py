"""What runs beside what: decoding beside denoising, writing beside both, requests beside each other from threads and
tasks. Frames are the same bytes as one after the other, errors and cancelling come through, and no thread stays."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time

import numpy as np
import pytest
import tiny
import torch
from streams import frames_of

import fastvid
from fastvid.engine import decode
from fastvid.engine.events import Finished, Frames, Started, Step
from fastvid.engine.queue import PATIENCE, Scheduler, Ticket
from fastvid.media.writer import BackgroundWriter

SMALL = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    """Windows of three columns, latents carried on."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny.write_checkpoint(folder)
    loaded = fastvid.load(str(folder), device="cpu")
    recipe = dataclasses.replace(loaded._model.preset, window=3, carries=True)
    return fastvid.Pipeline(dataclasses.replace(loaded._model, preset=recipe))


@pytest.fixture
def beside(monkeypatch):
    """As on a device where it is worth it."""
    monkeypatch.setattr(decode, "faster_beside", lambda device: True)


def ours() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("fastvid-")]


def scheduled(pipe: fastvid.Pipeline, **limits: int) -> tuple[fastvid.Pipeline, Scheduler]:
    """The same model, with a scheduler of its own."""
    made = fastvid.Pipeline(pipe._model)
    made._scheduler = Scheduler(**limits)
    return made, made._scheduler


# ---------------------------------------------------------------- decoding


def test_frames_beside_are_those_in_place(pipe, monkeypatch):
    request = {"num_frames": 45, "seed": 3, **SMALL}
    alone = frames_of(pipe.stream("a red circle", **request))
    monkeypatch.setattr(decode, "faster_beside", lambda device: True)
    stream, kinds = pipe.stream("a red circle", **request), []
    made = []
    for event in stream:
        assert torch.is_grad_enabled()
        kinds.append(type(event))
        made += [event] if isinstance(event, Frames) else []
    assert pipe.plan("a", **request).decode_beside and pipe.plan("a", **request).segments == 1
    assert np.array_equal(frames_of(made), alone) and alone.std() > 5
    assert [e.start for e in made] == [sum(len(e.frames) for e in made[:i]) for i in range(len(made))]
    assert kinds[0] is Started and kinds[-1] is Finished and not ours()
    assert kinds.index(Frames) < len(kinds) - 1 - kinds[::-1].index(Step)


def test_a_window_is_decoded_while_the_next_is_denoised(pipe, beside, monkeypatch):
    """The denoiser waits for a chunk that is being decoded at the same time, which only a second thread can do."""
    decoded, seen = threading.Event(), []
    decode_rgb, step = type(pipe._model.vae).decode_rgb, type(pipe._model.transformer).forward

    def watched(self, *given):
        seen.append(threading.current_thread().name)
        done = decode_rgb(self, *given)
        decoded.set()
        return done

    calls = []

    def slow(self, *args, **kwargs):
        calls.append(None)
        assert len(calls) != 3 or decoded.wait(20)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(type(pipe._model.vae), "decode_rgb", watched)
    monkeypatch.setattr(type(pipe._model.transformer), "forward", slow)
    pipe.generate("a", num_frames=17, seed=0, **SMALL)
    assert len(calls) > 3 and all(name.startswith("fastvid-decode") for name in seen)


def test_segments_wait_for_the_frames_they_begin_with(pipe, monkeypatch):
    """A loop over many windows of a model that does not carry latents on."""
    recipe = dataclasses.replace(pipe._model.preset, carries=False)
    other = fastvid.Pipeline(dataclasses.replace(pipe._model, preset=recipe))
    request = {"num_frames": 21, "seed": 5, **SMALL}
    alone = other.generate("a red circle", **request)
    monkeypatch.setattr(decode, "faster_beside", lambda device: True)
    again = other.generate("a red circle", **request)
    assert other.plan("a", **request).segments > 1
    assert np.array_equal(alone.frames, again.frames) and torch.equal(alone.latents, again.latents)


def test_an_error_of_the_decoder_comes_through(pipe, beside, monkeypatch):
    calls = []

    def broken(self, latents, *rest):
        calls.append(None)
        raise KeyError("full")

    monkeypatch.setattr(type(pipe._model.vae), "decode_rgb", broken)
    with pytest.raises(KeyError, match="full"):
        pipe.generate("a", num_frames=25, **SMALL)
    assert len(calls) == 1 and not ours()


@pytest.mark.parametrize("end", ["close", "cancel", "drop"])
def test_no_thread_is_left_behind(pipe, beside, end):
    pipe, scheduler = scheduled(pipe)
    stream = pipe.stream("a", num_frames=45, **SMALL)
    while not isinstance(next(stream), Frames):
        pass
    assert ours()
    if end == "cancel":
        stream.cancel()
        with pytest.raises(fastvid.Cancelled):
            list(stream)
    elif end == "close":
        stream.close()
    del stream
    assert not ours() and not scheduler.running


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_frames_beside_are_those_in_place(monkeypatch):
    on_gpu, request = fastvid.load("embedded", device="cuda"), {"num_frames": 97, "seed": 3, **SMALL}
    assert on_gpu.plan("a", **request).decode_beside
    made = on_gpu.generate("a red circle", **request)
    monkeypatch.setattr(decode, "faster_beside", lambda device: False)
    alone = on_gpu.generate("a red circle", **request)
    assert torch.equal(made.latents, alone.latents) and np.array_equal(made.frames, alone.frames)


# ---------------------------------------------------------------- writing


class Sink:
    def __init__(self, fail_at: int = -1) -> None:
        self.got, self.fail_at, self.threads = [], fail_at, set()

    def write(self, frames: np.ndarray) -> None:
        self.threads.add(threading.current_thread().name)
        if len(self.got) == self.fail_at:
            raise fastvid.MediaError("the disk is full")
        self.got.append(frames)


def test_writing_keeps_the_order_and_raises():
    sink, given = Sink(), [np.full((1, 2, 2, 3), i, np.uint8) for i in range(9)]
    with BackgroundWriter(sink) as beside:
        for frames in given:
            beside.write(frames)
        beside.finish()
        assert [a is b for a, b in zip(sink.got, given, strict=True)] == [True] * 9
    assert threading.current_thread().name not in sink.threads and not ours()
    with pytest.raises(fastvid.MediaError, match="full"), BackgroundWriter(Sink(3)) as beside:
        for frames in given:
            beside.write(frames)
        beside.finish()
    assert not ours()


def test_writing_waits_where_the_sink_is_slow():
    gate, sink = threading.Event(), Sink()
    plain = sink.write
    sink.write = lambda frames: gate.wait(20) and plain(frames)
    given = iter([np.zeros((1, 2, 2, 3), np.uint8)] * 50)
    with BackgroundWriter(sink) as beside:
        caller = threading.Thread(target=lambda: [beside.write(frames) for frames in given])
        caller.start()
        time.sleep(0.1)
        assert sum(1 for _ in given) >= 50 - 4  # two are with it, one in the caller's hand
        gate.set()
        caller.join()


# ---------------------------------------------------------------- many requests

OTHERS = [
    {"num_frames": 9, "seed": 1, **SMALL},
    {"num_frames": 17, "seed": 2, **SMALL, "guidance_scale": 2.0},
    {"num_frames": 5, "seed": 3, **SMALL, "width": 96, "solver": "dpm++"},
    {"num_frames": 13, "seed": 4, **SMALL, "num_inference_steps": 3, "solver": "euler"},
]


@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_four_threads_and_four_tasks_equal_each_alone(pipe, at_once, monkeypatch):
    monkeypatch.setattr(decode, "faster_beside", lambda device: at_once != 2)
    alone = [pipe.generate("a red circle", **o).frames for o in OTHERS]
    pipe, scheduler = scheduled(pipe, running=at_once, steps=min(at_once, 2))
    got: dict[int, np.ndarray] = {}
    threads = [
        threading.Thread(target=lambda i=i: got.update({i: pipe.generate("a red circle", **OTHERS[i]).frames}))
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    async def all_of_them():
        return await asyncio.gather(*(pipe.agenerate("a red circle", **o) for o in OTHERS))

    tasks = [video.frames for video in asyncio.run(all_of_them())]
    assert all(np.array_equal(got[i], alone[i]) and np.array_equal(tasks[i], alone[i]) for i in range(4))
    assert not ours() and not scheduler.running


def test_requests_take_turns_and_one_step_runs_at_a_time(pipe, monkeypatch):
    forward, running, order, most = type(pipe._model.transformer).forward, [], [], []

    def watched(self, x, *args, **kwargs):
        running.append(None)
        most.append(len(running))
        order.append(x.shape[-1])
        time.sleep(0.02)
        try:
            return forward(self, x, *args, **kwargs)
        finally:
            running.pop()

    monkeypatch.setattr(type(pipe._model.transformer), "forward", watched)
    pipe, _ = scheduled(pipe)
    options = SMALL | {"num_inference_steps": 12, "num_frames": 5}
    threads = [threading.Thread(target=lambda w=w: pipe.generate("a", **options | {"width": w})) for w in (64, 80, 96)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1 and sorted(order) == [8] * 12 + [10] * 12 + [12] * 12
    together = order[max(order.index(w) for w in (8, 10, 12)) :][:18]
    assert all(len(set(together[i : i + 3])) == 3 for i in range(0, 18, 3))


def test_a_request_that_waits_has_made_nothing_and_can_be_cancelled(pipe):
    pipe, scheduler = scheduled(pipe, running=1)
    ticket = pipe.new_ticket()
    first, second = (each.stream("a", num_frames=5, **SMALL) for each in (pipe.with_ticket(ticket), pipe))
    next(first), next(first)
    with ticket.pulled():  # as while it makes a step
        assert isinstance(next(second), Started)
        ended: list[BaseException] = []

        def wait() -> None:
            try:
                next(second)
            except fastvid.Cancelled as error:
                ended.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(2 * PATIENCE)
        assert thread.is_alive() and (scheduler.running, scheduler.waiting) == (1, 1)
        second.cancel()
        thread.join(5)
    assert ended and isinstance(list(first)[-1], Finished) and not scheduler.running


def test_who_pulls_many_streams_from_one_thread_never_waits_for_himself(pipe):
    pipe, _ = scheduled(pipe, running=1)
    streams = [pipe.stream("a", seed=i, num_frames=5, **SMALL) for i in range(3)]
    running, start = list(streams), time.monotonic()
    while running:
        running = [stream for stream in running if next(stream, None) is not None]
    assert time.monotonic() - start < 10


def test_beginning_is_first_come_first_served():
    scheduler, order = Scheduler(running=1), []
    tickets = [Ticket(scheduler) for _ in range(5)]

    def work(number: int) -> None:
        with tickets[number].admitted():
            order.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(1, 5)]
    with tickets[0].admitted():
        for count, thread in enumerate(threads, 1):
            thread.start()
            while scheduler.waiting < count:
                time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert order == [1, 2, 3, 4]


def test_the_log_has_steps_and_the_plan_but_no_prompt(pipe, caplog):
    caplog.set_level("DEBUG", logger="fastvid.engine")
    pipe.generate("a red circle", num_frames=5, seed=7, **SMALL)
    levels = [record.levelname for record in caplog.records]
    assert levels.count("DEBUG") == SMALL["num_inference_steps"]
    begins, plan, *_, ends = [record.message for record in caplog.records]
    assert "generate, 64x64, 5 frames, seed 7" in begins and plan.startswith("plan: 1 segments, 2 steps")
    assert ends.startswith("request finished: 5 frames") and "circle" not in caplog.text


# ---------------------------------------------------------------- async


def test_astream_has_the_events_and_leaves_the_loop_free(pipe):
    async def main():
        ticks, done = 0, asyncio.Event()

        async def tick():
            nonlocal ticks
            while not done.is_set():
                ticks += 1
                await asyncio.sleep(0.001)

        ticking = asyncio.create_task(tick())
        events = [event async for event in pipe.astream("a red circle", num_frames=17, seed=6, **SMALL)]
        done.set()
        await ticking
        return events, ticks

    events, ticks = asyncio.run(main())
    plain = list(pipe.stream("a red circle", num_frames=17, seed=6, **SMALL))
    assert [type(e) for e in events] == [type(e) for e in plain] and ticks >= 10
    assert np.array_equal(frames_of(events), frames_of(plain)) and not ours()


def test_cancelling_a_task_cancels_the_request(pipe, beside):
    pipe, scheduler = scheduled(pipe)

    async def main():
        steps = []

        async def consume():
            async for event in pipe.astream("a", num_frames=5, **SMALL | {"num_inference_steps": 500}):
                if isinstance(event, Step):
                    steps.append(event)

        for begin in (consume, lambda: pipe.agenerate("a", num_frames=5, **SMALL | {"num_inference_steps": 500})):
            task = asyncio.create_task(begin())
            await asyncio.sleep(0.2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert not scheduler.running
        return steps

    assert 0 < len(asyncio.run(main())) < 400
    deadline = time.monotonic() + 5
    while ours() and time.monotonic() < deadline:  # the threads have nothing left to do but end
        time.sleep(0.01)
    assert not ours()


def test_async_errors_and_other_verbs(pipe):
    clip = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), dtype=np.uint8)

    async def main():
        with pytest.raises(fastvid.InvalidRequest, match="width"):
            await pipe.agenerate("a", width=3)
        with pytest.raises(fastvid.InvalidRequest, match="width"):
            async for _ in pipe.astream("a", width=3):
                pass
        async for event in pipe.astream("a", num_frames=45, **SMALL):
            if isinstance(event, Step):
                break
        return await pipe.aextend(clip, "a red circle", seconds=0.5, num_inference_steps=1, seed=1)

    video = asyncio.run(main())
    plain = pipe.extend(clip, "a red circle", seconds=0.5, num_inference_steps=1, seed=1)
    assert np.array_equal(video.frames, plain.frames) and np.array_equal(video.frames[:9], clip)
    verbs = (
        "generate",
        "image",
        "extend",
        "loop",
        "blend",
        "edit",
        "storyboard",
        "finalize",
        "interpolate",
        "upscale",
        "stream",
    )
    assert all(hasattr(pipe, f"a{verb}") for verb in verbs)
