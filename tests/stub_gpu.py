"""A stub of a GPU: tensors that say they are on "cuda:0" and keep their values on the CPU, so that whole computations
run, and every place where the host would wait for the device is seen.

    with stub_gpu() as gpu:
        move(module)
        module(torch.randn(2, 3, device="cuda"))
    gpu.waits       # "aten._local_scalar_dense at fastvid/engine/finite.py:20", ...

The host waits where a value is read (`.item()`, `bool()`, `nonzero()`, a mask as an index), where a tensor comes from
pageable host memory or without non_blocking, where it goes to the host, and where a stream or an event is synchronized.
Operations on tensors of both devices raise, as on a GPU; only host scalars may take part.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ROOT = str(Path(__file__).parents[1] / "fastvid")
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
READS = {
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "equal",
    "allclose",
    "nonzero",
    "nonzero_static",
    "masked_select",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "repeat_interleave",
}
"""Operations whose result the host needs: a value, or a size that depends on values."""
MOVES = {"_to_copy", "copy_", "_pin_memory", "is_pinned", "pin_memory"}


class OnGpu(Tensor):
    """values: on the CPU. Torch's C++ takes it for a tensor on "meta", which is a device in every build of torch."""

    values: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, values: Tensor) -> OnGpu:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device="meta",
        )

    def __init__(self, values: Tensor) -> None:
        self.values = values

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False

    def new_tensor(self, data: Any, *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:  # type: ignore[override]
        return torch.tensor(data, dtype=dtype or self.dtype, device=CUDA)

    def tolist(self) -> Any:
        _ACTIVE[-1].wait("tolist")
        return self.values.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert _ACTIVE, "a tensor of the stub outside of it"
        return _ACTIVE[-1].run(func, args, kwargs or {})


_ACTIVE: list[StubGpu] = []


class StubGpu(TorchDispatchMode):
    """waits: the operations at which the host waited, with the line of fastvid that called them."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.operations = 0
        self._pinned: set[int] = set()
        self._kept: list[Tensor] = []  # pinned memory, whose addresses must not be used again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def wait(self, what: str) -> None:
        """Notes that the host waits here."""
        lines = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_stack() if ROOT in frame.filename]
        self.waits.append(f"{what} at {lines[-1].removeprefix(ROOT) if lines else 'a test'}")

    def event(self) -> SimpleNamespace:
        """An event behind the operations so far. Waiting for it is noted with how many were queued behind it."""
        at = self.operations
        return SimpleNamespace(synchronize=lambda: self.wait(f"event, {self.operations - at} operations ahead"))

    @contextmanager
    def counting(self) -> Iterator[list[str]]:
        """The waits within the block."""
        before, made = len(self.waits), list[str]()
        yield made
        made += self.waits[before:]

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        name = func._schema.name.removeprefix("aten::")
        composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
        if composite and name not in READS:
            with self:
                return func.decompose(*args, **kwargs)
        self.operations += 1
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        here = [one for one in given if isinstance(one, OnGpu)]
        asked = kwargs.get("device")
        target = torch.device(asked).type if asked is not None else ("cuda" if here else "cpu")
        target = "cuda" if target == "meta" else target
        if name in MOVES:
            self._move(name, args, kwargs, target)
        elif here:
            self._check(name, func, args, given, here)
        if name in ("_pin_memory", "pin_memory"):
            return self._pin(args[0])
        if name == "is_pinned":
            return args[0].data_ptr() in self._pinned
        return self._computed(func, args, kwargs, given, target)

    def _computed(self, func: Any, args: Any, kwargs: dict[str, Any], given: list[Tensor], target: str) -> Any:
        known = {id(one.values): one for one in given if isinstance(one, OnGpu)}
        pinned = kwargs.pop("pin_memory", None)
        kwargs = {**kwargs, "device": CPU} if kwargs.get("device") is not None else kwargs
        made = func(*_values(args), **_values(kwargs))

        def wrapped(one: Any) -> Any:
            if not isinstance(one, Tensor):
                return one
            if pinned:
                self._note_pinned(one)
            if id(one) in known:
                return known[id(one)]
            return OnGpu(one) if target == "cuda" else one

        return tree_map(wrapped, made)

    def _check(self, name: str, func: Any, args: Any, given: list[Tensor], here: list[OnGpu]) -> None:
        if name in READS:
            self.wait(f"aten.{name}")
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            indices = [one for one in tree_leaves(args[1]) if isinstance(one, Tensor)]
            if any(one.dtype == torch.bool for one in indices):
                self.wait(f"aten.{name} with a mask")
            if not all(isinstance(one, OnGpu) for one in indices):
                self.wait(f"aten.{name} with an index on the host")
            return
        if any(not isinstance(one, OnGpu) and one.ndim for one in given):
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, found cuda:0 and cpu")

    def _move(self, name: str, args: Any, kwargs: dict[str, Any], target: str) -> None:
        """Notes waits of copies between devices."""
        if name == "copy_":
            source, from_gpu, to_gpu = args[1], isinstance(args[1], OnGpu), isinstance(args[0], OnGpu)
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            host = args[0] if from_gpu else source
        else:
            source, from_gpu, to_gpu = args[0], isinstance(args[0], OnGpu), target == "cuda"
            non_blocking, host = kwargs.get("non_blocking", False), None if isinstance(args[0], OnGpu) else source
        if from_gpu == to_gpu or name not in ("_to_copy", "copy_"):
            return
        if not non_blocking:
            self.wait(f"aten.{name} between devices")
        elif host is None or host.data_ptr() not in self._pinned:
            self.wait(f"aten.{name} of pageable memory")

    def _pin(self, x: Tensor) -> Tensor:
        made = x.clone()
        self._note_pinned(made)
        return made

    def _note_pinned(self, x: Tensor) -> None:
        self._pinned.add(x.data_ptr())
        self._kept.append(x)


@contextmanager
def stub_gpu() -> Iterator[StubGpu]:
    """The stub, and torch.cuda's streams as far as fastvid calls them."""
    gpu = StubGpu()
    stream = SimpleNamespace(cuda_stream=0, synchronize=lambda: gpu.wait("stream.synchronize"))
    stream.record_event, stream.wait_event = gpu.event, lambda *_: None
    patches = {
        "_lazy_init": lambda: None,
        "current_stream": lambda device=None: stream,
        "synchronize": lambda device=None: gpu.wait("torch.cuda.synchronize"),
    }
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") is made on the CPU, then moved
    _ACTIVE.append(gpu)
    try:
        with mock.patch.multiple(torch.cuda, **patches), gpu:
            yield gpu
    finally:
        _ACTIVE.pop()
        torch._C._set_only_lift_cpu_tensors(False)


def _values(tree: Any) -> Any:
    return tree_map(lambda one: one.values if isinstance(one, OnGpu) else one, tree)


def move(module: nn.Module) -> nn.Module:
    """A module with its weights and buffers on the stub."""
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, one in table.items():
                if one is not None and not isinstance(one, OnGpu):
                    table[name] = OnGpu(one.detach())
    return module
