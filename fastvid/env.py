"""All environment variables that fastvid reads at run time (setup.py also reads FASTVID_BUILD_CUDA and
FASTVID_CUDA_ARCHS when it builds). They are defaults; arguments and flags win. fastvid never sets a variable.

    FASTVID_MODEL      the default model: "embedded", a folder or a hub id
    FASTVID_DEVICE     "cpu", "cuda", "cuda:1"
    FASTVID_DTYPE      "float32", "bfloat16", "float16"
    FASTVID_BACKEND    as in fastvid.ops.dispatch.bind: "auto", "reference", "triton", "cuda", or "to_rgb=cuda"
    FASTVID_ATTENTION  the same for attention, also "sdpa", "flash", "cuda_fp8" and "cuda_int8"
    FASTVID_PROMPT_ENDPOINT  endpoint for prompt expansion (fastvid.requests.prompts): "http://localhost:8000/v1"
    FASTVID_PROMPT_MODEL     the language model's name at the endpoint
    FASTVID_PROMPT_KEY       the endpoint's key; never in an error, a report or a recipe
    FASTVID_LOG        the command line's log level, on standard error: "debug", "info", "warning", "error"
    FASTVID_DEBUG      any value: the command line shows tracebacks
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

PREFIX = "FASTVID_"
BUILD_TIME = ("FASTVID_BUILD_CUDA", "FASTVID_CUDA_ARCHS")


@dataclass(frozen=True)
class Settings:
    """The values of the environment variables; None or a default where unset."""

    model: str = "embedded"
    device: str | None = None
    dtype: str | None = None
    backend: str = "auto"
    attention: str = "auto"
    prompt_endpoint: str | None = None
    prompt_model: str | None = None
    prompt_key: str | None = field(default=None, repr=False)
    log: str | None = None
    debug: str | None = None


def read(environ: Mapping[str, str] = os.environ) -> Settings:
    """Reads the settings; an empty variable counts as unset."""
    values = {field.name: environ.get(PREFIX + field.name.upper()) for field in fields(Settings)}
    return Settings(**{name: value for name, value in values.items() if value})


def unknown(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Variables with fastvid's prefix that nothing reads, most likely misspelled."""
    known = {PREFIX + field.name.upper() for field in fields(Settings)} | set(BUILD_TIME)
    return [name for name in all_set(environ) if name not in known]


def all_set(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """All variables with fastvid's prefix, known or not; the values of keys are hidden."""
    variables = {name: value for name, value in sorted(environ.items()) if name.startswith(PREFIX)}
    return {name: "(hidden)" if name.endswith("_KEY") and value else value for name, value in variables.items()}
