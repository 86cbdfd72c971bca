"""Names of the layers that siblings of Wan have beside its own: original -> diffusers, as in `weight_names`."""

from __future__ import annotations

FUN = {"ref_conv": "ref_conv"}  # VideoX-Fun's Control models from V1.1 on; diffusers has none of them

TRANSFORMER = {**FUN}
