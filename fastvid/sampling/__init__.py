"""Sampling: noise levels, solvers, guidance and noise. Pure functions on latents; knows no model."""
