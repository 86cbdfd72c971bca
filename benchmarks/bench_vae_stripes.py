"""Wan 2.1 VAE decode on the CPU in fp32 in stripes of rows: time at 480x832 and 5 frames, memory at 240x416.

python benchmarks/bench_vae_stripes.py [--rounds 1]

Time: interleaved, random weights with base_dim 96; results of all stripe counts are checked against the first. Memory:
torch's peak allocation while decoding a latent frame after the first, compared with decoder_bytes.
"""

from __future__ import annotations

import argparse

import torch
from harness import Case, measure, save, table

from fastvid.models.wan.config import WanVAEConfig
from fastvid.models.wan.vae import WanVAE
from fastvid.planning.memory import cache_bytes, decoder_bytes

STRIPES = (1, 2, 4)
TIMED = (1, 16, 2, 60, 104)
WEIGHED = 240, 416


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    torch.manual_seed(0)
    vae = WanVAE(WanVAEConfig()).eval().requires_grad_(False)
    memory = {n: weigh(vae, n) for n in STRIPES}
    print(
        *(f"{n}: {peak / 2**20:.0f} MiB, expected {want / 2**20:.0f}" for n, (peak, want) in memory.items()), sep="\n"
    )
    latents = torch.randn(TIMED)
    made: dict[int, torch.Tensor] = {}
    cases = [Case(f"{n} stripes", lambda n=n: made.update({n: vae.decode(latents, stripes=n)[0]})) for n in STRIPES]
    rows = measure(cases, "cpu", args.rounds, warm_up=0)
    errors = {n: float((made[n] - made[1]).norm() / made[1].norm()) for n in STRIPES}
    print(table(rows, f"VAE decode, relative errors {errors}"))
    facts = {n: {"peak_bytes": peak, "decoder_bytes": want} for n, (peak, want) in memory.items()}
    print(save("vae-stripes", rows, "cpu", relative_error=errors, memory_240x416=facts))


def weigh(vae: WanVAE, stripes: int) -> tuple[int, int]:
    """Bytes that decoding a latent frame after the first allocates: (measured, predicted by decoder_bytes)."""
    height, width = WEIGHED
    latents = torch.randn(1, 16, 2, height // 8, width // 8)
    _, cache = vae.decode(latents[:, :, :1], stripes=stripes)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        vae.decode(latents[:, :, 1:], cache, stripes=stripes, reuse=True)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak, decoder_bytes(vae.config, height, width, vae.config.temporal_scale, stripes) - cache_bytes(
        vae.config, height, width
    )


if __name__ == "__main__":
    main()
