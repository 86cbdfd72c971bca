"""The VAEs' operations by libraries, channels-last: against float64 and vae.py, in every type, with past, edges,
residual, in stripes and bands; no layout changes and nothing is concatenated on the way; how many bytes move."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from exact_vae import exact_conv, exact_double, exact_downsample, exact_norm, exact_upsample
from kernel_cases import check, error, laid_out, random
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastvid import notices
from fastvid.models.registry import build_vae
from fastvid.models.wan.config import WAN22_VAE, WanVAEConfig
from fastvid.ops import compiling, libraries, rgb, vae, vae_gpu, vae_library

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
LAST = torch.channels_last_3d
LAYOUTS = ["plain", "channels last", "slice of frames"]
OPS = SimpleNamespace(**vae_library.OPERATIONS, to_rgb=rgb.reference)
NORMED = "vae_norm_silu_conv3d"


def both(op: str, *given: Any) -> tuple[Any, Any]:
    """What vae.py and the library path make of it; some arguments are written to."""
    made = []
    for of in (vae_gpu.BACKENDS[op]["reference"], vae_library.OPERATIONS[op]):
        own = (one.clone() if isinstance(one, Tensor) else one for one in given)
        with torch.no_grad():
            made.append(of(*own))
    return made[0], made[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("edges", [(0, 0), (1, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize(
    ("T", "behind", "added"), [(1, False, False), (1, True, True), (2, False, True), (3, True, True)]
)
def test_norm_silu_conv3d(dtype: torch.dtype, edges: tuple[int, int], T: int, behind: bool, added: bool) -> None:
    x = laid_out(random(1, 13, T, 5, 4, dtype=dtype) * 50, LAYOUTS[T - 1])
    x = x.clone(memory_format=torch.preserve_format)
    x[:, :, :, 1, 1] = 0
    past = random(1, 13, 2, 5, 4, dtype=dtype, seed=1) if behind else None
    gamma, bias = random(13, 1, 1, 1, dtype=dtype, seed=2), random(7, dtype=dtype, seed=3)
    weight = random(7, 13, 3, 3, 3, dtype=dtype, seed=4) / 4
    residual = random(1, 7, T, 5 - sum(edges), 4, dtype=dtype, seed=5) if added else None
    exact = exact_conv(exact_norm(x, gamma), 2 if past is None else past, weight, bias, (1, 1), edges)
    exact += 0 if residual is None else residual.double()
    (eager, its_past), (made, kept) = both(NORMED, x, past, gamma, weight, bias, residual, edges)
    check(made, eager, exact)
    assert made.dtype == dtype and made.is_contiguous(memory_format=LAST)
    normed = exact_norm(x, gamma)
    normed = torch.cat(
        (torch.zeros_like(normed[:, :, :1]).expand(-1, -1, 2, -1, -1) if past is None else past, normed), 2
    )
    check(kept, its_past, normed[:, :, -2:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("behind", [True, False])
@pytest.mark.parametrize(("kernel", "T"), [((3, 3, 3), 1), ((3, 3, 3), 2), ((3, 1, 1), 3), ((2, 3, 3), 2)])
def test_causal_conv3d(dtype: torch.dtype, behind: bool, kernel: tuple[int, int, int], T: int) -> None:
    for B, edges, layout in ((1, (0, 0), "plain"), (2, (1, 1), "channels last")):
        x = laid_out(random(B, 5, T, 4, 6, dtype=dtype), layout)
        past = random(B, 5, kernel[0] - 1, 4, 6, dtype=dtype, seed=1) if behind else None
        weight, bias = random(6, 5, *kernel, dtype=dtype, seed=2) / 4, random(6, dtype=dtype, seed=3)
        pad = (kernel[1] // 2, kernel[2] // 2)
        (eager, its_past), (made, kept) = both("vae_causal_conv3d", x, past, weight, bias, pad, edges)
        check(made, eager, exact_conv(x, kernel[0] - 1 if past is None else past, weight, bias, pad, edges))
        assert torch.equal(kept, its_past)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_others(dtype: torch.dtype) -> None:
    x, bias = laid_out(random(2, 5, 3, 5, 4, dtype=dtype), "slice of frames"), random(6, dtype=dtype, seed=1)
    flat = random(6, 5, 3, 3, dtype=dtype, seed=2) / 4
    for edges in ((0, 0), (1, 0), (1, 1)):
        eager, made = both("vae_upsample_conv2d", x, flat, bias, edges)
        check(made, eager, exact_upsample(x, flat, bias, edges))
    for H, bottom in ((4, 0), (5, 1), (2, 0)):
        part = x[:, :, :, :H]
        eager, made = both("vae_downsample_conv2d", part, flat, bias, bottom)
        check(made, eager, exact_downsample(part, flat, bias, bottom))
        assert made.is_contiguous(memory_format=LAST)
    line = random(6, 5, 3, 1, 1, dtype=dtype, seed=3) / 2
    for past in (None, random(2, 5, 2, 5, 4, dtype=dtype, seed=4)):
        (eager, its_past), (made, kept) = both("vae_double_frames", x, past, line, bias)
        check(made, eager, exact_double(x, past, line, bias))
        assert torch.equal(kept, its_past)
        last = None if past is None else past[:, :, 1:]
        eager, made = both("vae_halve_frames", x, last, line, bias)
        check(made, eager, exact_conv(x, last, line, bias, stride=(2, 1, 1)))
    for kernel, pad, stride in (((1, 1, 1), (0, 0), 1), ((3, 3, 3), (1, 0), 2), ((1, 3, 3), (1, 1), 1)):
        weight = random(6, 5, *kernel, dtype=dtype, seed=5) / 2
        eager, made = both("vae_conv3d", x, weight, bias, pad, stride)
        check(made, eager, exact_conv(x, None, weight, bias, pad, stride=(stride, 1, 1)))
    gamma = random(5, 1, 1, 1, dtype=dtype, seed=6)
    for one, its_gamma in ((x, gamma), (x[:, :, 0], gamma[..., 0]), (torch.zeros_like(x), gamma)):
        eager, made = both("vae_rms_norm", one, its_gamma)
        exact = exact_norm(one if one.ndim == 5 else one[:, :, None], gamma, silu=False)
        check(made, eager, exact if one.ndim == 5 else exact[:, :, 0]) if one.any() else made.any() and pytest.fail()


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_bytes_are_those_of_to_rgb(dtype: torch.dtype) -> None:
    x, gamma = random(1, 5, 2, 5, 4, dtype=dtype), random(5, 1, 1, 1, dtype=dtype, seed=2)
    given = (x, None, gamma, random(3, 5, 3, 3, 3, dtype=dtype, seed=3) / 6, random(3, dtype=dtype))
    frames, kept = vae_library.norm_silu_conv3d(*given, None, (1, 0))
    made, also = vae_library.norm_silu_conv3d_rgb(*given, (1, 0))
    assert made.dtype == torch.uint8 and torch.equal(kept, also)
    assert torch.equal(made.permute(0, 2, 3, 4, 1), torch.stack([rgb.reference(one) for one in frames]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_convolutions_that_torch_does_not_trust_run_frame_by_frame(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three 2-d convolutions, each rounded: a little less exact in 16 bits."""
    monkeypatch.setattr(vae_library, "without_3d", lambda device, dtype: True)
    monkeypatch.setattr(torch.nn.functional, "conv3d", lambda *given: pytest.fail("a 3-d convolution"))
    x, past = random(2, 13, 3, 5, 4, dtype=dtype), random(2, 13, 2, 5, 4, dtype=dtype, seed=1)
    weight, bias = random(6, 13, 3, 3, 3, dtype=dtype, seed=2) / 4, random(6, dtype=dtype, seed=3)
    made, _ = vae_library.causal_conv3d(x, past, weight, bias, (1, 1), (1, 0))
    assert error(made, exact_conv(x, past, weight, bias, (1, 1), (1, 0))) < 2 * torch.finfo(dtype).eps
    made = vae_library.conv3d(x, weight, bias, (1, 0), 2)
    assert error(made, exact_conv(x, None, weight, bias, (1, 0), stride=(2, 1, 1))) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("cudnn", "version", "split"),
    [
        (90701, "2.13.0", False),
        (90800, "2.13.0", True),
        (91300, "2.9.1", True),
        (91501, "2.9.1", False),
        (91501, "2.9.0+cu130", True),
    ],
)
def test_which_versions_are_not_trusted(
    cudnn: int, version: str, split: bool, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    monkeypatch.setattr(torch, "__version__", version)
    told: list[str] = []
    monkeypatch.setattr(notices, "warn", told.append)
    vae_library._distrusted.cache_clear()
    cuda = torch.device("cuda")
    assert vae_library.without_3d(cuda, torch.bfloat16) is split is vae_library.without_3d(cuda, torch.float16)
    assert not vae_library.without_3d(cuda, torch.float32)
    assert not vae_library.without_3d(torch.device("cpu"), torch.bfloat16)
    vae_library._distrusted.cache_clear()
    assert len(told) == split and all(str(cudnn) in text for text in told)


def test_phases_of_the_kernel() -> None:
    weight = random(6, 5, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(vae_library.phase_weights(weight), vae.phase_weights(weight))


@pytest.mark.slow
@pytest.mark.skipif(compiling.why_not(torch.device("cpu")) is not None, reason="nothing can be compiled here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_passes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """They run, in the middle of other values, and are rounded once; other layouts run eagerly."""
    ran: list[str] = []
    call = compiling._call
    monkeypatch.setattr(compiling, "_call", lambda function, *given: ran.append("") or call(function, *given))
    for T, size in ((3, 4), (2, 7)):
        x, past = random(1, 16, T, size, 5, dtype=dtype) * 30, random(1, 16, 2, size, 5, dtype=dtype, seed=1)
        x = laid_out(x, "channels last")
        x[:, :, :, 1, 1] = 0
        gamma, bias = random(16, 1, 1, 1, dtype=dtype, seed=2), random(16, dtype=dtype, seed=3)
        weight, residual = random(16, 16, 3, 3, 3, dtype=dtype, seed=4) / 8, x.flip(2)
        exact = exact_conv(exact_norm(x, gamma), past, weight, bias, (1, 1)) + residual.double()
        given = (x, past, gamma, weight, bias)
        with torch.no_grad():
            eager, kept = vae_library.norm_silu_conv3d(*given, residual, pointwise=vae_library.EAGER)
            made, also = vae_library.norm_silu_conv3d(*given, residual, pointwise=vae_library.COMPILED)
        check(made, eager, exact)
        check(also, kept, torch.cat((past, exact_norm(x, gamma)), 2)[:, :, -2:])
    # Each runs once as it is compiled, and twice. In fp32 a CPU's convolution leaves pixels apart, so adding is eager.
    assert len(ran) == (6 if dtype == torch.bfloat16 else 3)


def test_it_is_the_default_on_gpus_alone() -> None:
    for op in vae_library.OPERATIONS:
        assert libraries.default(op, torch.device("cuda"))[0] == "channels_last"
        assert libraries.default(op, torch.device("cpu"))[0] == "reference"
        assert vae_gpu.BACKENDS[op]["channels_last"] is vae_library.OPERATIONS[op]


def test_what_a_device_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    for reason, wanted in ((None, vae_library.COMPILED), ("no Triton", vae_library.EAGER)):
        monkeypatch.setattr(compiling, "why_not", lambda device, reason=reason: reason)
        vae_library.pointwise_for.cache_clear()
        assert vae_library.pointwise_for(torch.device("cuda")) is wanted
        assert vae_library.pointwise_for(torch.device("cpu")) is vae_library.EAGER
    vae_library.pointwise_for.cache_clear()


# ---------------------------------------------------------------- networks

CONFIGS = {
    "2.1": WanVAEConfig(base_dim=32, num_res_blocks=1),
    "2.2": replace(WAN22_VAE, base_dim=32, decoder_base_dim=32, num_res_blocks=1),
}


def networks(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The same with random weights on vae.py and on the library path."""
    torch.manual_seed(0)
    plain, fast = (build_vae(CONFIGS[name], *ops).eval().requires_grad_(False) for ops in ((), (OPS,)))
    for parameter in plain.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    fast.load_state_dict(plain.state_dict())
    vae_gpu.channels_last(fast)
    return plain.to(dtype), fast.to(dtype)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("verb", ["decode", "encode"])
def test_a_network_in_chunks_and_stripes(name: str, verb: str) -> None:
    plain, fast = networks(name)
    scale, z_dim = CONFIGS[name].spatial_scale, CONFIGS[name].z_dim
    x = random(1, z_dim, 3, 3, 2) if verb == "decode" else random(1, 3, 9, 3 * scale, 2 * scale).clamp(-1, 1)
    cut = 1 if verb == "decode" else 5
    want, want_cache = getattr(plain, verb)(x)
    first, cache = getattr(fast, verb)(x[:, :, :cut])
    rest, cache = getattr(fast, verb)(x[:, :, cut:], cache, stripes=2, reuse=True)
    assert error(torch.cat((first, rest), 2), want.double()) < 1e-5
    assert all(error(a, b.double()) < 1e-5 for a, b in zip(cache, want_cache, strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_network_in_bf16(name: str) -> None:
    """Not farther from fp32 than vae.py in bf16 is."""
    latents = random(1, CONFIGS[name].z_dim, 2, 3, 4)
    wanted = networks(name)[0].decode(latents)[0].double()
    plain, fast = (network.decode(latents)[0] for network in networks(name, torch.bfloat16))
    assert 0 < error(fast, wanted) <= 1.1 * error(plain, wanted)


class Moved(TorchDispatchMode):
    """Counts what operations read and write of tensors with `least` elements, in units of `unit` bytes. Memory that is
    only handed out is not, nor what copy_ overwrites."""

    def __init__(self, least: int, unit: int) -> None:
        super().__init__()
        self.least, self.unit, self.bytes = least, unit, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and not name.startswith(("empty", "new_empty")):
            read = args[1:2] if name == "copy_" else args
            self.bytes += self._size(read) + self._size((kwargs or {}).get("other")) + self._size(out)
        return out

    def _size(self, tree: Any) -> int:
        return sum(t.nbytes for t in tree_leaves(tree) if isinstance(t, Tensor) and t.numel() >= self.least)

    @property
    def units(self) -> float:
        return self.bytes / self.unit


def test_bytes_that_a_residual_convolution_moves() -> None:
    """Counted on the operations, for four frames in bf16, without weights and without the copy of the new past into the
    cache, which is 1. Two chains of passes are left that compiling joins: SiLU with the norm, and the residual with the
    bias, which saves 2 each."""
    C, size = 16, (1, 16, 4, 32, 32)
    x, past = (torch.randn(size)[:, :, :T].bfloat16().contiguous(memory_format=LAST) for T in (4, 2))
    gamma, weight, bias = (torch.randn(shape).bfloat16() for shape in ((C, 1, 1, 1), (C, C, 3, 3, 3), (C,)))
    found = {}
    for name, run in (("vae.py", vae.norm_silu_conv3d), ("library", vae_library.norm_silu_conv3d)):
        residual = x.clone()
        with torch.inference_mode(), Moved(x.numel() // 4, x.nbytes) as seen:
            run(x, past, gamma, weight, bias, residual)
        found[name] = seen.units
    assert found["library"] == 12.5 and found["vae.py"] > 15, found


class Copies(TorchDispatchMode):
    """Notes copies of activations of more than `frames` frames, and results whose channels do not lie side by side.
    Channels are multiples of 32, widths are not."""

    COPIES = ("clone", "copy_", "cat", "stack", "constant_pad_nd", "_to_copy", "repeat")

    def __init__(self, least: int, frames: int) -> None:
        super().__init__()
        self.least, self.frames = least, frames
        self.made, self.split, self.copies = 0, list[str](), list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in tree_leaves(out):
            if not isinstance(made, Tensor) or made.ndim != 5 or made.numel() < self.least or func.is_view:
                continue
            self.made += 1
            name, channels = f"{func} {tuple(made.shape)}", made.stride(1) == 1
            if not channels and not (made.stride(-1) == 1 and made.shape[-1] % 32 in (0, 3)):
                self.split.append(name)
            frames = made.shape[2] if channels else made.shape[1]
            if func._schema.name.removeprefix("aten::") in self.COPIES and frames > self.frames:
                self.copies.append(name)
        return out


@pytest.mark.parametrize(("verb", "rooms"), [("decode", 2), ("encode", 3)])
def test_no_layout_changes_between_layers(verb: str, rooms: int) -> None:
    """From a stream's second chunk on. What is copied are the pasts, two frames or less, and in the two convolutions
    over time alone, which no norm comes before, the frames behind their past; and given frames. In bf16, since
    convolutions in fp32 on a CPU change layouts themselves."""
    plain, fast = networks("2.1", torch.bfloat16)
    x = random(1, 16, 6, 5, 7) if verb == "decode" else random(1, 3, 33, 40, 56)
    cut = 1
    found = []
    for network in (fast, plain):
        _, cache = getattr(network, verb)(x[:, :, :cut])
        with torch.inference_mode(), Copies(4000, 2) as seen:
            getattr(network, verb)(x[:, :, cut:], cache, reuse=True)
        found.append(seen)
    assert not found[0].split and len(found[0].copies) == rooms, found[0].copies
    assert found[0].made > 40
    assert found[1].split and len(found[1].copies) > 10, "vae.py changes layouts: the test sees it"
