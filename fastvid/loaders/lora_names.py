"""The names of tensors in LoRA files: which module they change, in which expert, and what they are.

diffusers, peft    transformer.blocks.0.attn1.to_q.lora_A.weight, or .lora_A.NAME.weight with an adapter's name;
                   transformer_2. for the low noise expert
original, ComfyUI  diffusion_model.blocks.0.self_attn.q.lora_down.weight, .alpha
kohya, musubi      lora_unet_blocks_0_self_attn_q.lora_down.weight, .alpha; also lora_unet__
LyCORIS            lycoris_blocks_0_self_attn_q.lokr_w1, .hada_w1_a, .lora_mid.weight, .dora_scale, .w_norm
lightx2v           like ComfyUI, with .diff (weights), .diff_b (biases), .diff_m (modulation)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from fastvid.errors import CheckpointError
from fastvid.models.wan.weight_names import DIFFUSERS, rules, some

PREFIXES = (
    *("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "unet.", "model."),
    *("pipe.dit.", "dit.", "module."),
)
EXPERT_PREFIXES = {
    **dict.fromkeys(("transformer_2.", "low_noise_model.", "pipe.dit2.", "dit2."), "low"),
    "high_noise_model.": "high",
}
FLAT = ("lora_unet_", "lycoris_")  # in front of names with "_" in place of "."
_ROLES = re.compile(
    r"\.(?:(?P<factor>lora_(?:A|B|down|up|mid|magnitude_vector)|lora\.(?:down|up|mid)"
    r"|lokr_(?:w[12](?:_[ab])?|t2)|hada_(?:w[12]_[ab]|t[12]))(?:\.(?P<adapter>[^.]+?))??(?P<kind>\.weight|\.bias)?"
    r"|(?P<bare>alpha|dora_scale|diff|diff_b|diff_m|w_norm|b_norm))$"
)
_PAIRS = {"A": "down", "B": "up", "magnitude_vector": "magnitude"}
_SAME = {"w_norm": "diff", "b_norm": "diff_b"}
OTHER_KINDS = {
    r"\boft_|\bboft|oft_blocks": "OFT",
    r"\.(a1|a2|b1|b2|bm)\.weight$": "GLoRA",
    r"ia3|\.on_input$": "(IA)3",
    r"\bvera_": "VeRA",
    r"lora_embedding_": "LoRA of embeddings",
    r"reshape_weight|set_weight": "replaced weights",
    r"modules_to_save|base_layer": "whole modules saved by peft",
    r"^lora_te|text_encoder|lora_te\d?_": "LoRA of the text encoder",
}


@dataclass(frozen=True)
class Group:
    """The tensors of a file that change one module. expert: "high" or "low" where their names say it. module: in
    diffusers' names; stored: as in the file, without prefixes. tensors: by role, such as up, down, alpha, lokr_w1."""

    expert: str
    module: str
    stored: str
    tensors: Mapping[str, Tensor]


def is_lora_weight(name: str) -> bool:
    """Whether a tensor's name is one of a LoRA, also of kinds that are not merged."""
    return bool(_ROLES.search(name)) or ".lora_embedding_" in name


def group_tensors(tensors: Mapping[str, Tensor]) -> tuple[Group, ...]:
    """The groups of a file. Raises CheckpointError (without the file's name) for names that are not understood, that
    are there twice, or that are of several adapters."""
    made: dict[tuple[str, str], tuple[str, dict[str, Tensor]]] = {}
    unknown, twice, adapters = [], [], set()
    for name, tensor in tensors.items():
        if (found := _ROLES.search(name)) is None:
            unknown.append(name)
            continue
        expert, module, stored = _module(name[: found.start()])
        role = _role(found)
        group = made.setdefault((expert, module), (stored, {}))[1]
        twice += [name] if role in group else []
        group[role] = tensor
        if found["factor"]:
            adapters.add(found["adapter"])
    if unknown:
        raise CheckpointError(f"holds what is no part of a LoRA: {some(unknown)}{_other_kinds(unknown)}")
    if len(adapters) > 1:
        names = ", ".join(sorted(name or "one without a name" for name in adapters))
        raise CheckpointError(f"holds several adapters ({names}); save each to a file of its own")
    if twice:
        raise CheckpointError(f"holds the same weights twice, under different names: {some(twice)}")
    return tuple(Group(*key, stored, group) for key, (stored, group) in made.items())


def _role(found: re.Match[str]) -> str:
    word = found["factor"] or found["bare"]
    if not word.startswith("lora"):
        return _SAME.get(word, word)
    word = word.removeprefix("lora").lstrip("._")
    return _PAIRS.get(word, word) + ("_bias" if found["kind"] == ".bias" else "")


def _module(name: str) -> tuple[str, str, str]:
    """(expert, diffusers' name, name without prefixes) of a module. Unknown modules keep their name; what no model has
    is refused later."""
    for prefix in FLAT:
        if name.startswith(prefix):
            expert, stored = _strip(name.removeprefix(prefix).lstrip("_"), "_")
            return expert, _unflatten(stored) or name, stored
    expert, stored = _strip(name, ".")
    if re.fullmatch(r"(vace_)?blocks\.\d+", stored):  # of diff_m
        return expert, stored, stored
    return expert, rules("transformer").module(stored, DIFFUSERS) or stored, stored


def _strip(name: str, dot: str) -> tuple[str, str]:
    """(the expert that a prefix names, the rest). dot: what stands for "." in the name."""
    expert = ""
    prefixes = {prefix.replace(".", dot): "" for prefix in PREFIXES}
    prefixes |= {prefix.replace(".", dot): of for prefix, of in EXPERT_PREFIXES.items()}
    while prefix := max((prefix for prefix in prefixes if name.startswith(prefix)), key=len, default=""):
        name, expert = name.removeprefix(prefix), prefixes[prefix] or expert
    return expert, name


def _unflatten(name: str) -> str | None:
    if block := re.fullmatch(r"((?:vace_)?blocks)_(\d+)", name):
        return f"{block[1]}.{block[2]}"
    return rules("transformer").unflatten(name)


def _other_kinds(names: Iterable[str]) -> str:
    kinds = {kind for part, kind in OTHER_KINDS.items() for name in names if re.search(part, name)}
    return f" ({', '.join(sorted(kinds))} is not supported)" if kinds else ""
