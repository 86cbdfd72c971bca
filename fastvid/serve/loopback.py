"""Keeps a Ray cluster that is started here on this machine's loopback address."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from fastvid import env


@contextlib.contextmanager
def local_only(ray: Any) -> Iterator[None]:
    """A cluster that is started meanwhile listens on the loopback address alone, reports no usage statistics, and its
    idle threads sleep, unless the program's environment says otherwise.

    On Linux, Ray replaces 127.0.0.1 by the address of a network, and then listens on all of them; where it makes no
    clusters (on Windows and macOS) it does not. It asks this variable, once when it is imported.
    """
    variable, name = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "ENABLE_RAY_CLUSTER"
    own = {"RAY_USAGE_STATS_ENABLED": "0", variable: "0", **env.thread_variables()}
    added = {key: value for key, value in own.items() if key not in os.environ}
    constants = getattr(getattr(ray, "_private", None), "ray_constants", None)
    before = getattr(constants, name, None)
    os.environ.update(added)
    if variable in added and before is not None:
        setattr(constants, name, False)
    try:
        yield
    finally:
        if before is not None:
            setattr(constants, name, before)
        for key in added:
            os.environ.pop(key, None)
