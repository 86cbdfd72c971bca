"""The alpha channel of VP8 and VP9 in WebM: a second stream of the same codec, beside each packet (the container's
BlockAdditional number 1), whose luma is the alpha of the packet's frame."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np

from fastvid.media.files import MAX_CLIP_PIXELS

SIDE_DATA = "matroska_block_additional"
ALPHA = (1).to_bytes(8, "big")  # how FFmpeg hands over number 1
KEPT = 4  # frames: the reader looks one ahead, and decoders without frame threads return each right after its packet


def has_alpha(stream: Any) -> bool:
    """Whether a stream states alpha that its decoder does not read."""
    return stream.metadata.get("alpha_mode") == "1" and stream.codec_context.name in ("vp8", "vp9")


class AlphaDecoder:
    """Decodes the alpha of a stream's packets, beside its frames."""

    def __init__(self, codec: str) -> None:
        import av

        self._decoder: Any = av.CodecContext.create(codec, "r")
        self._decoder.thread_count = 1
        self._decoder.options = {"max_pixels": str(MAX_CLIP_PIXELS)}
        self._planes: dict[Any, np.ndarray] = {}  # by presentation time

    def put(self, packet: Any) -> None:
        """Take the alpha of a packet, before the packet is decoded."""
        import av

        data = bytes(packet.get_sidedata(SIDE_DATA)) if packet.has_sidedata(SIDE_DATA) else b""
        if data[:8] != ALPHA:
            return
        beside = av.Packet(data[8:])
        beside.pts, beside.dts, beside.time_base = packet.pts, packet.dts, packet.time_base
        with contextlib.suppress(av.error.InvalidDataError):
            for frame in self._decoder.decode(beside):
                self._planes[packet.pts] = _luma(frame)
        while len(self._planes) > KEPT:
            del self._planes[next(iter(self._planes))]

    def plane(self, time: Any) -> np.ndarray | None:
        """The alpha uint8 [H, W] of the frame with this presentation time; None: it is opaque."""
        return self._planes.get(time)


def _luma(frame: Any) -> np.ndarray:
    """A frame's first plane, as it is."""
    plane = frame.planes[0]
    rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
    return rows[: frame.height, : frame.width].copy()
