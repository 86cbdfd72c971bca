"""LoRA files: low-rank changes of a transformer's weights, merged while the weights are loaded.

    W + scale * (sum of alpha / rank * B @ A, and of full-rank terms: diff, diff_b, diff_m)

computed in fp32 and rounded once, to the loaded dtype. LoRAs are never subtracted: removing one reloads the base
weights (`Pipeline.set_loras`), which restores them bit for bit.

Naming schemes in use (lora_A, lora_B are also called lora_down, lora_up, with or without .weight):
    diffusers, peft    transformer.blocks.0.attn1.to_q.lora_A.weight; alpha in the header or in adapter_config.json
    original, ComfyUI  diffusion_model.blocks.0.self_attn.q.lora_down.weight, .alpha
    kohya, musubi      lora_unet_blocks_0_self_attn_q.lora_down.weight, .alpha
    lightx2v           like ComfyUI, with .diff (weights), .diff_b (biases), .diff_m (modulation)
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fastvid.checks import nearest_name
from fastvid.errors import CheckpointError, InvalidRequest
from fastvid.loaders import safetensors
from fastvid.models.common.config_reader import read_json
from fastvid.models.description import Checkpoint, Part
from fastvid.models.registry import build_empty
from fastvid.models.wan.weight_names import DIFFUSERS, Shape, rules, some

PREFIXES = (
    *("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "unet.", "model."),
    "pipe.dit.",
)
KOHYA = "lora_unet_"
# Suffix of a tensor's name -> its role.
ENDINGS = {
    **{f".{a}{default}{weight}": "A" for a in ("lora_A", "lora_down", "lora.down") for default in ("", ".default")
       for weight in ("", ".weight")},
    **{f".{b}{default}{weight}": "B" for b in ("lora_B", "lora_up", "lora.up") for default in ("", ".default")
       for weight in ("", ".weight")},
    **{f".{b}{default}.bias": "bias" for b in ("lora_B", "lora_up") for default in ("", ".default")},
    ".alpha": "alpha",
    ".diff": "diff",
    ".diff_b": "diff_b",
    ".diff_m": "diff_m",
}  # fmt: skip
OTHER_KINDS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_w": "LoHa",
    "lokr_w": "LoKr",
    "lora_mid": "LoCon with a middle part",
    "oft_": "OFT",
}
MAX_SCALE = 100.0
NOISE_LEVELS = ("high", "low")  # of transformer and transformer_2
METADATA = "lora_adapter_metadata"  # header key under which diffusers stores peft's configuration


@dataclass(frozen=True)
class Term:
    """One change of one parameter: factor * up @ down, or factor * up if down is None."""

    up: Tensor
    down: Tensor | None
    factor: float

    @property
    def shape(self) -> Shape:
        """Shape of the change."""
        return tuple(self.up.shape) if self.down is None else (self.up.shape[0], *self.down.shape[1:])


@dataclass(frozen=True)
class Lora:
    """A LoRA that was read from a file. terms: diffusers' parameter name -> changes, before `scale`. expert: "high" or
    "low" for one of two transformers; "" for all."""

    path: Path
    scale: float
    terms: Mapping[str, tuple[Term, ...]]
    expert: str = ""

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that occur, ascending; empty if all terms have full rank."""
        pairs = (term.down for terms in self.terms.values() for term in terms)
        return tuple(sorted({down.shape[0] for down in pairs if down is not None}))

    def to_dict(self) -> dict[str, Any]:
        """A summary of JSON types."""
        summary = {
            "file": str(self.path),
            "scale": self.scale,
            "ranks": list(self.ranks),
            "parameters": len(self.terms),
        }
        return summary | ({"expert": self.expert} if self.expert else {})


def read_lora(path: str | Path, scale: float = 1.0, expert: str = "") -> Lora:
    """Read a LoRA file (safetensors). Does not check whether it fits a model: see `check`.

    Raises InvalidRequest for an unknown expert or a scale outside [-100, 100], CheckpointError for a file that is
    missing, broken, of another kind (DoRA, LoHa, ...), or has unknown tensor names.
    """
    path = Path(path).expanduser()
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not -MAX_SCALE <= scale <= MAX_SCALE:
        raise InvalidRequest(f"lora {path.name}: scale is {scale!r:.40}; allowed is {-MAX_SCALE:g} to {MAX_SCALE:g}")
    if expert and expert not in NOISE_LEVELS:
        near = nearest_name(str(expert), NOISE_LEVELS)
        raise InvalidRequest(
            f"lora {path.name}: expert is {expert!r:.40}; allowed is {' or '.join(NOISE_LEVELS)}; the nearest is {near}"
        )
    if path.suffix in safetensors.PICKLES:
        raise CheckpointError(
            f"{path} is a pickle, which fastvid does not open; a {safetensors.SUFFIX} file is expected, such as "
            f"`fastvid convert {path} {path.with_suffix(safetensors.SUFFIX)}` makes of it"
        )
    tensors, metadata = _read_file(path)
    groups, unknown = _group(tensors)
    if unknown:
        raise CheckpointError(f"{path} holds what is no part of a LoRA: {some(unknown)}{_other_kind(unknown)}")
    if not groups:
        raise CheckpointError(f"{path} holds no LoRA weights")
    alphas = _peft_settings(path, metadata)
    terms: dict[str, list[Term]] = {}
    for module, tensors_by_role in groups.items():
        for name, term in _terms(path, module, tensors_by_role, alphas):
            terms.setdefault(name, []).append(term)
    return Lora(path, float(scale), {name: tuple(made) for name, made in terms.items()}, expert)


def read_loras(loras: Any) -> tuple[Lora, ...]:
    """Read `loras=` of `fastvid.load`: files, (file, scale), or (file, scale, expert). Raises InvalidRequest,
    CheckpointError."""
    entries = []
    for entry in (loras,) if isinstance(loras, str | Path) else loras or ():
        fields = (entry,) if isinstance(entry, str | Path) else entry
        if not isinstance(fields, list | tuple) or not _is_lora(fields) or (len(fields) < 2 and fields is entry):
            raise InvalidRequest(
                f'loras: {entry!r:.60} is no LoRA; give a file, or (file, scale) such as ("a.safetensors", 0.8), or '
                '("a.safetensors", 0.8, "high") for one of two experts'
            )
        entries.append(fields)
    return tuple(read_lora(*entry) for entry in entries)


def _is_lora(entry: Sequence[Any]) -> bool:
    expert = entry[2] if len(entry) == 3 else "high"
    named = 1 <= len(entry) <= 3 and isinstance(entry[0], str | Path) and bool(entry[0])
    return named and isinstance(expert, str) and bool(expert)


def as_tuples(loras: Sequence[Lora]) -> tuple[tuple[Any, ...], ...]:
    """LoRAs as (file, scale) or (file, scale, expert)."""
    return tuple((str(lora.path), lora.scale, *([lora.expert] if lora.expert else [])) for lora in loras)


def experts_of(lora: Lora, count: int) -> Sequence[int]:
    """Indices of the transformers that a LoRA changes, of a model with `count` (high noise first). Raises
    InvalidRequest if the LoRA names an expert and the model has only one transformer."""
    if not lora.expert:
        return range(count)
    if count == 1:
        raise InvalidRequest(
            f"lora {lora.path.name} is for the {lora.expert} noise expert, but this model has one transformer for all "
            f"levels; leave out {lora.expert!r}"
        )
    return (NOISE_LEVELS.index(lora.expert),)


def for_expert(loras: Sequence[Lora], number: int, count: int) -> tuple[Lora, ...]:
    """The LoRAs that change transformer `number` of `count`. Raises InvalidRequest, see `experts_of`."""
    return tuple(lora for lora in loras if number in experts_of(lora, count))


def merge(name: str, tensor: Tensor, loras: Iterable[Lora]) -> Tensor:
    """Add the changes of all LoRAs to a parameter. Returns fp32 (fp64 for fp64), or `tensor` itself if nothing changes.

    name: the parameter's diffusers name, which fastvid's modules share. Shapes must be checked before.
    """
    changes = [(lora.scale, term) for lora in loras for term in lora.terms.get(name, ())]
    if not changes:
        return tensor
    kind = torch.promote_types(tensor.dtype, torch.float32)
    # Sum the terms first: they are small compared to the weight, so this loses less to rounding.
    delta = torch.zeros(tensor.shape, dtype=kind)
    for scale, term in changes:
        delta += (scale * term.factor) * _product(term, kind).reshape(tensor.shape)
    return tensor.to(kind) + delta.to(tensor.device)


def check(loras: Iterable[Lora], shapes: Mapping[str, Sequence[int]], model: str = "the model") -> None:
    """Check that LoRAs fit a model. shapes: parameter name -> shape.

    Raises CheckpointError that lists unknown parameters and wrong shapes.
    """
    for lora in loras:
        unknown = [name for name in lora.terms if name not in shapes]
        sentences = []
        if unknown:
            hint = (
                "; add_k_proj, add_v_proj and image_embedder are in Wan 2.1 picture models only"
                if any("add_k_proj" in name or "image_embedder" in name for name in unknown)
                else ""
            )
            sentences.append(
                f"no weights of the model match {len(unknown)} of {len(lora.terms)}: {some(unknown)}{hint}"
            )
        wrong = [
            f"{name} {list(term.shape)} for {list(shapes[name])}"
            for name, terms in lora.terms.items()
            for term in terms
            if name in shapes and not _fits(term, tuple(shapes[name]))
        ]
        if wrong:
            sentences.append(f"wrong shapes: {some(wrong)}")
        if sentences:
            raise CheckpointError(f"{lora.path} does not fit {model}: " + "; ".join(sentences))


def check_part(loras: Iterable[Lora], module: nn.Module, part: Part) -> None:
    """Check that LoRAs fit the module of a part. Raises CheckpointError."""
    check(loras, _shapes(module), str(part.files[0].parent))


def lora_problems(checkpoint: Checkpoint, lora: Lora) -> list[str]:
    """The reasons why a LoRA can't be merged into a model's transformers; empty if it can."""
    problems: list[str] = []
    try:
        numbers = experts_of(lora, len(checkpoint.experts))
    except InvalidRequest as error:
        return [str(error)]
    for part in (checkpoint.part(checkpoint.experts[number]) for number in numbers):
        try:
            if part.config is None:
                raise CheckpointError(f"the {part.name} cannot be read")
            check([lora], _shapes(build_empty(part.name, part.config)))
        except CheckpointError as error:
            problems.append(str(error))
    return list(dict.fromkeys(problems))  # both experts usually report the same problem


def _shapes(module: nn.Module) -> dict[str, Shape]:
    return {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}


def changed_weights(loras: Iterable[Lora]) -> frozenset[str]:
    """Names of the parameters that the LoRAs change."""
    return frozenset(name for lora in loras for name in lora.terms)


# ---------------------------------------------------------------- reading


def _read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    entries = safetensors.read_header(path)
    allowed = {*safetensors.FLOATS, "I64", "I32"}  # alpha may be a whole number
    kinds = {entry.dtype for entry in entries.values()} - allowed
    if kinds:
        raise CheckpointError(
            f"{path} holds {', '.join(sorted(kinds))} tensors; known are {', '.join(safetensors.FLOATS)}"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a valid safetensors file ({error}); download it again") from None


def _group(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """(diffusers' module name -> role, see ENDINGS -> tensor; names that are not understood)."""
    groups: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for name, tensor in tensors.items():
        ending = next((ending for ending in sorted(ENDINGS, key=len, reverse=True) if name.endswith(ending)), None)
        if ending is None or ENDINGS[ending] in groups.get(module := _module(name.removesuffix(ending)), {}):
            unknown.append(name)
        else:
            groups.setdefault(module, {})[ENDINGS[ending]] = tensor
    return groups, unknown


def _module(name: str) -> str:
    """Diffusers' name of a module. Unknown names are returned unchanged; `check` rejects them."""
    table = rules("transformer")
    if name.startswith(KOHYA):
        return table.unflatten(name.removeprefix(KOHYA)) or name
    while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), ""):
        name = name.removeprefix(prefix)
    if block := re.fullmatch(r"(vace_)?blocks\.\d+", name):  # of diff_m
        return block[0]
    return table.module(name, DIFFUSERS) or name


def _terms(
    path: Path, module: str, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> Iterable[tuple[str, Term]]:
    """Yield (parameter, change) for the tensors of a module."""
    if ("A" in tensors) != ("B" in tensors) or not tensors.keys() - {"alpha"}:
        present = ", ".join(sorted(tensors))
        raise CheckpointError(
            f"{path}: {module} needs lora_A (lora_down) and lora_B (lora_up); only {present} is there"
        )
    factor = 1.0
    if "A" in tensors:
        up, down = tensors["B"], tensors["A"]
        if up.ndim < 2 or down.ndim < 2 or math.prod(up.shape[1:]) != down.shape[0] or 0 in (*up.shape, *down.shape):
            raise CheckpointError(
                f"{path}: {module} has lora_B {list(up.shape)} and lora_A {list(down.shape)}, which do not multiply"
            )
        factor = _factor(path, module, tensors.get("alpha"), down.shape[0], settings)
        yield f"{module}.weight", Term(up, down, factor)
    if "bias" in tensors:
        yield f"{module}.bias", Term(tensors["bias"], None, factor)
    if "diff" in tensors:
        bare = module.endswith(("scale_shift_table", "pos_embed"))  # parameters, not modules
        yield (module if bare else f"{module}.weight"), Term(tensors["diff"], None, 1.0)
    if "diff_b" in tensors:
        yield f"{module}.bias", Term(tensors["diff_b"], None, 1.0)
    if "diff_m" in tensors:
        # Modulation of a block, or of the head; diffusers keeps the head's at the top level.
        name = "scale_shift_table" if module in ("head", "proj_out") else f"{module}.scale_shift_table"
        yield name, Term(tensors["diff_m"], None, 1.0)


def _factor(path: Path, module: str, alpha: Tensor | None, rank: int, settings: Mapping[str, Any]) -> float:
    """alpha / rank, or 1 without an alpha. With peft's use_rslora: alpha / sqrt(rank) (arXiv 2312.03732)."""
    if alpha is not None:
        value: Any = alpha.item() if alpha.numel() == 1 else list(alpha.shape)
        root = False
    else:
        patterns = settings.get("alpha_pattern")
        patterns = patterns if isinstance(patterns, dict) else {}
        matching = [key for key in patterns if f".{module}".endswith(f".{key}")]
        value = patterns[max(matching, key=len)] if matching else settings.get("lora_alpha", rank)
        root = bool(settings.get("use_rslora"))
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise CheckpointError(f"{path}: alpha of {module} is {value!r}; a number is expected")
    return value / (math.sqrt(rank) if root else rank)


def _peft_settings(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """peft's configuration, from the file's header (written by diffusers) or from adapter_config.json beside it."""
    if METADATA in metadata:
        try:
            parsed = json.loads(metadata[METADATA])
        except ValueError as error:
            raise CheckpointError(f"{path} has broken {METADATA} in its header: {error}") from None
        if not isinstance(parsed, dict):
            raise CheckpointError(f"{path} has broken {METADATA} in its header: an object is expected")
        settings = {key.removeprefix("transformer."): value for key, value in parsed.items()}
    elif path.name.startswith("adapter_model") and (path.parent / "adapter_config.json").is_file():
        settings = read_json(path.parent / "adapter_config.json")
    else:
        return {}
    if settings.get("use_dora"):
        raise CheckpointError(f"{path} is a DoRA; only LoRA is supported")
    return settings


def _other_kind(names: Iterable[str]) -> str:
    kinds = {kind for part, kind in OTHER_KINDS.items() for name in names if part in name}
    return f" ({', '.join(sorted(kinds))} is not supported; only LoRA is)" if kinds else ""


# ---------------------------------------------------------------- arithmetic


def _product(term: Term, kind: torch.dtype) -> Tensor:
    """up @ down [out, in * kernel], or up itself."""
    if term.down is None:
        return term.up.to(kind)
    return term.up.flatten(1).to(kind) @ term.down.flatten(1).to(kind)


def _fits(term: Term, shape: Shape) -> bool:
    if term.down is None:
        return tuple(term.up.shape) == shape
    return len(shape) >= 2 and (term.up.shape[0], math.prod(term.down.shape[1:])) == (shape[0], math.prod(shape[1:]))
