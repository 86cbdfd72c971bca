"""`fastvid tune`: its flags, its line of progress, and the table as text."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

from fastvid.cli.command_parser import UsageError
from fastvid.cli.progress import LINE_SECONDS, duration

SHOWN = 3  # classes that were not measured, of each reason
ARGUMENTS = ("model", "size", "num_frames", "budget", "device", "dtype", "only", "export")


def run(flags: argparse.Namespace) -> None:
    """Tunes, or with --show and --clear looks at the table or removes it."""
    given = {name: value for name in ARGUMENTS if (value := getattr(flags, name)) is not None}
    if flags.show or flags.clear:
        if others := [name for name in given if name != "device" or flags.clear]:
            raise UsageError(f"--{others[0]}: {'--clear' if flags.clear else '--show'} tunes nothing; leave it out")
        _print(flags, *(_clear() if flags.clear else _show(flags.device)))
        return
    from fastvid.tuning.run import tune

    for name, kind, example in (("num_frames", int, "17"), ("budget", float, "300")):
        if name in given:
            given[name] = _number(f"--{name.replace('_', '-')}", given[name], kind, example)
    line = Line(quiet=flags.quiet)
    try:
        result = tune(**given, progress=line.event)
    except KeyboardInterrupt:
        line.say("interrupted; what was measured until now is in the table (fastvid tune --show)")
        raise
    finally:
        line.close()
    facts = result.to_dict()
    _print(flags, facts, [*lines(facts), f"{len(result.rows)} choices in {duration(result.seconds)}: {result.path}"])


def _number(flag: str, text: str, kind: Callable[[str], Any], example: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise UsageError(f"{flag} {text:.40}: a number is needed, such as {flag} {example}") from None


def _print(flags: argparse.Namespace, facts: Mapping[str, Any], text: Sequence[str]) -> None:
    print(json.dumps(facts) if flags.json else "\n".join(text))


def _show(device: str | None) -> tuple[dict[str, Any], list[str]]:
    from fastvid.device.devices import find_device
    from fastvid.ops import dispatch, tuned

    where = find_device(device)
    dispatch.bind("reference", "reference", where)  # raises if it is not there
    path, table = tuned.path_of(where), tuned.load(where)
    head = [", ".join(f"{name} {value}" for name, value in table["key"].items() if value is not None), str(path)]
    text = [*lines(table)] or ["there is no table for this machine; fastvid tune makes one"]
    return {"path": str(path), **table}, [*head, *text]


def _clear() -> tuple[dict[str, Any], list[str]]:
    from fastvid.ops import tuned

    removed = [str(path) for path in tuned.clear()]
    return {"removed": removed}, [f"removed {path}" for path in removed] or ["there was no table"]


def lines(table: Mapping[str, Any]) -> Iterator[str]:
    """The table as text: an operation and class a line, then what was rejected and what was not reached."""
    for row in sorted(table["rows"], key=lambda row: (row["op"], row["dtype"], row["shape_class"])):
        following = f", next {row['next']} {row['next_us']:.1f} us" if row["next"] else ""
        yield f"{_class(row):<84} {row['backend']:<14} {row['median_us']:10.1f} us{following}"
    for row in table["rejected"]:
        yield f"{_class(row)}: {row['backend']} is not used: {row['why']}"
    reasons: dict[str, list[str]] = {}
    for row in table.get("unmeasured", ()):
        reasons.setdefault(row["why"], []).append(_class(row))
    for why, classes in reasons.items():
        more = f" and {len(classes) - SHOWN} more" if len(classes) > SHOWN else ""
        yield f"not measured, {why}: {', '.join(classes[:SHOWN])}{more} (fastvid tune goes on with them)"


def _class(row: Mapping[str, Any]) -> str:
    return f"{row['op']} {row['dtype']} {row['shape_class']}"


class Line:
    """What is done now: on a terminal one line that is written over, elsewhere a line now and then."""

    def __init__(
        self, stream: TextIO | None = None, *, quiet: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._quiet, self._clock, self._tty = quiet, clock, self._stream.isatty()
        self._last, self._width = -LINE_SECONDS, 0

    def event(self, event: Mapping[str, Any]) -> None:
        if self._quiet or (not self._tty and self._clock() - self._last < LINE_SECONDS):
            return
        self._last = self._clock()
        done = f" [{event['done']}/{event['total']}]" if "total" in event else ""
        what = " ".join(str(event[name]) for name in ("stage", "op", "shape_class", "backend") if event.get(name))
        text = f"{event['model']}{done}: {what}"
        if self._tty:
            print(f"\r{text[:118]:<{self._width}}", end="", file=self._stream, flush=True)
            self._width = len(text[:118])
        else:
            print(text, file=self._stream, flush=True)

    def say(self, text: str) -> None:
        self.close()
        if not self._quiet:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        if self._tty and self._width:
            print(f"\r{'':<{self._width}}\r", end="", file=self._stream, flush=True)
        self._width = 0
