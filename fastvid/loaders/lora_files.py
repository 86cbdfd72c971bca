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
from fastvid.loaders import hub, hub_cache, safetensors
from fastvid.loaders.peft_settings import FILE as SETTINGS_FILE
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
    try:
        path = Path(text).expanduser()
        if path.is_dir():
            file = path / choose(str(path), _names_in(path))
            return Source(file, file.absolute())
        if path.exists() or not _is_hub_name(text):
            return Source(path, path.absolute())
    except (OSError, ValueError, RuntimeError) as error:  # a NUL, a user that is not there
        raise CheckpointError(
            f"lora {text!r:.80} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None
    return _from_hub(text, download)


def choose(where: str, names: list[str]) -> str:
    """Which file of a folder or repository is the LoRA. Raises CheckpointError if none is, or several may be."""
    found = [name for name in names if name.endswith(safetensors.SUFFIXES)]
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
    inside = Path(text.split("/")[0]).exists() or (text.endswith(safetensors.SUFFIXES) and text.count("/") == 1)
    return hub.is_hub_name(text) and not inside


def _from_hub(name: str, download: bool) -> Source:
    repo, file = hub.split(name)

    def with_settings(names: list[str]) -> list[str]:
        chosen = file or choose(repo, [name for name in names if "/" not in name])
        if chosen not in names:
            raise CheckpointError(f"the repository has no such file; it has {some(names)}")
        beside = str(Path(chosen).with_name(SETTINGS_FILE))
        return [chosen, *([beside] if beside in names else [])]

    try:
        folder = hub_cache.snapshot(repo)
        cached = with_settings(hub.names_below(folder)) if folder and _holds(folder, file) else []
        usable = folder and cached and not hub_cache.damaged(folder, cached)
        if folder and usable and (_is_settled(file, cached) or not download):
            return Source(folder / cached[0], Path(repo, cached[0]))
        if download:
            folder, chosen = hub.get(name, with_settings)
            return Source(folder / chosen[0], Path(repo, chosen[0]))
    except CheckpointError as error:
        raise CheckpointError(f"lora {name}: no such file or folder here, and on the hub: {error}") from None
    state = "damaged in the local cache of the hub" if cached else "not in the local cache of the hub"
    raise CheckpointError(
        f"lora {name}: there is no such file or folder, and it is {state}; `hf download "
        f"{name.replace(repo + '/', repo + ' ')}` fetches it"
    )


def _is_settled(file: str, cached: list[str]) -> bool:
    """Whether the hub can't say more than the cache: another LoRA in the repository, or peft's settings beside it."""
    name = cached[0].rpartition("/")[2]
    return len(cached) > 1 or (name != STANDARD_NAMES[1] and (bool(file) or name == STANDARD_NAMES[0]))


def _holds(folder: Path, file: str) -> bool:
    """Whether a snapshot has a file, or any LoRA."""
    return (folder / file).is_file() if file else any(name.endswith(safetensors.SUFFIXES) for name in _names_in(folder))


def _names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())
