"""Finds every refusal and warning in the source: what the documentation's list of messages has to cover."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "fastvid"
GAP = "\0"
"""Stands in a message for what is filled in when it is raised."""
ERRORS = {"Error", "InvalidRequest", "OutOfMemory", "CheckpointError", "BackendUnavailable", "MediaError"}
ERRORS |= {"PromptError", "PoolFull", "WorkerFailed", "UsageError", "Refused", "HubError", "OSError"}
ERRORS |= {"ArgumentTypeError", "Misfit", "TableRefused"}
CALLS = {"warn", "refuse", "error", "fail", "failed", "__init__", "library_errors"}
"""Functions that warn, or raise one of these, with a message of their caller's."""
NOTES = {"problems.append"}
"""Calls that note why a model cannot be loaded."""


@dataclass(frozen=True)
class Site:
    """A place that raises or warns. text: its message, with GAP for what is filled in."""

    place: str
    name: str
    text: str


@dataclass(frozen=True)
class Source:
    """A module, and what stands for what in its messages."""

    tree: ast.Module
    known: Mapping[str, str]
    """Its constants' and its own functions' texts, which messages quote."""
    functions: Mapping[str, str]
    """What each function of the package returns or yields."""

    def message(self, name: str, args: list[ast.expr], given: Mapping[str, ast.expr]) -> str:
        """The message that a call makes of its arguments; checks.refuse(name, value, allowed, nearest) frames them.

        given: what the names of the function around it are.
        """
        parts = [self.resolved(arg, given) for arg in args]
        if name == "refuse" and len(parts) in (3, 4):
            parts = [f"{parts[0]}={GAP}: allowed is {parts[2]}", *(f"; the nearest is {part}" for part in parts[3:])]
        return re.sub(f"{GAP}+", GAP, ("" if name == "refuse" else GAP).join(parts))

    def resolved(self, node: ast.expr, given: Mapping[str, ast.expr], depth: int = 3) -> str:
        """The text of an argument, or of what the names and calls in it stand for."""
        if (text := _text(node, self.known)).strip(GAP) or not depth:
            return text
        names = [each.id for each in ast.walk(node) if isinstance(each, ast.Name)]
        texts = (
            self.resolved(given[name], given, depth - 1) if name in given else self.functions.get(name, "")
            for name in names
        )
        return GAP.join(texts) or GAP


def sites() -> Iterator[Site]:
    """Every place that makes one of fastvid's errors with a text of its own, or warns, or notes what a model lacks."""
    for path, source in _sources().items():
        for call, around in _calls(source.tree):
            name = _name(call.func)
            if name in ERRORS | CALLS or (name == "append" and ast.unparse(call.func) in NOTES):
                text = source.message(name, call.args, dict(_assigned(around)))
                if sum(map(str.isalpha, text)) > 3:
                    yield Site(f"{path.relative_to(PACKAGE)}:{call.lineno}", name, text)


def _name(called: ast.expr) -> str:
    return called.id if isinstance(called, ast.Name) else called.attr if isinstance(called, ast.Attribute) else ""


def _calls(node: ast.AST, around: ast.AST | None = None) -> Iterator[tuple[ast.Call, ast.AST]]:
    """Every call, with the function that it is in."""
    around = node if around is None or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else around
    if isinstance(node, ast.Call):
        yield node, around
    for child in ast.iter_child_nodes(node):
        yield from _calls(child, around)


def _sources() -> dict[Path, Source]:
    trees = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
    constants = {name: text for tree in trees.values() for name, text in _constants(tree)}
    ends = {path: list(_ends(tree)) for path, tree in trees.items()}
    functions = {name: _texts(values, {}) for each in ends.values() for name, values in each}
    found = {}
    for path, tree in trees.items():
        own = constants | dict(_constants(tree))
        for _ in range(2):  # functions quote functions
            own |= {name: _texts(values, own) for name, values in ends[path] if name.startswith("_")}
        found[path] = Source(tree, own, functions)
    return found


def _constants(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id.isupper():
            yield node.targets[0].id, _text(node.value, {})


def _ends(tree: ast.Module) -> Iterator[tuple[str, list[ast.expr]]]:
    """What functions return or yield: messages are put together there too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            ends = (each.value for each in ast.walk(node) if isinstance(each, ast.Return | ast.Yield))
            yield node.name, [value for value in ends if value]


def _texts(values: list[ast.expr], known: Mapping[str, str]) -> str:
    return GAP.join(_text(value, known) for value in values)


def _assigned(tree: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            yield node.targets[0].id, node.value
        elif isinstance(node, ast.NamedExpr | ast.For | ast.comprehension) and isinstance(node.target, ast.Name):
            yield node.target.id, node.value if isinstance(node, ast.NamedExpr) else node.iter


def _text(node: ast.expr, known: Mapping[str, str]) -> str:
    """The fixed parts of a text, and of what it quotes."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, known) for part in node.values)
    if isinstance(node, ast.BinOp):
        return _text(node.left, known) + _text(node.right, known)
    if isinstance(node, ast.IfExp):
        return _text(node.body, known) + GAP + _text(node.orelse, known)
    if isinstance(node, ast.FormattedValue):
        return _text(node.value, known)
    named = node.func if isinstance(node, ast.Call) else node
    return known.get(named.id, GAP) if isinstance(named, ast.Name) else GAP
