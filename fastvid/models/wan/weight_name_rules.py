"""How modules of Wan's networks are called in the original repositories and in diffusers (the encoders: transformers).

"#" stands for a number. Facts: Wan2.1 and Wan2.2 `wan/modules/{model,vace_model,vae,vae2_2,t5,clip}.py`, diffusers
`scripts/convert_wan_to_diffusers.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cached_property, lru_cache

DIFFUSERS, ORIGINAL = "diffusers", "original"
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
        self._plain = {DIFFUSERS: dict(table), ORIGINAL: {b: a for a, b in table.items()}}
        numbered = [(a, b) for a, b in table.items() if "#" in a]
        self._numbered = {
            DIFFUSERS: [(_pattern(a), b) for a, b in numbered],
            ORIGINAL: [(_pattern(b), a) for a, b in numbered],
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
        return rules("vae", any(name.startswith("encoder.down_blocks.0.resnets.") for name in names), max(stages))
    nested = _numbers(names, r"decoder\.upsamples\.0\.upsamples\.(\d+)\.residual\.")
    if nested:
        return rules("vae", True, max(nested))
    resampled = _numbers(names, r"decoder\.upsamples\.(\d+)\.resample\.")
    blocks = min(resampled) - 1 if resampled else max(_numbers(names, r"decoder\.upsamples\.(\d+)\."), default=2)
    return rules("vae", False, max(0, blocks))


def _numbers(names: Iterable[str], pattern: str) -> set[int]:
    regex = re.compile(pattern)
    return {int(found[1]) for name in names if (found := regex.match(name))}
