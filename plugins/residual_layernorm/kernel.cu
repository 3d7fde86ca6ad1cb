#include "residual_layernorm/kernel.h"

#include <limits>

#include "common/device.cuh"
#include "common/launch.h"

namespace trocr
{

namespace
{

constexpr int32_t kMAX_WIDTH = 1 << 30; // columns are counted in 32 bits, offsets in 64
constexpr int64_t kMAX_ROWS = std::numeric_limits<int32_t>::max();

// Up to here a warp keeps a row in registers: 1024 elements are 32 floats a lane. TrOCR's widths are 256 to 1024.
constexpr int kMAX_WARP_WIDTH = 1024;

// Pointers are not __restrict__: outputs may be inputs (each element is written by the thread that read it, after its
// last reading).
template <typename T>
struct Arguments
{
    T const* x;
    T const* residual;
    T const* gamma;
    T const* beta;
    T* normed;
    T* sum; // null where not wanted
    int rows;
    int width;
    float epsilon;
};

//! x + residual as a reader of the stored sum sees it: rounded to T.
template <typename T, int kSIZE>
__device__ __forceinline__ Pack<T, kSIZE> roundedSum(T const* x, T const* residual)
{
    auto sum = Pack<T, kSIZE>::load(x);
    auto const other = Pack<T, kSIZE>::load(residual);
#pragma unroll
    for (int i = 0; i < kSIZE; ++i)
    {
        sum.values[i] = toFloat(fromFloat<T>(sum.values[i] + other.values[i]));
    }
    return sum;
}

template <typename T, int kSIZE>
__device__ __forceinline__ void storeNormed(
    Pack<T, kSIZE> sum, float mean, float inverseDeviation, T const* gamma, T const* beta, T* normed)
{
    auto const scale = Pack<T, kSIZE>::load(gamma);
    auto const shift = Pack<T, kSIZE>::load(beta);
#pragma unroll
    for (int i = 0; i < kSIZE; ++i)
    {
        sum.values[i] = (sum.values[i] - mean) * inverseDeviation * scale.values[i] + shift.values[i];
    }
    sum.store(normed);
}

// A warp a row: no shared memory, no barrier, and both passes over registers.
constexpr int kROWS_A_BLOCK = 4;

template <typename T, int kPACKS>
__global__ void __launch_bounds__(kWARP_SIZE* kROWS_A_BLOCK) warpPerRowKernel(Arguments<T> args)
{
    constexpr int kSIZE = 16 / sizeof(T);
    int const row = blockIdx.x * kROWS_A_BLOCK + threadIdx.y;
    if (row >= args.rows)
    {
        return;
    }
    int64_t const offset = static_cast<int64_t>(row) * args.width;

    Pack<T> packs[kPACKS];
    float total = 0.0F;
#pragma unroll
    for (int p = 0; p < kPACKS; ++p)
    {
        int const column = (p * kWARP_SIZE + threadIdx.x) * kSIZE;
        if (column < args.width)
        {
            packs[p] = roundedSum<T, kSIZE>(args.x + offset + column, args.residual + offset + column);
        }
    }
#pragma unroll
    for (int p = 0; p < kPACKS; ++p)
    {
        int const column = (p * kWARP_SIZE + threadIdx.x) * kSIZE;
        if (column < args.width)
        {
            if (args.sum != nullptr)
            {
                packs[p].store(args.sum + offset + column);
            }
#pragma unroll
            for (int i = 0; i < kSIZE; ++i)
            {
                total += packs[p].values[i];
            }
        }
    }
    float const mean = groupSum(total) / static_cast<float>(args.width);

    float squares = 0.0F;
#pragma unroll
    for (int p = 0; p < kPACKS; ++p)
    {
        int const column = (p * kWARP_SIZE + threadIdx.x) * kSIZE;
        if (column < args.width)
        {
#pragma unroll
            for (int i = 0; i < kSIZE; ++i)
            {
                float const centred = packs[p].values[i] - mean;
                squares += centred * centred;
            }
        }
    }
    float const inverseDeviation = rsqrtf(groupSum(squares) / static_cast<float>(args.width) + args.epsilon);

#pragma unroll
    for (int p = 0; p < kPACKS; ++p)
    {
        int const column = (p * kWARP_SIZE + threadIdx.x) * kSIZE;
        if (column < args.width)
        {
            storeNormed<T, kSIZE>(packs[p], mean, inverseDeviation, args.gamma + column, args.beta + column,
                args.normed + offset + column);
        }
    }
}

// A block a row, for any width and alignment: three passes, of which the second and third read from the caches.
constexpr int kBLOCK_WARPS = 8;

//! Sum over the block; every thread gets it. `scratch` must not be in use by an earlier call.
__device__ __forceinline__ float blockSum(float value, float (&scratch)[kBLOCK_WARPS])
{
    value = groupSum(value);
    if (threadIdx.x % kWARP_SIZE == 0)
    {
        scratch[threadIdx.x / kWARP_SIZE] = value;
    }
    __syncthreads();
    float total = 0.0F;
#pragma unroll
    for (int warp = 0; warp < kBLOCK_WARPS; ++warp)
    {
        total += scratch[warp];
    }
    return total;
}

template <typename T, int kSIZE>
__global__ void __launch_bounds__(kWARP_SIZE* kBLOCK_WARPS) blockPerRowKernel(Arguments<T> args)
{
    __shared__ float sumScratch[kBLOCK_WARPS];
    __shared__ float squaresScratch[kBLOCK_WARPS];

    constexpr int kSTEP = kWARP_SIZE * kBLOCK_WARPS * kSIZE;
    int const firstColumn = threadIdx.x * kSIZE;
    int64_t const offset = static_cast<int64_t>(blockIdx.x) * args.width;
    T const* const x = args.x + offset;
    T const* const residual = args.residual + offset;

    float total = 0.0F;
    for (int column = firstColumn; column < args.width; column += kSTEP)
    {
        auto const sum = roundedSum<T, kSIZE>(x + column, residual + column);
#pragma unroll
        for (int i = 0; i < kSIZE; ++i)
        {
            total += sum.values[i];
        }
    }
    float const mean = blockSum(total, sumScratch) / static_cast<float>(args.width);

    float squares = 0.0F;
    for (int column = firstColumn; column < args.width; column += kSTEP)
    {
        auto const sum = roundedSum<T, kSIZE>(x + column, residual + column);
#pragma unroll
        for (int i = 0; i < kSIZE; ++i)
        {
            float const centred = sum.values[i] - mean;
            squares += centred * centred;
        }
    }
    float const inverseDeviation
        = rsqrtf(blockSum(squares, squaresScratch) / static_cast<float>(args.width) + args.epsilon);

    for (int column = firstColumn; column < args.width; column += kSTEP)
    {
        auto const sum = roundedSum<T, kSIZE>(x + column, residual + column);
        if (args.sum != nullptr)
        {
            sum.store(args.sum + offset + column);
        }
        storeNormed<T, kSIZE>(
            sum, mean, inverseDeviation, args.gamma + column, args.beta + column, args.normed + offset + column);
    }
}

template <typename T, int kPACKS>
cudaError_t launchWarpPerRow(Arguments<T> const& args, cudaStream_t stream)
{
    constexpr int kPACKS_MAX = kMAX_WARP_WIDTH * sizeof(T) / 16 / kWARP_SIZE;
    if constexpr (kPACKS < kPACKS_MAX)
    {
        if (args.width > static_cast<int>(kPACKS * kWARP_SIZE * (16 / sizeof(T))))
        {
            return launchWarpPerRow<T, kPACKS + 1>(args, stream);
        }
    }
    dim3 const grid(ceilDiv<unsigned>(args.rows, kROWS_A_BLOCK));
    return launch(warpPerRowKernel<T, kPACKS>, grid, dim3(kWARP_SIZE, kROWS_A_BLOCK), stream, args);
}

template <typename T, int kSIZE>
cudaError_t launchBlockPerRow(Arguments<T> const& args, cudaStream_t stream)
{
    return launch(
        blockPerRowKernel<T, kSIZE>, dim3(args.rows), dim3(kWARP_SIZE * kBLOCK_WARPS), stream, args);
}

template <typename T>
cudaError_t launchTyped(ResidualLayerNormParams const& params, cudaStream_t stream)
{
    constexpr int kSIZE = 16 / sizeof(T);
    Arguments<T> const args{static_cast<T const*>(params.x), static_cast<T const*>(params.residual),
        static_cast<T const*>(params.gamma), static_cast<T const*>(params.beta), static_cast<T*>(params.normed),
        static_cast<T*>(params.sum), static_cast<int>(params.rows), params.width, params.epsilon};

    void const* const sum = args.sum != nullptr ? args.sum : args.normed; // aligned as any where there is none
    if (!areAligned(sizeof(T), params.x, params.residual, params.gamma, params.beta, params.normed, sum))
    {
        return cudaErrorInvalidValue;
    }
    bool const packed = params.width % kSIZE == 0
        && areAligned(16, params.x, params.residual, params.gamma, params.beta, params.normed, sum);
    if (!packed)
    {
        return launchBlockPerRow<T, 1>(args, stream);
    }
    return params.width <= kMAX_WARP_WIDTH ? launchWarpPerRow<T, 1>(args, stream)
                                           : launchBlockPerRow<T, kSIZE>(args, stream);
}

} // namespace

bool canImplementResidualLayerNorm(ResidualLayerNormParams const& params, char const** reason)
{
    if (sizeOf(params.dataType) == 0)
    {
        return refuse(reason, "the data type is none of float32, float16, bfloat16");
    }
    if (params.rows < 1 || params.width < 1)
    {
        return refuse(reason, "rows and width must be at least 1");
    }
    if (params.width > kMAX_WIDTH || params.rows > kMAX_ROWS)
    {
        return refuse(reason, "the width is above 2^30 or the rows are above 2^31 - 1");
    }
    if (!(params.epsilon >= 0.0F)) // NaN too
    {
        return refuse(reason, "epsilon must not be negative");
    }
    return true;
}

cudaError_t residualLayerNorm(ResidualLayerNormParams const& params, cudaStream_t stream)
{
    if (!canImplementResidualLayerNorm(params))
    {
        return cudaErrorInvalidValue;
    }
    switch (params.dataType)
    {
    case DataType::kFLOAT:
        return launchTyped<float>(params, stream);
    case DataType::kHALF:
        return launchTyped<__half>(params, stream);
    case DataType::kBF16:
        return launchTyped<__nv_bfloat16>(params, stream);
    }
    return cudaErrorInvalidValue;
}

} // namespace trocr
