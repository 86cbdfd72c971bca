"""Damaged headers, indexes, configs, tokenizers and LoRAs: each is read, or refused with an error of ours, soon and in
little memory. Nothing is written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from mutations import damaged, damaged_json, fuzz, nested, peak, refuses, seeds, untouched
from safetensors.torch import save_file

from fastvid.errors import CheckpointError, Error
from fastvid.loaders import safetensors, weight_files
from fastvid.loaders.checkpoint import open_checkpoint
from fastvid.loaders.find import read_tokenizer
from fastvid.loaders.lora import read_lora
from fastvid.loaders.peft_settings import HEADER_KEY
from fastvid.models.common.config_reader import MAX_JSON, parse_json, read_json

HEADER = {
    "__metadata__": {"format": "pt"},
    "a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}
INDEX = {"metadata": {"total_size": 32}, "weight_map": {"a.weight": "x.safetensors", "b": "y.safetensors"}}
CONFIGS = (
    *("model_index.json", "scheduler/scheduler_config.json", "transformer/config.json", "vae/config.json"),
    *("text_encoder/config.json", "tokenizer/tokenizer_config.json", "tokenizer/tokenizer.json"),
)
ADAPTER = {"r": 4, "lora_alpha": 8, "alpha_pattern": {"to_q": 2}, "rank_pattern": {}, "use_rslora": False}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the model that ships with the package."""
    return Path(shutil.copytree(open_checkpoint("embedded").folder, tmp_path / "model"))


def write_header(path: Path, text: bytes, data: bytes = b"", length: int | None = None) -> None:
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


@fuzz(10_000)
def test_headers_and_indexes(tmp_path: Path, count: int) -> None:
    part, path = tmp_path / "part", tmp_path / "x.safetensors"
    part.mkdir()
    index = part / "m.safetensors.index.json"
    for name in ("x", "y"):
        (part / f"{name}.safetensors").touch()
    refused = 0
    with peak(64), untouched(tmp_path, path, index):
        for random in seeds("headers", count):
            if random.random() < 0.3:
                index.write_bytes(damaged_json(INDEX, random))
                refused += refuses(lambda: weight_files.find_files(part))
                continue
            text = damaged_json(HEADER, random) if random.random() < 0.9 else json.dumps(HEADER).encode()
            lie = random.choice((0,) * 12 + (1, -1, 2**40, 2**64 - 1 - len(text)))
            write_header(path, text, bytes(random.choice((32, 32, 32, 0, 31, 33))), max(0, len(text) + lie))
            if random.random() < 0.2:
                path.write_bytes(damaged(path.read_bytes(), random))
            refused += refuses(lambda: safetensors.read_header(path))
    assert 0.5 * count < refused < count


@fuzz(10_000, fast=30)
def test_configs(folder: Path, count: int) -> None:
    whole = {name: (folder / name).read_bytes() for name in CONFIGS}
    refused = 0

    def read() -> None:
        checkpoint = open_checkpoint(folder).check()
        checkpoint.to_dict()
        if name.startswith("tokenizer"):
            read_tokenizer(checkpoint.tokenizer)(["a red circle"])

    assert not refuses(lambda: open_checkpoint(folder).check())
    with peak(64), untouched(folder, *(folder / name for name in CONFIGS)):
        for random in seeds("configs", count):
            name = random.choice(CONFIGS)
            (folder / name).write_bytes(damaged_json(json.loads(whole[name]), random))
            refused += refuses(read)
            (folder / name).write_bytes(whole[name])
    assert 0.3 * count < refused < count
    assert not refuses(lambda: open_checkpoint(folder).check())


@fuzz(2_000)
def test_adapter_configs(tmp_path: Path, count: int) -> None:
    """Beside the weights, and in their header."""
    module = "blocks.0.attn1.to_q"
    tensors = {f"transformer.{module}.lora_{one}.weight": torch.ones(4, 4) for one in "AB"}
    path, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    for random in seeds("adapters", count):
        data = damaged_json(ADAPTER, random)
        inside = random.random() < 0.3
        metadata = {HEADER_KEY: data.decode(errors="replace")} if inside else None
        save_file(tensors, path, metadata)
        config.write_bytes(data)
        refuses(lambda: read_lora(path), Error)


# ---------------------------------------------------------------- what is no file, or too large


@pytest.mark.parametrize("name", [*CONFIGS, "vae/diffusion_pytorch_model.safetensors"])
def test_pipes_and_giants(folder: Path, name: str) -> None:
    """A pipe that nobody writes to, and a sparse file of a terabyte."""
    path = folder / name
    size = path.stat().st_size
    os.truncate(path, 2**40)
    with peak(64):
        assert refuses(lambda: open_checkpoint(folder).check())
    path.unlink()
    os.mkfifo(path)
    assert refuses(lambda: open_checkpoint(folder).check())
    with pytest.raises(CheckpointError, match=path.name):
        open_checkpoint(folder).check()
    assert size


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":"' + b"x" * MAX_JSON + b'"}',
        b'{"a":[' + b"[]," * 1_000_000 + b"0]}",
        b'{"a":[' + b"1," * 1_000_000 + b"0]}",
        b"{" + b",".join(b'"%d":"a,b[c"' % number for number in range(100_002)) + b"}",
        str(nested(40, "list")).encode(),
        b'{"a":' * 100_000,
        b'{"a":' + b"9" * 5000 + b"}",
        b'{"a":1,"a":2}',
        b"\xff\xfe{}",
    ],
    ids=range(9),
)
def test_texts_that_are_no_configs(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text)
    with peak(64):
        assert refuses(lambda: read_json(path))


def test_punctuation_in_strings_is_no_value() -> None:
    text = {"a": '[{,"' * 200_000, "b": "\\" * 9 + '"'}
    assert parse_json(json.dumps(text)) == text


@pytest.mark.parametrize("shape", [[-1], [1.0], [True], [2**63], [2**62, 4], [1] * 17, [[1]], "1", None, {}], ids=str)
def test_shapes_that_no_tensor_has(tmp_path: Path, shape: Any) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}).encode()
    write_header(tmp_path / "x.safetensors", header, bytes(4))
    with pytest.raises(CheckpointError, match="broken safetensors header"):
        safetensors.read_header(tmp_path / "x.safetensors")


def test_headers_of_very_many_tensors_or_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    entry = b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    for count in (20_001, 300_000):
        write_header(path, b"{" + b",".join(entry % number for number in range(count)) + b"}")
        with peak(64):
            assert refuses(lambda: safetensors.read_header(path))
    write_header(path, b'{"__metadata__":{"a":"' + b"x" * 20_000_000 + b'"}}')
    with peak(8):
        assert refuses(lambda: safetensors.read_header(path))
    write_header(path, b'{"__metadata__":{"tags":"' + b'[{,\\"' * 500_000 + b'"}}')  # what trainers note is long
    assert safetensors.read_header(path) == {}


# ---------------------------------------------------------------- networks that nobody publishes


@pytest.mark.parametrize(
    ("part", "values", "key"),
    [
        ("vae", {"dim_mult": [1] * 9, "temperal_downsample": [False] * 8}, "dim_mult"),
        ("vae", {"num_res_blocks": 100}, "num_res_blocks"),
        ("vae", {"latents_std": [0.0] * 16}, "latents_std"),
        ("vae", {"latents_std": [1e-40] * 16}, "latents_std"),
        ("vae", {"latents_mean": [1e39] * 16}, "latents_mean"),
        ("vae", {"base_dim": 2**40}, "base_dim"),
        ("transformer", {"ffn_dim": 10**400}, "ffn_dim"),
        ("transformer", {"patch_size": [1] * 5000}, "patch_size"),
        ("text_encoder", {"layer_norm_epsilon": 10**309}, "layer_norm_epsilon"),
        ("text_encoder", {"feed_forward_proj": "x" * 100_000}, "feed_forward_proj"),
    ],
)
def test_absurd_configs(folder: Path, part: str, values: dict[str, Any], key: str) -> None:
    path = folder / part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    assert refuses(lambda: open_checkpoint(folder).check())
    with pytest.raises(CheckpointError, match=key):
        open_checkpoint(folder).check()


@pytest.mark.parametrize(
    ("part", "key"),
    [
        ("transformer", "num_layers"),
        ("vae", "num_res_blocks"),
        ("text_encoder", "num_layers"),
    ],
)
@pytest.mark.parametrize("depth", [10**5, 2**62])
def test_a_depth_that_would_take_forever_to_build(folder: Path, part: str, key: str, depth: int) -> None:
    path = folder / part / "config.json"
    whole = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(whole) | {key: depth}))
        assert refuses(lambda: open_checkpoint(folder).check())
    finally:
        path.write_text(whole)


@pytest.mark.parametrize(
    "text",
    [
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": {"dtype": "F32", "shape": [1], '
        '"data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
    ],
)
def test_a_name_that_stands_twice(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text.encode() + bytes(4))
    with pytest.raises(CheckpointError, match="stands there twice"):
        safetensors.read_header(tmp_path / "a.safetensors")
    (tmp_path / "i.json").write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}')
    with pytest.raises(CheckpointError, match="'a' stands there twice"):
        read_json(tmp_path / "i.json")
