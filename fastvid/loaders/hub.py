"""Models from the Hugging Face hub: looked up in the local cache, or downloaded to it. Downloads only needed files.

    org/name                            a repository in diffusers' layout, or in the original one
    org/name/path/to/file.safetensors   one file of a repository

The repository's list of files determines what to download. huggingface_hub manages the cache, the login and
HF_HUB_OFFLINE. After an interrupted download, only incomplete files are downloaded again; huggingface_hub 2.4 resumes
within a file only in the same process.
"""

from __future__ import annotations

import glob
import importlib
import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from fastvid.errors import CheckpointError
from fastvid.loaders import layouts, safetensors
from fastvid.loaders.layouts import CONFIG, EXPERT_FOLDERS, EXTRAS, INDEX, ORIGINAL_PATTERNS, ORIGINAL_TOKENIZER
from fastvid.models.common.config_reader import read_json

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILE = re.compile(r"([\w.-]+/[\w.-]+)/((?:[\w .()+-]+/)*[\w .()+-]+\.safetensors)")
SHARD = re.compile(r"-\d{5}-of-(\d{5})\.safetensors$")
# Repositories may also hold other formats and dtypes of the weights, example videos and licenses.
DIFFUSERS_FILES = (
    INDEX,
    "*/*.json",
    "*/diffusion_pytorch_model*.safetensors",
    "*/model*.safetensors",
    "tokenizer/*",
)
OTHER_TYPES = ("*.fp16*.safetensors", "*.bf16*.safetensors", "*.fp32*.safetensors")
UNWEIGHTED = ("scheduler", "tokenizer", "image_processor", "feature_extractor")  # parts without weights
# The original repositories publish their encoders as pickles; copies of them use safetensors.
WEIGHTS = "diffusion_pytorch_model*.safetensors"
TRANSFORMERS = (WEIGHTS, *(f"{folder}/{WEIGHTS}" for folder in EXPERT_FOLDERS.values()))
CONFIGS = (CONFIG, f"*/{CONFIG}", "*.safetensors.index.json", EXTRAS, f"{ORIGINAL_TOKENIZER}/*")
SHOWN = 8  # file names listed in an error message
T = TypeVar("T")


def is_hub_name(model: str) -> bool:
    """Whether a name has the form of a hub name: org/name, or a file in it. A path inside a local folder does not."""
    if HUB_ID.fullmatch(model):
        return True
    return HUB_FILE.fullmatch(model) is not None and not Path(model.split("/")[0]).exists()


def find(model: str) -> Path | None:
    """The folder or file of a hub name in the local cache; None if it is incomplete. Downloads nothing."""
    repo, file = split(model)
    folder = _snapshot(repo)
    if folder is None:
        return None
    if file:
        return folder / file if _has_file(folder, file) else None
    return folder if complete(folder) else None


def _snapshot(repo: str) -> Path | None:
    """The folder of a repository in the local cache, complete or not; None if there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:  # a pattern that matches nothing: otherwise huggingface_hub requires files that we never download
        return Path(snapshot_download(repo, allow_patterns=["/"], local_files_only=True))
    except (HFValidationError, OSError):  # a missing snapshot raises OSError too
        return None


def download(model: str) -> Path:
    """Download the missing files of a hub name and return its folder or file. Shows progress on a terminal.

    Raises CheckpointError if the hub is unreachable, does not have the model or file, refuses access, or has it only in
    an unsupported format.
    """
    from huggingface_hub import snapshot_download

    repo, file = split(model)
    names = _with_hub_errors(model, lambda: _list_files(repo))
    chosen = _with_shards(model, file, names) if file else select(model, names)
    fetch = lambda: snapshot_download(repo, allow_patterns=chosen, tqdm_class=_quiet_off_terminals())  # noqa: E731
    folder = Path(_with_hub_errors(model, fetch))
    return folder / file if file else folder


def split(model: str) -> tuple[str, str]:
    """(repository, file in it or "")."""
    match = HUB_FILE.fullmatch(model)
    return (match[1], match[2]) if match else (model, "")


def select(model: str, names: Iterable[str]) -> list[str]:
    """The files of a repository that a pipeline reads. Raises CheckpointError if they are not a complete model."""
    names = sorted(names)
    if INDEX in names:
        return [name for name in names if _matches(name, DIFFUSERS_FILES) and not _matches(name, OTHER_TYPES)]
    files = [name for name in names if name.endswith(".safetensors")]
    if not any(_is_at(name, TRANSFORMERS) for name in names):
        raise CheckpointError(
            f"model={model!r} has neither a {INDEX} nor {WEIGHTS}, so it is no whole model; "
            + (
                f"give one of its files, such as {model}/{files[0]} (it has {_some(files)})"
                if files
                else "it has no weights"
            )
        )
    encoders, pickles = {}, []
    for part, pattern in ORIGINAL_PATTERNS.items():
        encoders[part] = [name for name in names if _is_at(name, [pattern + ".safetensors"])]
        if not encoders[part]:
            pickles += [name for name in names if _is_at(name, [pattern + end for end in safetensors.PICKLES])]
    if pickles:
        raise CheckpointError(
            f"model={model!r} has its encoders as pickles ({', '.join(pickles)}), which fastvid does not open; give "
            f"the copy in diffusers' layout, if there is one ({model}-Diffusers), or make one: `hf download {model} "
            "--local-dir FOLDER`, then `fastvid convert FOLDER NEW-FOLDER`"
        )
    if not (encoders["vae"] and encoders["text_encoder"]):
        raise CheckpointError(
            f"model={model!r} has a transformer without VAE and text encoder; give its file, and the others as parts: "
            f'fastvid.load("{model}/{files[0]}", parts={{"base": FOLDER}}), --part base=FOLDER'
        )
    chosen = {name for files_found in encoders.values() for name in files_found}
    return [name for name in names if name in chosen or _is_at(name, TRANSFORMERS) or _matches(name, CONFIGS)]


def _list_files(repo: str) -> list[str]:
    """The file names in a repository."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    try:
        return [file.rfilename for file in HfApi().model_info(repo).siblings or ()]
    except HFValidationError:
        raise
    except Exception:  # which types mean "no network" depends on huggingface_hub's HTTP library
        if folder := _snapshot(repo):
            # The cached files may allow a more useful error than "no network".
            select(repo, [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()])
        raise


def _with_hub_errors(model: str, act: Callable[[], T]) -> T:
    """Call `act` and return its result. Raises the hub's errors as CheckpointError."""
    from huggingface_hub import errors as hub

    repo, _ = split(model)
    try:
        return act()
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
    except (hub.HfHubHTTPError, OSError, _network_error()) as error:
        fetched = model if repo == model else f"{repo} {model.removeprefix(repo + '/')}"
        raise CheckpointError(
            f"model={model!r} is not (all) in the local cache and could not be downloaded: {_first_line(error)}; where "
            f"there is a network `hf download {fetched}` fetches it, into the folder that HF_HOME names"
        ) from None


def _network_error() -> type[Exception]:
    """The base error of the HTTP library that huggingface_hub uses, which depends on its version."""
    for name in ("httpx2", "httpx"):
        try:
            return importlib.import_module(name).HTTPError
        except ImportError:
            continue
    return OSError  # base of requests' errors


def _with_shards(model: str, file: str, names: Iterable[str]) -> list[str]:
    """A file, its other shards and, if it has a standard name, the config.json beside it."""
    names = sorted(names)
    if file not in names:
        available = _some([name for name in names if name.endswith(".safetensors")]) or "no weights"
        raise CheckpointError(f"model={model!r}: the repository has no such file; it has {available}")
    folder, _, name = file.rpartition("/")
    selected = {file}
    if count := SHARD.search(file):
        stem = file[: count.start()]
        selected |= {n for n in names if n.startswith(stem) and (count[1] in n or n.endswith(".index.json"))}
    if name.startswith(("diffusion_pytorch_model", "model")):
        selected.add(f"{folder}/config.json".lstrip("/"))
    return sorted(selected.intersection(names))


def _has_file(folder: Path, file: str) -> bool:
    """Whether a snapshot has a file and all its shards."""
    if not (count := SHARD.search(file)):
        return (folder / file).is_file()
    shards = folder.glob(f"{glob.escape(file[: count.start()])}-*-of-{count[1]}.*")
    return len(list(shards)) == int(count[1])


def complete(folder: Path) -> bool:
    """Whether a snapshot holds every part of a model (those that model_index.json names, or those of the original
    layout), with all shards."""
    try:
        return _has_parts(folder) if (folder / INDEX).is_file() else _has_original_files(folder)
    except (CheckpointError, OSError, TypeError):
        return False


def _has_parts(folder: Path) -> bool:
    named = [name for name, value in read_json(folder / INDEX).items() if isinstance(value, list) and all(value)]
    weighted = [folder / name for name in named if name not in UNWEIGHTED]
    return all(safetensors.find_files(part) for part in weighted) and all(
        any((folder / name).glob("*")) for name in named if name in UNWEIGHTED
    )


def _has_original_files(folder: Path) -> bool:
    """Whether all files of the original layout are there. Raises CheckpointError if the transformer is missing."""
    experts = layouts.original_transformers(folder)
    config = read_json(experts["transformer"][0].with_name(CONFIG))
    needs_image_encoder = config.get("model_type") in ("i2v", "flf2v") and len(experts) == 1
    parts = ("vae", "text_encoder", "image_encoder") if needs_image_encoder else ("vae", "text_encoder")
    encoders = all(any(folder.glob(ORIGINAL_PATTERNS[part] + ".safetensors")) for part in parts)
    return encoders and (folder / ORIGINAL_TOKENIZER / "tokenizer.json").is_file()


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _is_at(name: str, patterns: Iterable[str]) -> bool:
    """Like `_matches`, but * does not match a slash."""
    return any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)


def _some(files: list[str]) -> str:
    """The first few files, and how many more there are."""
    return ", ".join(files[:SHOWN]) + (f" and {len(files) - SHOWN} more" if len(files) > SHOWN else "")


def _quiet_off_terminals() -> Any:
    """A tqdm class that shows progress only on a terminal."""
    from tqdm.auto import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)  # huggingface_hub passes it; only its own bar accepts it
            super().__init__(*args, **{**options, "disable": None})

    return Bar


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
