"""The command line: `fastvid generate | image | extend | loop | blend | edit | storyboard | finalize`, `resume`, and
`plan`, `inspect`, `models`, `download`, `convert`, `tune`, `doctor`, `bench`.

Everything that does not need the model (flags, request, output path) is checked before torch is imported.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastvid import env
from fastvid.checks import one_of
from fastvid.cli import arguments, batches, parser, render
from fastvid.cli.command_parser import parts_of
from fastvid.cli.flags import RESUME_INPUTS, with_flags
from fastvid.cli.output import Output, output_of
from fastvid.cli.progress import Progress, Stopwatch
from fastvid.cli.writing import VideoFile, say_done
from fastvid.errors import Cancelled, Error, FastvidWarning, InvalidRequest
from fastvid.version import __version__

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
LONGEST_LINE = 4000  # characters of a value that is shown; --json has all
SHAPE = ("num_frames", "width", "height", "fps")  # what a recipe says of a video
LEVELS = ("debug", "info", "warning", "error")


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns the exit status. Errors are printed as one line on standard error."""
    verb = "generate"
    try:
        with _sigterm_interrupts():
            command, flags = parser.parse(sys.argv[1:] if argv is None else argv)
            verb = flags.verb
            run = {"": _version, "resume": _resume, "plan": _plan, "inspect": _inspect, "convert": _convert}
            run |= {"download": _download, "doctor": _doctor, "bench": _bench, "tune": _tune, "models": _models}
            run |= {"calibrate": _calibrate}
            with _logged(flags), _warnings_shown():
                run.get(command, _run_verb)(flags)
            sys.stdout.flush()
        return OK
    except SystemExit as exit:  # argparse, after --help
        return int(exit.code or 0)
    except KeyboardInterrupt:
        return _report("interrupted", INTERRUPTED)
    except Cancelled as error:
        return _report(str(error) or "cancelled", INTERRUPTED)
    except InvalidRequest as error:
        return _report(with_flags(str(error), verb), USAGE)
    except BrokenPipeError:
        _drop_stdout()
        return FAILED
    except Error as error:
        return _report(str(error), FAILED)
    except MemoryError as error:
        return _report(f"out of memory: {error}", FAILED)
    except Exception as error:
        return _report(f"unexpected {type(error).__name__}: {error} (FASTVID_DEBUG=1 shows where)", FAILED)


@contextlib.contextmanager
def _warnings_shown() -> Iterator[None]:
    """Writes fastvid's own warnings to stderr as one line each."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def show_ours(message: Warning | str, category: type[Warning], *place: Any) -> None:
            if not issubclass(category, FastvidWarning):
                show(message, category, *place)
            elif sys.stderr is not None:
                print(f"fastvid: warning: {message}", file=sys.stderr)

        warnings.showwarning = show_ours  # type: ignore[assignment]
        yield


# ---------------------------------------------------------------- commands


def _version(flags: argparse.Namespace) -> None:
    print(f"fastvid {__version__}")


def _run_verb(flags: argparse.Namespace) -> None:
    if batches.is_batch(flags):
        return batches.run(flags)
    recipe = arguments.read_recipe(flags)
    request = arguments.make(flags, recipe)
    options = request.arguments()
    output = output_of(flags, arguments.inputs_of(flags, options), flags.checkpoint, new=True)
    output.check(1 if flags.verb == "image" else request.num_frames, request.width, request.height, request.fps)
    arguments.check_files(options)
    arguments.check_same(request, recipe or {})
    _show(flags, output, recipe or {}, lambda pipe: pipe.stream(verb=request.verb, **options, keep_latents=False))


def _resume(flags: argparse.Namespace) -> None:
    from fastvid.engine import resume_contents

    about = resume_contents.get_about(flags.folder)
    recipe = about["recipe"]
    options = {name: value for name in RESUME_INPUTS if (value := getattr(flags, name)) is not None}
    output = output_of(flags, arguments.inputs_of(flags, about["arguments"] | options), flags.folder)
    output.check(**{name: value for name in SHAPE if type(value := recipe.get(name)) in (int, float)})
    arguments.check_files(options)
    options |= arguments.checkpoint_options(flags)
    _show(flags, output, recipe, lambda pipe: pipe.resume(flags.folder, **options, keep_latents=False))


def _show(flags: argparse.Namespace, output: Output, recipe: dict[str, Any], start: Callable[[Any], Any]) -> None:
    """Makes the video, with progress, and prints the --json result."""
    progress = Progress(quiet=flags.quiet)
    try:
        with output.alone():
            result = _run(flags, output, recipe, progress, start)
    finally:
        progress.close()
    if flags.json:
        print(json.dumps(result))


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Collects no garbage meanwhile: torch's import makes half a million objects, of which hardly any go."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _run(
    flags: argparse.Namespace, output: Output, recipe: dict[str, Any], progress: Progress, start: Callable[[Any], Any]
) -> dict[str, Any]:
    """Loads the model, runs the stream and writes the video. start: starts the stream on the pipeline. Returns the
    --json result."""
    watch = Stopwatch()
    model = arguments.model_of(flags, recipe)
    progress.say(f"loading {model}")
    with _uncollected():
        from fastvid import api

    with api.load(model, **arguments.load_arguments(flags, recipe)) as pipe:
        watch.mark("load")
        with contextlib.closing(start(pipe)) as stream, VideoFile(output, watch) as file:
            for event in stream:  # to its end, after Finished: only then a checkpoint goes
                progress.event(event)
                file.add(event)
    if file.result is None:
        raise Error("the stream ended before the video was finished")
    progress.close()
    say_done(progress, file.result, watch.total)
    return file.result


def _plan(flags: argparse.Namespace) -> None:
    recipe = arguments.read_recipe(flags)
    requests = batches.requests_of(flags, recipe) if batches.is_batch(flags) else [arguments.make(flags, recipe)]
    request = requests[0]  # of a batch, all take the same
    arguments.check_files(request.arguments())
    arguments.check_same(request, recipe or {})
    from fastvid import api

    load_options = arguments.load_arguments(flags, recipe or {})
    model, memory = arguments.model_of(flags, recipe or {}), flags.device_memory
    blueprint = api.blueprint(model, **load_options, device_memory=memory, card=flags.card, format=flags.format)
    estimate = "again" if flags.measure else memory is None or flags.card is not None
    plan = blueprint.plan(**request.arguments(), verb=request.verb, estimate=estimate, keep_frames=False)
    videos = {"videos": len(requests)} if len(requests) > 1 else {}
    print(json.dumps(plan.to_dict() | videos) if flags.json else "\n".join(render.lines(plan, model, len(requests))))


def _inspect(flags: argparse.Namespace) -> None:
    from fastvid import api
    from fastvid.media import metadata

    if metadata.is_media(flags.model):
        description = metadata.describe(flags.model)
    else:
        description = api.inspect(flags.model, flags.lora or (), parts_of(flags), flags.variant, flags.quantize)
    print(json.dumps(description) if flags.json else "\n".join(_lines(description)))


def _models(flags: argparse.Namespace) -> None:
    from fastvid.cli import models

    models.show(flags)


def _download(flags: argparse.Namespace) -> None:
    from fastvid.cli import download

    download.run(flags)


def _convert(flags: argparse.Namespace) -> None:
    from fastvid.loaders.convert import convert

    progress = Progress(quiet=flags.quiet)
    try:
        options = {"key": flags.key, "base": flags.base, "dtype": flags.dtype, "quantize": flags.quantize}
        result = convert(flags.source, flags.destination, flags.to, say=progress.say, **options)
    finally:
        progress.close()
    if flags.json:
        print(json.dumps(result))
    else:
        progress.say(f"{result['destination']}: {', '.join(result['parts'].values())}, {result['layout']} layout")


def _tune(flags: argparse.Namespace) -> None:
    from fastvid.cli import tune

    tune.run(flags)


def _calibrate(flags: argparse.Namespace) -> None:
    from fastvid.cli import calibrate

    calibrate.run(flags)


def _doctor(flags: argparse.Namespace) -> None:
    from fastvid.cli import doctor

    report = doctor.doctor(flags.device)
    print(json.dumps(report) if flags.json else doctor.render(report))


def _bench(flags: argparse.Namespace) -> None:
    from fastvid.cli import bench

    if not flags.names:
        for name, path in bench.scripts().items():
            print(f"{name:<16} {bench.summary(path)}")
        return
    bench.run(flags.names, Path(flags.out), flags.passed_on)


def _lines(value: dict[str, Any], indent: str = "") -> Iterator[str]:
    """A dict as text: one line per entry, nested entries indented."""
    for name, inner in value.items():
        if isinstance(inner, dict) and inner:
            yield f"{indent}{name}"
            yield from _lines(inner, indent + "  ")
        else:
            text = ", ".join(map(_word, inner)) if isinstance(inner, (list, tuple)) else str(inner)
            # What a stranger's file says must not steer the terminal.
            text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:LONGEST_LINE])
            yield f"{indent}{name:<{max(1, 26 - len(indent))}} {text}"


def _word(value: Any) -> str:
    return " ".join(f"{name}={one}" for name, one in value.items()) if isinstance(value, dict) else str(value)


# ---------------------------------------------------------------- errors and signals


def _report(message: str, status: int) -> int:
    """Prints an error as one line, with FASTVID_DEBUG after its traceback."""
    if env.read().debug and status != INTERRUPTED:
        traceback.print_exc()
    with contextlib.suppress(OSError):
        print("fastvid: " + " ".join(message.split()), file=sys.stderr, flush=True)
    return status


def _drop_stdout() -> None:
    """Redirects stdout to /dev/null after its reader has closed it, so that the interpreter's last flush does not
    fail."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _logged(flags: argparse.Namespace) -> Iterator[None]:
    """Logs to standard error at the level of FASTVID_LOG, or of --verbose."""
    name = env.read().log or ("info" if getattr(flags, "verbose", False) else None)
    if name is None:
        yield
        return
    level = one_of(LEVELS)(f"{env.PREFIX}LOG", name.lower())
    logger, handler = logging.getLogger("fastvid"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level.upper())
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Handles SIGTERM like Ctrl-C while a command runs. Does nothing outside the main thread, which alone may set
    handlers."""

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
