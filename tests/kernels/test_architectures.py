"""A build and a device that do not fit: what is asked for by name says so when it is bound, names both and what to do;
and the binding says so too, before it launches anything."""

from __future__ import annotations

import ctypes
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from compiled_host import CXX, compile_host
from hypothesis import given
from hypothesis import strategies as st

from fastvid.cli import doctor
from fastvid.device import devices
from fastvid.errors import BackendUnavailable
from fastvid.ops import dispatch

ALL = "80;90a;100;120"
ANY, HOPPER = "to_rgb", ("attention", "vae_causal_conv3d")  # HOPPER: for sm_90a alone


def fit(monkeypatch: pytest.MonkeyPatch, archs: str, capability: tuple[int, int], devices: int = 1) -> None:
    """As if fastvid._C was built for archs, and there was such a device."""
    built = SimpleNamespace(ARCHS=archs, CUDA_VERSION="13.0", device_count=lambda: devices)
    monkeypatch.setattr(dispatch, "extension", lambda: built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU of a test")


def refused(op: str) -> str:
    """What bind says, empty if it binds."""
    asked = {"attention": "cuda"} if "attention" in op else {"backend": f"{op}=cuda"}
    try:
        assert dispatch.bind(**asked, device="cuda").bound[op] == "cuda"
    except BackendUnavailable as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("archs", "capability"),
    [
        *((ALL, capability) for capability in [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)]),
        ("80", (8, 6)),
    ],
)
def test_a_build_that_fits(monkeypatch: pytest.MonkeyPatch, archs: str, capability: tuple[int, int]) -> None:
    fit(monkeypatch, archs, capability)
    assert refused(ANY) == ""
    for op in HOPPER:
        told = refused(op)
        if capability == (9, 0):
            assert told == ""
        else:
            device = "sm_{}{}".format(*capability)
            assert f"it is for sm_90a alone, and the device is {device}: ask for triton" in told, op


@pytest.mark.parametrize(
    ("archs", "capability", "remedy"),
    [
        ("80", (9, 0), "80;90a"),
        ("90a", (8, 0), "90a;80"),
        ("90a", (8, 6), "90a;86"),
        ("86", (8, 0), "86;80"),
        ("80;90a", (10, 0), "80;90a;100"),
        ("80;90a;100a", (10, 3), "80;90a;100a;103"),
        (ALL, (11, 0), "80;90a;100;120;110"),
        ("80;90a", (12, 0), "80;90a;120"),
        ("120a", (12, 1), "120a;121"),
    ],
)
@pytest.mark.parametrize("op", [ANY, *HOPPER])
def test_a_build_that_lacks_the_device(
    monkeypatch: pytest.MonkeyPatch, op: str, archs: str, capability: tuple[int, int], remedy: str
) -> None:
    fit(monkeypatch, archs, capability)
    told = refused(op)
    assert f"the device is sm_{capability[0]}{capability[1]}" in told and f"built for {archs}:" in told
    assert f"FASTVID_CUDA_ARCHS='{remedy}'" in told and op in told
    assert dispatch.runs_on(remedy, capability)  # so that doing it helps


@pytest.mark.parametrize("archs", ["90", "80;90"])
@pytest.mark.parametrize("op", HOPPER)
def test_a_build_for_hopper_without_its_own_instructions(monkeypatch: pytest.MonkeyPatch, op: str, archs: str) -> None:
    fit(monkeypatch, archs, (9, 0))
    assert refused(ANY) == ""
    assert f"it is for sm_90a, and fastvid._C was built for {archs}: " in refused(op)
    assert f"FASTVID_CUDA_ARCHS='{archs};90a'" in refused(op)


def test_a_device_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    fit(monkeypatch, ALL, (7, 5))
    assert all("sm_75 is older than sm_80: ask for reference" in refused(op) for op in (ANY, *HOPPER))


def install_driver(monkeypatch: pytest.MonkeyPatch, release: str | None) -> None:
    """As if this driver was installed."""
    for module in (devices, doctor):
        monkeypatch.setattr(module, "driver", lambda: release)


def test_a_driver_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    fit(monkeypatch, ALL, (9, 0), devices=0)
    install_driver(monkeypatch, None)
    assert all("the driver is older than CUDA 13.0" in refused(op) for op in (ANY, *HOPPER))
    install_driver(monkeypatch, "570.124.06")
    for op in (ANY, *HOPPER):
        assert "driver 570.124.06 is too old: CUDA 13.0 of fastvid._C needs r580 or later" in refused(op)
        assert "for CUDA 12" in refused(op)


@pytest.mark.parametrize(
    ("release", "fits"),
    [("450.80", ()), ("524.99", ()), ("525.60.13", (12,)), ("579.1", (12,)), ("580.65.06", (12, 13))],
)
def test_doctor_says_which_driver_is_too_old(
    release: str, fits: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    install_driver(monkeypatch, release)
    for major in (12, 13):
        monkeypatch.setattr(torch.version, "cuda", f"{major}.0")
        built = SimpleNamespace(ARCHS=ALL, CUDA_VERSION=f"{major}.1", __file__="_C.so")
        monkeypatch.setattr(dispatch, "extension", lambda built=built: built)
        report = doctor.doctor("cpu")
        for section, version in (("cuda", f"CUDA {major}.0 of torch"), ("extension", f"CUDA {major}.1 of fastvid._C")):
            told = report[section].get("driver_too_old", "")
            assert (told == "") is (major in fits)
            assert major in fits or (
                release in told and version in told and f"r{devices.OLDEST_DRIVERS[major]}" in told
            )
        assert report["cuda"]["driver"] == release
    assert devices.driver_too_old(None, "torch") is devices.driver_too_old("14.0", "torch") is None


def test_auto_binds_none_of_it_and_raises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    fit(monkeypatch, ALL, (11, 0))
    assert "cuda" not in set(dispatch.bind(device="cuda").bound.values())


# The binding's own questions, csrc/archs.h

needs_compiler = pytest.mark.skipif(CXX is None, reason="there is no C++ compiler")
CAPABILITIES = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1)]
NUMBERS = [f"{major}{minor}" for major, minor in CAPABILITIES]


@cache
def library() -> ctypes.CDLL:
    return compile_host("archs_host.cpp")


def refused_by_binding(archs: str, needs: str, capability: int) -> str:
    out = ctypes.create_string_buffer(1000)
    library().refuse_device(archs.encode(), needs.encode(), capability, out, len(out))
    return out.value.decode()


def check_both_sides(archs: str, capability: tuple[int, int]) -> None:
    number, runs = 10 * capability[0] + capability[1], dispatch.runs_on(archs, capability)
    assert bool(library().runs_on(archs.encode(), number)) is runs, (archs, number)
    assert (refused_by_binding(archs, "", number) == "") is runs
    hopper = refused_by_binding(archs, "90a", number) == ""
    assert hopper is (capability == (9, 0) and "90a" in archs.split(";"))


@needs_compiler
@pytest.mark.parametrize("suffix", ["", "a", "f"])
def test_both_sides_agree_on_each(suffix: str) -> None:
    for number in NUMBERS:
        for capability in CAPABILITIES:
            check_both_sides(number + suffix, capability)


@needs_compiler
@given(
    st.lists(st.tuples(st.sampled_from(NUMBERS), st.sampled_from(["", "a", "f"])), min_size=2, max_size=4),
    st.sampled_from(CAPABILITIES),
)
def test_both_sides_agree_on_lists(drawn: list[tuple[str, str]], capability: tuple[int, int]) -> None:
    check_both_sides(";".join(map("".join, drawn)), capability)


@needs_compiler
@pytest.mark.parametrize(
    ("archs", "needs", "capability", "told"),
    [
        (ALL, "90a", 86, "this kernel is for sm_90a alone, and the device is sm_86"),
        ("80;90", "90a", 90, "fastvid._C was built for 80;90, and the device is sm_90: build it with 90a among"),
        ("80", "", 90, "fastvid._C was built for 80, and the device is sm_90: build it with 90a among"),
        (ALL, "", 110, "fastvid._C was built for 80;90a;100;120, and the device is sm_110: build it with 110 among"),
        ("90a", "", 86, "fastvid._C was built for 90a, and the device is sm_86: build it with 86 among"),
    ],
)
def test_what_the_binding_says(archs: str, needs: str, capability: int, told: str) -> None:
    assert refused_by_binding(archs, needs, capability).startswith(told)


@needs_compiler
def test_a_device_that_is_not_known_is_left_to_cuda() -> None:
    assert refused_by_binding("80", "90a", 0) == ""


def refused_driver(built: str, known: int) -> str:
    out = ctypes.create_string_buffer(1000)
    library().refuse_driver(built.encode(), known, out, len(out))
    return out.value.decode()


@needs_compiler
def test_the_binding_says_which_driver_is_too_old() -> None:
    assert all(library().oldest_driver(major) == devices.OLDEST_DRIVERS.get(major, 0) for major in range(10, 20))
    assert refused_driver("13.0", 13000) == refused_driver("12.8", 12000) == ""
    assert refused_driver("13.0", 0).startswith("CUDA: there is no driver")
    told = refused_driver("13.0", 12040)
    assert "knows CUDA 12.4" in told and "CUDA 13.0, which needs a driver from r580 on" in told and "r525" in told
    assert "needs a driver from r525 on" in refused_driver("12.8", 11080) and "12.8, for" not in refused_driver(
        "12.8", 11080
    )
