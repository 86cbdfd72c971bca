"""Batches on the command line: `--prompts FILE --seeds 1-8` makes a video of every prompt with every seed, with the
model loaded once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastvid.checks import MAX_SEED, nearest_name
from fastvid.cli import arguments
from fastvid.cli.command_parser import UsageError
from fastvid.cli.flags import with_flags
from fastvid.cli.output import STDOUT, Output, output_of
from fastvid.cli.progress import Progress, Stopwatch
from fastvid.cli.writing import VideoFile, say_done
from fastvid.errors import InvalidRequest, MediaError
from fastvid.requests.arguments import random_seed
from fastvid.requests.batch import LISTS, MOST
from fastvid.requests.request import Request

MAX_FILE = 1 << 26  # bytes
LINES = (".jsonl", ".ndjson")
FIELDS = ("number", "seed")
"""What a pattern for names may hold, such as clip-{number}-{seed}.mp4."""

Overrides = dict[str, Any]


def is_batch(flags: argparse.Namespace) -> bool:
    return getattr(flags, "prompts", None) is not None or getattr(flags, "seeds", None) is not None


def run(flags: argparse.Namespace) -> None:
    """Makes the videos, and prints a line of --json for each. Nothing is loaded before all of them are checked; what is
    finished stays if a later one fails or is interrupted."""
    recipe = arguments.read_recipe(flags)
    requests = requests_of(flags, recipe)
    options = requests[0].arguments()
    inputs = [*arguments.inputs_of(flags, options), flags.prompts]
    outputs = [output_of(one, inputs) for one in _places(flags, requests)]
    for request, output in zip(requests, outputs, strict=True):
        frames = 1 if flags.verb == "image" else request.num_frames
        output.check(frames, request.width, request.height, request.fps)
    arguments.check_files(options)
    arguments.check_same(requests[0], recipe or {})
    progress = Progress(quiet=flags.quiet)
    try:
        _make(flags, recipe or {}, requests, outputs, progress)
    finally:
        progress.close()


def _make(
    flags: argparse.Namespace,
    recipe: dict[str, Any],
    requests: list[Request],
    outputs: list[Output],
    progress: Progress,
) -> None:
    model, watch, done = arguments.model_of(flags, recipe), Stopwatch(), 0
    progress.say(f"loading {model}")
    from fastvid import api
    from fastvid.pipeline import batches

    try:
        with api.load(model, **arguments.load_arguments(flags, recipe)) as pipe, contextlib.ExitStack() as entered:
            events = entered.enter_context(contextlib.closing(batches.events(pipe, requests, False, False)))
            files: dict[int, VideoFile] = {}
            for number, event in events:
                if number not in files:
                    progress.say(f"video {number + 1} of {len(requests)}")
                    files[number] = entered.enter_context(VideoFile(outputs[number], Stopwatch()))
                file = files[number]
                if number == min(files):
                    progress.event(event)
                file.add(event)
                if file.result is not None:
                    del files[number]
                    progress.close()
                    done += 1
                    say_done(progress, file.result, file.result["seconds"]["total"])
                    if flags.json:
                        print(json.dumps(file.result), flush=True)
    except BaseException:
        progress.close()
        progress.say(f"{done} of {len(requests)} videos are finished")
        raise
    progress.say(f"{done} videos, in {watch.total:.1f} s")


# ---------------------------------------------------------------- the requests


def requests_of(flags: argparse.Namespace, recipe: dict[str, Any] | None) -> list[Request]:
    """The request of every prompt with every seed, prompt by prompt, all checked."""
    _check(flags)
    if flags.prompts is None and flags.prompt == "-":
        flags.prompt = arguments.read_prompt()
    prompts: list[Overrides] = [{}] if flags.prompts is None else read_prompts(flags.prompts)
    seeds: list[Overrides] = [{}] if flags.seeds is None else [{"seed": seed} for seed in parse_seeds(flags.seeds)]
    if flags.seeds is not None and any("seed" in one for one in prompts):
        raise UsageError(f"--seeds: {flags.prompts} gives seeds, too; leave one of them out")
    if len(prompts) * len(seeds) > MOST:
        raise InvalidRequest(f"{len(prompts)} prompts with {len(seeds)} seeds each are more than {MOST} videos")
    each = [prompt | seed for prompt in prompts for seed in seeds]
    made = []
    for number, overrides in enumerate(each):
        own = vars(flags) | overrides
        if own["seed"] is None or own["seed"] == -1:
            own["seed"] = random_seed()  # now, so that a name may hold it
        try:
            made.append(arguments.make(argparse.Namespace(**own), recipe))
        except InvalidRequest as error:
            wrong = with_flags(str(error), flags.verb)
            raise UsageError(f"batch, video {number + 1} of {len(each)}: {wrong}") from None
    return made


def _check(flags: argparse.Namespace) -> None:
    """Raises UsageError for flags that do not go together."""
    for one, other, name in (("prompts", "prompt", "a prompt"), ("seeds", "seed", "--seed")):
        if getattr(flags, one) is not None and getattr(flags, other, None) is not None:
            raise UsageError(f"--{one} and {name} are both given; give one of them")
    if getattr(flags, "checkpoint", None) is not None:
        raise UsageError("--checkpoint is of one video; leave it out of a batch, whose finished videos stay")
    if flags.output == STDOUT and not flags.planned:
        raise UsageError("-o -: standard output takes one video; give -o out.mp4, a folder, or out-{number}.mp4")


def read_prompts(path: str) -> list[Overrides]:
    """The prompts of a file: one a line; in a .jsonl file each line is a JSON object with "prompt", and perhaps
    "negative_prompt" and "seed". Empty lines are left out."""
    try:
        with Path(path).open("rb") as file:
            text = file.read(MAX_FILE + 1).decode()
    except OSError as error:
        raise MediaError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None
    if len(text) > MAX_FILE:
        raise InvalidRequest(f"{path} has more than {MAX_FILE >> 20} MiB; give a shorter file of prompts")
    lines = [(number, line.strip()) for number, line in enumerate(text.removeprefix("\ufeff").splitlines(), 1)]
    read = _json_line if Path(path).suffix.lower() in LINES else _text_line
    made = [read(f"{path}, line {number}", line) for number, line in lines if line]
    if not made:
        raise InvalidRequest(f"{path} holds no prompt; write one a line")
    return made


def _text_line(place: str, line: str) -> Overrides:
    return {"prompt": line}


def _json_line(place: str, line: str) -> Overrides:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or "prompt" not in value:
        raise InvalidRequest(f'{place} is no JSON object with a prompt; needed is {{"prompt": "a red circle"}}')
    if other := next((key for key in value if key not in LISTS), None):
        raise InvalidRequest(f"{place}: there is no {other!r:.40}; the nearest is {nearest_name(other, LISTS)}")
    return {name: one for name, one in value.items() if one is not None}


def parse_seeds(text: str) -> list[int]:
    """The seeds of "1-8,12": numbers and ranges, whose ends count."""
    made: list[int] = []
    for part in map(str.strip, text.split(",")):
        words = part.partition("-")[::2] if "-" in part else (part, part)
        if not all(word.strip().isdecimal() and len(word) < 24 for word in words):
            raise UsageError(f"--seeds: {part[:30]!r} is no seed; give numbers and ranges, such as 1-8,12")
        low, high = map(int, words)
        if high < low:
            raise UsageError(f"--seeds: {part} runs down; the nearest is {high}-{low}")
        if high > MAX_SEED:
            raise UsageError(f"--seeds: {part} is beyond the largest seed; the nearest is {MAX_SEED}")
        if len(made) + high - low >= MOST:
            raise UsageError(f"--seeds: {part} makes more than {MOST} videos; give fewer seeds")
        made += range(low, high + 1)
    return made


# ---------------------------------------------------------------- the outputs


def _places(flags: argparse.Namespace, requests: list[Request]) -> Iterator[argparse.Namespace]:
    """The flags with each video's own output. Raises UsageError for names that do not differ."""
    pattern = _pattern(flags)
    width = max(4, len(str(len(requests))))
    names = [pattern.format(number=f"{number:0{width}}", seed=one.seed) for number, one in enumerate(requests, 1)]
    if twice := next((name for at, name in enumerate(names) if name in set(names[:at])), None):
        raise UsageError(f"-o {flags.output}: two videos would be {twice}; put {{number}} into the name")
    return (argparse.Namespace(**vars(flags) | {"output": name, "frames_dir": None}) for name in names)


def _pattern(flags: argparse.Namespace) -> str:
    """The names of the outputs, with {number} and {seed} where those go."""
    if flags.frames_dir is not None:
        return _in_folder(flags.frames_dir, "{number}/")
    path: str = flags.output
    if "{" in path or "}" in path:
        return _checked(path)
    if path.endswith(("/", os.sep)) or os.path.isdir(path):
        return _in_folder(path, "{number}.png" if flags.verb == "image" else "{number}.mp4")
    stem, suffix = os.path.splitext(path)
    return f"{stem}-{{number}}{suffix}"


def _checked(pattern: str) -> str:
    try:
        fields = [(name, spec, kind) for _, name, spec, kind in string.Formatter().parse(pattern) if name is not None]
    except ValueError as error:
        raise UsageError(f"-o {pattern:.80}: {error}; write {{number}} and {{seed}}") from None
    for name, spec, kind in fields:
        if name not in FIELDS or spec or kind:
            near = nearest_name(name, FIELDS)
            raise UsageError(f"-o {pattern:.80}: there is no {{{name:.40}}}; the nearest is {{{near}}}")
    return pattern


def _in_folder(folder: str, name: str) -> str:
    """A pattern for names in a folder, which is made if its own folder is there."""
    path = Path(folder)
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise MediaError(f"{folder}: no folder can be made there: {error.strerror}") from None
    return os.path.join(str(path).replace("{", "{{").replace("}", "}}"), name)
