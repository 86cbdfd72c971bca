"""GPUs that are not here: by name, with what is published of them."""

from __future__ import annotations

import pytest
import torch

import fastvid
from fastvid.cli import render
from fastvid.distributed.cards import CARDS, card_named, check_card
from fastvid.distributed.cost_model import H200
from fastvid.distributed.links import device_of
from fastvid.errors import InvalidRequest
from fastvid.planning import speed

HALF = torch.bfloat16
TOKENS = 32_760


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("RTX 4090", "RTX 4090"),
        ("rtx4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti SUPER"),
        ("4060 ti 16gb", "RTX 4060 Ti 16GB"),
        ("a100-40GB", "A100 40GB"),
        ("AMD Instinct MI300X", "MI300X"),
        *((card.name.lower(), card.name) for card in CARDS),
    ],
)
def test_a_card_is_found_by_its_name(said: str, name: str) -> None:
    assert check_card("card", said).name == name


@pytest.mark.parametrize(("said", "near"), [("RTX 4990", "RTX 4090"), ("H220", "H200"), ("rtx 5091", "RTX 5090")])
def test_another_name_is_refused_with_the_nearest(said: str, near: str) -> None:
    with pytest.raises(InvalidRequest, match=f"the nearest is {near}"):
        fastvid.blueprint("wan2.1-t2v-1.3b", card=said)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti SUPER"),
        ("NVIDIA GeForce RTX 4070 Ti", "RTX 4070 Ti"),
        ("NVIDIA GeForce RTX 4060 Ti", "RTX 4060 Ti 8GB"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA T4", None),
        ("NVIDIA A10", None),
    ],
)
def test_what_torch_calls_a_device_is_a_card(device: str, name: str | None) -> None:
    found = card_named(device)
    assert (found and found.name) == name


def test_geforce_cards_sum_in_fp32_at_twice_the_speed_of_fp32() -> None:
    for card in CARDS:
        if card.name.startswith(("RTX 3", "RTX 40", "RTX 5")):
            assert card.bf16 == pytest.approx(2 * card.fp32, rel=0.01), card
        assert 8 <= card.memory <= 192 and 250 < card.bandwidth <= 8000


def test_an_h200_reaches_what_the_cost_model_says_of_it() -> None:
    assert device_of(check_card("card", "H200")) == H200
    rates = speed.assumed(check_card("card", "H200"), HALF, HALF)
    flops = 4.0 * TOKENS**2 * 1536
    assert rates.seconds("attention", flops) == pytest.approx(flops / H200.attention)
    assert rates.seconds("linear", 1.0) == H200.launch  # nothing is faster than the launch of a kernel


def test_fp32_is_slower_by_what_has_no_matrix_units() -> None:
    card = check_card("card", "RTX 4090")
    half, single = (speed.assumed(card, dtype, dtype) for dtype in (HALF, torch.float32))
    for kind in ("linear", "attention"):
        assert single.seconds(kind, 1e15) == pytest.approx(card.bf16 / card.fp32 * half.seconds(kind, 1e15))
    assert single.seconds("convolution", 1e15) > half.seconds("convolution", 1e15)


@pytest.mark.parametrize(
    ("name", "int8", "fp8"),
    [
        ("RTX 3090", 284.0, 71.2),
        ("RTX 4090", 660.6, 330.3),
        ("RTX 5090", 838.0, 419.0),
        ("RTX A6000", 309.7, 154.8),
        ("L40S", 733.0, 733.0),
        ("A100", 624.0, 312.0),
        ("H100", 1978.9, 1978.9),
        ("B200", 4500.0, 4500.0),
        ("MI300X", 2614.9, 1307.4),
    ],
)
def test_products_in_8_bits_are_as_fast_as_published(name: str, int8: float, fp8: float) -> None:
    """8-bit floats where fastvid multiplies them as such."""
    card = check_card("card", name)
    assert card.int8 == pytest.approx(int8, rel=0.02) and card.fp8 == pytest.approx(fp8, rel=0.02)
    plain = speed.assumed(card, HALF, HALF)
    for format, tops in (("int8", int8), ("fp8_e4m3", fp8)):
        rates = speed.assumed(card, HALF, HALF, format)
        assert (rates.layers, plain.layers) == ("eight", "linear")
        gain = plain.seconds("linear", 1e15) / rates.seconds("eight", 1e15)
        assert gain == pytest.approx(tops / card.bf16, rel=0.02)
        assert rates.seconds("attention", 1e15) == plain.seconds("attention", 1e15)


def test_a_plan_for_a_card_says_that_its_time_is_assumed() -> None:
    sizes = {"size": "832x480", "num_frames": 81}
    plans = {
        name: fastvid.blueprint("wan2.1-t2v-1.3b", card=name).plan(estimate=True, **sizes)
        for name in ("RTX 3090", "RTX 4090", "RTX 5090", "H200")
    }
    assert [plan.bytes_free // 2**30 for plan in plans.values()] == [23, 23, 31, 140]
    seconds = [plan.seconds for plan in plans.values()]
    assert seconds == sorted(seconds, reverse=True) and len(set(seconds)) == 4
    told = "\n".join(render.lines(plans["RTX 4090"], "a model"))
    assert "by rates assumed from the data sheet of RTX 4090, not measured" in told
    assert plans["H200"].to_dict()["rates"] == plans["H200"].rates


def test_what_cannot_be_estimated_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="no RTX 4090 is here to measure"):
        fastvid.blueprint("wan2.1-t2v-1.3b", card="4090").plan(estimate="again")
    known = fastvid.blueprint("wan2.1-t2v-1.3b", card="4090", device_memory=16 * 2**30)  # such as one that is in use
    plan = known.plan(size="832x480", num_frames=17, estimate=True)
    assert plan.bytes_free == 15 * 2**30 and plan.seconds


def test_ranks_are_laid_out_for_the_card_that_is_named() -> None:
    plan = fastvid.blueprint("wan2.1-t2v-14b", card="B200", parallel=8).plan(size="1280x720", num_frames=81)
    assert "are predicted on B200" in plan.parallel_why
