"""Models from the Hugging Face hub: found in the local cache, or downloaded into it once, only what a pipeline reads.

    org/name                            a repository in diffusers' layout, or in the original one
    org/name/path/to/file.safetensors   one file of a repository

What is needed follows from the repository's list of files, before any is fetched. The cache, the login and
HF_HUB_OFFLINE are huggingface_hub's own. After a download that was interrupted, only the files that were not whole are
fetched; huggingface_hub 2.4 takes up a part of a file within one process alone.
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
# A repository may hold the same weights in other formats and types, example videos and licences beside these.
DIFFUSERS_FILES = (
    INDEX,
    "*/*.json",
    "*/diffusion_pytorch_model*.safetensors",
    "*/model*.safetensors",
    "tokenizer/*",
)
OTHER_TYPES = ("*.fp16*.safetensors", "*.bf16*.safetensors", "*.fp32*.safetensors")
UNWEIGHTED = ("scheduler", "tokenizer", "image_processor", "feature_extractor")  # parts that have no weights
# The original repositories: transformers, with encoders that are published as pickles, and copied as safetensors.
WEIGHTS = "diffusion_pytorch_model*.safetensors"
TRANSFORMERS = (WEIGHTS, *(f"{folder}/{WEIGHTS}" for folder in EXPERT_FOLDERS.values()))
CONFIGS = (CONFIG, f"*/{CONFIG}", "*.safetensors.index.json", EXTRAS, f"{ORIGINAL_TOKENIZER}/*")
SHOWN = 8  # files in a message
T = TypeVar("T")


def is_hub_name(model: str) -> bool:
    """Whether a name could be of the hub: org/name, or a file of it. One below a folder that is here is not."""
    if HUB_ID.fullmatch(model):
        return True
    return HUB_FILE.fullmatch(model) is not None and not Path(model.split("/")[0]).exists()


def find(model: str) -> Path | None:
    """The folder or file of a hub name in the local cache, None if not all of it is there. Nothing is downloaded."""
    repo, file = split(model)
    folder = _snapshot(repo)
    if folder is None:
        return None
    if file:
        return folder / file if _has_file(folder, file) else None
    return folder if complete(folder) else None


def _snapshot(repo: str) -> Path | None:
    """The folder of a repository in the local cache, whatever is in it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:  # with a pattern that no file has it does not ask for the files that we leave out
        return Path(snapshot_download(repo, allow_patterns=["/"], local_files_only=True))
    except (HFValidationError, OSError):  # not there is an OSError too
        return None


def download(model: str) -> Path:
    """Download what is missing of a hub name and return its folder or file; progress is shown on a terminal.

    Raises:
        CheckpointError: the hub can't be reached, has no such model or file, does not give it, or has it in a form that
        is not loaded; what to do then.
    """
    from huggingface_hub import snapshot_download

    repo, file = split(model)
    names = _reaching(model, lambda: _list(repo))
    chosen = _with_shards(model, file, names) if file else select(model, names)
    fetch = lambda: snapshot_download(repo, allow_patterns=chosen, tqdm_class=_quiet_off_terminals())  # noqa: E731
    folder = Path(_reaching(model, fetch))
    return folder / file if file else folder


def split(model: str) -> tuple[str, str]:
    """(repository, file in it or "")."""
    found = HUB_FILE.fullmatch(model)
    return (found[1], found[2]) if found else (model, "")


def select(model: str, names: Iterable[str]) -> list[str]:
    """The files of a repository that a pipeline reads. Raises CheckpointError for one that is no model as it is."""
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
    chosen = {name for found in encoders.values() for name in found}
    return [name for name in names if name in chosen or _is_at(name, TRANSFORMERS) or _matches(name, CONFIGS)]


def _list(repo: str) -> list[str]:
    """The files of a repository; without a network those that are in the cache."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    try:
        return [file.rfilename for file in HfApi().model_info(repo).siblings or ()]
    except HFValidationError:
        raise
    except Exception:  # its HTTP library has errors of its own for a network that is down
        if folder := _snapshot(repo):
            # What is there may say more than that there is no network.
            select(repo, [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()])
        raise


def _reaching(model: str, act: Callable[[], T]) -> T:
    """What `act` returns, with the hub's errors as ours."""
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
    """What the hub library's HTTP library raises when nothing answers; which one it is differs by version."""
    for name in ("httpx2", "httpx"):
        try:
            return importlib.import_module(name).HTTPError
        except ImportError:
            continue
    return OSError  # requests' errors are such


def _with_shards(model: str, file: str, names: Iterable[str]) -> list[str]:
    """A file with what belongs to it: its other shards and, where it is named as a folder's weights, config.json."""
    names = sorted(names)
    if file not in names:
        held = _some([name for name in names if name.endswith(".safetensors")]) or "no weights"
        raise CheckpointError(f"model={model!r}: the repository has no such file; it has {held}")
    folder, _, name = file.rpartition("/")
    wanted = {file}
    if count := SHARD.search(file):
        stem = file[: count.start()]
        wanted |= {n for n in names if n.startswith(stem) and (count[1] in n or n.endswith(".index.json"))}
    if name.startswith(("diffusion_pytorch_model", "model")):
        wanted.add(f"{folder}/config.json".lstrip("/"))
    return sorted(wanted.intersection(names))


def _has_file(folder: Path, file: str) -> bool:
    """Whether a file is in a snapshot, with all of its shards."""
    if not (count := SHARD.search(file)):
        return (folder / file).is_file()
    shards = folder.glob(f"{glob.escape(file[: count.start()])}-*-of-{count[1]}.*")
    return len(list(shards)) == int(count[1])


def complete(folder: Path) -> bool:
    """Whether a snapshot holds a whole model, with all shards of its weights: every part that its model_index.json
    names, or what the original layout consists of."""
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
    """Raises CheckpointError for some of what is missing."""
    experts = layouts.original_transformers(folder)
    config = read_json(experts["transformer"][0].with_name(CONFIG))
    sees_pictures = config.get("model_type") in ("i2v", "flf2v") and len(experts) == 1
    parts = ("vae", "text_encoder", "image_encoder") if sees_pictures else ("vae", "text_encoder")
    encoders = all(any(folder.glob(ORIGINAL_PATTERNS[part] + ".safetensors")) for part in parts)
    return encoders and (folder / ORIGINAL_TOKENIZER / "tokenizer.json").is_file()


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _is_at(name: str, patterns: Iterable[str]) -> bool:
    """The same, where * does not reach into folders."""
    return any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)


def _some(files: list[str]) -> str:
    """The first few files, and how many more there are."""
    return ", ".join(files[:SHOWN]) + (f" and {len(files) - SHOWN} more" if len(files) > SHOWN else "")


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
