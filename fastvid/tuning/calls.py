"""Calls of operations as data: which operation, with tensors of which shapes, strides and dtypes, and how often.

A call goes to a child process as JSON. In it a tensor is {"tensor": shape, "stride", "dtype", "host"}, a function of
`ops` is {"function": its operation}, a dtype {"dtype": its name} and a quantized weight {"weight": its fields}.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastvid.ops import dispatch, reference
from fastvid.ops.quantized import QuantizedRows, QuantizedTensor
from fastvid.tuning import weights
from fastvid.tuning.weights import WeightLike

FAMILIES: Mapping[str, tuple[str, ...]] = {
    "attention": ("attention",),
    "linears": ("linear", "linear_gelu_tanh", "linear_quantized", "quantize_rows", "quantized_norm"),
    "norms": (
        *("modulated_layer_norm", "gated_residual", "gated_residual_norm", "gated_residual_layer_norm"),
        *("residual_norm", "layer_norm", "rms_norm", "rms_norm_rope", "qkv_norm_rope"),
    ),
    "ends": ("patch_embed", "head"),
    "solver": ("solver_step",),
    "rgb": ("to_rgb",),
    "vae-convolutions": (
        *("vae_conv3d", "vae_causal_conv3d", "vae_norm_silu_conv3d", "vae_norm_silu_conv3d_rgb"),
        *("vae_upsample_conv2d", "vae_downsample_conv2d", "vae_double_frames", "vae_halve_frames"),
    ),
    "vae-norms": ("vae_rms_norm",),
}
"""Operations that share a child process."""
MAY_WRITE = {"vae_norm_silu_conv3d": ("residual",), "vae_norm_silu_conv3d_rgb": ("residual",)}
"""Arguments that an operation may overwrite."""


@dataclass(frozen=True)
class TensorLike:
    """A tensor without its values. host: it stays on the CPU."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    host: bool = False

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Function:
    """Stands for the function of an operation."""

    op: str


@dataclass(frozen=True)
class Call:
    """A class of calls. given: the argument of each name, tensors as TensorLike. count: how often it is called in a
    request. flops, bytes: of one call."""

    op: str
    dtype: str
    shape_class: str
    given: Mapping[str, Any]
    count: float
    flops: float
    bytes: float

    @property
    def name(self) -> tuple[str, str, str]:
        return self.op, self.dtype, self.shape_class


def family_of(op: str) -> str:
    """The family of an operation; of one that is in none, by its name."""
    found = next((family for family, ops in FAMILIES.items() if op in ops), None)
    return found or ("vae-convolutions" if op.startswith("vae_") else "norms")


@cache
def signature(op: str) -> inspect.Signature:
    return inspect.signature(getattr(reference, op))


def named(op: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, without those that are left at None."""
    bound = signature(op).bind(*args, **kwargs).arguments
    parameters = signature(op).parameters
    return {name: value for name, value in bound.items() if value is not None or parameters[name].default is not None}


def split(op: str, given: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments by name -> as a model passes them: those that may be positional are."""
    bound = inspect.BoundArguments(signature(op), dict(given))
    return bound.args, bound.kwargs


def like(value: Any) -> Any:
    """A recorded argument without values: tensors become TensorLike, functions Function."""
    if isinstance(value, QuantizedTensor):
        return weights.like(value)
    if isinstance(value, QuantizedRows):  # a product is tuned with what makes them
        value = torch.empty(value.shape, dtype=value.dtype, device="meta")
    if isinstance(value, Tensor):
        return TensorLike(tuple(value.shape), value.stride(), value.dtype, value.device.type == "cpu")
    if isinstance(value, list | tuple):
        return tuple(map(like, value))
    return Function(getattr(value, "op", "")) if callable(value) else value


def cost(op: str, given: Mapping[str, Any], out: Any) -> tuple[float, float]:
    """(floating point operations, bytes read and written) of a call."""
    out = (out.codes, out.scale) if isinstance(out, QuantizedRows) else out
    made = [one for one in (out if isinstance(out, list | tuple) else [out]) if isinstance(one, Tensor)]
    tensors = [one for value in given.values() for one in (value if isinstance(value, tuple) else (value,))]
    moved = sum(one.bytes for one in tensors if isinstance(one, TensorLike | WeightLike))
    moved += sum(one.numel() * one.element_size() for one in made)
    if op == "attention":
        return 4.0 * math.prod(given["q"].shape) * given["k"].shape[1], moved
    weight = given.get("weight")
    if isinstance(weight, TensorLike | WeightLike) and len(weight.shape) > 1:
        return 2.0 * made[0].numel() * math.prod(weight.shape[1:]), moved
    return 10.0 * sum(one.numel() for one in made), moved


FLOPS_PER_BYTE = {"cuda": 150.0, "cpu": 15.0}
"""About what a device computes while it moves a byte."""


def work(call: Call, device: torch.device) -> float:
    """A call's share of a request, in bytes: those it moves, or as many as its arithmetic takes the time of."""
    return call.count * max(call.bytes, call.flops / FLOPS_PER_BYTE[device.type])


def total(calls: Sequence[Call], device: torch.device) -> float:
    return math.fsum(work(call, device) for call in calls)


def candidates(op: str, device: torch.device) -> dict[str, Callable[..., Any]]:
    """The back ends of an operation that can run on a device, without approximations. On a CPU also without Triton's
    interpreter, which is for tests, and torch.compile, whose start costs a process some 5 s: more than it gains."""
    skipped = (*dispatch.APPROXIMATE, *(("triton", "compiled") if device.type == "cpu" else ()))
    return {
        name: function
        for name, function in dispatch.implementations()[op].items()
        if name not in skipped and not (dispatch.why_not(name, device) or dispatch.lacks(function, device))
    }


# ---------------------------------------------------------------- JSON


def to_json(call: Call) -> dict[str, Any]:
    fields = {name: getattr(call, name) for name in ("op", "dtype", "shape_class", "count", "flops", "bytes")}
    return fields | {"given": {name: _plain(value) for name, value in call.given.items()}}


def from_json(data: Mapping[str, Any]) -> Call:
    given = {name: _parsed(value) for name, value in data["given"].items()}
    return Call(**{**data, "given": given})


def _plain(value: Any) -> Any:
    if isinstance(value, TensorLike):
        dtype = str(value.dtype).removeprefix("torch.")
        return {"tensor": value.shape, "stride": value.stride, "dtype": dtype, "host": value.host}
    if isinstance(value, WeightLike):
        return weights.to_json(value)
    if isinstance(value, Function):
        return {"function": value.op}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    return [_plain(one) for one in value] if isinstance(value, tuple) else value


def _parsed(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_parsed, value))
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        dtype = getattr(torch, value["dtype"])
        return TensorLike(tuple(value["tensor"]), tuple(value["stride"]), dtype, value["host"])
    if "weight" in value:
        return weights.from_json(value["weight"])
    return Function(value["function"]) if "function" in value else getattr(torch, value["dtype"])
