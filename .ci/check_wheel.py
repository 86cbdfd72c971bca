"""Looks at an installed fastvid and at the video that its command line made: python check_wheel.py FILE."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import av

import fastvid
import fastvid.kernels


def main(path: str) -> None:
    assert "site-packages" in fastvid.__file__ and "site-packages" in fastvid.kernels.__file__, fastvid.__file__
    if sys.platform == "linux":
        importlib.import_module("fastvid.kernels.rgb")
    if os.environ.get("FASTVID_BUILD_CUDA") == "1":
        module = importlib.import_module("fastvid._C")
        beside = Path(fastvid.__file__).parents[1] / "fastvid.libs"
        assert not beside.exists(), f"libraries were copied into the wheel: {os.listdir(beside)}"
        print(f"fastvid._C for {module.ARCHS}, by CUDA {module.CUDA_VERSION}; devices: {module.device_count()}")
    with av.open(path) as file:
        stream = file.streams.video[0]
        codec, layout, fps = stream.codec_context.name, stream.codec_context.pix_fmt, float(stream.average_rate)
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(stream)]
    found = codec, layout, frames[0].shape, fps, len(frames)
    print(*found)
    assert found == ("h264", "yuv420p", (64, 64, 3), 16.0, 17)
    assert frames[0].std() > 10 and frames[0].mean() > 100, "not a shape on a white background"
    assert (frames[0] != frames[-1]).mean() > 0.01, "nothing moves"


if __name__ == "__main__":
    main(sys.argv[1])
