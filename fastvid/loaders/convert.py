"""`fastvid convert`: weights from one layout to the other, and pickles to safetensors. Bytes are moved, never computed
with: what is converted there and back is the same bit for bit. In memory is one chunk, or one tensor that is transposed.

Whole models: the original folder <-> the diffusers folder (see layouts.py). Single parts: a file or folder with the
weights of a transformer, VAE, text or image encoder, in either layout, with ComfyUI's prefixes or none.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory

from fastvid.checks import nearest_name
from fastvid.errors import CheckpointError, InvalidRequest
from fastvid.loaders import layouts, safetensors
from fastvid.loaders.find import FoundPart, find_original, identify_part, kind_name
from fastvid.loaders.layouts import CONFIG, EXPERT_FOLDERS, EXTRAS, INDEX, ORIGINAL_TOKENIZER, SCHEDULER, TOKENIZER
from fastvid.loaders.pickles import PickleReader, read_exactly
from fastvid.loaders.safetensors import BITS, Entry
from fastvid.models.common.config_reader import read_json
from fastvid.models.registry import EXPERTS
from fastvid.models.wan import weight_names
from fastvid.models.wan.detect import Identity
from fastvid.models.wan.weight_names import DIFFUSERS, LAYOUTS, ORIGINAL, Origin, some

SHARD_BYTES = 5 * 10**9
STEMS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}  # model for the encoders
NOT_IN_SHAPES = ("num_attention_heads", "eps", "rope_max_seq_len", "vace_layers")
LORA = re.compile(r"\.(lora_(A|B|down|up|embedding_A|embedding_B)\b|alpha$|diff(_b|_m)?$)")
Report = Callable[[str], None]


@dataclass(frozen=True)
class WeightsOutput:
    """One set of weights to write: `target` (*.safetensors) within the destination, and the config.json beside it."""

    part: FoundPart
    target: Path
    origins: Mapping[str, Origin]
    config: Mapping[str, Any] | None

    @property
    def entries(self) -> dict[str, Entry]:
        """The tensors that are written."""
        return describe(self.origins, self.part.entries, self.target)


@dataclass(frozen=True)
class Output:
    """Everything that goes into a destination: weights, small JSON files, and folders that are copied."""

    weights: tuple[WeightsOutput, ...]
    texts: Mapping[Path, Any]
    copies: Mapping[Path, Path]  # to -> from


def convert(
    source: str | Path,
    destination: str | Path,
    to: str = DIFFUSERS,
    *,
    shard_bytes: int = SHARD_BYTES,
    key: str | None = None,
    base: str | Path | None = None,
    say: Report = lambda text: None,
) -> dict[str, Any]:
    """Convert a model, or a part of one, into a new file or folder; returns what was written, as plain JSON values.

    Args:
        source: a folder of either layout, a folder or file with the weights of one part; .pth and the like are opened
            in a child process, with weights_only.
        destination: must not exist. A name that ends in .safetensors becomes one file, any other a folder.
        to: "diffusers" or "original".
        shard_bytes: how large a file may become.
        key: which weights to take of a pickle with several state dicts; the default is the first there is of
            generator_ema, ema, params_ema, generator, generator_lora, state_dict, model_state_dict, model, module.
        base: a whole model's folder, for a source that is a transformer alone: the destination becomes a whole model
            with everything else from there.
        say: called with a line for every set of weights.

    Raises:
        InvalidRequest: an argument is not possible.
        CheckpointError: the source is broken, incomplete, or no Wan model; nothing is left of the destination.
    """
    source, destination = Path(source).expanduser(), Path(destination).expanduser()
    _check(source, destination, to, shard_bytes)
    single = destination.name.endswith(safetensors.SUFFIX)
    with TensorReader({source: key} if key else {}) as reader:
        if base is None:
            output = _plan(source, to, reader, single)
        else:
            output = _plan_onto(Path(base), source, to, reader, single)
        _check_space(destination.absolute().parent, output)
        with _temporary_folder(destination) as folder:
            _write_output(output, folder, reader, None if single else shard_bytes, say)
            written = folder / output.weights[0].target if single else folder
            found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
            files = [destination.name] if single else found
            os.replace(written, destination)
    parts = {weights.part.name: weights.part.identity.name for weights in output.weights}
    return {"source": str(source), "destination": str(destination), "layout": to, "parts": parts, "files": files}


def _check(source: Path, destination: Path, to: Any, shard_bytes: Any) -> None:
    if to not in LAYOUTS:
        near = nearest_name(str(to), LAYOUTS)
        raise InvalidRequest(f"to={to!r:.40}: allowed is {' or '.join(LAYOUTS)}; the nearest is {near}")
    if type(shard_bytes) is not int or shard_bytes < 1:
        raise InvalidRequest(f"shard_bytes={shard_bytes!r:.40}: a positive number of bytes is needed")
    if not source.exists():
        raise InvalidRequest(
            f"source {source} does not exist; give a folder, or a file ({', '.join(layouts.WEIGHT_FILES)})"
        )
    if destination.exists() or destination.is_symlink():
        raise InvalidRequest(f"destination {destination} exists already; give a new name, or remove it first")
    if not destination.absolute().parent.is_dir():
        raise InvalidRequest(f"destination {destination}: there is no folder {destination.absolute().parent}")


def _check_space(folder: Path, output: Output) -> None:
    needed = sum(_known_bytes(entry) for weights in output.weights for entry in weights.entries.values())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InvalidRequest(
            f"destination needs {needed} bytes, but {folder} has {free} free; {needed - free} are missing"
        )


# ---------------------------------------------------------------- what is to be written


def _plan(source: Path, to: str, reader: TensorReader, single: bool) -> Output:
    if (source / INDEX).is_file():
        output = _from_diffusers(source, to, reader)
    elif layouts.is_original(source):
        output = _from_original(source, to, reader)
    else:
        if lora := _read_lora(source, reader, single):
            return lora
        part = _read_part(source, reader)
        return Output((_weights_output(part, to, alone=True),), {}, {})
    if single:
        names = ", ".join(weights.part.name for weights in output.weights)
        raise InvalidRequest(f"{source} is a whole model ({names}), which needs a folder as destination, not one file")
    return output


def _plan_onto(base: Path, source: Path, to: str, reader: TensorReader, single: bool) -> Output:
    """A transformer with everything else of a whole model."""
    base = base.expanduser()
    if single:
        raise InvalidRequest(f"base {base} makes a whole model, which needs a folder as destination, not one file")
    if not ((base / INDEX).is_file() or layouts.is_original(base)):
        raise InvalidRequest(f"base {base} is no folder of a whole model, in diffusers' or in the original layout")
    whole = _plan(base, to, reader, False)
    old = [weights for weights in whole.weights if weights.part.name in EXPERTS]
    rest = [weights for weights in whole.weights if weights.part.name not in EXPERTS]
    if len(old) != 1:
        raise InvalidRequest(f"base {base} has two transformers, {source} is one; a base with one is needed")
    # What shapes do not show, such as the number of heads, is as in the base.
    part = _read_part(
        source, reader, "transformer", {key: (old[0].part.config or {}).get(key) for key in NOT_IN_SHAPES}
    )
    texts = {name: _renamed_class(value, part) if name == Path(INDEX) else value for name, value in whole.texts.items()}
    texts = {name: value for name, value in texts.items() if name != Path(EXTRAS)}
    return Output((_weights_output(part, to), *rest), texts, whole.copies)


def _renamed_class(index: Mapping[str, Any], part: FoundPart) -> dict[str, Any]:
    kind = ["diffusers", (part.config or {})["_class_name"]]
    return {**index, "transformer": kind, "_class_name": layouts.pipeline_of(part.identity)}


def _from_original(source: Path, to: str, reader: TensorReader) -> Output:
    found = find_original(source, reader.entries)
    experts = any(part.name == "transformer_2" for part in found.parts)
    weights = tuple(_weights_output(part, to, experts=experts) for part in found.parts)
    if to == ORIGINAL:
        extras = {Path(EXTRAS): read_json(source / EXTRAS)} if (source / EXTRAS).is_file() else {}
        return Output(weights, extras, {Path(ORIGINAL_TOKENIZER): found.tokenizer})
    texts = {Path(INDEX): found.index, SCHEDULER: found.scheduler}
    texts |= {layouts.IMAGE_PROCESSOR: found.image_processor} if found.image_processor else {}
    return Output(weights, texts, {Path(TOKENIZER): found.tokenizer})


def _from_diffusers(source: Path, to: str, reader: TensorReader) -> Output:
    index = read_json(source / INDEX)
    # A component that a pipeline does without stands there as [null, null].
    names = [name for name in layouts.CLASSES if isinstance(index.get(name), list) and any(index[name])]
    if "transformer" not in names:
        raise CheckpointError(f"{source / INDEX} names no transformer; a Wan model is expected")
    parts = [_read_part(source / name, reader, name) for name in names]
    weights = tuple(_weights_output(part, to, experts="transformer_2" in names) for part in parts)
    scheduler = read_json(source / SCHEDULER)
    texts: dict[Path, Any] = {Path(INDEX): index, SCHEDULER: scheduler}
    processor = read_json(source / layouts.IMAGE_PROCESSOR) if (source / layouts.IMAGE_PROCESSOR).is_file() else None
    if not (source / TOKENIZER).is_dir():
        raise CheckpointError(f"{source / TOKENIZER} is missing")
    if to == DIFFUSERS:
        texts |= {layouts.IMAGE_PROCESSOR: processor} if processor else {}
        return Output(weights, texts, {Path(TOKENIZER): source / TOKENIZER})
    # The original layout has no place for these; on the way back they are taken from here.
    extras = {"model_index": index, "scheduler": scheduler, "configs": {part.name: part.config for part in parts}}
    extras |= {"image_processor": processor} if processor else {}
    return Output(weights, {Path(EXTRAS): extras}, {Path(ORIGINAL_TOKENIZER): source / TOKENIZER})


def _read_lora(source: Path, reader: TensorReader, single: bool) -> Output | None:
    """A LoRA, such as LongLive's generator_lora: its tensors under the names that they have. None if it is none."""
    if source.is_dir() or source.suffix not in layouts.WEIGHT_FILES:
        return None
    entries = reader.entries((source,))
    if not entries or not all(LORA.search(name) for name in entries):
        return None
    if not single:
        raise InvalidRequest(f"{source} is a LoRA; a destination that ends in {safetensors.SUFFIX} is needed")
    identity = Identity("lora", "", "", "wan", "", None, {})
    part = FoundPart("lora", (source,), entries, {}, identity)
    copies = {name: Origin((name,)) for name in entries}
    return Output((WeightsOutput(part, Path("lora" + safetensors.SUFFIX), copies, None),), {}, {})


def _read_part(
    source: Path, reader: TensorReader, name: str | None = None, unshown: Mapping[str, Any] | None = None
) -> FoundPart:
    """The weights of one part: a file, or a folder with config.json or without. unshown: what its config says if it has
    none."""
    files = (source,) if source.is_file() else _files_of(source)
    if files[0].suffix not in layouts.WEIGHT_FILES:
        raise InvalidRequest(
            f"source {source}: {files[0].suffix or 'no'} file; allowed are {', '.join(layouts.WEIGHT_FILES)}"
        )
    config = source / CONFIG if source.is_dir() else None
    given = layouts.to_diffusers_words(read_json(config)) if config and config.is_file() else {}
    given = given or {key: value for key, value in (unshown or {}).items() if value is not None}
    part = identify_part(name or "", files, reader.entries(files), given)
    if name and part.identity.part != kind_name(name):
        raise CheckpointError(f"{source} should hold a {kind_name(name)}, but it is a {part.identity.part}")
    return replace(part, name=name or part.identity.part)


def _files_of(folder: Path) -> tuple[Path, ...]:
    """Safetensors files of a folder, or its pickles where there are none."""
    held = sorted(folder.iterdir()) if folder.is_dir() else []
    pickles = tuple(path for path in held if path.suffix in safetensors.PICKLES)
    if pickles and not any(path.name.endswith(safetensors.SUFFIX) for path in held):
        return pickles
    return safetensors.find_files(folder)


def _weights_output(part: FoundPart, to: str, alone: bool = False, experts: bool = False) -> WeightsOutput:
    """Where a part goes. `alone`: into the destination itself, otherwise where the layout has its place."""
    found = weight_names.Found(part.identity.part, part.identity.layout, part.identity.prefix)
    origins = weight_names.origins(part.entries, to, found)
    kind = part.identity.part
    if to == DIFFUSERS:
        folder = Path() if alone else Path(part.name)
        return WeightsOutput(part, folder / (STEMS.get(kind, "model") + safetensors.SUFFIX), origins, part.config)
    if kind != "transformer":
        return WeightsOutput(part, Path(layouts.original_name(kind, part.identity)), origins, None)
    folder = Path(EXPERT_FOLDERS[part.name]) if experts and not alone else Path()
    config = layouts.to_original_words(part.config or {}, part.identity.task)
    return WeightsOutput(part, folder / (STEMS[kind] + safetensors.SUFFIX), origins, config)


# ---------------------------------------------------------------- reading


class TensorReader:
    """Reads the bytes of tensors. A context manager: it owns the child processes that hold pickles open. keys:
    of pickles that hold several state dicts, which to take."""

    def __init__(self, keys: Mapping[Path, str] | None = None) -> None:
        self._keys = keys or {}
        self._stack = ExitStack()
        self._pickles: dict[Path, PickleReader] = {}

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def entries(self, files: Iterable[Path]) -> dict[str, Entry]:
        """Name -> entry of all tensors in the files. Raises CheckpointError."""
        files = tuple(files)
        found = safetensors.read_headers(file for file in files if file.suffix not in safetensors.PICKLES)
        for file in (file for file in files if file.suffix in safetensors.PICKLES):
            if file not in self._pickles:
                self._pickles[file] = self._stack.enter_context(PickleReader(file, self._keys.get(file, "")))
            # No offset: bytes come from the child.
            held = {name: Entry(kind, shape, file) for name, (kind, shape, _) in self._pickles[file].tensors.items()}
            if twice := found.keys() & held.keys():
                raise CheckpointError(f"{some(twice)} in {file} and in another file beside it")
            found |= held
        return found

    def chunks(self, name: str, entry: Entry, begin: int, end: int) -> Iterator[bytes]:
        """Bytes [begin, end) of a tensor, in pieces. Raises CheckpointError if they can't be had."""
        if entry.file in self._pickles:
            yield from self._pickles[entry.file].chunks(name, begin, end)
            return
        if entry.file.suffix in safetensors.PICKLES:
            raise ValueError(f"{entry.file} is a pickle that was not opened")  # its bytes are not where it begins
        try:
            with entry.file.open("rb") as file:
                file.seek(entry.offset + begin)
                yield from read_exactly(file, end - begin, f"{entry.file} ended within {name}")
        except OSError as error:
            raise CheckpointError(f"{entry.file} cannot be read: {error.strerror or error}") from None


def _known_bytes(entry: Entry) -> int:
    """Bytes of a tensor. Raises CheckpointError for a dtype of unknown size."""
    if entry.dtype not in BITS:
        raise CheckpointError(f"{entry.file} holds {entry.dtype} weights; known are {', '.join(BITS)}")
    return safetensors.nbytes(entry)


def describe(origins: Mapping[str, Origin], entries: Mapping[str, Entry], file: Path) -> dict[str, Entry]:
    """The entries of the tensors that are made. Raises CheckpointError where parts of one have several dtypes."""
    for origin in origins.values():
        kinds = {entries[name].dtype for name in origin.names}
        if len(kinds) > 1:
            raise CheckpointError(f"{', '.join(origin.names)} have to be of one dtype; they are {', '.join(kinds)}")
    return {name: replace(entry, file=file) for name, entry in safetensors.origin_entries(origins, entries).items()}


def _origin_bytes(origin: Origin, reader: TensorReader, entries: Mapping[str, Entry]) -> Iterator[bytes]:
    """The bytes of a tensor, from what it is made of: rows lie one after the other, so joining and splitting them, like
    leading ones, is no more than which bytes are read.
    """
    for name in origin.names:
        entry, size = entries[name], _known_bytes(entries[name]) // origin.parts
        chunks = reader.chunks(name, entry, origin.part * size, (origin.part + 1) * size)
        if origin.transpose:
            item = np.dtype(f"V{BITS[entry.dtype] // 8}")
            yield np.frombuffer(b"".join(chunks), item).reshape(entry.shape).T.tobytes()
        else:
            yield from chunks


# ---------------------------------------------------------------- writing


def write_weights(
    target: Path,
    origins: Mapping[str, Origin],
    reader: TensorReader,
    entries: Mapping[str, Entry],
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Write tensors as `target` (*.safetensors), or as its shards and their index if they are more than shard_bytes."""
    described = describe(origins, entries, target)
    shards = split_state_dict_into_shards_factory(
        {name: described[name] for name in sorted(described)},
        get_storage_size=_known_bytes,
        filename_pattern=target.name.removesuffix(safetensors.SUFFIX) + "{suffix}" + safetensors.SUFFIX,
        max_shard_size=shard_bytes,
    )
    for file, names in shards.filename_to_tensors.items():
        _write_file(target.with_name(file), {name: described[name] for name in names}, origins, reader, entries)
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": dict(sorted(shards.tensor_to_filename.items()))}
        write_json(target.with_name(target.name + ".index.json"), index)
    return [target.with_name(file) for file in shards.filename_to_tensors]


def write_json(path: Path, value: Any) -> None:
    """As diffusers writes its files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_file(
    path: Path,
    shard: Mapping[str, Entry],
    origins: Mapping[str, Origin],
    reader: TensorReader,
    entries: Mapping[str, Entry],
) -> None:
    # Wide types first, as the library writes them, so that every tensor is aligned.
    order = sorted(shard, key=lambda name: (-BITS[shard[name].dtype], name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in order:
        entry, end = shard[name], at + _known_bytes(shard[name])
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            for chunk in _origin_bytes(origins[name], reader, entries):
                file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    if path.stat().st_size != 8 + len(text) + at:
        raise CheckpointError(f"{path.name} came out with {path.stat().st_size} bytes instead of {8 + len(text) + at}")


def _write_output(output: Output, folder: Path, reader: TensorReader, shard_bytes: int | None, say: Report) -> None:
    """Write everything into a folder. shard_bytes: None for one file."""
    for weights in output.weights:
        size = sum(map(_known_bytes, weights.entries.values()))
        say(f"{weights.part.name}: {weights.part.identity.name}, {len(weights.origins)} tensors, {size / 1e9:.2f} GB")
        target = folder / weights.target
        target.parent.mkdir(parents=True, exist_ok=True)
        # The original layout has its encoders in one file each.
        limit = 2**63 if shard_bytes is None or weights.config is None else shard_bytes
        write_weights(target, weights.origins, reader, weights.part.entries, limit)
        if weights.config is not None:
            write_json(target.with_name(CONFIG), weights.config)
    for name, value in output.texts.items():
        write_json(folder / name, value)
    for to, source in output.copies.items():
        shutil.copytree(source, folder / to)


@contextmanager
def _temporary_folder(destination: Path) -> Iterator[Path]:
    """A temporary folder beside the destination, gone at the end, whatever happens."""
    folder = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.absolute().parent))
    try:
        os.chmod(folder, 0o755)  # mkdtemp makes it private; what is renamed should be as any other folder
        yield folder
    except OSError as error:
        raise CheckpointError(f"{destination} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
