"""Wan 2.2 end to end against diffusers' WanPipeline on the same weights: two experts with a boundary and a guidance
scale each, and the 5B's VAE with timesteps per token. And what `Experts` promises by itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import fastvid
from fastvid.cli.commands import main
from fastvid.errors import CheckpointError
from fastvid.loaders.convert import convert
from fastvid.models.common.experts import Experts
from fastvid.models.wan.vae22 import WanVAE22
from fastvid.sampling.sigmas import make_sigmas, timesteps

SIGMAS = [1.0, 0.95, 0.88, 0.8, 0.6875, 0.55, 0.38, 0.2]
BOUNDARY = 0.6875  # one of the levels: its own step belongs to the first expert
PROMPTS = {"prompt": "a red circle moving left", "negative_prompt": "blue square"}
VAE_22 = {
    "base_dim": 8,
    "decoder_base_dim": 16,
    "num_res_blocks": 1,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": [0.1] * 48,
    "latents_std": [1.5] * 48,
}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("two")
    return folder, tiny.write_checkpoint(folder, boundary_ratio=BOUNDARY)


@pytest.fixture(scope="module")
def pipe(two: tuple[Path, Any]) -> fastvid.Pipeline:
    return fastvid.load(str(two[0]), device="cpu")


def diffusers_frames(theirs: Any, latents: torch.Tensor, **options: Any) -> np.ndarray:
    """uint8 frames of diffusers' own pipeline with Euler steps over SIGMAS."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    class Given(FlowMatchEulerDiscreteScheduler):
        def set_timesteps(self, num_inference_steps: Any = None, device: Any = None, **kwargs: Any) -> None:
            super().set_timesteps(sigmas=SIGMAS, device=device)

    theirs.scheduler = Given(num_train_timesteps=1000, shift=1.0)
    theirs.set_progress_bar_config(disable=True)
    steps = {"num_inference_steps": len(SIGMAS), "max_sequence_length": 16, "output_type": "np"}
    with torch.no_grad():
        out = theirs(**PROMPTS, **options, **steps, latents=latents.clone())
    return (np.asarray(out.frames[0]) * 255).round().astype(np.uint8)


def assert_same_frames(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape and ours.std() > 5
    difference = np.abs(ours.astype(int) - theirs.astype(int))
    assert (difference <= 1).mean() >= 0.999, (difference.max(), (difference <= 1).mean())


@pytest.mark.parametrize(
    "scales",
    [
        {"guidance_scale_2": 1.5},
        {"guidance_scale_2": 1.0},
        {"guidance_scale_2": 0.5},
        {"guidance_scale_2": 0.0},
        {"guidance_scale": 0.5, "guidance_scale_2": 3.0},
        {},
    ],
)
def test_two_experts_equal_diffusers(two: tuple[Path, Any], pipe: fastvid.Pipeline, scales: dict[str, float]) -> None:
    latents = torch.randn(1, 16, 3, 8, 12, generator=torch.Generator().manual_seed(5))
    options = {"guidance_scale": 4.0, "height": 64, "width": 96, "num_frames": 9, **scales}
    ours = pipe.generate(**PROMPTS, **options, solver="euler", sigmas=SIGMAS, latents=latents).frames
    assert_same_frames(ours, diffusers_frames(two[1], latents, **options))


@pytest.mark.parametrize(("boundary", "high"), [(0.0, 8), (0.5, 6), (1.0, 1), (0.88, 3)])
def test_the_boundary_of_a_request(pipe: fastvid.Pipeline, boundary: float, high: int) -> None:
    seen: list[list[float]] = [[], []]
    hooks = [spy(module, seen[i]) for i, module in enumerate(pipe._model.experts.modules)]
    options = {"height": 64, "width": 64, "num_frames": 1, "solver": "euler", "sigmas": SIGMAS, "guidance_scale": 0}
    pipe.generate("a", **options, boundary_ratio=boundary)
    pipe.generate("a", **options)  # the model's own again
    for remove in hooks:
        remove()
    assert [len(calls) for calls in seen] == [high + 5, 8 - high + 3]


def test_the_second_scale_changes_the_video(pipe: fastvid.Pipeline) -> None:
    options = {"height": 64, "width": 64, "num_frames": 1, "seed": 1, "solver": "euler", "sigmas": SIGMAS}
    frames = [pipe.generate("a", guidance_scale=4.0, **x, **options).frames for x in ({}, {"guidance_scale_2": 1.0})]
    assert not np.array_equal(*frames)


def spy(module: nn.Module, seen: list[float]) -> Callable[[], None]:
    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        assert args[1].unique().numel() == 1
        seen.append(float(args[1].flatten()[0]))

    return module.register_forward_pre_hook(note).remove


@pytest.mark.parametrize("solver", ["euler", "unipc", "dpm++"])
def test_each_expert_sees_its_own_timesteps(pipe: fastvid.Pipeline, solver: str) -> None:
    seen: list[list[float]] = [[], []]
    hooks = [spy(module, seen[i]) for i, module in enumerate(pipe._model.experts.modules)]
    options = {"height": 64, "width": 64, "num_frames": 1, "solver": solver, "sigmas": SIGMAS}
    pipe.generate("a", guidance_scale=2.0, guidance_scale_2=1.0, **options)
    for remove in hooks:
        remove()
    told = timesteps(np.array(SIGMAS), solver).tolist()
    high = [t for t in told if t >= 1000 * BOUNDARY]
    # 687.5 is the boundary itself: on it with exact timesteps, just below it where they are cut to 687.
    assert len(high) == (5 if solver == "euler" else 4)
    assert seen == [[t for t in high for _ in range(2)], told[len(high) :]]
    assert pipe.plan("a", guidance_scale=2.0, guidance_scale_2=1.0, **options).model_calls == sum(map(len, seen))


@pytest.mark.parametrize(("steps", "shift", "ratio", "high"), [(40, 12.0, 0.875, 26), (40, 5.0, 0.9, 15)])
def test_published_tables_are_split_as_published(steps: int, shift: float, ratio: float, high: int) -> None:
    experts = Experts([nn.Linear(1, 1), nn.Linear(1, 1)], ratio)  # type: ignore[list-item]
    chosen = [experts.choose(t) for t in timesteps(make_sigmas(steps, shift, "unipc"), "unipc")]
    assert chosen == [0] * high + [1] * (steps - high)


def test_the_plan_counts_both_experts(two: tuple[Path, Any], pipe: fastvid.Pipeline) -> None:
    theirs = two[1]
    modules = (theirs.transformer, theirs.transformer_2, theirs.text_encoder, theirs.vae)
    wanted = sum(p.numel() * 4 for module in modules for p in module.parameters())
    assert pipe.plan("a", height=64, width=64, num_frames=1).bytes_weights == pytest.approx(wanted, rel=1e-3)


def test_interleaved_requests_equal_each_alone(pipe: fastvid.Pipeline) -> None:
    options = {"height": 64, "width": 64, "num_frames": 1, "seed": 3, "num_inference_steps": 4, "flow_shift": 1.0}
    alone = [pipe.generate(prompt, **options).latents for prompt in ("a red circle", "blue")]
    streams = [pipe.stream(prompt, **options) for prompt in ("a red circle", "blue")]
    next(streams[0])
    next(streams[0])  # a step ahead of the other
    ends = [None, None]
    for _ in range(20):
        for i, stream in enumerate(streams):
            ends[i] = next(stream, ends[i])
    assert all(torch.equal(end.latents, wanted) for end, wanted in zip(ends, alone, strict=True))


# ---------------------------------------------------------------- Experts


def test_without_turns_nothing_is_moved() -> None:
    two = [nn.Linear(1, 1), nn.Linear(1, 1)]
    experts = Experts(two, 0.5)  # type: ignore[arg-type]
    before = [module.weight.data_ptr() for module in two]
    with experts.use(0) as first, experts.use(1) as second:
        assert [first, second] == two and [module.weight.data_ptr() for module in two] == before


def test_a_boundary_belongs_to_the_first() -> None:
    two = [nn.Linear(1, 1), nn.Linear(1, 1)]
    assert [Experts(two, 0.9).choose(t) for t in (1000, 900, 899.999, 0)] == [0, 0, 1, 1]  # type: ignore[arg-type]
    assert [Experts(two[:1], None).choose(t) for t in (1000, 0)] == [0, 0]  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="boundary_ratio"):
        Experts(two, None)  # type: ignore[arg-type]


# ---------------------------------------------------------------- LoRAs and original folders


def write_lora(path: Path, width: int = 48) -> tuple[Path, Tensor]:
    """A LoRA of one layer, and what it adds there."""
    torch.manual_seed(7)
    up, down = torch.randn(width, 3), torch.randn(3, width)
    stem = "diffusion_model.blocks.1.self_attn.q"
    save_file({f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down}, path)
    return path, up @ down


CHANGED = "blocks.1.attn1.to_q.weight"


def states(pipe: fastvid.Pipeline) -> list[dict[str, Tensor]]:
    return [{k: v.clone() for k, v in module.state_dict().items()} for module in pipe._model.experts.modules]


def assert_same_states(a: list[dict[str, Tensor]], b: list[dict[str, Tensor]]) -> None:
    for mine, other in zip(a, b, strict=True):
        assert mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


def test_a_lora_goes_into_both_experts(two: tuple[Path, Any], pipe: fastvid.Pipeline, tmp_path: Path) -> None:
    base, (file, delta) = states(pipe), write_lora(tmp_path / "a.safetensors")
    loaded = fastvid.load(str(two[0]), device="cpu", loras=[(file, 0.5)])
    for plain, merged in zip(base, states(loaded), strict=True):
        assert {name for name in plain if not torch.equal(plain[name], merged[name])} == {CHANGED}
        torch.testing.assert_close(merged[CHANGED], plain[CHANGED] + 0.5 * delta)
    set_later = fastvid.load(str(two[0]), device="cpu")
    set_later.set_loras([(file, 0.5)])
    assert_same_states(states(set_later), states(loaded))
    set_later.set_loras()
    assert_same_states(states(set_later), base)


def test_loras_for_one_expert_each(
    two: tuple[Path, Any], pipe: fastvid.Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, (file, delta) = states(pipe), write_lora(tmp_path / "a.safetensors")
    other = write_lora(tmp_path / "b.safetensors")[0]
    given = [(file, 1.0, "high"), (str(other), -0.25, "low"), (file, 0.5)]
    loaded = fastvid.load(str(two[0]), device="cpu", loras=given)
    for plain, merged, scale in zip(base, states(loaded), (1.5, 0.25), strict=True):
        assert {name for name in plain if not torch.equal(plain[name], merged[name])} == {CHANGED}
        torch.testing.assert_close(merged[CHANGED], plain[CHANGED] + scale * delta)
    told = [[str(file), 1.0, "high"], [str(other), -0.25, "low"], [str(file), 0.5]]
    assert loaded.describe()["loras"] == told
    changed = fastvid.load(str(two[0]), device="cpu", loras=[(file, 2.0, "low")])
    assert torch.equal(states(changed)[0][CHANGED], base[0][CHANGED]), "the other expert is as it was"
    changed.set_loras(given)
    assert_same_states(states(changed), states(loaded))
    changed.set_loras([(file, 1.0, "high")])
    assert_same_states(states(changed)[1:], base[1:])
    changed.set_loras()
    assert_same_states(states(changed), base)
    asked = ["--num-frames", "1", "--steps", "2", "--seed", "3", "--size", "64x64", "--quiet", "--json"]
    flags = ["--lora", f"{file}:high", "--lora", f"{other}:-0.25:low", "--lora", f"{file}:0.5"]
    assert main(["generate", "a", "-o", str(tmp_path / "a.npy"), "--model", str(two[0]), *asked, *flags]) == 0
    recipe = json.loads(capsys.readouterr().out)["recipe"]
    assert recipe["settings"]["loras"] == told
    assert main(["generate", "a", "-o", str(tmp_path / "a.mp4"), "--model", str(two[0]), *asked, *flags]) == 0
    assert main(["generate", "--recipe", str(tmp_path / "a.mp4"), "-o", str(tmp_path / "b.npy"), "--quiet"]) == 0
    assert (np.load(tmp_path / "a.npy") == np.load(tmp_path / "b.npy")).all()
    plain = pipe.generate("a", num_frames=1, num_inference_steps=2, seed=3, size="64x64").frames
    assert (plain != np.load(tmp_path / "b.npy")).any(), "the LoRAs change the video"


def test_a_lora_that_fits_not_both_changes_neither(two: tuple[Path, Any], tmp_path: Path) -> None:
    """The second expert's file is found broken before the first is touched."""
    folder, (file, _) = tmp_path / "model", write_lora(tmp_path / "a.safetensors")
    shutil.copytree(two[0], folder)
    pipe = fastvid.load(str(folder), device="cpu")
    base, weights = states(pipe), folder / "transformer_2" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="transformer_2"):
        pipe.set_loras([file])
    assert_same_states(states(pipe), base)
    with pytest.raises(CheckpointError, match=r"wrong shapes: blocks.1.attn1.to_q.weight \[40, 40\]"):
        pipe.set_loras([write_lora(tmp_path / "b.safetensors", 40)[0]])
    assert pipe.describe()["loras"] == []


def test_inspect_says_once_that_a_lora_does_not_fit(two: tuple[Path, Any], tmp_path: Path) -> None:
    files = [write_lora(tmp_path / f"{width}.safetensors", width)[0] for width in (48, 40)]
    assert [len(found["problems"]) for found in inspect(two[0], files)["loras"]] == [0, 1]


@pytest.mark.parametrize("extras", [True, False])
def test_an_original_folder_with_two_experts(two: tuple[Path, Any], tmp_path: Path, extras: bool) -> None:
    """high_noise_model and low_noise_model are loaded as they are, with a LoRA; without what fastvid wrote beside them
    the boundary is that of the published model."""
    folder, (file, _) = tmp_path / "original", write_lora(tmp_path / "a.safetensors")
    convert(two[0], folder, "original")
    if not extras:
        (folder / "diffusers_extras.json").unlink()
    ours, theirs = (fastvid.load(str(path), device="cpu", loras=file) for path in (folder, two[0]))
    assert_same_states(states(ours), states(theirs))
    assert ours._model.experts.boundary == pytest.approx(1000 * (BOUNDARY if extras else 0.875))
    ours.set_loras()
    assert_same_states(states(ours), states(fastvid.load(str(two[0]), device="cpu")))


def test_an_original_folder_of_the_5b(tmp_path: Path) -> None:
    """The 2.2 VAE in its original names, and timesteps per token because it is the 5B."""
    tiny.write_checkpoint(tmp_path / "made", vae_config=VAE_22, expand_timesteps=True)
    convert(tmp_path / "made", tmp_path / "original", "original")
    assert (tmp_path / "original" / "Wan2.2_VAE.safetensors").is_file()
    asked = {"prompt": "a red circle", "height": 64, "width": 64, "num_frames": 5, "seed": 1, "num_inference_steps": 1}
    pipes = [fastvid.load(str(tmp_path / name), device="cpu") for name in ("made", "original")]
    assert all(isinstance(pipe._model.vae, WanVAE22) and pipe._model.preset.per_token_timesteps for pipe in pipes)
    assert pipes[0]._model.preset == pipes[1]._model.preset
    assert np.array_equal(*(pipe.generate(**asked).frames for pipe in pipes))


# ---------------------------------------------------------------- requests and files


def test_the_second_scale_follows_the_first_if_that_is_given(pipe: fastvid.Pipeline) -> None:
    def scales(**given: float) -> tuple[float, float]:
        recipe = next(iter(pipe.stream("a", height=64, width=64, num_frames=1, **given))).recipe
        return recipe["guidance_scale"], recipe["guidance_scale_2"]

    assert scales() == (5.0, 5.0)
    assert scales(guidance_scale=3.0) == (3.0, 3.0)
    assert scales(guidance_scale_2=3.0) == (5.0, 3.0)
    assert scales(guidance_scale=2.0, guidance_scale_2=3.0) == (2.0, 3.0)


def test_a_folder_with_two_experts_is_described(two: tuple[Path, Any]) -> None:
    found = inspect(two[0])
    assert list(found["parts"]) == ["transformer", "transformer_2", "vae", "text_encoder"]
    assert found["recipe"]["boundary_ratio"] == BOUNDARY and found["recipe"]["patterns"]["staggered"] == "refused"
    assert found["problems"] == [] and found["recipe"]["name"] == "wan-custom" and found["alternatives"] == []


def inspect(folder: Path, loras: list[Path] | None = None) -> dict[str, Any]:
    from fastvid.api import inspect

    return inspect(str(folder), loras or ())


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("file", "changes", "says"),
    [
        ("model_index.json", {"boundary_ratio": None}, "no boundary_ratio"),
        ("model_index.json", {"boundary_ratio": 875}, "boundary_ratio is 875; a number from 0 to 1"),
        ("model_index.json", {"boundary_ratio": "0.9"}, "boundary_ratio is '0.9'"),
        ("model_index.json", {"transformer_2": [None, None]}, "there is no transformer_2"),
        ("model_index.json", {"transformer_2": ["diffusers", "UNet"]}, "transformer_2 is a UNet"),
        ("transformer_2/config.json", {"eps": 1e-5}, "transformer eps is 1e-06, but transformer_2's is 1e-05"),
        ("transformer_2/config.json", {"num_layers": 3}, "transformer_2: missing weights: blocks.2"),
    ],
)
def test_broken_pairs_are_refused(two: tuple[Path, Any], file: str, changes: dict[str, Any], says: str) -> None:
    path = two[0] / file
    before = path.read_text()
    try:
        change(path, **changes)
        with pytest.raises(fastvid.CheckpointError) as caught:
            fastvid.load(str(two[0]), device="cpu")
        assert says in str(caught.value)
        assert any(says in text for text in inspect(two[0])["problems"])
    finally:
        path.write_text(before)


# ---------------------------------------------------------------- TI2V-5B


def test_the_5b_equals_diffusers(tmp_path: Path) -> None:
    theirs = tiny.write_checkpoint(tmp_path, vae_config=VAE_22, expand_timesteps=True)
    pipe = fastvid.load(str(tmp_path), device="cpu")
    assert pipe._model.preset.per_token_timesteps and pipe._model.preset.spatial_multiple == 32
    latents = torch.randn(1, 48, 3, 4, 6, generator=torch.Generator().manual_seed(6))
    options = {"guidance_scale": 4.0, "height": 64, "width": 96, "num_frames": 9}
    ours = pipe.generate(**PROMPTS, **options, solver="euler", sigmas=SIGMAS, latents=latents).frames
    assert_same_frames(ours, diffusers_frames(theirs, latents, **options))
    odd = pipe.generate("a", height=70, width=66, num_frames=2, num_inference_steps=1)
    assert odd.frames.shape == (2, 70, 66, 3) and odd.latents.shape == (1, 48, 2, 6, 6)
