#include <algorithm>

#include "common/device.cuh"
#include "common/fp8.cuh"
#include "common/launch.h"
#include "device_decoder/kernel.h"

namespace trocr
{

namespace
{

constexpr int kTHREADS = 256;
constexpr int kEACH = 16;  //!< elements of a thread at a time
constexpr int kMOST_TENSORS = 64;

struct RoundParams
{
    uint4 const* from[kMOST_TENSORS];
    uint4* to[kMOST_TENSORS];
    int64_t packs;  //!< of kEACH elements
};

__device__ __forceinline__ uint2 roundEight(uint4 const& bits)
{
    Pack<__half> const eight = Pack<__half>::fromBits(bits);
    float const* const v = eight.values;
    return {toE4m3(v[0], v[1]) | toE4m3(v[2], v[3]) << 16, toE4m3(v[4], v[5]) | toE4m3(v[6], v[7]) << 16};
}

//! blockIdx.y is a tensor.
__global__ void __launch_bounds__(kTHREADS) roundKernel(__grid_constant__ RoundParams const p)
{
    uint4 const* const from = p.from[blockIdx.y];
    uint4* const to = p.to[blockIdx.y];
    int64_t const step = static_cast<int64_t>(gridDim.x) * kTHREADS;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kTHREADS + threadIdx.x; i < p.packs; i += step)
    {
        uint2 const low = roundEight(from[2 * i]);
        uint2 const high = roundEight(from[2 * i + 1]);
        to[i] = {low.x, low.y, high.x, high.y};
    }
}

}  // namespace

cudaError_t roundToE4m3(std::vector<void const*> const& from, std::vector<void*> const& to, int64_t count,
                        cudaStream_t stream)
{
    if (from.size() != to.size() || from.empty() || from.size() > kMOST_TENSORS || count < kEACH || count % kEACH != 0)
    {
        return cudaErrorInvalidValue;
    }
    RoundParams params{};
    for (size_t i = 0; i < from.size(); ++i)
    {
        params.from[i] = static_cast<uint4 const*>(from[i]);
        params.to[i] = static_cast<uint4*>(to[i]);
    }
    params.packs = count / kEACH;
    // Enough blocks for every multiprocessor of any GPU, in all tensors together.
    auto const blocks = std::min<int64_t>(ceilDiv<int64_t>(params.packs, kTHREADS), 256);
    return launch(roundKernel, dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(from.size())), dim3(kTHREADS),
                  stream, params);
}

}  // namespace trocr
