"""From clean latents to the frames of a video, in order: the VAE, the frames beside known ones, and the output.

In place, a chunk is decoded when it is asked for. Beside denoising, one thread decodes (on a GPU on a stream of its own)
while the denoiser goes on; the thread gets new latents only after its earlier ones are done, so at most one window (or
block) is under way. Frames, and their order, are the same.

Beside is for GPUs, where both fit at once. On a CPU, torch's threads fill the cores already, and the thread saves no work
(2.36 against 2.30 processor seconds for 49 frames of 160x96, embedded model, one torch thread); whether it saves time on
many cores has not been measured. `benchmarks/bench_stream.py beside` does.

Shapes: C channels, T latent frames of a chunk, n frames, H/W the height and width that come out. Frames are counted along
the segment's stream.
"""

from __future__ import annotations

import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvid.device.precision import ieee_fp32
from fastvid.engine.events import Frames
from fastvid.engine.queue import Scheduler, Ticket
from fastvid.models.loaded import Model
from fastvid.requests.timeline import Segment

Decoded = tuple[np.ndarray, int, float]
"""uint8 frames [n, H, W, 3] of a chunk, the number of the first, and the seconds that decoding took."""

FADE = 4
"""Frames on each side of a known one that are corrected."""


def faster_beside(device: torch.device) -> bool:
    """Whether decoding beside denoising is faster than after it."""
    return device.type == "cuda"


def decode_chunk(segment: Segment) -> int:
    """Latent frames decoded at a time: one for large frames, more where a frame is small."""
    pixels = segment.made_height * segment.made_width * segment.temporal
    return max(1, min(segment.columns - segment.lead, (1 << 17) // pixels))


def wait_for_gpu(device: torch.device) -> None:
    """Waits for the GPU's work in this thread's stream: then steps end, are timed and are cancelled when they seem to."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


class Decoder:
    """Decodes the latents of a segment, chunk after chunk, for the request that has this ticket: in the caller's thread,
    in its step turns, or beside denoising, in a thread of its own. An error is raised where its frames would come.

    stripes: of rows, in which a frame is decoded.
    """

    def __init__(self, model: Model, segment: Segment, ticket: Ticket, beside: bool = False, stripes: int = 1) -> None:
        # Ranks decode together: the messages of a second thread would mix with those of the denoiser.
        assert not beside or model.mesh.size == 1
        self._model, self._segment, self._ticket, self._stripes = model, segment, ticket, stripes
        self._cache: Any = None  # what the VAE keeps from one chunk to the next
        self._start = 0  # the next frame
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fastvid-decode") if beside else None
        self._pending: deque[Future[Decoded]] = deque()
        self._failed = False

    def put(self, chunks: Sequence[Tensor]) -> Iterator[Decoded]:
        """Takes the next latents [1, C, T, h, w], and yields what is decoded by now. Beside denoising it first waits for
        the latents taken earlier."""
        if self._thread is None:
            for chunk in chunks:
                with self._ticket.step():
                    decoded = self._decode(chunk)
                yield decoded
            return
        while self._pending and (chunks or self._pending[0].done()):
            yield self._pending.popleft().result()
        device = self._model.device
        ready = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
        self._pending.extend(self._thread.submit(self._decode_beside, chunk, ready) for chunk in chunks)

    def finish(self) -> Iterator[Decoded]:
        """Yields what is left after the last `put`."""
        while self._pending:
            yield self._pending.popleft().result()

    def close(self) -> None:
        """Ends the thread. A chunk that is being decoded is waited for."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()

    @torch.no_grad()
    def _decode(self, latents: Tensor) -> Decoded:
        mark, start = time.perf_counter(), self._start
        model, reuse = self._model, self._cache is not None  # the cache is this stream's own: its memory is reused
        with ieee_fp32():
            frames, self._cache = model.vae.decode_rgb(latents, self._cache, self._stripes, reuse, model.bands)
        self._start = start + len(frames[0])
        cropped = self._segment.crop(frames[0]).contiguous().cpu().numpy()
        return cropped, start, time.perf_counter() - mark

    def _decode_beside(self, latents: Tensor, ready: Any) -> Decoded:
        """ready: the event after which the latents are there."""
        try:
            with self._ticket.decoding() as scheduler, self._on_stream(scheduler, latents, ready):
                assert not self._failed  # nobody takes chunks after an error
                return self._decode(latents)
        except BaseException:
            self._failed = True
            raise

    def _on_stream(self, scheduler: Scheduler, latents: Tensor, ready: Any) -> AbstractContextManager[Any]:
        if ready is None:
            return nullcontext()
        # One stream for all requests: memory that torch's allocator keeps for a stream serves no other.
        stream = scheduler.decode_stream = scheduler.decode_stream or torch.cuda.Stream(self._model.device)
        stream.wait_event(ready)
        latents.record_stream(stream)
        return torch.cuda.stream(stream)


class KnownFrameBlend:
    """Corrects the frames beside known ones, so that no seam shows.

    A known frame goes through the VAE (and the model) like its neighbors and comes out a little different, while the video
    shows the frame itself. That difference is added to the frames beside it too, fading over FADE frames. Over 12 clips
    extended by the embedded model the change at the seam fell from 1.20 to 1.01 times what is allowed (median), and the
    frames came no farther from the true ones (2.30 against 2.32 levels).

    known: uint8 [H, W, 3] by frame number: frames beside those that come out, and pictures among them, which come out
    unchanged. All of them have to be decoded.
    """

    def __init__(self, segment: Segment, known: Mapping[int, np.ndarray]) -> None:
        self._segment, self._known = segment, dict(known)
        self._lost: dict[int, np.ndarray] = {}  # by frame: known minus decoded
        self._held: list[np.ndarray] = []  # frames that wait for a known one; the first is number _next
        self._next = 0

    @property
    def last(self) -> int:
        """The last frame that has to be decoded."""
        return max(self._segment.skip + self._segment.num_frames - 1, *self._known, 0)

    def put(self, frames: np.ndarray, start: int) -> Iterator[tuple[np.ndarray, int]]:
        """Takes the next decoded frames [n, H, W, 3], from number `start` on; yields those that are done, of those that
        come out, and the number of the first."""
        stop = start + len(frames)
        for number in sorted(n for n in self._known if start <= n < stop):
            self._lost[number] = self._known[number].astype(np.float32) - frames[number - start]
        if not self._held:
            self._next = start
        self._held.extend(frames)
        ready = min((n - FADE for n in self._known if n >= stop), default=stop)
        count = max(0, min(ready, stop) - self._next)
        done, self._held = self._held[:count], self._held[count:]
        first, self._next = self._next, self._next + count
        yield from self._finish(done, first)

    def _finish(self, frames: list[np.ndarray], start: int) -> Iterator[tuple[np.ndarray, int]]:
        begin, end = self._segment.skip, self._segment.skip + self._segment.num_frames
        chosen = [self._corrected(frame, n) for n, frame in enumerate(frames, start) if begin <= n < end]
        if chosen:
            yield np.stack(chosen), max(start, begin)
        for number in [n for n in self._lost if n + FADE < start + len(frames)]:
            del self._lost[number], self._known[number]

    def _corrected(self, frame: np.ndarray, number: int) -> np.ndarray:
        weights = {n: 1 - abs(number - n) / (FADE + 1) for n in self._lost if abs(number - n) <= FADE}
        if not weights:
            return frame
        if number in weights:
            return self._known[number]
        total = max(1.0, sum(weights.values()))
        lost = sum(weight / total * self._lost[n] for n, weight in weights.items())
        return (frame + lost).round().clip(0, 255).astype(np.uint8)


def frames_to_blend(
    segment: Segment, left: np.ndarray | None, after: np.ndarray | None, pictures: Mapping[int, np.ndarray]
) -> dict[int, np.ndarray]:
    """The known frames for KnownFrameBlend [H, W, 3] by number: `left`, just before those that come out, `after`, just
    after them, and pictures by number among them. Not the stream's first frame, which comes out as it is decoded."""
    found = {segment.skip + frame: picture for frame, picture in pictures.items() if segment.skip + frame > 0}
    if left is not None:
        found[segment.skip - 1] = left
    if after is not None:
        found[segment.skip + segment.num_frames] = after
    return found


class Output:
    """Brings the frames of a timeline's parts into order. Parts that are made early wait in temporary files, so memory
    does not grow with them; nothing is left after `close`."""

    def __init__(self) -> None:
        self._part = self._frame = 0  # the next to come out
        self._files: dict[int, Any] = {}
        self._shapes: dict[int, list[tuple[int, ...]]] = {}

    def put(self, part: int, frames: np.ndarray) -> Iterator[Frames]:
        """The next frames uint8 [n, H, W, 3] of a part."""
        if part == self._part:
            yield self._next(frames)
        else:
            self._spill(part, frames)

    def end(self, part: int) -> Iterator[Frames]:
        """A part has all of its frames; yields those of the parts that waited for it."""
        self._part += part == self._part
        while self._part in self._files:
            for frames in self._spilled(self._part):
                yield self._next(frames)
            self._part += 1

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _next(self, frames: np.ndarray) -> Frames:
        start, self._frame = self._frame, self._frame + len(frames)
        return Frames(start, frames)

    def _spill(self, part: int, frames: np.ndarray) -> None:
        if part not in self._files:
            self._files[part] = tempfile.TemporaryFile(prefix="fastvid-")  # noqa: SIM115 - closed by `close`
        self._files[part].write(np.ascontiguousarray(frames).tobytes())
        self._shapes.setdefault(part, []).append(frames.shape)

    def _spilled(self, part: int) -> Iterator[np.ndarray]:
        with self._files.pop(part) as file:
            file.seek(0)
            for shape in self._shapes.pop(part):
                yield np.frombuffer(file.read(int(np.prod(shape))), dtype=np.uint8).reshape(shape)
