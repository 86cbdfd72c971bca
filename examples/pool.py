"""Several requests over a pool of pipelines on Ray: python examples/pool.py [--groups 2] [--parallel 1] [PROMPT ...]

Needs the extra: pip install fastvid[ray]. On a cluster, run it where `ray status` works, with --folder on a disk that
all machines see.
"""

from __future__ import annotations

import argparse
import time

import fastvid

PROMPTS = [
    f"a {color} {shape} moving right on a white background"
    for color in ("red", "blue")
    for shape in ("circle", "square")
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompts", nargs="*", default=PROMPTS)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--groups", type=int, default=2, help="pipelines")
    parser.add_argument("--parallel", default="1", help="ranks of each")
    parser.add_argument("--folder", help="for checkpoints; one that all machines see")
    args = parser.parse_args()
    began = time.perf_counter()
    with fastvid.Pool(args.model, groups=args.groups, parallel=args.parallel, folder=args.folder) as pool:
        print(f"{args.groups} pipelines after {time.perf_counter() - began:.1f} s")
        jobs = [(prompt, pool.submit(prompt=prompt)) for prompt in args.prompts]
        for number, (prompt, job) in enumerate(jobs):
            path = job.result().save(f"{number}.mp4")
            print(f"{time.perf_counter() - began:6.1f} s  {path}  {prompt}")


if __name__ == "__main__":
    main()
