"""LoRA files: changes of a transformer's weights, merged while the weights are loaded.

    W + sum over LoRAs of scale * change        changes: see lora_terms.py; names of tensors: lora_names.py

computed in fp32 and rounded once, to the loaded dtype. Every change is relative to W alone, so their order does not
matter. LoRAs are never subtracted: removing one reloads the base weights (`Pipeline.set_loras`), which restores them
bit for bit. Which of two experts a LoRA is for, and whether it fits a model: lora_fit.py.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvid import notices
from fastvid.checks import nearest_name
from fastvid.errors import CheckpointError, InvalidRequest
from fastvid.loaders.lora_files import Source, find_file, is_finite, read_file
from fastvid.loaders.lora_names import Group, group_tensors
from fastvid.loaders.lora_terms import Decomposed, Hadamard, Kronecker, Misfit, Pair, Term, Whole
from fastvid.loaders.peft_settings import Settings, read_settings
from fastvid.models.common.expert_names import NOISE_LEVELS
from fastvid.models.wan.weight_names import some

MAX_MODULES = 10_000  # the largest models have about 1,000
BARE = ("scale_shift_table", "pos_embed")  # parameters, not modules


@dataclass(frozen=True, eq=False)
class Lora:
    """A LoRA that was read from a file, or the part of it for one of two experts.

    terms: diffusers' parameter name -> changes, before `scale`. expert: "high" or "low" for one of two transformers, ""
    for all, or not known yet (see `lora_fit.fit`). named: the expert that the names of its tensors say. name: what its
    file is called. metadata: the texts in the file's header.
    """

    path: Path
    scale: float
    terms: Mapping[str, tuple[Term, ...]]
    expert: str = ""
    named: str = ""
    name: Path = Path()
    metadata: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that occur, ascending; empty if all terms have full rank."""
        found = {term.rank for terms in self.terms.values() for term in terms}
        return tuple(sorted(rank for rank in found if rank is not None))

    def to_dict(self) -> dict[str, Any]:
        """A summary of JSON types."""
        summary = {
            "file": str(self.path),
            "scale": self.scale,
            "ranks": list(self.ranks),
            "parameters": len(self.terms),
        }
        return summary | ({"expert": self.expert} if self.expert else {})


def read_loras(loras: Sequence[Any], download: bool = False) -> tuple[Lora, ...]:
    """Read checked `loras=` of `fastvid.load`: files, folders or hub names, each alone or as (file, scale) or (file,
    scale, expert). download: fetch what is on the hub and not in the local cache. Raises InvalidRequest,
    CheckpointError."""
    return tuple(lora for entry in as_entries(loras) for lora in read_lora(*entry, download=download))


def as_entries(loras: Sequence[Any]) -> list[tuple[Any, ...]]:
    """LoRAs as (file,), (file, scale) or (file, scale, expert)."""
    return [(entry,) if isinstance(entry, str | os.PathLike) else tuple(entry) for entry in loras or ()]


def as_tuples(loras: Sequence[Lora]) -> tuple[tuple[Any, ...], ...]:
    """LoRAs as (file, scale) or (file, scale, expert)."""
    return tuple((str(lora.path), lora.scale, *([lora.expert] if lora.expert else [])) for lora in loras)


def changed_weights(loras: Iterable[Lora]) -> frozenset[str]:
    """Names of the parameters that the LoRAs change."""
    return frozenset(name for lora in loras for name in lora.terms)


def read_lora(
    given: str | os.PathLike[str], scale: float = 1.0, expert: str = "", *, download: bool = False
) -> tuple[Lora, ...]:
    """Read a LoRA: one, or two if its names tell the experts apart. Does not check whether it fits a model.

    Raises InvalidRequest for an unknown expert, CheckpointError for a file that is missing, broken, of an unknown kind,
    or has unknown tensor names.
    """
    check_expert(given, expert)
    return read_source(find_file(given, download), scale, expert)


def check_expert(given: str | os.PathLike[str], expert: str) -> None:
    """Raises InvalidRequest for an unknown expert."""
    if expert and expert not in NOISE_LEVELS:
        near = nearest_name(str(expert), NOISE_LEVELS)
        raise InvalidRequest(
            f"lora {Path(given).name}: expert is {expert!r:.40}; allowed is {' or '.join(NOISE_LEVELS)}; the nearest "
            f"is {near}"
        )


def read_source(source: Source, scale: float = 1.0, expert: str = "") -> tuple[Lora, ...]:
    """Read a LoRA that was found; see `read_lora`."""
    tensors, metadata = read_file(source.file)
    try:
        groups = group_tensors(tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{source.file} {error}") from None
    if not groups:
        raise CheckpointError(f"{source.file} holds no LoRA weights")
    if len(groups) > MAX_MODULES:
        raise CheckpointError(
            f"{source.file} holds changes of {len(groups):,} modules; at most {MAX_MODULES:,} are read"
        )
    settings = read_settings(source.file, metadata)
    _warn_of_zeros(source.file, groups)
    return _split(source, scale, expert, groups, settings, metadata)


def _split(
    source: Source,
    scale: float,
    expert: str,
    groups: Sequence[Group],
    settings: Mapping[str, Settings],
    metadata: Mapping[str, str],
) -> tuple[Lora, ...]:
    """The LoRA, or its parts for two experts. In a file with weights for one expert by name, those without are for the
    other: transformer. beside transformer_2."""
    named = {group.expert for group in groups}
    rest = "high" if named == {"", "low"} else "low" if named == {"", "high"} else ""
    parts: dict[str, dict[str, list[Term]]] = {}
    for group in groups:
        of = group.expert or rest
        for name, term in _terms(source.file, group, settings[of]):
            parts.setdefault(of, {}).setdefault(name, []).append(term)
    return tuple(
        Lora(source.file, scale, {k: tuple(v) for k, v in parts[of].items()}, expert, of, source.name, metadata)
        for of in ("", *NOISE_LEVELS)
        if of in parts
    )


def _warn_of_zeros(path: Path, groups: Iterable[Group]) -> None:
    zeros = [group.module for group in groups if "alpha" in group.tensors and not group.tensors["alpha"].any()]
    if zeros:
        notices.warn(f"{path}: alpha is 0 for {some(zeros)}, so the LoRA changes nothing there")


# ---------------------------------------------------------------- terms


def _terms(path: Path, group: Group, settings: Settings) -> Iterator[tuple[str, Term]]:
    """Yield (parameter, change) for the tensors of a module. Raises CheckpointError."""
    left = dict(group.tensors)
    module, alpha = group.module, left.pop("alpha", None)
    try:
        change = _change(path, group, left, alpha, settings)
    except KeyError as error:
        present, missing = ", ".join(sorted(group.tensors)), str(error.args[0])
        raise CheckpointError(f"{path}: {module} needs {missing}; only {present} is there") from None
    except Misfit as error:
        raise CheckpointError(f"{path}: {module} has {error}") from None
    magnitude = next((left.pop(name) for name in ("dora_scale", "magnitude") if name in left), None)
    if change is None and (magnitude is not None or "up_bias" in left or not left):
        present = ", ".join(sorted(group.tensors))
        raise CheckpointError(
            f"{path}: {module} needs lora_A (lora_down) and lora_B (lora_up); only {present} is there"
        )
    if change is not None and magnitude is None and settings.decomposes:
        raise CheckpointError(f"{path}: {module} lacks lora_magnitude_vector, although peft's settings say use_dora")
    if change is not None:
        inside = "magnitude" in group.tensors
        yield f"{module}.weight", change if magnitude is None else Decomposed(change, magnitude, inside)
    if "up_bias" in left and change is not None:
        yield f"{module}.bias", Whole(left.pop("up_bias"), change.factor)
    yield from _whole_terms(module, left)
    if left:
        raise CheckpointError(f"{path}: {module} has {', '.join(sorted(left))}, which belongs to nothing there")


def _change(
    path: Path, group: Group, left: dict[str, Tensor], alpha: Tensor | None, settings: Settings
) -> Pair | Hadamard | Kronecker | None:
    """The change of a module's weight; takes its tensors out of `left`. Raises KeyError for a missing one."""
    kinds = {KINDS[role] for role in left if role in KINDS}
    if len(kinds) > 1:
        raise CheckpointError(f"{path}: {group.module} has changes of several kinds: {', '.join(sorted(left))}")
    if not kinds:
        return None
    change = kinds.pop()(left)
    return replace(change, factor=_factor(path, group, alpha, change.rank, settings))


def _pair(left: dict[str, Tensor]) -> Pair:
    for name, shown in (("down", "lora_A (lora_down)"), ("up", "lora_B (lora_up)")):
        if name not in left:
            raise KeyError(shown)
    return Pair(left.pop("up"), left.pop("down"), 1.0, left.pop("mid", None))


def _hadamard(left: dict[str, Tensor]) -> Hadamard:
    return Hadamard(_factors(left, "hada_w1", "hada_t1"), _factors(left, "hada_w2", "hada_t2"))


def _kronecker(left: dict[str, Tensor]) -> Kronecker:
    def side(name: str, middle: str) -> Whole | Pair:
        return Whole(left.pop(name)) if name in left else _factors(left, name, middle)

    return Kronecker(side("lokr_w1", "lokr_t1"), side("lokr_w2", "lokr_t2"))


# Role of a tensor -> what makes the change of which it is a part.
KINDS: Mapping[str, Callable[[dict[str, Tensor]], Pair | Hadamard | Kronecker]] = {
    **dict.fromkeys(("up", "down", "mid"), _pair),
    **dict.fromkeys(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"), _hadamard),
    **dict.fromkeys((f"lokr_{x}" for x in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")), _kronecker),
}


def _factors(left: dict[str, Tensor], stem: str, middle: str) -> Pair:
    """stem_a @ stem_b; with a middle part (Tucker) stem_a is stored transposed."""
    up, down = left.pop(f"{stem}_a"), left.pop(f"{stem}_b")
    if middle not in left:
        return Pair(up, down)
    if up.ndim != 2 or down.ndim != 2:
        raise Misfit(f"{stem}_a {list(up.shape)} and {stem}_b {list(down.shape)}; matrices are needed beside {middle}")
    return Pair(up.T, down, 1.0, left.pop(middle))


def _factor(path: Path, group: Group, alpha: Tensor | None, rank: int | None, settings: Settings) -> float:
    """alpha / rank. 1 without an alpha, and for a LoKr of whole matrices, as LyCORIS has it."""
    if alpha is None:
        return settings.factor((group.stored, group.module), rank)
    if alpha.numel() != 1:
        raise CheckpointError(f"{path}: alpha of {group.module} is {list(alpha.shape)}; a number is expected")
    value = alpha.item()
    if not math.isfinite(value):
        raise CheckpointError(f"{path}: alpha of {group.module} is {value!r}; a number is expected")
    return value / rank if rank is not None else 1.0


def _whole_terms(module: str, left: dict[str, Tensor]) -> Iterator[tuple[str, Term]]:
    """What is stored whole; alpha does not scale it."""
    if "diff" in left:
        yield (module if module.endswith(BARE) else f"{module}.weight"), Whole(left.pop("diff"))
    if "diff_b" in left:
        yield f"{module}.bias", Whole(left.pop("diff_b"))
    if "diff_m" in left:
        # Modulation of a block, or of the head; diffusers keeps the head's at the top level.
        name = "scale_shift_table" if module in ("head", "proj_out") else f"{module}.scale_shift_table"
        yield name, Whole(left.pop("diff_m"))


# ---------------------------------------------------------------- arithmetic


def merge(name: str, tensor: Tensor, loras: Iterable[Lora], dtype: torch.dtype | None = None) -> Tensor:
    """Add the changes of all LoRAs to a parameter. Returns fp32 (fp64 for fp64), or `tensor` itself if nothing changes.

    name: the parameter's diffusers name, which fastvid's modules share. dtype: what the result will be rounded to.
    Shapes must be checked before. Raises CheckpointError if a value of the result is not finite.
    """
    changes = [(lora, term) for lora in loras for term in lora.terms.get(name, ())]
    if not changes:
        return tensor
    kind = torch.promote_types(tensor.dtype, torch.float32)
    weight = tensor.to(kind)
    base = weight.cpu()
    # Sum the terms first: they are small compared to the weight, so this loses less to rounding.
    delta = torch.zeros(tensor.shape, dtype=kind)
    for lora, term in changes:
        delta += term.delta(base, lora.scale)
    merged = weight + delta.to(tensor.device)
    _check_merged(name, tensor, merged, dtype or kind, [lora.path.name for lora, _ in changes])
    return merged


def _check_merged(name: str, tensor: Tensor, merged: Tensor, dtype: torch.dtype, files: Sequence[str]) -> None:
    low, high = (float(value) for value in torch.aminmax(merged))
    limit = torch.finfo(dtype).max
    if math.isfinite(low) and math.isfinite(high) and -limit <= low and high <= limit:
        return
    if not is_finite(tensor):
        raise CheckpointError(f"{name} of the model has NaN or infinite values")
    raise CheckpointError(
        f"{', '.join(dict.fromkeys(files))}: {name} with it has values that are not finite in {str(dtype)[6:]} (up to "
        f"{max(abs(low), abs(high)):.3g}); give a smaller scale, or dtype='bfloat16'"
    )
