"""Streaming on the CPU with the embedded model: time to the first frame, memory by length, gain of parallel work.

Parallel work is decoding or writing while denoising continues.

python benchmarks/bench_stream.py [first] [memory] [beside] [full] [--size 160x96] [--seconds 10 60] [--rounds 5]

first: a video of 60 s (960 frames, 64x64, 4 steps): seconds to its first frame and in total, with the model loaded.
memory: for each length, peak resident bytes (VmHWM) of a separate process that writes a file (2 steps, no guidance).
beside: the same request decoded and written synchronously and in a thread, interleaved, for the embedded model and for
one with random weights and width 384. full: one window (33 frames) of 1920x1080 in 1 step without guidance, and the
time of a minute extrapolated from it.

Files are written like on the command line: a stream without latents into a FrameSink.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import Row, save, table

import fastvid
from fastvid.engine import decode
from fastvid.media.writer import BackgroundWriter, FrameSink

PROMPT = "a red circle moving right on a white background"
PARTS = ("first", "memory", "beside", "full")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="what to measure (default: all)")
    parser.add_argument("--size", default="160x96", help="of memory's videos")
    parser.add_argument("--seconds", type=float, nargs="+", default=[10, 60], help="lengths of memory's videos")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a request, in a process of its own
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(json.loads(args.one))))
        return
    for part in args.parts or PARTS:
        {"first": first, "memory": memory, "beside": beside, "full": full}[part](args)


# ---------------------------------------------------------------- one video


def write(pipe: Any, path: Path, in_thread: bool = True, **request: Any) -> dict[str, float]:
    """Write a video file. Returns the seconds to the first frame and in total."""
    start, first = time.perf_counter(), 0.0
    stream = pipe.stream(PROMPT, keep_latents=False, **request)
    started = next(stream)
    with (
        FrameSink(path, width=started.width, height=started.height, fps=started.fps) as sink,
        BackgroundWriter(sink) as writing,
    ):
        for event in stream:
            if isinstance(event, fastvid.Frames):
                first = first or time.perf_counter() - start
                (writing if in_thread else sink).write(event.frames)
        writing.finish()
        sink.close()
    return {"first_frame": first, "total": time.perf_counter() - start, "frames": started.num_frames}


def one(request: dict[str, Any]) -> dict[str, Any]:
    """Generate one video in this process, and measure its memory."""
    pipe = fastvid.load("embedded", device="cpu")
    loaded = peak()
    with tempfile.TemporaryDirectory() as folder:
        made = write(pipe, Path(folder) / "out.mp4", **request)
    return {**made, "vm_hwm": peak(), "vm_hwm_loaded": loaded, "request": request}


def peak() -> int:
    """Peak resident bytes of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def alone(**request: Any) -> dict[str, Any]:
    """`one` in a new process."""
    command = [sys.executable, __file__, "--one", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------- what is measured


def first(args: argparse.Namespace) -> None:
    """Time to the first frame of a minute."""
    made = [alone(seconds=60, num_inference_steps=4, seed=1) for _ in range(args.rounds)]
    made.sort(key=lambda m: m["total"])
    middle = made[len(made) // 2]
    early, total = middle["first_frame"], middle["total"]
    print(f"{middle['frames']} frames: the first after {early:.2f} s of {total:.1f}, {early / total:.1%}")
    rows = [row("first frame", [m["first_frame"] for m in made]), row("all frames", [m["total"] for m in made])]
    print(save("stream-first", rows, "cpu", share=early / total, request=middle["request"]))


def memory(args: argparse.Namespace) -> None:
    """Peak memory against length."""
    width, height = map(int, args.size.split("x"))
    request = {"width": width, "height": height, "num_inference_steps": 2, "guidance_scale": 1.0, "seed": 1}
    made = [alone(seconds=seconds, **request) for seconds in args.seconds]
    for m in made:
        print(f"{args.size}, {m['frames']} frames: {m['vm_hwm'] / 2**20:.0f} MiB, {m['total']:.0f} s")
    grown = made[-1]["vm_hwm"] / made[0]["vm_hwm"]
    print(f"{grown:.3f} x")
    rows = [row(f"{m['frames']} frames", [m["total"]]) for m in made]
    print(save(f"stream-memory-{args.size}", rows, "cpu", videos=made, grown=grown))


def full(args: argparse.Namespace) -> None:
    """A minute of 1920x1080, extrapolated from a window of it."""
    made = alone(width=1920, height=1080, num_frames=33, num_inference_steps=1, guidance_scale=1.0, seed=1)
    minute = made["total"] * 960 / made["frames"]
    print(f"1920x1080, {made['frames']} frames, 1 step: {made['total']:.0f} s, {made['vm_hwm'] / 2**20:.0f} MiB")
    print(f"extrapolated by frames to 960 of them: {minute:.0f} s")
    rows = [row(f"{made['frames']} frames", [made["total"]])]
    print(save("stream-full-1920x1080", rows, "cpu", video=made, extrapolated_seconds_for_960_frames=minute))


CASES = (
    ("decode and write in place", False, False),
    ("write in a thread", False, True),
    ("decode and write in threads", True, True),
)


def beside(args: argparse.Namespace) -> None:
    """In place against beside, interleaved. Processor seconds stand next to the times: on a machine that others use, a
    process with more threads gets more of it, which is no gain where it is alone."""
    results: dict[str, list[Row]] = {}
    spent: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, pipe, request in (
            ("embedded 96x160", fastvid.load("embedded", device="cpu"), {"width": 160, "height": 96, "num_frames": 49}),
            ("384 wide, 96x160", middling(Path(folder) / "model"), {"width": 160, "height": 96, "num_frames": 33}),
        ):
            options = {"num_inference_steps": 2, "guidance_scale": 1.0, "seed": 1, **request}
            runs = [timed(pipe, Path(folder) / "out.mp4", *case[1:], options) for case in CASES]
            taken: list[list[tuple[float, float]]] = [[run() for run in runs] for _ in range(args.rounds + 1)][1:]
            results[name] = [row(case[0], [r[n][0] for r in taken]) for n, case in enumerate(CASES)]
            spent[name] = {case[0]: statistics.median(r[n][1] for r in taken) for n, case in enumerate(CASES)}
            print(table(results[name], name), spent[name], sep="\n")
    print(save("stream-beside", results, "cpu", processor_seconds=spent))


def timed(
    pipe: Any, path: Path, decodes: bool, writes: bool, options: dict[str, Any]
) -> Callable[[], tuple[float, float]]:
    """Write the file with decoding and writing each synchronous or in a thread: wall seconds and CPU seconds."""

    def run() -> tuple[float, float]:
        chosen, decode.faster_beside = decode.faster_beside, lambda device: decodes
        mark, busy = time.perf_counter(), time.process_time()
        try:
            write(pipe, path, writes, **options)
        finally:
            decode.faster_beside = chosen
        return time.perf_counter() - mark, time.process_time() - busy

    return run


def middling(folder: Path) -> Any:
    """A model with random weights: 8 layers 384 wide, a VAE 32 wide; windows of 5 columns, latents carried on."""
    from dataclasses import replace

    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import tiny

    tiny.write_checkpoint(
        folder,
        vae_config={"base_dim": 32, "num_res_blocks": 1, "z_dim": 16},
        num_attention_heads=6,
        attention_head_dim=64,
        ffn_dim=1536,
        num_layers=8,
    )
    pipe = fastvid.load(str(folder), device="cpu")
    recipe = replace(pipe._model.preset, window=5, carries=True)
    pipe._model = replace(pipe._model, preset=recipe)
    return pipe


def row(name: str, seconds: list[float]) -> Row:
    """Times in the harness's form."""
    times = sorted(s * 1e6 for s in seconds)
    return Row(name, times[len(times) // 2], times[0], times[-1], len(times), 0.0, 0.0, 1.0)


if __name__ == "__main__":
    main()
