"""A cold `fastvid generate` beside the import of torch, and loading a 1.3B beside diffusers: processes of their own.

    python benchmarks/bench_start.py [--rounds 5] [--load-rounds 3] [--folder DIR]

Start: a process that imports torch, and one that makes the embedded model's default video; taken in turn, with modules
compiled and files in the page cache. Loading: a folder with random weights in bf16 (1.4 billion, the VAE in fp32),
written to DIR, loaded to the CPU by diffusers, by fastvid, and by fastvid without mapping. Only the loading is timed,
not the imports. Times are of the processor (user and system) and of the clock; the peak is the process's own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import Case, Row, row_of, save, table

PROMPT = "a red circle moving right on a white background"
REPORT = """
import json, resource, time
def used():
    own = resource.getrusage(resource.RUSAGE_SELF)
    return time.perf_counter(), own.ru_utime + own.ru_stime
def report(began, ended):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print("REPORT " + json.dumps({"wall": ended[0] - began[0], "cpu": ended[1] - began[1], "peak": peak}))
START = (time.perf_counter(), 0.0)
"""
TORCH = "import torch\nreport(START, used())"
GENERATE = """
import sys
from fastvid.__main__ import main
sys.argv = ["fastvid", "generate", {prompt!r}, "-o", {output!r}, "--seed", "1", "--quiet", "--overwrite"]
main()
report(START, used())
"""
DIFFUSERS = """
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from transformers import UMT5EncoderModel
began = used()
vae = AutoencoderKLWan.from_pretrained({folder!r}, subfolder="vae", torch_dtype=torch.float32)
pipe = WanPipeline.from_pretrained({folder!r}, vae=vae, torch_dtype=torch.bfloat16, tokenizer=None)
report(began, used())
"""
FASTVID = """
import fastvid
fastvid.load
began = used()
pipe = fastvid.load({folder!r}, device="cpu", dtype="bfloat16", mmap={mmap})
report(began, used())
"""
WRITE = """
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel
torch.manual_seed(0)
transformer = WanTransformer3DModel(
    num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=30, text_dim=4096
).to(torch.bfloat16)
text = UMT5EncoderModel(UMT5Config(d_model=4096, d_ff=64, d_kv=64, num_heads=1, num_layers=1, vocab_size=33)).bfloat16()
scheduler = UniPCMultistepScheduler(
    prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
)
WanPipeline(
    tokenizer=AutoTokenizer.from_pretrained({tokenizer!r}),
    text_encoder=text, transformer=transformer, vae=AutoencoderKLWan(), scheduler=scheduler
).save_pretrained({folder!r}, max_shard_size="20GB")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="of the start")
    parser.add_argument("--load-rounds", type=int, default=3, help="of loading; 0: leave it out")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        generate = GENERATE.format(prompt=PROMPT, output=str(work / "a.mp4"))
        finish("start", {"import torch": TORCH, "fastvid generate": generate}, args.rounds)
        if args.load_rounds:
            finish("load-whole", loads(work), args.load_rounds)
    finally:
        shutil.rmtree(work)


def loads(work: Path) -> dict[str, str]:
    """The programs that load a 1.3B, after it was written."""
    import fastvid

    tokenizer = Path(str(fastvid.__file__)).parent / "embedded" / "tokenizer"
    folder = str(work / "model")
    subprocess.run([sys.executable, "-c", WRITE.format(folder=folder, tokenizer=str(tokenizer))], check=True)
    mapped, read = (FASTVID.format(folder=folder, mmap=mmap) for mmap in ('"auto"', False))
    return {"diffusers": DIFFUSERS.format(folder=folder), "fastvid": mapped, "fastvid, mmap=False": read}


def finish(name: str, programs: dict[str, str], rounds: int) -> None:
    """Run, print and save; each program once before, for the page cache and compiled modules."""
    for program in programs.values():
        run(program)
    found: dict[str, list[dict[str, float]]] = {label: [] for label in programs}
    for _ in range(rounds):
        for label, program in programs.items():
            found[label].append(run(program))
    rows = {word: rows_of(found, key) for key, word in (("cpu", "processor"), ("wall", "clock"))}
    peaks = {label: statistics.median(one["peak"] for one in each) for label, each in found.items()}
    for word, each in rows.items():
        print(table(each, f"{name}, time of the {word}"))
    print(
        {label: f"{peak / 2**20:.0f} MiB" for label, peak in peaks.items()}, save(name, rows, "cpu", peak_bytes=peaks)
    )


def rows_of(found: dict[str, list[dict[str, float]]], key: str) -> list[Row]:
    """The rows of one kind of seconds, in microseconds; speed is relative to the first program."""
    times = {label: [1e6 * one[key] for one in each] for label, each in found.items()}
    baseline = statistics.median(next(iter(times.values())))
    return [row_of(Case(label, int), each, baseline) for label, each in times.items()]


def run(program: str) -> dict[str, float]:
    """What a program reports of itself."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run([sys.executable, "-c", REPORT + program], env=env, check=True, capture_output=True, text=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith("REPORT "))
    reported: dict[str, Any] = json.loads(line.removeprefix("REPORT "))
    return reported


if __name__ == "__main__":
    main()
