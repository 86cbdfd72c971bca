"""Parts of calls and double precision, for every operation that the embedded model calls."""

from __future__ import annotations

import json

import pytest
import torch
from interpreted import run_interpreted

from fastvid.models.loaded import LoadOptions
from fastvid.ops import dispatch, reference
from fastvid.tuning import calls as recorded
from fastvid.tuning import check, inputs, pieces
from fastvid.tuning.calls import Call, family_of, total, work
from fastvid.tuning.truth import truth
from fastvid.tuning.work import Subject, record

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def found() -> dict[str, Call]:
    """The smallest class of each operation."""
    options = LoadOptions(device="cpu"), LoadOptions(device="cpu", quantize="int8")
    calls = [call for one in options for call in record(Subject("embedded", (64, 64), 9), one)]
    return {call.op: call for call in sorted(calls, key=lambda call: work(call, CPU), reverse=True)}


OTHER_MODELS = {"layer_norm", "rms_norm_rope", "quantize_rows"}
OPERATIONS = sorted(set(dispatch.implementations()) - OTHER_MODELS)


def test_the_embedded_model_calls_all_operations(found: dict[str, Call]) -> None:
    assert sorted(found) == OPERATIONS


@pytest.mark.parametrize("op", OPERATIONS)
def test_a_call_survives_json(op: str, found: dict[str, Call]) -> None:
    assert recorded.from_json(json.loads(json.dumps(recorded.to_json(found[op])))) == found[op]


@pytest.mark.parametrize("op", OPERATIONS)
def test_parts_of_the_result_are_results_of_parts(op: str, found: dict[str, Call]) -> None:
    given = inputs.make(found[op], CPU)
    whole = check.run(op, getattr(reference, op), check.fresh(op, given))
    rows, kind = pieces.rows_of(op, given)
    assert rows > 1
    made = pieces.pieces(op, given)
    assert len(made) == 1 if kind == "tokens" else len(made) == 3
    for piece in made:
        part = check.run(op, getattr(reference, op), check.fresh(op, piece.given))
        for a, b in zip(piece.of(whole), part, strict=True):
            assert a.shape == b.shape
            assert check.error(a, b.double())[0] < 1e-6


@pytest.mark.parametrize("op", OPERATIONS)
def test_the_reference_is_near_double_precision(op: str, found: dict[str, Call]) -> None:
    given = inputs.make(found[op], CPU, seed=3)
    whole = check.run(op, getattr(reference, op), check.fresh(op, given))
    for out, exact in zip(whole, truth(op, given), strict=True):
        assert out.shape == exact.shape and out.is_floating_point() == (out.dtype not in (torch.uint8, torch.int8))
        # Pixels and codes may differ by one where float64 rounds to the other side.
        assert check.error(out, exact)[0] < {torch.uint8: 5e-3, torch.int8: 2e-2}.get(out.dtype, 2e-6)


@pytest.mark.parametrize("op", OPERATIONS)
def test_inputs_are_as_recorded_and_never_zeros(op: str, found: dict[str, Call]) -> None:
    made = inputs.make(found[op], CPU)
    for name, like in found[op].given.items():
        if isinstance(like, recorded.TensorLike):
            assert made[name].shape == like.shape and made[name].dtype == like.dtype
            assert name == "index" or made[name].count_nonzero() > 0.8 * made[name].numel() or name == "moves"
            if not op.startswith("vae_"):
                assert made[name].stride() == like.stride


def test_every_operation_is_in_a_family() -> None:
    listed = [op for ops in recorded.FAMILIES.values() for op in ops]
    assert sorted(listed) == sorted(dispatch.implementations())
    assert {family_of(op) for op in listed} == set(recorded.FAMILIES)


def test_a_step_of_a_large_model_is_mostly_attention_and_linears() -> None:
    calls = record(Subject("wan2.1-t2v-14b"), LoadOptions(device="cpu", dtype="bfloat16"))
    shares = {family: 0.0 for family in recorded.FAMILIES}
    for call in calls:
        shares[family_of(call.op)] += work(call, GPU) / total(calls, GPU)
    assert shares["attention"] > 0.6 and shares["linears"] > 0.15 and sum(shares.values()) == pytest.approx(1)
    attention = max((call for call in calls if call.op == "attention"), key=lambda call: work(call, GPU))
    assert attention.flops == pytest.approx(117.05e12, rel=0.001) and attention.count == 40 * 50 * 2


@pytest.mark.parametrize(
    "name",
    [
        *("wan2.1-i2v-14b-720p", "wan2.1-vace-1.3b", "wan2.2-ti2v-5b", "wan2.2-animate-14b"),
        "self-forcing-wan2.1-t2v-1.3b",
    ],
)
@pytest.mark.slow
def test_other_kinds_of_models_are_recorded(name: str) -> None:
    from fastvid.models.wan.variants import PUBLISHED

    known = name if name in PUBLISHED else next(one for one in PUBLISHED if "forcing" in one)
    assert len(record(Subject(known), LoadOptions(device="cpu", dtype="bfloat16"))) > 40


# ---------------------------------------------------------------- our kernels


@pytest.mark.slow
def test_our_triton_kernels_pass_the_checks() -> None:
    """So that a right kernel is not rejected on a GPU for what the checks ask of it."""
    run_interpreted(__file__, "one_triton_kernel")


@pytest.mark.interpret
@pytest.mark.parametrize("op", OPERATIONS)
def test_one_triton_kernel(op: str, found: dict[str, Call], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "REPEATS", 2)  # a tile takes a millisecond
    function, cases = dispatch.implementations()[op]["triton"], check.small_cases(found[op], CPU)
    for case in cases:
        check.check(op, function, case)
    check.check_other_values(op, function, cases[0])
    if op == "attention":
        check.check_empty_lists(function, cases[0].given)
