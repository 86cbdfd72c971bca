"""Shapes of Wan's weights that ggml cannot keep: it drops leading ones, and has four dimensions at most.

llama-quantize writes a [1, 6, d] as [6, d]; stable-diffusion.cpp also joins the first two sizes of a 5-D convolution.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

Shape = tuple[int, ...]

# Parameters of three dimensions, of which the first are ones, in original and in diffusers' names.
_LEADING = re.compile(r"(.*\.)?(modulation|scale_shift_table|img_emb\.emb_pos|image_embedder\.pos_embed|"
                      r"visual\.(cls|pos)_embedding)")  # fmt: skip


def true_shape(name: str, shapes: Mapping[str, Shape]) -> Shape:
    """What the shape of a weight was, from its name and the shapes of the others."""
    shape = shapes[name]
    if _LEADING.fullmatch(name):
        return (1,) * (3 - len(shape)) + shape
    outputs = math.prod(shapes.get(name.removesuffix("weight") + "bias", ()))
    if len(shape) == 4 and outputs > 1 and shape[0] > outputs and shape[0] % outputs == 0:
        return (outputs, shape[0] // outputs, *shape[1:])
    return shape
