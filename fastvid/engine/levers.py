"""The levers of a segment: what each call of the transformer does less of. State belongs to one request and one
segment."""

from __future__ import annotations

import numpy as np

from fastvid.distributed.mesh import RankView
from fastvid.engine import windows
from fastvid.engine.sparsity import SegmentSparsity, Settings
from fastvid.engine.step_cache import StepCache
from fastvid.engine.step_choice import method_of
from fastvid.engine.step_methods import Method
from fastvid.layers.levers import CallLevers
from fastvid.models.loaded import Model
from fastvid.requests.request import Resolved
from fastvid.requests.timeline import Segment
from fastvid.sampling.noise_table import TableRow


class SegmentLevers:
    """The levers of one segment of a request. sigmas: noise levels [N] of a window. cache: its step cache, if any."""

    def __init__(self, model: Model, request: Resolved, segment: Segment, ranks: RankView, sigmas: np.ndarray) -> None:
        method = method_of(model, request, windows.levels_of(model, segment, sigmas, request))
        self.cache, self._ranks = None if method is None else StepCache(method, ranks), ranks
        self._sparsity = None if request.attention is None else SegmentSparsity(Settings.of(request.attention), sigmas)

    def measure(self, method: Method) -> None:
        """Has a method in place of the request's that looks at what the blocks make."""
        self.cache = StepCache(method, self._ranks)

    def of_call(self, row: TableRow, expert: int, prompt: int) -> CallLevers | None:
        """What the call of a table row, for an expert and a prompt's number, does less of; None: nothing."""
        blocks = None if self.cache is None else self.cache.of_call(row, expert, prompt)
        sparsity = None if self._sparsity is None or self._sparsity.is_dense(row.sigma) else self._sparsity
        return None if blocks is None and sparsity is None else CallLevers(blocks, sparsity)
