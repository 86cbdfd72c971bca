"""The environment variables that fastvid reads at run time, all of them here (setup.py reads FASTVID_BUILD_CUDA and
FASTVID_CUDA_ARCHS when it builds). They are defaults: what the caller gives wins. Nothing is ever set.

    FASTVID_MODEL      the model that is loaded when none is named: "embedded", a folder or a hub id
    FASTVID_DEVICE     "cpu", "cuda", "cuda:1"
    FASTVID_DTYPE      "float32", "bfloat16", "float16"
    FASTVID_BACKEND    as in fastvid.ops.dispatch.bind: "auto", "reference", "triton", "cuda", or "to_rgb=cuda"
    FASTVID_ATTENTION  the same for attention, also "sdpa", "flash", "cuda_fp8" and "cuda_int8"
    FASTVID_PROMPT_ENDPOINT  who writes long prompts (fastvid.requests.prompts), such as "http://localhost:8000/v1"
    FASTVID_PROMPT_MODEL     the language model's name there
    FASTVID_PROMPT_KEY       its key; in no error, no report and no recipe
    FASTVID_LOG        what the command line tells of its work on standard error: "debug", "info", "warning", "error"
    FASTVID_DEBUG      anything: the command line shows the traceback of an error
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

PREFIX = "FASTVID_"
BUILD_TIME = ("FASTVID_BUILD_CUDA", "FASTVID_CUDA_ARCHS")


@dataclass(frozen=True)
class Settings:
    """What the environment says; None or the default where it says nothing."""

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
    """The settings of an environment; a variable that is empty counts as not set."""
    given = {field.name: environ.get(PREFIX + field.name.upper()) for field in fields(Settings)}
    return Settings(**{name: value for name, value in given.items() if value})


def unknown(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Variables with fastvid's prefix that nothing reads: misspelt, most likely."""
    known = {PREFIX + field.name.upper() for field in fields(Settings)} | set(BUILD_TIME)
    return [name for name in given(environ) if name not in known]


def given(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """All variables with fastvid's prefix, known or not; of a key only that it is set."""
    found = {name: value for name, value in sorted(environ.items()) if name.startswith(PREFIX)}
    return {name: "(hidden)" if name.endswith("_KEY") and value else value for name, value in found.items()}
