"""The texts: links lead somewhere, front pages stay short, and what they tell people to type is understood."""

from __future__ import annotations

import ast
import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import message_sites
import pytest

from fastvid.cli import parser
from fastvid.requests.arguments import ARGUMENTS, VERBS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FRONT = ("README.md", "ARCHITECTURE.md")
MAX_WORDS = 900
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(path: Path) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", path.read_text())


def anchor(heading: str) -> str:
    """The anchor of a heading, as GitHub and MyST make it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    return {anchor(heading) for heading in re.findall(r"^#{1,3} (.+)$", prose(path), re.MULTILINE)}


def broken_links(path: Path) -> list[str]:
    """Relative links without a file, or without the heading they name."""
    broken = []
    for link in LINK.findall(prose(path)):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, heading = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if not target.exists() or (heading and heading not in anchors(target)):
            broken.append(link)
    return broken


def command_lines(path: Path) -> Iterator[str]:
    """Every `fastvid ...` in an indented block or in a fence for a shell."""
    shells = "".join(body for language, body in FENCE.findall(path.read_text()) if language in ("sh", "bash"))
    indented = "\n".join(re.findall(r"^ {4}(.+)$", prose(path), re.MULTILINE))
    for line in f"{shells}\n{indented}".splitlines():
        for command in re.split(r"&& | \| ", line):
            if command.strip().startswith("fastvid "):
                yield command.strip()


def python_blocks(path: Path) -> list[str]:
    return [body for language, body in FENCE.findall(path.read_text()) if language == "python"]


def calls_of_verbs(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(verb, keyword) of every call such as pipe.agenerate(..., seed=1)."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and ast.unparse(node.func.value) == "pipe"
        ):
            name = node.func.attr
            verb = name if name in VERBS else name.removeprefix("a")
            yield from ((verb, each.arg) for each in node.keywords if each.arg and verb in VERBS)


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    assert broken_links(path) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One\n\n[a](page.md#one) [b](page.md#two) [c](gone.md) [d](https://example.org)\n")
    assert broken_links(page) == ["page.md#two", "gone.md"]


@pytest.mark.parametrize("name", FRONT)
def test_front_pages_are_short(name: str) -> None:
    assert len((ROOT / name).read_text().split()) <= MAX_WORDS


@pytest.mark.parametrize("path", [path for path in PAGES if any(command_lines(path))], ids=name_of)
def test_commands_are_understood(path: Path) -> None:
    for line in command_lines(path):
        parser.parse(shlex.split(line, comments=True)[1:])


@pytest.mark.parametrize("path", [path for path in PAGES if python_blocks(path)], ids=name_of)
def test_python_examples_name_arguments_that_there_are(path: Path) -> None:
    for block in python_blocks(path):
        tree = compile(block, str(path), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT | ast.PyCF_ONLY_AST)
        for verb, keyword in calls_of_verbs(tree):
            assert keyword in VERBS[verb] and keyword in ARGUMENTS, f"{verb}({keyword}=)"


def test_every_page_is_in_the_table_of_contents() -> None:
    listed = re.findall(r"^([a-z-]+)$", (ROOT / "docs" / "index.md").read_text(), re.MULTILINE)
    assert {path.stem for path in PAGES if path.parent == ROOT / "docs"} - {"benchmarks"} == {*listed, "index"}


def test_files_that_the_architecture_names_exist() -> None:
    named = re.findall(r"`(fastvid/[\w/]+\.py)`", (ROOT / "ARCHITECTURE.md").read_text())
    assert len(named) >= 10 and [name for name in named if not (ROOT / name).is_file()] == []


# ---------------------------------------------------------------- the page of messages

ROW = re.compile(r"^\| `(.+?)` \| (.+) \|$", re.MULTILINE)


@functools.cache
def rows() -> dict[str, str]:
    """Messages and what to do, of docs/messages.md."""
    found = ROW.findall((ROOT / "docs" / "messages.md").read_text())
    assert len({row for row, _ in found}) == len(found), "a message is there twice"
    return dict(found)


@functools.cache
def sites() -> tuple[message_sites.Site, ...]:
    return tuple(message_sites.sites())


def matches(row: str, site: message_sites.Site) -> bool:
    """Whether a row such as `... does not exist; give ...` shows the message of a site."""
    at = 0
    for piece in filter(None, map(str.strip, row.split("..."))):
        found = site.text.find(piece, at)
        if found < 0:
            return False
        at = found + len(piece)
    return True


def test_every_message_is_on_the_page() -> None:
    missing = [f"{site.place}: {site.text}" for site in sites() if not any(matches(row, site) for row in rows())]
    assert len(sites()) > 500 and missing == []


def test_the_page_shows_no_message_that_is_gone() -> None:
    assert [row for row in rows() if not any(matches(row, site) for site in sites())] == []


def test_every_row_says_what_to_do() -> None:
    assert len(rows()) >= 250
    assert [row for row, what in rows().items() if sum(map(str.isalpha, row)) < 6 or len(what) < 9] == []


@pytest.mark.parametrize(
    "source, message",
    [
        ('raise InvalidRequest(f"{name} is bad; the nearest is {near}")', "... is bad; the nearest is ..."),
        ('checks.refuse("width", value, "one number", near)', "width=...: allowed is one number; the nearest is ..."),
        ('return MediaError(f"{NAME} ends" if short else "no frames")', "clip ends...no frames"),
        ("notices.warn(said)", "... is pale"),
        ("raise CheckpointError(_why(path))", "... is a file"),
        ("raise KeyError('a name that is not there')", None),
    ],
)
def test_messages_are_found(source: str, message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "module.py").write_text(f"""
NAME = "clip"
def _why(path): return f"{{path}} is a file"
def check(value):
    said = f"{{value}} is pale"
    {source}
""")
    monkeypatch.setattr(message_sites, "PACKAGE", tmp_path)
    found = [site.text.replace(message_sites.GAP, "...") for site in message_sites.sites()]
    assert found == ([message] if message else [])
