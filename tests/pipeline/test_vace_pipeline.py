"""VACE: whole pipelines against diffusers' WanVACEPipeline on random weights, and what is refused."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import (
    HEIGHT,
    SIGMAS,
    WIDTH,
    clip,
    noise,
    picture,
    prepared,
    region,
    run_theirs,
    share_of_equal,
    write_vace,
)
from torch.utils.flop_counter import FlopCounterMode

import fastvid
from fastvid.cli.commands import main
from fastvid.engine import controls, pixels
from fastvid.engine.decode import decode_chunk
from fastvid.loaders.convert import convert
from fastvid.media.metadata import read_recipe
from fastvid.media.writer import FrameSink
from fastvid.models.wan.config import WanVACEConfig
from fastvid.models.wan.vace import WanVACETransformer
from fastvid.pipeline.control_checks import CONTROL_OPTIONS
from fastvid.planning.speed import Calls, denoise_flops
from fastvid.requests.recipe import fingerprint
from fastvid.sampling.noise import latent_noise

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vace")


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return write_vace(folder)


@pytest.fixture(scope="module")
def pipe(theirs: Any, folder: Path) -> fastvid.Pipeline:
    return fastvid.load(str(folder), device="cpu")


def pil(pictures: np.ndarray | list[np.ndarray]) -> list[Image.Image]:
    return [Image.fromarray(one) for one in pictures]


def placed(pictures: dict[int, np.ndarray]) -> dict[str, torch.Tensor]:
    """A grey video with pictures in it that stay, as diffusers takes one that is not of 8 bits: [1, F, 3, H, W]."""
    video, mask = torch.full((1, 9, 3, HEIGHT, WIDTH), 0.5), torch.ones(1, 9, 3, HEIGHT, WIDTH)
    for frame, one in pictures.items():
        video[0, frame], mask[0, frame] = torch.from_numpy(one / 255).movedim(-1, 0), 0
    return {"video": video, "mask": mask}


VIDEO = {"video": clip(9), "mask": region(9)}
REFERENCES = [picture(7, 48, 40), picture(8, 66, 135)]
# What we are given, what diffusers is given, and how many references there are.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "text": ({}, {}, 0),
    "video": ({"video": clip(9)}, {"video": pil(clip(9))}, 0),
    "mask": (VIDEO, {"video": pil(VIDEO["video"]), "mask": pil(VIDEO["mask"])}, 0),
    "reference": (
        {**VIDEO, "reference_images": REFERENCES[0]},
        {"video": pil(VIDEO["video"]), "mask": pil(VIDEO["mask"]), "reference_images": pil(REFERENCES[:1])},
        1,
    ),
    "references": (
        {"video": clip(9), "reference_images": REFERENCES},
        {"video": pil(clip(9)), "reference_images": pil(REFERENCES)},
        2,
    ),
    "references alone": ({"reference_images": REFERENCES}, {"reference_images": pil(REFERENCES)}, 2),
    "half": (
        {**VIDEO, "conditioning_scale": 0.5},
        {"video": pil(VIDEO["video"]), "mask": pil(VIDEO["mask"]), "conditioning_scale": 0.5},
        0,
    ),
    "layers": (
        {**VIDEO, "conditioning_scale": [0.3, 1.4]},
        {"video": pil(VIDEO["video"]), "mask": pil(VIDEO["mask"]), "conditioning_scale": [0.3, 1.4]},
        0,
    ),
    "larger": (
        {"video": clip(9, 128, 192), "mask": region(9, 128, 192)},
        {"video": pil(clip(9, 128, 192)), "mask": pil(region(9, 128, 192))},
        0,
    ),
    "image": ({"image": picture(0)}, placed({0: picture(0)}), 0),
    "both images": ({"image": picture(0), "last_image": picture(1)}, placed({0: picture(0), 8: picture(1)}), 0),
}


def make(pipe: fastvid.Pipeline, latents: torch.Tensor, sigmas: list[float] = SIGMAS, **options: Any) -> fastvid.Video:
    return pipe.generate(
        "a red circle moving left",
        negative_prompt="blue square",
        num_frames=9,
        solver="euler",
        sigmas=sigmas,
        guidance_scale=4.0,
        latents=latents,
        size=f"{WIDTH}x{HEIGHT}",
        **options,
    )


class TestEqualsDiffusers:
    @pytest.mark.parametrize("case", CASES)
    def test_frames(self, theirs: Any, pipe: fastvid.Pipeline, case: str) -> None:
        ours, asked, references = CASES[case]
        latents = noise(3 + references)
        video = make(pipe, latents, **ours)
        assert video.frames.std() > 5
        assert video.latents.shape == (1, 16, 3, HEIGHT // 8, WIDTH // 8)
        assert share_of_equal(video.frames, run_theirs(theirs, latents, **asked)) >= 0.999

    @pytest.mark.slow
    def test_every_case_makes_something_else(self, pipe: fastvid.Pipeline) -> None:
        """So that none could pass for another: what is given counts. (What a random encoder makes of a last frame alone
        is too faint: see `test_known_frames_stay`.)"""
        chosen = [name for name, case in CASES.items() if case[2] == 0 and name != "both images"]
        made = [make(pipe, noise(3), **CASES[name][0], sigmas=SIGMAS[::3]).frames for name in chosen]
        for i, one in enumerate(made):
            assert all(share_of_equal(one, other) < 0.9 for other in made[:i])
        orders = REFERENCES, REFERENCES[::-1]
        one, two = (make(pipe, noise(5), reference_images=pair, sigmas=SIGMAS[::3]).frames for pair in orders)
        assert share_of_equal(one, two) < 0.9

    def test_the_original_layout_and_the_folder_converted_back(
        self, pipe: fastvid.Pipeline, folder: Path, tmp_path: Path
    ) -> None:
        convert(folder, tmp_path / "original", "original")
        found = fastvid.load(str(tmp_path / "original"), device="cpu")
        assert json.loads((tmp_path / "original" / "config.json").read_text())["vace_layers"] == [0, 2]
        assert "vace_blocks.0.before_proj.weight" in (tmp_path / "original" / WEIGHTS).read_bytes().decode("latin-1")
        options = {**VIDEO, "reference_images": REFERENCES, "sigmas": SIGMAS[::3]}
        assert np.array_equal(make(found, noise(5), **options).frames, make(pipe, noise(5), **options).frames)


def lay_out(pipe: fastvid.Pipeline, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    options = {"prompt": "a", "num_inference_steps": 1, "size": f"{WIDTH}x{HEIGHT}", **options}
    job = prepared(pipe, **options).job
    segment = job.timeline.segments[0]
    return controls.control_video(job.request, segment, pixels.KnownFrames(pictures=segment.pictures))


class TestWhatTheModelSees:
    def test_known_frames_stay(self, pipe: fastvid.Pipeline) -> None:
        frames, mask = lay_out(pipe, image=picture(0), last_image=picture(1), num_frames=9)
        wanted = placed({0: picture(0), 8: picture(1)})
        assert torch.allclose(frames, wanted["video"][0] * 2 - 1, atol=1e-6)
        assert torch.equal(mask, wanted["mask"][0, :, :1])

    def test_a_picture_goes_over_the_video(self, pipe: fastvid.Pipeline) -> None:
        plain, _ = lay_out(pipe, video=clip(9))
        frames, mask = lay_out(pipe, video=clip(9), last_image=picture(7))
        assert torch.equal(frames[:8], plain[:8]) and not torch.equal(frames[8], plain[8])
        assert mask[:8].all() and not mask[8].any()

    def test_the_end_is_repeated_where_the_model_makes_more(self, pipe: fastvid.Pipeline) -> None:
        frames, mask = lay_out(pipe, video=clip(7), mask=region(7))
        assert len(frames) == len(mask) == 9
        assert torch.equal(frames[7:], frames[6:7].expand(2, -1, -1, -1))
        assert torch.equal(mask[7:], mask[6:7].expand(2, -1, -1, -1)) and not torch.equal(mask[6], mask[5])
        real, _ = lay_out(pipe, video=clip(12), num_frames=7)
        assert torch.equal(real[:7], frames[:7]) and not torch.equal(real[7], frames[7])

    def test_odd_sizes_and_edges(self, pipe: fastvid.Pipeline) -> None:
        video = clip(5, 70, 90)
        frames, mask = lay_out(pipe, video=video, mask=region(5, 70, 90), size="90x70")
        assert frames.shape == (5, 3, 80, 96) and mask.shape == (5, 1, 80, 96)
        shown = ((frames[:, :, :70, :90] + 1) * 127.5).round().to(torch.uint8).movedim(1, -1).numpy()
        assert np.array_equal(shown, video)
        assert torch.equal(frames[:, :, 70:], frames[:, :, 69:70].expand(-1, -1, 10, -1))
        made = pipe.generate("a", video=video, reference_images=REFERENCES, num_inference_steps=1, size="90x70")
        assert made.frames.shape == video.shape

    def test_every_way_to_give_them_is_the_same(self, pipe: fastvid.Pipeline, tmp_path: Path) -> None:
        video, mask = clip(5), region(5)
        np.save(tmp_path / "clip.npy", video)
        for name in ("clip/", "mask/"):
            with FrameSink(f"{tmp_path}/{name}", width=WIDTH, height=HEIGHT, fps=8, recipe={}) as sink:
                sink.write(video if name == "clip/" else np.stack([mask] * 3, -1))
                sink.close()
        wanted = lay_out(pipe, video=video, mask=mask)
        shown = fastvid.Video(video, 8, 0, None, {})
        videos = [tmp_path / "clip.npy", str(tmp_path / "clip"), pil(video), list(video), torch.tensor(video), shown]
        masks = [
            tmp_path / "mask",
            pil(mask),
            list(mask),
            torch.tensor(mask),
            np.stack([mask] * 3, -1),
            mask[..., None],
        ]
        for one, other in zip(videos, masks, strict=True):
            assert all(map(torch.equal, lay_out(pipe, video=one, mask=other), wanted))
        hard = mask[:1] > 127
        wanted = lay_out(pipe, video=video, mask=np.repeat(hard, 5, 0).astype(np.uint8) * 255)
        Image.fromarray(hard[0]).save(tmp_path / "mask.png")
        for one in (hard, hard[0], torch.tensor(hard[0]), Image.fromarray(hard[0]), tmp_path / "mask.png"):
            assert all(map(torch.equal, lay_out(pipe, video=video, mask=one), wanted))

    def test_what_is_in_front_has_noise_of_its_own(self, pipe: fastvid.Pipeline) -> None:
        """The video's own noise is that of the same seed without references."""
        options = {"video": clip(5), "num_inference_steps": 2, "reference_images": REFERENCES, "size": "96x64"}
        started = latent_noise(9, (16, 4, HEIGHT // 8, WIDTH // 8), start=-2)
        seeded, again = pipe.generate("a", seed=9, **options), pipe.generate("a", latents=started, **options)
        assert torch.equal(seeded.latents, again.latents) and seeded.latents.shape[2] == 2
        assert torch.equal(started[:, :, 2:], latent_noise(9, (16, 2, HEIGHT // 8, WIDTH // 8)))
        assert share_of_equal(pipe.decode(seeded.latents), seeded.frames) == 1

    def test_encoding_in_chunks_is_encoding_at_once(self, pipe: fastvid.Pipeline) -> None:
        parts, frames = pipe._model, torch.rand(1, 3, 9, 192, 192) * 2 - 1
        options = {"prompt": "a", "num_frames": 9, "size": "192x192"}
        segment = prepared(pipe, **options).job.timeline.segments[0]
        assert decode_chunk(segment) == 1
        with torch.no_grad():
            wanted, _ = parts.vae.encode(frames)
            torch.testing.assert_close(pixels.encode(parts, frames, segment), wanted)
            torch.testing.assert_close(pixels.encode(parts, frames[:, :, :1], segment), wanted[:, :, :1])


class TestCounting:
    def test_frames_and_size_follow_the_video(self, pipe: fastvid.Pipeline) -> None:
        plan = pipe.plan("a", video=clip(7, 64, 128), num_inference_steps=1)
        assert (plan.num_frames, plan.model_frames) == (7, 9) and plan.width == 2 * plan.height
        assert pipe.plan("a", video=clip(7), num_frames=5, size="64x80").num_frames == 5
        assert pipe.plan("a", video=clip(9), seconds=0.25, size="64x64").num_frames == 4
        assert pipe.plan("a", reference_images=REFERENCES[1], size="64x64", num_frames=5).latent_shape[1] == 3

    def test_arithmetic_is_counted(self) -> None:
        """Against PyTorch's own count; the embeddings are left out of ours."""
        sizes = {"num_attention_heads": 4, "attention_head_dim": 32, "ffn_dim": 512, "num_layers": 4, "text_dim": 16}
        config = WanVACEConfig.from_dict({**sizes, "vace_layers": [0, 2]})
        with torch.device("meta"):
            model = WanVACETransformer(config)
            x, text = torch.zeros(1, 16, 5, 24, 32), torch.zeros(1, 64, 16)
            with FlopCounterMode(display=False) as counter:
                context = model.prepare_context(text, control=torch.zeros(1, 96, 5, 24, 32))
                before = counter.get_total_flops()
                model(x, torch.zeros(1), context)
        tokens = 5 * 12 * 16
        call = Calls(1, tokens, tokens, 64)
        ours = denoise_flops(call, config.transformer, 2)
        assert ours == pytest.approx(counter.get_total_flops() - before, rel=0.04)
        assert ours / denoise_flops(call, config.transformer) == pytest.approx(6.2 / 4, rel=0.05)

    def test_the_plan_counts_the_branch(self, pipe: fastvid.Pipeline) -> None:
        parts, options = pipe._model, {"num_frames": 9, "size": "96x64"}
        found, longer = pipe.plan("a", **options), pipe.plan("a", reference_images=REFERENCES, **options)
        plain = denoise_flops(Calls(1, found.tokens, found.tokens, 16), parts.transformer.config)
        assert found.flops_denoise > 1.4 * found.model_calls * plain
        assert found.bytes_encoder > 9 * 96 * 64 * 8 * 4 and longer.bytes_encoder == found.bytes_encoder
        assert longer.tokens == found.tokens * 5 // 3 and longer.bytes_latents == found.bytes_latents * 5 // 3
        assert fastvid.load("embedded", device="cpu").plan("a").bytes_encoder == 0


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"video": clip(5), "num_frames": 9}, "num_frames=9: video has 5 frames; the nearest is 5"),
    ({"mask": region(5)}, "give video too"),
    ({**VIDEO, "mask": region(3)}, "mask has 3 frames; allowed is 1, or 9"),
    ({**VIDEO, "mask": region(9) / 100}, "mask is floating point"),
    ({**VIDEO, "mask": (region(9) > 9).astype(np.uint8)}, "give it as bool, or times 255"),
    ({**VIDEO, "mask": np.zeros((9, 4, 4, 2), np.uint8)}, "mask is uint8"),
    ({"video": picture(0)}, r"must be uint8 RGB \[F, H, W, 3\]"),
    ({"video": clip(5) / 100}, "video is floating point"),
    ({"video": []}, "one picture or more"),
    ({"video": 7}, "a file"),
    ({"video": [picture(0), picture(0, 80, 80)]}, "one size"),
    ({"reference_images": []}, "one picture or more"),
    ({"reference_images": [picture(0) / 100]}, r"reference_images\[0\] is floating"),
    ({"reference_images": [picture(0, 64, 7)]}, "is 7x64; allowed are sides of 16"),
    ({"reference_images": [picture(0, 2048, 16)]}, "too narrow"),
    ({"conditioning_scale": [1, 2, 3]}, "give one number, or 2"),
    ({"conditioning_scale": "much"}, "conditioning_scale='much'"),
    ({"conditioning_scale": [1, float("nan")]}, r"conditioning_scale\[1\]"),
    ({"reference_images": REFERENCES, "latents": noise(3)}, r"must be \[1, 16, 5, 8, 12\]"),
    ({"reference_image": picture(0)}, "the nearest is reference_images"),
]


class TestRefused:
    @pytest.mark.parametrize(("options", "says"), REFUSED, ids=range(len(REFUSED)))
    def test_what_does_not_fit(self, pipe: fastvid.Pipeline, options: dict[str, Any], says: str) -> None:
        with pytest.raises(fastvid.InvalidRequest, match=says):
            pipe.plan("a", **{"num_frames": 9, "size": "96x64", **options})

    def test_a_video_that_cannot_be_read(self, pipe: fastvid.Pipeline, tmp_path: Path) -> None:
        with pytest.raises(fastvid.Error, match="missing.mp4"):
            pipe.plan("a", video=tmp_path / "missing.mp4")

    def test_models_without_a_control_branch(self) -> None:
        plain = fastvid.load("embedded", device="cpu")
        for options in (VIDEO, {"reference_images": REFERENCES}, {"conditioning_scale": 1.0}):
            with pytest.raises(fastvid.InvalidRequest, match=f"no control branch; leave {next(iter(options))} out"):
                plain.plan("a", **options)


def test_what_a_folder_says_of_the_branch(pipe: fastvid.Pipeline, folder: Path, tmp_path: Path) -> None:
    config = pipe.inspect()["parts"]["transformer"]["config"]
    assert (config["vace_layers"], config["vace_in_channels"], config["num_layers"]) == ((0, 2), 96, 4)
    broken = shutil.copytree(folder, tmp_path / "broken")
    stated = json.loads((broken / "transformer" / "config.json").read_text())
    (broken / "transformer" / "config.json").write_text(json.dumps(stated | {"vace_in_channels": 80}))
    with pytest.raises(
        fastvid.CheckpointError, match="vace_in_channels is 80, but what the vae makes of a control is 96"
    ):
        fastvid.load(str(broken), device="cpu")


@pytest.mark.slow
def test_from_the_command_line(
    pipe: fastvid.Pipeline, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "video.npy", VIDEO["video"])
    np.save(tmp_path / "mask.npy", VIDEO["mask"])
    words = ["--video", str(tmp_path / "video.npy"), "--mask", str(tmp_path / "mask.npy")]
    for number, one in enumerate(REFERENCES):
        Image.fromarray(one).save(tmp_path / f"{number}.png")
        words += ["--reference-image", str(tmp_path / f"{number}.png")]
    start = ["generate", "--model", str(folder), "--quiet", "-o"]
    first = [*start, str(tmp_path / "out.npy"), "a red circle", "--seed", "3", "--steps", "2", "--size", "96x64"]
    assert main([*first, *words, "--conditioning-scale", "0.5,0.7"]) == 0
    options = {**VIDEO, "reference_images": REFERENCES, "conditioning_scale": [0.5, 0.7]}
    made = pipe.generate("a red circle", seed=3, num_inference_steps=2, size="96x64", **options)
    assert np.array_equal(np.load(tmp_path / "out.npy"), made.frames)
    recipe = read_recipe(tmp_path / "out.npy")
    assert {name: recipe[name] for name in CONTROL_OPTIONS} == {name: made.recipe[name] for name in CONTROL_OPTIONS}
    assert recipe["reference_images"] == [fingerprint(one) for one in REFERENCES]
    assert recipe["conditioning_scale"] == [0.5, 0.7]

    again = [*start, str(tmp_path / "again.npy"), "--recipe", str(tmp_path / "out.npy")]
    assert main([*again, *words]) == 0
    assert np.array_equal(np.load(tmp_path / "again.npy"), made.frames)
    capsys.readouterr()
    for left, flag in ((words[2:], "--mask"), (words[:4], "--reference-image"), ([], "--video")):
        if flag == "--mask":
            left = words[:2] + words[4:]
        assert main([*again, *left]) == 2
        said = capsys.readouterr().err
        assert f"give {flag}= again" in said and "sha256" in said


def test_another_rate_and_a_mask_without_white_are_told(pipe: fastvid.Pipeline) -> None:
    control = fastvid.Video(clip(9), fps=30.0, seed=1)
    size = {"height": HEIGHT, "width": WIDTH}
    with pytest.warns(fastvid.FastvidWarning) as told:
        prepared(pipe, prompt="a", video=control, mask=0 * region(9), **size)
    words = " ".join(str(one.message) for one in told)
    assert (
        "video has 30 frames a second and the result 16" in words and "0.53 times its speed; fps=30 keeps it" in words
    )
    assert "mask is black everywhere: black keeps video as it is, white is generated" in words
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        prepared(pipe, prompt="a", video=control, mask=region(9), fps=29.97, **size)
    assert not any("frames a second" in str(one.message) or "black" in str(one.message) for one in told)
