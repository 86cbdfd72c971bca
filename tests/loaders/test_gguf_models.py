"""Whole models in GGUF files, as users of ComfyUI have them: the frames are those of the dequantized model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastvid
from fastvid.api import inspect
from fastvid.errors import CheckpointError
from fastvid.layers.quantized import Quantized
from fastvid.loaders import weight_files
from fastvid.loaders.find import read_tokenizer
from fastvid.models.common import ggml_names
from fastvid.models.common.sentencepiece import _parse
from fastvid.models.wan.weight_names import DIFFUSERS, ORIGINAL, origins

oracle = pytest.importorskip("gguf")

import gguf_files  # noqa: E402

DATA = Path(__file__).parents[1] / "data"
SIZES = {"num_attention_heads": 2, "attention_head_dim": 128, "ffn_dim": 512, "num_layers": 2}
ASKED: dict[str, Any] = {
    **{"prompt": "a red circle", "height": 64, "width": 64, "num_frames": 5, "seed": 1, "flow_shift": 5.0},
    **{"num_inference_steps": 3, "guidance_scale": 2.0, "negative_prompt": "blue", "solver": "euler"},
}
KINDS = {"q": "q4_k", "k": "q4_k", "v": "q6_k", "o": "q8_0", "0": "q5_k", "2": "q3_k"}  # of a block's layers
NOT_QUANTIZED = ("patch_embedding", "text_embedding", "time_projection", "time_embedding", "head.", "norm")


def kind_of(name: str, tensor: Tensor) -> str:
    """As ComfyUI-GGUF writes transformers, with a mixture of types."""
    if tensor.dim() != 2 or tensor.numel() <= 1024:
        return "f32"
    return "f16" if any(part in name for part in NOT_QUANTIZED) else KINDS[name.split(".")[-2]]


def text_kind(name: str, tensor: Tensor) -> str:
    return "f32" if tensor.dim() == 1 or "attn_rel_b" in name else "q8_0" if "token" in name else "q4_0"


def tensors(folder: Path, to: str) -> dict[str, Tensor]:
    """The weights of a part of a diffusers folder under the names of a layout."""
    state = {name: tensor for file in weight_files.find_files(folder) for name, tensor in load_file(file).items()}
    return {name: origin.make(state.__getitem__).contiguous() for name, origin in origins(state, to).items()}


def ggml(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """umT5's weights in llama.cpp's names."""
    block = {theirs: ours for ours, theirs in ggml_names.BLOCK.items()}
    outside = {theirs: ours for ours, theirs in ggml_names.OUTSIDE.items()}
    made = {}
    for name, tensor in state.items():
        stem = name.removesuffix(".weight")
        _, _, number, inner = stem.split(".", 3) if stem.startswith("encoder.block.") else ("", "", "", "")
        made[f"enc.blk.{number}.{block[inner]}.weight" if inner else f"{outside[stem]}.weight"] = tensor
    return made


def pieces(writer: Any) -> None:
    """The tiny sentencepiece model as llama.cpp writes it, with unused places behind it."""
    vocabulary = _parse((DATA / "tiny_spiece.model").read_bytes())
    padded = [*vocabulary.pieces, *((f"[PAD{i}]", -10000.0, 5) for i in range(3))]
    writer.add_tokenizer_model("t5")
    writer.add_token_list([text.encode() for text, _, _ in padded])
    writer.add_token_scores([score for _, score, _ in padded])
    writer.add_token_types([kind for _, _, kind in padded])
    writer.add_unk_token_id(vocabulary.unknown)
    writer.add_precompiled_charsmap(vocabulary.table)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf") / "published"
    tiny.write_checkpoint(folder, vocab_size=64, **SIZES)
    return folder


@pytest.fixture(scope="module")
def comfy(published: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """ComfyUI's folders with GGUF files, and the same dequantized: the transformers' files. No tokenizer but the
    vocabulary in umT5's file, which the dequantized one gets as a folder's spiece.model."""
    roots = [tmp_path_factory.mktemp(name) for name in ("quantized", "plain")]
    prefix = "model.diffusion_model."
    wanted = {
        ("unet", "wan2.1_t2v-Q4_K_M"): (
            {prefix + n: t for n, t in tensors(published / "transformer", ORIGINAL).items()}
        ),
        ("text_encoders", "umt5-xxl-encoder-Q8_0"): ggml(tensors(published / "text_encoder", DIFFUSERS)),
        ("vae", "wan_2.1_vae"): tensors(published / "vae", ORIGINAL),
    }
    for (folder, name), state in wanted.items():
        for root in roots:
            (root / folder).mkdir()
        text = folder == "text_encoders"
        kinds = text_kind if text else kind_of if folder == "unet" else (lambda name, tensor: "f16")
        more, arch = (pieces, "t5encoder") if text else (None, "wan" if folder == "unet" else None)
        worth = gguf_files.write(roots[0] / folder / f"{name}.gguf", state, kinds, arch, more=more)
        renamed = ggml_names.to_transformers(worth) if text else worth
        save_file({n: tensor.contiguous() for n, tensor in renamed.items()}, roots[1] / folder / f"{name}.safetensors")
    shutil.copy(DATA / "tiny_spiece.model", roots[1] / "text_encoders" / "spiece.model")
    return roots[0] / "unet" / "wan2.1_t2v-Q4_K_M.gguf", roots[1] / "unet" / "wan2.1_t2v-Q4_K_M.safetensors"


def held(pipe: Any, part: str) -> int:
    """Bytes of a part's tensors."""
    return sum(tensor.nbytes for tensor in getattr(pipe._model, part).parameters())


def test_frames_and_memory(comfy: tuple[Path, Path]) -> None:
    """In fp32 both compute the same products; memory is the files'."""
    ours, theirs = (fastvid.load(str(file), device="cpu", dtype="float32") for file in comfy)
    a, b = (pipe.generate(**ASKED).frames.astype(int) for pipe in (ours, theirs))
    assert a.std() > 1 and (abs(a - b) <= 1).mean() >= 0.999
    module = ours._model.transformer
    held_as = {name: layer.spec.format for name, layer in module.named_modules() if isinstance(layer, Quantized)}
    assert held_as["blocks.0.attn1.to_q"] == "q4_k" and held_as["blocks.0.attn1.to_v"] == "q6_k"
    assert len(held_as) == 2 * 10


def test_memory_is_that_of_the_files(comfy: tuple[Path, Path]) -> None:
    pipe = fastvid.load(str(comfy[0]), device="cpu", dtype="bfloat16")
    files = {"transformer": comfy[0], "text_encoder": next(comfy[0].parents[1].glob("text_encoders/*.gguf"))}
    for part, file in files.items():
        assert held(pipe, part) <= 1.10 * file.stat().st_size
    described = inspect(comfy[0])
    assert described["problems"] == [] and "q4_k" in described["parts"]["transformer"]["dtypes"]


def test_prompts_are_read_alike(comfy: tuple[Path, Path]) -> None:
    """umT5 with quantized layers and embedding, and the tokenizer of its file."""
    ours, theirs = (fastvid.load(str(file), device="cpu", dtype="float32")._model for file in comfy)
    assert isinstance(ours.text_encoder.shared, Quantized)
    ids = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    a, b = (model.text_encoder(ids, mask) for model in (ours, theirs))
    assert ((a - b).norm() / b.norm()).item() < 1e-5
    texts = list(json.loads((DATA / "tiny_spiece.json").read_text()))
    assert all(x.equal(y) for x, y in zip(ours.tokenizer(texts), theirs.tokenizer(texts), strict=True))


def test_the_tokenizer_in_a_file(comfy: tuple[Path, Path]) -> None:
    """tiny_spiece.json was written by the sentencepiece library."""
    tokenizer = read_tokenizer(next(comfy[0].parents[1].glob("text_encoders/*.gguf")))
    for text, ids in json.loads((DATA / "tiny_spiece.json").read_text()).items():
        assert tokenizer([text])[0][0].tolist() == ids


# ---------------------------------------------------------------- where files are


def test_a_diffusers_folder_with_a_gguf_file(published: Path, comfy: tuple[Path, Path], tmp_path: Path) -> None:
    """Its config.json counts; the names in the file are the original ones."""
    for name in ("model_index.json", "scheduler", "tokenizer", "text_encoder", "vae"):
        (tmp_path / name).symlink_to(published / name)
    (tmp_path / "transformer").mkdir()
    shutil.copy(published / "transformer" / "config.json", tmp_path / "transformer")
    (tmp_path / "transformer" / "wan-Q4_K_M.gguf").symlink_to(comfy[0])
    found = inspect(tmp_path)
    assert found["problems"] == [] and "q6_k" in found["parts"]["transformer"]["dtypes"]
    module = fastvid.load(str(tmp_path), device="cpu", dtype="float32")._model.transformer
    plain = load_file(comfy[1])["model.diffusion_model.blocks.1.cross_attn.v.weight"]
    assert module.blocks[1].attn2.to_v.weight.dequantize().equal(plain)


def test_split_files(comfy: tuple[Path, Path], tmp_path: Path) -> None:
    """Any of them stands for all; without the others it is refused."""
    state = list(load_file(comfy[1]).items())
    names = [f"wan-q8-{i:05}-of-00003.gguf" for i in (1, 2, 3)]
    for number, name in enumerate(names):
        gguf_files.write(tmp_path / name, dict(state[number::3]), arch=None)
    parts = {name: comfy[1].parents[1] / name for name in ("vae", "text_encoders")}
    given = {
        "vae": next(parts["vae"].iterdir()),
        "text_encoder": parts["text_encoders"] / "umt5-xxl-encoder-Q8_0.safetensors",
        "tokenizer": parts["text_encoders"] / "spiece.model",
    }
    found = inspect(tmp_path / names[1], parts=given)
    assert found["problems"] == [] and len(found["parts"]["transformer"]["files"]) == 3
    (tmp_path / names[2]).unlink()
    with pytest.raises(CheckpointError, match="has 2 of the 3 files wan-q8-"):
        inspect(tmp_path / names[0], parts=given)


def test_two_experts_by_their_names(tmp_path: Path) -> None:
    """The type in a name says nothing of the expert: Q3_K_L is not low."""
    from fastvid.models.common.expert_names import expert_of, is_pair, read_mark

    for kind in ("Q4_K_M", "Q3_K_L", "q5_0", "IQ4_XS", "Q8_0", "UD-Q2_K_XL"):
        high, low = (f"Wan2.2-T2V-A14B-{side}-{kind}.gguf" for side in ("HighNoise", "LowNoise"))
        assert (expert_of(high).expert, expert_of(low).expert) == ("high", "low") and is_pair(high, low)
        assert read_mark(f"wan2.1-t2v-14b-{kind}.gguf") == read_mark("wan2.1-t2v-14b.gguf")
        assert expert_of(f"wan22_i2v_high_{kind}.gguf").sure
    assert not is_pair("wan-high-Q4_K_M.gguf", "wan-low-Q5_K_M.gguf")


def test_a_t5_encoder_beside_umt5_is_left_out(comfy: tuple[Path, Path], tmp_path: Path) -> None:
    """Both are in ComfyUI's folder of whoever also runs Flux; T5 has one table of distances."""
    shutil.copytree(comfy[0].parents[1], tmp_path, dirs_exist_ok=True)
    umt5 = next((tmp_path / "text_encoders").iterdir())
    state = load_file(next(comfy[1].parents[1].glob("text_encoders/*.safetensors")))
    t5 = {name: tensor for name, tensor in state.items() if "relative" not in name or ".0.layer.0" in name}
    save_file(t5, tmp_path / "text_encoders" / "t5xxl_fp16.safetensors")
    gguf_files.write(tmp_path / "text_encoders" / "t5-v1_1-xxl-encoder-Q8_0.gguf", ggml(t5), arch="t5encoder")
    found = inspect(tmp_path / "unet" / comfy[0].name)
    assert found["problems"] == [] and found["parts"]["text_encoder"]["files"] == [str(umt5)]
    for other in ("t5xxl_fp16.safetensors", "t5-v1_1-xxl-encoder-Q8_0.gguf"):
        parts = {"text_encoder": tmp_path / "text_encoders" / other}
        assert "T5's encoder, not umT5's" in inspect(comfy[0], parts=parts)["problems"][0]


def test_names_on_the_hub() -> None:
    from fastvid.loaders import hub

    assert hub.split("QuantStack/Wan2.2-T2V-A14B-GGUF/HighNoise/Wan2.2-T2V-A14B-HighNoise-Q4_K_M.gguf") == (
        "QuantStack/Wan2.2-T2V-A14B-GGUF",
        "HighNoise/Wan2.2-T2V-A14B-HighNoise-Q4_K_M.gguf",
    )
