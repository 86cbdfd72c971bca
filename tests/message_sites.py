"""Finds every refusal and warning in the source: what the documentation's list of messages has to cover."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "fastvid"
GAP = "\0"
"""Stands in a message for what is filled in when it is raised."""
ERRORS = {"Error", "InvalidRequest", "OutOfMemory", "CheckpointError", "BackendUnavailable", "MediaError"}
ERRORS |= {"PromptError", "PoolFull", "WorkerFailed", "UsageError", "Refused", "HubError"}
CALLS = {"warn", "refuse"}
"""Functions that warn, or raise one of these, with a message of their caller's."""


@dataclass(frozen=True)
class Site:
    """A place that raises or warns. text: its message, with GAP for what is filled in."""

    place: str
    name: str
    text: str


def sites() -> Iterator[Site]:
    """Every place that makes one of fastvid's errors with a text of its own, or warns."""
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ast.parse(path.read_text())
        texts = dict(_texts(module))
        for call in ast.walk(module):
            if isinstance(call, ast.Call):
                name = ast.unparse(call.func).rpartition(".")[2]
                text = _message(name, call.args, texts) if name in ERRORS | CALLS else ""
                if sum(map(str.isalpha, text)) > 3:
                    yield Site(f"{path.relative_to(PACKAGE)}:{call.lineno}", name, text)


def _texts(module: ast.Module) -> Iterator[tuple[str, str]]:
    """What the functions of a module return, and what its constants are: messages are put together there too."""
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef):
            returned = [each.value for each in ast.walk(node) if isinstance(each, ast.Return) and each.value]
            yield node.name, GAP.join(map(_text, returned))
    for node in module.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            yield node.targets[0].id, _text(node.value)


def _message(name: str, args: list[ast.expr], texts: dict[str, str]) -> str:
    """The message that a call makes of its arguments; checks.refuse(name, value, allowed, nearest) frames them."""
    parts = [_text(arg) if _text(arg) != GAP else texts.get(_name(arg), GAP) for arg in args]
    if name != "refuse" or len(parts) not in (3, 4):
        return GAP.join(parts)
    return f"{parts[0]}={GAP}: allowed is {parts[2]}" + "".join(f"; the nearest is {part}" for part in parts[3:])


def _name(node: ast.expr) -> str:
    """The name that is called or read."""
    return _name(node.func) if isinstance(node, ast.Call) else node.id if isinstance(node, ast.Name) else ""


def _text(node: ast.expr) -> str:
    """The fixed parts of a text."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    if isinstance(node, ast.IfExp):
        return _text(node.body) + GAP + _text(node.orelse)
    return GAP
