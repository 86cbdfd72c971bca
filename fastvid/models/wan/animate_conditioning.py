"""What Wan-Animate gets behind the noisy latents: the character in front, then what is known of the segment.

Pure functions; `encode` and shapes as in `conditioning`. Source: diffusers `pipelines/wan/pipeline_wan_animate.py`
(Apache-2.0).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvid.errors import InvalidRequest
from fastvid.models.wan.conditioning import Encode


def animate_condition(encode: Encode, character: Tensor, frames: Tensor, known: Tensor, *, temporal: int = 4) -> Tensor:
    """Channels that go behind the noisy latents: [1, temporal + C, 1 + T, h, w], mask first.

    character: [1, 3, H, W] in [-1, 1]. frames: [1, 3, F, H, W], those of the segment before, or the background, and 0
    elsewhere. known: [F, H, W] from 0 to 1, 1 where frames stay.
    """
    if character.shape != frames[:, :, 0].shape or known.shape != (frames.shape[2], *frames.shape[3:]):
        given = f"{list(character.shape)}, {list(frames.shape)} and {list(known.shape)}"
        raise InvalidRequest(f"[1, 3, H, W], [1, 3, F, H, W] and [F, H, W] of one size are needed, not {given}")
    first, rest = encode(character[:, :, None]), encode(frames)
    mask = known_channels(known, rest.shape[3], rest.shape[4], temporal).to(rest)
    latents, ones = torch.cat((first, rest), dim=2), torch.ones_like(mask[:, :1])
    return torch.cat((torch.cat((ones, mask), dim=1)[None], latents), dim=1)


def known_channels(known: Tensor, height: int, width: int, temporal: int = 4) -> Tensor:
    """What is known of every frame [F, H, W] as the channels of their latents [temporal, T, h, w]: the nearest pixel,
    and in time as `conditioning.mask_channels`."""
    known = F.interpolate(known[:, None], (height, width), mode="nearest")[:, 0]
    known = torch.cat((known[:1].expand(temporal, -1, -1), known[1:]))
    return known.unflatten(0, (-1, temporal)).transpose(0, 1)
