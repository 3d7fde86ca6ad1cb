// float32, on the ordinary cores: for engines that are to agree with PyTorch in float32, not for speed. A block
// computes 64 patches by 64 columns, a thread 4 by 4 of them.

#include "common/launch.h"
#include "patch_embedding/pieces.cuh"

namespace trocr::patch_embedding_detail
{
namespace
{

constexpr int kTILE = kPART_COLUMNS;  // so that a row of a tile is one part of the statistics
constexpr int kSTEP = 16;
constexpr int kTHREADS = 256;
constexpr int kTHREAD_ROWS = 4;
constexpr int kTHREAD_COLUMNS = 4;

//! Offset, in an image, of input k from its patch's first pixel.
__device__ int pixelOffset(Arguments<float> const& p, int k)
{
    int const channel = k / 256;
    int const y = k / 64 % 4 * 4 + k / 2 % 4;
    int const x = k / 16 % 4 * 4 + k / 8 % 2 * 2 + k % 2;
    return channel * p.plane + y * p.width + x;
}

__global__ void __launch_bounds__(kTHREADS) patchEmbeddingFloatKernel(Arguments<float> const p)
{
    __shared__ float pixelTile[kSTEP][kTILE + 1];
    __shared__ float weightTile[kSTEP][kTILE + 1];
    int const row = static_cast<int>(blockIdx.x) * kTILE;
    int const column = static_cast<int>(blockIdx.y) * kTILE;
    int const threadRow = static_cast<int>(threadIdx.x) / 16 * kTHREAD_ROWS;
    int const threadColumn = static_cast<int>(threadIdx.x) % 16 * kTHREAD_COLUMNS;
    int const tileRow = static_cast<int>(threadIdx.x) / 4;
    int const tileInput = static_cast<int>(threadIdx.x) % 4 * 4;
    uint8_t const* const patch = patchPixels(p, min(row + tileRow, p.rows - 1));
    float const* const weight = p.weight + static_cast<int64_t>(column + tileRow) * kPATCH_INPUTS;

    int const block = static_cast<int>(blockIdx.y * gridDim.x + blockIdx.x);
    writeSpecialTokens(p, block * (kTHREADS / 32) + static_cast<int>(threadIdx.x) / 32,
                       static_cast<int>(gridDim.x * gridDim.y) * (kTHREADS / 32), static_cast<int>(threadIdx.x) % 32);

    float acc[kTHREAD_ROWS][kTHREAD_COLUMNS]{};
    for (int k = 0; k < kPATCH_INPUTS; k += kSTEP)
    {
#pragma unroll
        for (int i = 0; i < 4; ++i)
        {
            int const pixel = patch[pixelOffset(p, k + tileInput + i)];
            pixelTile[tileInput + i][tileRow] = static_cast<float>(pixel - kPIXEL_CENTRE);
            weightTile[tileInput + i][tileRow] = weight[k + tileInput + i];
        }
        __syncthreads();
#pragma unroll
        for (int step = 0; step < kSTEP; ++step)
        {
#pragma unroll
            for (int i = 0; i < kTHREAD_ROWS; ++i)
            {
#pragma unroll
                for (int j = 0; j < kTHREAD_COLUMNS; ++j)
                {
                    acc[i][j] += pixelTile[step][threadRow + i] * weightTile[step][threadColumn + j];
                }
            }
        }
        __syncthreads();
    }

    for (int i = 0; i < kTHREAD_ROWS; ++i)
    {
        TokenPlace const place = tokenPlace(p, row + threadRow + i);
        float sum = 0.0F;
        for (int j = 0; j < kTHREAD_COLUMNS; ++j)
        {
            int const n = column + threadColumn + j;
            float const position = p.positions[static_cast<int64_t>(place.position) * p.outputs + n];
            acc[i][j] = p.scale * acc[i][j] + p.bias[n] + position;
            sum += acc[i][j];
            if (place.row >= 0)
            {
                p.y[static_cast<int64_t>(place.row) * p.outputs + n] = acc[i][j];
            }
        }
        if (p.statistics != nullptr)
        {
            float const mean = groupSum<16>(sum) * (1.0F / kPART_COLUMNS);
            float squares = 0.0F;
            for (float const v : acc[i])
            {
                squares += (v - mean) * (v - mean);
            }
            float const m2 = groupSum<16>(squares);
            if (threadColumn == 0 && place.row >= 0)
            {
                int64_t const part = static_cast<int64_t>(place.row) * (p.outputs / kPART_COLUMNS);
                p.statistics[part + blockIdx.y] = make_float2(mean, m2);
            }
        }
    }
}

}  // namespace

cudaError_t patchEmbeddingFloat(PatchEmbeddingParams const& params, cudaStream_t stream)
{
    Arguments<float> const args = arguments<float>(params);
    dim3 const blocks(ceilDiv(args.rows, kTILE), params.outputs / kTILE);
    patchEmbeddingFloatKernel<<<blocks, kTHREADS, 0, stream>>>(args);
    return cudaGetLastError();
}

}  // namespace trocr::patch_embedding_detail
