"""Wan-Animate: the picture-to-video transformer, driven by a skeleton (pose) and a face. The pose is added to the
video's tokens; those of the face are attended to after block 0, 5, 10, ... Parameter names are those of diffusers'
WanAnimateTransformer3DModel.

Shapes: as in `fastvid.models.wan.transformer`; latents have 1 + T frames, the first of which is the character's; M
tokens of a face in a latent frame, F frames of the face video, S side of its pictures.
Maths: Wan2.2 `wan/modules/animate/` (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastvid.errors import InvalidRequest
from fastvid.layers.attention import cross_attention
from fastvid.layers.causal_blocks import CausalBlocks
from fastvid.layers.kv_cache import KVCache
from fastvid.layers.levers import CallLevers, is_enough
from fastvid.layers.linear import Linear, linear
from fastvid.layers.residual import Stream
from fastvid.layers.sequence_parallel import SequenceParallel
from fastvid.models.wan.animate_config import WanAnimateConfig
from fastvid.models.wan.animate_motion import FaceEncoder, MotionEncoder
from fastvid.models.wan.config import WanTransformerConfig
from fastvid.models.wan.transformer import AnyContext, Inputs, Modulation, WanTransformer, cross_attentions
from fastvid.ops import reference

TEMPORAL = 4  # frames of the face video in a latent frame: the face encoder halves time twice


class AnimateContext(NamedTuple):
    """What the blocks look at (see `wan.Context`), keys and values of the face for each face block
    [B * (1 + T), M, heads, head_dim], and the pose, which all branches of a request share."""

    layers: tuple[tuple[Tensor, ...], ...]
    face: tuple[tuple[Tensor, Tensor], ...]
    pose: Tensor  # [B, C, T, H, W]


class FaceBlock(nn.Module):
    """The attention of each latent frame's tokens to that frame's tokens of the face."""

    def __init__(self, config: WanTransformerConfig, ops: Any) -> None:
        super().__init__()
        self.ops, self.eps, self.heads = ops, config.eps, config.num_attention_heads
        self.to_q = Linear(config.dim, config.dim)
        self.to_k = Linear(config.dim, config.dim)
        self.to_v = Linear(config.dim, config.dim)
        self.to_out = Linear(config.dim, config.dim)
        self.norm_q = nn.RMSNorm(config.attention_head_dim, config.eps)
        self.norm_k = nn.RMSNorm(config.attention_head_dim, config.eps)

    def project_face(self, face: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the face's tokens [B, T, M, d]: two tensors [B * T, M, heads, head_dim]."""
        face = nn.functional.layer_norm(face.flatten(0, 1), face.shape[-1:], eps=self.eps)
        keys = self.ops.rms_norm(self._to_heads(linear(self.ops, self.to_k, face)), self.norm_k.weight, self.eps)
        return keys, self._to_heads(linear(self.ops, self.to_v, face))

    def forward(self, stream: Stream, modulation: Modulation, face: tuple[Tensor, Tensor]) -> Stream:
        """Adds what the face says to the stream. face: keys and values from `project_face`."""
        ones = torch.ones_like(modulation.rows[:, 0])
        zeros, index = torch.zeros_like(ones), modulation.groups
        x, y, gate = stream.take()
        x, y = self.ops.gated_residual_norm(x, y, gate, zeros, zeros, index, self.eps)
        frames = len(face[0]) // len(x)
        q = self._to_heads(linear(self.ops, self.to_q, y).unflatten(1, (frames, -1)).flatten(0, 1))
        q = self.ops.rms_norm(q, self.norm_q.weight, self.eps)
        y = cross_attention(self.ops, q, *face).unflatten(0, (len(x), frames)).flatten(1, 2)
        return Stream(x, linear(self.ops, self.to_out, y), ones)

    def _to_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))


class WanAnimateTransformer(WanTransformer):
    """Velocity (noise - clean) of noisy video latents, given their noise level, a text, a character, a pose and a face.

    config: WanAnimateConfig. ops: an object with the functions of `fastvid.ops.reference`.
    `forward` is that of WanTransformer with a context from `prepare_context`.
    """

    FP32_PARTS = (*WanTransformer.FP32_PARTS, "motion_synthesis_weight")
    STREAMED = ("blocks", "face_adapter")

    def __init__(self, config: WanAnimateConfig, ops: Any = reference) -> None:
        super().__init__(config.transformer, ops)
        self.animate_config, main = config, config.transformer
        self.pose_patch_embedding = nn.Conv3d(main.out_channels, main.dim, main.patch_size, main.patch_size)
        self.motion_encoder = MotionEncoder(config)
        self.face_encoder = FaceEncoder(config)
        self.face_adapter = nn.ModuleList([FaceBlock(main, ops) for _ in range(config.face_layers)])

    def prepare_context(
        self,
        text_embeds: Tensor,
        image_embeds: Tensor | None = None,
        *,
        pose: Tensor | None = None,
        face: Tensor | None = None,
    ) -> AnimateContext:
        """Everything that depends on the condition alone, once a segment and guidance branch.

        text_embeds [B, L, text_dim], image_embeds [B, M, image_dim]: of the character. pose [B, C, T, H, W]: latents of
        the skeleton video. face [B, 3, F, S, S] in [-1, 1], F = 4 T - 3, or 1 for a face that is always the same.
        """
        batch = text_embeds.shape[0]
        pose, face = self._check_pose(pose, batch), self._check_face(face, pose, batch)
        embedded = self._embed(text_embeds, image_embeds)
        layers = tuple(one.project_context(*embedded) for one in self.walk(cross_attentions(self.blocks)))
        tokens = self.encode_face(face, pose.shape[2])
        return AnimateContext(layers, tuple(block.project_face(tokens) for block in self.walk(self.face_adapter)), pose)

    def encode_face(self, face: Tensor, latent_frames: int) -> Tensor:
        """The tokens [B, 1 + T, M, d] of a face video; those of the character's frame are zeros."""
        place = self.patch_embedding.weight.device
        pictures = face.transpose(1, 2).flatten(0, 1).split(self.animate_config.motion_encoder_batch_size)
        motion = torch.cat([self.motion_encoder(some.to(place)) for some in pictures]).unflatten(0, (len(face), -1))
        tokens = self.face_encoder(motion.expand(-1, TEMPORAL * latent_frames - 3, -1))
        return torch.cat((torch.zeros_like(tokens[:, :1]), tokens), dim=1)

    def _check_context(self, context: AnyContext, latents: Tensor, cache: KVCache | CausalBlocks | None) -> None:
        """The pose has the latents' height and width, and a frame less."""
        if cache is not None:
            raise InvalidRequest("models that are driven by a pose keep no KV cache")
        assert isinstance(context, AnimateContext)
        (t, *size), (latent_t, *latent_size) = context.pose.shape[2:], latents.shape[2:]
        if size != latent_size or t + 1 != latent_t:
            raise InvalidRequest(
                f"the pose is {[t, *size]} (T, H, W) and does not fit latents of {[latent_t, *latent_size]}, of which "
                "the first frame is the character's"
            )

    def _shard(self, inputs: Inputs, parallel: SequenceParallel) -> Inputs:
        assert isinstance(inputs.context, AnimateContext)
        pose = parallel.shard(inputs.context.pose, self.config.patch_size)
        return super()._shard(inputs, parallel)._replace(context=inputs.context._replace(pose=pose))

    def _through_blocks(
        self,
        stream: Stream,
        modulation: Modulation,
        context: AnyContext,
        rotary: tuple[Tensor, Tensor],
        cache: Any,
        parallel: SequenceParallel | None,
        levers: CallLevers | None,
    ) -> Stream:
        assert isinstance(context, AnimateContext)
        stream, every = self._with_pose(stream, context.pose), self.animate_config.inject_face_latents_blocks
        walk: Iterator[Any] = self.walk(self._in_order())
        for number, layer in enumerate(context.layers):
            stream = next(walk)(stream, modulation, layer, rotary, None, parallel)
            if number % every == 0:
                stream = next(walk)(stream, modulation, context.face[number // every])
            if is_enough(levers, stream):
                return stream
        next(walk, None)
        return stream

    def _with_pose(self, stream: Stream, pose: Tensor) -> Stream:
        """The video's tokens with those of the pose added, which has none for the character's frame."""
        x, *_ = stream.take()
        tokens = self.ops.patch_embed(pose, self.pose_patch_embedding.weight, self.pose_patch_embedding.bias)
        character, rest = x.split((x.shape[1] - tokens.shape[1], tokens.shape[1]), dim=1)
        return Stream(torch.cat((character, rest + tokens), dim=1))

    def _in_order(self) -> list[nn.Module]:
        """The blocks of both lists in the order in which they run."""
        every = self.animate_config.inject_face_latents_blocks
        faces = {every * number: block for number, block in enumerate(self.face_adapter)}
        return [b for number, block in enumerate(self.blocks) for b in (block, faces.get(number)) if b is not None]

    def _check_pose(self, pose: Tensor | None, batch: int) -> Tensor:
        wanted, patch = (batch, self.config.out_channels), self.config.patch_size
        if (
            pose is None
            or pose.ndim != 5
            or pose.shape[:2] != wanted
            or any(n % p for n, p in zip(pose.shape[2:], patch, strict=True))
        ):
            given = None if pose is None else list(pose.shape)
            raise InvalidRequest(
                f"a pose [{batch}, {wanted[1]}, T, H, W] is needed, T, H, W multiples of {patch}, not {given}"
            )
        return pose

    def _check_face(self, face: Tensor | None, pose: Tensor, batch: int) -> Tensor:
        side, frames = self.animate_config.motion_encoder_size, TEMPORAL * pose.shape[2] - 3
        shapes = [(batch, 3, count, side, side) for count in (frames, 1)]
        if face is None or tuple(face.shape) not in shapes:
            given = None if face is None else list(face.shape)
            raise InvalidRequest(f"a face {list(shapes[0])}, or of 1 frame, is needed for this pose, not {given}")
        return face
