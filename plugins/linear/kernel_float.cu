// float32, on the ordinary cores: for engines that are to agree with PyTorch's float32, not for speed. A block computes
// 64 rows by 64 columns, a thread 4 by 4 of them.

#include "linear/epilogue.cuh"
#include "linear/launch.h"
#include "linear/tactics.h"

namespace trocr::linear_detail
{
namespace
{

constexpr int kTILE = kLINEAR_STATISTICS_WIDTH;  // so that a row of a tile is one part of the statistics
constexpr int kBLOCK_K = 16;
constexpr int kTHREADS = 256;
constexpr int kTHREAD_ROWS = 4;
constexpr int kTHREAD_COLUMNS = 4;

//! Sum over the 16 threads that share a row.
__device__ float sumOfRow(float v)
{
#pragma unroll
    for (int mask = 8; mask > 0; mask /= 2)
    {
        v += __shfl_xor_sync(0xFFFFFFFFU, v, mask);
    }
    return v;
}

//! Rows [row, row + 64) and columns [k, k + 16) of a matrix [rows, columns], transposed; zeros outside.
__device__ void loadTransposed(float (&tile)[kBLOCK_K][kTILE + 1], float const* matrix, int row, int rows, int k,
                               int columns)
{
    int const tileRow = threadIdx.x / 4;
    int const tileColumn = threadIdx.x % 4 * 4;
    bool const present = row + tileRow < rows && k + tileColumn < columns;
    auto const* const source = matrix + static_cast<int64_t>(row + tileRow) * columns + k + tileColumn;
    float4 const v = present ? *reinterpret_cast<float4 const*>(source) : float4{};
    tile[tileColumn][tileRow] = v.x;
    tile[tileColumn + 1][tileRow] = v.y;
    tile[tileColumn + 2][tileRow] = v.z;
    tile[tileColumn + 3][tileRow] = v.w;
}

__global__ void __launch_bounds__(kTHREADS)
    linearFloatKernel(float const* x, float const* weight, float const* residual, float* y, bool gelu, EpilogueParams p)
{
    __shared__ float xTile[kBLOCK_K][kTILE + 1];
    __shared__ float weightTile[kBLOCK_K][kTILE + 1];
    int const row = blockIdx.x * kTILE;
    int const column = blockIdx.y * kTILE;
    int const threadRow = threadIdx.x / 16 * kTHREAD_ROWS;
    int const threadColumn = threadIdx.x % 16 * kTHREAD_COLUMNS;

    float acc[kTHREAD_ROWS][kTHREAD_COLUMNS]{};
    for (int k = 0; k < p.inputs; k += kBLOCK_K)
    {
        loadTransposed(xTile, x, row, p.rows, k, p.inputs);
        loadTransposed(weightTile, weight, column, p.outputs, k, p.inputs);
        __syncthreads();
#pragma unroll
        for (int step = 0; step < kBLOCK_K; ++step)
        {
#pragma unroll
            for (int i = 0; i < kTHREAD_ROWS; ++i)
            {
#pragma unroll
                for (int j = 0; j < kTHREAD_COLUMNS; ++j)
                {
                    acc[i][j] += xTile[step][threadRow + i] * weightTile[step][threadColumn + j];
                }
            }
        }
        __syncthreads();
    }

    for (int i = 0; i < kTHREAD_ROWS; ++i)
    {
        int64_t const m = row + threadRow + i;
        float mean = 0.0F;
        float rstd = 1.0F;
        if (p.inputStatistics != nullptr && m < p.rows)
        {
            int const parts = p.inputs / kLINEAR_STATISTICS_WIDTH;
            auto const* const statistics = reinterpret_cast<float2 const*>(p.inputStatistics) + m * parts;
            float m2 = 0.0F;
            for (int part = 0; part < parts; ++part)
            {
                float2 const next = statistics[part];
                float const delta = next.x - mean;
                mean += delta / static_cast<float>(part + 1);
                m2 += next.y + kLINEAR_STATISTICS_WIDTH * delta * delta * part / static_cast<float>(part + 1);
            }
            rstd = 1.0F / sqrtf(m2 / static_cast<float>(p.inputs) + p.epsilon);
        }
        float sum = 0.0F;
        for (int j = 0; j < kTHREAD_COLUMNS; ++j)
        {
            int const n = column + threadColumn + j;
            if (m < p.rows && n < p.outputs)
            {
                int64_t const at = m * p.outputs + n;
                float v = acc[i][j];
                v = p.inputStatistics != nullptr ? rstd * (v - mean * p.weightSum[n]) : v;
                v += p.bias != nullptr ? p.bias[n] : 0.0F;
                v = gelu ? v * normcdff(v) : fmaxf(v, p.lowerBound);
                v += residual != nullptr ? residual[at] : 0.0F;
                float* const to = p.heads.tokens != 0 ? HeadsCursor<float>(p, m, n).get() : y + at;
                *to = v;
                acc[i][j] = v;
                sum += v;
            }
        }
        if (p.outputStatistics != nullptr)  // then outputs is a multiple of 64: all columns are there
        {
            float const partMean = sumOfRow(sum) / kLINEAR_STATISTICS_WIDTH;
            float squares = 0.0F;
            for (float const v : acc[i])
            {
                squares += (v - partMean) * (v - partMean);
            }
            float const m2 = sumOfRow(squares);
            if (threadColumn == 0 && m < p.rows)
            {
                int64_t const part = m * (p.outputs / kLINEAR_STATISTICS_WIDTH) + blockIdx.y;
                reinterpret_cast<float2*>(p.outputStatistics)[part] = make_float2(partMean, m2);
            }
        }
    }
}

}  // namespace

cudaError_t linearFloat(LinearParams const& params, cudaStream_t stream)
{
    dim3 const blocks(ceilDiv(params.rows, kTILE), ceilDiv(params.outputs, kTILE));
    linearFloatKernel<<<blocks, kTHREADS, 0, stream>>>(
        static_cast<float const*>(params.x), static_cast<float const*>(params.weight),
        static_cast<float const*>(params.residual), static_cast<float*>(params.y),
        params.activation == LinearActivation::kGELU, epilogueParams(params));
    return cudaGetLastError();
}

}  // namespace trocr::linear_detail
