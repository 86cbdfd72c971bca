"""Cases of the area "cli": standard output and exit code of `python -m fastvid`.

It is run in this process through `runpy`, as python runs it with -m, so that torch is imported once. Three cases start
a real process.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import golden_inputs as given
import golden_models
import numpy as np
from golden_pipes import path_of
from golden_record import Case, Lab, sha256

import fastvid

VERBS = ("generate", "image", "extend", "loop", "blend", "edit", "storyboard", "finalize")
COMMANDS = (*VERBS, "resume", "plan", "inspect", "download", "convert", "doctor", "bench")
LEFT_OUT = ("seconds", "seconds_parts", "efficiency", "bytes_free")


def cases() -> dict[str, Case]:
    return {**helps(), **plans(), **inspections(), **conversions(), **videos(), **processes()}


def run(*words: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one command."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["fastvid", *words]
    status: Any = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_module("fastvid", run_name="__main__", alter_sys=True)
    except SystemExit as done:
        status = done.code
    finally:
        sys.argv = before
    return int(status or 0), out.getvalue(), err.getvalue()


def said(*words: str) -> Case:
    """A case: exit code and standard output, as lines."""

    def case(lab: Lab) -> dict[str, Any]:
        status, out, _ = run(*words)
        return {"status": status, "out": lab.text(out).splitlines()}

    return case


def told(*words: str, left_out: tuple[str, ...] = LEFT_OUT) -> Case:
    """A case: exit code and the one JSON object, without what is measured. {t2v} stands for a tiny model."""

    def case(lab: Lab) -> dict[str, Any]:
        filled = [fill(lab, word) for word in words]
        status, out, err = run(*filled)
        if status:
            return {"status": status, "err": lab.text(err).splitlines()}
        return {"status": status, "json": {k: v for k, v in json.loads(out).items() if k not in left_out}}

    return case


def fill(lab: Lab, word: str) -> str:
    for kind in golden_models.KINDS:
        word = word.replace(f"{{{kind}}}", path_of(lab, kind)) if f"{{{kind}}}" in word else word
    return word.replace("{lora}", str(golden_models.ensure_lora(lab.models)))


def helps() -> dict[str, Case]:
    found: dict[str, Case] = {"--help": said("--help"), "--version": said("--version")}
    found |= {f"{command} --help": said(command, "--help") for command in COMMANDS}
    return found | {f"plan {verb} --help": said("plan", verb, "--help") for verb in VERBS}


def plans() -> dict[str, Case]:
    lines = (
        'generate "a" --model wan2.1-t2v-14b --size 832x480 --device-memory 24GB',
        'generate "a" --model wan2.1-t2v-1.3b --seconds 10 --device-memory 16GiB --offload blocks',
        'generate "a" --model wan2.1-t2v-14b --gpus 8 --link nvlink --device-memory 80GB',
        '"a" --size 160x96 --seconds 2 --steps 7',
        "extend {clip} --seconds 2 --direction both",
        "loop {clip}",
        'edit {clip} "a" --strength 0.5',
        'storyboard --shot "a:1" --shot "b:2" --size 96x64',
        'image "a" --size 512x512 --model {t2v}',
        'generate "a" --model {two} --size 96x64 --num-frames 9',
        'generate "a" --model wan2.1-t2v-14b --size 1280x720 --device-memory 6GB',
    )
    found: dict[str, Case] = {f"plan {line}": with_clip(line, "--json") for line in lines}
    found |= {f"plan {line} (text)": plan_text(line) for line in lines[:3]}
    return found


def with_clip(line: str, *more: str) -> Case:
    def case(lab: Lab) -> dict[str, Any]:
        np.save("clip.npy", given.clip(9))
        return told("plan", *shlex.split(line.replace("{clip}", "clip.npy")), *more)(lab)

    return case


def plan_text(line: str) -> Case:
    return said("plan", *shlex.split(line))


def inspections() -> dict[str, Case]:
    found: dict[str, Case] = {}
    for kind in golden_models.KINDS:
        found[f"inspect {kind}"] = told("inspect", f"{{{kind}}}", "--json", left_out=())
    return found | {
        "inspect t2v (text)": lambda lab: said("inspect", path_of(lab, "t2v"))(lab),
        "inspect embedded": told("inspect", "embedded", "--json", left_out=()),
        "inspect with a LoRA": told("inspect", "{t2v}", "--lora", "{lora}:0.5", "--json", left_out=()),
        "inspect with parts": told("inspect", "{t2v}", "--part", "vae={two}/vae", "--json", left_out=()),
    }


# ---------------------------------------------------------------- converting


def conversions() -> dict[str, Case]:
    return {f"convert {kind}": there_and_back(kind) for kind in ("t2v", "two", "ti2v", "vace", "i2v")}


def there_and_back(kind: str) -> Case:
    """Into the original layout and back, with the sha256 of every file that is written."""

    def case(lab: Lab) -> dict[str, Any]:
        original, again = f"{kind}-original", f"{kind}-again"
        there = run("convert", path_of(lab, kind), original, "--to", "original", "--quiet", "--json")
        back = run("convert", original, again, "--quiet", "--json")
        inspected = run("inspect", original, "--json")
        return {
            "statuses": [there[0], back[0], inspected[0]],
            "there": parsed(there[1]),
            "back": parsed(back[1]),
            "inspected": parsed(inspected[1]),
            "files": files(Path(original)) | files(Path(again)),
            "errors": [there[2], back[2], inspected[2]],
        }

    return case


def parsed(text: str) -> Any:
    return json.loads(text) if text else None


def files(folder: Path) -> dict[str, str | None]:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): sha256(np.frombuffer(path.read_bytes(), np.uint8)) for path in found}


# ---------------------------------------------------------------- videos


def videos() -> dict[str, Case]:
    """Every verb as a command, into a .npy file."""
    few = "--steps 1 --seed 3 --quiet --json"
    lines = {
        "generate": f'generate "a red circle moving right" --size 90x70 --num-frames 5 {few}',
        "image": f'image "a blue star" --size 64x80 {few}',
        "extend": f'extend clip.npy "a red circle" --num-frames 4 --direction before {few}',
        "loop": f'loop clip.npy "a red circle" --seconds 0.4 {few}',
        "blend": f'blend clip.npy clip.npy "a red circle" --num-frames 4 {few}',
        "edit": f'edit clip.npy "a blue circle" --strength 1 --mask mask.npy {few}',
        "storyboard": f'storyboard --shot "a red circle:0.3" --shot "a blue star:0.3" --size 64x64 {few}',
        "storyboard file": f"storyboard --shots shots.json --size 64x64 {few}",
        "finalize": f'finalize clip.npy "a red circle" --size 96x96 {few}',
        "picture": f'generate "a red circle" --image clip.npy --num-frames 5 --solver euler {few}',
        "of a model": f'generate "a red circle" --size 64x64 --num-frames 5 --model {{t2v}} --lora {{lora}}:0.8 {few}',
    }
    return {f"make/{name}": video(name, line) for name, line in lines.items()}


def video(name: str, line: str) -> Case:
    def case(lab: Lab) -> dict[str, Any]:
        np.save("clip.npy", given.clip(5))
        np.save("mask.npy", np.repeat(given.still_mask()[None, :, :, None] * np.uint8(255), 3, -1))
        Path("shots.json").write_text('[["a red circle", 0.3], ["a blue star", 0.4]]')
        path = Path(name.replace(" ", "-") + ".npy").resolve()
        made = told(*shlex.split(line), "-o", str(path))(lab)
        if path.exists():
            frames = np.load(path)
            lab.keep(frames)
            made |= {"shape": list(frames.shape), "frames_sha256": sha256(frames)}
        return made

    return case


def processes() -> dict[str, Case]:
    """In a process of its own."""
    return {
        "process/--help": process("--help"),
        "process/refused": process("generate", "a", "-o", "out.mp4", "--stpes", "3"),
        "process/generate": process(
            *("generate", "a red circle", "--size", "64x64", "--num-frames", "1", "--steps", "1", "--seed", "3"),
            *("--quiet", "-o", "process.npy"),
        ),
    }


def process(*words: str) -> Case:
    def case(lab: Lab) -> dict[str, Any]:
        command = [sys.executable, "-m", "fastvid", *words]
        # The tree that is imported here is the one that is run there.
        paths = [str(Path(fastvid.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
        made = {"status": done.returncode, "out": lab.text(done.stdout).splitlines(), "err": done.stderr.splitlines()}
        if Path("process.npy").exists():
            made["frames_sha256"] = sha256(np.load("process.npy"))
        return made

    return case


# ---------------------------------------------------------------- what is refused


WRONG = (
    "",
    "genrate p -o out.mp4",
    "generate",
    "generate -o out.mp4",
    "generate a red circle -o out.mp4",
    "generate p -o out.mp4 --stpes 3",
    "generate p -o out.mp4 --step=3",
    "generate p -o out.mp4 --steps",
    "generate p -o out.mp4 --steps many",
    "generate p -o out.mp4 --steps 0",
    "generate p -o out.mp4 --num-frames 2.5",
    "generate p -o out.mp4 --num-frames 1e99",
    "generate p -o out.mp4 --guidance-scale nan",
    "generate p -o out.mp4 --seed -7",
    "generate p -o out.mp4 --width 5000",
    "generate p -o out.mp4 --size 64",
    "generate p -o out.mp4 --seconds 1 --num-frames 3",
    "generate p -o out.mp4 --sigmas 0.5,0.7",
    "generate p -o out.mp4 --sigmas 0.5,x",
    "generate p -o out.mp4 --solver unpic",
    "generate p -o out.mp5",
    "generate p -o out.png --num-frames 5",
    "generate p -o none/out.mp4",
    "generate p -o out.mp4 --model embeded",
    "generate p -o out.mp4 --device tpu",
    "generate p -o out.mp4 --dtype float23",
    "generate p -o out.mp4 --image missing.png",
    "generate p -o out.mp4 --part vae",
    "generate p -o out.mp4 --keyframe 3",
    "generate p -o out.mp4 --strength 0.5",
    "generate --recipe none.mp4 -o out.mp4",
    "extend missing.mp4 -o out.mp4",
    "extend -o out.mp4",
    "blend a.npy -o out.mp4",
    "edit missing.npy p -o out.mp4 --strength 2",
    "storyboard -o out.mp4",
    "storyboard --shot a -o out.mp4",
    "finalize -o out.mp4",
    "resume missing.ckpt -o out.mp4",
    "inspect",
    "inspect missing/folder",
    "convert missing/folder out",
    "convert a b --to comfy",
    "doctor --jsn",
    "bench nothing",
    "plan p --device-memory none",
    "plan p --model wan2.1-t2v-15b",
    "plan p --model wan2.1-t2v-14b --size 832x480 --device-memory 3GB",
    "--verson",
)


def refusals() -> dict[str, Case]:
    """Wrong commands, for the area "refusals"."""
    return {f"fastvid {line}".strip(): refused(*line.split()) for line in WRONG}


def refused(*words: str) -> Case:
    def case(lab: Lab) -> dict[str, Any]:
        status, out, err = run(*words)
        return {"status": status, "out": lab.text(out).splitlines(), "err": lab.text(err).splitlines()}

    return case
