#pragma once

#include "greedy_decode/kernel.h"

namespace trocr::greedy
{

//! One kernel: its function and the shared memory that it asks for.
struct Kernel
{
    void const* function;
    size_t sharedBytes;
};

//! The kernel for T, by the number of row tiles of a team and of the batch (1, 2 or 4); teams are clusters or the grid.
Kernel kernelOfHalf(bool cluster, int headRowTiles);
Kernel kernelOfBf16(bool cluster, int headRowTiles);

} // namespace trocr::greedy
