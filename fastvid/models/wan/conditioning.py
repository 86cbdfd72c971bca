"""What models get of known pictures beside the text: latents and masks as more channels, or a control.

- I2V and FLF2V (Wan 2.1), I2V-A14B (Wan 2.2): `image_condition`, to be put behind the noisy latents as more channels.
- Fun-InP, and Fun-Control of Wan 2.2: `inpaint_condition`.
- VACE: `vace_condition`, the input of the control branch.

Pure functions. `encode` stands for the VAE: frames [B, 3, F, H, W] in [-1, 1], F = temporal * k + 1, to normalised
latents [B, C, T, h, w], T = k + 1.

Shapes: B batch, F pixel frames, H/W pixels, C latent channels, T latent frames, h/w latent height and width.
Source: diffusers `pipelines/wan/pipeline_wan_i2v.py` and `pipeline_wan_vace.py` (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvid.errors import InvalidRequest

Encode = Callable[[Tensor], Tensor]


# ---------------------------------------------------------------- I2V and FLF2V: more channels


def image_condition(encode: Encode, pictures: Mapping[int, Tensor], num_frames: int, *, temporal: int = 4) -> Tensor:
    """Channels that go behind the noisy latents of an I2V model: [B, temporal + C, T, h, w], mask first.

    pictures: pixel frame -> picture [B, 3, H, W] in [-1, 1]: frame 0 for I2V, 0 and num_frames - 1 for FLF2V, which is
    what the models were trained with. num_frames: temporal * k + 1.
    Raises InvalidRequest for frames outside of the video and pictures of different sizes.
    """
    frames, known = place_pictures(pictures, num_frames)
    latents = encode(frames)
    mask = mask_channels(known, temporal).to(latents)[None, :, :, None, None]
    return torch.cat((mask.expand(len(latents), -1, -1, *latents.shape[3:]), latents), dim=1)


def place_pictures(pictures: Mapping[int, Tensor], num_frames: int) -> tuple[Tensor, Tensor]:
    """Pictures [B, 3, H, W] as frames of a video [B, 3, F, H, W] of zeros, and which frames those are: bool [F]."""
    shapes = {tuple(picture.shape) for picture in pictures.values()}
    if len(shapes) != 1 or any(len(shape) != 4 for shape in shapes):
        raise InvalidRequest(f"pictures are [B, 3, H, W], one or more of one size, not {sorted(shapes)}")
    if outside := [frame for frame in pictures if not 0 <= frame < num_frames]:
        raise InvalidRequest(f"pictures are for frames 0 to {num_frames - 1}, not {outside}")
    first = next(iter(pictures.values()))
    frames = first.new_zeros(*first.shape[:2], num_frames, *first.shape[2:])
    known = torch.zeros(num_frames, dtype=torch.bool, device=first.device)
    for frame, picture in pictures.items():
        frames[:, :, frame] = picture
        known[frame] = True
    return frames, known


def mask_channels(known: Tensor, temporal: int = 4) -> Tensor:
    """Which pixel frames [F] are known, as the channels of their latents: [temporal, T].

    A latent has a channel for each of its pixel frames; the first, which has one, has it in all of them. So a known
    last frame marks only the last channel of the last latent.
    """
    if known.ndim != 1 or (len(known) - 1) % temporal:
        raise InvalidRequest(f"{temporal}k+1 pixel frames are needed, not {list(known.shape)}")
    return torch.cat((known[:1].expand(temporal), known[1:])).unflatten(0, (-1, temporal)).T


# ---------------------------------------------------------------- Fun-InP: what is known, anywhere


def inpaint_condition(
    encode: Encode,
    frames: Tensor,
    mask: Tensor,
    shape: tuple[int, int, int, int],
    *,
    device: torch.device | str = "cpu",
    temporal: int = 4,
) -> Tensor:
    """Channels behind the noisy latents of a Fun-InP model: [1, temporal + C, T, h, w] on the device, mask first.

    frames: [F, 3, H, W] in [-1, 1], F = temporal * k + 1. mask: [F, 1, H, W], from 0.5 on what the model shall make.
    shape: (C, T, h, w) of the latents. Where nothing is known, mask and latents are zeros; of frames that are known as
    a whole this is `image_condition`.
    Source: aigc-apps/VideoX-Fun `videox_fun/pipeline/pipeline_wan2_2_fun_inpaint.py` (Apache-2.0).
    """
    free, (channels, T, h, w) = (mask >= 0.5).to(frames), shape
    if bool(free.all()):
        return torch.zeros(1, temporal + channels, T, h, w, dtype=torch.float32, device=device)
    latents = encode((frames * (1 - free)).movedim(0, 1)[None].to(device))
    known = 1 - _fold(free, temporal)
    parts = [(known[:, :, :1], 1), (known[:, :, 1:], T - 1)]
    resized = [F.interpolate(part, (count, h, w), mode="trilinear") for part, count in parts if count]
    return torch.cat((torch.cat(resized, 2).to(latents), latents), dim=1)


def latent_levels(mask: Tensor, size: tuple[int, ...], temporal: int = 4) -> Tensor | None:
    """The share of the noise level that a Fun model of timesteps per token is told: [T, h, w], 0 where pixels are
    known; None where nothing is. mask: [F, 1, H, W], from 0.5 on what the model shall make; size: (T, h, w)."""
    free = (mask >= 0.5).float()
    if bool(free.all()):
        return None
    return F.interpolate(_fold(free, temporal)[:, :1], size, mode="trilinear", align_corners=True)[0, 0]


def _fold(mask: Tensor, temporal: int) -> Tensor:
    """A mask [F, 1, H, W] with a channel for each frame of a latent: [1, temporal, T, H, W]; the first frame, which has
    a latent of its own, in all of them."""
    frames = torch.cat((mask[:1].expand(temporal, -1, -1, -1), mask[1:]))[:, 0]
    return frames.unflatten(0, (-1, temporal)).transpose(0, 1)[None]


# ---------------------------------------------------------------- VACE: the control branch


def vace_condition(
    encode: Encode,
    frames: Tensor,
    mask: Tensor,
    references: Sequence[Tensor] = (),
    *,
    spatial: int = 8,
    temporal: int = 4,
) -> Tensor:
    """What the control branch of a VACE model sees: [B, 2 C + spatial^2, R + T, h, w].

    frames: [B, 3, F, H, W] in [-1, 1]. mask: [B, 1, F, H, W], 1 where the model shall make pixels, 0 where those of
    frames stay. references: R pictures [B, 3, H, W] (see `fastvid.engine.pixels.fit_reference`); they are put in front
    in time, the last one first as diffusers does. So the model makes R latent frames more, to be dropped before
    decoding.
    Channels: what stays, what is to change, mask. Raises InvalidRequest for sizes that do not fit each other.
    """
    _check_control(frames, mask, references, spatial)
    change = (mask > 0.5).to(frames)
    latents = torch.cat((encode(frames * (1 - change)), encode(frames * change)), dim=1)
    out = torch.cat((latents, vace_masks(mask.to(latents), spatial, temporal)), dim=1)
    for picture in references:
        latents = encode(picture.to(frames)[:, :, None])
        rest = latents.new_zeros(latents.shape[0], out.shape[1] - latents.shape[1], *latents.shape[2:])
        out = torch.cat((torch.cat((latents, rest), dim=1), out), dim=2)
    return out


def vace_masks(mask: Tensor, spatial: int = 8, temporal: int = 4) -> Tensor:
    """A mask [B, 1, F, H, W] as channels, one for every pixel of a latent: [B, spatial^2, T, h, w].

    In time, the nearest frame is taken; the values, unlike those that part the frames, are not rounded.
    """
    B, _, frames, H, W = mask.shape
    h, w = H // spatial, W // spatial
    pixels = mask.reshape(B, frames, h, spatial, w, spatial).permute(0, 3, 5, 1, 2, 4).flatten(1, 2)
    return F.interpolate(pixels, ((frames + temporal - 1) // temporal, h, w), mode="nearest-exact")


def _check_control(frames: Tensor, mask: Tensor, references: Sequence[Tensor], spatial: int) -> None:
    if frames.ndim != 5 or any(side % spatial for side in frames.shape[3:]):
        raise InvalidRequest(
            f"frames are [B, 3, F, H, W] with H and W multiples of {spatial}, not {list(frames.shape)}"
        )
    B, _, count, H, W = frames.shape
    if mask.shape != (B, 1, count, H, W):
        raise InvalidRequest(f"the mask of these frames is {[B, 1, count, H, W]}, not {list(mask.shape)}")
    if wrong := [list(picture.shape) for picture in references if picture.shape != (B, 3, H, W)]:
        raise InvalidRequest(f"references for these frames are {[B, 3, H, W]}, not {wrong}")
