#include <limits>

#include "common/device.cuh"
#include "common/launch.h"
#include "residual_layernorm/kernel.h"

namespace trocr
{

namespace
{

constexpr int32_t kMAX_WIDTH = 1 << 30;  // columns are counted in 32 bits, offsets in 64
constexpr int64_t kMAX_ROWS = std::numeric_limits<int32_t>::max();

// Up to here a warp keeps a row in registers: 1024 elements are 32 floats a lane. TrOCR's widths are 256 to 1024.
constexpr int kMAX_WARP_WIDTH = 1024;

// Pointers are not __restrict__: outputs may be inputs (each element is written by the thread that read it, after its
// last reading).
template <typename T>
struct Arguments
{
    T const* x;
    T const* residual;  // null where there is none
    T const* gamma;
    T const* beta;
    T* normed;
    T* sum;  // null where not wanted
    int rows;
    int width;
    float epsilon;
};

//! griddepcontrol.wait: until the preceding grid has ended and what it wrote is visible.
__device__ __forceinline__ void waitForPredecessor()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

//! griddepcontrol.launch_dependents: the next grid may start, and wait for this one's end.
__device__ __forceinline__ void releaseSuccessor()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

//! x + residual as a reader of the stored sum sees it: rounded to T.
template <typename T, int kSIZE>
__device__ __forceinline__ Pack<T, kSIZE> roundedSum(Pack<T, kSIZE> x, Pack<T, kSIZE> const& residual)
{
#pragma unroll
    for (int i = 0; i < kSIZE; ++i)
    {
        x.values[i] = toFloat(fromFloat<T>(x.values[i] + residual.values[i]));
    }
    return x;
}

template <typename T, int kSIZE>
__device__ __forceinline__ Pack<T, kSIZE> normalise(Pack<T, kSIZE> sum, float mean, float inverseDeviation,
                                                    Pack<T, kSIZE> const& gamma, Pack<T, kSIZE> const& beta)
{
#pragma unroll
    for (int i = 0; i < kSIZE; ++i)
    {
        sum.values[i] = (sum.values[i] - mean) * inverseDeviation * gamma.values[i] + beta.values[i];
    }
    return sum;
}

// A warp a row: no shared memory, no barrier, and both passes over registers. A decode step has few rows and so waits
// for memory, not bandwidth: all loads, those of gamma and beta too, are started before the first is used. The launch
// bound leaves the compiler the registers for that.
constexpr int kROWS_A_BLOCK = 4;

template <typename T, int kPACKS, bool kRESIDUAL>
__global__ void __launch_bounds__(kWARP_SIZE* kROWS_A_BLOCK, sizeof(T) == 4 ? 2 : 4) warpPerRowKernel(Arguments<T> args)
{
    releaseSuccessor();
    constexpr int kSIZE = 16 / sizeof(T);
    int const row = blockIdx.x * kROWS_A_BLOCK + threadIdx.y;
    if (row >= args.rows)
    {
        return;
    }
    int64_t const offset = static_cast<int64_t>(row) * args.width;

    // A lane whose last pack is beyond the row loads the row's first: without a branch around the loads they overlap.
    uint4 x[kPACKS];
    uint4 residual[kPACKS];
    uint4 gamma[kPACKS];
    uint4 beta[kPACKS];
    bool inside[kPACKS];
#pragma unroll
    for (int p = 0; p < kPACKS; ++p)
    {
        int const column = (p * kWARP_SIZE + threadIdx.x) * kSIZE;
        inside[p] = column < args.width;
        int const safe = inside[p] ? column : 0;
        gamma[p] = __ldg(reinterpret_cast<uint4 const*>(args.gamma + safe));
        beta[p] = __ldg(reinterpret_cast<uint4 const*>(args.beta + safe));
    }
    waitForPredecessor();
#pragma unroll
    for (int p = 0; p < kPACKS; ++p)
    {
        int const safe = inside[p] ? (p * kWARP_SIZE + threadIdx.x) * kSIZE : 0;
        x[p] = *reinterpret_cast<uint4 const*>(args.x + offset + safe);
        if constexpr (kRESIDUAL)
        {
            residual[p] = *reinterpret_cast<uint4 const*>(args.residual + offset + safe);
        }
    }

    Pack<T> sums[kPACKS];
    float total = 0.0F;
#pragma unroll
    for (int p = 0; p < kPACKS; ++p)
    {
        sums[p] = Pack<T>::fromBits(x[p]);
        if constexpr (kRESIDUAL)
        {
            sums[p] = roundedSum(sums[p], Pack<T>::fromBits(residual[p]));
        }
#pragma unroll
        for (int i = 0; i < kSIZE; ++i)
        {
            total += inside[p] ? sums[p].values[i] : 0.0F;
        }
    }
    float const mean = groupSum(total) / static_cast<float>(args.width);

    float squares = 0.0F;
#pragma unroll
    for (int p = 0; p < kPACKS; ++p)
    {
#pragma unroll
        for (int i = 0; i < kSIZE; ++i)
        {
            float const centred = inside[p] ? sums[p].values[i] - mean : 0.0F;
            squares += centred * centred;
        }
    }
    float const inverseDeviation = rsqrtf(groupSum(squares) / static_cast<float>(args.width) + args.epsilon);

#pragma unroll
    for (int p = 0; p < kPACKS; ++p)
    {
        if (inside[p])
        {
            int64_t const element = offset + (p * kWARP_SIZE + threadIdx.x) * kSIZE;
            if (args.sum != nullptr)
            {
                sums[p].store(args.sum + element);
            }
            normalise(sums[p], mean, inverseDeviation, Pack<T>::fromBits(gamma[p]), Pack<T>::fromBits(beta[p]))
                .store(args.normed + element);
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
    auto const sumAt = [&](int column)
    {
        auto const x = Pack<T, kSIZE>::load(args.x + offset + column);
        return args.residual == nullptr ? x : roundedSum(x, Pack<T, kSIZE>::load(args.residual + offset + column));
    };
    releaseSuccessor();
    waitForPredecessor();

    float total = 0.0F;
    for (int column = firstColumn; column < args.width; column += kSTEP)
    {
        auto const sum = sumAt(column);
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
        auto const sum = sumAt(column);
#pragma unroll
        for (int i = 0; i < kSIZE; ++i)
        {
            float const centred = sum.values[i] - mean;
            squares += centred * centred;
        }
    }
    float const inverseDeviation =
        rsqrtf(blockSum(squares, squaresScratch) / static_cast<float>(args.width) + args.epsilon);

    for (int column = firstColumn; column < args.width; column += kSTEP)
    {
        auto const sum = sumAt(column);
        auto const gamma = Pack<T, kSIZE>::load(args.gamma + column);
        auto const beta = Pack<T, kSIZE>::load(args.beta + column);
        if (args.sum != nullptr)
        {
            sum.store(args.sum + offset + column);
        }
        normalise(sum, mean, inverseDeviation, gamma, beta).store(args.normed + offset + column);
    }
}

//! Launches, as a dependent of the preceding grid where that is asked for and the device can.
template <typename T>
cudaError_t launchDependent(void (*kernel)(Arguments<T>), dim3 grid, dim3 block, bool overlap, cudaStream_t stream,
                            Arguments<T> const& args)
{
    int major{};
    cudaError_t const status = overlap ? deviceAttribute(cudaDevAttrComputeCapabilityMajor, major) : cudaSuccess;
    if (status != cudaSuccess)
    {
        return status;
    }
    cudaLaunchAttribute dependent = dependentLaunch();

    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.stream = stream;
    config.attrs = &dependent;
    config.numAttrs = overlap && major >= 9 ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, args);
}

template <typename T, int kPACKS>
cudaError_t launchWarpPerRow(Arguments<T> const& args, bool overlap, cudaStream_t stream)
{
    constexpr int kPACKS_MAX = kMAX_WARP_WIDTH * sizeof(T) / 16 / kWARP_SIZE;
    if constexpr (kPACKS < kPACKS_MAX)
    {
        if (args.width > static_cast<int>(kPACKS * kWARP_SIZE * (16 / sizeof(T))))
        {
            return launchWarpPerRow<T, kPACKS + 1>(args, overlap, stream);
        }
    }
    dim3 const grid(ceilDiv<unsigned>(args.rows, kROWS_A_BLOCK));
    auto const kernel =
        args.residual != nullptr ? warpPerRowKernel<T, kPACKS, true> : warpPerRowKernel<T, kPACKS, false>;
    return launchDependent(kernel, grid, dim3(kWARP_SIZE, kROWS_A_BLOCK), overlap, stream, args);
}

template <typename T, int kSIZE>
cudaError_t launchBlockPerRow(Arguments<T> const& args, bool overlap, cudaStream_t stream)
{
    return launchDependent(blockPerRowKernel<T, kSIZE>, dim3(args.rows), dim3(kWARP_SIZE * kBLOCK_WARPS), overlap,
                           stream, args);
}

template <typename T>
cudaError_t launchTyped(ResidualLayerNormParams const& params, cudaStream_t stream)
{
    constexpr int kSIZE = 16 / sizeof(T);
    Arguments<T> const args{static_cast<T const*>(params.x),
                            static_cast<T const*>(params.residual),
                            static_cast<T const*>(params.gamma),
                            static_cast<T const*>(params.beta),
                            static_cast<T*>(params.normed),
                            static_cast<T*>(params.sum),
                            static_cast<int>(params.rows),
                            params.width,
                            params.epsilon};

    // Aligned as any where there are none.
    void const* const sum = args.sum != nullptr ? args.sum : args.normed;
    void const* const residual = args.residual != nullptr ? args.residual : args.x;
    if (!areAligned(sizeof(T), params.x, residual, params.gamma, params.beta, params.normed, sum))
    {
        return cudaErrorInvalidValue;
    }
    bool const packed =
        params.width % kSIZE == 0 && areAligned(16, params.x, residual, params.gamma, params.beta, params.normed, sum);
    bool const overlap = params.overlapPredecessor;
    if (!packed)
    {
        return launchBlockPerRow<T, 1>(args, overlap, stream);
    }
    return params.width <= kMAX_WARP_WIDTH ? launchWarpPerRow<T, 1>(args, overlap, stream)
                                           : launchBlockPerRow<T, kSIZE>(args, overlap, stream);
}

}  // namespace

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
    if (!(params.epsilon >= 0.0F))  // NaN too
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
    return dispatchType(params.dataType, [&](auto type) { return launchTyped<decltype(type)>(params, stream); });
}

}  // namespace trocr
