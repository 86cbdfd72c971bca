"""Trains the embedded model's VAE on drawn clips: images first, clips after.

    python -m fastvid.benchmarks.quality.train_vae --out runs/vae --image-minutes 8 --clip-minutes 20

The temporal resampling starts as duplication (and picking), so that what was learned on images carries over to
clips. Most samples are 32x32 crops around the thing's outline, because that is where reconstruction is hard.
Writes a diffusers-layout `vae/` folder with the latents' statistics measured on clips.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastvid.benchmarks.quality.clips import draw, path, random_scene
from fastvid.benchmarks.quality.mixed import mixed_precision
from fastvid.models.wan.config import WanVAEConfig
from fastvid.models.wan.vae import WanVAE
from fastvid.models.wan.vae_layers import Downsample, Upsample

CONFIG = WanVAEConfig(base_dim=16, z_dim=16, num_res_blocks=1)
EDGES = 0.5  # weight of the loss on differences of neighbouring pixels
HARD = 0.25  # share of samples made stars: their corners are the last thing that is learned


def duplicate_in_time(vae: WanVAE) -> None:
    """Makes the temporal up- and downsampling copy frames, the natural start after training on images."""
    for module in vae.modules():
        conv = getattr(module, "time_conv", None) if isinstance(module, (Downsample, Upsample)) else None
        if conv is None:
            continue
        c = conv.weight.shape[1]
        eye = torch.eye(c).repeat(conv.weight.shape[0] // c, 1)
        with torch.no_grad():
            conv.weight.mul_(0.1)
            conv.weight[:, :, -1, 0, 0] += eye
            conv.bias.zero_()


def widen(narrow: WanVAE, wide: WanVAE, jitter: float = 0.02) -> None:
    """Copies a VAE into one of twice its width that computes the same (Net2Net, Chen et al. 2015), plus a little noise.

    Every inner channel appears twice and every reader of a doubled channel halves its weight. RMS norms do not
    notice; the attention's queries shrink by sqrt(2) because its scale is that of the wide network.
    """
    ends = {"encoder.conv_in": "in", "decoder.conv_in": "in", "encoder.conv_out": "out", "decoder.conv_out": "out"}
    target = wide.state_dict()
    for key, value in narrow.state_dict().items():
        layer, kind = key.rsplit(".", 1)
        if "quant_conv" in layer:
            target[key].copy_(value)
            continue
        groups = 3 if layer.endswith("to_qkv") else 2 if layer.endswith("time_conv") and "upsamplers" in layer else 1
        if ends.get(layer) != "out":
            value = value.reshape(groups, -1, *value.shape[1:]).repeat_interleave(2, dim=1).flatten(0, 1)
        if layer.endswith("to_qkv"):
            value[: value.shape[0] // 3] /= 2**0.5
        if kind == "weight" and ends.get(layer) != "in":
            value = value.repeat_interleave(2, dim=1) / 2
            value = value * (1 + jitter * torch.randn_like(value))
        target[key].copy_(value)
    wide.load_state_dict(target)


def start_from(folder: Path) -> WanVAE:
    """Reads a `vae/` folder and widens it to CONFIG if it is narrower."""
    config = WanVAEConfig.from_dict(json.loads((folder / "config.json").read_text()))
    vae = WanVAE(config)
    vae.load_state_dict({k: v.float() for k, v in load_file(folder / "diffusion_pytorch_model.safetensors").items()})
    if config.base_dim == CONFIG.base_dim:
        return vae
    wide = WanVAE(replace(CONFIG, latents_mean=config.latents_mean, latents_std=config.latents_std))
    widen(vae, wide)
    return wide


def batch(n: int, frames: int, size: int, generator: torch.Generator) -> Tensor:
    """Random clips [n, 3, F, size, size], cropped around the thing when size is below 64."""
    out = []
    for _ in range(n):
        scene = random_scene(generator, mid_stream=bool(torch.rand((), generator=generator) < 0.6))
        if float(torch.rand((), generator=generator)) < HARD:
            scene = replace(scene, shape="star")
        clip = draw(scene, frames, 64, 64)
        if size < 64:
            cx, cy, radius, _ = path(scene, frames, 64, 64)
            middle = frames // 2
            shift = (torch.rand(2, generator=generator) * 2 - 1) * float(radius[middle]) - size / 2
            x = min(max(int(cx[middle] + shift[0]), 0), 64 - size)
            y = min(max(int(cy[middle] + shift[1]), 0), 64 - size)
            clip = clip[:, :, y : y + size, x : x + size]
        out.append(clip.movedim(0, 1))
    return torch.stack(out)


def loss_of(vae: WanVAE, frames: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """Reconstruction loss and the mean squared error of pixels in [0, 1]."""
    with mixed_precision():
        latents, _ = vae.encode(frames)
        latents = latents.float()
        out, _ = vae.decode_raw(latents + noise * torch.randn_like(latents))
    error = out.float() - frames
    mse = error.square().mean()
    # Outlines decide what a shape is; the differences of neighbours weigh them more than areas do.
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 2.0 * mse + EDGES * edges + 1e-4 * latents.square().mean(), mse / 4


def stage(
    vae: WanVAE, ema: WanVAE, minutes: float, clips: bool, lr: float, out: Path, generator: torch.Generator
) -> None:
    """One stage of training, with a learning rate that warms up and falls to nothing over its time."""
    optimiser = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    start, step, seen = time.time(), 0, []
    while (share := (time.time() - start) / (60 * minutes)) < 1:
        warm = min(1.0, (step + 1) / 100)
        for group in optimiser.param_groups:
            group["lr"] = lr * warm * max(0.02, 0.5 * (1 + math.cos(math.pi * share)))
        whole = bool(torch.rand((), generator=generator) < 0.2)
        size = 64 if whole else 32
        n = (2 if whole else 8) if clips else (16 if whole else 48)
        frames = (13 if whole else 9) if clips else 1
        loss, mse = loss_of(vae, batch(n, frames, size, generator), noise=0.03)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        decay = min(0.995, (step + 1) / (step + 20))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(vae.parameters()), 1 - decay)
        seen.append(mse.item())
        step += 1
        if step % 50 == 0:
            psnr = -10 * math.log10(sum(seen[-50:]) / 50)
            print(
                f"{'clips' if clips else 'images'} {step} {share:.2f} loss {loss.item():.4f} psnr {psnr:.2f}",
                flush=True,
            )
            save_file({k: v.contiguous() for k, v in ema.state_dict().items()}, out / "ema.safetensors")


@torch.no_grad()
def statistics(vae: WanVAE, generator: torch.Generator, clips: int = 48) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each latent channel over whole clips."""
    z = torch.cat([vae.encode(batch(4, 17, 64, generator))[0] for _ in range(clips // 4)])
    return z.mean((0, 2, 3, 4)).tolist(), z.std((0, 2, 3, 4)).tolist()


def write(vae: WanVAE, mean: list[float], std: list[float], folder: Path) -> None:
    """Writes config.json and the weights (fp16) in the published layout."""
    folder.mkdir(parents=True, exist_ok=True)
    c = vae.config
    config = {
        "_class_name": "AutoencoderKLWan",
        "_diffusers_version": "0.42.1",
        "attn_scales": [],
        "base_dim": c.base_dim,
        "decoder_base_dim": None,
        "dim_mult": list(c.dim_mult),
        "dropout": 0.0,
        "in_channels": 3,
        "is_residual": False,
        "latents_mean": [round(m, 4) for m in mean],
        "latents_std": [round(s, 4) for s in std],
        "num_res_blocks": c.num_res_blocks,
        "out_channels": 3,
        "patch_size": None,
        "scale_factor_spatial": 8,
        "scale_factor_temporal": 4,
        "temperal_downsample": list(c.temperal_downsample),
        "z_dim": c.z_dim,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {k: v.half().contiguous() for k, v in vae.state_dict().items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--image-minutes", type=float, default=8)
    parser.add_argument("--clip-minutes", type=float, default=20)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--init", type=Path, help="a vae/ folder to start from; a narrower one is widened")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    vae = start_from(args.init) if args.init else WanVAE(CONFIG)
    if not args.init:
        duplicate_in_time(vae)
    ema = WanVAE(vae.config)
    ema.load_state_dict(vae.state_dict())
    for minutes, clips in ((args.image_minutes, False), (args.clip_minutes, True)):
        if minutes > 0:
            stage(vae, ema, minutes, clips, args.lr, args.out, generator)
        vae.load_state_dict(ema.state_dict())
    plain = WanVAE(CONFIG)
    plain.load_state_dict(ema.state_dict())
    # Latents were trained in the units of the starting point's statistics; measure the plain ones.
    mean, std = statistics(plain, generator)
    write(plain, mean, std, args.out / "vae")


if __name__ == "__main__":
    main()
