"""What tests of ranks share: sizes of groups, errors, and the bytes that ranks should send."""

from __future__ import annotations

import pytest
import torch

from fastvid.distributed.mesh import Layout

# Two ranks in the fast tests.
SIZES = [2, *(pytest.param(size, marks=pytest.mark.slow) for size in (3, 4))]


def relative(made: torch.Tensor, true: torch.Tensor) -> float:
    """The error of a tensor as a share of its norm."""
    return ((made.double() - true.double()).norm() / true.double().norm()).item()


def bytes_of_a_step(layout: Layout, tokens: int, width: int, layers: int, values: int, itemsize: int) -> int:
    """Bytes that all ranks send in a step with guidance, by the table in docs/gpus.md.

    values: of a velocity per token, in fp32. itemsize: bytes of a value inside the model.
    """
    group, ring, ranks = layout.ulysses, layout.ring, layout.sequence
    attention = 4 * tokens * width * (group - 1) // group + 2 * tokens * width * (ring - 1)
    calls = 2 * (layers * attention * itemsize + 4 * tokens * values * (ranks - 1))
    return calls + (2 * ranks * 4 * tokens * values if layout.guidance == 2 else 0)
