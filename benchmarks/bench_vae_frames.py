"""Decoding 81 frames with the Wan 2.1 VAE at 480p, 720p and 1080p in bf16, compared with diffusers.

diffusers runs with the same random weights, by default and channels-last. Also shows the utilization of the matrix
units and the peak memory.

    python benchmarks/bench_vae_frames.py [--device cuda] [--size 480p 720p 1080p] [--rounds 3]

Frames are decoded to uint8 in chunks of as many latent frames as a pipeline takes. Operations of convolutions and
products are counted on the meta device. diffusers is skipped if it is not installed or does not fit into memory, and
the result says so. On a CPU all sizes are tiny: this only checks that the script works.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from harness import Case, measure, save, table, why_not
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastvid.engine.decode import GPU_PIXELS
from fastvid.errors import BackendUnavailable
from fastvid.models.wan.config import WanVAEConfig
from fastvid.models.wan.vae import WanVAE
from fastvid.ops import dispatch, rgb, vae_gpu

SIZES = {"480p": (60, 104), "720p": (90, 160), "1080p": (136, 240)}
FRAMES, SMALL = 21, (3, 4, 6)  # latent ones; on a CPU, with height and width
TERAFLOPS = 790  # of an H200 in bf16, measured (dense): what a share is of
BACKENDS = {
    "reference": "reference",
    "channels_last": ",".join(f"{op}=channels_last" for op in vae_gpu.BACKENDS),
    "triton": "triton",
    "cuda": ",".join(f"{op}=cuda" for op, of in vae_gpu.BACKENDS.items() if "cuda" in of),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    device = torch.device(args.device)
    sizes = {name: (FRAMES, *SIZES[name]) for name in args.size} if device.type == "cuda" else {"small": SMALL}
    groups: dict[str, Any] = {}
    facts: dict[str, Any] = {"pflop": {}, "share_of_limit": {}, "peak_bytes": {}, "left_out": {}}
    with torch.no_grad():
        config = WanVAEConfig() if device.type == "cuda" else WanVAEConfig(base_dim=16, num_res_blocks=1)
        decoders = dict(build(config, device, facts))
        for title, size in sizes.items():
            groups[title] = bench(title, size, config, decoders, device, args.rounds, facts)
            print(table(groups[title], title), end="\n\n", flush=True)
    print(save("vae-frames", groups, device, limit_teraflops=TERAFLOPS, **facts))


def bench(
    title: str,
    size: tuple[int, int, int],
    config: WanVAEConfig,
    decoders: dict[str, Callable[[Tensor], Tensor]],
    device: torch.device,
    rounds: int,
    facts: dict[str, Any],
) -> list[Any]:
    """Measure the time and memory of every decoder; skips those that run out of memory."""
    flops = count(config, size)
    latents = torch.randn(1, config.z_dim, *size, device=device, generator=torch.Generator(device).manual_seed(1))
    wanted, cases, peaks = None, [], {}
    for name, decode in decoders.items():
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            held = torch.cuda.memory_allocated(device)
        try:
            frames = decode(latents).float()
        except torch.OutOfMemoryError:
            facts["left_out"][f"{title}: {name}"] = "out of memory"
            continue
        if device.type == "cuda":
            peaks[name] = torch.cuda.max_memory_allocated(device) - held
        wanted = frames if wanted is None else wanted
        off = float((frames - wanted).square().mean().sqrt()) / 255
        assert off < 0.02, f"{title}: {name} gives other frames ({off:.3f} of the whole range off)"
        del frames
        cases.append(Case(name, lambda decode=decode: decode(latents), flops=flops))
    rows = measure(cases, device, rounds, warm_up=1)
    facts["pflop"][title] = flops / 1e15
    facts["peak_bytes"][title] = peaks
    if device.type == "cuda":
        facts["share_of_limit"][title] = {row.name: row.tflop_per_s / TERAFLOPS for row in rows}
    return rows


def count(config: WanVAEConfig, size: tuple[int, int, int]) -> int:
    """Operations of the products and convolutions of a decode."""
    with torch.device("meta"):
        vae, latents = WanVAE(config, dispatch.bind("reference")), torch.empty(1, config.z_dim, *size)
    with FlopCounterMode(display=False) as counter:
        in_chunks(lambda part, cache: vae.decode(part, cache), latents)
    return counter.get_total_flops()


def in_chunks(decode: Callable[[Tensor, Any], tuple[Tensor, Any]], latents: Tensor) -> list[Tensor]:
    """What a pipeline does: a chunk of latent frames at a time, with the cache of those before it."""
    parts, cache = [], None
    chunk = max(1, GPU_PIXELS // (4 * 64 * latents[0, 0, 0].numel()))  # 4 frames of 8 x 8 pixels for each latent
    for part in latents.split(chunk, dim=2):
        made, cache = decode(part, cache)
        parts.append(made)
    return parts


def build(
    config: WanVAEConfig, device: torch.device, facts: dict[str, Any]
) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """Decoders from normalised latents to uint8 [T, H, W, 3], all with the same weights."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    first = WanVAE(config).to(device, dtype)
    for name, layout in (("diffusers", torch.contiguous_format), ("diffusers, channels-last", torch.channels_last_3d)):
        if importlib.util.find_spec("diffusers") is None:
            facts["left_out"][name] = "it is not installed"
        else:
            yield name, diffusers(config, first, device, dtype, layout)
    for name, backend in BACKENDS.items():
        if reason := why_not("vae_norm_silu_conv3d", name, device):
            facts["left_out"][f"fastvid {name}"] = reason
            continue
        try:
            bound = dispatch.bind(backend, device=device)
        except BackendUnavailable as error:
            facts["left_out"][f"fastvid {name}"] = str(error)
            continue
        own = WanVAE(config, bound).to(device, dtype)
        own.load_state_dict(first.state_dict())
        if bound.bound["vae_norm_silu_conv3d"] != "reference":
            vae_gpu.channels_last(own)

        def decode(latents: Tensor, own: WanVAE = own) -> Tensor:
            parts = in_chunks(lambda x, c: own.decode_rgb(x, c, reuse=c is not None), latents)
            return torch.cat([part[0] for part in parts])

        yield f"fastvid {name}", decode


def diffusers(
    config: WanVAEConfig, weights: nn.Module, device: torch.device, dtype: torch.dtype, layout: torch.memory_format
) -> Callable[[Tensor], Tensor]:
    from diffusers import AutoencoderKLWan

    names = ("base_dim", "num_res_blocks", "latents_mean", "latents_std")
    theirs = AutoencoderKLWan(**{name: getattr(config, name) for name in names}).to(device, dtype).eval()
    theirs.load_state_dict(weights.state_dict())
    for module in theirs.modules():
        if isinstance(module, nn.Conv3d):
            module.to(memory_format=layout)
    mean, std = (
        torch.tensor(x, device=device).view(1, -1, 1, 1, 1)
        for x in (theirs.config.latents_mean, theirs.config.latents_std)
    )

    def decode(latents: Tensor) -> Tensor:
        given = (latents * std + mean).to(dtype).contiguous(memory_format=layout)
        return rgb.reference(theirs.decode(given).sample[0])

    return decode


if __name__ == "__main__":
    main()
