"""SkyReels V2's diffusion forcing, whole pipelines of tiny models against diffusers' with the same noise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import skyreels_cases as cases
import torch
from PIL import Image
from skyreels_cases import HEIGHT, OURS, SIGMAS, WIDTH, embeds, make, picture, text, wanted

import fastvid
from fastvid import InvalidRequest
from fastvid.sampling.noise import latent_noise

DF = "skyreels-v2-df-1.3b-540p"
CLIP = np.stack([picture(i) for i in range(17)])
IN_PARTS = {"base_num_frames": 17, "overlap_history": 5}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """(its folder, diffusers' pipeline of that kind and the same weights, by kind)."""
    folder = tmp_path_factory.mktemp("skyreels") / "model"
    pipe = make(folder=folder)
    import diffusers

    def of(kind: str = "") -> Any:
        pipe.transformer._set_ar_attention(1)
        return getattr(diffusers, f"SkyReelsV2DiffusionForcing{kind}Pipeline")(**pipe.components)

    return folder, of


@pytest.fixture(scope="module")
def mine(theirs):
    return fastvid.load(str(theirs[0]), device="cpu", variant=DF)


def noise(columns: int, start: int = 0) -> torch.Tensor:
    return latent_noise(OURS["seed"], (16, columns, HEIGHT // 8, WIDTH // 8), start=start)


def close(made: torch.Tensor, those: torch.Tensor) -> None:
    assert (made - those).abs().max() < 1e-4 < 1 < those.abs().max()


@pytest.mark.filterwarnings("ignore::fastvid.FastvidWarning")
class TestAgainstDiffusers:
    @pytest.mark.parametrize(
        "given",
        [
            {},
            {"fps": 16},
            {"ar_step": 2},
            {"ar_step": 2, "causal_block_size": 3},
            {"ar_step": 9, "causal_block_size": 2},  # more than there are steps
            {"causal_block_size": 3},
        ],
    )
    def test_from_text(self, theirs, mine, given):
        made = mine.generate(num_frames=21, **OURS, **text(), **given)
        given = {"ar_step": 0, "causal_block_size": None, "fps": 24, **given}
        close(made.latents, wanted(theirs[1](), noise(6), num_frames=21, **given))

    @pytest.mark.parametrize("given", [{}, {"ar_step": 2}])
    @pytest.mark.parametrize("last", [False, True])
    def test_from_a_picture_and_up_to_one_behind_the_video(self, theirs, mine, last, given):
        ends = {"image": picture(1)} | ({"last_image": picture(4)} if last else {})
        made = mine.generate(num_frames=17, addnoise_condition=0, **ends, **OURS, **text(), **given)
        ends = {name: Image.fromarray(one) for name, one in ends.items()}
        those = wanted(theirs[1]("ImageToVideo"), noise(5), num_frames=17, **ends, **given)
        close(made.latents, those[:, :, :5])
        assert made.frames.shape[0] == 17 and those.shape[2] == 5 + last

    def test_noise_on_what_is_known(self, theirs, mine, monkeypatch):
        image = {"image": picture(1)}
        made = mine.generate(num_frames=17, addnoise_condition=200, **image, **OURS, **text())
        steps = iter(range(len(SIGMAS)))

        def draw(x: torch.Tensor) -> torch.Tensor:  # the known column has passed every level, four others one a row
            return latent_noise(5, (16, 1, 8, 12), draw=1 + len(SIGMAS) + 4 * next(steps))

        monkeypatch.setattr(torch, "randn_like", draw)
        options = {"image": Image.fromarray(picture(1)), "num_frames": 17}
        pipe = theirs[1]("ImageToVideo")
        close(made.latents, wanted(pipe, noise(5), addnoise_condition=200, **options))
        assert (made.latents - wanted(pipe, noise(5), **options)).abs().max() > 1e-3

    @pytest.mark.parametrize(("given", "columns"), [({}, 4), ({"ar_step": 1, "causal_block_size": 3}, 6)])
    def test_a_clip_goes_on(self, theirs, mine, given, columns):
        options = {name: value for name, value in OURS.items() if name not in ("height", "width")}
        new, more = 4 * columns, {"overlap_history": 9, "base_num_frames": 97, **given}
        made = mine.extend(CLIP, num_frames=new, addnoise_condition=0, **options, **text(), **more)
        video = {"video": [Image.fromarray(frame) for frame in CLIP], "num_frames": 9 + new}
        those = wanted(theirs[1]("VideoToVideo"), noise(3 + columns, start=-3), **video, **more)
        close(made.latents, those[:, :, 3:])
        assert np.array_equal(made.frames[:17], CLIP)

    def test_each_part_of_a_long_video_goes_on_from_the_frames_before(self, theirs, mine):
        made = mine.generate(num_frames=33, addnoise_condition=0, **IN_PARTS, **OURS, **text())
        close(made.latents[:, :, :5], wanted(theirs[1](), noise(5), num_frames=17))
        for done, columns in ((17, 3), (29, 1)):
            video = {"video": [Image.fromarray(frame) for frame in made.frames[:done]]}
            start = (done - 1) // 4 + 1
            options = {"num_frames": 5 + 4 * columns, "overlap_history": 5, **video}
            those = wanted(theirs[1]("VideoToVideo"), noise(2 + columns, start=start - 2), **options)
            close(made.latents[:, :, start : start + columns], those[:, :, 2:])

    def test_the_solver_is_the_one_of_all_frames_together(self, tmp_path):
        """At ar_step 0 a solver for each frame is the same as one for all, which diffusers' T2V pipeline has."""
        pipe = make("SkyReelsV2Pipeline", folder=tmp_path / "model", inject_sample_info=False)
        mine = fastvid.load(str(tmp_path / "model"), device="cpu", variant="skyreels-v2-df-14b-540p")
        made = mine.generate(num_frames=17, **OURS, **text())
        close(made.latents, wanted(pipe, noise(5), num_frames=17))
        forced = make(inject_sample_info=False)
        scheduler = cases.right_unipc()
        scheduler.step = super(type(scheduler), scheduler).step  # as it is, which overwrites what it keeps
        assert (made.latents - wanted(forced, noise(5), scheduler, num_frames=17)).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore::fastvid.FastvidWarning")
class TestRequests:
    def test_frames_come_while_later_blocks_are_made_and_all_steps_are_planned(self, mine):
        options = {"ar_step": 3, "causal_block_size": 2, "num_inference_steps": 6, "height": 64, "width": 96}
        events = list(mine.stream(num_frames=25, prompt_embeds=embeds(1), seed=1, **options))
        kinds = [type(event).__name__ for event in events]
        assert events[0].total_steps == kinds.count("Step") == 6 + 3 * 3
        assert [len(event.frames) for event in events if isinstance(event, fastvid.Frames)] == [5, 8, 8, 4]
        assert kinds.index("Frames") < len(kinds) - kinds[::-1].index("Step") - 1
        assert events[0].plan.model_calls == 2 * 15

    def test_a_recipe_makes_the_same_video(self, mine):
        given = {"ar_step": 2, "causal_block_size": 2, "causal_attention": False, "fps": 16, **IN_PARTS}
        options = {"num_inference_steps": 3, "height": 64, "width": 96, "image": picture(1), "num_frames": 21}
        made = mine.generate("a red circle", addnoise_condition=30, seed=3, **given, **options)
        recipe = {name: made.recipe[name] for name in (*given, "addnoise_condition")}
        assert recipe == {**given, "addnoise_condition": 30.0}
        again = mine.generate("a red circle", seed=3, **recipe, **options)
        assert np.array_equal(made.frames, again.frames)
        other = mine.generate("a red circle", seed=3, **{**recipe, "causal_attention": True}, **options)
        assert not np.array_equal(made.frames, other.frames)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"overlap_history": 97}, "overlap_history=97 .* the nearest is 93"),
            ({"ar_step": 2, "schedule": "staggered"}, "leave one of them out"),
            ({"causal_block_size": 5, "last_image": picture(1)}, r"causal_attention=False, --no-causal-attention"),
            ({"ar_step": -1}, "ar_step=-1"),
            ({"causal_block_size": 0}, "causal_block_size=0"),
            ({"base_num_frames": 4}, "base_num_frames=4"),
        ],
    )
    def test_what_cannot_be_is_refused_by_name(self, mine, given, message):
        with pytest.raises(InvalidRequest, match=message):
            mine.plan("", num_frames=17, **given)
        with pytest.raises(InvalidRequest, match="ar_step=2: edit starts"):
            mine.plan("", verb="edit", video=CLIP, ar_step=2)

    def test_a_ring_of_ranks_is_refused_for_causal_blocks(self):
        causal = {"causal_block_size": 5, "height": 544, "width": 960}
        options = {"device_memory": 80 * 2**30}
        with pytest.raises(InvalidRequest, match="take ranks that divide the 12 heads"):
            fastvid.blueprint(DF, parallel="ring=2", **options).plan("", **causal)
        assert "ring=1" in fastvid.blueprint(DF, parallel=8, **options).plan("", **causal).parallel

    def test_a_stopped_request_goes_on(self, mine, tmp_path):
        options = {"ar_step": 2, "causal_block_size": 2, "image": picture(1), "num_frames": 33, **IN_PARTS}
        options |= {"num_inference_steps": 4, "height": 64, "width": 96, "seed": 3}
        whole = mine.generate("a red circle", **options)
        file = tmp_path / "first.png"
        Image.fromarray(picture(1)).save(file)
        saved = {**options, "image": str(file), "checkpoint": str(tmp_path / "job.ckpt"), "checkpoint_every": 0}
        steps = 0
        with pytest.raises(InterruptedError):
            for event in mine.stream("a red circle", **saved):
                steps += isinstance(event, fastvid.Step)
                if steps == 11:
                    raise InterruptedError
        events = list(mine.resume(str(tmp_path / "job.ckpt")))
        made = np.concatenate([event.frames for event in events if isinstance(event, fastvid.Frames)])
        assert np.array_equal(made, whole.frames)
        assert sum(isinstance(event, fastvid.Step) for event in events) < events[0].total_steps

    def test_other_models_refuse_each_argument(self):
        pipe = fastvid.blueprint("embedded")
        for name, value in {"ar_step": 5, "causal_attention": False, "overlap_history": 17}.items():
            with pytest.raises(InvalidRequest, match=f"{name}={value}: embedded was not trained by diffusion forcing"):
                pipe.plan("", **{name: value})


def test_odd_frame_rates_and_much_noise_are_warned_of(mine):
    with pytest.warns(fastvid.FastvidWarning, match="fps=30: .* knows 16 and 24 frames a second"):
        mine.plan("", fps=30)
    with pytest.warns(fastvid.FastvidWarning, match="addnoise_condition=80: .* at most 50"):
        mine.plan("", addnoise_condition=80)
