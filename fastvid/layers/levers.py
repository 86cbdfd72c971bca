"""What one call of a transformer may do less of. Without levers a call computes everything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CallLevers:
    """blocks: a step cache for this call, which runs the blocks or reuses what they made in an earlier step. sparsity:
    which tiles of keys each layer's queries attend to. None: not in this call."""

    blocks: Any = None
    sparsity: Any = None
