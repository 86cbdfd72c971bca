"""The GPU ladder with a pretended GPU: order, limits, what a later call skips, exit codes, and the files it writes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import alive

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import ladder  # noqa: E402
import limited  # noqa: E402

NAME = "Pretended GPU"
SMI = f"""#!/bin/sh
case "$*" in
    *=name*) echo "{NAME}" ;;
    *=compute_cap*) echo 9.0 ;;
    *=driver_version*) echo 580.65 ;;
    -L) echo "GPU 0: {NAME}" ;;
    *) exit 1 ;;
esac
"""


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


# ---------------------------------------------------------------- commands under a limit


def test_a_command_ends_by_itself_or_is_ended(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    fine = limited.run(["sh", "-c", "echo said; echo more >&2"], 20, log)
    assert (fine.how, fine.code) == ("done", 0) and limited.tail(log) == "said\nmore\n"
    assert limited.run(["sh", "-c", "exit 7"], 20, log).how == "status 7"
    assert limited.run(["sh", "-c", "kill -SEGV $$"], 20, log).how == "killed by signal 11"
    gone = limited.run(["/no/such/program"], 20, log)
    assert gone.how == "not started: /no/such/program: No such file or directory" and gone.code == 127
    hung = limited.run(["sleep", "60"], 0.5, log)
    assert (hung.how, hung.code) == ("stopped after 0 s", None) and hung.seconds < 10


def test_what_a_command_started_is_ended_with_it(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    limited.run(["sh", "-c", "sleep 60 & echo $!; sleep 60"], 0.5, log)
    limited_child = int(log.read_text())
    deadline = time.monotonic() + 5
    while alive(limited_child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(limited_child)


def test_an_interrupted_command_may_write_what_it_has(tmp_path: Path) -> None:
    script = "import time\ntry:\n    print('ready', flush=True)\n    time.sleep(60)\nfinally:\n    print('kept')\n"
    log, command = tmp_path / "log.txt", [sys.executable, "-IS", "-c", script]  # a start that a busy machine makes
    assert limited.run(command, 3, log, grace=20).how == "stopped after 3 s"
    assert "kept" in log.read_text()
    limited.run(command, 2, log)
    assert "ready" in log.read_text() and "kept" not in log.read_text()


# ---------------------------------------------------------------- items


@pytest.fixture
def climbing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ladder.Ladder:
    """A ladder over a checkout with one source."""
    monkeypatch.setattr(ladder, "ROOT", tmp_path)
    monkeypatch.setattr(ladder, "SITE", tmp_path / "site")
    monkeypatch.setattr(ladder, "LEAST", 0.3)
    monkeypatch.setitem(ladder.earlier.__globals__, "RESULTS", tmp_path / "results")
    (tmp_path / "out").mkdir()
    for name in ("kernels", "fastvid", "benchmarks"):
        (tmp_path / name).mkdir()
    (tmp_path / "kernels" / "rgb.py").write_text("first")
    for path in (ROOT / "benchmarks").glob("bench_*.py"):
        shutil.copy(path, tmp_path / "benchmarks")
    return ladder.Ladder("cpu", "cpu X", tmp_path / "out", time.monotonic() + 60, False, {})


def shell(command: str, of: tuple[str, ...] = ("kernels",), limit: float = 20, step: str = "video") -> ladder.Item:
    return ladder.Item(step, "it", ("sh", "-c", command), limit, of)


def record(climbing: ladder.Ladder) -> dict[str, Any]:
    return json.loads(climbing.file.read_text())["items"]["it"]


def test_how_an_item_ended_is_recorded_at_once(climbing: ladder.Ladder) -> None:
    assert ladder.climb(shell("echo hello"), climbing) == "done"
    assert record(climbing)["ended"] == "done"
    assert climbing.log.read_text() == "===== it: done\nhello\n\n"
    assert ladder.climb(shell("exit 4", ()), climbing) == "status 4" == record(climbing)["ended"]
    assert ladder.climb(shell("sleep 60", (), limit=1), climbing) == "stopped after 1 s"


def test_a_sanitizer_that_cannot_look_at_the_device_is_no_failure(climbing: ladder.Ladder) -> None:
    said = "echo '========= Error: Device not supported. Please refer to the documentation'; exit 1"
    assert ladder.climb(shell(said, step="sanitize"), climbing) == "cannot run"
    assert ladder.climb(shell("exit 9", step="sanitize"), climbing) == "status 9"
    assert ladder.climb(shell(said), climbing) == "status 1"


def test_what_is_done_is_done_again_only_with_other_sources(climbing: ladder.Ladder) -> None:
    assert ladder.climb(shell("exit 1"), climbing) == "status 1"
    assert ladder.climb(shell("true"), climbing) == "done"
    assert ladder.climb(shell("exit 1"), climbing) == "done before"
    (ladder.ROOT / "kernels" / "rgb.py").write_text("second")
    assert ladder.climb(shell("true"), climbing) == "done"
    (ladder.ROOT / "fastvid" / "other.py").write_text("not in this folder")
    (ladder.ROOT / "kernels" / "notes.md").write_text("no source")
    assert ladder.climb(shell("exit 1"), climbing) == "done before"
    climbing.again = True
    assert ladder.climb(shell("exit 5"), climbing) == "status 5"
    climbing.again = False
    assert ladder.climb(shell("true", ()), climbing) == "done"  # knows by itself what is done
    assert ladder.climb(shell("exit 6", ()), climbing) == "status 6"


def test_without_time_nothing_begins(climbing: ladder.Ladder) -> None:
    climbing.until = time.monotonic() + ladder.LEAST - 0.1
    assert ladder.climb(shell("touch begun"), climbing) == "no time"
    assert not (ladder.ROOT / "begun").exists() and not climbing.file.exists()


def test_what_the_call_s_end_stops_goes_on_in_the_next(climbing: ladder.Ladder) -> None:
    climbing.until = time.monotonic() + ladder.LEAST + 0.5
    assert ladder.climb(shell("sleep 60"), climbing) == "no time" == record(climbing)["ended"]
    climbing.until = time.monotonic() + 60
    assert ladder.climb(shell("exit 3", ()), climbing) == "no time"  # as smoke and tests say it
    assert ladder.climb(shell("true"), climbing) == "done"


def test_the_build_is_for_this_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path / "nvidia-smi", SMI)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    ladder.gpu.cache_clear()
    assert ladder.environment(shell("", step="build"))["FASTVID_CUDA_ARCHS"] == "90a"
    program(tmp_path / "nvidia-smi", SMI.replace("9.0", "8.6"))
    ladder.gpu.cache_clear()
    assert ladder.environment(shell("", step="build"))["FASTVID_CUDA_ARCHS"] == "86"
    assert "PYTORCH_NO_CUDA_MEMORY_CACHING" in ladder.environment(shell("", step="sanitize"))
    ladder.gpu.cache_clear()


def test_what_tuning_did_not_reach_is_left_to_the_next_call(climbing: ladder.Ladder) -> None:
    args = ladder.argparse.Namespace(models=["m"], budget=7.0, device="cpu")
    file = climbing.out / "tune-m-cpu-x.json"
    file.write_text(json.dumps({"unmeasured": [{"op": "to_rgb"}, {"op": "rms_norm"}, {"op": "layer_norm"}]}))
    (item,) = ladder.tuned(args, climbing)
    assert item.name == "tune m" and str(file) in item.command and item.limit == 7 + ladder.LIMITS["tune"]
    climbing.known["tune m"] = {"ended": "done", "key": ladder.sources(item.of)}
    _, rest = ladder.tuned(args, climbing)
    assert rest.name == "tune m, the rest" and str(file) not in rest.command
    assert rest.command[rest.command.index("--only") + 1] == "norms,rgb"
    earlier = ladder.earlier(Path("none")).parent
    earlier.mkdir()
    file.rename(earlier / file.name)  # it was committed
    assert len(list(ladder.tuned(args, climbing))) == 2
    file.write_text(json.dumps({"unmeasured": []}))
    assert len(list(ladder.tuned(args, climbing))) == 1


def items(climbing: ladder.Ladder, monkeypatch: pytest.MonkeyPatch, *words: str) -> Iterator[ladder.Item]:
    monkeypatch.setattr(sys, "argv", ["ladder.py", "--device", "cpu", *words])
    return ladder.items(ladder.parsed(), climbing)


def test_a_smoke_test_that_was_cut_off_is_repeated_after_tuning(
    climbing: ladder.Ladder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for ended, wanted in (("no time", 2), ("done", 1), ("status 1", 1)):
        names = []
        for item in items(climbing, monkeypatch):
            names.append(item.step)
            climbing.known[item.name] = {"ended": ended, "key": ""}
        assert names.count("smoke") == wanted and names.count("tune") == len(ladder.MODELS)
        assert names.index("tests") == len(names) - 1 - 2 * len(ladder.TOOLS)


def test_what_is_measured_is_asked_for_by_name(climbing: ladder.Ladder, monkeypatch: pytest.MonkeyPatch) -> None:
    named = list(items(climbing, monkeypatch, "measure", "rgb", "profile_step"))
    assert [item.name for item in named] == ["build", "measure rgb", "measure profile_step"]
    every = [item for item in items(climbing, monkeypatch, "measure") if item.step == "measure"]
    assert {item.name for item in every} > {"measure attention", "measure norms", "measure e2e"}
    for item in (*named[1:], *every):
        assert (ROOT / "benchmarks" / Path(item.command[1]).name).is_file()


@pytest.mark.parametrize(
    ("outcomes", "code"),
    [
        (["done", "done before"], 0),
        (["done", "no time"], 3),
        (["no time", "status 9", "done"], 1),
        (["stopped after 40 s"], 1),
        (["killed by signal 11"], 1),
        (["done", "cannot run"], 0),
    ],
)
def test_the_exit_status(outcomes: list[str], code: int) -> None:
    assert ladder.status(dict(enumerate(outcomes))) == code


# ---------------------------------------------------------------- all of it

NVCC = """#!/bin/sh
case "$*" in
    *--version*) echo "Cuda compilation tools, release 13.0, V13.0.88"; exit 0 ;;
    *--dryrun*) echo "#$ TOP={root}" >&2; exit 0 ;;
esac
while [ $# -gt 0 ]; do
    case "$1" in
        -o) out=$2 ;;
        -MF) deps=$2 ;;
    esac
    shift
done
echo "$out:" > "$deps"
: | g++ -x c++ -c - -o "$out"
"""
SANITIZER = """#!/bin/sh
case "$PRETEND $*" in
    *hang*"--tool racecheck"*sanitize.py*cuda_int8*) sleep 600 ;;
    *fault*"--tool memcheck"*triton) echo "Invalid read"; exit 9 ;;
esac
echo "$2 found nothing"
"""
FAKE = "import pytest\n\n\n@pytest.mark.gpu\ndef test_it():\n    {}\n"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the sources, with small tests, beside programs that pretend a GPU."""
    root, stubs = tmp_path / "checkout", tmp_path / "stubs"
    for name in ("fastvid", "kernels", "csrc", "benchmarks"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "results"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root)
    (root / "benchmarks" / "results").mkdir()
    limits = root / "benchmarks" / "ladder.py"
    text = limits.read_text()
    for before, after in (
        ('"smoke": 40', '"smoke": 320'),
        ('"tune": 100', '"tune": 500'),
        ('"sanitize": 150', '"sanitize": 12'),
    ):
        assert before in text
        text = text.replace(before, after)  # a CPU is slow, and what hangs is to be stopped soon
    limits.write_text(text)
    import gpu_tests

    (root / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    for file in gpu_tests.COVERS:
        program(root / file, FAKE.format("assert False" if "test_rgb" in file else "pass"))
    program(stubs / "nvidia-smi", SMI)
    program(stubs / "compute-sanitizer", SANITIZER)
    program(stubs / "bin" / "nvcc", NVCC.replace("{root}", str(stubs)))
    (stubs / "lib64").mkdir()
    subprocess.run(["ar", "rc", str(stubs / "lib64" / "libcudart_static.a")], check=True)
    return root


def call(root: Path, *words: str, pretend: str = "", out: Path | None = None) -> tuple[int, dict[str, str]]:
    """Run gpu.sh; its status, and how each item ended, in their order."""
    stubs = root.parent / "stubs"
    given = {"PATH": f"{stubs}:{stubs / 'bin'}:{os.environ['PATH']}", "CUDA_HOME": str(stubs), "PRETEND": pretend}
    given |= {"PYTHON": sys.executable, "XDG_CACHE_HOME": str(root.parent / "cache")}
    given |= {"OUT": str(out)} if out else {}
    env = {name: value for name, value in os.environ.items() if name not in ("OUT", "PYTHONPATH")} | given
    command = ["bash", str(root / "benchmarks" / "gpu.sh"), "--device", "cpu", *words]
    done = subprocess.run(command, env=env, cwd="/", capture_output=True, text=True, timeout=1500)
    print(done.stdout, done.stderr)
    names = ("build", "doctor", "smoke", "video", "tune", "tests", "memcheck", "racecheck", "initcheck", "measure")
    said = re.findall(rf"^((?:{'|'.join(names)})\b[^:\n/]*): (.+)$", done.stdout, re.MULTILINE)
    return done.returncode, dict(said)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None or shutil.which("ar") is None, reason="there is no g++ or no ar")
def test_the_whole_ladder(checkout: Path, tmp_path: Path) -> None:
    results, out = checkout / "benchmarks" / "results", tmp_path / "out"
    words = ("--models", "embedded", "--budget", "6", "--seconds", "1200")
    status, ended = call(checkout, *words, pretend="hang fault", out=out)
    sanitizers = [f"{tool} {kind}" for kind in ("cuda", "triton") for tool in ("memcheck", "racecheck", "initcheck")]
    assert list(ended) == ["build", "doctor", "smoke", "video", "tune embedded", "tests", *sanitizers]
    assert status == 1 and ended["tests"] == "status 1"
    assert ended["racecheck cuda"] == "stopped after 12 s" and ended["memcheck triton"] == "status 9"
    assert {how for name, how in ended.items() if name not in ("tests", "racecheck cuda", "memcheck triton")} == {
        "done"
    }
    written = {path.name.partition("-cpu")[0]: json.loads(path.read_text()) for path in out.glob("*.json")}
    assert set(written) == {"ladder", "smoke", "tune-embedded", "gpu-tests"}
    files = written["gpu-tests"]["files"]
    assert [file for file, one in files.items() if one["passed"] != 1] == ["tests/kernels/test_rgb.py"]
    cases = written["smoke"]["cases"].values()
    assert len(cases) == 12 and all(case["error"] <= case["allowed"] for case in cases)
    assert len(list(out.iterdir())) == 5 and "===== video: done" in next(out.glob("*.txt")).read_text()
    tuned = written["tune-embedded"]
    assert tuned["benchmark"] == "tune" and (tuned["rows"] or tuned["unmeasured"])

    # The results are committed, what failed is mended, and the next call goes on from there.
    for path in out.glob("*.json"):
        shutil.copy(path, results)
    program(checkout / "tests/kernels/test_rgb.py", FAKE.format("pass"))
    status, ended = call(checkout, *words)
    ran = {"build", "smoke", "tests", "racecheck cuda", "memcheck triton"}
    ran |= {"tune embedded, the rest"} if tuned["unmeasured"] else set()
    assert status == 0 and {name for name, how in ended.items() if how == "done"} == ran
    assert {how for name, how in ended.items() if name not in ran} == {"done before"}
    record = json.loads(next(results.glob("gpu-tests*")).read_text())["files"]
    assert all(one["passed"] == 1 for one in record.values())
    assert sum(record[file] == files[file] for file in files) == len(files) - 1  # the others did not run again

    # Nothing is left, until a source changes.
    with open(checkout / "fastvid" / "cli" / "doctor.py", "a") as file:
        file.write("# changed\n")
    status, ended = call(checkout, "doctor", "sanitize")
    assert status == 0 and list(ended) == ["build", "doctor", *sanitizers]
    assert ended["doctor"] == "done" and {ended[name] for name in sanitizers} == {"done before"}


def test_a_machine_without_a_gpu_is_told_so(tmp_path: Path) -> None:
    program(tmp_path / "nvidia-smi", "#!/bin/sh\nexit 9\n")
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "OUT": str(tmp_path / "out")}
    command = [sys.executable, str(ROOT / "benchmarks" / "ladder.py"), "smoke"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "no GPU is found" in done.stderr


@pytest.mark.parametrize("words", [["tset"], ["measure", "no_such"]])
def test_an_unknown_step_is_refused(words: list[str]) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "ladder.py"), "--device", "cpu", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "there is no" in done.stderr


def test_a_call_that_is_ended_ends_what_it_runs(tmp_path: Path) -> None:
    script = f"""
import signal, sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import ladder, limited
signal.signal(signal.SIGTERM, ladder.stop)
limited.run(["sh", "-c", "echo $$; sleep 60"], 60, Path({str(tmp_path / "log.txt")!r}))
"""
    child = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 20
    while not limited.tail(tmp_path / "log.txt") and time.monotonic() < deadline:
        time.sleep(0.05)
    started = int(limited.tail(tmp_path / "log.txt"))
    child.send_signal(signal.SIGTERM)
    assert child.wait(20) == 1
    while alive(started) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(started)
