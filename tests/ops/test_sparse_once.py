"""What kernels derive from block lists is made once for all calls with the same `Blocks`, and freed with them."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import make, random_blocks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastvid.ops import attention_gpu, sparse
from fastvid.ops.sparse import Blocks

pytest.importorskip("triton")
STEPS = (attention_gpu.exact_steps, attention_gpu.triton_steps, attention_gpu.padded_steps)


class Launches(TorchDispatchMode):
    """Counts the operations in a block, each of which would be at least a launch on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def cases(seed: int = 0) -> tuple[Tensor, Blocks]:
    return make((1, 300, 2, 64), torch.float16), random_blocks(([100, 200], [130, 20, 250]), 2, 0.6, seed)


def equal(made: list[Tensor], steps: Any, q: Tensor, blocks: Blocks) -> bool:
    """Whether they are the steps of these blocks; what no row holds is undefined."""
    fresh = steps(q, copy.copy(blocks))
    return all(
        torch.equal(made[at], fresh[at])
        and all(torch.equal(made[at + i][: int(made[at][-1])], fresh[at + i][: int(made[at][-1])]) for i in more)
        for at, more in ((0, (1,)), (2, (1, 2)))
    )


@pytest.mark.parametrize("steps", STEPS)
def test_the_same_blocks_are_cut_once(steps: Any) -> None:
    q, blocks = cases()
    with Launches() as first:
        made = steps(q, blocks)
    others = [make((1, 300, 2, 64), torch.float16, seed) for seed in range(3)]
    with Launches() as second:
        again = [steps(other, blocks) for other in others]
    assert first.count > 20 and second.count == 0
    assert all(a is b for one in again for a, b in zip(one, made, strict=True))


@pytest.mark.parametrize("steps", STEPS)
def test_changed_blocks_are_cut_anew(steps: Any) -> None:
    q, blocks = cases()
    made = steps(q, blocks)
    other = replace(blocks, indices=random_blocks(([100, 200], [130, 20, 250]), 2, 0.6, 0).indices)
    assert steps(q, other)[0] is not made[0] and steps(q, blocks)[0] is made[0]
    blocks.rows.copy_(torch.zeros_like(blocks.rows))  # written to in place: no tile has keys any more
    changed = steps(q, blocks)
    assert changed[0] is not made[0] and int(changed[0][-1]) == int(changed[2][-1]) == 0
    assert equal(changed, steps, q, blocks) and steps(q, blocks)[0] is changed[0]


def test_steps_of_different_sizes_do_not_mix() -> None:
    q, blocks = cases()
    exact, padded = attention_gpu.exact_steps(q, blocks), attention_gpu.padded_steps(q, blocks)
    assert equal(exact, attention_gpu.exact_steps, q, blocks) and equal(padded, attention_gpu.padded_steps, q, blocks)
    small = attention_gpu._schedule(q, blocks, 16)
    assert small[1].numel() > exact[1].numel() and attention_gpu.exact_steps(q, blocks)[1] is exact[1]


def test_they_are_freed_with_the_blocks() -> None:
    q, blocks = cases()
    made = weakref.ref(attention_gpu.exact_steps(q, blocks)[1])
    assert made() is not None
    del blocks
    gc.collect()
    assert made() is None


def test_copies_make_their_own() -> None:
    q, blocks = cases()
    made = attention_gpu.exact_steps(q, blocks)
    for copied in (copy.copy(blocks), copy.deepcopy(blocks), pickle.loads(pickle.dumps(blocks)), blocks.to("cpu")):
        assert copied.largest == blocks.largest
        assert all(torch.equal(a, b) for a, b in zip(copied.tensors, blocks.tensors, strict=True))
        assert attention_gpu.exact_steps(q, copied)[1] is not made[1]


class Stream:
    """What is asked of a stream."""

    def __init__(self) -> None:
        self.waited: list[object] = []

    def record_event(self) -> object:
        return object()

    def wait_event(self, event: object) -> None:
        self.waited.append(event)


def test_streams_wait_and_graphs_keep_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other, recording = Stream(), Stream(), False
    current = one
    monkeypatch.setattr(sparse, "_stream", lambda _: current)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: recording)
    _, blocks = cases()
    recording = True
    first, second = blocks.once("a", object), blocks.once("a", object)
    assert first is not second  # both lie in the memory of a graph
    recording = False
    kept = blocks.once("a", object)
    assert blocks.once("a", object) is kept and not one.waited
    current = other
    assert blocks.once("a", object) is kept and len(other.waited) == 1
    recording = True
    assert blocks.once("a", object) is kept and len(other.waited) == 1  # a graph may not wait for what is outside
    blocks.rows.add_(0)
    assert blocks.once("a", object) is not kept
