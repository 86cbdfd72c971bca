"""Models from the Hugging Face hub: looked up in the local cache, or downloaded to it. Downloads only needed files.

    org/name                            a repository in diffusers' layout, or in the original one
    org/name/path/to/file.safetensors   one file of a repository, or a .gguf

The repository's list of files determines what to download, and says the size and digest of each. Whatever the hub
answers is checked: nothing is written outside of huggingface_hub's cache, and a file that is not what the list says is
refused by its name. After an interrupted download, only incomplete files are downloaded again.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from fastvid import notices
from fastvid.errors import CheckpointError
from fastvid.loaders import hub_cache, layouts, safetensors, weight_files
from fastvid.loaders.hub_cache import COMMIT, DIGEST, Remote, Repository
from fastvid.loaders.hub_http import HubError, fetch, first_line, run
from fastvid.loaders.layouts import CONFIG, EXPERT_FOLDERS, EXTRAS, INDEX, ORIGINAL_PATTERNS, ORIGINAL_TOKENIZER
from fastvid.models.common.config_reader import read_json

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILE = re.compile(r"([\w.-]+/[\w.-]+)/((?:[\w .()+-]+/)*[\w .()+-]+\.(?:safetensors|gguf))")
SHARD = re.compile(r"-\d{5}-of-(\d{5})\.(?:safetensors|gguf)$")
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
MAX_FILES = 1000  # fetched of one repository
MAX_LIST, MAX_LISTED = 4 << 20, 20_000  # bytes and entries of a repository's list of files
LIST_SECONDS = 60


def is_hub_name(model: str) -> bool:
    """Whether a name has the form of a hub name: org/name, or a file in it. A path inside a local folder does not."""
    if HUB_ID.fullmatch(model):
        return True
    return HUB_FILE.fullmatch(model) is not None and not Path(model.split("/")[0]).exists()


def find(model: str, repair: bool = False) -> Path | None:
    """The folder or file of a hub name in the local cache; None if it is incomplete. Downloads nothing.

    A damaged file raises CheckpointError; with `repair` it counts as missing instead, with a warning.
    """
    repo, file = split(model)
    folder = hub_cache.snapshot(repo)
    if folder is None:
        return None
    names = names_below(folder)
    names = [name for name in _shards(file, names) if name in names] if file else _read_by_pipelines(names)
    if bad := hub_cache.damaged(folder, names):
        told = f"model={model!r}: damaged in the local cache: {_some(bad)}"
        if not repair:
            raise CheckpointError(f"{told}; loading the model fetches {'it' if len(bad) == 1 else 'them'} again")
        notices.warn(f"{told}; fetched again")
        return None
    if not (_has_file(folder, file) if file else complete(folder)):
        return None
    return folder / file if file else folder


def download(model: str) -> Path:
    """Download the missing files of a hub name and return its folder or file. Shows progress on a terminal.

    Raises CheckpointError if the hub is unreachable, stalls, does not have the model or file, refuses access, has it
    only in an unsupported format, or sends something else than its list of files says.
    """
    _, file = split(model)
    folder, _ = get(model, lambda names: _with_shards(model, file, names) if file else select(model, names))
    return folder / file if file else folder


def get(model: str, choose: Callable[[list[str]], list[str]]) -> tuple[Path, list[str]]:
    """Bring the files of a repository that `choose` picks from their names into the cache: (folder, chosen names).

    If the hub can't be reached, `choose` picks from the cached names. Raises CheckpointError as `download` does.
    """
    repo, _ = split(model)
    _check_id(model, repo)
    try:
        repository = _list_files(repo)
    except HubError as error:
        return _cached_instead(model, choose, error)
    chosen = choose(sorted(repository.files))
    if len(chosen) > MAX_FILES:
        raise CheckpointError(
            f"model={model!r}: {len(chosen):,} of its files would be fetched; allowed are {MAX_FILES}"
        )
    try:
        return hub_cache.download(repository, chosen, _progress_bar), chosen
    except HubError as error:
        raise _as_checkpoint_error(model, error) from None
    except OSError as error:
        place = hub_cache.folder_of(repo)
        raise CheckpointError(f"model={model!r} could not be stored in {place}: {first_line(error)}") from None


def _cached_instead(model: str, choose: Callable[[list[str]], list[str]], error: HubError) -> tuple[Path, list[str]]:
    """The chosen ones of the cached files, if the hub did not answer. Raises CheckpointError."""
    repo, file = split(model)
    missing = _as_checkpoint_error(model, error)
    folder = None if error.status in range(400, 429) else hub_cache.snapshot(repo)
    if folder is None or file and not _has_file(folder, file):
        raise missing from None
    chosen = choose(names_below(folder))  # may say more than "no network" does
    if not chosen or (not file and (folder / INDEX).exists() and not complete(folder)):
        raise missing from None
    if bad := hub_cache.damaged(folder, chosen):
        raise CheckpointError(f"model={model!r}: damaged in the local cache: {_some(bad)}; {missing}") from None
    return folder, chosen


def names_below(folder: Path) -> list[str]:
    """The names of the files in a folder and below."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def split(model: str) -> tuple[str, str]:
    """(repository, file in it or "")."""
    match = HUB_FILE.fullmatch(model)
    return (match[1], match[2]) if match else (model, "")


def select(model: str, names: Iterable[str]) -> list[str]:
    """The files of a repository that a pipeline reads. Raises CheckpointError if they are not a complete model."""
    names = sorted(names)
    if INDEX in names:
        return [name for name in names if _matches(name, DIFFUSERS_FILES) and not _matches(name, OTHER_TYPES)]
    files = [name for name in names if name.endswith(safetensors.READABLE)]
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


# ---------------------------------------------------------------- what the hub tells


def _list_files(repo: str) -> Repository:
    """What the hub tells of a repository. Raises HubError, and CheckpointError for an answer of another kind."""
    from huggingface_hub import constants

    url, answer = f"{constants.ENDPOINT}/api/models/{repo}?blobs=true", bytearray()
    run([lambda progress: fetch(url, answer.extend, progress, MAX_LIST)], lambda received: None, LIST_SECONDS)
    if answer.count(b"{") + answer.count(b"[") > MAX_LISTED:
        raise CheckpointError(f"model={repo!r}: the hub lists more than {MAX_LISTED:,} files")
    try:
        told = json.loads(answer)
        siblings, commit = told["siblings"], told["sha"]
        files = [_remote(sibling) for sibling in siblings or ()]
        if not COMMIT.fullmatch(commit):
            raise ValueError(f"commit {commit[:80]!r}")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"model={repo!r}: the hub's list of files is not one ({type(error).__name__}: {first_line(error)})"
        ) from None
    return Repository(repo, commit, {file.name: file for file in files})


def _remote(sibling: Mapping[str, Any]) -> Remote:
    """A file of the list. Raises ValueError, TypeError or KeyError if it is none, or its name leaves the folder."""
    name, size, lfs = sibling["rfilename"], sibling.get("size"), sibling.get("lfs")
    digest = sibling.get("blobId")
    if lfs is not None:
        size, digest = lfs.get("size", size), lfs["sha256"]
    if not isinstance(name, str) or not _is_inside(name):
        raise ValueError(f"a file named {str(name)[:80]!r}")
    if size is not None and (type(size) is not int or not 0 <= size < 1 << 50):
        raise ValueError(f"{name[:80]!r} of {str(size)[:80]} bytes")
    if digest is not None and not DIGEST.fullmatch(digest):
        raise ValueError(f"{name[:80]!r} with digest {digest[:80]!r}")
    return Remote(name, size, digest or "")


def _is_inside(name: str) -> bool:
    """Whether a name is a path below a folder, on any system."""
    parts = name.split("/")
    plain = name.isprintable() and not re.search(r"[\\:]", name) and len(name.encode()) <= 1000
    return plain and all(part not in ("", ".", "..") and len(part.encode()) <= 200 for part in parts)


def _check_id(model: str, repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise CheckpointError(f"model={model!r} is no hub id: {error}") from None


def _as_checkpoint_error(model: str, error: HubError) -> CheckpointError:
    repo, _ = split(model)
    if error.code == "GatedRepo":
        return CheckpointError(
            f"model={model!r}: its owner wants terms to be accepted on the hub's page first; then `hf auth login`"
        )
    if error.code == "RepoNotFound" or error.status == 401:
        return CheckpointError(
            f"model={model!r}: the hub has no such model, or it is private (`hf auth login`); a published one is "
            "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
        )
    fetched = model if repo == model else f"{repo} {model.removeprefix(repo + '/')}"
    return CheckpointError(
        f"model={model!r} is not (all) in the local cache and could not be downloaded: {error}; where there is a "
        f"network `hf download {fetched}` fetches it, into the folder that HF_HOME names"
    )


# ---------------------------------------------------------------- which files belong together


def _with_shards(model: str, file: str, names: Iterable[str]) -> list[str]:
    """A file, its other shards and, if it has a standard name, the config.json beside it."""
    names = sorted(names)
    if file not in names:
        available = _some([name for name in names if name.endswith(safetensors.READABLE)]) or "no weights"
        raise CheckpointError(f"model={model!r}: the repository has no such file; it has {available}")
    return _shards(file, names)


def _shards(file: str, names: Iterable[str]) -> list[str]:
    folder, _, name = file.rpartition("/")
    selected = {file}
    if count := SHARD.search(file):
        stem = file[: count.start()]
        selected |= {n for n in names if n.startswith(stem) and (count[1] in n or n.endswith(".index.json"))}
    if name.startswith(("diffusion_pytorch_model", "model")):
        selected.add(f"{folder}/config.json".lstrip("/"))
    return sorted(selected.intersection(names))


def _read_by_pipelines(names: list[str]) -> list[str]:
    """Those of a complete snapshot's files that a pipeline reads."""
    try:
        return select("", names)
    except CheckpointError:
        return names


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
    return all(weight_files.find_files(part) for part in weighted) and all(
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


def _progress_bar(total: int) -> Any:
    """Shows received bytes on a terminal, and nothing elsewhere."""
    from tqdm.auto import tqdm

    return tqdm(total=total, unit="B", unit_scale=True, desc="Downloading", disable=None)
