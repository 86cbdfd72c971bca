"""Which layout `parallel="auto"` takes: the fastest by the cost model of those that fit into memory, over the links
that were found or stated, and the same on all ranks; what plans say of it."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from ranks import run_ranks

import fastvid
from fastvid.api import CUDA_RESERVE
from fastvid.cli import render
from fastvid.distributed.cost_model import CORE, H200, INFINIBAND, LOOPBACK, NVLINK, PCIE, predict, ranked
from fastvid.distributed.layout import every
from fastvid.distributed.links import ASSUMED, FOUND, SAID, Links, card_of, find_links
from fastvid.distributed.mesh import Layout, Mesh
from fastvid.engine.events import Plan, Step
from fastvid.errors import InvalidRequest, OutOfMemory
from fastvid.models.loaded import LoadOptions, Model
from fastvid.pipeline.load import load_model, outline
from fastvid.pipeline.pipeline import Pipeline
from fastvid.pipeline.prepare import plan_of
from fastvid.planning.layout import work_of

GIB = 2**30
CUDA = torch.device("cuda")
SIZE = {"height": 480, "width": 832, "num_frames": 81}
LARGE = {"height": 720, "width": 1280, "num_frames": 81}
BLOCKS = {"dtype": "bfloat16", "vae_dtype": "bfloat16", "offload": "blocks"}


def planned(size: dict, memory: int = 80 * GIB, **options: object) -> Plan:
    return fastvid.blueprint("wan2.1-t2v-14b", device_memory=memory, **options).plan(**size)


# ---------------------------------------------------------------- links


def test_links_decide() -> None:
    fast, slow = (planned(SIZE, parallel=8, link=link) for link in ("nvlink", "pcie"))
    assert (fast.parallel, slow.parallel) == ("guidance=2,ring=1,ulysses=4", "guidance=2,ring=2,ulysses=2")
    for plan, link in ((fast, NVLINK), (slow, PCIE)):
        work = work_of(outline("wan2.1-t2v-14b", free=GIB).transformer.config, (21, 30, 52), guided=True)
        wanted = {str(x): predict(work, x, card_of(-1), link).seconds for x in every(8, 40, True)}
        assert plan.layouts == wanted and list(plan.layouts)[0] == plan.parallel
        assert list(plan.layouts.values()) == sorted(wanted.values()) and len(wanted) == 7
        assert link.name in plan.link and SAID in plan.link
    # What is slow between hosts stays within them, and decides too.
    near, far = (planned(SIZE, parallel=16, link=link) for link in ("nvlink,nvlink", "nvlink,loopback"))
    assert near.layouts != far.layouts and "on hosts of 8, gloo over loopback (as was said)" in far.link


def test_a_plan_says_why() -> None:
    plan = planned(SIZE, parallel=8, link="pcie")
    first, second = list(plan.layouts.items())[:2]
    lines = "\n".join(render.lines(plan, "14B"))
    assert f"{first[1]:.3g} s a step are predicted on an H200 (assumed)" in plan.parallel_why
    assert f"{second[1]:.3g} s with {second[0]}, the next best" in plan.parallel_why
    assert plan.parallel_why in lines and f"joined by{' ' * 14}{plan.link}" in lines
    assert json.loads(json.dumps(plan.to_dict()))["layouts"] == plan.layouts
    asked = planned(SIZE, parallel="ring=8", link="pcie")
    assert asked.parallel_why.startswith("as was asked") and list(asked.layouts) == [asked.parallel]
    alone = planned(SIZE)
    assert (alone.layouts, alone.parallel_why, alone.link) == ({}, "", "")
    assert "why" not in "\n".join(render.lines(alone, "14B"))


def test_ties_go_by_the_order_that_is_given() -> None:
    work = work_of(outline("wan2.1-t2v-14b", free=GIB).transformer.config, (21, 30, 52), guided=True)
    for layouts in ([Layout(2, 2), Layout(1, 4)], [Layout(1, 4), Layout(2, 2)]):
        with mock.patch("fastvid.distributed.cost_model._step", return_value=(1.0, 1.0, 1.0, 1.0, 1.0)):
            assert [one.layout for one in ranked(layouts, work, CORE, LOOPBACK)] == layouts


@pytest.mark.parametrize(
    ("said", "match"),
    [
        ("nvlnik", "link='nvlnik': allowed is auto, nvlink.*the nearest is nvlink"),
        ("nvlink,pcie,pcie", "the nearest is auto"),
        (4, "link=4: allowed is auto"),
    ],
)
def test_what_link_cannot_say(said: object, match: str) -> None:
    with pytest.raises(InvalidRequest, match=match):
        fastvid.blueprint("embedded", device="cpu", parallel=2, link=said)


class NVMLError(Exception):
    """As pynvml's."""


class Driver:
    """pynvml on a host with four GPUs, of which those of a pair reach each other by NVLink. failing: what raises."""

    NVMLError = NVMLError
    NVML_P2P_CAPS_INDEX_NVLINK, NVML_P2P_STATUS_OK = 2, 0

    def __init__(self, pairs: set[frozenset[int]], failing: str = "") -> None:
        self.pairs, self.failing, self.open = pairs, failing, 0

    def _check(self, name: str) -> None:
        if self.failing == name:
            raise NVMLError(name)

    def nvmlInit(self) -> None:  # noqa: N802
        self._check("start")
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:  # noqa: N802
        self._check("handle")
        return int(uuid.removeprefix("GPU-"))

    def nvmlDeviceGetP2PStatus(self, a: int, b: int, kind: int) -> int:  # noqa: N802
        self._check("status")
        assert kind == self.NVML_P2P_CAPS_INDEX_NVLINK
        return self.NVML_P2P_STATUS_OK if frozenset({a, b}) in self.pairs else 3


ALL = {frozenset({a, b}) for a in range(4) for b in range(a)}


@pytest.mark.parametrize(
    ("driver", "peers", "found"),
    [
        (Driver(ALL), True, (NVLINK, FOUND)),
        (Driver(ALL - {frozenset({1, 3})}), True, (PCIE, FOUND)),
        (Driver(ALL, "handle"), True, (PCIE, ASSUMED)),
        (Driver(ALL, "status"), True, (PCIE, ASSUMED)),
        (Driver(ALL, "start"), True, (PCIE, ASSUMED)),
        (None, True, (PCIE, ASSUMED)),
        (None, False, (PCIE, FOUND)),
    ],
)
def test_links_are_found(driver: Driver | None, peers: bool, found: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 4)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: peers)
    monkeypatch.setitem(sys.modules, "pynvml", driver)  # None: not installed
    made = find_links("auto", Mesh(size=4), CUDA)
    assert (made.near, made.near_how) == found and made.per_host is None and made.device.name == "H100"
    # What is stated is not looked for.
    made = find_links("infiniband", Mesh(size=4), CUDA)
    assert (made.near, made.near_how) == (INFINIBAND, SAID)
    # A host cannot look at the GPUs of another one; the slower link is assumed between them.
    made = find_links("auto", Mesh(size=8, per_host=4), CUDA)
    assert made.near == found[0] and (made.far, made.far_how, made.per_host) == (INFINIBAND, ASSUMED, 4)
    assert driver is None or driver.open == 0


def test_a_log_says_why_links_are_assumed(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    gpus(monkeypatch, 2)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: True)
    for driver, reason in ((None, "requires the package nvidia-ml-py"), (Driver(ALL, "start"), "NVML does not start")):
        monkeypatch.setitem(sys.modules, "pynvml", driver)
        with caplog.at_level("INFO", logger="fastvid.plan"):
            find_links("auto", Mesh(size=2), CUDA)
        assert reason in caplog.messages[-1]


def gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid=str(i)))


def test_what_is_not_here_is_assumed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = find_links("auto", Mesh(size=16), CUDA, planned=True)
    assert str(made) == "NVLink 4 (assumed) on hosts of 8, InfiniBand NDR (assumed) between them"
    assert "assumed" in made.device.name
    gpus(monkeypatch, 1)  # a process that sees one of several
    assert str(find_links("auto", Mesh(size=2), CUDA)) == "PCIe 5 x16 (assumed)"
    assert str(find_links("auto", Mesh(size=2), torch.device("cpu"))) == "gloo over loopback (found)"
    assert str(find_links("auto", Mesh(size=2, staged=True), CUDA)) == "gloo over loopback (found)"


# ---------------------------------------------------------------- memory


def test_memory_decides() -> None:
    """Half of guidance on each rank is faster; where it does not fit, tokens are shared, which takes less."""
    split, shared = (planned(LARGE, parallel=way, **BLOCKS).bytes_device for way in ("guidance=2", "ring=2"))
    assert shared < split
    plans = [planned(LARGE, most + CUDA_RESERVE, parallel=2, **BLOCKS) for most in (split, split - 1, shared)]
    assert plans[0].parallel == "guidance=2,ring=1,ulysses=1" and len(plans[0].layouts) == 3
    for plan in plans[1:]:
        assert plan.parallel == "guidance=1,ring=2,ulysses=1" and plan.bytes_device == shared
        assert "guidance=2,ring=1,ulysses=1 would not fit into memory" in plan.parallel_why
        assert [*plan.layouts] == ["guidance=1,ring=2,ulysses=1", "guidance=1,ring=1,ulysses=2"]
    # With less memory, fewer frames are decoded at once. Then none fits: the need is that of the one that is nearest.
    least = planned(LARGE, shared - 1 + CUDA_RESERVE, parallel=2, **BLOCKS)
    assert least.bytes_device < shared and least.decode_chunk < plans[2].decode_chunk
    assert least.parallel == "guidance=1,ring=2,ulysses=1"
    need = least.bytes_device
    with pytest.raises(OutOfMemory, match=rf"takes about {need / GIB:.1f} GiB.*{(need - 1) / GIB:.1f} GiB are there"):
        planned(LARGE, need - 1 + CUDA_RESERVE, parallel=2, **BLOCKS)


# ---------------------------------------------------------------- ranks


def same_everywhere(mesh: Mesh) -> None:
    """Ranks that have other memory free, see other links, or would predict otherwise, still take the same layout."""
    parts = replace(outline("wan2.1-t2v-14b", LoadOptions(**BLOCKS), free=80 * GIB), mesh=mesh)

    def taken(parts: Model, free: int) -> Plan:
        plan = plan_of(parts, "a", free=free, **LARGE)
        chosen = [*map(str, every(mesh.size, 40, True))].index(plan.parallel)
        assert len(set(mesh.gather(torch.tensor([chosen]), (1,) * mesh.size, 0).tolist())) == 1
        return plan

    assert taken(parts, 80 * GIB).parallel.startswith("guidance=2")
    # One rank has too little for that.
    alone = replace(parts, mesh=Mesh(size=mesh.size))
    split, shared = (
        plan_of(replace(alone, options=LoadOptions(layout=layout)), "a", free=80 * GIB, **LARGE).bytes_device
        for layout in (Layout(2), Layout(1, 2))
    )
    assert shared < split
    assert taken(parts, 80 * GIB if mesh.rank == 0 else split - 1).parallel.startswith("guidance=1")
    # Rank 0's prediction counts.
    devices = H200, replace(H200, memory=1e9)  # where memory is slow, a ring's merging is
    joined = [Links(near=NVLINK, far=NVLINK, device=device) for device in devices]
    first, other = (plan_of(replace(alone, links=one), "a", free=split - 1, **LARGE).parallel for one in joined)
    plan = taken(replace(parts, links=joined[mesh.rank]), split - 1)
    assert plan.parallel == first != other and plan.parallel == list(plan.layouts)[0]
    # The slowest link that one of them sees counts for all.
    seen = (NVLINK, FOUND) if mesh.rank == 0 else (PCIE, ASSUMED)
    with mock.patch("fastvid.distributed.links._between", return_value=seen):
        found = find_links("auto", replace(mesh, device=torch.device("cpu")), CUDA)
    assert (found.near, found.near_how) == (PCIE, ASSUMED)


@pytest.mark.slow
def test_ranks_take_the_same() -> None:
    run_ranks(2, same_everywhere)


def kept(mesh: Mesh, folder: str) -> None:
    """A request goes on in the layout in which it began, whatever another one would get now."""
    pipe, given = Pipeline(load_model("embedded", mesh=mesh)), {"num_frames": 5, "num_inference_steps": 2, "seed": 1}
    with mock.patch("fastvid.distributed.cost_model.ranked", lambda *given: ranked(*given)[::-1]):
        stream = pipe.stream("a", **given, checkpoint=folder, checkpoint_every=0)
        began = next(stream).plan.parallel
        while not isinstance(next(stream), Step):
            pass
        stream.close()
    mesh.gather(torch.zeros(1), (1,) * mesh.size, 0)  # until all have let go of it
    went_on = list(pipe.resume(folder))[0].plan
    assert went_on.parallel == began != pipe.plan("a", **given).parallel and [*went_on.layouts] == [began]


@pytest.mark.slow
def test_a_layout_is_kept(tmp_path: Path) -> None:
    run_ranks(2, kept, str(tmp_path / "job"))
