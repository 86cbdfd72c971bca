"""From a model's name to its parts on a device."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastvid.device import cuda_graphs as graphs
from fastvid.device.devices import available_bytes, find_device, resolve_dtype, resolve_vae_dtype
from fastvid.device.offload import MODES, Resident, Swapped, weigh
from fastvid.distributed.layout import agree, parse
from fastvid.distributed.links import find_links
from fastvid.distributed.mesh import Layout, Mesh
from fastvid.errors import CheckpointError, InvalidRequest
from fastvid.loaders.checkpoint import check_fill, fill, load_part, open_checkpoint
from fastvid.loaders.find import EMBEDDED, read_tokenizer
from fastvid.loaders.lora import Lora, for_expert, named, read_loras, touched
from fastvid.models.common.experts import Experts
from fastvid.models.description import Checkpoint
from fastvid.models.loaded import Model, Sizes, Untold
from fastvid.models.preset import Preset
from fastvid.models.registry import EXPERTS, build_empty, part_dtype, weigh_module
from fastvid.models.wan import presets
from fastvid.ops import vae_gpu
from fastvid.ops.dispatch import Ops, bind
from fastvid.planning import memory
from fastvid.requests.request import default_request

AUTO = "auto"
ENCODERS = ("text_encoder", "image_encoder")


def load_parts(
    model: str | Path = EMBEDDED,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    backend: str = "auto",
    attention: str = "auto",
    loras: Sequence[Any] = (),
    offload: str = "auto",
    parts: Mapping[str, str | Path] | None = None,
    cuda_graphs: str | bool = "auto",
    vae_dtype: str | torch.dtype | None = None,
    link: str = AUTO,
    mesh: Mesh | None = None,
    layout: Layout | None = None,
) -> Model:
    """Load everything of a model; see `fastvid.load`. What was asked for is checked before any weight is read.

    mesh: the ranks that run it together, all of which load it with the same arguments but the device. layout: see
    Parts.
    """
    mesh = mesh or Mesh()
    where = find_device(device)
    kind, vae_kind = resolve_dtype(dtype, where), resolve_vae_dtype(vae_dtype)
    ops = bind(backend, attention, where)
    merging, asked, replay = read_loras(loras), check_offload(offload), graphs.check(cuda_graphs)
    links = find_links(link, mesh, where)
    checkpoint = open_checkpoint(model, parts, download=True).check()
    mode = (
        asked
        if asked != AUTO
        else choose_offload(configs_of(checkpoint), checkpoint.preset, where, kind, vae_dtype=vae_kind)
    )
    mode = MODES[agree(mesh, MODES.index(mode), max)]
    stay, caches = experts_stay(checkpoint, mode), checkpoint.preset.rollout is not None
    replaying, why = graphs.choose(replay, where, stay, caches, mesh.size)
    experts = load_experts(checkpoint, ops, where, kind, merging, mode)
    for module in experts.modules:
        module.run = replaying or module.run
    # An I2V model without an image encoder (A14B) sees its picture in the latents alone.
    names = [name for name in ENCODERS if name in [part.name for part in checkpoint.parts]]
    at = where if mode == "none" else torch.device("cpu")
    if mesh.rank == 0:
        loaded = [load_part(checkpoint, name, ops, at, part_dtype(name, kind)) for name in names]
    else:  # rank 0 reads texts and looks at pictures
        configs = configs_of(checkpoint)
        loaded = [build_empty(name, configs[name]).to(part_dtype(name, kind)) for name in names]
    staying = mode == "none" or mesh.rank > 0
    encoders = Resident(loaded) if staying else Swapped(loaded, where, stream=mode == "blocks")
    vae = load_part(checkpoint, "vae", ops, where, vae_kind)
    if ops.bound["vae_norm_silu_conv3d"] != "reference":
        vae_gpu.channels_last(vae)  # here once, instead of in every call
    tokenizer = read_tokenizer(checkpoint.tokenizer)
    made = Model(str(model), checkpoint, checkpoint.preset, tokenizer, loaded[0], experts, vae, ops, where, kind)
    image_encoder = loaded[1] if len(loaded) > 1 else None
    image_bytes = weigh(image_encoder).total if image_encoder is not None else 0
    sizes = Sizes(tuple(map(weigh, experts.modules)), weigh(loaded[0]), weigh(vae).total, image_bytes)
    made = replace(made, image_encoder=image_encoder, offload=mode, encoders=encoders, sizes=sizes)
    made = replace(made, loras=named(merging), merged=touched(merging), graphs=replaying, graphs_why=why)
    made = replace(made, vae_dtype=vae_kind, mesh=mesh, layout=layout, links=links)
    return replace(made, sources=tuple((name, str(path)) for name, path in (parts or {}).items()))


def check_offload(offload: Any) -> str:
    """The way of offloading that was asked for; InvalidRequest if there is no such way."""
    if not isinstance(offload, str) or offload not in (AUTO, *MODES):
        near = difflib.get_close_matches(str(offload).lower(), (AUTO, *MODES), 1, 0)[0]
        raise InvalidRequest(f"offload={offload!r:.40}: allowed is {', '.join((AUTO, *MODES))}; the nearest is {near}")
    return offload


def choose_offload(
    configs: Mapping[str, Any],
    preset: Preset,
    device: torch.device,
    dtype: torch.dtype,
    free: int | None = None,
    vae_dtype: torch.dtype = torch.float32,
) -> str:
    """The least offloading with which what the model's preset makes fits into the device's free memory; without a GPU,
    none: host and device are one memory there. free: bytes, of a device that is not here."""
    if device.type == "cpu":
        return "none"
    capacity = available_bytes(device) if free is None else free
    return memory.choose_offload(configs, default_request(preset), capacity, dtype, vae_dtype)


def configs_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The configuration of each part."""
    return {part.name: part.config for part in checkpoint.parts}


# ---------------------------------------------------------------- without weights


def outline(
    model: str | Path = EMBEDDED,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    backend: str = "auto",
    attention: str = "auto",
    loras: Sequence[Any] = (),
    offload: str = "auto",
    parts: Mapping[str, str | Path] | None = None,
    parallel: Any = None,
    cuda_graphs: str | bool = "auto",
    vae_dtype: str | torch.dtype | None = None,
    link: str = AUTO,
    free: int | None = None,
) -> Model:
    """What `load_parts` would make, with modules that have no weights: enough to plan with, and for nothing else.

    parallel: the ranks that it is planned for, as `parallel.parse` takes it; one if nothing is said.

    model: also the name of a published model, see `models.published`. free: bytes that can be taken of a device that is
    not here; "cuda" unless said otherwise, and nothing is known of its back ends.
    """
    where = torch.device("cuda") if free is not None and device is None else find_device(device)
    kind, asked, merging = resolve_dtype(dtype, where), check_offload(offload), read_loras(loras)
    ranks, vae_kind = parse(parallel), resolve_vae_dtype(vae_dtype)
    ops = bind(backend, attention, where) if free is None else Ops({}, {}, {})
    preset, configs, rows, checkpoint = _describe(model, parts)
    mode = asked if asked != AUTO else choose_offload(configs, preset, where, kind, free, vae_kind)
    empty = {name: build_empty(name, config) for name, config in configs.items()}
    weighed = {name: weigh_module(name, module, kind, vae_kind) for name, module in empty.items()}
    names = [name for name in EXPERTS if name in empty]
    image = weighed["image_encoder"].total if "image_encoder" in empty else 0
    made = Model(
        model=str(model),
        checkpoint=checkpoint,
        preset=preset,
        tokenizer=Untold(rows),
        text_encoder=empty["text_encoder"],
        experts=Experts([empty[name] for name in names], preset.boundary_ratio),
        vae=empty["vae"],
        ops=ops,
        device=where,
        dtype=kind,
        image_encoder=empty.get("image_encoder"),
        offload=mode,
        sizes=Sizes(tuple(weighed[name] for name in names), weighed["text_encoder"], weighed["vae"].total, image),
    )
    made = replace(
        made, vae_dtype=vae_kind, loras=named(merging), mesh=Mesh(size=ranks.ranks or 1), layout=ranks.layout
    )
    made = replace(made, links=find_links(link, made.mesh, where, planned=True))
    stays, caches = mode == "none" or (mode == "text" and len(names) == 1), preset.rollout is not None
    want, why = graphs.wanted(cuda_graphs, where, stays, caches, made.mesh.size)
    return replace(made, graphs=graphs.PLANNED if want else None, graphs_why=why)


def _describe(
    model: str | Path, parts: Mapping[str, str | Path] | None
) -> tuple[Preset, dict[str, Any], int, Checkpoint | None]:
    """Recipe, configurations by part, rows of text, and the checkpoint where there is one."""
    if (name := str(model).lower()) in presets.PUBLISHED and not Path(model).exists():
        return *presets.published_configs(name), presets.TEXT_LENGTH, None
    try:
        checkpoint = open_checkpoint(model, parts).check()
    except CheckpointError as error:
        if Path(model).exists() or "/" in str(model):
            raise
        near = difflib.get_close_matches(name, presets.PUBLISHED, 1, 0)[0]
        raise CheckpointError(f"{error}; published models are planned by name, the nearest is {near}") from None
    return checkpoint.preset, configs_of(checkpoint), checkpoint.text_length, checkpoint


def change_loras(parts: Model, loras: Any) -> Model:
    """The same model with these LoRAs in place of those it has: every weight that one of them changes, or has changed,
    is read again from the model's files, for every expert where it is. Everything is checked before the first is.
    """
    merging = read_loras(loras)
    stale = parts.merged | touched(merging)
    names = parts.checkpoint.experts
    mine = [for_expert(merging, number, len(names)) for number in range(len(names))]
    experts = list(zip(parts.experts.modules, map(parts.checkpoint.part, names), mine, strict=True))
    for module, part, loras in experts:
        check_fill(module, part, loras)
    with parts.experts.turns.change():
        if parts.graphs is not None:
            parts.graphs.free()  # they know weights by their places
        for module, part, loras in experts:
            fill(module, part, next(module.parameters()).device, parts.dtype, loras, only=stale)
    return replace(parts, loras=named(merging), merged=touched(merging))


def experts_stay(checkpoint: Checkpoint, offload: str) -> bool:
    """Whether the transformers stay on the device with this way of offloading."""
    return offload == "none" or (offload == "text" and len(checkpoint.experts) == 1)


def load_experts(
    checkpoint: Checkpoint,
    ops: Ops,
    device: torch.device,
    dtype: torch.dtype,
    loras: Sequence[Lora] = (),
    offload: str = "none",
) -> Experts:
    """The transformers, LoRAs merged into each, on the device or in host memory until their turn."""
    stay = experts_stay(checkpoint, offload)
    at = device if stay else torch.device("cpu")
    names = checkpoint.experts
    mine = [for_expert(loras, number, len(names)) for number in range(len(names))]
    modules = [load_part(checkpoint, name, ops, at, dtype, own) for name, own in zip(names, mine, strict=True)]
    turns = Resident(modules) if stay else Swapped(modules, device, stream=offload == "blocks", linger=True)
    return Experts(modules, checkpoint.preset.boundary_ratio, turns)
