#!/usr/bin/env bash
# Scratch: build, quick check (a process a case group, with a time limit), bench. Never hangs; under two minutes.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export TROCR_BUILD_DIR=${BUILD:-build/decode}
start=$SECONDS
timeout 20 cmake -S . -B "$TROCR_BUILD_DIR" -DTROCR_PLUGINS=OFF -DCMAKE_CUDA_ARCHITECTURES=90a-real \
    -DPython_EXECUTABLE="$(command -v "$python")" >/tmp/try_decode_cmake.log 2>&1 \
    || { echo "CONFIGURE FAILED"; tail -20 /tmp/try_decode_cmake.log; exit 1; }
timeout 100 cmake --build "$TROCR_BUILD_DIR" -j "$(nproc)" --target trocr_kernels >/tmp/try_decode_build.log 2>&1 \
    || { echo "BUILD FAILED"; grep -m 20 -A 3 -E "error|FAILED" /tmp/try_decode_build.log; exit 1; }
echo "built in $((SECONDS - start)) s"
ran=0
run() # seconds, arguments of pytest
{
    local limit=$1
    shift
    timeout -k 3 "$limit" "$python" -m pytest -q -x -p no:cacheprovider tests/test_greedy_decode.py -m gpu "$@" 2>&1 | tail -25
    local status=${PIPESTATUS[0]}
    [ "$status" = 0 ] || { echo "FAILED ($status; 124 or 137: hung): $*"; ran=1; }
}
# The plainest first, and alone: a cluster's and the grid's barriers. The rest only where it is right.
run 25 -k "test_matches_float32 and tiny-1-torch.float16"
run 25 -k "test_matches_float32 and base-1-torch.float16"
if [ "$ran" = 0 ]; then
    timeout -k 3 "${BENCH_SECONDS:-45}" "$python" -m profiling.greedy_decode "$@"
    echo "bench: $?; $((SECONDS - start)) s"
    [ -n "${ALL_TESTS:-}" ] && run 100
fi
echo "total $((SECONDS - start)) s"
