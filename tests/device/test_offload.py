"""Weights that visit the device: the order of copies and computing, how much is there at once, the same bytes out with
every way of offloading, requests that interleave, LoRAs. On the CPU, where a visit is a copy; and marked gpu, the same
on a GPU."""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import fastvid
from fastvid.device import offload
from fastvid.device.offload import MODES, Prefetcher, Swapped, weigh
from fastvid.errors import InvalidRequest
from fastvid.models.wan.config import WanVACEConfig
from fastvid.models.wan.vace import WanVACETransformer

SMALL: dict[str, Any] = {"height": 64, "width": 64, "num_frames": 5, "num_inference_steps": 3, "seed": 3}


class Recorder:
    """A lane that only notes: a copy is made when something waits for it, as late as a real one may be."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.pending: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.marks = itertools.count(1)

    def copy(self, pairs: Any, after: int) -> int:
        mark = next(self.marks)
        self.pending[mark] = list(pairs)
        self.events.append(("copy", mark, {target.untyped_storage().data_ptr() for target, _ in pairs}, after))
        return mark

    def wait(self, mark: int) -> None:
        for target, source in self.pending.pop(mark, ()):
            target.copy_(source)
        self.events.append(("wait", mark))

    def mark(self) -> int:
        mark = next(self.marks)
        self.events.append(("mark", mark))
        return mark


def pair(inner: int) -> nn.Module:
    return nn.Sequential(nn.Linear(8, inner), nn.Linear(inner, 8))


class Stack(nn.Module):
    """Blocks of growing size, walked one after the other."""

    STREAMED = ("blocks",)

    def __init__(self, count: int = 5) -> None:
        super().__init__()
        self.walk: Any = iter
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList([pair(8 + 3 * i) for i in range(count)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.walk(self.blocks):
            x = block(x)
        return x


def stack(count: int = 5) -> Stack:
    torch.manual_seed(0)
    return Stack(count).requires_grad_(False)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_walk_copies_ahead_and_never_over_what_is_computed_from(count: int) -> None:
    module, lane, x = stack(count), Recorder(), torch.randn(3, 8)
    wanted, computed = module(x), []
    turns = Swapped([module], "cpu", stream=True, linger=True, lane=lane)
    for number, block in enumerate(module.blocks):
        block.register_forward_pre_hook(lambda *_, n=number: lane.events.append(("compute", n)))
        block.register_forward_hook(lambda *_, n=number: computed.append(n))
    for _ in range(2):
        lane.events.clear()
        with turns.use(0) as there:
            assert torch.equal(there(x), wanted)
    assert computed == [*range(count)] * 2
    events = [event for event in lane.events if event[0] != "mark"]
    # Block n is copied before block n - 1 is computed, waited for before its own turn; no copy runs further ahead.
    turn = ["copy", "wait", "compute"]
    order = ["copy", *turn * (count - 1), *turn[1:]]
    assert [event[0] for event in events] == order
    copies = [event for event in events if event[0] == "copy"]
    assert [event[1] for event in events if event[0] == "wait"] == [event[1] for event in copies]
    assert len({place for copy in copies for place in copy[2]}) == min(count, offload.SLOTS)
    # The buffer that block n goes into was block n - 2's: its copy waits for a mark set after that one was computed.
    for n in range(2, count):
        mark, at = lane.events.index(("mark", copies[n][3])), lane.events.index(copies[n])
        assert copies[n][2] == copies[n - 2][2]
        assert lane.events.index(("compute", n - 2)) < mark < at


def test_the_recorder_finds_a_missing_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = stack(), torch.randn(3, 8)
    wanted, lane = module(x), Recorder()
    turns = Swapped([module], "cpu", stream=True, lane=lane)
    monkeypatch.setattr(lane, "wait", lambda mark: None)
    with turns.use(0) as there:
        assert not torch.equal(there(x), wanted)


def test_two_buffers_are_all_there_is_of_blocks() -> None:
    module = stack()
    sizes = weigh(module)
    turns = Swapped([module], "cpu", stream=True, linger=True)
    assert turns.prefetcher.capacity == sizes.buffer and sizes.total == sum(p.nbytes for p in module.parameters())
    homes = [p.data_ptr() for p in module.parameters()]
    with turns.use(0) as there:
        for number, block in enumerate(there.walk(there.blocks)):
            away = [n for n, other in enumerate(there.blocks) if other[0].weight.data_ptr() not in homes]
            assert away == [number] and there.first.weight.data_ptr() not in homes
            assert block is there.blocks[number]
    assert sum(b.nbytes for b in turns.prefetcher._buffers) == sizes.streamed - sizes.rest


def test_what_visits_is_freed_and_comes_home_unchanged() -> None:
    module = stack()
    before = {name: p.clone() for name, p in module.named_parameters()}
    turns = Swapped([module], "cpu")
    with turns.use(0) as there:
        copy = weakref.ref(there.first.weight.untyped_storage())
        inside = there.first.weight.data_ptr()
    gc.collect()
    assert copy() is None and module.first.weight.data_ptr() != inside
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


@pytest.mark.parametrize("linger", [True, False])
def test_a_walk_that_fails_leaves_nothing_behind(linger: bool) -> None:
    """Also while its traceback, and so its iterator, is still held by somebody."""
    module, lane, x = stack(), Recorder(), torch.randn(3, 8)
    wanted = module(x)
    turns = Swapped([module], "cpu", stream=True, linger=linger, lane=lane)
    hook = module.blocks[2].register_forward_pre_hook(lambda *_: 1 / 0)
    held = []
    for _ in range(2):
        try:
            with turns.use(0) as there:
                held.append(there.walk(there.blocks))
                next(held[-1])
                there(x)
        except ZeroDivisionError as error:
            held.append(error)
        assert all(p.data_ptr() == h.data_ptr() for p, h in turns.prefetcher.homes.items())
    hook.remove()
    assert not lane.pending, "a copy is under way that nothing waits for"
    with turns.use(0) as there:
        assert torch.equal(there(x), wanted)
        with pytest.raises(RuntimeError, match="another one had started"):
            next(held[0])
    with turns.use(0) as there:
        assert torch.equal(there(x), wanted)


@pytest.mark.parametrize("stream", [True, False])
def test_one_at_a_time_is_there(stream: bool) -> None:
    """The other goes first, so that the two are never there together; asked for again, the same one stays."""
    modules = [stack(), stack()]
    turns = Swapped(modules, "cpu", stream=stream, linger=True)
    homes = [module.first.weight.data_ptr() for module in modules]
    seen = []
    for number in (0, 0, 1, 1, 0):
        with turns.use(number) as there:
            assert there is modules[number]
            away = [module.first.weight.data_ptr() != home for module, home in zip(modules, homes, strict=True)]
            assert away == [number == 0, number == 1]
            seen.append(there.first.weight.data_ptr())
    assert seen[0] == seen[1] and seen[2] == seen[3]


def test_threads_take_turns() -> None:
    modules, x = [stack(), stack(3)], torch.randn(3, 8)
    wanted = [module(x) for module in modules]
    turns, wrong = Swapped(modules, "cpu", stream=True, linger=True), []

    def ask(number: int) -> None:
        for i in range(20):
            with turns.use((number + i) % 2) as there:
                if not torch.equal(there(x), wanted[(number + i) % 2]):
                    wrong.append((number, i))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_weights_exchanged_at_home_are_those_that_visit() -> None:
    module, x = stack(), torch.randn(3, 8)
    turns = Swapped([module], "cpu", stream=True, linger=True)
    with turns.use(0) as there:
        there(x)
    with turns.change():
        for part in (module.first, module.blocks[1][0]):
            part.load_state_dict({"weight": part.weight * 2, "bias": part.bias}, assign=True)
        wanted = module.blocks[1][0].weight.clone(), Stack.forward
    with turns.use(0) as there:
        found = there(x)
    plain = stack()
    plain.first.weight.data.mul_(2)
    plain.blocks[1][0].weight.data.mul_(2)
    assert torch.equal(found, plain(x)) and torch.equal(module.blocks[1][0].weight, wanted[0])
    assert len(turns.prefetcher.homes) == len(list(module.parameters()))


def test_a_weight_is_packed_into_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "RUN", 1000)
    module, x = stack(), torch.randn(3, 8)
    wanted = module(x)
    turns = Swapped([module], "cpu")
    assert torch.equal(module(x), wanted)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in module.parameters()}
    assert len(storages) > 3 and max(storages.values()) < 2000
    assert all(p.data_ptr() % offload.ALIGNMENT == 0 for p in module.parameters())
    del turns


def test_an_empty_walk() -> None:
    assert list(Prefetcher(torch.device("cpu"))([])) == []


@torch.no_grad()
def test_vace_streams_both_stacks() -> None:
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4, "text_dim": 20}
    config = {**sizes, "ffn_dim": 80, "num_layers": 4, "vace_layers": [0, 2], "vace_in_channels": 9}
    module = WanVACETransformer(WanVACEConfig.from_dict(config)).eval()
    given = torch.randn(1, 4, 2, 4, 4), torch.tensor([500.0])
    text, control = torch.randn(1, 7, 20), torch.randn(1, 9, 2, 4, 4)

    def run() -> Tensor:
        return module(*given, module.prepare_context(text, control=control))

    wanted, walked = run(), []
    turns = Swapped([module], "cpu", stream=True, linger=True)
    for block in (*module.blocks, *module.vace_blocks):
        block.register_forward_pre_hook(lambda *_, b=block: walked.append(b))
    with turns.use(0):
        assert torch.equal(run(), wanted)
    main, vace = module.blocks, module.vace_blocks
    assert walked == [main[0], vace[0], main[1], main[2], vace[1], main[3]]


# ---------------------------------------------------------------- pipelines


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("two")
    tiny.write_checkpoint(path, boundary_ratio=0.7)
    return path


@pytest.fixture(scope="module")
def pipes(folder: Path) -> dict[str, fastvid.Pipeline]:
    return {mode: fastvid.load(str(folder), device="cpu", offload=mode) for mode in MODES}


def test_every_way_makes_the_same_bytes(pipes: dict[str, fastvid.Pipeline]) -> None:
    videos = [pipe.generate("a red circle", **SMALL) for pipe in pipes.values()]
    assert all(torch.equal(video.latents, videos[0].latents) for video in videos)
    assert all(np.array_equal(video.frames, videos[0].frames) for video in videos)
    assert videos[0].recipe == videos[2].recipe, "where weights lie is no part of what makes a video"


def test_the_encoders_weights_go_home(pipes: dict[str, fastvid.Pipeline]) -> None:
    for mode in ("text", "blocks"):
        parts = pipes[mode]._model
        homes = {n: p.data_ptr() for n, p in parts.text_encoder.named_parameters()}
        pipes[mode].embed("a")
        assert {n: p.data_ptr() for n, p in parts.text_encoder.named_parameters()} == homes


@pytest.mark.parametrize("mode", ["text", "blocks"])
def test_interleaved_requests_equal_each_alone(pipes: dict[str, fastvid.Pipeline], mode: str) -> None:
    prompts = ("a red circle", "blue")
    alone = [pipes["none"].generate(prompt, **SMALL).latents for prompt in prompts]
    streams = [pipes[mode].stream(prompt, **SMALL) for prompt in prompts]
    next(streams[0])
    next(streams[0])  # a step ahead of the other, so that they are at different experts at times
    ends = [None, None]
    for _ in range(20):
        for i, stream in enumerate(streams):
            ends[i] = next(stream, ends[i])
    assert all(torch.equal(end.latents, wanted) for end, wanted in zip(ends, alone, strict=True))


def test_loras_reach_streamed_blocks(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    stem = "diffusion_model.blocks.1.self_attn.q"
    file = tmp_path / "a.safetensors"
    save_file({f"{stem}.lora_up.weight": torch.randn(48, 3), f"{stem}.lora_down.weight": torch.randn(3, 48)}, file)
    ours, plain = (fastvid.load(str(folder), device="cpu", offload=mode) for mode in ("blocks", "none"))
    base = plain.generate("a", **SMALL).latents
    made = []
    for pipe in (ours, plain):
        pipe.generate("a", **SMALL)
        pipe.set_loras([(file, 0.5)])
        made.append(pipe.generate("a", **SMALL).latents)
        pipe.set_loras()
        assert torch.equal(pipe.generate("a", **SMALL).latents, base)
    assert torch.equal(*made) and not torch.equal(made[0], base)


def test_the_plan_says_how(pipes: dict[str, fastvid.Pipeline]) -> None:
    plans = {mode: pipe.plan("a", **SMALL) for mode, pipe in pipes.items()}
    assert {mode: plan.offload for mode, plan in plans.items()} == {mode: mode for mode in MODES}
    assert plans["none"].bytes_host == 0 and plans["none"].choices == ("every part stays on the device",)
    assert plans["none"].bytes_device > plans["none"].bytes_weights > plans["text"].bytes_host > 0
    assert plans["none"].bytes_device > plans["text"].bytes_device
    # Two buffers for two blocks save nothing, and each starts on a boundary of its own.
    assert plans["blocks"].bytes_device == pytest.approx(plans["text"].bytes_device, rel=0.01)
    said = plans["blocks"].choices
    assert "of 2 experts only the one in use takes memory of the device" in said
    assert "transformer blocks are streamed from host memory: 2 of 2 on the device at a time" in said
    assert plans["blocks"].to_dict()["choices"] == list(said)
    assert pipes["blocks"].describe()["offload"] == "blocks"


def test_auto_on_a_cpu_is_none(folder: Path) -> None:
    assert fastvid.load(str(folder), device="cpu").describe()["offload"] == "none"


@pytest.mark.parametrize(("given", "near"), [("block", "; the nearest is blocks"), ("cpu", ""), (True, ""), ("", "")])
def test_other_words_are_refused(given: Any, near: str) -> None:
    with pytest.raises(InvalidRequest, match=f"offload={given!r}: allowed is one of auto, none, text, blocks{near}"):
        fastvid.load("embedded", offload=given)


# ---------------------------------------------------------------- a real GPU


@pytest.mark.gpu
def test_host_memory_is_pinned() -> None:
    memory = offload.host_memory(1 << 20, pin=True)
    assert memory.is_pinned()
    address = memory.data_ptr()
    del memory
    gc.collect()
    again = offload.host_memory(1 << 20, pin=True)  # would fail if the pages were still locked
    assert again.is_pinned() and address


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["text", "blocks"])
def test_every_way_makes_the_same_bytes_on_a_gpu(folder: Path, mode: str) -> None:
    given = {**SMALL, "num_inference_steps": 6}
    wanted = fastvid.load(str(folder), device="cuda", offload="none").generate("a red circle", **given)
    pipe = fastvid.load(str(folder), device="cuda", offload=mode)
    for _ in range(3):
        assert torch.equal(pipe.generate("a red circle", **given).latents, wanted.latents)


@pytest.mark.gpu
def test_large_blocks_stream_right_and_within_two_buffers() -> None:
    """Copies that take longer than computing, and the other way round: only the order of events keeps them right."""
    torch.manual_seed(0)
    module, staying = Stack(0), Stack(0)
    for made in (module, staying):
        made.blocks = nn.ModuleList([pair(2**18) for _ in range(12)])
        made.requires_grad_(False)
    staying.load_state_dict(module.state_dict())
    sizes, staying = weigh(module), staying.cuda()
    for rows in (1, 2048):
        x = torch.randn(rows, 8, device="cuda")
        wanted = staying(x)
        turns = Swapped([module], "cuda", stream=True)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(5):
            with turns.use(0) as there:
                assert torch.equal(there(x), wanted)
        activations = 2 * rows * 2**18 * 4 + 2**24
        assert torch.cuda.max_memory_allocated() - before < sizes.streamed + activations
        assert torch.cuda.memory_allocated() == before
