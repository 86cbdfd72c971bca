"""What people have in one folder: variants, left-over indices, copies, other endings; and which of it is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from fastvid.errors import CheckpointError, FastvidWarning
from fastvid.loaders.checkpoint import open_checkpoint
from fastvid.loaders.find import find_part, read_part
from fastvid.loaders.single_files import DOUBTFUL, _find_experts, _noise_of
from fastvid.loaders.weight_files import find_files, weight_groups
from fastvid.models.wan.detect import Identity
from fastvid.models.wan.weight_names import ORIGINAL, origins

HEADS = {"num_attention_heads": 1, "attention_head_dim": 128, "num_layers": 1}


def put(folder: Path, *names: str) -> None:
    folder.mkdir(exist_ok=True)
    for i, name in enumerate(names):
        save_file({"a": torch.full((4,), float(i))}, folder / name)


def index(folder: Path, name: str, *shards: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps({"weight_map": {str(i): shard for i, shard in enumerate(shards)}}))


def names(folder: Path) -> list[str]:
    return [path.name for path in find_files(folder)]


PLAIN, SHARDS = "model.safetensors", ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
HALVES = [shard.replace("model-", "model.fp16-") for shard in SHARDS]


@pytest.mark.parametrize("variant", ["fp16", "bf16", "non_ema"])
def test_a_variant_alone(tmp_path: Path, variant: str) -> None:
    shards = [shard.replace("model-", f"model.{variant}-") for shard in SHARDS]
    put(tmp_path, *shards)
    index(tmp_path, f"model.safetensors.index.{variant}.json", *shards)
    assert names(tmp_path) == shards
    assert list(weight_groups(tmp_path, [".safetensors"])) == [find_files(tmp_path)]
    put(tmp_path / "whole", f"diffusion_pytorch_model.{variant}.safetensors")
    assert names(tmp_path / "whole") == [f"diffusion_pytorch_model.{variant}.safetensors"]


def test_the_most_exact_is_read_and_the_rest_is_named(tmp_path: Path) -> None:
    put(tmp_path, *HALVES, "model.bf16.safetensors")
    index(tmp_path, "model.safetensors.index.fp16.json", *HALVES)
    with pytest.warns(FastvidWarning, match="left out: model.bf16.safetensors"):
        assert names(tmp_path) == HALVES
    put(tmp_path, PLAIN, "pytorch_lora_weights.safetensors")
    with pytest.warns(FastvidWarning, match="left out: .*index.fp16.json.*pytorch_lora_weights"):
        assert names(tmp_path) == [PLAIN]
    put(tmp_path, *SHARDS)
    index(tmp_path, "model.safetensors.index.json", *SHARDS)
    with pytest.warns(FastvidWarning, match="left out: .*model.safetensors"):
        assert names(tmp_path) == SHARDS


@pytest.mark.parametrize("there", [[], SHARDS[:1]])
def test_a_stale_index_beside_a_whole_file(tmp_path: Path, there: list[str]) -> None:
    index(tmp_path, "model.safetensors.index.json", *SHARDS)
    put(tmp_path, *there)
    with pytest.raises(CheckpointError, match=r"lacks model-.*, of 2"):  # one shard alone is no model
        names(tmp_path)
    put(tmp_path, PLAIN)
    with pytest.warns(FastvidWarning, match="left over"):
        assert names(tmp_path) == [PLAIN]


def test_copies_are_one_and_others_are_not(tmp_path: Path) -> None:
    put(tmp_path, "vae.safetensors")
    shutil.copy(tmp_path / "vae.safetensors", tmp_path / "vae (1).safetensors")
    with pytest.warns(FastvidWarning, match="left out: vae"):
        assert len(names(tmp_path)) == 1
    put(tmp_path, "other.safetensors", "vae.safetensors")
    with pytest.raises(CheckpointError, match="several weights"):
        names(tmp_path)


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model", "anything"])
def test_sft(tmp_path: Path, stem: str) -> None:
    put(tmp_path, f"{stem}.sft")
    assert names(tmp_path) == [f"{stem}.sft"]


# ---------------------------------------------------------------- what is opened


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files") / "m"
    tiny.write_checkpoint(folder, **HEADS)
    return folder


@pytest.fixture
def folder(published: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "m"))


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("pipeline", ["WanPipeline", "WanVideoToVideoPipeline"])
def test_pipelines_that_can_be_run(folder: Path, pipeline: str) -> None:
    change(folder / "model_index.json", _class_name=pipeline)
    assert open_checkpoint(folder).check().pipeline == pipeline


@pytest.mark.parametrize(
    ("part", "values", "name"),
    [
        ("transformer", {"_class_name": "FluxTransformer2DModel"}, "FluxTransformer2DModel"),
        ("transformer", {"_class_name": ["Wan"]}, "Wan"),
        ("transformer", {"architectures": ["Evil"]}, "Evil"),
        ("vae", {"_class_name": "AutoencoderKL"}, "AutoencoderKL"),
        ("vae", {"_class_name": "WanTransformer3DModel"}, "WanTransformer3DModel"),
        ("text_encoder", {"architectures": ["evil_mod.Evil"]}, "evil_mod.Evil"),
        ("text_encoder", {"architectures": "T5EncoderModel"}, "T5EncoderModel"),
        ("text_encoder", {"model_type": "t5"}, "t5"),
    ],
)
def test_another_class_is_refused(folder: Path, part: str, values: dict[str, Any], name: str) -> None:
    """In a model folder, and where the part is named by itself."""
    change(folder / part / "config.json", **values)
    with pytest.raises(CheckpointError, match=rf"{part}.config\.json.*{name}"):
        open_checkpoint(folder).check()
    with pytest.raises(CheckpointError, match=rf"config\.json.*{name}"):
        find_part(part, folder / part)


def test_classes_that_hold_the_part(folder: Path) -> None:
    change(folder / "transformer/config.json", _class_name="CausalWanTransformer3DModel")
    change(folder / "text_encoder/config.json", architectures=["UMT5ForConditionalGeneration"])
    open_checkpoint(folder).check()


def test_a_quantization_config_beside_plain_weights(folder: Path) -> None:
    for part in ("transformer", "vae", "text_encoder"):
        change(folder / part / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    with pytest.warns(FastvidWarning, match="quantization_config") as told:
        open_checkpoint(folder).check()
    assert len(told) == 3
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    state = load_file(file)
    save_file(state | {"proj_out.weight": state["proj_out.weight"].to(torch.int8)}, file)
    with pytest.raises(CheckpointError, match="without marks of a quantized format: I8"):
        open_checkpoint(folder).check()


def test_a_tokenizer_of_another_model(folder: Path) -> None:
    """Also one whose few ids are large: what counts is the largest, not how many there are."""
    path = folder / "tokenizer/tokenizer.json"
    table = json.loads(path.read_text())
    table["model"]["vocab"]["blue"] = len(tiny.WORDS)
    path.write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match=f"tokenizer has ids up to {len(tiny.WORDS)}.* embeds {len(tiny.WORDS)}"):
        open_checkpoint(folder).check()


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_vace_module_alone(tmp_path: Path, prefix: str) -> None:
    save_file({f"{prefix}vace_blocks.0.before_proj.weight": torch.zeros(2, 2)}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="VACE module alone.*give that transformer.*--part vace=PATH"):
        read_part("transformer", (tmp_path / "m.safetensors",))


# ---------------------------------------------------------------- experts


def transformer(published: Path, path: Path) -> Path:
    state = load_file(published / "transformer/diffusion_pytorch_model.safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: one.make(state.__getitem__).contiguous() for name, one in origins(state, ORIGINAL).items()}, path)
    return path


@pytest.mark.parametrize(
    ("high", "low"),
    [
        ("blendHigh.safetensors", "blendLow.safetensors"),
        ("a_H.safetensors", "a_L.safetensors"),
        ("mixHigh/wan.safetensors", "mixLow/wan.safetensors"),
        ("high_noise_model/wan.sft", "low_noise_model/wan.sft"),
    ],
)
def test_pairs(published: Path, tmp_path: Path, high: str, low: str) -> None:
    first, second = transformer(published, tmp_path / "x" / high), transformer(published, tmp_path / "x" / low)
    for file in (first, second):
        found = _find_experts(file, {})
        assert (found["transformer"].files, found["transformer_2"].files) == ((first,), (second,))


@pytest.mark.parametrize("name", ["t2v_low_vram", "high res/t2v", "t2v-high-quality", "SlowMotion", "highlights"])
def test_whole_models(published: Path, tmp_path: Path, name: str) -> None:
    assert list(_find_experts(transformer(published, tmp_path / f"{name}.safetensors"), {})) == ["transformer"]


def test_a_doubtful_14b(tmp_path: Path) -> None:
    """A T2V of 14B may be Wan 2.1's, or one of the two of Wan 2.2."""
    (tmp_path / "jump_high.safetensors").touch()

    def noise(name: str, family: str = "wan", size: str = "14B", task: str = "t2v") -> str:
        return _noise_of(tmp_path / name, Identity("transformer", ORIGINAL, "", family, size, task, {}))

    assert [noise(name) for name in ("jump_high.safetensors", "x_high_noise.safetensors", "t2v.safetensors")] == [
        "doubtful",
        "high",
        "",
    ]
    assert noise("jump_high.safetensors", size="custom") == ""
    for name in ("wan2.2_t2v_14B", "Wan22-T2V", "T2V-A14B"):
        assert noise(f"{name}.safetensors") == "doubtful", "which of the two?"
    for name in ("wan2.1_t2v_14B", "wan2.2-rapid-aio", "wan22_merge"):
        assert noise(f"{name}.safetensors") == "", "one transformer"
    assert noise("x_high_noise.safetensors", "wan2.1", "1.3B") == "", "published with one transformer alone"
    assert noise("x_high_noise.safetensors", "wan2.2", "5B", "ti2v") == ""


def test_what_a_doubtful_file_is_is_said_by_the_caller(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, other = (transformer(published, tmp_path / f"{name}.safetensors") for name in ("jump_high", "other"))
    monkeypatch.setattr("fastvid.loaders.single_files._noise_of", lambda file, identity: DOUBTFUL)
    found = _find_experts(file, {})
    assert any(
        "does not say which" in text and '"transformer": PATH' in text for text in found["transformer_2"].problems
    )
    assert list(_find_experts(file, {"transformer": file})) == ["transformer"]
    assert _find_experts(file, {"transformer_2": other})["transformer_2"].files == (other,)
