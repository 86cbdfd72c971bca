"""Runs every kernel once on small odd shapes under compute-sanitizer, and compares results with the reference.

compute-sanitizer --tool memcheck python benchmarks/sanitize.py [--backend triton] [--backend cuda]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastvid.ops import dispatch, sparse
from fastvid.ops.quantized import QuantizedTensor, Spec
from fastvid.tuning.weights import draw

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
APPROXIMATE = 0.1  # tolerance of 8-bit products
BACKENDS = ("triton", "cuda", *dispatch.EIGHT)


def inputs(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Yield (operation, arguments) or (operation, arguments, keyword arguments), with sizes that fill no block."""
    torch.manual_seed(0)

    def random(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device=DEVICE).to(kind)

    B, (t, h, w), heads, D = 2, (3, 5, 7), 3, 64
    N, d, fp32 = t * h * w, heads * D, torch.float32
    x, y, weight, bias = random(B, N, d), random(B, N, d), random(d), random(d)
    shift, scale, gate = (random(t, d, kind=fp32) for _ in range(3))
    index = torch.arange(t, device=DEVICE).expand(B, t).contiguous()
    angles = random(N, D // 2, kind=fp32)
    rotary = angles.cos(), angles.sin()
    yield "modulated_layer_norm", (x, shift, scale, index, 1e-6)
    yield "gated_residual", (x, y, gate, index)
    yield "gated_residual_norm", (x, y, gate, shift, scale, index, 1e-6)
    yield "gated_residual_layer_norm", (x, y, gate, index, weight, bias, 1e-6)
    yield "residual_norm", (x, y, shift, scale, index, 1e-6)
    yield "layer_norm", (x, weight, bias, 1e-6)
    yield "rms_norm", (x, weight, 1e-6)
    yield "rms_norm_rope", (x, weight, *rotary, 1e-6)
    yield "qkv_norm_rope", (random(B, N, 3 * d), weight, bias, *rotary, 1e-6)
    seen = random(B, N, heads, D), random(B, 77, heads, D), random(B, 77, heads, D)
    yield "attention", seen
    yield "attention", seen, {"return_lse": True}
    blocks = sparse.window((t, h, w), (2, 2, 4), (2, 2, 1)).to(DEVICE)
    own = tuple(random(B, N, heads, D) for _ in range(3))
    yield "attention", own, {"blocks": blocks}
    yield "attention", own, {"blocks": blocks, "return_lse": True}
    yield "linear", (x, random(130, d), random(130))
    yield "linear_gelu_tanh", (x, random(130, d), random(130))
    for format, eight_bit in (("int8", False), ("nf4", False), ("int8", True), ("fp8_e4m3", True)):
        spec = Spec.of(format, (130, d), eight_bit=eight_bit)
        data = draw(spec, torch.Generator(DEVICE).manual_seed(0))
        yield "linear_quantized", (x, QuantizedTensor(format, (130, d), data, dtype, 0, eight_bit), random(130))
    latents = random(B, 16, t, 2 * h, 2 * w, kind=fp32)
    yield "patch_embed", (latents, random(d, 16, 1, 2, 2), bias)
    yield "head", (x, shift, scale, index, random(64, d) / 8, random(64), (t, h, w), (1, 2, 2), 1e-6)
    if dtype == fp32:
        sigma = torch.linspace(0.9, 0.5, t, dtype=torch.float64)
        weights = torch.randn(2, 5, t, dtype=torch.float64)
        history = [random(*latents.shape) for _ in range(3)]
        velocities = random(*latents.shape), random(*latents.shape)
        yield "solver_step", (latents, *velocities, 4.0, sigma, sigma > 0.6, weights, history)
    yield "to_rgb", (random(3, t, 2 * h, 2 * w + 1),)
    yield from of_the_vae(random)


def of_the_vae(random: Callable[..., Tensor]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Numbers of channels that are not powers of 2, frames of 5x7 pixels, and edge rows without a result."""
    C, N, size = 40, 32, (5, 7)
    x, past, gamma = random(2, C, 3, *size), random(2, C, 2, *size), random(C, 1, 1, 1)
    cube, square, line = random(N, C, 3, 3, 3) / 33, random(N, C, 3, 3) / 19, random(N, C, 3, 1, 1) / 11
    bias, residual = random(N), random(2, N, 3, size[0] - 1, size[1])
    yield "vae_rms_norm", (x, gamma)
    yield "vae_conv3d", (x, random(N, C, 1, 1, 1) / 6, bias)
    yield "vae_causal_conv3d", (x, past, cube, bias, (1, 1), (1, 1))
    yield "vae_norm_silu_conv3d", (x, past, gamma, cube, bias, None, (0, 1))
    yield "vae_norm_silu_conv3d", (x, None, gamma, cube, bias, residual, (1, 0))
    yield "vae_norm_silu_conv3d_rgb", (x, past, gamma, cube[:3], bias[:3])
    yield "vae_upsample_conv2d", (x, square, bias, (1, 0))
    yield "vae_downsample_conv2d", (x, square, bias, 1)
    yield "vae_double_frames", (x, past, line, bias)
    yield "vae_halve_frames", (x, past[:, :, 1:], line, bias)


def compare(name: str, backend: str, made: Any, wanted: Any, dtype: torch.dtype) -> None:
    pairs = zip(*([one] if isinstance(one, Tensor) else one for one in (made, wanted)), strict=True)
    for one, right in pairs:
        off = float((one.double() - right.double()).norm() / right.double().norm())
        allowed = APPROXIMATE if backend in dispatch.EIGHT else TOLERANCE[dtype]
        assert off < allowed, f"{name} by {backend} in {dtype} is {off:.1e} off"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="those alone (default: all)")
    asked = parser.parse_args().backend or list(BACKENDS)
    table: dict[str, dict[str, Callable[..., Any]]] = dispatch.implementations()
    covered, ran = set(), 0
    for dtype in TOLERANCE if DEVICE == "cuda" else (torch.float32, torch.float16):
        for name, given, *named in inputs(dtype):
            options = named[0] if named else {}
            wanted = table[name]["reference"](*given, **options)
            for backend in asked:
                function = table[name].get(backend)
                if function is None or dtype not in getattr(function, "dtypes", TOLERANCE):
                    continue
                device = torch.device(DEVICE)
                if not (dispatch.why_not(backend, device) or dispatch.lacks(function, device)):
                    own = (one.clone() if isinstance(one, Tensor) else one for one in given)  # some are written to
                    compare(name, backend, function(*own, **options), wanted, dtype)
                    covered.add(name)
                    ran += 1
    left = {name for name, functions in table.items() if "triton" in asked and "triton" in functions} - covered
    print(f"{ran} runs of {len(covered)} operations; not run: {', '.join(sorted(left)) or 'none'}")
    raise SystemExit(1 if left or not ran else 0)


if __name__ == "__main__":
    main()
