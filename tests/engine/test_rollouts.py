"""Causal rollouts of whole pipelines against explicit ones that keep nothing: for every call of the model attention to
the whole video so far under a dense mask; and, where prompts change, against one that writes down each frame's keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

import fastvid
from fastvid.engine import windows
from fastvid.engine.events import Finished, Frames, Step
from fastvid.models.preset import Preset, Rollout
from fastvid.models.wan import presets
from fastvid.models.wan.transformer import WanTransformer
from fastvid.ops import reference
from fastvid.sampling.guidance import combine
from fastvid.sampling.noise import latent_noise
from fastvid.sampling.sigmas import find_solver, make_sigmas

HEIGHT, WIDTH, TOKENS = 64, 96, 24  # TOKENS: of a latent frame
SIZE = {"height": HEIGHT, "width": WIDTH}
PROMPT, NEGATIVE = "a red circle moving right", "blue square"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    tiny.write_checkpoint(path, num_layers=3)  # so that keys show what other frames' keys were made of
    return path


def load(folder, dtype: str = "float32") -> fastvid.Pipeline:
    """With frames that look at each other and at their text: random weights hardly do."""
    pipe = fastvid.load(str(folder), device="cpu", dtype=dtype)
    for block in pipe._model.transformer.blocks:
        for attention in (block.attn1, block.attn2):
            attention.norm_q.weight.data *= 4
            attention.to_out[0].weight.data *= 20
    return pipe


@pytest.fixture(scope="module")
def plain(folder):
    return load(folder)


def with_preset(pipe: fastvid.Pipeline, recipe: Preset, **changes: Any) -> fastvid.Pipeline:
    """The pipeline as if it were of another kind, of this checkpoint's sizes."""
    made = replace(recipe, spatial_multiple=16, temporal=4, **changes)
    return fastvid.Pipeline(replace(pipe._model, preset=made))


def picture() -> np.ndarray:
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack((x * 2, y * 3, 255 - x - y), -1).astype(np.uint8)


def clip(count: int) -> np.ndarray:
    return np.stack([np.roll(picture(), 3 * i, 1) for i in range(count)])


def transformer(pipe: fastvid.Pipeline, attention: Callable[..., Tensor]) -> WanTransformer:
    """The pipeline's weights with plain operations and this self-attention."""
    own = pipe._model.transformer

    def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return (attention if q.shape[1] == k.shape[1] else reference.attention)(q, k, v)

    net = WanTransformer(own.config, SimpleNamespace(**{**vars(reference), "attention": attend}))
    net.load_state_dict(own.state_dict())
    for new, old in zip(net.parameters(), own.parameters(), strict=True):
        new.data = new.data.to(old.dtype)
    return net.eval().requires_grad_(False)


# ---------------------------------------------------------------- the explicit rollout


def blocks_of(columns: int, size: int, alone: int = 0) -> list[tuple[int, int]]:
    """(start, stop): the known ones, which are a block of `size` at most or one of one, then all others."""
    first = [(0, alone)] if alone else []
    return first + [(start, start + size) for start in range(alone, columns, size)]


def visible(blocks: Sequence[tuple[int, int]], window: int | None, sink: int) -> Tensor:
    """bool [frames, frames]: the video's first `sink` frames, and so many with one's own block as are left."""
    see = torch.zeros(blocks[-1][1], blocks[-1][1], dtype=torch.bool)
    for start, stop in blocks:
        for other in range(stop):
            recent = window is None or stop <= window or other >= stop - (window - sink)
            see[start:stop, other] = recent or other < sink
    return see


@dataclass
class Dense:
    """The network over the whole sequence [clean past at 0 | block at its level], under a block-causal mask."""

    pipe: fastvid.Pipeline
    see: Tensor

    def __post_init__(self) -> None:
        self.net = transformer(self.pipe, self.attention)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        frames = q.shape[1] // TOKENS
        mask = self.see[:frames, :frames].repeat_interleave(TOKENS, 0).repeat_interleave(TOKENS, 1)
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * q.shape[-1] ** -0.5
        return torch.einsum("bhnm,bmhd->bnhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)

    def __call__(self, past: Tensor, x: Tensor, told: Tensor, text: Tensor, context: float) -> Tensor:
        start = past.shape[2]
        times = torch.cat((torch.full((1, start), context, dtype=torch.float64), told[None]), dim=1)
        return self.net(torch.cat((past, x), dim=2), times, text)[:, :, start:]


@torch.no_grad()
def explicit(
    pipe: fastvid.Pipeline,
    blocks: Sequence[tuple[int, int]],
    *,
    known: Tensor | None = None,
    scale: float = 1.0,
    seed: int = 0,
    origin: int = 0,
) -> Tensor:
    """Clean latents [1, 16, T, h, w] of a rollout over these blocks."""
    recipe = pipe._model.preset
    rollout, solver = recipe.rollout, find_solver(recipe.solver)
    sigmas = recipe.sigmas or make_sigmas(recipe.num_inference_steps, recipe.flow_shift, recipe.solver).tolist()
    dense = Dense(pipe, visible(blocks, rollout.window, rollout.sink))
    texts = [pipe.embed(PROMPT), pipe.embed(NEGATIVE)]
    done = torch.zeros(1, 16, 0, HEIGHT // 8, WIDTH // 8)
    count = 0 if known is None else known.shape[2]
    for start, stop in blocks:
        if stop <= count:
            done = known[:, :, :stop]
            continue
        free = torch.arange(start, stop) >= count
        shape = (16, stop - start, HEIGHT // 8, WIDTH // 8)
        x, state = latent_noise(seed, shape, start=origin + start), solver.init()
        for step, sigma in enumerate(sigmas):
            if not bool(free.all()):
                x[:, :, ~free] = known[:, :, start:]
            told = 1000 * sigma
            told = int(told) if recipe.solver == "unipc" else round(told) if recipe.whole_timesteps else told
            v = [dense(done, x, told * free.double(), text, rollout.context_noise) for text in texts]
            x0 = x - sigma * free.view(1, 1, -1, 1, 1) * combine(v[0], v[1], scale)
            after = [*sigmas, 0.0][step + 1]
            if recipe.solver == "unipc":
                x, state = solver.step(x, x0, sigma * free.double(), after * free.double(), state)
            else:
                noise = latent_noise(seed, shape, start=origin + start, draw=step + 1)
                x = (1 - after) * x0 + after * noise if after else x0
        done = torch.cat((done, x), dim=2)
    return done


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


SELF_FORCING, CAUSVID, LONGLIVE, LONGLIVE_2 = (
    presets.SELF_FORCING,
    presets.CAUSVID,
    presets.LONGLIVE,
    presets.LONGLIVE_2,
)
SMALL = Rollout(frames_per_block=2, window=5, sink=1, recache=True)
# A recipe, what of it is changed, how it is asked, the columns that come out of it, and those that are known alone.
CASES: dict[str, tuple[Preset, dict[str, Any], dict[str, Any], int, int]] = {
    "self-forcing": (SELF_FORCING, {}, {"num_frames": 21}, 6, 0),
    "a part of a block": (SELF_FORCING, {}, {"num_frames": 18}, 6, 0),
    "one frame": (SELF_FORCING, {}, {"num_frames": 1}, 3, 0),
    "framewise": (presets.CAUSAL_FORCING_FRAMEWISE, {}, {"num_frames": 13}, 4, 0),
    "causvid": (CAUSVID, {}, {"num_frames": 21}, 6, 0),
    "guided": (SELF_FORCING, {}, {"num_frames": 21, "guidance_scale": 2.5, "negative_prompt": NEGATIVE}, 6, 0),
    "context noise": (SELF_FORCING, {"rollout": Rollout(context_noise=100)}, {"num_frames": 21}, 6, 0),
    "a picture": (SELF_FORCING, {}, {"num_frames": 25, "image": picture()}, 7, 1),
    "longlive": (LONGLIVE, {}, {"num_frames": 57}, 15, 0),
    "longlive, short": (LONGLIVE, {}, {"num_frames": 9}, 3, 0),
    "sink and window": (LONGLIVE, {"rollout": SMALL}, {"num_frames": 37}, 10, 0),
    "sink, window and a picture": (LONGLIVE, {"rollout": SMALL}, {"num_frames": 37, "image": picture()}, 11, 1),
    "longlive 2": (
        LONGLIVE_2,
        {"rollout": Rollout(frames_per_block=4, window=8, sink=2, picture_in_block=True)},
        {"num_frames": 45},
        12,
        0,
    ),
    "longlive 2, a picture": (
        LONGLIVE_2,
        {"rollout": Rollout(frames_per_block=4, window=8, sink=2, picture_in_block=True)},
        {"num_frames": 29, "image": picture()},
        8,
        0,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_pipeline_is_the_explicit_rollout(plain, case):
    recipe, changes, options, columns, alone = CASES[case]
    pipe = with_preset(plain, recipe, **changes)
    blocks = blocks_of(columns, pipe._model.preset.rollout.frames_per_block, alone)
    known = pipe.encode(picture()[None]) if "image" in options else None
    wanted = explicit(pipe, blocks, known=known, scale=options.get("guidance_scale", 1.0), seed=11)
    assert wanted.shape[2] == columns
    video = pipe.generate(PROMPT, seed=11, **SIZE, **options)
    shown = video.latents.shape[2]
    assert len(video.frames) == options["num_frames"] and shown == (options["num_frames"] + 2) // 4 + 1
    assert error(video.latents, wanted[:, :, :shown]) < 1e-5
    frames = pipe.decode(wanted)[: options["num_frames"]]
    difference = np.abs(video.frames.astype(int) - frames)
    assert (difference <= 1).mean() >= 0.999 and frames.std() > 5
    # Not so for a model that sees every frame, nor for one that sees none of those before.
    if case == "sink and window":
        wide = with_preset(plain, recipe, rollout=Rollout(frames_per_block=2))
        assert error(video.latents, explicit(wide, blocks, seed=11)[:, :, :shown]) > 1e-3


def test_a_clip_goes_on_from_its_last_frames(plain):
    """The last nine are three latents in the cache; noise of what is new begins at index 0."""
    pipe, frames = with_preset(plain, SELF_FORCING), clip(20)
    events = list(pipe.stream(PROMPT, verb="extend", video=frames, num_frames=14, seed=3))
    wanted = explicit(pipe, blocks_of(9, 3, 3), known=pipe.encode(frames[-9:]), seed=3, origin=-3)
    out = np.concatenate([event.frames for event in events if isinstance(event, Frames)])
    latents = events[-1].latents
    assert error(latents, wanted[:, :, 3 : 3 + latents.shape[2]]) < 1e-5
    assert len(out) == 34 and np.array_equal(out[:20], frames)
    decoded = pipe.decode(wanted).astype(float)
    lost = frames[-1] - decoded[8]  # given back to the next four frames, less and less (`KnownFrameBlend`)
    back = np.array([0.8, 0.6, 0.4, 0.2] + 10 * [0])[:, None, None, None] * lost
    difference = np.abs(out[20:] - (decoded[9:23] + back).clip(0, 255))
    assert (difference <= 1.5).mean() >= 0.999
    assert sum(isinstance(event, Step) for event in events) == events[0].total_steps == 1 + 2 * 5


# ---------------------------------------------------------------- few steps


@pytest.mark.parametrize("recipe", [presets.FASTWAN_1_3B, presets.FASTWAN_5B], ids=lambda recipe: recipe.name)
@torch.no_grad()
def test_few_steps_are_a_plain_loop(plain, recipe):
    """FastVideo's DmdDenoisingStage: 1000, 757, 522 are told, levels are the table's nearest."""
    pipe, told = with_preset(plain, recipe), []
    video, shape = pipe.generate(PROMPT, num_frames=17, seed=5, **SIZE), (16, 5, HEIGHT // 8, WIDTH // 8)
    net, text = transformer(plain, reference.attention), pipe.embed(PROMPT)
    x, levels = latent_noise(5, shape), [1.0, 0.7567567567567568, 0.5217391304347826, 0.0]
    for step, time in enumerate([1000.0, 757.0, 522.0]):
        x0 = x - levels[step] * net(x, torch.tensor([time]), text)
        x = (1 - levels[step + 1]) * x0 + levels[step + 1] * latent_noise(5, shape, draw=step + 1)
        told.append(time)
    assert error(video.latents, x) < 1e-5
    difference = np.abs(video.frames.astype(int) - pipe.decode(x))
    assert (difference <= 1).mean() >= 0.999
    assert pipe.plan(PROMPT, num_frames=17, **SIZE).model_calls == 3


# ---------------------------------------------------------------- another prompt


class Notebook:
    """A rollout that writes down the keys and values of every frame, and looks up those that it is told to."""

    def __init__(self, pipe: fastvid.Pipeline) -> None:
        self.net, self.rollout = transformer(pipe, self.attention), pipe._model.preset.rollout
        self.notes: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def attention(self, q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        keys, values = k.split(TOKENS, dim=1), v.split(TOKENS, dim=1)
        new = {frame: (keys[i], values[i]) for i, frame in enumerate(self.frames)}
        for frame, pair in new.items():
            self.fresh[frame].append(pair)
        layer = len(self.fresh[self.frames[0]]) - 1
        seen = [new[frame] if frame in new else self.notes[frame][layer] for frame in self.sees]
        return reference.attention(q, torch.cat([k for k, _ in seen], 1), torch.cat([v for _, v in seen], 1))

    def call(self, x: Tensor, start: int, told: float, text: Tensor) -> Tensor:
        stop = start + x.shape[2]
        window, sink = self.rollout.window, self.rollout.sink
        self.frames = list(range(start, stop))
        recent = range(0 if window is None or stop <= window else stop - (window - sink), stop)
        self.sees = sorted({*range(min(sink, stop)), *recent})
        self.fresh: dict[int, list[tuple[Tensor, Tensor]]] = {frame: [] for frame in self.frames}
        return self.net(x, torch.full((1, len(self.frames)), told), text, rope_offset=start)

    def write(self, x: Tensor, start: int, text: Tensor) -> None:
        self.call(x, start, 0.0, text)
        self.notes |= self.fresh

    def again(self, clean: Tensor, text: Tensor) -> None:
        """What is in LongLive's cache once more, all at once; not the sink, unless nothing has gone yet."""
        stop, window = clean.shape[2], self.rollout.window
        start = 0 if stop <= window else stop - (window - self.rollout.sink)
        self.write(clean[:, :, start:], start, text)


@torch.no_grad()
def switched(pipe, prompts: dict[int, str], columns: int, scale: float, seed: int) -> Tensor:
    """Clean latents of a rollout whose prompt changes at these columns."""
    recipe, notes, other = pipe._model.preset, Notebook(pipe), Notebook(pipe)
    size, negative = recipe.rollout.frames_per_block, pipe.embed(NEGATIVE)
    clean = torch.zeros(1, 16, 0, HEIGHT // 8, WIDTH // 8)
    for start in range(0, columns, size):
        if start in prompts:
            text = pipe.embed(prompts[start])
            if start and recipe.rollout.recache:
                notes.again(clean, text)
        shape = (16, size, HEIGHT // 8, WIDTH // 8)
        x = latent_noise(seed, shape, start=start)
        for step, (sigma, after) in enumerate(zip(recipe.sigmas, (*recipe.sigmas[1:], 0.0), strict=True)):
            v = notes.call(x, start, 1000 * sigma, text)
            if scale != 1:
                v = combine(v, other.call(x, start, 1000 * sigma, negative), scale)
            x = (1 - after) * (x - sigma * v) + after * latent_noise(seed, shape, start=start, draw=step + 1)
        notes.write(x, start, text)
        if scale != 1:
            other.write(x, start, negative)
        clean = torch.cat((clean, x), dim=2)
    return clean


# 26 frames are 7 columns: the last prompt waits for the block that begins at 8.
SHOTS = [("a red circle", 1.0), ("a blue square moving left", 10 / 16), ("white on red", 19 / 16)]
AT = {0: SHOTS[0][0], 4: SHOTS[1][0], 8: SHOTS[2][0]}


@pytest.mark.parametrize("recache", [True, False])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_another_prompt(plain, recache, scale):
    pipe = with_preset(plain, LONGLIVE, rollout=replace(SMALL, recache=recache))
    options = {"guidance_scale": scale, "negative_prompt": NEGATIVE, "seed": 2, **SIZE}
    calls, events = [], []
    hook = plain._model.transformer.register_forward_hook(lambda *_: calls.append(1))
    for event in pipe.stream(verb="storyboard", shots=SHOTS, **options):
        events.append(event)
    hook.remove()
    wanted = switched(pipe, AT, 12, scale, 2)
    assert error(events[-1].latents, wanted) < 1e-5
    unlike = with_preset(plain, LONGLIVE, rollout=replace(SMALL, recache=not recache))
    assert error(events[-1].latents, switched(unlike, AT, 12, scale, 2)) > 1e-3
    assert sum(isinstance(event, Step) for event in events) == events[0].total_steps == 6 * 5 + 2 * recache
    assert len(calls) == events[0].plan.model_calls == 6 * 5 * (1 + (scale != 1)) + 2 * recache


def test_without_a_window_all_frames_are_passed_again(plain):
    pipe = with_preset(plain, LONGLIVE, rollout=Rollout(frames_per_block=2, recache=True))
    shots = [("a red circle", 9 / 16), ("a blue square", 1.0)]
    video = pipe.storyboard(shots, seed=4, **SIZE)
    full = replace(pipe._model.preset, rollout=Rollout(frames_per_block=2, window=8, recache=True))
    held = with_preset(plain, full)
    assert error(video.latents, switched(held, {0: shots[0][0], 4: shots[1][0]}, 8, 1.0, 4)[:, :, :7]) < 1e-5


@pytest.mark.parametrize("shots", [[("a", 1.0), ("b", 0.1), ("c", 1.0)], [("a", 1.0), ("b", 0.1)]])
def test_a_prompt_without_a_block_is_refused(plain, shots):
    with pytest.raises(fastvid.InvalidRequest, match="12 frames"):
        with_preset(plain, SELF_FORCING).plan(verb="storyboard", shots=shots, **SIZE)


# ---------------------------------------------------------------- while it runs


def test_frames_come_out_after_their_block(plain):
    pipe = with_preset(plain, SELF_FORCING)
    events = list(pipe.stream(PROMPT, num_frames=33, seed=0, **SIZE))
    kinds = [type(event) for event in events if isinstance(event, Step | Frames)]
    steps = [kinds[:i].count(Step) for i, kind in enumerate(kinds) if kind is Frames]
    # Four steps a block and one for the cache; its frames are out before that.
    assert sorted(set(steps)) == [4, 9, 14]
    counts = {at: sum(len(e.frames) for e, n in _with_steps(events) if n == at) for at in set(steps)}
    assert counts == {4: 9, 9: 12, 14: 12}
    picture_first = list(pipe.stream(PROMPT, image=picture(), num_frames=13, seed=0, **SIZE))
    assert [n for _, n in _with_steps(picture_first)][0] == 1  # the picture, after its own pass
    assert isinstance(events[-1], Finished)


def _with_steps(events: Sequence[Any]) -> list[tuple[Frames, int]]:
    """Frames events, and how many steps were done before."""
    found, steps = [], 0
    for event in events:
        steps += isinstance(event, Step)
        if isinstance(event, Frames):
            found.append((event, steps))
    return found


def recorded(monkeypatch) -> list[Any]:
    """The caches that are made from now on."""
    made: list[Any] = []

    class Recorded(windows.KVCache):
        def __init__(self, layers: int, capacity: int, sink: int = 0) -> None:
            super().__init__(layers, capacity, sink)
            if layers:
                made.append(self)

    monkeypatch.setattr(windows, "KVCache", Recorded)
    return made


def buffers(caches: Sequence[Any]) -> list[Tensor]:
    return [b for cache in caches for layer in cache.layers for b in (layer._keys, layer._values) if b is not None]


@pytest.mark.parametrize("num_frames", [37, 77])
def test_the_cache_does_not_grow(plain, monkeypatch, num_frames):
    made, pipe, seen = recorded(monkeypatch), with_preset(plain, LONGLIVE, rollout=SMALL), []
    config = pipe._model.transformer.config
    for event in pipe.stream(PROMPT, num_frames=num_frames, seed=0, **SIZE):
        if isinstance(event, Step):
            seen.append(sorted((b.data_ptr(), b.nbytes) for b in buffers(made)))
    assert len(made) == 1 and all(at == seen[0] for at in seen)
    assert sum(size for _, size in seen[0]) == 2 * config.num_layers * 5 * TOKENS * config.dim * 4


def test_a_cache_in_bf16(folder, monkeypatch):
    """As far from fp32 as the same network without a cache is."""
    half, made = load(folder, "bfloat16"), recorded(monkeypatch)
    pipe, blocks = with_preset(half, SELF_FORCING), blocks_of(6, 3)
    video = pipe.generate(PROMPT, num_frames=21, seed=1, **SIZE)
    assert {b.dtype for b in buffers(made)} == {torch.bfloat16} and video.latents.dtype == torch.float32
    dense = explicit(pipe, blocks, seed=1)
    half._model.transformer.float()
    half._model.text_encoder.float()
    exact = explicit(
        with_preset(
            fastvid.Pipeline(replace(half._model, placement=replace(half._model.placement, dtype=torch.float32))),
            SELF_FORCING,
        ),
        blocks,
        seed=1,
    )
    assert 0 < error(video.latents, exact) <= 2 * error(dense, exact) < 0.5
