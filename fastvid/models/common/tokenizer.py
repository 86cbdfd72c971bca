"""Prompts to token ids to embeddings, as diffusers' WanPipeline makes them, without transformers.

A tokenizer is a folder, or a sentencepiece model (unigram): ComfyUI's text encoders carry theirs as a tensor of bytes,
`spiece_model`; google/umt5-xxl has it as spiece.model.

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
from tokenizers import Encoding, Tokenizer
from tokenizers.models import Unigram
from torch import Tensor, nn

from fastvid.errors import CheckpointError
from fastvid.files import read_bytes, reason
from fastvid.models.common.config_reader import read_json
from fastvid.models.common.sentencepiece import PAD, Vocabulary, build, read_spiece
from fastvid.models.common.tokenizer_checks import check_bytes, check_parts, library_errors

MAX_TEXT_LENGTH = 512  # rows of text that Wan was trained with
MAX_TOKENIZER = 40_000_000  # bytes of a tokenizer.json; umt5-xxl's has 17 MB, Gemma's 33 MB
UNKNOWN = ("<unk>", "[UNK]")
PUNCTUATION = ".,;:!?()[]{}\"'“”‘’…"


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer: at most text_length tokens a prompt, pad_id where there are fewer. source: the file it is from."""

    inner: Tokenizer
    text_length: int
    pad_id: int
    source: str

    @classmethod
    def from_spiece(cls, data: bytes, source: str) -> TextTokenizer:
        """Of a sentencepiece model, which says nothing of lengths: 512 tokens, as Wan was trained with.

        Raises CheckpointError, with `source` in front, for bytes that are none.
        """
        return cls._of_pieces(read_spiece(data, source), source)

    @classmethod
    def from_vocabulary(cls, vocabulary: Vocabulary, source: str) -> TextTokenizer:
        """Of what such a model holds. Raises CheckpointError as `from_spiece` does."""
        return cls._of_pieces(build(vocabulary, source), source)

    @classmethod
    def _of_pieces(cls, inner: Tokenizer, source: str) -> TextTokenizer:
        inner.enable_truncation(MAX_TEXT_LENGTH)
        pad_id = inner.token_to_id(PAD)
        assert pad_id is not None, source  # a model without it is refused
        return cls(inner, MAX_TEXT_LENGTH, pad_id, source)

    @classmethod
    def from_folder(cls, folder: Path) -> TextTokenizer:
        """Read tokenizer.json and tokenizer_config.json; CheckpointError if they are missing or broken.

        text_length is model_max_length, at most 512.
        """
        config = read_json(folder / "tokenizer_config.json")
        text_length = _text_length(config.get("model_max_length"), folder)
        path = folder / "tokenizer.json"
        inner = _read_tokenizer(path, text_length, config.get("truncation_side", "right"))
        return cls(inner, text_length, _pad_id(inner, config.get("pad_token", "<pad>"), path), str(path))

    def unknown_words(self, prompt: str) -> list[str]:
        """The words of a prompt, as far as it is read, of which a part is no token."""
        text = clean_prompt(prompt)
        unknown = {number for token in UNKNOWN if (number := self.inner.token_to_id(token)) is not None}
        encoding = self._encode([text])[0]
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
        encoding = self._encode([text])[0]
        if not encoding.overflowing:
            return ""
        return text[max((stop for _, stop in encoding.offsets), default=0) :].strip()

    @property
    def largest_id(self) -> int:
        """Of all tokens, also those that were added."""
        if isinstance(self.inner.model, Unigram):  # ids without gaps; UMT5's 256,300 tokens would take long to list
            return self.inner.get_vocab_size(with_added_tokens=True) - 1
        return max(self.inner.get_vocab(with_added_tokens=True).values(), default=0)

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and mask (1: a token, 0: padding), int64 [B, L]; L is that of the longest prompt."""
        rows = [encoding.ids for encoding in self._encode([clean_prompt(prompt) for prompt in prompts])]
        length = max(map(len, rows))
        ids = torch.tensor([row + [self.pad_id] * (length - len(row)) for row in rows])
        return ids, torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])

    def _encode(self, texts: list[str]) -> list[Encoding]:
        with library_errors(f"{self.source}: the tokenizer cannot read {texts[0][:80]!r}"):
            return self.inner.encode_batch(texts)


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
            f"{folder / 'tokenizer_config.json'}: model_max_length is {value!r:.80}, not a positive number"
        )
    return MAX_TEXT_LENGTH if value is None else int(min(value, MAX_TEXT_LENGTH))


def _read_tokenizer(path: Path, text_length: int, truncation_side: object) -> Tokenizer:
    try:
        data = read_bytes(path, MAX_TOKENIZER)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path} is not a tokenizer: {reason(error)}") from None
    with library_errors(f"{path} is not a tokenizer"):
        check_bytes(data)
        inner = Tokenizer.from_buffer(data)
        check_parts(inner)
        inner.no_padding()
        inner.enable_truncation(text_length, direction=truncation_side)
        inner.encode("a")
    return inner


def _pad_id(inner: Tokenizer, pad_token: object, path: Path) -> int:
    # A token is a string, or in older files an object that describes one.
    content = pad_token.get("content") if isinstance(pad_token, dict) else pad_token
    is_text = isinstance(content, str) and not any("\ud800" <= letter <= "\udfff" for letter in content)
    pad_id = inner.token_to_id(str(content)) if is_text else None
    if pad_id is None:
        raise CheckpointError(f"{path} has no token {content!r:.80}, which tokenizer_config.json names as pad_token")
    return pad_id
