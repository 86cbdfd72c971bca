"""Sparse attention of a pipeline and of its requests: `load(attention="sparse:...")`, and where it cannot be."""

from __future__ import annotations

from dataclasses import replace

from fastvid.errors import InvalidRequest
from fastvid.models.loaded import Model
from fastvid.requests.request import Request, Resolved


def with_default(model: Model, request: Request) -> Request:
    """The request with the pipeline's own attention where it does not say what it wants, by `attention` or
    `quality="exact"`."""
    default = model.options.sparsity
    if default is None or request.attention is not None or request.quality == "exact":
        return request
    return replace(request, attention=default)


def said(model: Model, request: Resolved) -> dict[str, str]:
    """What a recipe says of dense attention: where the pipeline's own is sparse, that this request's is not."""
    return {"attention": "dense"} if model.options.sparsity and request.attention is None else {}


def check(model: Model, request: Resolved) -> None:
    """Raises InvalidRequest for sparse attention that this model or request cannot have."""
    if request.attention is None:
        return
    said, preset = f"attention={request.attention:.60}", model.preset
    if preset.rollout is not None:
        raise InvalidRequest(
            f"{said}: {preset.name} attends to a cache of earlier frames, which is dense; take attention='dense'"
        )
    if request.causal_attention:
        raise InvalidRequest(
            f"{said}: blocks of causal_attention see different frames, in dense attention; leave one of them out "
            "(attention='dense', causal_attention=False)"
        )
