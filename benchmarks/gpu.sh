#!/usr/bin/env bash
# Everything that needs a GPU, in one call of under 10 minutes: build the extension for this GPU, run the tests marked
# `gpu`, run the benchmarks. It needs the system's Python with torch, Triton, pytest and hypothesis, and nvcc; no package
# index, no virtual environment, nothing installed. Results go to $OUT, or to benchmarks/results.
#
#   benchmarks/gpu.sh [benchmark ...]      # e.g. rgb; all of benchmarks/bench_*.py when none is named
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export OUT=${OUT:-$PWD/benchmarks/results}
mkdir -p "$OUT"

# 9.0 and later have instructions of their own (the a of sm_90a); older ones do not.
arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d ' .')
if [ "$arch" -ge 90 ]; then arch=${arch}a; fi
FASTVID_BUILD_CUDA=1 FASTVID_CUDA_ARCHS=$arch "$python" setup.py -q build_ext --inplace

# What an editable install would do: the package, with kernels/ as fastvid.kernels, on the path ahead of the checkout.
site=$PWD/build/site
rm -rf "$site"
mkdir -p "$site/fastvid"
ln -s "$PWD"/fastvid/* "$site/fastvid/"
ln -s "$PWD/kernels" "$site/fastvid/kernels"
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1

"$python" -c 'from fastvid import doctor; print(doctor.render(doctor.doctor()))' | tee "$OUT/doctor.txt"

failed=0
mapfile -t tests < <(grep -l 'mark\.gpu' tests/test_*.py)
"$python" -m pytest -q -m gpu -p no:cacheprovider "${tests[@]}" 2>&1 | tee "$OUT/tests.txt" || failed=1

if [ $# -eq 0 ]; then
    mapfile -t names < <(cd benchmarks && printf '%s\n' bench_*.py | sed 's/^bench_//; s/\.py$//')
    set -- "${names[@]}"
fi
for name in "$@"; do
    PYTHONPATH=$PWD/benchmarks:$PYTHONPATH "$python" "benchmarks/bench_$name.py" --device cuda || failed=1
done
exit $failed
