#include <algorithm>
#include <limits>

#include "bias_activation/kernel.h"
#include "common/device.cuh"
#include "common/launch.h"

namespace trocr
{

namespace
{

// A warp covers 512 neighbouring bytes of a row, a block 8 rows of them at a time. A thread stays in its columns, so
// that it reads the bias once and needs no modulo, and works on kUNROLL rows at once to keep as many loads in flight.
constexpr int kBLOCK_ROWS = 8;
constexpr int kUNROLL = 4;

constexpr int32_t kMAX_WIDTH = 1 << 30;  // columns are counted in 32 bits, rows and offsets in 64
constexpr int64_t kMAX_ROWS = std::numeric_limits<int32_t>::max();

template <Activation kACTIVATION>
__device__ __forceinline__ float activate(float v)
{
    if constexpr (kACTIVATION == Activation::kGELU)
    {
        constexpr float kSQRT_HALF = 0.70710678118654752F;
        return 0.5F * v * (1.0F + erff(v * kSQRT_HALF));
    }
    else
    {
        return v < 0.0F ? 0.0F : v;  // unlike fmaxf, keeps NaN
    }
}

template <typename T, int kSIZE, Activation kACTIVATION>
__global__ void __launch_bounds__(kWARP_SIZE* kBLOCK_ROWS)
    biasActivationKernel(T const* x, T const* bias, T* y, int64_t rows, int width)
{
    int const column = (blockIdx.x * kWARP_SIZE + threadIdx.x) * kSIZE;
    if (column >= width)
    {
        return;
    }
    auto const biasPack = Pack<T, kSIZE>::load(bias + column);

    int64_t const stride = static_cast<int64_t>(gridDim.y) * kBLOCK_ROWS;
    int64_t const firstRow = static_cast<int64_t>(blockIdx.y) * kBLOCK_ROWS + threadIdx.y;
    for (int64_t row = firstRow; row < rows; row += kUNROLL * stride)
    {
        Pack<T, kSIZE> packs[kUNROLL];
#pragma unroll
        for (int u = 0; u < kUNROLL; ++u)
        {
            if (row + u * stride < rows)
            {
                packs[u] = Pack<T, kSIZE>::load(x + (row + u * stride) * width + column);
            }
        }
#pragma unroll
        for (int u = 0; u < kUNROLL; ++u)
        {
            if (row + u * stride < rows)
            {
#pragma unroll
                for (int i = 0; i < kSIZE; ++i)
                {
                    packs[u].values[i] = activate<kACTIVATION>(packs[u].values[i] + biasPack.values[i]);
                }
                packs[u].store(y + (row + u * stride) * width + column);
            }
        }
    }
}

template <typename T, int kSIZE, Activation kACTIVATION>
cudaError_t launchSized(BiasActivationParams const& params, cudaStream_t stream)
{
    constexpr int64_t kMAX_GRID_Y = 65535;
    int64_t const columnBlocks = ceilDiv<int64_t>(params.width, kWARP_SIZE * kSIZE);
    int64_t const rowBlocks = std::min(ceilDiv<int64_t>(params.rows, kBLOCK_ROWS * kUNROLL), kMAX_GRID_Y);
    dim3 const grid(static_cast<unsigned>(columnBlocks), static_cast<unsigned>(rowBlocks));
    return launch(biasActivationKernel<T, kSIZE, kACTIVATION>, grid, dim3(kWARP_SIZE, kBLOCK_ROWS), stream,
                  static_cast<T const*>(params.x), static_cast<T const*>(params.bias), static_cast<T*>(params.y),
                  params.rows, params.width);
}

template <typename T, Activation kACTIVATION>
cudaError_t launchTyped(BiasActivationParams const& params, cudaStream_t stream)
{
    constexpr int kSIZE = 16 / sizeof(T);
    if (!areAligned(sizeof(T), params.x, params.bias, params.y))
    {
        return cudaErrorInvalidValue;
    }
    bool const packed = params.width % kSIZE == 0 && areAligned(16, params.x, params.bias, params.y);
    return packed ? launchSized<T, kSIZE, kACTIVATION>(params, stream) : launchSized<T, 1, kACTIVATION>(params, stream);
}

template <typename T>
cudaError_t launchActivation(BiasActivationParams const& params, cudaStream_t stream)
{
    return params.activation == Activation::kGELU ? launchTyped<T, Activation::kGELU>(params, stream)
                                                  : launchTyped<T, Activation::kRELU>(params, stream);
}

}  // namespace

bool canImplementBiasActivation(BiasActivationParams const& params, char const** reason)
{
    if (sizeOf(params.dataType) == 0)
    {
        return refuse(reason, "the data type is none of float32, float16, bfloat16");
    }
    if (params.activation != Activation::kGELU && params.activation != Activation::kRELU)
    {
        return refuse(reason, "the activation is neither gelu nor relu");
    }
    if (params.rows < 1 || params.width < 1)
    {
        return refuse(reason, "rows and width must be at least 1");
    }
    if (params.width > kMAX_WIDTH || params.rows > kMAX_ROWS)
    {
        return refuse(reason, "the width is above 2^30 or the rows are above 2^31 - 1");
    }
    return true;
}

cudaError_t biasActivation(BiasActivationParams const& params, cudaStream_t stream)
{
    if (!canImplementBiasActivation(params))
    {
        return cudaErrorInvalidValue;
    }
    return dispatchType(params.dataType, [&](auto type) { return launchActivation<decltype(type)>(params, stream); });
}

}  // namespace trocr
