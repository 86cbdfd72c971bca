"""Back ends of `linear_quantized`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastvid.ops import reference

BACKENDS: Mapping[str, Mapping[str, Callable[..., Any]]] = {
    "linear_quantized": {"reference": reference.linear_quantized},
}
