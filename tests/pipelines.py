"""Pipelines of tiny models, and what several tests ask of them."""

from __future__ import annotations

from typing import Any

from fastvid import Pipeline
from fastvid.pipeline.prepare import Prepared, prepare
from fastvid.requests.request import Request


def prepared(pipe: Pipeline, verb: str = "generate", **options: Any) -> Prepared:
    """A request laid out and planned, without running it."""
    return prepare(pipe._model, Request.make(verb, **options))
