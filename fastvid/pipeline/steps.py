"""The steps of a pipeline one by one, for those who put them together themselves: text, frames and latents."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvid import checks
from fastvid.device.precision import ieee_fp32
from fastvid.errors import InvalidRequest
from fastvid.models.loaded import Model


@torch.no_grad()
def embed(parts: Model, prompt: str) -> Tensor:
    """See Pipeline.embed."""
    prompt = checks.text("prompt", prompt)
    with ieee_fp32():
        return parts.embed(prompt)


@torch.no_grad()
def encode(parts: Model, frames: Any) -> Tensor:
    """See Pipeline.encode."""
    pixels = _frames(frames, parts)
    with ieee_fp32():
        latents, _ = parts.vae.encode(pixels.to(parts.device, torch.float32).div(127.5).sub(1), bands=parts.bands)
    return latents


@torch.no_grad()
def decode(parts: Model, latents: Any) -> np.ndarray:
    """See Pipeline.decode."""
    given, channels = checks.tensor("latents", latents), parts.vae.config.z_dim
    shape = tuple(given.shape)
    if len(shape) != 5 or shape[:2] != (1, channels) or min(shape) < 1:
        raise InvalidRequest(f"latents has shape {list(shape)}; it must be [1, {channels}, T, h, w], as encode returns")
    tensor = torch.as_tensor(given)
    if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
        raise InvalidRequest("latents must be finite floating point numbers, such as encode returns")
    out, cache = [], None
    with ieee_fp32():
        # One latent frame at a time: the memory that it takes does not grow with the clip.
        for part in tensor.to(parts.device, torch.float32).split(1, dim=2):
            decoded, cache = parts.vae.decode_rgb(part, cache, bands=parts.bands)
            out.append(decoded[0].cpu().numpy())
    return np.concatenate(out)


def _frames(frames: Any, parts: Model) -> Tensor:
    """Frames [T, H, W, 3] as [1, 3, T, H, W]; sizes and number as the VAE takes them."""
    given = checks.tensor("frames", frames)
    if len(given.shape) != 4 or given.shape[3] != 3 or not str(given.dtype).endswith("uint8"):
        raise InvalidRequest(f"frames is {given.dtype} {list(given.shape)}; it must be uint8 RGB [T, H, W, 3]")
    space, time = parts.vae.config.spatial_scale, parts.vae.config.temporal_scale
    count, height, width = given.shape[:3]
    if count < 1 or (count - 1) % time:
        nearest = max(0, round((count - 1) / time)) * time + 1
        raise InvalidRequest(f"frames holds {count} frames; the VAE takes {time}k+1, the nearest is {nearest}")
    for name, size in (("height", height), ("width", width)):
        if size < space or size % space:
            nearest = max(1, round(size / space)) * space
            raise InvalidRequest(f"frames have {name} {size}; it must be a multiple of {space}, such as {nearest}")
    return torch.as_tensor(given).permute(3, 0, 1, 2)[None]
