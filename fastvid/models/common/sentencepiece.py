"""Reads sentencepiece models (unigram) as the tokenizer that transformers makes of T5's.

A model is a protocol buffer, of which little is needed (sentencepiece `src/sentencepiece_model.proto`):

    ModelProto      1: pieces, each {1: text, 2: score (float), 3: type}   2: TrainerSpec   3: NormalizerSpec
    TrainerSpec     3: model type (1: unigram)   40: id of <unk>
    NormalizerSpec  2: compiled table of characters
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram

from fastvid.models.common.tokenizer_checks import check_charsmap, library_errors

# umt5-xxl's has 256,384 pieces in 4.5 MB.
MAX_SPIECE = 1 << 24  # bytes
MAX_PIECES = 1 << 19
MAX_FIELDS = 1 << 16  # of the TrainerSpec and the NormalizerSpec
BYTES = 2  # the kind of a field that holds text, bytes or fields
PAD, EOS = "<pad>", "</s>"
UNIGRAM, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
SPACE = "▁"


@dataclass(frozen=True)
class Vocabulary:
    """What a unigram model holds: pieces as (text, score, type), the number of <unk>, the table of characters."""

    pieces: list[tuple[str, float, int]]
    unknown: int
    table: bytes


def read_spiece(data: bytes, source: str) -> Tokenizer:
    """The tokenizer of a sentencepiece model, which puts </s> behind every text.

    Raises CheckpointError, with `source` in front, for bytes that are none, and for one that is not unigram or lacks
    the tokens that T5 needs. Ids are those of the file: the 300 <extra_id_*> behind them are not made.
    """
    with library_errors(f"{source} is no sentencepiece model that can be used"):
        return _build(_parse(data))


def build(vocabulary: Vocabulary, source: str) -> Tokenizer:
    """The tokenizer of a vocabulary that was read from elsewhere; unused pieces at its end are left out."""
    pieces = list(vocabulary.pieces)
    while pieces and pieces[-1][2] == UNUSED:
        pieces.pop()
    with library_errors(f"{source} holds no vocabulary that can be used"):
        if not all(math.isfinite(score) for _, score, _ in pieces):
            raise ValueError("a piece with a score that is not finite")
        return _build(replace(vocabulary, pieces=pieces))


def _build(vocabulary: Vocabulary) -> Tokenizer:
    pieces, unknown, table = vocabulary.pieces, vocabulary.unknown, vocabulary.table
    ids = {text: i for i, (text, _, _) in enumerate(pieces)}
    if not 0 <= unknown < len(pieces):
        raise ValueError(f"its <unk> is number {unknown} of {len(pieces)} pieces")
    if missing := [token for token in (PAD, EOS) if token not in ids]:
        raise ValueError(f"it has no piece {' and no '.join(missing)}")
    if table:
        check_charsmap(table)
    tokenizer = Tokenizer(Unigram([(text, score) for text, score, _ in pieces], unk_id=unknown, byte_fallback=False))
    added = [(text, kind) for text, _, kind in pieces if kind in (CONTROL, USER_DEFINED)]
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=kind == CONTROL) for text, kind in added])
    steps: list[normalizers.Normalizer] = [normalizers.Precompiled(table)] if table else []
    steps += [normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), SPACE)]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, ids[EOS])])
    return tokenizer


def _parse(data: bytes) -> Vocabulary:
    pieces, model_type, unknown, table = [], UNIGRAM, 0, b""
    if len(data) > MAX_SPIECE:
        raise ValueError(f"{len(data):,} bytes; at most {MAX_SPIECE:,} are read")
    for number, kind, value in _fields(data, MAX_PIECES):
        if kind != BYTES or number == 0:
            raise ValueError(f"a field {number} of kind {kind}")
        if number == 1:
            pieces.append(_piece(value))
        elif number == 2:
            trainer = {inner: one for inner, _, one in _fields(value, MAX_FIELDS)}
            model_type, unknown = trainer.get(3, UNIGRAM), trainer.get(40, 0)
        elif number == 3:
            table = {inner: one for inner, _, one in _fields(value, MAX_FIELDS)}.get(2, b"")
    if not pieces:
        raise ValueError("it has no pieces")
    if model_type != UNIGRAM:
        raise ValueError(f"its type is {model_type}; only unigram ({UNIGRAM}) is supported")
    return Vocabulary(pieces, unknown, table)


def _piece(data: bytes) -> tuple[str, float, int]:
    piece = {number: value for number, _, value in _fields(data, 4)}
    score = struct.unpack("<f", piece.get(2, bytes(4)))[0]
    if not math.isfinite(score):
        raise ValueError(f"a piece with the score {score}")
    return piece[1].decode(), score, piece.get(3, 1)


def _fields(data: bytes, most: int) -> Iterator[tuple[int, int, Any]]:
    """(number, kind, value) of each field: a whole number, or bytes. Raises ValueError for more than `most`."""
    at = 0
    value: int | bytes
    for _ in range(most):
        if at >= len(data):
            return
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
        elif kind in (1, BYTES, 5):
            size, at = _varint(data, at) if kind == BYTES else ({1: 8, 5: 4}[kind], at)
            value, at = data[at : at + size], at + size
        else:
            raise ValueError(f"a field of kind {kind} at byte {at}")
        if at > len(data):
            raise ValueError("it ends within a field")
        yield key >> 3, kind, value
    if at < len(data):
        raise ValueError(f"more than {most} fields in one")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A whole number of variable length, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("it ends within a number")
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise ValueError("a number of more than ten bytes")
