"""Single files as ComfyUI keeps them, parts from elsewhere: each layout is written from a diffusers folder with the
maps of names, and has to make the very same frames.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastvid
from fastvid.api import inspect
from fastvid.cli.commands import main
from fastvid.errors import CheckpointError, FastvidWarning, InvalidRequest
from fastvid.loaders import weight_files
from fastvid.loaders.find import read_tokenizer
from fastvid.models.common.tokenizer import clean_prompt
from fastvid.models.wan.weight_names import DIFFUSERS, ORIGINAL, origins

DATA = Path(__file__).parents[1] / "data"
# Files without a config.json are taken to have heads of 128, as all published ones.
HEADS = {"num_attention_heads": 1, "attention_head_dim": 128, "num_layers": 1}
ASKED: dict[str, Any] = {
    **{"prompt": "a red circle", "height": 64, "width": 64, "num_frames": 5, "seed": 1, "flow_shift": 5.0},
    **{"num_inference_steps": 3, "guidance_scale": 2.0, "negative_prompt": "blue", "solver": "euler"},
}
PARTS = ("transformer", "vae", "text_encoder")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("single") / "published"
    tiny.write_checkpoint(folder, **HEADS)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two") / "published"
    tiny.write_checkpoint(folder, 1, boundary_ratio=0.875, **HEADS)
    return folder


def frames(model: Any, parts: Any = None, **asked: Any) -> np.ndarray:
    return fastvid.load(str(model), device="cpu", parts=parts).generate(**{**ASKED, **asked}).frames


@pytest.fixture(scope="module")
def truth(published: Path) -> np.ndarray:
    made = frames(published)
    assert made.std() > 1
    return made


def tensors(folder: Path, to: str, prefix: str = "") -> dict[str, Tensor]:
    """The weights of a part of a diffusers folder under the names of a layout."""
    state = {name: tensor for file in weight_files.find_files(folder) for name, tensor in load_file(file).items()}
    made = origins(state, to)
    return {prefix + name: origin.make(state.__getitem__).contiguous() for name, origin in made.items()}


def write(path: Path, state: dict[str, Tensor]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path)
    return path


def comfy(model: Path, root: Path, name: str = "wan2.1_t2v_tiny.safetensors", prefix: str = "") -> Path:
    """models/ of ComfyUI, with a tokenizer folder beside; returns the transformer's file."""
    write(root / "text_encoders" / "umt5_xxl_fp16.safetensors", tensors(model / "text_encoder", DIFFUSERS))
    write(root / "vae" / "wan_2.1_vae.safetensors", tensors(model / "vae", ORIGINAL))
    shutil.copytree(model / "tokenizer", root / "tokenizer")
    return write(root / "diffusion_models" / name, tensors(model / "transformer", ORIGINAL, prefix))


# ---------------------------------------------------------------- layouts


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_neighbouring_folders(published: Path, truth: np.ndarray, tmp_path: Path, prefix: str) -> None:
    file = comfy(published, tmp_path, "wan/t2v.safetensors", prefix)
    if prefix:  # the other names of the folders
        for old, new in (("diffusion_models", "unet"), ("text_encoders", "clip")):
            (tmp_path / old).rename(tmp_path / new)
        file = tmp_path / "unet" / "wan" / "t2v.safetensors"
        (tmp_path / "clip" / "mine").mkdir()
        (tmp_path / "clip" / "umt5_xxl_fp16.safetensors").rename(tmp_path / "clip" / "mine" / "t5.safetensors")
        write(tmp_path / "clip" / "clip_l.safetensors", {"text_model.x": torch.zeros(2)})
    assert (frames(file) == truth).all()


def test_all_side_by_side(published: Path, truth: np.ndarray, tmp_path: Path) -> None:
    root = tmp_path / "flat"
    file = comfy(published, tmp_path / "made")
    root.mkdir()
    for path in (tmp_path / "made").rglob("*.safetensors"):
        shutil.move(path, root)
    shutil.copytree(published / "tokenizer", root / "google" / "umt5-xxl")
    assert (frames(root / file.name) == truth).all()


def test_all_in_one(published: Path, truth: np.ndarray, tmp_path: Path) -> None:
    state = tensors(published / "transformer", ORIGINAL, "model.diffusion_model.")
    state |= tensors(published / "vae", ORIGINAL, "vae.")
    state |= tensors(published / "text_encoder", DIFFUSERS, "text_encoders.umt5xxl.transformer.")
    state |= {"text_encoders.umt5xxl.logit_scale": torch.zeros(1), "model_sampling.sigmas": torch.zeros(4)}
    file = write(tmp_path / "checkpoints" / "wan.safetensors", state)
    parts = {"tokenizer": published / "tokenizer"}
    found = inspect(file, parts=parts)
    assert found["problems"] == [] and {part["files"][0] for part in found["parts"].values()} == {str(file)}
    sizes = {name: inspect(published)["parts"][name]["parameters"] for name in PARTS}
    assert {name: found["parts"][name]["parameters"] for name in PARTS} == sizes
    assert (frames(file, parts) == truth).all()
    assert (frames(file, {"base": published}) == truth).all()


def test_a_transformer_of_a_diffusers_folder(published: Path, truth: np.ndarray) -> None:
    assert (frames(published / "transformer" / "diffusion_pytorch_model.safetensors") == truth).all()


def test_parts_by_an_argument_of_their_own(published: Path, truth: np.ndarray, tmp_path: Path) -> None:
    vae = {"vae": published / "vae"}
    pipe = fastvid.load(published, device="cpu", vae=published / "vae", transformer=(published / "transformer",))
    assert (pipe.generate(**ASKED).frames == truth).all()
    described = inspect(published, **vae)
    assert described["parts"]["vae"]["files"] == inspect(published, parts=vae)["parts"]["vae"]["files"]
    with pytest.raises(InvalidRequest, match="vae is given twice: as vae= and in parts"):
        fastvid.load(published, parts=vae, **vae)
    with pytest.raises(InvalidRequest, match="allowed is a file, or two for the experts"):
        fastvid.load(published, transformer=(published, published, published))
    with pytest.raises(InvalidRequest, match="transformer_2 is given twice"):
        fastvid.load(published, parts={"transformer": (published, published), "transformer_2": published})


@pytest.mark.slow
def test_two_experts(two: Path, tmp_path: Path) -> None:
    high = comfy(two, tmp_path, "wan2.2_t2v_high_noise_14B.safetensors")
    low = write(high.with_name("another_LOW.safetensors"), tensors(two / "transformer_2", ORIGINAL))
    with pytest.raises(CheckpointError, match="low noise one is not in .*--part transformer_2=PATH"):
        fastvid.load(high)
    made = frames(two)
    assert (frames(high, {"transformer_2": low}) == made).all()
    pair = fastvid.load(two, device="cpu", transformer=(high, low))
    assert (pair.generate(**ASKED).frames == made).all()
    shutil.move(low, low.with_name("Wan2.2_t2v-low-noise_14B.safetensors"))
    low = low.with_name("Wan2.2_t2v-low-noise_14B.safetensors")
    assert (frames(high) == made).all() and (frames(low) == made).all()
    assert (made != frames(high, {"transformer_2": high})).any(), "the second is not the first"
    assert inspect(low)["parts"]["transformer"]["files"] == [str(high)]
    with pytest.raises(InvalidRequest, match="for low noise by its name, .* for high: give them the other way"):
        fastvid.load(low, parts={"transformer_2": high})
    assert inspect(high)["recipe"]["boundary_ratio"] == 0.875


def test_folders_by_noise(two: Path, tmp_path: Path) -> None:
    """As the original repositories and some copies of them sort their experts."""
    first = comfy(two, tmp_path, "HIGH/wan.safetensors")
    write(tmp_path / "diffusion_models" / "LOW" / "wan.safetensors", tensors(two / "transformer_2", ORIGINAL))
    assert (frames(first) == frames(two)).all()


@pytest.mark.slow
def test_a_picture_model(tmp_path: Path) -> None:
    """With clip_vision; the encoder of the published width, since its heads follow from that."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    from fastvid.loaders.checkpoint import open_checkpoint

    tiny.write_checkpoint(
        tmp_path / "m", in_channels=36, out_channels=16, image_dim=1280, added_kv_proj_dim=128, **HEADS
    )
    sizes = {"hidden_size": 1280, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 16}
    config = CLIPVisionConfig(**sizes, image_size=28, patch_size=14, hidden_act="gelu", projection_dim=8)
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path / "m" / "image_encoder")
    index = json.loads((tmp_path / "m" / "model_index.json").read_text())
    index |= {"_class_name": "WanImageToVideoPipeline"}
    index |= {"image_encoder": ["transformers", "CLIPVisionModelWithProjection"]}
    (tmp_path / "m" / "model_index.json").write_text(json.dumps(index))
    root = tmp_path / "models"
    file = comfy(tmp_path / "m", root, "wan2.1_i2v_720p.safetensors")
    with pytest.raises(CheckpointError, match=r"image_encoder \(hidden_size 1280\) is missing: .*clip_vision"):
        fastvid.load(file)
    write(root / "clip_vision" / "clip_vision_h.safetensors", tensors(tmp_path / "m" / "image_encoder", ORIGINAL))
    assert open_checkpoint(file).check().pipeline == "WanImageToVideoPipeline"
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert (frames(file, image=picture) == frames(tmp_path / "m", image=picture)).all()


# ---------------------------------------------------------------- parts that are named


def test_parts_from_anywhere(published: Path, truth: np.ndarray, tmp_path: Path) -> None:
    file = comfy(published, tmp_path / "models")
    alone = shutil.move(file, tmp_path / "t2v.safetensors")
    named = {"vae": tmp_path / "models/vae/wan_2.1_vae.safetensors", "text_encoder": published / "text_encoder"}
    assert (frames(alone, named) == truth).all(), "the tokenizer is beside text_encoder/"
    assert (frames(alone, {"vae": published / "vae", "base": str(published)}) == truth).all()
    assert (frames(alone, {"vae": published, "text_encoder": published}) == truth).all()


def test_a_folder_with_another_part(published: Path, truth: np.ndarray, tmp_path: Path) -> None:
    other = {name: -tensor for name, tensor in tensors(published / "vae", ORIGINAL).items()}
    vae = write(tmp_path / "other_vae.safetensors", other)
    changed = frames(published, {"vae": vae})
    assert (changed != truth).any()
    folder = tmp_path / "copy"
    shutil.copytree(published, folder)
    write(folder / "vae" / "diffusion_pytorch_model.safetensors", tensors_of(vae))
    assert (frames(folder) == changed).all()
    assert inspect(published, parts={"vae": vae})["parts"]["vae"]["files"] == [str(vae)]
    with pytest.raises(InvalidRequest, match="base is for a model that is a single file"):
        fastvid.load(published, parts={"base": published})


def tensors_of(file: Path) -> dict[str, Tensor]:
    state = load_file(file)
    return {name: origin.make(state.__getitem__) for name, origin in origins(state, DIFFUSERS).items()}


def test_an_original_folder_with_pickles_and_parts(published: Path, truth: np.ndarray, tmp_path: Path) -> None:
    from fastvid.loaders.convert import convert

    folder = tmp_path / "original"
    convert(published, folder, ORIGINAL)
    for file in [*folder.glob("*_VAE.safetensors"), *folder.glob("models_t5*")]:
        torch.save(load_file(file), file.with_suffix(".pth"))
        file.unlink()
    with pytest.raises(CheckpointError, match=r"with pickles \(Wan2.1_VAE.pth"):
        fastvid.load(folder)
    with pytest.raises(CheckpointError, match="vae .* is missing: .*Wan2.1_VAE.pth is a pickle"):
        fastvid.load(folder, parts={"text_encoder": published})
    assert (frames(folder, {"vae": published, "text_encoder": published}) == truth).all()


def test_a_recipe_repeats_the_parts(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "t2v.safetensors", tensors(published / "transformer", ORIGINAL))
    flags = ["--num-frames", "1", "--steps", "1", "--seed", "3", "--size", "64x64", "--quiet", "--json"]
    made = ["generate", "a red circle", "-o", str(tmp_path / "a.mp4"), "--model", str(file), *flags]
    assert main([*made]) == 1
    error = capsys.readouterr().err
    assert "vae (z_dim 16) is missing" in error and "--part vae=PATH" in error and "tokenizer is missing" in error
    assert main([*made, "--part", f"base={published}"]) == 0
    recipe = json.loads(capsys.readouterr().out)["recipe"]
    assert recipe["settings"]["parts"] == {"base": str(published)} and recipe["model"] == str(file)
    again = ["generate", "--recipe", str(tmp_path / "a.mp4"), "-o", str(tmp_path / "b.mp4"), "--quiet", "--json"]
    assert main(again) == 0
    assert json.loads(capsys.readouterr().out)["recipe"] == recipe


def test_inspect_says_where_parts_come_from(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = comfy(published, tmp_path)
    assert main(["inspect", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parts"]["vae"]["files"] == [str(tmp_path / "vae" / "wan_2.1_vae.safetensors")]
    assert found["tokenizer"] == str(tmp_path / "tokenizer") and found["problems"] == []
    (tmp_path / "vae" / "wan_2.1_vae.safetensors").unlink()
    assert main(["inspect", str(file), "--json"]) == 0, "a file with missing parts is described too"
    found = json.loads(capsys.readouterr().out)
    assert found["parts"]["transformer"]["config"]["num_layers"] == 1 and "vae (z_dim 16)" in found["problems"][0]


# ---------------------------------------------------------------- the tokenizer inside


def test_ids_are_those_of_sentencepiece() -> None:
    """tiny_spiece.json was written by the sentencepiece library from the same model."""
    tokenizer = read_tokenizer(DATA / "tiny_spiece.model")
    rows = json.loads((DATA / "tiny_spiece.json").read_text())
    assert len(rows) > 30
    for text, ids in rows.items():
        assert tokenizer([text])[0][0].tolist() == ids, text
    assert tokenizer([clean_prompt("a ") * 2000])[0].shape == (1, 512)


def test_the_tokenizer_inside_a_text_encoder(tmp_path: Path) -> None:
    folder = tmp_path / "published"
    tiny.write_checkpoint(folder, vocab_size=64, **HEADS)
    tokenizer = read_tokenizer(DATA / "tiny_spiece.model")
    tokenizer.inner.save(str(folder / "tokenizer" / "tokenizer.json"))
    config = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text())
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 512}))
    truth = frames(folder, prompt="a red circle moving left")
    assert (truth != frames(folder, prompt="a blue star")).any()
    file = comfy(folder, tmp_path / "models")
    shutil.rmtree(tmp_path / "models" / "tokenizer")
    with pytest.raises(CheckpointError, match="tokenizer is missing: .*spiece_model.*--part tokenizer=PATH"):
        fastvid.load(file)
    spiece = np.frombuffer((DATA / "tiny_spiece.model").read_bytes(), np.uint8).copy()
    state = tensors(folder / "text_encoder", DIFFUSERS, "text_encoders.umt5xxl.transformer.")
    write(
        tmp_path / "models/text_encoders/umt5_xxl_fp16.safetensors",
        state | {"text_encoders.umt5xxl.transformer.spiece_model": torch.from_numpy(spiece)},
    )
    assert (frames(file, prompt="a red circle moving left") == truth).all()
    assert inspect(file)["tokenizer"].endswith("umt5_xxl_fp16.safetensors")


@pytest.mark.parametrize("data", [b"", b"\x0a", b"\xff" * 20, b"\x0a\x05\x0a\x03abc", b"text that is none"])
def test_broken_sentencepiece_models(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"spiece\.model is no sentencepiece model that can be used"):
        read_tokenizer(tmp_path)


# ---------------------------------------------------------------- what is wrong


def test_several_that_fit(published: Path, truth: np.ndarray, tmp_path: Path) -> None:
    file = comfy(published, tmp_path)
    vae = tensors(published / "vae", ORIGINAL)
    write(tmp_path / "vae" / "half.safetensors", {name: tensor.bfloat16() for name, tensor in vae.items()})
    assert (frames(file) == truth).all(), "the one in fp32 is taken"
    second = write(tmp_path / "vae" / "second.safetensors", vae)
    with pytest.warns(FastvidWarning, match="half.safetensors.* left out"):
        assert (frames(file) == truth).all(), "two copies are one"
    write(second, {name: tensor * 1.01 for name, tensor in vae.items()})
    with pytest.raises(CheckpointError, match=r"vae: 3 files fit, .*half.safetensors \(BF16\).*--part vae=PATH"):
        fastvid.load(file)
    assert (frames(file, {"vae": tmp_path / "vae" / "wan_2.1_vae.safetensors"}) == truth).all()


def test_what_does_not_fit_is_named(published: Path, tmp_path: Path) -> None:
    file = comfy(published, tmp_path)
    text = tensors(published / "text_encoder", DIFFUSERS)
    whole = {name: tensor.to(torch.int8) for name, tensor in text.items()}
    (tmp_path / "text_encoders" / "umt5_xxl_fp16.safetensors").unlink()
    write(tmp_path / "text_encoders" / "int8.safetensors", whole)
    layer = "encoder.block.0.layer.0.SelfAttention.q"
    write(tmp_path / "text_encoders" / "nunchaku.safetensors", text | {f"{layer}.wscales": torch.ones(2)})
    with pytest.raises(CheckpointError) as caught:
        fastvid.load(file)
    assert "int8.safetensors is I8, without marks of a quantized format" in str(caught.value)
    assert f"nunchaku.safetensors: {layer}.wscales: quantized as Nunchaku" in str(caught.value)
    with pytest.raises(CheckpointError, match="without marks of a quantized format: I8"):
        fastvid.load(file, parts={"text_encoder": tmp_path / "text_encoders" / "int8.safetensors"})


def test_files_that_are_no_transformer(published: Path, tmp_path: Path) -> None:
    vae = write(tmp_path / "vae.safetensors", tensors(published / "vae", ORIGINAL))
    with pytest.raises(CheckpointError, match=r"vae.safetensors holds no transformer, it is a vae; give the transf"):
        fastvid.load(vae)
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"a.pth is a pickle.*fastvid convert"):
        fastvid.load(tmp_path / "a.pth")
    (tmp_path / "q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="q4.gguf is not a whole GGUF file"):
        fastvid.load(tmp_path / "q4.gguf")
    other = write(tmp_path / "sd.safetensors", {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="no part of a Wan model"):
        fastvid.load(other)
    file = comfy(published, tmp_path / "models")
    with pytest.raises(CheckpointError, match="holds no text_encoder, it is a vae"):
        fastvid.load(file, parts={"text_encoder": vae})
    with pytest.raises(CheckpointError, match="tokenizer: .* holds none"):
        fastvid.load(file, parts={"tokenizer": vae})


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"vea": "x"}, "parts='vea': allowed is one of transformer, .*; the nearest is vae"),
        ({"vae": "nowhere.safetensors"}, "parts: vae: nowhere.safetensors does not exist"),
        ({"vae": 3}, "parts: vae=3: allowed is .* a folder, a file"),
        (["vae"], "allowed is names and paths"),
    ],
)
def test_wrong_parts(published: Path, parts: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        fastvid.load(published, parts=parts)


def test_the_flag_needs_a_name(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(published), "--part", "vae.safetensors"]) == 2
    assert "is not NAME=PATH" in capsys.readouterr().err


def test_parts_of_other_sizes(published: Path, tmp_path: Path) -> None:
    tiny.write_checkpoint(tmp_path / "b", vae_config={"base_dim": 8, "num_res_blocks": 1, "z_dim": 16}, text_dim=32)
    config = json.loads((tmp_path / "b/text_encoder/config.json").read_text())
    assert config["d_model"] == 32
    file = write(tmp_path / "t.safetensors", tensors(published / "transformer", ORIGINAL))
    wide = tensors(tmp_path / "b" / "transformer", ORIGINAL)
    write(tmp_path / "narrow.safetensors", wide)
    with pytest.raises(CheckpointError, match="shapes do not show the number of heads"):
        fastvid.load(tmp_path / "narrow.safetensors", parts={"base": published})
    assert inspect(file, parts={"base": tmp_path / "b"})["problems"] == []
