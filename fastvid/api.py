"""`load`, `blueprint` and `inspect`: load a model by name to make videos, plan with it, or describe it.

With several ranks `load` starts a process for each (`fastvid.workers.team`); under torchrun, the processes that
torchrun started are the ranks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch

from fastvid import checks
from fastvid.device.precision import computing, eager
from fastvid.distributed.cards import Card
from fastvid.distributed.layout import parse_parallel
from fastvid.engine.events import Plan
from fastvid.engine.queue import RUNNING
from fastvid.errors import InvalidRequest
from fastvid.loaders import lora_fit
from fastvid.loaders.checkpoint import open_checkpoint
from fastvid.loaders.lora import read_loras
from fastvid.loaders.quantize import apply as apply_quantize
from fastvid.models.loaded import LoadOptions, Model
from fastvid.models.text_cache import LIMIT as TEXT_CACHE
from fastvid.pipeline import load_arguments
from fastvid.pipeline.load import load_model, outline, runs_with
from fastvid.pipeline.pipeline import Pipeline
from fastvid.pipeline.prepare import AGAIN, estimate_of, plan_of
from fastvid.requests.arguments import documented
from fastvid.requests.options import AnyOptions
from fastvid.workers import remote

log = logging.getLogger(__name__)
CUDA_RESERVE = 2**30  # bytes of device memory reserved for the CUDA context and libraries


class PartFiles(TypedDict, total=False):
    """Sources of a model's parts, each as in `parts=` of `load`. transformer: two for the experts (high noise, low)."""

    transformer: str | Path | Sequence[str | Path] | None
    transformer_2: str | Path | None
    vace: str | Path | Sequence[str | Path] | None
    vace_2: str | Path | None
    vae: str | Path | None
    text_encoder: str | Path | None
    image_encoder: str | Path | None
    tokenizer: str | Path | None


class OutlineOptions(PartFiles, total=False):
    """The options of `load` that matter for planning."""

    device: str | torch.device | None
    dtype: str | torch.dtype | None
    vae_dtype: str | torch.dtype | None
    backend: str
    attention: str
    loras: Sequence[Any]
    offload: str
    parts: Mapping[str, Any] | None
    cuda_graphs: str | bool
    parallel: Any
    link: str
    variant: str | None
    quantize: str | Mapping[str, str | None] | None


class Blueprint:
    """A model without weights, for planning. Create one with `fastvid.blueprint`."""

    def __init__(self, model: Model, free: int | None = None, card: Card | None = None) -> None:
        self._model, self._free, self._card = model, free, card

    def __repr__(self) -> str:
        return f"<Blueprint of {self._model.name:.60}>"

    @documented
    def plan(
        self,
        prompt: str | None = None,
        *,
        verb: str = "generate",
        estimate: bool | str = False,
        keep_frames: bool = True,
        **options: Unpack[AnyOptions],
    ) -> Plan:
        """The cost of a request. The prompt may be left out.

        estimate: also estimate the time, from this machine's speed, which is measured once (2 s); "again": measure
        anew; of a card that is not here, by its published rates (assumed, not measured). keep_frames: whether all
        frames stay in memory, as with `generate`; False: as with `stream`. Raises InvalidRequest, MediaError, and
        OutOfMemory if the request does not fit.
        """
        estimate, keep_frames = estimate_of("estimate", estimate), checks.flag("keep_frames", keep_frames)
        if estimate and self._free is not None and not self._card:
            raise InvalidRequest(
                "estimate: nothing is known of another card's rates; name it by card=, or leave it out"
            )
        if estimate == AGAIN and self._card:
            raise InvalidRequest(f"estimate={AGAIN}: no {self._card.name} is here to measure; leave it out")
        settings: dict[str, Any] = {"estimate": estimate, "free": self._free, "keep_frames": keep_frames}
        settings["card"] = self._card
        with computing():
            return plan_of(self._model, prompt, verb=verb, **settings, **options)


def blueprint(
    model: str = "embedded",
    *,
    device_memory: int | None = None,
    card: str | None = None,
    format: str | None = None,
    **options: Unpack[OutlineOptions],
) -> Blueprint:
    """A model for planning. Reads only configurations and file headers.

    Args:
        model: as `load` takes it, but nothing is downloaded; or the name of a published model, such as
            "wan2.1-t2v-14b", which needs no files.
        device_memory: memory in bytes of a GPU that this machine does not have; 1 GiB of it is reserved for CUDA.
        card: a GPU that this machine does not have, such as "RTX 4090" (see `fastvid.distributed.cards`): its memory,
            and its published rates for an estimate.
        format: of a published model, the quantized format of its files, such as "q4_k_m", "fp8_e4m3" or, for each
            part, "transformer=q4_k,text_encoder=q8_0". Default: 16 bits.
        options: device, dtype, vae_dtype, backend, attention, loras, offload, parts (or each by its name), parallel,
            link, cuda_graphs, variant and quantize, as `load` takes them.

    Raises as `load` does.
    """
    own = {"model": model, "device_memory": device_memory, "card": card, "format": format}
    given = load_arguments.checked(own | options, "blueprint")
    model, memory, parallel = given.pop("model"), given.pop("device_memory"), given.pop("parallel", None)
    named: Card | None = given.pop("card")
    planned: dict[str, Any] = {"parallel": parallel, "card": named, "format": given.pop("format")}
    memory = named.memory_bytes if memory is None and named else memory
    free = None if memory is None else max(0, memory - CUDA_RESERVE)
    with computing():
        return Blueprint(outline(model, LoadOptions(**given), free=free, **planned), free, named)


def load(
    model: str = "embedded",
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    backend: str = "auto",
    attention: str = "auto",
    loras: Sequence[Any] = (),
    offload: str = "auto",
    parts: Mapping[str, Any] | None = None,
    max_running: int = RUNNING,
    cuda_graphs: str | bool = "auto",
    parallel: Any = 1,
    vae_dtype: str | torch.dtype | None = None,
    link: str = "auto",
    variant: str | None = None,
    quantize: str | Mapping[str, str | None] | None = None,
    text_cache: int = TEXT_CACHE,
    mmap: str | bool = "auto",
    **files: Unpack[PartFiles],
) -> Pipeline:
    """Load a model.

    Args:
        model: "embedded" (the small model in the package); a folder in diffusers' or the original layout; a single
            transformer file, with its other parts in the neighboring folders of a ComfyUI installation; or a hub id
            (org/name, or org/name/path/to/file.safetensors), downloaded once to huggingface_hub's cache.
        device: "cuda", "cuda:1", "cpu"; default: a GPU if there is one.
        dtype: "float32", "bfloat16" or "float16" (or "fp32", "bf16", "fp16"), for the transformer and the text encoder;
            default: bfloat16 on a GPU, float32 on a CPU. "auto": bfloat16 also on a CPU with AVX512-BF16 or AMX.
        backend, attention: back ends (`fastvid doctor`); or "sparse", "sparse:keep=0.3": what requests attend to.
        loras: LoRAs for all requests: files, folders or hub names, each alone, as (file, scale), or as (file, scale,
            "high") or (file, scale, "low") for one of two experts. Without that its names and its header say the
            expert; none: both; doubtful: refused. Merged, or beside quantized weights. See `Pipeline.set_loras`.
        offload: which weights stay in host memory while unused. "none"; "text": the encoders and the inactive expert;
            "blocks": also the blocks of transformer and text encoder, but for two at a time; "auto": the least with
            which the preset's default video fits; on a CPU "none", where the other modes only cost memory.
        parts: sources of missing or replaced parts: names (transformer_2, vae, text_encoder, image_encoder,
            tokenizer, vace) to files, folders or hub files. "base" is a whole model folder that supplies everything
            else to a single file. "transformer", "vace" take two files for two experts. Each also by its name: vae=FILE
        max_running: how many requests may run at once; others wait.
        cuda_graphs: True replays the transformer's calls as CUDA graphs, one per shape; "auto": nowhere so far.
        parallel: the ranks that generate each video together (docs/gpus.md): a number, "auto" (one per GPU), or
            degrees such as "guidance=2,ulysses=4", each in a process. Under torchrun, this returns on rank 0 alone.
        vae_dtype: the VAE's dtype, named as for dtype; default: bfloat16 on a GPU, float32, as published, on a CPU.
        link: what joins the ranks: "nvlink", "pcie", "infiniband", "loopback", two for within and between hosts
            ("nvlink,infiniband"), or "auto", which asks the driver.
        variant: the published model that these weights are, such as "wan2.1-i2v-14b-720p", where no name tells.
        quantize: "fp8" or "int8", for all parts or for each: {"transformer": "fp8"}; see docs/quantized.md.
        text_cache: bytes of host memory for the embeddings of the latest prompts (default: 64 MiB); 0: keep none.
        mmap: whether weights on a CPU are used where they lie in their files. "auto": in files of 64 MiB and more on
            local disks. See docs/memory.md#mapped-files.

    Raises:
        CheckpointError: the model is missing, damaged or unsupported, or a LoRA does not fit it.
        InvalidRequest: an invalid option, or CUDA graphs for a model that does not support them.
        BackendUnavailable: an explicitly requested back end or device cannot run here.
        WorkerFailed: a rank's process ended while loading.
    """
    return _start(**load_arguments.checked({k: v for k, v in locals().items() if k != "files"} | files))


@eager
def _start(model: str, max_running: int, parallel: int | str, **options: Any) -> Pipeline:
    """The pipeline, in this process or on several ranks."""
    began, ranks = time.perf_counter(), remote.ranks_for(parse_parallel(parallel), options["device"])
    if ranks.ranks == 1:
        with computing():
            pipe = Pipeline(load_model(model, LoadOptions(**options)), max_running)
    else:
        pipe = remote.load(model, ranks, options, max_running)
    if log.isEnabledFor(logging.INFO):
        _log_loaded(pipe.describe(), time.perf_counter() - began)
    return pipe


def _log_loaded(description: Mapping[str, Any], seconds: float) -> None:
    """Logs the sources of all parts, the settings, and each back end with its reason and operations."""
    log.info("loaded %s (%s) in %.2f s", description["model"], description["variant"], seconds)
    for name, path in description["parts"].items():
        log.info("%s comes from %s", name, path)
    names = ("device", "dtype", "vae_dtype", "offload", "parallel", "cuda_graphs")
    log.info("%s", ", ".join(f"{name} {description[name]}" for name in names))
    ops_by_backend: dict[tuple[str, str], list[str]] = {}
    for op, backend in description["backends"].items():
        ops_by_backend.setdefault((backend, description["reasons"].get(op, "")), []).append(op)
    for (backend, reason), ops in ops_by_backend.items():
        log.info("on %s (%s): %s", backend, reason, ", ".join(ops))


def inspect(
    model: str,
    loras: Sequence[Any] = (),
    parts: Mapping[str, Any] | None = None,
    variant: str | None = None,
    quantize: str | Mapping[str, str | None] | None = None,
    **files: Unpack[PartFiles],
) -> dict[str, Any]:
    """Describe a checkpoint from its configurations and file headers, without loading it, and check whether LoRAs
    fit."""
    given = load_arguments.checked({k: v for k, v in locals().items() if k != "files"} | files, "inspect")
    checkpoint, loras = open_checkpoint(given["model"], given["parts"], variant=given["variant"]), given["loras"]
    checkpoint = apply_quantize(checkpoint, given["quantize"])
    described = lora_fit.describe(read_loras(loras), checkpoint)
    return checkpoint.to_dict() | runs_with(checkpoint) | ({"loras": described} if described else {})
