"""What a measured row is valid for: a hash of the kernel's sources, or the version of the library that runs.

    triton                     a file of kernels/ and the kernel files that it imports
    cuda, cuda_pair, cuda_fp8, cuda_int8  files of csrc/ and the headers that they include, as compiled into fastvid._C
    others                     the libraries' versions: "torch 2.11.0, cuDNN 91501"

`file_of` says which file runs an operation. Kernels that run one after the other have one name: "conv.cu+vae_norm.cu".
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import torch

CUDA = ("cuda", "cuda_pair", "cuda_fp8", "cuda_int8")
WITHOUT_KERNELS = {"ahead.py"}  # describes kernels to the ahead-of-time compiler; no call goes through it
ROWS, HEADS, CONV = "row_norms.py", "qk_norm_rope.py", {"triton": "vae_conv.py", "cuda": "conv.cu"}
NORM_CONV = {**CONV, "cuda": "conv.cu+vae_norm.cu"}
# Operation -> back end -> file.
FILES: Mapping[str, Mapping[str, str]] = {
    "attention": {
        "triton": "attention.py",
        "cuda": "attention.cu",
        "cuda_pair": "attention.cu+attention_pair.cu",
        "cuda_fp8": "attention_eight.cu+quantize.cu",
        "cuda_int8": "attention_eight.cu+quantize.cu",
    },
    "to_rgb": {"triton": "rgb.py", "cuda": "rgb.cu"},
    "solver_step": {"triton": "solver_step.py"},
    "patch_embed": {"triton": "patch_embed.py"},
    "head": {"triton": "head.py"},
    "linear": {"triton": "linear_gelu.py"},
    "linear_gelu_tanh": {"triton": "linear_gelu.py"},
    "linear_quantized": {"triton": "linear_quantized.py+linear_eight.py", "cuda": "dequantize.cu"},
    "quantize_rows": {"triton": "linear_eight.py"},
    "quantized_norm": {"triton": ROWS},
    "rms_norm_rope": {"triton": HEADS},
    "qkv_norm_rope": {"triton": HEADS},
    "modulated_layer_norm": {"triton": ROWS},
    "gated_residual": {"triton": ROWS},
    "gated_residual_norm": {"triton": ROWS},
    "gated_residual_layer_norm": {"triton": ROWS},
    "residual_norm": {"triton": ROWS},
    "layer_norm": {"triton": ROWS},
    "rms_norm": {"triton": ROWS},
    "vae_rms_norm": {"triton": "vae_norm.py", "cuda": "vae_norm.cu"},
    "vae_conv3d": CONV,
    "vae_causal_conv3d": CONV,
    "vae_norm_silu_conv3d": NORM_CONV,
    "vae_norm_silu_conv3d_rgb": {"triton": "vae_conv.py"},
    "vae_upsample_conv2d": CONV,
    "vae_downsample_conv2d": CONV,
    "vae_double_frames": CONV,
    "vae_halve_frames": CONV,
}
# Back end -> packages beside torch whose versions count. One of several names is installed.
PACKAGES: Mapping[str, tuple[str, ...]] = {
    "flash": ("flash-attn",),
    "flash3": ("flash-attn-3", "flash_attn_3"),
    "flash4": ("flash-attn-4", "flash_attn_4", "flash-attn-cute"),
    "sage": ("sageattention",),
    "compiled": ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-windows"),
}
CUDNN = ("cudnn", "channels_last", "sdpa", "library", "reference")  # may run cuDNN


def file_of(op: str, backend: str, shape_class: str = "") -> str:
    """The file that runs an operation by a back end of ours; "" for a library's. Sparse attention has its own in
    Triton."""
    file = FILES.get(op, {}).get(backend, "")
    return f"sparse_{file}" if file == "attention.py" and "sparse" in shape_class else file


def source_hash(backend: str, file: str = "") -> str | None:
    """What must be the same for a row to count; None if it isn't there (no such file, not built, not installed)."""
    if backend == "triton":
        return joined([_kernel_hash(name) for name in file.split("+")])
    if backend in CUDA:
        built = _compiled()
        return joined([built.get(name) for name in file.split("+")])
    return _version(backend)


def joined(hashes: Sequence[str | None]) -> str | None:
    """The hash of several files; None if one has none."""
    present = [one for one in hashes if one is not None]
    if len(present) < len(hashes):
        return None
    return present[0] if len(present) == 1 else _digest(present)


def kernel_files(file: str, folder: Path) -> set[str]:
    """A file of kernels/ and the kernel files that it imports, and that those import."""
    found, todo = set(), [file]
    while todo:
        name = todo.pop()
        if name not in found and name not in WITHOUT_KERNELS and (folder / name).is_file():
            found.add(name)
            todo += _imported((folder / name).read_text(encoding="utf-8"))
    return found


@lru_cache(maxsize=64)
def _imported(source: str) -> tuple[str, ...]:
    """The files of kernels/ that a source imports, anywhere in it."""
    return tuple(f"{name}.py" for node in ast.walk(ast.parse(source)) for name in _names(node))


def _names(node: ast.AST) -> Iterator[str]:
    package = "fastvid.kernels"
    if isinstance(node, ast.ImportFrom) and node.module == package:
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{package}."):
        yield str(node.module).removeprefix(f"{package}.")
    elif isinstance(node, ast.Import):
        yield from (a.name.removeprefix(f"{package}.") for a in node.names if a.name.startswith(f"{package}."))


def _kernel_hash(file: str) -> str | None:
    spec = importlib.util.find_spec("fastvid.kernels")
    folders = spec.submodule_search_locations if spec else None
    folder = Path(folders[0]) if folders else None
    if not file or Path(file).name != file or folder is None or not (folder / file).is_file():
        return None  # a row's file may be anything, such as a path that leads out of the folder
    names = sorted(kernel_files(file, folder))
    return _digest([f"{name} {hashlib.sha256((folder / name).read_bytes()).hexdigest()}" for name in names])


def _compiled() -> Mapping[str, str]:
    """File of csrc/ -> hash of it and its headers when fastvid._C was built; empty where that is not there."""
    try:
        return getattr(importlib.import_module("fastvid._C"), "SOURCE_HASHES", {})
    except ImportError:
        return {}


def _digest(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _version(backend: str) -> str | None:
    """ "torch 2.11.0, cuDNN 91501"; None if a package that the back end needs is not installed."""
    versions = [f"torch {torch.__version__}"]
    if backend in CUDNN and (cudnn := torch.backends.cudnn.version()):
        versions.append(f"cuDNN {cudnn}")
    if backend == "cublaslt":
        versions.append(f"CUDA {torch.version.cuda}")
    if backend in PACKAGES:
        found = next((named for name in PACKAGES[backend] if (named := _package(name))), None)
        if found is None:
            return None
        versions.append(found)
    return ", ".join(versions)


def _package(name: str) -> str | None:
    """ "triton 3.6.0"; None if it is not installed."""
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return None
