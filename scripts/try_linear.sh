#!/usr/bin/env bash
# Scratch: build, quick check of every tactic (a process each, side by side, with a time limit), bench. Never hangs.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
start=$SECONDS
timeout 90 scripts/build_linear.sh || { echo "BUILD FAILED"; exit 1; }
echo "built in $((SECONDS - start)) s"
logs=$(mktemp -d)
failed=0
# First the plainest path alone: if it hangs or faults, the others say nothing new.
for group in "4" "13,14" "5,6" "7,8,9" "10,11,12" "1" "2" "3" "0"; do
    ( timeout -k 2 25 "$python" -m profiling.linear check --tactics "$group" > "$logs/$group" 2>&1
      echo "rc=$?" >> "$logs/$group" ) &
done
wait
for group in "4" "13,14" "5,6" "7,8,9" "10,11,12" "1" "2" "3" "0"; do
    if tail -1 "$logs/$group" | grep -q "rc=0"; then
        echo "tactics $group: all ok ($(grep -c ' ok$' "$logs/$group") cases)"
    else
        echo "tactics $group: FAILED (124 or 137: hung)"; tail -4 "$logs/$group"; failed=1
    fi
done
echo "checks done after $((SECONDS - start)) s"
if [ "$failed" = 0 ] || [ -n "${BENCH_ANYWAY:-}" ]; then
    timeout -k 2 "${BENCH_SECONDS:-60}" "$python" -m profiling.linear bench "$@"
fi
echo "total $((SECONDS - start)) s"
