"""Stops a request whose numbers are NaN or infinite, with the step and the likely cause. Nothing else hides them: the
conversion to bytes would make black pixels of NaN.

The sum of a tensor shows both, in one pass over any memory layout. It is read where the device is waited for anyway:
once a decoded chunk, and of steps one step later (`Check`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvid.errors import Error
from fastvid.models.loaded import Model

TEXT, ENCODED, DECODED = "the prompt's embeddings", "the latents of the given frames", "the decoded frames"


class Check:
    """Whether no value of x is NaN or infinite. `wait` waits until the device has come to x, and no longer: what was
    queued behind x goes on."""

    def __init__(self, x: Tensor) -> None:
        self._finite = x.sum(dtype=torch.promote_types(x.dtype, torch.float32)).isfinite()
        self._event: torch.cuda.Event | None = None
        if x.device.type == "cuda":
            on_host = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=True)
            self._finite = on_host.copy_(self._finite, non_blocking=True)
            self._event = torch.cuda.current_stream(x.device).record_event()

    def wait(self) -> bool:
        if self._event is not None:
            self._event.synchronize()
        return bool(self._finite)


def is_finite(x: Tensor) -> bool:
    """Whether no value is NaN or infinite. Waits for the device."""
    return Check(x).wait()


def check_text(embeds: Tensor, model: Model) -> Tensor:
    """Embeddings [1, L, text_dim] in the model's dtype. Raises Error if they are not finite."""
    if not is_finite(embeds):
        raise not_finite(model, TEXT)
    return embeds


def check_encoded(latents: Tensor, model: Model) -> Tensor:
    """Latents that the VAE made of frames. Raises Error if they are not finite."""
    if not is_finite(latents):
        raise not_finite(model, ENCODED)
    return latents


def not_finite(model: Model, what: str) -> Error:
    """The error for values that a model made, with the likely cause."""
    of_vae = what in (ENCODED, DECODED)
    dtype, option = (model.vae_dtype, "vae_dtype") if of_vae else (model.dtype, "dtype")
    if dtype == torch.float16:
        cause = (
            f"numbers beyond float16's largest, 65504, are the likely cause: load with {option}='bfloat16' or 'float32'"
        )
    elif (model.loras or model.asked) and not of_vae:
        cause = "a LoRA that is damaged or whose scale is too large is the likely cause: load without it"
    else:
        cause = f"damaged weights are the likely cause, in {str(dtype).removeprefix('torch.')}; fetch the model again"
    return Error(f"{what} are not finite (NaN or infinity); {cause}")
