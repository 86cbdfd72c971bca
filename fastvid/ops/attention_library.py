"""Dense attention by libraries: PyTorch's own operators, called directly, and packages that may be installed.

    cudnn        aten's cuDNN operator: 16-bit types, head_dim a multiple of 8 up to 128, at least two keys
    aten_flash   aten's flash operator: 16-bit types, head_dim a multiple of 8 up to 256
    flash        the package flash-attn (FlashAttention-2)
    flash3       the package flash_attn_interface (FlashAttention-3)
    flash4       the package flash_attn.cute (FlashAttention-4)
    sage         the package sageattention: 8-bit products, an approximation
    brgemm       bf16 on CPUs with AVX512-BF16, head by head (attention_cpu.py)

PyTorch's context manager for its kernels changes flags of the whole process and gives no log-sum-exp, which the ranks
of a ring need; so the operators are called by their names. They are undocumented: `why_not` compares their arguments
with those used here.

Shapes: q [B, N, H, D]; k and v [B, M, H, D]; log-sum-exp fp32 [B, H, N], natural logarithm.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastvid.ops import attention_cpu

HALVES = (torch.float16, torch.bfloat16)
# 9.15.1 (major * 10^4 + minor * 100 + patch): the first cuDNN whose attention is right for every number of tokens.
CUDNN = 91501
CUDNN_DEVICES = ((9, 0), (10, 0), (10, 3))  # where PyTorch itself prefers cuDNN's attention
CUDNN_LARGEST = 65535  # samples, heads
OPERATORS: Mapping[str, Sequence[str]] = {
    "_scaled_dot_product_cudnn_attention": ("query", "key", "value", "attn_bias", "compute_log_sumexp", "scale"),
    "_scaled_dot_product_flash_attention": ("query", "key", "value", "dropout_p", "is_causal", "scale"),
}
PACKAGES = {
    "flash": ("flash_attn", "flash-attn"),
    "flash3": ("flash_attn_interface", "flash-attn-3"),
    "flash4": ("flash_attn.cute", "flash-attn-4"),
    "sage": ("sageattention", "sageattention"),
}
Run = Callable[[Tensor, Tensor, Tensor, float | None, bool], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Library:
    """A library's attention. name: of the back end. run(q, k, v, scale, with_lse) -> (out, log-sum-exp or None).

    head_dim: the largest. multiple: what head_dim has to be a multiple of.
    """

    name: str
    run: Run
    head_dim: int = 256
    multiple: int = 1

    def refuses(self, q: Tensor, k: Tensor) -> str | None:
        """Why it cannot take this call; None if it can."""
        head_dim = q.shape[-1]
        if self.name == "brgemm":
            return attention_cpu.refuses(q, k)
        if q.dtype not in HALVES:
            return f"{self.name} takes fp16 and bf16, not {str(q.dtype).removeprefix('torch.')}"
        if head_dim > self.head_dim or head_dim % self.multiple:
            multiples = f"multiples of {self.multiple}" if self.multiple > 1 else "head dimensions"
            return f"{self.name} takes {multiples} up to {self.head_dim}, not a head dimension of {head_dim}"
        if q.numel() == 0:
            return f"{self.name} takes at least one query"
        if self.name == "cudnn" and (k.shape[1] == 1 or max(q.shape[0], q.shape[2]) > CUDNN_LARGEST):
            return f"cudnn takes at least two keys and up to {CUDNN_LARGEST} samples and heads"
        return None

    def why_not(self, device: torch.device) -> str | None:
        """Why it cannot run on a device; None if it can."""
        if reason := _missing_package(self.name):
            return reason
        if self.name == "brgemm":
            return attention_cpu.why_not(device)
        if device.type != "cuda":
            return f"it needs a CUDA device, and the device is {device}"
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
            return "it needs sm_80 or newer"
        if self.name == "cudnn":
            return _old_cudnn() or _other_arguments("_scaled_dot_product_cudnn_attention")
        return _other_arguments("_scaled_dot_product_flash_attention") if self.name == "aten_flash" else None


def preferred(device: torch.device) -> tuple[str, ...]:
    """The libraries that the default tries on a device, best first; nothing where PyTorch chooses better itself: on
    other CPUs and on AMD's GPUs."""
    if device.type == "cpu":
        return ("brgemm",) if attention_cpu.preferred() else ()
    if device.type != "cuda" or torch.version.hip is not None:
        return ()
    names = ("cudnn", "aten_flash") if torch.cuda.get_device_capability(device) in CUDNN_DEVICES else ("aten_flash",)
    return tuple(name for name in names if LIBRARIES[name].why_not(device) is None)


def worth(name: str, q: Tensor, k: Tensor) -> bool:
    """Whether a preferred library that takes a call is faster than PyTorch's own attention."""
    return name != "brgemm" or attention_cpu.worth(q, k)


def cudnn_version() -> str:
    """ "9.15.1", or "none"."""
    number = torch.backends.cudnn.version()
    return "none" if number is None else f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def _missing_package(name: str) -> str | None:
    if name not in PACKAGES:
        return None
    module, package = PACKAGES[name]
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        found = False
    except ValueError:  # it is imported already, and has no spec
        found = True
    return None if found else f"the package {package} is not installed"


def _old_cudnn() -> str | None:
    number = torch.backends.cudnn.version()
    if torch.version.hip is not None or number is None:
        return "this build of torch has no cuDNN"
    return f"cuDNN is {cudnn_version()}, and its attention is used from 9.15.1 on" if number < CUDNN else None


@functools.cache
def _other_arguments(name: str) -> str | None:
    """Why an operator of aten cannot be called as it is here: a release of torch may change it."""
    operator = getattr(getattr(torch.ops.aten, name, None), "default", None)
    arguments = [] if operator is None else [one.name for one in operator._schema.arguments]
    wrong = set(OPERATORS[name]) - set(arguments)
    return f"torch {torch.__version__} has another aten::{name}" if wrong else None


# PyTorch's operators. They take [B, H, N, D].


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """Copies rows that do not start at multiples of 16 bytes, which the kernels load at once."""
    return [(x if _aligned(x) else x.contiguous()).transpose(1, 2) for x in tensors]


def _aligned(x: Tensor) -> bool:
    *strides, last = x.stride()
    return last == 1 and x.storage_offset() % 8 == 0 and all(stride % 8 == 0 for stride in strides)


def _cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float | None, with_lse: bool) -> tuple[Tensor, Tensor | None]:
    operator = torch.ops.aten._scaled_dot_product_cudnn_attention.default
    out, lse, *_ = operator(*_heads_first(q, k, v), attn_bias=None, compute_log_sumexp=with_lse, scale=scale)
    return out.transpose(1, 2), lse.view(lse.shape[:3]) if with_lse else None  # in some releases [B, H, N, 1]


def _aten_flash(q: Tensor, k: Tensor, v: Tensor, scale: float | None, with_lse: bool) -> tuple[Tensor, Tensor | None]:
    operator = torch.ops.aten._scaled_dot_product_flash_attention.default
    out, lse, *_ = operator(*_heads_first(q, k, v), dropout_p=0.0, is_causal=False, scale=scale)
    return out.transpose(1, 2), lse


# Packages. They take [B, N, H, D].


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float | None, with_lse: bool) -> tuple[Tensor, Tensor | None]:
    from flash_attn import flash_attn_func

    if not with_lse:
        return flash_attn_func(q, k, v, softmax_scale=scale), None
    out, lse, _ = flash_attn_func(q, k, v, softmax_scale=scale, return_attn_probs=True)
    return out, lse


def _flash3(q: Tensor, k: Tensor, v: Tensor, scale: float | None, with_lse: bool) -> tuple[Tensor, Tensor | None]:
    from flash_attn_interface import flash_attn_func

    return _pair(flash_attn_func, (q, k, v), scale, with_lse, "return_attn_probs")


def _flash4(q: Tensor, k: Tensor, v: Tensor, scale: float | None, with_lse: bool) -> tuple[Tensor, Tensor | None]:
    from flash_attn.cute import flash_attn_func

    return _pair(flash_attn_func, (q, k, v), scale, with_lse, "return_lse")


def _pair(
    function: Callable[..., Any], qkv: Sequence[Tensor], scale: float | None, with_lse: bool, word: str
) -> tuple[Tensor, Tensor | None]:
    """word: the argument that asks for the log-sum-exp; releases without it always give a pair."""
    asked = {word: True} if with_lse and _has_argument(function, word) else {}
    made = function(*qkv, softmax_scale=scale, **asked)
    out, lse = made[:2] if isinstance(made, tuple) else (made, None)
    if with_lse and lse is None:
        raise ValueError(f"{function.__module__} gives no log-sum-exp, which several ranks need: install a newer one")
    return out, lse if with_lse else None


@functools.cache
def _has_argument(function: Callable[..., Any], word: str) -> bool:
    return word in inspect.signature(function).parameters


def _sage(q: Tensor, k: Tensor, v: Tensor, scale: float | None, with_lse: bool) -> tuple[Tensor, Tensor | None]:
    from sageattention import sageattn

    qkv = [x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v)]
    made = sageattn(*qkv, tensor_layout="NHD", is_causal=False, sm_scale=scale, return_lse=with_lse)
    return made if with_lse else (made, None)


LIBRARIES: Mapping[str, Library] = {
    library.name: library
    for library in (
        Library("cudnn", _cudnn, head_dim=128, multiple=8),
        Library("aten_flash", _aten_flash, multiple=8),
        Library("flash", _flash),
        Library("flash3", _flash3),
        Library("flash4", _flash4, multiple=8),
        Library("sage", _sage, head_dim=128),
        Library("brgemm", attention_cpu.attention),
    )
}
