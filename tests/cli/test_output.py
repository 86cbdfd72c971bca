"""Where commands write: files, folders of pictures and standard output; nothing of the caller's is lost."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from fake_pipe import FakePipe, failed, run

from fastvid.cli.output import Output
from fastvid.engine import resume_files, resume_output
from fastvid.errors import InvalidRequest, MediaError
from fastvid.media.metadata import read_recipe, read_video
from fastvid.media.pipe import PipeSink
from fastvid.media.targets import check_writable
from fastvid.media.video import Video

pytestmark = pytest.mark.usefixtures("pipe")


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ("-o out", "-o out says no kind of file; give out.mp4 for a video, or out/ for a folder of pictures"),
        ("-o a.b/out", "give a.b/out.mp4 for a video, or a.b/out/ for"),
        ("-o out.mp4 --frames-dir out", "not allowed with"),
        ("--frames-dir out.mp4", "out.mp4 is a file, not a folder"),
        ("-o - --json", "standard output is the video's with -o -; leave it out, or give -o out.mp4"),
        ("-o - --size 65x64", "even sides, not 65x64; the nearest is 66x64; or give a file"),
        ("-o link.mp4", "link.mp4 is a link to precious"),
        ("-o o.mp4 --checkpoint precious.d", "precious.d is there already and is no empty folder; give a new name"),
        ("-o job/o.mp4 --checkpoint job", "job/o.mp4 is in .*job, which is the checkpoint's .*such as .*o.mp4"),
        ("-o job/ --checkpoint job", "job/ is in .*job, which"),
        ("-o job/ --checkpoint job/ckpt", "job/ckpt is in job/, the folder of the video's frames"),
    ],
)  # fmt: skip
def test_names_that_say_nothing_sure_are_refused(capsys, pipe: FakePipe, words: str, match: str) -> None:
    import re

    for name in ("job", "precious.d", "a.b"):
        Path(name).mkdir()
    for name in ("precious", "precious.d/x", "out.mp4"):
        Path(name).write_bytes(b"precious")
    Path("link.mp4").symlink_to("precious")
    before = sorted(os.listdir())
    error = failed(capsys, 1 if "is a file" in match else 2, "generate", "p", *words.split())
    assert re.search(match, error), error
    assert sorted(os.listdir()) == before and pipe.loaded == [] and os.listdir("job") == []
    assert Path("precious").read_bytes() == b"precious"


def test_folders_of_pictures(capsys) -> None:
    for words in (("--frames-dir", "frames"), ("-o", "frames"), ("-o", "frames/"), ("--frames-dir", "frames/")):
        assert run(capsys, "generate", "p", *words)[0] == 0
        assert sorted(os.listdir("frames")) == [f"{number:06d}.png" for number in range(5)]


@pytest.mark.parametrize(
    "words",
    [
        ("extend", "{}"), ("edit", "clip.npy", "p", "--mask", "{}"), ("generate", "p", "--image", "{}"),
        ("generate", "p", "--keyframe", "3={}"), ("generate", "p", "--recipe", "{}"), ("blend", "clip.npy", "{}"),
    ],
)  # fmt: skip
def test_inputs_are_replaced_only_if_asked(capsys, pipe: FakePipe, words: tuple[str, ...]) -> None:
    frames = np.zeros((5, 64, 64, 3), np.uint8)
    for name in ("clip.npy", "in.mp4"):
        Video(frames, 16.0, 1, recipe={"fastvid": "0", "prompt": "p"}).save(name)
    os.link("in.mp4", "same.mp4")
    before = Path("in.mp4").read_bytes()
    command = [word.format("in.mp4") for word in words]
    for output in ("in.mp4", "./in.mp4", "same.mp4"):
        assert "is read by this request (in.mp4)" in failed(capsys, 2, *command, "-o", output)
    assert Path("in.mp4").read_bytes() == before and pipe.loaded == []
    if words[0] == "extend":
        assert run(capsys, *command, "-o", "in.mp4", "--overwrite")[0] == 0
        assert Path("in.mp4").read_bytes() != before == Path("same.mp4").read_bytes()


def test_python_keeps_inputs_too() -> None:
    video = Video(np.zeros((2, 64, 64, 3), np.uint8), 16.0, 1, inputs=(os.path.abspath("in.npy"),))
    Video(video.frames, 16.0, 1).save("in.npy")
    with pytest.raises(InvalidRequest, match="in.npy is read by this request .*in-2.npy"):
        video.save("in.npy")
    video.save("in.npy", overwrite=True), video.save("other.npy")
    with pytest.raises(InvalidRequest, match="overwrite"):
        video.save("in.npy", overwrite=1)
    with pytest.raises(InvalidRequest, match="standard output on the command line alone"):
        video.save("-")


# ---------------------------------------------------------------- standard output

STREAM = """
import sys
sys.path[:0] = {paths!r}
import types
from fake_pipe import FakePipe
import fastvid
made = FakePipe()
fake = types.ModuleType("fastvid.api")
fake.load = lambda *a, **k: (print("a library prints"), made.load(*a, **k))[1]
sys.modules["fastvid.api"] = fastvid.api = fake
from fastvid.cli import commands
status = commands.main(sys.argv[1:])
print("after", file=sys.stderr)
sys.exit(status)
"""


def stream(*words: str, stdout: int | io.IOBase = subprocess.PIPE) -> subprocess.CompletedProcess[bytes]:
    code = STREAM.format(paths=[str(Path(__file__).parents[1])])
    return subprocess.run([sys.executable, "-c", code, *words], stdout=stdout, stderr=subprocess.PIPE, timeout=120)


def test_standard_output_holds_the_video_alone() -> None:
    done = stream("generate", "p", "-o", "-", "--seed", "5")
    assert done.returncode == 0 and b"a library prints" in done.stderr and os.listdir() == []
    Path("piped.mp4").write_bytes(done.stdout)
    with av.open("piped.mp4") as container:
        assert sum(1 for _ in container.decode(video=0)) == 5
    assert b"moof" in done.stdout and done.stdout[4:8] == b"ftyp"
    assert read_recipe("piped.mp4")["seed"] == 5
    with open("more.mp4", "wb") as file:  # a file as standard output, behind what is there
        file.write(b"before")
        file.flush()
        assert stream("generate", "p", "-o", "-", "--seed", "5", stdout=file).returncode == 0
    assert Path("more.mp4").read_bytes() == b"before" + done.stdout


def test_frames_leave_while_later_ones_are_made() -> None:
    read, write = os.pipe()
    frames = np.broadcast_to(np.arange(40, dtype=np.uint8)[:, None, None, None] * 6, (40, 64, 64, 3))  # a few kB
    with PipeSink(write, width=64, height=64, fps=16, recipe={"fastvid": "0"}) as sink:
        sink.write(frames)
        early = os.read(read, 1 << 16)
        assert early.count(b"moof") >= 2
        sink.close()
    with os.fdopen(read, "rb") as file:
        Path("all.mp4").write_bytes(early + file.read())
    found = read_video("all.mp4")[0]
    assert found.shape == frames.shape and np.abs(found.astype(int) - frames).max() < 4


def test_a_reader_that_goes_is_told() -> None:
    read, write = os.pipe()
    os.close(read)
    frames = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), np.uint8)
    sink = PipeSink(write, width=64, height=64, fps=16)
    with pytest.raises(MediaError, match="standard output: Broken pipe"), sink:
        sink.write(frames)
        sink.close()
    with pytest.raises(OSError):
        os.fstat(write)


# ---------------------------------------------------------------- what a killed command leaves


def test_the_unfinished_file_of_a_killed_command_is_removed_by_the_next() -> None:
    folder, target = Path("job").resolve(), check_writable("out.mp4")
    folder.mkdir()
    resume_files.put_json(folder, "request.json", {"format": 1})
    left = [target.staging() for _ in range(3)]
    for path in left:
        path.touch()
    for path in left[:2]:
        resume_output.replace_partial("job", target, path.name)
    assert not left[0].exists() and left[1].exists() and left[2].exists()
    resume_output.replace_partial("job", check_writable("other.mp4"), "other.mp4.00000000.partial")
    assert left[1].exists(), "of another video"
    for partial in ("../out.mp4.00000000.partial", "precious", 5, None, ["x"], "out.mp4.0000000g.partial"):
        for name in ("precious", "out.mp4.0000000g.partial"):
            Path(name).touch()
        resume_files.put_json(folder, "output.json", {"partial": partial})
        resume_output.replace_partial("job", target, left[2].name)
        assert Path("precious").exists() and Path("out.mp4.0000000g.partial").exists() and left[2].exists()
    assert json.loads((folder / "output.json").read_bytes())["partial"] == left[2].name


def test_an_output_checks_its_checkpoint() -> None:
    Path("job").mkdir()
    with pytest.raises(InvalidRequest, match="is in .*job"):
        Output("job/out.mp4", checkpoint="job").check()
    Output("out.mp4", checkpoint="job").check()
    Output("-", checkpoint="job", new=True).check()
