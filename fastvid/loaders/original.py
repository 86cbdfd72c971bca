"""A folder of the original Wan repositories, described as a diffusers folder would be.

    config.json + diffusion_pytorch_model*.safetensors, or (Wan 2.2 A14B) those in high_noise_model/, low_noise_model/
    models_t5_umt5-xxl-enc-bf16.pth, Wan2.1_VAE.pth or Wan2.2_VAE.pth, models_clip_*.pth (2.1 with pictures)
    google/umt5-xxl/  the tokenizer

The encoders are published as pickles, which only `fastvid convert` opens; as .safetensors of the same names they are
read as they are. What this layout has no place for (configurations of the encoders, the scheduler) follows from the
variant, or stands in EXTRAS, which `fastvid convert --to original` writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastvid.errors import CheckpointError
from fastvid.loaders import safetensors
from fastvid.loaders.safetensors import Entry
from fastvid.models.wan import presets
from fastvid.models.wan.detect import Identity, identify

EXTRAS = "diffusers_extras.json"
CONFIG = "config.json"
EXPERTS = {"transformer": "high_noise_model", "transformer_2": "low_noise_model"}
TOKENIZER = "google/umt5-xxl"
# part -> (the name that is written, what is looked for)
SINGLE = {
    "vae": ("Wan{version}_VAE.safetensors", "*_VAE"),
    "text_encoder": ("models_t5_umt5-xxl-enc-bf16.safetensors", "models_t5*"),
    "image_encoder": ("models_clip_open-clip-xlm-roberta-large-vit-huge-14.safetensors", "models_clip*"),
}
FILES = (safetensors.SUFFIX, *safetensors.PICKLES)
# The original words for what a transformer's config.json says.
WORDS = {
    "num_heads": "num_attention_heads",
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    "vace_in_dim": "vace_in_channels",
    **{key: key for key in ("eps", "ffn_dim", "freq_dim", "num_layers", "vace_layers")},
}
PIPELINES = {"t2v": "WanPipeline", "ti2v": "WanPipeline", "vace": "WanVACEPipeline"}
# Shift by (task, two experts), where the expert changes by task.
FLOW_SHIFT = {
    ("flf2v", False): presets.WAN_FLF2V.flow_shift,
    ("vace", False): presets.WAN_VACE_14B.flow_shift,
    ("t2v", True): presets.WAN_T2V_A14B.flow_shift,
}
BOUNDARY = {"t2v": presets.WAN_T2V_A14B.boundary_ratio, "i2v": presets.WAN_I2V_A14B.boundary_ratio}
Config = dict[str, Any]


@dataclass(frozen=True)
class FoundPart:
    """One part: its name in model_index.json, its files, what they are, and its config.json in diffusers' words."""

    name: str
    files: tuple[Path, ...]
    entries: Mapping[str, Entry]
    identity: Identity
    config: Config


@dataclass(frozen=True)
class Whole:
    """A model's parts, the model_index.json and scheduler_config.json that describe them, and its tokenizer.

    folder: it, or the file of its transformer. scheduler: None where the folder has one. missing: parts that could not
    be found -> why.
    """

    folder: Path
    parts: tuple[FoundPart, ...]
    index: Config
    scheduler: Config | None
    image_processor: Config | None
    tokenizer: Path
    missing: Mapping[str, str] = field(default_factory=dict)


def is_original(folder: Path) -> bool:
    """Whether a folder is a whole model in the original layout: a transformer beside an encoder or a VAE."""
    return folder.is_dir() and any(_find(folder, part) for part in ("vae", "text_encoder"))


def read_original(
    folder: Path, read_entries: Callable[[Iterable[Path]], Mapping[str, Entry]] = safetensors.read_headers
) -> Whole:
    """Describe an original folder. Raises CheckpointError that names what is missing, broken or a pickle."""
    if read_entries is safetensors.read_headers:
        _refuse_pickles(folder)
    extras = safetensors.read_json(folder / EXTRAS) if (folder / EXTRAS).is_file() else {}
    configs = extras.get("configs") if isinstance(extras.get("configs"), dict) else {}
    files = {**transformer_files(folder), **{part: _single(folder, part) for part in ("vae", "text_encoder")}}
    if image := _find(folder, "image_encoder"):
        files["image_encoder"] = (image,)
    parts = tuple(_part(folder, name, found, configs, read_entries) for name, found in files.items())
    identity, experts = parts[0].identity, "transformer_2" in files
    if identity.task in ("i2v", "flf2v") and identity.family == "wan2.1" and "image_encoder" not in files:
        raise CheckpointError(f"{folder} lacks {SINGLE['image_encoder'][0]} (or .pth), which {identity.name} needs")
    if not (folder / TOKENIZER / "tokenizer.json").is_file():
        raise CheckpointError(f"{folder / TOKENIZER} has no tokenizer.json; it comes with the original model")
    processor = extras.get("image_processor") or IMAGE_PROCESSOR
    return Whole(
        folder,
        parts,
        extras.get("model_index") or make_index({part.name: part for part in parts}),
        extras.get("scheduler") or make_scheduler(identity.task or "t2v", experts),
        processor if "image_encoder" in files else None,
        folder / TOKENIZER,
    )


def read_part(
    name: str, files: tuple[Path, ...], entries: Mapping[str, Entry], given: Mapping[str, Any] | None = None
) -> FoundPart:
    """A part by its files: found out from names and shapes. Raises CheckpointError with the file's name in front."""
    where = files[0] if len(files) == 1 else files[0].parent
    try:
        identity = identify({key: entry.shape for key, entry in entries.items()})
        return FoundPart(name, files, entries, identity, identity.config(given))
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None


def to_diffusers_words(config: Mapping[str, Any]) -> Config:
    """What an original transformer's config.json says, in diffusers' words; a diffusers config as it is."""
    if "dim" not in config:
        return dict(config)
    made = {ours: config[theirs] for theirs, ours in WORDS.items() if config.get(theirs) is not None}
    heads, dim = config.get("num_heads"), config["dim"]
    if type(heads) is int and type(dim) is int and heads > 0 and dim % heads == 0:
        made["attention_head_dim"] = dim // heads
    return made


def to_original_words(config: Mapping[str, Any], task: str | None) -> Config:
    """A diffusers transformer's config as the original repositories save theirs."""
    made = {theirs: config[ours] for theirs, ours in WORDS.items() if config.get(ours) is not None}
    names = {"_class_name": "VaceWanModel" if task == "vace" else "WanModel", "model_type": task or "t2v"}
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    return dict(sorted({**names, "dim": dim, "text_len": 512, **made}.items()))


def pipeline_of(identity: Identity) -> str:
    """The class of diffusers that a transformer belongs to."""
    return PIPELINES.get(identity.task or "t2v", "WanImageToVideoPipeline")


def make_index(parts: Mapping[str, FoundPart], experts: bool | None = None) -> Config:
    """model_index.json for these parts. experts: whether there are two transformers, if not as `parts` says."""
    task = parts["transformer"].identity.task or "t2v"
    pipeline = pipeline_of(parts["transformer"].identity)
    transformer = ["diffusers", parts["transformer"].config["_class_name"]]
    index: Config = {
        "_class_name": pipeline,
        "_diffusers_version": "0.35.0",
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": transformer,
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    if pipeline == "WanImageToVideoPipeline":
        image = parts.get("image_encoder")
        index["image_encoder"] = ["transformers", image.config["architectures"][0]] if image else [None, None]
        index["image_processor"] = ["transformers", "CLIPImageProcessor"] if image else [None, None]
    if "transformer_2" in parts if experts is None else experts:
        index |= {"transformer_2": transformer, "boundary_ratio": BOUNDARY.get(task, 0.9)}
    else:
        index |= {"transformer_2": [None, None], "boundary_ratio": None}
    return dict(sorted((index | ({"expand_timesteps": True} if task == "ti2v" else {})).items()))


def make_scheduler(task: str, experts: bool) -> Config:
    """scheduler_config.json, with the shift that the original code takes."""
    return {
        "_class_name": "UniPCMultistepScheduler",
        "_diffusers_version": "0.35.0",
        "flow_shift": FLOW_SHIFT.get((task, experts), 5.0),
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
    }


# What CLIP expects, as openai/clip and the published Wan folders say.
IMAGE_PROCESSOR: Config = {
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": 224},
}


def single_name(part: str, identity: Identity) -> str:
    """The file name of an encoder or VAE in the original layout."""
    return SINGLE[part][0].format(version="2.2" if identity.family == "wan2.2" else "2.1")


def transformer_files(folder: Path) -> dict[str, tuple[Path, ...]]:
    """Files of the transformer, or of both experts."""
    inner = {name: folder / inside for name, inside in EXPERTS.items() if (folder / inside).is_dir()}
    if len(inner) == 1:
        missing = next(inside for name, inside in EXPERTS.items() if name not in inner)
        raise CheckpointError(f"{folder / missing} is missing; models with two experts need both")
    if inner:
        return {name: safetensors.find_files(path) for name, path in inner.items()}
    others = {found for part in SINGLE for found in folder.glob(SINGLE[part][1] + safetensors.SUFFIX)}
    return {"transformer": safetensors.find_files(folder, others)}


def _part(
    folder: Path,
    name: str,
    files: tuple[Path, ...],
    configs: Mapping[str, Any],
    read_entries: Callable[[Iterable[Path]], Mapping[str, Entry]],
) -> FoundPart:
    given = dict(configs.get(name) or {})
    if name in EXPERTS:
        inner = folder / EXPERTS[name]
        config = (inner if inner.is_dir() else folder) / CONFIG
        given |= to_diffusers_words(safetensors.read_json(config)) if config.is_file() else {}
    part = read_part(name, files, read_entries(files), given)
    wanted = "transformer" if name in EXPERTS else name
    if part.identity.part != wanted:
        raise CheckpointError(f"{files[0]} should hold a {wanted}, but it is a {part.identity.part}")
    return part


def _refuse_pickles(folder: Path) -> None:
    found = [path for part in SINGLE if (path := _find(folder, part))]
    if pickles := [path.name for path in found if path.suffix in safetensors.PICKLES]:
        raise CheckpointError(
            f"{folder} is in the original Wan layout, with pickles ({', '.join(pickles)}), which fastvid does not "
            f"open; use `fastvid convert {folder} NEW-FOLDER`, or give the '-Diffusers' copy of the model"
        )


def _single(folder: Path, part: str) -> tuple[Path, ...]:
    if found := _find(folder, part):
        return (found,)
    name = SINGLE[part][0].format(version="2.1")
    raise CheckpointError(f"{folder} lacks {name} (or .pth), the {part} of the original layout")


def _find(folder: Path, part: str) -> Path | None:
    """The file of an encoder or VAE, safetensors before pickles."""
    for suffix in FILES:
        if found := sorted(folder.glob(SINGLE[part][1] + suffix)):
            return found[0]
    return None
