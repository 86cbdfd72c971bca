"""Encodes drawn clips once, so that the transformer's training reads latents instead of drawing and encoding.

    python -m fastvid.benchmarks.quality.latent_pool --vae runs/vae/vae --out runs/pool --clips 6000

Each shard is one file of clips of one size and length, half of them from their motion's beginning, half from
mid-stream. Stills are kept with every clip: what the VAE makes of two of its frames, each held for a group of four, and
of a frame from any time of the same motion as the head of a stream, which is what windows far into a video are shown.
So is a stretch of it encoded as a clip is that comes later: behind stills of its first frame, its past being unknown.
Short clips have a twin, which differs in one word of the caption and moves alike: what an edit would make of them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastvid.benchmarks.quality.clips import BACKGROUNDS, COLOURS, SHAPES, Scene, draw, random_scene
from fastvid.engine.known_latents import LEAD_IN
from fastvid.models.wan.config import WanVAEConfig
from fastvid.models.wan.presets import EMBEDDED
from fastvid.models.wan.vae import WanVAE

# (frames, height, width) and how often; the default size and length come most.
KINDS = {
    (17, 64, 64): 8,
    (33, 64, 64): 5,
    (49, 64, 64): 7,
    (49, 96, 160): 6,
    (17, 64, 96): 2,
    (17, 96, 64): 1,
    (17, 80, 80): 1,
    (17, 96, 160): 3,
    (17, 160, 96): 1,
}

SUFFIX = EMBEDDED.context
HARD = {"spinning": 4.0, "growing": 2.5, "shrinking": 2.5}


@dataclass
class Shard:
    """Clips of one size: latents [n, C, T, h, w], captions, whether each begins its motion, and the stills.

    still [n, 2, C, h, w] are the body latents of two held frames, still_at [n, 2] the latent frames that they belong
    to, in short clips the second of them the last; anchor [n, C, h, w] is the head latent of a frame from any time.
    suffix [n, C, SUFFIX, h, w] are latents from suffix_at [n] on, encoded behind stills. twin [n, C, T, h, w] and
    twin_captions are empty for long clips.
    """

    latents: Tensor
    captions: list[str]
    begins: Tensor
    still: Tensor
    still_at: Tensor
    anchor: Tensor
    suffix: Tensor
    suffix_at: Tensor
    twin: Tensor
    twin_captions: list[str]

    @cached_property
    def hard(self) -> Tensor:
        """How much each clip counts [n]: what spins (but for circles) or changes its size is learned last."""
        counts = [
            [w for m, w in HARD.items() if m in c and not ("circle" in c and m == "spinning")] for c in self.captions
        ]
        return torch.tensor([max(count, default=1.0) for count in counts])


def load_vae(folder: Path) -> WanVAE:
    """Reads a `vae/` folder."""
    vae = WanVAE(WanVAEConfig.from_dict(json.loads((folder / "config.json").read_text())))
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    vae.load_state_dict({k: v.float() for k, v in state.items()})
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode(vae: WanVAE, clips: Tensor) -> Tensor:
    """Frames [n, 3, F, H, W] to latents; in fp32, which has the VAE's fast form for CPUs."""
    return vae.encode(clips)[0]


def make_shard(vae: WanVAE, kind: tuple[int, int, int], count: int, generator: torch.Generator) -> Shard:
    """Draws and encodes `count` clips of one kind."""
    frames, height, width = kind
    latents, captions, begins, still, still_at, anchor, suffix, suffix_at, twins = ([] for _ in range(9))
    twin_captions = []
    for i in range(count):
        scene = random_scene(generator, mid_stream=i % 2 == 1)
        clip = draw(scene, frames, height, width).movedim(0, 1)[None]
        at = torch.randint(1, (frames - 1) // 4 + 1, (2,), generator=generator)
        inside = torch.randint(4, (2,), generator=generator)
        if frames == 17:  # a last picture
            at[1], inside[1] = (frames - 1) // 4, 3
        held = clip[0, :, 4 * at - 3 + inside].transpose(0, 1)[:, :, None].expand(-1, -1, 5, -1, -1)
        elsewhere = replace(scene, phase=8.0 * float(torch.rand((), generator=generator)))
        once = draw(elsewhere, 1, height, width).movedim(0, 1)[None]
        latents.append(encode(vae, clip)[0])
        anchor.append(encode(vae, once)[0, :, 0])
        still.append(encode(vae, held)[:, :, 1])
        latest = min((frames - 1) // 4 + 1, EMBEDDED.window) - SUFFIX
        place = int(torch.randint(1, latest + 1, (), generator=generator))
        first = 4 * place - 3
        lead = clip[:, :, first, None].expand(-1, -1, 4 * LEAD_IN - 3, -1, -1)
        behind = torch.cat((lead, clip[:, :, first : first + 4 * SUFFIX]), dim=2)
        suffix.append(encode(vae, behind)[0, :, LEAD_IN:])
        suffix_at.append(place)
        captions.append(scene.caption)
        if frames == 17:
            twin = twin_of(scene, generator)
            twins.append(encode(vae, draw(twin, frames, height, width).movedim(0, 1)[None])[0])
            twin_captions.append(twin.caption)
        begins.append(i % 2 == 0)
        still_at.append(at)
    return Shard(
        torch.stack(latents),
        captions,
        torch.tensor(begins),
        torch.stack(still),
        torch.stack(still_at),
        torch.stack(anchor),
        torch.stack(suffix),
        torch.tensor(suffix_at),
        torch.stack(twins) if twins else torch.empty(0),
        twin_captions,
    )


def twin_of(scene: Scene, generator: torch.Generator) -> Scene:
    """The scene with another colour (half of the time), shape or background."""

    def other(names: Iterable[str], own: str) -> str:
        rest = [name for name in names if name != own]
        return rest[int(torch.randint(len(rest), (), generator=generator))]

    what = int(torch.randint(4, (), generator=generator))
    if what == 0:
        return replace(scene, shape=other(SHAPES, scene.shape))
    if what == 1:
        return replace(scene, background=other(BACKGROUNDS, scene.background))
    return replace(scene, colour=other(COLOURS, scene.colour))


def save(shard: Shard, path: Path) -> None:
    """Writes a shard under a temporary name first, so that a reader never sees half of it."""
    tensors = {
        "latents": shard.latents.half().contiguous(),
        "begins": shard.begins,
        "still": shard.still.half().contiguous(),
        "still_at": shard.still_at,
        "anchor": shard.anchor.half().contiguous(),
        "suffix": shard.suffix.half().contiguous(),
        "suffix_at": shard.suffix_at,
        "twin": shard.twin.half().contiguous(),
    }
    said = {"captions": json.dumps(shard.captions), "twin_captions": json.dumps(shard.twin_captions)}
    save_file(tensors, path.with_suffix(".part"), metadata=said)
    path.with_suffix(".part").rename(path)


def load(path: Path) -> Shard:
    """Reads one shard."""
    with safe_open(path, "pt") as file:
        said = {name: json.loads(value) for name, value in file.metadata().items()}
        t = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a file is no dict)
    whole = ("begins", "still_at", "suffix_at")
    return Shard(**said, **{name: one if name in whole else one.float() for name, one in t.items()})


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
