"""Reads GGUF files: their headers, with each quantized tensor as one entry."""

from __future__ import annotations

from pathlib import Path

from fastvid.errors import CheckpointError
from fastvid.loaders.entries import Entry

SUFFIX = ".gguf"


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """(name -> entry of every tensor, the texts of the metadata) of a GGUF file."""
    raise CheckpointError(f"{path} is a GGUF file, which is not read yet; take the fp16 or bf16 file")
