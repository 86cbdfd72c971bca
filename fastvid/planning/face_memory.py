"""Memory of what a driven model has beside a picture-to-video transformer: the pose, the face's tokens, and what makes
them, before the first step of a segment."""

from __future__ import annotations

from fastvid.models.wan.animate_config import WanAnimateConfig

# Peak memory of the motion encoder, in tensors of the size of its first activation; of the face encoder likewise.
# Measured on their operations (tests/planning/test_face_memory.py).
MOTION_TENSORS, FACE_TENSORS = 4.1, 3.2
FP32_BYTES = 4


def channels(config: WanAnimateConfig | None) -> int:
    """Channels of the pose, and of what stands behind the noisy latents."""
    return 0 if config is None else config.transformer.in_channels


def token_bytes(config: WanAnimateConfig | None, columns: int, texts: int, itemsize: int) -> int:
    """Bytes of keys and values of the face's tokens for every face block and guidance branch."""
    if config is None:
        return 0
    return 2 * config.face_layers * columns * config.face_tokens * config.transformer.dim * itemsize * texts


def encoder_bytes(config: WanAnimateConfig | None, frames: int, itemsize: int) -> int:
    """Peak bytes of the two encoders on a face video of so many frames, whose pictures lie in host memory."""
    if config is None:
        return 0
    batch, side = min(frames, config.motion_encoder_batch_size), config.motion_encoder_size
    pictures = batch * 3 * side**2 * FP32_BYTES
    motion = batch * config.widths[0] * side**2 * itemsize * MOTION_TENSORS
    hidden = frames * config.face_encoder_hidden_dim * config.face_encoder_num_heads * itemsize * FACE_TENSORS
    return pictures + round(max(motion, hidden))
