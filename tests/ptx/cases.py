"""Sizes on which csrc's convolutions and attention are interpreted, and what is right there."""

from __future__ import annotations

from functools import partial

import torch
from attention_cases import assert_edges_untouched, check, make, poisoned, random_blocks
from attention_eight_host import attention_eight_host
from exact_vae import exact_conv
from ptx import runs
from ptx.runs import How
from torch import Tensor

from fastvid.ops import vae_gpu, vae_kernels
from fastvid.ops.sparse import Blocks


def conv_is_right(kernel: tuple[int, ...], C: int, N: int, dtype: torch.dtype, how: How, past: bool = True) -> bool:
    """A causal convolution of 2 frames of 5 x 9 pixels."""
    torch.manual_seed(how.seed)
    last = torch.channels_last_3d
    x, before = (torch.randn(1, C, t, 5, 9).to(dtype).contiguous(memory_format=last) for t in (2, kernel[0] - 1))
    weight = (torch.randn(N, C, *kernel) / (C * kernel[0] * kernel[1] * kernel[2]) ** 0.5).to(dtype)
    weight, bias = weight.contiguous(memory_format=last), torch.randn(N).to(dtype)
    kernels = vae_kernels.Kernels(partial(runs.conv, how=how), runs.norm, on_load=False)
    behind = before if past and kernel[0] > 1 else None
    pad = kernel[1] // 2, kernel[2] // 2
    if kernel[0] == 1:
        made = vae_gpu.conv3d(x, weight, bias, kernels=kernels)
        exact = exact_conv(x, None, weight, bias)
    else:
        made, _ = vae_gpu.causal_conv3d(x, behind, weight, bias, pad, (0, 0), kernels=kernels)
        exact = exact_conv(x, kernel[0] - 1 if behind is None else behind, weight, bias, pad, (0, 0))
    return bool((made.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max())


def attend(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, how: How, lists: int = 0
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor], Blocks | None]:
    N, M, H, D = sizes
    q, k, v = (make((1, n, H, D), dtype, how.seed + i) for i, n in enumerate((N, M, M)))
    blocks = random_blocks(([70, N - 70], [150, 40, M - 190]), lists, 0.6, 3) if lists else None
    (buffer, out), (edges, lse) = poisoned(q.shape, dtype), poisoned((1, H, N), torch.float32)
    runs.attention(q, k, v, out, lse, blocks, how=how)
    assert_edges_untouched(buffer)
    assert_edges_untouched(edges)
    return (q, k, v), (out, lse), blocks


def attention_is_right(sizes: tuple[int, int, int, int], how: How) -> bool:
    given, made, _ = attend(sizes, torch.bfloat16, how)
    try:
        check(*given, made)
    except AssertionError:
        return False
    return True


def eight_is_right(kind: str, head_dim: int, how: How, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Attention of 8 bits as the emulator of its kernels makes it, whose own tests hold it against float64."""
    N, M = 100, 200
    q, k, v = (make((1, n, 1, head_dim), dtype, i) for i, n in enumerate((N, M, M)))
    (out, lse), (wanted, wanted_lse) = ((torch.full_like(q, torch.nan), torch.empty(1, 1, N)) for _ in range(2))
    runs.attention_eight(q, k, v, out, lse, kind, how=how)
    attention_eight_host(q, k, v, wanted, wanted_lse, kind)
    off = (out.double() - wanted.double()).norm() / wanted.double().norm()
    return bool(off <= 0.1 * torch.finfo(dtype).eps) and torch.allclose(lse, wanted_lse, rtol=1e-6, atol=1e-6)
