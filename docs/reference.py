"""Writes docs/_generated/arguments.md: the arguments of every verb, and the flags of every command.

The arguments come from the one table in `fastvid.requests.arguments`, the flags from the command line's own parsers.
`conf.py` calls `write` at each build; by hand: python docs/reference.py
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastvid.cli import parser
from fastvid.requests.arguments import ARGUMENTS, CLIPS, EXPANSION, OPTIONS, VERBS, type_of

TARGET = Path(__file__).parent / "_generated" / "arguments.md"
COMMON = [name for name in ARGUMENTS if all(name in taken for taken in VERBS.values())]
EXPANDING = [verb for verb, taken in VERBS.items() if "expand_prompt" in taken]
FILES = ("part", "lora")
TYPES = {"prompt": "str | None", "video": "Clip", "video_2": "Clip", "shots": "Shots"}
"""Of arguments that are no options."""
CLIP_HELP = {"video": "the clip", "video_2": "the second clip"}


def write(*_: Any) -> Path:
    """Writes the page, unless it is there with the same text, and returns its path."""
    text = page()
    TARGET.parent.mkdir(exist_ok=True)
    if not TARGET.is_file() or TARGET.read_text(encoding="utf-8") != text:
        TARGET.write_text(text, encoding="utf-8")
    return TARGET


def page() -> str:
    """The whole page as Markdown."""
    return "\n\n".join(f"### {title}\n\n{table}" for title, table in [*_verbs(), *_commands()]) + "\n"


def _verbs() -> Iterable[tuple[str, str]]:
    yield "Every verb", _arguments(COMMON)
    yield f"Prompt expansion ({', '.join(EXPANDING)})", _arguments(EXPANSION)
    for verb, names in VERBS.items():
        yield f"`{verb}`", _arguments([name for name in names if name not in (*COMMON, *EXPANSION)], verb)


def _commands() -> Iterable[tuple[str, str]]:
    commands = parser.build()
    flags = {name: _actions(command) for name, command in commands.items()}
    groups = commands["generate"]._action_groups
    model = next(group._group_actions for group in groups if "model" in group.title.split())
    shared = [action.dest for action in model] + list(FILES)
    yield "The model and where it runs", _flags([a for a in flags["generate"] if a.dest in shared])
    requested = {*ARGUMENTS, *shared, "shots_file"}
    yield "Output", _flags([a for a in flags["generate"] if a.dest not in requested])
    common = {*requested, *(a.dest for a in flags["generate"])}
    yield "`fastvid plan`", _flags([a for a in flags["plan"] if a.dest not in common])
    for name in parser.OTHERS:
        if name != "plan":
            yield f"`fastvid {name}`", _flags([a for a in flags[name] if a.dest not in shared])


def _arguments(names: Sequence[str], verb: str = "") -> str:
    rows = ((f"`{name}`", _code(_flag(name, verb)), _code(_type(name, verb)), _help(name, verb)) for name in names)
    return _table(("argument", "flag", "type", "meaning"), rows)


def _flag(name: str, verb: str) -> str:
    return "" if name in CLIPS.get(verb, ()) else ARGUMENTS[name].flag


def _type(name: str, verb: str) -> str:
    option = any(name in each.__annotations__ for each in OPTIONS.values()) and name not in CLIPS.get(verb, ())
    return type_of(name).removesuffix(" | None") if option else TYPES[name]


def _help(name: str, verb: str) -> str:
    return CLIP_HELP[name] if name in CLIPS.get(verb, ()) else ARGUMENTS[name].help_for(verb)


def _actions(command: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in command._actions if action.dest != "help"]


def _flags(actions: Iterable[argparse.Action]) -> str:
    return _table(("flag", "meaning"), ((_code(_written(action)), action.help or "") for action in actions))


def _written(action: argparse.Action) -> str:
    value = action.metavar if isinstance(action.metavar, str) else ""
    if not action.option_strings:
        return value or action.dest
    return ", ".join(action.option_strings) + (f" {value}" if value and action.nargs != 0 else "")


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    print(write())
