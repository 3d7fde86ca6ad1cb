#!/usr/bin/env bash
# Scratch: builds the variants of encoder attention for Hopper, checks and times them. Delete once a variant is chosen.
# About 80 s; nothing can hang (every run has a time limit).
set -u
cd "$(dirname "$0")/.."
OUT=${BUILD:-/tmp/try_attention}
mkdir -p "$OUT"
NVCC=${NVCC:-$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)}
PYTHON=${PYTHON:-python3}
INCLUDES="$($PYTHON -c 'import pybind11, sysconfig; print("-I" + pybind11.get_include(), "-I" + sysconfig.get_path("include"))')"
SUFFIX=$($PYTHON -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
# consumer groups, keys of a tile, keys of the last tile, slots, eighths of the exponentials by polynomial
# (default: as compiled in, 2,128,80,12,0; this is the module of tests/test_attention_sm90.py)
VARIANTS=${VARIANTS:-"default 2,128,80,12,2 3,128,80,11,0 3,128,80,11,2 2,160,112,9,2 2,208,176,7,0 2,208,176,7,2"}
start=$SECONDS
modules=
for variant in $VARIANTS; do
    module=attention_${variant//,/_}
    sizes="-DTROCR_ATTENTION_SIZES=${variant//,/\\,}"
    [ "$variant" = default ] && module=trocr_attention_sm90 && sizes=
    modules="$modules $module"
    [ "$OUT/$module$SUFFIX" -nt plugins/encoder_attention/kernel_sm90.cu ] && continue
    timeout 120 "$NVCC" -std=c++17 -O3 -shared -Xcompiler -fPIC,-fvisibility=hidden -lineinfo -Xptxas -v \
        -gencode=arch=compute_90a,code=sm_90a $sizes "-DTROCR_MODULE=$module" \
        -Iplugins $INCLUDES plugins/encoder_attention/kernel_sm90.cu plugins/encoder_attention/bindings_sm90.cpp \
        -o "$OUT/$module$SUFFIX" >"$OUT/$module.log" 2>&1 || { echo "BUILD FAILED: $module"; grep -m 20 -i error "$OUT/$module.log"; } &
done
wait
echo "built in $((SECONDS - start)) s: $(cat "$OUT"/*.log | grep -E 'C75|spill' | grep -vc ' 0 bytes spill stores') ptxas warnings"
export PYTHONPATH="$OUT:$PWD"
for module in $modules; do
    (timeout -k 3 30 $PYTHON scripts/try_attention.py check "$module" >"$OUT/$module.check" 2>&1 || echo "$module: FAILED or hung ($?)" >>"$OUT/$module.check") &
done
wait
good=
for module in $modules; do
    tail -15 "$OUT/$module.check"
    grep -q "all right" "$OUT/$module.check" && good="$good $module"
done
[ -n "$good" ] && timeout -k 3 40 $PYTHON scripts/try_attention.py bench $good
echo "total $((SECONDS - start)) s"
