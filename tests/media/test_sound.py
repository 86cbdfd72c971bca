"""Sound of clips: read from every kind of file in time, laid along a video, and written beside its frames."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutations import damaged, fuzz, refuses, seeds

import fastvid
from fastvid.cli.commands import main
from fastvid.errors import InvalidRequest, MediaError
from fastvid.media.clip import open_clip
from fastvid.media.sound import PIECE, Sound, Span, Track, track_of
from fastvid.media.writer import BackgroundWriter, FrameSink

RATE = 44100


def beeps(seconds: float, at: tuple[float, ...], rate: int = RATE, channels: int = 1) -> np.ndarray:
    """Silence with beeps of 50 ms, each of a pitch of its own: float32 [N, channels]."""
    time = np.arange(round(seconds * rate)) / rate
    waves = [0.7 * np.sin(2 * np.pi * (500 + 300 * i) * time) * (np.abs(time - t) < 0.025) for i, t in enumerate(at)]
    return np.repeat(np.sum([0 * time, *waves], 0).astype(np.float32)[:, None], channels, 1)


def onsets(samples: np.ndarray, rate: int) -> list[float]:
    """The middles of the beeps, in seconds."""
    loud = np.convolve(np.abs(samples[:, 0]) > 0.1, np.ones(rate // 100), "same") > 0
    edges = np.flatnonzero(np.diff(np.concatenate(([0], loud.astype(int), [0]))))
    return [float(pair.mean() / rate) for pair in edges.reshape(-1, 2)]


def film(
    path: str | Path,
    sound: np.ndarray,
    *,
    count: int = 16,
    fps: int = 16,
    codecs: tuple[str, str] = ("libx264", "aac"),
    rate: int = RATE,
    shift: float = 0.0,
) -> str:
    """A clip of gray frames with this sound, all `shift` seconds late."""
    with av.open(str(path), "w") as out:
        stream, beside = out.add_stream(codecs[0], rate=fps), out.add_stream(codecs[1], rate=rate)
        beside.layout = "mono" if sound.shape[1] == 1 else "stereo" if sound.shape[1] == 2 else "5.1"
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 8 * i, np.uint8), format="rgb24")
            frame.pts, frame.time_base = i + round(shift * fps), Fraction(1, fps)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
        for start in range(0, len(sound), 1024):
            piece = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(sound[start : start + 1024].T), format="fltp", layout=beside.layout.name
            )
            piece.sample_rate, piece.pts = rate, start + round(shift * rate)
            piece.time_base = Fraction(1, rate)
            out.mux(beside.encode(piece))
        out.mux(beside.encode(None))
    return str(path)


def heard(path: str | Path) -> tuple[np.ndarray, int]:
    """A file's sound as PyAV decodes it, from time 0 on, with gaps as silence."""
    with av.open(str(path)) as found:
        rate, pieces, done = found.streams.audio[0].rate, [], 0
        for frame in found.decode(audio=0):
            start = round(frame.pts * frame.time_base * rate)
            if start > done + 100:
                pieces.append(np.zeros((start - done, 1), np.float32))
                done = start
            samples = frame.to_ndarray() if frame.format.is_planar else frame.to_ndarray().reshape(1, -1)
            pieces.append(samples[:1].T)
            done += frame.samples
    return np.concatenate(pieces), rate


def told(run: Callable[[], Any]) -> tuple[Any, str]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        made = run()
    return made, " ".join(str(w.message) for w in said if issubclass(w.category, fastvid.FastvidWarning))


def near(found: list[float], wanted: list[float], within: float = 0.012) -> bool:
    return len(found) == len(wanted) and bool(np.abs(np.subtract(found, wanted)).max() <= within)


# ---------------------------------------------------------------- reading

FILES = [
    ("a.mp4", "libx264", "aac", 44100),
    ("b.mov", "libx264", "pcm_s16le", 44100),
    ("c.mkv", "libx264", "flac", 22050),
    ("d.webm", "libvpx-vp9", "libopus", 48000),
    ("e.ts", "libx264", "aac", 44100),
    ("f.avi", "mpeg4", "pcm_s16le", 8000),
    ("g.mkv", "libx264", "libmp3lame", 44100),
    ("h.mp4", "libx264", "alac", 44100),
]


@pytest.mark.parametrize(("name", "video", "audio", "rate"), FILES, ids=[file[0] for file in FILES])
@pytest.mark.parametrize("shift", [0.0, 2.0])
def test_sound_is_in_time(name: str, video: str, audio: str, rate: int, shift: float) -> None:
    sound = beeps(1.0, (0.25, 0.625), rate, 2)
    planar = audio in ("aac", "libmp3lame", "libopus")
    try:
        film(name, sound, codecs=(video, audio), rate=rate, shift=shift)
    except ValueError:
        assert not planar
        pytest.skip("PyAV converts no samples for this encoder")
    found = open_clip(name).audio()
    assert found is not None and (found.rate, found.channels, found.seconds) == (rate, 2, 1.0)
    assert near(onsets(found.samples, rate), [0.25, 0.625], 0.03 if name == "g.mkv" else 0.012)


def test_sound_that_starts_late_or_ends_early_is_silent_there() -> None:
    with_gap = beeps(0.5, (0.25,))
    film("a.mp4", with_gap, count=32)
    found = open_clip("a.mp4").audio()
    assert found is not None and found.seconds == 2 and near(onsets(found.samples, RATE), [0.25])
    assert np.abs(found.samples[RATE:]).max() == 0


def test_many_channels_are_mixed_down_and_told() -> None:
    film("a.mp4", np.repeat(beeps(1.0, (0.5,)), 6, 1))
    found, said = told(lambda: open_clip("a.mp4").audio())
    assert found.channels == 2 and "6 channels, which are mixed down to 2" in said
    assert near(onsets(found.samples, RATE), [0.5])


def test_sound_in_another_codec_is_told() -> None:
    film("a.mkv", beeps(1.0, (0.5,)), codecs=("libx264", "aac"))
    data = Path("a.mkv").read_bytes()
    Path("a.mkv").write_bytes(data.replace(b"A_AAC", b"A_DTS"))
    found, said = told(lambda: open_clip("a.mkv").audio())
    assert found is None and "its sound is left out: its codec is dca" in said


def test_what_has_no_sound() -> None:
    assert open_clip(np.zeros((3, 64, 64, 3), np.uint8)).audio() is None
    with FrameSink("a.mp4", width=64, height=64, fps=16) as sink:
        sink.write(np.zeros((3, 64, 64, 3), np.uint8))
    assert open_clip("a.mp4").audio() is None


# ---------------------------------------------------------------- along a video


@given(
    first=st.tuples(st.floats(0, 1), st.floats(0.1, 2)),
    gap=st.floats(0, 1),
    second=st.tuples(st.floats(0, 1), st.floats(0.1, 2)),
    rate=st.sampled_from([8000, 11025, 16000]),
    channels=st.sampled_from([1, 2]),
)
def test_a_track_is_its_spans_and_silence(
    first: tuple[float, float], gap: float, second: tuple[float, float], rate: int, channels: int
) -> None:
    """Against one array, at the sources' own rate."""
    draw = np.random.default_rng(0)
    sources = [Sound(draw.uniform(-1, 1, (rate, channels)).astype(np.float32), rate) for _ in range(2)]
    at = first[1] + gap
    seconds = at + second[1] + 0.25
    track = Track((Span(sources[0], 0.0, *first), Span(sources[1], at, *second)), seconds)
    wanted = np.zeros((round(seconds * rate), channels), np.float32)
    for source, start, (begin, length) in ((sources[0], 0.0, first), (sources[1], at, second)):
        begin_at, count, place = round(begin * rate), round(length * rate), max(round(start * rate), 0)
        place = max(place, round(first[1] * rate)) if start else place
        part = source.samples[begin_at : begin_at + count]
        wanted[place : place + len(part)] = part
    found = np.concatenate([np.empty((0, channels), np.float32), *track.pieces()])
    assert len(found) >= len(wanted) and len(found) - len(wanted) <= 1
    assert np.array_equal(found[: len(wanted)], wanted)
    assert max(len(piece) for piece in track.pieces()) <= PIECE


def test_sound_of_one_channel_is_as_loud_in_two() -> None:
    one, two = Sound(beeps(1.0, (0.5,)), RATE), Sound(beeps(1.0, (0.5,), channels=2), RATE)
    found = Track((Span(one, 0.0, 0.0, 1.0), Span(two, 1.0, 0.0, 1.0)), 2.0).read()
    assert found.channels == 2 and np.abs(found.samples[:RATE] - one.samples).max() < 1e-6


@pytest.mark.parametrize("rate", [8000, 48000])
def test_another_rate_stays_in_time(rate: int) -> None:
    track = track_of(Sound(beeps(2.0, (0.5, 1.5)), RATE), 2.0)
    found = np.concatenate(list(track.pieces(rate)))
    assert len(found) == 2 * rate and near(onsets(found, rate), [0.5, 1.5], 0.004)


def test_sound_in_memory_is_checked() -> None:
    for samples, rate, says in (
        (np.zeros(5, np.float32), RATE, "float32 numbers"),
        (np.zeros((5, 1)), RATE, "float32 numbers"),
        (np.zeros((5, 3), np.float32), RATE, "1 or 2"),
        ([[0.5]], RATE, "1 or 2"),
        (np.full((5, 1), np.nan, np.float32), RATE, "NaN"),
        (np.zeros((5, 1), np.float32), 10, "rate=10"),
    ):
        with pytest.raises(InvalidRequest, match=says):
            Sound(samples, rate)
    assert repr(Sound(np.zeros((RATE, 2), np.float32), RATE)) == "Sound(1.000 s, 44100 Hz, 2 channels)"


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize("name", ["out.mp4", "out.webm"])
@pytest.mark.parametrize("channels", [1, 2])
def test_sound_is_written_beside_the_frames(name: str, channels: int) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), np.uint8)
    video = fastvid.Video(frames, 16.0, 0, audio=Sound(beeps(2.5, (0.25, 2.0), channels=channels), RATE))
    path, said = told(lambda: video.save(name))
    found, rate = heard(path)
    assert said == "" and abs(len(found) / rate - 2.5) < 0.03 and near(onsets(found, rate), [0.25, 2.0])
    clip = open_clip(path)
    silent = fastvid.Video(frames, 16.0, 0).save(f"silent-{name}")
    assert np.array_equal(clip.read(), open_clip(silent).read()) and clip.fps == 16
    first = path.read_bytes()
    assert video.save(name).read_bytes() == first
    again = clip.audio()
    assert again is not None and again.channels == channels and near(onsets(again.samples, again.rate), [0.25, 2.0])


def test_sound_and_frames_alternate_in_the_file() -> None:
    """So that players need not hold one of them: no two packets of frames are more than a second apart."""
    video = fastvid.Video(np.zeros((96, 64, 64, 3), np.uint8), 16.0, 0, audio=Sound(beeps(6.0, (1.0,)), RATE))
    with av.open(str(video.save("out.mp4"))) as found:
        last = {"audio": 0.0, "video": 0.0}
        for packet in sorted(found.demux(), key=lambda packet: packet.pos or 0):
            if packet.dts is not None:
                last[packet.stream.type] = float(packet.dts * packet.time_base)
                assert abs(last["audio"] - last["video"]) < 1.2


@pytest.mark.parametrize("name", ["out.gif", "out.npy", "out/"])
def test_files_without_sound_say_so(name: str) -> None:
    video = fastvid.Video(np.zeros((4, 64, 64, 3), np.uint8), 16.0, 0, audio=Sound(beeps(0.25, ()), RATE))
    assert "sound is left out" in told(lambda: video.save(name))[1]


def test_a_stream_reads_sound_from_the_file_when_it_is_closed() -> None:
    film("in.mp4", beeps(1.0, (0.5,)))
    span = open_clip("in.mp4").sound(0, 16, 16.0)
    assert span is not None
    with FrameSink("out.mp4", width=64, height=64, fps=16, sound=Track((span,), 1.5)) as sink:
        with BackgroundWriter(sink) as writer:
            writer.write(np.zeros((24, 64, 64, 3), np.uint8))
            writer.finish()
        sink.close()
    assert near(onsets(*heard("out.mp4")), [0.5])
    Path("in.mp4").unlink()

    def gone() -> None:
        with FrameSink("out.mp4", width=64, height=64, fps=16, sound=Track((span,), 1.5)) as sink:
            sink.write(np.zeros((24, 64, 64, 3), np.uint8))

    assert "in.mp4" in told(gone)[1] and onsets(*heard("out.mp4")) == []


def test_frames_are_not_lost_with_sound_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = np.zeros((8, 64, 64, 3), np.uint8)
    video = fastvid.Video(frames, 16.0, 0, audio=Sound(beeps(0.5, ()), RATE))

    def fails(*_: Any) -> None:
        raise ValueError("no such rate")

    monkeypatch.setattr("fastvid.media.sound.SoundWriter.finish", fails)
    assert "cannot be written and is left out: no such rate" in told(lambda: video.save("out.mp4"))[1]
    assert open_clip("out.mp4").num_frames == 8 and open_clip("out.mp4").audio() is None


@fuzz(3000, 60)
def test_damaged_sound_is_read_or_refused(count: int) -> None:
    """As long as the frames, finite, or no sound at all; and it can be written."""
    films = [("a.mp4", "libx264", "aac"), ("b.mkv", "libx264", "flac"), ("c.webm", "libvpx-vp9", "libopus")]
    films += [("d.ts", "libx264", "aac"), ("e.avi", "mpeg4", "pcm_s16le"), ("f.mkv", "libx264", "libmp3lame")]
    whole = []
    for name, *codecs in films:
        rate = 48000 if "libopus" in codecs else RATE
        film(name, beeps(0.5, (0.25,), rate, 2), count=8, codecs=(codecs[0], codecs[1]), rate=rate)
        whole.append(Path(name).read_bytes())

    def read() -> None:
        clip = open_clip("damaged")
        sound = clip.audio()
        if sound is not None:
            assert abs(sound.seconds - clip.num_frames / (clip.fps or 0)) < 0.01 and np.isfinite(sound.samples).all()

    for random in seeds("sound", count):
        Path("damaged").write_bytes(damaged(random.choice(whole), random))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fastvid.FastvidWarning)
            refuses(read, MediaError, InvalidRequest, seconds=2)


# ---------------------------------------------------------------- verbs


@pytest.fixture(scope="module")
def pipe() -> fastvid.Pipeline:
    return fastvid.load("embedded", device="cpu")


QUICK: dict[str, Any] = {"prompt": "a red circle", "num_inference_steps": 1, "seed": 1}


def test_extended_clips_keep_their_sound(pipe: fastvid.Pipeline) -> None:
    film("in.mp4", beeps(1.0, (0.25, 0.75)))
    made = pipe.extend("in.mp4", seconds=0.5, direction="both", **QUICK)
    assert made.audio is not None and made.audio.seconds == made.seconds == 2.0
    assert near(onsets(made.audio.samples, RATE), [0.75, 1.25]) and made.recipe["audio"] is True
    again = pipe.loop(made, seconds=0.25, **QUICK)  # in memory now
    assert again.audio is not None and np.array_equal(again.audio.samples[: 2 * RATE], made.audio.samples)
    assert near(onsets(*heard(again.save("out.webm"))), [0.75, 1.25])


def test_blended_and_edited_clips_keep_their_sound(pipe: fastvid.Pipeline) -> None:
    film("a.mp4", beeps(0.5, (0.25,)), count=8)
    film("b.mkv", beeps(1.0, (0.5,), 22050), fps=32, count=32, rate=22050)  # another rate of frames and of sound
    both = pipe.blend("a.mp4", "b.mkv", seconds=0.5, **QUICK)
    assert both.audio is not None and near(onsets(both.audio.samples, RATE), [0.25, 1.5]) and both.seconds == 2.0
    edited = pipe.edit("a.mp4", size="96x96", **QUICK)
    assert edited.audio is not None and near(onsets(edited.audio.samples, RATE), [0.25])


def test_sound_is_left_out_where_asked(pipe: fastvid.Pipeline) -> None:
    film("a.mp4", beeps(0.5, (0.25,)), count=8)
    made, said = told(lambda: pipe.extend("a.mp4", seconds=0.25, audio=False, **QUICK))
    assert made.audio is None and said == "" and made.recipe["audio"] is False
    silent = np.zeros((8, 64, 64, 3), np.uint8)
    made, said = told(lambda: pipe.extend(silent, seconds=0.25, audio=True, **QUICK))
    assert made.audio is None and "no sound" in said and "audio" not in made.recipe
    with pytest.raises(InvalidRequest, match="audio: generate does not take it"):
        pipe.generate(audio=False, **QUICK)


def test_frames_that_drift_from_their_sound_are_told(pipe: fastvid.Pipeline) -> None:
    with av.open("a.mkv", "w") as out:
        stream, sound = out.add_stream("libx264", rate=16), out.add_stream("aac", rate=RATE, layout="mono")
        stream.width = stream.height = 64
        stream.pix_fmt, stream.time_base = "yuv420p", Fraction(1, 1000)
        stream.codec_context.time_base = Fraction(1, 1000)
        for time in (0, 60, 120, 900, 960, 1020):
            frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
        piece = av.AudioFrame.from_ndarray(beeps(1.0, (0.5,)).T.copy(), format="fltp", layout="mono")
        piece.sample_rate, piece.pts, piece.time_base = RATE, 0, Fraction(1, RATE)
        out.mux(sound.encode(piece))
        out.mux(sound.encode(None))
    clip = open_clip("a.mkv")
    assert "drift apart" in told(lambda: clip.sound(0, 6, 16.0))[1]
    even = clip.resampled(16)
    assert told(lambda: even.sound(0, len(even), 16.0))[1] == ""
    found = even.audio()
    assert found is not None and near(onsets(found.samples, RATE), [0.5])


def test_a_resumed_request_has_the_same_sound(pipe: fastvid.Pipeline) -> None:
    film("in.mp4", beeps(0.5, (0.25,)), count=8)
    asked = {**QUICK, "num_inference_steps": 3, "seconds": 0.5, "direction": "before", "video": "in.mp4"}
    stream = pipe.stream(verb="extend", checkpoint="job", checkpoint_every=0, **asked)
    started = next(stream)
    next(stream)
    stream.close()
    with closing(pipe.resume("job")) as resumed:
        again = next(resumed)
    assert again.sound == started.sound and near(onsets(again.sound.read().samples, RATE), [0.75])


@pytest.mark.slow
def test_the_command_line_writes_sound_or_leaves_it_out() -> None:
    film("in.mp4", beeps(0.5, (0.25,)), count=8)
    words = ["extend", "in.mp4", "a red circle", "--steps", "1", "--seconds", "0.25", "--seed", "1", "--quiet", "-o"]
    assert main([*words, "out.mp4"]) == main([*words, "silent.mp4", "--no-audio"]) == 0
    assert near(onsets(*heard("out.mp4")), [0.25])
    assert open_clip("silent.mp4").audio() is None
    assert np.array_equal(open_clip("silent.mp4").read(), open_clip("out.mp4").read())


@pytest.mark.slow
def test_a_warning_about_a_clip_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    film("in.mp4", np.repeat(beeps(0.5, (0.25,)), 6, 1), count=8)
    words = ["extend", "in.mp4", "a red circle", "--steps", "1", "--seconds", "0.25", "--seed", "1", "--quiet", "-o"]
    assert main([*words, "out.mp4"]) == 0
    assert capsys.readouterr().err.count("mixed down") == 1
