"""From the command line's flags to a request, and to what loads its model.

Nothing here needs the model; clips and pictures are opened only to be held against a recipe.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fastvid import env
from fastvid.checks import MAX_PROMPT, nearest_name
from fastvid.cli.flags import FLAGS, has_prompt, usage_of, words_of
from fastvid.cli.parser import UsageError
from fastvid.errors import InvalidRequest, MediaError
from fastvid.requests.arguments import CHECKPOINT, CLIPS, VERBS
from fastvid.requests.request import PROMPT_OF_CLIP, Request

LOAD_FLAGS = ("device", "dtype", "vae_dtype", "backend", "attention")
MAX_SHOTS_FILE = 1 << 26  # bytes


def read_recipe(flags: argparse.Namespace) -> dict[str, Any] | None:
    """What --recipe names; None if nothing does. Raises MediaError, and UsageError for one of another verb."""
    if flags.recipe is None:
        return None
    from fastvid.media.metadata import read_recipe as read

    recipe = read(flags.recipe)
    verb = recipe.get("verb", "generate")
    if "fastvid" in recipe and verb in VERBS and verb != flags.verb:
        raise UsageError(f"{flags.recipe} was made by {verb}: {usage_of(verb)} --recipe {flags.recipe}")
    return recipe


def make(flags: argparse.Namespace, recipe: dict[str, Any] | None) -> Request:
    """The request that flags, beside a recipe or alone, ask for."""
    asked = {name: getattr(flags, name, None) for name in (*words_of(flags.verb), *FLAGS)}
    given = {name: value for name, value in asked.items() if value is not None and value is not False}
    if given.get("prompt") == "-":
        given["prompt"] = _read_prompt()
    if "keyframes" in given:
        given["keyframes"] = _by_frame(given["keyframes"])
    if "shots_file" in given:
        given["shots"] = _read_shots(given.pop("shots_file"), given.get("shots"))
    if recipe is not None:
        return Request.from_recipe(recipe, **given)
    _check_words(flags, given)
    return Request.make(flags.verb, **given)


def _check_words(flags: argparse.Namespace, given: dict[str, Any]) -> None:
    """What a verb can't do without. A plan can do without a prompt: the cost does not depend on it."""
    verb = flags.verb
    see = f"or --recipe FILE (see fastvid {verb} --help)"
    for name in CLIPS.get(verb, ()):
        if name not in given:
            raise UsageError(f"no {words_of(verb)[name]} given: {usage_of(verb)} -o PATH, {see}")
    if not has_prompt(verb) and "shots" not in given:
        raise UsageError(f"no shots given; give --shot PROMPT:SECONDS for each, --shots FILE, {see}")
    if has_prompt(verb) and verb not in PROMPT_OF_CLIP and "prompt" not in given:
        if not flags.planned:
            raise UsageError(f"no prompt given; give one in quotes, {see}")
        given["prompt"] = ""


def _read_prompt() -> str:
    """From standard input, without the line end. Reads no more than a prompt may have."""
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


def _read_shots(path: str, given: Any) -> list[Any]:
    """[[prompt, seconds], ...] of a JSON file, each also as {"prompt": ..., "seconds": ...}; the request checks it."""
    if given is not None:
        raise UsageError("--shot and --shots are both given; give one of them")
    try:
        with Path(path).open("rb") as file:
            found = json.loads(file.read(MAX_SHOTS_FILE))
    except OSError as error:
        raise MediaError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f'{path} is no JSON ({str(error):.100}); needed is [["a red circle", 2], ...]') from None
    if not isinstance(found, list):
        raise InvalidRequest(f'{path} holds no list; needed is [["a red circle", 2], ...]')
    return [_shot(path, number, shot) for number, shot in enumerate(found)]


def _shot(path: str, number: int, shot: Any) -> Any:
    if not isinstance(shot, dict):
        return shot
    if set(shot) != {"prompt", "seconds"}:
        other = next((key for key in shot if key not in ("prompt", "seconds")), None)
        near = f"; {other!r:.40} is none, the nearest is {nearest_name(other, ('prompt', 'seconds'))}" if other else ""
        raise InvalidRequest(f"{path}: shot {number} needs prompt and seconds{near}")
    return shot["prompt"], shot["seconds"]


# ---------------------------------------------------------------- the model


def keeping(flags: argparse.Namespace) -> dict[str, Any]:
    """What is said about checkpoints."""
    return {name: value for name in CHECKPOINT if (value := getattr(flags, name, None)) is not None}


def check_same(request: Request, recipe: dict[str, Any]) -> None:
    """Whether the clips and pictures given beside a recipe are those that it knows."""
    if any(isinstance(value, dict | list) for value in recipe.values()):
        from fastvid.requests import inputs

        inputs.check_same(recipe, request.arguments())


def model_of(flags: argparse.Namespace, recipe: dict[str, Any]) -> str:
    """The model's name: a flag's, the recipe's, the environment's."""
    return str(flags.model or recipe.get("model") or env.read().model)


def load_arguments(flags: argparse.Namespace, recipe: dict[str, Any]) -> dict[str, Any]:
    """A flag wins over what the recipe was made with, that over the environment. Its device may not be here, so that
    is not taken."""
    told = recipe.get("settings")
    settings: dict[str, Any] = told if isinstance(told, dict) else {}
    made_with = {
        name: settings[name] for name in LOAD_FLAGS if isinstance(settings.get(name), str) and name != "device"
    }
    here = env.read()
    chosen = {name: getattr(flags, name) or made_with.get(name) or getattr(here, name, None) for name in LOAD_FLAGS}
    chosen["loras"] = settings.get("loras") if flags.lora is None else flags.lora
    chosen["offload"] = flags.offload  # of this machine alone, as graphs are: the video is the same
    chosen["cuda_graphs"] = flags.cuda_graphs
    chosen["parallel"], chosen["link"] = flags.parallel, flags.link
    # Of another model, what the recipe's was made of says nothing.
    chosen["parts"] = dict(flags.part) if flags.part else None if flags.model else settings.get("parts")
    return {name: value for name, value in chosen.items() if value is not None}
