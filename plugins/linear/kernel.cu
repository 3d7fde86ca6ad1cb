#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/fp8.cuh"
#include "common/launch.h"
#include "linear/kernel.h"
#include "linear/launch.h"
#include "linear/tactics.h"

namespace trocr
{
namespace
{

bool aligned(void const* pointer, uintptr_t bytes)
{
    return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

//! What stands in the way of LinearParams, or null.
char const* whyNot(LinearParams const& p)
{
    if (sizeOf(p.dataType) == 0)
    {
        return "the type must be float, half or bfloat16";
    }
    if (p.rows < 1 || p.rows > kLINEAR_MAX_ROWS || p.outputs < 1 || p.inputs < 1)
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
    if (p.e4m3)
    {
        if (p.dataType != DataType::kHALF || p.inputs % 16 != 0 || p.outputs % kLINEAR_STATISTICS_WIDTH != 0)
        {
            return "e4m3 products are of half, inputs multiples of 16 and outputs of 64";
        }
        if (!isPositive(p.productScale) || (p.quantized != nullptr && !isPositive(p.outputScale)))
        {
            return "scales must be finite and above 0";
        }
        bool const wanted = p.activation == LinearActivation::kGELU || p.outputStatistics != nullptr;
        if (p.tokens != 0 || (p.quantized != nullptr) != wanted)
        {
            return "e4m3 outputs go with a GELU or output statistics, and those with them; with neither keys nor "
                   "values";
        }
    }
    else if (p.quantized != nullptr)
    {
        return "e4m3 outputs go with e4m3 inputs";
    }
    if (p.tokens != 0)
    {
        if (p.residual != nullptr || p.activation != LinearActivation::kNONE)
        {
            return "keys and values go with neither a residual nor an activation";
        }
        if (p.tokens < 0 || p.rows % p.tokens != 0)
        {
            return "the rows must be a multiple of the tokens";
        }
        if (p.headDim < 8 || p.headDim % 8 != 0 || p.outputs % (2 * p.headDim) != 0)
        {
            return "the size of a head must be a multiple of 8, and divide half of the outputs";
        }
    }
    return nullptr;
}

__device__ float2 toFloat2(float2 v)
{
    return v;
}

__device__ float2 toFloat2(__half2 v)
{
    return __half22float2(v);
}

__device__ float2 toFloat2(__nv_bfloat162 v)
{
    return __bfloat1622float2(v);
}

//! One warp a row: partial statistics of 64 columns at a time, two columns a lane; factor times the columns as e4m3.
template <typename T2>
__global__ void __launch_bounds__(256)
    rowStatisticsKernel(T2 const* x, float2* statistics, uint16_t* quantized, float factor, int rows, int parts)
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
        float2 const v = toFloat2(x[at * 32 + lane]);
        float const mean = warpSum(v.x + v.y) * (1.0F / kLINEAR_STATISTICS_WIDTH);
        float const m2 = warpSum((v.x - mean) * (v.x - mean) + (v.y - mean) * (v.y - mean));
        if (lane == 0)
        {
            statistics[at] = make_float2(mean, m2);
        }
        if (quantized != nullptr)
        {
            // Pair 8 j + 4 b + t of a row is stored at 8 j + 2 t + b.
            int const place = lane / 8 * 8 + lane % 4 * 2 + lane / 4 % 2;
            quantized[at * 32 + place] = static_cast<uint16_t>(toE4m3(v.x * factor, v.y * factor));
        }
    }
}

template <typename T2>
cudaError_t launchRowStatistics(RowStatisticsParams const& params, cudaStream_t stream)
{
    int const blocks = linear_detail::ceilDiv(params.rows, 8);
    int const parts = params.width / kLINEAR_STATISTICS_WIDTH;
    rowStatisticsKernel<<<blocks, 256, 0, stream>>>(
        static_cast<T2 const*>(params.x), reinterpret_cast<float2*>(params.statistics),
        static_cast<uint16_t*>(params.quantized), 1.0F / params.scale, static_cast<int>(params.rows), parts);
    return cudaGetLastError();
}

}  // namespace

int32_t linearTacticCount()
{
    return linear_detail::kNUM_SM90_TACTICS + linear_detail::kNUM_SM80_TACTICS;
}

int32_t linearTacticOnHopper(int64_t rows, int32_t outputs, int32_t inputs, bool residual, bool e4m3,
                             int32_t multiprocessors)
{
    return linear_detail::cheapestSm90Tactic({static_cast<int>(rows), outputs, inputs, residual, e4m3},
                                             multiprocessors);
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
    bool const onlyQuantized = params.e4m3 && params.activation == LinearActivation::kGELU;
    if (params.x == nullptr || params.weight == nullptr || (params.y == nullptr) != onlyQuantized ||
        (params.values == nullptr) != (params.tokens == 0))
    {
        return cudaErrorInvalidValue;
    }
    if (!aligned(params.x, 16) || !aligned(params.weight, 16) || !aligned(params.y, 16) ||
        !aligned(params.residual, 16) || !aligned(params.bias, 8) || !aligned(params.weightSum, 8) ||
        !aligned(params.inputStatistics, 8) || !aligned(params.outputStatistics, 8) || !aligned(params.values, 16) ||
        !aligned(params.quantized, 16))
    {
        return cudaErrorInvalidValue;
    }
    int major = 0;
    int multiprocessors = 0;
    cudaError_t status = deviceAttribute(cudaDevAttrComputeCapabilityMajor, major);
    if (status == cudaSuccess)
    {
        status = deviceAttribute(cudaDevAttrMultiProcessorCount, multiprocessors);
    }
    if (status != cudaSuccess)
    {
        return status;
    }

    if (params.e4m3 && major != 9)
    {
        return cudaErrorNotSupported;
    }
    if (params.dataType == DataType::kFLOAT)
    {
        return params.tactic == 0 ? linear_detail::linearFloat(params, stream) : cudaErrorInvalidValue;
    }
    // Tactics are numbered through: Hopper's, then those of the kernel for every architecture.
    bool const forSm80 = params.tactic > linear_detail::kNUM_SM90_TACTICS;
    if (params.e4m3 && forSm80)
    {
        return cudaErrorInvalidValue;
    }
    if (forSm80 || (major != 9 && params.tactic == 0))
    {
        int32_t const tactic = forSm80 ? params.tactic - linear_detail::kNUM_SM90_TACTICS : 0;
        return linear_detail::linearSm80(params, tactic, multiprocessors, stream);
    }
    return major == 9 ? linear_detail::linearSm90(params, params.tactic, multiprocessors, stream)
                      : cudaErrorInvalidValue;
}

bool canImplementRowStatistics(RowStatisticsParams const& params, char const** reason)
{
    if (sizeOf(params.dataType) == 0)
    {
        return refuse(reason, "the type must be float, half or bfloat16");
    }
    if (params.rows < 1 || params.rows > kLINEAR_MAX_ROWS)
    {
        return refuse(reason, "rows must be 1 to 2^30");
    }
    if (params.width < 1 || params.width % kLINEAR_STATISTICS_WIDTH != 0)
    {
        return refuse(reason, "the width must be a multiple of 64");
    }
    if (params.quantized != nullptr && !isPositive(params.scale))
    {
        return refuse(reason, "the scale must be finite and above 0");
    }
    return true;
}

cudaError_t rowStatistics(RowStatisticsParams const& params, cudaStream_t stream)
{
    if (!canImplementRowStatistics(params) || !areAligned(2 * sizeOf(params.dataType), params.x) ||
        !areAligned(8, params.statistics) || !aligned(params.quantized, 2))
    {
        return cudaErrorInvalidValue;
    }
    switch (params.dataType)
    {
        case DataType::kFLOAT:
            return launchRowStatistics<float2>(params, stream);
        case DataType::kHALF:
            return launchRowStatistics<__half2>(params, stream);
        case DataType::kBF16:
            return launchRowStatistics<__nv_bfloat162>(params, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace trocr
