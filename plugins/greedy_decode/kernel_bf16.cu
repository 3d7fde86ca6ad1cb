#include "greedy_decode/instances.cuh"

namespace trocr::greedy
{

Kernel kernelOfBf16(bool cluster, int headRowTiles)
{
    return kernelOf<__nv_bfloat16>(cluster, headRowTiles);
}

} // namespace trocr::greedy
