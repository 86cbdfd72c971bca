"""The command line, with a pipeline that is not real: flags, exit codes, streams, interruption, progress."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_pipe import FakePipe, Recipe, failed, run
from PIL import Image

from fastvid import errors
from fastvid.cli import arguments, commands, parser
from fastvid.cli.command_parser import parts_of
from fastvid.cli.progress import Progress, Stopwatch, duration
from fastvid.engine.events import Finished, Frames, Started, Step
from fastvid.media.metadata import read_recipe, read_video
from fastvid.media.video import Video
from fastvid.requests.arguments import VERBS
from fastvid.requests.request import Request

pytestmark = pytest.mark.usefixtures("pipe")


# ---------------------------------------------------------------- checkpoints


def test_checkpoint_flags_reach_the_pipeline(capsys: pytest.CaptureFixture[str], pipe: FakePipe) -> None:
    said: list[dict[str, Any]] = []
    stream = pipe.stream

    def streamed(prompt: str | None = None, **options: Any) -> Iterator[Any]:
        names = ("checkpoint", "checkpoint_every", "keep_checkpoint")
        said.append({name: options.pop(name) for name in names if name in options})
        return stream(prompt, **options)

    pipe.stream = streamed  # type: ignore[method-assign]
    words = ["--checkpoint", "job", "--checkpoint-every", "2.5", "--keep-checkpoint"]
    assert run(capsys, "generate", "p", "-o", "out.npy", *words)[0] == 0
    assert run(capsys, "generate", "p", "-o", "out.npy")[0] == 0
    assert said == [{"checkpoint": "job", "checkpoint_every": 2.5, "keep_checkpoint": True}, {}]
    Path("file").touch()
    assert "--checkpoint: file is there already" in failed(
        capsys, 2, "generate", "p", "-o", "o.npy", "--checkpoint", "file"
    )


def test_resume_loads_the_model_as_it_was(capsys: pytest.CaptureFixture[str], pipe: FakePipe) -> None:
    from fastvid.engine import resume_files

    recipe = Request.make(prompt="p", seed=3).resolve(Recipe()).to_recipe(model="folder", version="0", dtype="float16")
    saved = {"format": 1, "verb": "generate", "arguments": {"image": {"path": "was.png"}}, "model": {}}
    Path("job").mkdir()
    resume_files.put_json(Path("job"), "request.json", {**saved, "recipe": recipe})
    asked = []

    def resumed(path: str, **given: Any) -> Iterator[Any]:
        asked.append((path, given))
        return pipe._events(Request.make(prompt="p", seed=3).resolve(Recipe()))

    pipe.resume = resumed  # type: ignore[attr-defined]
    Image.new("RGB", (64, 64)).save("moved.png")
    words = ("resume", "job", "-o", "out.npy", "--json", "--quiet", "--image", "moved.png", "--keep-checkpoint")
    status, out, _ = run(capsys, *words)
    assert status == 0 and json.loads(out)["seed"] == 3 and np.load("out.npy").shape == (5, 64, 64, 3)
    assert asked == [("job", {"image": "moved.png", "keep_checkpoint": True, "keep_latents": False})]
    assert pipe.loaded == [("folder", {"dtype": "float16", "backend": "auto", "attention": "auto"})]


def test_resume_refuses_before_the_model_is_loaded(capsys: pytest.CaptureFixture[str], pipe: FakePipe) -> None:
    assert "none holds no checkpoint" in failed(capsys, 1, "resume", "none", "-o", "out.npy")
    Path("job").mkdir()
    Path("job/request.json").write_text("{")
    assert "request.json is damaged" in failed(capsys, 1, "resume", "job", "-o", "out.npy")
    assert "--output" in failed(capsys, 2, "resume", "job") and pipe.loaded == []


# ---------------------------------------------------------------- generate


def test_makes_a_video(capsys: pytest.CaptureFixture[str], pipe: FakePipe) -> None:
    status, out, err = run(capsys, "generate", "a red circle", "-o", "out.mp4", "--seed", "7")
    assert (status, out) == (0, "") and os.listdir() == ["out.mp4"]
    assert read_video("out.mp4")[0].shape == (5, 64, 64, 3) and read_recipe("out.mp4")["seed"] == 7
    assert pipe.loaded == [("embedded", {"backend": "auto", "attention": "auto"})] and pipe.closed == 1
    assert "5 frames of 64x64 at 16 fps, 4 steps, seed 7" in err and "out.mp4: 5 frames, 16 fps, 64x64, seed 7" in err


@pytest.mark.parametrize("words", [("--seed", "-1"), ("--seed=-1",)])
def test_a_seed_of_minus_one_is_a_random_one_that_is_told(
    capsys: pytest.CaptureFixture[str], pipe: FakePipe, words: tuple[str, ...]
) -> None:
    told = [run(capsys, "generate", "p", "-o", f"{name}.npy", "--json", "--quiet", *words)[1] for name in "ab"]
    seeds = [json.loads(out)["seed"] for out in told]
    assert seeds[0] != seeds[1] and all(0 <= seed < 2**32 for seed in seeds)
    assert seeds == [json.loads(out)["recipe"]["seed"] for out in told] == [request.seed for request in pipe.streamed]


def test_every_flag_reaches_the_request(capsys: pytest.CaptureFixture[str], pipe: FakePipe) -> None:
    flags = (
        "--width 80 --height 72 --num-frames 3 --fps 24000/1001 --seed 5 --steps 2 --guidance-scale 1.5 --flow-shift 8"
    )
    flags += " --negative-prompt bad --solver euler --model folder --device cpu --dtype float16 --backend reference"
    flags += " --vae-dtype bfloat16 --quantize transformer=fp8"
    status, out, err = run(
        capsys,
        "generate",
        "p",
        "-o",
        "out.npy",
        *flags.split(),
        "--attention",
        "sdpa",
        "--cuda-graphs",
        "--gpus",
        "2",
        "--link",
        "pcie",
        "--json",
        "--quiet",
    )
    made = json.loads(out)
    expected = {"width": 80, "height": 72, "num_frames": 3, "fps": 24000 / 1001, "seed": 5, "num_inference_steps": 2}
    expected |= {"guidance_scale": 1.5, "flow_shift": 8.0, "negative_prompt": "bad", "solver": "euler", "prompt": "p"}
    assert status == 0 and err == "" and {name: made["recipe"][name] for name in expected} == expected
    loaded = {"device": "cpu", "dtype": "float16", "backend": "reference", "attention": "sdpa", "cuda_graphs": True}
    loaded |= {"parallel": "2", "vae_dtype": "bfloat16", "link": "pcie"}
    loaded |= {"quantize": "transformer=fp8"}
    assert pipe.loaded == [("folder", loaded)]


def test_json_is_one_object_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "generate", "é", "-o", "out.mp4", "--json", "--size", "80x64")
    made = json.loads(out)
    assert out.count("\n") == 1 and err != ""
    assert Path(made["output"]) == Path("out.mp4").resolve() and made["recipe"] == read_recipe("out.mp4")
    assert (made["width"], made["height"], made["num_frames"], made["fps"]) == (80, 64, 5, 16.0)
    assert list(made["seconds"]) == ["load", "text", "denoise", "decode", "write", "total"]
    assert made["seed"] == made["recipe"]["seed"]


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "generate", "p", "-o", "out.mp4", "--quiet") == (0, "", "")


@pytest.mark.parametrize("name", ["out.webm", "out.gif", "out.npy", "out.mov", "frames/"])
def test_writes_every_kind(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert run(capsys, "generate", "p", "-o", name, "--seed", "3")[0] == 0
    assert len(read_video(name)[0]) == 5 and read_recipe(name)["seed"] == 3


def test_a_size_from_aspect_and_budget(capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "generate", "p", "-o", "out.npy", "--aspect", "9:16", "--budget", "240p", "--seconds", "0.25")
    assert np.load("out.npy").shape == (4, 416, 240, 3)


@pytest.mark.parametrize("name", ["out.mp4", "out.webm", "out.gif", "out.npy", "frames/"])
def test_a_recipe_makes_the_same_video(capsys: pytest.CaptureFixture[str], pipe: FakePipe, name: str) -> None:
    run(capsys, "generate", 'a "quoted" é', "-o", name, "--model", "folder", "--steps", "3", "--size", "72x64")
    assert run(capsys, "generate", "--recipe", name, "-o", "again.npy")[0] == 0
    assert run(capsys, "generate", "--recipe", "again.npy", "-o", "third.npy")[0] == 0
    assert Path("again.npy").read_bytes() == Path("third.npy").read_bytes()
    assert read_recipe(name) == read_recipe("again.npy")
    assert pipe.loaded[-1] == ("folder", {"dtype": "float32", "backend": "auto", "attention": "auto"})


def test_flags_beside_a_recipe_change_it(capsys: pytest.CaptureFixture[str], pipe: FakePipe) -> None:
    run(capsys, "generate", "p", "-o", "out.mp4", "--num-frames", "3", "--seed", "1")
    run(
        capsys,
        "generate",
        "other",
        "--recipe",
        "out.mp4",
        "-o",
        "b.npy",
        "--seconds",
        "0.5",
        "--model",
        "m",
        "--dtype",
        "x",
    )
    recipe = read_recipe("b.npy")
    assert (recipe["prompt"], recipe["num_frames"], recipe["seed"], recipe["model"]) == ("other", 8, 1, "m")
    assert pipe.loaded[-1][1]["dtype"] == "x"


def test_the_environment_gives_defaults(capsys: pytest.CaptureFixture[str], pipe: FakePipe, monkeypatch: Any) -> None:
    monkeypatch.setenv("FASTVID_MODEL", "here")
    monkeypatch.setenv("FASTVID_DTYPE", "bfloat16")
    run(capsys, "generate", "p", "-o", "out.npy")
    run(capsys, "generate", "p", "-o", "out.npy", "--model", "given", "--dtype", "float32")
    assert [(model, kwargs["dtype"]) for model, kwargs in pipe.loaded] == [("here", "bfloat16"), ("given", "float32")]


@pytest.mark.parametrize("data", [b"a blue\nsquare\n", "ünï\r\n".encode(), b""])
def test_a_prompt_from_standard_input(capsys: pytest.CaptureFixture[str], monkeypatch: Any, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert run(capsys, "generate", "-", "-o", "out.npy")[0] == 0
    assert read_recipe("out.npy")["prompt"] == data.decode().rstrip("\r\n")


@pytest.mark.parametrize("data, match", [(b"\xff\xfe", "UTF-8"), (b"a" * 100_001, "100000"), ("é" * 300_000, "100000")])
def test_a_bad_prompt_from_standard_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: Any, data: Any, match: str
) -> None:
    data = data.encode() if isinstance(data, str) else data
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert match in failed(capsys, 2, "generate", "-", "-o", "out.npy")


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    "words, match",
    [
        ("", "no command"),
        ("genrate p -o out.mp4", "nearest is generate"),
        ("generate", "-o/--output --frames-dir is required"),
        ("generate -o out.mp4", "no prompt"),
        ("generate a red circle -o out.mp4", "in quotes"),
        ("generate p -o out.mp4 --stpes 3", "unknown flag --stpes; the nearest is --steps"),
        ("generate p -o out.mp4 --step=3", "nearest is --steps"),
        ("generate p -o out.mp4 --steps", "expected one argument"),
        ("generate p -o out.mp4 --steps many", "'many' is not a number"),
        ("generate p -o out.mp4 --steps 0", "--steps=0: allowed is a whole number from 1 to 1000; the nearest is 1"),
        ("generate p -o out.mp4 --num-frames 2.5", "--num-frames=2.5"),
        ("generate p -o out.mp4 --num-frames 1e99", "the nearest is 131072"),
        ("generate p -o out.mp4 --num-frames " + "9" * 5000, "the nearest is 131072"),
        ("generate p -o out.mp4 --guidance-scale nan", "--guidance-scale=nan"),
        ("generate p -o out.mp4 --seed -2", "--seed=-2: allowed is a whole number from -1"),
        ("generate p -o out.mp4 --fps 1/0", "not a number"),
        ("generate p -o out.mp4 --width 5000", "the nearest is 2048"),
        ("generate p -o out.mp4 --seconds 1 --num-frames 3", "--num-frames and --seconds are both given"),
        ("generate p -o out.mp4 --sigmas 0.5,0.7", "--sigmas[1]=0.7"),
        ("generate p -o out.mp4 --sigmas 0.5,x", "not a number"),
        ("generate p -o out.mp4 --solver unpic", "nearest is unipc"),
        ("generate p -o out.mp4 --recipe none.mp4 --seed x", "not a number"),
        ("generate p -o out.mp5", "the nearest is out.mp4"),
        ("generate p -o out.png --num-frames 5", "one frame"),
        ("inspect", "required: model"),
        ("doctor --jsn", "nearest is --json"),
        ("--verson", "nearest is --version"),
    ],
)
def test_bad_usage(capsys: pytest.CaptureFixture[str], pipe: FakePipe, words: str, match: str) -> None:
    status, out, err = run(capsys, *words.split())
    assert status == 2 and out == "" and match in err and "Traceback" not in err
    assert words == "" or (err.startswith("fastvid: ") and err.count("\n") == 1)
    assert pipe.loaded == [] and os.listdir() == [], "nothing was loaded or written"


@pytest.mark.parametrize(
    "words, match",
    [
        ("generate p -o none/out.mp4", "no folder"),
        ("generate p -o /proc/out.mp4", "no file can be made"),
        ("generate --recipe none.mp4 -o out.mp4", "none.mp4: No such file"),
    ],
)
def test_files_that_cannot_be_used(capsys: pytest.CaptureFixture[str], pipe: FakePipe, words: str, match: str) -> None:
    assert match in failed(capsys, 1, *words.split()) and pipe.loaded == []


def test_a_file_without_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.json").write_text("{}")
    assert "not a fastvid recipe" in failed(capsys, 2, "generate", "--recipe", "a.json", "-o", "out.mp4")
    Path("b.json").write_text("not json")
    assert "b.json" in failed(capsys, 1, "generate", "--recipe", "b.json", "-o", "out.mp4")


@pytest.mark.parametrize(
    "failure, status",
    [
        (errors.OutOfMemory("does not fit\nby 3 GiB"), 1),
        (errors.CheckpointError("broken"), 1),
        (errors.InvalidRequest("latents"), 2),
        (errors.Cancelled("cancelled"), 130),
        (KeyboardInterrupt(), 130),
        (RuntimeError("bug"), 1),
        (MemoryError(), 1),
    ],
)
@pytest.mark.parametrize("name", ["out.mp4", "frames/"])
def test_a_failure_leaves_nothing(
    capsys: pytest.CaptureFixture[str], pipe: FakePipe, failure: BaseException, status: int, name: str
) -> None:
    pipe.failure = failure
    failed(capsys, status, "generate", "p", "-o", name, "--quiet")
    assert pipe.closed == 1 and pipe.left == 1


def test_a_failure_keeps_the_old_file(capsys: pytest.CaptureFixture[str], pipe: FakePipe) -> None:
    run(capsys, "generate", "p", "-o", "out.mp4")
    before = Path("out.mp4").read_bytes()
    pipe.failure = errors.Cancelled("cancelled")
    failed(capsys, 130, "generate", "p", "-o", "out.mp4", "--quiet")
    assert Path("out.mp4").read_bytes() == before


def test_debug_shows_where(capsys: pytest.CaptureFixture[str], pipe: FakePipe, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe.failure = RuntimeError("bug")
    assert "FASTVID_DEBUG" in failed(capsys, 1, "generate", "p", "-o", "out.mp4", "--quiet")
    monkeypatch.setenv("FASTVID_DEBUG", "1")
    status, _, err = run(capsys, "generate", "p", "-o", "out.mp4", "--quiet")
    assert status == 1 and "Traceback" in err and "_events" in err


def test_a_signal_is_an_interruption(capsys: pytest.CaptureFixture[str], pipe: FakePipe) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def load(model: str, **kwargs: Any) -> FakePipe:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        time.sleep(30)
        return pipe

    sys.modules["fastvid.api"].load = load  # type: ignore[attr-defined]
    start = time.monotonic()
    assert "interrupted" in failed(capsys, 130, "generate", "p", "-o", "out.mp4", "--quiet")
    assert time.monotonic() - start < 20 and signal.getsignal(signal.SIGTERM) is before


def test_main_runs_in_any_thread(capsys: pytest.CaptureFixture[str]) -> None:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(commands.main(["--version"])))
    thread.start()
    thread.join()
    assert found == [0]


def child(*words: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    code = "import sys; from fastvid.cli.commands import main; s = main(sys.argv[1:]); "
    code += "print('torch' in sys.modules, file=sys.stderr); sys.exit(s)"
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, **kwargs)


@pytest.mark.parametrize(
    "words", [["generate", "p", "-o", "none/out.mp4"], ["generate", "p", "-o", "o.mp4", "--fps", "0"], ["--help"]]
)
def test_torch_is_not_loaded_to_refuse(words: list[str]) -> None:
    assert child(*words).stderr.endswith("False\n")


def test_a_reader_that_goes_away() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "fastvid", "--version"], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


# ---------------------------------------------------------------- the other commands


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    import fastvid

    assert run(capsys, "--version") == (0, f"fastvid {fastvid.__version__}\n", "")
    for command in ("", *parser.COMMANDS):
        status, out, err = run(capsys, *filter(None, [command]), "--help")
        assert status == 0 and err == "" and "example" in out and "exit status" in out
    for action in parser.build()["generate"]._actions:
        assert action.help, action.option_strings


@pytest.mark.parametrize("verb", VERBS)
def test_every_argument_of_a_request_has_a_flag(verb: str) -> None:
    found = {action.dest for action in parser.build()[verb]._actions}
    only_in_python = {"latents", "prompt_embeds", "negative_prompt_embeds", "original_prompt", "prompt_key"}
    only_in_python |= {"loras"}  # --lora is of the model, which a command loads for itself
    missing = set(VERBS[verb]) - only_in_python - found
    assert missing == ({"prompt"} if verb == "storyboard" else set()), "a storyboard's prompts are those of its shots"
    assert set(arguments.LOAD_FLAGS) <= found and {"recipe", "output", "quiet", "json", "loras", "model"} - found == {
        "loras"
    }
    others = {name for other in VERBS for name in VERBS[other]} - set(VERBS[verb])
    assert not others & found, "flags of other verbs"


FARAWAY = ["--zebra", "--download=8", "--a", "--reload", "--nsfw-filter"]


@pytest.mark.parametrize("flag", FARAWAY)
def test_a_flag_like_no_other_gets_no_guess(capsys: pytest.CaptureFixture[str], flag: str) -> None:
    status, _, err = run(capsys, "generate", "p", "-o", "a.mp4", flag)
    assert status == 2 and flag.split("=")[0] in err and "nearest" not in err


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--num-inference-steps", "--steps"),
        ("--num_inference_steps", "--steps"),
        ("--cfg", "--guidance-scale"),
        ("--frames", "--num-frames"),
        ("--sampler=x", "--solver"),
        ("--negativ-prompt", "--negative-prompt"),
        ("--reference-images", "--reference-image"),
    ],
)
def test_a_flag_by_another_name_leads_to_ours(capsys: pytest.CaptureFixture[str], given: str, meant: str) -> None:
    status, _, err = run(capsys, "generate", "p", "-o", "a.mp4", given, "3")
    assert status == 2 and f"the nearest is {meant} " in err


def test_a_command_like_no_other_gets_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "zebra")
    assert status == 2 and "nearest" not in err and "generate, image" in err


def test_inspect_of_a_video(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = {"fastvid": "1", "verb": "generate", "prompt": "a \x1b[31mred\x07 circle\nand more", "seed": 4712}
    for name in ("a.mp4", "a.npy", "frames/"):
        frames = np.full((3, 32, 48, 3), 200, np.uint8)
        path = Video(frames, 12.0, 4712, None, recipe).save(str(tmp_path / name) + "/" * (name[-1] == "/"))
        status, out, _ = run(capsys, "inspect", str(path), "--json")
        told = json.loads(out)
        assert status == 0 and told["recipe"] == recipe, name
        assert (told["width"], told["height"], told["num_frames"]) == (48, 32, 3)
        status, out, _ = run(capsys, "inspect", str(path))
        assert "4712" in out and "\\x1b[31mred\\x07 circle\\nand more" in out and "\x1b" not in out


def test_inspect_of_a_picture_without_a_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    status, out, _ = run(capsys, "inspect", str(tmp_path / "a.png"), "--json")
    assert status == 0 and json.loads(out)["recipe"] is None and json.loads(out)["width"] == 40


def test_inspect(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "inspect", "embedded", "--json")
    assert status == 0 and json.loads(out)["parts"]["vae"]["parameters"] == 3
    status, out, _ = run(capsys, "inspect", "embedded")
    assert status == 0 and [line.split() for line in out.splitlines()] == [
        ["model", "embedded"],
        ["parts"],
        ["vae"],
        ["parameters", "3"],
        ["types", "F32"],
    ]


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from fastvid.cli import doctor

    monkeypatch.setattr(doctor, "doctor", lambda device: {"host": {"device": device}})
    assert run(capsys, "doctor", "--json", "--device", "cpu") == (0, '{"host": {"device": "cpu"}}\n', "")
    status, out, _ = run(capsys, "doctor")
    assert status == 0 and "host" in out


def test_bench(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from fastvid.cli import bench

    fine, bad = tmp_path / "bench_fine.py", tmp_path / "bench_bad.py"
    fine.write_text(
        '"""What it measures.\n\nMore."""\nimport os, sys\nopen(os.environ["OUT"] + "/made", "w").write(sys.argv[1])\n'
    )
    bad.write_text("raise SystemExit(3)\n")
    listed = [line.split()[0] for line in run(capsys, "bench")[1].splitlines()]
    assert listed == sorted(bench.scripts()) and {"dit_cpu", "rgb"} <= {*listed}
    monkeypatch.setattr(bench, "scripts", lambda: {"bad": bad, "fine": fine})
    assert run(capsys, "bench") == (0, f"{'bad':<16} \n{'fine':<16} What it measures.\n", "")
    status, _, error = run(capsys, "bench", "bad", "fine", "--out", str(tmp_path / "new"), "--", "--rounds")
    assert status == 1 and "failed: bad (exit status 3)" in error
    assert (tmp_path / "new" / "made").read_text() == "--rounds", "one that fails does not keep the next from running"
    status, _, error = run(capsys, "bench", "fin")
    assert status == 2 and "nearest is fine" in error


# ---------------------------------------------------------------- progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def steps(progress: Progress, clock: Clock, total: int, pause: float) -> None:
    progress.event(Started(None, 1, 17, 64, 96, 23.976, total, {}))  # type: ignore[arg-type]
    for i in range(total):
        clock.now += pause
        progress.event(Step(i + 1, total, 0.5, 0.1))
    progress.event(Frames(0, np.zeros((17, 1, 1, 3), np.uint8)))
    progress.event(Finished(1, 17, 23.976, None, {}, {}))
    progress.close()


@pytest.mark.parametrize(
    "total, pause, most", [(1000, 0.01, 12), (20, 0.1, 12), (3, 60.0, 5), (100, 60.0, 40), (1, 1, 3)]
)
def test_plain_lines_are_few(total: int, pause: float, most: int) -> None:
    stream, clock = io.StringIO(), Clock()
    steps(Progress(stream, clock=clock), clock, total, pause)
    lines = stream.getvalue().splitlines()
    assert 3 <= len(lines) <= most + 1 and "\r" not in stream.getvalue()
    assert lines[0] == f"17 frames of 96x64 at 23.976 fps, {total} step{'s' * (total > 1)}, seed 1"
    assert lines[-2] == f"denoising: step {total} of {total}" and lines[-1] == "decoding: 17 of 17 frames"


def test_plain_lines_tell_the_time_left() -> None:
    stream, clock = io.StringIO(), Clock()
    steps(Progress(stream, clock=clock), clock, 10, 30.0)
    assert "denoising: step 1 of 10, 4:30 min left" in stream.getvalue()


def test_a_terminal_has_a_bar() -> None:
    stream, clock = Terminal(), Clock()
    steps(Progress(stream), clock, 10, 0.0)
    text = stream.getvalue()
    assert "denoising" in text and "\r" in text and "left" in text


def test_quiet_has_neither() -> None:
    for stream in (Terminal(), io.StringIO()):
        steps(Progress(stream, quiet=True), Clock(), 10, 1.0)
        assert stream.getvalue() == ""


def test_stopwatch() -> None:
    clock = Clock()
    watch = Stopwatch(clock)
    for stage, now in (("a", 1.0), ("b", 3.0), ("a", 7.0)):
        clock.now = now
        watch.mark(stage)
    assert watch.seconds == {"a": 5.0, "b": 2.0} and watch.total == 7.0


@pytest.mark.parametrize(
    "seconds, text",
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (59.4, "59 s"), (59.6, "1:00 min"), (185, "3:05 min"), (3723, "1:02:03 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# ---------------------------------------------------------------- models by name


def test_models_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "models", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    small, two = rows["wan2.1-t2v-1.3b"], rows["wan2.2-t2v-a14b"]
    assert status == 0 and small["hub"] == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers" and small["licence"] == "Apache-2.0"
    assert 1.41e9 < small["parameters"] < 1.43e9 and two["transformers"] == 2
    assert all(row["memory"]["blocks"] < row["memory"]["none"] > row["bytes"] for row in rows.values())


def test_an_unknown_name_is_not_downloaded(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, said = run(capsys, "download", "wan2.1-t2v-13b")
    assert status == 2 and "the nearest name is wan2.1-t2v-1.3b" in said


@pytest.mark.parametrize(("model", "keeps"), [(None, True), ("m", True), ("another", False)])
def test_what_a_recipe_says_of_loading(model: str | None, keeps: bool) -> None:
    """Naming the recipe's own model again changes nothing; parts go with their model, quantize= and LoRAs do not."""
    settings = {"quantize": "int8", "loras": [["a.safetensors", 1.0]], "parts": {"vae": "v"}, "variant": "x"}
    flags = parser.parse(["generate", "--recipe", "r", "-o", "o.mp4", *(["--model", model] if model else [])])[1]
    made = arguments.load_arguments(flags, {"model": "m", "settings": settings})
    assert {name: made[name] for name in settings if name in made} == {
        name: value for name, value in settings.items() if keeps or name in ("quantize", "loras")
    }


def test_files_of_parts_by_flags_of_their_own() -> None:
    words = ["generate", "p", "-o", "a.mp4", "--transformer", "high.gguf", "--transformer", "low.gguf", "--vae", "v"]
    flags = parser.parse(words)[1]
    assert parts_of(flags) == {"transformer": ["high.gguf", "low.gguf"], "vae": "v"}
    with pytest.raises(errors.InvalidRequest, match="the part vae is given twice"):
        parts_of(parser.parse([*words, "--part", "vae=w"])[1])
