"""Prompts to token ids to embeddings, as diffusers' WanPipeline makes them, without transformers.

A tokenizer is a folder, or a sentencepiece model (unigram): ComfyUI's text encoders carry theirs as a tensor of bytes,
`spiece_model`; google/umt5-xxl has it as spiece.model. The latter becomes what transformers makes of T5's. It is a
protocol buffer, of which little is needed (sentencepiece `src/sentencepiece_model.proto`):

    ModelProto      1: pieces, each {1: text, 2: score (float), 3: type}   2: TrainerSpec   3: NormalizerSpec
    TrainerSpec     3: model type (1: unigram)   40: id of <unk>
    NormalizerSpec  2: compiled table of characters

Shapes: B prompts, L tokens, d width of the text encoder.
"""

from __future__ import annotations

import html
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram
from torch import Tensor, nn

from fastvid.errors import CheckpointError
from fastvid.models.common.config_reader import read_json

MAX_TEXT_LENGTH = 512  # rows of text that Wan was trained with
PAD, EOS = "<pad>", "</s>"
UNKNOWN = ("<unk>", "[UNK]")
PUNCTUATION = ".,;:!?()[]{}\"'“”‘’…"
UNIGRAM, CONTROL, USER_DEFINED = 1, 3, 4
SPACE = "▁"


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer: at most text_length tokens a prompt, pad_id where there are fewer."""

    inner: Tokenizer
    text_length: int
    pad_id: int

    @classmethod
    def from_spiece(cls, data: bytes, source: str) -> TextTokenizer:
        """Of a sentencepiece model, which says nothing of lengths: 512 tokens, as Wan was trained with.

        Raises CheckpointError, with `source` in front, for bytes that are none.
        """
        inner = read_spiece(data, source)
        inner.enable_truncation(MAX_TEXT_LENGTH)
        pad_id = inner.token_to_id(PAD)
        assert pad_id is not None, source  # read_spiece refuses a model without it
        return cls(inner, MAX_TEXT_LENGTH, pad_id)

    @classmethod
    def from_folder(cls, folder: Path) -> TextTokenizer:
        """Read tokenizer.json and tokenizer_config.json; CheckpointError if they are missing or broken.

        text_length is model_max_length, at most 512.
        """
        config = read_json(folder / "tokenizer_config.json")
        text_length = _text_length(config.get("model_max_length"), folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        try:
            inner = Tokenizer.from_file(str(path))
            inner.no_padding()
            inner.enable_truncation(text_length, direction=config.get("truncation_side", "right"))
        except Exception as error:  # the library raises bare Exceptions
            raise CheckpointError(f"{path} is not a tokenizer: {error}") from None
        return cls(inner, text_length, _pad_id(inner, config.get("pad_token", "<pad>"), path))

    def unknown_words(self, prompt: str) -> list[str]:
        """The words of a prompt, as far as it is read, of which a part is no token."""
        text = clean_prompt(prompt)
        unknown = {number for token in UNKNOWN if (number := self.inner.token_to_id(token)) is not None}
        encoding = self.inner.encode(text)
        found = [span for number, span in zip(encoding.ids, encoding.offsets, strict=True) if number in unknown]
        words = [
            word[0].strip(PUNCTUATION) or word[0]
            for word in re.finditer(r"\S+", text)
            if any(start < word.end() and stop > word.start() for start, stop in found)
        ]
        return list(dict.fromkeys(words))

    def words(self) -> list[str]:
        """All words of a small vocabulary; none of one of more than a hundred tokens."""
        if self.inner.get_vocab_size() > 100:
            return []
        tokens = sorted(self.inner.get_vocab().items(), key=lambda token: token[1])
        return [token for token, _ in tokens if token.isalpha()]

    def dropped(self, prompt: str) -> str:
        """The end of a prompt that is not read, since the model takes text_length tokens; "" if it is read whole."""
        text = clean_prompt(prompt)
        encoding = self.inner.encode(text)
        if not encoding.overflowing:
            return ""
        return text[max((stop for _, stop in encoding.offsets), default=0) :].strip()

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and mask (1: a token, 0: padding), int64 [B, L]; L is that of the longest prompt."""
        rows = [encoding.ids for encoding in self.inner.encode_batch([clean_prompt(prompt) for prompt in prompts])]
        length = max(map(len, rows))
        ids = torch.tensor([row + [self.pad_id] * (length - len(row)) for row in rows])
        return ids, torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])


def clean_prompt(prompt: str) -> str:
    """Mend mis-decoded text, undo HTML escapes (also double ones), and make every run of white space one space."""
    if not (prompt.isascii() and prompt.isprintable() and "&" not in prompt):  # else there is nothing to mend
        import ftfy  # slow to import, and seldom needed

        prompt = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", prompt).strip()


def encode_prompt(
    text_encoder: nn.Module, tokenizer: TextTokenizer, prompts: Sequence[str], text_length: int | None = None
) -> Tensor:
    """Embeddings of prompts, with rows of zeros after the last token: [B, text_length, d].

    text_length is the tokenizer's when None, and never less. The encoder sees the tokens of the longest prompt, not
    text_length rows: padding is masked there, and what comes out of it is replaced by zeros, so the result is the same
    for a fraction of the work.
    """
    rows = tokenizer.text_length if text_length is None else text_length
    if rows < tokenizer.text_length:
        raise ValueError(f"text_length is {rows}; this tokenizer makes up to {tokenizer.text_length} tokens")
    device = next(text_encoder.parameters()).device
    ids, mask = (tensor.to(device) for tensor in tokenizer(prompts))
    embeds = text_encoder(ids, mask).masked_fill(mask.unsqueeze(-1) == 0, 0)
    return F.pad(embeds, (0, 0, 0, rows - embeds.shape[1]))


def _text_length(value: object, folder: Path) -> int:
    # Files written without a limit hold 1e30 (as an integer or a float).
    if isinstance(value, bool) or not isinstance(value, int | float | None) or (value is not None and not value >= 1):
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'}: model_max_length is {value!r}, not a positive number"
        )
    return MAX_TEXT_LENGTH if value is None else int(min(value, MAX_TEXT_LENGTH))


def _pad_id(inner: Tokenizer, pad_token: object, path: Path) -> int:
    # A token is a string, or in older files an object that describes one.
    content = pad_token.get("content") if isinstance(pad_token, dict) else pad_token
    pad_id = inner.token_to_id(content) if isinstance(content, str) else None
    if pad_id is None:
        raise CheckpointError(f"{path} has no token {content!r}, which tokenizer_config.json names as padding")
    return pad_id


# ---------------------------------------------------------------- sentencepiece


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
    steps: list[normalizers.Normalizer] = [normalizers.Precompiled(table)] if table else []
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
    value: int | bytes
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
