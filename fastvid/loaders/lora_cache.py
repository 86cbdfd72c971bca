"""LoRA files that were read, so that requests that ask for the same ones do not read them again."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastvid.loaders.lora import Lora, as_entries, check_expert, read_source
from fastvid.loaders.lora_branches import Builder
from fastvid.loaders.lora_files import find_file
from fastvid.loaders.peft_settings import FILE as SETTINGS_FILE

LIMIT = 2**30  # bytes of files; a LoRA of rank 64 for a 14B model has 0.6 GB

Key = tuple[Any, ...]


class LoraCache:
    """LoRAs by file, time of its last change, and size; the least recently used go first. limit: bytes of the files.
    builder: makes branches of them, which requests that run at the same time share."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.builder, self._limit, self._lock = Builder(), limit, threading.Lock()
        self._read: OrderedDict[Key, tuple[int, tuple[Lora, ...]]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._read)

    def read(self, loras: Sequence[Any], download: bool = False) -> tuple[Lora, ...]:
        """As `lora.read_loras`. Raises InvalidRequest, CheckpointError."""
        return tuple(one for entry in as_entries(loras) for one in self._read_one(*entry, download=download))

    def _read_one(self, given: Any, scale: float = 1.0, expert: str = "", *, download: bool) -> tuple[Lora, ...]:
        check_expert(given, expert)
        source = find_file(given, download)
        if not source.file.is_file():
            return read_source(source, scale, expert)  # which raises
        with self._lock:
            key, size = _key(source.file)
            if key not in self._read:
                self._read[key] = size, read_source(source)
            self._read.move_to_end(key)
            found = self._read[key][1]
            while sum(size for size, _ in self._read.values()) > self._limit:
                self._read.popitem(last=False)
        return tuple(replace(one, scale=scale, expert=expert, name=source.name) for one in found)


def _key(file: Path) -> tuple[Key, int]:
    """What tells whether a LoRA is the one that was read, and its size. peft's settings count as well."""
    beside = file.with_name(SETTINGS_FILE)
    states = [os.stat(one) for one in (file, beside) if one.is_file()]
    times = tuple((state.st_mtime_ns, state.st_size, state.st_ino) for state in states)
    return (str(file.absolute()), times), states[0].st_size
