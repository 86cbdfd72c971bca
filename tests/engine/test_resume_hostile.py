"""Checkpoints of strangers, and other people's files in them: nothing outside is read, made or removed, foreign files
stay, and what does not belong to the request is refused by one of fastvid's errors that names the folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import safetensors.torch
import tiny
import torch
from mutations import changed, damaged, damaged_json, peak, refuses, seeds, untouched
from streams import run, same, snapshots

import fastvid
from fastvid.engine import resume_files
from fastvid.models.preset import EVERYTHING, Rollout
from fastvid.pipeline.pipeline import Pipeline

PROMPT = "a red circle moving right on a white"
OPTIONS = {"num_frames": 13, "num_inference_steps": 2, "seed": 3, "height": 64, "width": 64}
KINDS = {
    "whole": {},
    "chained": {"carries": False, "window": 2, "context": 1},
    "causal": {"rollout": Rollout(frames_per_block=1, window=3, sink=1)},
}


@pytest.fixture(scope="module")
def pipes(tmp_path_factory) -> dict[str, Pipeline]:
    import dataclasses

    folder = tmp_path_factory.mktemp("tiny")
    tiny.write_checkpoint(folder, vae_config={"base_dim": 4, "num_res_blocks": 1, "z_dim": 16})
    model = fastvid.load(str(folder), device="cpu")._model
    presets = {kind: dataclasses.replace(model.preset, patterns=EVERYTHING, **known) for kind, known in KINDS.items()}
    return {kind: Pipeline(dataclasses.replace(model, preset=preset)) for kind, preset in presets.items()}


def options_of(kind: str) -> dict[str, Any]:
    return {**OPTIONS, "solver": "euler" if kind == "causal" else "unipc"}


@pytest.fixture(scope="module")
def jobs(pipes, tmp_path_factory) -> dict[str, Path]:
    """A checkpoint of each kind in the middle of its request."""
    made = {}
    for kind, pipe in pipes.items():
        into = tmp_path_factory.mktemp(kind)
        stream = pipe.stream(PROMPT, **options_of(kind), checkpoint=into / "job", checkpoint_every=0)
        made[kind] = snapshots(stream, into / "job", into)[1 if kind == "whole" else -2]
    return made


@pytest.fixture(scope="module")
def wanted(pipes) -> dict[str, Any]:
    return {kind: run(pipe.stream(PROMPT, **options_of(kind))) for kind, pipe in pipes.items()}


@pytest.fixture
def job(jobs, tmp_path) -> Path:
    return shutil.copytree(jobs["chained"], tmp_path / "job.ckpt")


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read(job: Path, name: str) -> dict[str, Any]:
    value = json.loads((job / name).read_bytes())
    assert value.pop("sha256") == digest(value)
    return value


def write(job: Path, name: str, value: Any) -> None:
    """Write JSON with the right digest."""
    made = {**value, "sha256": digest(value)} if isinstance(value, dict) else value
    (job / name).write_text(json.dumps(made))


def rewrite(job: Path, name: str, **values: Any) -> None:
    write(job, name, {**read(job, name), **values})


def restate(job: Path, kind: str, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of a file ("state", "clean", "cache"), with the right digests everywhere."""
    old = sorted(job.glob(f"{kind}-*.safetensors"))[-1]
    tensors = safetensors.torch.load(old.read_bytes())
    change(tensors)
    put(job, old, safetensors.torch.save(tensors))


def put(job: Path, old: Path, data: bytes) -> None:
    """Another tensor file in place of an old one, with the right digests everywhere."""
    name = f"{old.stem.rsplit('-', 1)[0]}-{hashlib.sha256(data).hexdigest()[:16]}.safetensors"
    old.unlink()
    (job / name).write_bytes(data)
    (job / "head.json").write_text((job / "head.json").read_text().replace(old.name, name))
    head = json.loads((job / "head.json").read_bytes())
    head.pop("sha256")
    write(job, "head.json", head)


def refused(pipe: Pipeline, job: Path, *facts: str) -> None:
    with pytest.raises(fastvid.CheckpointError) as caught:
        run(pipe.resume(job))
    for fact in (job.name, *facts):
        assert fact in str(caught.value)


# ---------------------------------------------------------------- what is not the request's


@pytest.mark.parametrize(
    ("kind", "change", "fact"),
    [
        ("state", lambda t: t["done"].add_(1), "done is not that"),
        ("state", lambda t: t["row"].add_(1), "rows"),
        ("state", lambda t: t["row"].mul_(0).add_(10**12), "rows"),
        ("state", lambda t: t["start"].add_(1), "start is not that"),
        ("state", lambda t: t["state.order"].add_(1), "order is not that"),
        ("state", lambda t: t["state.sigmas.0"].mul_(0.5), "sigmas.0 is not that"),
        ("state", lambda t: t["state.x"].view(-1)[7:8].fill_(float("inf")), "NaN or infinity"),
        ("state", lambda t: t.update(latents=t["latents"].half()), "float16"),
        ("state", lambda t: t.update(kept=t["latents"].clone()), "kept is missing, or too much"),
        ("clean", lambda t: t["row"].sub_(1), "row is not that"),
        ("clean", lambda t: t["ready"].view(-1)[3:4].fill_(float("nan")), "NaN or infinity"),
        ("clean", lambda t: t.update(ready=t["ready"][:, :, :1].repeat(1, 1, 2, 1, 1)), "ready is float32"),
    ],
)
def test_tensors_that_are_not_of_the_request_are_refused(pipes, job, kind, change, fact):
    restate(job, kind, change)
    refused(pipes["chained"], job, fact)


@pytest.mark.parametrize(
    "change",
    [
        lambda head: head["places"]["0"].update(next=head["places"]["0"]["next"] + 1),
        lambda head: head["places"]["0"].update(capacity=2),
        lambda head: head["places"]["0"].update(slots=[0]),
        lambda head: head["places"].pop("0"),
        lambda head: head.update(caches=head["caches"][1:]),
        lambda head: head.update(rows=head["rows"] - 1),
        lambda head: head.update(clean=head["clean"] - 1),
    ],
)
def test_caches_that_are_elsewhere_are_refused(pipes, jobs, tmp_path, change):
    job = shutil.copytree(jobs["causal"], tmp_path / "job.ckpt")
    head = read(job, "head.json")
    change(head)
    write(job, "head.json", head)
    refused(pipes["causal"], job)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update({name: tensor[:, :, :3] for name, tensor in t.items()}),
        lambda t: t.update({name: tensor.double() for name, tensor in t.items()}),
        lambda t: t.pop(min(t)),
        lambda t: next(iter(t.values())).view(-1)[:1].fill_(float("nan")),
    ],
)
def test_caches_of_other_shapes_are_refused(pipes, jobs, tmp_path, change):
    job = shutil.copytree(jobs["causal"], tmp_path / "job.ckpt")
    restate(job, "cache", change)
    refused(pipes["causal"], job)


def test_a_sparse_giant_is_refused_before_it_is_read(pipes, job):
    state = next(job.glob("state-*"))
    header = json.dumps({"latents": {"dtype": "F32", "shape": [1 << 36], "data_offsets": [0, 1 << 38]}}).encode()
    state.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(state, 8 + len(header) + (1 << 38))
    with peak(32):
        assert refuses(lambda: run(pipes["chained"].resume(job)), fastvid.CheckpointError)


@pytest.mark.parametrize("name", ["request.json", "head.json"])
@pytest.mark.parametrize("value", ["x" * 2**22, "\N{GRINNING FACE}" * 2**20 + "x", [[]] * 199_000, ["x"] * 199_000])
def test_large_json_takes_little(pipes, job, name, value):
    rewrite(job, name, more=value)
    with peak(64):
        assert refuses(lambda: run(pipes["chained"].resume(job)), fastvid.CheckpointError)


def test_a_folder_that_cannot_be_renamed_is_emptied(pipes, job, wanted, monkeypatch):
    monkeypatch.setattr(Path, "rename", lambda *_: os.listdir("/nowhere"))
    assert same(run(pipes["chained"].resume(job)), wanted["chained"])
    assert not job.exists()


def test_texts_that_do_not_fit_are_refused_before_anything_is_made(pipes, tmp_path, monkeypatch):
    monkeypatch.setattr(resume_files, "MAX_JSON", 3000)
    with pytest.raises(fastvid.InvalidRequest, match="a checkpoint holds at most 2,000; leave checkpoint out"):
        pipes["whole"].stream("a red circle " * 200, **OPTIONS, checkpoint=tmp_path / "job")
    assert not (tmp_path / "job").exists()


# ---------------------------------------------------------------- links, pipes and foreign files

NAMES = ["request.json", "head.json", "lock", "fastvid-files", "state", "clean"]


def file_of(job: Path, name: str) -> Path:
    return job / name if (job / name).exists() else sorted(job.glob(f"{name}-*"))[0]


@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "folder"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_file_is_not_followed(pipes, job, tmp_path, wanted, name, kind):
    place, outside = file_of(job, name), tmp_path / "outside"
    outside.mkdir()
    if kind == "link":
        place.rename(outside / "kept")
        place.symlink_to(outside / "kept")
    else:
        place.unlink()
        if kind == "dangling":
            place.symlink_to(outside / "made")
        elif kind == "pipe":
            os.mkfifo(place)
        else:
            (place / "inner").mkdir(parents=True)
    with untouched(outside):
        was_refused = refuses(lambda: run(pipes["chained"].resume(job)), fastvid.CheckpointError)
    assert was_refused or name == "fastvid-files" and os.path.lexists(place)
    assert sorted(os.listdir(outside)) == (["kept"] if kind == "link" else [])


def test_a_list_that_names_what_is_not_ours_removes_none_of_it(pipes, job, tmp_path, wanted):
    (tmp_path / "outside").write_text("precious")
    (job / "thesis.txt").write_text("precious")
    (job / "sub").mkdir()
    (job / "state-00000001-0123456789abcdef.safetensors").symlink_to(tmp_path / "outside")
    foreign = job / "state-00000002-0123456789abcdef.safetensors"  # not listed
    foreign.write_text("precious")
    with (job / "fastvid-files").open("a") as file:
        file.write("thesis.txt\n../outside\nsub\nstate-00000001-0123456789abcdef.safetensors\n/etc/hostname\n")
    assert same(run(pipes["chained"].resume(job)), wanted["chained"])
    assert (tmp_path / "outside").read_text() == (job / "thesis.txt").read_text() == foreign.read_text() == "precious"
    assert sorted(os.listdir(job)) == [
        "state-00000001-0123456789abcdef.safetensors", foreign.name, "sub", "thesis.txt",
    ]  # fmt: skip


def test_a_new_request_takes_no_folder_with_foreign_files(pipes, tmp_path):
    """Not one with a file by the name of the list, either; but what a removal that was killed has left is its own."""
    job = tmp_path / "job"
    job.mkdir()
    (job / "fastvid-files").write_text("my own list\n")
    with pytest.raises(fastvid.InvalidRequest, match="no empty folder; give a new name, such as .*job/job.ckpt"):
        pipes["whole"].stream(PROMPT, **OPTIONS, checkpoint=job)
    (job / "fastvid-files").unlink()
    resume_files.start_list(job)
    run(pipes["whole"].stream(PROMPT, **OPTIONS, checkpoint=job))
    assert not job.exists()


def test_what_a_kill_leaves_is_removed_by_the_list(pipes, job, wanted):
    """Files that were written after the last head.json, and half-written ones; not those that no list names."""
    pipe, late = pipes["chained"], "state-00000009-00112233445566aa.safetensors"
    for name in (late, "head.json.partial", f"{late}.partial"):
        (job / name).write_bytes(b"half")
    with (job / "fastvid-files").open("a") as file:
        file.write(f"{late}\n")
    assert same(run(pipe.resume(job, keep_checkpoint=True)), wanted["chained"])
    assert not (job / late).exists() and not list(job.glob("*.partial"))


def test_folders_that_have_no_list_are_taken(pipes, job, wanted):
    (job / "fastvid-files").unlink()
    assert same(run(pipes["chained"].resume(job)), wanted["chained"])
    assert not job.exists()


# ---------------------------------------------------------------- ten thousand of each


def mutate(job: Path, random: Random, outside: Path) -> None:
    """Damage a checkpoint in one way, mostly with right digests."""
    way = random.choice(
        ("request", "request", "head", "head", "head", "json", "tensors", "tensors", "bytes", "names", "links")
    )
    if way in ("request", "head"):
        name = f"{way}.json"
        value = changed(read(job, name), random)
        try:
            write(job, name, value)
        except (TypeError, ValueError, RecursionError, UnicodeEncodeError):
            (job / name).write_bytes(damaged_json(read(job, name), random))
    elif way == "json":
        name = random.choice(("request.json", "head.json", "fastvid-files"))
        data = (job / name).read_bytes()
        (job / name).write_bytes(
            damaged(data, random)
            if random.random() < 0.5
            else damaged_json(json.loads(data) if name.endswith("json") else {}, random)
        )
    elif way == "tensors":
        restate(job, random.choice([kind for kind in ("state", "clean", "cache") if list(job.glob(f"{kind}-*"))]),
                lambda tensors: other_tensors(tensors, random))  # fmt: skip
    elif way == "bytes":
        old = random.choice(sorted(job.glob("*.safetensors")))
        put(job, old, damaged(old.read_bytes(), random))
    elif way == "names":
        old = random.choice(sorted(job.iterdir()))
        new = random.choice((old.name.replace("0", "1"), old.name[:-3], f"{old.name}.partial", "lock", "head.json"))
        if random.random() < 0.5 and new != old.name:
            os.replace(old, job / new)
        else:
            shutil.copy(old, job / f"copy-{new}")
    else:
        old = random.choice(sorted(job.iterdir()))
        target = outside / random.choice(("secret", "made", "."))
        old.unlink()
        random.choice((lambda: old.symlink_to(target), lambda: os.mkfifo(old), old.mkdir))()


def other_tensors(tensors: dict[str, torch.Tensor], random: Random) -> None:
    name = random.choice(sorted(tensors))
    one = tensors[name]
    made = random.choice(
        (
            lambda: one.double(), lambda: one.half(), lambda: one.long(), lambda: one.bool(), lambda: one[None],
            lambda: one.flatten(), lambda: one.repeat(*[2] * max(1, one.ndim)), lambda: torch.zeros(0), lambda: one + 1,
            lambda: torch.full_like(one, float("nan")) if one.is_floating_point() else one - 10**12,
            lambda: torch.full_like(one, float("inf")) if one.is_floating_point() else -one, lambda: torch.zeros(3, 3),
        )
    )  # fmt: skip
    if random.random() < 0.1:
        del tensors[name]
    elif random.random() < 0.1:
        tensors[random.choice(("x", "state.x0s.9", "kept", "0.99.keys", "latents.latents"))] = one.clone()
    else:
        tensors[name] = made().contiguous()


def resumed(pipe: Pipeline, job: Path, to_the_end: bool) -> None:
    """Resume up to the first step that is made here: what was saved is restored and checked then; or to the end."""
    with contextlib.closing(pipe.resume(job)) as stream:
        for event in stream:
            if isinstance(event, fastvid.Step) and not to_the_end:
                return


def attempts(count: int) -> Iterator[tuple[int, Random]]:
    return enumerate(seeds("resume folders", count))


@pytest.mark.parametrize("count", [60, pytest.param(10_000, marks=pytest.mark.slow)])
def test_damaged_checkpoints_are_refused(pipes, jobs, tmp_path, count):
    outside, other = tmp_path / "outside", shutil.copytree(jobs["whole"], tmp_path / "other.ckpt")
    outside.mkdir()
    (outside / "secret").write_text("precious")
    kinds, refusals = sorted(pipes), 0
    with peak(64), untouched(tmp_path, tmp_path / "job"):
        for number, random in attempts(count):
            kind = kinds[number % len(kinds)]
            job = shutil.copytree(jobs[kind], tmp_path / "job" / str(number))
            mutate(job, random, outside)
            (job / "thesis.txt").write_text("a year of work")
            refusals += refuses(partial(resumed, pipes[kind], job, number % 10 == 0), fastvid.Error, seconds=2.0)
            assert (job / "thesis.txt").read_text() == "a year of work"
            shutil.rmtree(job)
    assert refusals > 0.6 * count and (other / "head.json").exists()
