"""The Wan transformer against diffusers' on random weights, and each of its operations against its formula."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from gradients import gradients
from torch import Tensor
from wan_cases import (
    CONFIGS,
    SIZES,
    T2V,
    diffusers_model,
    empty,
    error,
    halved,
    inputs,
    ours,
    run_ours,
    run_theirs,
    their_class,
)

from fastvid.errors import CheckpointError, InvalidRequest
from fastvid.layers.embeddings import RotaryTables, rotary_table, timestep_sinusoid
from fastvid.models.wan.config import WanTransformerConfig
from fastvid.models.wan.transformer import group_timesteps
from fastvid.ops import reference

TIMESTEPS = ["sample", "frame", "token"]


CASES = [("t2v", one) for one in TIMESTEPS] + [(kind, "sample") for kind in ("i2v", "flf2v", "vace")]


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {kind: diffusers_model(kind) for kind in CONFIGS}


@pytest.fixture(scope="module")
def theirs(models: dict[str, Any]) -> WanTransformer3DModel:
    return models["t2v"]


# ---------------------------------------------------------------- every kind


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES, ids=" ".join)
@torch.no_grad()
def test_equals_diffusers(models: dict[str, Any], case: tuple[str, str], size: tuple[int, int, int]) -> None:
    kind, timesteps = case
    given = inputs(kind, size, timesteps)
    found = run_ours(ours(models[kind]), *given)
    assert found.shape == (2, 4, *size)
    assert error(found, run_theirs(models[kind], *given)) < 1e-6


@pytest.mark.parametrize("case", CASES, ids=" ".join)
@torch.no_grad()
def test_bf16_is_as_good_as_diffusers(models: dict[str, Any], case: tuple[str, str]) -> None:
    kind, timesteps = case
    given = inputs(kind, timesteps=timesteps)
    truth, half = run_theirs(models[kind], *given), halved(models[kind], diffusers_model(kind))
    model = empty(half)
    model.load_state_dict(half.state_dict(), assign=True)
    latents, timestep, *rest = given
    allowed = 2 * error(run_theirs(half, latents.bfloat16(), timestep, *(x.bfloat16() for x in rest)), truth)
    assert model.dtype == torch.bfloat16
    assert set(model.FP32_PARTS) == {"time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"}
    assert 0 < error(run_ours(model, *given), truth) <= allowed


@pytest.mark.parametrize("case", [("t2v", "token"), ("flf2v", "sample"), ("vace", "sample")], ids=" ".join)
def test_gradients_equal_diffusers(models: dict[str, Any], case: tuple[str, str]) -> None:
    kind, timesteps = case
    given, theirs = inputs(kind, timesteps=timesteps), models[kind]
    model = ours(theirs).train()
    theirs.zero_grad()
    run_theirs(theirs, *given).square().mean().backward()
    run_ours(model, *given).square().mean().backward()
    found = gradients(model)
    for name, parameter in theirs.named_parameters():
        assert error(found.pop(name), parameter.grad) < 1e-4, name
    assert not found


# What the published config.json files say.
PICTURE = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
SMALLER = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30, "vace_layers": list(range(0, 30, 2))}
PUBLISHED = [
    ("i2v-14b", PICTURE, 1303, 16.3949),
    ("flf2v-14b", {**PICTURE, "pos_embed_seq_len": 514}, 1304, 16.3955),
    ("i2v-a14b", {"in_channels": 36}, 1095, 14.2889),
    ("vace-1.3b", SMALLER, 1264, 2.154),
    ("vace-14b", {"vace_layers": list(range(0, 40, 5))}, 1331, 17.3376),
]


@pytest.mark.parametrize(("name", "config", "tensors", "billions"), PUBLISHED)
def test_published_models(name: str, config: dict[str, Any], tensors: int, billions: float) -> None:
    """Names and shapes are diffusers', their number that of the published files."""
    with torch.device("meta"):
        theirs = their_class(config)(**config, out_channels=16)
        model = empty(theirs)
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    assert shapes == {key: tensor.shape for key, tensor in theirs.state_dict().items()}
    assert len(shapes) == tensors
    assert sum(shape.numel() for shape in shapes.values()) / 1e9 == pytest.approx(billions, abs=5e-4)


# ---------------------------------------------------------------- text alone


@pytest.mark.parametrize("changes", [{"cross_attn_norm": False}, {"patch_size": (1, 1, 1)}, {"attention_head_dim": 34}])
@torch.no_grad()
def test_other_configurations_equal_diffusers(changes: dict[str, Any]) -> None:
    theirs = diffusers_model("t2v", **changes)
    latents, timestep, text = inputs("t2v", (3, 4, 6), "sample")
    assert error(ours(theirs)(latents, timestep, text), run_theirs(theirs, latents, timestep, text)) < 1e-6


@pytest.mark.parametrize("timestep", [[999, 3], [999.0, 0.5], [1000.0, 0.0], [123.4, 567.8]])
@torch.no_grad()
def test_timesteps_of_any_type_equal_diffusers(theirs: WanTransformer3DModel, timestep: list[float]) -> None:
    latents, _, text = inputs("t2v", (3, 6, 10), "sample")
    given = latents, torch.tensor(timestep), text
    assert error(ours(theirs)(*given), run_theirs(theirs, *given)) < 1e-6


def test_timestep_sinusoid_against_fp64() -> None:
    timestep = torch.tensor([0.0, 0.5, 3.0, 999.0])
    angle = timestep.double()[:, None] * 10000 ** (-torch.arange(128).double() / 128)
    assert error(timestep_sinusoid(timestep, 256), torch.cat((angle.cos(), angle.sin()), -1)) < 1e-5


@torch.no_grad()
def test_a_wrong_epsilon_or_gelu_would_be_seen(theirs: WanTransformer3DModel) -> None:
    given = inputs("t2v", (3, 6, 10), "sample")
    right = run_theirs(theirs, *given)
    wrong = ours(theirs)
    for block in wrong.blocks:
        block.eps = 1e-5
    assert error(wrong(*given), right) > 1e-6
    erf = ours(theirs, SimpleNamespace(**{**vars(reference), "linear_gelu_tanh": lambda *x: F.gelu(F.linear(*x))}))
    assert error(erf(*given), right) > 1e-6


@torch.no_grad()
def test_a_prepared_context_changes_nothing(theirs: WanTransformer3DModel) -> None:
    latents, timestep, text = inputs("t2v", (3, 6, 10), "frame")
    model = ours(theirs)
    context = model.prepare_context(text)
    assert torch.equal(model(latents, timestep, context), model(latents, timestep, text))
    assert len(context.layers) == 3 and context.layers[0][0].shape == (2, 7, 3, 24)


@torch.no_grad()
def test_samples_of_a_batch_do_not_meet(theirs: WanTransformer3DModel) -> None:
    latents, timestep, text = inputs("t2v", (3, 6, 10), "token")
    model = ours(theirs)
    both = model(latents, timestep, text)
    for i in range(2):
        alone = model(latents[i : i + 1], timestep[i : i + 1], text[i : i + 1])
        assert error(alone[0], both[i]) < 1e-6


@torch.no_grad()
def test_a_window_can_start_anywhere(theirs: WanTransformer3DModel) -> None:
    """Rotary attention sees differences of positions only, so an offset must not change a window's own result."""
    given = inputs("t2v", (3, 6, 10), "sample")
    model = ours(theirs)
    assert error(model(*given, rope_offset=2000), model(*given)) < 1e-5
    assert not torch.equal(model(*given, rope_offset=2000), model(*given))


def test_a_rotary_table_is_kept_for_the_next_step() -> None:
    cpu, rotary = torch.device("cpu"), RotaryTables(24)
    first = rotary((3, 2, 4), 5, cpu)
    assert all(a is b for a, b in zip(first, rotary((3, 2, 4), 5, cpu), strict=True))
    for grid, offset in (((3, 2, 4), 6), ((3, 2, 4), (5, 6, 8)), ((3, 4, 2), 5), ((3, 2, 4), 5)):
        wanted = rotary_table(grid, 24, offset=offset, device=cpu)
        assert all(torch.equal(a, b) for a, b in zip(rotary(grid, offset, cpu), wanted, strict=True)), (grid, offset)


def test_threads_share_rotary_tables() -> None:
    cpu, rotary = torch.device("cpu"), RotaryTables(24)
    with ThreadPoolExecutor(8) as pool:
        asked = [((1 + i % 3, 2, 3), i % 5) for i in range(400)]
        made = list(pool.map(lambda one: rotary(*one, cpu), asked))
    for (grid, offset), table in zip(asked, made, strict=True):
        assert torch.equal(table[0], rotary_table(grid, 24, offset=offset, device=cpu)[0]), (grid, offset)


def test_rotary_tables_of_inference_take_gradients() -> None:
    rotary = RotaryTables(24)
    with torch.inference_mode():
        cos, _ = rotary((1, 2, 2), 0, torch.device("cpu"))
    x = torch.ones_like(cos, requires_grad=True)
    (x * cos).sum().backward()
    assert torch.equal(x.grad, cos)


@pytest.mark.parametrize("head_dim", [24, 34, 64, 128])
def test_rotary_table(head_dim: int) -> None:
    whole = rotary_table((9, 3, 5), head_dim, device=torch.device("cpu"))
    part = rotary_table((4, 3, 5), head_dim, offset=5, device=torch.device("cpu"))
    for a, b in zip(whole, part, strict=True):
        assert b.shape == (4 * 3 * 5, head_dim // 2) and torch.equal(a[5 * 15 :], b)
    apart = rotary_table((3, 3, 5), head_dim, offset=(0, 5, 8), device=torch.device("cpu"))
    for a, b in zip(whole, apart, strict=True):
        assert torch.equal(a.view(9, 15, -1)[[0, 5, 8]].flatten(0, 1), b)
    cos, sin = whole
    torch.testing.assert_close(cos.square() + sin.square(), torch.ones_like(cos))
    theirs = WanTransformer3DModel(**{**T2V, "attention_head_dim": head_dim, "num_layers": 1}).rope
    expected = theirs(torch.empty(1, 4, 9, 6, 10))
    assert torch.equal(cos, expected[0][0, :, 0, ::2]) and torch.equal(sin, expected[1][0, :, 0, 1::2])


@torch.no_grad()
def test_every_operation_is_the_one_handed_in(theirs: WanTransformer3DModel) -> None:
    calls: dict[str, int] = {}

    def counted(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] = calls.get(name, 0) + 1
            return getattr(reference, name)(*args, **kwargs)

        return call

    names = [name for name in vars(reference) if callable(getattr(reference, name)) and not name.startswith("_")]
    ops = SimpleNamespace(**{name: counted(name) for name in names if name != "Tensor"})
    ours(theirs, ops)(*inputs("t2v", (1, 2, 2), "sample"))
    layers = T2V["num_layers"]
    assert calls == {
        "attention": 2 * layers,
        "linear": 7 * layers,
        "qkv_norm_rope": layers,
        "rms_norm": 2 * layers,
        "modulated_layer_norm": 1,
        "gated_residual_norm": layers - 1,
        "gated_residual_layer_norm": layers,
        "residual_norm": layers,
        "gated_residual": 1,
        "linear_gelu_tanh": layers + 1,
        "patch_embed": 1,
        "head": 1,
    }


GROUPS = [
    (torch.tensor([5.0, 5.0]), 2, 1),
    (torch.tensor([[0.0, 9.0, 9.0], [0.0, 0.0, 9.0]]), 2, 3),
    (torch.tensor([[0.0], [9.0]]).expand(2, 18), 2, 3),
    (torch.tensor([0.0] * 17 + [9.0]).expand(2, 18), 2, 18),
]


@pytest.mark.parametrize(("timestep", "distinct", "groups"), GROUPS)
def test_timesteps_are_grouped(timestep: Tensor, distinct: int, groups: int) -> None:
    values, index = group_timesteps(timestep, 2, (3, 2, 3))
    assert values.shape == (distinct,) and index.shape == (2, groups)
    wide = timestep[:, None] if timestep.ndim == 1 else timestep
    expected = wide.repeat_interleave(18 // wide.shape[1], dim=1)
    assert torch.equal(values[index].repeat_interleave(18 // groups, dim=1), expected)


@pytest.mark.parametrize("shape", [(3,), (2, 2), (2, 17), (1, 18), (2, 18, 1), ()])
def test_other_timesteps_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRequest, match=r"timestep is \[2\], \[2, 3\] .* or \[2, 18\]"):
        group_timesteps(torch.zeros(shape), 2, (3, 2, 3))


@pytest.mark.parametrize("shape", [(1, 5, 3, 4, 4), (1, 4, 3, 5, 4), (1, 4, 3, 4, 3), (4, 3, 4, 4)])
def test_other_latents_are_refused(theirs: WanTransformer3DModel, shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRequest, match=r"\[B, 4, T, H, W\]"):
        ours(theirs)(torch.zeros(shape), torch.zeros(1), torch.zeros(1, 7, 20))
    with pytest.raises(InvalidRequest, match=r"\[B, L, 20\]"):
        ours(theirs).prepare_context(torch.zeros(1, 7, 21))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_dim": 1280}, "CLIP picture"),
        ({"added_kv_proj_dim": 144}, "picture tokens"),
        ({"vace_layers": [0, 2]}, "VACE"),
        ({"qk_norm": "rms_norm"}, "rms_norm_across_heads"),
        ({"qk_norm": None}, "rms_norm_across_heads"),
        ({"window": 7}, "sets window"),
        ({"num_layers": "30"}, "num_layers is '30'"),
        ({"num_layers": 0}, "positive"),
        ({"ffn_dim": True}, "ffn_dim is True"),
        ({"eps": float("nan")}, "positive"),
        ({"patch_size": [2, 2]}, "patch_size"),
        ({"patch_size": 2}, "patch_size"),
        ({"attention_head_dim": 23}, "even"),
    ],
)
def test_configurations_that_are_not_supported(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        WanTransformerConfig.from_dict({**T2V, **changes})


def test_configurations_that_mean_the_same() -> None:
    plain = WanTransformerConfig.from_dict(T2V)
    extra = {"_class_name": "x", "image_dim": None, "rope_max_seq_len": 9, "qk_norm": "rms_norm_across_heads"}
    assert WanTransformerConfig.from_dict({**T2V, **extra, "patch_size": [1, 2, 2], "out_channels": None}) == plain
    assert plain.dim == 72
