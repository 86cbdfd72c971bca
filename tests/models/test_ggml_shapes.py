"""Shapes that ggml loses come back for every weight of a Wan model, in both layouts of names."""

from __future__ import annotations

import pytest

from fastvid.models.registry import build_empty
from fastvid.models.wan.config import WanTransformerConfig, WanVACEConfig, WanVAEConfig
from fastvid.models.wan.ggml_shapes import Shape, true_shape
from fastvid.models.wan.weight_names import LAYOUTS, Found, origins

SIZES = {"num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 2, "ffn_dim": 80, "text_dim": 32}
IMAGE = {"image_dim": 24, "added_kv_proj_dim": 48, "pos_embed_seq_len": 514, "in_channels": 36}
CONFIGS = {
    "flf2v": ("transformer", WanTransformerConfig, {**SIZES, **IMAGE}),
    "vace": ("transformer", WanVACEConfig, {**SIZES, "vace_layers": [0], "vace_in_channels": 96}),
    "vae": ("vae", WanVAEConfig, {"base_dim": 8, "num_res_blocks": 1}),
}


def collapsed(shape: Shape) -> Shape:
    """As ggml keeps a shape: four sizes at most, the first two joined if there are more, and no leading ones."""
    shape = (shape[0] * shape[1], *shape[2:]) if len(shape) == 5 else shape
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_every_weight_of_a_model(kind: str, layout: str) -> None:
    part, config, sizes = CONFIGS[kind]
    state = build_empty(part, config.from_dict(sizes)).state_dict()
    known = {name: tuple(tensor.shape) for name, tensor in state.items()}
    shapes = {
        name: origin.shape(known) for name, origin in origins(known, layout, Found(part, "diffusers", "")).items()
    }
    stored = {name: collapsed(shape) for name, shape in shapes.items()}
    assert stored != shapes
    assert {name: true_shape(name, stored) for name in stored} == shapes
    assert {name: true_shape(name, shapes) for name in shapes} == shapes
