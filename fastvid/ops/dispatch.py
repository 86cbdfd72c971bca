"""Chooses the back end of every operation.

`bind` creates an `Ops` once, when a model is loaded. It has all functions of `reference.py`, such as
`ops.attention(...)`; models do not know which back end runs them:

    reference             eager PyTorch, everywhere
    triton                kernels/, on CUDA devices, or on CPU tensors in Triton's interpreter (TRITON_INTERPRET=1)
    cuda                  csrc/, on the architectures for which fastvid._C was built
    sdpa                  PyTorch's scaled_dot_product_attention, everywhere (attention only)
    cudnn, aten_flash     aten's operators, called directly (attention only)
    flash, flash3, flash4 the packages flash-attn 2, 3 and 4 (attention only)
    sage                  the package sageattention, an approximation (attention only)
    library               the best of them for each call (attention only)
    cuda_fp8, cuda_int8   csrc/ with 8-bit products, an approximation (attention only)

A back end that is requested explicitly either works or raises BackendUnavailable; there is no fallback. `auto` selects
a kernel only if verified.json has a committed result for this architecture and exactly this source code.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from fastvid.checks import one_of, shown
from fastvid.device.devices import driver_too_old
from fastvid.errors import BackendUnavailable, InvalidRequest
from fastvid.ops import attention as attentions
from fastvid.ops import rgb, solver_step, transformer, vae_gpu
from fastvid.ops.sources import source_hash

Function = Callable[..., Any]
NAMES = ("reference", "triton", "cuda")
EIGHT = ("cuda_fp8", "cuda_int8")
APPROXIMATE = (*EIGHT, "sage")
ATTENTION = ("sdpa", "library", "cudnn", "aten_flash", "flash", "flash3", "flash4", *APPROXIMATE)
MIN_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Ops:
    """The chosen function of every operation, as an attribute: `ops.rms_norm(...)`.

    functions: operation -> function; bound: operation -> back end; reasons: operation -> why it was chosen.
    """

    functions: Mapping[str, Function]
    bound: Mapping[str, str]
    reasons: Mapping[str, str]

    def __post_init__(self) -> None:
        vars(self).update(self.functions)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Function: ...


@dataclass(frozen=True)
class DispatchByShape:
    """A function that runs a kernel on the shape classes for which it is verified, and `rest` on all others.

    shape_class: maps the function's arguments to a shape class. kernels: shape class -> kernel.
    """

    shape_class: Function
    kernels: Mapping[str, Function]
    rest: Function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.kernels.get(self.shape_class(*args, **kwargs), self.rest)(*args, **kwargs)


def shape_classes() -> dict[str, Function]:
    """Operation -> function that returns the shape class of its arguments. Other operations have only the class
    "any"."""
    return {"attention": attentions.form}


def implementations() -> dict[str, dict[str, Function]]:
    """Operation -> back end -> function. The operations are those of `reference.py`."""
    families = (transformer.BACKENDS, solver_step.BACKENDS, vae_gpu.BACKENDS)
    table = {"attention": attentions.BACKENDS, "to_rgb": rgb.BACKENDS}
    return {name: dict(functions) for of in (table, *families) for name, functions in of.items()}


def bind(
    backend: str = "auto",
    attention: str = "auto",
    device: str | torch.device = "cpu",
    verified: Iterable[Mapping[str, str]] | None = None,
) -> Ops:
    """Choose the back end of every operation on a device.

    backend: "auto", "reference", "triton" or "cuda" for all operations, or a list such as
        "to_rgb=cuda,rms_norm=reference" with `auto` for the others.
    attention: overrides `backend` for attention; also one of ATTENTION ("sdpa", "cudnn", ...), of which APPROXIMATE are
        approximations.
    verified: the kernels that `auto` may select; None: those of verified.json.
    Raises InvalidRequest for an unknown name, BackendUnavailable if a requested back end cannot run here.
    """
    torch_device = _device(device)
    table = implementations()
    requested = _asked(backend, attention, table)
    if missing := _missing(requested, table, torch_device):
        raise BackendUnavailable(
            f"backend={shown(backend)}, attention={shown(attention)} cannot run here: {missing}. "
            'One operation can be asked for ("to_rgb=cuda"); auto and reference always run.'
        )
    rows = list(read_verified() if verified is None else verified)
    chosen = {
        op: _auto(op, table[op], torch_device, rows) if name == "auto" else (table[op][name], name, "asked for")
        for op, name in requested.items()
    }
    return Ops(
        functions={op: function for op, (function, _, _) in chosen.items()},
        bound={op: name for op, (_, name, _) in chosen.items()},
        reasons={op: reason for op, (_, _, reason) in chosen.items()},
    )


def read_verified() -> list[dict[str, str]]:
    """The rows of verified.json: op, backend, shape_class, arch, file, source (hash of the file), result (a path)."""
    return json.loads(Path(__file__).with_name("verified.json").read_text(encoding="utf-8"))["kernels"]


def _auto(
    op: str, functions: Mapping[str, Function], device: torch.device, rows: list[Mapping[str, str]]
) -> tuple[Function, str, str]:
    """(function, back end, reason) that `auto` chooses for an operation: verified kernels, else PyTorch."""
    name = "sdpa" if op == "attention" else "reference"
    matching_rows = {row["shape_class"]: row for row in rows if _fits(row, op, functions, device)}
    if row_for_any := matching_rows.get("any"):
        return functions[row_for_any["backend"]], row_for_any["backend"], f"verified: {row_for_any['result']}"
    if matching_rows and op in shape_classes():
        kernels = {shapes: functions[row["backend"]] for shapes, row in matching_rows.items()}
        description = ", ".join(f"{row['backend']} for {shapes}" for shapes, row in sorted(matching_rows.items()))
        results = ", ".join(sorted({row["result"] for row in matching_rows.values()}))
        function = DispatchByShape(shape_classes()[op], kernels, functions[name])
        return function, f"{description}, else {name}", f"verified: {results}"
    if op == "attention":
        return functions[name], name, "PyTorch's own"
    return functions[name], name, device.type if device.type == "cpu" else "no committed GPU result"


def _fits(row: Mapping[str, str], op: str, functions: Mapping[str, Function], device: torch.device) -> bool:
    """Whether a row matches this operation, architecture and source code, and its back end can run."""
    same = (row["op"], row["arch"]) == (op, architecture(device))
    return (
        same
        and row["backend"] in functions
        and row["backend"] not in APPROXIMATE
        and row["source"] == source_hash(row["backend"], row["file"])
        and not why_not(row["backend"], device)
        and not lacks(functions[row["backend"]], device)
    )


def _missing(asked: Mapping[str, str], table: Mapping[str, Mapping[str, Function]], device: torch.device) -> str:
    """Why explicitly requested back ends cannot run: "reason (operations); ..."; empty if all can."""
    reasons: dict[str, list[str]] = {}
    for op, name in asked.items():
        if name != "auto":
            reason: str | None = f"there is no {name} back end"
            if here := table[op].get(name):
                reason = why_not(name, device) or lacks(here, device)
            reasons.setdefault(reason or "", []).append(op)
    return "; ".join(f"{reason} ({', '.join(ops)})" for reason, ops in reasons.items() if reason)


def _asked(backend: str, attention: str, table: Mapping[str, object]) -> dict[str, str]:
    """Operation -> requested back end, or "auto"."""
    if isinstance(backend, str) and "=" in backend:
        pairs = [part.strip().partition("=") for part in backend.split(",")]
        by_operation = {_known(op, table, "operation"): name for op, _, name in pairs}
    else:
        by_operation = dict.fromkeys(table, _known(backend, ("auto", *NAMES), "backend"))
    asked = {op: by_operation.get(op, "auto") for op in table}
    if attention != "auto":
        asked["attention"] = attention
    for op, name in asked.items():
        more = ATTENTION if op == "attention" else ()
        _known(name, ("auto", *NAMES, *more), "attention" if more else f"back end of {op}")
    return asked


def _known(name: str, allowed: Iterable[str], what: str) -> str:
    """Return `name` if it is allowed. Raises InvalidRequest otherwise."""
    return one_of(allowed)(what, name)


def _device(device: str | torch.device) -> torch.device:
    try:
        torch_device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InvalidRequest(f"device is {shown(device)}; it can be 'cpu', 'cuda' or 'cuda:<number>'") from error
    if torch_device.type == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailable(f"device is {str(torch_device)!r}, and no CUDA device is found; 'cpu' always runs")
    return torch_device


# Availability of back ends on a device


def why_not(backend: str, device: torch.device) -> str | None:
    """The reason why a back end cannot run on this device; None if it can."""
    if backend == "triton":
        return _why_not_triton(device)
    return _why_not_cuda(device) if backend == "cuda" or backend in EIGHT else None


def lacks(function: object, device: torch.device) -> str | None:
    """The reason why a function cannot run on a device although its back end can; None if it can.

    Its optional attribute `needs` ("90a") names the architecture that it requires. A library answers by itself.
    """
    if isinstance(function, attentions.Dense):
        return function.why_not(device)
    needs, module = getattr(function, "needs", None), extension()
    if needs is None:
        return None
    if isinstance(module, str):
        return module
    if not runs_on(needs, torch.cuda.get_device_capability(device)):
        return f"it is for sm_{needs} alone, and the device is {architecture(device)}: ask for triton"
    if needs not in module.ARCHS.split(";"):
        return f"it is for sm_{needs}, and {_built_without(needs, module.ARCHS)}"
    return None


def extension() -> ModuleType | str:
    """The module fastvid._C, or the reason why it is not available."""
    try:
        return importlib.import_module("fastvid._C")
    except ModuleNotFoundError:
        return "fastvid._C was not built: install with FASTVID_BUILD_CUDA=1 where nvcc is"
    except ImportError as error:
        return f"fastvid._C does not load: {error}"


def runs_on(archs: str, capability: tuple[int, int]) -> bool:
    """Whether code built for archs ("80;90a") runs on a device: sm_80 on any 8.x, sm_90a only on 9.0."""
    for number, minor, suffix in re.findall(r"(\d+)(\d)([af]?)", archs):
        built = (int(number), int(minor))
        if built == capability or (suffix != "a" and built[0] == capability[0] and built[1] <= capability[1]):
            return True
    return False


def architecture(device: torch.device) -> str:
    """ "sm_90" etc. for a CUDA device, else the device's type."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return device.type
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def _why_not_triton(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (there is one for Linux)"
    if importlib.import_module("triton").knobs.runtime.interpret:
        return None
    if reason := _why_not_gpu(device):
        return reason
    if torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return f"{architecture(device)} is older than sm_80"
    return None


def _why_not_cuda(device: torch.device) -> str | None:
    module = extension()
    if isinstance(module, str):
        return module
    if reason := _why_not_gpu(device):
        return reason
    if not module.device_count():
        return driver_too_old(module.CUDA_VERSION, "fastvid._C") or (
            f"fastvid._C finds no device; most likely the driver is older than CUDA {module.CUDA_VERSION}, which "
            "fastvid._C was built with: update the driver, install with an older nvcc, or ask for triton"
        )
    major, minor = torch.cuda.get_device_capability(device)
    if runs_on(module.ARCHS, (major, minor)):
        return None
    if (major, minor) < MIN_CAPABILITY:
        return f"{architecture(device)} is older than sm_80: ask for reference"
    device_arch = (
        f"{major}{minor}{'a' if major >= 9 else ''}"  # since Hopper each architecture has specific instructions
    )
    return f"the device is {architecture(device)}, and {_built_without(device_arch, module.ARCHS)}"


def _built_without(arch: str, archs: str) -> str:
    return (
        f"fastvid._C was built for {archs}: install with FASTVID_BUILD_CUDA=1 FASTVID_CUDA_ARCHS='{archs};{arch}' "
        "where nvcc is, or ask for triton"
    )


def _why_not_gpu(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"it needs a CUDA device, and the device is {device}"
    return None if torch.cuda.is_available() else "no CUDA device is found"
