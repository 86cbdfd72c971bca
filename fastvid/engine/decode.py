"""From clean latents to uint8 frames, in place or beside the denoising of what comes next.

In place: a chunk is decoded when it is asked for. Beside: one thread decodes what has become clean (on a GPU on a
stream of its own) while the denoiser goes on; before more is given to it, what it was given before is taken from it, so
at most the latents and frames of one window (or block) are on their way. Frames, and their order, are the same.

Where: beside on a GPU, if both fit at once. In place on a CPU: torch's threads fill its cores already, and the thread
saves no work (2.36 against 2.30 processor seconds for 49 frames of 160x96, embedded model, one torch thread); whether
it gains time on many cores has not been measured. `benchmarks/bench_stream.py beside` does.

Shapes: C channels, T latent frames of a chunk, n frames of it (`fastvid.engine.seams` says which come out), H/W the
height and width that come out.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvid.device.precision import ieee_fp32
from fastvid.engine.queue import Scheduler, Ticket
from fastvid.models.loaded import Model
from fastvid.requests.timeline import Segment

Decoded = tuple[np.ndarray, int, float]
"""uint8 frames [n, H, W, 3] of a chunk, the stream's frame that it began with, seconds it took."""


def worth_it(device: torch.device) -> bool:
    """Whether decoding beside denoising is faster than one after the other."""
    return device.type == "cuda"


def settle(device: torch.device) -> None:
    """Wait until what was computed on a GPU in this thread's stream is done, so that steps are told when they are, are
    timed right, and end soon when cancelled."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


class Decoder:
    """The VAE on one stream of latents: each chunk goes on from the cache that the one before has left."""

    def __init__(self, parts: Model, segment: Segment, stripes: int = 1) -> None:
        self.parts, self.segment, self.stripes = parts, segment, stripes
        self.cache: Any = None
        self.start = 0  # the stream's next frame

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Decoded:
        """The next latents [1, C, T, h, w]."""
        mark, start = time.perf_counter(), self.start
        with ieee_fp32():
            # The cache is this stream's own, so its memory may be used again.
            again = self.cache is not None
            frames, self.cache = self.parts.vae.decode_rgb(latents, self.cache, self.stripes, again, self.parts.bands)
        rgb = frames[0]
        self.start = start + len(rgb)
        cropped = self.segment.crop(rgb).contiguous().cpu().numpy()
        return cropped, start, time.perf_counter() - mark


class InPlace:
    """Decodes in the caller's thread. `finish` and `close` have nothing to do."""

    def __init__(self, decoder: Decoder, ticket: Ticket) -> None:
        self.decoder, self._ticket = decoder, ticket

    def put(self, chunks: Sequence[Tensor]) -> Iterator[Decoded]:
        """Give the next chunks [1, C, T, h, w]; yields what is decoded by now."""
        for chunk in chunks:
            with self._ticket.step():
                decoded = self.decoder.decode(chunk)
            yield decoded

    def finish(self) -> Iterator[Decoded]:
        """What is still to come, after the last `put`."""
        return iter(())

    def close(self) -> None:
        """Stop, and leave no thread behind."""


class Beside:
    """Decodes in a thread of its own; the same to use as InPlace. An error is raised where its frames would come."""

    def __init__(self, decoder: Decoder, ticket: Ticket) -> None:
        # Ranks decode together: the messages of this thread would meet those of the denoiser.
        assert decoder.parts.mesh.size == 1
        self.decoder, self._ticket, self._device = decoder, ticket, decoder.parts.device
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fastvid-decode")
        self._coming: deque[Future[Decoded]] = deque()
        self._failed = False

    def put(self, chunks: Sequence[Tensor]) -> Iterator[Decoded]:
        """See InPlace. Waits for what was given before, if more is given."""
        while self._coming and (chunks or self._coming[0].done()):
            yield self._coming.popleft().result()
        made = torch.cuda.current_stream(self._device).record_event() if self._device.type == "cuda" else None
        self._coming.extend(self._thread.submit(self._decode, chunk, made) for chunk in chunks)

    def finish(self) -> Iterator[Decoded]:
        """See InPlace."""
        while self._coming:
            yield self._coming.popleft().result()

    def close(self) -> None:
        """See InPlace. A chunk that is being decoded is waited for."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._coming.clear()

    def _decode(self, latents: Tensor, made: Any) -> Decoded:
        """made: the event after which the latents are there."""
        try:
            with self._ticket.decoding() as scheduler, self._on_side(scheduler, latents, made):
                assert not self._failed  # nobody takes what comes after an error
                return self.decoder.decode(latents)
        except BaseException:
            self._failed = True
            raise

    def _on_side(self, scheduler: Scheduler, latents: Tensor, made: Any) -> Any:
        if made is None:
            return nullcontext()
        # One stream for all: what torch's allocator keeps for a stream, no other can have.
        scheduler.decode_stream = scheduler.decode_stream or torch.cuda.Stream(self._device)
        scheduler.decode_stream.wait_event(made)
        latents.record_stream(scheduler.decode_stream)
        return torch.cuda.stream(scheduler.decode_stream)


def open_decoder(parts: Model, segment: Segment, ticket: Ticket, beside: bool, stripes: int = 1) -> InPlace | Beside:
    """The decoder of a segment of the request that has this ticket, frames in so many stripes of rows."""
    return (Beside if beside else InPlace)(Decoder(parts, segment, stripes), ticket)


def decode_chunk(segment: Segment) -> int:
    """Latent frames decoded at a time: one for large frames, more where a frame is small."""
    pixels = segment.made_height * segment.made_width * segment.temporal
    return max(1, min(segment.columns - segment.lead, (1 << 17) // pixels))
