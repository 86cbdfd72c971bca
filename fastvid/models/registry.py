"""The only table of model families: how each part of a checkpoint becomes a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from fastvid.device.offload import Weights, weigh
from fastvid.layers.quantized import install, layer_of
from fastvid.models.common.clip import CLIPVisionConfig, CLIPVisionEncoder
from fastvid.models.common.umt5 import UMT5Config, UMT5Encoder
from fastvid.models.wan.animate import WanAnimateTransformer
from fastvid.models.wan.animate_config import CLASS_NAME as DRIVEN
from fastvid.models.wan.animate_config import MARK, WanAnimateConfig
from fastvid.models.wan.config import WanFunConfig, WanTransformerConfig, WanVACEConfig, WanVAEConfig
from fastvid.models.wan.few_steps import FEW_STEPS, method_of
from fastvid.models.wan.fun import WanFunTransformer
from fastvid.models.wan.skyreels import SkyReelsTransformer
from fastvid.models.wan.transformer import WanTransformer
from fastvid.models.wan.vace import WanVACETransformer
from fastvid.models.wan.vae import WanVAE
from fastvid.models.wan.vae22 import WanVAE22
from fastvid.ops import reference
from fastvid.ops.quantized import Spec

__all__ = ["FEW_STEPS", "method_of"]

TransformerConfig = WanTransformerConfig | WanVACEConfig | WanFunConfig | WanAnimateConfig
Config = TransformerConfig | WanVAEConfig | UMT5Config | CLIPVisionConfig

EXPERTS = ("transformer", "transformer_2")  # high noise, low noise; most models have the first alone
ENCODERS = ("text_encoder", "image_encoder")
OPTIONAL = ("image_encoder",)  # parts that not every model has
FP32 = ("vae", "image_encoder")  # parts that stay in fp32, as published, if nothing else is asked for
CONTROLLED = "WanVACETransformer3DModel"
CAUSAL = "CausalWanTransformer3DModel"  # FastVideo's name of the same network, for rollouts
SKYREELS = "SkyReelsV2Transformer3DModel"  # the same network; its config.json says whether it is told the frame rate

SKYREELS_DEFAULTS = {"num_attention_heads": 16, "ffn_dim": 8192, "num_layers": 32}  # where they are not Wan's


@dataclass(frozen=True)
class PartKind:
    """How a sub-folder becomes a module: the class that model_index.json names, its config, and what builds it.

    also: other classes that read_config and build take. holders: classes that hold it beside other things, which its
    config.json may name. model_types: transformers' names of its kind.
    """

    class_name: str
    read_config: Callable[[dict[str, Any]], Any]
    build: Callable[[Any, Any], nn.Module]  # (config, ops)
    also: tuple[str, ...] = ()
    holders: tuple[str, ...] = ()
    model_types: tuple[str, ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes that its config.json may name."""
        return (self.class_name, *self.also, *self.holders)


def read_transformer(config: Mapping[str, Any]) -> TransformerConfig:
    """With a control branch if the file says where it hints, or names its class; as a sibling if it has its layers. Of
    a class with other defaults these count."""
    if config.get("add_ref_conv"):
        return WanFunConfig.from_dict(config)
    if config.get(MARK) is not None or config.get("_class_name") == DRIVEN:
        return WanAnimateConfig.from_dict(config)
    if config.get("_class_name") == SKYREELS:
        config = {**SKYREELS_DEFAULTS, **config}
    plain = config.get("vace_layers") is None and config.get("_class_name") != CONTROLLED
    return (WanTransformerConfig if plain else WanVACEConfig).from_dict(config)


TRANSFORMERS: Mapping[type, Callable[[Any, Any], WanTransformer]] = {
    WanTransformerConfig: lambda config, ops: (
        SkyReelsTransformer(config, ops) if config.inject_sample_info else WanTransformer(config, ops)
    ),
    WanVACEConfig: WanVACETransformer,
    WanFunConfig: WanFunTransformer,
    WanAnimateConfig: WanAnimateTransformer,
}


def build_transformer(config: TransformerConfig, ops: Any = reference) -> WanTransformer:
    return TRANSFORMERS[type(config)](config, ops)


def build_vae(config: WanVAEConfig, ops: Any = reference) -> WanVAE:
    return (WanVAE22 if config.is_residual else WanVAE)(config, ops)


KINDS: Mapping[str, PartKind] = {
    "transformer": PartKind(
        "WanTransformer3DModel", read_transformer, build_transformer, (CONTROLLED, DRIVEN, CAUSAL, SKYREELS)
    ),
    "vae": PartKind("AutoencoderKLWan", WanVAEConfig.from_dict, build_vae),
    "text_encoder": PartKind(
        "UMT5EncoderModel",
        UMT5Config.from_dict,
        lambda config, ops: UMT5Encoder(config),
        holders=("UMT5Model", "UMT5ForConditionalGeneration"),
        model_types=("umt5",),
    ),
    "image_encoder": PartKind(
        "CLIPVisionModel",
        CLIPVisionConfig.from_dict,
        CLIPVisionEncoder,
        also=("CLIPVisionModelWithProjection",),
        holders=("CLIPModel",),
        model_types=("clip_vision_model", "clip"),
    ),
}


# ---------------------------------------------------------------- modules without weights, and types of weights


def kind_of(name: str) -> PartKind:
    """How the part of that name is built: both experts are transformers."""
    return KINDS["transformer" if name in EXPERTS else name]


def build_empty(name: str, config: Config, ops: Any = reference) -> nn.Module:
    """A part without weights, on the meta device."""
    with torch.device("meta"):
        return kind_of(name).build(config, ops)


def hold_quantized(module: nn.Module, quantized: Mapping[str, Spec], dtype: torch.dtype, ops: Any = reference) -> None:
    """Lets an empty module that will be loaded as dtype hold weights as they are quantized. quantized: name -> how."""
    install(module, quantized, ops, partial(target_dtype, module, dtype=dtype))


def build_outline(
    name: str,
    config: Config,
    dtype: torch.dtype,
    vae_dtype: torch.dtype = torch.float32,
    quantized: Mapping[str, Spec] = MappingProxyType({}),
) -> nn.Module:
    """A part without weights, with the dtypes that they have in a model that is loaded as dtype, its VAE as vae_dtype.
    quantized: the weights that stay quantized."""
    module, kind = build_empty(name, config), part_dtype(name, dtype, vae_dtype)
    hold_quantized(module, quantized, kind)
    for weight, parameter in module.named_parameters():
        if parameter.dtype.is_floating_point and layer_of(module, weight) is None:
            parameter.data = parameter.data.to(target_dtype(module, weight, kind))
    return module


def weigh_part(
    name: str,
    config: Config,
    dtype: torch.dtype,
    vae_dtype: torch.dtype = torch.float32,
    quantized: Mapping[str, Spec] = MappingProxyType({}),
) -> Weights:
    """Bytes of a part's weights in a model that is loaded as dtype, from its configuration."""
    return weigh(build_outline(name, config, dtype, vae_dtype, quantized))


def part_dtype(name: str, dtype: torch.dtype, vae_dtype: torch.dtype = torch.float32) -> torch.dtype:
    """What a part is loaded as in a model that is loaded as dtype, its VAE as vae_dtype."""
    if name == "vae":
        return vae_dtype
    return torch.float32 if name in FP32 else dtype


def target_dtype(module: nn.Module, name: str, dtype: torch.dtype) -> torch.dtype:
    """What a weight becomes in a module that is loaded as dtype: fp32 if a part of its name is in FP32_PARTS."""
    kept = getattr(module, "FP32_PARTS", ())
    return dtype if frozenset(kept).isdisjoint(name.split(".")) else torch.float32
