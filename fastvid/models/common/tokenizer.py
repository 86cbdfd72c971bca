"""Prompts to token ids to embeddings, as diffusers' WanPipeline makes them, without transformers.

Shapes: B prompts, L tokens, d width of the text encoder.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from fastvid.errors import CheckpointError
from fastvid.models.common.config_reader import read_json
from fastvid.models.common.spiece import PAD, read_spiece

MAX_TEXT_LENGTH = 512  # rows of text that Wan was trained with


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
        return cls(inner, MAX_TEXT_LENGTH, inner.token_to_id(PAD))

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
