"""Where a LoRA is found, which of two experts it goes to, and what of it a model has."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import serve
from safetensors.torch import save_file
from torch import Tensor

from fastvid.errors import CheckpointError, Error, FastvidWarning, InvalidRequest
from fastvid.loaders.lora import Lora, as_tuples, read_loras
from fastvid.loaders.lora_files import find_file
from fastvid.loaders.lora_fit import describe, fit
from fastvid.models.description import Checkpoint, Part
from fastvid.models.wan.config import WanTransformerConfig

WIDTH = 16
CONFIG = WanTransformerConfig(1, WIDTH, text_dim=8, freq_dim=8, ffn_dim=20, num_layers=1)
LAYER, IMAGE = "blocks.0.attn1.to_q", "diffusion_model.blocks.0.cross_attn.k_img"


def model(experts: int = 2) -> Checkpoint:
    names = ("transformer", "transformer_2")[:experts]
    return Checkpoint(Path("model"), "", tuple(Part(name, CONFIG) for name in names), None, (), None, ())


def tensors(*stems: str) -> dict[str, Tensor]:
    shapes = (("lora_A.weight", (2, WIDTH)), ("lora_B.weight", (WIDTH, 2)))
    return {f"{stem}.{role}": torch.ones(shape) for stem in stems or (LAYER,) for role, shape in shapes}


def write(path: Path, *stems: str, header: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors(*stems), path, header)
    return path


def experts(*loras: Any, count: int = 2) -> list[str]:
    return [lora.expert for lora in fit(read_loras(loras), model(count))]


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


# ---------------------------------------------------------------- which expert


@pytest.mark.parametrize(
    ("high", "low"),
    [
        ("a_high_noise", "a_low_noise"),
        ("HIGH/a", "LOW/a"),
        ("wan22StyleHigh", "wan22StyleLow"),
        ("a-H", "a-L"),
        ("a_hn_v2", "a_ln_v2"),
        ("high_motion", "low_motion"),
    ],
)
def test_pairs_go_where_their_names_say(folder: Path, high: str, low: str) -> None:
    files = [write(folder / f"{name}.safetensors") for name in (low, high)]
    assert experts(*files) == ["low", "high"]
    assert experts((files[0], 0.5, "high"), files[1]) == ["high", "high"], "what the caller says counts"
    assert experts(files[1]) == ["high"], "its partner is beside it, or its name is clear"
    assert as_tuples(fit(read_loras(files), model())) == ((str(files[0]), 1.0, "low"), (str(files[1]), 1.0, "high"))


def test_names_that_say_nothing_go_to_both(folder: Path) -> None:
    names = ("highlights", "slow_motion", "high_res", "style", "low_angle")
    assert experts(*(write(folder / f"{name}.safetensors") for name in names)) == [""] * len(names)


@pytest.mark.parametrize("name", ["high_motion", "style_HN", "high_to_low", "LOW/a_high_noise"])
def test_doubtful_names_are_refused(folder: Path, name: str) -> None:
    file = write(folder / f"{name}.safetensors")
    message = rf"{file.name}.*clearly.*\('{file.name}', 1, \"high\"\).*\"low\"\).*--lora {file.name}:1:high"
    with pytest.raises(InvalidRequest, match=message):
        experts(file)
    (told,) = describe(read_loras([file]), model())
    assert "clearly" in told["problems"][0]
    assert experts((file, 1.0, "low")) == ["low"] and experts(file, count=1) == [""]


def test_a_header_says_it(folder: Path) -> None:
    for text, expert in (("style high noise", "high"), ("wan2.2_t2v_low_noise_14B.safetensors", "low")):
        file = write(folder / "a.safetensors", header={"modelspec.title": text, "ss_tag_frequency": "low noise"})
        with pytest.warns(FastvidWarning, match=f"a.safetensors is merged into the {expert} noise expert only"):
            assert experts(file) == [expert]
    both = {"ss_output_name": "high_noise", "ss_sd_model_name": "low_noise"}
    assert experts(write(folder / "b.safetensors", header=both)) == [""]
    named = write(folder / "c_low_noise.safetensors", header={"modelspec.title": "high noise"})
    assert experts(named) == ["low"]


def test_both_experts_in_one_file(folder: Path) -> None:
    both = write(folder / "a.safetensors", f"transformer.{LAYER}", f"transformer_2.{LAYER}")
    assert experts(both) == ["high", "low"]
    assert experts((both, 0.5, "low")) == ["low"], "the part that is asked for"
    with pytest.warns(FastvidWarning, match=r"its 1 weights for the low noise expert .* left out"):
        assert experts(both, count=1) == [""]
    second = write(folder / "b.safetensors", f"transformer_2.{LAYER}")
    assert experts(second) == ["low"]
    for given, count in (((second, 1.0, "high"), 2), (second, 1)):
        with pytest.raises(InvalidRequest, match=r"b.safetensors.*low noise"):
            experts(given, count=count)
    assert experts(write(folder / "d.safetensors", f"pipe.dit.{LAYER}", f"pipe.dit2.{LAYER}")) == ["high", "low"]
    flat = write(folder / "c.safetensors", "lora_unet_blocks_0_attn1_to_q", "lycoris_transformer_2_blocks_0_attn1_to_q")
    assert experts(flat) == ["high", "low"]


def test_a_model_with_one_transformer(folder: Path) -> None:
    file = write(folder / "a_high_noise.safetensors")
    with pytest.warns(FastvidWarning, match="for the high noise expert by its name; this model has one transformer"):
        assert experts(file, count=1) == [""]
    with pytest.raises(InvalidRequest, match="leave out 'high'"):
        experts((file, 1.0, "high"), count=1)


# ---------------------------------------------------------------- what the model has


def test_what_other_wan_models_have_is_left_out(folder: Path) -> None:
    stems = (f"diffusion_model.{LAYER}", IMAGE, "transformer.vace_blocks.0.proj_out")
    stems += ("diffusion_model.blocks.0.cross_attn.norm_q_img",)
    file = write(folder / "a.safetensors", *stems)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        (lora,) = fit(read_loras([file]), model())
    assert set(lora.terms) == {f"{LAYER}.weight"} and len(said) == 1
    assert "3 of 4 changes" in str(said[0].message) and "add_k_proj" in str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (told,) = describe(read_loras([file]), model())
    names = ("blocks.0.attn2.add_k_proj", "vace_blocks.0.proj_out", "blocks.0.cross_attn.norm_q_img")
    assert sorted(told["left_out"]) == sorted(f"{name}.weight" for name in names)
    assert told["problems"] == []


@pytest.mark.parametrize(
    ("stems", "name"),
    [
        ((IMAGE,), "add_k_proj"),
        ((LAYER, "blocks.7.attn1.to_q"), r"blocks.7"),
        ((LAYER, "blocks.0.attn9.to_q"), "attn9"),
    ],
)
def test_what_no_such_model_has_is_refused(folder: Path, stems: tuple[str, ...], name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"a.safetensors does not fit model: .*{name}"):
        experts(write(folder / "a.safetensors", *stems))


# ---------------------------------------------------------------- where it is


@pytest.mark.parametrize("name", ["pytorch_lora_weights", "adapter_model", "style"])
def test_folders(folder: Path, name: str) -> None:
    file = write(folder / f"one/{name}.safetensors")
    if name != "style":
        write(folder / "one/other.safetensors")
    assert find_file(folder / "one").file == file
    (lora,) = read_loras([(str(folder / "one"), 0.5)]) if name != "adapter_model" else quiet(folder / "one")
    assert isinstance(lora, Lora) and lora.path == file


def quiet(path: Path) -> tuple[Lora, ...]:
    with pytest.warns(FastvidWarning):
        return read_loras([path])


def test_folders_without_exactly_one(folder: Path) -> None:
    for name in ("one_high", "one_low"):
        write(folder / f"two/{name}.safetensors")
    (folder / "none").mkdir()
    (folder / "old").mkdir()
    (folder / "old/pytorch_lora_weights.bin").touch()
    for inner, message in {
        "two": "several LoRA files.*one_high.*one_low",
        "none": r"none holds no LoRA; pytorch_lora_weights.safetensors, adapter_model.safetensors or exactly one",
        "old": r"pickles only \(pytorch_lora_weights.bin\)",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            read_loras([folder / inner])


@pytest.mark.parametrize(
    "given", ["missing.safetensors", "some/missing.safetensors", "/a/b/c", "~no-such-user/x", "a\0b"]
)
def test_what_is_not_there(given: str) -> None:
    with pytest.raises(Error):
        read_loras([given], download=False)


def test_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    write(folder / "served/adapter_model.safetensors")
    write(folder / "served/more/a_low_noise.safetensors")
    (folder / "served/adapter_config.json").write_text('{"r": 2, "lora_alpha": 8}')
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
    with pytest.raises(CheckpointError, match=r"org/name: .* not in the local cache.*`hf download org/name`"):
        read_loras(["org/name"])
    with serve("org/name", folder / "served") as (address, seen):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        (lora,) = read_loras([("org/name", 0.5)], download=True)
        assert lora.terms[f"{LAYER}.weight"][0].factor == 4.0, "peft's settings came along"
        assert experts_downloaded("org/name/more/a_low_noise.safetensors") == ["low"]
        with pytest.raises(
            CheckpointError, match=r"lora org/name/b.safetensors: .*no such file; it has adapter_config"
        ):
            read_loras(["org/name/b.safetensors"], download=True)
        seen.clear()
        assert read_loras(["org/name"], download=True)[0].path == lora.path and not seen, "from the cache"
    assert os.path.commonpath([lora.path, folder / "cache"]) == str(folder / "cache")
    assert read_loras(["org/name/more/a_low_noise.safetensors"])


def experts_downloaded(name: str) -> list[str]:
    return [lora.expert for lora in fit(read_loras([name], download=True), model())]
