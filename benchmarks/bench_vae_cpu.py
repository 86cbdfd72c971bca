"""Wan 2.1 VAE decode on the CPU in fp32 beside diffusers, same random weights: base_dim 96, 240x416, 17 frames.

python benchmarks/bench_vae_cpu.py [--rounds 3]

Time: interleaved in one process. Memory: peak resident set above that after loading the model, each in a separate
process.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys

import torch
from harness import Case, measure, save, table

from fastvid.models.wan.config import WanVAEConfig
from fastvid.models.wan.vae import WanVAE

LATENTS = (1, 16, 5, 30, 52)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--peak", choices=("diffusers", "fastvid"), help="print the peak memory of one decode, in bytes"
    )
    args = parser.parse_args()
    latents = torch.randn(LATENTS, generator=torch.Generator().manual_seed(1))
    if args.peak:
        print(peak(args.peak, latents))
        return
    decoders = [decoder("diffusers"), decoder("fastvid")]
    with torch.no_grad():
        wanted, made = (decode(latents) for decode in decoders)
        error = float((made - wanted).norm() / wanted.norm())
        names = ("diffusers", "fastvid")
        cases = [Case(n, lambda d=d: d(latents)) for n, d in zip(names, decoders, strict=True)]
        rows = measure(cases, "cpu", args.rounds, warm_up=0)
    print(table(rows, f"VAE decode, relative error {error:.1e}"))
    peaks = {name: peak_of_process(name) for name in names}
    ratio = peaks["fastvid"] / peaks["diffusers"]
    print(*(f"{name}: {size / 2**20:.0f} MiB" for name, size in peaks.items()), f"ratio {ratio:.2f}")
    print(save("vae-decode", rows, "cpu", relative_error=error, peak_bytes=peaks, peak_ratio=ratio))


def decoder(name: str):
    """A function from normalised latents [1, C, T, h, w] to frames, with weights that depend on the seed alone."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    theirs = AutoencoderKLWan().eval().requires_grad_(False)
    mean, std = (torch.tensor(theirs.config[k]).view(1, -1, 1, 1, 1) for k in ("latents_mean", "latents_std"))
    if name == "diffusers":
        return lambda latents: theirs.decode(latents * std + mean).sample
    config = WanVAEConfig.from_dict({**theirs.config})
    ours = WanVAE(config).eval().requires_grad_(False)
    ours.load_state_dict(theirs.state_dict())
    return lambda latents: ours.decode(latents)[0]


def peak(name: str, latents: torch.Tensor) -> int:
    """Bytes that one decode adds to the peak of this process."""
    decode = decoder(name)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # reset the peak
    before = resident("VmRSS")
    with torch.no_grad():
        decode(latents)
    return resident("VmHWM") - before


def resident(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_of_process(name: str) -> int:
    """`peak` in a new process."""
    done = subprocess.run([sys.executable, __file__, "--peak", name], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


if __name__ == "__main__":
    main()
