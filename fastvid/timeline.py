"""A video as the pixel frames that are asked for, laid out on the latent frames that a model makes.

A causal VAE has two kinds of latent: the head of a stream is one frame, every later one, the body, is `temporal`
frames. The model makes whole latents at sizes that it can take; the tail and the right and bottom edges that were
not asked for are cropped.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Timeline:
    """All frames free: made from noise. Pixels: num_frames x height x width; made: the model's next sizes up. lead:
    latent frames that are made in front of the video and dropped, one for each reference picture."""

    num_frames: int
    height: int
    width: int
    made_frames: int
    made_height: int
    made_width: int
    spatial: int = 8
    temporal: int = 4
    lead: int = 0

    @property
    def columns(self) -> int:
        """Latent frames, those in front with them: the columns of the noise table."""
        return self.lead + (self.made_frames - 1) // self.temporal + 1

    def latent_shape(self, channels: int) -> tuple[int, int, int, int]:
        """(C, T, h, w) of the latents."""
        return channels, self.columns, self.made_height // self.spatial, self.made_width // self.spatial

    def without_lead(self, latents: Tensor, start: int) -> Tensor:
        """Latents [1, C, n, h, w] from column `start` on, without those in front of the video."""
        return latents[:, :, max(0, self.lead - start) :]

    def crop(self, frames: Tensor, start: int) -> Tensor:
        """Frames [n, H, W, 3] from frame `start` on, without what was not asked for."""
        return frames[: max(0, self.num_frames - start), : self.height, : self.width]
