"""Reads pickles safely: only a child process opens them, with torch.load and weights_only, which creates nothing but
tensors. The file is memory-mapped, so at most one of its tensors is in memory.

    python -m fastvid.loaders.pickles FILE [KEY]

The child first writes one line: {"tensors": {name: [dtype, shape, bytes]}} or {"error": text}. Then it reads tensor
names, one JSON string per line, and writes the bytes of each. `PickleReader` is the parent's side.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from fastvid.errors import CheckpointError
from fastvid.files import open_regular, reason
from fastvid.loaders.safetensors import MAX_TENSORS
from fastvid.loaders.storages import check_storages

CHUNK = 2**24  # bytes per read
MAX_SECONDS = 60  # of CPU time until the tensors are listed
MAX_SHARED = 4  # times that a file's bytes may be in its tensors; tied weights are there twice
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
# Where training checkpoints keep their weights; averaged weights first.
WEIGHT_KEYS = (
    *("generator_ema", "ema", "params_ema", "generator", "generator_lora"),
    *("state_dict", "model_state_dict", "model", "module"),
)
# Prefixes that module wrappers (FSDP, activation checkpointing, torch.compile) insert into names at any level.
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


class PickleReader:
    """Reads tensors from a pickle through a child process. This process unpickles nothing.

    tensors: name -> (dtype as safetensors writes it, shape, bytes).
    """

    def __init__(self, path: Path, key: str = "") -> None:
        self.path = path
        try:
            open_regular(path).close()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {reason(error)}") from None
        self.tensors: dict[str, tuple[str, tuple[int, ...], int]] = {}
        # Same import path as this process. The working directory is ours, so no file of the user's shadows a module.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        child = subprocess.Popen(
            [sys.executable, "-m", "fastvid.loaders.pickles", str(path.resolve()), key],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=Path(__file__).parents[2],
            env=environment,
        )
        assert child.stdin and child.stdout
        self._child, self._to_child, self._from_child = child, child.stdin, child.stdout

    def __enter__(self) -> PickleReader:
        try:
            reply = json.loads(self._from_child.readline() or "null")
            if not isinstance(reply, dict) or "tensors" not in reply:
                raise CheckpointError(f"{self.path} {reply['error'] if reply else self._why_it_ended()}")
        except BaseException:
            self.__exit__()
            raise
        self.tensors = {name: (dtype, tuple(shape), size) for name, (dtype, shape, size) in reply["tensors"].items()}
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):  # the child may have exited
            self._to_child.close()
        self._child.terminate()
        self._child.wait()
        self._from_child.close()
        self._errors.close()

    def chunks(self, name: str, begin: int, end: int) -> Iterator[bytes]:
        """Yield bytes [begin, end) of a tensor in chunks. The whole tensor goes through the pipe."""
        try:
            self._to_child.write(json.dumps(name).encode() + b"\n")
            self._to_child.flush()
        except OSError:
            raise CheckpointError(f"{self.path} {self._why_it_ended()}") from None
        at = 0
        for chunk in read_exactly(self._from_child, self.tensors[name][2], f"{self.path} ended within {name}"):
            yield chunk[max(0, begin - at) : max(0, end - at)]
            at += len(chunk)

    def _why_it_ended(self) -> str:
        code = self._child.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"cannot be read: its process ended with {code} ({lines[-1][:200] if lines else 'silent'})"


def read_exactly(file: IO[bytes], size: int, problem: str) -> Iterator[bytes]:
    """Yield `size` bytes of a file in chunks. Raises CheckpointError(problem) if the file is shorter."""
    while size > 0:
        chunk = file.read(min(CHUNK, size))
        if not chunk:
            raise CheckpointError(problem)
        size -= len(chunk)
        yield chunk


# ---------------------------------------------------------------- in the child


class Refused(Exception):
    """The file can't be read. The text completes a sentence that starts with the file's name."""


def main(path: str, key: str = "") -> int:
    """Serve the tensors of one file, or those under `key` in it, on standard input and output."""
    out, sys.stdout = sys.stdout.buffer, sys.stderr
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)  # ends this process
    try:
        tensors = _load(path, key)
        listing = {name: [DTYPES[one.dtype], list(one.shape), one.nbytes] for name, one in tensors.items()}
        out.write(json.dumps({"tensors": listing}).encode() + b"\n")
    except Refused as error:
        out.write(json.dumps({"error": str(error)}).encode() + b"\n")
        return 1
    finally:
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_PROF, 0)
    out.flush()
    for line in sys.stdin:
        tensor = tensors[json.loads(line)].detach().contiguous().reshape(-1)
        out.write(tensor.view(torch.uint8).numpy().data)
        out.flush()
    return 0


def _load(path: str, key: str = "") -> dict[str, Tensor]:
    """The memory-mapped tensors of a file, by name without wrapper prefixes. Raises Refused."""
    try:
        if zipfile.is_zipfile(path):  # torch says what any other file is
            check_storages(path)
    except Exception as error:
        raise Refused(f"is damaged and was not opened: it {' '.join(str(error).split())[:200]}") from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        lines = str(error).replace("WeightsUnpickler error: ", "").split("\n")
        detail = next((line.strip() for line in lines if "Unsupported" in line or "GLOBAL" in line), lines[0])
        raise Refused(
            f"holds more than plain tensors and was refused, nothing in it was run ({detail[:200]}); only files of "
            "plain tensors are read"
        ) from None
    except Exception as error:
        if "mmap can only be used" in str(error):
            raise Refused(
                "is not in the zip format that torch.save has written since version 1.6, the only one that can be read "
                "piece by piece; it was not opened. Download it again or, if you trust it, load and save it with torch"
            ) from None
        raise Refused(f"cannot be read as a torch file ({' '.join(str(error).split())[:200]})") from None
    return _check(_without_wrappers(_find_tensors(_under_key(state, key))))


def _under_key(state: Any, key: str) -> Any:
    """The value under `key`, or all of `state` if the key is empty."""
    if not key:
        return state
    entries = state if isinstance(state, dict) else {}
    if not isinstance(entries.get(key), dict):
        names = ", ".join(str(name) for name, value in list(entries.items())[:10] if isinstance(value, dict))
        raise Refused(f"has no weights under {key!r}; it has {names or 'none that are sorted under names'}")
    return state[key]


def _without_wrappers(tensors: dict[Any, Tensor]) -> dict[Any, Tensor]:
    """Remove wrapper prefixes from the names. Raises Refused if two names become equal."""
    renamed = {}
    for name, tensor in tensors.items():
        plain = name
        for wrapper in WRAPPERS if isinstance(name, str) else ():
            plain = plain.replace(wrapper, "")
        if plain in renamed:
            raise Refused(f"holds {plain} twice, once in a wrapper")
        renamed[plain] = tensor
    return renamed


def _find_tensors(state: Any) -> dict[str, Tensor]:
    """The dict of tensors in a loaded checkpoint: the checkpoint itself, or its entry that holds the weights."""
    for _ in range(4):
        if not isinstance(state, dict):
            break
        if tensors := {name: value for name, value in state.items() if isinstance(value, Tensor)}:
            return tensors
        known = [name for name in WEIGHT_KEYS if isinstance(state.get(name), dict)]
        if not known:
            break
        state = state[known[0]]
    names = ", ".join(map(str, list(state)[:10])) if isinstance(state, dict) else type(state).__name__
    raise Refused(f"holds no dict of tensors ({names or 'nothing'}); looked for are {', '.join(WEIGHT_KEYS)}")


def _check(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `tensors`. Raises Refused if safetensors can't store one of them, or if they are more than the file holds:
    views that repeat its numbers."""
    if len(tensors) > MAX_TENSORS:
        raise Refused(f"holds {len(tensors):,} tensors; at most {MAX_TENSORS:,} are read")
    held: dict[int, int] = {}
    for name, tensor in tensors.items():
        if not isinstance(name, str) or tensor.layout != torch.strided or tensor.is_meta:
            raise Refused(f"holds {name!r:.80}, which is not a plain tensor with a name")
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        if tensor.nbytes > storage.nbytes():
            raise Refused(f"holds {name[:80]} as {list(tensor.shape)}, which repeats the fewer numbers that are stored")
        if tensor.dtype not in DTYPES:
            raise Refused(f"holds {name[:80]} as {tensor.dtype}, which safetensors files cannot")
    if (total := sum(tensor.nbytes for tensor in tensors.values())) > MAX_SHARED * sum(held.values()):
        raise Refused(f"holds {sum(held.values()):,} bytes, which its tensors share so often that they have {total:,}")
    return tensors


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
