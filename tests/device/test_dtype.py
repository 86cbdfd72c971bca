"""Which dtype `dtype="auto"` is."""

from __future__ import annotations

import pytest
import torch

import fastvid
from fastvid.device import devices
from fastvid.errors import InvalidRequest


@pytest.mark.parametrize(
    ("flags", "kind", "why"),
    [
        ("fpu avx512_bf16 amx_bf16", torch.bfloat16, "amx_bf16 and avx512_bf16"),
        ("avx512f avx512_bf16 fma", torch.bfloat16, "(avx512_bf16)"),
        ("avx512f avx512_bf16x fma", torch.float32, "no products of bfloat16"),
        ("", torch.float32, "no products of bfloat16"),
    ],
)
def test_a_processor(monkeypatch: pytest.MonkeyPatch, flags: str, kind: torch.dtype, why: str) -> None:
    monkeypatch.setattr(devices, "_read", lambda path: f"flags\t\t: {flags}\n")
    found, said = devices.choose_dtype("auto", torch.device("cpu"))
    assert found is kind and why in said


def test_it_is_shown_and_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe has the dtype itself, so that it makes the same bytes on another processor."""
    monkeypatch.setattr(devices, "_bf16_products", lambda device: "a test")
    pipe = fastvid.load("embedded", device="cpu", dtype="auto")
    about = pipe.describe()
    assert (about["dtype"], pipe.describe()["dtype_why"][:5]) == ("bfloat16", "auto:")
    video = pipe.generate("a red circle moving right on a white background", num_inference_steps=1, seed=0)
    assert video.recipe["settings"]["dtype"] == "bfloat16"
    assert fastvid.load("embedded", device="cpu").describe()["dtype"] == "float32"
    with pytest.raises(InvalidRequest, match="vae_dtype"):
        fastvid.load("embedded", device="cpu", vae_dtype="auto")
