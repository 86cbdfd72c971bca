"""The verbs: `Pipeline` and what stands behind it."""

from fastvid.pipeline.pipeline import Pipeline, Stream

__all__ = ["Pipeline", "Stream"]
