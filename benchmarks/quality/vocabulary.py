"""The embedded model's tokenizer: whole words, lower case, `</s>` at the end, 16 rows of text."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from fastvid.benchmarks.quality.clips import BACKGROUNDS, COLOURS, MOTIONS, SHAPES

TEXT_LENGTH = 16


def words() -> list[str]:
    """Every word a caption can hold, in a fixed order."""
    names = [*COLOURS, *SHAPES, *(w for motion in MOTIONS for w in motion.split()), *BACKGROUNDS]
    return list(dict.fromkeys(["a", "on", "background", *names]))


def write(folder: Path) -> Tokenizer:
    """Writes tokenizer.json and tokenizer_config.json; returns the tokenizer."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": TEXT_LENGTH,
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "padding_side": "right",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return tokenizer


def encode(tokenizer: Tokenizer, caption: str) -> list[int]:
    """Token ids of a caption, `</s>` last, at most TEXT_LENGTH."""
    ids = tokenizer.encode(caption).ids
    return ids if len(ids) <= TEXT_LENGTH else [*ids[: TEXT_LENGTH - 1], 1]
