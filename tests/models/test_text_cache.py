"""Embeddings of prompts that come again: the same bytes without the text encoder, within bounds, on every thread."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

import fastvid
from fastvid.models.text_cache import TextCache

RED, BLUE = "a red circle moving right on a white background", "a blue square growing on a black background"


def rows(seed: int, count: int = 4) -> torch.Tensor:
    return torch.randn(1, count, 8, generator=torch.Generator().manual_seed(seed))


def never() -> torch.Tensor:
    raise AssertionError("the encoder was asked")


def test_the_least_recently_used_leave_first() -> None:
    cache = TextCache(limit=2 * rows(0).nbytes)
    for number in (1, 2, 1, 3):
        cache.get((number,), lambda number=number: rows(number))
    assert torch.equal(cache.get((1,), never), rows(1)) and torch.equal(cache.get((3,), never), rows(3))
    assert cache.to_dict() == {"entries": 2, "bytes": cache.limit, "limit": cache.limit, "hits": 3, "misses": 3}
    with pytest.raises(AssertionError):
        cache.get((2,), never)


def test_what_is_larger_than_the_limit_is_not_kept() -> None:
    cache = TextCache(limit=rows(0).nbytes - 1)
    cache.get((1,), lambda: rows(1))
    assert cache.to_dict()["entries"] == cache.to_dict()["bytes"] == 0


def test_entries_are_the_caches_own() -> None:
    cache, made = TextCache(), rows(1)
    cache.get((1,), lambda: made)
    made.zero_()
    assert torch.equal(cache.get((1,), never), rows(1))


def test_threads_share_it() -> None:
    cache, wrong = TextCache(limit=3 * rows(0).nbytes), list[int]()

    def ask(seed: int) -> None:
        for number in np.random.default_rng(seed).integers(0, 6, 300):
            if not torch.equal(cache.get((int(number),), lambda number=number: rows(int(number))), rows(int(number))):
                wrong.append(int(number))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    about = cache.to_dict()
    assert not wrong and about["bytes"] == about["entries"] * rows(0).nbytes <= cache.limit
    assert about["hits"] + about["misses"] == 1200


def test_frames_are_the_same_with_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, plain = fastvid.load("embedded", device="cpu"), fastvid.load("embedded", device="cpu", text_cache=0)
    options = {"num_inference_steps": 2, "num_frames": 5, "seed": 1, "negative_prompt": BLUE}
    expected, first = plain.generate(RED, **options), kept.generate(RED, **options)
    again = plain.generate(RED, **options)
    monkeypatch.setattr(kept._model.modules.encoders, "use", never)
    second = kept.generate("  a red circle\nmoving right on a white background ", **options)
    assert all(np.array_equal(expected.frames, video.frames) for video in (first, again, second))
    assert kept.describe()["text_cache"]["entries"] == 2 and plain.describe()["text_cache"]["entries"] == 0
    assert torch.equal(kept.embed(RED), plain.embed(RED))
    kept.embed(RED).zero_()
    assert torch.equal(kept.embed(RED), plain.embed(RED))


def test_a_pipeline_has_its_own() -> None:
    one, other = (fastvid.load("embedded", device="cpu", dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert one.embed(RED).dtype == torch.float32 and other.embed(RED).dtype == torch.bfloat16
    assert other.describe()["text_cache"]["misses"] == 1
