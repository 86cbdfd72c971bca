"""Finds the file of a LoRA, from a path, a folder or a hub name, and reads its tensors and its header."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastvid.errors import CheckpointError
from fastvid.loaders import hub, safetensors
from fastvid.models.wan.weight_names import some

STANDARD_NAMES = ("pytorch_lora_weights" + safetensors.SUFFIX, "adapter_model" + safetensors.SUFFIX)
INTEGERS = ("I64", "I32")  # alpha may be a whole number
EXPECTED = f"{STANDARD_NAMES[0]}, {STANDARD_NAMES[1]} or exactly one other {safetensors.SUFFIX} file"


@dataclass(frozen=True)
class Source:
    """Where a LoRA is. file: on this machine. name: what its name is read from (see `expert_names`): a path, or the
    hub's name of the file."""

    file: Path
    name: Path


def find_file(given: str | os.PathLike[str], download: bool = False) -> Source:
    """The file of a LoRA: a path, a folder with one, or a hub name (org/name, org/name/file.safetensors), which is
    looked up in the local cache; with `download`, what is missing there is fetched. Raises CheckpointError."""
    text = os.fspath(given)
    path = Path(text).expanduser()
    try:
        if path.is_dir():
            file = path / choose(str(path), _names_in(path))
            return Source(file, file.absolute())
        if path.exists() or not _is_hub_name(text):
            return Source(path, path.absolute())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"lora {text!r:.80}: {error}") from None
    return _from_hub(text, download)


def choose(where: str, names: list[str]) -> str:
    """Which file of a folder or repository is the LoRA. Raises CheckpointError if none is, or several may be."""
    found = [name for name in names if name.endswith(safetensors.SUFFIX)]
    if standard := [name for name in STANDARD_NAMES if name in found]:
        found = standard
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(f"{where} holds several LoRA files ({some(found)}); give one of them, such as {found[0]}")
    if pickles := [name for name in names if name.endswith(safetensors.PICKLES)]:
        raise CheckpointError(
            f"{where} holds pickles only ({some(pickles)}), which fastvid does not open; `fastvid convert` makes "
            f"{safetensors.SUFFIX} files of them"
        )
    raise CheckpointError(f"{where} holds no LoRA; {EXPECTED} is expected")


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(the tensors of a LoRA file, the texts in its header). Raises CheckpointError if it is missing, broken, a pickle,
    or has values that are not finite."""
    if path.suffix in safetensors.PICKLES:
        raise CheckpointError(
            f"{path} is a pickle, which fastvid does not open; a {safetensors.SUFFIX} file is expected, such as "
            f"`fastvid convert {path} {path.with_suffix(safetensors.SUFFIX)}` makes of it"
        )
    entries = safetensors.read_header(path)
    if kinds := {entry.dtype for entry in entries.values()} - {*safetensors.FLOATS, *INTEGERS}:
        raise CheckpointError(
            f"{path} holds {', '.join(sorted(kinds))} tensors; known are {', '.join(safetensors.FLOATS)}"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a valid safetensors file ({error}); download it again") from None
    _check_finite(path, tensors)
    return tensors, metadata


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are numbers, and none is infinite."""
    if not tensor.numel() or not tensor.is_floating_point():
        return True
    low, high = torch.aminmax(tensor)  # NaN if any value is
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    if wrong := [name for name, tensor in tensors.items() if not is_finite(tensor)]:
        raise CheckpointError(
            f"{path} has NaN or infinite values in {some(wrong)}; training has diverged, or the file is damaged"
        )


# ---------------------------------------------------------------- the hub


def _is_hub_name(text: str) -> bool:
    """Whether a name that is no path here may be on the hub: folder/file.safetensors, and a path inside a folder that
    exists, are not."""
    inside = Path(text.split("/")[0]).exists() or (text.endswith(safetensors.SUFFIX) and text.count("/") == 1)
    return hub.is_hub_name(text) and not inside


def _from_hub(name: str, download: bool) -> Source:
    repo, file = hub.split(name)
    file = file or _file_in_cache(repo)
    full = f"{repo}/{file}" if file else name
    try:
        found = hub.find(full) if file else None
        if found is None and download and file:
            found = hub.download(full)
    except CheckpointError as error:
        raise CheckpointError(f"lora {name}: {error}") from None
    if found is None:
        raise CheckpointError(
            f"lora {name}: there is no such file or folder, and it is not in the local cache of the hub; `hf download "
            f"{full.replace(repo + '/', repo + ' ')}` fetches it"
        )
    return Source(found, Path(full))


def _file_in_cache(repo: str) -> str:
    """The LoRA file of a repository in the local cache; "" if it is not there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:  # a pattern that matches nothing: otherwise huggingface_hub requires files that we never download
        folder = Path(snapshot_download(repo, allow_patterns=["/"], local_files_only=True))
    except (HFValidationError, OSError):
        return ""
    names = _names_in(folder)
    return choose(repo, names) if any(name.endswith(safetensors.SUFFIX) for name in names) else ""


def _names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())
