"""Weights that are not finite, or would not be in the type that they are loaded as, are refused by file and name."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import fastvid
from fastvid.errors import CheckpointError
from fastvid.loaders import safetensors
from fastvid.loaders.finite import Weight, _first_infinite, check_finite
from fastvid.models.wan.weight_names import Origin

KINDS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def weight(stored: torch.dtype, target: torch.dtype) -> Weight:
    return Weight(Path("f"), "w", stored, target)


@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("stored", KINDS)
def test_the_first_infinite_number(stored: torch.dtype, target: torch.dtype) -> None:
    """The number itself is infinite as the target, the one below it is not."""
    limit = torch.tensor(_first_infinite(stored, target), dtype=stored)
    below = torch.nextafter(limit, torch.zeros_like(limit)) if limit.isfinite() else torch.finfo(stored).max
    assert torch.isinf(limit.to(target)) and torch.isfinite(torch.as_tensor(below, dtype=stored).to(target))


@settings(max_examples=300, deadline=None)
@given(
    stored=st.sampled_from(KINDS),
    target=st.sampled_from(KINDS),
    value=st.floats(allow_nan=True, allow_infinity=True),
    place=st.integers(0, 36),
)
def test_what_is_refused_is_what_is_not_finite_after_the_cast(
    stored: torch.dtype, target: torch.dtype, value: float, place: int
) -> None:
    values = torch.linspace(-1, 1, 37).to(stored)
    values[place] = torch.tensor(value, dtype=torch.float64).to(stored)
    if bool(torch.isfinite(values.to(target)).all()):
        check_finite(values, weight(stored, target))
        return
    with pytest.raises(CheckpointError, match="f: w holds .*" + ("overflow" if values.isfinite().all() else "NaN")):
        check_finite(values, weight(stored, target))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = nn.Linear(3, 2), nn.Linear(1500, 1501)  # more than one read


def load(path: Path, dtype: torch.dtype = torch.float32, **options: object) -> nn.Module:
    with torch.device("meta"):
        module = Two()
    safetensors.load_into(module, [path], dtype=dtype, **options)
    return module


@pytest.mark.parametrize("place", [0, 1_234_567, -1])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("stored", KINDS)
def test_every_place_is_looked_at(tmp_path: Path, stored: torch.dtype, value: float, place: int) -> None:
    state = {name: tensor.to(stored) for name, tensor in Two().state_dict().items()}
    file = tmp_path / "m.safetensors"
    save_file(state, file)
    load(file)
    state["large.weight"].view(-1)[place] = value
    save_file(state, file)
    for target in (torch.float32, torch.bfloat16):
        with pytest.raises(CheckpointError, match=r"m\.safetensors: large\.weight holds NaN or infinity"):
            load(file, target)
    load(file, only={"small.weight", "small.bias", "large.bias"})  # what is not read is not looked at


def test_an_overflow_in_half_precision(tmp_path: Path) -> None:
    state = Two().state_dict()
    file = tmp_path / "m.safetensors"
    for value, fits in ((65519.0, True), (65520.0, False), (-65520.0, False)):
        state["small.bias"][1] = value
        save_file(state, file)
        load(file, torch.bfloat16)
        if fits:
            assert load(file, torch.float16).get_parameter("small.bias")[1] == 65504
            continue
        with pytest.raises(CheckpointError, match="small.bias holds 6.552e.04, which overflows in float16"):
            load(file, torch.float16)


def test_weights_of_other_names(tmp_path: Path) -> None:
    """What a weight is made of is named as it stands in the file."""
    state = {f"old.{name}": tensor for name, tensor in Two().state_dict().items()}
    state["old.small.weight"][0, 0] = math.nan
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="old.small.weight holds NaN"):
        load(tmp_path / "m.safetensors", origins={name.removeprefix("old."): Origin((name,)) for name in state})


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_any_part_of_a_model(tmp_path: Path, part: str) -> None:
    tiny.write_checkpoint(tmp_path / "m", num_layers=1)
    file = next((tmp_path / "m" / part).glob("*.safetensors"))
    state = load_file(file)
    name = sorted(state)[-1]
    state[name].view(-1)[0] = math.inf
    save_file(state, file)
    with pytest.raises(CheckpointError, match=rf"{part}.*{name} holds NaN or infinity"):
        fastvid.load(str(tmp_path / "m"), device="cpu")
