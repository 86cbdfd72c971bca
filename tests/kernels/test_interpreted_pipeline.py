"""The whole embedded model on the Triton kernels, in the interpreter, beside the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from interpreted import run_interpreted

import fastvid
from fastvid.ops import dispatch

OPTIONS = {"seed": 2, "num_frames": 5, "num_inference_steps": 2, "width": 64, "height": 64}
KERNELS = sorted(op for op, of in dispatch.implementations().items() if "triton" in of)


@pytest.mark.interpret
def test_the_embedded_model() -> None:
    prompt = "a red circle moving right on a white background"
    plain = fastvid.load("embedded", device="cpu", backend="reference")
    wanted = plain.generate(prompt, **OPTIONS)
    pipe = fastvid.load("embedded", device="cpu", backend=",".join(f"{op}=triton" for op in KERNELS))
    used: set[str] = set()
    # What a pipeline binds it has to use: a kernel that nothing calls would prove nothing here.
    for op, function in pipe._model.ops.functions.items():
        vars(pipe._model.ops)[op] = lambda *x, op=op, function=function, **y: used.add(op) or function(*x, **y)
    made = pipe.generate(prompt, **OPTIONS)
    error = (made.latents - wanted.latents).norm() / wanted.latents.norm()
    assert 0 < error < 1e-4, "other sums round elsewhere, and no more"
    assert (np.abs(made.frames.astype(int) - wanted.frames) <= 1).mean() > 0.999
    frames = np.random.default_rng(3).integers(0, 255, (5, 64, 64, 3), dtype=np.uint8)
    encoded, true = pipe.encode(frames), plain.encode(frames)
    assert 0 < (encoded - true).norm() / true.norm() < 1e-4
    assert set(KERNELS) - used == UNUSED and torch.isfinite(made.latents).all()


# Norms of pictures' tokens, which this model sees none of; queries and keys apart, which its models have as one;
# frames to bytes, which its last convolution does; quantized weights and what goes to them, which it has none of.
UNUSED = {"layer_norm", "rms_norm_rope", "to_rgb", "linear_quantized", "quantize_rows", "quantized_norm"}


@pytest.mark.slow
def test_under_the_interpreter() -> None:
    run_interpreted(__file__)
