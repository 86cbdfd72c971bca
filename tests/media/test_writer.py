"""Frames to files and back: sizes, rates, colours, recipes, equal bytes, and nothing half-written."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fastvid.errors import InvalidRequest, MediaError
from fastvid.media import encoders, files, targets, writer
from fastvid.media.metadata import read_recipe, read_video
from fastvid.media.targets import check_writable
from fastvid.media.writer import FrameSink

KINDS = ["out.mp4", "out.mov", "out.webm", "out.gif", "out.npy", "out/", "out"]
VIDEOS = ["out.mp4", "out.mov", "out.webm"]
RECIPE = {"fastvid": "0.1.0", "prompt": 'é " \n 色 😀', "seed": 2**63 - 1, "fps": 16.0, "sigmas": [1.0, 0.25]}


def clip(num_frames: int, width: int = 64, height: int = 64) -> np.ndarray:
    """A smooth picture that gets bluer, uint8 [T, H, W, 3]."""
    y, x = np.mgrid[:height, :width]
    planes = np.broadcast_arrays(x * 255 / width, y * 255 / height, np.arange(num_frames)[:, None, None] * 9 % 256)
    return np.stack(planes, axis=-1).astype(np.uint8)


def save(path: Path | str, frames: np.ndarray, fps: float = 16, recipe: dict[str, Any] | None = None) -> Path:
    with FrameSink(path, width=frames.shape[2], height=frames.shape[1], fps=fps) as sink:
        sink.write(frames)
        return sink.close(recipe)


def error_of(frames: np.ndarray, expected: np.ndarray) -> float:
    assert frames.shape == expected.shape and frames.dtype == np.uint8
    return float(np.abs(frames.astype(int) - expected).mean())


def content(path: Path) -> bytes:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return b"".join(file.read_bytes() for file in files)


# ---------------------------------------------------------------- what is in the file


@pytest.mark.parametrize("name", KINDS)
def test_frames_rate_and_recipe_come_back(name: str) -> None:
    frames = clip(9)
    path = save(name, frames, recipe=RECIPE)
    found, fps = read_video(path)
    assert error_of(found, frames) < (8 if name == "out.gif" else 2.5 if name in VIDEOS else 1e-9)
    assert fps == 16 and read_recipe(path) == RECIPE
    assert os.listdir() == [name.strip("/")], "the temporary file is gone"


@given(
    width=st.integers(64, 99), height=st.integers(64, 99), num_frames=st.integers(1, 6), name=st.sampled_from(KINDS[:5])
)
def test_every_size_is_exact(width: int, height: int, num_frames: int, name: str) -> None:
    frames = clip(num_frames, width, height)
    assert error_of(read_video(save(name, frames))[0], frames) < 8


@pytest.mark.parametrize("name", KINDS)
def test_the_same_frames_give_the_same_bytes(name: str) -> None:
    frames = clip(6, 65, 67)
    first = content(save(name, frames, recipe=RECIPE))
    Path("deeper").mkdir()
    other = FrameSink("deeper/" + name, width=65, height=67, fps=16, recipe={"another": "first"})
    for start in (0, 1, 1, 4):  # in other chunks, one of them empty
        other.write(frames[start : {0: 1, 1: 4, 4: 6}[start]] if start != 1 or other.num_frames == 1 else frames[:0])
    assert content(other.close(RECIPE)) == first


@pytest.mark.parametrize("name", VIDEOS)
@given(fps=st.sampled_from([16, 24, 30, 23.976, 29.97, 59.94, 240, 0.5, 0.1, 1 / 3, 12.5, 7.77]))
def test_the_rate_is_right(name: str, fps: float) -> None:
    path = save(name, clip(5), fps)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        times = [float(packet.pts * packet.time_base) for packet in container.demux(stream) if packet.dts is not None]
        assert float(stream.average_rate) == pytest.approx(fps, rel=2e-3)
    assert times == pytest.approx([i / fps for i in range(5)], abs=6e-4)


def test_rates_that_television_uses() -> None:
    assert [writer.exact_rate(fps) for fps in (23.976, 29.97, 59.94)] == [
        Fraction(n, 1001) for n in (24000, 30000, 60000)
    ]
    assert [writer.exact_rate(fps) for fps in (24, 30.0, 12.5, 0.1)] == [24, 30, Fraction(25, 2), Fraction(1, 10)]


@pytest.mark.parametrize("name", VIDEOS)
@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 120, 40)])
def test_colours_are_kept(name: str, colour: tuple[int, int, int]) -> None:
    path = save(name, np.full((3, 64, 64, 3), colour, np.uint8))
    assert np.abs(read_video(path)[0].astype(int) - colour).max() <= 2
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        assert (int(frame.colorspace), int(frame.color_range)) == (1, 1)  # BT.709, limited
        assert frame.format.name == "yuv420p"


def test_an_mp4_plays_in_a_browser() -> None:
    path = save("out.mp4", clip(40), recipe=RECIPE)
    data = path.read_bytes()
    assert data[4:8] == b"ftyp" and data.index(b"moov") < data.index(b"mdat"), "the index comes first"
    assert b"moof" not in data
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.frames, stream.profile) == ("h264", 40, "High")
        packets = [packet for packet in container.demux(stream) if packet.dts is not None]
    keys = [i for i, packet in enumerate(packets) if packet.is_keyframe]
    assert keys[0] == 0 and max(np.diff([*keys, 40])) <= 8, "a key frame at least every half second"
    assert all(packet.pts == packet.dts for packet in packets), "no B-frames"


@pytest.mark.parametrize("name", [*KINDS, "out.png", "out.jpg"])
def test_recipes_of_every_length(name: str) -> None:
    recipe = {"fastvid": "1", "prompt": "色" * 100_000}
    assert read_recipe(save(name, clip(1), recipe=recipe)) == recipe
    for size in (1, 254, 255, 256, 511):
        assert read_recipe(save(name, clip(1), recipe={"a": "x" * size})) == {"a": "x" * size}


@pytest.mark.parametrize("name", KINDS)
def test_no_recipe_is_told(name: str) -> None:
    with pytest.raises(MediaError, match="no fastvid recipe"):
        read_recipe(save(name, clip(2)))


def test_a_recipe_of_its_own() -> None:
    Path("a.json").write_text(' {"fastvid": "1"}')
    assert read_recipe("a.json") == {"fastvid": "1"}


@given(
    data=st.binary(max_size=300),
    start=st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\x93NUMPY\x01\x00", b"{"]),
)
def test_any_bytes_are_read_or_refused(data: bytes, start: bytes) -> None:
    Path("bytes").write_bytes(start + data)
    for read in (read_recipe, read_video):
        try:
            read("bytes")
        except MediaError as error:
            assert "bytes" in str(error)


@pytest.mark.parametrize("name", ["out.gif", "out.png", "out.npy", "out.mp4", "out.webm"])
@given(cut=st.floats(0, 1))
def test_a_cut_file_is_read_or_refused(name: str, cut: float) -> None:
    path = save(name, clip(1), recipe=RECIPE)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * cut)])
    try:
        assert read_recipe(path) == RECIPE
    except MediaError as error:
        assert name in str(error)


def test_what_is_not_there_is_told() -> None:
    for read in (read_recipe, read_video):
        with pytest.raises(MediaError, match="none.mp4: No such file"):
            read("none.mp4")


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left"), av.error.ExternalError(1, "from a library"), ValueError()]
)
def test_errors_of_the_system_name_the_file(error: Exception) -> None:
    with pytest.raises(MediaError, match="out.mp4: (No space|from|ValueError)"), files.media_errors("out.mp4"):
        raise error
    with pytest.raises(TypeError), files.media_errors("out.mp4"):  # a bug stays one
        raise TypeError


def test_pngs_and_arrays_are_read_by_others() -> None:
    frames = clip(3, 65, 67)
    folder = save("out/", frames, recipe=RECIPE)
    assert sorted(os.listdir(folder)) == ["000000.png", "000001.png", "000002.png"]
    for i, frame in enumerate(frames):
        assert np.array_equal(np.asarray(Image.open(folder / f"{i:06d}.png")), frame)
    assert Image.open(folder / "000000.png").text["fastvid"].startswith("{")
    assert np.array_equal(np.load(save("out.npy", frames, recipe=RECIPE)), frames)
    assert Image.open(save("out.gif", frames, recipe=RECIPE)).n_frames == 3


# ---------------------------------------------------------------- before any work


@pytest.mark.parametrize(
    "name, nearest",
    [
        ("out.mp5", "out.mp4"),
        ("out.m4v", "out.mp4"),
        ("out.wbem", "out.webm"),
        ("a.b/out.webp", "out.png"),
        ("out.gfi", "out.gif"),
    ],
)
def test_unknown_kinds_are_told_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(InvalidRequest, match=f"nearest is .*{nearest}"):
        check_writable(name)


@pytest.mark.parametrize("path", ["", "a\0.mp4", None, 3, b"a.mp4"])
def test_what_is_no_path_is_refused(path: Any) -> None:
    with pytest.raises(InvalidRequest, match="the name of a file or folder"):
        check_writable(path)


@pytest.mark.parametrize(
    "name, match",
    [
        ("none/out.mp4", "no folder"),
        ("file/out.mp4", "no folder"),
        ("/proc/out.mp4", "no file can be made"),
        ("folder.mp4/", "holds other files"),
        ("file", "is a file"),
        ("/dev/null", "is a file|not a folder"),
        ("pipe.mp4", "not a regular file"),
        ("x" * 300 + ".mp4", "at most 255 bytes"),
        ("\udcff.mp4", "surrogates"),
    ],
)
def test_places_where_nothing_can_be_written(name: str, match: str) -> None:
    Path("file").touch()
    Path("folder.mp4").mkdir()
    Path("folder.mp4/notes.txt").touch()
    os.mkfifo("pipe.mp4")
    with pytest.raises((MediaError, InvalidRequest), match=match):
        check_writable(name)
    with pytest.raises((MediaError, InvalidRequest), match=match):
        FrameSink(name, width=64, height=64, fps=16)


@pytest.mark.skipif(os.geteuid() == 0, reason="everything is writable for root")
def test_read_only_places() -> None:
    Path("there.mp4").touch(mode=0o444)
    with pytest.raises(MediaError, match="read-only"):
        check_writable("there.mp4")
    Path("closed").mkdir(mode=0o555)
    with pytest.raises(MediaError, match="no file can be made"):
        check_writable("closed/out.mp4")


def test_what_a_kind_cannot_hold() -> None:
    with pytest.raises(InvalidRequest, match="one frame"):
        check_writable("out.png", num_frames=2)
    with pytest.raises(InvalidRequest, match="at most 50 fps"):
        check_writable("out.gif", fps=60)
    with pytest.raises(MediaError, match="MiB are free"):
        check_writable("out.npy", num_frames=2**60, width=64, height=64)
    with pytest.raises(MediaError, match="one frame"):
        save("out.png", clip(2))
    assert os.listdir() == []


def test_a_missing_encoder_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = encoders.ENCODINGS | {".mp4": encoders.Encoding("mp4", ("none1", "none2"), "", None, {}, {}, None)}  # type: ignore[arg-type]
    monkeypatch.setattr(targets, "ENCODINGS", broken)
    with pytest.raises(MediaError, match="looked for none1, none2"):
        check_writable("out.mp4")


def test_checking_leaves_nothing_and_is_quick() -> None:
    check_writable("out.mp4")
    start = time.perf_counter()
    for name in KINDS:
        check_writable(name, num_frames=17, width=64, height=64, fps=16)
    assert time.perf_counter() - start < 0.5 and os.listdir() == []


# ---------------------------------------------------------------- whole or not at all


@pytest.mark.parametrize("name", [*KINDS, "out.png"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_what_was_there(name: str, error: type[BaseException]) -> None:
    path = save(name, clip(1), recipe=RECIPE)
    before = content(path)
    with pytest.raises(error), FrameSink(name, width=64, height=64, fps=16) as sink:
        sink.write(255 - clip(1))
        raise error
    assert content(path) == before and os.listdir() == [path.name]


@pytest.mark.parametrize("name", KINDS)
def test_a_new_video_replaces_the_old_one(name: str) -> None:
    save(name, clip(5), recipe=RECIPE)
    frames = 255 - clip(2)
    assert error_of(read_video(save(name, frames))[0], frames) < 8
    assert os.listdir() == [name.strip("/")]


def guarded(name: str, **guard: Any) -> Path:
    with FrameSink(name, width=64, height=64, fps=16, **guard) as sink:
        sink.write(clip(1))
        return sink.close(RECIPE)


@pytest.mark.parametrize("name", ["out.mp4", "out.png", "out.npy", "out/"])
@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_followed_only_if_asked(name: str, there: bool) -> None:
    Path("real").mkdir()
    real = Path("real", name.replace("out", "other").strip("/"))
    if there:
        real.mkdir() if name == "out/" else real.write_bytes(b"precious")
    Path(name.strip("/")).symlink_to(real)
    with pytest.raises(InvalidRequest, match=f"{name} is a link to real/other"):
        guarded(name)
    assert os.listdir("real") == [real.name] * there and (not real.is_file() or real.read_bytes() == b"precious")
    if there or name != "out/":
        assert guarded(name, overwrite=True) == real.resolve() and read_recipe(real) == RECIPE
        assert Path(name.strip("/")).is_symlink() and os.listdir("real") == [real.name]


def test_a_link_to_the_folder_is_followed() -> None:
    Path("real").mkdir()
    Path("outputs").symlink_to("real")
    assert guarded("outputs/out.mp4") == Path("real/out.mp4").resolve()


def test_an_input_is_replaced_only_if_asked() -> None:
    save("clip.mp4", clip(2), recipe=RECIPE), save("frames/", clip(2), recipe=RECIPE)
    save("picture.png", clip(1)), os.link("clip.mp4", "hard.mp4")
    Path("elsewhere.mp4").symlink_to("clip.mp4")
    before = {name: content(Path(name)) for name in os.listdir()}
    for name, read, other in (
        ("clip.mp4", "clip.mp4", "clip-2.mp4"),
        ("./clip.mp4", {"video": ["x", Path("clip.mp4")]}, "./clip-2.mp4"),
        ("clip.mp4", "elsewhere.mp4", "clip-2.mp4"),
        ("hard.mp4", ("clip.mp4",), "hard-2.mp4"),
        ("frames/", "frames", "frames-2/"),
        ("frames", {8: "frames/000001.png"}, "frames-2/"),
        ("frames/000001.png", "frames/", "frames/000001-2.png"),
    ):
        with pytest.raises(InvalidRequest, match=f"{name} is read by this request .*such as {other}, or overwrite it"):
            guarded(name, inputs=[read])
    assert {name: content(Path(name)) for name in os.listdir()} == before
    guarded("clip.mp4", inputs=["frames/", "picture.png", 3, None, np.zeros(2)])
    guarded("frames/", inputs=["frames/"], overwrite=True)
    assert os.listdir("frames") == ["000000.png"] and len(read_video("hard.mp4")[0]) == 2


def test_pictures_of_others_are_kept() -> None:
    """A folder is taken only if it is empty, or holds the frames of a video that fastvid wrote."""
    Path("mine").mkdir()
    for number in range(3):
        Image.fromarray(clip(1)[0]).save(f"mine/{number:06d}.png")
    with pytest.raises(MediaError, match="did not write .000000.png has no recipe.*overwrite it"):
        guarded("mine/")
    assert len(os.listdir("mine")) == 3
    save("ours/", clip(3), recipe=RECIPE)
    Path("ours/notes.txt").touch()
    with pytest.raises(MediaError, match="holds other files .notes.txt"):
        guarded("ours/", overwrite=True)
    Path("ours/notes.txt").unlink()
    Path("elsewhere").write_bytes(b"precious")
    Path("ours/000001.png").unlink()
    Path("ours/000001.png").symlink_to("../elsewhere")
    save("ours/", clip(2), recipe=RECIPE)
    assert sorted(os.listdir("ours")) == ["000000.png", "000001.png"] and not Path("ours/000001.png").is_symlink()
    assert Path("elsewhere").read_bytes() == b"precious"


def test_unfinished_files_of_a_target_are_known_by_their_names() -> None:
    target = check_writable("out.mp4")
    stages = [check_writable(name).staging() for name in ("out.mp4", "out.mp4", "other.mp4")]
    for stage in stages:
        stage.touch()
    Path("out.mp4.keep.partial").touch(), Path("notes").touch()
    Path("out.mp4.00000000.partial").symlink_to("notes")
    for name in (
        stages[0].name,
        stages[2].name,
        "out.mp4.keep.partial",
        "out.mp4.00000000.partial",
        "../notes",
        "notes",
    ):
        target.remove_partial(name)
    assert sorted(os.listdir()) == sorted(
        [stages[1].name, stages[2].name, "out.mp4.keep.partial", "out.mp4.00000000.partial", "notes"]
    )
    folder = check_writable("frames/").staging()
    folder.mkdir()
    for name in ("000000.png", "next.partial", "notes.txt"):
        (folder / name).touch()
    check_writable("frames/").remove_partial(folder.name)
    assert os.listdir(folder) == ["notes.txt"]


def test_a_jpeg_is_near_its_frame_and_can_be_read_by_others() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (8, 9, 3), np.uint8).repeat(9, 0).repeat(9, 1)[None]
    for name in ("a.jpg", "b.jpeg", "c.JPG"):
        path = save(name, frame, recipe=RECIPE)
        picture = Image.open(path)
        assert picture.format == "JPEG" and picture.size == (81, 72)
        assert error_of(np.asarray(picture)[None], frame) < 3 and error_of(read_video(path)[0], frame) < 3
        assert read_recipe(path) == RECIPE
    with pytest.raises(InvalidRequest, match="a .jpg holds one frame, not 2; give a folder such as a/, or a.mp4"):
        check_writable("a.jpg", num_frames=2)


@pytest.mark.parametrize("frames", [clip(1)[0], clip(1, 66), clip(1).astype(np.float32), clip(1)[..., :1], np.zeros(3)])
def test_wrong_frames_are_refused(frames: np.ndarray) -> None:
    sink = FrameSink("out.mp4", width=64, height=64, fps=16)
    with pytest.raises(MediaError, match="frames must be uint8"):
        sink.write(frames)
    assert os.listdir() == []


@pytest.mark.parametrize("name", KINDS)
def test_no_frames_make_no_file(name: str) -> None:
    with pytest.raises(MediaError, match="no frames"):
        save(name, clip(0))
    assert os.listdir() == []


def test_a_closed_sink_takes_no_more() -> None:
    sink = FrameSink("out.mp4", width=64, height=64, fps=16)
    sink.write(clip(1))
    assert sink.close() == sink.close() == Path("out.mp4").resolve()
    with pytest.raises(MediaError, match="closed"):
        sink.write(clip(1))
    assert os.listdir() == ["out.mp4"]


@contextmanager
def a_small_disk(num_bytes: int) -> Iterator[None]:
    """No file may grow beyond that; Python has the system say so instead of ending the process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", [*KINDS, "out.png"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.99])
def test_a_full_disk_leaves_nothing(name: str, share: float) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (1 if name == "out.png" else 20, 64, 64, 3), np.uint8)
    path = save("whole_" + name, frames, recipe=RECIPE)
    sizes = [file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path])]
    with a_small_disk(int(max(sizes) * share)), pytest.raises(MediaError, match="out.*(large|space)"):
        save(name, frames, recipe=RECIPE)
    assert os.listdir() == [path.name]


@pytest.mark.parametrize("name", ["out.mp4", "out.webm", "out.npy", "out/"])
def test_a_full_disk_is_noticed_while_writing(name: str) -> None:
    """Not only at the end of a long video; and the sink cleans up without a `with` around it."""
    frames = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8)
    sink = FrameSink(name, width=64, height=64, fps=16)
    limit = 2000 if name == "out/" else 40_000
    with a_small_disk(limit), pytest.raises(MediaError, match="out.*large"):
        for _ in range(500):
            sink.write(frames)
    assert sink.num_frames < 400 and sink.closed and os.listdir() == []


def test_a_fragmented_file_that_failed_silently_is_not_renamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "_payload", lambda path: (len(str(path)), 0))
    with pytest.raises(MediaError, match="does not hold what was encoded"):
        save("out.mp4", clip(2))
    assert os.listdir() == []


@pytest.mark.parametrize("name", ["out.mp4", "out.webm", "out.npy", "out/"])
def test_a_killed_process_leaves_a_file_that_plays(name: str, tmp_path: Path) -> None:
    code = f"""
        import numpy as np
        from fastvid.media.writer import FrameSink
        sink = FrameSink({name!r}, width=64, height=64, fps=16)
        while True:
            sink.write(np.full((1, 64, 64, 3), sink.num_frames % 256, np.uint8))
            print(sink.num_frames, flush=True)
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    while int(child.stdout.readline()) < 120:
        pass
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    (left,) = os.listdir()
    assert left.startswith(name.strip("/")) and left.endswith(".partial")
    found = read_video(left)[0]
    assert len(found) > 60 and np.abs(found[:60].astype(int) - np.arange(60)[:, None, None, None]).max() < 3


def test_an_array_can_be_loaded_at_any_moment() -> None:
    """The header has the number of frames that are complete, after every frame."""
    frames, sink = clip(5), FrameSink("out.npy", width=64, height=64, fps=16)
    for number, frame in enumerate(frames):
        sink.write(frame[None])
        assert np.array_equal(np.load(sink.stage), frames[: number + 1])
    assert np.array_equal(np.load(sink.close(RECIPE)), frames) and read_recipe("out.npy") == RECIPE


@pytest.mark.slow
def test_memory_does_not_grow_with_length() -> None:
    """Peak memory of 16 and of 400 frames of 480x270 in fresh processes; 384 more frames are 142 MiB as RGB."""
    code = """
        import resource, sys, numpy as np
        from fastvid.media.writer import FrameSink
        frames = np.random.default_rng(0).integers(0, 256, (1, 270, 480, 3), np.uint8) // 32
        with FrameSink("out" + sys.argv[1] + ".mp4", width=480, height=270, fps=16) as sink:
            for i in range(int(sys.argv[1])):
                sink.write(frames)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
    """
    peaks = [
        int(subprocess.run([sys.executable, "-c", textwrap.dedent(code), n], capture_output=True, check=True).stdout)
        for n in ("40", "400")
    ]
    assert peaks[1] - peaks[0] < 30, f"MiB: {peaks}"
