"""A model with other LoRAs: those that it has for all requests (`Pipeline.set_loras`), and those of one request.

Changes of 16 and 32 bit weights are merged into them, those of quantized weights are kept beside them: rounded to the
formats that they have, most of a change would be lost. A request's own are always beside the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from fastvid.device import cuda_graphs
from fastvid.device.offload import Resident
from fastvid.errors import CheckpointError
from fastvid.layers.branches import Branches
from fastvid.loaders.checkpoint import check_fill, fill
from fastvid.loaders.lora import Lora, as_tuples, changed_weights
from fastvid.loaders.lora_fit import fit, for_expert, is_quantized, of_quantized
from fastvid.models.description import Checkpoint, Part
from fastvid.models.loaded import Model, TextLength


def with_loras(model: Model, loras: Sequence[Lora]) -> Model:
    """The model as it is with these LoRAs, which are merged where they are to be."""
    beside = of_quantized(loras, model.experts.modules)
    model = replace(model, loras=as_tuples(loras), merged=changed_weights(loras), beside=beside)
    return replace(model, branches=_branches(model, ()))


def values_beside(loras: Sequence[Lora], checkpoint: Checkpoint) -> int:
    """How many values of LoRAs will be kept beside the quantized weights of a model that is not loaded yet."""
    held = {name for part in checkpoint.experts for name in checkpoint.part(part).quantized}
    terms = [term for lora in loras for name, terms in lora.terms.items() if name in held for term in terms]
    return sum(term.size for term in terms)


def for_request(model: Model, loras: Sequence[Any]) -> Model:
    """The model with a request's own LoRAs beside its weights. loras: checked. All is checked and nothing is computed;
    only files are read. Raises InvalidRequest, CheckpointError."""
    if not loras:
        return model
    download = not isinstance(model.tokenizer, TextLength)  # not to plan
    asked = tuple(lora for lora in fit(model.lora_cache.read(loras, download), model.checkpoint) if lora.scale != 0)
    return replace(model, asked=as_tuples(asked), branches=_branches(model, asked)) if asked else model


def _branches(model: Model, asked: Sequence[Lora]) -> tuple[Branches, ...]:
    """Of each expert. asked: the LoRAs of a request."""
    experts, made = model.experts, []
    stays = isinstance(experts.residency, Resident)
    for number, module in enumerate(experts.modules):
        own = of_quantized(for_expert(model.beside, number, len(experts)), [module])
        own += for_expert(asked, number, len(experts))
        made.append(model.lora_cache.builder.build(module, own, stays))
    return tuple(made) if any(made) else ()


def change_loras(model: Model, loras: Any) -> Model:
    """The model with its LoRAs replaced by these. Every plain weight that an old or a new LoRA changes is read from the
    model's files again, in every expert that has it; quantized ones are as their files have them anyway. Everything is
    checked before the first weight is read.
    """
    merging = fit(model.lora_cache.read(loras, download=True), model.checkpoint)
    stale = model.merged | changed_weights(merging)
    for module, part, own in _per_expert(model, merging):
        check_fill(module, part, own)
    changed = with_loras(model, merging)
    with model.experts.residency.change():
        for module in model.experts.modules:
            if isinstance(module.run, cuda_graphs.Graphs):
                module.run.free()  # graphs know weights by their addresses
        try:
            _refill(model, merging, stale)
        except CheckpointError:  # values that are not finite show only while merging
            _refill(model, fit(model.lora_cache.read(model.loras), model.checkpoint), stale)
            raise
    return changed


def _per_expert(model: Model, loras: Sequence[Lora]) -> list[tuple[nn.Module, Part, Sequence[Lora]]]:
    """Each expert's module and files, and the LoRAs that change it."""
    names = model.checkpoint.experts
    mine = [for_expert(loras, number, len(names)) for number in range(len(names))]
    return list(zip(model.experts.modules, map(model.checkpoint.part, names), mine, strict=True))


def _refill(model: Model, loras: Sequence[Lora], stale: frozenset[str]) -> None:
    for module, part, own in _per_expert(model, loras):
        if plain := frozenset(name for name in stale if not is_quantized(module, name)):
            fill(module, part, next(module.parameters()).device, model.dtype, own, plain, model.placement.mapped)
