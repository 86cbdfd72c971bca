"""Weights that are used where they lie in their files."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fastvid
from fastvid.device import mapped
from fastvid.device.devices import available_bytes
from fastvid.errors import CheckpointError
from fastvid.layers.fused import FusedLinear
from fastvid.loaders import safetensors


class Layers(nn.Module):
    """The weights that loading treats in different ways: used in place, copied into a product, converted."""

    FP32_PARTS = ("norm",)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(5, 3), nn.LayerNorm(3)
        self.fused = FusedLinear(4, 4, 2)
        self.to_q, self.to_k = self.fused.layers()


def written(file: Path, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    state = {name: tensor.to(dtype).clone() for name, tensor in Layers().state_dict().items()}
    save_file(state, file)
    return state


def loaded(file: Path, dtype: torch.dtype = torch.bfloat16) -> Layers:
    with torch.device("meta"):
        module = Layers()
    safetensors.load_into(module, [file], dtype=dtype, mapped=(file,))
    return module


def test_values_and_places(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    state, module = written(file), loaded(file)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, state[name].to(tensor.dtype)), name
    assert module.norm.weight.dtype == torch.float32
    (one,) = [one for one in mapped._OPEN if one.path == file]
    assert one.taken == sum(state[name].nbytes for name in state if name.startswith("first"))
    first = torch.frombuffer(one, dtype=torch.uint8).data_ptr()
    assert first <= module.first.weight.data_ptr() < first + len(one) and module.first.weight.is_leaf
    del module, one
    gc.collect()
    assert not [one for one in mapped._OPEN if one.path == file]  # unmapped, and its descriptor closed


def test_a_tensor_at_an_odd_place_is_copied(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    state = written(file)
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    for odd in (1, 2, 3):
        file.write_bytes((length + odd).to_bytes(8, "little") + data[8 : 8 + length] + b" " * odd + data[8 + length :])
        module = loaded(file)
        assert all(torch.equal(one, state[name].to(one.dtype)) for name, one in module.state_dict().items())
        gc.collect()
        taken = max((one.taken for one in mapped._OPEN if one.path == file), default=0)
        assert (taken == 0) == bool(odd % 2)  # odd places are no multiples of two bytes


def test_writing_to_weights_leaves_the_file(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    written(file)
    before, module = file.read_bytes(), loaded(file)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    assert file.read_bytes() == before
    file.chmod(0o400)
    assert torch.equal(loaded(file).first.weight, load_file(file)["first.weight"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(tmp_path: Path, value: float) -> None:
    file = tmp_path / "m.safetensors"
    state = written(file)
    for name in ("first.weight", "to_k.weight", "norm.bias"):
        save_file(state | {name: torch.full_like(state[name], value)}, file)
        with pytest.raises(CheckpointError, match=f"{name} holds NaN or infinity"):
            loaded(file)


def test_a_file_that_shrinks_before_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "m.safetensors"
    written(file)
    mapping = safetensors.map_file

    def cut(opened: object, path: Path) -> mapped.MappedFile:
        os.truncate(path, path.stat().st_size - 8)
        return mapping(opened, path)

    monkeypatch.setattr(safetensors, "map_file", cut)
    with pytest.raises(CheckpointError, match="ended while it was read"):
        loaded(file)


# ---------------------------------------------------------------- models


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mapped")
    tiny.write_checkpoint(folder)
    return folder


def frames(pipe: fastvid.Pipeline) -> bytes:
    return pipe.generate("a", seed=1, num_inference_steps=2, num_frames=5, height=64, width=64).frames.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_frames(folder: Path, dtype: str) -> None:
    read, in_place = (fastvid.load(str(folder), device="cpu", dtype=dtype, mmap=one) for one in (False, True))
    assert frames(read) == frames(in_place)
    assert read.describe()["mapped"] == [] and str(folder) in in_place.describe()["mapped"][0]
    assert 0 < mapped.bytes_mapped(in_place._model.placement.mapped) <= in_place._model.bytes_held


def test_a_file_that_is_written_into_is_told(tmp_path: Path) -> None:
    folder = tmp_path
    tiny.write_checkpoint(folder)
    pipe = fastvid.load(str(folder), device="cpu", mmap=True)
    first, file = frames(pipe), Path(pipe.describe()["mapped"][0])
    copy = file.with_suffix(".new")
    copy.write_bytes(b"other bytes")
    content = file.read_bytes()
    copy.rename(file)  # replaced: the pipeline keeps the old file
    assert frames(pipe) == first
    file.write_bytes(content)
    pipe = fastvid.load(str(folder), device="cpu", mmap=True)
    with file.open("r+b") as opened:
        opened.seek(-4, os.SEEK_END)
        opened.write(b"\0\0\0\0")
    with pytest.raises(CheckpointError, match=f"{file.name} was written into while a pipeline used weights"):
        frames(pipe)


def test_what_is_mapped_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large files on local disks, for a CPU alone."""
    small = tmp_path / "small"
    small.write_bytes(b"x")
    assert "less than 64 MiB" in str(mapped.why_not(small))
    monkeypatch.setattr(mapped, "SMALLEST", 0)
    monkeypatch.setattr(mapped, "MOUNTS", tmp_path / "mounts")
    network = tmp_path / "a network"
    network.mkdir()
    far, near = network / "f", tmp_path / "f"
    far.write_bytes(b"x")
    near.write_bytes(b"x")
    lines = [f"1 0 8:1 / {point} rw - {kind} none rw" for point, kind in (("/", "ext4"), (network, "nfs4"))]
    mapped.MOUNTS.write_text("\n".join(lines).replace("a network", "a\\040network"))
    assert mapped.why_not(near) is None and "of kind nfs4" in str(mapped.why_not(far))
    cpu, both = torch.device("cpu"), [near, far]
    assert mapped.files_to_map(both, "auto", cpu) == {near}
    assert mapped.files_to_map(both, True, cpu) == {near, far}
    assert not mapped.files_to_map(both, False, cpu) | mapped.files_to_map(both, True, torch.device("cuda"))


def test_mapped_weights_are_not_free() -> None:
    cpu = torch.device("cpu")
    assert available_bytes(cpu, 1 << 60) == 0 < available_bytes(cpu)
