"""What surrounds a launch, csrc/on_device.h and tensor_map.h, over a pretended CUDA (tests/csrc/stub)."""

from __future__ import annotations

import ctypes

import pytest
from compiled_host import CXX, ROOT, compile_host

pytestmark = pytest.mark.skipif(CXX is None, reason="there is no C++ compiler")
NOT_SUPPORTED, NO_CONTEXT, NO_DEVICE, INVALID = 801, 201, 101, 1


def library() -> ctypes.CDLL:
    return compile_host("launch_host.cpp", ROOT / "tests/csrc/stub")


def launch(device: int, current: int = 0, rank: int = 3) -> tuple[int, list[int]]:
    told = (ctypes.c_int * 3)(-7, -7, -7)
    return library().launch(device, current, rank, told), list(told)


def test_a_thread_without_a_context_gets_one_and_a_missing_entry_point_is_looked_for_again() -> None:
    lib = library()
    assert lib.lookups() == 0  # one test, as what is found stays for the process
    lib.set_found(0)
    assert [launch(0)[0], launch(0)[0]] == [NOT_SUPPORTED] * 2 and lib.lookups() == 2
    lib.set_found(1)
    assert lib.launch_unbound() == NO_CONTEXT  # so that it matters
    for device, current in ((0, 0), (1, 0), (0, 1), (1, 1)):
        assert launch(device, current) == (0, [device, device, current])
    assert launch(2) == (NO_DEVICE, [-7, -7, 0])
    assert launch(1, 0, rank=2) == (INVALID, [1, 1, 0])  # the driver's own error, and the device is put back
    assert lib.lookups() == 3
