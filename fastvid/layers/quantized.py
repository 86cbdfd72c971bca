"""Layers whose weights stay quantized, as their files have them.

`install` puts them in place of a module's own layers, before it is filled. A layer's data are parameters
("weight_codes", "weight_scale", ...), so they are moved and counted like all others; `weight` is all of them together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastvid.layers.branches import Branch, with_branch
from fastvid.layers.fused import FusedLayer
from fastvid.ops.formats import Data
from fastvid.ops.formats_rows import INT8
from fastvid.ops.quantized import FORMATS, Activations, QuantizedRows, QuantizedTensor, Spec
from fastvid.ops.quantized_cpu import pack
from fastvid.ops.quantized_library import packs


class Quantized(nn.Module):
    """A layer with a quantized weight. keeps: whether a back end may give it another form of its data; not while they
    have a copy in host memory."""

    keeps = True

    def __init__(self, spec: Spec, dtype: torch.dtype) -> None:
        super().__init__()
        self.spec, self.dtype = spec, dtype
        for role, (kind, shape) in spec.data.items():
            empty = torch.empty(shape, dtype=kind, device="meta")
            self.register_parameter(f"weight_{role}", nn.Parameter(empty, requires_grad=False))

    @property
    def weight(self) -> QuantizedTensor:
        spec = self.spec
        data = {role: getattr(self, f"weight_{role}") for role in spec.data}
        keep = self._keep if self.keeps else None
        return QuantizedTensor(spec.format, spec.shape, data, self.dtype, spec.rotation, spec.eight_bit, keep)

    def _keep(self, role: str, tensor: Tensor) -> None:
        setattr(self, f"weight_{role}", nn.Parameter(tensor, requires_grad=False))

    def copies(self, device: torch.device) -> bool:
        """Whether `fill` copies the codes, so that their memory is free again."""
        return device.type != "cpu"

    def fill(self, data: Data, device: torch.device) -> None:
        """Takes the weight's tensors as its own, moved to a device."""
        for role, (kind, shape) in self.spec.data.items():
            tensor = data[role]
            if not tensor.is_mkldnn:
                tensor = tensor.reshape(shape).to(device=device, dtype=kind).contiguous()
            setattr(self, f"weight_{role}", nn.Parameter(tensor, requires_grad=False))


class QuantizedLinear(Quantized):
    """A linear layer: [..., K] -> [..., N]. ops: what computes it (`ops.linear_quantized`).

    branch: what LoRAs add to it at the moment; replacement: the weight as they change it, where an operation takes that
    itself.
    """

    branch: Branch | None = None
    replacement: Tensor | None = None

    def __init__(self, spec: Spec, bias: bool, ops: Any, dtype: torch.dtype) -> None:
        super().__init__(spec, dtype)
        self.ops = ops
        self.bias = nn.Parameter(torch.empty(spec.shape[0], dtype=dtype, device="meta")) if bias else None

    def copies(self, device: torch.device) -> bool:
        return super().copies(device) or self._packs(device)

    def fill(self, data: Data, device: torch.device) -> None:
        if self._packs(device):
            data = {**data, "codes": pack(data["codes"].reshape(self.spec.shape))}
        super().fill(data, device)

    def _packs(self, device: torch.device) -> bool:
        return self.keeps and packs(self.ops, self.spec, device)

    def forward(self, x: Activations, rows: QuantizedRows | None = None) -> Tensor:
        """rows: x as 8-bit products take it, if it was quantized for several layers. A branch reads x itself."""
        made = self.ops.linear_quantized(x if rows is None else rows, self.weight, self.bias)
        return with_branch(self, cast(Tensor, x), made)  # codes come to layers without one

    def gelu_tanh(self, x: Activations, rows: str | None = None) -> Activations:
        """The layer without a branch, then GELU in its tanh form. rows: the format in which the next layer takes it."""
        made: Activations = self.ops.linear_quantized(x, self.weight, self.bias, gelu=True, rows=rows)
        return made


class QuantizedEmbedding(Quantized):
    """Rows of a table [V, d]: only those that are looked up are dequantized."""

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] int64 -> [..., d]."""
        whole, flat = self.weight, ids.reshape(-1)
        rows = {role: tensor if len(tensor) != whole.shape[0] else tensor[flat] for role, tensor in whole.data.items()}
        found = replace(whole, shape=(len(flat), whole.shape[1]), data=rows)
        return found.dequantize().unflatten(0, ids.shape)


class JoinedLinear(nn.Module):
    """Layers of a module with the same input, whose results stand one after the other. Branches are beside each."""

    def __init__(self, holder: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self._holder, self.names = (holder,), tuple(names)  # in a tuple: it is no child of this module

    @property
    def layers(self) -> tuple[Any, ...]:
        return tuple(getattr(self._holder[0], name) for name in self.names)

    def forward(self, x: Activations) -> Tensor:
        """[..., K] -> [..., sum of N]. For 8-bit products x is quantized once."""
        layers = self.layers
        sizes, given = [layer.weight.shape[0] for layer in layers], dict[str, Any]()
        if isinstance(x, Tensor) and (coding := coding_of(layers, x)) is not None:
            format, rotation = coding
            codes, scale = layers[0].ops.quantize_rows(x, *coding)
            given = {"rows": QuantizedRows(format, codes, scale, x.dtype, rotation)}
        out, start = torch.empty((*x.shape[:-1], sum(sizes)), dtype=x.dtype, device=x.device), 0
        for layer, size in zip(layers, sizes, strict=True):
            out[..., start : start + size] = layer(x, **given)
            start += size
        return out


def coding_of(layers: Sequence[nn.Module], x: Activations) -> tuple[str, int] | None:
    """(format, rotation) in which x can be quantized once for all these layers: if all of them multiply it in 8 bits,
    and in the same ones. Not for gradients, and not to e4m3 on CPUs, where that takes longer than it saves."""
    found = {
        (layer.spec.format, layer.spec.rotation)
        if isinstance(layer, QuantizedLinear) and layer.spec.eight_bit
        else None
        for layer in layers
    }
    coding = found.pop()
    if found or coding is None or (torch.is_grad_enabled() and x.requires_grad):
        return None
    return None if x.device.type == "cpu" and coding[0] != INT8 else coding


def takes_rows(layer: nn.Module, x: Activations) -> str | None:
    """The format in which the operation before a layer may quantize its input, in x's place. None where LoRAs read it
    too, which take it as it is, and where it is rotated before."""
    layers = layer.layers if isinstance(layer, JoinedLinear) else (layer,)
    if any(getattr(one, "branch", None) is not None for one in layers):
        return None
    coding = coding_of(layers, x)
    return coding[0] if coding is not None and not coding[1] else None


# ---------------------------------------------------------------- putting them in place


def install(
    module: nn.Module, specs: Mapping[str, Spec], ops: Any, dtype_of: Callable[[str], torch.dtype]
) -> dict[str, Spec]:
    """Replaces the layers whose weights are quantized. The module is on the meta device.

    specs: name of a weight -> how it is stored. dtype_of: name of a weight -> what its layer computes in. Returns the
    specs of weights that are not of linear layers or embeddings, which stay as they are.
    """
    left = {}
    for name, spec in specs.items():
        path, _, leaf = name.rpartition(".")
        layer = _find(module, path) if leaf == "weight" else None
        if isinstance(layer, FusedLayer):
            layer = _separate(module, path, dtype_of)
        if isinstance(layer, nn.Linear):
            _put(module, path, QuantizedLinear(spec, layer.bias is not None, ops, dtype_of(name)))
        elif isinstance(layer, nn.Embedding) and FORMATS[spec.format].by_rows:
            _put(module, path, QuantizedEmbedding(spec, dtype_of(name)))
        else:
            left[name] = spec
    return left


def logical_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight, a quantized one under its plain name."""
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    for path, layer in module.named_modules():
        if isinstance(layer, Quantized):
            prefix = f"{path}." if path else ""
            for role in layer.spec.data:
                del shapes[f"{prefix}weight_{role}"]
            shapes[f"{prefix}weight"] = layer.spec.shape
    return shapes


def layer_of(module: nn.Module, name: str) -> Quantized | None:
    """The quantized layer that has a weight or a parameter of this name."""
    layer = _find(module, name.rpartition(".")[0])
    return layer if isinstance(layer, Quantized) and not name.endswith(".bias") else None


def _find(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def _put(module: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    holder = module.get_submodule(parent)
    if isinstance(holder, nn.ModuleList):
        holder[int(name)] = layer
    elif isinstance(holder, nn.ModuleDict):
        holder[name] = layer
    else:
        setattr(holder, name, layer)


def _separate(module: nn.Module, path: str, dtype_of: Callable[[str], torch.dtype]) -> nn.Module:
    """Makes a layer of its own of each of some fused layers; returns the one at `path`."""
    parent, _, wanted = path.rpartition(".")
    holder = module.get_submodule(parent)
    whole = cast(FusedLayer, holder.get_submodule(wanted)).whole
    parts = [name for name, one in holder.named_children() if isinstance(one, FusedLayer) and one.whole is whole]
    for name in parts:
        made = PlainLinear(whole.weight.shape[1], len(whole.weight) // whole.count, device="meta")
        setattr(holder, name, made.to(dtype_of(f"{parent}.{name}.weight")))
    joined = next(name for name, one in holder.named_children() if one is whole)
    setattr(holder, joined, JoinedLinear(holder, parts))
    return holder.get_submodule(wanted)


class PlainLinear(nn.Linear):
    """nn.Linear, but nothing is drawn: a checkpoint fills it. branch: what LoRAs add to it at the moment."""

    branch: Branch | None = None

    def reset_parameters(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return with_branch(self, x, super().forward(x))
