"""Formats with a scale for each block of weights along K."""

from __future__ import annotations

from collections.abc import Mapping

from fastvid.ops.formats import Format

FORMATS: Mapping[str, Format] = {}
