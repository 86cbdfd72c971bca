"""Loading a sharded checkpoint of 64 MB: everything is read, and memory does not grow by more than a shard."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastvid.loaders import safetensors, weight_files
from fastvid.models.wan.config import WanTransformerConfig

ROOT = Path(__file__).parents[2]
CONFIG = WanTransformerConfig(8, ffn_dim=4096, num_layers=2, text_dim=512)


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("bench_load", ROOT / "benchmarks" / "bench_load.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def files(bench: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, int]]:
    return bench.write_checkpoint(tmp_path_factory.mktemp("load") / "model", bench.module_of(CONFIG), shards=4)


def read_bytes() -> int:
    """Bytes that this process has asked the system for."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_every_byte_is_read_and_memory_stays_small(
    bench: ModuleType, files: list[tuple[Path, int]], device: str
) -> None:
    total, shard = sum(size for _, size in files), max(size for _, size in files)
    assert total > 60e6
    found = weight_files.find_files(files[0][0].parent)
    module, before = bench.module_of(CONFIG), read_bytes()
    with bench.Sampler() as sampler:
        safetensors.load_into(module, found, device, torch.bfloat16)
    assert read_bytes() - before >= 0.99 * total
    assert sampler.growth <= shard + 50e6 + (total if device == "cpu" else 0)
    assert {p.device.type for p in module.parameters()} == {device}
    assert module.blocks[0].ffn.net[2].weight.dtype == torch.bfloat16


def test_what_was_read_is_what_is_there(bench: ModuleType, files: list[tuple[Path, int]]) -> None:
    from safetensors.torch import load_file

    module = bench.module_of(CONFIG)
    safetensors.load_into(module, [path for path, _ in files], "cpu", torch.bfloat16)
    stored = {name: tensor for path, _ in files for name, tensor in load_file(path).items()}
    for name, tensor in module.state_dict().items():
        wanted = stored[name].to(tensor.dtype)
        assert torch.equal(tensor.view(torch.uint8), wanted.view(torch.uint8)), name
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in module.parameters()), "nothing stays beside it"
