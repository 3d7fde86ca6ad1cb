#!/usr/bin/env bash
# Builds trocr_linear for Hopper (and the sm_80 code, as PTX) into build/linear, with the machine's nvcc and pybind11.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
nvcc=${NVCC:-$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)}
out=build/linear
mkdir -p $out
flags="-std=c++17 -O3 -lineinfo -Iplugins -Xcompiler -fPIC,-fvisibility=hidden -c"
hopper="-gencode=arch=compute_90a,code=sm_90a"
pids=()
for file in kernel_sm90_half kernel_sm90_bf16 kernel_sm90; do
    "$nvcc" $flags $hopper -o $out/$file.o plugins/linear/$file.cu & pids+=($!)
done
for file in kernel kernel_sm80; do # compute_80: what runs is the sm_80 code, translated by the driver
    "$nvcc" $flags -gencode=arch=compute_80,code=compute_80 -o $out/$file.o plugins/linear/$file.cu & pids+=($!)
done
"$nvcc" $flags $("$python" -m pybind11 --includes) -o $out/bindings.o plugins/linear/bindings.cpp & pids+=($!)
for pid in "${pids[@]}"; do wait "$pid"; done
"$nvcc" -shared -cudart static -o "$out/trocr_linear$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')" $out/*.o
