"""Memory of what Wan-Animate has beside a picture-to-video transformer, against what its operations hold."""

from __future__ import annotations

import pytest
import torch
from live_memory import LiveMemory

from fastvid.models.wan.animate import WanAnimateTransformer
from fastvid.models.wan.animate_config import WanAnimateConfig
from fastvid.models.wan.config import WanTransformerConfig
from fastvid.planning import face_memory

SMALL = WanTransformerConfig(num_attention_heads=2, attention_head_dim=16, num_layers=5, ffn_dim=64, text_dim=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_encoders_of_a_face(dtype: torch.dtype) -> None:
    """At published sizes but for the width of the tokens; nothing is computed."""
    config = WanAnimateConfig(SMALL)
    with torch.device("meta"):
        model, face = WanAnimateTransformer(config).to(dtype), torch.empty(1, 3, 77, 512, 512)
    with LiveMemory() as seen:
        tokens = model.encode_face(face, 20)
    assert tokens.shape == (1, 21, 5, 32)
    planned = face_memory.encoder_bytes(config, 77, dtype.itemsize)
    assert 0.8 <= (seen.peak + face[:, :, :8].nbytes) / planned <= 1.05


@torch.no_grad()
def test_the_tokens_of_a_face() -> None:
    config = WanAnimateConfig(SMALL)
    with torch.device("meta"):
        model, tokens = WanAnimateTransformer(config), torch.empty(1, 21, 5, 32)
    held = sum(one.nbytes for block in model.face_adapter for one in block.project_face(tokens))
    assert held == face_memory.token_bytes(config, 21, 1, 4) > 0
    assert face_memory.token_bytes(None, 21, 1, 4) == face_memory.encoder_bytes(None, 77, 4) == 0
