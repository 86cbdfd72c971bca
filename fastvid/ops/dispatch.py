"""Operations and the choice of what runs them.

`bind` makes an `Ops` once, when a model is loaded; models call `ops.attention(...)`, `ops.to_rgb(...)` and every
function of `reference.py` on it, and never learn which back end answers. A back end asked for by name works or raises
BackendUnavailable; only `auto` chooses, and it chooses a kernel only if verified.json shows a committed result for it
on this architecture, from this very source.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastvid.errors import BackendUnavailable, InvalidRequest
from fastvid.ops import attention as attentions
from fastvid.ops import backends, linears, norms, patches, reference, rgb, solver_step, vae_cuda, vae_gpu

Function = Callable[..., Any]
DENSE, SPARSE = ("attention", "attention_lse"), ("sparse_attention", "sparse_attention_lse")


@dataclass(frozen=True)
class Ops:
    """The functions of every operation, bound; each is an attribute: `ops.rms_norm(...)`.

    functions: operation -> function; bound: operation -> name of its back end; reasons: operation -> why that one.
    """

    functions: Mapping[str, Function]
    bound: Mapping[str, str]
    reasons: Mapping[str, str]

    def __post_init__(self) -> None:
        vars(self).update(self.functions)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Function: ...


@dataclass(frozen=True)
class ByClass:
    """A function that runs a kernel on the classes of shapes that it is verified for, and another one on the rest.

    shape_class: from the function's arguments to the name of their class. kernels: class -> kernel.
    """

    shape_class: Function
    kernels: Mapping[str, Function]
    rest: Function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.kernels.get(self.shape_class(*args, **kwargs), self.rest)(*args, **kwargs)


def shape_classes() -> dict[str, Function]:
    """Operation -> which class its arguments are of, where speed depends on that; "any" of the others."""
    return {}


def implementations() -> dict[str, dict[str, Function]]:
    """Operation -> back end -> function."""
    public = {name: f for name, f in vars(reference).items() if inspect.isfunction(f) and not name.startswith("_")}
    table = {name: {"reference": f} for name, f in public.items() if f.__module__ == reference.__name__}
    table["attention"] = dict(attentions.BACKENDS)
    table["attention_lse"] = dict(attentions.LSE_BACKENDS)
    table["sparse_attention"] = dict(attentions.SPARSE_BACKENDS)
    table["sparse_attention_lse"] = dict(attentions.SPARSE_LSE_BACKENDS)
    table["to_rgb"] = dict(rgb.BACKENDS)
    for family in (norms, patches, linears, solver_step, vae_gpu):
        for name, functions in family.BACKENDS.items():
            table[name] = dict(functions)
    for name, functions in vae_cuda.BACKENDS.items():
        table[name] |= functions
    return table


def bind(
    backend: str = "auto",
    attention: str = "auto",
    device: str | torch.device = "cpu",
    verified: Iterable[Mapping[str, str]] | None = None,
) -> Ops:
    """Choose what runs every operation on a device.

    backend: "auto", "reference", "triton" or "cuda" for all of them, or a list such as "to_rgb=cuda,rms_norm=reference"
        with `auto` for the rest. attention: the same for attention alone, with and without the log-sum-exp, also
        "sdpa", "flash", or "cuda_fp8" and "cuda_int8", which approximate; wins over backend.
    verified: the kernels that `auto` may take; those of verified.json when None.
    Raises InvalidRequest for an unknown name, BackendUnavailable when what was asked for cannot run here.
    """
    where = _device(device)
    table = implementations()
    asked = _asked(backend, attention, table)
    if missing := _missing(asked, table, where):
        raise BackendUnavailable(
            f"backend={backend!r}, attention={attention!r} cannot run here: {missing}. "
            'One operation can be asked for ("to_rgb=cuda"); auto and reference always run.'
        )
    rows = list(read_verified() if verified is None else verified)
    chosen = {
        op: _auto(op, table[op], where, rows) if name == "auto" else (table[op][name], name, "asked for")
        for op, name in asked.items()
    }
    functions, bound, reasons = ({op: of[i] for op, of in chosen.items()} for i in range(3))
    return Ops(functions, bound, reasons)


def read_verified() -> list[dict[str, str]]:
    """The rows of verified.json: op, backend, shape_class, arch, file, source (its hash), result (its path)."""
    return json.loads(Path(__file__).with_name("verified.json").read_text(encoding="utf-8"))["kernels"]


def source_hash(backend: str, file: str) -> str | None:
    """The hash that a row of verified.json must have: of the kernel's file, or of all of csrc for the extension."""
    if backend == "cuda":
        return getattr(backends.extension(), "SOURCE_HASH", None)
    spec = importlib.util.find_spec("fastvid.kernels")
    folders = spec.submodule_search_locations if spec else None
    path = Path(folders[0], file) if folders else None
    return hashlib.sha256(path.read_bytes()).hexdigest() if path and path.is_file() else None


def _auto(
    op: str, functions: Mapping[str, Function], device: torch.device, rows: list[Mapping[str, str]]
) -> tuple[Function, str, str]:
    """(function, name, reason) that `auto` gives an operation: verified kernels, or what PyTorch itself has."""
    name = "sdpa" if op in DENSE else "reference"
    found = {row["shape_class"]: row for row in rows if _fits(row, op, functions, device)}
    if every := found.get("any"):
        return functions[every["backend"]], every["backend"], f"verified: {every['result']}"
    if found and op in shape_classes():
        kernels = {shapes: functions[row["backend"]] for shapes, row in found.items()}
        told = ", ".join(f"{row['backend']} for {shapes}" for shapes, row in sorted(found.items()))
        results = ", ".join(sorted({row["result"] for row in found.values()}))
        function = ByClass(shape_classes()[op], kernels, functions[name])
        return function, f"{told}, else {name}", f"verified: {results}"
    if op in DENSE:
        return functions[name], name, "PyTorch's own"
    return functions[name], name, device.type if device.type == "cpu" else "no committed GPU result"


def _fits(row: Mapping[str, str], op: str, functions: Mapping[str, Function], device: torch.device) -> bool:
    """Whether a row is of this operation, this architecture and the very source that is here, and can run."""
    same = (row["op"], row["arch"]) == (op, backends.architecture(device))
    return (
        same
        and row["backend"] in functions
        and row["backend"] not in backends.APPROXIMATE
        and row["source"] == source_hash(row["backend"], row["file"])
        and not backends.why_not(row["backend"], device)
        and not backends.lacks(functions[row["backend"]], device)
    )


def _missing(asked: Mapping[str, str], table: Mapping[str, Mapping[str, Function]], device: torch.device) -> str:
    """What was asked for by name and cannot run: "reason (operations); ..."; empty if everything can."""
    reasons: dict[str, list[str]] = {}
    for op, name in asked.items():
        if name != "auto":
            reason = f"there is no {name} back end"
            if here := table[op].get(name):
                reason = backends.why_not(name, device) or backends.lacks(here, device)
            reasons.setdefault(reason or "", []).append(op)
    return "; ".join(f"{reason} ({', '.join(ops)})" for reason, ops in reasons.items() if reason)


def _asked(backend: str, attention: str, table: Mapping[str, object]) -> dict[str, str]:
    """Operation -> the name asked for it, "auto" included."""
    if isinstance(backend, str) and "=" in backend:
        pairs = [part.strip().partition("=") for part in backend.split(",")]
        named = {_known(op, table, "operation"): name for op, _, name in pairs}
    else:
        named = dict.fromkeys(table, _known(backend, ("auto", *backends.NAMES), "backend"))
    asked = {op: named.get(op, "auto") for op in table}
    if attention != "auto":
        # Packages have dense attention alone; what is sparse is then chosen as if nothing had been asked for.
        asked |= {op: attention for op in (*DENSE, *SPARSE) if op in DENSE or attention in table[op]}
    for op, name in asked.items():
        more = {**dict.fromkeys(DENSE, backends.DENSE_ATTENTION), **dict.fromkeys(SPARSE, backends.APPROXIMATE)}
        allowed = (*backends.NAMES, *more.get(op, ()))
        _known(name, ("auto", *allowed), "attention" if op in DENSE else f"back end of {op}")
    return asked


def _known(name: str, allowed: Iterable[str], what: str) -> str:
    """The name itself, if it is one of those allowed."""
    allowed = list(allowed)
    if name in allowed:
        return name
    nearest = difflib.get_close_matches(str(name), allowed, 1, 0)
    raise InvalidRequest(f"{what} is {name!r}; it can be {', '.join(allowed)} (nearest: {nearest[0]!r})")


def _device(device: str | torch.device) -> torch.device:
    try:
        where = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InvalidRequest(f"device is {device!r}; it can be 'cpu', 'cuda' or 'cuda:<number>'") from error
    if where.type == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailable(f"device is {str(where)!r}, and no CUDA device is found; 'cpu' always runs")
    return where
