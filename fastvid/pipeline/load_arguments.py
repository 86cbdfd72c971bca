"""The checks of `fastvid.load`'s arguments, before anything is read. `fastvid.load` says what they mean.

`checked` serves `load`, `blueprint`, `inspect`, `Pipeline.set_loras` and the pool.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastvid import checks
from fastvid.checks import Check, guarded, items, one_of, path, refuse, whole
from fastvid.device import cuda_graphs
from fastvid.device.devices import DTYPES, check_device, check_dtype
from fastvid.device.offload import MODES
from fastvid.distributed.cards import check_card
from fastvid.distributed.layout import AUTO, check_parallel
from fastvid.distributed.links import check_link
from fastvid.errors import InvalidRequest
from fastvid.loaders import quantize
from fastvid.loaders.names import BASE, EMBEDDED, PART_NAMES, VACE
from fastvid.models.loaded import SPARSE
from fastvid.models.registry import EXPERTS
from fastvid.models.wan.variants import PUBLISHED
from fastvid.requests import loras
from fastvid.requests.levers import check_attention

MAX_BACKENDS = 1000  # characters
_PARTS = 'names and paths, such as {"vae": "wan_2.1_vae.safetensors"}'
_MODEL = f"{EMBEDDED!r}, a folder, a file, or a hub id such as org/name"
_VARIANT = "the name of a published model, such as wan2.1-i2v-14b-480p"


@guarded(_MODEL)
def model(name: str, value: Any) -> str | Path:
    """Text stays text, which may be a hub's name; a path is only ever a path."""
    if not checks.is_path(value) or not os.fspath(value):
        refuse(name, value, _MODEL)
    plain = path(name, value)
    return plain if isinstance(value, str) else Path(plain)


@guarded(_PARTS)
def parts(name: str, value: Any) -> dict[str, str | Path]:
    if isinstance(value, Mapping) and len(value) == 0:
        return {}
    part, found = one_of(PART_NAMES), dict[str, str | Path]()
    for one, source in checks.entries(name, value, _PARTS, len(PART_NAMES)):
        key = part(name, one)
        for own, path_of in _pair(f"{name}: {key}", key, source):
            if own in found:
                refuse(name, value, f"each part once; {own} is given twice")
            found[own] = path_of
    return found


def _pair(name: str, part: str, source: Any) -> list[tuple[str, str | Path]]:
    """A part's source; two of a transformer or a VACE module are those of the two experts, for high noise and low."""
    pair: tuple[str, str] | None = next((names for names in (EXPERTS, VACE) if names[0] == part), None)
    if pair is None or not checks.is_list(source):
        return [(part, model(name, source))]
    files = items(name, source, "a file, or two for the experts (high noise, low noise)", 2, least=1)
    return [(expert, model(name, one)) for expert, one in zip(pair, files, strict=False)]


@guarded(_VARIANT)
def variant(name: str, value: Any) -> str:
    """The name of a published model."""
    plain = checks.text(name, value).lower()
    return plain if plain in PUBLISHED else refuse(name, value, _VARIANT, checks.nearest_name(plain, PUBLISHED))


@guarded(", ".join((*DTYPES, AUTO)))
def _dtype_or_auto(name: str, value: Any) -> str:
    return AUTO if isinstance(value, str) and str.__str__(value) == AUTO else _dtype(name, value)


def _dtype(name: str, value: Any) -> str:
    return str(check_dtype(name, value)).removeprefix("torch.")


def _backend(name: str, value: Any) -> str:
    plain = checks.text(name, value)
    return plain if len(plain) <= MAX_BACKENDS else refuse(name, plain, f"at most {MAX_BACKENDS} characters")


@guarded("the name of a back end, or sparse")
def _attention(name: str, value: Any) -> str:
    """A back end, or sparse attention for the requests."""
    if isinstance(value, Mapping) or (isinstance(value, str) and value.partition(":")[0].strip() == SPARSE):
        return check_attention(name, value)
    return _backend(name, value)


CHECKS: Mapping[str, Check] = {
    "model": model,
    "device": check_device,
    "dtype": _dtype_or_auto,
    "vae_dtype": _dtype,
    "backend": _backend,
    "attention": _attention,
    "loras": loras.check,
    "offload": one_of((AUTO, *MODES)),
    "parts": parts,
    "max_running": whole(1, 1000),
    "cuda_graphs": cuda_graphs.check,
    "mmap": cuda_graphs.check,
    "parallel": check_parallel,
    "link": check_link,
    "device_memory": whole(0, 1 << 50, " bytes"),
    "card": check_card,
    "variant": variant,
    "quantize": quantize.check,
    "format": quantize.check_format,
    "text_cache": whole(0, 1 << 40, " bytes"),
}
BY_NAME = tuple(name for name in PART_NAMES if name != BASE)
"""Parts that have an argument of their own."""
OPTIONAL: tuple[str, ...] = ("device", "dtype", "vae_dtype", "loras", "parts", "parallel", "device_memory", "card")
OPTIONAL += ("variant", "quantize", "format")
"""Arguments that may be None."""
RUNNING = ("max_running", "text_cache", "mmap")
"""Arguments about how requests run, which no plan depends on."""
TAKEN: Mapping[str, tuple[str, ...]] = {
    "load": tuple(name for name in CHECKS if name not in ("device_memory", "card", "format")),
    "blueprint": tuple(name for name in CHECKS if name not in RUNNING),
    "inspect": ("model", "loras", "parts", "variant", "quantize"),
}
"""The arguments of each function, beside parts by their names."""


def checked(arguments: Mapping[str, Any], function: str = "load") -> dict[str, Any]:
    """The arguments of a function of TAKEN as plain values, files of parts in `parts`. Raises InvalidRequest."""
    arguments = _named_parts(arguments)
    for name in arguments:
        if name not in CHECKS:
            near = checks.nearest_name(name, (*TAKEN[function], *BY_NAME))
            raise InvalidRequest(f"{function}: there is no argument {checks.shown(name)}; the nearest is {near}")
        if name not in TAKEN[function]:
            others = " and ".join(other for other, names in TAKEN.items() if name in names)
            raise InvalidRequest(f"{name}: {function} does not take it ({others} does); leave it out")
    left_out = [name for name in OPTIONAL if name in arguments and arguments[name] is None]
    return dict.fromkeys(left_out) | {
        name: CHECKS[name](name, value) for name, value in arguments.items() if name not in left_out
    }


def _named_parts(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The same with parts that have an argument of their own (`vae=`) put into `parts`. Raises InvalidRequest."""
    own = {name: arguments[name] for name in BY_NAME if arguments.get(name) is not None}
    rest = {name: value for name, value in arguments.items() if name not in BY_NAME}
    if not own:
        return rest
    given = rest.get("parts")
    given = {} if given is None else dict(checks.entries("parts", given, _PARTS, len(PART_NAMES)))
    if twice := [name for name in own if name in given]:
        raise InvalidRequest(f"{twice[0]} is given twice: as {twice[0]}= and in parts; leave one out")
    return rest | {"parts": given | own}
