#include "common/device.cuh"
#include "common/launch.h"
#include "encoder_attention/launchers.h"

//! Encoder attention in plain float32: the same streaming over keys as on tensor cores, with a register tile of fused
//! multiply-adds a thread. For checking and for GPUs' float32 mode; made to be right and not slow, not to win.

namespace trocr
{

namespace encoder_attention
{

// 16 x 16 threads hold 64 x 32 scores: a thread 4 queries by 2 keys, then 4 queries by d / 16 columns of the context.
// The 16 threads of a query are half a warp, so softmax needs only shuffles. 43 KiB of shared memory at d = 64.
constexpr int kSIDE = 16;
constexpr int kFLOAT_QUERIES = 64;
constexpr int kFLOAT_KEYS = 32;
constexpr int kQUERIES_A_THREAD = kFLOAT_QUERIES / kSIDE;
constexpr int kKEYS_A_THREAD = kFLOAT_KEYS / kSIDE;

//! Rows are padded by 16 bytes, so that 8 threads reading 16 bytes each of 8 rows meet in no bank.
template <int kCOLUMNS>
struct PaddedRow
{
    float values[kCOLUMNS + 4];

    __device__ __forceinline__ float4& at(int column)
    {
        return *reinterpret_cast<float4*>(values + column);
    }
};

template <int kHEAD_DIM>
struct FloatShared
{
    PaddedRow<kHEAD_DIM> queries[kFLOAT_QUERIES];
    PaddedRow<kHEAD_DIM> keys[kFLOAT_KEYS];
    PaddedRow<kHEAD_DIM> values[kFLOAT_KEYS];
    PaddedRow<kFLOAT_KEYS> probabilities[kFLOAT_QUERIES];
};

//! Copies rows [firstRow, firstRow + kROWS) of one head's matrix, `stride` floats apart; zeros from endRow on.
template <int kHEAD_DIM, int kROWS>
__device__ __forceinline__ void copyRows(PaddedRow<kHEAD_DIM> (&tile)[kROWS], float const* head, int64_t stride,
                                         int firstRow, int endRow)
{
    constexpr int kPACKS = kHEAD_DIM / 4;
    for (int i = threadIdx.x; i < kROWS * kPACKS; i += kSIDE * kSIDE)
    {
        int const row = i / kPACKS;
        int const column = i % kPACKS * 4;
        tile[row].at(column) = firstRow + row < endRow
                                   ? __ldg(reinterpret_cast<float4 const*>(head + (firstRow + row) * stride + column))
                                   : float4{};
    }
}

__device__ __forceinline__ float dot(float4 a, float4 b, float sum)
{
    return fmaf(a.x, b.x, fmaf(a.y, b.y, fmaf(a.z, b.z, fmaf(a.w, b.w, sum))));
}

template <int kHEAD_DIM>
__global__ void __launch_bounds__(kSIDE* kSIDE, 2)
    floatKernel(float const* __restrict__ qkv, float* __restrict__ context, int sequenceLength)
{
    constexpr int kCOLUMNS_A_THREAD = kHEAD_DIM / kSIDE;
    __shared__ FloatShared<kHEAD_DIM> shared;
    static_assert(sizeof(shared) <= 48 * 1024);

    // blockIdx = (query tile, head, image); qkv [B, S, 3, H, d], context [B, S, H, d]
    int const x = threadIdx.x % kSIDE;
    int const y = threadIdx.x / kSIDE;
    int const firstQuery = blockIdx.x * kFLOAT_QUERIES;
    int const width = gridDim.y * kHEAD_DIM;
    int64_t const image = static_cast<int64_t>(blockIdx.z) * sequenceLength;
    int64_t const stride = 3 * static_cast<int64_t>(width);
    float const* const queries = qkv + image * stride + blockIdx.y * kHEAD_DIM;
    float const* const keys = queries + width;
    float const* const values = keys + width;
    float const scale = kLOG2_E * rsqrtf(static_cast<float>(kHEAD_DIM));

    copyRows(shared.queries, queries, stride, firstQuery, sequenceLength);

    float sums[kQUERIES_A_THREAD] = {};
    float maxima[kQUERIES_A_THREAD];
    float accumulators[kQUERIES_A_THREAD][kCOLUMNS_A_THREAD] = {};
#pragma unroll
    for (int q = 0; q < kQUERIES_A_THREAD; ++q)
    {
        maxima[q] = -INFINITY;
    }

    for (int firstKey = 0; firstKey < sequenceLength; firstKey += kFLOAT_KEYS)
    {
        __syncthreads();  // the tiles before are read
        copyRows(shared.keys, keys, stride, firstKey, sequenceLength);
        copyRows(shared.values, values, stride, firstKey, sequenceLength);
        __syncthreads();

        // Thread (x, y) has queries 4y to 4y + 3 and keys x, x + 16.
        float scores[kQUERIES_A_THREAD][kKEYS_A_THREAD] = {};
#pragma unroll 4
        for (int column = 0; column < kHEAD_DIM; column += 4)
        {
#pragma unroll
            for (int k = 0; k < kKEYS_A_THREAD; ++k)
            {
                float4 const key = shared.keys[x + kSIDE * k].at(column);
#pragma unroll
                for (int q = 0; q < kQUERIES_A_THREAD; ++q)
                {
                    float4 const query = shared.queries[kQUERIES_A_THREAD * y + q].at(column);
                    scores[q][k] = dot(query, key, scores[q][k]);
                }
            }
        }

#pragma unroll
        for (int q = 0; q < kQUERIES_A_THREAD; ++q)
        {
            float maximum = maxima[q];
#pragma unroll
            for (int k = 0; k < kKEYS_A_THREAD; ++k)
            {
                bool const inside = firstKey + x + kSIDE * k < sequenceLength;
                scores[q][k] = inside ? scores[q][k] * scale : -INFINITY;
                maximum = fmaxf(maximum, scores[q][k]);
            }
            maximum = groupMax<kSIDE>(maximum);  // finite: every tile has a key
            float const factor = exp2Approx(maxima[q] - maximum);
            maxima[q] = maximum;
            sums[q] *= factor;
#pragma unroll
            for (int c = 0; c < kCOLUMNS_A_THREAD; ++c)
            {
                accumulators[q][c] *= factor;
            }
#pragma unroll
            for (int k = 0; k < kKEYS_A_THREAD; ++k)
            {
                float const probability = exp2Approx(scores[q][k] - maximum);
                sums[q] += probability;  // of the thread's own keys
                shared.probabilities[kQUERIES_A_THREAD * y + q].values[x + kSIDE * k] = probability;
            }
        }
        __syncwarp();  // the probabilities of a query are written and read by one half of a warp

#pragma unroll 4
        for (int key = 0; key < kFLOAT_KEYS; ++key)
        {
            float value[kCOLUMNS_A_THREAD];
#pragma unroll
            for (int c = 0; c < kCOLUMNS_A_THREAD; ++c)
            {
                value[c] = shared.values[key].values[kCOLUMNS_A_THREAD * x + c];
            }
#pragma unroll
            for (int q = 0; q < kQUERIES_A_THREAD; ++q)
            {
                float const probability = shared.probabilities[kQUERIES_A_THREAD * y + q].values[key];
#pragma unroll
                for (int c = 0; c < kCOLUMNS_A_THREAD; ++c)
                {
                    accumulators[q][c] = fmaf(probability, value[c], accumulators[q][c]);
                }
            }
        }
    }

#pragma unroll
    for (int q = 0; q < kQUERIES_A_THREAD; ++q)
    {
        float const factor = 1.0F / groupSum<kSIDE>(sums[q]);
        int const query = firstQuery + kQUERIES_A_THREAD * y + q;
        if (query < sequenceLength)
        {
            float* const to = context + (image + query) * width + blockIdx.y * kHEAD_DIM + kCOLUMNS_A_THREAD * x;
#pragma unroll
            for (int c = 0; c < kCOLUMNS_A_THREAD; ++c)
            {
                to[c] = accumulators[q][c] * factor;
            }
        }
    }
}

}  // namespace encoder_attention

template <int kHEAD_DIM>
cudaError_t encoderAttentionFloat(EncoderAttentionParams const& params, cudaStream_t stream)
{
    using namespace encoder_attention;
    dim3 const grid(ceilDiv(params.sequenceLength, kFLOAT_QUERIES), params.numHeads, params.batch);
    return launch(floatKernel<kHEAD_DIM>, grid, dim3(kSIDE * kSIDE), stream, static_cast<float const*>(params.qkv),
                  static_cast<float*>(params.context), params.sequenceLength);
}

template cudaError_t encoderAttentionFloat<32>(EncoderAttentionParams const&, cudaStream_t);
template cudaError_t encoderAttentionFloat<64>(EncoderAttentionParams const&, cudaStream_t);

}  // namespace trocr
