"""Benchmarks: a shared `harness` and one script per subject."""
