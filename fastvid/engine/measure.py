"""Denoises a request for what can be measured on the way; nothing is decoded or kept."""

from __future__ import annotations

from collections.abc import Callable

from fastvid.distributed.mesh import RankView
from fastvid.engine import windows
from fastvid.engine.conditioning import SegmentDenoiser
from fastvid.engine.levers import SegmentLevers
from fastvid.engine.pixels import KnownFrames
from fastvid.engine.session import Job, PromptChanges, Prompts
from fastvid.models.loaded import Model
from fastvid.sampling.loop import walk
from fastvid.sampling.sigmas import find_solver


def denoise(model: Model, job: Job, prepare: Callable[[SegmentLevers], None]) -> None:
    """Denoises the first segment of a request without known frames. prepare: called with its levers before."""
    request, segment = job.request, job.timeline.segments[0]
    texts = Prompts(model, request, PromptChanges())
    for prompt in texts.of(segment):
        texts.embeds(prompt)
    ranks = RankView(model.mesh, job.layout)
    denoising = SegmentDenoiser(model, request, job.sigmas, segment, KnownFrames(), texts.embeds, ranks)
    prepare(denoising.levers)
    table = windows.table_of(model, segment, job.sigmas, denoising.conditions.columns, request, lambda column: False)
    rows = walk(
        table,
        denoising.initial,
        find_solver(request.solver),
        lambda row: denoising.denoiser(row, segment.prompts[0][1]),
        fresh=denoising.fresh,
        keep=windows.most_refilled(model, segment, any_block=True),
        anchor=model.preset.anchor is not None,
    )
    for row in rows:
        denoising.first = None if row.position is None else row.position.first
