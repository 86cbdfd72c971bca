"""Plans without weights: the same as those of loaded models, of published models by name, and estimates of time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastvid
from fastvid.cli import commands, render
from fastvid.errors import CheckpointError, InvalidRequest, OutOfMemory
from fastvid.models.registry import build_empty, build_vae
from fastvid.models.wan import variants
from fastvid.models.wan.config import WanVAEConfig
from fastvid.models.wan.transformer import WanTransformer
from fastvid.ops.dispatch import bind
from fastvid.pipeline import prepare
from fastvid.planning import speed

GIB = 2**30
CLIP = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), np.uint8)
POINTS = ((1e6, 1e-4), (1e9, 1e-2), (1e10, 0.05))
RATES = speed.Rates(POINTS, POINTS, POINTS)
# Parameters of the published transformers, in billions.
PARAMETERS = {
    "wan2.1-t2v-1.3b": 1.419,
    "wan2.2-ti2v-5b": 4.9998,
    "wan2.1-t2v-14b": 14.2885,
    "wan2.1-vace-1.3b": 2.154,
    "wan2.1-vace-14b": 17.3376,
    "wan2.2-animate-14b": 17.2748,
}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"size": "96x64", "num_frames": 60, "guidance_scale": 1.0},
        {"verb": "extend", "video": CLIP, "seconds": 1},
        {"verb": "edit", "video": CLIP, "strength": 0.5, "source_prompt": "a"},
        {"verb": "storyboard", "shots": [("a", 1), ("b", 2)]},
    ],
)
def test_a_blueprint_plans_what_a_loaded_model_plans(options: dict[str, Any]) -> None:
    loaded, empty = fastvid.load("embedded", device="cpu"), fastvid.blueprint("embedded", device="cpu")
    prompt = None if "shots" in options else "a"
    plans = [replace(pipe.plan(prompt, **options), bytes_free=0) for pipe in (loaded, empty)]
    assert plans[0] == plans[1] and plans[0].flops_denoise > plans[0].flops_attention > 0
    assert plans[0].bytes_frames > empty.plan(prompt, keep_frames=False, **options).bytes_frames == 0
    assert plans[0].seconds is None


@pytest.mark.parametrize("name", variants.PUBLISHED)
def test_published_models_are_planned_by_name(name: str) -> None:
    recipe, configs = variants.published_configs(name)
    assert recipe.name == name
    picture = {"image": np.zeros((64, 64, 3), np.uint8)} if "i2v" in name or "flf2v" in name else {}
    picture |= {"last_image": picture["image"]} if "flf2v" in name else {}
    plan = fastvid.blueprint(name.upper(), device_memory=80 * GIB).plan(size="480x256", num_frames=17, **picture)
    assert (plan.dtype, plan.device) == ("bfloat16", "cuda") and plan.bytes_free == 79 * GIB
    if name in PARAMETERS:
        module = build_empty("transformer", configs["transformer"])
        counted = sum(parameter.numel() for parameter in module.parameters())
        assert counted == pytest.approx(PARAMETERS[name] * 1e9, rel=1e-4)


def test_other_cards() -> None:
    offload = {
        card: fastvid.blueprint("wan2.1-t2v-14b", device_memory=card * GIB).plan(size="832x480").offload
        for card in (24, 40, 80)
    }
    assert offload == {24: "blocks", 40: "text", 80: "none"}
    with pytest.raises(OutOfMemory, match=r"832x480 with 81 frames.*denoising takes the most.*3.0 GiB are there"):
        fastvid.blueprint("wan2.1-t2v-14b", device_memory=4 * GIB).plan(size="832x480", num_frames=81)
    with pytest.raises(InvalidRequest, match="another card"):
        fastvid.blueprint("wan2.1-t2v-1.3b", device_memory=24 * GIB).plan(estimate=True)
    with pytest.raises(CheckpointError, match="nearest is wan2.1-t2v-14b"):
        fastvid.blueprint("wan2.1-t2v-15b")


# ---------------------------------------------------------------- time


def test_seconds_between_and_beyond_what_was_measured() -> None:
    assert speed.interpolate(POINTS, 0) == 0 and speed.interpolate(POINTS, 10) == 1e-4
    assert speed.interpolate(POINTS, 1e9) == pytest.approx(1e-2) and speed.interpolate(
        POINTS, 10**7.5
    ) == pytest.approx(1e-3)
    assert speed.interpolate(POINTS, 1e12) == pytest.approx(5.0)


def test_rates_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured: list[int] = []
    monkeypatch.setattr(speed, "measure", lambda *_: measured.append(1) or RATES)
    given = (bind(), torch.device("cpu"), torch.float32)
    assert speed.find_rates(*given) == RATES == speed.find_rates(*given) and measured == [1]
    assert speed.find_rates(*given, again=True) == RATES and measured == [1, 1]
    (file,) = (tmp_path / "fastvid").iterdir()
    for broken in ("", "{}", json.dumps({"key": 1, "rates": {}}), file.read_text().replace("0.05", "-1")):
        file.write_text(broken)
        assert speed.find_rates(*given) == RATES
    assert len(measured) == 6
    speed.find_rates(given[0], given[1], torch.bfloat16)
    assert len(measured) == 7, "another dtype, other rates"
    eight = replace(RATES, eight=((1e6, 1e-5),))
    monkeypatch.setattr(speed, "measure", lambda *_: measured.append(1) or eight)
    assert [speed.find_rates(*given, eight="int8") for _ in range(2)] == [eight, eight] and len(measured) == 8
    assert speed.find_rates(*given) == RATES, "which models without 8-bit products go by"


def test_linear_layers_in_8_bits_have_rates_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the time of all linear layers is what a plan gains."""
    asked, found = [], []
    rates = replace(RATES, eight=tuple((work, seconds / 4) for work, seconds in POINTS))
    monkeypatch.setattr(
        prepare, "find_rates", lambda *_, eight, **__: asked.append(eight) or (rates if eight else RATES)
    )
    for quantize in (None, "int8", "fp8"):
        plan = fastvid.blueprint("embedded", device="cpu", quantize=quantize).plan("a", estimate=True)
        found.append(plan.seconds_parts["denoise"])
    assert asked == [None, "int8", "fp8_e4m3"] and found[1] == found[2] < found[0]
    calls = speed.Calls(1, 192, 192, 32)
    config = fastvid.blueprint("embedded", device="cpu")._model.transformer.config
    nothing = ((1.0, 1e-18),)
    linear, eight = (speed.denoise_seconds(calls, config, 0, replace(one, attention=nothing)) for one in (RATES, rates))
    assert eight == pytest.approx(linear / 4, rel=1e-3)


@pytest.mark.slow
def test_measuring() -> None:
    made = speed.measure(bind(), torch.device("cpu"), torch.float32, "int8")
    for points in (made.linear, made.attention, made.convolution, made.eight):
        assert points and points == tuple(sorted(points)) and all(seconds > 0 for _, seconds in points)


def test_operations_of_the_vae_are_those_of_its_convolutions() -> None:
    """By hand: the decoder's layers, each at its own scale."""
    config = WanVAEConfig(base_dim=8, dim_mult=(1, 2), num_res_blocks=1, temperal_downsample=(False,), z_dim=16)
    vae, seen = build_vae(config), []
    for module in vae.decoder.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d):
            seen.append(module)
    counted = speed.count_vae(vae)
    assert counted.count == len(seen) and counted.flops > 2 * 27 * 8 * 3  # its last layer alone
    wider = speed.count_vae(build_vae(replace(config, base_dim=16)))
    assert 3 < wider.flops / counted.flops < 4.01, "nearly all layers grow in both widths"


def test_an_estimate_is_of_what_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastvid.pipeline.prepare.find_rates", lambda *_, **__: RATES)
    pipe = fastvid.blueprint("embedded", device="cpu")
    short, long = (pipe.plan("a", estimate=True, num_inference_steps=steps) for steps in (5, 10))
    assert long.seconds_parts["denoise"] == pytest.approx(2 * short.seconds_parts["denoise"])
    assert short.seconds_parts["decode"] == long.seconds_parts["decode"] > 0 == short.seconds_parts["encode"]
    assert short.seconds == pytest.approx(sum(short.seconds_parts.values()))
    edited = pipe.plan("a", verb="edit", video=CLIP, estimate=True)
    assert edited.seconds_parts["encode"] > 0
    assert json.loads(json.dumps(edited.to_dict()))["seconds"] == edited.seconds


def test_a_call_is_its_layers() -> None:
    """Against a transformer's own operations, at a rate of one a second."""
    ones = ((1.0, 1.0), (2.0, 2.0))
    config = fastvid.blueprint("embedded", device="cpu")._model.transformer.config
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = WanTransformer(config)
        context = model.prepare_context(torch.empty(1, 32, config.text_dim))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, config.in_channels, 3, 16, 16), torch.empty(1), context)
    guessed = speed.denoise_seconds(speed.Calls(1, 192, 192, 32), config, 0, speed.Rates(ones, ones, ones))
    assert guessed == pytest.approx(counter.get_total_flops(), rel=0.03)  # patches, timesteps and the head are left out


# ---------------------------------------------------------------- the command


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("fastvid.pipeline.prepare.find_rates", lambda *_, **__: RATES)
    np.save(tmp_path / "a.npy", CLIP)
    assert commands.main(["plan", "extend", str(tmp_path / "a.npy"), "--device", "cpu", "--json", "-o", "x.mp4"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_frames"] == 25 and found["seconds"] > 0 and found["bytes_frames"] == 0
    assert commands.main(["plan", "--model", "wan2.1-t2v-14b", "--size", "832x480", "--device-memory", "24GB"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "32,760 tokens" in out and "blocks are streamed" in out and "23.0 GiB are free" in out
    assert "time" not in [line.split()[0] for line in out.splitlines()]
    assert commands.main(["plan", "--model", "wan2.1-i2v-14b-480p", "--device-memory", "24GB"]) == 2
    assert "give --image=" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        commands.parser.parse(["plan", "--help"])


@pytest.mark.parametrize(
    ("count", "text"), [(2**30 * 3, "3.0 GiB"), (2**30 * 200, "200 GiB"), (2**20, "1.0 MiB"), (1, "0 KiB")]
)
def test_sizes(count: int, text: str) -> None:
    assert render.size(count) == text


def test_graphs_are_planned_for() -> None:
    given = {"device_memory": 80 * 2**30, "dtype": "bfloat16"}
    plain = fastvid.blueprint("wan2.1-t2v-1.3b", **given).plan(num_frames=17)
    graphs = fastvid.blueprint("wan2.1-t2v-1.3b", **given, cuda_graphs=True).plan(num_frames=17)
    assert plain.bytes_graphs == 0 and graphs.bytes_graphs > graphs.bytes_activations
    assert graphs.bytes_device >= plain.bytes_device + graphs.bytes_activations
    with pytest.raises(fastvid.BackendUnavailable, match="needs a CUDA device"):
        fastvid.blueprint("embedded", device="cpu", cuda_graphs=True)
