"""Sampling: noise levels, solvers, guidance and noise. Pure functions on latents; knows no model."""

from fastvid.sampling.guidance import (
    Denoise,
    Velocity,
    combine,
    denoiser,
    flow_edit,
    guided,
    known,
    switched,
    velocity_to_x0,
)
from fastvid.sampling.noise import column_noise, latent_noise
from fastvid.sampling.sigmas import check_sigmas, find_solver, make_sigmas, shift_sigmas, timesteps
from fastvid.sampling.solvers import SOLVERS, Solver, SolverState

__all__ = [
    "SOLVERS",
    "Denoise",
    "Solver",
    "SolverState",
    "Velocity",
    "check_sigmas",
    "column_noise",
    "combine",
    "denoiser",
    "find_solver",
    "flow_edit",
    "guided",
    "known",
    "latent_noise",
    "make_sigmas",
    "shift_sigmas",
    "switched",
    "timesteps",
    "velocity_to_x0",
]
