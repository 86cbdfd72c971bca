"""Benchmarks, imported as `fastvid.benchmarks` only to be found: `harness` and one script a subject."""
