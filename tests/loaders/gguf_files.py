"""GGUF files for tests: written by the package gguf, with random blocks where it can make none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvid.ops.formats_gguf import BLOCKS
from fastvid.ops.quantized import FORMATS


def draw(format: str, shape: tuple[int, ...], seed: int = 0, size: float = 0.01) -> Tensor:
    """Random blocks of a matrix, uint8 [N, bytes of a row]: any bytes, but factors of about `size`."""
    block, generator = BLOCKS[format], torch.Generator().manual_seed(seed)
    count = int(np.prod(shape)) // block.weights
    codes = torch.randint(256, (count, block.bytes), dtype=torch.uint8, generator=generator)
    for word in block.halves:
        codes.view(torch.float16)[:, word] = torch.randn(count, generator=generator).mul(size).half()
    return codes.view(*shape[:-1], -1)


def dequantized(format: str, codes: Tensor) -> Tensor:
    N, K = codes.shape[0], codes.shape[1] // BLOCKS[format].bytes * BLOCKS[format].weights
    return FORMATS[format].dequantize({"codes": codes}, (N, K), 0, N)


def write(
    path: Path,
    tensors: Mapping[str, Tensor],
    kinds: Mapping[str, str] | Callable[[str, Tensor], str] | None = None,
    arch: str | None = "wan",
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    more: Callable[[Any], None] | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Writes tensors as kinds say ("f16", "bf16", "q8_0", ...; else fp32) and returns what they are worth.

    A format that the package cannot write gets random blocks, small enough for a layer. shapes: true shapes that are
    kept beside reshaped tensors. more: adds keys.
    """
    import gguf
    from gguf import GGMLQuantizationType as Kind

    writer, worth = gguf.GGUFWriter(path, arch or "x", **options), {}
    if arch is None:
        writer.kv_data[0].pop("general.architecture")
    if more is not None:
        more(writer)
    for number, (name, tensor) in enumerate(tensors.items()):
        choose = kinds if callable(kinds) else lambda name, _: (kinds or {}).get(name, "f32")
        kind, flat = choose(name, tensor), tensor.float().reshape(*tensor.shape)
        if shapes and name in shapes:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(shapes[name]))
        if kind in BLOCKS:
            matrix = flat.reshape(-1, flat.shape[-1])
            if kind in ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1"):
                codes = torch.from_numpy(gguf.quants.quantize(matrix.numpy(), Kind[kind.upper()]))
            else:
                codes = draw(kind, tuple(matrix.shape), number)
                spread = dequantized(kind, codes).std() * matrix.shape[1] ** 0.5
                codes = draw(kind, tuple(matrix.shape), number, 0.01 * float(0.5 / spread))
            writer.add_tensor(name, codes.view(*flat.shape[:-1], -1).numpy(), raw_dtype=Kind[kind.upper()])
            worth[name] = dequantized(kind, codes).view(tensor.shape)
        elif kind == "bf16":
            bits = flat.bfloat16().contiguous()
            writer.add_tensor(name, bits.view(torch.uint8).numpy(), raw_dtype=Kind.BF16)
            worth[name] = bits.float()
        else:
            stored = flat.half() if kind == "f16" else flat
            writer.add_tensor(name, stored.contiguous().numpy())
            worth[name] = stored.float()
        if shapes and name in shapes:
            worth[name] = worth[name].view(shapes[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return worth
