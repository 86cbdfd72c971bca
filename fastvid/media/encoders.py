"""Encoded video: .mp4 (H.264), .webm (VP9) and .gif through PyAV, one frame at a time.

The same frames give the same bytes: no times, no random ids, a fixed number of encoder threads.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastvid.errors import MediaError

THREADS = 4  # of the encoder; their number decides bytes, so it does not follow the machine
BT709, LIMITED_RANGE = 1, 1  # ITU-T H.273 codes, the same in every FFmpeg version


@dataclass(frozen=True)
class Spec:
    """What is written: sides in pixels, frames a second."""

    width: int
    height: int
    fps: Fraction


class Output(io.FileIO):
    """A file for PyAV, which takes no notice of a write that was cut short, as the last one on a full disk is. (Given
    a name instead of a file, FFmpeg's fragmented MP4 muxer does not report a full disk at all.)"""

    def write(self, data: Any) -> int:
        view, done = memoryview(data).cast("B"), 0
        while done < len(view):
            done += super().write(view[done:]) or 0
        return done


class Graph(NamedTuple):
    """A configured filter graph. Its ends do not keep it alive, and crash without it."""

    graph: Any
    source: Any
    sink: Any


def _yuv_graph(spec: Spec) -> Graph:
    """RGB -> BT.709 limited range 4:2:0, chroma averaged over each 2x2 block, to within half a level."""
    graph, source = _graph(spec)
    scale = graph.add("scale", "flags=area+accurate_rnd+full_chroma_inp:out_color_matrix=bt709:out_range=tv")
    pixels, sink = graph.add("format", "yuv420p"), graph.add("buffersink")
    source.link_to(scale)
    scale.link_to(pixels)
    pixels.link_to(sink)
    graph.configure()
    return Graph(graph, source, sink)


def _palette_graph(spec: Spec) -> Graph:
    """RGB -> 256 colours, a palette for each frame, so that no frame is kept. Ordered dither: it does not flicker."""
    graph, source = _graph(spec)
    split, sink = graph.add("split"), graph.add("buffersink")
    make = graph.add("palettegen", "stats_mode=single:reserve_transparent=0")
    use = graph.add("paletteuse", "new=1:dither=bayer:bayer_scale=4")
    source.link_to(split)
    split.link_to(make, 0, 0)
    split.link_to(use, 1, 0)
    make.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    return Graph(graph, source, sink)


def _graph(spec: Spec) -> tuple[Any, Any]:
    import av.filter

    graph, rate = av.filter.Graph(), spec.fps
    time_base = f"{rate.denominator}/{rate.numerator}"
    size = f"{spec.width}x{spec.height}"
    return graph, graph.add("buffer", f"video_size={size}:pix_fmt=rgb24:time_base={time_base}:pixel_aspect=1/1")


@dataclass(frozen=True)
class Encoding:
    """How one kind of file is encoded. `encoders` are tried in order; `whole` is None where no remux is needed. ahead:
    the first encoder's option for how many frames it looks at before it writes one."""

    container: str
    encoders: tuple[str, ...]
    pixels: str
    graph: Callable[[Spec], Graph]
    options: dict[str, str]
    stage: dict[str, str]
    whole: dict[str, str] | None
    even: bool = False
    ahead: str = ""


MP4 = Encoding(
    container="mp4",
    encoders=("libx264", "libopenh264", "h264_videotoolbox", "h264_nvenc"),
    pixels="yuv420p",
    graph=_yuv_graph,
    options={"crf": "16", "preset": "medium"},
    stage={"movflags": "frag_keyframe+empty_moov+default_base_moof"},
    whole={"movflags": "+faststart"},
    even=True,
    ahead="rc-lookahead",
)
WEBM = Encoding(
    container="webm",
    encoders=("libvpx-vp9",),
    pixels="yuv420p",
    graph=_yuv_graph,
    options={"crf": "20", "b": "0", "deadline": "good", "cpu-used": "4", "lag-in-frames": "0", "auto-alt-ref": "0"},
    stage={},
    whole={"cues_to_front": "1"},
)
GIF = Encoding("gif", ("gif",), "pal8", _palette_graph, {}, {}, None)


def find_encoder(encoding: Encoding) -> str:
    """The first encoder that this PyAV has. Raises MediaError, which names the kinds of file that it can write."""
    import av

    for name in encoding.encoders:
        with contextlib.suppress(Exception):  # PyAV raises several types for an unknown encoder
            av.Codec(name, "w")
            return name
    wanted = ", ".join(encoding.encoders)
    raise MediaError(
        f"no encoder for .{encoding.container} (looked for {wanted}); a .npy or a folder of PNGs needs none"
    )


class EncodedWriter:
    """Encodes into the staging file as frames come (a fragmented MP4 plays even when the process is killed), then
    copies the packets into a file with its index in front, its exact size and its recipe."""

    def __init__(self, encoding: Encoding, stage: Path, spec: Spec, recipe: str | None) -> None:
        import av

        self._encoding, self._spec, self._stage = encoding, spec, stage
        self._padded = _even(spec) if encoding.even else spec
        self._graph = encoding.graph(self._padded)
        self._file = Output(stage, "w")
        options = encoding.stage | {"fflags": "+bitexact"}
        self._container = av.open(self._file, "w", format=encoding.container, options=options)
        if recipe is not None and encoding.whole is not None:
            self._container.metadata["comment"] = recipe
        self._stream = _add_stream(self._container, encoding, self._padded)
        self._pushed = self._encoded = 0

    def write(self, frame: np.ndarray) -> None:
        import av

        pad = (self._padded.height - self._spec.height, self._padded.width - self._spec.width)
        if any(pad):
            frame = np.pad(frame, ((0, pad[0]), (0, pad[1]), (0, 0)), mode="edge")
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        picture.pts, picture.time_base = self._pushed, 1 / self._spec.fps
        self._pushed += 1
        self._graph.source.push(picture)
        self._drain()

    def _drain(self) -> None:
        """Encode what the filters have ready."""
        with contextlib.suppress(BlockingIOError, EOFError):
            while True:
                picture = self._graph.sink.pull()
                picture.pts, picture.time_base = self._encoded, 1 / self._spec.fps
                self._encoded += 1
                self._mux(picture)

    def _mux(self, picture: Any) -> None:
        self._container.mux(self._stream.encode(picture))

    def finish(self, recipe: str | None) -> Path:
        self._graph.source.push(None)
        self._drain()
        self._mux(None)
        self._container.close()
        self._file.close()
        if self._encoding.whole is None:
            _append_gif_comment(self._stage, recipe)
            return self._stage
        whole = self._stage.with_name(self._stage.name + "2")
        _remux(self._encoding, self._stage, whole, self._spec, recipe)
        return whole

    def discard(self) -> None:
        for part in (getattr(self, "_container", None), getattr(self, "_file", None)):
            with contextlib.suppress(Exception):  # it is thrown away; a disk may still be full
                part.close()


def _even(spec: Spec) -> Spec:
    return Spec(spec.width + spec.width % 2, spec.height + spec.height % 2, spec.fps)


def _add_stream(container: Any, encoding: Encoding, spec: Spec) -> Any:
    name = find_encoder(encoding)
    stream = container.add_stream(name, rate=spec.fps)
    codec = stream.codec_context
    codec.width, codec.height, codec.pix_fmt = spec.width, spec.height, encoding.pixels
    codec.time_base, codec.thread_count = 1 / spec.fps, THREADS
    if encoding.container == "gif":
        return stream
    codec.gop_size, codec.max_b_frames = max(1, int(spec.fps / 2)), 0
    codec.colorspace = codec.color_primaries = codec.color_trc = BT709
    codec.color_range = LIMITED_RANGE
    if name == encoding.encoders[0]:
        # What is killed loses a group of pictures, which half a second is, and what the encoder looks ahead.
        codec.options = encoding.options | ({encoding.ahead: str(codec.gop_size // 2)} if encoding.ahead else {})
    else:  # others know no constant quality: about the bits that it takes
        codec.bit_rate = int(spec.width * spec.height * spec.fps / 4)
    return stream


def _remux(encoding: Encoding, stage: Path, whole: Path, spec: Spec, recipe: str | None) -> None:
    """Copy packets, with the exact size stated in the container: H.264 4:2:0 cannot say odd sides, so its pictures
    are an edge column or row larger, and decoders crop to what the file says (libavcodec/h264_slice.c)."""
    import av

    options = (encoding.whole or {}) | {"fflags": "+bitexact"}
    with (
        stage.open("rb") as file,
        av.open(file) as source,
        av.open(str(whole), "w", format=encoding.container, options=options) as target,
    ):
        if recipe is not None:
            target.metadata["comment"] = recipe
        stream = target.add_stream_from_template(source.streams.video[0])
        stream.codec_context.width, stream.codec_context.height = spec.width, spec.height
        stream.codec_context.framerate = spec.fps  # .webm states it; a template does not bring it along
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    if _payload(whole) != _payload(stage):
        raise MediaError("the file that was written does not hold what was encoded; is the disk full or failing?")


def _payload(path: Path) -> tuple[int, int]:
    """Packets and their bytes."""
    import av

    with path.open("rb") as file, av.open(file) as container:
        sizes = [packet.size for packet in container.demux(video=0) if packet.dts is not None]
    return len(sizes), sum(sizes)


def _append_gif_comment(path: Path, recipe: str | None) -> None:
    """A comment extension (GIF89a, 24) before the trailer; FFmpeg's muxer writes none."""
    if recipe is None:
        return
    data = recipe.encode("ascii")
    blocks = b"".join(bytes([len(part)]) + part for part in (data[i : i + 255] for i in range(0, len(data), 255)))
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x21\xfe" + blocks + b"\0;")


ENCODINGS = {".mp4": MP4, ".webm": WEBM, ".gif": GIF}
