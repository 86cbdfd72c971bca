"""`Pipeline`: loads a model, and prepares and runs requests."""

from fastvid.pipeline.pipeline import Pipeline, Stream

__all__ = ["Pipeline", "Stream"]
