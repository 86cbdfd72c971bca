"""What kernels take on each architecture is what is recorded, or less, and none spills unseen."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton interprets in this process", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import resources

from fastvid.kernels import devices
from fastvid.kernels.ahead import Resources, Variant, compile_ahead, compiled, tool

FILES = resources.files()
# Rows that spill, and why: fp32 has no matrix units on NVIDIA, heads of 96 are masked ones of 128, and the head of 192
# features holds two products. All others keep everything in registers.
SPILLING = ("attention fp32 128 sm_80", "sparse fp32", "attention fp16 96", "head groups 192", "head tokens 192 fp32")


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


def test_every_kernel_has_a_row_on_every_architecture() -> None:
    """And the row's launch is the one that a device of that architecture takes, with the memory that it has."""
    for file, kernels in resources.read()["kernels"].items():
        by_kernel: dict[str, set[str]] = {}
        for variant in FILES[file]:
            rows = kernels["variants"][variant.name]
            assert set(rows) == {str(arch) for arch in variant.archs}, variant.name
            by_kernel.setdefault(variant.kernel.__name__, set()).update(rows)
            for arch in variant.archs:
                assert rows[str(arch)]["shared"] <= devices.SHARED[arch], (variant.name, arch)
                assert rows[str(arch)]["spilled"] == 0 or variant.name.startswith(SPILLING), (variant.name, arch)
        for kernel, found in by_kernel.items():
            by_descriptor = {"90", "100"}  # the kernel that only reads by descriptor
            assert found == (by_descriptor if "tma" in kernel else set(map(str, devices.ARCHITECTURES))), kernel


def device_of(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], kib: int) -> torch.device:
    major, minor = capability
    found = SimpleNamespace(major=major, minor=minor, shared_memory_per_block_optin=kib * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: found)
    return torch.device("cuda")


@pytest.mark.parametrize(
    ("capability", "kib", "arch"),
    [
        ((8, 0), 163, 80),
        ((8, 6), 99, 86),
        ((8, 7), 163, 86),
        ((8, 9), 99, 89),
        ((9, 0), 227, 90),
        ((10, 0), 227, 100),
        ((10, 3), 227, 100),
        ((11, 0), 227, 100),
        ((12, 0), 99, 120),
        ((12, 1), 99, 120),
        ((8, 0), 99, 86),  # a device that says it has less than its kind
        ((11, 0), 99, 86),
    ],
)
def test_a_device_takes_what_fits_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], kib: int, arch: int
) -> None:
    chosen = devices.architecture(device_of(monkeypatch, capability, kib))
    assert chosen == arch and devices.SHARED[chosen] <= kib * 1024


def test_an_entry_is_that_of_the_nearest_that_is_followed() -> None:
    table = {(80, "a"): 1, (90, "a"): 2, (86, "a"): 3, (80, "b"): 4}
    assert [devices.entry(table, arch, "a") for arch in devices.ARCHITECTURES] == [1, 3, 3, 2, 1, 3, 1]
    assert devices.takers(table, 86, "a") == (86, 89, 120) and devices.takers(table, 80, "a") == (80, 100, devices.AMD)
    assert devices.takers(table, 80, "b") == devices.ARCHITECTURES


def test_one_of_each_kernel_is_compiled_for_each_architecture() -> None:
    for file, variants in FILES.items():
        few, everything = resources.launches(variants, False), resources.launches(variants, True)
        assert {(v.name, arch) for v, arch in few} <= {(v.name, arch) for v, arch in everything}
        kernels = {(v.kernel.__name__, arch) for v, arch in everything}
        assert len(few) == len(kernels) and kernels == {(v.kernel.__name__, arch) for v, arch in few}, file


def test_what_is_worse_is_said() -> None:
    variant = FILES["rgb"][0]
    recorded = {"registers": 40, "spilled": 0, "shared": 1000, "units": ["wgmma"]}
    fine = Resources(44, 0, 1100, ("wgmma", "tma"))
    assert not list(resources.worse(variant, 90, fine, recorded, same=True))
    for change in ({"registers": 45}, {"spilled": 8}, {"shared": 1101}, {"units": ()}):
        assert len(list(resources.worse(variant, 90, replace(fine, **change), recorded, same=True))) == 1, change
    large = {**recorded, "shared": 120_000}
    assert not list(resources.worse(variant, 90, replace(fine, shared=110_000), large, same=True))
    assert list(resources.worse(variant, 120, replace(fine, shared=110_000), large, same=True))  # does not fit
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
    for variant, arch in [(variant, arch) for variant in to_bytes for arch in (80, 90) if arch in variant.archs]:
        lines = [line for line in machine_code(variant, arch).splitlines() if "12582912" in line]
        found = {name for line in lines for name in re.findall(r"\b(?:FADD|FFMA|FMUL|HFMA2|HADD2)\b", line)}
        assert found == {"FADD"}, (variant.name, arch, lines[:3])
