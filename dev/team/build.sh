#!/bin/bash
# build.sh WHAT SRC FLAGS...: WHAT.o from SRC/plugins
W=$1; S=$2; shift 2
nice nvcc -std=c++17 -O3 -gencode arch=compute_90a,code=sm_90a -I$S/plugins -Xptxas -v "$@" -c dev.cu -o $W.o 2>&1 | grep -E "error|spill|registers|warning" | grep -v "0 bytes spill stores, 0 bytes spill loads" | c++filt
