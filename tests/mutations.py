"""Damaged inputs from fixed seeds, and what has to hold when they are read.

    @fuzz(10_000)
    def test_configs(tmp_path, count):
        with peak(64), untouched(tmp_path.parent):
            for random in seeds("configs", count):
                path.write_bytes(damaged_json(config, random))
                refuses(lambda: read(path), CheckpointError)

The same seed gives the same input everywhere, so that a failure can be repeated by its number.
"""

from __future__ import annotations

import contextlib
import copy
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

import pytest

from fastvid.errors import CheckpointError

FAST = 200  # mutations of each kind in the fast tier
HANG = 20.0  # seconds after which an attempt counts as hung
NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 127, 255, 65536, 2**31 - 1, 2**31, -(2**31), 2**32, 2**53 + 1),
    *(2**62, 2**63 - 1, 2**63, -(2**63), 2**64, 10**30, 10**308, 10**309, -(10**309), 10**400),
    *(0.0, -0.0, 0.5, -0.5, 1.5, 1e-320, 1e30, 1e308, -1e308, float("nan"), float("inf"), float("-inf")),
)  # fmt: skip
TEXTS = (
    *("", "a", " ", "0", "1", "-1", "nan", "inf", "true", "null", "None"),
    *("\0", "a\0b", "\ud800", "\udfff", "\u202e", "\ufeff"),
    *("é", "日本", "👩‍👩‍👧", "a" * 300, "a" * 20_000, "\n", "%s", "{}", "$HOME", "~", "."),
    *("..", "../x", "../../../../etc/passwd", "/etc/passwd", "/dev/zero", "C:\\x", "\\\\host\\x", "x/"),
    *("file:///etc/passwd", "F32", "bool", "float32", "__class__", "_class_name", "x.safetensors", "x.bin", "a/b/c"),
)  # fmt: skip

NOISE = (b"", b"null", b"[]", b"{}", b"NaN", b"\xff\xfe{}")
KINDS = ("none", "flag", *("number",) * 3, *("text",) * 2, "list", "object", "deep", "long")


# ---------------------------------------------------------------- damage


def seeds(name: str, count: int) -> Iterator[Random]:
    """A generator of random numbers for each of `count` attempts."""
    for number in range(count):
        yield Random(f"{name} {number}")


def value(random: Random, depth: int = 3) -> Any:
    """A JSON value of any type: numbers at and beyond every limit, odd texts, containers of those."""
    kind = random.choice(
        ("none", "flag", "number", "number", "number", "text", "text", "list", "object", "deep", "long")
    )
    if kind == "none" or (depth <= 0 and kind not in ("flag", "number", "text")):
        return None
    if kind == "flag":
        return random.random() < 0.5
    if kind == "number":
        return random.choice(NUMBERS)
    if kind == "text":
        return random.choice(TEXTS)
    if kind == "deep":
        return nested(random.choice((10, 100, 900, 3000)), random.choice(("list", "object")))
    if kind == "long":
        return [random.choice(NUMBERS)] * random.choice((100, 5000))
    if kind == "list":
        return [value(random, depth - 1) for _ in range(random.randint(0, 4))]
    return {str(random.choice(TEXTS)): value(random, depth - 1) for _ in range(random.randint(0, 4))}


class Raw(str):
    """JSON text that stands for itself in `text_of`, such as a number of more digits than Python writes."""


def nested(depth: int, kind: str) -> Raw:
    """`depth` lists or objects inside one another."""
    return Raw("[" * depth + "]" * depth if kind == "list" else '{"a":' * depth + "0" + "}" * depth)


def text_of(whole: Any) -> str:
    """The JSON text of a value, which may have Raw inside."""
    if isinstance(whole, Raw):
        return str(whole)
    if isinstance(whole, dict):
        return "{" + ",".join(f"{json.dumps(str(key))}:{text_of(inner)}" for key, inner in whole.items()) + "}"
    if isinstance(whole, list | tuple):
        return "[" + ",".join(map(text_of, whole)) + "]"
    return json.dumps(whole)


def places(whole: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to everything inside a JSON value; () is the value itself."""
    inside = whole.items() if isinstance(whole, dict) else enumerate(whole) if isinstance(whole, list) else ()
    return [way, *(place for key, inner in inside for place in places(inner, (*way, key)))]


def changed(whole: Any, random: Random) -> Any:
    """A copy of a JSON value in which one to three values are others, gone, moved, or under other names."""
    made = copy.deepcopy(whole)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        inner = [place for place in places(made) if place]
        if not inner or random.random() < 0.01:
            return value(random)
        *way, last = random.choice(inner)
        target = made
        for key in way:
            target = target[key]
        _change(target, last, random, value(random) if random.random() < 0.8 else _within(made, random.choice(inner)))
    return made


def _change(target: Any, key: Any, random: Random, new: Any) -> None:
    kind = random.choice(("swap", "swap", "swap", "swap", "gone", "more", "name", "near"))
    if kind == "gone":
        del target[key]
    elif kind == "more" and isinstance(target, list):
        target[key:key] = [copy.deepcopy(target[key])] * random.choice((1, 3, 1000))
    elif kind == "more":
        target[random.choice(TEXTS)] = new
    elif kind == "name" and isinstance(target, dict):
        target[random.choice(TEXTS)] = target.pop(key)
    elif kind == "near" and type(target[key]) in (int, float):
        target[key] = random.choice((-target[key], target[key] + 1, target[key] * 2, target[key] * 1000))
    else:
        target[key] = new


def _within(whole: Any, way: tuple[Any, ...]) -> Any:
    for key in way:
        whole = whole[key]
    return copy.deepcopy(whole)


def damaged(data: bytes, random: Random) -> bytes:
    """The same bytes, one to four times damaged: flipped, cut, cut out, inserted, repeated, overwritten."""
    made = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4))):
        at = random.randint(0, len(made))
        size = random.choice((1, 1, 2, 4, 8, random.randint(0, 64)))
        kind = random.choice(("flip", "flip", "flip", "byte", "cut", "out", "in", "again", "over", "number", "zeros"))
        if kind == "flip" and made:
            made[at % len(made)] ^= 1 << random.randrange(8)
        elif kind == "byte" and made:
            made[at % len(made)] = random.choice((0, 1, 127, 128, 255, random.randrange(256)))
        elif kind == "cut":
            del made[at:]
        elif kind == "out":
            del made[at : at + size]
        elif kind == "in":
            made[at:at] = random.randbytes(size)
        elif kind == "again":
            made[at:at] = bytes(made[max(0, at - size) : at]) * random.choice((1, 2, 50))
        elif kind == "number":
            number = random.choice((0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1, random.getrandbits(64)))
            made[at : at + 8] = number.to_bytes(8, random.choice(("little", "big")))
        else:
            made[at : at + size] = random.randbytes(size) if kind == "over" else bytes(size)
    return bytes(made)


def damaged_json(whole: Any, random: Random) -> bytes:
    """JSON bytes of a value, wrong in its values, its names or its text."""
    kind = random.choice(("value",) * 7 + ("text", "text", "twice", "digits", "noise", "encoding"))
    if kind == "noise":
        return random.choice((*NOISE, random.randbytes(random.randint(0, 60))))
    text = text_of(changed(whole, random) if kind == "value" else whole)
    if kind == "text":
        return damaged(text.encode(), random)
    if kind == "twice":
        at = random.choice([i for i, letter in enumerate(text) if letter == "{"] or [0]) + 1
        text = f"{text[:at]}{text[at : at + random.randint(0, 60)]},{text[at:]}"
    elif kind == "digits":
        at = random.choice([i for i, letter in enumerate(text) if letter.isdigit()] or [0])
        text = text[:at] + "9" * random.choice((400, 5000, 30_000)) + text[at:]
    elif kind == "encoding":
        return text.encode(random.choice(("utf-16", "utf-32", "utf-8-sig", "latin-1")), "replace")
    return text.encode(errors="surrogatepass")


# ---------------------------------------------------------------- what has to hold


def fuzz(count: int = 10_000, fast: int = FAST) -> Any:
    """Mark a test that takes `count`: so many attempts in the slow tier, `fast` in the fast one."""
    return pytest.mark.parametrize("count", [min(fast, count), pytest.param(count, marks=pytest.mark.slow)])


def refuses(act: Callable[[], Any], *errors: type[Exception], seconds: float = 1.0) -> bool:
    """Whether a call was refused with one of these errors (CheckpointError if none is named).

    Fails if another error comes out, if the message is empty or endless, or if it takes more than `seconds` of CPU
    time; stops what hangs.
    """
    errors = errors or (CheckpointError,)
    start = time.process_time()
    try:
        with _alarm():
            act()
        refused = False
    except errors as error:
        assert 0 < len(str(error)) < 5000, f"a message of {len(str(error))} characters"
        str(error).encode()  # can be printed
        refused = True
    taken = time.process_time() - start
    assert taken < seconds, f"took {taken:.1f} s of CPU time"
    return refused


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"hung for {HANG:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, HANG)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def peak(mib: float = 64) -> Iterator[None]:
    """Fail if the memory of this process grows by more at any time inside. Linux only; elsewhere it checks nothing."""
    if not sys.platform.startswith("linux"):
        yield
        return
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is held now
    before = status("VmRSS")
    yield
    grown = (status("VmHWM") - before) / 1024
    assert grown <= mib, f"memory grew by {grown:.0f} MiB; allowed are {mib:g}"


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


@contextlib.contextmanager
def untouched(folder: Path, *mine: Path) -> Iterator[None]:
    """Fail if a file in `folder` is made, changed or removed inside, except at or below `mine`."""
    before = _listing(folder, mine)
    yield
    after = _listing(folder, mine)
    wrong = sorted(str(path) for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    assert not wrong, f"touched: {', '.join(wrong[:10])}"


def _listing(folder: Path, mine: tuple[Path, ...]) -> dict[Path, tuple[int, int]]:
    found = {}
    for path in folder.rglob("*"):
        if path in mine or any(own in path.parents for own in mine) or (path.is_dir() and not path.is_symlink()):
            continue
        status = path.lstat()
        found[path] = (status.st_size, status.st_mtime_ns)
    return found
