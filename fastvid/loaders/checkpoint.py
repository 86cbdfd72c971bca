"""What a model folder holds, known before any weight is read: model_index.json, the parts' configs, and the headers of
their safetensors files, held against the modules that would be built from them.
"""

from __future__ import annotations

import difflib
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastvid.errors import CheckpointError
from fastvid.loaders import assembled, lora, original, safetensors
from fastvid.loaders.lora import Lora, note_problem
from fastvid.loaders.sources import read_tokenizer
from fastvid.models.common.clip import CLIPVisionConfig
from fastvid.models.common.umt5 import UMT5Config
from fastvid.models.description import Checkpoint, Part, _flat
from fastvid.models.preset import Preset
from fastvid.models.registry import CONTROLLED, EXPERTS, KINDS, OPTIONAL, PartKind, kind_of, on_meta
from fastvid.models.wan import weight_names
from fastvid.models.wan.config import VAEConfig, WanTransformerConfig, WanVACEConfig
from fastvid.models.wan.presets import find_preset, find_variants, read_signature
from fastvid.ops import reference

PIPELINES = (
    "WanPipeline",
    "WanImageToVideoPipeline",
    "WanVACEPipeline",
    "WanDMDPipeline",  # FastVideo's, of distilled models
    "WanCausalDMDPipeline",
)
INDEX = "model_index.json"


def open_checkpoint(folder: str | Path, given: Mapping[str, str | Path] | None = None) -> Checkpoint:
    """Read everything of a model but its weights. folder: that of a model, or the single file of a transformer. given:
    parts that come from elsewhere, see `fastvid.load`.

    What is missing or wrong inside goes into `problems`. Raises CheckpointError for a path that is no model of this
    kind at all, saying what was expected and what is nearest; InvalidRequest for parts that do not exist.
    """
    folder, paths = Path(folder).expanduser(), assembled.check_parts(given)
    whole = _describe_whole(folder, paths)
    index = _check_index(whole.index, folder) if whole else _read_index(folder)
    tokenizer = whole.tokenizer if whole else folder / "tokenizer"
    found = {part.name: part for part in whole.parts} if whole else {}
    missing = whole.missing if whole else {}
    parts = {name: _open_part(folder, name, index, found.get(name), missing) for name in _part_names(index)}
    problems = [text for part in parts.values() for text in part.problems]
    text_length = None
    if "tokenizer" in missing:
        problems.append(missing["tokenizer"])
    else:
        text_length = note_problem(problems, lambda: read_tokenizer(tokenizer).text_length)
    scheduler = whole and whole.scheduler
    preset, alternatives = note_problem(problems, lambda: _preset(folder, index, parts, scheduler)) or (None, ())
    problems += _disagreements(parts)
    rest = (preset, alternatives, text_length, tuple(problems), tokenizer)
    return Checkpoint(folder, index["_class_name"], tuple(parts.values()), *rest)


def _describe_whole(folder: Path, given: Mapping[str, Path]) -> original.Whole | None:
    """What is not simply a diffusers folder, described as one; None for one that is."""
    if folder.is_file() and folder.suffix in original.FILES:
        return assembled.describe_file(folder, given)
    if _is_original(folder):
        described = original.read_original(folder) if not given else None
        return described or assembled.describe_file(assembled.transformer_file(folder), given)
    return assembled.replace_parts(folder, _read_index(folder), given) if given else None


def load_part(
    checkpoint: Checkpoint,
    name: str,
    ops: Any = reference,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    loras: Sequence[Lora] = (),
) -> nn.Module:
    """Build a part of a checkpoint and stream its weights in; `name` as `Checkpoint.part` takes it.

    ops: see `fastvid.ops.dispatch.bind`. loras: merged into the weights. Raises CheckpointError if the part has
    problems, or a LoRA does not fit it.
    """
    part = checkpoint.part(name)
    if part.problems:
        raise CheckpointError("; ".join(part.problems))
    module = on_meta(kind_of(name), part.config, ops)
    fill(module, part, device, dtype, loras)
    return module


def fill(
    module: nn.Module,
    part: Part,
    device: torch.device | str,
    dtype: torch.dtype,
    loras: Sequence[Lora] = (),
    only: Container[str] | None = None,
) -> None:
    """Stream a part's weights, with LoRAs merged in, into its module: all of them, or `only` some, read again."""
    lora.check_part(loras, module, part)
    merge = (lambda key, tensor: lora.merge(key, tensor, loras)) if loras else None
    safetensors.load_into(module, part.files, device, dtype, origins=part.origins, merge=merge, only=only)


def check_fill(module: nn.Module, part: Part, loras: Sequence[Lora] = ()) -> None:
    """Raise what `fill` would raise, without reading a weight."""
    lora.check_part(loras, module, part)
    safetensors.read_fitting(module, part.files, part.origins)


def _part_names(index: Mapping[str, Any]) -> list[str]:
    experts = [name for name in EXPERTS if name == EXPERTS[0] or _class_of(index, name)]
    return [*experts, *(n for n in KINDS if n not in EXPERTS and (n not in OPTIONAL or _class_of(index, n)))]


def _open_part(
    folder: Path,
    name: str,
    index: Mapping[str, Any],
    found: original.FoundPart | None,
    missing: Mapping[str, str],
) -> Part:
    """A part of a diffusers folder, or one that was `found` elsewhere, or is known to be `missing`."""
    kind, problems = kind_of(name), []
    if name in missing:
        return Part(name, None, problems=(missing[name],))
    given, path = _class_of(index, name), folder / name / "config.json"
    if given is None:
        return Part(name, None, problems=(f"{INDEX}: {name} is a None; only {kind.class_name} is supported",))
    stated = found.config if found else note_problem(problems, lambda: safetensors.read_json(path))
    config = module = None
    if given not in (kind.class_name, kind.also):
        problems.append(f"{INDEX}: {name} is a {given}; only {kind.class_name} is supported")
    elif stated is not None:
        config, module = note_problem(problems, lambda: _read_part(kind, stated, path)) or (None, None)
        if config is not None and given == CONTROLLED != stated.get("_class_name", given):
            problems.append(f"{INDEX}: {name} is a {given}, but {path} is of a {stated['_class_name']}")
    files = found.files if found else note_problem(problems, lambda: safetensors.find_files(folder / name)) or ()
    entries = found.entries if found else note_problem(problems, lambda: safetensors.read_headers(files)) or {}
    origins = weight_names.origins(entries, weight_names.DIFFUSERS) if found else None
    entries = entries if origins is None else safetensors.made_of(origins, entries)
    if module is not None and entries:
        where = files[0] if found else folder / name
        problems += [f"{where}: {text}" for text in safetensors.mismatches(module, entries)]
        entries = safetensors.renamed(module, entries)
    held = sum(safetensors.nbytes(entry) for entry in found.entries.values()) if found else 0
    sizes = held or sum(file.stat().st_size for file in files)
    counts = (safetensors.count_parameters(entries), safetensors.dtypes(entries), sizes)
    return Part(name, config, stated, files, *counts, tuple(problems), origins)


def _read_part(kind: PartKind, stated: dict[str, Any], path: Path) -> tuple[Any, nn.Module]:
    """The config that a file holds, and the module that it describes, without weights."""
    config = kind.read_config(stated)
    try:
        return config, on_meta(kind, config, reference)
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise CheckpointError(f"{path} describes no {kind.class_name} that can be built: {error}") from None


def _preset(
    folder: Path, index: Mapping[str, Any], parts: Mapping[str, Part], scheduler: Mapping[str, Any] | None
) -> tuple[Preset, tuple[str, ...]] | None:
    """The preset, and the other variants that it might be; None without what it follows from. Also for a transformer
    that can't be built yet: its config.json says which one it is."""
    stated, vae = parts["transformer"].stated, parts["vae"].config
    if stated is None or not isinstance(vae, VAEConfig):
        return None
    scheduler = scheduler or safetensors.read_json(folder / "scheduler" / "scheduler_config.json")
    experts, name = sum(part in EXPERTS for part in parts), f"{_model_name(folder)} {index['_class_name']}"
    preset = find_preset(stated, vae, scheduler, index, name, experts)
    same = find_variants(read_signature(stated, experts), name)
    return preset, tuple(other.preset.name for other in same if other.preset.name != preset.name)


def _model_name(path: Path) -> str:
    """What a folder or file is called; in the hub's cache (models--org--name/snapshots/revision) also by the name
    there. A file there is a link to one without a name."""
    whole = path.absolute() if path.is_file() else path.resolve()
    snapshots = next((parent for parent in whole.parents if parent.name == "snapshots"), None)
    names = [snapshots.parent.name] if snapshots else []
    return " ".join(names + ([whole.name] if path.is_file() or not snapshots else []))


def _disagreements(parts: Mapping[str, Part]) -> list[str]:
    """Sizes in which the parts do not fit each other."""
    stated, vae, text_encoder = (parts[name].config for name in ("transformer", "vae", "text_encoder"))
    transformer = stated.transformer if isinstance(stated, WanVACEConfig) else stated
    if not isinstance(transformer, WanTransformerConfig) or not isinstance(vae, VAEConfig):
        return []
    pairs = [("transformer out_channels", transformer.out_channels, "vae z_dim", vae.z_dim)]
    # With a picture's mask and latents behind its own.
    if transformer.in_channels != 2 * transformer.out_channels + vae.temporal_scale:
        pairs.append(("transformer in_channels", transformer.in_channels, "vae z_dim", vae.z_dim))
    if isinstance(text_encoder, UMT5Config):
        pairs.append(("transformer text_dim", transformer.text_dim, "text_encoder d_model", text_encoder.d_model))
    if transformer.image_dim:
        sees = parts["image_encoder"].config if "image_encoder" in parts else None
        width = sees.hidden_size if isinstance(sees, CLIPVisionConfig) else None
        pairs.append(("transformer image_dim", transformer.image_dim, "image_encoder hidden_size", width))
    if isinstance(stated, WanVACEConfig):
        seen = 2 * vae.z_dim + vae.spatial_scale**2
        pairs.append(("transformer vace_in_channels", stated.vace_in_channels, "what the vae makes of a control", seen))
    if "transformer_2" in parts and (second := parts["transformer_2"].config) is not None:
        mine, other = _flat(stated), _flat(second)
        pairs += [(f"transformer {k}", mine.get(k), "transformer_2's", other.get(k)) for k in mine | other]
    return [f"{name} is {a}, but {other} is {b}" for name, a, other, b in pairs if a != b]


def _read_index(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise CheckpointError(_not_a_folder(folder))
    if not (folder / INDEX).is_file():
        raise CheckpointError(f"{folder} has no {INDEX}{_nearest_folder(folder)}")
    return _check_index(safetensors.read_json(folder / INDEX), folder)


def _is_original(folder: Path) -> bool:
    return not (folder / INDEX).is_file() and original.is_original(folder)


def _check_index(index: dict[str, Any], folder: Path) -> dict[str, Any]:
    if (given := index.get("_class_name")) not in PIPELINES:
        raise CheckpointError(
            f"{folder / INDEX} describes a {given}; the kinds known so far are {', '.join(PIPELINES)} (Wan, such as "
            "Wan-AI/Wan2.1-T2V-1.3B-Diffusers)"
        )
    return index


def _not_a_folder(path: Path) -> str:
    if path.suffix == ".gguf":
        return f"{path} is quantized (GGUF), which is not supported; take the fp16 or bf16 {safetensors.SUFFIX} file"
    if path.exists():
        return f"{path} is a file; give the folder that holds {INDEX}" + _nearest_folder(path.parent)
    around = path.parent.iterdir() if path.parent.is_dir() else ()
    siblings = [entry.name for entry in around if entry.is_dir() or path.suffix == entry.suffix == safetensors.SUFFIX]
    near = difflib.get_close_matches(path.name, siblings, n=1)
    hint = f"; did you mean {path.parent / near[0]}?" if near else f"; a folder that holds {INDEX} is expected"
    return f"{path} does not exist{hint}"


def _nearest_folder(folder: Path) -> str:
    """The rest of a sentence: which folder nearby is the one to give, or what this one looks like instead."""
    near = [path.parent for path in (folder / INDEX, folder.parent / INDEX, *sorted(folder.glob(f"*/{INDEX}")))]
    near = [path for path in near if (path / INDEX).is_file()]
    if near:
        return f"; {near[0]} has one"
    return (
        "; the diffusers layout is expected (model_index.json, transformer/, vae/, text_encoder/, tokenizer/), or the "
        "original one (config.json, diffusion_pytorch_model*.safetensors, models_t5*, Wan2.*_VAE*)"
    )


def _class_of(index: Mapping[str, Any], name: str) -> str | None:
    """The class that model_index.json names for a component: the second of [library, class]."""
    value = index.get(name)
    return value[1] if isinstance(value, list) and len(value) == 2 and isinstance(value[1], str) else None
