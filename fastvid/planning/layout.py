"""How ranks share a request: of the layouts that its heads, tokens and guidance allow, those that fit into memory, and
of these the one whose steps the cost model (`fastvid.distributed.cost_model`) predicts to be the fastest.

What decides is the same on all ranks and in every run: configurations, the links that ranks have agreed on, a kind of
device rather than what was measured on one, and the least memory that a rank has. Rank 0's choice is everyone's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fastvid.distributed import cost_model
from fastvid.distributed import layout as parallel
from fastvid.distributed.cost_model import Prediction, Work
from fastvid.distributed.mesh import Layout
from fastvid.models.loaded import Model
from fastvid.requests.request import Resolved
from fastvid.requests.timeline import Segment, Timeline


@dataclass(frozen=True)
class Choice:
    """A layout. made: predictions of a step in those that fit, the fastest first. left_out: those that do not fit.
    asked: there was nothing to choose."""

    layout: Layout
    made: tuple[Prediction, ...] = ()
    left_out: tuple[Layout, ...] = ()
    asked: bool = False

    @property
    def seconds(self) -> dict[str, float]:
        """Predicted of a step, by layout."""
        return {str(one.layout): one.seconds for one in self.made}

    def why(self, device: str) -> str:
        """In a sentence."""
        if not self.made:
            return ""
        said = [f"{self.made[0].seconds:.3g} s a step are predicted on {device}"]
        if self.asked:
            return f"as was asked; {said[0]}"
        if len(self.made) > 1:
            said.append(f"{self.made[1].seconds:.3g} s with {self.made[1].layout}, the next best")
        if self.left_out:
            said.append(f"{', '.join(map(str, self.left_out))} would not fit into memory")
        return "; ".join(said)


def layouts_of(
    parts: Model, request: Resolved, timeline: Timeline, asked: Layout | None = None
) -> tuple[list[Layout], bool]:
    """How ranks can share a request, and whether that is as was asked (asked: in this request, before what the model
    was loaded with). Raises InvalidRequest."""
    config, mesh, asked = parts.transformer.config, parts.mesh, asked or parts.layout
    _, ph, pw = config.patch_size
    shapes = [segment.latent_shape(1)[2:] for segment in timeline.segments]
    tokens = min((h // ph * (w // pw) for h, w in shapes), default=mesh.size)
    heads, guided = config.num_attention_heads, request.guided(len(parts.experts))
    return parallel.layouts_for(asked, mesh.size, heads, tokens, guided, parts.links.per_host), asked is not None


def work_of(parts: Model, request: Resolved, window: Segment) -> Work:
    """A step, with a control branch's layers as more of the same."""
    config = parts.transformer.config
    t, h, w = (n // p for n, p in zip(window.latent_shape(1)[1:], config.patch_size, strict=True))
    config = replace(config, num_layers=config.num_layers + parts.control_layers)
    guided = request.guided(len(parts.experts))
    return Work(config, (t, h, w), guided, parts.tokenizer.text_length, parts.dtype.itemsize)


def choose(
    parts: Model, work: Work, layouts: Sequence[Layout], asked: bool, taken: Callable[[Layout], int], capacity: int
) -> Choice:
    """taken: bytes of the device that a request takes in a layout. Where it fits in none, the one that takes the
    least: what is planned with it is refused, and says what would fit."""
    if parts.mesh.size == 1:
        return Choice(layouts[0])
    needs = {layout: taken(layout) for layout in layouts}
    fits = [layout for layout in layouts if needs[layout] <= capacity] or [min(layouts, key=lambda one: needs[one])]
    links = parts.links
    made = cost_model.ranked(fits, work, links.device, links.near, links.far, links.per_host or parts.mesh.size)
    best = fits[parallel.agree(parts.mesh, fits.index(made[0].layout), parallel.first)]
    made.sort(key=lambda one: one.layout != best)
    return Choice(best, tuple(made), tuple(one for one in layouts if one not in fits), asked)
