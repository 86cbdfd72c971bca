"""Turns command-line flags into a request and the arguments of `load`.

Nothing here needs the model. Clips and pictures are opened to see that they can be read, and to compare them with a
recipe.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastvid import env
from fastvid.checks import MAX_PROMPT, nearest_name
from fastvid.cli.command_parser import UsageError, parts_of
from fastvid.cli.flags import FLAGS, has_prompt, usage_of, words_of
from fastvid.errors import FastvidWarning, InvalidRequest, MediaError
from fastvid.requests.arguments import CHECKPOINT, CLIPS, PROMPT_OF_CLIP, VERBS
from fastvid.requests.request import DATA, Request

LOAD_FLAGS = ("device", "dtype", "vae_dtype", "backend", "attention")
MAX_SHOTS_FILE = 1 << 26  # bytes


def read_recipe(flags: argparse.Namespace) -> dict[str, Any] | None:
    """The recipe in the --recipe file; None without the flag. Raises MediaError, and UsageError if another verb made
    it."""
    if flags.recipe is None:
        return None
    from fastvid.media.metadata import read_recipe as read

    recipe = read(flags.recipe)
    verb = recipe.get("verb", "generate")
    if "fastvid" in recipe and isinstance(verb, str) and verb in VERBS and verb != flags.verb:
        raise UsageError(f"{flags.recipe} was made by {verb}: {usage_of(verb)} --recipe {flags.recipe}")
    return recipe


def make(flags: argparse.Namespace, recipe: dict[str, Any] | None) -> Request:
    """The request of the flags, applied to a recipe if there is one."""
    parsed = {name: getattr(flags, name, None) for name in (*words_of(flags.verb), *FLAGS)}
    values: dict[str, Any] = {name: value for name, value in parsed.items() if value is not None}
    if values.get("prompt") == "-":
        values["prompt"] = read_prompt()
    if "keyframes" in values:
        values["keyframes"] = _by_frame(values["keyframes"])
    if "shots_file" in values:
        values["shots"] = _read_shots(values.pop("shots_file"), values.get("shots"))
    if recipe is not None:
        return Request.from_recipe(recipe, **values)
    _check_words(flags, values)
    return Request.make(flags.verb, **values)


def _check_words(flags: argparse.Namespace, values: dict[str, Any]) -> None:
    """Raises UsageError if a required word is missing. Plans need no prompt, since the cost does not depend on it."""
    verb = flags.verb
    see = f"or --recipe FILE (see fastvid {verb} --help)"
    for name in CLIPS.get(verb, ()):
        if name not in values:
            raise UsageError(f"no {words_of(verb)[name]} given: {usage_of(verb)} -o PATH, {see}")
    if not has_prompt(verb) and "shots" not in values:
        raise UsageError(f"no shots given; give --shot PROMPT:SECONDS for each, --shots FILE, {see}")
    optional = verb in PROMPT_OF_CLIP or "pose_video" in values
    if has_prompt(verb) and not optional and "prompt" not in values:
        if not flags.planned:
            raise UsageError(f"no prompt given; give one in quotes, {see}")
        values["prompt"] = ""


def read_prompt() -> str:
    """Reads a prompt from standard input, without the line end; no more than the longest allowed one."""
    data = sys.stdin.buffer.read(4 * MAX_PROMPT + 8)
    try:
        return data.decode("utf-8", errors="ignore" if len(data) > 4 * MAX_PROMPT else "strict").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"the prompt on standard input is not UTF-8: {error.reason} at byte {error.start}"
        ) from error


def _by_frame(pairs: list[tuple[int | float, str]]) -> dict[int | float, str]:
    twice = next((frame for i, (frame, _) in enumerate(pairs) if frame in dict(pairs[:i])), None)
    if twice is not None:
        raise UsageError(f"--keyframe {twice} is given twice; give one picture for a frame")
    return dict(pairs)


def _read_shots(path: str, flag_shots: Any) -> list[Any]:
    """Reads [[prompt, seconds], ...] from a JSON file; a shot may also be {"prompt": ..., "seconds": ...}. The request
    validates them. flag_shots: the shots given as --shot flags."""
    if flag_shots is not None:
        raise UsageError("--shot and --shots are both given; give one of them")
    try:
        with Path(path).open("rb") as file:
            shots = json.loads(file.read(MAX_SHOTS_FILE))
    except OSError as error:
        raise MediaError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f'{path} is no JSON ({str(error):.100}); needed is [["a red circle", 2], ...]') from None
    if not isinstance(shots, list):
        raise InvalidRequest(f'{path} holds no list; needed is [["a red circle", 2], ...]')
    return [_shot(path, number, shot) for number, shot in enumerate(shots)]


def _shot(path: str, number: int, shot: Any) -> Any:
    if not isinstance(shot, dict):
        return shot
    if set(shot) != {"prompt", "seconds"}:
        other = next((key for key in shot if key not in ("prompt", "seconds")), None)
        near = f"; {other!r:.40} is none, the nearest is {nearest_name(other, ('prompt', 'seconds'))}" if other else ""
        raise InvalidRequest(f"{path}: shot {number} needs prompt and seconds{near}")
    return shot["prompt"], shot["seconds"]


# ---------------------------------------------------------------- the model


def checkpoint_options(flags: argparse.Namespace) -> dict[str, Any]:
    """The flags about checkpoints."""
    return {name: value for name in CHECKPOINT if (value := getattr(flags, name, None)) is not None}


def check_same(request: Request, recipe: dict[str, Any]) -> None:
    """Raises InvalidRequest if a clip or picture is not the one that the recipe was made with."""
    if any(isinstance(value, dict | list) for value in recipe.values()):
        from fastvid.requests import inputs

        with _quiet():
            inputs.check_same(recipe, request.arguments())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without fastvid's warnings, which come when the request reads its inputs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FastvidWarning)
        yield


def check_files(arguments: dict[str, Any]) -> None:
    """Raises MediaError for a picture or clip that cannot be read, before the model is loaded."""
    if any(name in arguments for name in DATA):
        from fastvid.requests import inputs

        with _quiet():
            inputs.check_files(arguments)


def inputs_of(flags: argparse.Namespace, options: dict[str, Any]) -> list[Any]:
    """What names the files that a command reads."""
    named = [getattr(flags, name, None) for name in ("recipe", "shots_file", "lora", "part", "model")]
    return [*(options[name] for name in DATA if name in options), *named]


def model_of(flags: argparse.Namespace, recipe: dict[str, Any]) -> str:
    """The model's name, from the flag, else the recipe, else the environment."""
    return str(flags.model or recipe.get("model") or env.read().model)


def load_arguments(flags: argparse.Namespace, recipe: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `load`, from flags, else the recipe, else the environment. The recipe's device is not used,
    since this machine may not have it."""
    recorded = recipe.get("settings")
    settings: dict[str, Any] = recorded if isinstance(recorded, dict) else {}
    from_recipe = {
        name: settings[name] for name in LOAD_FLAGS if isinstance(settings.get(name), str) and name != "device"
    }
    from_env = env.read()
    arguments = {
        name: getattr(flags, name) or from_recipe.get(name) or getattr(from_env, name, None) for name in LOAD_FLAGS
    }
    arguments["loras"] = settings.get("loras") if flags.lora is None else flags.lora
    # These depend on the machine and do not change the video, so recipes do not have them.
    arguments["offload"], arguments["cuda_graphs"] = flags.offload, flags.cuda_graphs
    arguments["mmap"] = flags.mmap
    arguments["parallel"], arguments["link"] = flags.parallel, flags.link
    # The recipe's parts belong to its model, not to another one.
    own = settings if flags.model in (None, "", recipe.get("model")) else {}
    arguments["parts"] = parts_of(flags) or own.get("parts")
    arguments["variant"] = flags.variant or own.get("variant")
    arguments["quantize"] = flags.quantize or settings.get("quantize")
    return {name: value for name, value in arguments.items() if value is not None}
