"""The names of umT5's weights in GGUF files, as llama.cpp writes them, and transformers'.

Facts: llama.cpp `gguf-py/gguf/{constants,tensor_mapping}.py`, `convert_hf_to_gguf.py` (T5EncoderModel).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")

OUTSIDE = {"token_embd": "shared", "enc.output_norm": "encoder.final_layer_norm"}
BLOCK = {
    **{f"attn_{x}": f"layer.0.SelfAttention.{x}" for x in "qkvo"},
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "attn_norm": "layer.0.layer_norm",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",  # the side of the GELU
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
    "ffn_norm": "layer.1.layer_norm",
}
_IN_BLOCK = re.compile(r"enc\.blk\.(\d+)\.(\w+)\.weight")
_DECODER = re.compile(r"dec\..*|output\.weight")  # of a whole T5


def to_transformers(named: Mapping[str, T]) -> dict[str, T] | None:
    """The same under transformers' names, without a decoder; names that are not known stay. None if these are not the
    names of a T5 encoder."""
    if "enc.blk.0.attn_q.weight" not in named:
        return None
    return {_translate(name): value for name, value in named.items() if not _DECODER.fullmatch(name)}


def _translate(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in OUTSIDE:
        return f"{OUTSIDE[stem]}.weight"
    found = _IN_BLOCK.fullmatch(name)
    return f"encoder.block.{found[1]}.{BLOCK[found[2]]}.weight" if found and found[2] in BLOCK else name
