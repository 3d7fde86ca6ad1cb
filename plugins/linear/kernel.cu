#include "linear/kernel.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "linear/launch.h"
#include "linear/tactics.h"

namespace trocr
{
namespace
{

constexpr int32_t kMAX_ROWS = 1 << 30;

bool aligned(void const* pointer, uintptr_t bytes)
{
    return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

//! What stands in the way of LinearParams, or null.
char const* whyNot(LinearParams const& p)
{
    if (p.dataType != DataType::kHALF && p.dataType != DataType::kBF16)
    {
        return "the type must be half or bfloat16";
    }
    if (p.rows < 1 || p.rows > kMAX_ROWS || p.outputs < 1 || p.inputs < 1)
    {
        return "rows, outputs and inputs must be at least 1, rows at most 2^30";
    }
    if (p.outputs % 8 != 0 || p.inputs % 8 != 0)
    {
        return "outputs and inputs must be multiples of 8";
    }
    if (p.inputStatistics != nullptr && (p.inputs % kLINEAR_STATISTICS_WIDTH != 0 || p.weightSum == nullptr))
    {
        return "with input statistics, inputs must be a multiple of 64 and weightSum given";
    }
    if (p.inputStatistics == nullptr && p.weightSum != nullptr)
    {
        return "weightSum goes with input statistics";
    }
    if (p.outputStatistics != nullptr && (p.outputs % kLINEAR_STATISTICS_WIDTH != 0 || p.residual == nullptr))
    {
        return "with output statistics, outputs must be a multiple of 64 and a residual given";
    }
    if (p.residual != nullptr && p.activation != LinearActivation::kNONE)
    {
        return "a residual and an activation cannot be combined";
    }
    return nullptr;
}

//! One warp a row: partial statistics of 64 columns at a time, two columns a lane.
template <typename T2>
__global__ void __launch_bounds__(256) rowStatisticsKernel(T2 const* x, float2* statistics, int rows, int parts)
{
    int const row = blockIdx.x * 8 + threadIdx.x / 32;
    int const lane = threadIdx.x % 32;
    if (row >= rows)
    {
        return;
    }
    auto const warpSum = [](float v)
    {
#pragma unroll
        for (int mask = 16; mask > 0; mask /= 2)
        {
            v += __shfl_xor_sync(0xFFFFFFFFU, v, mask);
        }
        return v;
    };
    for (int part = 0; part < parts; ++part)
    {
        int64_t const at = static_cast<int64_t>(row) * parts + part;
        float2 v;
        if constexpr (std::is_same_v<T2, __half2>)
        {
            v = __half22float2(x[at * 32 + lane]);
        }
        else
        {
            v = __bfloat1622float2(x[at * 32 + lane]);
        }
        float const mean = warpSum(v.x + v.y) * (1.0F / kLINEAR_STATISTICS_WIDTH);
        float const m2 = warpSum((v.x - mean) * (v.x - mean) + (v.y - mean) * (v.y - mean));
        if (lane == 0)
        {
            statistics[at] = make_float2(mean, m2);
        }
    }
}

} // namespace

int32_t linearTacticCount()
{
    return linear_detail::kNUM_SM90_TACTICS + linear_detail::kNUM_SM80_TACTICS;
}

bool canImplementLinear(LinearParams const& params, char const** reason)
{
    char const* const problem = whyNot(params);
    if (reason != nullptr)
    {
        *reason = problem;
    }
    return problem == nullptr;
}

cudaError_t linear(LinearParams const& params, cudaStream_t stream)
{
    if (!canImplementLinear(params) || params.tactic < 0 || params.tactic > linearTacticCount())
    {
        return cudaErrorInvalidValue;
    }
    if (params.x == nullptr || params.weight == nullptr || params.y == nullptr)
    {
        return cudaErrorInvalidValue;
    }
    if (!aligned(params.x, 16) || !aligned(params.weight, 16) || !aligned(params.y, 16) || !aligned(params.residual, 16)
        || !aligned(params.bias, 8) || !aligned(params.weightSum, 8) || !aligned(params.inputStatistics, 8)
        || !aligned(params.outputStatistics, 8))
    {
        return cudaErrorInvalidValue;
    }
    int device = 0;
    int major = 0;
    int multiprocessors = 0;
    cudaError_t status = cudaGetDevice(&device);
    if (status == cudaSuccess)
    {
        status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    }
    if (status == cudaSuccess)
    {
        status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    }
    if (status != cudaSuccess)
    {
        return status;
    }

    // Tactics are numbered through: Hopper's, then those of the kernel for every architecture.
    bool const forSm80 = params.tactic > linear_detail::kNUM_SM90_TACTICS;
    if (forSm80 || (major != 9 && params.tactic == 0))
    {
        int32_t const tactic = forSm80 ? params.tactic - linear_detail::kNUM_SM90_TACTICS : 0;
        return linear_detail::linearSm80(params, tactic, multiprocessors, stream);
    }
    return major == 9 ? linear_detail::linearSm90(params, params.tactic, multiprocessors, stream)
                      : cudaErrorInvalidValue;
}

cudaError_t rowStatistics(RowStatisticsParams const& params, cudaStream_t stream)
{
    bool const known = params.dataType == DataType::kHALF || params.dataType == DataType::kBF16;
    if (!known || params.rows < 1 || params.width < 1 || params.width % kLINEAR_STATISTICS_WIDTH != 0
        || params.x == nullptr || params.statistics == nullptr || !aligned(params.x, 4)
        || !aligned(params.statistics, 8))
    {
        return cudaErrorInvalidValue;
    }
    int const blocks = linear_detail::ceilDiv(params.rows, 8);
    int const parts = params.width / kLINEAR_STATISTICS_WIDTH;
    auto* const statistics = reinterpret_cast<float2*>(params.statistics);
    if (params.dataType == DataType::kHALF)
    {
        rowStatisticsKernel<<<blocks, 256, 0, stream>>>(
            static_cast<__half2 const*>(params.x), statistics, params.rows, parts);
    }
    else
    {
        rowStatisticsKernel<<<blocks, 256, 0, stream>>>(
            static_cast<__nv_bfloat162 const*>(params.x), statistics, params.rows, parts);
    }
    return cudaGetLastError();
}

} // namespace trocr
