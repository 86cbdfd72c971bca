#!/usr/bin/env bash
# The GPU ladder. Each rung works on a bare machine and takes under 9 minutes:
#
#   benchmarks/gpu.sh build                   # compile csrc/ for this GPU
#   benchmarks/gpu.sh smoke                   # doctor, and one video by the embedded model
#   benchmarks/gpu.sh verify                  # run the tests marked `gpu`, then the small ones under a sanitizer
#   benchmarks/gpu.sh measure [NAME ...]      # time operations and whole models: rgb attention ... vae_frames e2e
#   benchmarks/gpu.sh all                     # all four, in one call
#
# Needs the system's Python with torch, Triton, pytest and hypothesis, and nvcc. Needs no package index and no virtual
# environment, and installs nothing; diffusers, av and ftfy may be missing (a column without its peer is left out).
# Results go to $OUT, or to benchmarks/results. A rung that was cut off continues with what has no result yet
# (ALL=1: everything again). Then commit the results and run benchmarks/verified.py.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export OUT=${OUT:-$PWD/benchmarks/results}
mkdir -p "$OUT"
rung=${1:-}
[ $# -eq 0 ] || shift
seconds=${SECONDS_IN_ALL:-500} # after which nothing new is begun
a_run=${SECONDS_A_RUN:-240}    # limit of one benchmark or sanitizer run: one that hangs must not cost the others

failed=0
least() { [ "$1" -lt "$2" ] && echo "$1" || echo "$2"; }
time_is_up() { [ "$SECONDS" -gt "$seconds" ]; }
limit() { least "$a_run" "$((seconds - SECONDS + 40))"; }

build() {
    # 9.0 and later have instructions of their own (the a of sm_90a); older ones do not.
    local arch
    arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d ' .')
    if [ "$arch" -ge 90 ]; then arch=${arch}a; fi
    FASTVID_BUILD_CUDA=1 FASTVID_CUDA_ARCHS=$arch "$python" setup.py -q build_ext --inplace
    # What an editable install would do: the package, with kernels/ and benchmarks/ in it, on the path.
    site=$PWD/build/site
    rm -rf "$site"
    mkdir -p "$site/fastvid"
    ln -sfn "$PWD"/fastvid/* "$site/fastvid/"
    ln -sfn "$PWD/kernels" "$PWD/benchmarks" "$site/fastvid/"
    export PYTHONPATH=$PWD/benchmarks:$site${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1
}

smoke() {
    "$python" -m fastvid doctor | tee "$OUT/doctor.txt"
    "$python" -m fastvid generate "a red circle moving right on a white background" --seed 1 --quiet \
        -o "${TMPDIR:-/tmp}/fastvid-smoke.npy" || failed=1
}

verify() {
    timeout "$seconds" "$python" benchmarks/gpu_tests.py ${ALL:+--again} "$@" || failed=1
    # Without torch's memory cache every tensor has bounds that a sanitizer sees. Kernels of csrc/ run apart from those
    # of Triton: after a fault nothing more runs in a process.
    for tool in memcheck racecheck initcheck; do
        for which in "cuda --backend cuda_int8 --backend cuda_fp8" triton; do
            ! time_is_up || { echo "no time is left for $tool"; failed=1; return; }
            # shellcheck disable=SC2086
            PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout "$(limit)" compute-sanitizer --tool "$tool" \
                --error-exitcode 9 --launch-timeout 0 "$python" benchmarks/sanitize.py --backend $which 2>&1 |
                tee "$OUT/$tool-${which%% *}.txt" | tail -n 20 || failed=1
        done
    done
}

bench() { # NAME: bench_NAME.py, unless it has a result
    if [ -z "${ALL:-}" ] && compgen -G "$OUT/${1//_/-}-nvidia*.json" > /dev/null; then return; fi
    if time_is_up; then
        echo "no time is left for $1: call this again"
        failed=1
        return
    fi
    timeout "$(limit)" "$python" "benchmarks/bench_$1.py" --device cuda || failed=1
}

measure() {
    if [ $# -eq 0 ]; then
        mapfile -t names < <(grep -l '^OPERATIONS = True' benchmarks/bench_*.py | sed 's/.*bench_//; s/\.py$//')
        set -- "${names[@]}" vae_frames e2e
    fi
    for name in "$@"; do bench "$name"; done
    # What a denoising step runs and copies: half a minute.
    if [ -n "${ALL:-}" ] || ! compgen -G "$OUT/profile-step-nvidia*.json" > /dev/null; then
        timeout 120 "$python" benchmarks/profile_step.py --device cuda || failed=1
    fi
}

case $rung in
    build) build ;;
    smoke) build && smoke ;;
    verify) build && verify "$@" ;;
    measure) build && measure "$@" ;;
    all) build && smoke && verify && measure ;;
    *)
        sed -n '2,15s/^# \{0,1\}//p' "$0" >&2
        exit 2
        ;;
esac
exit $failed
