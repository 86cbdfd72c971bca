"""Random weights in the quantized forms that programs write, by those programs' own packages where they have one.

A form turns a weight [N, K] of a layer into the tensors that its file has, by the ends of their names, and into the
weight that they mean, in fp32.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Form = Callable[[Tensor], tuple[Tensors, Tensor, dict[str, Any] | None]]
"""weight -> (end of a name -> tensor, the weight that they mean, the layer's mark)."""


def kitchen() -> Any:
    """comfy-kitchen's formats, computed without kernels."""
    pytest.importorskip("comfy_kitchen", reason="comfy-kitchen is needed")
    import comfy_kitchen.tensor as formats

    return formats


# ---------------------------------------------------------------- ComfyUI


def fp8_scaled(weight: Tensor, dtype: torch.dtype = torch.float8_e4m3fn, inputs: bool = True) -> Any:
    """The older form: a scale for the matrix."""
    scale = weight.abs().amax().float() / torch.finfo(dtype).max
    codes = (weight.float() / scale).to(dtype)
    extra = {"scale_input": torch.tensor(0.5)} if inputs else {}
    return {"weight": codes, "scale_weight": scale, **extra}, codes.float() * scale, None


def plain_fp8(weight: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> Any:
    codes = weight.to(dtype)
    return {"weight": codes}, codes.float(), None


def _by_kitchen(name: str, mark: dict[str, Any], weight: Tensor, **options: Any) -> Any:
    layout = getattr(kitchen(), name)
    codes, params = layout.quantize(weight.float(), **options)
    tensors = {f"weight{end}": tensor for end, tensor in layout.state_dict_tensors(codes, params).items()}
    made = layout.dequantize(codes, params)[: len(weight), : weight.shape[1]]
    return tensors, made, mark


def comfy_fp8(weight: Tensor) -> Any:
    tensors, made, mark = _by_kitchen("TensorCoreFP8Layout", {"format": "float8_e4m3fn"}, weight)
    return {**tensors, "input_scale": torch.tensor(2.0)}, made, mark


def comfy_fp8_e5m2(weight: Tensor) -> Any:
    return _by_kitchen("TensorCoreFP8Layout", {"format": "float8_e5m2"}, weight, dtype=torch.float8_e5m2)


def comfy_int8(weight: Tensor) -> Any:
    return _by_kitchen("TensorWiseINT8Layout", {"format": "int8_tensorwise"}, weight)


def comfy_int8_rows(weight: Tensor) -> Any:
    return _by_kitchen("TensorWiseINT8Layout", {"format": "int8_tensorwise"}, weight, per_channel=True)


def comfy_convrot(weight: Tensor, group: int = 64) -> Any:
    """ConvRot, where groups divide the inputs; published files have groups of 256."""
    if weight.shape[1] % group:
        return comfy_int8_rows(weight)
    mark = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": group}
    turned = {"per_channel": True, "convrot": True, "convrot_groupsize": group}
    return _by_kitchen("TensorWiseINT8Layout", mark, weight, **turned)


def comfy_mxfp8(weight: Tensor) -> Any:
    return _by_kitchen("TensorCoreMXFP8Layout", {"format": "mxfp8"}, weight)


def comfy_nvfp4(weight: Tensor) -> Any:
    return _by_kitchen("TensorCoreNVFP4Layout", {"format": "nvfp4"}, weight)


# ---------------------------------------------------------------- LightX2V


def lightx2v(weight: Tensor, dtype: torch.dtype = torch.int8) -> Any:
    """A scale for each row, in the weights' own dtype."""
    largest = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    scale = (weight.abs().amax(1, keepdim=True).clamp(min=1e-5) / largest).bfloat16()
    codes = weight.float() / scale.float()
    codes = codes.round().clamp(-128, 127).to(dtype) if dtype == torch.int8 else codes.to(dtype)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale.float(), None


def lightx2v_comfyui(weight: Tensor) -> Any:
    """Its form for ComfyUI: a scale for the matrix, under the older name, for int8 too."""
    scale = weight.abs().amax().float() / 127
    codes = (weight.float() / scale).round().to(torch.int8)
    return {"weight": codes, "scale_weight": scale.reshape(1)}, codes.float() * scale, None


def lightx2v_mxfp8(weight: Tensor) -> Any:
    tensors, made, _ = comfy_mxfp8(weight)
    return {name: tensor.view(torch.uint8) for name, tensor in tensors.items()}, made, None


def lightx2v_nvfp4(weight: Tensor) -> Any:
    """The first of two weights in the low half of a byte, an outer scale that divides."""
    tensors, made, _ = comfy_nvfp4(weight)
    over = 1 / tensors["weight_scale_2"]
    exact = made * ((1 / over) / tensors["weight_scale_2"])  # 1 / (1 / s) may differ from s by its last bit
    codes = tensors["weight"]
    return (
        {
            "weight": codes >> 4 | codes << 4,
            "weight_scale": tensors["weight_scale"],
            "weight_global_scale": over,
            "input_absmax": torch.tensor(3.0),
        },
        exact,
        None,
    )


def torchao_nvfp4(weight: Tensor) -> Any:
    """As torchao's are repacked: the first of two weights in the low half, scales in rows of whole tiles."""
    tensors, made, _ = comfy_nvfp4(weight)
    codes, scale = tensors["weight"], tensors["weight_scale"]
    tensors |= {"weight": codes >> 4 | codes << 4, "weight_scale": scale.reshape(len(scale) // 4, -1)}
    return {**tensors, "torchao_nvfp4": torch.zeros(2, dtype=torch.uint8)}, made, None


# ---------------------------------------------------------------- whole files


@dataclass
class File:
    """tensors, metadata: of a file. means: its weights, in fp32."""

    tensors: Tensors
    means: Tensors
    metadata: dict[str, str] = field(default_factory=dict)


def quantized(
    state: Tensors, form: Form, layers: Iterable[str] | None = None, marks: str = "tensors", bare: str = ""
) -> File:
    """A part's weights with its linear layers in a form; the others as they are.

    layers: those that are quantized; None: all. marks: "tensors" or "header"; bare: what the header
    leaves out of names.
    """
    chosen = frozenset(linear_layers(state) if layers is None else layers)
    file, listed = File(dict(state), {name: tensor.float() for name, tensor in state.items()}), {}
    for layer in chosen:
        made, file.means[f"{layer}.weight"], mark = form(state[f"{layer}.weight"])
        file.tensors |= {f"{layer}.{end}": tensor.contiguous() for end, tensor in made.items()}
        if mark and marks == "tensors":
            file.tensors[f"{layer}.comfy_quant"] = mark_tensor(mark)
        elif mark:
            listed[layer.removeprefix(bare)] = mark
    if listed:
        file.metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": listed})
    return file


def mark_tensor(mark: dict[str, Any], padding: int = 0) -> Tensor:
    return torch.tensor([*json.dumps(mark).encode(), *[0] * padding], dtype=torch.uint8)


def linear_layers(state: Tensors) -> list[str]:
    """The layers with matrices: not the embeddings of UMT5."""
    names = [name.removesuffix(".weight") for name, one in state.items() if name.endswith(".weight") and one.ndim == 2]
    return [name for name in names if not name.endswith(("shared", "embed_tokens", "relative_attention_bias"))]


# ---------------------------------------------------------------- diffusers


def bitsandbytes() -> Any:
    """bitsandbytes' functions on a CPU."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is needed")
    import bitsandbytes.functional as functional

    return functional


def plain_bitsandbytes(codes: Tensor, state: Any) -> Tensor:
    """bitsandbytes' own back end for any device. Its kernel for CPUs (0.50) takes another block's scale where rows are
    not whole blocks, and gives back other weights than were quantized."""
    from bitsandbytes.backends.default import ops

    scale = state.absmax
    if state.nested:
        over = (scale, state.state2.absmax, state.state2.code, 256, torch.float32)
        scale = ops._dequantize_blockwise_compute.__wrapped__(scale.flatten(), *over[1:]) + state.offset
    whole = (codes.reshape(-1), scale, state.code, state.blocksize, state.shape, torch.float32)
    return ops._dequantize_4bit_compute.__wrapped__(*whole)
