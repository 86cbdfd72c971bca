"""How many bytes of tensors an eager computation holds at most: what a device's allocator would hand out, read off the
operations themselves, so that it can be measured without a GPU."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Counts the storages that operations make while it is active. `peak`: bytes of them alive at once, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {self._key(t) for t in tree_leaves((args, kwargs)) if self._is_known(t)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if self._is_known(tensor) and self._key(tensor) not in given | self._known:
                self._note(tensor.untyped_storage())
        return out

    @staticmethod
    def _is_known(value: Any) -> bool:
        """Not so of oneDNN's packed weights, which have no storage."""
        return isinstance(value, torch.Tensor) and not value.is_mkldnn

    @staticmethod
    def _key(tensor: torch.Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size
