"""`fastvid convert`: converts weights between layouts, pickles to safetensors, and to other dtypes and 8 bits.

Without `dtype` and `quantize` conversion only moves bytes, so a round trip is bit-identical. Memory holds one chunk, or
one tensor to transpose or to change.
Whole models: the original folder <-> the diffusers folder (see layouts.py). Single parts: a file or folder with the
weights of a transformer, VAE, text or image encoder, in either layout, with ComfyUI's prefixes or none.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastvid.checks import nearest_name
from fastvid.device.devices import check_dtype
from fastvid.errors import CheckpointError, InvalidRequest
from fastvid.files import copy_files, reason
from fastvid.loaders import gguf, layouts, safetensors, weight_files
from fastvid.loaders.convert_files import TensorReader, Tensors, moved, write_json, write_weights
from fastvid.loaders.convert_quantized import QUANTIZATION, Change, check_source
from fastvid.loaders.find import FoundPart, find_original, identify_part, kind_name
from fastvid.loaders.layouts import CONFIG, EXPERT_FOLDERS, EXTRAS, INDEX, ORIGINAL_TOKENIZER, SCHEDULER, TOKENIZER
from fastvid.loaders.lora_names import is_lora_weight
from fastvid.loaders.quantize import check as check_quantize
from fastvid.loaders.quantize import check_parts, choice_of
from fastvid.models.common.config_reader import read_json
from fastvid.models.common.tokenizer import MAX_TOKENIZER
from fastvid.models.registry import EXPERTS
from fastvid.models.wan import weight_names
from fastvid.models.wan.detect import Identity
from fastvid.models.wan.weight_names import DIFFUSERS, LAYOUTS, ORIGINAL, Origin

SHARD_BYTES = 5 * 10**9
STEMS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}  # model for the encoders
NOT_IN_SHAPES = ("num_attention_heads", "eps", "rope_max_seq_len", "vace_layers")
Report = Callable[[str], None]


@dataclass(frozen=True)
class WeightsOutput:
    """One set of weights to write. target: path (*.safetensors) in the destination; config: its config.json; change:
    None moves the bytes."""

    part: FoundPart
    target: Path
    origins: Mapping[str, Origin]
    config: Mapping[str, Any] | None
    change: Change | None = None

    def tensors(self, reader: TensorReader) -> Tensors:
        """The tensors to write."""
        if self.change is not None:
            return self.change.tensors(self.part, self.origins, reader, self.target)
        check_source(self.part)
        return moved(self.origins, reader, self.part.entries, self.target)


@dataclass(frozen=True)
class Output:
    """Everything to write to a destination: weights, small JSON files, and folders to copy."""

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
    dtype: str | torch.dtype | None = None,
    quantize: str | Mapping[str, str | None] | None = None,
    say: Report = lambda text: None,
) -> dict[str, Any]:
    """Convert a model or one of its parts into a new file or folder. Returns a JSON summary of what was written.

    Args:
        source: a model folder in either layout, or a folder or file with the weights of one part. Pickles (.pth etc.)
            are opened in a child process, with weights_only.
        destination: must not exist. A name that ends in .safetensors becomes one file, any other a folder.
        to: "diffusers" or "original".
        shard_bytes: maximum size of a weights file.
        key: the state dict to read from a pickle with several. Default: the first that exists of
            generator_ema, ema, params_ema, generator, generator_lora, state_dict, model_state_dict, model, module.
        base: a model folder that supplies every other part when the source is only a transformer. The destination is
            then a complete model.
        dtype: of the weights, as for `fastvid.load`; what is stored and computed in fp32 stays so. Needed to make
            16-bit weights of quantized ones. Default: as they are.
        quantize: as for `fastvid.load`: writes 8-bit weights of those that it names, in ComfyUI's format.
        say: called with a line of text for every set of weights.

    Raises:
        InvalidRequest: an argument is invalid.
        CheckpointError: the source is broken, incomplete, or not a Wan model. The destination is not created.
    """
    source, destination = Path(source).expanduser(), Path(destination).expanduser()
    _check(source, destination, to, shard_bytes)
    wanted = _Wanted(
        None if quantize is None else check_quantize("quantize", quantize),
        None if dtype is None else check_dtype("dtype", dtype),
    )
    single = destination.name.endswith(safetensors.SUFFIXES)
    with TensorReader({source: key} if key else {}) as reader:
        if base is None:
            output = _plan(source, to, reader, single)
        else:
            output = _plan_onto(Path(base), source, to, reader, single)
        output = wanted.applied(output)
        _check_space(destination.absolute().parent, output, reader)
        with _temporary_folder(destination) as folder:
            _write_output(output, folder, reader, None if single else shard_bytes, say)
            written = folder / output.weights[0].target if single else folder
            all_files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
            files = [destination.name] if single else all_files
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
    if destination.suffix in (gguf.SUFFIX, *safetensors.PICKLES):
        raise InvalidRequest(
            f"destination {destination}: {destination.suffix} files are not written; the nearest is "
            f"{destination.with_suffix(safetensors.SUFFIX).name}"
        )
    if destination.exists() or destination.is_symlink():
        raise InvalidRequest(f"destination {destination} exists already; give a new name, or remove it first")
    if not destination.absolute().parent.is_dir():
        raise InvalidRequest(f"destination {destination}: there is no folder {destination.absolute().parent}")


@dataclass(frozen=True)
class _Wanted:
    """quantize: as `quantize.check` returns it."""

    quantize: str | None
    dtype: torch.dtype | None

    def applied(self, output: Output) -> Output:
        """The output with its weights changed. Raises InvalidRequest for what it does not have."""
        if self.quantize is None and self.dtype is None:
            return output
        if (first := output.weights[0]).part.name == "lora":
            raise InvalidRequest(
                f"{first.part.files[0]} is a LoRA, which is kept as it is; leave out dtype and quantize"
            )
        if self.quantize is not None:
            check_parts(self.quantize, {weights.part.name for weights in output.weights})
        return replace(output, weights=tuple(map(self._changed, output.weights)))

    def _changed(self, weights: WeightsOutput) -> WeightsOutput:
        config = None if weights.config is None else {k: v for k, v in weights.config.items() if k != QUANTIZATION}
        return replace(weights, config=config, change=Change(choice_of(self.quantize, weights.part.name), self.dtype))


def _check_space(folder: Path, output: Output, reader: TensorReader) -> None:
    every = (entry for weights in output.weights for entry in weights.tensors(reader).entries.values())
    needed = sum(map(safetensors.known_bytes, every))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InvalidRequest(
            f"destination needs {needed} bytes, but {folder} has {free} free; {needed - free} are missing"
        )


# ---------------------------------------------------------------- planning the output


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
    """Combine a transformer with all other parts of the `base` model."""
    base = base.expanduser()
    if single:
        raise InvalidRequest(f"base {base} makes a whole model, which needs a folder as destination, not one file")
    if not ((base / INDEX).is_file() or layouts.is_original(base)):
        raise InvalidRequest(f"base {base} is no folder of a whole model, in diffusers' or in the original layout")
    base_output = _plan(base, to, reader, False)
    old = [weights for weights in base_output.weights if weights.part.name in EXPERTS]
    other_weights = [weights for weights in base_output.weights if weights.part.name not in EXPERTS]
    if len(old) != 1:
        raise InvalidRequest(f"base {base} has two transformers, {source} is one; a base with one is needed")
    # Take values that shapes do not determine, such as the number of heads, from the base.
    part = _read_part(
        source, reader, "transformer", {key: (old[0].part.config or {}).get(key) for key in NOT_IN_SHAPES}
    )
    texts = {
        name: _renamed_class(value, part) if name == Path(INDEX) else value for name, value in base_output.texts.items()
    }
    texts = {name: value for name, value in texts.items() if name != Path(EXTRAS)}
    return Output((_weights_output(part, to), *other_weights), texts, base_output.copies)


def _renamed_class(index: Mapping[str, Any], part: FoundPart) -> dict[str, Any]:
    kind = ["diffusers", (part.config or {})["_class_name"]]
    return {**index, "transformer": kind, "_class_name": layouts.pipeline_of(part.identity)}


def _from_original(source: Path, to: str, reader: TensorReader) -> Output:
    model = find_original(source, reader.entries)
    experts = any(part.name == "transformer_2" for part in model.parts)
    weights = tuple(_weights_output(part, to, experts=experts) for part in model.parts)
    if to == ORIGINAL:
        extras = {Path(EXTRAS): read_json(source / EXTRAS)} if (source / EXTRAS).is_file() else {}
        return Output(weights, extras, {Path(ORIGINAL_TOKENIZER): model.tokenizer})
    texts = {Path(INDEX): model.index, SCHEDULER: model.scheduler}
    texts |= {layouts.IMAGE_PROCESSOR: model.image_processor} if model.image_processor else {}
    return Output(weights, texts, {Path(TOKENIZER): model.tokenizer})


def _from_diffusers(source: Path, to: str, reader: TensorReader) -> Output:
    index = read_json(source / INDEX)
    # model_index.json lists unused components as [null, null].
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
    # The original layout cannot store these. Converting back to diffusers reads them from this file.
    extras = {"model_index": index, "scheduler": scheduler, "configs": {part.name: part.config for part in parts}}
    extras |= {"image_processor": processor} if processor else {}
    return Output(weights, {Path(EXTRAS): extras}, {Path(ORIGINAL_TOKENIZER): source / TOKENIZER})


def _read_lora(source: Path, reader: TensorReader, single: bool) -> Output | None:
    """Plan a LoRA such as LongLive's generator_lora; its tensors keep their names. None if the source is not a LoRA."""
    if source.is_dir() or source.suffix not in layouts.WEIGHT_FILES:
        return None
    entries = reader.entries((source,))
    if not entries or not all(map(is_lora_weight, entries)):
        return None
    if not single:
        raise InvalidRequest(f"{source} is a LoRA; a destination that ends in {safetensors.SUFFIX} is needed")
    identity = Identity("lora", "", "", "wan", "", None, {})
    part = FoundPart("lora", (source,), entries, {}, identity)
    copies = {name: Origin((name,)) for name in entries}
    return Output((WeightsOutput(part, Path("lora" + safetensors.SUFFIX), copies, None),), {}, {})


def _read_part(
    source: Path, reader: TensorReader, name: str | None = None, fallback: Mapping[str, Any] | None = None
) -> FoundPart:
    """Read the headers of one part: a file, or a folder with an optional config.json. fallback: config values to use
    if there is no config.json."""
    files = (source,) if source.is_file() else _files_of(source)
    if files[0].suffix not in layouts.WEIGHT_FILES:
        raise InvalidRequest(
            f"source {source}: {files[0].suffix or 'no'} file; allowed are {', '.join(layouts.WEIGHT_FILES)}"
        )
    config = source / CONFIG if source.is_dir() else None
    known_config = layouts.to_diffusers_keys(read_json(config)) if config and config.is_file() else {}
    known_config = known_config or {key: value for key, value in (fallback or {}).items() if value is not None}
    part = identify_part(name or "", files, reader.entries(files), known_config)
    if name and part.identity.part != kind_name(name):
        raise CheckpointError(f"{source} should hold a {kind_name(name)}, but it is a {part.identity.part}")
    return replace(part, name=name or part.identity.part)


def _files_of(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a folder, or its pickles if it has no safetensors files."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    pickles = tuple(path for path in paths if path.suffix in safetensors.PICKLES)
    if pickles and not any(path.name.endswith(safetensors.SUFFIXES) for path in paths):
        return pickles
    return weight_files.find_files(folder)


def _weights_output(part: FoundPart, to: str, alone: bool = False, experts: bool = False) -> WeightsOutput:
    """Where to write a part. alone: directly in the destination, not in the layout's subfolder. experts: the model has
    two transformers."""
    found = weight_names.Found(part.identity.part, part.identity.layout, part.identity.prefix)
    origins = weight_names.origins(part.entries, to, found)
    kind = part.identity.part
    if to == DIFFUSERS:
        folder = Path() if alone else Path(part.name)
        return WeightsOutput(part, folder / (STEMS.get(kind, "model") + safetensors.SUFFIX), origins, part.config)
    if kind != "transformer":
        return WeightsOutput(part, Path(layouts.original_name(kind, part.identity)), origins, None)
    folder = Path(EXPERT_FOLDERS[part.name]) if experts and not alone else Path()
    config = layouts.to_original_keys(part.config or {}, part.identity.task)
    return WeightsOutput(part, folder / (STEMS[kind] + safetensors.SUFFIX), origins, config)


# ---------------------------------------------------------------- writing


def _write_output(output: Output, folder: Path, reader: TensorReader, shard_bytes: int | None, say: Report) -> None:
    """Write everything into a folder. shard_bytes: None writes each set of weights to one file."""
    for weights in output.weights:
        tensors = weights.tensors(reader)
        size = sum(map(safetensors.known_bytes, tensors.entries.values()))
        say(f"{weights.part.name}: {weights.part.identity.name}, {len(weights.origins)} tensors, {size / 1e9:.2f} GB")
        target = folder / weights.target
        target.parent.mkdir(parents=True, exist_ok=True)
        # The original layout stores each encoder in a single file.
        limit = 2**63 if shard_bytes is None or weights.config is None else shard_bytes
        write_weights(target, tensors, limit)
        if weights.config is not None:
            write_json(target.with_name(CONFIG), weights.config)
    for name, value in output.texts.items():
        write_json(folder / name, value)
    for to, source in output.copies.items():
        copy_files(source, folder / to, MAX_TOKENIZER)


@contextmanager
def _temporary_folder(destination: Path) -> Iterator[Path]:
    """A temporary folder beside the destination, always removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.absolute().parent))
    try:
        os.chmod(folder, 0o755)  # mkdtemp creates private folders; the renamed one should have the usual mode
        yield folder
    except OSError as error:
        raise CheckpointError(f"{destination} cannot be written: {reason(error, named=True)}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
