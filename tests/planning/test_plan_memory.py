"""What a plan says of memory: formulas against what operations really hold, and published models on cards of a size."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from live_memory import LiveMemory
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

import fastvid
from fastvid.cli import render
from fastvid.device.devices import resolve_vae_dtype
from fastvid.device.offload import MODES
from fastvid.errors import InvalidRequest, OutOfMemory
from fastvid.models.common.clip import CLIP_HUGE
from fastvid.models.common.umt5 import UMT5_XXL, UMT5Config, UMT5Encoder
from fastvid.models.registry import build_vae, weigh_part
from fastvid.models.wan.config import WAN22_VAE, WanTransformerConfig, WanVAEConfig
from fastvid.models.wan.transformer import WanTransformer
from fastvid.models.wan.variants import published_configs
from fastvid.ops import rgb, vae_gpu, vae_library
from fastvid.ops import vae as vae_ops
from fastvid.planning import memory
from fastvid.planning.memory import Memory, ModelFacts, Needs
from fastvid.requests.request import Request

GIB = 2**30
CONTEXT = GIB  # what CUDA itself takes of a card
LARGE = WanTransformerConfig()
NARROW, NARROW_22 = WanVAEConfig(base_dim=16), replace(WAN22_VAE, base_dim=16, decoder_base_dim=16)


def ways(name: str, card: float, size: str = "832x480", frames: int = 81) -> tuple[str, dict[str, Memory]]:
    """The offloading chosen for a published model on a card of so many GiB, and its memory with each."""
    preset, configs = published_configs(name)
    request = Request.make(prompt="a", size=size, num_frames=frames).resolve(preset)
    model = ModelFacts.of_configs(configs, torch.bfloat16, torch.bfloat16)
    chosen = memory.choose_offload(configs, request, int(card * GIB) - CONTEXT, torch.bfloat16, torch.bfloat16)
    needs = Needs(model, memory.whole_clip(request, model.vae), pictures=int("i2v" in name))
    return chosen, {mode: needs.memory(mode) for mode in MODES}


# ---------------------------------------------------------------- published models


def test_14b_runs_in_24_gb() -> None:
    chosen, found = ways("wan2.1-t2v-14b", 24)
    blocks = found["blocks"]
    assert chosen == "blocks" and blocks.device <= 23 * GIB
    assert "transformer blocks are streamed from host memory: 2 of 40 on the device at a time" in blocks.choices
    assert "text encoder blocks are streamed from host memory: 2 of 24 on the device at a time" in blocks.choices
    # 14.29, 5.68 and 0.13 billion numbers in bf16.
    assert found["none"].device == pytest.approx(14.29e9 * 2 + 5.68e9 * 2 + 0.127e9 * 2, rel=0.4)
    assert found["none"].device > found["text"].device > 28.6e9 > 24 * GIB > blocks.device
    assert blocks.host == pytest.approx(14.29e9 * 2 + 5.68e9 * 2, rel=0.01)


def test_more_memory_means_less_offloading() -> None:
    assert [ways("wan2.1-t2v-14b", card)[0] for card in (24, 40, 80)] == ["blocks", "text", "none"]
    assert ways("wan2.1-t2v-14b", 1)[0] == "blocks", "where nothing fits, smaller requests may"


def test_frames_are_decoded_in_stripes_only_if_offloading_does_not_suffice() -> None:
    """At 1080p the decoder takes more than the weights: no way of offloading makes the card large enough."""
    _, found = ways("wan2.1-t2v-1.3b", 24, "1920x1080", 17)
    decoding = found["blocks"].device
    assert found["blocks"].largest_phase == "decoding"
    assert ways("wan2.1-t2v-1.3b", (decoding + CONTEXT) / GIB, "1920x1080", 17)[0] == "blocks"
    assert ways("wan2.1-t2v-1.3b", (decoding + CONTEXT) / GIB - 0.1, "1920x1080", 17)[0] != "blocks"


def test_a14b_has_one_of_two_experts_on_the_device() -> None:
    chosen, found = ways("wan2.2-t2v-a14b", 24)
    assert chosen == "blocks"
    assert "of 2 experts only the one in use takes memory of the device" in found["blocks"].choices
    assert found["blocks"].host == pytest.approx(2 * 14.29e9 * 2 + 5.68e9 * 2, rel=0.01)
    assert ways("wan2.2-t2v-a14b", 72, "1280x720")[0] == "text"
    assert found["none"].device - found["text"].device > 14.29e9 * 2


def test_i2v_14b_counts_clip_and_the_vae_encoder() -> None:
    chosen, found = ways("wan2.1-i2v-14b-480p", 24)
    blocks = found["blocks"]
    assert chosen == "blocks" and any(text.startswith("the image encoder (2.3 GiB)") for text in blocks.choices)
    assert set(blocks.phases) == {"text", "pictures", "denoising", "decoding"}
    # The picture among 80 empty frames is encoded as a clip: fp32, as it is and in the VAE's range.
    assert blocks.phases["pictures"] > 2 * 81 * 480 * 832 * 3 * 4
    assert found["none"].phases["pictures"] > blocks.phases["pictures"] + 30e9


def test_1_3b_in_8_gb() -> None:
    chosen, found = ways("wan2.1-t2v-1.3b", 8)
    assert chosen != "none" and found[chosen].phases["text"] <= 7 * GIB < found["none"].device
    assert found["blocks"].phases["text"] < 7 * GIB < found["text"].phases["text"], "the text encoder alone takes 10.6"
    assert found["blocks"].phases["denoising"] < 3 * GIB
    plan = fastvid.blueprint("wan2.1-t2v-1.3b", device_memory=8 * GIB).plan(size="832x480")
    assert plan.offload == chosen and plan.bytes_device <= 7 * GIB and plan.decode_stripes == 1
    exact = fastvid.blueprint("wan2.1-t2v-1.3b", device_memory=8 * GIB, vae_dtype="float32").plan(size="832x480")
    assert exact.bytes_device <= 7 * GIB and exact.decode_stripes > 1


def test_the_vae_is_in_bf16_on_a_gpu() -> None:
    for device, name in (("cuda", "bfloat16"), ("cpu", "float32")):
        options = {"device": device, "device_memory": 80 * GIB}
        plan, stated, other = (
            fastvid.blueprint("wan2.1-t2v-1.3b", vae_dtype=kind, **options).plan(size="832x480")
            for kind in (None, name, {"bfloat16": "float32", "float32": "bfloat16"}[name])
        )
        assert plan == stated and plan.bytes_decoder != other.bytes_decoder
        assert resolve_vae_dtype(None, torch.device(device)) == getattr(torch, name)


def test_a_chunk_fills_a_gpu_if_memory_is_there() -> None:
    def chunks(size: str, **options: object) -> list[int]:
        plans = (fastvid.blueprint("wan2.1-t2v-1.3b", device_memory=card * GIB, **options) for card in (80, 24, 12, 8))
        return [plan.plan(size=size, num_frames=81).decode_chunk for plan in plans]

    assert chunks("416x240", vae_dtype="float32", offload="blocks") == [10, 10, 5, 2], "halves until it fits"
    assert chunks("832x480") == [2, 2, 2, 1] and chunks("1280x720") == [1, 1, 1, 1]
    plans = fastvid.blueprint("wan2.1-t2v-1.3b", device_memory=80 * GIB)
    assert plans.plan(size="416x240", num_frames=17).decode_chunk == 5, "no more than there are"
    on_cpu = fastvid.blueprint("wan2.1-t2v-1.3b", device="cpu", device_memory=80 * GIB).plan(
        size="160x96", num_frames=81
    )
    assert on_cpu.decode_chunk == 2
    kept = plans.plan(size="416x240", num_frames=81)
    one, many = (memory.decoder_bytes(WanVAEConfig(), 240, 416, 4 * count, itemsize=2) for count in (1, 10))
    assert kept.bytes_decoder == many > 5 * one


def test_what_does_not_fit_is_refused_with_what_is_too_much() -> None:
    small = fastvid.blueprint("wan2.1-t2v-1.3b", device_memory=8 * GIB)
    with pytest.raises(OutOfMemory, match=r"1920x1080.*offload='blocks'.*decoding takes the most.*7.0 GiB are there"):
        small.plan(size="1920x1080")
    options = {"dtype": "float32", "vae_dtype": "bfloat16", "device_memory": int(11.2 * GIB)}
    large = fastvid.blueprint("wan2.1-t2v-14b", **options)
    hint = r"\(denoising takes the most\).*the nearest that fits is num_frames=\d+"
    with pytest.raises(OutOfMemory, match=hint) as error:
        large.plan(size="832x480", num_frames=81)
    frames = int(str(error.value).rpartition("=")[2])
    assert large.plan(size="832x480", num_frames=frames).bytes_device <= 10.2 * GIB
    with pytest.raises(OutOfMemory):
        large.plan(size="832x480", num_frames=frames + 4)


@pytest.mark.parametrize(("size", "card"), [("1280x720", 8), ("1920x1080", 10), ("720x1280", 9)])
def test_the_size_that_is_named_fits_and_a_larger_one_does_not(size: str, card: int) -> None:
    plans = fastvid.blueprint("wan2.1-t2v-14b", device_memory=card * GIB)
    with pytest.raises(OutOfMemory, match=r"the nearest size that fits is \d+x\d+$") as error:
        plans.plan(size=size)
    near = str(error.value).rpartition(" ")[2]
    width, height = map(int, near.split("x"))
    asked = tuple(map(int, size.split("x")))
    assert abs(width / height / (asked[0] / asked[1]) - 1) < 0.1 and width < asked[0]
    assert plans.plan(size=near).bytes_device <= (card - 1) * GIB
    with pytest.raises(OutOfMemory):
        plans.plan(size=f"{int(width * 1.08)}x{int(height * 1.08)}")


def test_where_no_size_fits_that_is_said() -> None:
    plans = fastvid.blueprint("wan2.1-t2v-14b", device_memory=2 * GIB)
    with pytest.raises(OutOfMemory, match="no size of as many frames fits; ask for fewer, or take a smaller model$"):
        plans.plan(size="1280x720")
    with pytest.raises(OutOfMemory, match="no size fits; take a smaller model$"):
        plans.plan(size="1280x720", verb="image")


@pytest.mark.parametrize(
    ("verb", "says"), [("generate", "give image=$"), ("image", "image needs a T2V"), ("edit", "edit needs a T2V")]
)
def test_a_picture_model_asks_for_a_picture_where_one_can_be_given(verb: str, says: str) -> None:
    clip = {"video": np.zeros((5, 64, 64, 3), np.uint8)} if verb == "edit" else {}
    with pytest.raises(InvalidRequest, match=says):
        fastvid.blueprint("wan2.1-i2v-14b-480p").plan(prompt="a", verb=verb, **clip)


def test_a_plan_keeps_host_memory_apart() -> None:
    told = list(render.lines(fastvid.blueprint("wan2.1-t2v-14b", device_memory=24 * GIB).plan(), "a model"))
    start = next(i for i, line in enumerate(told) if line.startswith("device memory"))
    (host,) = (i for i, line in enumerate(told) if line.startswith("host memory"))
    assert host > start and "GiB of weights" in told[host]
    for line in told[start:host]:
        assert all(float(size) <= 23 for size in re.findall(r"([\d.]+) GiB", line)), line


def test_frames_that_end_within_a_latent_frame_need_the_whole_of_it() -> None:
    """5 + 1 to 5 + 4 frames are three latent frames: they need the same on the device."""
    plans = fastvid.blueprint("wan2.1-t2v-1.3b", device_memory=80 * GIB)
    needs = [plans.plan(num_frames=frames).bytes_activations for frames in (5, 6, 7, 8, 9, 10)]
    assert needs[0] < needs[1] == needs[2] == needs[3] == needs[4] < needs[5]


def test_the_log_says_what_was_chosen(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="fastvid.plan"):
        fastvid.blueprint("wan2.1-t2v-1.3b", device_memory=24 * GIB).plan(num_frames=17)
    load, plan = (record.getMessage() for record in caplog.records if record.name == "fastvid.plan")
    assert load.startswith("offload=none: the default request needs") and "of 23.0 GiB" in load
    assert plan.startswith("offload=none, decoded in 1 stripe") and "every part stays on the device" in plan


def test_weights_are_counted_by_part() -> None:
    counted = weigh_part("transformer", LARGE, torch.bfloat16)
    assert len(counted.blocks) == 40 and len(set(counted.blocks)) == 1
    block = 8 * 5120**2 + 2 * 5120 * 13824 + 8 * 5120 + 4 * 5120 + 13824 + 5120 * 2
    assert counted.blocks[0] == pytest.approx(2 * block, rel=1e-3)
    assert counted.total == pytest.approx(2 * 14.2885e9, rel=1e-2)
    assert weigh_part("image_encoder", CLIP_HUGE, torch.bfloat16).total == pytest.approx(4 * 0.632e9, rel=1e-2)
    assert weigh_part("text_encoder", UMT5_XXL, torch.bfloat16).total == pytest.approx(2 * 5.6809e9, rel=1e-3)
    assert weigh_part("vae", WanVAEConfig(), torch.bfloat16).total == pytest.approx(4 * 126.89e6, rel=1e-3)


# ---------------------------------------------------------------- formulas against operations


@pytest.mark.parametrize("kind", ["sample", "frame"])
@pytest.mark.parametrize(("heads", "ffn"), [(2, 700), (2, 2048), (4, 1100)])
@torch.no_grad()
def test_activations(heads: int, ffn: int, kind: str) -> None:
    config = WanTransformerConfig(
        num_attention_heads=heads, attention_head_dim=128, ffn_dim=ffn, num_layers=2, text_dim=64
    )
    model = WanTransformer(config).bfloat16().eval()
    for name, parameter in model.named_parameters():
        if set(WanTransformer.FP32_PARTS) & set(name.split(".")):
            parameter.data = parameter.data.float()
    x, tokens = torch.randn(1, 16, 4, 24, 24), 4 * 12 * 12
    timestep = torch.tensor([500.0]) if kind == "sample" else torch.tensor([[0.0, 500.0, 500.0, 500.0]])
    context = model.prepare_context(torch.randn(1, 7, 64))
    with LiveMemory() as seen:
        model(x, timestep, context)
    # Where GELU is part of a bf16 product, a wide feed-forward holds its hidden tensor once.
    assert 0.6 <= seen.peak / memory.activation_bytes(tokens, config, 2) <= 1.02


@torch.no_grad()
def test_context() -> None:
    config = WanTransformerConfig(num_attention_heads=2, ffn_dim=700, num_layers=3, text_dim=64)
    model = WanTransformer(config).eval()
    context = model.prepare_context(torch.randn(1, 7, 64))
    held = sum(tensor.nbytes for layer in context.layers for tensor in layer)
    assert held == memory.context_bytes(7, 1, 1, config, 4)


@torch.no_grad()
def test_text() -> None:
    config = UMT5Config(vocab_size=50, d_model=64, d_kv=16, d_ff=160, num_layers=2, num_heads=4)
    model = UMT5Encoder(config).eval()
    for rows in (16, 300):
        ids = torch.ones(1, rows, dtype=torch.long)
        with LiveMemory() as seen:
            model(ids, ids)
        assert 0.6 <= seen.peak / memory.text_bytes(rows, config, 4) <= 1.1, rows


@pytest.mark.parametrize(
    ("config", "on_cpu"),
    [
        (NARROW, False),
        pytest.param(NARROW, True, marks=pytest.mark.slow),
        pytest.param(NARROW_22, False, marks=pytest.mark.slow),
        pytest.param(NARROW_22, True, marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_vae(config: WanVAEConfig, on_cpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also as on a GPU: without the forms that are for CPUs."""
    if not on_cpu:
        monkeypatch.setattr(vae_ops, "channels_last", lambda *tensors: False)
    vae, side = build_vae(config).eval(), 4 * config.spatial_scale
    height = 32 * config.spatial_scale  # stripes are for large frames

    def peak(run: object, chunks: list[Tensor]) -> int:
        cache = None
        with LiveMemory() as seen:
            for chunk in chunks:
                _, cache = run(chunk, cache)  # type: ignore[operator]
        return seen.peak

    for stripes in (1, 2, 4):
        chunks = [torch.randn(1, config.z_dim, 1, 32, 8) for _ in range(3)]
        decoding = peak(lambda x, cache, n=stripes: vae.decode(x, cache, n, cache is not None), chunks)
        assert 0.8 <= decoding / memory.decoder_bytes(config, height, 2 * side, 4, stripes) <= 1.01, stripes
    if on_cpu:
        return
    frames = torch.randn(1, 3, 9, side, side)
    encoding = peak(vae.encode, [frames[:, :, :1], frames[:, :, 1:5], frames[:, :, 5:]]) + 2 * frames.nbytes
    assert 0.8 <= encoding / memory.encoder_bytes(config, side, side, 4, 9) <= 1


def _one_pass(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that makes nothing on the way, as where it is compiled."""

    def run(*given: Any) -> Any:
        with _disable_current_modes():
            return function(*given)

    return run


@pytest.mark.parametrize("config", [NARROW, pytest.param(NARROW_22, marks=pytest.mark.slow)])
@torch.no_grad()
def test_vae_by_libraries_in_chunks(config: WanVAEConfig) -> None:
    """What is planned, which is vae.py's, suffices: there is no copy of an activation with its past."""
    passes = vae_library.Pointwise(_one_pass(vae_library.norm_silu), _one_pass(vae_library.add))
    ops = {name: partial(function, pointwise=passes) for name, function in vae_library.OPERATIONS.items()}
    norm = _one_pass(vae_library.rms_norm)
    ops["vae_rms_norm"] = lambda x, gamma: torch.empty_like(x).copy_(norm(x, gamma))
    vae = build_vae(config, SimpleNamespace(**ops, to_rgb=rgb.reference)).eval().bfloat16()
    vae_gpu.channels_last(vae)
    height, width = 32 * config.spatial_scale, 8 * config.spatial_scale
    for latents, stripes in ((1, 1), (1, 4), (3, 1)):
        cache = None
        with LiveMemory() as seen:
            for _ in range(3):
                z = torch.randn(1, config.z_dim, latents, 32, 8)
                _, cache = vae.decode(z, cache, stripes, cache is not None)
        planned = memory.decoder_bytes(config, height, width, 4 * latents, stripes, itemsize=2)
        assert 0.6 <= seen.peak / planned <= 1, (latents, stripes)


@pytest.mark.parametrize("config", [NARROW, NARROW_22])
@torch.no_grad()
def test_cache(config: WanVAEConfig) -> None:
    scale = config.spatial_scale
    _, cache = build_vae(config).eval().decode(torch.randn(1, config.z_dim, 1, 3, 2))
    assert sum(tensor.nbytes for tensor in cache) == memory.cache_bytes(config, 3 * scale, 2 * scale)


@pytest.mark.parametrize("verb", ["extend", "loop"])
def test_a_clip_that_is_too_large_is_to_be_scaled(verb: str) -> None:
    """Verbs that add to a clip take no size, and num_frames is what they add."""
    plans = fastvid.blueprint("wan2.1-t2v-14b", device_memory=8 * GIB)
    clip = np.zeros((17, 720, 1280, 3), np.uint8)
    with pytest.raises(OutOfMemory, match=r"num_frames=\d+$|\d+x\d+; scale the clip to it$") as error:
        plans.plan("a", verb=verb, video=clip, num_frames=64)
    if match := re.search(r"num_frames=(\d+)$", str(error.value)):
        assert int(match[1]) < 64
        plans.plan("a", verb=verb, video=clip, num_frames=int(match[1]))
