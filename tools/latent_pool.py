"""Encodes drawn clips once, so that the transformer's training reads latents instead of drawing and encoding.

    python -m tools.latent_pool --vae runs/vae/vae --out runs/pool --clips 6000

Each shard is one file of clips of one size and length, half of them from their motion's beginning, half from
mid-stream. A still is kept with every clip: what the VAE makes of one of its frames held for a group of four.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastvid.models.wan_vae import WanVAE, WanVAEConfig
from tools.clips import draw, random_scene

# (frames, height, width) and how often; the default size and length come most.
KINDS = {
    (17, 64, 64): 10,
    (33, 64, 64): 5,
    (49, 64, 64): 6,
    (49, 96, 160): 2,
    (17, 64, 96): 2,
    (17, 96, 64): 2,
    (17, 80, 80): 2,
    (17, 96, 160): 3,
    (17, 160, 96): 1,
}


@dataclass
class Shard:
    """Clips of one size: latents [n, C, T, h, w], captions, whether each begins its motion, and the stills.

    still [n, C, h, w] is the body latent of one held frame, still_at [n] the latent frame that it belongs to.
    """

    latents: Tensor
    captions: list[str]
    begins: Tensor
    still: Tensor
    still_at: Tensor


def load_vae(folder: Path) -> WanVAE:
    """Reads a `vae/` folder."""
    vae = WanVAE(WanVAEConfig.from_dict(json.loads((folder / "config.json").read_text())))
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    vae.load_state_dict({k: v.float() for k, v in state.items()})
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode(vae: WanVAE, clips: Tensor) -> Tensor:
    """Frames [n, 3, F, H, W] to latents, in bf16 arithmetic."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return vae.encode(clips)[0].float()


def make_shard(vae: WanVAE, kind: tuple[int, int, int], count: int, generator: torch.Generator) -> Shard:
    """Draws and encodes `count` clips of one kind."""
    frames, height, width = kind
    latents, captions, begins, still, still_at = [], [], [], [], []
    for i in range(count):
        scene = random_scene(generator, mid_stream=i % 2 == 1)
        clip = draw(scene, frames, height, width).movedim(0, 1)[None]
        at = int(torch.randint(1, (frames - 1) // 4 + 1, (), generator=generator))
        inside = int(torch.randint(4, (), generator=generator))
        held = clip[:, :, 4 * at - 3 + inside, None].expand(-1, -1, 5, -1, -1)
        latents.append(encode(vae, clip)[0])
        still.append(encode(vae, held)[0, :, 1])
        captions.append(scene.caption)
        begins.append(i % 2 == 0)
        still_at.append(at)
    return Shard(torch.stack(latents), captions, torch.tensor(begins), torch.stack(still), torch.tensor(still_at))


def save(shard: Shard, path: Path) -> None:
    """Writes a shard under a temporary name first, so that a reader never sees half of it."""
    tensors = {
        "latents": shard.latents.half().contiguous(),
        "begins": shard.begins,
        "still": shard.still.half().contiguous(),
        "still_at": shard.still_at,
    }
    save_file(tensors, path.with_suffix(".part"), metadata={"captions": json.dumps(shard.captions)})
    path.with_suffix(".part").rename(path)


def load(path: Path) -> Shard:
    """Reads one shard."""
    with safe_open(path, "pt") as file:
        captions = json.loads(file.metadata()["captions"])
        t = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a file is no dict)
    return Shard(t["latents"].float(), captions, t["begins"], t["still"].float(), t["still_at"])


def plan(clips: int, per_shard: int = 50) -> Iterator[tuple[int, int, int]]:
    """The kinds of the shards in an order that mixes them evenly."""
    total = sum(KINDS.values())
    due = dict.fromkeys(KINDS, 0.0)
    for _ in range(clips // per_shard):
        for kind, weight in KINDS.items():
            due[kind] += weight / total
        kind = max(due, key=due.get)
        due[kind] -= 1
        yield kind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    vae = load_vae(args.vae)
    for i, kind in enumerate(plan(args.clips)):
        path = args.out / f"{i:05d}.safetensors"
        if not path.exists():
            generator = torch.Generator().manual_seed(args.seed * 1_000_003 + i)
            save(make_shard(vae, kind, 50, generator), path)


if __name__ == "__main__":
    main()
