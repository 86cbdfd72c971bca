"""Models from the Hugging Face hub: found in the local cache, or downloaded into it once, only what a pipeline reads.

The cache, the login and HF_HUB_OFFLINE are huggingface_hub's own. After a download that was interrupted, only the files
that were not whole are fetched; huggingface_hub 2.4 takes up a part of a file within one process alone.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from fastvid.errors import CheckpointError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# A repository may hold the same weights in other formats and types, example videos and licences beside these.
FILES = [
    "model_index.json",
    "*/*.json",
    "*/diffusion_pytorch_model*.safetensors",
    "*/model*.safetensors",
    "tokenizer/*",
]
OTHER_TYPES = ["*.fp16*.safetensors", "*.bf16*.safetensors", "*.fp32*.safetensors"]
SELECTION = {"allow_patterns": FILES, "ignore_patterns": OTHER_TYPES}
UNWEIGHTED = ("scheduler", "tokenizer", "image_processor", "feature_extractor")  # parts that have no weights


def find(model: str) -> Path | None:
    """The folder of a hub id in the local cache, None if not all of it is there. Nothing is downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        folder = Path(snapshot_download(model, **SELECTION, local_files_only=True))
    except (HFValidationError, OSError):  # not there is an OSError too
        return None
    return folder if complete(folder) else None


def download(model: str) -> Path:
    """Download what is missing of a hub id and return its folder; progress is shown on a terminal.

    Raises:
        CheckpointError: the hub can't be reached, has no such model or does not give it; what to do then.
    """
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, **SELECTION, tqdm_class=_quiet_off_terminals()))
    except hub.HFValidationError as error:
        raise CheckpointError(f"model={model!r} is no hub id: {error}") from None
    except hub.GatedRepoError:
        raise CheckpointError(
            f"model={model!r}: its owner wants terms to be accepted on the hub's page first; then `hf auth login`"
        ) from None
    except hub.RepositoryNotFoundError:
        raise CheckpointError(
            f"model={model!r}: the hub has no such model, or it is private (`hf auth login`); a published one is "
            "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
        ) from None
    except (hub.HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"model={model!r} is not (all) in the local cache and could not be downloaded: {_first_line(error)}; where "
            f"there is a network `hf download {model}` fetches it, into the folder that HF_HOME names"
        ) from None


def complete(folder: Path) -> bool:
    """Whether a snapshot holds every part that its model_index.json names, with all shards of its weights."""
    try:
        index = json.loads((folder / "model_index.json").read_text())
        parts = [name for name, value in index.items() if isinstance(value, list) and all(value)]
        return all(_has_part(folder / name) for name in parts)
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return False


def _has_part(folder: Path) -> bool:
    if folder.name in UNWEIGHTED:
        return any(folder.glob("*"))
    indexes = list(folder.glob("*.safetensors.index.json"))
    if not indexes:
        return any(folder.glob("*.safetensors"))
    shards = {name for index in indexes for name in json.loads(index.read_text())["weight_map"].values()}
    return all((folder / name).is_file() for name in shards)


def _quiet_off_terminals() -> Any:
    """tqdm's bar, shown on a terminal only."""
    from tqdm.auto import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)  # huggingface_hub's own bar takes one
            super().__init__(*args, **{**options, "disable": None})

    return Bar


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
