"""The one place where all tokens meet, and so the one where sequence parallelism enters.

Models hand over the tokens that they hold and get back the same tokens' results. On a mesh of one that is plain
attention.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def self_attention(ops: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of every token to every token: q, k, v [B, N, H, D] -> [B, N, H * D]."""
    return ops.attention(q, k, v).flatten(2)


def cross_attention(ops: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of every token to a context that all ranks hold: q [B, N, H, D], k and v [B, M, H, D]."""
    return ops.attention(q, k, v).flatten(2)
