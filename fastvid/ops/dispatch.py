"""Chooses the back end of every operation.

`bind` creates an `Ops` once, when a model is loaded. It has all functions of `reference.py`, such as
`ops.attention(...)`; models do not know which back end runs them:

    reference             eager PyTorch, everywhere: the definition
    library               what `auto` takes where no result says better (`libraries.default`)
    triton                kernels/, on CUDA devices, or on CPU tensors in Triton's interpreter (TRITON_INTERPRET=1)
    cuda                  csrc/, on the architectures for which fastvid._C was built

Some operations have more. Attention:

    sdpa                  PyTorch's scaled_dot_product_attention, everywhere
    cudnn, aten_flash     aten's operators, called directly
    flash, flash3, flash4 the packages flash-attn 2, 3 and 4
    sage                  the package sageattention, an approximation
    cuda_pair             attention of csrc/ by pairs of blocks that share keys and values
    cuda_fp8, cuda_int8   csrc/ with 8-bit products, an approximation

A back end that is requested explicitly either works or raises BackendUnavailable; there is no fallback. `auto` selects
what results have shown to be right and fastest, for each dtype and shape class (choices.py): committed results of this
architecture, then what `fastvid tune` has found on this machine; elsewhere it takes libraries.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from fastvid.checks import one_of, refuse, shown
from fastvid.device.devices import architecture, driver_too_old, on_rocm
from fastvid.errors import BackendUnavailable, InvalidRequest
from fastvid.ops import attention as attentions
from fastvid.ops import (
    choices,
    compiled,
    eight_bits,
    libraries,
    linear_library,
    quantized_library,
    rgb,
    solver_step,
    transformer,
    tuned,
    vae_gpu,
)
from fastvid.ops.choices import Choice, Function, Row
from fastvid.ops.sources import file_of, source_hash

NAMES = ("library", "reference", "triton", "cuda")
EIGHT = ("cuda_fp8", "cuda_int8")
APPROXIMATE = (*EIGHT, "sage")
MIN_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Ops:
    """The chosen function of every operation, as an attribute: `ops.rms_norm(...)`.

    functions: operation -> function; bound: operation -> back end; reasons: operation -> why it was chosen; choices:
    operation -> what runs for which shape class, where results decide. device: where it was chosen for;
    None: of weights that move.
    """

    functions: Mapping[str, Function]
    bound: Mapping[str, str]
    reasons: Mapping[str, str]
    choices: Mapping[str, tuple[Choice, ...]] = field(default_factory=dict)
    device: torch.device | None = torch.device("cpu")

    def __post_init__(self) -> None:
        vars(self).update(self.functions)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Function: ...


@dataclass(frozen=True)
class _Bound:
    """What was chosen for one operation."""

    function: Function
    name: str
    reason: str
    choices: tuple[Choice, ...] = ()


def implementations() -> dict[str, dict[str, Function]]:
    """Operation -> back end -> function. The operations are those of `reference.py`."""
    families = (transformer, quantized_library, eight_bits, solver_step, vae_gpu)
    table = {"attention": attentions.BACKENDS, "to_rgb": rgb.BACKENDS}
    every: dict[str, dict[str, Function]] = {
        name: dict(functions)
        for of in (table, *(family.BACKENDS for family in families))
        for name, functions in of.items()
    }
    for name, function in compiled.BACKENDS.items():
        every[name]["compiled"] = function
    for name, functions in linear_library.BACKENDS.items():
        every[name] |= functions
    return every


def bind(
    backend: str = "auto",
    attention: str = "auto",
    device: str | torch.device = "cpu",
    verified: Iterable[Row] | None = None,
) -> Ops:
    """Choose the back end of every operation on a device.

    backend: "auto", "library", "reference", "triton" or "cuda" for all operations, or a list such as
        "to_rgb=cuda,rms_norm=compiled" with `auto` for the others.
    attention: overrides `backend` for attention; also one of its own back ends (see the module).
    verified: the rows that `auto` goes by; None: committed results, then the user's table.
    Raises InvalidRequest for an unknown name, BackendUnavailable if a requested back end cannot run here.
    """
    torch_device = _device(device)
    table = implementations()
    requested = _asked(backend, attention, table)
    if missing := _missing(requested, table, torch_device):
        raise BackendUnavailable(
            f"backend={shown(backend)}, attention={shown(attention)} cannot run here: {missing}. "
            'One operation can be asked for ("to_rgb=cuda"); auto, library and reference always run.'
        )
    rows = list(verified or ())
    if verified is None and "auto" in requested.values():
        rows = _rows(torch_device)
    chosen = {op: _bind(op, name, table[op], torch_device, rows) for op, name in requested.items()}
    return Ops(
        functions={op: one.function for op, one in chosen.items()},
        bound={op: one.name for op, one in chosen.items()},
        reasons={op: one.reason for op, one in chosen.items()},
        choices={op: one.choices for op, one in chosen.items() if one.choices},
        device=torch_device,
    )


def _rows(device: torch.device) -> list[Row]:
    """The results that count on this device: committed ones, without back ends found wrong here, then the user's."""
    own = tuned.read(device)
    wrong = {(row["op"], row["backend"], row["dtype"], row["shape_class"]) for row in own["rejected"]}
    fitting = [row for row in choices.committed() if row["machine"] == architecture(device)]
    right = [row for row in fitting if (row["op"], row["backend"], row["dtype"], row["shape_class"]) not in wrong]
    return [*right, *own["rows"]]


def _bind(op: str, name: str, functions: Mapping[str, Function], device: torch.device, rows: list[Row]) -> _Bound:
    if name not in ("auto", "library"):
        return _Bound(functions[name], name, "asked for")
    default, reason = libraries.default(op, device)
    if name == "library":
        return _Bound(functions[default], default, "asked for")
    found = choices.choices(op, rows, lambda row: _counts(row, functions, device))
    if not found:
        return _Bound(functions[default], default, reason)
    kernels = {(one.dtype, one.shape_class): functions[one.backend] for one in found if one.backend != default}
    function = choices.DispatchByShape(op, kernels, functions[default]) if kernels else functions[default]
    return _Bound(function, choices.summary(found, default), choices.why(found), tuple(found))


def _counts(row: Row, functions: Mapping[str, Function], device: torch.device) -> bool:
    """Whether a row is of this source code, and its back end exact and able to run here."""
    return (
        row["backend"] in functions
        and row["backend"] not in APPROXIMATE
        and row["file"] == file_of(row["op"], row["backend"], row["shape_class"])  # not another kernel's
        and row["source"] == source_hash(row["backend"], row["file"])
        and not why_not(row["backend"], device)
        and not lacks(functions[row["backend"]], device)
    )


def _missing(asked: Mapping[str, str], table: Mapping[str, Mapping[str, Function]], device: torch.device) -> str:
    """Why explicitly requested back ends cannot run: "reason (operations); ..."; empty if all can."""
    reasons: dict[str, list[str]] = {}
    for op, name in asked.items():
        if name not in ("auto", "library"):
            reason: str | None = f"there is no {name} back end"
            if here := table[op].get(name):
                reason = why_not(name, device) or lacks(here, device)
            reasons.setdefault(reason or "", []).append(op)
    return "; ".join(f"{reason} ({', '.join(ops)})" for reason, ops in reasons.items() if reason)


def _asked(backend: str, attention: str, table: Mapping[str, Mapping[str, Function]]) -> dict[str, str]:
    """Operation -> requested back end, or "auto"."""
    if isinstance(backend, str) and "=" in backend:
        pairs = [part.strip().partition("=") for part in backend.split(",")]
        by_operation = {_known(op, table, "operation"): name for op, _, name in pairs}
        if len(by_operation) < len(pairs):
            refuse("backend", backend, "each operation once")
    else:
        by_operation = dict.fromkeys(table, _known(backend, ("auto", *NAMES), "backend"))
    asked = {op: by_operation.get(op, "auto") for op in table}
    if attention != "auto":
        asked["attention"] = attention
    for op, name in asked.items():
        names = dict.fromkeys(("auto", *NAMES, *table[op]))
        _known(name, names, op if op == "attention" else f"back end of {op}")
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
    if why := getattr(function, "why_not", None):
        return why(device)
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


def _why_not_triton(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (there is one for Linux)"
    if importlib.import_module("triton").knobs.runtime.interpret:
        return None
    if reason := _why_not_gpu(device):
        return reason
    if not on_rocm() and torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return f"{architecture(device)} is older than sm_80"
    return None


def _why_not_cuda(device: torch.device) -> str | None:
    if device.type == "cuda" and on_rocm():
        return f"it is for NVIDIA's GPUs, and the device is {architecture(device)} (ROCm): ask for triton"
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
    device_arch = f"{major}{minor}{'a' if (major, minor) == (9, 0) else ''}"  # kernels use Hopper's own instructions
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
