"""AMD's GPUs, which torch calls "cuda" and gives capabilities that read like NVIDIA's: with a stub of torch on ROCm."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fastvid.cli import doctor
from fastvid.device import devices
from fastvid.errors import BackendUnavailable
from fastvid.ops import dispatch, tuned

DEVICE = torch.device("cuda")


@pytest.fixture(autouse=True)
def mi300x(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(
        name="AMD Instinct MI300X", major=9, minor=4, gcnArchName="gfx942:sramecc+:xnack-", total_memory=192 * 2**30
    )
    monkeypatch.setattr(torch.version, "hip", "6.4.43482")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 4))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: found)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: found.name)


def test_the_architecture_is_no_sm_94() -> None:
    assert devices.architecture(DEVICE) == "gfx942" and tuned.machine(DEVICE) == "gfx942"


def test_by_default_libraries_run() -> None:
    bound = dict(dispatch.bind(device="cuda").bound)
    assert bound["attention"] == "sdpa"
    made_by_library = {bound.pop(op) for op in ("linear_quantized", "quantize_rows", "quantized_norm")}
    assert made_by_library == {"library"}, "PyTorch's products"
    assert not {"cuda", "triton", "library", "cudnn"} & set(bound.values())


@pytest.mark.parametrize("archs", ["80;90a;100a", "90", "94"])
def test_kernels_in_cuda_are_refused_by_name(monkeypatch: pytest.MonkeyPatch, archs: str) -> None:
    """Whatever was built: 90 would run on a device of capability (9, 4) if that were NVIDIA's."""
    built = SimpleNamespace(ARCHS=archs, CUDA_VERSION="13.0", device_count=lambda: 1)
    monkeypatch.setattr(dispatch, "extension", lambda: built)
    for asked in ({"attention": "cuda"}, {"backend": "to_rgb=cuda"}):
        with pytest.raises(BackendUnavailable, match=r"NVIDIA's GPUs, and the device is gfx942 \(ROCm\): ask for tri"):
            dispatch.bind(**asked, device="cuda")


def test_triton_runs_the_configurations_that_run_everywhere() -> None:
    pytest.importorskip("triton")
    from fastvid.kernels import attention, row_norms
    from fastvid.kernels.devices import AMD, architecture

    bound = dispatch.bind("triton", device="cuda").bound
    assert bound["attention"] == bound["rms_norm"] == "triton"
    assert architecture(DEVICE) == AMD
    assert attention.config_of(attention.CONFIGS, torch.empty(1, 4, 2, 128, dtype=torch.bfloat16, device="meta"))
    assert "maxnreg" in row_norms.choose(90, 1536) and "maxnreg" not in row_norms.choose(AMD, 1536)


def test_an_old_one_is_not_older_than_sm_80(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (1, 0))
    assert dispatch.why_not("triton", DEVICE) is None


def test_doctor_says_rocm() -> None:
    told = doctor.render({"cuda": doctor.doctor()["cuda"]})
    assert "ROCm 6.4.43482" in told and "AMD Instinct MI300X, gfx942, 192 GiB" in told
