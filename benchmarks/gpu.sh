#!/usr/bin/env bash
# The first hour on a GPU: a ladder of steps that fits a call of 9 minutes. Call it again, and it goes on.
#
#   benchmarks/gpu.sh                      # build, doctor, smoke, video, tune, tests, sanitize
#   benchmarks/gpu.sh smoke tune           # build, and these alone
#   benchmarks/gpu.sh measure [rgb ...]    # time operations and whole models, which the ladder leaves out
#   benchmarks/gpu.sh --help
#
# Needs the system's Python with torch, Triton, pytest and hypothesis, and nvcc. Needs no package index and no virtual
# environment, and installs nothing; diffusers, av and ftfy may be missing (a column without its peer is left out).
# Results go to $OUT, or to benchmarks/results, each as soon as it is there; benchmarks/README.md says what to commit.
set -euo pipefail
cd "$(dirname "$0")/.."
export OUT=${OUT:-$PWD/benchmarks/results}
exec "${PYTHON:-python3}" benchmarks/ladder.py "$@"
