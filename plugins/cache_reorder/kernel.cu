#include <algorithm>

#include "cache_reorder/kernel.h"
#include "common/launch.h"

namespace trocr
{

namespace
{

// A line has a few dozen tokens of 4 or 8 packs each: one or two passes of a block.
constexpr int kTHREADS = 128;
constexpr int kMAX_BEAMS = 16;

//! A block a head of an image in one tensor: blockIdx = (image, head, tensor).
template <int kBEAMS>
__global__ void __launch_bounds__(kTHREADS)
    cacheReorderKernel(uint4* cache, int64_t const* __restrict__ rows, int64_t const* __restrict__ positionIds,
                       int64_t tensorPacks, int beams, int capacity, int rowPacks)
{
    int64_t const firstRow = static_cast<int64_t>(blockIdx.x) * beams;
    int sources[kBEAMS];  // within the image; constant indices below keep it in registers
    bool moves = false;
#pragma unroll
    for (int beam = 0; beam < kBEAMS; ++beam)
    {
        sources[beam] = beam;
        if (beam < beams)
        {
            int64_t const source = rows[firstRow + beam] - firstRow;
            sources[beam] = source >= 0 && source < beams ? static_cast<int>(source) : beam;
            moves |= sources[beam] != beam;
        }
    }
    if (!moves)
    {
        return;
    }

    int64_t const headPacks = static_cast<int64_t>(capacity) * rowPacks;
    int64_t const beamPacks = headPacks * gridDim.y;
    uint4* const head = cache + blockIdx.z * tensorPacks + firstRow * beamPacks + blockIdx.y * headPacks;
    int64_t const position = min(max(positionIds[firstRow], int64_t{0}), static_cast<int64_t>(capacity));
    for (int64_t i = threadIdx.x; i < position * rowPacks; i += kTHREADS)
    {
        uint4 packs[kBEAMS];
#pragma unroll
        for (int beam = 0; beam < kBEAMS; ++beam)
        {
            if (beam < beams)
            {
                packs[beam] = head[sources[beam] * beamPacks + i];
            }
        }
#pragma unroll
        for (int beam = 0; beam < kBEAMS; ++beam)
        {
            if (beam < beams && sources[beam] != beam)
            {
                head[beam * beamPacks + i] = packs[beam];
            }
        }
    }
}

template <int kBEAMS>
cudaError_t launchSized(CacheReorderParams const& params, cudaStream_t stream)
{
    dim3 const grid(params.batch / params.beams, params.numHeads, params.tensors);
    return launch(cacheReorderKernel<kBEAMS>, grid, dim3(kTHREADS), stream, static_cast<uint4*>(params.cache),
                  params.rows, params.positionIds, params.tensorBytes / static_cast<int64_t>(sizeof(uint4)),
                  params.beams, params.capacity, params.rowBytes / static_cast<int>(sizeof(uint4)));
}

}  // namespace

bool canImplementCacheReorder(CacheReorderParams const& params, char const** reason)
{
    if (params.beams < 1 || params.beams > kMAX_BEAMS)
    {
        return refuse(reason, "beams must be 1 to 16");
    }
    if (params.batch < 1 || params.batch % params.beams != 0)
    {
        return refuse(reason, "the rows are not a multiple of the beams");
    }
    if (std::min(params.numHeads, params.tensors) < 1 || std::max(params.numHeads, params.tensors) > 65535)
    {
        return refuse(reason, "heads and tensors must be 1 to 65535");
    }
    if (params.capacity < 1)
    {
        return refuse(reason, "the cache capacity must be at least 1");
    }
    if (params.rowBytes < 16 || params.rowBytes % 16 != 0 || params.tensorBytes % 16 != 0)
    {
        return refuse(reason, "rows of the cache and distances of tensors must be multiples of 16 bytes");
    }
    return true;
}

cudaError_t cacheReorder(CacheReorderParams const& params, cudaStream_t stream)
{
    if (!canImplementCacheReorder(params) || !areAligned(16, params.cache) ||
        !areAligned(sizeof(int64_t), params.rows, params.positionIds))
    {
        return cudaErrorInvalidValue;
    }
    if (params.beams <= 4)
    {
        return launchSized<4>(params, stream);
    }
    return params.beams <= 8 ? launchSized<8>(params, stream) : launchSized<kMAX_BEAMS>(params, stream);
}

}  // namespace trocr
