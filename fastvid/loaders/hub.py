"""Models from the Hugging Face hub: found in the local cache, or downloaded into it once, only what a pipeline reads.

    org/name                            a repository in diffusers' layout, or in the original one
    org/name/path/to/file.safetensors   one file of a repository

What is needed follows from the repository's list of files, before any is fetched. The cache, the login and
HF_HUB_OFFLINE are huggingface_hub's own. After a download that was interrupted, only the files that were not whole are
fetched; huggingface_hub 2.4 takes up a part of a file within one process alone.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from fastvid.errors import CheckpointError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILE = re.compile(r"([\w.-]+/[\w.-]+)/((?:[\w .()+-]+/)*[\w .()+-]+\.safetensors)")
INDEX = "model_index.json"
# A repository may hold the same weights in other formats and types, example videos and licences beside these.
FILES = [
    INDEX,
    "*/*.json",
    "*/diffusion_pytorch_model*.safetensors",
    "*/model*.safetensors",
    "tokenizer/*",
]
OTHER_TYPES = ["*.fp16*.safetensors", "*.bf16*.safetensors", "*.fp32*.safetensors"]
UNWEIGHTED = ("scheduler", "tokenizer", "image_processor", "feature_extractor")  # parts that have no weights
# The original repositories: transformers, with encoders that are published as pickles, and copied as safetensors.
EXPERTS = ("high_noise_model", "low_noise_model")
WEIGHTS = "diffusion_pytorch_model*.safetensors"
TRANSFORMER = [WEIGHTS, *(f"{expert}/{WEIGHTS}" for expert in EXPERTS)]
ENCODERS = ("*_VAE", "models_t5*", "models_clip*")
TOKENIZER = "google/umt5-xxl"
CONFIGS = ["config.json", "*/config.json", "*.safetensors.index.json", "diffusers_extras.json", f"{TOKENIZER}/*"]
PICKLES = (".pth", ".pt", ".bin", ".ckpt")
SHARD = re.compile(r"-\d{5}-of-(\d{5})\.safetensors$")
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
        return [name for name in names if _any(name, FILES) and not _any(name, OTHER_TYPES)]
    files = [name for name in names if name.endswith(".safetensors")]
    if not any(_top(name, TRANSFORMER) for name in names):
        listed = ", ".join(files[:SHOWN]) + (f" and {len(files) - SHOWN} more" if len(files) > SHOWN else "")
        raise CheckpointError(
            f"model={model!r} has neither a {INDEX} nor {WEIGHTS}, so it is no whole model; "
            + (f"give one of its files, such as {model}/{files[0]} (it has {listed})" if files else "it has no weights")
        )
    encoders = [name for pattern in ENCODERS for name in names if _top(name, [pattern + ".safetensors"])]
    pickles = [name for pattern in ENCODERS if not any(_top(e, [pattern + ".safetensors"]) for e in encoders)
               for name in names if _top(name, [pattern + suffix for suffix in PICKLES])]  # fmt: skip
    if pickles:
        raise CheckpointError(
            f"model={model!r} has its encoders as pickles ({', '.join(pickles)}), which fastvid does not open; give "
            f"the copy in diffusers' layout, if there is one ({model}-Diffusers), or make one: `hf download {model} "
            "--local-dir FOLDER`, then `fastvid convert FOLDER NEW-FOLDER`"
        )
    if not (any(_top(e, ["*_VAE.*"]) for e in encoders) and any(_top(e, ["models_t5*"]) for e in encoders)):
        raise CheckpointError(
            f"model={model!r} has a transformer without VAE and text encoder; give its file, and the others as parts: "
            f'fastvid.load("{model}/{files[0]}", parts={{"base": FOLDER}}), --part base=FOLDER'
        )
    return [name for name in names if name in encoders or _top(name, TRANSFORMER) or _any(name, CONFIGS)]


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
        near = [name for name in names if name.endswith(".safetensors")]
        listed = ", ".join(near[:SHOWN]) + (f" and {len(near) - SHOWN} more" if len(near) > SHOWN else "")
        raise CheckpointError(f"model={model!r}: the repository has no such file; it has {listed or 'no weights'}")
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
    return len(list((folder / file).parent.glob(f"{Path(file[: count.start()]).name}-*-of-{count[1]}.*"))) == int(
        count[1]
    )


def complete(folder: Path) -> bool:
    """Whether a snapshot holds a whole model, with all shards of its weights: every part that its model_index.json
    names, or what the original layout consists of."""
    try:
        if not (folder / INDEX).is_file():
            return _complete_original(folder)
        index = json.loads((folder / INDEX).read_text())
        parts = [name for name, value in index.items() if isinstance(value, list) and all(value)]
        return all(_has_part(folder / name) for name in parts)
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return False


def _complete_original(folder: Path) -> bool:
    inner = [folder / expert for expert in EXPERTS] if (folder / EXPERTS[0]).is_dir() else [folder]
    wanted = [f"{pattern}.safetensors" for pattern in ENCODERS[:2]] + [f"{TOKENIZER}/tokenizer.json"]
    config = json.loads((inner[0] / "config.json").read_text())
    if config.get("model_type") in ("i2v", "flf2v") and len(inner) == 1:
        wanted.append(f"{ENCODERS[2]}.safetensors")
    whole = all(any(path.glob(WEIGHTS)) and _has_part(path) for path in inner)
    return whole and all(any(folder.glob(pattern)) for pattern in wanted)


def _any(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _top(name: str, patterns: Iterable[str]) -> bool:
    """The same, where * does not reach into folders."""
    return any(fnmatchcase(name, p) and name.count("/") == p.count("/") for p in patterns)


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
