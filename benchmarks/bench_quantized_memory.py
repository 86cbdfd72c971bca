"""Memory of quantized models: what is held, and the peaks of loading and of a step, beside the file's size.

python benchmarks/bench_quantized_memory.py [--ways "q4_k file;fp8 file"] [--num-frames 5] [--folder DIR]

A transformer of the 1.3B's shape with random weights, in bf16, in fp8 and int8 as `fastvid convert` writes them, and in
a GGUF file of Q4_K; the other parts are the embedded model's. Each way is measured in a process of its own: peak
resident bytes above those of the process with PyTorch and the embedded model used once. Allowed is at most 1.10 x the
file's size, and for the peaks, in addition, what the same step takes in activations in bf16. Removes the files.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import save
from safetensors.torch import save_file

import fastvid
from fastvid.loaders import quantize
from fastvid.loaders.convert import convert
from fastvid.models.registry import build_empty, target_dtype
from fastvid.models.wan.config import WanTransformerConfig

EMBEDDED = Path(fastvid.__file__).parent / "embedded"
CONFIG = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30, "text_dim": 128}
WAYS = {  # name -> the files' format, quantize= on load
    "bf16": ("bf16", None),
    "fp8 file": ("fp8", None),
    "fp8 file, 8-bit products": ("fp8", "fp8"),
    "fp8 from bf16": ("bf16", "fp8"),
    "int8 file, 8-bit products": ("int8", "int8"),
    "int8 from bf16": ("bf16", "int8"),
    "q4_k file": ("q4_k", None),
}
SHARE = 1.10  # of the file's size that the tensors may take


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ways", default=";".join(WAYS), help="names, separated by semicolons")
    parser.add_argument("--num-frames", type=int, default=5)
    parser.add_argument("--layers", type=int, default=CONFIG["num_layers"])
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--child", nargs=3, metavar=("FOLDER", "QUANTIZE", "FRAMES"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure_here(Path(args.child[0]), args.child[1], int(args.child[2]))))
        return
    wanted = [name for name in WAYS if name in args.ways.split(";")]
    work = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        rows = measure_all(work, list(dict.fromkeys(["bf16", *wanted])), args.num_frames, args.layers)
    finally:
        shutil.rmtree(work)
    print(
        save("quantized-memory", [], "cpu", num_frames=args.num_frames, size="416x240", layers=args.layers, ways=rows)
    )


def measure_all(work: Path, ways: list[str], frames: int, layers: int) -> dict[str, dict[str, Any]]:
    """Rows of bytes, by way."""
    folders, rows = (
        write_models(work, {name for way in ways for name in WAYS[way] if name}, layers),
        dict[str, dict[str, Any]](),
    )
    for way in ways:
        format, option = WAYS[way]
        words = [sys.executable, __file__, "--child", str(folders[format]), option or "none", str(frames)]
        out = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout
        # Of what is quantized on load, the file that it would be.
        file = files_of(folders[option if option in folders else format])
        row = {"file": file, **json.loads(out.splitlines()[-1])}
        rows[way] = row
        activations = rows["bf16"]["peak of a step"] - rows["bf16"]["held"]
        allowed = SHARE * file + activations
        row |= {"held / file": row["held"] / file, "allowed peak": allowed, "activations of bf16": activations}
        row["fits"] = row["held"] <= SHARE * file and max(row["peak of a step"], row["peak of load"]) <= allowed
        shown = ("file", "held", "peak of load", "peak of a step", "allowed peak")
        text = ", ".join(f"{name} {row[name] / 2**20:.0f} MiB" for name in shown)
        print(f"{way}: {text}, fits: {row['fits']}", flush=True)
    return rows


# ---------------------------------------------------------------- the measured process


def measure_here(folder: Path, option: str, frames: int) -> dict[str, Any]:
    """Bytes of the transformer's tensors, and peaks above what the process had before."""
    torch.set_num_threads(1)
    small = fastvid.load("embedded", device="cpu", dtype="bfloat16", quantize="int8")._model
    step(small.transformer, torch.zeros(1, 8, 128, dtype=torch.bfloat16), 1, 8, 8)
    del small
    base = resident("VmRSS")
    forget_peak()
    began = time.perf_counter()
    model = fastvid.load(folder, device="cpu", dtype="bfloat16", quantize={"transformer": option})._model
    loaded, peak = time.perf_counter() - began, resident("VmHWM") - base
    held = sum(parameter.nbytes for parameter in model.transformer.parameters())
    rest = model.sizes.total - held
    text = torch.randn(1, 16, 128, dtype=torch.bfloat16)
    forget_peak()
    began = time.perf_counter()
    step(model.transformer, text, (frames - 1) // 4 + 1, 30, 52)
    took, high = time.perf_counter() - began, resident("VmHWM") - base
    return {
        "held": held,
        "peak of load": peak - rest,
        "peak of a step": high - rest,
        "resident after": resident("VmRSS") - base - rest,
        "seconds": {"load": loaded, "step": took},
    }


def step(module: Any, text: torch.Tensor, time: int, height: int, width: int) -> None:
    latents = torch.randn(1, 16, time, height, width, dtype=torch.bfloat16)
    with torch.inference_mode():
        module(latents, torch.tensor([500.0]), module.prepare_context(text))


def resident(name: str) -> int:
    """VmRSS: resident bytes now; VmHWM: their peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


# ---------------------------------------------------------------- files


def write_models(work: Path, formats: set[str], layers: int) -> dict[str, Path]:
    """Folders of whole models, by format."""
    folders = {format: work / format for format in (*formats, "bf16")}
    for folder in folders.values():
        shutil.copytree(EMBEDDED, folder, ignore=shutil.ignore_patterns("*diffusion_pytorch_model.safetensors"))
        shutil.copytree(EMBEDDED / "vae", folder / "vae", dirs_exist_ok=True)
    config = json.loads((EMBEDDED / "transformer/config.json").read_text()) | CONFIG | {"num_layers": layers}
    tensors = dict(random_weights(WanTransformerConfig.from_dict(config)))
    source = folders["bf16"] / "transformer"
    save_file(tensors, source / "diffusion_pytorch_model.safetensors")
    (source / "config.json").write_text(json.dumps(config))
    for format in formats - {"bf16"}:
        target = folders[format] / "transformer"
        shutil.rmtree(target)
        if format == "q4_k":
            target.mkdir()
            write_gguf(target / "model.gguf", tensors, set(quantize.weights_of(empty(config))))
            (target / "config.json").write_text(json.dumps(config))
        else:
            convert(source, target, quantize=format)
    return folders


def empty(config: dict[str, Any]) -> torch.nn.Module:
    return build_empty("transformer", WanTransformerConfig.from_dict(config))


def files_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in (folder / "transformer").iterdir() if file.suffix != ".json")


def random_weights(config: WanTransformerConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Blocks have equal weights: nothing here depends on them."""
    module, made = build_empty("transformer", config), dict[str, torch.Tensor]()
    for name, tensor in module.state_dict().items():
        kind = "block " + name.split(".", 2)[-1] if name.startswith("blocks.") else name
        if kind not in made:
            made[kind] = (torch.randn(tensor.shape) * 0.02).to(target_dtype(module, name, torch.bfloat16))
        yield name, made[kind].clone()


def write_gguf(path: Path, tensors: dict[str, torch.Tensor], quantized: set[str]) -> None:
    """Random blocks of Q4_K for the quantized weights, F32 for vectors, BF16 for the rest."""
    header = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), 1)]
    header.append(_text("general.architecture") + struct.pack("<I", 8) + _text("wan"))
    offset, kinds = 0, {}
    for name, tensor in tensors.items():
        kind = 12 if name in quantized else 0 if tensor.ndim == 1 else 30
        size = tensor.numel() * 144 // 256 if kind == 12 else tensor.numel() * (4 if kind == 0 else 2)
        shape = tuple(reversed(tensor.shape))
        header.append(_text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset))
        kinds[name], offset = (kind, size), offset + -(-size // 32) * 32
    start = b"".join(header)
    with path.open("wb") as file:
        file.write(start + bytes(-len(start) % 32))
        for name, (kind, size) in kinds.items():
            file.write(_data(tensors[name], kind, size))
            file.write(bytes(-size % 32))


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _data(tensor: torch.Tensor, kind: int, size: int) -> bytes:
    if kind == 0:
        return bytes(tensor.float().numpy().tobytes())
    if kind == 30:
        return bytes(tensor.bfloat16().contiguous().view(torch.uint8).numpy().tobytes())
    blocks = np.random.default_rng(0).integers(0, 256, (size // 144, 144), dtype=np.uint8)
    blocks[:, :4] = np.array([0.001, 0.001], np.float16).view(np.uint8)
    return bytes(blocks.tobytes())


if __name__ == "__main__":
    main()
