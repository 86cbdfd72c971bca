"""DiT forward on the CPU in fp32 beside diffusers, same weights: 1.3B width, 4 layers, 1,560 tokens, 512 rows of text.

python benchmarks/bench_dit_cpu.py [--rounds 5]
"""

from __future__ import annotations

import argparse

import torch
from harness import Case, measure, save, table

from fastvid.models.wan.config import WanTransformerConfig
from fastvid.models.wan.transformer import WanTransformer

CONFIG = WanTransformerConfig(num_attention_heads=12, attention_head_dim=128, text_dim=4096, ffn_dim=8960, num_layers=4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    theirs, ours = pair()
    latents, text = torch.randn(1, 16, 5, 24, 52), torch.randn(1, 512, 4096)
    groups, errors = {}, {}
    for title, timestep in (("one timestep", torch.tensor([700.0])), ("a timestep a token", per_token())):
        with torch.no_grad():
            wanted, made = theirs(latents, timestep, text).sample, ours(latents, timestep, text)
            errors[title] = float((made - wanted).norm() / wanted.norm())
            cases = [
                Case("diffusers", lambda t=timestep: theirs(latents, t, text)),
                Case("fastvid", lambda t=timestep: ours(latents, t, text)),
            ]
            groups[title] = measure(cases, "cpu", args.rounds, warm_up=1)
        print(table(groups[title], f"{title}, relative error {errors[title]:.1e}"), end="\n\n", flush=True)
    print(save("dit", groups, "cpu", relative_error=errors))


def pair() -> tuple[torch.nn.Module, WanTransformer]:
    """diffusers' transformer and ours, with the same random weights."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    theirs = WanTransformer3DModel(
        num_attention_heads=CONFIG.num_attention_heads,
        attention_head_dim=CONFIG.attention_head_dim,
        text_dim=CONFIG.text_dim,
        ffn_dim=CONFIG.ffn_dim,
        num_layers=CONFIG.num_layers,
    ).eval()
    ours = WanTransformer(CONFIG).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs.requires_grad_(False), ours.requires_grad_(False)


def per_token() -> torch.Tensor:
    """Timesteps [1, N]: the first latent frame known, the rest at one level."""
    levels = torch.full((1, 5, 12 * 26), 700.0)
    levels[:, 0] = 0.0
    return levels.flatten(1)


if __name__ == "__main__":
    main()
