"""Which back ends can run on a device, and if one cannot, why.

reference  eager PyTorch, everywhere
triton     kernels/, on CUDA devices, or on CPU tensors in Triton's interpreter (TRITON_INTERPRET=1)
cuda       csrc/, on the architectures that fastvid._C was built for
sdpa       torch's scaled_dot_product_attention, everywhere (attention only)
flash      the flash-attn package (attention only)
cuda_fp8   csrc/ with 8-bit products (attention only); an approximation, as is
cuda_int8  the other kind of them
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from types import ModuleType

import torch

NAMES = ("reference", "triton", "cuda")
APPROXIMATE = ("cuda_fp8", "cuda_int8")
DENSE_ATTENTION = ("sdpa", "flash", *APPROXIMATE)
MIN_CAPABILITY = (8, 0)


def why_not(backend: str, device: torch.device) -> str | None:
    """None if the back end can run on this device of this machine, else the reason that it cannot."""
    if backend == "triton":
        return _why_not_triton(device)
    if backend == "cuda" or backend in APPROXIMATE:
        return _why_not_cuda(device)
    if backend == "flash" and importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn is not installed"
    return None


def lacks(function: object, device: torch.device) -> str | None:
    """What a form of an operation lacks on a device on which its back end runs; None if nothing.

    Its attribute `needs`, if it has one ("90a"), names the only architecture that it is compiled for.
    """
    needs, module = getattr(function, "needs", None), extension()
    if needs is None:
        return None
    if isinstance(module, str):
        return module
    if not runs_on(needs, torch.cuda.get_device_capability(device)):
        return f"it is for sm_{needs} alone, and the device is {architecture(device)}: ask for triton"
    if needs not in module.ARCHS.split(";"):
        return f"it is for sm_{needs}, and {_built_without(needs, module.ARCHS)}"
    return None


def extension() -> ModuleType | str:
    """The module fastvid._C, or the reason that there is none."""
    try:
        return importlib.import_module("fastvid._C")
    except ModuleNotFoundError:
        return "fastvid._C was not built: install with FASTVID_BUILD_CUDA=1 where nvcc is"
    except ImportError as error:
        return f"fastvid._C does not load: {error}"


def runs_on(archs: str, capability: tuple[int, int]) -> bool:
    """Whether code built for archs ("80;90a") runs on a device: sm_80 on any 8.x, sm_90a on 9.0 alone."""
    for number, minor, suffix in re.findall(r"(\d+)(\d)([af]?)", archs):
        built = (int(number), int(minor))
        if built == capability or (suffix != "a" and built[0] == capability[0] and built[1] <= capability[1]):
            return True
    return False


def architecture(device: torch.device) -> str:
    """sm_90 and the like for a CUDA device, else the device's type."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return device.type
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def _why_not_triton(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (there is one for Linux)"
    if importlib.import_module("triton").knobs.runtime.interpret:
        return None
    if reason := _why_not_gpu(device):
        return reason
    if torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return f"{architecture(device)} is older than sm_80"
    return None


def _why_not_cuda(device: torch.device) -> str | None:
    module = extension()
    if isinstance(module, str):
        return module
    if reason := _why_not_gpu(device):
        return reason
    if not module.device_count():
        return (
            f"fastvid._C finds no device; most likely the driver is older than CUDA {module.CUDA_VERSION}, which "
            "fastvid._C was built with: update the driver, install with an older nvcc, or ask for triton"
        )
    major, minor = torch.cuda.get_device_capability(device)
    if runs_on(module.ARCHS, (major, minor)):
        return None
    if (major, minor) < MIN_CAPABILITY:
        return f"{architecture(device)} is older than sm_80: ask for reference"
    own = f"{major}{minor}{'a' if major >= 9 else ''}"  # from Hopper on there are instructions of each alone
    return f"the device is {architecture(device)}, and {_built_without(own, module.ARCHS)}"


def _built_without(arch: str, archs: str) -> str:
    return (
        f"fastvid._C was built for {archs}: install with FASTVID_BUILD_CUDA=1 FASTVID_CUDA_ARCHS='{archs};{arch}' "
        "where nvcc is, or ask for triton"
    )


def _why_not_gpu(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"it needs a CUDA device, and the device is {device}"
    return None if torch.cuda.is_available() else "no CUDA device is found"
