#pragma once

#include "greedy_decode/decoder.cuh"
#include "greedy_decode/launch.h"

namespace trocr::greedy
{

//! The kernels of one type; a file each, for short builds.
template <typename T>
Kernel kernelOf(bool cluster, int headRowTiles)
{
    auto const kernel = [](auto* function) { return Kernel{reinterpret_cast<void const*>(function), sizeof(Shared<T>)}; };
    switch (headRowTiles)
    {
    case 1:
        return cluster ? kernel(greedyDecodeKernel<T, true, 1, 1>) : kernel(greedyDecodeKernel<T, false, 1, 1>);
    case 2:
        return cluster ? kernel(greedyDecodeKernel<T, true, 1, 2>) : kernel(greedyDecodeKernel<T, false, 2, 2>);
    default:
        return cluster ? kernel(greedyDecodeKernel<T, true, 1, 4>) : kernel(greedyDecodeKernel<T, false, 4, 4>);
    }
}

} // namespace trocr::greedy
