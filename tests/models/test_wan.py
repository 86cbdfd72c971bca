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

from fastvid.errors import CheckpointError, InvalidRequest
from fastvid.layers.embeddings import RotaryTables, rotary_table, timestep_sinusoid
from fastvid.models.wan.config import WanTransformerConfig
from fastvid.models.wan.transformer import WanTransformer, group_timesteps
from fastvid.ops import reference

SMALL: dict[str, Any] = {
    "num_attention_heads": 3,
    "attention_head_dim": 24,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 20,
    "ffn_dim": 80,
    "num_layers": 3,
}
SIZES = [(1, 2, 2), (3, 6, 10), (5, 14, 6)]  # latent frames, height, width
KINDS = ["sample", "frame", "token"]


def error(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||"""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def diffusers_model(**changes: Any) -> WanTransformer3DModel:
    """diffusers' model with every weight drawn, also those that start as ones or zeros."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(**{**SMALL, **changes}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def ours(theirs: WanTransformer3DModel, ops: Any = reference) -> WanTransformer:
    model = WanTransformer(WanTransformerConfig.from_dict(dict(theirs.config)), ops)
    model.load_state_dict(theirs.state_dict())
    return model.eval()


@pytest.fixture(scope="module")
def theirs() -> WanTransformer3DModel:
    return diffusers_model()


def inputs(size: tuple[int, int, int], kind: str, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps of a kind, text."""
    generator = torch.Generator().manual_seed(sum(size))
    t, h, w = size
    shape = {"sample": (batch,), "frame": (batch, t), "token": (batch, t * h * w // 4)}[kind]
    timestep = torch.rand(shape, generator=generator) * 1000
    if kind != "sample":
        timestep[torch.rand(shape, generator=generator) < 0.4] = 0
    draw = [torch.randn(s, generator=generator) for s in ((batch, 4, t, h, w), (batch, 7, 20))]
    return draw[0], timestep, draw[1]


def run_theirs(model: WanTransformer3DModel, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
    """diffusers knows timesteps a sample and a token, not a frame."""
    tokens = latents[0, 0].numel() // 4
    if timestep.ndim == 2 and timestep.shape[1] != tokens:
        timestep = timestep.repeat_interleave(tokens // timestep.shape[1], dim=1)
    return model(latents, timestep, text, return_dict=False)[0]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_equals_diffusers(theirs: WanTransformer3DModel, size: tuple[int, int, int], kind: str) -> None:
    given = inputs(size, kind)
    assert error(ours(theirs)(*given), run_theirs(theirs, *given)) < 1e-6


@pytest.mark.parametrize("changes", [{"cross_attn_norm": False}, {"patch_size": (1, 1, 1)}, {"attention_head_dim": 34}])
@torch.no_grad()
def test_other_configurations_equal_diffusers(changes: dict[str, Any]) -> None:
    theirs = diffusers_model(**changes)
    latents, timestep, text = inputs((3, 4, 6), "sample")
    assert error(ours(theirs)(latents, timestep, text), run_theirs(theirs, latents, timestep, text)) < 1e-6


@pytest.mark.parametrize("timestep", [[999, 3], [999.0, 0.5], [1000.0, 0.0], [123.4, 567.8]])
@torch.no_grad()
def test_timesteps_of_any_type_equal_diffusers(theirs: WanTransformer3DModel, timestep: list[float]) -> None:
    latents, _, text = inputs((3, 6, 10), "sample")
    given = latents, torch.tensor(timestep), text
    assert error(ours(theirs)(*given), run_theirs(theirs, *given)) < 1e-6


def test_timestep_sinusoid_against_fp64() -> None:
    timestep = torch.tensor([0.0, 0.5, 3.0, 999.0])
    angle = timestep.double()[:, None] * 10000 ** (-torch.arange(128).double() / 128)
    assert error(timestep_sinusoid(timestep, 256), torch.cat((angle.cos(), angle.sin()), -1)) < 1e-5


@torch.no_grad()
def test_a_wrong_epsilon_or_gelu_would_be_seen(theirs: WanTransformer3DModel) -> None:
    given = inputs((3, 6, 10), "sample")
    right = run_theirs(theirs, *given)
    wrong = ours(theirs)
    for block in wrong.blocks:
        block.eps = 1e-5
    assert error(wrong(*given), right) > 1e-6
    erf = ours(theirs, SimpleNamespace(**{**vars(reference), "linear_gelu_tanh": lambda *x: F.gelu(F.linear(*x))}))
    assert error(erf(*given), right) > 1e-6


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_bf16_is_as_good_as_diffusers(theirs: WanTransformer3DModel, kind: str) -> None:
    given = inputs((3, 6, 10), kind)
    truth = run_theirs(theirs, *given)
    half = diffusers_model().bfloat16()
    kept = {"time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"}
    for name, parameter in half.named_parameters():
        if kept & set(name.split(".")):
            parameter.data = theirs.get_parameter(name).data
    model = WanTransformer(WanTransformerConfig.from_dict(dict(half.config)))
    model.load_state_dict(half.state_dict(), assign=True)
    latents, timestep, text = given
    allowed = 2 * error(run_theirs(half, latents.bfloat16(), timestep, text.bfloat16()), truth)
    assert set(model.FP32_PARTS) == kept and model.dtype == torch.bfloat16
    assert 0 < error(model(latents, timestep, text), truth) <= allowed


@torch.no_grad()
def test_a_prepared_context_changes_nothing(theirs: WanTransformer3DModel) -> None:
    latents, timestep, text = inputs((3, 6, 10), "frame")
    model = ours(theirs)
    context = model.prepare_context(text)
    assert torch.equal(model(latents, timestep, context), model(latents, timestep, text))
    assert len(context.layers) == 3 and context.layers[0][0].shape == (2, 7, 3, 24)


@torch.no_grad()
def test_samples_of_a_batch_do_not_meet(theirs: WanTransformer3DModel) -> None:
    latents, timestep, text = inputs((3, 6, 10), "token")
    model = ours(theirs)
    both = model(latents, timestep, text)
    for i in range(2):
        alone = model(latents[i : i + 1], timestep[i : i + 1], text[i : i + 1])
        assert error(alone[0], both[i]) < 1e-6


@torch.no_grad()
def test_a_window_can_start_anywhere(theirs: WanTransformer3DModel) -> None:
    """Rotary attention sees differences of positions only, so an offset must not change a window's own result."""
    given = inputs((3, 6, 10), "sample")
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
    theirs = WanTransformer3DModel(**{**SMALL, "attention_head_dim": head_dim, "num_layers": 1}).rope
    expected = theirs(torch.empty(1, 4, 9, 6, 10))
    assert torch.equal(cos, expected[0][0, :, 0, ::2]) and torch.equal(sin, expected[1][0, :, 0, 1::2])


def test_gradients_equal_diffusers(theirs: WanTransformer3DModel) -> None:
    latents, timestep, text = inputs((3, 6, 10), "token")
    model = ours(theirs).train()
    theirs.zero_grad()
    run_theirs(theirs, latents, timestep, text).square().mean().backward()
    model(latents, timestep, text).square().mean().backward()
    found = gradients(model)
    for name, parameter in theirs.named_parameters():
        assert error(found.pop(name), parameter.grad) < 1e-4, name
    assert not found


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
    ours(theirs, ops)(*inputs((1, 2, 2), "sample"))
    layers = SMALL["num_layers"]
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
        WanTransformerConfig.from_dict({**SMALL, **changes})


def test_configurations_that_mean_the_same() -> None:
    plain = WanTransformerConfig.from_dict(SMALL)
    extra = {"_class_name": "x", "image_dim": None, "rope_max_seq_len": 9, "qk_norm": "rms_norm_across_heads"}
    assert WanTransformerConfig.from_dict({**SMALL, **extra, "patch_size": [1, 2, 2], "out_channels": None}) == plain
    assert plain.dim == 72
