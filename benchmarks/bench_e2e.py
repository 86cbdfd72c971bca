"""Complete models with random weights, compared with diffusers (eager and compiled) with the same weights.

    python benchmarks/bench_e2e.py [--device cuda] [--model 1.3b 14b] [--backend auto]

1.3b: Wan 2.1 1.3B, 832x480, 81 frames: one denoising step with guidance (50 steps are *extrapolated* from it, and
labeled so), and a complete video in 4 steps without guidance, decoded to uint8. 14b: Wan 2.1 14B, 1280x720, 81 frames:
one denoising step with guidance. On a GPU, fastvid also runs with CUDA graphs (`fastvid.device.cuda_graphs`). Peak
memory is measured in a separate run and includes weights and graphs. Without diffusers its cases are skipped, and the
result says so. On a CPU all sizes are tiny: this only checks that the script works.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from harness import Case, Row, measure, save, table
from torch import Tensor, nn

from fastvid.device.cuda_graphs import CudaCapture, Graphs
from fastvid.models.registry import target_dtype
from fastvid.models.wan.config import WanVAEConfig
from fastvid.models.wan.transformer import WanTransformer
from fastvid.models.wan.vae import WanVAE
from fastvid.models.wan.variants import published_configs
from fastvid.ops import dispatch, rgb, vae_gpu

NAMES = {"1.3b": "wan2.1-t2v-1.3b", "14b": "wan2.1-t2v-14b"}
LATENTS = {"1.3b": (1, 16, 21, 60, 104), "14b": (1, 16, 21, 90, 160)}
SMALL = (1, 16, 2, 8, 8)
SIGMAS = (1.0, 0.9375, 0.8333, 0.625, 0.0)  # 4 steps
GUIDANCE = 5.0


@dataclass
class Model:
    """What a case runs: velocity(latents, timestep, text) and decode(latents) -> uint8 [T, H, W, 3]."""

    velocity: Callable[[Tensor, Tensor, Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--backend", nargs="+", default=["auto"], help="of the operations; a case each")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true", help="leave compiled diffusers out")
    args = parser.parse_args()
    device = torch.device(args.device)
    groups: dict[str, list[Row]] = {}
    facts: dict[str, Any] = {"extrapolated": {}, "peak_bytes": {}, "left_out": []}
    if importlib.util.find_spec("diffusers") is None:
        facts["left_out"].append("diffusers: it is not installed")
    with torch.no_grad():
        for name in args.model:
            bench(name, device, args, groups, facts)
    print(save("e2e", groups, device, backends=args.backend, **facts))


def bench(name: str, device: torch.device, args: argparse.Namespace, groups: dict, facts: dict) -> None:
    """Measure one model; adds the results to groups and facts."""
    models = build(name, device, args.backend, compiled=not args.no_compile)
    shape = LATENTS[name] if device.type == "cuda" else SMALL
    generator = torch.Generator(device).manual_seed(1)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    latents = torch.randn(shape, device=device, generator=generator)
    texts = [torch.randn(1, 512, 4096, device=device, generator=generator).to(dtype) for _ in range(2)]
    size = f"{8 * shape[4]}x{8 * shape[3]}, {4 * shape[2] - 3} frames"

    title = f"{name} {size}, a step with guidance"
    run(title, {case: lambda m=m: guided(m, latents, texts) for case, m in models.items()}, device, args, groups, facts)
    facts["extrapolated"] |= {
        f"{title}: {row.name}": {"what": "50 steps, as 50 x the median of one", "seconds": 50 * row.median / 1e6}
        for row in groups[title]
    }
    if name == "1.3b":
        title = f"{name} {size}, 4 steps without guidance, decoded by the VAE in {str(dtype).removeprefix('torch.')}"
        cases = {case: lambda m=m: few_steps(m, latents, texts[0]) for case, m in models.items()}
        run(title, cases, device, args, groups, facts)


def run(title: str, cases: dict[str, Callable], device: torch.device, args: Any, groups: dict, facts: dict) -> None:
    wanted = next(iter(cases.values()))().float()
    for name, case in cases.items():  # same weights and inputs, so results differ only by rounding
        error = float((case().float() - wanted).norm() / wanted.norm())
        assert error < 0.05, f"{title}: {name} gives something else (relative error {error:.3f})"
    groups[title] = measure([Case(*case) for case in cases.items()], device, args.rounds, warm_up=1)
    print(table(groups[title], title), end="\n\n", flush=True)
    if device.type == "cuda":
        facts["peak_bytes"] |= {f"{title}: {name}": peak(case) for name, case in cases.items()}


def peak(case: Callable[[], Any]) -> int:
    torch.cuda.reset_peak_memory_stats()
    case()
    return torch.cuda.max_memory_allocated()


def guided(model: Model, latents: Tensor, texts: list[Tensor]) -> Tensor:
    """One Euler step from the first level to the next, with guidance."""
    timestep = torch.tensor([1000 * SIGMAS[0]], device=latents.device)
    given, not_given = (model.velocity(latents, timestep, text).float() for text in texts)
    return latents + (SIGMAS[1] - SIGMAS[0]) * (not_given + GUIDANCE * (given - not_given))


def few_steps(model: Model, latents: Tensor, text: Tensor) -> Tensor:
    """A whole video: [T, H, W, 3]."""
    for sigma, following in zip(SIGMAS, SIGMAS[1:], strict=False):
        timestep = torch.tensor([1000 * sigma], device=latents.device)
        latents = latents + (following - sigma) * model.velocity(latents, timestep, text).float()
    return model.decode(latents)


def build(name: str, device: torch.device, backends: list[str], compiled: bool) -> dict[str, Model]:
    """Build all cases; they share their weights."""
    config = published_configs(NAMES[name])[1]["transformer"]
    on_gpu = device.type == "cuda"
    config = config if on_gpu else replace(config, num_layers=2)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    torch.manual_seed(0)
    with torch.device("meta"):
        meta = WanTransformer(config)
    state = {}
    for key, weight in meta.state_dict().items():
        kept = torch.empty(weight.shape, device=device, dtype=target_dtype(meta, key, dtype))
        state[key] = kept.fill_(1.0) if "norm" in key and key.endswith("weight") else kept.normal_(std=0.02)
    torch.manual_seed(0)
    vae = WanVAE(WanVAEConfig() if on_gpu else WanVAEConfig(base_dim=16, num_res_blocks=1)).to(device, dtype)
    cases: dict[str, Model] = {}
    for backend in backends:
        bound = dispatch.bind(backend, device=device)
        with torch.device("meta"):
            ours = WanTransformer(config, bound)
        ours.load_state_dict(state, assign=True)
        state = ours.eval().state_dict()  # each has its own queries, keys and values; diffusers looks at the last one's
        own = WanVAE(vae.config, bound).to(device, dtype)
        own.load_state_dict(vae.state_dict())
        if bound.bound["vae_norm_silu_conv3d"] != "reference":
            vae_gpu.channels_last(own)
        runs = {"": ours.run} | ({" with graphs": Graphs(CudaCapture(device))} if on_gpu else {})
        cases |= {f"fastvid {backend}{name}": model(ours, run, own) for name, run in runs.items()}
    if importlib.util.find_spec("diffusers") is not None:
        theirs = diffusers_pair(config, state, vae, device, dtype)
        compared = {"diffusers": theirs[0]} | ({"diffusers, torch.compile": theirs[1]} if compiled else {})
        cases = compared | cases
    return cases


def model(ours: WanTransformer, run: Callable[..., Tensor], vae: WanVAE) -> Model:
    """fastvid's case; transformer calls go through `run`. Decodes one latent frame at a time, like a pipeline."""

    def velocity(latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        ours.run = run
        return ours(latents, timestep, text)

    def decode(latents: Tensor) -> Tensor:
        frames, cache = [], None
        for part in latents.split(1, dim=2):
            decoded, cache = vae.decode_rgb(part, cache, reuse=cache is not None)
            frames.append(decoded[0])
        return torch.cat(frames)

    return Model(velocity, decode)


def diffusers_pair(config: Any, state: dict[str, Tensor], vae: WanVAE, device: torch.device, dtype: torch.dtype) -> Any:
    """diffusers, eager and compiled, on the same weights."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    with torch.device("meta"):
        theirs = WanTransformer3DModel(
            num_attention_heads=config.num_attention_heads,
            attention_head_dim=config.attention_head_dim,
            text_dim=config.text_dim,
            ffn_dim=config.ffn_dim,
            num_layers=config.num_layers,
        )
    missing = theirs.load_state_dict(state, assign=True, strict=False).missing_keys
    assert not missing, missing
    rope = WanTransformer3DModel(num_layers=1, num_attention_heads=1, attention_head_dim=config.attention_head_dim).rope
    theirs.rope = rope.to(device)  # its tables are no weights
    theirs.eval()
    names = ("base_dim", "num_res_blocks", "latents_mean", "latents_std")
    parts = {name: getattr(vae.config, name) for name in names}
    their_vae = AutoencoderKLWan(**parts).to(device, dtype).eval()
    their_vae.load_state_dict(vae.state_dict())
    c = their_vae.config
    mean, std = (torch.tensor(x, device=device).view(1, -1, 1, 1, 1) for x in (c.latents_mean, c.latents_std))

    def decode(latents: Tensor) -> Tensor:
        return rgb.reference(their_vae.decode((latents * std + mean).to(dtype)).sample[0])

    def velocity(module: nn.Module) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda x, t, c: module(x.to(dtype), t, c, return_dict=False)[0]

    return Model(velocity(theirs), decode), Model(velocity(torch.compile(theirs)), decode)


if __name__ == "__main__":
    main()
