"""Damaged files of torch.save, as the child process reads them: each is refused, or read as what it holds."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path
from random import Random

import pytest
import torch
from mutations import damaged, fuzz, peak, refuses, seeds, untouched

from fastvid.errors import CheckpointError
from fastvid.loaders import pickles
from fastvid.loaders.pickles import PickleReader, Refused

STATE = {
    "blocks.0.weight": torch.arange(24.0).reshape(4, 6),
    "blocks.0.bias": torch.arange(3).to(torch.bfloat16),
    "steps": torch.tensor(5),
    "half": torch.arange(12.0).half().reshape(3, 4).T,
}


def within(data: bytes, random: Random) -> bytes:
    """A file whose pickle or sizes of records are damaged, but whose parts fit together."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as new:
        victim = random.choice(old.namelist())
        for name in old.namelist():
            held = old.read(name)
            new.writestr(name, damaged(held, random) if name == victim or name.endswith("data.pkl") else held)
    return made.getvalue()


@fuzz(10_000)
def test_damaged_pickles(tmp_path: Path, count: int) -> None:
    path = tmp_path / "x.pt"
    torch.save(STATE, path)
    whole = path.read_bytes()
    refused = 0

    def read() -> None:
        for name, tensor in pickles._load(str(path)).items():
            assert isinstance(name, str)
            assert tensor.nbytes <= len(whole) * 4
            tensor.contiguous()

    with peak(64), untouched(tmp_path, path):
        for random in seeds("pickles", count):
            path.write_bytes(damaged(whole, random) if random.random() < 0.4 else within(whole, random))
            refused += refuses(read, Refused)
    assert 0.2 * count < refused < count


def rewritten(tmp_path: Path, state: object, compression: int = zipfile.ZIP_STORED, held: int | None = None) -> Path:
    """What torch.save makes of a state, with its records compressed, or its first storage cut to `held` bytes."""
    torch.save(state, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as old, zipfile.ZipFile(tmp_path / "x.pt", "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name)[: held if name.endswith("data/0") else None])
    return tmp_path / "x.pt"


@pytest.mark.parametrize("held", [0, 3, 95])
def test_a_storage_that_is_shorter_than_its_tensor(tmp_path: Path, held: int) -> None:
    """torch would read on into the next record."""
    with pytest.raises(Refused, match="is damaged .* storage 0 has 96 bytes"):
        pickles._load(str(rewritten(tmp_path, STATE, held=held)))


def test_a_storage_that_ends_in_the_next_record(tmp_path: Path) -> None:
    """Its size in the list of records is a lie."""
    path = rewritten(tmp_path, STATE, held=40)
    data = path.read_bytes()
    at = data.rindex(b"PK\1\2", 0, data.rindex(b"data/0"))
    path.write_bytes(data[: at + 20] + (96).to_bytes(4, "little") * 2 + data[at + 28 :])
    with pytest.raises(Refused, match="is damaged"):
        pickles._load(str(path))


def test_a_compressed_storage(tmp_path: Path) -> None:
    """torch would take the compressed bytes for numbers."""
    with pytest.raises(Refused, match="does not hold as they are"):
        pickles._load(str(rewritten(tmp_path, {"a": torch.zeros(1000)}, zipfile.ZIP_DEFLATED)))


def test_a_number_that_is_repeated(tmp_path: Path) -> None:
    path = rewritten(tmp_path, {"a": torch.zeros(1).expand(2**26), "b": torch.ones(4)})
    with pytest.raises(CheckpointError, match=r"x\.pt holds a as \[67108864\]"), PickleReader(path):
        pass


def test_a_storage_that_is_shared_very_often(tmp_path: Path) -> None:
    one = torch.ones(1000)
    with pytest.raises(Refused, match="share so often"):
        pickles._load(str(rewritten(tmp_path, {str(index): one for index in range(100)})))
    tied = pickles._load(str(rewritten(tmp_path, {"embedding": one, "head": one, "part": one[10:20]})))
    assert {name: tensor.nbytes for name, tensor in tied.items()} == {"embedding": 4000, "head": 4000, "part": 40}


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"x\.pt cannot be read: not an ordinary file"):
        PickleReader(tmp_path / "x.pt")
