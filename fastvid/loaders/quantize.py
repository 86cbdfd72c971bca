"""`quantize=` of `load`: which weights are held in 8 bits, made from 16-bit files while they are loaded.

The rule: the linear layers of attention and feed-forward in the blocks of a transformer, and of the text encoder. A
scale for each output channel. All else stays as it is: patch embedding, the embedders of time, text and pictures,
modulation, the last layer, what a block has beside attention and feed-forward, norms, biases, token embeddings. In a
transformer products are computed in 8 bits too, with a scale for each token; the text encoder, which runs once a
prompt, computes with its weights dequantized. What each choice costs is measured by benchmarks/bench_quantize.py.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from torch import nn

from fastvid import checks
from fastvid.checks import entries, guarded, nearest_name, one_of, refuse
from fastvid.errors import InvalidRequest
from fastvid.layers.fused import FusedLayer
from fastvid.models.description import Checkpoint, Part
from fastvid.models.registry import EXPERTS, Config, build_empty
from fastvid.ops.formats_gguf import BLOCKS
from fastvid.ops.formats_rows import E4M3, INT8
from fastvid.ops.quantized import EIGHT_BIT, Spec
from fastvid.ops.quantized import FORMATS as HELD

log = logging.getLogger("fastvid.load")

FORMATS: Mapping[str, str] = {"fp8": E4M3, "int8": INT8}
"""Name for users -> format of weights."""
NONE = "none"
PARTS = (*EXPERTS, "text_encoder")
ALLOWED = 'fp8, int8, none, or one of them for each part, such as {"transformer": "fp8", "text_encoder": "int8"}'
MIXES: Mapping[str, tuple[str, str]] = {"q4_k_m": ("q4_k", "q6_k"), "q5_k_m": ("q5_k", "q6_k")}
"""Mixture of GGUF files -> its formats: of most weights, and of values and the last layer of feed-forward."""
FINER = (".to_v", ".ffn.net.2")
_value, _part, _format = one_of((*FORMATS, NONE)), one_of(PARTS), one_of((*HELD, *MIXES))


# ---------------------------------------------------------------- the argument


@guarded(ALLOWED)
def check(name: str, value: Any) -> str | None:
    """`quantize=` in one form: "fp8", "transformer=fp8,text_encoder=int8", or None. Raises InvalidRequest."""
    if isinstance(value, Mapping):
        chosen = dict(entries(name, value, ALLOWED, len(PARTS)))
    else:
        plain = checks.text(name, value)
        if "=" not in plain:
            return None if plain == NONE else _word(name, plain)
        chosen = _by_part(name, plain)
    parts = {_part(name, part): NONE if one is None else _word(f"{name} {part}", one) for part, one in chosen.items()}
    return ",".join(f"{part}={parts[part]}" for part in PARTS if part in parts)


def _by_part(name: str, text: str) -> dict[str, str]:
    """The choices in "transformer=fp8,text_encoder=int8"."""
    words = [word.partition("=") for word in text.split(",", len(PARTS))]
    chosen = {part.strip(): choice.strip() for part, _, choice in words}
    if len(chosen) < len(words):
        refuse(name, text, "each part once")
    return chosen


def _word(name: str, value: Any) -> str:
    if not isinstance(value, str):
        refuse(name, value, ALLOWED)
    return _value(name, value) if value in (*FORMATS, NONE) else refuse(name, value, ALLOWED, _nearest(value))


def _nearest(value: str) -> str:
    return "fp8" if "8" in value and "f" in value.lower() else nearest_name(value, FORMATS)


def choice_of(quantize: str | None, part: str) -> str:
    """ "fp8", "int8" or "none" for a part. "transformer" says it of both experts if the second is not named."""
    if quantize is None or part not in PARTS:
        return NONE
    if "=" not in quantize:
        return quantize
    named = dict(word.split("=") for word in quantize.split(","))
    return named.get(part, named.get("transformer", NONE) if part in EXPERTS else NONE)


# ---------------------------------------------------------------- formats of files that are not there


def check_format(name: str, value: Any) -> str:
    """`format=` of a plan in one form: "q4_k", or "transformer=q4_k_m,text_encoder=q8_0"."""
    plain = checks.text(name, value).lower()
    if "=" not in plain:
        return _format(name, plain)
    parts = {_part(name, part): _format(name, one) for part, one in _by_part(name, plain).items()}
    return ",".join(f"{part}={parts[part]}" for part in PARTS if part in parts)


def in_format(checkpoint: Checkpoint, format: str) -> Checkpoint:
    """A model that is only planned with, as a file in that format would hold it: by the rule, and in 16 bits where a
    row is no multiple of the format's blocks. format: as `check_format` returns it."""
    check_parts(format, {part.name for part in checkpoint.parts})
    return replace(checkpoint, parts=tuple(_held(part, choice_of(format, part.name)) for part in checkpoint.parts))


def _held(part: Part, format: str) -> Part:
    if format == NONE or part.config is None:
        return part
    plain, finer = MIXES.get(format, (format, format))
    shapes = _shapes(part)
    made = {name: finer if name.removesuffix(".weight").endswith(FINER) else plain for name in shapes}
    fits = {name: one for name, one in made.items() if one not in BLOCKS or not shapes[name][1] % BLOCKS[one].weights}
    return replace(part, quantized={name: Spec.of(one, shapes[name]) for name, one in fits.items()})


# ---------------------------------------------------------------- the rule


def weights_of(module: nn.Module) -> list[str]:
    """Names of the weights that are quantized in a module: of the linear layers that are in attention or feed-forward
    in its streamed blocks."""
    found = []
    for blocks in getattr(module, "STREAMED", ()):
        for name in linear_weights(module.get_submodule(blocks)):
            if name.count(".") > 2:  # 0.attn1.to_q.weight, but not 0.proj_out.weight
                found.append(f"{blocks}.{name}")
    return found


def linear_weights(module: nn.Module) -> list[str]:
    """Names of the weights of all linear layers."""
    layers = module.named_modules()
    return [f"{name}.weight" for name, layer in layers if isinstance(layer, nn.Linear | FusedLayer)]


def specs_of(part: Part, choice: str, eight_bit: bool = True) -> dict[str, Spec]:
    """The weights of a part that are quantized, by the rule: name -> how. choice: "fp8" or "int8"."""
    return {name: Spec.of(FORMATS[choice], shape, eight_bit=eight_bit) for name, shape in _shapes(part).items()}


def _shapes(part: Part) -> dict[str, tuple[int, int]]:
    """Of the weights that the rule names."""
    assert part.config is not None
    return _rule("transformer" if part.name in EXPERTS else part.name, part.config)


@cache
def _rule(name: str, config: Config) -> dict[str, tuple[int, int]]:
    module = build_empty(name, config)
    state = module.state_dict()
    return {name: (state[name].shape[0], state[name].shape[1]) for name in weights_of(module)}


# ---------------------------------------------------------------- checkpoints


def apply(checkpoint: Checkpoint, quantize: str | None) -> Checkpoint:
    """The checkpoint with its parts' weights quantized. quantize: as `check` returns it.

    Raises InvalidRequest for a part that the model does not have, or that is quantized in another way already.
    """
    if quantize is None:
        return checkpoint
    check_parts(quantize, {part.name for part in checkpoint.parts})
    parts = (_quantized(part, choice_of(quantize, part.name), "=" in quantize) for part in checkpoint.parts)
    return replace(checkpoint, parts=tuple(parts))


def check_parts(quantize: str, names: Container[str]) -> None:
    """Raises InvalidRequest if `quantize` names a part that is not there. names: of those that are."""
    there = [name for name in PARTS if name in names]
    if not there:
        raise InvalidRequest(f"quantize={quantize!r}: of {', '.join(PARTS)} none is here; leave it out")
    for word in quantize.split(",") if "=" in quantize else ():
        if (part := word.partition("=")[0]) not in there:
            raise InvalidRequest(f"quantize: this model has no {part}; the nearest is {nearest_name(part, there)}")


def _quantized(part: Part, choice: str, named: bool) -> Part:
    """named: the choice was made for this part alone."""
    if choice == NONE or part.config is None:
        return part
    eight_bit = part.name in EXPERTS
    if not part.quantized:
        return replace(part, quantized=specs_of(part, choice, eight_bit))
    formats = sorted({spec.format for spec in part.quantized.values()})
    if FORMATS[choice] not in formats:
        if not eight_bit and not named:
            log.info("%s stays as its file has it: %s", part.name, ", ".join(formats))
            return part
        fits = next((name for name, format in FORMATS.items() if format in formats), NONE)
        raise InvalidRequest(
            f"quantize={choice!r}: {part.name} is quantized already ({', '.join(formats)}), and stays as its file has "
            f"it; the nearest is quantize={fits!r}"
        )
    # Files may hold more layers in 8 bits than the rule names: those are multiplied exactly.
    ruled = _shapes(part) if eight_bit else {}
    able = {name for name, spec in part.quantized.items() if spec.format in EIGHT_BIT and not spec.exact}
    eight = able & ruled.keys()
    return replace(part, quantized={k: replace(v, eight_bit=k in eight) for k, v in part.quantized.items()})
