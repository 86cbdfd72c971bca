"""VACE modules in files of their own: on a text-to-video model they make what a whole VACE model makes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pipelines import clip, write_vace
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastvid
from fastvid.api import inspect
from fastvid.cli.commands import main
from fastvid.errors import CheckpointError, InvalidRequest
from fastvid.loaders.checkpoint import load_part, open_checkpoint
from fastvid.loaders.safetensors import read_headers
from fastvid.models.wan.weight_names import DIFFUSERS, ORIGINAL, origins

ASKED: dict[str, Any] = {
    **{"prompt": "a red circle", "height": 64, "width": 96, "num_frames": 5, "seed": 1, "solver": "euler"},
    **{"num_inference_steps": 2, "guidance_scale": 2.0, "negative_prompt": "blue", "flow_shift": 5.0},
}


def named(state: dict[str, Tensor], to: str, prefix: str = "") -> dict[str, Tensor]:
    made = origins(state, to)
    return {prefix + name: origin.make(state.__getitem__).clone().contiguous() for name, origin in made.items()}


def is_module(name: str) -> bool:
    return name.split(".")[0].startswith("vace_")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny VACE model, and beside it its base, as a folder of diffusers."""
    root = tmp_path_factory.mktemp("vace")
    write_vace(root / "whole")
    shutil.copytree(root / "whole", root / "base")
    state = load_file(root / "whole" / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file(
        {k: v for k, v in state.items() if not is_module(k)},
        root / "base" / "transformer" / "diffusion_pytorch_model.safetensors",
    )
    config = json.loads((root / "base" / "transformer" / "config.json").read_text())
    config = {k: v for k, v in config.items() if "vace" not in k} | {"_class_name": "WanTransformer3DModel"}
    (root / "base" / "transformer" / "config.json").write_text(json.dumps(config))
    index = json.loads((root / "base" / "model_index.json").read_text())
    index |= {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}
    (root / "base" / "model_index.json").write_text(json.dumps(index))
    return root


def module_of(root: Path, path: Path, layout: str = ORIGINAL, prefix: str = "", **changes: Any) -> Path:
    state = load_file(root / "whole" / "transformer" / "diffusion_pytorch_model.safetensors")
    made = named(state, layout)
    made = {prefix + k: v.to(changes.get("dtype", v.dtype)) for k, v in made.items() if is_module(k)}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(made | {"model_type.vace": torch.zeros(1)}, path)
    return path


def frames(model: Any, parts: Any = None, **asked: Any) -> np.ndarray:
    pipe = fastvid.load(str(model), device="cpu", parts=parts)
    return pipe.generate(**{**ASKED, "video": clip(5), **asked}).frames


@pytest.mark.parametrize(("layout", "prefix"), [(ORIGINAL, ""), (ORIGINAL, "model.diffusion_model."), (DIFFUSERS, "")])
def test_on_a_diffusers_folder(whole: Path, tmp_path: Path, layout: str, prefix: str) -> None:
    module = module_of(whole, tmp_path / "Wan2_1-VACE_module_tiny_bf16.safetensors", layout, prefix)
    made = frames(whole / "base", {"vace": module})
    assert (made == frames(whole / "whole")).all()
    if layout == ORIGINAL and not prefix:
        zero = frames(whole / "base", {"vace": module}, conditioning_scale=0.0)
        plain = fastvid.load(str(whole / "base"), device="cpu").generate(**ASKED).frames
        assert (zero == plain).all() and (made != plain).any(), "scale 0 is the base, exactly"
        found = inspect(str(whole / "base"), parts={"vace": module})
        assert found["pipeline"] == "WanVACEPipeline" and found["problems"] == []
        assert str(module) in found["parts"]["transformer"]["files"]


def test_from_the_command_line(whole: Path, tmp_path: Path) -> None:
    module = module_of(whole, tmp_path / "module.safetensors")
    np.save(tmp_path / "control.npy", clip(5))
    words = ["generate", ASKED["prompt"], "--model", str(whole / "base"), "--vace", str(module), "--seed", "1"]
    words += ["--size", "96x64", "--steps", "2", "--solver", "euler", "--flow-shift", "5", "--guidance-scale", "2"]
    words += ["--negative-prompt", "blue", "--video", str(tmp_path / "control.npy"), "--quiet"]
    assert main([*words, "-o", str(tmp_path / "out.npy")]) == 0
    assert (np.load(tmp_path / "out.npy") == frames(whole / "whole")).all()


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_on_a_single_file(whole: Path, tmp_path: Path, prefix: str) -> None:
    """With another prefix than the module's, and fp8 with scales under a bf16 module."""
    state = load_file(whole / "base" / "transformer" / "diffusion_pytorch_model.safetensors")
    made = named(state, ORIGINAL, prefix)
    scaled = {}
    for name, tensor in made.items():
        if name.endswith("ffn.0.weight"):
            scaled[name] = (tensor / 0.5).to(torch.float8_e4m3fn)
            scaled[name.replace(".weight", ".scale_weight")] = torch.tensor(0.5)
        else:
            scaled[name] = tensor
    scaled[prefix + "scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    save_file(scaled, tmp_path / "diffusion_pytorch_model.safetensors")
    module = module_of(whole, tmp_path / "module.safetensors", dtype=torch.bfloat16)
    parts = {"vace": module, "base": whole / "whole"}
    # Heads are not in a file without a configuration: tiny ones are given by one beside it.
    shutil.copy(whole / "base" / "transformer" / "config.json", tmp_path / "config.json")
    checkpoint = open_checkpoint(tmp_path / "diffusion_pytorch_model.safetensors", parts).check()
    filled = load_part(checkpoint, "transformer")
    told = load_file(whole / "whole" / "transformer" / "diffusion_pytorch_model.safetensors")
    own = dict(filled.named_parameters())
    for name in ("vace_blocks.0.ffn.net.0.proj.weight", "vace_blocks.1.attn1.to_out.0.weight"):
        assert torch.equal(own[name], told[name].bfloat16().float()), name
    weight = told["blocks.0.ffn.net.0.proj.weight"]
    stored = ((weight / 0.5).to(torch.float8_e4m3fn).float() * 0.5).to(weight.dtype)
    assert torch.equal(filled.blocks[0].ffn.net[0].proj.weight.dequantize(torch.float32), stored.float())


def test_each_file_has_its_own_marks(whole: Path, tmp_path: Path) -> None:
    """Both files may say `scaled_fp8`; a file of one format says nothing of the other."""
    for name, dtype in (("a", torch.float8_e4m3fn), ("b", torch.float8_e5m2)):
        stem = "vace_blocks.0" if name == "b" else "blocks.0"
        weight = {f"{stem}.ffn.0.weight": torch.ones(4, 4).to(dtype), f"{stem}.ffn.0.scale_weight": torch.tensor(2.0)}
        save_file(weight | {"scaled_fp8": torch.zeros(2, dtype=dtype)}, tmp_path / f"{name}.safetensors")
    entries = read_headers([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
    assert {name: entry.dtype for name, entry in entries.items()} == {
        "blocks.0.ffn.0.weight": "fp8_e4m3",
        "vace_blocks.0.ffn.0.weight": "fp8_e5m2",
    }


# ---------------------------------------------------------------- what does not fit


def test_what_does_not_fit_is_refused(whole: Path, tmp_path: Path) -> None:
    module = module_of(whole, tmp_path / "module.safetensors")
    with pytest.raises(CheckpointError, match=r"VACE module alone: .*parts=\{\"vace\": PATH\}, --part vace=PATH"):
        fastvid.load(str(module), device="cpu")
    with pytest.raises(CheckpointError, match="belongs on a text-to-video transformer; .* is"):
        inspect(str(whole / "whole"), parts={"vace": module})
    with_rate = shutil.copytree(whole / "base", tmp_path / "rate")
    config = json.loads((with_rate / "transformer" / "config.json").read_text()) | {"inject_sample_info": True}
    (with_rate / "transformer" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="belongs on a text-to-video transformer; .* is"):
        inspect(str(with_rate), parts={"vace": module})
    with pytest.raises(CheckpointError, match="holds no VACE module"):
        inspect(str(whole / "base"), parts={"vace": whole / "whole" / "vae"})
    with pytest.raises(InvalidRequest, match="vace_2 is for models with two transformers; leave it out"):
        inspect(str(whole / "base"), parts={"vace": module, "vace_2": module})
    with pytest.raises(InvalidRequest, match="vace_2 is given without vace"):
        inspect(str(whole / "base"), parts={"vace_2": module})
    wide = {"vace_patch_embedding.weight": torch.zeros(64, 96, 1, 2, 2), "vace_blocks.0.norm3.bias": torch.zeros(64)}
    save_file(wide, tmp_path / "wide.safetensors")
    with pytest.raises(CheckpointError, match="for transformers of width 64; .* has 48"):
        inspect(str(whole / "base"), parts={"vace": tmp_path / "wide.safetensors"})


def test_two_experts(whole: Path, tmp_path: Path) -> None:
    """Each its own module: the second is found by the first's name, given, or missing."""
    root = tmp_path / "two"
    shutil.copytree(whole / "base", root)
    shutil.copytree(root / "transformer", root / "transformer_2")
    index = json.loads((root / "model_index.json").read_text())
    index |= {"transformer_2": index["transformer"], "boundary_ratio": 0.875}
    (root / "model_index.json").write_text(json.dumps(index))
    high = module_of(whole, tmp_path / "Wan2_2_Fun_VACE_module_HIGH_bf16.safetensors")
    with pytest.raises(InvalidRequest, match="two transformers, and the second one's VACE module is not known"):
        inspect(str(root), parts={"vace": high})
    low = module_of(whole, tmp_path / "Wan2_2_Fun_VACE_module_LOW_bf16.safetensors")
    state = load_file(low)
    save_file({name: 0.5 * tensor for name, tensor in state.items()}, low)
    with pytest.raises(InvalidRequest, match="vace is the high noise expert's, but its file is named low .* exchange"):
        inspect(str(root), parts={"vace": low, "vace_2": high})
    lone = shutil.copy(root / "transformer" / "diffusion_pytorch_model.safetensors", tmp_path / "low_noise.safetensors")
    with pytest.raises(InvalidRequest, match="transformer is the high noise expert, and .* is named low; give it as"):
        inspect(str(root), parts={"transformer": lone})
    for parts in ({"vace": high}, {"vace": low}, {"vace": high, "vace_2": low}):
        found = inspect(str(root), parts=parts)
        assert found["problems"] == [] and found["recipe"]["boundary_ratio"] == 0.875
        files = [found["parts"][name]["files"][-1] for name in ("transformer", "transformer_2")]
        assert files == [str(high), str(low)]
    made = fastvid.load(str(root), device="cpu", vace=(high, low))
    pair = [dict(expert.named_parameters())["vace_blocks.1.proj_out.weight"] for expert in made._model.experts.modules]
    assert torch.equal(0.5 * pair[0], pair[1])
