"""The names of Wan's weights in its two layouts: that of diffusers' folders (for the encoders: transformers'), which
fastvid's modules share, and that of the original repositories, which ComfyUI's single files keep behind a prefix.

First the tables of names, "#" standing for a number, then `origins`: for every tensor of the target layout the tensors
of the file that it is made of (`Origin`). Almost all are plain renames; only CLIP's are split, joined and reshaped.

Facts: Wan2.1 and Wan2.2 `wan/modules/{model,vace_model,vae,vae2_2,t5,clip}.py`, diffusers
`scripts/convert_wan_to_diffusers.py`.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from fastvid.errors import CheckpointError
from fastvid.models.wan import animate_names, sibling_names
from fastvid.models.wan.weight_origin import DIFFUSERS as DIFFUSERS
from fastvid.models.wan.weight_origin import ORIGINAL as ORIGINAL
from fastvid.models.wan.weight_origin import Origin as Origin
from fastvid.models.wan.weight_origin import Shape as Shape

LAYOUTS = (DIFFUSERS, ORIGINAL)

# original -> diffusers
_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
_IMAGE = {"k_img": "add_k_proj", "v_img": "add_v_proj", "norm_k_img": "norm_added_k"}
_BLOCK = {
    "modulation": "scale_shift_table",
    "norm3": "norm2",  # diffusers counts in the order of use; neither's other two norms have weights
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    **{f"self_attn.{a}": f"attn1.{b}" for a, b in _ATTENTION.items()},
    **{f"cross_attn.{a}": f"attn2.{b}" for a, b in (_ATTENTION | _IMAGE).items()},
}
TRANSFORMER = {
    "patch_embedding": "patch_embedding",
    "vace_patch_embedding": "vace_patch_embedding",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
    **{f"blocks.#.{a}": f"blocks.#.{b}" for a, b in _BLOCK.items()},
    **{f"vace_blocks.#.{a}": f"vace_blocks.#.{b}" for a, b in _BLOCK.items()},
    "vace_blocks.#.before_proj": "vace_blocks.#.proj_in",
    "vace_blocks.#.after_proj": "vace_blocks.#.proj_out",
    **sibling_names.TRANSFORMER,
}
TEXT_ENCODER = {
    "token_embedding": "shared",
    "norm": "encoder.final_layer_norm",
    "blocks.#.norm1": "encoder.block.#.layer.0.layer_norm",
    **{f"blocks.#.attn.{x}": f"encoder.block.#.layer.0.SelfAttention.{x}" for x in "qkvo"},
    "blocks.#.pos_embedding.embedding": "encoder.block.#.layer.0.SelfAttention.relative_attention_bias",
    "blocks.#.norm2": "encoder.block.#.layer.1.layer_norm",
    "blocks.#.ffn.gate.0": "encoder.block.#.layer.1.DenseReluDense.wi_0",
    "blocks.#.ffn.fc1": "encoder.block.#.layer.1.DenseReluDense.wi_1",
    "blocks.#.ffn.fc2": "encoder.block.#.layer.1.DenseReluDense.wo",
}
_RESIDUAL = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
_RESAMPLE = {"resample.1": "resample.1", "time_conv": "time_conv"}
_VAE_TOP = {
    "conv1": "quant_conv",
    "conv2": "post_quant_conv",
    **{
        f"{coder}.{a}": f"{coder}.{b}"
        for coder in ("encoder", "decoder")
        for a, b in {
            "conv1": "conv_in",
            "head.0": "norm_out",
            "head.2": "conv_out",
            **{f"middle.1.{x}": f"mid_block.attentions.0.{x}" for x in ("norm", "to_qkv", "proj")},
            **{f"middle.0.{a}": f"mid_block.resnets.0.{b}" for a, b in _RESIDUAL.items()},
            **{f"middle.2.{a}": f"mid_block.resnets.1.{b}" for a, b in _RESIDUAL.items()},
        }.items()
    },
}
IMAGE_ENCODER = {
    "visual.patch_embedding": "vision_model.embeddings.patch_embedding",
    "visual.pre_norm": "vision_model.pre_layrnorm",  # transformers' spelling
    "visual.post_norm": "vision_model.post_layernorm",
    "visual.transformer.#.norm1": "vision_model.encoder.layers.#.layer_norm1",
    "visual.transformer.#.norm2": "vision_model.encoder.layers.#.layer_norm2",
    "visual.transformer.#.attn.proj": "vision_model.encoder.layers.#.self_attn.out_proj",
    "visual.transformer.#.mlp.0": "vision_model.encoder.layers.#.mlp.fc1",
    "visual.transformer.#.mlp.2": "vision_model.encoder.layers.#.mlp.fc2",
}


class Rules:
    """Renames of modules, both ways; what stands behind a module (.weight, .bias, .gamma) is kept."""

    def __init__(self, table: Mapping[str, str]) -> None:
        self.table = table
        self._plain = {DIFFUSERS: table, ORIGINAL: {b: a for a, b in table.items()}}
        self._numbered = {
            to: [(_pattern(a), b) for a, b in names.items() if "#" in a] for to, names in self._plain.items()
        }

    def translate(self, name: str, to: str) -> str | None:
        """The name in layout `to` of a tensor that is named as in the other; None if no rule knows it."""
        stem, dot, suffix = name.rpartition(".")
        module, rest = (stem, dot + suffix) if suffix in ("weight", "bias", "gamma") else (name, "")
        target = self.module(module, to)
        return None if target is None else target + rest

    def module(self, name: str, to: str) -> str | None:
        """The same for a module."""
        if name in self._plain[to]:
            return self._plain[to][name]
        return _first(self._numbered[to], name)

    def unflatten(self, name: str) -> str | None:
        """The diffusers name of a module, in either layout, that is written with "_" in place of "."."""
        return _first(self._flat, name)

    @cached_property
    def _flat(self) -> list[tuple[re.Pattern[str], str]]:
        pairs = [*self.table.items(), *((name, name) for name in self.table.values())]
        return [(_pattern(name.replace(".", "_")), target) for name, target in pairs]


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\#", r"(\d+)"))


def _first(patterns: Iterable[tuple[re.Pattern[str], str]], name: str) -> str | None:
    """The target of the first pattern that a name matches, with the name's numbers in it."""
    for regex, target in patterns:
        if found := regex.fullmatch(name):
            pieces = target.split("#")
            return "".join(piece + number for piece, number in zip(pieces, (*found.groups(), ""), strict=True))
    return None


@lru_cache
def rules(part: str, residual: bool = False, res_blocks: int = 2) -> Rules:
    """The renames of a part. A VAE's depend on its kind (residual: 2.2) and its blocks a stage."""
    if part == "vae":
        return Rules(_VAE_TOP | (_vae_residual(res_blocks) if residual else _vae_flat(res_blocks)))
    return Rules({"transformer": TRANSFORMER, "text_encoder": TEXT_ENCODER, "image_encoder": IMAGE_ENCODER}[part])


def _vae_flat(res_blocks: int) -> dict[str, str]:
    """VAE 2.1: the original counts all layers of a coder in one row; diffusers sorts those of the decoder by stage."""
    inner = _RESIDUAL | _RESAMPLE
    table = {f"encoder.downsamples.#.{a}": f"encoder.down_blocks.#.{b}" for a, b in inner.items()}
    for stage in range(16):
        first = stage * (res_blocks + 2)
        for i in range(res_blocks + 1):
            block = f"decoder.up_blocks.{stage}.resnets.{i}"
            table |= {f"decoder.upsamples.{first + i}.{a}": f"{block}.{b}" for a, b in _RESIDUAL.items()}
        up, last = f"decoder.up_blocks.{stage}.upsamplers.0", first + res_blocks + 1
        table |= {f"decoder.upsamples.{last}.{a}": f"{up}.{b}" for a, b in _RESAMPLE.items()}
    return table


def _vae_residual(res_blocks: int) -> dict[str, str]:
    """VAE 2.2: both sort by stage; the original counts the resampling layer as one more block."""
    down, up = "encoder.downsamples.#.downsamples", "decoder.upsamples.#.upsamples"
    return {
        **{f"{down}.#.{a}": f"encoder.down_blocks.#.resnets.#.{b}" for a, b in _RESIDUAL.items()},
        **{f"{up}.#.{a}": f"decoder.up_blocks.#.resnets.#.{b}" for a, b in _RESIDUAL.items()},
        **{f"{down}.{res_blocks}.{a}": f"encoder.down_blocks.#.downsampler.{b}" for a, b in _RESAMPLE.items()},
        **{f"{up}.{res_blocks + 1}.{a}": f"decoder.up_blocks.#.upsampler.{b}" for a, b in _RESAMPLE.items()},
    }


def vae_rules(names: Iterable[str]) -> Rules:
    """The renames of the VAE that these names (of either layout, without prefix) belong to."""
    names = set(names)
    stages = _numbers(names, r"decoder\.up_blocks\.0\.resnets\.(\d+)\.")
    if stages:
        return rules("vae", is_residual(names), max(stages))
    nested = _numbers(names, r"decoder\.upsamples\.0\.upsamples\.(\d+)\.residual\.")
    if nested:
        return rules("vae", True, max(nested))
    resampled = _numbers(names, r"decoder\.upsamples\.(\d+)\.resample\.")
    blocks = min(resampled) - 1 if resampled else max(_numbers(names, r"decoder\.upsamples\.(\d+)\."), default=2)
    return rules("vae", False, max(0, blocks))


def is_residual(names: Iterable[str]) -> bool:
    """Whether diffusers' names of a VAE are those of 2.2."""
    return any(name.startswith("encoder.down_blocks.0.resnets.") for name in names)


def _numbers(names: Iterable[str], pattern: str) -> set[int]:
    regex = re.compile(pattern)
    return {int(found[1]) for name in names if (found := regex.match(name))}


# ---------------------------------------------------------------- what tensors are made of

PARTS = ("transformer", "vae", "text_encoder", "image_encoder")
SHOWN = 10  # names in a message

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
    "transformer": re.compile(
        rf"(vace_)?blocks\.\d+\.(attn2\.norm_added_q|cross_attn\.norm_q_img)\.weight|model_type\..*|{animate_names.IGNORED}"
    ),
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
    if any(re.search(r"(^|\.)vace_(blocks\.\d|patch_embedding)", name) for name in names):
        raise CheckpointError(
            "these weights are a VACE module alone: control blocks without the text-to-video transformer that they "
            'belong to; give that transformer as the model, and this as parts={"vace": PATH}, --part vace=PATH'
        )
    raise CheckpointError(
        f"these weights are no part of a Wan model (transformer, VAE, UMT5, CLIP) in either layout: {some(names)}"
    )


_MODULE = re.compile(r"(?P<prefix>.*?)vace_(blocks\.\d+|patch_embedding)\.")
_BESIDE_MODULE = re.compile(r"(.*\.)?scaled_fp8|model_type\..*")


def is_module(names: Iterable[str]) -> bool:
    """Whether these are the tensors of a VACE module alone."""
    kinds = {bool(_MODULE.match(name)) for name in names if not _BESIDE_MODULE.fullmatch(name)}
    return kinds == {True}


def find_module(names: Iterable[str]) -> Found | None:
    """A VACE module among these names, which may have a prefix and a layout of its own; None if there is none."""
    inside = [found for name in names if (found := _MODULE.match(name))]
    if not inside:
        return None
    original = any(".self_attn." in found.string or "before_proj" in found.string for found in inside)
    return Found("transformer", ORIGINAL if original else DIFFUSERS, inside[0]["prefix"])


def origins(names: Iterable[str], to: str, found: Found | None = None) -> dict[str, Origin]:
    """Name in layout `to` -> what it is made of, for all tensors of a file. Names that are there for nothing are left
    out, but not where original names stay as they are.

    Raises CheckpointError that lists the names that no layout knows, or that are there twice.
    """
    names = list(names)
    module = find_module(names) if found is None else None
    found = found or find_part(names)
    if module and (module.layout, module.prefix) != (found.layout, found.prefix):  # from a file of its own
        inside = [name for name in names if _MODULE.match(name)]
        rest = [name for name in names if not _MODULE.match(name)]
        return origins(rest, to, found) | origins(inside, to, module)
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
    special = _SPECIAL[found.part](name, stored, found.layout, to) if found.part in _SPECIAL else None
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


# What is more than renamed, by part.
_SPECIAL = {"image_encoder": _clip, "transformer": animate_names.originate}


def _join(a: Origin, b: Origin, target: str) -> Origin:
    """Two parts of a joined tensor; anything else that meets here is there twice."""
    if len(a.names) == len(b.names) > 1 and not any(x and y for x, y in zip(a.names, b.names, strict=True)):
        return replace(a, names=tuple(x or y for x, y in zip(a.names, b.names, strict=True)))
    raise CheckpointError(f"weights that stand for the same {target}: {', '.join(filter(None, (*a.names, *b.names)))}")


def _check_joined(made: dict[str, Origin]) -> dict[str, Origin]:
    for target, origin in made.items():
        if not all(origin.names):
            parts = "q, k and v" if len(origin.names) == 3 else "k and v"
            raise CheckpointError(f"{target} needs {parts}; only {', '.join(filter(None, origin.names))} is there")
    return made


def _canonical(name: str, found: Found, names: Container[str]) -> str:
    """The name as published: transformers 5 leaves out CLIP's prefix, and may keep UMT5's embedding under its alias."""
    if (found.part, found.layout) == ("image_encoder", DIFFUSERS) and name.startswith(CLIP_BARE):
        return f"vision_model.{name}"
    return SHARED if name == EMBED_TOKENS and SHARED not in names else name


def _check_known(unknown: list[str], found: Found) -> None:
    if quantized := [name for name in unknown if _QUANTIZED.fullmatch(name.removeprefix(found.prefix))]:
        raise CheckpointError(
            f"scales and marks of quantized weights that are not there: {some(quantized)}; take another copy"
        )
    if unknown:
        raise CheckpointError(f"weights that a Wan {found.part} in {found.layout} names does not have: {some(unknown)}")


def some(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = sorted(names)
    return ", ".join(name[:200] for name in names[:SHOWN]) + (
        f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    )
