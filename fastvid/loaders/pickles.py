"""The child process of `fastvid convert` that opens a pickle: torch.load with weights_only, which makes nothing but
tensors. The file is mapped, so that no more than a tensor of it is in memory.

    python -m fastvid.loaders.pickles FILE [KEY]

First line out: {"tensors": {name: [dtype, shape]}} or {"error": text}. Then for every line in, a name as a JSON string,
the tensor's bytes go out.
"""

from __future__ import annotations

import json
import pickle
import sys
from typing import Any

import torch
from torch import Tensor

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
# Where checkpoints of training code keep the weights; averaged ones first.
INSIDE = (
    *("generator_ema", "ema", "params_ema", "generator", "generator_lora"),
    *("state_dict", "model_state_dict", "model", "module"),
)
# What wrappers of modules (FSDP, activation checkpointing, torch.compile) put into names, wherever they stand.
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


class Refused(Exception):
    """The file is not what can be read; the text ends a sentence that begins with its name."""


def main(path: str, key: str = "") -> int:
    """Serve one file, or what stands in it under `key`, on standard input and output."""
    out, sys.stdout = sys.stdout.buffer, sys.stderr
    try:
        tensors = read(path, key)
        told = {name: [DTYPES[tensor.dtype], list(tensor.shape)] for name, tensor in tensors.items()}
        out.write(json.dumps({"tensors": told}).encode() + b"\n")
    except Refused as error:
        out.write(json.dumps({"error": str(error)}).encode() + b"\n")
        return 1
    out.flush()
    for line in sys.stdin:
        tensor = tensors[json.loads(line)].detach().contiguous().reshape(-1)
        out.write(memoryview(tensor.view(torch.uint8).numpy()))
        out.flush()
    return 0


def read(path: str, key: str = "") -> dict[str, Tensor]:
    """The tensors of a file, mapped, by their names without those of wrappers. Raises Refused."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        first = str(error).replace("WeightsUnpickler error: ", "").split("\n")
        detail = next((line.strip() for line in first if "Unsupported" in line or "GLOBAL" in line), first[0])
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
    return check(unwrapped(inside(chosen(state, key))))


def chosen(state: Any, key: str) -> Any:
    """What stands under `key`, or all of it if that is empty."""
    if not key:
        return state
    entries = state if isinstance(state, dict) else {}
    if not isinstance(entries.get(key), dict):
        names = ", ".join(str(name) for name, value in list(entries.items())[:10] if isinstance(value, dict))
        raise Refused(f"has no weights under {key!r}; it has {names or 'none that are sorted under names'}")
    return state[key]


def unwrapped(tensors: dict[Any, Tensor]) -> dict[Any, Tensor]:
    """The same without the names of wrappers, unless two would become one."""
    made = {}
    for name, tensor in tensors.items():
        plain = name
        for wrapper in WRAPPERS if isinstance(name, str) else ():
            plain = plain.replace(wrapper, "")
        if plain in made:
            raise Refused(f"holds {plain} twice, once in a wrapper")
        made[plain] = tensor
    return made


def inside(state: Any) -> dict[str, Tensor]:
    """The dict of tensors in what was loaded: itself, or the entry that holds the weights."""
    for _ in range(4):
        if not isinstance(state, dict):
            break
        if tensors := {name: value for name, value in state.items() if isinstance(value, Tensor)}:
            return tensors
        known = [name for name in INSIDE if isinstance(state.get(name), dict)]
        if not known:
            break
        state = state[known[0]]
    names = ", ".join(map(str, list(state)[:10])) if isinstance(state, dict) else type(state).__name__
    raise Refused(f"holds no dict of tensors ({names or 'nothing'}); looked for are {', '.join(INSIDE)}")


def check(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same, if safetensors has a place for all of it."""
    for name, tensor in tensors.items():
        if not isinstance(name, str) or tensor.layout != torch.strided or tensor.is_meta:
            raise Refused(f"holds {name!r}, which is not a plain tensor with a name")
        if tensor.dtype not in DTYPES:
            raise Refused(f"holds {name} as {tensor.dtype}, which safetensors files cannot")
    return tensors


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
