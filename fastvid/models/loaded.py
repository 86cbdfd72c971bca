"""A loaded model: its modules on their device, and how they are to be used."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastvid.device.offload import Resident, Swapped, Weights
from fastvid.distributed.links import Links
from fastvid.distributed.mesh import Layout, Mesh
from fastvid.models.common.clip import CLIPVisionEncoder
from fastvid.models.common.experts import Experts
from fastvid.models.common.tokenizer import TextTokenizer, encode_prompt
from fastvid.models.common.umt5 import UMT5Encoder
from fastvid.models.description import Checkpoint
from fastvid.models.preset import Preset
from fastvid.models.wan.transformer import WanTransformer
from fastvid.models.wan.vae import WanVAE
from fastvid.models.wan.vae_bands import Bands
from fastvid.ops.dispatch import Ops


@dataclass(frozen=True)
class Sizes:
    """Weights of a model's parts as they are loaded; image: 0 in models that look at no pictures."""

    experts: tuple[Weights, ...]
    text: Weights
    vae: int
    image: int = 0

    @property
    def total(self) -> int:
        return sum(expert.total for expert in self.experts) + self.text.total + self.vae + self.image


@dataclass(frozen=True)
class Model:
    """A loaded model: modules on their device, and how they are to be used. `model` is the name it was loaded by.

    experts: the transformers, one or two; `experts.use` brings the one that is needed to the device. loras: the files
    that are merged, with their scales and where it is one the expert they are for; merged: the weights that they
    changed. sources: the parts that came from elsewhere, as they were given. offload: "none", "text" or "blocks" (see
    `fastvid.device.offload`); encoders: how the text encoder and the image encoder, in this order, come to the device;
    sizes: bytes of all weights as loaded. graphs: what replays the transformers' calls, if anything does; graphs_why:
    why it does or does not. vae_dtype: what the VAE computes in. mesh: the ranks that run it together, each with parts
    of its own; layout: how they share requests, None if each is shared as suits it; links: what joins them.
    """

    model: str
    checkpoint: Checkpoint | None
    preset: Preset
    tokenizer: TextTokenizer | Untold
    text_encoder: UMT5Encoder
    experts: Experts
    vae: WanVAE
    ops: Ops
    device: torch.device
    dtype: torch.dtype
    backend: str = "auto"
    attention: str = "auto"
    loras: tuple[tuple[Any, ...], ...] = ()
    merged: frozenset[str] = frozenset()
    image_encoder: CLIPVisionEncoder | None = None
    offload: str = "none"
    encoders: Resident | Swapped | None = None
    sizes: Sizes | None = None
    sources: tuple[tuple[str, str], ...] = ()
    graphs: Any = None
    graphs_why: str = ""
    vae_dtype: torch.dtype = torch.float32
    mesh: Mesh = field(default_factory=Mesh)
    layout: Layout | None = None
    links: Links = field(default_factory=Links)

    @property
    def transformer(self) -> WanTransformer:
        """The only transformer, or the one for high noise; both have the same configuration."""
        return self.experts.modules[0]

    @property
    def control_layers(self) -> int:
        """Layers of the transformer's control branch (VACE), 0 if it has none."""
        return len(getattr(self.transformer, "vace_blocks", ()))

    @property
    def settings(self) -> dict[str, Any]:
        """What `load` was asked for and made of it, as a recipe records it: what else decides the bytes."""
        dtype = str(self.dtype).removeprefix("torch.")
        made = {"dtype": dtype, "device": self.device.type, "backend": self.backend, "attention": self.attention}
        made |= {} if self.vae_dtype is torch.float32 else {"vae_dtype": str(self.vae_dtype).removeprefix("torch.")}
        made |= {"parts": dict(self.sources)} if self.sources else {}
        made |= {"parallel": str(self.layout or self.mesh.size)} if self.mesh.size > 1 else {}
        return made | ({"loras": [list(pair) for pair in self.loras]} if self.loras else {})

    @property
    def bytes_held(self) -> int:
        """Bytes of weights that are on the device now."""
        modules = [*self.experts.modules, self.text_encoder, self.vae, *filter(None, [self.image_encoder])]
        held = [p.nbytes for module in modules for p in module.parameters() if p.device.type == self.device.type]
        return sum(held)

    @property
    def bands(self) -> Bands | None:
        """The ranks that share a frame's rows in the VAE; None on one."""
        return Bands(self.mesh) if self.mesh.size > 1 else None

    def embed(self, prompt: str) -> Tensor:
        """Text embeddings [1, L, text_dim] of one prompt. Rank 0 reads it."""
        made = None
        if self.mesh.rank == 0:
            with self.encoders.use(0) as encoder:
                made = encode_prompt(encoder, self.tokenizer, [prompt]).to(self.device, self.dtype)
        return self.mesh.broadcast(made)

    def look(self, pixels: Tensor) -> Tensor:
        """What the image encoder makes of pictures [B, 3, S, S] -> [B, M, d]. Rank 0 looks at them."""
        made = None
        if self.mesh.rank == 0:
            with self.encoders.use(1) as encoder:
                made = encoder(pixels)
        return self.mesh.broadcast(made)


@dataclass(frozen=True)
class Untold:
    """What a plan asks of a tokenizer."""

    text_length: int


CHANNELS, CONTROL, TIMESTEPS, CACHE, REIMPOSED = "channels", "control", "timesteps", "cache", "reimposed"


def way_of(parts: Model) -> str:
    """How a model is told of known frames."""
    config = parts.transformer.config
    if parts.control_layers:
        return CONTROL
    if config.in_channels > config.out_channels:
        return CHANNELS
    if parts.preset.per_token_timesteps:
        return TIMESTEPS  # of causal models too: what their KV cache holds is no part of a window
    return REIMPOSED if parts.preset.rollout is None else CACHE
