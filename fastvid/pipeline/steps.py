"""The single steps of a pipeline (embed, encode, decode), for custom pipelines, and descriptions of its model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvid import checks
from fastvid.device.devices import available_bytes
from fastvid.distributed.layout import agree
from fastvid.engine.decode import GPU_PIXELS, decode_rgb
from fastvid.engine.finite import check_encoded, check_text
from fastvid.errors import InvalidRequest
from fastvid.models.loaded import Model
from fastvid.pipeline.request_warnings import warn_of_prompt
from fastvid.pipeline.tensors import as_tensor, finite
from fastvid.planning.memory import decoder_bytes
from fastvid.requests import levers


def embed(model: Model, prompt: str) -> Tensor:
    """See Pipeline.embed."""
    prompt = checks.text("prompt", prompt)
    warn_of_prompt(model, prompt)
    return check_text(model.embed(prompt), model)


def encode(model: Model, frames: Any) -> Tensor:
    """See Pipeline.encode."""
    pixels = _frames(frames, model)
    latents, _ = model.vae.encode(pixels.to(model.device, torch.float32).div(127.5).sub(1), bands=model.bands)
    return check_encoded(latents, model)


def decode(model: Model, latents: Any) -> np.ndarray:
    """See Pipeline.decode."""
    tensor, channels = as_tensor("latents", latents), model.vae.config.z_dim
    shape = tuple(tensor.shape)
    if len(shape) != 5 or shape[:2] != (1, channels) or min(shape) < 1:
        raise InvalidRequest(
            f"latents has shape {str(list(shape)):.60}; it must be [1, {channels}, T, h, w], as encode returns"
        )
    tensor = finite("latents", tensor)
    out, cache = [], None
    for chunk in torch.split(tensor.to(model.device, torch.float32), _chunk(model, shape), dim=2):
        decoded, cache = decode_rgb(model, chunk, cache)
        out.append(decoded[0].cpu().numpy())
    return np.concatenate(out)


def _chunk(model: Model, shape: tuple[int, ...]) -> int:
    """How many of the latents [1, C, T, h, w] are decoded at once: one, so that activation memory does not grow with
    the clip; on a GPU as many as keep it busy, in halves until they fit."""
    if model.device.type == "cpu":
        return 1
    config, (frames, height, width) = model.vae.config, shape[2:]
    size, time = (height * config.spatial_scale, width * config.spatial_scale), config.temporal_scale
    free = agree(model.mesh, available_bytes(model.device))
    count = max(1, min(frames, GPU_PIXELS // (time * size[0] * size[1])))
    while count > 1 and decoder_bytes(config, *size, time * count, itemsize=model.vae_dtype.itemsize) > free:
        count //= 2
    return count


def _frames(frames: Any, model: Model) -> Tensor:
    """Frames [T, H, W, 3] as [1, 3, T, H, W]. Raises InvalidRequest for sizes and counts that the VAE cannot encode."""
    array = as_tensor("frames", frames)
    if len(array.shape) != 4 or array.shape[3] != 3 or array.dtype != torch.uint8:
        shape = f"{array.dtype} {list(array.shape)}".removeprefix("torch.")
        raise InvalidRequest(f"frames is {shape:.60}; it must be uint8 RGB [T, H, W, 3]")
    space, time = model.vae.config.spatial_scale, model.vae.config.temporal_scale
    count, height, width = array.shape[:3]
    if count < 1 or (count - 1) % time:
        nearest = max(0, round((count - 1) / time)) * time + 1
        raise InvalidRequest(f"frames holds {count} frames; the VAE takes {time}k+1, the nearest is {nearest}")
    for name, size in (("height", height), ("width", width)):
        if size < space or size % space:
            nearest = max(1, round(size / space)) * space
            raise InvalidRequest(f"frames have {name} {size}; it must be a multiple of {space}, such as {nearest}")
    return array.permute(3, 0, 1, 2)[None]


def describe(model: Model) -> dict[str, Any]:
    """See Pipeline.describe."""
    return {
        "model": model.name,
        "variant": model.preset.name,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "dtype_why": model.placement.reasons["dtype"],
        "vae_dtype": str(model.vae_dtype).removeprefix("torch."),
        "quantize": model.options.quantize,
        "quality": levers.tables(model.preset),
        "backends": dict(model.ops.bound),
        "reasons": dict(model.ops.reasons),
        "choices": {op: [one.to_dict() for one in found] for op, found in model.ops.choices.items()},
        "loras": [list(pair) for pair in model.loras],
        "offload": model.offload,
        "cuda_graphs": model.placement.reasons["cuda_graphs"],
        "parallel": model.settings.get("parallel", "1"),
        "parts": model.sources,
        "text_cache": model.modules.texts.to_dict(),
        "mapped": sorted(map(str, model.placement.mapped)),
    }


def inspect(model: Model) -> dict[str, Any]:
    """See Pipeline.inspect."""
    if model.checkpoint is None:
        return {}
    return model.checkpoint.to_dict()
