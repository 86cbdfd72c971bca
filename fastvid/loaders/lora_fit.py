"""Which weights of a model a LoRA changes: which of two experts it is for, what of it the model has, and what not.

An expert is told, in this order: by the caller, by the names of the tensors (transformer_2.), by the name of the file
or its folder, by the header. A name that may mean an expert, or both, is refused: a LoRA in the wrong expert is not
seen in any message, only in the video.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn

from fastvid import notices
from fastvid.errors import CheckpointError, InvalidRequest
from fastvid.layers.quantized import layer_of, logical_shapes
from fastvid.loaders import safetensors
from fastvid.loaders.lora import Lora
from fastvid.loaders.lora_terms import Shape
from fastvid.models.common.expert_names import NOISE_LEVELS, expert_of, read_mark
from fastvid.models.description import Checkpoint, Part
from fastvid.models.registry import Config, build_empty
from fastvid.models.wan.weight_names import some

# What only some Wan models have. A LoRA of one of them is used on the others too, without these.
OPTIONAL = re.compile(
    r"condition_embedder\.image_embedder\..*|(vace_)?blocks\.\d+\.attn2\.(add_[kv]_proj|norm_added_[kq])\..*"
    r"|vace_blocks\.\d+\..*|vace_patch_embedding\..*|(vace_)?blocks\.\d+\.cross_attn\.norm_q_img\..*"
)
# Texts in a header that are about much else.
PROSE = re.compile(r"description|comment|tag|caption|prompt|license|hint|usage|hash|date|author", re.IGNORECASE)
MAX_TEXT = 300  # characters of a text in a header that is a name


def fit(loras: Sequence[Lora], checkpoint: Checkpoint) -> tuple[Lora, ...]:
    """The LoRAs with their experts and with what the model has; the rest is told in a warning.

    Raises InvalidRequest if the expert is doubtful or not there, CheckpointError if a LoRA does not fit.
    """
    count, model = len(checkpoint.experts), str(checkpoint.folder)
    left_out = [lora for lora in loras if _is_left_out(lora, loras, count)]
    for lora in left_out if count == 1 else ():
        notices.warn(
            f"lora {lora.path.name}: its {len(lora.terms)} weights for the low noise expert (transformer_2) are left "
            "out; this model has one transformer"
        )
    chosen = [choose_expert(lora, loras, count) for lora in loras if lora not in left_out]
    shapes = [_shapes_of(checkpoint.part(name)) for name in checkpoint.experts] if chosen else []
    return tuple(_fit_one(lora, shapes, model) for lora in chosen)


def _fit_one(lora: Lora, shapes: Sequence[Mapping[str, Shape]], model: str) -> Lora:
    kept, left_out = _keep_known(lora, shapes, model)
    if left_out:
        notices.warn(
            f"lora {lora.path.name}: {len(left_out)} of {len(lora.terms)} changes are of weights that this model does "
            f"not have, and are left out: {some(left_out)}"
        )
    return kept


def describe(loras: Sequence[Lora], checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Of each LoRA what `Lora.to_dict` says, what of it the model does not have ("left_out", if any), and why it can't
    be merged ("problems")."""
    count = len(checkpoint.experts)
    return [_describe(lora, loras, checkpoint) for lora in loras if not _is_left_out(lora, loras, count)]


def _describe(lora: Lora, loras: Sequence[Lora], checkpoint: Checkpoint) -> dict[str, Any]:
    count, left_out, problems = len(checkpoint.experts), list[str](), list[str]()
    try:
        lora = choose_expert(lora, loras, count)
        mine = experts_of(lora, count)
        shapes = [_shapes_of(checkpoint.part(name)) if i in mine else {} for i, name in enumerate(checkpoint.experts)]
        lora, left_out = _keep_known(lora, shapes, str(checkpoint.folder))
    except (CheckpointError, InvalidRequest) as error:
        problems = [str(error)]
    return lora.to_dict() | ({"left_out": left_out} if left_out else {}) | {"problems": problems}


def _shapes_of(part: Part) -> dict[str, Shape]:
    if part.config is None:
        raise CheckpointError(f"the {part.name} cannot be read: {'; '.join(part.problems)}")
    return _shapes_from(part.name, part.config)


@lru_cache(maxsize=4)
def _shapes_from(name: str, config: Config) -> dict[str, Shape]:
    return _shapes(build_empty(name, config))


def _shapes(module: nn.Module) -> dict[str, Shape]:
    return logical_shapes(module)


# ---------------------------------------------------------------- which expert


def _is_left_out(lora: Lora, loras: Sequence[Lora], count: int) -> bool:
    """Whether it is the part of a file with weights for both experts that is not wanted here, while the other is."""

    def wanted(one: Lora) -> bool:
        return one.named != "low" if count == 1 else not (one.named and one.expert and one.named != one.expert)

    return not wanted(lora) and any(
        one.path == lora.path and one.expert == lora.expert and wanted(one) for one in loras
    )


def choose_expert(lora: Lora, others: Sequence[Lora], count: int) -> Lora:
    """The LoRA with the expert it is for. others: all that are given. Raises InvalidRequest if that is doubtful."""
    if count == 1:
        return _for_one_transformer(lora)
    if lora.expert and lora.named and lora.expert != lora.named:
        raise InvalidRequest(
            f"lora {lora.path.name}: expert is {lora.expert!r}, but its weights are named for the {lora.named} noise "
            f"expert; leave out {lora.expert!r}"
        )
    if lora.expert or lora.named:
        return replace(lora, expert=lora.expert or lora.named)
    mark = expert_of(lora.name, [other.name for other in others])
    if not (mark.expert and mark.sure):
        mark = expert_of(lora.name, _beside(lora.path, lora.name))
    if mark.expert and mark.sure:
        return replace(lora, expert=mark.expert)
    if (told := _told_by(lora.metadata)) is not None:
        key, expert = told
        notices.warn(
            f"lora {lora.path.name} is merged into the {expert} noise expert only, since its header says "
            f'{key}={lora.metadata[key]!r:.60}; give (file, scale, "high") or (file, scale, "low") to say it'
        )
        return replace(lora, expert=expert)
    if not mark.sure:
        raise InvalidRequest(_doubtful(lora))
    return lora


def _for_one_transformer(lora: Lora) -> Lora:
    if lora.expert:
        raise InvalidRequest(
            f"lora {lora.path.name} is for the {lora.expert} noise expert, but this model has one transformer for all "
            f"levels; leave out {lora.expert!r}"
        )
    if lora.named == "low":
        raise InvalidRequest(
            f"lora {lora.path.name} is for the low noise expert by the names of its weights, but this model has one "
            "transformer for all levels"
        )
    mark = expert_of(lora.name)
    if mark.expert and mark.sure:
        notices.warn(
            f"lora {lora.path.name} is for the {mark.expert} noise expert by its name; this model has one transformer, "
            "which gets it"
        )
    return lora


def _beside(path: Path, name: Path) -> list[Path]:
    """The LoRA files in the same folder, named as `name` is."""
    try:
        return [
            name.with_name(file.name)
            for file in path.parent.iterdir()
            if file.name.endswith(safetensors.SUFFIXES) and file.name != path.name
        ]
    except OSError:
        return []


def _told_by(metadata: Mapping[str, str]) -> tuple[str, str] | None:
    """(key, expert) of what a header says, if all that it says is one expert."""
    marks = {
        key: mark.expert
        for key, text in metadata.items()
        if len(text) <= MAX_TEXT and not text.startswith(("{", "[")) and not PROSE.search(key)
        and (mark := read_mark(text)).expert and mark.sure
    }  # fmt: skip
    return next(iter(marks.items())) if len(set(marks.values())) == 1 else None


def _doubtful(lora: Lora) -> str:
    file, scale = lora.path.name, f"{lora.scale:g}"
    return (
        f"lora {file}: its name does not say clearly which of the two experts it is for; say it, as ({file!r}, {scale},"
        f' "high") or ({file!r}, {scale}, "low"), on the command line --lora {file}:{scale}:high or :low; for both '
        "give it twice"
    )


def experts_of(lora: Lora, count: int) -> Sequence[int]:
    """Indices of the transformers that a LoRA changes, of a model with `count` (high noise first)."""
    return (NOISE_LEVELS.index(lora.expert),) if lora.expert and count > 1 else range(count)


def for_expert(loras: Sequence[Lora], number: int, count: int) -> tuple[Lora, ...]:
    """The LoRAs that change transformer `number` of `count`."""
    return tuple(lora for lora in loras if number in experts_of(lora, count))


# ---------------------------------------------------------------- quantized weights


def is_quantized(module: nn.Module, name: str) -> bool:
    """Whether a module holds the weight of this name quantized."""
    return layer_of(module, name) is not None


def of_quantized(loras: Iterable[Lora], modules: Sequence[nn.Module], wanted: bool = True) -> tuple[Lora, ...]:
    """The LoRAs with their changes of weights that one of the modules holds quantized; without `wanted`, with all their
    other changes. Those without any are left out."""
    made = []
    for lora in loras:
        held = {name for name in lora.terms if any(is_quantized(module, name) for module in modules)}
        if kept := {name: terms for name, terms in lora.terms.items() if (name in held) is wanted}:
            made.append(lora if len(kept) == len(lora.terms) else replace(lora, terms=kept))
    return tuple(made)


# ---------------------------------------------------------------- what the model has


def _keep_known(lora: Lora, shapes: Sequence[Mapping[str, Shape]], model: str) -> tuple[Lora, list[str]]:
    """(the LoRA without what only other Wan models have, what that is). shapes: of each expert. Raises CheckpointError
    if the rest does not fit, or if nothing is left."""
    left_out = _not_there(lora, shapes)
    if len(left_out) < len(lora.terms):
        lora = replace(lora, terms={name: terms for name, terms in lora.terms.items() if name not in left_out})
    for number in experts_of(lora, len(shapes)):
        check([lora], shapes[number], model)
    return lora, left_out


def _not_there(lora: Lora, shapes: Sequence[Mapping[str, Shape]]) -> list[str]:
    """What the LoRA changes of those weights that only some models have, and this one has not."""
    mine = [shapes[number] for number in experts_of(lora, len(shapes))]
    return [name for name in lora.terms if OPTIONAL.fullmatch(name) and not any(name in inside for inside in mine)]


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
            if name in shapes and not term.fits(tuple(shapes[name]))
        ]
        if wrong:
            sentences.append(f"wrong shapes: {some(wrong)}")
        if sentences:
            raise CheckpointError(f"{lora.path} does not fit {model}: " + "; ".join(sentences))


def check_part(loras: Iterable[Lora], module: nn.Module, part: Part) -> None:
    """Check that LoRAs fit the module of a part. Raises CheckpointError."""
    check(loras, _shapes(module), str(part.files[0].parent))
