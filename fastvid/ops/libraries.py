"""What `auto` takes without any result of a kernel: well-kept libraries on GPUs, today's PyTorch routes on CPUs."""

from __future__ import annotations

import torch

from fastvid.ops import attention_library, rgb, solver_step, transformer, vae_gpu

# Back ends of other operations by libraries, best first.
ON_CUDA = ("channels_last", "compiled")


def default(op: str, device: torch.device) -> tuple[str, str]:
    """(back end, reason) of an operation on a device, for which nothing is known of our own kernels.

    Attention on CUDA is "library", which decides for each call (`attention.library`); on CPUs and on AMD's GPUs it is
    PyTorch's own choice, "sdpa". Other operations on GPUs take a compiled or channels-last path if they have one.
    """
    if op == "attention":
        return _attention(device)
    if device.type == "cuda":
        for name in ON_CUDA:
            if name in _backends(op):
                return name, "a library, without a result of this GPU"
    return "reference", device.type


def version(op: str, backend: str) -> str:
    """The version of the library behind a back end, for results of it: "cudnn 9.15.1", "torch 2.13.0"."""
    return attention_library.version(backend if op == "attention" else "torch")


def _attention(device: torch.device) -> tuple[str, str]:
    names = attention_library.preferred(device)
    if not names:
        return "sdpa", "PyTorch's own"
    if "cudnn" in names:
        return "library", f"cuDNN {attention_library.cudnn_version()}, else aten's flash or efficient kernel"
    return "library", "aten's flash kernel, else its efficient one"


def _backends(op: str) -> set[str]:
    if op == "to_rgb":
        return set(rgb.BACKENDS)
    families = (transformer.BACKENDS, solver_step.BACKENDS, vae_gpu.BACKENDS)
    return {name for family in families for name in family.get(op, ())}
