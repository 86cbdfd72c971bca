"""The UMT5 encoder against transformers' on random weights, and prompts against diffusers' WanPipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel
from transformers import UMT5Config as TheirConfig

from fastvid.errors import CheckpointError
from fastvid.models.common.tokenizer import TextTokenizer, clean_prompt, encode_prompt
from fastvid.models.common.umt5 import UMT5Config, UMT5Encoder

SMALL: dict[str, Any] = {"vocab_size": 100, "d_model": 48, "d_kv": 16, "d_ff": 80, "num_layers": 3, "num_heads": 4}
WORDS = ["a", "red", "blue", "circle", "square", "moving", "left", "right", "on", "white", "background"]
PROMPTS = [
    "a red circle moving right on a white background",
    "",
    "  A\u00a0Red\n circle &amp;amp; unheard-of  words ",
    "a blue square " * 20,
    "sch\u00c3\u00b6n &lt;pad&gt; </s> left",
]


def error(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||"""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.fixture(scope="module")
def theirs() -> UMT5EncoderModel:
    """transformers' model with every weight drawn, also those that start as ones."""
    torch.manual_seed(0)
    model = UMT5EncoderModel(TheirConfig(**SMALL, feed_forward_proj="gated-gelu")).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def ours(theirs: UMT5EncoderModel) -> UMT5Encoder:
    model = UMT5Encoder(UMT5Config.from_dict(theirs.config.to_dict()))
    weights = {name: tensor for name, tensor in theirs.state_dict().items() if name not in UMT5Encoder.ALIASES}
    model.load_state_dict(weights)
    return model.eval()


def tokens(lengths: list[int], width: int) -> tuple[Tensor, Tensor]:
    """Random ids [B, width] and the mask of so many tokens."""
    generator = torch.Generator().manual_seed(width)
    ids = torch.randint(SMALL["vocab_size"], (len(lengths), width), generator=generator)
    return ids, (torch.arange(width) < torch.tensor(lengths)[:, None]).long()


@pytest.mark.parametrize(("lengths", "width"), [([1], 1), ([1, 13], 13), ([137, 2, 60], 137), ([300, 129], 301)])
@torch.no_grad()
def test_equals_transformers(theirs: UMT5EncoderModel, lengths: list[int], width: int) -> None:
    ids, mask = tokens(lengths, width)
    assert error(ours(theirs)(ids, mask), theirs(ids, mask).last_hidden_state) < 3e-6


@torch.no_grad()
def test_bf16_is_as_good_as_transformers(theirs: UMT5EncoderModel) -> None:
    ids, mask = tokens([137, 20], 137)
    truth = theirs(ids, mask).last_hidden_state[mask == 1]
    half = UMT5EncoderModel(theirs.config).eval()
    half.load_state_dict(theirs.state_dict())
    half.bfloat16()
    found, allowed = (m(ids, mask) for m in (ours(theirs).bfloat16(), lambda *a: half(*a).last_hidden_state))
    assert found.dtype == torch.bfloat16
    assert 0 < error(found[mask == 1], truth) <= 2 * error(allowed[mask == 1], truth)


@torch.no_grad()
def test_padding_is_not_seen(theirs: UMT5EncoderModel) -> None:
    ids, mask = tokens([20], 60)
    model = ours(theirs)
    before = model(ids, mask)[:, :20]
    ids[:, 20:] = 7
    assert torch.equal(model(ids, mask)[:, :20], before)
    assert error(model(ids[:, :20], mask[:, :20]), before) < 1e-6


def test_gradients_equal_transformers(theirs: UMT5EncoderModel) -> None:
    ids, mask = tokens([13, 5], 13)
    model = ours(theirs).train()
    theirs.zero_grad()
    theirs(ids, mask).last_hidden_state.square().mean().backward()
    model(ids, mask).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and error(parameter.grad, theirs.get_parameter(name).grad) < 1e-4, name


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (8, 20)])
def test_position_buckets_equal_transformers(buckets: int, distance: int) -> None:
    sizes = {"relative_attention_num_buckets": buckets, "relative_attention_max_distance": distance, "num_layers": 1}
    theirs = UMT5EncoderModel(TheirConfig(**{**SMALL, **sizes}, feed_forward_proj="gated-gelu"))
    attention = theirs.encoder.block[0].layer[0].SelfAttention
    position = torch.arange(513)
    expected = attention._relative_position_bucket(position[None] - position[:, None])
    model = UMT5Encoder(UMT5Config.from_dict({**SMALL, **sizes}))
    assert torch.equal(model._buckets(513, torch.device("cpu")), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feed_forward_proj": "relu"}, "feed_forward_proj='relu'"),
        ({"relative_attention_num_buckets": 30}, "multiple of 4"),
        ({"relative_attention_max_distance": 8}, "more than a quarter"),
        ({"d_model": -1}, "d_model is -1"),
        ({"num_heads": 2.0}, "num_heads is 2.0"),
    ],
)
def test_configurations_that_are_not_supported(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        UMT5Config.from_dict({**SMALL, **changes})


# Prompts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of words, lower case, </s> at the end, at most 24 tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    special = ["<pad>", "</s>", "<unk>"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *WORDS])}, unk_token="<unk>"))
    inner.add_special_tokens(special)
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    inner.save(str(folder / "tokenizer.json"))
    write_config(folder, model_max_length=24)
    return folder


def write_config(folder: Path, **config: Any) -> None:
    text = json.dumps({"pad_token": "<pad>", **config})
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def pipeline(theirs: UMT5EncoderModel, folder: Path) -> WanPipeline:
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **special)
    return WanPipeline(tokenizer, theirs, vae=None, scheduler=None)


@pytest.mark.parametrize("prompts", [PROMPTS, [""], PROMPTS[:1], ["", "x"]])
@pytest.mark.parametrize("rows", [24, 40])
@torch.no_grad()
def test_prompts_are_embedded_as_by_diffusers(
    theirs: UMT5EncoderModel, pipeline: WanPipeline, folder: Path, prompts: list[str], rows: int
) -> None:
    write_config(folder, model_max_length=rows)
    made = encode_prompt(ours(theirs), TextTokenizer.from_folder(folder), prompts)
    expected = pipeline._get_t5_prompt_embeds(prompts, max_sequence_length=rows, device=torch.device("cpu"))
    assert made.shape == expected.shape == (len(prompts), rows, 48)
    assert error(made, expected) < 1e-6
    assert torch.equal(made == 0, expected == 0)


@torch.no_grad()
def test_rows_of_text(theirs: UMT5EncoderModel, folder: Path) -> None:
    write_config(folder, model_max_length=24)
    tokenizer = TextTokenizer.from_folder(folder)
    assert encode_prompt(ours(theirs), tokenizer, ["a"], 30).shape == (1, 30, 48)
    with pytest.raises(ValueError, match="up to 24"):
        encode_prompt(ours(theirs), tokenizer, ["a"], 23)
    ids, mask = tokenizer(["a " * 100, "red"])
    assert ids.shape == (2, 24) and ids[0, -1] == 1, "</s> stays at the end of a prompt that is cut"
    assert mask.sum(1).tolist() == [24, 2] and ids[1, :3].tolist() == [WORDS.index("red") + 3, 1, 0]


@given(
    st.text()
    | st.lists(st.sampled_from(["<", "&amp;", "lt;", "&#32;", "\u3000", "Ã©", "  ", "a", "\x1c", "\x85"])).map("".join)
)
@example("< &amp;lt; ftfy leaves escapes alone where there is a tag")
def test_prompts_are_cleaned_as_by_diffusers(text: str) -> None:
    assert clean_prompt(text) == prompt_clean(text)


@pytest.mark.parametrize(
    ("limit", "rows"), [(16, 16), (512, 512), (10**30, 512), (1e30, 512), (None, 512), (float("inf"), 512)]
)
def test_the_length_of_text(folder: Path, limit: Any, rows: int) -> None:
    write_config(folder, model_max_length=limit)
    assert TextTokenizer.from_folder(folder).text_length == rows


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_max_length": 0}, "model_max_length is 0"),
        ({"model_max_length": "16"}, "model_max_length is '16'"),
        ({"model_max_length": float("nan")}, "model_max_length is nan"),
        ({"pad_token": "[PAD]"}, r"no token '\[PAD\]'"),
        ({"pad_token": None}, "no token None"),
        ({"truncation_side": "up"}, "is not a tokenizer"),
    ],
)
def test_broken_tokenizer_configs(folder: Path, config: dict[str, Any], message: str) -> None:
    write_config(folder, **config)
    with pytest.raises(CheckpointError, match=message):
        TextTokenizer.from_folder(folder)


@pytest.mark.parametrize("text", [None, "", "{}", '{"model": 1}', "\x00"])
def test_broken_tokenizers(tmp_path: Path, text: str | None) -> None:
    write_config(tmp_path)
    if text is not None:
        (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match="tokenizer.json is"):
        TextTokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is missing"):
        TextTokenizer.from_folder(tmp_path)


def test_an_older_way_to_write_the_padding(folder: Path) -> None:
    write_config(folder, pad_token={"content": "<pad>", "special": True})
    assert TextTokenizer.from_folder(folder).pad_id == 0
