"""The levers of a segment: what each call of the transformer does less of. State belongs to one request and one
segment."""

from __future__ import annotations

from typing import Any

from fastvid.distributed.mesh import RankView
from fastvid.layers.levers import CallLevers
from fastvid.models.loaded import Model
from fastvid.requests.request import Resolved
from fastvid.requests.timeline import Segment
from fastvid.sampling.noise_table import TableRow


class SegmentLevers:
    """The levers of one segment of a request."""

    def __init__(self, model: Model, request: Resolved, segment: Segment, ranks: RankView) -> None:
        self._cache: Any = None
        self._sparsity: Any = None

    def of_call(self, row: TableRow, expert: int, prompt: int) -> CallLevers | None:
        """What the call of a table row, for an expert and a prompt's number, does less of; None: nothing."""
        if self._cache is None and self._sparsity is None:
            return None
        return CallLevers(self._cache, self._sparsity)
