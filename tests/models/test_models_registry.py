"""Model folders: what they are told to be before anything is loaded, and which recipe they are run by."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastvid.errors import CheckpointError
from fastvid.loaders import safetensors
from fastvid.loaders.checkpoint import load_part, open_checkpoint
from fastvid.models.common.umt5 import UMT5_XXL
from fastvid.models.registry import KINDS, OPTIONAL
from fastvid.models.wan.config import WanTransformerConfig, WanVAEConfig
from fastvid.models.wan.presets import VARIANTS
from fastvid.models.wan.variants import find_preset
from fastvid.ops import reference

TRANSFORMER = {
    "_class_name": "WanTransformer3DModel",
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 8,
    "ffn_dim": 16,
    "num_layers": 2,
    "patch_size": [1, 2, 2],
    "qk_norm": "rms_norm_across_heads",
    "image_dim": None,
}
VAE = {"_class_name": "AutoencoderKLWan", "base_dim": 4, "z_dim": 16, "num_res_blocks": 1, "attn_scales": []}
TEXT = {
    "architectures": ["UMT5EncoderModel"],
    "vocab_size": 9,
    "d_model": 8,
    "d_kv": 4,
    "d_ff": 8,
    "num_layers": 1,
    "num_heads": 2,
    "feed_forward_proj": "gated-gelu",
}
INDEX = {
    "_class_name": "WanPipeline",
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": [None, None],
    "vae": ["diffusers", "AutoencoderKLWan"],
}
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [],
    "model": {"type": "WordLevel", "vocab": {"<pad>": 0, "a": 1}, "unk_token": "<pad>"},
}


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def change(path: Path, **changes: Any) -> None:
    write(path, {**json.loads(path.read_text(encoding="utf-8")), **changes})


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole small model in the published layout, the transformer in bf16."""
    folder = tmp_path_factory.mktemp("models") / "small-wan"
    write(folder / "model_index.json", INDEX)
    write(folder / "scheduler" / "scheduler_config.json", {"flow_shift": 7.0})
    write(folder / "tokenizer" / "tokenizer.json", TOKENIZER)
    write(folder / "tokenizer" / "tokenizer_config.json", {"model_max_length": 32, "pad_token": "<pad>"})
    for name, config in {"transformer": TRANSFORMER, "vae": VAE, "text_encoder": TEXT}.items():
        write(folder / name / "config.json", config)
        module = KINDS[name].build(KINDS[name].read_config(config), reference)
        dtype = torch.bfloat16 if name == "transformer" else torch.float32
        save_file(
            {key: value.to(dtype) for key, value in module.state_dict().items()}, folder / name / "model.safetensors"
        )
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "small-wan"))


def test_a_whole_folder_is_described(folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder)).check()
    assert checkpoint.problems == () and checkpoint.text_length == 32
    transformer, text_encoder = checkpoint.part("transformer"), checkpoint.part("text_encoder")
    stored = load_file(folder / "transformer" / "model.safetensors")
    assert transformer.parameters == sum(tensor.numel() for tensor in stored.values())
    assert transformer.dtypes == ("BF16",) and text_encoder.dtypes == ("F32",)
    assert transformer.bytes == (folder / "transformer" / "model.safetensors").stat().st_size
    assert transformer.config == WanTransformerConfig.from_dict(TRANSFORMER)
    described = json.loads(json.dumps(checkpoint.to_dict()))
    assert described["recipe"]["name"] == "wan-custom" and described["recipe"]["flow_shift"] == 7.0
    assert described["parts"]["vae"]["class"] == "AutoencoderKLWan"
    with pytest.raises(dataclasses.FrozenInstanceError):
        checkpoint.folder = folder  # type: ignore[misc]


@pytest.mark.parametrize("name", [name for name in KINDS if name not in OPTIONAL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_are_loaded(folder: Path, name: str, dtype: torch.dtype) -> None:
    module = load_part(open_checkpoint(folder), name, reference, "cpu", dtype)
    stored = load_file(folder / name / "model.safetensors")
    for key, tensor in module.state_dict().items():
        kept = {"time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"} & set(key.split("."))
        target = torch.float32 if kept and name == "transformer" else dtype
        assert tensor.dtype == target and torch.equal(tensor, stored[key].to(target)), key


def test_the_ops_handed_in_are_used(folder: Path) -> None:
    ops = object()
    assert load_part(open_checkpoint(folder), "transformer", ops).ops is ops


def test_headers_are_enough(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors, "_read", None)
    assert open_checkpoint(folder).problems == ()


# Tensors and parameters of the published files.
PUBLISHED = [
    ("transformer", {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}, 825, 1.4190e9),
    ("transformer", {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}, 1095, 14.2885e9),
    ("vae", {}, 194, 126.89e6),
    ("text_encoder", asdict(UMT5_XXL), 242, 5.6809e9),
]


@pytest.mark.parametrize(("name", "config", "tensors", "parameters"), PUBLISHED)
def test_published_sizes(name: str, config: dict[str, Any], tensors: int, parameters: float) -> None:
    with torch.device("meta"):
        state = KINDS[name].build(KINDS[name].read_config(config), reference).state_dict()
    assert len(state) == tensors
    assert sum(tensor.numel() for tensor in state.values()) == pytest.approx(parameters, rel=5e-5)


SIZES = {
    "embedded": ({"num_attention_heads": 4, "attention_head_dim": 64, "text_dim": 128, "num_layers": 6}, "", 16),
    "wan2.1-t2v-1.3b": ({"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}, "色调艳丽", 480),
    "wan2.1-t2v-14b": ({"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}, "色调艳丽", 720),
}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("embedded", (20, 3.0, 3.0, 17, 64, 64, True, "")),
        ("wan2.1-t2v-1.3b", (50, 5.0, 5.0, 81, 480, 832, False, "色调艳丽")),
        ("wan2.1-t2v-14b", (50, 5.0, 5.0, 81, 720, 1280, False, "色调艳丽")),
    ],
)
def test_variants_are_found_by_their_sizes(name: str, expected: tuple[Any, ...]) -> None:
    r = find_preset(SIZES[name][0], WanVAEConfig(), {})
    numbers = (r.num_inference_steps, r.flow_shift, r.guidance_scale, r.num_frames, r.height, r.width)
    assert (r.name, *numbers, r.per_token_timesteps, r.negative_prompt[:4]) == (name, *expected)
    assert (r.fps, r.solver, r.spatial_multiple, r.temporal) == (16, "unipc", 16, 4)
    assert set(SIZES) <= {variant.preset.name for variant in VARIANTS}


@pytest.mark.parametrize(
    ("scheduler", "expand", "shift"),
    [({"flow_shift": 3}, None, 3.0), ({"shift": 2.5}, True, 2.5), ({}, False, 5.0)],
)
def test_other_sizes_follow_their_files(scheduler: dict[str, Any], expand: bool | None, shift: float) -> None:
    vae = WanVAEConfig(dim_mult=(1, 2, 4, 4, 4), temperal_downsample=(False, True, True, False))
    recipe = find_preset(TRANSFORMER, vae, scheduler, {"expand_timesteps": expand})
    assert (recipe.name, recipe.flow_shift, recipe.per_token_timesteps) == ("wan-custom", shift, bool(expand))
    assert (recipe.spatial_multiple, recipe.height, recipe.width) == (32, 480, 832)
    assert (recipe.num_inference_steps, recipe.guidance_scale, recipe.num_frames) == (50, 5.0, 81)


def test_the_files_word_on_timesteps_counts() -> None:
    for expand in (True, False):
        recipe = find_preset(SIZES["embedded"][0], WanVAEConfig(), {}, {"expand_timesteps": expand})
        assert recipe.per_token_timesteps == expand


def shrink(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


BREAKS: list[tuple[Callable[[Path], Any], str]] = [
    (lambda f: (f / "vae" / "config.json").unlink(), r"config\.json is missing"),
    (lambda f: (f / "vae" / "config.json").write_text("{"), r"config\.json cannot be read as JSON"),
    (lambda f: shutil.rmtree(f / "text_encoder"), "text_encoder.* is missing"),
    (lambda f: shutil.rmtree(f / "tokenizer"), r"tokenizer_config\.json is missing"),
    (lambda f: (f / "tokenizer" / "tokenizer.json").unlink(), r"tokenizer\.json is missing"),
    (lambda f: shutil.rmtree(f / "scheduler"), r"scheduler_config\.json is missing"),
    (lambda f: change(f / "scheduler" / "scheduler_config.json", flow_shift="x"), "flow_shift is 'x'"),
    (lambda f: shrink(f / "transformer" / "model.safetensors"), "download it again"),
    (lambda f: (f / "vae" / "model.safetensors").rename(f / "vae" / "vae.pth"), "fastvid convert"),
    (lambda f: change(f / "transformer" / "config.json", image_dim=1280), "a model needs both"),
    (
        lambda f: change(f / "transformer" / "config.json", image_dim=1280, added_kv_proj_dim=24),
        "image_dim is 1280, but image_encoder hidden_size is None",
    ),
    (lambda f: change(f / "vae" / "config.json", base_dim="8"), "describes no AutoencoderKLWan|base_dim"),
    (lambda f: change(f / "transformer" / "config.json", ffn_dim=2**62), "ffn_dim is 4611686018427387904"),
    (lambda f: change(f / "transformer" / "config.json", num_layers=3), "missing weights: blocks.2"),
    (lambda f: change(f / "transformer" / "config.json", num_layers=1), "does not have: blocks.1.* and 17 more"),
    (lambda f: change(f / "transformer" / "config.json", ffn_dim=17), "wrong shapes: blocks.0.ffn"),
    (lambda f: change(f / "transformer" / "config.json", text_dim=9), "text_dim is 9, but text_encoder d_model is 8"),
    (
        lambda f: change(f / "transformer" / "config.json", in_channels=20, out_channels=20),
        "in_channels is 20, but vae z_dim is 16",
    ),
    (lambda f: change(f / "model_index.json", vae=["diffusers", "AutoencoderKL"]), "vae is a AutoencoderKL; only"),
    (lambda f: change(f / "model_index.json", vae=None), "vae is a None"),
    (lambda f: change(f / "model_index.json", transformer_2=INDEX["transformer"]), "transformer_2.* is missing"),
    (
        lambda f: change(f / "model_index.json", boundary_ratio=0.5),
        "boundary_ratio is 0.5, but there is no transformer_2",
    ),
    (
        lambda f: change(f / "model_index.json", transformer=["diffusers", "WanVACETransformer3DModel"]),
        "is a WanVACETransformer3DModel, but .*config.json is of a WanTransformer3DModel",
    ),
    (lambda f: change(f / "model_index.json", transformer=["diffusers", "WanAnimate"]), "is a WanAnimate"),
]


@pytest.mark.parametrize(("damage", "message"), BREAKS, ids=range(len(BREAKS)))
def test_what_is_wrong_is_told(folder: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(folder)
    checkpoint = open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.check()
    assert str(folder) in str(caught.value)
    json.dumps(checkpoint.to_dict())
    for part in checkpoint.parts:
        if part.problems:
            with pytest.raises(CheckpointError):
                load_part(checkpoint, part.name)


def test_all_problems_are_told_at_once(folder: Path) -> None:
    (folder / "vae" / "config.json").unlink()
    shutil.rmtree(folder / "tokenizer")
    change(folder / "transformer" / "config.json", num_layers=3)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder).check()
    assert all(name in str(caught.value) for name in ("vae", "tokenizer", "transformer"))
    assert open_checkpoint(folder).preset is None


def message(path: Path | str) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    return str(caught.value)


def test_paths_that_are_no_model(folder: Path, tmp_path: Path) -> None:
    parent = folder.parent
    assert f"did you mean {folder}?" in message(parent / "smal-wan")
    assert "a folder that holds model_index.json is expected" in message(parent / "nothing" / "like" / "it")
    assert f"is a file; give the folder that holds model_index.json; {folder} has one" in message(
        folder / "model_index.json"
    )
    assert f"has no model_index.json; {folder} has one" in message(folder / "transformer")
    assert f"has no model_index.json; {folder} has one" in message(parent)
    empty = tmp_path / "far" / "empty"
    empty.mkdir(parents=True)
    assert "the diffusers layout is expected" in message(empty)
    (empty / "models_t5_umt5-xxl-enc-bf16.pth").touch()
    assert "original Wan layout" in message(empty)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", None])
def test_other_pipelines_are_refused(folder: Path, name: str | None) -> None:
    change(folder / "model_index.json", _class_name=name)
    assert f"describes a {name}; the kinds known so far are WanPipeline, " in message(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_a_broken_index_is_told(folder: Path, text: str) -> None:
    (folder / "model_index.json").write_text(text)
    assert "model_index.json" in message(folder)


LINKED = ["model_index.json", "scheduler", "vae/config.json", "tokenizer", "tokenizer/tokenizer.json"]


@pytest.mark.parametrize("name", LINKED)
def test_a_link_out_of_a_folder_is_told(tmp_path: Path, name: str) -> None:
    folder, other = tmp_path / "model", tmp_path / "elsewhere"
    shutil.copytree(open_checkpoint("embedded").folder, folder)
    (folder / name).rename(other)
    (folder / name).symlink_to(other)
    told = open_checkpoint(folder).to_dict()
    assert not told["problems"]
    assert told["links"]
    for file, real in told["links"].items():
        assert file.startswith(name) and Path(real).is_relative_to(other)
    (tmp_path / "link").symlink_to(folder)  # a folder that is a link itself is the user's own
    assert set(open_checkpoint(tmp_path / "link").to_dict()["links"]) == set(told["links"])


def test_links_within_a_folder_or_a_cache_are_no_news(tmp_path: Path) -> None:
    folder = tmp_path / "models--a--b" / "snapshots" / "revision"
    shutil.copytree(open_checkpoint("embedded").folder, folder)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(file for file in folder.rglob("*") if file.is_file())):
        file.rename(blobs / str(number))
        file.symlink_to(blobs / str(number))
    assert "links" not in open_checkpoint(folder).to_dict()
    (folder / "vae" / "config.json").unlink()
    (folder / "vae" / "config.json").symlink_to(folder / "other.json")
    shutil.copyfile(open_checkpoint("embedded").folder / "vae" / "config.json", folder / "other.json")
    assert "links" not in open_checkpoint(folder).to_dict()
