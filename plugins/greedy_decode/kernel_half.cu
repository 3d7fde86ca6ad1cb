#include "greedy_decode/instances.cuh"

namespace trocr::greedy
{

Kernel kernelOfHalf(bool cluster, int headRowTiles)
{
    return kernelOf<__half>(cluster, headRowTiles);
}

} // namespace trocr::greedy
