"""Names of the layers that siblings of Wan have beside its own: original -> diffusers, as in `weight_names`."""

from __future__ import annotations

from fastvid.models.wan import animate_names

FUN = {"ref_conv": "ref_conv"}  # VideoX-Fun's Control models from V1.1 on; diffusers has none of them

# SkyReels V2's diffusion forcing model of 1.3B.
SKYREELS = {
    "fps_embedding": "fps_embedding",
    "fps_projection.0": "fps_projection.net.0.proj",
    "fps_projection.2": "fps_projection.net.2",
}

TRANSFORMER = {**FUN, **SKYREELS, **animate_names.TRANSFORMER}
