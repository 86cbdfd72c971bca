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
    """Every place that raises one of fastvid's errors with a text of its own, or warns."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            call = node.exc if isinstance(node, ast.Raise) else node
            if not isinstance(call, ast.Call):
                continue
            name = ast.unparse(call.func).rpartition(".")[2]
            if (isinstance(node, ast.Raise) and name in ERRORS) or (isinstance(node, ast.Call) and name in CALLS):
                text = GAP.join(map(_text, call.args))
                if sum(map(str.isalpha, text)) > 3:
                    yield Site(f"{path.relative_to(PACKAGE)}:{call.lineno}", name, text)


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
