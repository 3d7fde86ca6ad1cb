// Encoder attention on Hopper for few query tiles: a block has one, and each of its warpgroups a key tile. SM90.md,
// "Few tiles".

#include <cmath>
#include <type_traits>

#include "common/fp8.cuh"
#include "common/launch.h"
#include "encoder_attention/launchers.h"
#include "encoder_attention/tile_sm90.cuh"

namespace trocr
{

namespace
{

using namespace sm90;

constexpr int kGROUPS = kDIVIDED_KEY_TILES;
constexpr int kTHREADS = 128 * kGROUPS;
constexpr int kTILE_BYTES = kDIVIDED_KEYS * kROW_BYTES;

// Shared memory, from an address that is a multiple of 1024: each group's keys and values, then what all share.
constexpr int kQUERIES_AT = kGROUPS * 2 * kTILE_BYTES;
constexpr int kONES_AT = kQUERIES_AT + kQUERY_BYTES;
constexpr int kPARTS_AT = kONES_AT + kONES_BYTES;  // float2 [group][row]: maximum, sum
constexpr int kBARRIERS_AT = kPARTS_AT + kGROUPS * kQUERIES * 8;
constexpr int kBARRIERS = 1 + 3 * kGROUPS;
constexpr int kSHARED_BYTES = kBARRIERS_AT + kBARRIERS * 8 + 1024 /* alignment */;
static_assert(kSHARED_BYTES <= 227 * 1024);
static_assert(kTILE_BYTES >= kQUERIES * kHEAD_DIM * 4, "a group's outputs take the place of its keys");

struct Arguments
{
    void* context;  // C [B, S, H, 64]
    int sequenceLength;
    int heads;
    int queryTiles;      // of a head
    int keyTiles;        // of a head, at most kGROUPS
    float scale;         // log2(e) / sqrt(d)
    float outputFactor;  // of e4m3, 1 / outputScale
};

//! Barriers: queries are there; of each group, its keys and its values are there, its warps have read its keys.
struct Barriers
{
    uint32_t queries, keys, values, keysRead;

    __device__ __forceinline__ Barriers(uint32_t base, int group)
        : queries(base + kBARRIERS_AT), keys(queries + 8 + 24 * group), values(keys + 8), keysRead(keys + 16)
    {
    }
};

//! Byte of `column`, a multiple of 2, in a group's float32 outputs [64, 64]. Pieces of eight columns change places by
//! the row, so that neither the accumulators' layout nor whole rows meet a bank twice.
__device__ __forceinline__ int outputAt(int row, int column)
{
    return row * (kHEAD_DIM * 4) + ((column / 8) ^ (row % 8)) * 32 + column % 8 * 4;
}

//! This group's part of the tile: to shared memory its outputs, relative to its own maxima, and those with the sums.
template <typename T>
__device__ __forceinline__ void attend(Arguments const& arguments, uint32_t base, uint8_t* shared, int group)
{
    int const warp = __shfl_sync(kFULL_WARP, static_cast<int>(threadIdx.x) % 128 / kWARP_SIZE, 0);
    int const lane = threadIdx.x % kWARP_SIZE;
    uint32_t const keys = base + group * 2 * kTILE_BYTES;
    uint32_t const values = keys + kTILE_BYTES;
    Barriers const barriers(base, group);

    float s[kDIVIDED_KEYS / 2];
    barrierWait(barriers.queries, 0);
    barrierWait(barriers.keys, 0);
    wgmmaFence();
    multiplyScores<T, kDIVIDED_KEYS>(s, base + kQUERIES_AT, keys);
    wgmmaCommit();
    wgmmaWait<0>();
    wgmmaResult(s);
    if (lane == 0)
    {
        barrierArrive(barriers.keysRead);
    }

    if (group + 1 == arguments.keyTiles)
    {
        mask<kDIVIDED_KEYS>(s, arguments.sequenceLength - group * kDIVIDED_KEYS);
    }
    float maxima[2];
    threadMaxima<kDIVIDED_KEYS>(s, maxima);
    maxima[0] = groupMax<4>(maxima[0]);
    maxima[1] = groupMax<4>(maxima[1]);
    exponentials<kDIVIDED_KEYS>(s, arguments.scale, maxima);
    uint32_t p[kDIVIDED_KEYS / 4];
    pack<T, kDIVIDED_KEYS>(p, s);
    float o[kOUTPUTS / 2];
#pragma unroll
    for (int i = 0; i < kOUTPUTS / 2; ++i)
    {
        o[i] = 0.0F;
    }
    barrierWait(barriers.values, 0);
    wgmmaFence();
    multiplyValues<T, kDIVIDED_KEYS>(o, p, values, base + kONES_AT);
    wgmmaCommit();
    wgmmaWait<0>();
    wgmmaResult(o);

    barrierWait(barriers.keysRead, 0);  // whose place the outputs take
    uint8_t* const outputs = shared + group * 2 * kTILE_BYTES;
#pragma unroll
    for (int h = 0; h < 2; ++h)
    {
        int const row = warp * 16 + 8 * h + lane / 4;
#pragma unroll
        for (int block = 0; block < kHEAD_DIM / 8; ++block)
        {
            *reinterpret_cast<float2*>(outputs + outputAt(row, 8 * block + 2 * (lane % 4))) = {
                o[4 * block + 2 * h], o[4 * block + 2 * h + 1]};
        }
        if (lane % 4 == 0)
        {
            reinterpret_cast<float2*>(shared + kPARTS_AT)[group * kQUERIES + row] = {
                maxima[h], o[kHEAD_DIM / 2 + 2 * h]};  // of the column of ones
        }
    }
}

//! context = the groups' outputs, each scaled to the largest of their maxima, over their sums. A thread has a row and
//! 16 bytes of it. C: the context's type, T or e4m3.
template <typename C>
__device__ __forceinline__ void combine(Arguments const& arguments, uint8_t const* shared, int tile, int head,
                                        int image)
{
    constexpr int kCOLUMNS = 16 / sizeof(C);
    constexpr int kPIECES = kHEAD_DIM / kCOLUMNS;  // of a row
    int const row = threadIdx.x / kPIECES;
    int const column = threadIdx.x % kPIECES * kCOLUMNS;
    if (row >= kQUERIES || tile * kQUERIES + row >= arguments.sequenceLength)
    {
        return;
    }
    float2 parts[kGROUPS];
    float maximum = -CUDART_INF_F;
#pragma unroll
    for (int group = 0; group < kGROUPS; ++group)
    {
        parts[group] = {-CUDART_INF_F, 0.0F};
        if (group < arguments.keyTiles)
        {
            parts[group] = reinterpret_cast<float2 const*>(shared + kPARTS_AT)[group * kQUERIES + row];
        }
        maximum = fmaxf(maximum, parts[group].x);
    }
    float sum = 0.0F;
    float v[kCOLUMNS] = {};
#pragma unroll
    for (int group = 0; group < kGROUPS; ++group)
    {
        if (group < arguments.keyTiles)
        {
            float const factor = exp2Approx((parts[group].x - maximum) * arguments.scale);
            sum += factor * parts[group].y;
#pragma unroll
            for (int i = 0; i < kCOLUMNS; i += 4)
            {
                float4 const part =
                    *reinterpret_cast<float4 const*>(shared + group * 2 * kTILE_BYTES + outputAt(row, column + i));
                v[i] += factor * part.x;
                v[i + 1] += factor * part.y;
                v[i + 2] += factor * part.z;
                v[i + 3] += factor * part.w;
            }
        }
    }
    uint32_t w[4];
    if constexpr (std::is_same_v<C, __nv_fp8_e4m3>)
    {
        float const factor = arguments.outputFactor / sum;
#pragma unroll
        for (int i = 0; i < 4; ++i)  // in the order of common/fp8.cuh
        {
            w[i] = toE4m3(v[2 * i] * factor, v[2 * i + 1] * factor) |
                   toE4m3(v[8 + 2 * i] * factor, v[8 + 2 * i + 1] * factor) << 16;
        }
    }
    else
    {
        float const inverse = 1.0F / sum;
#pragma unroll
        for (int i = 0; i < 4; ++i)
        {
            w[i] = packPair<C>(v[2 * i] * inverse, v[2 * i + 1] * inverse);
        }
    }
    size_t const token = static_cast<size_t>(image) * arguments.sequenceLength + tile * kQUERIES + row;
    C* const context = static_cast<C*>(arguments.context) + (token * arguments.heads + head) * kHEAD_DIM + column;
    *reinterpret_cast<uint4*>(context) = {w[0], w[1], w[2], w[3]};
}

template <typename T, typename C>
__global__ void __launch_bounds__(kTHREADS, 1)
    dividedAttentionKernel(__grid_constant__ CUtensorMap const queryMap,
                           __grid_constant__ CUtensorMap const keyValueMap, __grid_constant__ Arguments const arguments)
{
    extern __shared__ uint8_t dynamicShared[];
    uint32_t const base = tileMemory(dynamicShared);
    uint8_t* const shared = dynamicShared + (base - sharedAddress(dynamicShared));
    int const group = __shfl_sync(kFULL_WARP, static_cast<int>(threadIdx.x) / 128, 0);
    int const tile = blockIdx.x % arguments.queryTiles;
    int const head = blockIdx.x / arguments.queryTiles % arguments.heads;
    int const image = blockIdx.x / arguments.queryTiles / arguments.heads;

    Barriers const barriers(base, group);
    if (threadIdx.x % 128 == 0)
    {
        if (group == 0)
        {
            barrierInit(barriers.queries, 1);
            prefetchTensorMap(&queryMap);
            prefetchTensorMap(&keyValueMap);
        }
        barrierInit(barriers.keys, 1);
        barrierInit(barriers.values, 1);
        barrierInit(barriers.keysRead, 128 / kWARP_SIZE);
        barrierInitFence();
    }
    fillOnes<T>(base + kONES_AT);
    __syncthreads();
    launchDependents();

    if (group < arguments.keyTiles)
    {
        if (threadIdx.x % 128 == 0)
        {
            // Whoever writes has read what is loaded from here on, so nobody else need wait.
            waitForPriorGrids();
            if (group == 0)
            {
                loadRows(base + kQUERIES_AT, &queryMap, tile * kQUERIES, head, image, barriers.queries, kQUERY_BYTES);
            }
            uint32_t const keys = base + group * 2 * kTILE_BYTES;
            int const row = group * kDIVIDED_KEYS;
            loadRows(keys, &keyValueMap, row, arguments.heads + head, image, barriers.keys, kTILE_BYTES);
            loadRows(keys + kTILE_BYTES, &keyValueMap, row, 2 * arguments.heads + head, image, barriers.values,
                     kTILE_BYTES);
        }
        __syncwarp();
        attend<T>(arguments, base, shared, group);
    }
    __syncthreads();
    combine<C>(arguments, shared, tile, head, image);
}

}  // namespace

template <typename T, typename C>
cudaError_t encoderAttentionDivided(EncoderAttentionParams const& params, cudaStream_t stream)
{
    Arguments arguments{};
    arguments.context = params.context;
    arguments.sequenceLength = params.sequenceLength;
    arguments.heads = params.numHeads;
    arguments.queryTiles = ceilDiv(params.sequenceLength, kQUERIES);
    arguments.keyTiles = ceilDiv(params.sequenceLength, kDIVIDED_KEYS);
    arguments.outputFactor = 1.0F / params.outputScale;
    arguments.scale = kLOG2_E / std::sqrt(static_cast<float>(kHEAD_DIM));
    return launchTiles(dividedAttentionKernel<T, C>, params, kDIVIDED_KEYS,
                       params.batch * params.numHeads * arguments.queryTiles, kTHREADS, kSHARED_BYTES, arguments,
                       stream);
}

template cudaError_t encoderAttentionDivided<__half, __half>(EncoderAttentionParams const&, cudaStream_t);
template cudaError_t encoderAttentionDivided<__nv_bfloat16, __nv_bfloat16>(EncoderAttentionParams const&, cudaStream_t);
template cudaError_t encoderAttentionDivided<__half, __nv_fp8_e4m3>(EncoderAttentionParams const&, cudaStream_t);

}  // namespace trocr
