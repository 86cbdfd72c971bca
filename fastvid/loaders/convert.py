"""`fastvid convert`: weights from one layout to the other, and pickles to safetensors. Bytes are moved, never computed
with: what is converted there and back is the same bit for bit.

Whole models: the original folder (see models/original.py) <-> the diffusers folder. Single parts: a file or folder with
the weights of a transformer, VAE, text or picture encoder, in either layout, with ComfyUI's prefixes or none.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastvid.checks import nearest_name
from fastvid.errors import CheckpointError, InvalidRequest
from fastvid.loaders import original, safetensors
from fastvid.loaders.convert_files import SHARD_BYTES, Tensors, describe, nbytes, write_json, write_weights
from fastvid.loaders.original import CONFIG, EXPERTS, EXTRAS, TOKENIZER, FoundPart
from fastvid.models.wan import weight_names
from fastvid.models.wan.detect import Identity
from fastvid.models.wan.weight_names import DIFFUSERS, LAYOUTS, ORIGINAL, Origin

INDEX = "model_index.json"
SCHEDULER = Path("scheduler", "scheduler_config.json")
PROCESSOR = Path("image_processor", "preprocessor_config.json")
STEMS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}  # model for the encoders
MODEL_PARTS = ("transformer", "transformer_2", "vae", "text_encoder", "image_encoder")
UNSHOWN = ("num_attention_heads", "eps", "rope_max_seq_len", "vace_layers")
LORA = re.compile(r"\.(lora_(A|B|down|up|embedding_A|embedding_B)\b|alpha$|diff(_b|_m)?$)")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """One set of weights to write: `target` (*.safetensors) within the destination, and the config.json beside it."""

    part: FoundPart
    target: Path
    made: Mapping[str, Origin]
    config: Mapping[str, Any] | None

    @property
    def bytes(self) -> int:
        return sum(nbytes(entry) for entry in describe(self.made, self.part.entries, self.target).values())


@dataclass(frozen=True)
class Work:
    """Everything that goes into a destination: weights, small JSON files, and folders that are copied."""

    jobs: tuple[Job, ...]
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
    say: Say = lambda text: None,
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
    with Tensors({source: key} if key else {}) as tensors:
        work = _plan(source, to, tensors, single) if base is None else _onto(Path(base), source, to, tensors, single)
        _check_space(destination.absolute().parent, sum(job.bytes for job in work.jobs))
        with _fresh(destination) as folder:
            for job in work.jobs:
                # The original layout has its encoders in one file each.
                _run(job, folder, tensors, 2**63 if single or job.config is None else shard_bytes, say)
            _write_rest(work, folder)
            written = folder / work.jobs[0].target if single else folder
            files = [destination.name] if single else _files_in(folder)
            os.replace(written, destination)
    parts = {job.part.name: job.part.identity.name for job in work.jobs}
    return {"source": str(source), "destination": str(destination), "layout": to, "parts": parts, "files": files}


def _check(source: Path, destination: Path, to: Any, shard_bytes: Any) -> None:
    if to not in LAYOUTS:
        near = nearest_name(str(to), LAYOUTS)
        raise InvalidRequest(f"to={to!r:.40}: allowed is {' or '.join(LAYOUTS)}; the nearest is {near}")
    if type(shard_bytes) is not int or shard_bytes < 1:
        raise InvalidRequest(f"shard_bytes={shard_bytes!r:.40}: a positive number of bytes is needed")
    if not source.exists():
        raise InvalidRequest(f"source {source} does not exist; give a folder, or a file ({', '.join(original.FILES)})")
    if destination.exists() or destination.is_symlink():
        raise InvalidRequest(f"destination {destination} exists already; give a new name, or remove it first")
    if not destination.absolute().parent.is_dir():
        raise InvalidRequest(f"destination {destination}: there is no folder {destination.absolute().parent}")


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InvalidRequest(
            f"destination needs {needed} bytes, but {folder} has {free} free; {needed - free} are missing"
        )


# ---------------------------------------------------------------- what is to be written


def _plan(source: Path, to: str, tensors: Tensors, single: bool) -> Work:
    if (source / INDEX).is_file():
        work = _from_diffusers(source, to, tensors)
    elif original.is_original(source):
        work = _from_original(source, to, tensors)
    else:
        if lora := _read_lora(source, tensors, single):
            return lora
        part = _read_part(source, tensors)
        return Work((_job(part, to, alone=True),), {}, {})
    if single:
        names = ", ".join(job.part.name for job in work.jobs)
        raise InvalidRequest(f"{source} is a whole model ({names}), which needs a folder as destination, not one file")
    return work


def _onto(base: Path, source: Path, to: str, tensors: Tensors, single: bool) -> Work:
    """A transformer with everything else of a whole model."""
    base = base.expanduser()
    if single:
        raise InvalidRequest(f"base {base} makes a whole model, which needs a folder as destination, not one file")
    if not ((base / INDEX).is_file() or original.is_original(base)):
        raise InvalidRequest(f"base {base} is no folder of a whole model, in diffusers' or in the original layout")
    whole = _plan(base, to, tensors, False)
    old = [job for job in whole.jobs if job.part.name in EXPERTS]
    if len(old) != 1:
        raise InvalidRequest(f"base {base} has two transformers, {source} is one; a base with one is needed")
    # What shapes do not show, such as the number of heads, is as in the base.
    part = _read_part(source, tensors, "transformer", {key: old[0].part.config.get(key) for key in UNSHOWN})
    texts = {name: _renamed_class(value, part) if name == Path(INDEX) else value for name, value in whole.texts.items()}
    texts = {name: value for name, value in texts.items() if name != Path(EXTRAS)}
    return Work((_job(part, to), *(job for job in whole.jobs if job not in old)), texts, whole.copies)


def _renamed_class(index: Mapping[str, Any], part: FoundPart) -> dict[str, Any]:
    kind = ["diffusers", part.config["_class_name"]]
    return {**index, "transformer": kind, "_class_name": original.pipeline_of(part.identity)}


def _from_original(source: Path, to: str, tensors: Tensors) -> Work:
    found = original.read_original(source, tensors.entries)
    experts = any(part.name == "transformer_2" for part in found.parts)
    jobs = tuple(_job(part, to, experts=experts) for part in found.parts)
    if to == ORIGINAL:
        extras = {Path(EXTRAS): safetensors.read_json(source / EXTRAS)} if (source / EXTRAS).is_file() else {}
        return Work(jobs, extras, {Path(TOKENIZER): found.tokenizer})
    texts = {Path(INDEX): found.index, SCHEDULER: found.scheduler}
    texts |= {PROCESSOR: found.image_processor} if found.image_processor else {}
    return Work(jobs, texts, {Path("tokenizer"): found.tokenizer})


def _from_diffusers(source: Path, to: str, tensors: Tensors) -> Work:
    index = safetensors.read_json(source / INDEX)
    # A component that a pipeline does without stands there as [null, null].
    names = [name for name in MODEL_PARTS if isinstance(index.get(name), list) and any(index[name])]
    if "transformer" not in names:
        raise CheckpointError(f"{source / INDEX} names no transformer; a Wan model is expected")
    parts = [_read_part(source / name, tensors, name) for name in names]
    jobs = tuple(_job(part, to, experts="transformer_2" in names) for part in parts)
    scheduler = safetensors.read_json(source / SCHEDULER)
    texts: dict[Path, Any] = {Path(INDEX): index, SCHEDULER: scheduler}
    processor = safetensors.read_json(source / PROCESSOR) if (source / PROCESSOR).is_file() else None
    if not (source / "tokenizer").is_dir():
        raise CheckpointError(f"{source / 'tokenizer'} is missing")
    if to == DIFFUSERS:
        texts |= {PROCESSOR: processor} if processor else {}
        return Work(jobs, texts, {Path("tokenizer"): source / "tokenizer"})
    # The original layout has no place for these; on the way back they are taken from here.
    extras = {"model_index": index, "scheduler": scheduler, "configs": {part.name: part.config for part in parts}}
    extras |= {"image_processor": processor} if processor else {}
    return Work(jobs, {Path(EXTRAS): extras}, {Path(TOKENIZER): source / "tokenizer"})


def _read_lora(source: Path, tensors: Tensors, single: bool) -> Work | None:
    """A LoRA, such as LongLive's generator_lora: its tensors under the names that they have. None if it is none."""
    if source.is_dir() or source.suffix not in original.FILES:
        return None
    entries = tensors.entries((source,))
    if not entries or not all(LORA.search(name) for name in entries):
        return None
    if not single:
        raise InvalidRequest(f"{source} is a LoRA; a destination that ends in {safetensors.SUFFIX} is needed")
    part = FoundPart("lora", (source,), entries, Identity("lora", "", "", "wan", "", None, {}), {})
    return Work(
        (Job(part, Path("lora" + safetensors.SUFFIX), {name: Origin((name,)) for name in entries}, None),), {}, {}
    )


def _read_part(
    source: Path, tensors: Tensors, name: str | None = None, unshown: Mapping[str, Any] | None = None
) -> FoundPart:
    """The weights of one part: a file, or a folder with config.json or without. unshown: what its config says if it has
    none."""
    files = (source,) if source.is_file() else _files(source)
    if files[0].suffix not in original.FILES:
        raise InvalidRequest(
            f"source {source}: {files[0].suffix or 'no'} file; allowed are {', '.join(original.FILES)}"
        )
    config = source / CONFIG if source.is_dir() else None
    given = original.to_diffusers_words(safetensors.read_json(config)) if config and config.is_file() else {}
    given = given or {key: value for key, value in (unshown or {}).items() if value is not None}
    part = original.read_part(name or "", files, tensors.entries(files), given)
    wanted = "transformer" if name in EXPERTS else name
    if wanted and part.identity.part != wanted:
        raise CheckpointError(f"{source} should hold a {wanted}, but it is a {part.identity.part}")
    return replace(part, name=name or part.identity.part)


def _files(folder: Path) -> tuple[Path, ...]:
    """Safetensors files of a folder, or its pickles where there are none."""
    try:
        return safetensors.find_files(folder)
    except CheckpointError:
        pickles = (
            sorted(path for path in folder.iterdir() if path.suffix in safetensors.PICKLES) if folder.is_dir() else []
        )
        if not pickles or any(path.name.endswith(safetensors.SUFFIX) for path in folder.iterdir()):
            raise
        return tuple(pickles)


def _job(part: FoundPart, to: str, alone: bool = False, experts: bool = False) -> Job:
    """Where a part goes. `alone`: into the destination itself, otherwise where the layout has its place."""
    found = weight_names.Found(part.identity.part, part.identity.layout, part.identity.prefix)
    made = weight_names.origins(part.entries, to, found)
    kind = part.identity.part
    if to == DIFFUSERS:
        folder = Path() if alone else Path(part.name)
        return Job(part, folder / (STEMS.get(kind, "model") + safetensors.SUFFIX), made, part.config)
    if kind != "transformer":
        return Job(part, Path(original.single_name(kind, part.identity)), made, None)
    folder = Path(EXPERTS[part.name]) if experts and not alone else Path()
    config = original.to_original_words(part.config, part.identity.task)
    return Job(part, folder / (STEMS[kind] + safetensors.SUFFIX), made, config)


# ---------------------------------------------------------------- writing


def _files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _run(job: Job, folder: Path, tensors: Tensors, shard_bytes: int, say: Say) -> None:
    say(f"{job.part.name}: {job.part.identity.name}, {len(job.made)} tensors, {job.bytes / 1e9:.2f} GB")
    target = folder / job.target
    target.parent.mkdir(parents=True, exist_ok=True)
    write_weights(target, job.made, tensors, job.part.entries, shard_bytes)
    if job.config is not None:
        write_json(target.with_name(CONFIG), job.config)


def _write_rest(work: Work, folder: Path) -> None:
    for name, value in work.texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_json(folder / name, value)
    for to, source in work.copies.items():
        shutil.copytree(source, folder / to)


@contextmanager
def _fresh(destination: Path) -> Iterator[Path]:
    """A temporary folder beside the destination, gone at the end, whatever happens."""
    folder = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.absolute().parent))
    try:
        os.chmod(folder, 0o755)  # mkdtemp makes it private; what is renamed should be as any other folder
        yield folder
    except OSError as error:
        raise CheckpointError(f"{destination} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
