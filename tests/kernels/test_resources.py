"""What kernels take on each architecture is what is recorded, or less, and none spills unseen."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton interprets in this process", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import resources

from fastvid.kernels.ahead import Resources, Variant, compile_ahead, compiled, tool

FILES = resources.files()


def machine_code(variant: Variant, arch: int) -> str:
    """What a variant is for sm_<arch>, as nvdisasm writes it: one instruction a line."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled(variant, arch).asm["cubin"])
        file.flush()
        return subprocess.run([tool("nvdisasm"), "-c", file.name], capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_kernels_take_what_is_recorded(file: str) -> None:
    try:
        wrong = resources.check(file, FILES[file])
    except RuntimeError as error:
        if "ptxas" in str(error):
            pytest.skip(f"this Triton's ptxas does not know an architecture: {str(error)[:200]}")
        raise
    assert not wrong, "\n".join(wrong)


def test_every_row_is_of_a_kernel() -> None:
    rows = resources.read()["kernels"]
    assert {(file, v.name) for file, vs in FILES.items() for v in vs} == {
        (file, name) for file, row in rows.items() for name in row["variants"]
    }


def test_what_is_worse_is_said() -> None:
    variant = FILES["rgb"][0]
    recorded = {"registers": 40, "spilled": 0, "shared": 1000, "units": ["wgmma"]}
    fine = Resources(44, 0, 1100, ("wgmma", "tma"))
    assert not list(resources.worse(variant, 90, fine, recorded, same=True))
    for change in ({"registers": 45}, {"spilled": 8}, {"shared": 1101}, {"units": ()}):
        assert len(list(resources.worse(variant, 90, replace(fine, **change), recorded, same=True))) == 1, change
    # Another version of Triton gives other numbers, but has no reason to spill.
    assert not list(resources.worse(variant, 90, replace(fine, registers=60), recorded, same=False))
    assert list(resources.worse(variant, 90, replace(fine, spilled=8), None, same=False))


def test_a_variant_names_every_argument() -> None:
    variant = FILES["rgb"][0]
    with pytest.raises(ValueError, match="do not name"):
        compile_ahead(replace(variant, constants={}), 90)


@pytest.mark.slow
def test_bytes_are_rounded_by_an_addition_alone() -> None:
    """Frames become bytes by adding 1.5 * 2^23: with the product before it fused into that, others would come out."""
    to_bytes = [*FILES["rgb"], next(v for v in FILES["vae_conv"] if "rgb" in v.name)]
    for variant, arch in [(variant, arch) for variant in to_bytes for arch in (80, 90)]:
        lines = [line for line in machine_code(variant, arch).splitlines() if "12582912" in line]
        found = {name for line in lines for name in re.findall(r"\b(?:FADD|FFMA|FMUL|HFMA2|HADD2)\b", line)}
        assert found == {"FADD"}, (variant.name, arch, lines[:3])
