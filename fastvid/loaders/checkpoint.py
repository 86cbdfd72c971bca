"""Describes and loads a model. `open_checkpoint` reads model_index.json, the parts' configs and the headers of their
safetensors files, and checks them against the modules that would be built. `load_part` then reads the weights.
"""

from __future__ import annotations

import difflib
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastvid import notices
from fastvid.errors import CheckpointError
from fastvid.loaders import layouts, lora, lora_fit, marks_refused, quantized, safetensors, vace_modules
from fastvid.loaders.find import (
    UNIDENTIFIED,
    FoundModel,
    FoundPart,
    find_diffusers,
    find_original,
    note_problem,
    part_names,
    read_tokenizer,
)
from fastvid.loaders.layouts import CONFIG, INDEX
from fastvid.loaders.lora import Lora
from fastvid.loaders.names import find_folder, find_sources
from fastvid.loaders.single_files import find_single_file
from fastvid.models.common.clip import CLIPVisionConfig
from fastvid.models.common.config_reader import read_json
from fastvid.models.common.tokenizer import TextTokenizer
from fastvid.models.common.umt5 import UMT5Config
from fastvid.models.description import Checkpoint, Part, flat_config
from fastvid.models.preset import Preset
from fastvid.models.registry import CONTROLLED, DRIVEN, EXPERTS, build_empty, hold_quantized, kind_of, target_dtype
from fastvid.models.wan import weight_names
from fastvid.models.wan.config import WanTransformerConfig, WanVACEConfig, WanVAEConfig
from fastvid.models.wan.variants import find_preset, find_variants, read_signature
from fastvid.ops import reference


def open_checkpoint(
    model: str | Path,
    parts: Mapping[str, str | Path] | None = None,
    download: bool = False,
    variant: str | None = None,
) -> Checkpoint:
    """Read everything about a model except its weights.

    model: a name, a folder, or the single file of a transformer. parts: paths of parts stored elsewhere, see
    `fastvid.load`. download: download missing files of a hub model. variant: the published model that it is.
    Missing or broken parts are listed in `problems`. Raises CheckpointError if the path is not a supported model,
    InvalidRequest if `parts` names a path that does not exist.
    """
    modules, sources = vace_modules.split(find_sources(parts, download))
    folder = find_folder(model, download).expanduser()
    found = vace_modules.add(_find_model(folder, sources), modules)
    by_name = {part.name: part for part in found.parts}
    opened = {}
    for name in part_names(found.index):
        part = by_name.get(name) or FoundPart(name, problems=(f"{folder} has no {name}",))
        opened[name] = _open_part(part, layouts.class_of(found.index, name), folder)
    problems = [text for part in opened.values() for text in part.problems] + list(found.problems)
    text_length = None
    if found.tokenizer != Path():
        words = opened["text_encoder"].config
        text_length = note_problem(problems, lambda: _check_tokenizer(read_tokenizer(found.tokenizer), words, found))
    preset, alternatives = note_problem(problems, lambda: _detect_preset(folder, found, opened, variant)) or (None, ())
    if "image_encoder" in opened and (folder / layouts.IMAGE_PROCESSOR).is_file():
        note_problem(problems, lambda: _check_image_processor(folder, opened["image_encoder"].config))
    return Checkpoint(
        folder,
        found.index["_class_name"],
        tuple(opened.values()),
        preset,
        alternatives,
        text_length,
        (*problems, *_size_conflicts(opened)),
        found.tokenizer,
    )


def _find_model(path: Path, sources: Mapping[str, Path]) -> FoundModel:
    if path.is_file() and path.suffix in layouts.WEIGHT_FILES:
        return find_single_file(path, sources)
    if layouts.is_original(path):
        if not sources:
            return find_original(path)
        return find_single_file(layouts.original_transformers(path)["transformer"][0], sources)
    if not path.is_dir():
        raise CheckpointError(_not_a_folder(path))
    if not (path / INDEX).is_file():
        raise CheckpointError(f"{path} has no {INDEX}{_nearest_folder(path)}")
    return find_diffusers(path, sources)


def load_part(
    checkpoint: Checkpoint,
    name: str,
    ops: Any = reference,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    loras: Sequence[Lora] = (),
    mapped: Container[Path] = (),
) -> nn.Module:
    """Build a part of a checkpoint and stream its weights in. name: see `Checkpoint.part`.

    ops: see `fastvid.ops.dispatch.bind`. loras: merged into the weights. mapped: the files whose weights are used where
    they lie. Raises CheckpointError if the part has
    problems or a LoRA does not fit it.
    """
    part = checkpoint.part(name)
    if part.problems or part.config is None:
        raise CheckpointError("; ".join(part.problems))
    module = build_empty(name, part.config, ops)
    hold_quantized(module, part.quantized, dtype, ops)
    fill(module, part, device, dtype, loras, mapped=mapped)
    return module


def fill(
    module: nn.Module,
    part: Part,
    device: torch.device | str,
    dtype: torch.dtype,
    loras: Sequence[Lora] = (),
    only: Container[str] | None = None,
    mapped: Container[Path] = (),
) -> None:
    """Stream a part's weights into its module, with LoRAs merged in but for their changes of quantized weights (see
    `fastvid.pipeline.loras`). only: the weights to reload; None: all. mapped: see `load_part`."""
    lora_fit.check_part(loras, module, part)
    loras = lora_fit.of_quantized(loras, [module], wanted=False)

    def merge(key: str, tensor: Tensor) -> Tensor:
        return lora.merge(key, tensor, loras, target_dtype(module, key, dtype))

    merging = merge if loras else None
    safetensors.load_into(
        module, part.files, device, dtype, origins=part.origins, merge=merging, only=only, mapped=mapped
    )


def check_fill(module: nn.Module, part: Part, loras: Sequence[Lora] = ()) -> None:
    """Raise the errors that `fill` would raise, without reading any weights."""
    lora_fit.check_part(loras, module, part)
    safetensors.read_matching_headers(module, part.files, part.origins)


def _open_part(found: FoundPart, class_name: str | None, folder: Path) -> Part:
    """Check a part's files against the module that its config describes. class_name: from model_index.json."""
    kind, problems, config, module = kind_of(found.name), list(found.problems), None, None
    identified = found.identity is not UNIDENTIFIED
    where = found.files[0] if identified else folder / found.name
    config_path = where if identified else where / CONFIG
    if class_name not in (kind.class_name, *kind.also):
        problems.append(f"{INDEX}: {found.name} is a {class_name!s:.80}; only {kind.class_name} is supported")
    elif (raw_config := found.config) is not None:
        built = note_problem(problems, lambda: _read_config(found.name, raw_config, config_path))
        config, module = built or (None, None)
        config_class = raw_config.get("_class_name", class_name)
        if config is not None and class_name in (CONTROLLED, DRIVEN) and class_name != config_class:
            problems.append(f"{INDEX}: {found.name} is a {class_name}, but {config_path} is of a {config_class!s:.80}")
    entries, origins = found.entries, None
    if identified:
        origins = weight_names.origins(entries, weight_names.DIFFUSERS)
        entries = safetensors.origin_entries(origins, entries)
    if module is not None and entries:
        problems += [f"{where}: {text}" for text in safetensors.mismatches(module, entries)]
        entries = safetensors.in_module_names(module, entries)
    _note_quantization(found, config_path, problems)
    stored = sum(map(safetensors.nbytes, found.entries.values())) if identified else 0
    return Part(
        found.name,
        config,
        found.config,
        found.files,
        safetensors.count_parameters(entries),
        safetensors.dtypes(entries),
        stored or sum(file.stat().st_size for file in found.files),
        tuple(problems),
        origins,
        quantized.specs_of(found.entries, origins, getattr(module, "ALIASES", {})) if module else {},
    )


def _note_quantization(found: FoundPart, path: Path, problems: list[str]) -> None:
    """Says what a config's quantization_config means, where the weights are not quantized in a way that is read."""
    settings = (found.config or {}).get("quantization_config")
    if not settings:
        return
    method, quantized = "", any(entry.source for entry in found.entries.values())
    if isinstance(settings, dict):
        method = str(settings.get("quant_method"))
    if method == "torchao" and not found.files:
        problems.append(
            f"{path}: {found.name} is quantized by torchao; save it again with torchao 0.16 or later, as safetensors"
        )
    elif (problems or quantized) and method in marks_refused.METHODS:
        problems.append(f"{path}: {found.name} {marks_refused.method_text(method)}")
    elif not problems and not quantized:
        notices.warn(f"{path}: quantization_config is not read: the weights beside it are not quantized")


def _check_tokenizer(tokenizer: TextTokenizer, text_encoder: Any, found: FoundModel) -> int:
    """The tokens of a prompt. Raises CheckpointError for a tokenizer with ids that the text encoder does not have."""
    if isinstance(text_encoder, UMT5Config) and tokenizer.largest_id >= text_encoder.vocab_size:
        raise CheckpointError(
            f"{found.tokenizer}: the tokenizer has ids up to {tokenizer.largest_id}, the text encoder embeds "
            f"{text_encoder.vocab_size}; take the tokenizer that belongs to this text encoder"
        )
    return tokenizer.text_length


def _check_image_processor(folder: Path, image_encoder: Any) -> None:
    """Warn of settings that pictures are not prepared by; they are prepared as CLIP's are."""
    size = image_encoder.image_size if isinstance(image_encoder, CLIPVisionConfig) else None
    stated = read_json(folder / layouts.IMAGE_PROCESSOR)
    others = []
    for key, value in layouts.make_image_processor(size or 224).items():
        said = value if stated.get(key) is None else stated[key]
        same = key == "image_processor_type" and str(said).startswith(value)  # ...Fast is the same in torch
        if key in ("size", "crop_size") and isinstance(said, int):  # as older files have it
            said = dict.fromkeys(value, said)
        if said != value and not same:
            others.append(f"{key}={said!r:.60}")
    if others:
        notices.warn(
            f"{folder / layouts.IMAGE_PROCESSOR} says {', '.join(others)}, which is not done: pictures are scaled, "
            "cropped and normalized as published for CLIP"
        )


def _read_config(name: str, raw_config: dict[str, Any], path: Path) -> tuple[Any, nn.Module]:
    """Parse a config and build its module on the meta device."""
    kind = kind_of(name)
    config = kind.read_config(raw_config)
    try:
        return config, build_empty(name, config)
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise CheckpointError(f"{path} describes no {kind.class_name} that can be built: {error}") from None


def _detect_preset(
    folder: Path, found: FoundModel, parts: Mapping[str, Part], chosen: str | None = None
) -> tuple[Preset, tuple[str, ...]] | None:
    """The model's preset and the names of other matching variants. None if the transformer's config.json or the VAE's
    config could not be read. Works for transformers that are not supported yet: only their config.json is needed."""
    raw_config, vae = parts["transformer"].stated, parts["vae"].config
    if raw_config is None or not isinstance(vae, WanVAEConfig):
        return None
    scheduler = found.scheduler or read_json(folder / layouts.SCHEDULER)
    experts = sum(part in EXPERTS for part in parts)
    name = f"{layouts.name_of(folder)} {found.index['_class_name']} {raw_config.get('_class_name')!s:.80}"
    preset = find_preset(raw_config, vae, scheduler, found.index, name, experts, found.own_scheduler, chosen)
    variants = find_variants(read_signature(raw_config, experts), name, chosen)
    return preset, tuple(other.preset.name for other in variants if other.preset.name != preset.name)


def _size_conflicts(parts: Mapping[str, Part]) -> list[str]:
    """Messages for sizes that differ between parts but must be equal."""
    transformer_config, vae, text_encoder = (parts[name].config for name in ("transformer", "vae", "text_encoder"))
    transformer = getattr(transformer_config, "transformer", transformer_config)
    if not isinstance(transformer, WanTransformerConfig) or not isinstance(vae, WanVAEConfig):
        return []
    pairs: list[tuple[str, Any, str, Any]] = [
        ("transformer out_channels", transformer.out_channels, "vae z_dim", vae.z_dim)
    ]
    # Image-to-video transformers also take a mask and the image's latents as input channels, others a control.
    out, temporal = transformer.out_channels, vae.temporal_scale
    if transformer.in_channels not in (2 * out + temporal, 3 * out, 3 * out + temporal):
        pairs.append(("transformer in_channels", transformer.in_channels, "vae z_dim", vae.z_dim))
    if isinstance(text_encoder, UMT5Config):
        pairs.append(("transformer text_dim", transformer.text_dim, "text_encoder d_model", text_encoder.d_model))
    if transformer.image_dim:
        image_encoder = parts["image_encoder"].config if "image_encoder" in parts else None
        width = image_encoder.hidden_size if isinstance(image_encoder, CLIPVisionConfig) else None
        pairs.append(("transformer image_dim", transformer.image_dim, "image_encoder hidden_size", width))
    if isinstance(transformer_config, WanVACEConfig):
        control_channels = 2 * vae.z_dim + vae.spatial_scale**2
        pairs.append(
            (
                "transformer vace_in_channels",
                transformer_config.vace_in_channels,
                "what the vae makes of a control",
                control_channels,
            )
        )
    if (
        transformer_config is not None
        and "transformer_2" in parts
        and (second := parts["transformer_2"].config) is not None
    ):
        config, other = flat_config(transformer_config), flat_config(second)
        pairs += [(f"transformer {k}", config.get(k), "transformer_2's", other.get(k)) for k in config | other]
    return [f"{name} is {a}, but {other} is {b}" for name, a, other, b in pairs if a != b]


def _not_a_folder(path: Path) -> str:
    if path.exists():
        return f"{path} is a file; give the folder that holds {INDEX}" + _nearest_folder(path.parent)
    around = path.parent.iterdir() if path.parent.is_dir() else ()
    siblings = [entry.name for entry in around if entry.is_dir() or path.suffix == entry.suffix in safetensors.READABLE]
    near = difflib.get_close_matches(path.name, siblings, n=1)
    hint = f"; did you mean {path.parent / near[0]}?" if near else f"; a folder that holds {INDEX} is expected"
    return f"{path} does not exist{hint}"


def _nearest_folder(folder: Path) -> str:
    """The end of an error message: a nearby folder with a model_index.json, or a description of what is expected."""
    near = [path.parent for path in (folder / INDEX, folder.parent / INDEX, *sorted(folder.glob(f"*/{INDEX}")))]
    near = [path for path in near if (path / INDEX).is_file()]
    if near:
        return f"; {near[0]} has one"
    return (
        "; the diffusers layout is expected (model_index.json, transformer/, vae/, text_encoder/, tokenizer/), or the "
        "original one (config.json, diffusion_pytorch_model*.safetensors, models_t5*, Wan2.*_VAE*)"
    )
