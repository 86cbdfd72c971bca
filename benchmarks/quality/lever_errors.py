"""The error of each lever at the width of Wan 2.1 1.3B, against the exact request, in latents.

    python -m fastvid.benchmarks.quality.lever_errors --out benchmarks/results/lever-errors.json

The model has 1.3B's width, heads and feed-forward, but fewer layers, and weights drawn so that its activations look
like those of trained models: blocks that add a tenth of the stream each, and a few channels that are twenty times as
large as the rest. It makes no pictures, so this says how far a lever moves the result, and not how that looks; the
embedded model's videos say that (`fastvid.benchmarks.quality.levers`).
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import fastvid
from fastvid.benchmarks.host import RESULTS, ROOT
from fastvid.benchmarks.quality.lever_cases import CASES, EXACT
from fastvid.models.wan.config import WanTransformerConfig
from fastvid.models.wan.transformer import WanTransformer

EMBEDDED = ROOT / "fastvid" / "embedded"
SHAPE = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960}
LARGE, HOW_LARGE = 0.002, 20.0  # share of the channels, and how large they are
ADDED = 0.1  # what a block adds, relative to the stream


def write_model(folder: Path, layers: int) -> None:
    """A folder with a random transformer and the embedded model's other parts."""
    shutil.copytree(EMBEDDED, folder, dirs_exist_ok=True)
    file = folder / "transformer" / "config.json"
    config = json.loads(file.read_text()) | SHAPE | {"num_layers": layers}
    file.write_text(json.dumps(config))
    known = {key: value for key, value in config.items() if not key.startswith("_")}
    with torch.device("meta"):
        module = WanTransformer(WanTransformerConfig.from_dict(known))
    generator = torch.Generator().manual_seed(0)
    state = {name: _drawn(name, tuple(one.shape), generator) for name, one in module.state_dict().items()}
    for old in (folder / "transformer").glob("*.safetensors*"):
        old.unlink()
    save_file(state, folder / "transformer" / "diffusion_pytorch_model.safetensors", {"format": "pt"})


def _drawn(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Weights of one tensor in fp32."""
    if "norm" in name:
        return (
            torch.ones(shape, dtype=torch.float32)
            if name.endswith("weight")
            else torch.zeros(shape, dtype=torch.float32)
        )
    drawn = torch.randn(shape, generator=generator, dtype=torch.float32)
    if name.endswith("bias"):
        return 0.02 * drawn
    if "scale_shift_table" in name:
        gates = torch.ones(shape, dtype=torch.float32)
        if shape[1] == 6:
            gates[:, [2, 5]] = ADDED
        return 0.3 * drawn * gates
    fan_in = drawn[0].numel()
    weight = drawn * fan_in**-0.5
    if name.endswith(("to_out.0.weight", "ffn.net.2.weight")):
        large = torch.rand(shape[0], generator=generator, dtype=torch.float32) < LARGE
        weight[large] *= HOW_LARGE
    return weight


def errors(folder: Path, size: tuple[int, int, int], cases: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each case: relative error of the latents, CPU seconds of the request."""
    pipe = fastvid.load(folder, device="cpu")
    width, height, frames = size
    exact, rows = None, []
    for name, options in cases.items():
        began = time.process_time()
        shape: dict[str, Any] = {"width": width, "height": height, "num_frames": frames}
        made = pipe.generate("a red circle moving right", seed=1, **shape, **options).latents
        exact = made if exact is None else exact
        error = float((made - exact).norm() / exact.norm())
        rows.append({"case": name, "error": error, "seconds": time.process_time() - began})
        print(f"{name:<40} {error:.4f} {rows[-1]['seconds']:.1f} s", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--size", default="160x96x9", help="width x height x frames")
    parser.add_argument("--cases", default="", help="names of cases, separated by ';' (default: all)")
    parser.add_argument("--out", type=Path, default=RESULTS / "lever-errors.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    wanted = {EXACT, *args.cases.split(";")} if args.cases else set(CASES)
    width, height, frames = map(int, args.size.split("x"))
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), args.layers)
        cases = {name: dict(options) for name, options in CASES.items() if name in wanted}
        rows = errors(Path(folder), (width, height, frames), cases)
    result = {"layers": args.layers, "size": args.size, "torch": torch.__version__, "rows": rows}
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
