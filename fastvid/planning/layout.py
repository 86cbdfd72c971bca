"""Chooses how ranks share a request: the layout with the fastest predicted step among those that fit into memory.

The choice is the same on all ranks and in all runs. It depends only on configurations, the links that ranks agreed on,
the kind of device (not its measured speed) and the least memory of any rank. Rank 0's choice is final.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from fastvid.distributed import cost_model
from fastvid.distributed.cost_model import Prediction, Work
from fastvid.distributed.layout import agree, first, layouts_for
from fastvid.distributed.mesh import Layout
from fastvid.engine.sparsity import tile_of
from fastvid.errors import InvalidRequest
from fastvid.models.loaded import Model
from fastvid.models.wan.config import WanTransformerConfig
from fastvid.ops.sparse import tile_counts
from fastvid.requests.request import Resolved
from fastvid.requests.timeline import Segment, Timeline


@dataclass(frozen=True)
class Choice:
    """The chosen layout. predictions: of a step in each layout that fits, the chosen one first. too_large: layouts that
    do not fit. asked: the caller requested this layout."""

    layout: Layout
    predictions: tuple[Prediction, ...] = ()
    too_large: tuple[Layout, ...] = ()
    asked: bool = False

    @property
    def seconds(self) -> dict[str, float]:
        """Layout -> predicted seconds of a step."""
        return {str(one.layout): one.seconds for one in self.predictions}

    def why(self, device: str) -> str:
        """The reason for the choice, in a sentence; empty on one rank."""
        if not self.predictions:
            return ""
        best, *others = self.predictions
        reasons = [f"{best.seconds:.3g} s a step are predicted on {device}"]
        if self.asked:
            return f"as was asked; {reasons[0]}"
        if others:
            reasons.append(f"{others[0].seconds:.3g} s with {others[0].layout}, the next best")
        if self.too_large:
            reasons.append(f"{', '.join(map(str, self.too_large))} would not fit into memory")
        return "; ".join(reasons)


def work_of(
    config: WanTransformerConfig,
    grid: tuple[int, int, int],
    guided: bool,
    text_rows: int = 512,
    itemsize: int = 2,
    control_layers: int = 0,
) -> Work:
    """The sizes of a transformer's step on a grid (t, h, w) of tokens, for the cost model. Control layers count like
    other layers."""
    return Work(
        grid=grid,
        dim=config.dim,
        ffn_dim=config.ffn_dim,
        heads=config.num_attention_heads,
        layers=config.num_layers + control_layers,
        velocity=config.out_channels * prod(config.patch_size),
        guided=guided,
        text_rows=text_rows,
        itemsize=itemsize,
    )


def step_work(model: Model, request: Resolved, window: Segment) -> Work:
    """The sizes of a step on one window of latents."""
    config = model.transformer.config
    t, h, w = (n // p for n, p in zip(window.latent_shape(1)[1:], config.patch_size, strict=True))
    guided = request.guided(len(model.experts))
    rows, itemsize = model.tokenizer.text_length, model.dtype.itemsize
    return work_of(config, (t, h, w), guided, rows, itemsize, model.control_layers)


def layouts_of(model: Model, request: Resolved, timeline: Timeline, asked: Layout | None) -> list[Layout]:
    """The possible layouts of a request; only `asked` if it is not None. Raises InvalidRequest."""
    config, mesh = model.transformer.config, model.mesh
    _, ph, pw = config.patch_size
    sizes = [size for one in timeline.segments for size in ((one.seen,) if one.half is None else (one, one.small))]
    shapes = [segment.latent_shape(1)[2:] for segment in sizes]
    tokens = min((h // ph * (w // pw) for h, w in shapes), default=mesh.size)
    heads, guided = config.num_attention_heads, request.guided(len(model.experts))
    found = layouts_for(asked, mesh.size, heads, tokens, guided, model.links.per_host)
    if has_less_guidance(request):  # ranks that compute the negative prompt's half would wait in the other steps
        found = [layout for layout in found if layout.guidance == 1 or asked] or found
    if request.attention is not None:
        return _whole_tiles(found, request, shapes, (ph, pw))
    if not request.causal_attention:
        return found
    if whole := [layout for layout in found if layout.ring == 1]:
        return whole
    raise InvalidRequest(
        "causal_attention: a ring of ranks cannot attend in causal blocks; take ranks that divide the "
        f"{heads} heads (parallel='ulysses=...'), or turn them off (causal_attention=False, --no-causal-attention)"
    )


def has_less_guidance(request: Resolved) -> bool:
    """Whether some steps need one velocity alone, or both in one call."""
    levers = request.guidance_interval, request.guidance_every, request.guidance_batch
    return any(lever is not None for lever in levers)


def _whole_tiles(
    found: list[Layout], request: Resolved, shapes: list[tuple[int, int]], patch: tuple[int, int]
) -> list[Layout]:
    """The layouts in which every rank sees all keys of its heads and holds whole tiles of each frame."""
    frames = [(h // patch[0], w // patch[1]) for h, w in shapes]
    tiles = min((prod(tile_counts((1, *frame), (1, *tile_of(frame)))) for frame in frames), default=1)
    if kept := [layout for layout in found if layout.ring == 1 and layout.sequence <= tiles]:
        return kept
    raise InvalidRequest(
        f"attention={request.attention!s:.60}: tiles are chosen from all keys of a head, and a frame has {tiles} tiles"
        "; take ranks that divide the heads (parallel='ulysses=...'), no ring, and no more than there are tiles; or "
        "attention='dense'"
    )


def choose_layout(
    model: Model, work: Work, layouts: list[Layout], asked: bool, taken: Callable[[Layout], int], capacity: int
) -> Choice:
    """Choose the layout of a request. taken: layout -> bytes of device memory that the request needs.

    If no layout fits, chooses the one that needs the least memory; `check_fits` then refuses the request.
    """
    if model.mesh.size == 1:
        return Choice(layouts[0])
    needs = {layout: taken(layout) for layout in layouts}
    fits = [layout for layout in layouts if needs[layout] <= capacity] or [min(layouts, key=lambda one: needs[one])]
    links = model.links
    per_host = links.per_host or model.mesh.size
    predictions = cost_model.ranked(fits, work, links.device, links.near, links.far, per_host)
    best = fits[agree(model.mesh, fits.index(predictions[0].layout), first)]
    predictions.sort(key=lambda one: one.layout != best)
    return Choice(best, tuple(predictions), tuple(one for one in layouts if one not in fits), asked)
