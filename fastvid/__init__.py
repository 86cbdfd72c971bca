"""fastvid: a fast runtime for video diffusion transformers."""

__version__ = "0.1.0"
