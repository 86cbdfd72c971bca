"""CUDA graphs of a model's calls: when they are captured, replayed, refused and let go of, with a stand-in that records
calls on the CPU; and on a GPU, that a replay gives what the call gives."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastvid
from fastvid.device import cuda_graphs
from fastvid.device.cuda_graphs import CudaCapture, Graphs
from fastvid.errors import BackendUnavailable, InvalidRequest
from fastvid.layers.kv_cache import KVCache
from fastvid.models.wan.config import WanTransformerConfig, WanVACEConfig
from fastvid.models.wan.transformer import WanTransformer
from fastvid.models.wan.vace import WanVACETransformer
from fastvid.pipeline import load
from fastvid.planning.memory import ModelFacts, Needs, whole_clip
from fastvid.requests.request import default_request

CONFIG = WanTransformerConfig(
    num_attention_heads=2, attention_head_dim=24, in_channels=6, out_channels=4, text_dim=8, ffn_dim=40, num_layers=2
)
CUDA = torch.device("cuda")  # naming it needs none
PROMPT = "a red circle moving right on a white background"
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Tape:
    """Records a call by keeping it, and plays it into the very same memory, as a graph would."""

    def __init__(self) -> None:
        self.captured = self.played = self.released = 0
        self._inside = threading.Lock()

    def capture(self, call: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        self.captured += 1
        made = torch.full_like(call(), torch.nan)

        def play() -> None:
            self.played += 1
            made.copy_(call())

        return play, made

    @contextmanager
    def alone(self) -> Iterator[None]:
        assert self._inside.acquire(blocking=False), "two calls at once in one set of buffers"
        yield
        self._inside.release()

    def release(self) -> None:
        self.released += 1


class Module:
    """Something with a method that a graph can be made of."""

    def __init__(self, factor: float = 2.0) -> None:
        self.factor, self.calls = factor, 0

    def run(self, x: Tensor, pair: tuple[Tensor | None, float] = (None, 0.0)) -> Tensor:
        self.calls += 1
        other, add = pair
        return x * self.factor + add if other is None else x * self.factor + other + add


@pytest.fixture
def tape() -> Tape:
    return Tape()


def made(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def given(seed: int, text: int = 7) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Tensor]]:
    return (made(seed, 1, 4, 3, 4, 4), torch.tensor([10.0 * seed]), made(seed + 1, 1, text, 8)), {
        "known": made(seed + 2, 1, 2, 3, 4, 4)
    }


def model(backend: Tape | CudaCapture | None = None) -> WanTransformer:
    torch.manual_seed(0)
    transformer = WanTransformer(CONFIG).eval().requires_grad_(False)
    transformer.run = Graphs(backend) if backend else transformer.run
    return transformer


# ---------------------------------------------------------------- when


@torch.no_grad()
def test_the_second_call_of_a_shape_is_captured_and_gives_what_the_call_gives(tape: Tape) -> None:
    plain, replayed = model(), model(tape)
    found = []
    for number in range(4):
        args, known = given(number)
        found.append((replayed(*args, **known), plain(*args, **known)))
        assert (tape.captured, tape.played) == (number > 0, number)
    assert all(torch.equal(a, b) for a, b in found), "results have memory of their own"
    assert not torch.equal(found[2][0], found[3][0])


@torch.no_grad()
def test_what_a_graph_depends_on(tape: Tape) -> None:
    module, run, x = Module(), Graphs(tape), made(0, 3)
    other = Module()  # another one of the same kind has other weights
    distinct = [
        (module.run, x),
        (module.run, made(0, 4)),
        (module.run, x.double()),
        (module.run, x, (None, 1.0)),
        (module.run, x, (made(1, 3), 1.0)),
        (other.run, x),
    ]
    for _ in range(3):
        for call in distinct:
            assert torch.equal(run(*call), call[0](*call[1:]))
    assert tape.captured == len(run) == len(distinct) and tape.played == 2 * len(distinct)


@torch.no_grad()
def test_texts_share_a_graph_and_are_copied_once_a_change(tape: Tape, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    copy = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, of: copied.append(len(of)) or copy(to, of))
    module, run, texts = Module(), Graphs(tape), [made(1, 3), made(2, 3)]
    for number in (0, 0, 0, 1, 1):
        x = made(9, 3)
        assert torch.equal(run(module.run, x, (texts[number], 0.0)), 2 * x + texts[number])
    assert tape.captured == 1 and copied == [2, 1, 2, 1], "x is new every time; capturing filled what the first needs"
    texts[1].add_(1)
    assert torch.equal(run(module.run, x, (texts[1], 0.0)), 2 * x + texts[1]) and copied[-1] == 1
    del texts[1]
    assert torch.equal(run(module.run, x, (made(3, 3), 0.0)), 2 * x + made(3, 3))


@torch.no_grad()
def test_strides_do_not_matter(tape: Tape) -> None:
    module, run = Module(), Graphs(tape)
    for number in range(3):
        x = made(number, 4, 3).T
        assert torch.equal(run(module.run, x), 2 * x)
    assert torch.equal(run(module.run, made(5, 3, 4)), 2 * made(5, 3, 4)) and len(run) == 1


@torch.no_grad()
def test_a_cache_stays_eager(tape: Tape) -> None:
    config = replace(CONFIG, in_channels=4)
    transformer = WanTransformer(config).eval()
    transformer.run = Graphs(tape)
    cache = KVCache(config.num_layers, 3)
    for frame in range(3):
        cache.begin(frame, 1)
        transformer(made(0, 1, 4, 1, 4, 4), torch.tensor([5.0]), made(1, 1, 7, 8), rope_offset=frame, cache=cache)
    assert len(transformer.run) == tape.captured == 0


@torch.no_grad()
def test_a_control_and_its_scales(tape: Tape) -> None:
    torch.manual_seed(0)
    config = WanVACEConfig(replace(CONFIG, in_channels=4), vace_layers=(0, 1), vace_in_channels=9)
    transformer = WanVACETransformer(config).eval()
    args, found = (made(0, 1, 4, 3, 4, 4), torch.tensor([5.0])), {}
    for scale in (1.0, 0.5):
        context = transformer.prepare_context(made(1, 1, 7, 8), control=made(2, 1, 9, 3, 4, 4), scales=scale)
        plain = transformer(*args, context)
        transformer.run, before = Graphs(tape), transformer.run
        found[scale] = [transformer(*args, context) for _ in range(3)]
        assert all(torch.equal(one, plain) for one in found[scale])
        transformer.run = before
    assert not torch.equal(found[1.0][2], found[0.5][2]) and tape.captured == 2


# ---------------------------------------------------------------- who, and until when


@torch.no_grad()
def test_threads_take_turns_with_the_buffers(tape: Tape) -> None:
    module, run = Module(), Graphs(tape)
    run(module.run, made(0, 50))

    def call(number: int) -> bool:
        x = made(number, 50)
        return torch.equal(run(module.run, x), 2 * x)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(call, range(200)))
    assert tape.captured == 1 and tape.played == 200


@torch.no_grad()
def test_the_least_recently_used_goes(tape: Tape) -> None:
    module, run = Module(), Graphs(tape, limit=2)
    for size in (1, 1, 2, 2, 1, 3, 3):  # 2 was used before 1
        run(module.run, made(0, size))
    assert (len(run), tape.captured, tape.released) == (2, 3, 1)
    run(module.run, made(0, 1))
    assert tape.captured == 3
    run(module.run, made(0, 2))
    assert (tape.captured, tape.released) == (4, 2), "a shape that is known is captured again at once"


@torch.no_grad()
def test_let_go_of(tape: Tape) -> None:
    module, run = Module(), Graphs(tape)
    run.free()
    assert tape.released == 0
    for _ in range(2):
        run(module.run, made(0, 3))
    run.free()
    assert len(run) == 0 and tape.released == 1
    module.factor = 3.0
    assert torch.equal(run(module.run, made(0, 3)), 3 * made(0, 3)) and tape.captured == 1, "begins anew"


@torch.no_grad()
def test_a_call_that_cannot_be_captured_says_so(tape: Tape, monkeypatch: pytest.MonkeyPatch) -> None:
    module, run = Module(), Graphs(tape)
    run(module.run, made(0, 3))
    with monkeypatch.context() as patch:
        patch.setattr(tape, "capture", lambda call: (_ for _ in ()).throw(RuntimeError("capture failed")))
        patch.setattr(tape, "alone", lambda: threading.Lock())
        with pytest.raises(RuntimeError, match="capture failed"):
            run(module.run, made(0, 3))
    assert len(run) == 0 and torch.equal(run(module.run, made(0, 3)), 2 * made(0, 3)) and len(run) == 1


# ---------------------------------------------------------------- a pipeline


@pytest.fixture
def pipe(tape: Tape) -> fastvid.Pipeline:
    loaded = fastvid.load("embedded", device="cpu")
    run = Graphs(tape)
    loaded._model = replace(loaded._model, placement=replace(loaded._model.placement, graphs=True))
    loaded._model.transformer.run = run
    return loaded


def test_a_request_is_the_same_and_new_loras_let_go(pipe: fastvid.Pipeline, tape: Tape) -> None:
    options = {"seed": 1, "num_frames": 5, "num_inference_steps": 3, "guidance_scale": 3.0}
    plain = fastvid.load("embedded", device="cpu").generate(PROMPT, **options)
    found = pipe.generate(PROMPT, **options)
    assert torch.equal(found.latents, plain.latents) and (found.frames == plain.frames).all()
    assert (tape.captured, tape.played) == (1, 5), "two calls a step, the first of them eager"
    pipe.set_loras([])
    assert len(pipe._model.transformer.run) == 0 and tape.released == 1


def test_a_plan_counts_what_graphs_keep(pipe: fastvid.Pipeline) -> None:
    plain = fastvid.load("embedded", device="cpu")
    assert pipe.plan(PROMPT).bytes_device > plain.plan(PROMPT).bytes_device
    facts = ModelFacts.of(plain._model)
    segment = whole_clip(default_request(plain._model.preset), facts.vae)
    cost, kept = (Needs(replace(facts, graphs=graphs), segment).cost() for graphs in (False, True))
    assert kept.graphs > kept.activations == cost.activations and cost.graphs == 0
    assert replace(kept, graphs=0) == cost


# ---------------------------------------------------------------- the choice


@pytest.mark.parametrize("asked", ["yes", 1, None, "True"])
def test_other_words_are_refused(asked: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"cuda_graphs=.* allowed is 'auto', True or False"):
        fastvid.load("embedded", device="cpu", cuda_graphs=asked)


def test_asked_for_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "load_experts", lambda *_: pytest.fail("weights were read before"))
    with pytest.raises(BackendUnavailable, match="cuda_graphs=True needs a CUDA device, not 'cpu'"):
        fastvid.load("embedded", device="cpu", cuda_graphs=True)


def test_left_to_itself_it_is_off_and_says_why() -> None:
    for asked, why in (("auto", "off: cpu"), (False, "off: asked for")):
        assert fastvid.load("embedded", device="cpu", cuda_graphs=asked).describe()["cuda_graphs"] == why
    assert cuda_graphs.choose("auto", CUDA, stays=True, caches=False) == (False, "off: no committed GPU result")


def test_asked_for_where_they_have_nothing_to_do() -> None:
    with pytest.raises(InvalidRequest, match="offload='none'"):
        cuda_graphs.choose(True, CUDA, stays=False, caches=False)
    with pytest.raises(InvalidRequest, match="KV cache"):
        cuda_graphs.choose(True, CUDA, stays=True, caches=True)
    with pytest.raises(InvalidRequest, match="ranks exchange tensors"):
        cuda_graphs.choose(True, CUDA, stays=True, caches=False, ranks=2)
    assert cuda_graphs.choose(True, CUDA, stays=True, caches=False) == (True, "on: asked for")


# ---------------------------------------------------------------- on a GPU


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_replay_is_the_call(dtype: torch.dtype) -> None:
    plain, replayed = (m.to(CUDA, dtype) for m in (model(), model(CudaCapture(CUDA))))
    for number in (0, 1, 2, 0, 3):
        args, known = given(number)
        args, known = [x.to(CUDA) for x in args], {"known": known["known"].to(CUDA)}
        assert torch.equal(replayed(*args, **known), plain(*args, **known))
    assert len(replayed.run) == 1
    replayed.run.free()
    assert torch.equal(replayed(*args, **known), plain(*args, **known))


@gpu
@pytest.mark.gpu
def test_requests_in_threads_with_graphs_are_what_they_are_without() -> None:
    plain, replayed = (fastvid.load("embedded", device="cuda", cuda_graphs=on) for on in (False, True))
    options = {"num_frames": 5, "num_inference_steps": 4, "guidance_scale": 3.0}
    wanted = [plain.generate(PROMPT, seed=seed, **options) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: replayed.generate(PROMPT, seed=seed, **options), range(4)))
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a.latents, b.latents) and (a.frames == b.frames).all()
    assert len(replayed._model.transformer.run) == 1 and replayed.describe()["cuda_graphs"] == "on: asked for"
