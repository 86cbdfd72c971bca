"""Several linear layers as one: what state dicts see of it, and what it holds when they are loaded."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastvid.layers.fused import FusedLinear
from fastvid.loaders.safetensors import load_into

NAMES = ("a", "b", "c")
KEYS = [f"{name}.{kind}" for name in NAMES for kind in ("weight", "bias")]


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.abc = FusedLinear(3, 2, 3)
        self.a, self.b, self.c = self.abc.layers()


class Apart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(3, 2) for _ in NAMES)


def made(kind: type[nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return kind()


def on_meta() -> Fused:
    with torch.device("meta"):
        return Fused()


def holds(module: nn.Module, state: dict[str, Tensor]) -> bool:
    """Whether the whole, which computes, has what a state dict says, and says so itself."""
    weight, bias = (torch.cat([state[f"{name}.{kind}"] for name in NAMES]) for kind in ("weight", "bias"))
    own = module.state_dict()
    said = list(own) == KEYS and all(torch.equal(own[key], state[key]) for key in KEYS)
    return said and torch.equal(module.abc.weight, weight) and torch.equal(module.abc.bias, bias)


def test_it_begins_as_layers_by_themselves_would() -> None:
    assert holds(made(Fused), made(Apart).state_dict())
    assert [name for name, _ in made(Fused).named_parameters()] == ["abc.weight", "abc.bias"]


@pytest.mark.parametrize("assign", [False, True])
def test_it_loads_what_layers_by_themselves_save(assign: bool) -> None:
    state = made(Apart, 1).state_dict()
    module = made(Fused)
    module.load_state_dict(state, assign=assign)
    assert holds(module, state) and not holds(made(Fused), state)
    apart = made(Apart)
    apart.load_state_dict(module.state_dict())
    assert all(torch.equal(tensor, state[key]) for key, tensor in apart.state_dict().items())


def test_a_saved_state_is_a_view() -> None:
    module = made(Fused)
    state = module.state_dict()
    module.abc.weight.data[2] = 7.0
    assert torch.equal(state["b.weight"][0], torch.full((3,), 7.0)) and not state["b.weight"].requires_grad
    assert module.state_dict(keep_vars=True)["b.weight"].requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_assigned_it_takes_the_type_and_else_it_keeps_its_own(dtype: torch.dtype) -> None:
    state = made(Apart, 1).to(dtype).state_dict()
    module, whole = made(Fused), on_meta()
    module.load_state_dict(state)
    assert module.abc.weight.dtype == torch.float32 and torch.equal(
        module.b.state_dict()["bias"].to(dtype), state["b.bias"]
    )
    whole.load_state_dict(state, assign=True)
    assert holds(whole, state) and whole.abc.weight.dtype == dtype


@torch.no_grad()
def test_one_layer_is_loaded_and_the_others_stay() -> None:
    module, state = made(Fused), made(Fused).state_dict()
    mine = {key: tensor.clone() for key, tensor in state.items()} | {"b.weight": torch.ones(2, 3)}
    parameter = module.abc.weight
    module.b.load_state_dict({"weight": torch.ones(2, 3)}, strict=False, assign=True)
    assert holds(module, mine) and module.abc.weight is parameter, "offloading knows weights by their parameters"
    module.b.load_state_dict({"weight": torch.ones(2, 3, dtype=torch.float64)}, strict=False, assign=True)
    assert module.abc.weight.dtype == torch.float64 and torch.equal(module.abc.weight.float(), parameter)


def test_what_does_not_fit_is_named() -> None:
    state = made(Apart).state_dict()
    wrong = {**state, "a.weight": torch.ones(3, 2), "c.gain": torch.ones(1)}
    del wrong["b.bias"]
    with pytest.raises(RuntimeError, match=r"(?s)Missing.*b\.bias.*Unexpected.*c\.gain.*size mismatch for a\.weight"):
        made(Fused).load_state_dict(wrong)


def test_copies_and_moves_stay_whole() -> None:
    module = made(Fused)
    other = copy.deepcopy(module).double()
    other.load_state_dict(made(Apart, 1).state_dict())
    assert holds(module, made(Apart).state_dict()) and not torch.equal(module.abc.weight.double(), other.abc.weight)
    assert (
        torch.equal(other.b.state_dict()["weight"], other.abc.weight[2:4]) and other.abc.weight.dtype == torch.float64
    )


def test_files(tmp_path: Path) -> None:
    path, state = tmp_path / "x.safetensors", made(Apart, 1).state_dict()
    save_file(state, path)
    module = on_meta()
    load_into(module, [path])
    assert holds(module, state) and not module.abc.weight.requires_grad and not module.training
    changed = {"b.weight": state["b.weight"] + 1}
    load_into(module, [path], merge=lambda name, tensor: changed.get(name, tensor), only=changed)
    assert holds(module, state | changed)
    save_file(module.state_dict(), tmp_path / "y.safetensors")
    again = load_file(tmp_path / "y.safetensors")
    assert again.keys() == state.keys() and all(torch.equal(again[key], (state | changed)[key]) for key in KEYS)
