"""A sentencepiece model (unigram) as a tokenizer of the `tokenizers` library, made as transformers makes T5's from it.

ComfyUI's text encoders carry theirs as a tensor of bytes, `spiece_model`; google/umt5-xxl has it as spiece.model. The
file is a protocol buffer, of which little is needed (sentencepiece `src/sentencepiece_model.proto`):

    ModelProto      1: pieces, each {1: text, 2: score (float), 3: type}   2: TrainerSpec   3: NormalizerSpec
    TrainerSpec     3: model type (1: unigram)   40: id of <unk>
    NormalizerSpec  2: compiled table of characters
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram

from fastvid.errors import CheckpointError

PAD, EOS = "<pad>", "</s>"
UNIGRAM, CONTROL, USER_DEFINED = 1, 3, 4
SPACE = "▁"


def read_spiece(data: bytes, source: str) -> Tokenizer:
    """The tokenizer of a sentencepiece model, which puts </s> behind every text.

    Raises CheckpointError, with `source` in front, for bytes that are none, and for one that is not unigram or lacks
    the tokens that T5 needs. Ids are those of the file: the 300 <extra_id_*> behind them are not made.
    """
    try:
        pieces, model_type, unknown, table = _parse(data)
        tokenizer = _build(pieces, model_type, unknown, table)
    except Exception as error:  # the library raises bare Exceptions
        raise CheckpointError(f"{source} is no sentencepiece model that can be used: {error}") from None
    return tokenizer


def _build(pieces: list[tuple[str, float, int]], model_type: int, unknown: int, table: bytes) -> Tokenizer:
    ids = {text: i for i, (text, _, _) in enumerate(pieces)}
    if model_type != UNIGRAM:
        raise ValueError(f"its type is {model_type}; only unigram ({UNIGRAM}) is supported")
    if missing := [token for token in (PAD, EOS) if token not in ids]:
        raise ValueError(f"it has no piece {' and no '.join(missing)}")
    tokenizer = Tokenizer(Unigram([(text, score) for text, score, _ in pieces], unk_id=unknown, byte_fallback=False))
    added = [(text, kind) for text, _, kind in pieces if kind in (CONTROL, USER_DEFINED)]
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=kind == CONTROL) for text, kind in added])
    steps = [normalizers.Precompiled(table)] if table else []
    steps += [normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), SPACE)]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, ids[EOS])])
    return tokenizer


def _parse(data: bytes) -> tuple[list[tuple[str, float, int]], int, int, bytes]:
    """(pieces as (text, score, type), the model's type, the id of <unk>, the table of characters)."""
    pieces, model_type, unknown, table = [], UNIGRAM, 0, b""
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(value))
            pieces.append((piece[1].decode(), struct.unpack("<f", piece.get(2, bytes(4)))[0], piece.get(3, 1)))
        elif number == 2:
            trainer = dict(_fields(value))
            model_type, unknown = trainer.get(3, UNIGRAM), trainer.get(40, 0)
        elif number == 3:
            table = dict(_fields(value)).get(2, b"")
    if not pieces:
        raise ValueError("it has no pieces")
    return pieces, model_type, unknown, table


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field: a whole number, or bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
        elif kind in (1, 2, 5):
            size, at = _varint(data, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
            value, at = data[at : at + size], at + size
        else:
            raise ValueError(f"a field of kind {kind} at byte {at}")
        if at > len(data):
            raise ValueError("it ends within a field")
        yield key >> 3, value


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
