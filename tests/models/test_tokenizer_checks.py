"""Tokenizers that make the library panic, hang or grow are refused; what passes the checks does none of it."""

from __future__ import annotations

import base64
import json
import struct
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest
from mutations import damaged, fuzz, peak, refuses, seeds
from tokenizers import Regex, Tokenizer, models, normalizers

from fastvid.errors import CheckpointError
from fastvid.loaders.checkpoint import open_checkpoint
from fastvid.models.common.sentencepiece import MAX_PIECES, MAX_SPIECE, _parse, read_spiece
from fastvid.models.common.tokenizer import TextTokenizer
from fastvid.models.common.tokenizer_checks import check_charsmap, is_bounded, library_errors

SPIECE = (Path(__file__).parents[1] / "data" / "tiny_spiece.model").read_bytes()
TABLE = _parse(SPIECE).table
TEXTS = ["a red circle", "ﬁ ½ Ⅷ ｱ ㍿ é e\u0301 \u200b\u3000x", "".join(map(chr, range(1, 0x3000, 7))), "日本語 😀"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = open_checkpoint("embedded").folder / "tokenizer"
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def change(folder: Path, **values: Any) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def charsmap(data: bytes) -> dict[str, Any]:
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


def template(**values: Any) -> dict[str, Any]:
    return {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}, **values}


def replace(pattern: str, content: str = "x") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


BROKEN = [
    {"normalizer": charsmap(b"")},
    {"normalizer": charsmap(b"\0\1\0\0")},
    {"normalizer": charsmap(struct.pack("<II", 4, 2**32 - 1) + b"abc\0")},
    {"normalizer": {"type": "Sequence", "normalizers": [charsmap(TABLE[:-1])]}},
    {"normalizer": charsmap(TABLE[:4] + bytes(len(TABLE) - 4)[:-1] + b"a")},
    {"post_processor": template(single=[{"SpecialToken": {"id": "nope", "type_id": 0}}])},
    {"post_processor": template(single=[{"Sequence": {"id": "A", "type_id": 0}}] * 1000)},
    {"normalizer": replace("(a+)+$")},
    {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a|a)*b"}, "behavior": "Isolated", "invert": False}},
    {"normalizer": {"type": "Sequence", "normalizers": [replace("a", "aa")] * 20}},
    {"normalizer": {"type": "Prepend", "prepend": "a" * 10_000}},
    {"normalizer": {"type": "Sequence", "normalizers": [{"type": "ByteLevel"}] * 40}},
    {"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 7}},
    {"model": None},
    {"normalizer": replace("(")},
]


@pytest.mark.parametrize("values", BROKEN, ids=range(len(BROKEN)))
def test_what_would_panic_is_refused_without_a_panic(
    folder: Path, values: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    change(folder, **values)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a tokenizer"):
        TextTokenizer.from_folder(folder)
    assert "panicked" not in capfd.readouterr().err


def test_a_panic_is_a_checkpoint_error(folder: Path) -> None:
    """Also one that nobody has thought of, while a prompt is read."""
    tokenizer = TextTokenizer.from_folder(folder)
    tokenizer.inner.normalizer = normalizers.Replace(Regex("(a+)+$"), "x")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: the tokenizer cannot read 'aaa.*retry-limit"):
        tokenizer(["a" * 40 + "!"])
    with pytest.raises(KeyboardInterrupt), library_errors("x"):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("pattern", "good"),
    [
        (" {2,}", True),
        (r"\s+", True),
        (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", True),  # GPT-2
        (r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+", True),  # Qwen
        (r"(a)[*+?](b)|\)\+", True),
        ("(a+)+$", False),
        ("(a|a){23}b", False),
        (".*.*.*x", False),
        (".{0,200}.{0,200}.{0,200}x", False),
        ("a{1,2}{1,2}", False),
        ("a{5000}", False),
        (r"(a)\1", False),
        (r"(?<n>a\g<n>?)", False),
        ("(?x)(a+) +", False),
        ("(?~a)", False),
        ("(a*|b)(c*|d)(e*|f)", False),
        ("x" * 3000, False),
    ],
)
def test_regular_expressions(pattern: str, good: bool) -> None:
    assert is_bounded(pattern) == good


ATOMS = [
    "a",
    ".",
    "[ab]",
    r"\w",
    "(?:a|b)",
    "(?=a)",
    "a*",
    "a+",
    ".*",
    ".{0,90}",
    "[ab]?",
    "(a*)",
    "|",
    "b",
    r"\s+",
    "(.+|a)",
]


@fuzz(2_000)
def test_what_is_bounded_is_quick(count: int) -> None:
    texts = ["a" * 500 + "!", "ab" * 250, " a" * 250]
    passed = 0
    for random in seeds("patterns", count):
        pattern = "".join(random.choice(ATOMS) for _ in range(random.randint(1, 6))) + random.choice(
            ("", "!", "$", "+")
        )
        try:
            regex = Regex(pattern)
        except Exception:  # the library raises bare Exceptions
            continue
        if not is_bounded(pattern):
            continue
        passed += 1
        start = time.process_time()
        with_pattern = normalizers.Replace(regex, "x")
        for text in texts:
            with_pattern.normalize_str(text)
        assert time.process_time() - start < 1, pattern
    assert 0.1 * count < passed < count


# ---------------------------------------------------------------- tables of characters


def test_a_published_table_passes() -> None:
    check_charsmap(TABLE)
    normalizers.Precompiled(TABLE).normalize_str(TEXTS[1])


@fuzz(5_000)
def test_a_table_that_passes_does_not_panic(count: int) -> None:
    passed = 0
    for random in seeds("tables", count):
        table = bytearray(TABLE)
        for _ in range(random.choice((1, 3, 20))):  # in the trie, whose units near the root are the ones in use
            at = 4 * random.randrange(1, random.choice((300, len(table) // 4)))
            table[at : at + 4] = random.choice(
                (random.randbytes(4), bytes(4), struct.pack("<I", random.getrandbits(31)))
            )
        data = bytes(table) if random.random() < 0.8 else damaged(bytes(table), random)
        try:
            check_charsmap(data)
        except ValueError:
            continue
        passed += 1
        normalizer = normalizers.Precompiled(data)
        for text in TEXTS:
            assert len(normalizer.normalize_str(text)) < 300 * len(text)
    assert 0.05 * count < passed < count


# ---------------------------------------------------------------- sentencepiece


def varint(value: int) -> bytes:
    made = b""
    while value > 127:
        made, value = made + bytes([value & 127 | 128]), value >> 7
    return made + bytes([value])


def field(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def piece(text: str, score: float = -1.0, kind: int = 1) -> bytes:
    return field(1, field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + b"\x18" + varint(kind))


BASE = piece("<pad>", 0, 3) + piece("</s>", 0, 3) + piece("<unk>", 0, 2)


@pytest.mark.parametrize(
    "data",
    [
        b"\x20\x00" * 8_000_000,
        b"\x0a\x00" * 8_000_000,
        b"\x00" * MAX_SPIECE,
        b"\x0a\x00" * (MAX_PIECES + 1),
        field(1, b"\x18\x01" * 1_000_000),
        BASE + field(2, b"\x18\x01" * 1_000_000),
        b"\x80" * 1_000_000,
        BASE + piece("a", float("nan")),
        BASE + piece("a", float("inf")),
        BASE + field(2, b"\xc0\x02\x63"),  # <unk> is number 99
        BASE + field(3, field(2, b"\0\1\0\0")),
        BASE + b"\x0a\xff\xff\xff\xff\x7f",
        BASE[:-1],
        b"",
    ],
    ids=range(14),
)
def test_what_is_no_sentencepiece_model(data: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    with peak(64):
        assert refuses(lambda: read_spiece(data, "spiece.model"))
    with pytest.raises(CheckpointError, match=r"spiece\.model is no sentencepiece model"):
        read_spiece(data, "spiece.model")
    assert "panicked" not in capfd.readouterr().err


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    from fastvid.loaders.find import read_tokenizer

    with (tmp_path / "spiece.model").open("wb") as file:
        file.truncate(MAX_SPIECE + 1)
    with peak(8):
        assert refuses(lambda: read_tokenizer(tmp_path))


@pytest.mark.slow
def test_a_model_as_large_as_the_published_ones(tmp_path: Path) -> None:
    """256,000 pieces in 5 MB, and a tokenizer.json of 20 MB."""
    random = Random(0)
    words = {"".join(random.choices("abcdefghijklmnop", k=random.randint(5, 12))) for _ in range(300_000)}
    pieces = [piece(word, -random.random() * 20) for word in sorted(words)[:256_000]]
    tokenizer = read_spiece(BASE + piece("▁") + b"".join(pieces) + field(3, field(2, TABLE)), "spiece.model")
    assert tokenizer.get_vocab_size() == 256_004
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 512, "pad_token": "<pad>"}')
    read = TextTokenizer.from_folder(tmp_path)
    assert read(["abc def"])[0].tolist() == [tokenizer.encode("abc def").ids]


@fuzz(5_000)
def test_damaged_sentencepiece_models(count: int) -> None:
    refused = 0

    def read() -> None:
        TextTokenizer.from_spiece(data, "spiece.model")(["a red circle"])

    with peak(64):
        for random in seeds("spiece", count):
            data = damaged(SPIECE, random)
            refused += refuses(read)
    assert 0.1 * count < refused < count


def test_a_word_tokenizer_of_anybody_is_read(tmp_path: Path) -> None:
    inner = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "a": 2}, unk_token="<unk>"))
    inner.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert TextTokenizer.from_folder(tmp_path)(["a"])[0].tolist() == [[2]]
