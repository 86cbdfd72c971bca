"""bind: a back end asked for by name works or raises, auto takes only what is verified, and Ops is a plain value."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastvid.errors import BackendUnavailable, InvalidRequest
from fastvid.ops import attention, choices, dispatch, libraries, reference, rgb, shapes, sources, sparse, tuned

FRAMES = torch.rand(3, 5, 4, 4)
OWN = libraries.default("attention", torch.device("cpu"))[0]
CLASS = shapes.shape_class("to_rgb", (FRAMES,), {})


def row(**changes: Any) -> dict[str, Any]:
    """A row that lets `auto` take the Triton to_rgb for frames of one class."""
    fitting = {"op": "to_rgb", "dtype": "float32", "shape_class": CLASS, "backend": "triton", "machine": "cpu"}
    measured = {"median_us": 10.0, "next": "reference", "next_us": 15.0, "result": "benchmarks/results/rgb.json"}
    source = dispatch.source_hash("triton", "rgb.py")
    return {**fitting, "file": "rgb.py", "source": source, **measured, **changes}


def test_auto_binds_the_reference_where_nothing_is_verified() -> None:
    bound = dispatch.bind()
    libraries = {"linear_quantized", "quantize_rows", "quantized_norm"}
    assert {bound.bound[op] for op in bound.bound if op not in libraries | {"attention"}} == {"reference"}
    assert bound.bound["attention"] == OWN and bound.to_rgb is rgb.reference
    assert {bound.bound[op] for op in libraries} == {"library"}
    assert bound.reasons["to_rgb"] == "cpu"


def test_every_function_of_the_reference_is_an_operation() -> None:
    bound = dispatch.bind(backend="reference")
    assert bound.rms_norm is reference.rms_norm and bound.attention is reference.attention
    assert set(bound.functions) == set(bound.bound) == set(bound.reasons) == set(dispatch.implementations())
    assert not [name for name in bound.functions if name.startswith("_")]


def test_ops_is_a_frozen_value() -> None:
    bound = dispatch.bind()
    assert pickle.loads(pickle.dumps(bound)) == bound and copy.deepcopy(bound) == bound
    assert copy.deepcopy(bound).rms_norm is reference.rms_norm
    with pytest.raises(dataclasses.FrozenInstanceError):
        bound.to_rgb = rgb.triton
    with pytest.raises(AttributeError):
        _ = bound.no_such_operation


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        ({"backend": "tritn"}, "the nearest is triton"),
        ({"attention": "spda"}, "the nearest is sdpa"),
        ({"backend": "to_rbg=triton"}, "the nearest is to_rgb"),
        ({"backend": "to_rgb=sdpa"}, "the nearest is (cuda|reference|triton)"),
        ({"backend": ""}, "nearest"),
        ({"backend": "to_rgb=triton,to_rgb=reference"}, "each operation once"),
        ({"backend": 3}, "backend=3: allowed is one of auto"),
        ({"backend": None}, "backend=None: allowed is one of auto"),
        ({"device": "gpu"}, "'cpu', 'cuda'"),
        ({"device": None}, "'cpu', 'cuda'"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(arguments: dict[str, str], nearest: str) -> None:
    with pytest.raises(InvalidRequest, match=nearest):
        dispatch.bind(**arguments)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"backend": "triton"}, r"it needs a CUDA device, and the device is cpu \(.*rms_norm"),
        ({"backend": "cuda"}, r"there is no cuda back end \(.*rms_norm"),
        ({"attention": "flash"}, r"the package flash-attn is not installed \(attention\)"),
        ({"backend": "to_rgb=triton"}, r"it needs a CUDA device, and the device is cpu \(to_rgb\)"),
        ({"backend": "to_rgb=cuda"}, r"it needs a CUDA device|_C was not built"),
    ],
)
def test_a_named_back_end_never_falls_back(arguments: dict[str, str], why: str) -> None:
    with pytest.raises(BackendUnavailable, match=why):
        dispatch.bind(**arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has one")
def test_a_device_that_is_not_there() -> None:
    with pytest.raises(BackendUnavailable, match="no CUDA device is found; 'cpu' always runs"):
        dispatch.bind(device="cuda:0")


def test_one_operation_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "why_not", lambda backend, device: None)
    bound = dispatch.bind(backend="to_rgb=triton, rms_norm=reference", attention="reference")
    assert bound.to_rgb is rgb.triton
    assert {bound.reasons[op] for op in ("to_rgb", "rms_norm", "attention")} == {"asked for"}
    assert bound.reasons["layer_norm"] == "cpu"


def counting(monkeypatch: pytest.MonkeyPatch, name: str = "triton") -> list[torch.Size]:
    """Makes a back end of to_rgb available here, and counts its calls."""
    called: list[torch.Size] = []
    monkeypatch.setattr(dispatch, "why_not", lambda backend, device: None)
    monkeypatch.setitem(rgb.BACKENDS, name, lambda frames: called.append(frames.shape) or rgb.reference(frames))
    return called


def test_auto_takes_a_kernel_for_the_class_that_it_was_measured_in(monkeypatch: pytest.MonkeyPatch) -> None:
    called = counting(monkeypatch)
    bound = dispatch.bind(verified=[row()])
    assert bound.bound["to_rgb"] == "triton for 1 shape class, else reference"
    assert bound.reasons["to_rgb"] == "1.50 x the next best in benchmarks/results/rgb.json"
    assert torch.equal(bound.to_rgb(FRAMES), rgb.reference(FRAMES)) and called == [FRAMES.shape]
    large = torch.rand(3, 5, 16, 16)
    assert torch.equal(bound.to_rgb(large), rgb.reference(large)) and len(called) == 1
    half = FRAMES.half()
    assert torch.equal(bound.to_rgb(half), rgb.reference(half)) and len(called) == 1  # another dtype


def test_choices_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    counting(monkeypatch)
    bound = dispatch.bind(verified=[row(), row(dtype="float16", next="", next_us=None)])
    half, single = bound.choices["to_rgb"]
    assert (single.backend, single.gain, single.next_best) == ("triton", 1.5, "reference")
    assert (half.dtype, half.gain, half.next_best) == ("float16", None, None)
    assert set(bound.choices) == {"to_rgb"}


def test_libraries_that_are_fastest_everywhere_are_told_as_such() -> None:
    source = dispatch.source_hash("reference", "")
    bound = dispatch.bind(verified=[row(backend="reference", file="", source=source, next="compiled")])
    assert bound.bound["to_rgb"] == "reference" and bound.to_rgb is rgb.reference
    assert bound.reasons["to_rgb"].startswith("1.50 x the next best") and len(bound.choices["to_rgb"]) == 1


def test_of_two_rows_for_a_class_the_first_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Committed results come before the user's table; a row whose source has changed is skipped."""
    first = counting(monkeypatch, "triton")
    second = counting(monkeypatch, "other")
    source = dispatch.source_hash("other", "")
    other = row(backend="other", file="", source=source)
    bound = dispatch.bind(verified=[row(), other])
    bound.to_rgb(FRAMES)
    assert (len(first), len(second)) == (1, 0)
    bound = dispatch.bind(verified=[row(source="0"), other])
    bound.to_rgb(FRAMES)
    assert (len(first), len(second)) == (1, 1)


def test_a_kernel_that_is_right_for_dense_attention_runs_no_other_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "why_not", lambda backend, device: None)
    monkeypatch.setitem(attention.BACKENDS, "triton", lambda q, k, v, **options: q)
    source = dispatch.source_hash("triton", "attention.py")
    q, k, v = torch.randn(3, 1, 4, 2, 8).unbind(0)
    dense = shapes.shape_class("attention", (q, k, v), {})
    verified = row(op="attention", shape_class=dense, file="attention.py", source=source)
    bound = dispatch.bind(verified=[verified])
    assert bound.bound["attention"] == f"triton for 1 shape class, else {OWN}"
    assert bound.attention(q, k, v) is q
    for options in ({"return_lse": True}, {"blocks": sparse.full((1, 2, 2), (1, 1, 2))}):
        made, wanted = (run(q, k, v, **options) for run in (bound.attention, attention.sdpa))
        torch.testing.assert_close(made, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("change", [{"op": "rms_norm"}, {"source": "0"}, {"file": "gone.py"}, {"backend": "gone"}])
def test_auto_leaves_a_kernel_that_was_verified_as_something_else(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, str]
) -> None:
    monkeypatch.setattr(dispatch, "why_not", lambda backend, device: None)
    assert dispatch.bind(verified=[row(**change)]).bound["to_rgb"] == "reference"


def test_a_row_of_another_kernel_s_file_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "why_not", lambda backend, device: None)
    assert dispatch.bind(verified=[row()]).bound["to_rgb"] != "reference"
    other = {"file": "head.py", "source": dispatch.source_hash("triton", "head.py")}
    assert dispatch.bind(verified=[row(**other)]).bound["to_rgb"] == "reference"


@pytest.mark.parametrize("name", dispatch.APPROXIMATE)
def test_auto_never_takes_an_approximation(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(dispatch, "why_not", lambda backend, device: None)
    monkeypatch.setattr(dispatch, "lacks", lambda function, device: None)
    monkeypatch.setattr(dispatch, "source_hash", lambda backend, file: "same")
    q = torch.randn(1, 4, 2, 8)
    dense = shapes.shape_class("attention", (q, q, q), {})

    def made(backend: str) -> dict[str, Any]:
        file = sources.file_of("attention", backend, dense)
        return row(op="attention", backend=backend, shape_class=dense, file=file, source="same")

    assert name in attention.BACKENDS
    assert dispatch.bind(verified=[made(name)]).bound["attention"] == OWN
    assert dispatch.bind(verified=[made("cuda")]).bound["attention"] != OWN


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what is committed, and what the user's table holds."""
    monkeypatch.setattr(dispatch, "why_not", lambda backend, device: None)

    def put(committed: list[Any], rows: list[Any], rejected: list[Any]) -> None:
        monkeypatch.setattr(choices, "committed", lambda: committed)
        monkeypatch.setattr(tuned, "read", lambda device: {"rows": rows, "rejected": rejected})

    return put


def test_committed_results_are_of_an_architecture_and_precede_the_users(tables: Callable[..., None]) -> None:
    own = row(backend="reference", file="", source=dispatch.source_hash("reference", ""), result="/table.json")
    tables([row()], [own], [])
    assert [one.backend for one in dispatch.bind().choices["to_rgb"]] == ["triton"]
    tables([row(machine="sm_90")], [own], [])
    assert [one.backend for one in dispatch.bind().choices["to_rgb"]] == ["reference"]
    tables([row(machine="sm_90")], [], [])
    assert not dispatch.bind().choices


def test_a_kernel_found_wrong_here_is_not_taken_whatever_was_committed(tables: Callable[..., None]) -> None:
    wrong = {"op": "to_rgb", "dtype": "float32", "shape_class": CLASS, "backend": "triton", "why": "off by 3 e-1"}
    tables([row()], [], [wrong])
    assert dispatch.bind().bound["to_rgb"] == "reference"
    tables([row()], [], [wrong | {"shape_class": "another"}])
    assert dispatch.bind().bound["to_rgb"] != "reference"


def test_auto_leaves_a_verified_kernel_that_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "why_not", lambda backend, device: "no")
    assert dispatch.bind(verified=[row()]).bound["to_rgb"] == "reference"


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        ("80;90a;100a", (8, 0), True),
        ("80;90a;100a", (8, 9), True),
        ("80;90a;100a", (9, 0), True),
        ("80;90a;100a", (10, 0), True),
        ("80;90a;100a", (10, 3), False),
        ("80;90a;100a", (12, 0), False),
        ("86", (8, 0), False),
        ("100f", (10, 3), True),
    ],
)
def test_which_devices_a_build_runs_on(archs: str, capability: tuple[int, int], runs: bool) -> None:
    assert dispatch.runs_on(archs, capability) is runs


def test_models_get_the_oracle_and_torch_the_same_attention() -> None:
    q, k, v = torch.randn(3, 2, 5, 4, 8).unbind(0)
    assert torch.equal(
        dispatch.bind(attention="sdpa").attention(q, k, v), dispatch.bind(backend="reference").attention(q, k, v)
    )
