"""Turns clean latents into the frames of a video, in order: VAE decoding, blending at known frames, output.

A chunk is decoded in one of two ways, with the same frames in the same order:

    in place           in the caller's thread, when its frames are pulled
    beside denoising   in a second thread (on a GPU in a second CUDA stream) while the denoiser runs; it gets new
                       latents only after it has finished the earlier ones, so at most one window (or block) is pending

Decoding beside denoising is for GPUs with room for both. On a CPU torch's threads fill the cores already, and the
thread saves no work (2.36 against 2.30 processor seconds for 49 frames of 160x96, embedded model, one torch thread).
Whether it saves time on many cores has not been measured; `benchmarks/bench_stream.py beside` measures it.

Shapes: C channels, T latent frames of a chunk, n frames, H/W output height and width. Frame numbers count along the
segment's stream.
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

from fastvid.device.precision import computing
from fastvid.engine import finite
from fastvid.engine.events import Frames
from fastvid.engine.queue import Scheduler, Ticket
from fastvid.models.loaded import Model
from fastvid.requests.timeline import Segment

Decoded = tuple[np.ndarray, int, float]
"""A chunk's frames uint8 [n, H, W, 3], the number of the first, and the seconds spent decoding."""

FADE = 4
"""How many frames on each side of a known frame are corrected."""


def faster_beside(device: torch.device) -> bool:
    """Whether decoding beside denoising is faster than after it."""
    return device.type == "cuda"


GPU_PIXELS = 1 << 22
"""Pixels, of all its frames, in a chunk that keeps a GPU busy: the first stages, which have 1/64 of the pixels, then
make 1.5 output tiles of 128 x 128 and more for each of 132 multiprocessors, and a chunk takes far longer than starting
its kernels. Computed, not measured."""


def decode_chunk(segment: Segment) -> int:
    """Latent frames per decoded chunk on a CPU, whose caches are small; on a GPU the least."""
    return _frames_of(segment, 1 << 17)


def decode_chunks(segment: Segment, device: torch.device, bands: int = 1) -> list[int]:
    """Latent frames per decoded chunk, from what is best on a device to the least, in halves, for a plan to choose from
    by memory. bands: ranks that share the rows. Results are the same to within rounding."""
    least = decode_chunk(segment)
    counts = [_frames_of(segment, GPU_PIXELS * bands)] if device.type == "cuda" else [least]
    while counts[-1] > least:
        counts.append(max(least, counts[-1] // 2))
    return counts


def _frames_of(segment: Segment, pixels: int) -> int:
    """The latent frames, at least one, that have so many pixels."""
    each = segment.model_height * segment.model_width * segment.temporal
    return max(1, min(segment.columns - segment.lead, pixels // each))


def decode_rgb(model: Model, latents: Tensor, cache: Any, stripes: int = 1, reuse: bool = False) -> tuple[Tensor, Any]:
    """WanVAE.decode_rgb. Raises Error, with the likely cause, where the frames are not finite."""
    try:
        return model.vae.decode_rgb(latents, cache, stripes, reuse, model.bands)
    except FloatingPointError:
        raise finite.not_finite(model, finite.DECODED) from None


class Decoder:
    """Decodes a segment's latents chunk by chunk, in place (in the ticket's step turns) or beside denoising.

    An error in the thread is raised where its frames would have been yielded. stripes: the number of horizontal stripes
    in which each frame is decoded.
    """

    def __init__(self, model: Model, segment: Segment, ticket: Ticket, beside: bool = False, stripes: int = 1) -> None:
        # Ranks decode together: a second thread's collectives would interleave with the denoiser's.
        assert not beside or model.mesh.size == 1
        self._model, self._segment, self._ticket, self._stripes = model, segment, ticket, stripes
        self._cache: Any = None  # the VAE's state between chunks
        self._start = 0  # number of the next frame
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fastvid-decode") if beside else None
        self._pending: deque[Future[Decoded]] = deque()
        self._failed = False

    def put(self, chunks: Sequence[Tensor]) -> Iterator[Decoded]:
        """Takes the next latents [1, C, T, h, w] and yields the chunks decoded so far. Beside denoising, first waits
        for all earlier latents."""
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
        """Yields the chunks that are still pending after the last `put`."""
        while self._pending:
            yield self._pending.popleft().result()

    def close(self) -> None:
        """Ends the thread, after the chunk that it is decoding."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()

    def _decode(self, latents: Tensor) -> Decoded:
        began, start = time.perf_counter(), self._start
        model, reuse = self._model, self._cache is not None  # nobody else holds the cache: decode into its memory
        frames, self._cache = decode_rgb(model, latents, self._cache, self._stripes, reuse)
        self._start = start + len(frames[0])
        cropped = self._segment.crop(frames[0]).contiguous().cpu().numpy()
        return cropped, start, time.perf_counter() - began

    def _decode_beside(self, latents: Tensor, ready: Any) -> Decoded:
        """ready: the CUDA event after which the latents are valid."""
        try:
            with self._ticket.decoding() as scheduler, computing(), self._on_stream(scheduler, latents, ready):
                assert not self._failed  # after an error no chunk is decoded
                return self._decode(latents)
        except BaseException:
            self._failed = True
            raise

    def _on_stream(self, scheduler: Scheduler, latents: Tensor, ready: Any) -> AbstractContextManager[Any]:
        if ready is None:
            return nullcontext()
        # One stream for all requests: torch's allocator does not share cached memory between streams.
        stream = scheduler.decode_stream = scheduler.decode_stream or torch.cuda.Stream(self._model.device)
        stream.wait_event(ready)
        latents.record_stream(stream)
        return torch.cuda.stream(stream)


class KnownFrameBlend:
    """Corrects the frames next to known frames, so that no seam shows.

    The VAE (and the model) reproduce a known frame with a small difference, while the video shows the known frame
    itself. The same difference is added to the frames next to it, fading out over FADE frames. Over 12 clips extended
    by the embedded model this lowered the change at the seam from 1.20 to 1.01 times the allowed one (median), and
    the frames were no farther from the true ones (2.30 against 2.32 levels).

    known: uint8 [H, W, 3] by frame number: the frames just before and after the output, and pictures within it, which
    are output unchanged. All of them must be decoded too.
    """

    def __init__(self, segment: Segment, known: Mapping[int, np.ndarray]) -> None:
        self._segment, self._known = segment, dict(known)
        self._difference: dict[int, np.ndarray] = {}  # known minus decoded, by frame number
        self._held: list[np.ndarray] = []  # frames waiting for a known frame; the first is number _next
        self._next = 0

    @property
    def last(self) -> int:
        """The last frame that must be decoded."""
        return max(self._segment.skip + self._segment.num_frames - 1, *self._known, 0)

    def put(self, frames: np.ndarray, start: int) -> Iterator[tuple[np.ndarray, int]]:
        """Takes the next decoded frames [n, H, W, 3], the first of them number `start`. Yields the output frames that
        are final now, with the number of the first."""
        stop = start + len(frames)
        for number in sorted(n for n in self._known if start <= n < stop):
            self._difference[number] = self._known[number].astype(np.float32) - frames[number - start]
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
        output = [self._corrected(frame, n) for n, frame in enumerate(frames, start) if begin <= n < end]
        if output:
            yield np.stack(output), max(start, begin)
        for number in [n for n in self._difference if n + FADE < start + len(frames)]:
            del self._difference[number], self._known[number]

    def _corrected(self, frame: np.ndarray, number: int) -> np.ndarray:
        weights = {n: 1 - abs(number - n) / (FADE + 1) for n in self._difference if abs(number - n) <= FADE}
        if not weights:
            return frame
        if number in weights:
            return self._known[number]
        total = max(1.0, sum(weights.values()))
        difference = sum(weight / total * self._difference[n] for n, weight in weights.items())
        return (frame + difference).round().clip(0, 255).astype(np.uint8)


def frames_to_blend(
    segment: Segment, left: np.ndarray | None, after: np.ndarray | None, pictures: Mapping[int, np.ndarray]
) -> dict[int, np.ndarray]:
    """The known frames [H, W, 3] for KnownFrameBlend, by frame number.

    left, after: the frames just before and just after the output. pictures: by output frame number. The stream's first
    frame is left out: it is output as decoded.
    """
    inside = {frame: picture for frame, picture in pictures.items() if not segment.is_behind(frame)}
    known = {segment.skip + frame: picture for frame, picture in inside.items() if segment.skip + frame > 0}
    if left is not None:
        known[segment.skip - 1] = left
    if after is not None:
        known[segment.skip + segment.num_frames] = after
    return known


class Output:
    """Puts the frames of a timeline's parts in order. Spills out-of-order parts to temporary files, which `close`
    removes, so memory does not grow with them."""

    def __init__(self) -> None:
        self._part = self._frame = 0  # the next part and frame to output
        self._files: dict[int, Any] = {}
        self._shapes: dict[int, list[tuple[int, ...]]] = {}

    def put(self, part: int, frames: np.ndarray) -> Iterator[Frames]:
        """Takes the next frames uint8 [n, H, W, 3] of a part; yields those that are in order."""
        if part == self._part:
            yield self._next(frames)
        else:
            self._spill(part, frames)

    def end(self, part: int) -> Iterator[Frames]:
        """Marks a part as complete; yields the spilled frames that are in order now."""
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
