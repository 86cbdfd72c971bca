"""Loading a sharded checkpoint: speed compared with plain file reads, and peak memory.

python benchmarks/bench_load.py [--gb 4] [--rounds 3] [--folder DIR]

Writes DIR/model (4 shards of a Wan 2.1 transformer's weights in bf16, random bytes, published names) and a plain file
of the same size. Reads them alternately with a cold cache: the file in chunks of 16 MB, the checkpoint with
`safetensors.load_into` to the meta device (data is read and dropped) and to the CPU. Memory is the growth of this
process's anonymous resident bytes, sampled during loading. Removes the files at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from harness import Case, Row, row_of, save, table
from torch import nn

from fastvid.loaders import safetensors
from fastvid.models.wan.config import WanTransformerConfig
from fastvid.models.wan.transformer import WanTransformer

PIECE = 2**24
BLOCK_BYTES = 2 * (8 * 1536**2 + 2 * 1536 * 8960)  # approximate size of a block of the 1.3B in bf16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        config = WanTransformerConfig(12, ffn_dim=8960, num_layers=max(1, round(args.gb * 1e9 / BLOCK_BYTES)))
        files = write_checkpoint(work / "model", module_of(config), shards=4)
        rows, grown = compare(config, files, work / "plain", args.rounds)
    finally:
        shutil.rmtree(work)
    sizes = [size for _, size in files]
    shares = {row.name: rows[0].median / row.median for row in rows[1:]}
    print(table(rows, f"{sum(sizes) / 1e9:.2f} GB in {len(sizes)} shards"))
    print({name: f"{size / 2**20:.0f} MiB" for name, size in grown.items()}, shares)
    facts = {"bytes": sum(sizes), "shard_bytes": sizes, "rss_anon_growth": grown, "share_of_disk_rate": shares}
    print(save("load", rows, "cpu", **facts))


def compare(
    config: WanTransformerConfig, files: list[tuple[Path, int]], plain: Path, rounds: int
) -> tuple[list[Row], dict[str, int]]:
    """Time reading and loading, interleaved, and the peak memory growth of each."""
    paths, total = [path for path, _ in files], sum(size for _, size in files)
    write_random(plain, total)
    kept: list[nn.Module] = []

    def load(device: str) -> None:
        kept[:] = [module_of(config)]
        safetensors.load_into(kept[0], paths, device, torch.bfloat16)

    cases = [
        Case("read the disk", lambda: read(plain), total),
        Case("load to meta", lambda: load("meta"), total),
        Case("load to cpu", lambda: load("cpu"), total),
    ]
    times: list[list[float]] = [[] for _ in cases]
    grown = {case.name: 0 for case in cases}
    for _ in range(rounds):
        for case, taken in zip(cases, times, strict=True):
            kept.clear()
            forget([plain, *paths])
            with Sampler() as sampler:
                taken.append(timed(case.run))
            grown[case.name] = max(grown[case.name], sampler.growth)
    baseline = statistics.median(times[0])
    return [row_of(case, taken, baseline) for case, taken in zip(cases, times, strict=True)], grown


def module_of(config: WanTransformerConfig) -> WanTransformer:
    with torch.device("meta"):
        return WanTransformer(config)


def write_checkpoint(folder: Path, module: nn.Module, shards: int) -> list[tuple[Path, int]]:
    """Write random bf16 weights of a module's shapes as shards with an index; returns (file, bytes) of each shard."""
    folder.mkdir(parents=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    total, placed = sum(2 * tensor.numel() for tensor in module.state_dict().values()), 0
    groups: list[dict[str, dict[str, object]]] = [{} for _ in range(shards)]
    ends = [0] * shards
    for name, tensor in module.state_dict().items():
        shard = min(shards - 1, placed * shards // total)
        begin, size = ends[shard], 2 * tensor.numel()
        groups[shard][name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [begin, begin + size]}
        ends[shard], placed = begin + size, placed + size
    made = []
    for number, (header, size) in enumerate(zip(groups, ends, strict=True)):
        path = folder / f"diffusion_pytorch_model-{number + 1:05}-of-{shards:05}.safetensors"
        text = json.dumps(header).encode()
        write_random(path, size, struct.pack("<Q", len(text)) + text)
        made.append((path, path.stat().st_size))
    index = {name: made[number][0].name for number, header in enumerate(groups) for name in header}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return made


def write_random(path: Path, size: int, head: bytes = b"") -> None:
    """Write `head` and random bytes that are finite bf16 numbers, and sync: holes and dirty pages would read faster
    than data on disk."""
    numbers = np.frombuffer(os.urandom(PIECE), np.uint8).copy()
    numbers[1::2] &= 0xBF  # clears the highest bit of the exponent
    piece = numbers.tobytes()
    with path.open("wb") as file:
        file.write(head)
        for start in range(0, size, PIECE):
            file.write(piece[: min(PIECE, size - start)])
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> None:
    """Read a file sequentially in chunks into one buffer."""
    buffer = bytearray(PIECE)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def forget(paths: list[Path]) -> None:
    """Drop files from the page cache."""
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(run: Callable[[], None]) -> float:
    """Run time in microseconds."""
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e6


def anonymous() -> int:
    """Anonymous resident bytes of this process, which excludes pages of files."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


class Sampler:
    """Samples `anonymous` in a background thread; `growth` is the peak above the initial value."""

    def __enter__(self) -> Sampler:
        self.start, self.growth, self._done = anonymous(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.growth = max(self.growth, anonymous() - self.start)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()
        self.growth = max(self.growth, anonymous() - self.start)


if __name__ == "__main__":
    main()
