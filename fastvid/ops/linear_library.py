"""Back ends of `linear` and `linear_gelu_tanh` by libraries, for tuning and by name.

aten       F.linear, then GELU (MKL in fp32 and oneDNN in bf16 on x86 CPUs, cuBLAS on GPUs)
onednn     oneDNN for any number of rows, with GELU in its product; CPUs
packed     the same with weights kept in oneDNN's own blocks beside the model's, which takes their memory once more
cublaslt   cuBLASLt's GELU epilogue through torch._addmm_activation, which is private: it is offered only on devices
           where it has proved to be the tanh form of GELU (on CPUs it is the erf form, 5e-4 off)
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvid.ops import onednn

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NO_GELU = ("none", "")


@dataclass(frozen=True)
class Linear:
    """A back end of `linear`, or with gelu of `linear_gelu_tanh`. why_not(device): why it cannot run there."""

    run: Callable[[Tensor, Tensor, Tensor | None, bool], Tensor]
    gelu: bool
    why_not: Callable[[torch.device], str | None]

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.run(x, weight, bias, self.gelu)


def _aten(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    y = F.linear(x, weight, bias)
    return F.gelu(y, approximate="tanh") if gelu else y


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    if _without_onednn(x, weight):
        return _aten(x, weight, bias, gelu)
    return onednn.linear(x, weight, bias, onednn.GELU_TANH if gelu else NO_GELU)


def _packed(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    if _without_onednn(x, weight):
        return _aten(x, weight, bias, gelu)
    return onednn.linear(x, PACKED.of(weight), bias, onednn.GELU_TANH if gelu else NO_GELU)


def _without_onednn(x: Tensor, weight: Tensor) -> bool:
    """Calls that oneDNN's routines do not take: gradients, other types, nothing to multiply."""
    return onednn.needs_gradients(x, weight) or x.dtype not in DTYPES or x.dtype != weight.dtype or x.numel() == 0


class Packed:
    """Packed weights, each as long as its weight lives. A weight that was written to or moved is packed again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: dict[int, tuple[weakref.ref[Tensor], tuple[int, int], Tensor]] = {}

    def of(self, weight: Tensor) -> Tensor:
        state = weight.data_ptr(), weight._version
        with self._lock:
            owner, at, packed = self._kept.get(id(weight), (None, None, None))
            if packed is None or owner is None or owner() is not weight or at != state:
                packed = onednn.pack(weight)
                self._kept[id(weight)] = weakref.ref(weight, functools.partial(self._drop, id(weight))), state, packed
            return packed

    def bytes(self) -> int:
        """What the packed weights take, without padding."""
        kept = list(self._kept.values())  # at once: another thread's weight may end meanwhile
        return sum(packed.numel() * packed.element_size() for _, _, packed in kept)

    def _drop(self, key: int, owner: weakref.ref[Tensor]) -> None:
        kept = self._kept.get(key)
        if kept is not None and kept[0] is owner:  # another tensor may have got its number
            self._kept.pop(key, None)


PACKED = Packed()


def _cublaslt(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    if bias is None or x.dtype not in DTYPES or onednn.needs_gradients(x, weight):
        return _aten(x, weight, bias, gelu)  # the epilogue adds a bias
    rows = x.reshape(-1, x.shape[-1])
    return torch._addmm_activation(bias, rows, weight.t(), use_gelu=True).view(*x.shape[:-1], weight.shape[0])


# Where they run


def _anywhere(device: torch.device) -> str | None:
    return None


def _on_cpu(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"it needs a CPU, and the device is {device}"
    return None if onednn.available() else "this build of torch has no oneDNN routines, or oneDNN is switched off"


@functools.cache
def _proved(device: torch.device) -> str | None:
    """One run on random numbers, against GELU's tanh form in float64; both forms differ by up to 5e-4."""
    if not hasattr(torch, "_addmm_activation"):
        return f"torch {torch.__version__} has no _addmm_activation"
    try:
        for dtype in DTYPES:
            if reason := _compared(device, dtype):
                return reason
    except RuntimeError as error:
        return f"torch._addmm_activation fails here: {str(error).splitlines()[0]}"
    return None


@torch.no_grad()
def _compared(device: torch.device, dtype: torch.dtype) -> str | None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((256, 128), (192, 128), (192,))
    drawn = (torch.randn(*shape, generator=generator, dtype=torch.float32) for shape in shapes)
    x, weight, bias = (one.to(dtype) for one in drawn)
    weight /= 128**0.5 / 2
    made, eager = (run(x.to(device), weight.to(device), bias.to(device), True) for run in (_cublaslt, _aten))
    exact = _aten(x.double(), weight.double(), bias.double(), True)
    found, allowed = ((one.double().cpu() - exact).abs().max().item() for one in (made, eager))
    if found > 2 * allowed:
        return f"torch._addmm_activation is another GELU here: off by {found:.0e} in {dtype}, eager by {allowed:.0e}"
    return None


def _backends(gelu: bool) -> dict[str, Callable[..., Any]]:
    made = {
        "aten": Linear(_aten, gelu, _anywhere),
        "onednn": Linear(_onednn, gelu, _on_cpu),
        "packed": Linear(_packed, gelu, _on_cpu),
    }
    return {**made, "cublaslt": Linear(_cublaslt, gelu, _proved)} if gelu else dict(made)


BACKENDS: Mapping[str, Mapping[str, Callable[..., Any]]] = {
    "linear": _backends(gelu=False),
    "linear_gelu_tanh": _backends(gelu=True),
}
