"""Sampling: noise levels, solvers, guidance and noise. Pure functions on latents; knows no model."""

from fastvid.sampling.guidance import (
    Denoise,
    Denoiser,
    Guided,
    Switched,
    Velocities,
    Velocity,
    combine,
    flow_edit,
    keep_known,
    velocity_to_x0,
)
from fastvid.sampling.noise import StreamNoise, latent_noise
from fastvid.sampling.sigmas import find_solver, make_sigmas, shift_sigmas, timesteps
from fastvid.sampling.solvers import SOLVERS, SolverState

__all__ = [
    "SOLVERS",
    "Denoise",
    "Denoiser",
    "Guided",
    "SolverState",
    "StreamNoise",
    "Switched",
    "Velocities",
    "Velocity",
    "combine",
    "find_solver",
    "flow_edit",
    "keep_known",
    "latent_noise",
    "make_sigmas",
    "shift_sigmas",
    "timesteps",
    "velocity_to_x0",
]
