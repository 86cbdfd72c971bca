"""Sparse attention of every kind of model: with tokens in tile order it is masked attention over tokens as they lie."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch import Tensor

import fastvid
from fastvid.distributed.mesh import Layout, Mesh, RankView
from fastvid.engine.events import Frames
from fastvid.engine.sparsity import SegmentSparsity, Settings, tile_of
from fastvid.layers.levers import CallLevers
from fastvid.models.registry import build_transformer, read_transformer
from fastvid.ops import attention, reference, sparse

GRID, KEEP = (3, 4, 6), 0.4
PLAIN: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4}
PLAIN |= {"text_dim": 20, "ffn_dim": 80, "num_layers": 3}
FACE = {"motion_encoder_size": 32, "motion_encoder_channel_sizes": {"32": 6, "16": 8, "8": 10, "4": 12}}
FACE |= {"motion_style_dim": 20, "motion_dim": 5, "motion_encoder_dim": 18, "face_encoder_hidden_dim": 28}
FACE |= {"face_encoder_num_heads": 2, "inject_face_latents_blocks": 2}
KINDS: dict[str, dict[str, Any]] = {
    "t2v": PLAIN,
    "vace": {**PLAIN, "vace_layers": [0, 2], "vace_in_channels": 9},
    "fun": {**PLAIN, "add_ref_conv": True, "in_dim_ref_conv": 4},
    "animate": {
        **PLAIN,
        **FACE,
        "in_channels": 12,
        "image_dim": None,
        "num_layers": 4,
        "_class_name": "WanAnimateTransformer3DModel",
    },
    "skyreels": {**PLAIN, "inject_sample_info": True},
}


def masked(frames: int, tile: tuple[int, int], dense: int = 0) -> Any:
    """Operations whose self-attention takes tokens as they lie, and masks those of tiles that are not chosen. dense: of
    the first calls."""
    grid, box = (frames, *GRID[1:]), (1, *tile)
    order, tiles = sparse.tile_order(grid, box), sparse.tile_offsets(grid, box)
    calls = [0]

    def attend(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Tensor:
        if q.shape[1] != len(order) or k.shape[1] != len(order):
            return attention.reference(q, k, v)
        calls[0] += 1
        if calls[0] <= dense:
            return attention.reference(q, k, v)
        count = max(1, round(KEEP * (len(tiles) - 1)))
        chosen = sparse.top_k(q[:, order], k[:, order], tiles, math.prod(tile), count)
        mask, back = sparse.token_mask(chosen), order.argsort()
        mask = mask[:, back][:, :, back].unflatten(0, (q.shape[0], q.shape[2]))
        q, k, v = (x.transpose(1, 2).double() for x in (q, k, v))
        weights = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf).softmax(-1)
        return (weights @ v).transpose(1, 2)

    names = (name for name in dir(reference) if not name.startswith("_"))
    return SimpleNamespace(**{name: getattr(reference, name) for name in names} | {"attention": attend})


def model_of(kind: str, ops: Any) -> Any:
    torch.manual_seed(1)
    model = build_transformer(read_transformer(KINDS[kind]), ops).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.1)
    for block in model.blocks:
        block.attn1.norm_q.weight.data.fill_(4.0)
        block.attn1.norm_k.weight.data.fill_(1.0)
    return model.double()


def called(kind: str, model: Any, levers: CallLevers | None, view: RankView | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    t, h, w = GRID[0], 2 * GRID[1], 2 * GRID[2]

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    latents, text = draw(2, KINDS[kind]["in_channels"], t, h, w), draw(2, 7, 20)
    times = torch.rand((2, t), generator=generator, dtype=torch.float64) * 1000
    more: dict[str, Any] = {
        "vace": {"control": draw(2, 9, t - 1, h, w)},
        "fun": {"reference": draw(2, 4, h, w)},
        "animate": {"pose": draw(2, 4, t - 1, h, w), "face": draw(2, 3, 5, 32, 32)},
    }.get(kind, {})
    with torch.no_grad():
        return model(latents, times, model.prepare_context(text, **more), levers=levers, view=view)


def levers_of(**changed: Any) -> CallLevers:
    settings = Settings(**{"keep": KEEP, "dense_steps": 0.0, "dense_layers": 0} | changed)
    return CallLevers(None, SegmentSparsity(settings, np.array([1.0])))


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_attention_with_a_mask(kind: str) -> None:
    frames, tile = GRID[0] + (kind == "fun"), tile_of(GRID[1:])
    made = called(kind, model_of(kind, reference), levers_of())
    wanted = called(kind, model_of(kind, masked(frames, tile)), None)
    dense = called(kind, model_of(kind, reference), None)
    assert (made - wanted).norm() < 1e-5 * wanted.norm() < 1e-2 * (dense - wanted).norm()


def test_first_layers_may_be_dense() -> None:
    made = called("t2v", model_of("t2v", reference), levers_of(dense_layers=2))
    wanted = called("t2v", model_of("t2v", masked(GRID[0], tile_of(GRID[1:]), dense=2)), None)
    assert (made - wanted).norm() < 1e-5 * wanted.norm()


def on_ranks(mesh: Mesh) -> None:
    for kind in ("t2v", "fun", "animate"):
        model, view = model_of(kind, reference), RankView(mesh, Layout(ulysses=mesh.size))
        alone, shared = called(kind, model, levers_of()), called(kind, model, levers_of(), view)
        assert (alone - shared).norm() < 1e-5 * alone.norm(), kind


@pytest.mark.slow
def test_two_ranks_share_it() -> None:
    run_ranks(2, on_ranks)


@pytest.mark.parametrize("frame", [(1, 1), (4, 4), (6, 10), (15, 26), (30, 52), (45, 80), (68, 120)])
def test_tiles_are_as_large_as_kernels_like_and_not_too_few(frame: tuple[int, int]) -> None:
    h, w = tile_of(frame)
    tiles, tokens = math.prod(sparse.tile_counts((1, *frame), (1, h, w))), frame[0] * frame[1]
    assert 1 <= h <= frame[0] and 1 <= w <= frame[1] and h * w <= 1.5 * 128
    assert tiles >= min(12, tokens) and (tokens < 16 * 128 or h * w >= 64)


# Requests

SHORT: dict[str, Any] = {"num_frames": 9, "num_inference_steps": 4, "seed": 5}
PROMPT = "a red circle moving right on a white background"


@pytest.fixture(scope="module")
def pipe() -> fastvid.Pipeline:
    return fastvid.load("embedded", device="cpu", attention="sparse:keep=0.5,dense_steps=0.5")


def test_requests_and_recipes(pipe: fastvid.Pipeline) -> None:
    made = pipe.generate(PROMPT, **SHORT)
    assert (
        made.recipe["attention"] == "sparse:keep=0.5,dense_steps=0.5" and made.recipe["settings"]["attention"] == "auto"
    )
    plain = fastvid.load("embedded", device="cpu")
    again = plain.generate(PROMPT, attention=made.recipe["attention"], **SHORT)
    dense = plain.generate(PROMPT, **SHORT)
    assert np.array_equal(again.frames, made.frames) and not np.array_equal(made.frames, dense.frames)
    off = pipe.generate(PROMPT, attention="dense", **SHORT)
    assert np.array_equal(off.frames, dense.frames) and off.recipe["attention"] == "dense"


def test_plans_say_what_is_kept(pipe: fastvid.Pipeline) -> None:
    plan = pipe.plan(PROMPT, **SHORT)
    assert plan.levers["attention"] == "self-attention to 50% of the tiles; the first 2 of 4 steps are dense"
    dense = pipe.plan(PROMPT, attention="dense", **SHORT)
    text = dense.flops_attention * pipe._model.tokenizer.text_length / (pipe._model.tokenizer.text_length + plan.tokens)
    assert plan.flops_attention == pytest.approx(text + 0.75 * (dense.flops_attention - text), rel=0.02)


def test_a_resumed_request_is_the_same(pipe: fastvid.Pipeline, tmp_path: Any) -> None:
    wanted, path = pipe.generate(PROMPT, **SHORT).frames, tmp_path / "job.ckpt"
    stream = pipe.stream(PROMPT, checkpoint=path, checkpoint_every=0, **SHORT)
    for event in stream:
        if getattr(event, "step", 0) == 3:
            break
    stream.close()
    events = list(pipe.resume(path))
    frames = [event.frames for event in events if isinstance(event, Frames)]
    assert np.array_equal(np.concatenate(frames), wanted)
