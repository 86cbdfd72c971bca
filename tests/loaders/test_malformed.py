"""10,000 broken headers, indexes and configs: each is read, or refused with a ValueError of ours within a second."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastvid.errors import CheckpointError
from fastvid.loaders import safetensors, weight_files
from fastvid.loaders.checkpoint import open_checkpoint
from fastvid.models.common.config_reader import read_json

QUICK = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
HEADER = {
    "__metadata__": {"format": "pt"},
    "a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}
INDEX = {"metadata": {"total_size": 32}, "weight_map": {"a.weight": "x.safetensors", "b": "y.safetensors"}}

odd = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 2**31, 2**62, 2**64, 10**30, 1e308, -0.5, float("nan"), float("inf")]),
    st.text(max_size=4),
    st.sampled_from(["F32", "a.weight", "../x.safetensors", "/x", "x.bin", "\0", "\ud800"]),
)
values = st.recursive(
    odd, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner), max_leaves=5
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to everything inside a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, inner in inside for place in places(inner, (*path, key)))]


@st.composite
def damaged(draw: st.DrawFn, whole: dict[str, Any]) -> bytes:
    """The text of a JSON object with something wrong in it."""
    kind = draw(st.sampled_from(["value", "value", "gone", "twice", "text", "noise"]))
    if kind == "noise":
        return draw(st.binary(max_size=60))
    text = json.dumps(whole)
    if kind == "text":
        at, end = sorted(draw(st.tuples(*[st.integers(0, len(text))] * 2)))
        return (text[:at] + draw(st.text(max_size=3)) + text[end:]).encode(errors="surrogatepass")
    if kind == "twice":
        at = text.index("{", draw(st.sampled_from([i for i, c in enumerate(text) if c == "{"])))
        inner = text[at + 1 : at + 1 + draw(st.integers(0, 60))]
        return (text[: at + 1] + inner + "," + text[at + 1 :]).encode()
    changed = json.loads(text)
    *way, last = draw(st.sampled_from([place for place in places(whole) if place]))
    target = changed
    for key in way:
        target = target[key]
    if kind == "gone":
        del target[last]
    else:
        target[last] = draw(values)
    return json.dumps(changed).encode(errors="surrogatepass")


def quick(act: Any) -> bool:
    """Whether it was refused. Anything but a ValueError of ours, or more than a second, fails."""
    start = time.process_time()
    try:
        act()
        refused = False
    except CheckpointError as error:
        assert isinstance(error, ValueError) and str(error)
        refused = True
    assert time.process_time() - start < 1
    return refused


def examples(count: int) -> Any:
    """So many examples in the slow tier, a hundredth of them, but at least 20, in the fast one."""
    return pytest.mark.parametrize("count", [max(20, count // 100), pytest.param(count, marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny.write_checkpoint(folder)
    return folder


@examples(4000)
def test_headers(folder: Path, count: int) -> None:
    path = folder / "header.safetensors"

    @given(text=damaged(HEADER), size=st.integers(0, 40), lie=st.sampled_from([0, 0, 0, 0, 1, -1, 2**40, 2**64 - 1]))
    @settings(max_examples=count, **QUICK)
    def check(text: bytes, size: int, lie: int) -> None:
        length = lie if lie > 2**32 else max(0, len(text) + lie)
        path.write_bytes(length.to_bytes(8, "little") + text + bytes(size))
        quick(lambda: safetensors.read_header(path))

    check()


@examples(3500)
def test_indexes(folder: Path, count: int) -> None:
    part = folder / "indexed"
    part.mkdir(exist_ok=True)
    for name in ("x", "y"):
        (part / f"{name}.safetensors").touch()

    @given(text=damaged(INDEX))
    @settings(max_examples=count, **QUICK)
    def check(text: bytes) -> None:
        (part / "m.safetensors.index.json").write_bytes(text)
        quick(lambda: weight_files.find_files(part))

    check()


@examples(450)
@pytest.mark.parametrize("name", ["transformer", "vae", "text_encoder", "model_index.json", "scheduler", "tokenizer"])
def test_configs(folder: Path, name: str, count: int) -> None:
    inner = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}.get(name, "config.json")
    path = folder / name if name.endswith(".json") else folder / name / inner
    whole = path.read_bytes()
    refused = []

    @given(text=damaged(json.loads(whole)))
    @settings(max_examples=count, **QUICK)
    def check(text: bytes) -> None:
        path.write_bytes(text)
        refused.append(quick(lambda: open_checkpoint(folder).check()))

    try:
        check()
    finally:
        path.write_bytes(whole)
    assert any(refused) and not quick(lambda: open_checkpoint(folder).check())


@pytest.mark.parametrize(
    ("part", "key"),
    [
        ("transformer", "num_layers"),
        ("vae", "num_res_blocks"),
        ("text_encoder", "num_layers"),
    ],
)
@pytest.mark.parametrize("depth", [10**5, 2**62])
def test_a_depth_that_would_take_forever_to_build(folder: Path, part: str, key: str, depth: int) -> None:
    path = folder / part / "config.json"
    whole = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(whole) | {key: depth}))
        assert quick(lambda: open_checkpoint(folder).check())
    finally:
        path.write_text(whole)


@pytest.mark.parametrize(
    "text",
    [
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": {"dtype": "F32", "shape": [1], '
        '"data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
    ],
)
def test_a_name_that_stands_twice(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text.encode() + bytes(4))
    with pytest.raises(CheckpointError, match="stands there twice"):
        safetensors.read_header(tmp_path / "a.safetensors")
    (tmp_path / "i.json").write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}')
    with pytest.raises(CheckpointError, match="'a' stands there twice"):
        read_json(tmp_path / "i.json")
