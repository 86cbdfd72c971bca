"""The names of Wan's weights in its two layouts: that of the diffusers folders (for the encoders: transformers'), which
fastvid's modules share, and that of the original repositories, which the single files of ComfyUI keep behind a prefix.

A map says for every tensor of the target layout which tensors of the file it is made of (`Origin`). Almost all are
plain renames; only the CLIP encoder splits, joins and reshapes. The tables are in layout_rules.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, cat

from fastvid.errors import CheckpointError
from fastvid.models.wan.weight_name_rules import DIFFUSERS, ORIGINAL, Rules, rules, vae_rules

PARTS = ("transformer", "vae", "text_encoder", "image_encoder")
SHOWN = 10  # names in a message
Shape = tuple[int, ...]

# The tensors of CLIP that are more than renamed: (original, diffusers, leading ones dropped, transposed).
_CLIP_SHAPED = (
    ("visual.cls_embedding", "vision_model.embeddings.class_embedding", 2, False),
    ("visual.pos_embedding", "vision_model.embeddings.position_embedding.weight", 1, False),
    ("visual.head", "visual_projection.weight", 0, True),
)
CLIP_BARE = ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.")
SHARED, EMBED_TOKENS = "shared.weight", "encoder.embed_tokens.weight"
_CLIP_QKV = re.compile(r"visual\.transformer\.(\d+)\.attn\.to_qkv\.(weight|bias)")
_CLIP_Q = re.compile(r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)")

# What files hold besides the weights that the model uses, and no layout needs.
IGNORED: Mapping[str, re.Pattern[str]] = {
    "transformer": re.compile(r"(vace_)?blocks\.\d+\.(attn2\.norm_added_q|cross_attn\.norm_q_img)\.weight"),
    "vae": re.compile(r"(?!)"),
    "text_encoder": re.compile(r"encoder\.embed_tokens\.weight|spiece_model"),  # a copy of shared.weight; ComfyUI's
    "image_encoder": re.compile(r"textual\..*|log_scale|logit_scale|vision_model\.embeddings\.position_ids"),
}
# A name that only this part in this layout has.
MARKERS: Mapping[tuple[str, str], str] = {
    ("transformer", ORIGINAL): "time_projection.1.weight",
    ("transformer", DIFFUSERS): "condition_embedder.time_proj.weight",
    ("vae", ORIGINAL): "decoder.middle.0.residual.0.gamma",
    ("vae", DIFFUSERS): "decoder.mid_block.resnets.0.norm1.gamma",
    ("text_encoder", ORIGINAL): "blocks.0.pos_embedding.embedding.weight",
    ("text_encoder", DIFFUSERS): "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    ("image_encoder", ORIGINAL): "visual.transformer.0.attn.to_qkv.weight",
    ("image_encoder", DIFFUSERS): "vision_model.encoder.layers.0.self_attn.q_proj.weight",
}
# In front of all names: ComfyUI's, and those of training code.
PREFIXES = (
    *("", "model.diffusion_model.", "diffusion_model.", "model.", "module.", "transformer.", "model.module."),
    *("_fsdp_wrapped_module.", "model._fsdp_wrapped_module.", "vae.", "first_stage_model."),
    *("text_encoders.umt5xxl.transformer.", "text_encoder.", "image_encoder."),
)
_QUANTIZED = re.compile(
    r"scaled_fp8|.*\.(scale_weight|weight_scale|scale_input|input_scale|qweight|absmax|quant_state.*)"
)


@dataclass(frozen=True)
class Origin:
    """What one tensor is made of: `names` joined along dimension 0, of that part number `part` of `parts`, transposed
    or with leading ones added (`lead` > 0) or dropped (`lead` < 0). Never arithmetic: values stay as they are.
    """

    names: tuple[str, ...]
    part: int = 0
    parts: int = 1
    lead: int = 0
    transpose: bool = False

    @property
    def is_copy(self) -> bool:
        """Whether the tensor is another one under a new name."""
        return len(self.names) == 1 and self.parts == 1 and self.lead == 0 and not self.transpose

    def shape(self, shapes: Mapping[str, Sequence[int]]) -> Shape:
        """Shape of the tensor, given the shapes of what it is made of. Raises CheckpointError if they do not fit."""
        first, *rest = (tuple(shapes[name]) for name in self.names)
        if self.is_copy:
            return first
        if not first or any(other[1:] != first[1:] for other in rest):
            given = ", ".join(f"{name} {list(shapes[name])}" for name in self.names)
            raise CheckpointError(f"shapes that do not fit together: {given}")
        rows = sum(int(shapes[name][0]) for name in self.names)
        dropped = first[: max(0, -self.lead)]
        if rows % self.parts or any(n != 1 for n in dropped) or len(first) < len(dropped) + self.transpose:
            raise CheckpointError(f"{self.names[0]} has shape {list(first)}, which this layout does not know")
        whole = (1,) * max(0, self.lead) + (rows // self.parts, *first[1:])[len(dropped) :]
        return whole[::-1] if self.transpose else whole

    def make(self, read: Callable[[str], Tensor]) -> Tensor:
        """The tensor, from a function that gives the tensors it is made of."""
        tensors = [read(name) for name in self.names]
        shape = self.shape({name: tensor.shape for name, tensor in zip(self.names, tensors, strict=True)})
        joined = cat(tensors) if len(tensors) > 1 else tensors[0]
        rows = joined.shape[0] // self.parts
        piece = joined[self.part * rows : (self.part + 1) * rows] if self.parts > 1 else joined
        return piece.T if self.transpose else piece.reshape(shape)


@dataclass(frozen=True)
class Found:
    """A part of a model in a set of names: which, in which layout, behind which prefix."""

    part: str
    layout: str
    prefix: str


def find_parts(names: Iterable[str]) -> tuple[Found, ...]:
    """The parts of a Wan model that a set of tensor names holds, by names that only they have."""
    names = set(names)
    found = []
    for (part, layout), marker in MARKERS.items():
        ends = [marker]
        if (part, layout) == ("image_encoder", DIFFUSERS):
            ends.append(marker.removeprefix("vision_model."))  # as transformers 5 has them in memory
        prefixes = [prefix for prefix in PREFIXES if any(prefix + end in names for end in ends)]
        found += [Found(part, layout, prefix) for prefix in prefixes]
    return tuple(found)


def find_part(names: Iterable[str]) -> Found:
    """The one part that a set of tensor names is. Raises CheckpointError if it is none, or several."""
    names = list(names)
    found = find_parts(names)
    if len(found) == 1:
        return found[0]
    if found:
        parts = ", ".join(f"{f.part} ({f.layout} names, prefix {f.prefix!r})" for f in found)
        raise CheckpointError(f"these weights hold several parts: {parts}; one at a time is needed")
    raise CheckpointError(
        f"these weights are no part of a Wan model (transformer, VAE, UMT5, CLIP) in either layout: {some(names)}"
    )


def origins(names: Iterable[str], to: str, found: Found | None = None) -> dict[str, Origin]:
    """Name in layout `to` -> what it is made of, for all tensors of a file. Names that are there for nothing are left
    out, but not where original names stay as they are.

    Raises CheckpointError that lists the names that no layout knows, or that are there twice.
    """
    names = list(names)
    found = found or find_part(names)
    bare = {name.removeprefix(found.prefix): name for name in names}
    if len(bare) != len(names):
        raise CheckpointError(f"weights that are there with and without the prefix {found.prefix!r}")
    known = {_canonical(name, found, bare): stored for name, stored in bare.items()}
    ignored = {name: stored for name, stored in known.items() if IGNORED[found.part].fullmatch(name)}
    table = vae_rules(known) if found.part == "vae" else rules(found.part)
    made = {name: Origin((stored,)) for name, stored in ignored.items()} if to == found.layout == ORIGINAL else {}
    unknown = []
    for name in known.keys() - ignored.keys():
        entries = _originate(name, known[name], found, to, table)
        unknown += [] if entries else [known[name]]
        for target, origin in entries.items():
            made[target] = origin if target not in made else _join(made[target], origin, target)
    _check_known(unknown, found)
    return _check_joined(made)


def _originate(name: str, stored: str, found: Found, to: str, table: Rules) -> dict[str, Origin]:
    """The tensors in layout `to` that one tensor becomes, or a part of; none if it is unknown."""
    other = ORIGINAL if found.layout == DIFFUSERS else DIFFUSERS
    special = _clip(name, stored, found.layout, to) if found.part == "image_encoder" else None
    if special is not None:
        return special
    translated = table.translate(name, other)
    return {} if translated is None else {(translated if to != found.layout else name): Origin((stored,))}


def _clip(name: str, stored: str, layout: str, to: str) -> dict[str, Origin] | None:
    """The tensors of CLIP that are more than renamed; None for the others."""
    for original, diffusers, ones, transpose in _CLIP_SHAPED:
        if name == (original if layout == ORIGINAL else diffusers):
            if to == layout:
                return {name: Origin((stored,))}
            target, lead = (diffusers, -ones) if to == DIFFUSERS else (original, ones)
            return {target: Origin((stored,), lead=lead, transpose=transpose)}
    pattern = _CLIP_QKV if layout == ORIGINAL else _CLIP_Q
    if not (match := pattern.fullmatch(name)):
        return None
    if to == layout:
        return {name: Origin((stored,))}
    if to == DIFFUSERS:
        stem = f"vision_model.encoder.layers.{match[1]}.self_attn"
        return {f"{stem}.{x}_proj.{match[2]}": Origin((stored,), i, 3) for i, x in enumerate("qkv")}
    joined = ["", "", ""]
    joined["qkv".index(match[2])] = stored
    return {f"visual.transformer.{match[1]}.attn.to_qkv.{match[3]}": Origin(tuple(joined))}


def _join(a: Origin, b: Origin, target: str) -> Origin:
    """Two thirds of a joined tensor; anything else that meets here is there twice."""
    if len(a.names) == len(b.names) == 3 and not any(x and y for x, y in zip(a.names, b.names, strict=True)):
        return replace(a, names=tuple(x or y for x, y in zip(a.names, b.names, strict=True)))
    raise CheckpointError(f"weights that stand for the same {target}: {', '.join(filter(None, (*a.names, *b.names)))}")


def _check_joined(made: dict[str, Origin]) -> dict[str, Origin]:
    for target, origin in made.items():
        if not all(origin.names):
            raise CheckpointError(f"{target} needs q, k and v; only {', '.join(filter(None, origin.names))} is there")
    return made


def _canonical(name: str, found: Found, names: Container[str]) -> str:
    """The name as published: transformers 5 leaves out CLIP's prefix, and may keep UMT5's embedding under its alias."""
    if (found.part, found.layout) == ("image_encoder", DIFFUSERS) and name.startswith(CLIP_BARE):
        return f"vision_model.{name}"
    return SHARED if name == EMBED_TOKENS and SHARED not in names else name


def _check_known(unknown: list[str], found: Found) -> None:
    if quantized := [name for name in unknown if _QUANTIZED.fullmatch(name.removeprefix(found.prefix))]:
        raise CheckpointError(
            f"quantized weights are not supported: {some(quantized)}; take the fp16, bf16 or fp32 file of this model"
        )
    if unknown:
        raise CheckpointError(f"weights that a Wan {found.part} in {found.layout} names does not have: {some(unknown)}")


def some(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
