"""The LoRAs of a load or a request: their check, and their files by paths that hold in every folder."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from fastvid import checks
from fastvid.checks import guarded, items, path

ALLOWED = 'a list of files, or of (file, scale) such as ("a.safetensors", 0.8), or of (file, scale, "high" or "low")'
_scale = checks.number(-100.0, 100.0)


@guarded(ALLOWED)
def check(name: str, value: Any) -> tuple[Any, ...]:
    """Each LoRA as its path, or as (path, scale) or (path, scale, expert)."""
    given = () if value is None else [value] if checks.is_path(value) else items(name, value, ALLOWED, 1000, least=0)
    return tuple(_lora(f"{name}[{i}]", one) for i, one in enumerate(given))


def check_of_request(name: str, value: Any) -> tuple[Any, ...] | None:
    """The same; None for an empty list, which is the same as none given."""
    return check(name, value) or None


def _lora(name: str, value: Any) -> Any:
    if checks.is_path(value):
        return path(name, value)
    file, scale, *expert = items(name, value, ALLOWED, 3, least=2)
    return path(name, file), _scale(f"{name} scale", scale), *(checks.text(f"{name} expert", one) for one in expert)


def absolute(loras: Iterable[Any]) -> list[Any]:
    """Checked LoRAs with the files that are here by absolute paths; names on the hub stay."""
    return [_absolute(one) if checks.is_path(one) else (_absolute(one[0]), *one[1:]) for one in loras]


def _absolute(file: Any) -> Any:
    return os.path.abspath(file) if os.path.exists(file) else file
