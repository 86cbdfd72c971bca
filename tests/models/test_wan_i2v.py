"""The Wan transformer with pictures as a condition (I2V, FLF2V) against diffusers' on random weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor
from wan_cases import I2V, NO_CLIP, TEXT, diffusers_model, error, inputs, ours, run_ours, run_theirs

from fastvid.errors import CheckpointError, InvalidRequest
from fastvid.loaders import safetensors
from fastvid.models.wan import transformer
from fastvid.models.wan.config import OPTIONAL, WanTransformerConfig
from fastvid.models.wan.transformer import WanTransformer
from fastvid.ops import reference

KINDS = ["i2v", "flf2v"]


@pytest.fixture(scope="module")
def models() -> dict[str, WanTransformer3DModel]:
    return {kind: diffusers_model(kind) for kind in KINDS}


@torch.no_grad()
def test_a_model_without_clip_takes_more_channels() -> None:
    """Wan 2.2 I2V-A14B: 36 channels in, 16 out, no CLIP."""
    theirs = diffusers_model("i2v", **NO_CLIP)
    latents, timestep, text, _ = inputs("i2v")
    expected = theirs(latents, timestep, text, return_dict=False)[0]
    assert error(ours(theirs)(latents, timestep, text), expected) < 1e-6


@torch.no_grad()
def test_known_channels_may_come_by_themselves() -> None:
    model = ours(diffusers_model("i2v", **NO_CLIP))
    latents, timestep, text, _ = inputs("i2v")
    wanted = model(latents, timestep, text)
    assert torch.equal(model(latents[:, :4], timestep, text, known=latents[:, 4:]), wanted)
    changed = model(latents[:, :4], timestep, text, known=latents[:, 4:] + 1)
    assert error(changed, wanted) > 1e-3
    for wrong in (latents[:, 5:], latents[:1, 4:], latents[:, 4:, 1:], latents[0, 4:]):
        with pytest.raises(InvalidRequest, match=r"known behind them.* not \[2, 4, 3, 6, 10\] and \["):
            model(latents[:, :4], timestep, text, known=wrong)


def wrong_eps(model: WanTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer, "IMAGE_NORM_EPS", 1e-6)


def wrong_gelu(model: WanTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    model.condition_embedder.image_embedder.ff.exact = False


def text_norm_for_pictures(model: WanTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    for block in model.blocks:
        block.attn2.norm_added_k = block.attn2.norm_k


def no_positions(model: WanTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    model.condition_embedder.image_embedder.pos_embed.data.zero_()


@pytest.mark.parametrize("mistake", [wrong_eps, wrong_gelu, text_norm_for_pictures, no_positions])
@torch.no_grad()
def test_a_small_mistake_would_be_seen(models: dict[str, Any], mistake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs("flf2v")
    model = ours(models["flf2v"])
    mistake(model, monkeypatch)
    assert error(run_ours(model, *given), run_theirs(models["flf2v"], *given)) > 1e-6


@torch.no_grad()
def test_text_and_pictures_have_a_softmax_each(models: dict[str, Any]) -> None:
    """One softmax over both would be another model: the difference has to be visible in these tests."""
    given = inputs("i2v")
    calls: list[int] = []

    def attention(q: Tensor, k: Tensor, v: Tensor, **_: object) -> Tensor:
        calls.append(k.shape[1])
        return reference.attention(q, k, v)

    run_ours(ours(models["i2v"], SimpleNamespace(**{**vars(reference), "attention": attention})), *given)
    assert calls == [45, TEXT, 5] * 3
    latents, timestep, text, pictures = given
    model = ours(models["i2v"])
    context = model.prepare_context(text, pictures)
    joined = [(torch.cat((k, ik), 1), torch.cat((v, iv), 1)) for k, v, ik, iv in context.layers]
    assert error(model(latents, timestep, transformer.Context(tuple(joined))), run_theirs(models["i2v"], *given)) > 1e-3


@torch.no_grad()
def test_a_norm_that_nothing_uses_is_not_loaded(models: dict[str, Any], tmp_path: Path) -> None:
    state = models["i2v"].state_dict()
    extra = {f"blocks.{i}.attn2.norm_added_q.weight": torch.full((72,), float("nan")) for i in range(3)}
    save_file({**state, **extra}, tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = WanTransformer(WanTransformerConfig.from_dict(I2V))
    safetensors.load_into(model, [tmp_path / "model.safetensors"])
    given = inputs("i2v", (1, 2, 2))
    assert torch.equal(run_ours(model, *given), run_ours(ours(models["i2v"]), *given))


@pytest.mark.parametrize(
    ("kind", "shape"), [("i2v", None), ("i2v", (1, 5, 40)), ("i2v", (2, 5, 41)), ("i2v", (5, 40)), ("i2v", (2, 0, 40))]
)
def test_wrong_pictures_are_refused(models: dict[str, Any], kind: str, shape: tuple[int, ...] | None) -> None:
    with pytest.raises(InvalidRequest, match=r"image embeddings (are \[2, M, 40\]|\[B, M, 40\])"):
        ours(models[kind]).prepare_context(torch.zeros(2, 7, 20), None if shape is None else torch.zeros(shape))


def test_first_and_last_picture_are_needed_together(models: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=r"\[2, 14, 40\] for this model, not \[2, 7, 40\]"):
        ours(models["flf2v"]).prepare_context(torch.zeros(2, 7, 20), torch.zeros(2, 7, 40))


def test_a_text_model_takes_no_pictures() -> None:
    plain = {key: value for key, value in I2V.items() if key not in OPTIONAL}
    model = WanTransformer(WanTransformerConfig.from_dict(plain))
    with pytest.raises(InvalidRequest, match="takes no image embeddings"):
        model.prepare_context(torch.zeros(2, 7, 20), torch.zeros(2, 5, 40))


@pytest.mark.parametrize("changes", [{"image_dim": None}, {"added_kv_proj_dim": None}, {"added_kv_proj_dim": 71}])
def test_half_a_configuration_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"needs both, the second as wide as the model \(72\)"):
        WanTransformerConfig.from_dict({**I2V, **changes})


def test_gelu_of_the_image_embedder_is_exact() -> None:
    layer = transformer.FeedForward(4, 4, 4, reference, exact=True)
    x = torch.randn(3, 4)
    assert torch.equal(layer(x), layer.net[2](F.gelu(layer.net[0]["proj"](x))))
