"""The two layouts of a model folder, diffusers' and the original repositories': file names and JSON files.

    diffusers  model_index.json  transformer/ vae/ text_encoder/ tokenizer/ scheduler/ (transformer_2/ image_encoder/)
    original   config.json + diffusion_pytorch_model*.safetensors, or (Wan 2.2 A14B) those in high_noise_model/ and
               low_noise_model/; models_t5_umt5-xxl-enc-bf16.pth; Wan2.1_VAE.pth or Wan2.2_VAE.pth;
               models_clip_*.pth (2.1 with pictures); google/umt5-xxl/ with the tokenizer

The original encoders are published as pickles, which only `fastvid convert` opens; .safetensors files with the same
stems can be loaded directly. The original layout does not store the encoders' configurations or the scheduler. They
follow from the variant, or come from EXTRAS, a file that `fastvid convert --to original` writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastvid.errors import CheckpointError
from fastvid.loaders import safetensors, weight_files
from fastvid.models.preset import Variant
from fastvid.models.wan import fun_presets, presets, skyreels_presets, variants
from fastvid.models.wan.detect import Identity

Config = dict[str, Any]

INDEX, CONFIG = "model_index.json", "config.json"
SCHEDULER = Path("scheduler", "scheduler_config.json")
IMAGE_PROCESSOR = Path("image_processor", "preprocessor_config.json")
TOKENIZER = "tokenizer"
# part -> [library, class] of model_index.json
CLASSES = {
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": ["diffusers", "WanTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "image_encoder": ["transformers", "CLIPVisionModel"],
}

ORIGINAL_CLASSES: tuple[str, ...] = ("WanModel", "VaceWanModel", "CausalWanModel", "WanAnimateModel")
ORIGINAL_CLASSES += ("WanTransformer3DModel", "Wan2_2Transformer3DModel", "VaceWanTransformer3DModel")  # VideoX-Fun's
EXTRAS = "diffusers_extras.json"
EXPERT_FOLDERS = {"transformer": "high_noise_model", "transformer_2": "low_noise_model"}
ORIGINAL_TOKENIZER = "google/umt5-xxl"
ORIGINAL_NAMES = {
    "vae": "Wan{version}_VAE.safetensors",
    "text_encoder": "models_t5_umt5-xxl-enc-bf16.safetensors",
    "image_encoder": "models_clip_open-clip-xlm-roberta-large-vit-huge-14.safetensors",
}
ORIGINAL_PATTERNS = {"vae": "*_VAE", "text_encoder": "models_t5*", "image_encoder": "models_clip*"}
WEIGHT_FILES = (*safetensors.READABLE, *safetensors.PICKLES)

# key in an original transformer's config.json -> diffusers' key
_CONFIG_KEYS = {
    "num_heads": "num_attention_heads",
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    "vace_in_dim": "vace_in_channels",
    "motion_encoder_dim": "motion_encoder_dim",
    **{key: key for key in ("eps", "ffn_dim", "freq_dim", "inject_sample_info", "num_layers", "vace_layers")},
}
_PIPELINES = {"t2v": "WanPipeline", "ti2v": "WanPipeline", "vace": "WanVACEPipeline"}  # by task
_PIPELINES |= {"df": "SkyReelsV2DiffusionForcingPipeline", "animate": "WanAnimatePipeline"}
FUN_PIPELINES = ("WanFunInpaintPipeline", "WanFunControlPipeline")  # VideoX-Fun's
_PIPELINES |= {"fun-inp": FUN_PIPELINES[0], "fun-control": FUN_PIPELINES[1]}
_PICTURES = ("WanImageToVideoPipeline", "WanAnimatePipeline", *FUN_PIPELINES)  # may have an image encoder
EULER = "FlowMatchEulerDiscreteScheduler"
_ORIGINAL_CLASS = {"vace": "VaceWanModel", "animate": "WanAnimateModel"}
# Flow shift by (task, has two experts); 5 for all others.
_FLOW_SHIFT = {
    ("flf2v", False): presets.WAN_FLF2V.flow_shift,
    ("vace", False): presets.WAN_VACE_14B.flow_shift,
    ("t2v", True): presets.WAN_T2V_A14B.flow_shift,
    ("df", False): skyreels_presets.DF_1_3B.flow_shift,
    ("vace", True): fun_presets.VACE_A14B.flow_shift,
}
_BOUNDARY = {"t2v": presets.WAN_T2V_A14B.boundary_ratio, "i2v": presets.WAN_I2V_A14B.boundary_ratio}
_BOUNDARY |= {"vace": fun_presets.VACE_A14B.boundary_ratio}


# ---------------------------------------------------------------- files


def class_of(index: Mapping[str, Any], name: str) -> str | None:
    """The class of a component in model_index.json, which lists [library, class]."""
    value = index.get(name)
    return value[1] if isinstance(value, list) and len(value) == 2 and isinstance(value[1], str) else None


def is_original(folder: Path) -> bool:
    """Whether a folder is a model in the original layout: it holds the VAE or the text encoder under its usual name."""
    if not folder.is_dir() or (folder / INDEX).is_file():
        return False
    return any(original_file(folder, part) for part in ("vae", "text_encoder"))


def original_file(folder: Path, part: str) -> Path | None:
    """The file of an encoder or VAE in an original folder; safetensors are preferred to pickles."""
    for suffix in WEIGHT_FILES:
        if found := sorted(folder.glob(ORIGINAL_PATTERNS[part] + suffix)):
            return found[0]
    return None


def original_transformers(folder: Path) -> dict[str, tuple[Path, ...]]:
    """The files of an original folder's transformer, or of both experts. Raises CheckpointError."""
    inner = {name: folder / inside for name, inside in EXPERT_FOLDERS.items() if (folder / inside).is_dir()}
    if len(inner) == 1:
        missing = next(inside for name, inside in EXPERT_FOLDERS.items() if name not in inner)
        raise CheckpointError(f"{folder / missing} is missing; models with two experts need both")
    if inner:
        return {name: weight_files.find_files(path) for name, path in inner.items()}
    patterns = [pattern + suffix for pattern in ORIGINAL_PATTERNS.values() for suffix in safetensors.READABLE]
    others = {file for pattern in patterns for file in folder.glob(pattern)}
    return {"transformer": weight_files.find_files(folder, others)}


def name_of(path: Path) -> str:
    """The name of a folder or file; of a file that is called as in any model, also its folder's. In the hub's cache
    (models--org--name/snapshots/revision) it includes the repository's name. Files there are links to blobs without a
    name, so they are not resolved."""
    resolved = path.absolute() if path.is_file() else path.resolve()
    snapshots = next((parent for parent in resolved.parents if parent.name == "snapshots"), None)
    names = [snapshots.parent.name] if snapshots else []
    if path.is_file() and path.name.startswith(weight_files.STEMS):
        names.append(resolved.parent.name)
    return " ".join(names + ([resolved.name] if path.is_file() or not snapshots else []))


def original_name(part: str, identity: Identity) -> str:
    """The file name of an encoder or VAE in the original layout."""
    return ORIGINAL_NAMES[part].format(version="2.2" if identity.family == "wan2.2" else "2.1")


# ---------------------------------------------------------------- JSON files


def to_diffusers_keys(config: Mapping[str, Any]) -> Config:
    """Translate an original transformer's config to diffusers' keys. A diffusers config is returned unchanged."""
    if "dim" not in config:
        return dict(config)
    if (named := config.get("_class_name")) not in (None, *ORIGINAL_CLASSES):
        raise CheckpointError(f"{CONFIG} is of a {named!s:.80}; a {' or a '.join(ORIGINAL_CLASSES)} is needed")
    translated = {ours: config[theirs] for theirs, ours in _CONFIG_KEYS.items() if config.get(theirs) is not None}
    heads, dim = config.get("num_heads"), config["dim"]
    if type(heads) is int and type(dim) is int and heads > 0 and dim % heads == 0:
        translated["attention_head_dim"] = dim // heads
    return translated


def to_original_keys(config: Mapping[str, Any], task: str | None) -> Config:
    """Translate a diffusers transformer's config to the original repositories' keys."""
    translated = {theirs: config[ours] for theirs, ours in _CONFIG_KEYS.items() if config.get(ours) is not None}
    kind = "t2v" if task in (None, "df") else task
    names = {"_class_name": _ORIGINAL_CLASS.get(task or "", "WanModel"), "model_type": kind}
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    return dict(sorted({**names, "dim": dim, "text_len": 512, **translated}.items()))


def pipeline_of(identity: Identity, name: str = "") -> str:
    """diffusers' pipeline class for a transformer, or VideoX-Fun's. name: what the model is called, which tells Fun-InP
    and SkyReels' models from Wan's."""
    if sibling := skyreels_of(identity, name):
        return sibling.pipeline
    if identity.task == "i2v" and any(v.by_name and variants.is_called(v, name) for v in fun_presets.VARIANTS):
        return FUN_PIPELINES[0]
    return _PIPELINES.get(identity.task or "t2v", "WanImageToVideoPipeline")


def skyreels_of(identity: Identity, name: str) -> Variant | None:
    """The model of SkyReels V2 that has the tensors of another and is meant by a name; None for all others."""
    if identity.task not in ("t2v", "i2v"):
        return None
    alike = [
        v for v in skyreels_presets.VARIANTS if v.by_name and ("-i2v-" in v.preset.name) == (identity.task == "i2v")
    ]
    return next((variant for variant in alike if variants.is_called(variant, name)), None)


def make_index(identity: Identity, configs: Mapping[str, Config], experts: bool, name: str = "") -> Config:
    """Build model_index.json. identity: the transformer's; configs: of the parts; experts: there are two
    transformers; name: what the model is called."""
    task, pipeline = identity.task or "t2v", pipeline_of(identity, name)
    transformer = ["diffusers", configs["transformer"]["_class_name"]]
    index: Config = {
        "_class_name": pipeline,
        "_diffusers_version": "0.35.0",
        "scheduler": ["diffusers", EULER if pipeline in FUN_PIPELINES else "UniPCMultistepScheduler"],
        "text_encoder": CLASSES["text_encoder"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": transformer,
        "transformer_2": transformer if experts else [None, None],
        "boundary_ratio": _BOUNDARY.get(task, 0.9) if experts else None,
        "vae": CLASSES["vae"],
    }
    if pipeline in _PICTURES:
        image = configs.get("image_encoder")
        index["image_encoder"] = ["transformers", image["architectures"][0]] if image else [None, None]
        index["image_processor"] = ["transformers", "CLIPImageProcessor"] if image else [None, None]
    return dict(sorted((index | ({"expand_timesteps": True} if task == "ti2v" else {})).items()))


def make_scheduler(identity: Identity, experts: bool, name: str = "") -> Config:
    """Build scheduler_config.json with the original code's default shift. name: what the model is called."""
    if pipeline_of(identity, name) in FUN_PIPELINES:
        return {"_class_name": EULER, "_diffusers_version": "0.35.0", "num_train_timesteps": 1000, "shift": 5.0}
    hinted = [variant for variant in variants.VARIANTS if variants.is_called(variant, name)]
    shifts = [variant.preset.flow_shift for variant in hinted if variant.preset.name.startswith(identity.name.lower())]
    if sibling := skyreels_of(identity, name):
        shifts = [sibling.preset.flow_shift]
    return {
        "_class_name": "UniPCMultistepScheduler",
        "_diffusers_version": "0.35.0",
        "flow_shift": shifts[0] if shifts else _FLOW_SHIFT.get((identity.task or "t2v", experts), 5.0),
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
    }


def make_image_processor(size: int = 224) -> Config:
    """Build preprocessor_config.json with CLIP's values, as in openai/clip and the published Wan folders. They are
    transformers' defaults too."""
    return {
        "crop_size": {"height": size, "width": size},
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
        "size": {"shortest_edge": size},
    }
