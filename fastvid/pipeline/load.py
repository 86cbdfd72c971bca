"""Loads a model by name onto its device, or describes one without weights, for planning."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from fastvid.checks import nearest_name, one_of
from fastvid.device import cuda_graphs
from fastvid.device.devices import AUTO, KINDS, available_bytes, choose_dtype, find_device, resolve_vae_dtype
from fastvid.device.mapped import files_to_map
from fastvid.device.offload import MODES, Resident, Swapped
from fastvid.distributed.cards import Card
from fastvid.distributed.layout import agree, parse_parallel
from fastvid.distributed.links import device_of, find_links
from fastvid.distributed.mesh import Mesh
from fastvid.errors import CheckpointError, InvalidRequest
from fastvid.loaders import copies, quantize
from fastvid.loaders.checkpoint import load_part, open_checkpoint
from fastvid.loaders.find import read_tokenizer
from fastvid.loaders.lora import Lora, read_loras
from fastvid.loaders.lora_cache import LoraCache
from fastvid.loaders.lora_fit import fit, for_expert
from fastvid.loaders.names import EMBEDDED
from fastvid.models.common.experts import Experts
from fastvid.models.description import Checkpoint, Part
from fastvid.models.loaded import LoadOptions, Model, Modules, Placement, TextLength
from fastvid.models.registry import ENCODERS, build_outline, part_dtype
from fastvid.models.text_cache import TextCache
from fastvid.models.wan import variants
from fastvid.ops import vae_gpu
from fastvid.ops.dispatch import Ops, bind
from fastvid.pipeline.loras import values_beside, with_loras
from fastvid.planning import memory
from fastvid.requests.request import default_request

OFFLOAD = one_of((AUTO, *MODES))
DEFAULTS = LoadOptions()
CPU = torch.device("cpu")

log = logging.getLogger("fastvid.load")


def load_model(source: str | Path = EMBEDDED, options: LoadOptions = DEFAULTS, mesh: Mesh | None = None) -> Model:
    """Loads a model; see `fastvid.load`. All options are checked before any weight is read.

    mesh: the ranks that run it together; all load it with the same options except the device.
    """
    device, loras, mesh = check_options(options), read_loras(options.loras, download=True), mesh or Mesh()
    ops = bind(options.backend, options.attention_backend, device)
    links = find_links(options.link, mesh, device)
    place = copies.find(source, options.quantize) or source
    checkpoint = open_checkpoint(place, options.parts, download=True, variant=options.variant).check()
    checkpoint = quantize.apply(checkpoint, options.quantize)
    loras = fit(loras, checkpoint)
    placement = choose_placement(checkpoint, options, mesh, values=values_beside(loras, checkpoint))
    files = [path for part in checkpoint.parts for path in part.files]
    placement = replace(placement, mapped=files_to_map(files, options.mmap, device))
    modules = load_modules(checkpoint, ops, placement, loras, mesh.rank)
    modules = replace(modules, texts=TextCache(options.text_cache))
    parts = str(source), checkpoint, checkpoint.require_preset(), modules, ops, options, placement
    return with_loras(Model(*parts, mesh=mesh, links=links, lora_cache=LoraCache()), loras)


def outline(
    source: str | Path = EMBEDDED,
    options: LoadOptions = DEFAULTS,
    *,
    parallel: Any = None,
    free: int | None = None,
    card: Card | None = None,
    format: str | None = None,
) -> Model:
    """The model that `load_model` would return, with modules without weights; only for planning.

    source: also the name of a published model (`fastvid.models.wan.variants.PUBLISHED`). parallel: the ranks to plan
    for, see `fastvid.load`; default: one. free: available bytes of a device that this machine does not have; it is
    "cuda" by default, and its back ends are unknown. card: what it is. format: of a published model's files.
    """
    ranks = parse_parallel(parallel)
    planned_device = "cuda" if free is not None and options.device is None else options.device
    options, mesh = replace(options, device=planned_device, layout=ranks.layout), Mesh(size=ranks.ranks or 1)
    device, loras = check_options(options), read_loras(options.loras)
    ops = bind(options.backend, options.attention_backend, device) if free is None else Ops({}, {}, {})
    links = find_links(options.link, mesh, device, planned=True)
    links = replace(links, device=device_of(card)) if card else links
    checkpoint = quantize.apply(describe(source, options, format), options.quantize)
    loras = fit(loras, checkpoint)
    placement = choose_placement(checkpoint, options, mesh, free, values_beside(loras, checkpoint))
    modules = empty_modules(checkpoint, placement)
    parts = str(source), checkpoint, checkpoint.require_preset(), modules, ops, options, placement
    return with_loras(Model(*parts, mesh=mesh, links=links, lora_cache=LoraCache()), loras)


# ---------------------------------------------------------------- options and placement


def check_options(options: LoadOptions) -> torch.device:
    """Checks the options before anything is read, and returns the device. Raises InvalidRequest for invalid ones."""
    device = find_device(options.device)
    choose_dtype(options.dtype, device)
    resolve_vae_dtype(options.vae_dtype, device)
    cuda_graphs.check("cuda_graphs", options.cuda_graphs)
    OFFLOAD("offload", options.offload)
    if options.quantize is not None:
        quantize.check("quantize", options.quantize)
    return device


def choose_placement(
    checkpoint: Checkpoint, options: LoadOptions, mesh: Mesh, free: int | None = None, values: int = 0
) -> Placement:
    """A model's device, dtypes, offload mode and CUDA graphs. free: available bytes of a device that this machine does
    not have. values: of LoRAs beside quantized weights.

    Raises BackendUnavailable or InvalidRequest if CUDA graphs are requested but impossible.
    """
    device = find_device(options.device)
    dtype, dtype_why = choose_dtype(options.dtype, device)
    dtype = KINDS[agree(mesh, KINDS.index(dtype))] if options.dtype == AUTO else dtype
    vae_dtype = resolve_vae_dtype(options.vae_dtype, device)
    offload, why = options.offload, "asked for"
    if offload == AUTO:
        free = available_bytes(device) if free is None else free
        free = max(0, free - values * dtype.itemsize)
        offload, why = choose_offload(checkpoint, device, dtype, vae_dtype, free)
    offload = MODES[agree(mesh, MODES.index(offload), max)]
    stays, caches = experts_stay(checkpoint, offload), checkpoint.require_preset().rollout is not None
    graphs, graphs_why = cuda_graphs.choose(options.cuda_graphs, device, stays, caches, mesh.size)
    reasons = {"offload": why, "cuda_graphs": graphs_why, "dtype": dtype_why}
    return Placement(device, dtype, vae_dtype, offload, graphs, reasons)


def choose_offload(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, vae_dtype: torch.dtype, free: int
) -> tuple[str, str]:
    """(mode, reason): the least offloading with which the preset's default video fits into a device's free bytes."""
    if device.type == "cpu":
        return MODES[0], "host and device are one memory"
    request = default_request(checkpoint.require_preset())
    mode = memory.choose_offload(checkpoint.configs, request, free, dtype, vae_dtype, checkpoint.quantized)
    return mode, f"by the default video and the {_size(free)} that are free"


def experts_stay(checkpoint: Checkpoint, offload: str) -> bool:
    """Whether the transformers stay on the device in this offload mode."""
    return offload == "none" or (offload == "text" and len(checkpoint.experts) == 1)


def describe(source: str | Path, options: LoadOptions, format: str | None = None) -> Checkpoint:
    """The description of a local checkpoint, or of a published model by name, without any files, which would be in
    this format."""
    if (name := str(source).lower()) in variants.PUBLISHED and not Path(source).exists():
        preset, configs = variants.published_configs(name)
        parts = tuple(Part(part, config) for part, config in configs.items())
        made = Checkpoint(Path(name), "", parts, preset, (), variants.TEXT_LENGTH, ())
        return quantize.in_format(made, format) if format else made
    if format:
        raise InvalidRequest(f"format={format!r}: the files of {source!s:.80} say how they are stored; leave it out")
    try:
        place = copies.find(source, options.quantize) or source
        return open_checkpoint(place, options.parts, variant=options.variant).check()
    except CheckpointError as error:
        if "/" in str(source) or os.path.exists(source):  # False for a name that is too long
            raise
        near = nearest_name(name, variants.PUBLISHED)
        raise CheckpointError(f"{error}; published models are planned by name, the nearest is {near}") from None


def runs_with(checkpoint: Checkpoint) -> dict[str, Any]:
    """What would compute a checkpoint's quantized layers here: operation, back end and reason; empty without any."""
    if not checkpoint.quantized:
        return {}
    device = find_device(None)
    ops = bind(device=device)
    names = ("linear", "linear_quantized")
    return {"runs": {name: f"{ops.bound[name]} ({ops.reasons[name]})" for name in names} | {"device": str(device)}}


# ---------------------------------------------------------------- modules


def load_modules(
    checkpoint: Checkpoint, ops: Ops, placement: Placement, loras: Sequence[Lora] = (), rank: int = 0
) -> Modules:
    """All modules of a model, with weights on the device, or in host memory until they are used."""
    experts = load_experts(checkpoint, ops, placement, loras)
    encoders = load_encoders(checkpoint, ops, placement, rank)
    vae = read_part(checkpoint, "vae", ops, placement.device, placement)
    if placement.device.type == "cuda" or ops.bound["vae_norm_silu_conv3d"] in ("triton", "channels_last"):
        vae_gpu.channels_last(vae)  # once, instead of in every call
    return Modules(read_tokenizer(checkpoint.tokenizer), encoders, experts, cast(Any, vae))


def load_experts(checkpoint: Checkpoint, ops: Ops, placement: Placement, loras: Sequence[Lora] = ()) -> Experts:
    """The transformers, with LoRAs merged into their plain weights."""
    names, device = checkpoint.experts, placement.device
    stay = experts_stay(checkpoint, placement.offload)
    mine = [for_expert(loras, number, len(names)) for number in range(len(names))]
    at = device if stay else CPU
    ops = ops if stay else replace(ops, device=None)  # weights that move keep the form in which they can
    modules = [read_part(checkpoint, name, ops, at, placement, own) for name, own in zip(names, mine, strict=True)]
    if placement.graphs:
        run = cuda_graphs.Graphs(cuda_graphs.CudaCapture(device))
        for module in modules:
            cast(Any, module).run = run
    streamed = placement.offload == "blocks"
    residency = Resident(modules) if stay else Swapped(modules, device, stream=streamed, linger=True)
    return Experts(modules, checkpoint.require_preset().boundary_ratio, residency)


def load_encoders(checkpoint: Checkpoint, ops: Ops, placement: Placement, rank: int = 0) -> Resident | Swapped:
    """Text encoder and image encoder; without weights on ranks other than 0, since only rank 0 encodes prompts and
    pictures."""
    # Some I2V models (A14B) have no image encoder: the picture reaches them through the latents alone.
    names = [name for name in ENCODERS if name in checkpoint.configs]
    if rank > 0:
        held = checkpoint.quantized
        empty = (build_outline(x, checkpoint.configs[x], placement.dtype, quantized=held.get(x, {})) for x in names)
        return Resident(list(empty))
    stay = placement.offload == "none"
    at = placement.device if stay else CPU
    ops = ops if stay else replace(ops, device=None)
    modules = [read_part(checkpoint, name, ops, at, placement) for name in names]
    return Resident(modules) if stay else Swapped(modules, placement.device, stream=placement.offload == "blocks")


def read_part(
    checkpoint: Checkpoint, name: str, ops: Ops, device: torch.device, placement: Placement, loras: Sequence[Lora] = ()
) -> nn.Module:
    """One part of a model with its weights, on a device."""
    start, part = time.perf_counter(), checkpoint.part(name)
    dtype = part_dtype(name, placement.dtype, placement.vae_dtype)
    module = load_part(checkpoint, name, ops, device, dtype, loras, placement.mapped)
    source = part.files[0] if len(part.files) == 1 else part.files[0].parent
    took = time.perf_counter() - start
    log.info("%s: %s from %s in %.1f s, on %s as %s", name, _size(part.bytes), source, took, device, dtype)
    return module


def empty_modules(checkpoint: Checkpoint, placement: Placement) -> Modules:
    """All modules of a model, without weights."""
    kinds = placement.dtype, placement.vae_dtype
    held = checkpoint.quantized
    empty = {name: build_outline(name, one, *kinds, held.get(name, {})) for name, one in checkpoint.configs.items()}
    experts = Experts([empty[name] for name in checkpoint.experts], checkpoint.require_preset().boundary_ratio)
    encoders = Resident([empty[name] for name in ENCODERS if name in empty])
    assert checkpoint.text_length is not None
    return Modules(TextLength(checkpoint.text_length), encoders, experts, cast(Any, empty["vae"]))


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
