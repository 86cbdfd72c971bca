"""Values of every type that people and programs hand over by mistake or on purpose, and a strategy that mixes them."""

from __future__ import annotations

import array
import collections
import datetime
import enum
import os
import types
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image

import fastvid

SPECIAL = (
    *("__repr__", "__str__", "__format__", "__len__", "__iter__", "__getitem__", "__contains__", "__index__"),
    *("__int__", "__float__", "__bool__", "__eq__", "__ne__", "__lt__", "__gt__", "__le__", "__ge__", "__hash__"),
    *("__fspath__", "__array__", "__call__", "__add__", "__mul__", "__truediv__", "__abs__", "__round__"),
)
NAMES = ("shape", "dtype", "ndim", "device", "layout", "frames", "fps", "read", "num_frames", "convert", "recipe")


def _raise(*_: Any, **__: Any) -> Any:
    raise ZeroDivisionError("a foreign object's own error")


def raising(*names: str, base: type = object) -> type:
    """A class whose methods of these names raise."""
    return type(f"Raising{base.__name__.title()}", (base,), {name: _raise for name in names})


def having(**attributes: Any) -> Any:
    """An object with these attributes; a function is a property."""
    return type("Foreign", (), {k: property(v) if callable(v) else v for k, v in attributes.items()})()


class Lying(Sequence[Any]):
    """A list that says that it has one item, and never ends."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: Any) -> Any:
        return "picture.png"

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield "picture.png"


class Endless(Mapping[Any, Any]):
    """A mapping that says that it has one item, and never ends."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, key: Any) -> Any:
        return "picture.png"

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield 3


class Color(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    LOW = 5


class PathTo:
    """Stands for a path, if `to` is one."""

    def __init__(self, to: Any) -> None:
        self.to = to

    def __fspath__(self) -> Any:
        return self.to


def _closed_picture() -> Any:
    picture = Image.new("RGB", (32, 32))
    picture.close()
    return picture


def _tensors() -> dict[str, Callable[[], Any]]:
    return {
        "meta": lambda: torch.empty(3, device="meta"),
        "meta scalar": lambda: torch.empty((), device="meta"),
        "meta picture": lambda: torch.empty(32, 32, 3, device="meta", dtype=torch.uint8),
        "sparse": lambda: torch.zeros(3, 3).to_sparse(),
        "sparse rows": lambda: torch.zeros(3, 3).to_sparse_csr(),
        "complex": lambda: torch.zeros(3, dtype=torch.complex64),
        "conjugate": lambda: torch.zeros(3, dtype=torch.complex64).conj(),
        "complex scalar": lambda: torch.tensor(5 + 0j),
        "bool scalar": lambda: torch.tensor(True),
        "whole scalar": lambda: torch.tensor(5),
        "scalar that learns": lambda: torch.tensor(5.0, requires_grad=True),
        "bfloat16": lambda: torch.zeros(3, dtype=torch.bfloat16),
        "float8": lambda: torch.zeros(3, dtype=torch.float8_e4m3fn),
        "quantized": lambda: torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.quint8),
        "nested": lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
        "parameter": lambda: torch.nn.Parameter(torch.zeros(3)),
        "inference": lambda: _inference(),
        "mkldnn": lambda: torch.zeros(3, 3).to_mkldnn(),
        "frames": lambda: torch.zeros(5, 64, 64, 3, dtype=torch.uint8),
        "dtype": lambda: torch.bfloat16,
        "device": lambda: torch.device("meta"),
        "size": lambda: torch.Size([64, 64]),
    }


def _inference() -> torch.Tensor:
    with torch.inference_mode():
        return torch.zeros(3)


def _arrays() -> dict[str, Callable[[], Any]]:
    kinds = ("float16", "float32", "float64", "longdouble", "int8", "uint64", "complex64")
    kinds += ("bool", "U3", "S3", "O", "V3")
    made: dict[str, Callable[[], Any]] = {f"scalar {kind}": lambda kind=kind: np.zeros(1, kind)[0] for kind in kinds}
    made |= {f"array {kind}": lambda kind=kind: np.zeros(3, kind) for kind in kinds}
    return made | {
        "date": lambda: np.datetime64("2020"),
        "no date": lambda: np.datetime64("NaT"),
        "dates": lambda: np.zeros(3, "M8[ns]"),
        "span": lambda: np.timedelta64(5),
        "empty": lambda: np.array([]),
        "array of one": lambda: np.array([5]),
        "array without dimensions": lambda: np.array(5),
        "object without dimensions": lambda: np.array(None, object),
        "structured": lambda: np.zeros(3, [("x", "f4"), ("y", "i4")]),
        "masked": lambda: np.ma.masked_array([1, 2, 3], [0, 1, 0]),
        "matrix": lambda: np.asmatrix(np.zeros((2, 2))),
        "big endian": lambda: np.zeros((1, 16, 2, 8, 8), ">f4"),
        "backwards": lambda: np.zeros((5, 64, 64, 3), np.uint8)[::-1],
        "read-only": lambda: np.broadcast_to(np.uint8(5), (64, 64, 3)),
        "enormous": lambda: np.broadcast_to(np.uint8(5), (1 << 17, 2048, 2048, 3)),
        "enormous floats": lambda: np.broadcast_to(np.float32(0.5), (1, 16, 1 << 20, 1 << 10, 1 << 10)),
        "32 dimensions": lambda: np.zeros((1,) * 32, np.uint8),
        "NaN": lambda: np.full((64, 64, 3), np.nan),
        "float NaN": lambda: np.float32("nan"),
        "float infinity": lambda: np.float64("inf"),
        "a dtype": lambda: np.dtype("float32"),
        "a class of numbers": lambda: np.float32,
    }


def _numbers() -> dict[str, Callable[[], Any]]:
    values = (
        *(0, 1, -1, 5, 2**31, 2**63 - 1, 2**63, 10**400, -(10**400), 10**5000, -(10**5000), True, False, Level.LOW),
        *(0.0, -0.0, 0.5, 5.0, 1e308, float("nan"), float("inf"), -float("inf"), 5e-324, 1j, 5 + 0j),
        *(Fraction(1, 3), Fraction(10**5000), Fraction(1, 10**5000), Fraction(10**5000 + 1, 10**5000), Fraction(16, 9)),
        *(Decimal(5), Decimal("0.5"), Decimal("NaN"), Decimal("sNaN"), Decimal("Infinity"), Decimal("1e999999999")),
        *(Decimal("1e-999999999"), Decimal("-1e999999999"), Decimal("9007199254740993")),
    )
    return {f"number {at}": lambda value=value: value for at, value in enumerate(values)}


def _texts() -> dict[str, Callable[[], Any]]:
    values = (
        *("", " ", "5", "-1", "nan", "inf", "True", "auto", "none", "\0", "a\0b", "\ud800", "\udcff", "a\udfffb"),
        *("embedded", "cpu", "cuda", "cuda:99999999999999999999", "meta", "bf16", "float64", "generate", "16:9", "1:0"),
        *("a" * 300, "a" * 100_001, "9" * 5000, "9" * 5000 + ":1", "64x64", "64x" + "9" * 30, "²x²"),
        *("ulysses=4,ring=2", "日本"),
        *("guidance=2,ring=1000,ulysses=1000", "to_rgb=cuda", "=", ",", ":", "..", "/", "/etc/passwd", "/dev/zero"),
        *("~", "~nobody", "out.mp4", "job.ckpt", "a\nb", "{0}", "%s"),
    )
    made: dict[str, Callable[[], Any]] = {f"text {at}": lambda value=value: value for at, value in enumerate(values)}
    return made | {
        "bytes": lambda: b"clip.mp4",
        "bytearray": lambda: bytearray(b"a"),
        "view of memory": lambda: memoryview(b"a"),
        "path": lambda: Path("nothing.png"),
        "path of half a character": lambda: Path("\ud800"),
        "path of NUL": lambda: Path("a\0b"),
        "path of 5,000 characters": lambda: Path("a" * 5000),
        "path in bytes": lambda: PathTo(b"nothing.png"),
        "path that is a number": lambda: PathTo(5),
        "path that is nothing": lambda: PathTo(None),
        "numpy text": lambda: np.str_("generate"),
    }


def _containers() -> dict[str, Callable[[], Any]]:
    def endless() -> Iterator[int]:
        while True:
            yield 1

    return {
        "list": list,
        "tuple": tuple,
        "dict": dict,
        "set": set,
        "frozen": lambda: frozenset({1}),
        "generator": lambda: (one for one in (1, 2)),
        "endless generator": endless,
        "iterator": lambda: iter([1.0, 0.5]),
        "range": lambda: range(3),
        "huge range": lambda: range(10**19),
        "deque": lambda: collections.deque([1.0, 0.5]),
        "machine numbers": lambda: array.array("d", [1.0, 0.5]),
        "lying list": Lying,
        "endless mapping": Endless,
        "mapping": lambda: types.MappingProxyType({3: "nothing.png"}),
        "long list": lambda: [1] * 200_000,
        "long list of paths": lambda: ["nothing.png"] * 200_000,
        "list of itself": lambda: _of_itself(),
        "deep list": lambda: _deep(5000),
        "list of everything": lambda: [None, 1, "a", [], object(), torch.empty(2, device="meta")],
        "pairs": lambda: [("a", 1.0), ("b", "c")],
        "shots": lambda: [("a", 1.0)],
        "shots of a huge number": lambda: [("a", Fraction(1, 10**5000))],
        "LoRAs": lambda: [("nothing.safetensors", 10**5000)],
        "LoRA of three": lambda: [("nothing.safetensors", 1.0, 5)],
        "keyframes": lambda: {10**5000: "a.png"},
        "keyframes by text": lambda: {"a" * 1000: "a.png", None: 3},
        "keyframes by what raises": lambda: {raising("__repr__", "__index__")(): "a.png"},
        "parts": lambda: {"vae": 5},
        "parts by number": lambda: {5: "vae"},
        "recipe": lambda: {"fastvid": "1", "prompt": ["a"], "seed": 10**400},
        "recipe of an unknown verb": lambda: {"fastvid": 1, "verb": ["generate"]},
        "recipe of prints": lambda: {"fastvid": 1, "image": {"sha256": 5, "shape": object()}},
        "recipe by number": lambda: {"fastvid": 1, 5: 5},
        "levels": lambda: [1.0, Fraction(1, 10**5000)],
        "levels of NaN": lambda: [1.0, float("nan")],
        "pictures": lambda: [np.zeros((32, 32, 3), np.uint8), np.zeros((16, 16, 3), np.uint8)],
        "degrees": lambda: {"ring": 10**5000},
        "degrees by what raises": lambda: {raising("__repr__")(): 1},
    }


def _of_itself() -> list[Any]:
    made: list[Any] = []
    made.append(made)
    return made


def _deep(depth: int) -> list[Any]:
    made: list[Any] = []
    for _ in range(depth):
        made = [made]
    return made


def _objects() -> dict[str, Callable[[], Any]]:
    made: dict[str, Callable[[], Any]] = {f"raising {name}": raising(name) for name in SPECIAL if name != "__hash__"}
    made |= {f"raising {base.__name__}": raising(*SPECIAL, base=base) for base in (list, tuple, dict, str, int, float)}
    made |= {f"raising {name}": lambda name=name: having(**{name: _raise}) for name in NAMES}
    return made | {
        "raising everything": raising(*SPECIAL, "__getattr__"),
        "raising __getattribute__": raising("__getattribute__", "__repr__"),
        "raising __class__": lambda: having(__class__=_raise),
        "as an array": lambda: having(shape=(32, 32, 3), dtype="uint8"),
        "as an array of text": lambda: having(shape="abc", dtype=5),
        "as an array of minus one": lambda: having(shape=(-1, 10**5000), dtype="float32", ndim=2),
        "as a video": lambda: having(frames=5, fps=16),
        "as a video that is odd": lambda: having(frames=np.zeros((2, 64, 64, 3), np.uint8), fps=Fraction(10**5000)),
        "as a picture": lambda: having(convert=5, getbands=5),
        "as a number": lambda: having(__index__=5, __float__=5),
        "object": object,
        "Ellipsis": lambda: ...,
        "not implemented": lambda: NotImplemented,
        "nothing": lambda: None,
        "function": lambda: len,
        "class": lambda: int,
        "type": lambda: type,
        "module": lambda: os,
        "exception": lambda: ValueError("a"),
        "enum": lambda: Color.RED,
        "date of Python": lambda: datetime.date(2020, 1, 1),
        "span of Python": lambda: datetime.timedelta(seconds=5),
        "uuid": lambda: uuid.UUID(int=5),
        "picture": lambda: Image.new("RGB", (32, 32)),
        "gray picture of 32 bits": lambda: Image.new("F", (32, 32)),
        "closed picture": _closed_picture,
        "tiny picture": lambda: Image.new("RGB", (1, 1)),
        "wide picture": lambda: Image.new("L", (9000, 16)),
        "class of videos": lambda: fastvid.Video,
        "video": lambda: fastvid.Video(np.zeros((5, 64, 64, 3), np.uint8), 16, 1),
        "clip": lambda: fastvid.open_clip(np.zeros((5, 64, 64, 3), np.uint8)),
        "request": lambda: fastvid.Request.make(prompt="a"),
    }


ODD: dict[str, Callable[[], Any]] = {
    **_numbers(),
    **_texts(),
    **{f"array: {name}": make for name, make in _arrays().items()},
    **{f"tensor: {name}": make for name, make in _tensors().items()},
    **{f"many: {name}": make for name, make in _containers().items()},
    **_objects(),
}
"""Name -> a function that makes the value."""

LETTERS = st.characters(exclude_characters="/\\", codec=None)  # with surrogates; no text is a name on the hub


@dataclass(frozen=True, eq=False)
class Drawn:
    """A drawn value that is made when it is used, so that hypothesis itself never looks at one whose methods raise."""

    name: str
    make: Callable[[], Any] = field(repr=False)


def values() -> st.SearchStrategy[Drawn]:
    """Values of every type: odd ones, drawn ones, and containers of both."""
    plain = (
        st.none() | st.booleans() | st.integers() | st.floats() | st.fractions() | st.decimals() | st.complex_numbers()
    )
    plain |= st.text(LETTERS, max_size=30) | st.binary(max_size=20) | st.integers(-(10**400), 10**400)
    plain |= st.integers(1, 32) | st.floats(0, 2)  # what many arguments take
    leaf = st.sampled_from(sorted(ODD)).map(lambda name: Drawn(name, ODD[name]))
    leaf |= plain.map(lambda value: Drawn(f"{value!r:.80}", lambda: value))
    many = st.lists(leaf, max_size=4)
    keyed = st.dictionaries(st.integers(-2, 20) | st.text(LETTERS, max_size=8), leaf, max_size=4)
    pairs = st.lists(st.tuples(leaf, leaf), max_size=3)
    return (
        leaf
        | many.map(lambda some: Drawn(f"{some}", lambda: [one.make() for one in some]))
        | many.map(lambda some: Drawn(f"tuple {some}", lambda: tuple(one.make() for one in some)))
        | keyed.map(lambda some: Drawn(f"{some}", lambda: {key: one.make() for key, one in some.items()}))
        | pairs.map(lambda some: Drawn(f"{some}", lambda: [(one.make(), other.make()) for one, other in some]))
    )
