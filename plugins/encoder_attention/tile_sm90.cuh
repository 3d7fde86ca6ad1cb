#pragma once

// What the Hopper kernel of encoder attention does with one tile: the copy engine's view of qkv, both products, and the
// softmax of scores in the registers of a warpgroup (row and column of a register: Wgmma in common/sm90.cuh).

#include <math_constants.h>

#include "common/data_type.h"
#include "common/device.cuh"
#include "common/launch.h"
#include "common/tensor_map.h"
#include "encoder_attention/kernel.h"
#include "encoder_attention/sm90.cuh"

namespace trocr
{

namespace sm90
{

constexpr int kHEAD_DIM = 64;
constexpr int kROW_BYTES = kHEAD_DIM * 2;  // one 128-byte swizzle
constexpr int kQUERIES = 64;               // query rows of a tile: the M of wgmma
constexpr int kQUERY_BYTES = kQUERIES * kROW_BYTES;
// Columns of the second product: the values', and eight of ones, whose products are the sums of the probabilities.
constexpr int kOUTPUTS = kHEAD_DIM + 8;
constexpr int kONES_BYTES = 16 * kROW_BYTES;  // 16 keys' rows

//! s[64, N] = q k^T, asynchronously.
template <typename T, int N>
__device__ __forceinline__ void multiplyScores(float* s, uint32_t queries, uint32_t keys)
{
    SharedProduct<T, N>::run(s, operandDescriptor(queries), operandDescriptor(keys));
}

//! Asks for a box of rows of one head; `plane` is the head, of keys behind those of queries, of values behind both.
__device__ __forceinline__ void loadRows(uint32_t to, CUtensorMap const* map, int row, int plane, int image,
                                         uint32_t full, uint32_t bytes)
{
    barrierArriveExpect(full, bytes);
    loadBox4d(to, map, 0, row, plane, image, full);
}

//! The first multiple of 1024 in the block's shared memory: uniform in a warp, and known to be so, as addresses and
//! descriptors then stay in uniform registers.
__device__ __forceinline__ uint32_t tileMemory(uint8_t const* dynamicShared)
{
    return __shfl_sync(kFULL_WARP, (sharedAddress(dynamicShared) + 1023) / 1024 * 1024, 0);
}

//! Fills the kONES_BYTES at `ones`; all threads of the block, before a barrier.
template <typename T>
__device__ __forceinline__ void fillOnes(uint32_t ones)
{
    uint32_t const pair = packPair<T>(1.0F, 1.0F);
    for (int i = threadIdx.x; i < kONES_BYTES / 4; i += blockDim.x)
    {
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(ones + 4 * i), "r"(pair) : "memory");
    }
    proxyFence();
}

//! o[64, 72] += p[64, N] (v, 1), asynchronously. `ones` lies behind `values`.
template <typename T, int N>
__device__ __forceinline__ void multiplyValues(float* o, uint32_t const* p, uint32_t values, uint32_t ones)
{
    constexpr int kSTEP = 16 * kROW_BYTES >> 4;  // in a descriptor, from 16 keys to the next 16
    // The leading offset, from the 64 columns to the next, leads to the same ones in every step.
    uint64_t const descriptor = operandDescriptor(values, ones - values);
#pragma unroll
    for (int k = 0; k < N / 16; ++k)
    {
        RegisterProduct<T>::run(o, p + 4 * k, descriptor + kSTEP * k - (uint64_t{kSTEP} << 16) * k);
    }
}

//! -inf from column `columns` on.
template <int N>
__device__ __forceinline__ void mask(float* s, int columns)
{
    int const column = 2 * (threadIdx.x % 4);
#pragma unroll
    for (int i = 0; i < N / 2; ++i)
    {
        if (column + i / 4 * 8 + i % 2 >= columns)
        {
            s[i] = -CUDART_INF_F;
        }
    }
}

//! The largest of this thread's scores in each of its two rows.
template <int N>
__device__ __forceinline__ void threadMaxima(float const* s, float (&maxima)[2])
{
#pragma unroll
    for (int h = 0; h < 2; ++h)
    {
        maxima[h] = fmaxf(s[2 * h], s[2 * h + 1]);
#pragma unroll
        for (int i = 4; i < N / 2; i += 4)
        {
            maxima[h] = fmaxf(maxima[h], fmaxf(s[i + 2 * h], s[i + 2 * h + 1]));
        }
    }
}

//! s = 2^(scale (s - maximum)).
template <int N>
__device__ __forceinline__ void exponentials(float* s, float scale, float const (&maxima)[2])
{
    float const offsets[2] = {-maxima[0] * scale, -maxima[1] * scale};
#pragma unroll
    for (int i = 0; i < N / 2; ++i)
    {
        int const h = i / 2 % 2;
        s[i] = exp2Approx(fmaf(s[i], scale, offsets[h]));
    }
}

template <typename T, int N>
__device__ __forceinline__ void pack(uint32_t* p, float const* s)
{
#pragma unroll
    for (int i = 0; i < N / 4; ++i)
    {
        p[i] = packPair<T>(s[2 * i], s[2 * i + 1]);
    }
}

//! qkv [B, S, 3, H, 64] as [B, 3 H, S, 64], in boxes of `rows` rows of one head: what a box has beyond S is zero, not
//! the next image.
inline cudaError_t makeMap(EncoderAttentionParams const& params, int rows, CUtensorMap& map)
{
    auto const encode = tensorMapEncoder();
    if (encode == nullptr)
    {
        return cudaErrorNotSupported;
    }
    cuuint64_t const planes = 3 * static_cast<cuuint64_t>(params.numHeads);
    cuuint64_t const length = params.sequenceLength;
    cuuint64_t const sizes[] = {kHEAD_DIM, length, planes, static_cast<cuuint64_t>(params.batch)};
    cuuint64_t const strides[] = {planes * kROW_BYTES, kROW_BYTES, length * planes * kROW_BYTES};
    cuuint32_t const box[] = {kHEAD_DIM, static_cast<cuuint32_t>(rows), 1, 1};
    cuuint32_t const steps[] = {1, 1, 1, 1};
    CUresult const result = encode(
        &map, params.dataType == DataType::kHALF ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        4, const_cast<void*>(params.qkv), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

//! A kernel's launch: qkv as tiles of kQUERIES rows and of `keys`, and `arguments`. Dependent: barriers, maps and
//! registers are set up while the predecessor ends. Whoever loads waits for that end before it reads qkv, and who
//! writes has read what was loaded. That a thread of every block waits also keeps the order transitive: this grid ends
//! after its predecessor.
template <typename Arguments>
cudaError_t launchTiles(void (*kernel)(CUtensorMap, CUtensorMap, Arguments), EncoderAttentionParams const& params,
                        int keys, int blocks, int threads, int sharedBytes, Arguments const& arguments,
                        cudaStream_t stream)
{
    CUtensorMap queryMap{};
    CUtensorMap keyValueMap{};
    cudaError_t status = makeMap(params, kQUERIES, queryMap);
    if (status == cudaSuccess)
    {
        status = makeMap(params, keys, keyValueMap);
    }
    if (status == cudaSuccess)
    {
        status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sharedBytes);
    }
    if (status != cudaSuccess)
    {
        return status;
    }
    cudaLaunchAttribute dependent = dependentLaunch();
    cudaLaunchConfig_t config{};
    config.gridDim = blocks;
    config.blockDim = threads;
    config.dynamicSmemBytes = sharedBytes;
    config.stream = stream;
    config.attrs = &dependent;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, queryMap, keyValueMap, arguments);
}

}  // namespace sm90

}  // namespace trocr
