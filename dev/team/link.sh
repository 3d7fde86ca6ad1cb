#!/bin/bash
nice nvcc -gencode arch=compute_90a,code=sm_90a -cudart static bench.o old.o $1.o -o $1
