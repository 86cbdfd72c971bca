"""What products with weights hold beside the weights and their results: packed and dequantized ones, and codes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from fastvid.models.loaded import Model, Sizes
from fastvid.models.registry import EXPERTS
from fastvid.ops.quantized import STRIP, Spec

FP32 = 4


@dataclass(frozen=True)
class Workspace:
    """Bytes that the products of a part hold at most at once: `fixed`, and for each row of activations `row`."""

    fixed: int = 0
    row: int = 0

    @classmethod
    def of(cls, specs: Iterable[Spec], itemsize: int) -> Workspace:
        """itemsize: of activations. A strip of dequantized weights in fp32, taken apart and as the product takes it,
        and its part of the result; or a row's codes and its factor."""
        specs = tuple(specs)
        exact = [spec for spec in specs if not spec.eight_bit]
        coded = [spec for spec in specs if spec.eight_bit]
        fixed = STRIP * (2 * FP32 + itemsize) if specs else 0
        row = max((min(STRIP // spec.shape[1], spec.shape[0]) * itemsize for spec in exact), default=0)
        return cls(fixed, max(row, max((spec.shape[1] + FP32 for spec in coded), default=0)))

    def bytes(self, rows: int) -> int:
        return self.fixed + rows * self.row


def workspaces(quantized: Mapping[str, Mapping[str, Spec]], itemsize: int) -> tuple[Workspace, Workspace]:
    """Those of the transformers and of the text encoder. quantized: part -> name of a weight -> how it is held."""
    experts = [spec for part in EXPERTS for spec in quantized.get(part, {}).values()]
    text = quantized.get("text_encoder", {}).values()
    return Workspace.of(experts, itemsize), Workspace.of(text, itemsize)


def format_of_products(model: Model) -> str | None:
    """The format in which most linear layers of the transformers' blocks multiply in 8 bits; None where they do not."""
    held = model.checkpoint.quantized
    specs = [spec for part in EXPERTS for spec in held.get(part, {}).values()]
    found = Counter(spec.format if spec.eight_bit else None for spec in specs)
    return found.most_common(1)[0][0] if found else None


def with_packed(model: Model) -> Sizes:
    """A model's sizes. Where plain linear layers are packed for oneDNN, the packed ones lie beside the experts' own,
    nearly all of which they are; quantized ones lie nowhere twice."""
    sizes, held = model.sizes, model.checkpoint.quantized
    if not any("packed" in model.ops.bound.get(op, "") for op in ("linear", "linear_gelu_tanh")):
        return sizes
    own = [sum(map(_bytes_of, held.get(name, {}).values())) for name in model.checkpoint.experts]
    pairs = zip(sizes.experts, own, strict=True)
    return replace(sizes, experts=tuple(one._replace(rest=one.rest + one.total - own) for one, own in pairs))


def _bytes_of(spec: Spec) -> int:
    return sum(kind.itemsize * math.prod(shape) for kind, shape in spec.data.values())
