"""The block formats of GGUF files."""

from __future__ import annotations

from collections.abc import Mapping

from fastvid.ops.formats import Format

FORMATS: Mapping[str, Format] = {}
