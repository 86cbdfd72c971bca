"""bind: a back end asked for by name works or raises, auto takes only what is verified, and Ops is a plain value."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch

from fastvid.errors import BackendUnavailable, InvalidRequest
from fastvid.ops import attention, dispatch, reference, rgb, sparse


def row(**changes: str) -> dict[str, str]:
    """A row of verified.json that lets `auto` take the Triton to_rgb."""
    fitting = {"op": "to_rgb", "backend": "triton", "shape_class": "any", "arch": "cpu", "file": "rgb.py"}
    source = dispatch.source_hash("triton", "rgb.py")
    return {**fitting, "source": source, "result": "benchmarks/results/rgb.json", **changes}


def test_auto_binds_the_reference_where_nothing_is_verified() -> None:
    bound = dispatch.bind()
    assert {bound.bound[op] for op in bound.bound if op != "attention"} == {"reference"}
    assert bound.bound["attention"] == "sdpa" and bound.to_rgb is rgb.reference
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


def test_auto_takes_a_verified_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "why_not", lambda backend, device: None)
    bound = dispatch.bind(verified=[row()])
    assert bound.to_rgb is rgb.triton
    assert bound.reasons["to_rgb"] == "verified: benchmarks/results/rgb.json"


def frames_class(frames: torch.Tensor) -> str:
    return "many frames" if frames.shape[1] > 2 else "few frames"


def test_auto_takes_a_kernel_for_the_shapes_it_is_verified_for(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(dispatch, "why_not", lambda backend, device: None)
    monkeypatch.setattr(dispatch, "shape_classes", lambda: {"to_rgb": frames_class})
    monkeypatch.setitem(rgb.BACKENDS, "triton", lambda frames: called.append(frames.shape) or rgb.reference(frames))
    bound = dispatch.bind(verified=[row(shape_class="many frames"), row(shape_class="huge frames")])
    assert bound.bound["to_rgb"] == "triton for huge frames, triton for many frames, else reference"
    assert bound.reasons["to_rgb"] == "verified: benchmarks/results/rgb.json"
    few, many = torch.rand(3, 2, 4, 4), torch.rand(3, 5, 4, 4)
    assert torch.equal(bound.to_rgb(few), rgb.reference(few)) and not called
    assert torch.equal(bound.to_rgb(many), rgb.reference(many)) and called == [many.shape]
    # Without the operation's classes nobody could tell which kernel is meant.
    monkeypatch.setattr(dispatch, "shape_classes", lambda: {})
    assert dispatch.bind(verified=[row(shape_class="many frames")]).bound["to_rgb"] == "reference"


def test_a_kernel_that_is_verified_for_dense_attention_runs_no_other_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "why_not", lambda backend, device: None)
    monkeypatch.setitem(attention.BACKENDS, "triton", lambda q, k, v, **options: q)
    source = dispatch.source_hash("triton", "attention.py")
    verified = row(op="attention", shape_class="dense", file="attention.py", source=source)
    bound = dispatch.bind(verified=[verified])
    assert bound.bound["attention"] == "triton for dense, else sdpa"
    q, k, v = torch.randn(3, 1, 4, 2, 8).unbind(0)
    assert bound.attention(q, k, v) is q
    for options in ({"return_lse": True}, {"blocks": sparse.full((1, 2, 2), (1, 1, 2))}):
        made, wanted = (run(q, k, v, **options) for run in (bound.attention, attention.sdpa))
        torch.testing.assert_close(made, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("change", [{"op": "rms_norm"}, {"arch": "sm_90"}, {"source": "0"}, {"file": "gone.py"}])
def test_auto_leaves_a_kernel_that_was_verified_as_something_else(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, str]
) -> None:
    monkeypatch.setattr(dispatch, "why_not", lambda backend, device: None)
    assert dispatch.bind(verified=[row(**change)]).bound["to_rgb"] == "reference"


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
