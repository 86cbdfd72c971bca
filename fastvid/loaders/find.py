"""Finds a model's parts in a folder in diffusers' or the original layout, or in a file. Reads only the headers of
weights. names.py finds the folder; single_files.py the parts that belong to a transformer's single file.

Tensor names and shapes identify a part (models/wan/detect.py); its file name does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from fastvid.errors import CheckpointError, InvalidRequest
from fastvid.files import open_regular, read_bytes, reason
from fastvid.loaders import gguf, layouts, safetensors, weight_files
from fastvid.loaders.layouts import CONFIG, INDEX, TOKENIZER, Config
from fastvid.loaders.names import BASE
from fastvid.loaders.safetensors import Entry
from fastvid.models.common.config_reader import read_json
from fastvid.models.common.expert_names import OTHER, Mark, expert_of
from fastvid.models.common.sentencepiece import MAX_SPIECE
from fastvid.models.common.tokenizer import TextTokenizer
from fastvid.models.registry import EXPERTS, KINDS, OPTIONAL, SKYREELS, kind_of
from fastvid.models.wan import weight_names
from fastvid.models.wan.detect import Identity, identify

PIPELINES = (
    "WanPipeline",
    "WanVideoToVideoPipeline",
    "WanImageToVideoPipeline",
    "WanVACEPipeline",
    "WanAnimatePipeline",
    *layouts.FUN_PIPELINES,  # in folders that `fastvid convert` has written
    "WanDMDPipeline",  # FastVideo's distilled models
    "WanCausalDMDPipeline",
    "SkyReelsV2Pipeline",
    "SkyReelsV2ImageToVideoPipeline",
    "SkyReelsV2DiffusionForcingPipeline",
    "SkyReelsV2DiffusionForcingImageToVideoPipeline",
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
)
SPIECE_FILE, SPIECE_TENSOR = "spiece.model", "spiece_model"
TOKENIZER_FOLDERS = (TOKENIZER, layouts.ORIGINAL_TOKENIZER, "umt5-xxl")
UNIDENTIFIED = Identity("", "", "", "", "", None, {})
T = TypeVar("T")


@dataclass(frozen=True)
class FoundPart:
    """One part of a model, as found on disk.

    name: as in model_index.json. entries: the tensors in the files. config: config.json with diffusers' key names.
    identity: detected from the tensors; UNIDENTIFIED in a diffusers folder, where config.json identifies the part.
    problems: why it can't be read."""

    name: str
    files: tuple[Path, ...] = ()
    entries: Mapping[str, Entry] = field(default_factory=dict)
    config: Config | None = None
    identity: Identity = UNIDENTIFIED
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class FoundModel:
    """A model's parts, and the JSON files that describe them in diffusers' layout.

    scheduler: None if it is in the folder. own_scheduler: it is the publisher's; else derived from the kind of model.
    tokenizer: its folder or file; Path() if missing, see `problems`.
    """

    parts: tuple[FoundPart, ...]
    index: Config
    tokenizer: Path
    scheduler: Config | None = None
    image_processor: Config | None = None
    own_scheduler: bool = True
    problems: tuple[str, ...] = ()


def note_problem(problems: list[str], read: Callable[[], T]) -> T | None:
    """Call `read` and return its result. On CheckpointError, add the message to `problems` and return None."""
    try:
        return read()
    except CheckpointError as error:
        problems.append(str(error))
        return None


# ---------------------------------------------------------------- model folders


def find_diffusers(folder: Path, sources: Mapping[str, Path]) -> FoundModel:
    """The model in a diffusers folder. sources: parts to take from elsewhere."""
    if BASE in sources:
        raise InvalidRequest(f"parts: {BASE} is for a model that is a single file; {folder} is a whole folder")
    index = _check_index(read_json(folder / INDEX), folder)
    if layouts.class_of(index, EXPERTS[1]):
        _check_experts(sources)
    replaced = {name: find_part(name, path) for name, path in sources.items() if name != TOKENIZER}
    for name, part in replaced.items():
        library, class_name = layouts.CLASSES[name]
        index[name] = [library, (part.config or {}).get("_class_name", class_name)]
    if "transformer" in replaced:
        index["_class_name"] = layouts.pipeline_of(replaced["transformer"].identity)
    parts = tuple(replaced.get(name) or _diffusers_part(folder, name, index) for name in part_names(index))
    tokenizer = find_tokenizer(sources[TOKENIZER]) if TOKENIZER in sources else folder / TOKENIZER
    return FoundModel(parts, index, tokenizer)


def _check_experts(sources: Mapping[str, Path]) -> None:
    """Raises InvalidRequest if the file for an expert has the other one's name."""
    for name, other, wrong in zip(EXPERTS, EXPERTS[::-1], ("low", "high"), strict=True):
        path = sources.get(name)
        if path is not None and expert_of(path) == Mark(wrong):
            raise InvalidRequest(
                f"parts: {name} is the {OTHER[wrong]} noise expert, and {path} is named {wrong}; give it as {other}, "
                "or rename it"
            )


def part_names(index: Mapping[str, Any]) -> list[str]:
    """The required parts, and the optional ones that model_index.json names, in a fixed order."""
    required = [EXPERTS[0], *(name for name in KINDS if name not in (*EXPERTS, *OPTIONAL))]
    optional = [name for name in (EXPERTS[1], *OPTIONAL) if layouts.class_of(index, name)]
    order = [*EXPERTS, *KINDS]
    return sorted(required + optional, key=order.index)


def _diffusers_part(folder: Path, name: str, index: Mapping[str, Any]) -> FoundPart:
    if layouts.class_of(index, name) is None:
        return FoundPart(name)
    problems: list[str] = []
    config = note_problem(problems, lambda: _read_config(name, folder / name / CONFIG))
    files = note_problem(problems, lambda: weight_files.find_files(folder / name)) or ()
    entries = note_problem(problems, lambda: safetensors.read_headers(files)) or {}
    found = FoundPart(name, files, entries, config, problems=tuple(problems))
    if not problems and files[0].suffix == gguf.SUFFIX:  # its tensors have original names, or others
        identified = note_problem(problems, lambda: identify_part(name, files, entries, config))
        return identified or replace(found, problems=tuple(problems))
    return found


def find_original(
    folder: Path, read_entries: Callable[[Iterable[Path]], Mapping[str, Entry]] | None = None
) -> FoundModel:
    """The model in an original folder. read_entries: reads headers, of pickles too; by default pickles are refused.
    Raises CheckpointError for missing or broken files and for refused pickles."""
    if read_entries is None:
        _refuse_pickles(folder)
    extras = read_json(folder / layouts.EXTRAS) if (folder / layouts.EXTRAS).is_file() else {}
    configs = extras["configs"] if isinstance(extras.get("configs"), dict) else {}
    files = layouts.original_transformers(folder) | _original_files(folder)
    parts = {}
    for name, part_files in files.items():
        config = dict(configs.get(name) or {}) | (_original_config(folder, name) if name in EXPERTS else {})
        parts[name] = identify_part(name, part_files, (read_entries or safetensors.read_headers)(part_files), config)
        if (actual := parts[name].identity.part) != kind_name(name):
            raise CheckpointError(f"{part_files[0]} should hold a {kind_name(name)}, but it is a {actual}")
    identity, experts = parts["transformer"].identity, "transformer_2" in parts
    if (parts["transformer"].config or {}).get("image_dim") and "image_encoder" not in parts:
        wanted = layouts.ORIGINAL_NAMES["image_encoder"]
        raise CheckpointError(f"{folder} lacks {wanted} (or .pth), which {identity.name} needs")
    tokenizer = folder / layouts.ORIGINAL_TOKENIZER
    if not (tokenizer / "tokenizer.json").is_file():
        raise CheckpointError(f"{tokenizer} has no tokenizer.json; it comes with the original model")
    name, index = layouts.name_of(folder), extras.get("model_index")
    if layouts.skyreels_of(identity, name):
        config = {**(parts["transformer"].config or {}), "_class_name": SKYREELS}
        parts["transformer"] = replace(parts["transformer"], config=config)
    given = {name: part.config or {} for name, part in parts.items()}
    index = index or layouts.make_index(identity, given, experts, name)
    derived = layouts.make_scheduler(identity, experts, name)
    scheduler = extras.get("scheduler") or derived
    processor = extras.get("image_processor") or layouts.make_image_processor()
    processor = processor if "image_encoder" in parts else None
    own, index = scheduler is not derived, _check_index(index, folder)
    return FoundModel(tuple(parts.values()), index, tokenizer, scheduler, processor, own)


def _original_files(folder: Path) -> dict[str, tuple[Path, ...]]:
    """The files of the encoders and the VAE."""
    files: dict[str, tuple[Path, ...]] = {}
    for part in ("vae", "text_encoder", "image_encoder"):
        if file := layouts.original_file(folder, part):
            files[part] = (file,)
        elif part not in OPTIONAL:
            name = layouts.ORIGINAL_NAMES[part].format(version="2.1")
            raise CheckpointError(f"{folder} lacks {name} (or .pth), the {part} of the original layout")
    return files


def _original_config(folder: Path, name: str) -> Config:
    inner = folder / layouts.EXPERT_FOLDERS[name]
    config = (inner if inner.is_dir() else folder) / CONFIG
    return layouts.to_diffusers_keys(read_json(config)) if config.is_file() else {}


def _refuse_pickles(folder: Path) -> None:
    files = [path for part in layouts.ORIGINAL_PATTERNS if (path := layouts.original_file(folder, part))]
    if pickles := [path.name for path in files if path.suffix in safetensors.PICKLES]:
        raise CheckpointError(
            f"{folder} is in the original Wan layout, with pickles ({', '.join(pickles)}), which fastvid does not "
            f"open; use `fastvid convert {folder} NEW-FOLDER`, or give the '-Diffusers' copy of the model"
        )


def _check_index(index: Config, folder: Path) -> Config:
    if (class_name := index.get("_class_name")) not in PIPELINES:
        raise CheckpointError(
            f"{folder / INDEX} describes a {class_name!s:.80}; the kinds known so far are {', '.join(PIPELINES)} "
            "(Wan, such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers)"
        )
    return index


# ---------------------------------------------------------------- one part


def kind_name(name: str) -> str:
    """The kind of the part with this name: both experts are transformers."""
    return "transformer" if name in EXPERTS else name


def find_part(name: str, path: Path) -> FoundPart:
    """Find the part `name` (any but the tokenizer) in a file, a folder with only that part, or a model folder.

    Raises CheckpointError if it is missing or not supported.
    """
    if not path.exists():
        raise CheckpointError(f"{name}: {path} does not exist")
    if layouts.is_original(path):
        parts = {part.name: part for part in find_original(path).parts}
        if name not in parts:
            raise CheckpointError(f"{path} has no {name}; it holds {', '.join(parts)}")
        return parts[name]
    if path.is_file():
        return read_part(name, weight_files.group_of(path, layouts.WEIGHT_FILES))
    return read_part(name, weight_files.find_files(path / name if (path / INDEX).is_file() else path))


def read_part(name: str, files: tuple[Path, ...]) -> FoundPart:
    """Read the part `name` from files that may also hold other parts. Raises CheckpointError."""
    entries, kind = _read_headers(files), kind_name(name)
    held = weight_names.find_parts(entries)
    matching = [one for one in held if one.part == kind]
    if held and not matching:
        names = ", ".join(dict.fromkeys(one.part for one in held))
        hint = f"; give the transformer itself, and this as parts={{{names!r}: ...}}" if name == "transformer" else ""
        raise CheckpointError(f"{files[0]} holds no {kind}, it is a {names}{hint}")
    if len(matching) == 1 and len(held) > 1:
        entries = _select_prefix(entries, matching[0].prefix, [one.prefix for one in held])
    return identify_part(name, files, entries, _config_beside(files[0]))


def identify_part(
    name: str, files: tuple[Path, ...], entries: Mapping[str, Entry], config: Mapping[str, Any] | None = None
) -> FoundPart:
    """Identify a part from the names and shapes of its tensors. config: known configuration values.
    Raises CheckpointError."""
    where = files[0] if len(files) == 1 else files[0].parent
    if config:
        _check_class(name, config, files[0].parent / CONFIG)
    try:
        identity = identify({key: entry.shape for key, entry in entries.items()})
        return FoundPart(name, files, entries, identity.config(config), identity)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None


def _read_config(name: str, path: Path) -> Config:
    config = read_json(path)
    _check_class(name, config, path)
    return config


def _check_class(name: str, config: Mapping[str, Any], path: Path) -> None:
    """Raises CheckpointError for a configuration of another class than the part's. name: "" for any part."""
    kinds = [kind_of(name)] if name else list(KINDS.values())
    known = [each for kind in kinds for each in kind.classes]
    architectures = config.get("architectures") or []
    named = [config.get("_class_name"), *(architectures if isinstance(architectures, list) else [architectures])]
    if others := [each for each in named if each is not None and each not in known]:
        raise CheckpointError(
            f"{path} is of a {others[0]!s:.80}; {name or 'a part'} has to be a {' or a '.join(known)}"
        )
    types = [each for kind in kinds for each in kind.model_types]
    if name and types and config.get("model_type") not in (None, *types):
        raise CheckpointError(f"{path} has model_type={config['model_type']!r:.80}; {name} has to be {types[0]!r}")


def held_kinds(files: Iterable[Path]) -> tuple[str, ...]:
    """The kinds of parts in the files."""
    return tuple(dict.fromkeys(found.part for found in weight_names.find_parts(safetensors.read_headers(files))))


def _read_headers(files: tuple[Path, ...]) -> dict[str, Entry]:
    for file in files:
        if file.suffix in safetensors.PICKLES:
            raise CheckpointError(
                f"{file} is a pickle, which fastvid does not open; turn it into safetensors with `fastvid convert "
                f"{file} {file.with_suffix(safetensors.SUFFIX)} --to original`"
            )
        if not file.name.endswith(safetensors.READABLE):
            raise CheckpointError(f"{file} is no {safetensors.SUFFIX} or {gguf.SUFFIX} file, the kinds that are read")
    return safetensors.read_headers(files)


def _select_prefix(entries: Mapping[str, Entry], prefix: str, others: Iterable[str]) -> dict[str, Entry]:
    """The tensors whose names start with `prefix`, without those of another part with a longer prefix. Tensors without
    any part's prefix belong to other programs."""
    longer = tuple(other for other in others if other != prefix and other.startswith(prefix))
    inside = {name: entry for name, entry in entries.items() if name.startswith(prefix)}
    return {name: entry for name, entry in inside.items() if not (longer and name.startswith(longer))}


def _config_beside(file: Path) -> Config:
    """config.json in the folder of a weights file, if the file has a standard name; {} otherwise."""
    config = file.parent / CONFIG
    if not file.name.startswith(("diffusion_pytorch_model", "model")) or not config.is_file():
        return {}
    return layouts.to_diffusers_keys(read_json(config))


# ---------------------------------------------------------------- the tokenizer


def find_tokenizer(path: Path) -> Path:
    """Find the tokenizer in its own folder, a model folder, or a file. Raises CheckpointError if there is none."""
    candidates = [path, *(path / inner for inner in TOKENIZER_FOLDERS)] if path.is_dir() else [path]
    if tokenizer := next(filter(is_tokenizer, candidates), None):
        return tokenizer
    raise CheckpointError(
        f"tokenizer: {path} holds none; a folder with tokenizer.json and tokenizer_config.json, a {SPIECE_FILE}, or a "
        "text encoder's file with the tensor spiece_model, or a GGUF one with a vocabulary, is expected"
    )


def is_tokenizer(path: Path) -> bool:
    """Whether a folder or file holds a tokenizer, possibly as a tensor."""
    if path.is_dir():
        return any((path / name).is_file() for name in ("tokenizer.json", SPIECE_FILE))
    if path.name.endswith(safetensors.SUFFIXES):
        return path.is_file() and holds_spiece(safetensors.read_header(path))
    if path.suffix == gguf.SUFFIX:
        return path.is_file() and gguf.holds_vocabulary(path)
    return path.is_file() and path.suffix == ".model"


def holds_spiece(names: Iterable[str]) -> bool:
    """Whether one of these tensor names is a sentencepiece model's."""
    return any(name.split(".")[-1] == SPIECE_TENSOR for name in names)


def read_tokenizer(path: Path) -> TextTokenizer:
    """Read a tokenizer folder, a spiece.model, a safetensors file that holds one as `spiece_model`, or a GGUF file's
    vocabulary.

    A folder with spiece.model but no tokenizer.json is read as that file. Raises CheckpointError if the tokenizer is
    missing or broken.
    """
    if path.is_dir() and not (path / "tokenizer.json").is_file() and (path / SPIECE_FILE).is_file():
        path = path / SPIECE_FILE
    if not path.is_file():
        return TextTokenizer.from_folder(path)
    if path.suffix == gguf.SUFFIX:
        return TextTokenizer.from_vocabulary(gguf.read_vocabulary(path), str(path))
    return TextTokenizer.from_spiece(_read_spiece(path), str(path))


def _read_spiece(path: Path) -> bytes:
    """The bytes of a sentencepiece model: a whole file, or a tensor in a safetensors file."""
    try:
        if not path.name.endswith(safetensors.SUFFIXES):
            return read_bytes(path, MAX_SPIECE)
        spiece_entries = [entry for name, entry in safetensors.read_header(path).items() if holds_spiece([name])]
        size = math.prod(spiece_entries[0].shape) if spiece_entries else 0
        if len(spiece_entries) != 1 or spiece_entries[0].dtype not in ("U8", "I8") or size > MAX_SPIECE:
            raise CheckpointError(
                f"{path} holds no sentencepiece model as the bytes (at most {MAX_SPIECE:,}) of a tensor {SPIECE_TENSOR}"
            )
        with open_regular(path) as file:
            file.seek(spiece_entries[0].offset)
            return file.read(size)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from None
