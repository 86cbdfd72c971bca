"""A loaded model: its modules on their device, what was asked for when it was loaded, and what was decided."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import starmap
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastvid.device.offload import Resident, Swapped, Weights, weigh
from fastvid.distributed.links import Links
from fastvid.distributed.mesh import Layout, Mesh
from fastvid.layers.branches import Branches
from fastvid.models.common.clip import CLIPVisionEncoder
from fastvid.models.common.experts import Experts
from fastvid.models.common.tokenizer import TextTokenizer, encode_prompt
from fastvid.models.common.umt5 import UMT5Encoder
from fastvid.models.description import Checkpoint
from fastvid.models.preset import Preset
from fastvid.models.text_cache import LIMIT, TextCache, padded
from fastvid.models.wan.transformer import WanTransformer
from fastvid.models.wan.vae import WanVAE
from fastvid.models.wan.vae_bands import Bands
from fastvid.ops.dispatch import Ops

# How a model is told of known frames: mask and latents as more channels, a control branch, timestep 0, its KV cache, or
# not at all (they are put back before every call).
CHANNELS, CONTROL, TIMESTEPS, CACHE, REIMPOSED = "channels", "control", "timesteps", "cache", "reimposed"
SPARSE = "sparse"  # `load(attention=...)` that is no back end, but what requests look at
DRIVEN = "driven"  # by a pose and a face; what is known reaches it as channels


@dataclass(frozen=True)
class LoadOptions:
    """What `load` was asked for: see `fastvid.load`. layout: how ranks share requests; None: each as suits it."""

    device: str | torch.device | None = None
    dtype: str | torch.dtype | None = None
    backend: str = "auto"
    attention: str = "auto"
    loras: Any = ()
    offload: str = "auto"
    parts: Mapping[str, str | Path] | None = None
    cuda_graphs: str | bool = "auto"
    vae_dtype: str | torch.dtype | None = None
    link: str = "auto"
    layout: Layout | None = None
    variant: str | None = None
    quantize: str | None = None
    text_cache: int = LIMIT
    mmap: str | bool = "auto"

    @property
    def sparsity(self) -> str | None:
        """What requests look at that do not say it: sparse attention, or None."""
        return self.attention if self.attention.partition(":")[0] == SPARSE else None

    @property
    def attention_backend(self) -> str:
        return "auto" if self.sparsity else self.attention


@dataclass(frozen=True)
class Placement:
    """Where a model's weights are and what it computes in, as decided when it was loaded.

    dtype: of transformers and text encoder. offload: one of `fastvid.device.offload.MODES`. graphs: the transformers'
    calls are replayed as CUDA graphs. reasons: why, for "offload", "cuda_graphs" and "dtype". mapped: the files whose
    weights are used where they lie.
    """

    device: torch.device
    dtype: torch.dtype
    vae_dtype: torch.dtype
    offload: str
    graphs: bool
    reasons: Mapping[str, str]
    mapped: frozenset[Path] = frozenset()


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model's weights as they are loaded. image: 0 in models without an image encoder."""

    experts: tuple[Weights, ...]
    text: Weights
    vae: int
    image: int = 0

    @property
    def total(self) -> int:
        return sum(expert.total for expert in self.experts) + self.text.total + self.vae + self.image


@dataclass(frozen=True)
class TextLength:
    """Stands for the tokenizer of a model that is only planned with."""

    text_length: int


@dataclass(frozen=True)
class Modules:
    """A model's networks. encoders: the text encoder and, in models that look at pictures, the image encoder.
    `experts.use` and `encoders.use` bring the one that is needed to the device. texts: what the text encoder made."""

    tokenizer: TextTokenizer | TextLength
    encoders: Resident | Swapped
    experts: Experts
    vae: WanVAE
    texts: TextCache = field(default_factory=TextCache)


@dataclass(frozen=True)
class Model:
    """A loaded model, or one without weights to plan with.

    name: what it was loaded by. loras: (file, scale) or (file, scale, expert) of those that it has for all requests;
    merged: the weights that they change. mesh: the ranks that run it together; links: what joins them.

    What LoRAs change without being merged: beside: of `loras` the changes of quantized weights. asked: the LoRAs of one
    request, as `loras`. branches: of each expert what both add while it is in use. lora_cache: files that were read
    (`fastvid.loaders.lora_cache`).
    """

    name: str
    checkpoint: Checkpoint
    preset: Preset
    modules: Modules
    ops: Ops
    options: LoadOptions
    placement: Placement
    loras: tuple[tuple[Any, ...], ...] = ()
    merged: frozenset[str] = frozenset()
    mesh: Mesh = field(default_factory=Mesh)
    links: Links = field(default_factory=Links)
    beside: tuple[Any, ...] = field(default=(), repr=False)
    asked: tuple[tuple[Any, ...], ...] = ()
    branches: tuple[Branches, ...] = field(default=(), repr=False)
    lora_cache: Any = field(default=None, repr=False)

    # ------------------------------------------------------------ modules

    @property
    def tokenizer(self) -> TextTokenizer | TextLength:
        return self.modules.tokenizer

    @property
    def text_encoder(self) -> UMT5Encoder:
        return cast(UMT5Encoder, self.modules.encoders.modules[0])

    @property
    def image_encoder(self) -> CLIPVisionEncoder | None:
        return cast(CLIPVisionEncoder | None, next(iter(self.modules.encoders.modules[1:]), None))

    @property
    def experts(self) -> Experts:
        return self.modules.experts

    @property
    def transformer(self) -> WanTransformer:
        """The only transformer, or the one for high noise; both have the same configuration."""
        return cast(WanTransformer, self.experts.modules[0])

    @property
    def vae(self) -> WanVAE:
        return self.modules.vae

    @property
    def control_layers(self) -> int:
        """Layers of the transformer's control branch (VACE), 0 if it has none."""
        return len(getattr(self.transformer, "vace_blocks", ()))

    @property
    def face_layers(self) -> int:
        """Blocks of the transformer that look at a face, 0 if a face does not drive it."""
        return len(getattr(self.transformer, "face_adapter", ()))

    @property
    def face_side(self) -> int:
        """Height and width of the pictures of a face that a driven model sees."""
        return int(cast(Any, self.transformer).animate_config.motion_encoder_size)

    @property
    def takes_reference(self) -> bool:
        """Whether a reference picture stands in front of the video (Fun-Control)."""
        return hasattr(self.transformer, "ref_conv")

    @cached_property
    def sizes(self) -> Sizes:
        """Bytes of all weights, on the device or not."""
        image = 0 if self.image_encoder is None else weigh(self.image_encoder).total
        experts = tuple(map(weigh, self.experts.modules))
        if self.branches:
            pairs = zip(self.experts.modules, experts, self.branches, strict=True)
            experts = tuple(starmap(with_branches, pairs))
        return Sizes(experts, weigh(self.text_encoder), weigh(self.vae).total, image)

    @property
    def bytes_held(self) -> int:
        """Bytes of weights that are on the device now."""
        modules: list[nn.Module] = [*self.experts.modules, *self.modules.encoders.modules, self.vae]
        held = sum(p.nbytes for module in modules for p in module.parameters() if p.device.type == self.device.type)
        return held + sum(branches.held(self.device) for branches in self.branches)

    @contextmanager
    def use_expert(self, number: int) -> Iterator[nn.Module]:
        """One of the transformers, on the device and with the branches of LoRAs until the block ends."""
        with self.experts.use(number) as module:
            if self.branches:
                with self.branches[number].attached(module, self.device):
                    yield module
            else:
                yield module

    # ------------------------------------------------------------ how it runs

    @property
    def device(self) -> torch.device:
        return self.placement.device

    @property
    def dtype(self) -> torch.dtype:
        return self.placement.dtype

    @property
    def vae_dtype(self) -> torch.dtype:
        return self.placement.vae_dtype

    @property
    def offload(self) -> str:
        return self.placement.offload

    @property
    def layout(self) -> Layout | None:
        """How the ranks share requests; None: each is shared as suits it."""
        return self.options.layout

    @property
    def bands(self) -> Bands | None:
        """The ranks that share a frame's rows in the VAE; None on one."""
        return Bands(self.mesh) if self.mesh.size > 1 else None

    @property
    def sources(self) -> dict[str, str]:
        """The parts that came from elsewhere, as they were given."""
        return {name: str(path) for name, path in (self.options.parts or {}).items()}

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the bytes of a video beside the request, as a recipe records it."""
        made: dict[str, Any] = {"dtype": str(self.dtype).removeprefix("torch."), "device": self.device.type}
        made |= {"backend": self.options.backend, "attention": self.options.attention_backend}
        made |= {} if self.vae_dtype is torch.float32 else {"vae_dtype": str(self.vae_dtype).removeprefix("torch.")}
        made |= {"parts": self.sources} if self.sources else {}
        made |= {"variant": self.options.variant} if self.options.variant else {}
        made |= {"quantize": self.options.quantize} if self.options.quantize else {}
        made |= {"parallel": str(self.layout or self.mesh.size)} if self.mesh.size > 1 else {}
        return made | ({"loras": [list(lora) for lora in self.loras]} if self.loras else {})

    # ------------------------------------------------------------ encoders

    def embed(self, prompt: str) -> Tensor:
        """Text embeddings [1, L, text_dim] of one prompt. Rank 0 reads it, or has it in its cache."""
        made = None
        if self.mesh.rank == 0:
            tokenizer = cast(TextTokenizer, self.tokenizer)  # nobody reads prompts with a model to plan with
            ids = tuple(tokenizer([prompt])[0][0].tolist())
            rows = self.modules.texts.get(ids, lambda: self._encode(tokenizer, prompt, len(ids)))
            made = padded(rows.to(self.device), tokenizer.text_length)
        return self.mesh.broadcast(made)

    def _encode(self, tokenizer: TextTokenizer, prompt: str, count: int) -> Tensor:
        """The embeddings of a prompt's tokens, without padding."""
        with self.modules.encoders.use(0) as encoder:
            return encode_prompt(encoder, tokenizer, [prompt])[:, :count].to(self.device, self.dtype)

    def look(self, pixels: Tensor) -> Tensor:
        """What the image encoder makes of pictures [B, 3, S, S] -> [B, M, d]. Rank 0 looks at them."""
        made = None
        if self.mesh.rank == 0:
            with self.modules.encoders.use(1) as encoder:
                made = encoder(pixels)
        return self.mesh.broadcast(made)


def with_branches(module: nn.Module, weights: Weights, branches: Branches) -> Weights:
    """The bytes of a module's weights with its branches. Of streamed blocks, a branch is on the device while its layer
    computes."""
    sizes = {name: branch.nbytes for name, branch in branches.layers.items()}
    lists = [name for name in getattr(module, "STREAMED", ())]
    blocks = [f"{name}.{i}." for name in lists for i in range(len(cast(nn.ModuleList, module.get_submodule(name))))]
    inside = [sum(size for name, size in sizes.items() if name.startswith(block)) for block in blocks]
    rest = sum(sizes.values()) - sum(inside) + branches.value_bytes
    added = tuple(map(sum, zip(weights.blocks, inside, strict=True)))
    return Weights(weights.rest + rest, added, weights.buffer + max(sizes.values(), default=0))


def way_of(model: Model) -> str:
    """How a model is told of known frames: CHANNELS, CONTROL, ..."""
    config = model.transformer.config
    if model.control_layers:
        return CONTROL
    if model.face_layers:
        return DRIVEN
    if config.in_channels > config.out_channels:
        return CHANNELS
    if model.preset.per_token_timesteps:
        return TIMESTEPS  # of causal models too: what their KV cache holds is no part of a window
    return REIMPOSED if model.preset.rollout is None else CACHE
