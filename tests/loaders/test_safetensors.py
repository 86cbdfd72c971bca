"""Safetensors files: found, described, checked and streamed into modules; and every way in which they can be broken."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import Tensor, nn

from fastvid.errors import CheckpointError
from fastvid.loaders import safetensors, weight_files

NAME = "diffusion_pytorch_model.safetensors"


class Small(nn.Module):
    """A module with a part kept in fp32, a parameter at the top, and a name that stands for another."""

    FP32_PARTS = ("norm1",)
    ALIASES = {"embed.weight": "first.weight"}

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.inner = nn.ModuleDict({"norm1": nn.LayerNorm(5), "norm12": nn.RMSNorm(5)})
        self.table = nn.Parameter(torch.zeros(1, 6, 5))


def on_meta() -> Small:
    with torch.device("meta"):
        return Small()


def state(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(tensor.shape).to(dtype) for name, tensor in Small().state_dict().items()}


def write_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Two files and their index."""
    names = sorted(tensors)
    table = {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        table |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": table}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_weights_are_loaded(tmp_path: Path, sharded: bool, stored: torch.dtype, wanted: torch.dtype) -> None:
    tensors = state(stored)
    if sharded:
        write_shards(tmp_path, tensors)
    else:
        save_file(tensors, tmp_path / NAME)
    module = on_meta()
    safetensors.load_into(module, weight_files.find_files(tmp_path), "cpu", wanted)
    for name, tensor in module.state_dict().items():
        target = torch.float32 if "norm1." in name else wanted
        assert tensor.dtype == target and torch.equal(tensor, tensors[name].to(target)), name
    assert not module.training and not any(p.requires_grad for p in module.parameters())


def test_a_file_may_change_after_it_was_loaded(tmp_path: Path) -> None:
    tensors = state()
    save_file(tensors, tmp_path / NAME)
    module = on_meta()
    safetensors.load_into(module, [tmp_path / NAME])
    with (tmp_path / NAME).open("r+b") as file:
        file.write(b"\xff" * 4096)
        file.truncate(16)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("both", [False, True])
def test_a_name_that_stands_for_another(tmp_path: Path, both: bool) -> None:
    tensors = state()
    tensors["embed.weight"] = tensors["first.weight"].clone() if both else tensors.pop("first.weight")
    save_file(tensors, tmp_path / NAME)
    module = on_meta()
    safetensors.load_into(module, [tmp_path / NAME])
    assert torch.equal(module.first.weight, tensors["embed.weight"])


def test_headers_tell_sizes_and_types(tmp_path: Path) -> None:
    tensors = state(torch.bfloat16) | {"table": torch.zeros(1, 6, 5), "scalar": torch.tensor(1.0)}
    save_file(tensors, tmp_path / NAME, metadata={"format": "pt"})
    entries = safetensors.read_header(tmp_path / NAME)
    assert {name: entry.shape for name, entry in entries.items()} == {n: tuple(t.shape) for n, t in tensors.items()}
    assert safetensors.count_parameters(entries) == sum(tensor.numel() for tensor in tensors.values())
    assert safetensors.dtypes(entries) == ("BF16", "F32") or safetensors.dtypes(entries) == ("F32", "BF16")
    assert entries["table"] == safetensors.Entry("F32", (1, 6, 5), tmp_path / NAME)


def test_the_most_frequent_type_comes_first(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2), "b": torch.zeros(3, dtype=torch.float16)}, tmp_path / NAME)
    assert safetensors.dtypes(safetensors.read_header(tmp_path / NAME)) == ("F16", "F32")


def broken(change: Callable[[dict[str, Tensor]], Any]) -> dict[str, Tensor]:
    tensors = state()
    change(tensors)
    return tensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("table"), "missing weights: table"),
        (lambda t: t.update(extra=torch.zeros(1)), "weights that the model does not have: extra"),
        (lambda t: t.update(table=torch.zeros(1, 5, 6)), r"wrong shapes: table \[1, 5, 6\] for \[1, 6, 5\]"),
        (lambda t: t.update(table=torch.zeros(1, 6, 5, dtype=torch.int8)), r"a dtype other than .*: I8 \(table\)"),
        (lambda t: t.update({f"x{i:02}": torch.zeros(1) for i in range(13)}), "x00, .*, x09 and 3 more$"),
        (lambda t: (t.pop("table"), t.update(tabel=torch.zeros(1))), "missing weights: table; weights .*: tabel"),
        (lambda t: t.clear(), "missing weights: first.bias, first.weight, .*, table"),
    ],
)
def test_weights_that_do_not_fit(tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], message: str) -> None:
    save_file(broken(change), tmp_path / NAME)
    module = on_meta()
    with pytest.raises(CheckpointError, match=message) as caught:
        safetensors.load_into(module, [tmp_path / NAME])
    assert str(tmp_path / NAME) in str(caught.value) and "Small" in str(caught.value)
    assert module.table.is_meta, "nothing may be loaded"


WHOLE = save(state())


@given(st.integers(0, len(WHOLE) - 1))
def test_a_cut_file_is_told(tmp_path_factory: pytest.TempPathFactory, length: int) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.safetensors"
    path.write_bytes(WHOLE[:length])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors .*download it again"):
        safetensors.read_header(path)


@given(st.integers(0, 1200), st.binary(min_size=1, max_size=20))
def test_a_damaged_file_is_told_or_read(tmp_path_factory: pytest.TempPathFactory, at: int, noise: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(WHOLE[:at] + noise + WHOLE[at + len(noise) :])
    try:
        safetensors.load_into(on_meta(), [path])
    except CheckpointError as error:
        assert "damaged.safetensors" in str(error)


# A part of what is said of each, with its header.
BROKEN, INVALID, SIZE = "has a broken safetensors header", "is not a valid safetensors file", "where its header needs"
HEADERS = [
    ("[]", BROKEN),
    ("{", BROKEN),
    ('{"a": 1}', BROKEN),
    ('{"a": {"dtype": "F32"}}', BROKEN),
    ('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}', BROKEN),
    ('{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}', BROKEN),
    ('{"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}', BROKEN),
    ('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}', SIZE),
    ('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', INVALID),
    ('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}, "b": {"dtype": "F32"}}', BROKEN),
    ("[" * 100_000, BROKEN),
    ("\xff", BROKEN),
]


@pytest.mark.parametrize(("header", "message"), HEADERS, ids=range(len(HEADERS)))
def test_a_broken_header_is_told(tmp_path: Path, header: str, message: str) -> None:
    text = header.encode("latin-1")
    (tmp_path / NAME).write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    with pytest.raises(CheckpointError, match=f"{NAME} .*{message}"):
        safetensors.read_header(tmp_path / NAME)


def test_gaps_in_a_file_are_told(tmp_path: Path) -> None:
    """Only the safetensors library looks for these; a header alone seems sound."""
    text = b'{"table": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}'
    (tmp_path / NAME).write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    module = nn.Module()
    module.table = nn.Parameter(torch.empty(1, device="meta"))
    with pytest.raises(CheckpointError, match=f"{NAME} is not a valid safetensors file"):
        safetensors.load_into(module, [tmp_path / NAME])


class Bomb:
    """Something that shows if it is ever unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('unpickled')",)


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    with (tmp_path / NAME).open("wb") as file:
        pickle.dump(Bomb(), file)
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        safetensors.load_into(on_meta(), [tmp_path / NAME])


@pytest.mark.parametrize("name", ["pytorch_model.bin", "Wan2.1_VAE.pth", "model.pt", "a.ckpt"])
def test_pickles_alone_are_told(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=rf"pickles only \({name}\).*fastvid convert"):
        weight_files.find_files(tmp_path)


def test_finding_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no \.safetensors file"):
        weight_files.find_files(tmp_path)
    (tmp_path / "a.safetensors").touch()
    assert weight_files.find_files(tmp_path) == (tmp_path / "a.safetensors",)
    (tmp_path / "b.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"several weights \(a\.safetensors, b\.safetensors\)"):
        weight_files.find_files(tmp_path)
    (tmp_path / NAME).touch()
    assert weight_files.find_files(tmp_path) == (tmp_path / NAME,)
    write_shards(tmp_path, state())
    assert [path.name[:11] for path in weight_files.find_files(tmp_path)] == ["model-00001", "model-00002"]
    with pytest.raises(CheckpointError, match="nowhere is missing"):
        weight_files.find_files(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "holds a JSON list"),
        ("\xff\xfe", "cannot be read as JSON"),
        ("{}", 'no "weight_map"'),
        ('{"weight_map": {}}', 'no "weight_map"'),
        ('{"weight_map": {"a": 1}}', 'no "weight_map"'),
        ('{"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}', "lacks x.safetensors, y.safetensors, of 2"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "outside its folder: ../x.safetensors"),
        ('{"weight_map": {"a": "/etc/x.safetensors"}}', "outside its folder"),
        ('{"weight_map": {"a": "C:\\\\x.safetensors"}}', "outside its folder"),
        ('{"weight_map": {"a": "b\\\\..\\\\..\\\\x.safetensors"}}', "outside its folder"),
        ('{"weight_map": {"a": ""}}', "outside its folder"),
        ('{"weight_map": {"a": "pytorch_model.bin"}}', "not safetensors: pytorch_model.bin"),
    ],
)
def test_broken_indices(tmp_path: Path, index: str, message: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(index.encode("latin-1"))
    with pytest.raises(CheckpointError, match=message) as caught:
        weight_files.find_files(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    files = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    for file in files:
        save_file({"table": torch.zeros(1, 6, 5)}, file)
    with pytest.raises(CheckpointError, match="table in both"):
        safetensors.load_into(on_meta(), files)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        safetensors.read_header(tmp_path / NAME)
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="folder.safetensors cannot be read"):
        safetensors.read_header(tmp_path / "folder.safetensors")
