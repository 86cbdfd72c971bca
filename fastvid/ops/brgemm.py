"""Products of bf16 matrices with fp32 results on CPUs, at the speed of the processor's bf16 instructions.

torch's public products round their results to bf16, which costs attention too much: with scores of a standard deviation
of 3 the output's error is five times SDPA's. torch itself multiplies with oneDNN's block kernel, `brgemm` in
`at::native::cpublas`, which it exports for extensions. This file calls it by the symbol, which spells the types of all
arguments. It runs as fast as the processor can (190 to 228 GFLOP/s a core, a large product 220); where it is missing,
nothing of this is offered.

Each call runs in the calling thread; `spread` divides work among threads.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from fastvid.ops import onednn

_PRODUCT = "_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb"
_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")


def why_not() -> str | None:
    """Why bf16 products with fp32 results cannot run here; None if they can."""
    if not onednn.available():
        return "this build of torch has no oneDNN routines, or oneDNN is switched off"
    return _lacking()


@functools.cache
def _lacking() -> str | None:
    # The product throws a C++ exception where oneDNN may not use these instructions, which would end the process.
    if sys.platform != "linux" or not torch.cpu._is_avx512_bf16_supported():
        return "it needs Linux on a processor with AVX512-BF16"
    if limits := [name for name in _LIMITS if name in os.environ]:
        return f"{limits[0]} limits the instructions that oneDNN uses"
    if not all(hasattr(_library(), name) for name in (_PRODUCT, "omp_set_num_threads")):
        return f"torch {torch.__version__} does not export its block product"
    return None if _proved() else f"the block product of torch {torch.__version__} is another one"


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"))


@functools.cache
def product() -> Callable[..., None]:
    function = getattr(_library(), _PRODUCT)
    sizes, pointers = [ctypes.c_int64] * 6, [ctypes.c_void_p] * 3
    function.argtypes, function.restype = [*sizes, ctypes.c_bool, *pointers, ctypes.c_bool], None
    return function


def _proved() -> bool:
    """Products of small whole numbers are exact in fp32: rows with gaps, sizes of no block, one product added."""
    a = (torch.arange(19 * 40, dtype=torch.int64) % 7 - 3).to(torch.bfloat16).view(19, 40)[:, :34]
    b = (torch.arange(34 * 21, dtype=torch.int64) % 5 - 2).to(torch.bfloat16).view(34, 21)
    out = torch.full((19, 24), torch.nan, dtype=torch.float32)[:, :21]
    matmul(a, pack(b), out)
    matmul(a, pack(b), out, add=True)
    return torch.equal(out, 2 * (a.float() @ b.float()))


def pack(b: Tensor) -> Tensor:
    """b [K, N] bf16 as `matmul` takes it: [K / 2, N, 2], pairs of rows; an odd K gets a row of zeros."""
    if b.shape[0] % 2:
        b = torch.cat((b, b.new_zeros(1, b.shape[1])))
    return b.reshape(-1, 2, b.shape[1]).transpose(1, 2).contiguous()


def pack_transposed(b: Tensor) -> Tensor:
    """pack(b.t()) for b [N, K]: where pairs lie together it moves 32-bit words."""
    if b.shape[1] % 2 or b.stride(1) != 1 or b.stride(0) % 2 or b.storage_offset() % 2:
        return pack(b.t())
    words = torch.empty(b.shape[1] // 2, b.shape[0], dtype=torch.int32).copy_(b.view(torch.int32).t())
    return words.view(b.dtype).view(-1, b.shape[0], 2)


def matmul(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """out [M, N] = a [M, K] @ b, or += with `add`. a: bf16; b: packed [K / 2, N, 2]; out: fp32. Rows of a and out may
    have gaps. K is even."""
    (M, K), (pairs, N, _) = a.shape, b.shape
    assert a.stride(1) == 1 == out.stride(1) and b.is_contiguous() and 2 * pairs == K and out.shape == (M, N)
    product()(M, N, K, a.stride(0), N, out.stride(0), add, a.data_ptr(), b.data_ptr(), out.data_ptr(), True)


def spread(run: Callable[[int], None], count: int) -> None:
    """run(0), ..., run(count - 1), divided among as many threads as torch has; each runs torch's operations alone."""
    threads = min(torch.get_num_threads(), count)

    def one(number: int) -> None:
        with torch.inference_mode():  # the caller's mode does not reach other threads
            run(number)

    if threads <= 1:
        for number in range(count):
            one(number)
        return
    for _ in _pool(threads).map(one, range(count)):
        pass


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Kept, since oneDNN compiles its kernels once a thread."""
    return ThreadPoolExecutor(threads, "fastvid-products", initializer=_alone)


if hasattr(os, "register_at_fork"):  # a child process has none of its parent's threads
    os.register_at_fork(after_in_child=_pool.cache_clear)


def _alone() -> None:
    """Let this thread's operations of torch start no threads. torch.set_num_threads would also change the others'."""
    torch.get_num_threads()  # torch sets a new thread's number once, at the first call
    _library().omp_set_num_threads(1)
