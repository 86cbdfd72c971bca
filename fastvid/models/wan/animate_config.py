"""What Wan-Animate's `transformer/config.json` says beside a picture-to-video transformer's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from fastvid.errors import CheckpointError
from fastvid.models.common.config_reader import LARGEST
from fastvid.models.wan.config import WanTransformerConfig

CLASS_NAME = "WanAnimateTransformer3DModel"
MARK = "motion_encoder_size"  # a key of a config that only this model has
SIZE_KEY, CHANNELS_KEY, LATENTS_KEY = "motion_encoder_size", "motion_encoder_channel_sizes", "latent_channels"
# Channels of the motion encoder by the side of its pictures: W22 `wan/modules/animate/motion_encoder.py`, EncoderApp.
CHANNELS: Mapping[int, int] = {
    **dict.fromkeys((4, 8, 16, 32), 512),
    **{64: 256, 128: 128, 256: 64, 512: 32, 1024: 16},
}
SMALLEST = 4  # side at which the encoder's last convolution reads the whole picture
IMAGE_DIM, IN_CHANNELS = 1280, 36  # what diffusers takes where a config does not say


@dataclass(frozen=True)
class WanAnimateConfig:
    """What `transformer/config.json` says: the transformer, its two encoders of a face, and where faces come in.

    motion_encoder_channel_sizes: (side, channels) pairs. inject_face_latents_blocks: after block 0, and after every so
    many, there is a face block. motion_encoder_batch_size: pictures that the motion encoder sees at once.
    """

    transformer: WanTransformerConfig
    motion_encoder_channel_sizes: tuple[tuple[int, int], ...] = tuple(CHANNELS.items())
    motion_encoder_size: int = 512
    motion_style_dim: int = 512
    motion_dim: int = 20
    motion_encoder_dim: int = 512
    face_encoder_hidden_dim: int = 1024
    face_encoder_num_heads: int = 4
    inject_face_latents_blocks: int = 5
    motion_encoder_batch_size: int = 8

    @property
    def face_layers(self) -> int:
        """The number of face blocks."""
        return self.transformer.num_layers // self.inject_face_latents_blocks

    @property
    def face_tokens(self) -> int:
        """Tokens of a face in a latent frame."""
        return self.face_encoder_num_heads + 1

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the motion encoder, from whole pictures to the smallest."""
        channels, side = dict(self.motion_encoder_channel_sizes), self.motion_encoder_size
        sides = [side >> level for level in range(side.bit_length()) if side >> level >= SMALLEST]
        return tuple(channels[one] for one in sides)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> WanAnimateConfig:
        """Read a diffusers config; CheckpointError for values that this model does not implement."""
        own = {field.name for field in fields(cls)} - {"transformer"}
        rest = {key: value for key, value in config.items() if key not in own | {LATENTS_KEY}}
        transformer = WanTransformerConfig.from_dict({"image_dim": IMAGE_DIM, "in_channels": IN_CHANNELS, **rest})
        sizes = {key: _whole(key, config[key]) for key in own - {CHANNELS_KEY} if config.get(key) is not None}
        made = cls(transformer, _channel_sizes(config.get(CHANNELS_KEY)), **sizes)
        made._check(config)
        return made

    def _check(self, config: Mapping[str, Any]) -> None:
        main, every, side = self.transformer, self.inject_face_latents_blocks, self.motion_encoder_size
        if main.num_layers % every:
            raise CheckpointError(
                f"transformer/config.json: num_layers is {main.num_layers}; a multiple of "
                f"inject_face_latents_blocks={every} is needed"
            )
        if side & (side - 1) or side < SMALLEST:
            raise CheckpointError(f"transformer/config.json: {SIZE_KEY} is {side}; a power of 2 from 4 on is needed")
        if missing := [one for one in (side >> n for n in range(side.bit_length() - 2)) if one not in self._channels]:
            raise CheckpointError(f"transformer/config.json: {CHANNELS_KEY} says nothing of side {missing[0]}")
        if main.in_channels != 2 * main.out_channels + 4 or config.get(LATENTS_KEY) not in (None, main.out_channels):
            raise CheckpointError(
                f"transformer/config.json: in_channels is {main.in_channels} and {LATENTS_KEY} "
                f"{config.get(LATENTS_KEY)!r:.80}; {2 * main.out_channels + 4} and {main.out_channels} are needed"
            )
        if main.pos_embed_seq_len:
            raise CheckpointError("transformer/config.json has pos_embed_seq_len; this model sees one picture")

    @property
    def _channels(self) -> dict[int, int]:
        return dict(self.motion_encoder_channel_sizes)


def _whole(key: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value <= LARGEST:
        raise CheckpointError(f"transformer/config.json: {key} is {value!r:.80}; a positive number is needed")
    return value


def _channel_sizes(given: Any) -> tuple[tuple[int, int], ...]:
    """JSON's {"512": 32, ...} as pairs of numbers."""
    if given is None:
        return tuple(CHANNELS.items())
    if not isinstance(given, Mapping) or not all(str(key).isdecimal() and len(str(key)) < 6 for key in given):
        raise CheckpointError(
            f"transformer/config.json: {CHANNELS_KEY} is {given!r:.60}; sides and channels are expected"
        )
    return tuple((int(side), _whole(CHANNELS_KEY, count)) for side, count in given.items())
