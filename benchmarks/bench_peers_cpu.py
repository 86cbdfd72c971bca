"""A whole generate on the CPU beside diffusers and stable-diffusion.cpp: the shape of Wan 2.1 1.3B with random weights.

python benchmarks/bench_peers_cpu.py --models FOLDER [--cases fastvid:bfloat16:float32 diffusers:bfloat16:float32]
                                     [--rounds 1] [--layers 30] [--size 416x240] [--frames 17] [--steps 4]
                                     [--sd-cli PATH]

A case is WHO:DTYPE:VAE_DTYPE; fastvid takes int8 too, for `quantize="int8"` of a bfloat16 model. FOLDER gets the
weights once (6 GB): diffusers' layout in bf16, which both load, and for sd-cli files in the original layout. Each case
is a process of its own, so that peaks and loading are its own; rounds go through all cases in turn. The prompt is given
as 512 random embeddings, since no text encoder is compared. There is no guidance. sd-cli (stable-diffusion.cpp) is a
case "sd-cli:TYPE:" for the type that it converts weights to (bf16, q8_0); its prompt is a placeholder, and it takes
30 layers only.

Counted are wall and CPU seconds of loading, each step and the rest (mostly the VAE), and the peak resident memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from harness import _path, machine

import fastvid

WIDTH = {"num_attention_heads": 12, "attention_head_dim": 128, "text_dim": 4096, "freq_dim": 256, "ffn_dim": 8960}
CASES = ("fastvid:bfloat16:float32", "diffusers:bfloat16:float32", "fastvid:bfloat16:bfloat16")
INDEX = {
    "_class_name": "WanPipeline",
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
}


def main() -> None:
    args = arguments()
    if args.run:
        print(json.dumps(run(args.run, args)))
        return
    write(args.models, args.layers)
    seconds: dict[str, list[dict[str, Any]]] = {case: [] for case in args.cases}
    for number in range(args.rounds):
        for case, made in seconds.items():
            made.append(in_process(case, args))
            print(number, case, json.dumps(made[-1]), flush=True)
    report(seconds, args)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--size", default="416x240")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--sd-cli", type=Path)
    parser.add_argument("--run", help="one case, in this process")
    args = parser.parse_args()
    if any(case.startswith("sd-cli") for case in args.cases) and args.sd_cli is None:
        parser.error("a case of sd-cli needs --sd-cli PATH")
    args.width, args.height = map(int, args.size.split("x"))
    return args


# Weights


def folder(models: Path, layers: int) -> Path:
    return models / f"wan-1.3b-{layers}-layers"


@torch.no_grad()
def write(models: Path, layers: int) -> None:
    """Random weights in bf16, the VAE's in fp32, unless they are there."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
    from safetensors.torch import save_file
    from transformers import UMT5Config, UMT5EncoderModel

    from fastvid.models.wan.weight_names import ORIGINAL, origins

    place = folder(models, layers)
    if (place / "model_index.json").exists():
        return
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    transformer = WanTransformer3DModel(**WIDTH, in_channels=16, out_channels=16, num_layers=layers)
    torch.set_default_dtype(torch.float32)
    vae = AutoencoderKLWan()
    small = {"d_ff": 64, "d_kv": 64, "num_heads": 1, "num_layers": 1, "vocab_size": 33}
    text = UMT5EncoderModel(UMT5Config(d_model=4096, **small, feed_forward_proj="gated-gelu"))
    transformer.save_pretrained(place / "transformer", max_shard_size="20GB")
    vae.save_pretrained(place / "vae")
    text.bfloat16().save_pretrained(place / "text_encoder")
    shutil.copytree(Path(fastvid.__file__).with_name("embedded") / "tokenizer", place / "tokenizer", dirs_exist_ok=True)
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    UniPCMultistepScheduler(**flow).save_pretrained(place / "scheduler")
    for name, part in (("transformer", transformer), ("vae", vae)):
        weights = part.state_dict()
        made = {
            key: one.make(lambda name, of=weights: of[name]) for key, one in origins(list(weights), ORIGINAL).items()
        }
        save_file({key: one.contiguous() for key, one in made.items()}, place / f"{name}.safetensors")
    (place / "model_index.json").write_text(json.dumps(INDEX))


# One case


def in_process(case: str, args: argparse.Namespace) -> dict[str, Any]:
    if case.startswith("sd-cli"):
        return sd_cli(case.split(":")[1], args)
    words = [sys.executable, __file__, "--models", str(args.models), "--run", case, "--layers", str(args.layers)]
    words += ["--size", args.size, "--frames", str(args.frames), "--steps", str(args.steps)]
    made = subprocess.run(words, capture_output=True, text=True)
    if made.returncode:
        raise SystemExit(f"{case} fails:\n{made.stderr[-3000:]}")
    return json.loads(made.stdout.splitlines()[-1])


def run(case: str, args: argparse.Namespace) -> dict[str, Any]:
    who, dtype, vae_dtype = case.split(":")
    if who == "diffusers":  # imported at its first use, which is no loading of weights
        from diffusers import AutoencoderKLWan, WanPipeline  # noqa: F401
    clock = Clock()
    with clock.part("load"):
        generate = {"fastvid": load_fastvid, "diffusers": load_diffusers}[who](args, dtype, vae_dtype)
    generate(clock)
    return clock.result()


class Clock:
    """Wall and CPU seconds of parts, in the order in which they end."""

    def __init__(self) -> None:
        self.parts: dict[str, list[tuple[float, float]]] = {}
        self._last = self._first = (time.perf_counter(), time.process_time())

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        yield
        self.ended(name)

    def ended(self, name: str) -> None:
        now = time.perf_counter(), time.process_time()
        self.parts.setdefault(name, []).append((now[0] - self._last[0], now[1] - self._last[1]))
        self._last = now

    def result(self) -> dict[str, Any]:
        wall, cpu = (self._last[i] - self._first[i] for i in (0, 1))
        parts = {
            name: {"wall": round(sum(one[0] for one in all), 2), "cpu": round(sum(one[1] for one in all), 2)}
            for name, all in self.parts.items()
        }
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"wall": round(wall, 2), "cpu": round(cpu, 2), "peak_bytes": peak, "parts": parts}


def embeddings() -> torch.Tensor:
    return torch.randn(1, 512, 4096, generator=torch.Generator().manual_seed(3))


def load_fastvid(args: argparse.Namespace, dtype: str, vae_dtype: str) -> Callable[[Clock], None]:
    types: dict[str, Any] = {"dtype": "bfloat16", "quantize": "int8"} if dtype == "int8" else {"dtype": dtype}
    pipe = fastvid.load(str(folder(args.models, args.layers)), device="cpu", vae_dtype=vae_dtype, **types)

    def generate(clock: Clock) -> None:
        size = {"height": args.height, "width": args.width, "num_frames": args.frames}
        options = {"num_inference_steps": args.steps, "guidance_scale": 1.0, "seed": 1}
        for event in pipe.stream(None, prompt_embeds=embeddings(), **size, **options):
            if type(event).__name__ == "Step":
                clock.ended("steps")
        clock.ended("rest")

    return generate


def load_diffusers(args: argparse.Namespace, dtype: str, vae_dtype: str) -> Callable[[Clock], None]:
    from diffusers import AutoencoderKLWan, WanPipeline

    place, kind = folder(args.models, args.layers), getattr(torch, dtype)
    vae = AutoencoderKLWan.from_pretrained(place, subfolder="vae", torch_dtype=getattr(torch, vae_dtype))
    none: dict[str, Any] = {"text_encoder": None, "tokenizer": None}
    pipe = WanPipeline.from_pretrained(place, vae=vae, torch_dtype=kind, **none)
    pipe.set_progress_bar_config(disable=True)

    def generate(clock: Clock) -> None:
        def ended(pipe: Any, step: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
            clock.ended("steps")
            return given

        size = {"height": args.height, "width": args.width, "num_frames": args.frames}
        options = {"num_inference_steps": args.steps, "guidance_scale": 1.0, "callback_on_step_end": ended}
        generator = torch.Generator().manual_seed(1)
        pipe(prompt_embeds=embeddings().to(kind), **size, **options, generator=generator, output_type="np")
        clock.ended("rest")

    return generate


def sd_cli(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    place = folder(args.models, args.layers)
    threads = os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))
    words = [str(args.sd_cli), "-M", "vid_gen", "--diffusion-model", str(place / "transformer.safetensors")]
    words += ["--vae", str(place / "vae.safetensors"), "-p", "x", "--cfg-scale", "1", "--sampling-method", "euler"]
    words += ["-W", str(args.width), "-H", str(args.height), "--video-frames", str(args.frames), "--flow-shift", "3.0"]
    words += ["--steps", str(args.steps), "-t", threads, "--type", kind, "-o", str(place / "out.avi")]
    start = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"sd-cli fails:\n{said.decode(errors='replace')[-3000:]}")
    cpu = usage.ru_utime + usage.ru_stime
    return {
        "wall": round(time.perf_counter() - start, 2),
        "cpu": round(cpu, 2),
        "peak_bytes": usage.ru_maxrss * 1024,
        "parts": {},
    }


def report(seconds: dict[str, list[dict[str, Any]]], args: argparse.Namespace) -> None:
    rows = {}
    first = next(iter(seconds.values()))
    for case, made in seconds.items():
        rows[case] = {
            **{key: statistics.median(one[key] for one in made) for key in ("wall", "cpu")},
            "peak_bytes": max(one["peak_bytes"] for one in made),
            # Of the same round: the other's time divided by the first case's.
            "wall_ratio": round(statistics.median(a["wall"] / b["wall"] for a, b in zip(made, first, strict=True)), 3),
            "cpu_ratio": round(statistics.median(a["cpu"] / b["cpu"] for a, b in zip(made, first, strict=True)), 3),
            "rounds": made,
        }
        row = rows[case]
        told = f"wall {row['wall']:.1f} s, CPU {row['cpu']:.1f} s, peak {row['peak_bytes'] / 2**30:.2f} GiB"
        print(f"{case:<30} {told}, {row['wall_ratio']:.2f} / {row['cpu_ratio']:.2f} x the first")
    device = torch.device("cpu")
    sizes = {"size": args.size, "frames": args.frames, "steps": args.steps, "layers": args.layers}
    record = {
        "benchmark": "peers",
        "machine": machine(device),
        **sizes,
        "threads": torch.get_num_threads(),
        "cases": rows,
    }
    path = _path(f"peers-{args.layers}-layers-{args.size}", device)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
