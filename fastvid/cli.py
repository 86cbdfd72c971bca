"""The command line: `fastvid generate | resume | inspect | convert | doctor`.

What can be checked without the model (flags, request, output path) is checked before torch is imported.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fastvid
from fastvid import cli_args, env
from fastvid.errors import Cancelled, Error, InvalidRequest
from fastvid.limits import MAX_PROMPT
from fastvid.progress import Progress, Stopwatch, duration
from fastvid.requests import Request

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

REQUEST_FLAGS = (
    *(
        "negative_prompt",
        "width",
        "height",
        "size",
        "aspect",
        "budget",
        "num_frames",
        "seconds",
        "fps",
        "seed",
        "image",
        "last_image",
        "video",
        "mask",
        "reference_images",
        "conditioning_scale",
    ),
    *("num_inference_steps", "guidance_scale", "guidance_scale_2", "flow_shift", "sigmas", "solver"),
)
PROMPT_FLAGS = ("expand_prompt", "prompt_endpoint", "prompt_model")
CHECKPOINT_FLAGS = ("checkpoint", "checkpoint_every", "keep_checkpoint")
RESUME_FLAGS = ("image", "last_image", "video", "mask", "reference_images")
LOAD_FLAGS = ("device", "dtype", "backend", "attention")


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status. Errors are one line on standard error."""
    try:
        with _sigterm_interrupts():
            command, flags = cli_args.parse(sys.argv[1:] if argv is None else argv)
            run = {
                **{"": _version, "generate": _generate, "resume": _resume},
                **{"inspect": _inspect, "convert": _convert, "doctor": _doctor},
            }
            run[command](flags)
            sys.stdout.flush()
        return OK
    except SystemExit as done:  # argparse, after --help
        return int(done.code or 0)
    except KeyboardInterrupt:
        return _report("interrupted", INTERRUPTED)
    except Cancelled as error:
        return _report(str(error) or "cancelled", INTERRUPTED)
    except InvalidRequest as error:
        return _report(_with_flags(str(error)), USAGE)
    except BrokenPipeError:
        _drop_stdout()
        return FAILED
    except Error as error:
        return _report(str(error), FAILED)
    except MemoryError as error:
        return _report(f"out of memory: {error}", FAILED)
    except Exception as error:
        return _report(f"unexpected {type(error).__name__}: {error} (FASTVID_DEBUG=1 shows where)", FAILED)


# ---------------------------------------------------------------- commands


def _version(flags: argparse.Namespace) -> None:
    print(f"fastvid {fastvid.__version__}")


def _generate(flags: argparse.Namespace) -> None:
    from fastvid import checkpoints_files
    from fastvid.media import check_writable

    recipe = _read_recipe(flags.recipe)
    request = _make_request(flags, recipe)
    check_writable(
        flags.output, num_frames=request.num_frames, width=request.width, height=request.height, fps=request.fps
    )
    if flags.checkpoint is not None:
        checkpoints_files.free_place(flags.checkpoint)
    asked = {name: value for name in PROMPT_FLAGS if (value := getattr(flags, name))}
    asked |= {name: value for name in CHECKPOINT_FLAGS if (value := getattr(flags, name)) is not None}
    _show(flags, recipe or {}, lambda pipe: pipe.stream(**request.arguments(), **asked))


def _resume(flags: argparse.Namespace) -> None:
    from fastvid import checkpoints_files
    from fastvid.media import check_writable

    recipe = checkpoints_files.get_about(flags.folder)["recipe"]
    check_writable(flags.output, num_frames=recipe.get("num_frames"), fps=recipe.get("fps"))
    names = (*RESUME_FLAGS, *CHECKPOINT_FLAGS[1:])
    given = {name: value for name in names if (value := getattr(flags, name)) is not None}
    _show(flags, recipe, lambda pipe: pipe.resume(flags.folder, **given))


def _show(flags: argparse.Namespace, recipe: dict[str, Any], start: Callable[[Any], Any]) -> None:
    """Run, with progress, and print what --json asks for."""
    progress = Progress(quiet=flags.quiet)
    try:
        result = _run(flags, recipe, progress, start)
    finally:
        progress.close()
    if flags.json:
        print(json.dumps(result))


def _make_request(flags: argparse.Namespace, recipe: dict[str, Any] | None) -> Request:
    given = {name: getattr(flags, name) for name in REQUEST_FLAGS if getattr(flags, name) is not None}
    if flags.prompt is not None:
        given["prompt"] = _read_prompt() if flags.prompt == "-" else flags.prompt
    if recipe is not None:
        return Request.from_recipe(recipe, **given)
    if "prompt" not in given:
        raise cli_args.UsageError("no prompt given; give one in quotes, or --recipe FILE (see fastvid generate --help)")
    return Request.make(**given)


def _read_prompt() -> str:
    """From standard input, without the line end. Reads no more than a prompt may have."""
    data = sys.stdin.buffer.read(4 * MAX_PROMPT + 8)
    try:
        return data.decode("utf-8", errors="ignore" if len(data) > 4 * MAX_PROMPT else "strict").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"the prompt on standard input is not UTF-8: {error.reason} at byte {error.start}"
        ) from error


def _read_recipe(path: str | None) -> dict[str, Any] | None:
    from fastvid.media import read_recipe

    return None if path is None else read_recipe(path)


def _run(
    flags: argparse.Namespace, recipe: dict[str, Any], progress: Progress, start: Callable[[Any], Any]
) -> dict[str, Any]:
    """Load, stream, write. Returns what --json prints. start: from the pipeline to the stream."""
    watch = Stopwatch()
    model = flags.model or recipe.get("model") or env.read().model
    progress.say(f"loading {model}")
    from fastvid import pipeline

    pipe = pipeline.load(model, **_load_arguments(flags, recipe))
    watch.mark("load")
    with contextlib.closing(start(pipe)) as stream:
        made = _write(stream, flags.output, progress, watch)
    progress.close()
    size = f"{made['num_frames']} frames, {made['width']}x{made['height']}, {made['fps']:g} fps, seed {made['seed']}"
    progress.say(f"{made['output']}: {size}, in {duration(watch.total)}")
    return made


def _load_arguments(flags: argparse.Namespace, recipe: dict[str, Any]) -> dict[str, Any]:
    """A flag wins over what the recipe was made with, that over the environment. Its device may not be here, so that
    is not taken."""
    settings = recipe.get("settings") if isinstance(recipe.get("settings"), dict) else {}
    made_with = {
        name: settings[name] for name in LOAD_FLAGS if isinstance(settings.get(name), str) and name != "device"
    }
    here = env.read()
    chosen = {name: getattr(flags, name) or made_with.get(name) or getattr(here, name) for name in LOAD_FLAGS}
    chosen["loras"] = settings.get("loras") if flags.lora is None else flags.lora
    chosen["offload"] = flags.offload  # of this machine alone: the video is the same
    # Of another model, what the recipe's was made of says nothing.
    chosen["parts"] = dict(flags.part) if flags.part else None if flags.model else settings.get("parts")
    return {name: value for name, value in chosen.items() if value is not None}


def _write(stream: Any, output: str, progress: Progress, watch: Stopwatch) -> dict[str, Any]:
    """Frames go into the file as they come, so that memory does not grow with the video. Whatever happens, the file is
    whole or not there."""
    from fastvid.media import FrameSink
    from fastvid.media_beside import Beside

    made = None
    with contextlib.ExitStack() as stack:
        for event in stream:
            watch.mark("model")
            progress.event(event)
            kind = type(event).__name__
            if kind == "Started":
                started = event
                sink = FrameSink(output, width=event.width, height=event.height, fps=event.fps, recipe=event.recipe)
                stack.enter_context(sink)
                beside = stack.enter_context(Beside(sink))
            elif kind == "Frames":
                beside.write(event.frames)
            elif kind == "Finished":
                beside.finish()
                watch.mark("wait")
                path = sink.close(event.recipe)
                watch.mark("close")
                written = beside.seconds + watch.seconds["close"]
                made = _summary(path, started, event, watch, written)  # the stream goes on: now its checkpoint may go
            watch.mark("wait")
    if made is None:
        raise Error("the stream ended before the video was finished")
    return made


def _summary(path: Path, started: Any, finished: Any, watch: Stopwatch, written: float) -> dict[str, Any]:
    seconds = {"load": watch.seconds["load"], **finished.seconds, "write": written, "total": watch.total}
    return {
        "output": str(path),
        "seed": finished.seed,
        "width": started.width,
        "height": started.height,
        "num_frames": finished.num_frames,
        "fps": finished.fps,
        "seconds": {stage: round(spent, 3) for stage, spent in seconds.items()},
        "recipe": finished.recipe,
    }


def _inspect(flags: argparse.Namespace) -> None:
    from fastvid import pipeline

    found = pipeline.inspect(flags.model, flags.lora or (), dict(flags.part) if flags.part else None)
    print(json.dumps(found) if flags.json else "\n".join(_lines(found)))


def _convert(flags: argparse.Namespace) -> None:
    from fastvid.convert import convert

    progress = Progress(quiet=flags.quiet)
    try:
        options = {"key": flags.key, "base": flags.base, "say": progress.say}
        made = convert(flags.source, flags.destination, flags.to, **options)
    finally:
        progress.close()
    if flags.json:
        print(json.dumps(made))
    else:
        progress.say(f"{made['destination']}: {', '.join(made['parts'].values())}, {made['layout']} layout")


def _doctor(flags: argparse.Namespace) -> None:
    from fastvid import doctor

    report = doctor.doctor(flags.device)
    print(json.dumps(report) if flags.json else doctor.render(report))


def _lines(value: dict[str, Any], indent: str = "") -> Iterator[str]:
    """A dict as text: a line an entry, what is inside an entry indented."""
    for name, inner in value.items():
        if isinstance(inner, dict) and inner:
            yield f"{indent}{name}"
            yield from _lines(inner, indent + "  ")
        else:
            text = ", ".join(map(str, inner)) if isinstance(inner, (list, tuple)) else str(inner)
            yield f"{indent}{name:<{max(1, 26 - len(indent))}} {text}"


# ---------------------------------------------------------------- errors and signals


def _report(message: str, status: int) -> int:
    """One line, or with FASTVID_DEBUG the traceback before it."""
    if env.read().debug and status != INTERRUPTED:
        traceback.print_exc()
    with contextlib.suppress(OSError):
        print("fastvid: " + " ".join(message.split()), file=sys.stderr, flush=True)
    return status


def _with_flags(message: str) -> str:
    """Arguments that a message opens with or offers, as the command line spells them."""

    def flag(found: re.Match[str]) -> str:
        name = {"num_inference_steps": "steps", "reference_images": "reference_image"}.get(found[2], found[2])
        return found[1] + "--" + name.replace("_", "-")

    names = "|".join((*PROMPT_FLAGS, *sorted(CHECKPOINT_FLAGS, key=len, reverse=True), *REQUEST_FLAGS))
    return re.sub(rf"(^|is |and |but |with |give |leave )({names})(?=[=:\[ ])", flag, message)


def _drop_stdout() -> None:
    """The reader went away: let the interpreter's last flush go nowhere instead of complaining."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM is Ctrl-C while a command runs. Only the main thread may say so."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
