"""torch.compile of a pipeline's transformer."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

import fastvid
from fastvid.models.wan.config import WanTransformerConfig
from fastvid.models.wan.transformer import WanTransformer
from fastvid.ops.dispatch import bind

CONFIG = WanTransformerConfig(
    2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16, freq_dim=32, ffn_dim=96, num_layers=1
)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def model_and_inputs(dtype: torch.dtype) -> tuple[WanTransformer, tuple[Tensor, Tensor, Tensor]]:
    torch.manual_seed(0)
    model = WanTransformer(CONFIG, bind(device="cpu")).to(dtype).eval().requires_grad_(False)
    latents = torch.randn(1, 4, 3, 16, 16)  # 192 tokens: more than oneDNN's routines start at
    return model, (latents, torch.tensor([700.0]), torch.randn(1, 7, 16))


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_one_graph(dtype: torch.dtype, allowed: float) -> None:
    """Traced whole, with nothing that torch.compile does not know."""
    model, inputs = model_and_inputs(dtype)
    expected = model(*inputs)
    made = torch.compile(model, backend="aot_eager", fullgraph=True)(*inputs)
    assert (made - expected).norm() / expected.norm() < allowed


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++")
def test_inductor() -> None:
    model, inputs = model_and_inputs(torch.float32)
    expected = model(*inputs)
    made = torch.compile(model, fullgraph=True)(*inputs)
    assert (made - expected).norm() / expected.norm() < 1e-5


@pytest.mark.slow
def test_a_pipeline_with_compiled_blocks() -> None:
    """As docs/performance.md says it; one block is traced for all."""
    pipe = fastvid.load("embedded", device="cpu")
    options = {"seed": 1, "num_inference_steps": 3}
    expected = pipe.generate("a red circle moving right on a white background", **options)
    for block in pipe.transformer.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    made = pipe.generate("a red circle moving right on a white background", **options)
    assert np.abs(made.frames.astype(int) - expected.frames).max() <= 1
    assert made.latents is not None and not torch.equal(made.latents, expected.latents)  # it did run
