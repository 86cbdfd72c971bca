"""What `auto` takes without any result of a kernel: well-kept libraries on GPUs, PyTorch's routes on CPUs."""

from __future__ import annotations

import torch

from fastvid.ops import attention_library, compiled, compiling, eight_bits, quantized_library, vae_gpu


def default(op: str, device: torch.device) -> tuple[str, str]:
    """(back end, reason) of an operation on a device, for which nothing is known of our own kernels.

    On CPUs that is PyTorch as it comes. On GPUs:

        attention                 "library", which decides for each call (`attention.library`): cuDNN, aten's flash
                                  operator, aten's efficient one; on AMD's GPUs "sdpa", PyTorch's own choice.
                                  On CPUs with AVX512-BF16 "library" too, which is "sdpa" but for bf16
        convolutions of VAEs      "channels_last" where they have it: cuDNN, or MIOpen on AMD's GPUs
        chains of passes over     "compiled": torch.compile, where Triton is installed
        memory
        the rest                  "reference", which is a library's product: patch_embed, linear

    Products with quantized weights, and activations for them, are "library" everywhere (quantized_library.py,
    eight_bits.py).
    """
    if op == "attention":
        return _attention(device)
    if op == "linear_quantized":
        return "library", quantized_library.described(device)
    if op in eight_bits.BACKENDS:
        return "library", "in the cache" if device.type == "cpu" else "compiled with the norm before"
    if device.type != "cuda":
        return "reference", device.type
    if "channels_last" in vae_gpu.BACKENDS.get(op, ()):
        return "channels_last", f"{_convolutions()}, channels-last"
    if op not in compiled.BACKENDS:
        return "reference", "PyTorch's libraries"
    reason = compiling.why_not(device)
    return ("reference", reason) if reason else ("compiled", f"torch.compile {torch.__version__}")


def _attention(device: torch.device) -> tuple[str, str]:
    names = attention_library.preferred(device)
    if not names:
        return "sdpa", "PyTorch's own"
    if "brgemm" in names:
        return "library", "torch's block products for bf16, else PyTorch's own"
    if "cudnn" in names:
        return "library", f"cuDNN {attention_library.cudnn_version()}, else aten's flash or efficient kernel"
    return "library", "aten's flash kernel, else its efficient one"


def _convolutions() -> str:
    """Whose convolutions PyTorch calls."""
    if torch.version.hip is not None:
        return "MIOpen"
    return "PyTorch's own" if torch.backends.cudnn.version() is None else f"cuDNN {attention_library.cudnn_version()}"
