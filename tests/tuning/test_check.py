"""What is wrong with a back end is found, and what is right passes."""

from __future__ import annotations

import pytest
import torch
from fakes import CALLS, FAKES
from torch import Tensor

from fastvid.ops import attention, reference
from fastvid.tuning import check
from fastvid.tuning.calls import Call, TensorLike

CPU = torch.device("cpu")


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> TensorLike:
    return TensorLike(shape, torch.empty(shape, device="meta").stride(), dtype)


def norm(rows: int = 700, dtype: torch.dtype = torch.float32) -> Call:
    given = {"x": tensor(1, rows, 64, dtype=dtype), "weight": tensor(64, dtype=dtype), "eps": 1e-6}
    return Call("rms_norm", str(dtype)[6:], "d64", given, 10, 1e4, 1e5)


def cases(call: Call) -> list[check.Case]:
    return [*check.small_cases(call, CPU), check.whole_case(call, CPU)]


def why(name: str, dtype: torch.dtype = torch.float32) -> str:
    """What is wrong with a fake."""
    CALLS["number"] = 0
    with pytest.raises(check.Wrong) as raised:
        for case in cases(norm(dtype=dtype)):
            check.check("rms_norm", FAKES[name], case)
    return str(raised.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_reference_is_right(dtype: torch.dtype) -> None:
    for case in cases(norm(dtype=dtype)):
        check.check("rms_norm", reference.rms_norm, case)


def test_a_wrong_epsilon_is_found() -> None:
    assert "off double precision" in why("off")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_value_that_is_not_written_is_found(dtype: torch.dtype) -> None:
    assert "off double precision" in why("tail", dtype) or "NaN" in why("tail", dtype)


def test_a_wrong_row_that_no_sample_sees_is_found() -> None:
    assert "a part of the result" in why("middle")


def test_other_bits_in_some_calls_are_found() -> None:
    assert why("fickle") == "equal calls give other bits (call 10)"


def test_memory_that_every_call_keeps_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU's allocator would count it."""
    kept: list[Tensor] = []

    def leaking(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = reference.rms_norm(x, weight, eps)
        kept.append(out.clone())
        return out

    monkeypatch.setattr(check, "allocated", lambda device: sum(one.nbytes for one in kept))
    case = cases(norm())[0]
    check.check("rms_norm", reference.rms_norm, case)
    with pytest.raises(check.Wrong, match="each call keeps 35,072 bytes"):  # 137 x 64 of 4 bytes
        check.check("rms_norm", leaking, case)


def test_writing_into_the_input_is_found() -> None:
    assert why("scribbling") == "it writes into its input x"


def test_large_values_are_tried() -> None:
    assert "off double precision" in why("overflowing")


def test_another_form_of_the_result_is_found() -> None:
    case = cases(norm())[0]
    with pytest.raises(check.Wrong, match="its results are"):
        check.check("rms_norm", lambda x, weight, eps: reference.rms_norm(x, weight, eps).double(), case)


def test_what_stays_nan_is_found_in_poisoned_memory() -> None:
    """Memory that a kernel does not write is most likely NaN. (The allocator may give other memory.)"""
    size, found = 1 << 20, 0
    for _ in range(20):
        check.inputs.poison(size, CPU)
        found += bool(torch.empty(size // 4).isnan().any())
    assert found


def attend(name: str = "sdpa") -> Call:
    q, k = tensor(1, 160, 4, 64), tensor(1, 96, 4, 64)
    return Call("attention", "float32", name, {"q": q, "k": k, "v": k}, 1, 4 * 160 * 96 * 256, 1e5)


def test_attention_is_looked_at_in_some_heads_and_rows() -> None:
    made = cases(attend())
    for case in made:
        check.check("attention", attention.sdpa, case)
    assert made[-1].parts[0][0].given["q"].shape == (1, 64, 3, 64)


def test_a_head_that_no_sample_sees_is_found() -> None:
    def wrong(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attention.sdpa(q, k, v)
        assert isinstance(out, Tensor)
        out[:, :, 1] *= 1.01 if out.shape[2] > 3 else 1
        return out

    with pytest.raises(check.Wrong, match="a part of the result"):
        check.check("attention", wrong, cases(attend())[-1])


def test_queries_without_keys_get_nothing() -> None:
    given = check.inputs.make(attend(), CPU)
    check.check_empty_lists(attention.reference, given)

    def whole(q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool, blocks: object) -> object:
        return attention.reference(q, k, v, return_lse=return_lse)

    with pytest.raises(check.Wrong, match="queries without keys"):
        check.check_empty_lists(whole, given)


def test_rows_beyond_32_bits_are_made_where_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    call = norm()
    few = check.small_cases(call, CPU)[0].given
    assert check.far_offsets("rms_norm", few, CPU) is None  # not on a CPU
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 40, 1 << 40))
    monkeypatch.setattr(check, "OFFSETS", 100_000)
    far = check.far_offsets("rms_norm", few, torch.device("cuda"))
    assert far is not None and far["x"].numel() > 100_000

    def wrapped(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """What a 32-bit offset would do."""
        out = reference.rms_norm(x, weight, eps)
        return torch.cat((out[:, :1500], out[:, : x.shape[1] - 1500]), 1)

    case = check.case("rms_norm", "far", far, slices=True)
    check.check("rms_norm", reference.rms_norm, case)
    with pytest.raises(check.Wrong):
        check.check("rms_norm", wrapped, case)


@pytest.mark.parametrize(
    ("a", "b", "whole", "worst"),
    [
        ([1.0, 1.0], [1.0, 1.0], 0, 0),
        ([3.0, 5.0], [3.0, 4.0], 0.2, 1 / 12.5**0.5),
        ([float("inf"), 1.0], [float("inf"), 1.0], 0, 0),
        ([float("nan"), 1.0], [1.0, 1.0], float("inf"), float("inf")),
        ([float("inf"), 1.0], [1.0, 1.0], float("inf"), float("inf")),
    ],
)
def test_errors(a: list[float], b: list[float], whole: float, worst: float) -> None:
    found = check.error(torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64))
    assert found == pytest.approx((whole, worst), abs=1e-30)
