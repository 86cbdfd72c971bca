"""GGUF headers: what the package gguf writes is read, and what is broken or of another kind is refused by name."""

from __future__ import annotations

import struct
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from mutations import damaged, fuzz, peak, refuses, seeds, untouched
from torch import Tensor, nn

from fastvid.errors import CheckpointError
from fastvid.loaders import gguf, safetensors
from fastvid.loaders.find import read_tokenizer
from fastvid.models.common.sentencepiece import _parse
from fastvid.ops.formats_gguf import BLOCKS

oracle = pytest.importorskip("gguf")

import gguf_files  # noqa: E402


def tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"a.weight": (12, 256), "b.weight": (3, 64), "c": (5,), "d.weight": (4, 3, 1, 2, 2), "e": (1, 6, 256)}
    return {f"time_projection.1.{name}": torch.randn(size, generator=generator) for name, size in sizes.items()}


def read(path: Path, name: str) -> Tensor:
    """A tensor as a module's plain parameter gets it."""
    entry = gguf.read_header(path)[0][name]
    with path.open("rb") as file:
        reader = safetensors._Reader({name: entry}, {path: file}, ())
        return reader.tensor(name, torch.float32, False, False)


@pytest.mark.parametrize("alignment", [None, 64])
@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", *BLOCKS])
def test_what_the_package_writes(tmp_path: Path, kind: str, alignment: int | None) -> None:
    path = tmp_path / "x.gguf"

    def more(writer: Any) -> None:
        if alignment:
            writer.add_custom_alignment(alignment)
        writer.add_uint8("t.u8", 200)
        writer.add_float64("t.f64", 0.1)
        writer.add_bool("t.bool", True)
        writer.add_int64("t.i64", -(2**40))
        writer.add_string("t.text", "Größe")
        writer.add_array("t.list", [1, 2, 3])
        writer.add_array("t.texts", ["a", "", "bc"])

    whole = {
        name: kind if kind not in BLOCKS or tensor.shape[-1] == 256 else "f16" for name, tensor in tensors().items()
    }
    worth = gguf_files.write(path, tensors(), whole, more=more)
    entries, texts = gguf.read_header(path)
    assert texts["t.text"] == "Größe" and texts["general.architecture"] == "wan"
    assert {name: entry.shape for name, entry in entries.items()} == {n: tuple(t.shape) for n, t in worth.items()}
    for name, want in worth.items():
        assert read(path, name).equal(want), name
    # The same names, shapes and types as the package reads.
    for theirs in oracle.GGUFReader(path).tensors:
        ours = entries[theirs.name]
        assert ours.dtype.upper() == theirs.tensor_type.name
        assert ours.shape == tuple(int(size) for size in theirs.shape)[::-1]
        assert ours.offset == theirs.data_offset


def test_shapes_that_were_reshaped(tmp_path: Path) -> None:
    """Rows of whole blocks stay a matrix; others are put together again when they are read."""
    path = tmp_path / "x.gguf"
    flat = {"x.weight": torch.randn(6, 256), "y.weight": torch.randn(3, 256), "z.weight": torch.randn(2, 256)}
    shapes = {"x.weight": (3, 512), "y.weight": (12, 64), "z.weight": (4, 2, 4, 4, 4)}
    worth = gguf_files.write(path, flat, dict.fromkeys(flat, "q4_k"), arch=None, shapes=shapes)
    entries, _ = gguf.read_header(path)
    assert {name: entry.shape for name, entry in entries.items()} == shapes
    assert [entries[name].source.shape == shapes[name] for name in flat] == [True, False, False]
    for name, want in worth.items():
        assert read(path, name).equal(want)


def test_a_linear_layer_whose_rows_are_no_blocks_is_widened(tmp_path: Path) -> None:
    path, module = tmp_path / "x.gguf", nn.Linear(64, 12, bias=False, device="meta")
    worth = gguf_files.write(path, {"weight": torch.randn(3, 256)}, {"weight": "q6_k"}, None, {"weight": (12, 64)})
    safetensors.load_into(module, [path], dtype=torch.bfloat16)
    assert module.weight.equal(worth["weight"].bfloat16())


# ---------------------------------------------------------------- refused


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def header(
    infos: list[tuple[str, tuple[int, ...], int, int]], keys: bytes = b"", count: int = 0, version: int = 3
) -> bytes:
    """A header: tensors as (name, dims, type, place)."""
    made = b"GGUF" + struct.pack("<IQQ", version, len(infos), count) + keys
    for name, dims, kind, place in infos:
        made += text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, place)
    return made + bytes(-len(made) % 32)


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


GOOD = header([("a", (32, 2), 8, 0), ("b", (4,), 0, 96)])  # 68 bytes, then 16
ARCH = key("general.architecture", 8, text("ltxv"))
WRONG = {
    "magic": (b"GGML" + GOOD[4:] + bytes(112), "instead of"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    "version": (header([("a", (4,), 0, 0)], version=1) + bytes(16), "version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 1, 0) + bytes(64), "big-endian"),
    "cut": (GOOD[:40], "not a whole GGUF file"),
    "data": (GOOD + bytes(111), "needs"),
    "overlap": (header([("a", (32, 2), 8, 0), ("b", (4,), 0, 64)]) + bytes(96), "overlaps"),
    "place": (header([("a", (4,), 0, 8)]) + bytes(96), "no multiple of 32"),
    "twice": (header([("a", (4,), 0, 0), ("a", (4,), 0, 32)]) + bytes(96), "twice"),
    "blocks": (header([("a", (48, 2), 8, 0)]) + bytes(256), "blocks of 32"),
    "huge": (header([("a", (2**40, 2**40), 0, 0)]) + bytes(96), "any file can hold"),
    "far": (header([("a", (4,), 0, 2**40)]) + bytes(96), "needs"),
    "dims": (header([("a", (1,) * 9, 0, 0)]) + bytes(96), "9 dimensions"),
    "IQ2_XXS": (header([("a", (256,), 16, 0)]) + bytes(96), "IQ2_XXS .*take the Q2_K"),
    "IQ3_S": (header([("a", (256,), 21, 0)]) + bytes(110), "IQ3_S .*take the Q3_K"),
    "MXFP4": (header([("a", (256,), 39, 0)]) + bytes(136), "MXFP4 .*take the Q4_0"),
    "type": (header([("a", (256,), 77, 0)]) + bytes(136), "type 77"),
    "ltxv": (header([("a", (4,), 0, 0)], ARCH, 1) + bytes(16), "'ltxv'"),
    "alignment": (header([], key("general.alignment", 4, struct.pack("<I", 24)), 1), "alignment of 24"),
    "key": (header([], key("x", 13, b""), 1), "unknown type 13"),
    "array": (header([], key("x", 9, struct.pack("<IQ", 8, 2**40)), 1), "1,099,511,627,776"),
    "nested": (header([], key("x", 9, struct.pack("<IQ", 9, 1) * 9), 1), "in one another"),
    "keys": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**50), "keys"),
    "long": (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key("x", 8, struct.pack("<Q", 2**62)), "longer than"),
    "shape": (
        header([("a", (4,), 0, 0)], key("comfy.gguf.orig_shape.a", 9, struct.pack("<IQ2i", 5, 2, 3, 2)), 1) + bytes(16),
        r"should be \[3, 2\]",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_refused(tmp_path: Path, case: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(WRONG[case][0])
    with pytest.raises(CheckpointError, match=WRONG[case][1]):
        gguf.read_header(path)


def test_the_good_one_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(GOOD + bytes(112))
    assert {name: entry.dtype for name, entry in gguf.read_header(path)[0].items()} == {"a": "q8_0", "b": "F32"}


def mutated(random: Random) -> bytes:
    """A header of some tensors and keys with a few wrong numbers, cut or longer."""
    infos = [
        (
            f"t{i}",
            tuple(random.choice((1, 2, 32, 256)) for _ in range(random.randint(1, 3))),
            random.choice((0, 1, 8, 12)),
            i * 4096,
        )
        for i in range(random.randint(0, 6))
    ]
    keys = [
        ARCH.replace(b"ltxv", b"wan!"),
        key("general.alignment", 4, struct.pack("<I", 32)),
        key("k.list", 9, struct.pack("<IQ3f", 6, 3, 1, 2, 3)),
        key("k.texts", 9, struct.pack("<IQ", 8, 2) + text("a") + text("bc")),
        key("comfy.gguf.orig_shape.t0", 9, struct.pack("<IQ2i", 5, 2, 1, 32)),
    ]
    chosen = random.sample(keys, random.randint(0, len(keys)))
    data = bytearray(header(infos, b"".join(chosen), len(chosen)))
    for _ in range(random.randint(0, 3)):
        at, size = random.randrange(len(data)), random.choice((1, 4, 8))
        number = random.choice((0, 1, 2**8 - 1, 2**16, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1))
        data[at : at + size] = (number % 2 ** (8 * size)).to_bytes(size, "little")
    if random.random() < 0.2:
        del data[random.randrange(len(data)) :]
    return bytes(data) + bytes(random.choice((0, 31, 30_000)))


@fuzz(10_000)
def test_damaged_headers(tmp_path: Path, count: int) -> None:
    path, refused = tmp_path / "x.gguf", 0
    with peak(64), untouched(tmp_path, path):
        for random in seeds("gguf", count):
            path.write_bytes(mutated(random))
            refused += refuses(lambda: safetensors.read_headers([path]))
    assert 0.3 * count < refused < count


def vocabulary() -> bytes:
    """A header with the tiny sentencepiece model's words."""
    words = _parse((Path(__file__).parents[1] / "data" / "tiny_spiece.model").read_bytes())
    texts, scores, types = zip(*words.pieces, strict=True)
    count = len(texts)
    keys = [
        key("tokenizer.ggml.model", 8, text("t5")),
        key("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, count) + b"".join(map(text, texts))),
        key("tokenizer.ggml.scores", 9, struct.pack(f"<IQ{count}f", 6, count, *scores)),
        key("tokenizer.ggml.token_type", 9, struct.pack(f"<IQ{count}i", 5, count, *types)),
        key("tokenizer.ggml.unknown_token_id", 4, struct.pack("<I", words.unknown)),
        key("tokenizer.ggml.precompiled_charsmap", 9, struct.pack("<IQ", 0, len(words.table)) + words.table),
    ]
    return header([], b"".join(keys), len(keys))


@fuzz(2_000, fast=100)
def test_damaged_vocabularies(tmp_path: Path, count: int) -> None:
    path, whole, refused = tmp_path / "x.gguf", vocabulary(), 0
    path.write_bytes(whole)
    assert read_tokenizer(path)(["a red circle"])[0].shape[0] == 1
    with peak(64), untouched(tmp_path, path):
        for random in seeds("vocabulary", count):
            path.write_bytes(damaged(whole, random))
            refused += refuses(lambda: read_tokenizer(path)(["a red circle"]))
    assert 0.2 * count < refused < count
