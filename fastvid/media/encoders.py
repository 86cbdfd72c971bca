"""Encoded video: .mp4 and .mov (H.264), .webm (VP9) and .gif through PyAV, one frame at a time.

The same frames give the same bytes: no times, no random ids, a fixed number of encoder threads.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastvid import notices
from fastvid.errors import MediaError
from fastvid.media.sound import SoundWriter, Track, sound_encoder

THREADS = 4  # encoder threads. The output depends on their number, so it is the same on every machine.
BT709, LIMITED_RANGE = 1, 1  # ITU-T H.273 codes, the same in every FFmpeg version


@dataclass(frozen=True)
class VideoSpec:
    """Sides in pixels, frames a second."""

    width: int
    height: int
    fps: Fraction


class OutputFile(io.FileIO):
    """A file for PyAV that completes short writes. PyAV ignores them, such as the last write on a full disk. (If it
    opens the file by name, FFmpeg's fragmented MP4 muxer does not report a full disk at all.)"""

    def write(self, data: Any) -> int:
        view, written = memoryview(data).cast("B"), 0
        while written < len(view):
            written += super().write(view[written:]) or 0
        return written


class PipeFile(OutputFile):
    """A descriptor that is written from the front to the end, whatever is behind it."""

    def seekable(self) -> bool:
        return False


class Graph(NamedTuple):
    """A configured filter graph. Keep `graph` referenced: source and sink crash after it is freed."""

    graph: Any
    source: Any
    sink: Any


def _yuv_graph(spec: VideoSpec) -> Graph:
    """RGB -> BT.709 limited range 4:2:0, chroma averaged over each 2x2 block, to within half a level."""
    graph, source = _graph(spec)
    scale = graph.add("scale", "flags=area+accurate_rnd+full_chroma_inp:out_color_matrix=bt709:out_range=tv")
    pixels, sink = graph.add("format", "yuv420p"), graph.add("buffersink")
    graph.link_nodes(source, scale, pixels, sink).configure()
    return Graph(graph, source, sink)


def _palette_graph(spec: VideoSpec) -> Graph:
    """RGB -> 256 colors. A palette per frame, so no frames are buffered; ordered dither, which does not flicker."""
    graph, source = _graph(spec)
    split, sink = graph.add("split"), graph.add("buffersink")
    make = graph.add("palettegen", "stats_mode=single:reserve_transparent=0")
    use = graph.add("paletteuse", "new=1:dither=bayer:bayer_scale=4")
    graph.link_nodes(source, split, make)
    split.link_to(use, 1, 0)
    make.link_to(use, 0, 1)
    graph.link_nodes(use, sink).configure()
    return Graph(graph, source, sink)


def _graph(spec: VideoSpec) -> tuple[Any, Any]:
    import av.filter

    graph, rate = av.filter.Graph(), spec.fps
    time_base = f"{rate.denominator}/{rate.numerator}"
    size = f"{spec.width}x{spec.height}"
    return graph, graph.add("buffer", f"video_size={size}:pix_fmt=rgb24:time_base={time_base}:pixel_aspect=1/1")


@dataclass(frozen=True)
class Encoding:
    """How one kind of file is encoded.

    encoders: tried in order; options: for the first one; staging, final: muxer options of the staging file and of the
    finished one (final=None: no remux needed); lookahead: the first encoder's option for the number of frames that it
    buffers.
    """

    container: str
    encoders: tuple[str, ...]
    pixels: str
    graph: Callable[[VideoSpec], Graph]
    options: dict[str, str]
    staging: dict[str, str]
    final: dict[str, str] | None
    even_sides: bool = False
    lookahead: str = ""


MP4 = Encoding(
    container="mp4",
    encoders=("libx264", "libopenh264", "h264_videotoolbox", "h264_nvenc"),
    pixels="yuv420p",
    graph=_yuv_graph,
    options={"crf": "16", "preset": "medium"},
    staging={"movflags": "frag_keyframe+empty_moov+default_base_moof"},
    final={"movflags": "+faststart"},
    even_sides=True,
    lookahead="rc-lookahead",
)
# With use_metadata_tags the recipe may have more than the 65535 bytes that a .mov's own tags hold.
MOV = replace(
    MP4,
    container="mov",
    staging={"movflags": "frag_keyframe+empty_moov+default_base_moof+use_metadata_tags"},
    final={"movflags": "+faststart+use_metadata_tags"},
)
WEBM = Encoding(
    container="webm",
    encoders=("libvpx-vp9",),
    pixels="yuv420p",
    graph=_yuv_graph,
    options={"crf": "20", "b": "0", "deadline": "good", "cpu-used": "4", "lag-in-frames": "0", "auto-alt-ref": "0"},
    staging={},
    final={"cues_to_front": "1"},
)
GIF = Encoding("gif", ("gif",), "pal8", _palette_graph, {}, {}, None)


def find_encoder(encoding: Encoding) -> str:
    """The first encoder that this build of PyAV supports. Raises MediaError if there is none."""
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
    """Encodes frames into a staging file (a fragmented MP4, which plays even if the process is killed). `finish`
    remuxes it into the final file, with the index at the front, the exact frame size and the recipe. Of a descriptor,
    which becomes the writer's, the fragments are the result, with the sound among them, and `complete` ends them."""

    def __init__(
        self, encoding: Encoding, stage: Path | int, spec: VideoSpec, recipe: str | None, sound: Track | None = None
    ) -> None:
        import av

        self._encoding, self._spec, self._stage, self._sound = encoding, spec, stage, sound
        self._padded = _even(spec) if encoding.even_sides else spec
        self._graph = encoding.graph(self._padded)
        self._file = PipeFile(stage, "w") if isinstance(stage, int) else OutputFile(stage, "x")
        options = encoding.staging | {"fflags": "+bitexact"}
        self._container = av.open(self._file, "w", format=encoding.container, options=options)
        if recipe is not None and encoding.final is not None:
            self._container.metadata["comment"] = recipe
        self._stream = _add_stream(self._container, encoding, self._padded)
        self._beside = _add_sound(self._container, encoding, sound) if isinstance(stage, int) else None
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
        """Encode the frames that the filter graph has finished."""
        with contextlib.suppress(BlockingIOError, EOFError):
            while True:
                picture = self._graph.sink.pull()
                picture.pts, picture.time_base = self._encoded, 1 / self._spec.fps
                self._encoded += 1
                if self._beside is not None:
                    self._beside.write_until(float(picture.pts * picture.time_base))
                self._mux(picture)

    def _mux(self, picture: Any) -> None:
        self._container.mux(self._stream.encode(picture))

    def complete(self) -> None:
        """Write what the encoder holds back, and close the file."""
        self._graph.source.push(None)
        self._drain()
        self._mux(None)
        if self._beside is not None:
            self._beside.finish()
        self._container.close()
        self._file.close()

    def finish(self, recipe: str | None) -> Path:
        assert isinstance(self._stage, Path)
        self.complete()
        if self._encoding.final is None:
            _append_gif_comment(self._stage, recipe)
            return self._stage
        final = self._stage.with_name(self._stage.name + "2")
        final.touch(exist_ok=False)  # FFmpeg would write through a link
        try:
            _remux(self._encoding, self._stage, final, self._spec, recipe, self._sound)
        except Exception as error:
            if self._sound is None:
                raise
            notices.warn(f"the clip's sound cannot be written and is left out: {error}")
            _remux(self._encoding, self._stage, final, self._spec, recipe, None)  # raises again if it is not the sound
        return final

    def discard(self) -> None:
        for part in (self._container, self._file):
            with contextlib.suppress(Exception):  # closing flushes, which fails on a full disk
                part.close()


def _even(spec: VideoSpec) -> VideoSpec:
    return VideoSpec(spec.width + spec.width % 2, spec.height + spec.height % 2, spec.fps)


def _add_stream(container: Any, encoding: Encoding, spec: VideoSpec) -> Any:
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
        # A killed process loses at most one group of pictures (half a second) and the lookahead frames.
        ahead = {encoding.lookahead: str(codec.gop_size // 2)} if encoding.lookahead else {}
        codec.options = encoding.options | ahead
    else:  # the other encoders have no constant quality: use about the bit rate that it results in
        codec.bit_rate = int(spec.width * spec.height * spec.fps / 4)
    return stream


def _add_sound(container: Any, encoding: Encoding, sound: Track | None) -> SoundWriter | None:
    encoder = None if sound is None else sound_encoder(encoding.container)
    return None if sound is None or encoder is None else SoundWriter(container, sound, encoder)


def _remux(
    encoding: Encoding, stage: Path, final: Path, spec: VideoSpec, recipe: str | None, sound: Track | None
) -> None:
    """Copy packets, encode sound beside them, and state the exact frame size in the container. H.264 4:2:0 requires
    even sides, so its pictures may have one more column or row; decoders crop to the container's size
    (libavcodec/h264_slice.c)."""
    import av

    options = (encoding.final or {}) | {"fflags": "+bitexact"}
    with (
        stage.open("rb") as file,
        av.open(file, "r") as source,
        av.open(str(final), "w", format=encoding.container, options=options) as target,
    ):
        if recipe is not None:
            target.metadata["comment"] = recipe
        stream = target.add_stream_from_template(source.streams.video[0])
        stream.codec_context.width, stream.codec_context.height = spec.width, spec.height
        stream.codec_context.framerate = spec.fps  # for .webm; the template does not copy it
        beside = _add_sound(target, encoding, sound)
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                if beside is not None:
                    beside.write_until(float(packet.dts * packet.time_base))
                packet.stream = stream
                target.mux(packet)
        if beside is not None:
            beside.finish()
    if _payload(final) != _payload(stage):
        raise MediaError("the file that was written does not hold what was encoded; is the disk full or failing?")


def _payload(path: Path) -> tuple[int, int]:
    """The number of packets and their total bytes."""
    import av

    with path.open("rb") as file, av.open(file, "r") as container:
        sizes = [packet.size for packet in container.demux(video=0) if packet.dts is not None]
    return len(sizes), sum(sizes)


def _append_gif_comment(path: Path, recipe: str | None) -> None:
    """A comment extension (GIF89a, 24) before the trailer; FFmpeg's muxer writes none."""
    if recipe is None:
        return
    data = recipe.encode("ascii")
    parts = [data[i : i + 255] for i in range(0, len(data), 255)]
    blocks = b"".join(bytes([len(part)]) + part for part in parts)
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x21\xfe" + blocks + b"\0;")


ENCODINGS = {".mp4": MP4, ".mov": MOV, ".webm": WEBM, ".gif": GIF}
