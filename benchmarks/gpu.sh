#!/usr/bin/env bash
# What needs a GPU, in parts of under 9 minutes each on a bare machine:
#
#   benchmarks/gpu.sh verify                  # build, run the tests marked `gpu`, and the small ones under a sanitizer
#   benchmarks/gpu.sh kernels [NAME ...]      # measure operations: rgb attention ..., or all that are not in $OUT yet
#   benchmarks/gpu.sh e2e [NAME ...]          # measure whole models
#
# It needs the system's Python with torch, Triton, pytest and hypothesis, and nvcc; no package index, no virtual
# environment, nothing installed. Results go to $OUT, or to benchmarks/results; a part that was cut off goes on with what
# has no result yet (ALL=1: everything anew). Then commit them and run benchmarks/verified.py.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export OUT=${OUT:-$PWD/benchmarks/results}
mkdir -p "$OUT"
part=${1:-}
[ $# -eq 0 ] || shift
seconds=${SECONDS_A_PART:-500} # of a part, after which nothing new is begun
a_run=${SECONDS_A_RUN:-240}    # of a benchmark or a run under a sanitizer: what hangs is not to cost the others

# 9.0 and later have instructions of their own (the a of sm_90a); older ones do not.
arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d ' .')
if [ "$arch" -ge 90 ]; then arch=${arch}a; fi
FASTVID_BUILD_CUDA=1 FASTVID_CUDA_ARCHS=$arch "$python" setup.py -q build_ext --inplace

# What an editable install would do: the package, with kernels/ and benchmarks/ in it, on the path ahead of the checkout.
site=$PWD/build/site
rm -rf "$site"
mkdir -p "$site/fastvid"
ln -sfn "$PWD"/fastvid/* "$site/fastvid/"
ln -sfn "$PWD/kernels" "$PWD/benchmarks" "$site/fastvid/"
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1

failed=0
least() { [ "$1" -lt "$2" ] && echo "$1" || echo "$2"; }
run() { # NAME: bench_NAME.py, unless it has a result
    if [ -z "${ALL:-}" ] && compgen -G "$OUT/${1//_/-}-nvidia*.json" > /dev/null; then return; fi
    if [ "$SECONDS" -gt "$seconds" ]; then
        echo "no time is left for $1: call this again"
        failed=1
        return
    fi
    PYTHONPATH=$PWD/benchmarks:$PYTHONPATH timeout "$(least "$a_run" "$((seconds - SECONDS + 40))")" \
        "$python" "benchmarks/bench_$1.py" --device cuda || failed=1
}

case $part in
    verify)
        "$python" -c 'from fastvid import doctor; print(doctor.render(doctor.doctor()))' | tee "$OUT/doctor.txt"
        PYTHONPATH=$PWD/benchmarks:$PYTHONPATH timeout "$seconds" \
            "$python" benchmarks/gpu_tests.py ${ALL:+--again} "$@" || failed=1
        # Without torch's cache of memory every tensor has bounds that a tool sees. Kernels of csrc/ apart from those of
        # Triton: after a fault nothing more runs in a process.
        for tool in memcheck racecheck initcheck; do
            for which in "cuda --backend cuda_int8 --backend cuda_fp8" triton; do
                [ "$SECONDS" -lt "$seconds" ] || { echo "no time is left for $tool"; failed=1; break 2; }
                # shellcheck disable=SC2086
                PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=$PWD/benchmarks:$PYTHONPATH \
                    timeout "$(least "$a_run" "$((seconds - SECONDS + 40))")" compute-sanitizer --tool "$tool" \
                    --error-exitcode 9 --launch-timeout 0 "$python" benchmarks/sanitize.py --backend $which 2>&1 |
                    tee "$OUT/$tool-${which%% *}.txt" | tail -n 20 || failed=1
            done
        done
        ;;
    kernels)
        if [ $# -eq 0 ]; then
            mapfile -t names < <(grep -l '^OPERATIONS = True' benchmarks/bench_*.py | sed 's/.*bench_//; s/\.py$//')
            set -- "${names[@]}"
        fi
        for name in "$@"; do run "$name"; done
        ;;
    e2e)
        [ $# -gt 0 ] || set -- vae_frames e2e
        for name in "$@"; do run "$name"; done
        # What a denoising step runs and copies: half a minute.
        if [ -n "${ALL:-}" ] || ! compgen -G "$OUT/profile-step-nvidia*.json" > /dev/null; then
            timeout 120 "$python" benchmarks/profile_step.py --device cuda || failed=1
        fi
        ;;
    *)
        sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
        exit 2
        ;;
esac
exit $failed
