"""LoRAs of one request: it makes with them what a pipeline makes that was loaded with them, and no other request sees
them, whichever runs at the same time, is offloaded, resumed or planned."""

from __future__ import annotations

import asyncio
import json
import os
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import save_file

import fastvid
from fastvid.engine.events import Finished, Step
from fastvid.errors import CheckpointError, Error, InvalidRequest
from fastvid.loaders import lora_cache, safetensors
from fastvid.loaders.lora_cache import LoraCache
from fastvid.planning import memory

SMALL: dict[str, Any] = {"height": 64, "width": 64, "num_frames": 5, "num_inference_steps": 4, "seed": 3}
BOUNDARY = 0.9
SCALE = 0.7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    tiny.write_checkpoint(made, boundary_ratio=BOUNDARY, vae_config={"base_dim": 4, "num_res_blocks": 1, "z_dim": 16})
    return made


@pytest.fixture(scope="module")
def pipe(folder: Path) -> fastvid.Pipeline:
    return fastvid.load(str(folder), device="cpu")


@pytest.fixture(scope="module")
def lora(folder: Path, pipe: fastvid.Pipeline) -> Path:
    return written(folder / "style.safetensors", pipe, 1)


@pytest.fixture(scope="module")
def other(folder: Path, pipe: fastvid.Pipeline) -> Path:
    return written(folder / "other.safetensors", pipe, 2)


def written(path: Path, pipe: fastvid.Pipeline, seed: int) -> Path:
    """A LoRA of all linear layers of the blocks, a norm and a bias."""
    draw, tensors = torch.Generator().manual_seed(seed), {}
    for name, weight in pipe._model.transformer.state_dict().items():
        stem, _, kind = f"transformer.{name}".rpartition(".")
        if kind == "weight" and weight.ndim == 2:
            tensors[f"{stem}.lora_A.weight"] = torch.randn(3, weight.shape[1], generator=draw) * 0.3
            tensors[f"{stem}.lora_B.weight"] = torch.randn(weight.shape[0], 3, generator=draw) * 0.3
        elif "norm2.weight" in name or "to_k.bias" in name:
            role = "diff" if kind == "weight" else "diff_b"
            tensors[f"{stem}.{role}"] = torch.randn(weight.shape, generator=draw) * 0.3
    save_file(tensors, path)
    return path


def made(pipe: fastvid.Pipeline, **options: Any) -> torch.Tensor:
    latents: torch.Tensor = pipe.generate("a red circle", **SMALL, **options).latents
    return latents


def far(one: torch.Tensor, exact: torch.Tensor) -> float:
    return float((one - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_request_makes_what_a_load_with_them_makes(folder: Path, lora: Path, other: Path, dtype: str) -> None:
    """fp32: to rounding. bf16: as near to fp32 as with merged weights."""
    both = [(lora, SCALE), (other, 0.5, "low")]
    plain = fastvid.load(str(folder), device="cpu", dtype=dtype)
    base = made(plain)
    own = made(plain, loras=both)
    merged = made(fastvid.load(str(folder), device="cpu", dtype=dtype, loras=both))
    assert far(base, merged) > 0.02
    if dtype == "float32":
        assert far(own, merged) < 1e-5
    else:
        exact = made(fastvid.load(str(folder), device="cpu", dtype="float32", loras=both))
        assert far(own, exact) < 1.5 * far(merged, exact)
    assert torch.equal(made(plain), base)
    assert torch.equal(made(plain, loras=[]), base) and torch.equal(made(plain, loras=[(lora, 0.0)]), base)


def test_they_add_to_those_of_the_load(folder: Path, pipe: fastvid.Pipeline, lora: Path, other: Path) -> None:
    with_one = fastvid.load(str(folder), device="cpu", loras=[(lora, SCALE)])
    assert far(made(with_one, loras=[other]), made(pipe, loras=[(lora, SCALE), other])) < 1e-5


def test_an_expert_of_its_own(pipe: fastvid.Pipeline, lora: Path) -> None:
    base, high, low, both = (
        made(pipe, loras=loras) for loras in (None, [(lora, 1.0, "high")], [(lora, 1.0, "low")], [lora])
    )
    for i, one in enumerate((base, high, low, both)):
        assert all(far(one, another) > 1e-3 for another in (base, high, low, both)[:i])
    assert torch.equal(made(pipe, loras=[(lora, 1.0, "high"), (lora, 1.0, "low")]), both)


def test_requests_that_take_turns_never_see_each_others(pipe: fastvid.Pipeline, lora: Path, other: Path) -> None:
    wanted = [[lora], None, [(lora, -SCALE)], [other, (lora, SCALE)]]
    alone = [made(pipe, loras=loras) for loras in wanted]
    streams = [pipe.stream("a red circle", **SMALL, loras=loras) for loras in wanted]
    last: list[Any] = [None] * len(streams)
    running = list(range(len(streams)))
    while running:
        for number in list(running):
            try:
                last[number] = next(streams[number])
            except StopIteration:
                running.remove(number)
    assert all(torch.equal(event.latents, one) for event, one in zip(last, alone, strict=True))
    assert not any(torch.equal(one, alone[1]) for one in (alone[0], alone[2], alone[3]))


def test_a_request_that_ends_early_leaves_nothing(pipe: fastvid.Pipeline, lora: Path) -> None:
    base = made(pipe)
    with closing(pipe.stream("a red circle", **SMALL, loras=[lora])) as stream:
        for event in stream:
            if isinstance(event, Step):
                break
    assert torch.equal(made(pipe), base)

    async def run() -> Any:
        return (await pipe.agenerate("a red circle", **SMALL, loras=[lora])).latents

    assert torch.equal(asyncio.run(run()), made(pipe, loras=[lora]))


@pytest.mark.parametrize("mode", ["text", "blocks"])
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_offloaded_models_make_the_same(folder: Path, lora: Path, other: Path, mode: str, quantize: str | None) -> None:
    options: dict[str, Any] = {"device": "cpu", "quantize": quantize, "loras": [(other, 0.3)]}
    staying, moved = (fastvid.load(str(folder), **options, offload=way) for way in ("none", mode))
    for loras in (None, [lora], None):
        assert torch.equal(made(staying, loras=loras), made(moved, loras=loras))


def test_quantized_weights_keep_them_beside(folder: Path, lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set, changed and removed without a look at the weights; what is removed leaves the very same bytes."""
    names = [f"blocks.{i}.{name}" for i in range(2) for name in ("attn1.to_q", "attn2.to_out.0", "ffn.net.2")]
    tensors = {f"transformer.{name}.lora_A.weight": torch.randn(2, 80 if "net.2" in name else 48) for name in names}
    tensors |= {f"transformer.{name}.lora_B.weight": torch.randn(48, 2) for name in names}
    save_file(tensors, folder / "linear.safetensors")
    file = folder / "linear.safetensors"
    pipe = fastvid.load(str(folder), device="cpu", quantize="fp8")
    base, reads = made(pipe), list[Any]()
    read = safetensors.load_into
    monkeypatch.setattr(safetensors, "load_into", lambda *args, **options: reads.append(read(*args, **options)))
    weights = {name: tensor.clone() for name, tensor in pipe._model.transformer.state_dict().items()}
    pipe.set_loras([file])
    one = made(pipe)
    pipe.set_loras([(file, 0.4, "low")])
    assert torch.equal(made(pipe, loras=[(file, 0.4, "high")]), made_after(pipe, [(file, 0.4)]))
    assert not reads and far(one, base) > 0.01
    pipe.set_loras()
    assert torch.equal(made(pipe), base) and torch.equal(made(pipe, loras=[file]), one)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in pipe._model.transformer.state_dict().items())
    pipe.set_loras([lora])  # it also has a norm and biases, which are merged: these are read again
    assert len(reads) == 2
    pipe.set_loras()
    assert torch.equal(made(pipe), base)


def made_after(pipe: fastvid.Pipeline, loras: list[Any]) -> torch.Tensor:
    pipe.set_loras(loras)
    return made(pipe)


@pytest.mark.slow
def test_ranks_have_them(lora: Path, other: Path, folder: Path) -> None:
    """Bytes of one rank: tokens are shared, weights and branches are not."""
    asked: list[list[Any] | None] = [[lora], None, [(lora, SCALE), (other, 0.3, "low")]]
    options: dict[str, Any] = {"device": "cpu", "quantize": "int8", "loras": [(other, 0.2)]}
    one = fastvid.load(str(folder), **options)
    with fastvid.load(str(folder), **options, parallel=2) as two:
        for loras in asked:
            assert far(made(two, loras=loras), made(one, loras=loras)) < 1e-5
        two.set_loras([lora])
        assert far(made(two), made_after(one, [lora])) < 1e-5
        with pytest.raises(CheckpointError, match=r"nowhere.safetensors"):
            made(two, loras=["nowhere.safetensors"])


# ---------------------------------------------------------------- recipes, checkpoints, plans


def test_a_recipe_names_them(pipe: fastvid.Pipeline, lora: Path) -> None:
    video = pipe.generate("a red circle", **SMALL, loras=[(lora, SCALE), (str(lora), 0.1, "high")])
    recipe = json.loads(json.dumps(video.recipe))
    assert recipe["loras"] == [[str(lora), SCALE], [str(lora), 0.1, "high"]] and "loras" not in recipe["settings"]
    request = fastvid.Request.from_recipe(recipe)
    assert torch.equal(pipe.generate(**request.arguments()).latents, video.latents)
    without = fastvid.Request.from_recipe(recipe, loras=[])
    assert without.loras is None and torch.equal(pipe.generate(**without.arguments()).latents, made(pipe))
    assert "loras" not in pipe.generate("a red circle", **SMALL, loras=[]).recipe


def test_a_checkpoint_carries_and_checks_them(
    pipe: fastvid.Pipeline, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "own.safetensors"
    file.write_bytes(lora.read_bytes())
    monkeypatch.chdir(tmp_path)
    wanted = made(pipe, loras=[(file, SCALE)])
    options: dict[str, Any] = {**SMALL, "checkpoint": "job.ckpt", "checkpoint_every": 0}
    stream = pipe.stream("a red circle", **options, loras=[("own.safetensors", SCALE)])
    with closing(stream):
        for event in stream:
            if isinstance(event, Step) and event.step == 2:
                break
    monkeypatch.chdir(tmp_path.parent)
    content = file.read_bytes()
    file.write_bytes(content[:-4] + b"\0\0\0\0")
    with pytest.raises(InvalidRequest, match=r"this checkpoint was made with other LoRAs \(own.safetensors\)"):
        pipe.resume(tmp_path / "job.ckpt")
    file.unlink()
    with pytest.raises(CheckpointError, match=r"own.safetensors"):
        pipe.resume(tmp_path / "job.ckpt")
    file.write_bytes(content)
    *_, last = pipe.resume(tmp_path / "job.ckpt")
    assert isinstance(last, Finished) and torch.equal(last.latents, wanted)
    assert last.recipe["loras"] == [["own.safetensors", SCALE]]


def test_a_plan_counts_them(folder: Path, pipe: fastvid.Pipeline, lora: Path) -> None:
    size = sum(tensor.nbytes for name, tensor in safetensors_of(lora).items() if "lora" in name)
    plain, own = (pipe.plan(**SMALL, loras=loras) for loras in (None, [lora]))
    assert 2 * size <= own.bytes_weights - plain.bytes_weights < 3 * size, "for both experts, with small weights"
    one = pipe.plan(**SMALL, loras=[(lora, 1.0, "low")])
    assert 2 * (one.bytes_weights - plain.bytes_weights) == own.bytes_weights - plain.bytes_weights
    planned = fastvid.blueprint(str(folder), device="cpu").plan(**SMALL, loras=[lora])
    assert planned.bytes_weights == own.bytes_weights


def test_offloading_is_chosen_with_those_beside_quantized_weights(
    folder: Path, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    capacities = list[int]()
    choose = memory.choose_offload
    monkeypatch.setattr(memory, "choose_offload", lambda *args: capacities.append(args[2]) or choose(*args))
    for quantize in (None, "int8"):
        options: dict[str, Any] = {"device": "cuda", "device_memory": 1 << 34, "quantize": quantize}
        fastvid.blueprint(str(folder), **options, loras=[lora])
    inside = [one for name, one in safetensors_of(lora).items() if "blocks" in name and "lora_" in name]
    assert capacities[0] - capacities[1] == 2 * sum(one.numel() for one in inside) > 0, "in bf16"


def safetensors_of(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


# ---------------------------------------------------------------- files


def test_what_does_not_fit_is_refused_before_anything_runs(pipe: fastvid.Pipeline, lora: Path, tmp_path: Path) -> None:
    tensors = {"transformer.blocks.0.ffn.net.2.lora_A.weight": torch.ones(2, 9)}
    tensors |= {"transformer.blocks.0.ffn.net.2.lora_B.weight": torch.ones(48, 2)}
    save_file(tensors, tmp_path / "other.safetensors")
    for wrong, kind, message in (
        ([tmp_path / "other.safetensors"], CheckpointError, "does not fit .* wrong shapes"),
        ([lora, "nowhere.safetensors"], CheckpointError, "nowhere.safetensors"),
        ([(lora, 1.0, "middle")], InvalidRequest, "allowed is high or low"),
        ([(lora, float("nan"))], InvalidRequest, r"loras\[0\] scale"),
        ({"a": 1}, InvalidRequest, "loras=.*allowed is a list of files"),
    ):
        for ask in (pipe.stream, pipe.plan, pipe.generate):
            with pytest.raises(kind, match=message):
                ask("a red circle", **SMALL, loras=wrong)
    base = made(pipe)
    with pytest.raises(Error):
        pipe.generate("a red circle", **SMALL, loras=[lora, tmp_path / "other.safetensors"])
    assert torch.equal(made(pipe), base)


def test_files_are_read_once(pipe: fastvid.Pipeline, lora: Path, tmp_path: Path, monkeypatch: Any) -> None:
    reads = list[Path]()
    read = lora_cache.read_source
    monkeypatch.setattr(lora_cache, "read_source", lambda source: reads.append(source.file) or read(source))
    content, size = lora.read_bytes(), lora.stat().st_size
    files = [tmp_path / f"{name}.safetensors" for name in "abc"]
    for file in files:
        file.write_bytes(content)
    cache = LoraCache(limit=2 * size)
    first = cache.read([files[0], (files[0], 0.5, "low")])
    assert reads == [files[0]] and [(one.scale, one.expert) for one in first] == [(1.0, ""), (0.5, "low")]
    assert first[0].terms is first[1].terms
    cache.read([files[1], files[0], files[2]])
    assert reads == files and len(cache) == 2, "the one that was not used for longest is gone"
    cache.read([files[0]])
    assert len(reads) == 3
    os.utime(files[0], ns=(1, 1))
    cache.read([files[0]])
    assert len(reads) == 4, "it was written again"
    assert len(LoraCache(limit=size - 1).read([lora])) == 1, "one that is larger is not kept"
