"""What the configuration files of Wan's networks say: dataclasses for the transformers and the VAEs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastvid import notices
from fastvid.errors import CheckpointError
from fastvid.models.common.config_reader import LARGEST, read_fields

HEAD_DIM = 128  # of every published transformer
# Mean and standard deviation of the published latents by their channels: Wan2.1 `wan/modules/vae.py`, Wan2.2
# `wan/modules/vae2_2.py`.
# fmt: off
LATENT_STATISTICS: Mapping[int, tuple[tuple[float, ...], tuple[float, ...]]] = {
    16: (
        (
            -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
            0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
        ),
        (
            2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
            3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.916,
        ),
    ),
    48: (
        (
            -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
            0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
            -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
            -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
        ),
        (
            0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
            0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
            0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
            0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
        ),
    ),
}
# fmt: on
MAX_LEVELS, MAX_BLOCKS = 8, 128  # published VAEs have 4 levels of 2 blocks
SMALLEST_STD = 1e-30  # of which fp32 can take the reciprocal
QK_NORM = "rms_norm_across_heads"
UNSET_VAE = ("decoder_base_dim", "patch_size", "is_residual", "latents_mean", "latents_std")  # null: the default
OPTIONAL = ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len", "inject_sample_info")
# What trainers and other programs write into any config, and what is not read of a VAE's: of training, or it follows
# from the network.
HARMLESS = {
    *("architectures", "attn_implementation", "dropout", "dtype", "gradient_checkpointing", "library_name"),
    *("license", "model_type", "quantization_config", "tags", "torch_dtype", "transformers_version", "use_cache"),
    "use_gradient_checkpointing",
}
INERT_VAE = {
    *("attn_scales", "clip_output", "in_channels", "out_channels", "sample_size", "scale_factor_spatial"),
    *("scale_factor_temporal", "use_slicing", "use_tiling"),
}
# Keys of the original repositories and of no effect, with the values that they may have; (): any.
BESIDE: Mapping[str, tuple[Any, ...]] = {
    **{"qk_norm": (QK_NORM, True), "rope_max_seq_len": (), "text_len": (512, None), "window_size": ([-1, -1], None)},
    **{"local_attn_size": (-1, None), "sink_size": (0, None), "num_frame_per_block": (1, None)},
    **{"add_ref_conv": (False, None), "in_dim_ref_conv": (), "add_control_adapter": (False, None)},
    **{"in_dim_control_adapter": (), "downscale_factor_control_adapter": ()},
}


@dataclass(frozen=True)
class WanTransformerConfig:
    """What `transformer/config.json` says. Width d is num_attention_heads * attention_head_dim.

    image_dim, added_kv_proj_dim: width of a picture's tokens before and after the image embedder; 0 in models that see
    no CLIP tokens. pos_embed_seq_len: how many tokens first and last picture have together; 0 if they get no positions.
    inject_sample_info: it is told the frame rate (SkyReels V2).
    """

    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = 40
    patch_size: tuple[int, int, int] = (1, 2, 2)
    cross_attn_norm: bool = True
    eps: float = 1e-6
    image_dim: int = 0
    added_kv_proj_dim: int = 0
    pos_embed_seq_len: int = 0
    inject_sample_info: bool = False

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> WanTransformerConfig:
        """Read a diffusers config; CheckpointError for values that this model does not implement."""
        out = config.get("out_channels", cls.out_channels) or config.get("in_channels", cls.in_channels)
        config = {**config, "out_channels": out}
        config = {key: value for key, value in config.items() if key not in OPTIONAL or value is not None}
        if config.get("vace_layers") is not None:
            raise CheckpointError("transformer/config.json has vace_layers: it is a VACE model, not a plain one")
        for key, allowed in BESIDE.items():
            if allowed and key in config and config[key] not in allowed:
                raise CheckpointError(
                    f"transformer/config.json has {key}={config[key]!r:.80}; only {allowed[0]!r} is known"
                )
        made = read_fields(cls(), config, "transformer/config.json", ignored={*BESIDE, *HARMLESS})
        if made.attention_head_dim % 2 or made.freq_dim % 2:
            raise CheckpointError("transformer/config.json: attention_head_dim and freq_dim have to be even")
        if len(made.patch_size) != 3:
            raise CheckpointError(f"transformer/config.json: patch_size is {config['patch_size']!r}; three are needed")
        made._check_image_widths()
        return made

    def _check_image_widths(self) -> None:
        if self.added_kv_proj_dim != (self.dim if self.image_dim else 0):
            raise CheckpointError(
                f"transformer/config.json has image_dim={self.image_dim} (width of a CLIP picture) and "
                f"added_kv_proj_dim={self.added_kv_proj_dim} (attention to picture tokens); a model needs both, the "
                f"second as wide as the model ({self.dim}), or neither"
            )


@dataclass(frozen=True)
class WanVACEConfig:
    """What `transformer/config.json` says: the transformer, and the control stack beside it.

    vace_layers: the block of the transformer that each control block hints at, ascending from 0.
    """

    transformer: WanTransformerConfig
    vace_layers: tuple[int, ...] = (0, 5, 10, 15, 20, 25, 30, 35)
    vace_in_channels: int = 96

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> WanVACEConfig:
        """Read a diffusers config; CheckpointError for values that this model does not implement."""
        layers = cls.vace_layers if config.get("vace_layers") is None else config["vace_layers"]
        channels = config.get("vace_in_channels", cls.vace_in_channels)
        rest = {key: value for key, value in config.items() if key not in ("vace_layers", "vace_in_channels")}
        transformer = WanTransformerConfig.from_dict(rest)
        whole = isinstance(layers, list | tuple) and all(type(layer) is int for layer in layers)
        if not whole or list(layers) != sorted({0, *layers}) or layers[0] < 0 or layers[-1] >= transformer.num_layers:
            raise CheckpointError(
                f"transformer/config.json: vace_layers is {layers!r:.80}; a list of layers is needed that ascends from "
                f"0 and stays below num_layers={transformer.num_layers}"
            )
        if type(channels) is not int or not 1 <= channels <= LARGEST:
            raise CheckpointError(
                f"transformer/config.json: vace_in_channels is {channels!r:.80}; a positive number is needed"
            )
        return cls(transformer, tuple(layers), channels)


@dataclass(frozen=True)
class WanFunConfig:
    """What `transformer/config.json` says of a Control model with a reference picture (VideoX-Fun, `add_ref_conv`): the
    transformer, and how many channels the picture's latent has."""

    transformer: WanTransformerConfig
    in_dim_ref_conv: int = 16

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> WanFunConfig:
        """Read a config; CheckpointError for values that this model does not implement."""
        rest = {key: value for key, value in config.items() if key not in ("add_ref_conv", "in_dim_ref_conv")}
        transformer = WanTransformerConfig.from_dict(rest)
        channels = config.get("in_dim_ref_conv") or transformer.out_channels
        if channels != transformer.out_channels:
            raise CheckpointError(
                f"transformer/config.json: in_dim_ref_conv is {channels!r:.80}; as many as out_channels, "
                f"{transformer.out_channels}, are needed"
            )
        return cls(transformer, channels)


@dataclass(frozen=True)
class WanVAEConfig:
    """What `vae/config.json` says; the defaults are Wan 2.1's. Channel widths are base_dim * dim_mult in the encoder
    and decoder_base_dim * dim_mult in the decoder (0: base_dim there too); temporal scale is 2 per True. is_residual:
    it is the Wan 2.2 network, whose frames are patches of patch_size x patch_size pixels.
    """

    base_dim: int = 96
    decoder_base_dim: int = 0
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    patch_size: int = 1
    latents_mean: tuple[float, ...] = LATENT_STATISTICS[16][0]
    latents_std: tuple[float, ...] = LATENT_STATISTICS[16][1]
    is_residual: bool = False

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> WanVAEConfig:
        """Reads a diffusers AutoencoderKLWan configuration; CheckpointError for what this network cannot do."""
        config = {key: value for key, value in config.items() if key not in UNSET_VAE or value is not None}
        if config.get("attn_scales"):
            raise CheckpointError(
                f"vae/config.json has attn_scales={config['attn_scales']!r:.80}; only [] is supported"
            )
        if not config.get("is_residual") and config.get("patch_size", 1) != 1:
            raise CheckpointError(
                f"vae/config.json has patch_size={config['patch_size']!r:.80}; only the Wan 2.2 VAE (is_residual) has "
                "patches"
            )
        if unknown := sorted(key for key in config if config[key] and not _is_vae_key(key)):
            notices.warn(
                f"vae/config.json: {', '.join(unknown):.200} is not read; AutoencoderKLWan has no such setting"
            )
        made = read_fields(cls._published(config), config, "vae/config.json", strict=False)
        made._check(config)
        return made

    @classmethod
    def _published(cls, config: Mapping[str, Any]) -> WanVAEConfig:
        """The defaults, with the statistics that were published for this number of channels."""
        channels = config.get("z_dim", cls.z_dim)
        mean, std = LATENT_STATISTICS[48 if type(channels) is int and channels == 48 else 16]
        return cls(latents_mean=mean, latents_std=std)

    def _check(self, config: Mapping[str, Any]) -> None:
        if len(self.latents_mean) != self.z_dim or len(self.latents_std) != self.z_dim:
            raise CheckpointError(f"vae/config.json: latents_mean and latents_std need z_dim={self.z_dim} numbers each")
        if len(self.temperal_downsample) != len(self.dim_mult) - 1:
            raise CheckpointError(
                f"vae/config.json: temperal_downsample has {len(self.temperal_downsample)} values; one less than "
                f"dim_mult, {len(self.dim_mult) - 1}, are needed"
            )
        if len(self.dim_mult) > MAX_LEVELS or len(self.dim_mult) * self.num_res_blocks > MAX_BLOCKS:
            raise CheckpointError(
                f"vae/config.json: dim_mult has {len(self.dim_mult)} levels of num_res_blocks={self.num_res_blocks}; "
                f"at most {MAX_LEVELS} levels and {MAX_BLOCKS} blocks in all are allowed"
            )
        if not all(SMALLEST_STD < value < 1 / SMALLEST_STD for value in self.latents_std):
            raise CheckpointError("vae/config.json: latents_std needs positive numbers, which latents are divided by")
        for key in ("in_channels", "out_channels"):
            if self.is_residual and config.get(key, 3) != self.frame_channels:
                raise CheckpointError(
                    f"vae/config.json has {key}={config.get(key, 3)!r:.80}; RGB in patches of "
                    f"patch_size={self.patch_size} needs {self.frame_channels}"
                )

    @property
    def decoder_dim(self) -> int:
        return self.decoder_base_dim or self.base_dim

    @property
    def frame_channels(self) -> int:
        """Channels of the frames as the network's first layer sees them."""
        return 3 * self.patch_size**2

    @property
    def widest(self) -> int:
        """Values that the widest activation (in 2.2 the last upsampler's) holds for each pixel of a frame."""
        if not self.is_residual:
            return self.base_dim
        return self.decoder_dim * self.dim_mult[:2][-1] // self.patch_size**2

    @property
    def spatial_scale(self) -> int:
        return self.patch_size * 2 ** (len(self.dim_mult) - 1)

    @property
    def temporal_scale(self) -> int:
        return 2 ** sum(self.temperal_downsample)


def _is_vae_key(key: str) -> bool:
    return key.startswith("_") or key in HARMLESS | INERT_VAE or key in WanVAEConfig.__dataclass_fields__


WAN22_VAE = WanVAEConfig(
    160,
    256,
    48,
    patch_size=2,
    latents_mean=LATENT_STATISTICS[48][0],
    latents_std=LATENT_STATISTICS[48][1],
    is_residual=True,
)
