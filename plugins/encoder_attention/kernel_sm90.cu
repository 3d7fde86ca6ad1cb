// Encoder attention on Hopper: wgmma, TMA, keys and values of one head resident in shared memory. SM90.md has the
// arithmetic behind the sizes below.

#include <cmath>
#include <limits>
#include <type_traits>

#include <cudaTypedefs.h>
#include <math_constants.h>

#include "common/device.cuh"
#include "common/launch.h"
#include "encoder_attention/launchers.h"
#include "encoder_attention/sm90.cuh"

namespace trocr
{

namespace
{

using namespace sm90;

constexpr int kHEAD_DIM = 64;
constexpr int kROW_BYTES = kHEAD_DIM * 2; // one 128-byte swizzle
constexpr int kQUERIES = 64;              // query rows of a tile: the M of wgmma
constexpr int kQUERY_BYTES = kQUERIES * kROW_BYTES;
constexpr int kCONSUMER_WARPS = 4; // of one consumer group, a warpgroup

//! Sizes of one variant of the kernel. The last key tile of a head takes kTAIL columns, the others kKEYS.
template <int kGROUPS_, int kKEYS_, int kTAIL_, int kSLOTS_>
struct Variant
{
    static constexpr int kGROUPS = kGROUPS_; // consumer warpgroups
    static constexpr int kKEYS = kKEYS_;
    static constexpr int kTAIL = kTAIL_;
    static constexpr int kSLOTS = kSLOTS_; // key or value tiles in shared memory

    static constexpr int kTHREADS = 128 * (kGROUPS + 1);
    static constexpr int kQUERY_BUFFERS = 2 * kGROUPS;
    static constexpr int kSLOT_BYTES = kKEYS * kROW_BYTES;
    static constexpr int kBARRIERS = 2 * (kSLOTS + kQUERY_BUFFERS);
    static constexpr int kSHARED_BYTES
        = kSLOTS * kSLOT_BYTES + kQUERY_BUFFERS * kQUERY_BYTES + kBARRIERS * 8 + 1024 /* alignment */;
    // 64 K registers: what the launch gives every thread is moved from the producer's warpgroup to the others.
    static constexpr int kPRODUCER_REGISTERS = kGROUPS == 2 ? 24 : 32;
    static constexpr int kCONSUMER_REGISTERS = kGROUPS == 2 ? 240 : 160;

    static_assert(kKEYS % 16 == 0 && kTAIL % 16 == 0 && kTAIL <= kKEYS && kKEYS <= 256);
    static_assert(kSLOT_BYTES % 1024 == 0, "the swizzle's pattern repeats every 1024 bytes");
    static_assert(kSHARED_BYTES <= 227 * 1024);
};

//! Query tiles are numbered over all images and heads: tile = (image * heads + head) * queryTiles + tile of the head.
struct Arguments
{
    void* context; // T [B, S, H, 64]
    int sequenceLength;
    int heads;
    int queryTiles;    // of a head
    int keyTiles;      // of a head
    int tiles;         // query tiles in all
    int tilesPerBlock; // block b computes tiles from b * tilesPerBlock
    bool resident;     // a head's keys and values fit in the slots: they are loaded once for all its tiles
    float scale;       // log2(e) / sqrt(d)
};

//! Tiles [begin, end) of one head for which keys and values pass through the slots once.
__device__ __forceinline__ int passEnd(Arguments const& arguments, int begin, int blockEnd, int groups)
{
    int const headEnd = (begin / arguments.queryTiles + 1) * arguments.queryTiles;
    int const end = min(headEnd, blockEnd);
    return arguments.resident ? end : min(end, begin + groups);
}

//! Shared memory: slots, query buffers, and four arrays of barriers.
template <typename V>
struct Shared
{
    uint32_t base;

    __device__ __forceinline__ uint32_t slot(int load) const
    {
        return base + load % V::kSLOTS * V::kSLOT_BYTES;
    }
    __device__ __forceinline__ uint32_t query(int tile) const
    {
        return base + V::kSLOTS * V::kSLOT_BYTES + tile % V::kQUERY_BUFFERS * kQUERY_BYTES;
    }
    __device__ __forceinline__ uint32_t barrier(int i) const
    {
        return base + V::kSLOTS * V::kSLOT_BYTES + V::kQUERY_BUFFERS * kQUERY_BYTES + 8 * i;
    }

    // Loads are numbered from 0 in the order of the producer, K and V tiles in turn; use n of a slot is its phase n.
    __device__ __forceinline__ uint32_t slotFull(int load) const
    {
        return barrier(load % V::kSLOTS);
    }
    __device__ __forceinline__ uint32_t slotEmpty(int load) const
    {
        return barrier(V::kSLOTS + load % V::kSLOTS);
    }
    static __device__ __forceinline__ uint32_t slotPhase(int load)
    {
        return load / V::kSLOTS & 1;
    }

    // Query tiles by their number in the block.
    __device__ __forceinline__ uint32_t queryFull(int tile) const
    {
        return barrier(2 * V::kSLOTS + tile % V::kQUERY_BUFFERS);
    }
    __device__ __forceinline__ uint32_t queryEmpty(int tile) const
    {
        return barrier(2 * V::kSLOTS + V::kQUERY_BUFFERS + tile % V::kQUERY_BUFFERS);
    }
    static __device__ __forceinline__ uint32_t queryPhase(int tile)
    {
        return tile / V::kQUERY_BUFFERS & 1;
    }
};

//! One thread: loads, in the order in which the consumers need them.
template <typename V>
__device__ __forceinline__ void produce(
    CUtensorMap const* queryMap, CUtensorMap const* keyValueMap, Arguments const& arguments, Shared<V> shared)
{
    int const heads = arguments.heads;
    int const blockBegin = blockIdx.x * arguments.tilesPerBlock;
    int const blockEnd = min(blockBegin + arguments.tilesPerBlock, arguments.tiles);

    auto loadQuery = [&](int tile, int head, int image)
    {
        int const i = tile - blockBegin;
        barrierWait(shared.queryEmpty(i), Shared<V>::queryPhase(i) ^ 1);
        barrierArriveExpect(shared.queryFull(i), kQUERY_BYTES);
        int const row = tile % arguments.queryTiles * kQUERIES;
        loadBox4d(shared.query(i), queryMap, 0, row, head, image, shared.queryFull(i));
    };
    int load = 0;
    auto loadKeysOrValues = [&](int keyTile, int row, int image)
    {
        barrierWait(shared.slotEmpty(load), Shared<V>::slotPhase(load) ^ 1);
        barrierArriveExpect(shared.slotFull(load), V::kSLOT_BYTES);
        loadBox4d(shared.slot(load), keyValueMap, 0, keyTile * V::kKEYS, row, image, shared.slotFull(load));
        ++load;
    };

    // The consumers write only after they have read what is loaded from here on: they need not wait themselves.
    waitForPriorGrids();
    for (int begin = blockBegin, end; begin < blockEnd; begin = end)
    {
        end = passEnd(arguments, begin, blockEnd, V::kGROUPS);
        int const head = begin / arguments.queryTiles % heads;
        int const image = begin / arguments.queryTiles / heads;
        int const firstRound = min(end, begin + V::kGROUPS);

        for (int keyTile = 0; keyTile < arguments.keyTiles; ++keyTile)
        {
            loadKeysOrValues(keyTile, heads + head, image);
            if (keyTile == 0)
            {
                for (int tile = begin; tile < firstRound; ++tile)
                {
                    loadQuery(tile, head, image);
                }
            }
            loadKeysOrValues(keyTile, 2 * heads + head, image);
        }
        if (end < blockEnd && arguments.resident)
        {
            int const nextHead = end / arguments.queryTiles % heads;
            int const nextImage = end / arguments.queryTiles / heads;
            for (int keyTile = 0; keyTile < arguments.keyTiles; ++keyTile)
            {
                prefetchBox4d(keyValueMap, 0, keyTile * V::kKEYS, heads + nextHead, nextImage);
                prefetchBox4d(keyValueMap, 0, keyTile * V::kKEYS, 2 * heads + nextHead, nextImage);
            }
        }
        for (int tile = firstRound; tile < end; ++tile)
        {
            loadQuery(tile, head, image);
        }
    }
}

//! s[64, N] = q k^T, asynchronously.
template <typename T, int N>
__device__ __forceinline__ void multiplyScores(float* s, uint32_t queries, uint32_t keys)
{
    SharedProduct<T, N>::run(s, operandDescriptor(queries), operandDescriptor(keys));
}

//! o[64, 64] += p[64, N] v, asynchronously.
template <typename T, int N>
__device__ __forceinline__ void multiplyValues(float* o, uint32_t const* p, uint32_t values)
{
    uint64_t const descriptor = operandDescriptor(values);
#pragma unroll
    for (int k = 0; k < N / 16; ++k)
    {
        RegisterProduct<T>::run(o, p + 4 * k, descriptor + 16 * kROW_BYTES / 16 * k);
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

//! s = 2^(scale (s - maximum)), and the thread's part of the rows' sums.
template <int N>
__device__ __forceinline__ void exponentials(float* s, float scale, float const (&maxima)[2], float (&sums)[2])
{
    float const offsets[2] = {-maxima[0] * scale, -maxima[1] * scale};
#pragma unroll
    for (int i = 0; i < N / 2; ++i)
    {
        int const h = i / 2 % 2;
        s[i] = exp2Approx(fmaf(s[i], scale, offsets[h]));
        sums[h] += s[i];
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

//! Lane q of four holds word q of blocks 0 to 3; afterwards it holds words 0 to 3 of block q.
__device__ __forceinline__ uint4 transposeQuad(uint32_t w0, uint32_t w1, uint32_t w2, uint32_t w3)
{
    bool const high = threadIdx.x & 2;
    bool const odd = threadIdx.x & 1;
    uint32_t const a = __shfl_xor_sync(kFULL_WARP, high ? w0 : w2, 2);
    uint32_t const b = __shfl_xor_sync(kFULL_WARP, high ? w1 : w3, 2);
    w0 = high ? a : w0;
    w1 = high ? b : w1;
    w2 = high ? w2 : a;
    w3 = high ? w3 : b;
    uint32_t const c = __shfl_xor_sync(kFULL_WARP, odd ? w0 : w1, 1);
    uint32_t const d = __shfl_xor_sync(kFULL_WARP, odd ? w2 : w3, 1);
    return {odd ? c : w0, odd ? w1 : c, odd ? d : w2, odd ? w3 : d};
}

//! context = o / sum for the rows of this warp that exist.
template <typename T>
__device__ __forceinline__ void store(Arguments const& arguments, float const* o, float const (&sums)[2], int tile)
{
    int const lane = threadIdx.x % kWARP_SIZE;
    int const row = tile % arguments.queryTiles * kQUERIES + threadIdx.x % 128 / kWARP_SIZE * 16 + lane / 4;
    int const head = tile / arguments.queryTiles % arguments.heads;
    int const image = tile / arguments.queryTiles / arguments.heads;
    size_t const rowStride = static_cast<size_t>(arguments.heads) * kHEAD_DIM;
    T* const context = static_cast<T*>(arguments.context)
        + (static_cast<size_t>(image) * arguments.sequenceLength + row) * rowStride + head * kHEAD_DIM + lane % 4 * 8;
#pragma unroll
    for (int h = 0; h < 2; ++h)
    {
        float const inverse = 1.0F / groupSum<4>(sums[h]);
        uint32_t w[8];
#pragma unroll
        for (int block = 0; block < 8; ++block)
        {
            w[block] = packPair<T>(o[4 * block + 2 * h] * inverse, o[4 * block + 2 * h + 1] * inverse);
        }
        uint4 const left = transposeQuad(w[0], w[1], w[2], w[3]);
        uint4 const right = transposeQuad(w[4], w[5], w[6], w[7]);
        if (row + 8 * h < arguments.sequenceLength)
        {
            T* const destination = context + 8 * h * rowStride;
            *reinterpret_cast<uint4*>(destination) = left;
            *reinterpret_cast<uint4*>(destination + 32) = right;
        }
    }
}

//! One warpgroup: every kGROUPS-th query tile of the block.
template <typename T, typename V>
__device__ __forceinline__ void consume(Arguments const& arguments, Shared<V> shared, int group)
{
    constexpr int kKEYS = V::kKEYS;
    constexpr int kTAIL = V::kTAIL;

    int const blockBegin = blockIdx.x * arguments.tilesPerBlock;
    int const blockEnd = min(blockBegin + arguments.tilesPerBlock, arguments.tiles);
    int const keyTiles = arguments.keyTiles;
    int const tailColumns = arguments.sequenceLength - (keyTiles - 1) * kKEYS;
    float const scale = arguments.scale;
    bool const leader = threadIdx.x % kWARP_SIZE == 0;
    int const warp = __shfl_sync(kFULL_WARP, static_cast<int>(threadIdx.x) % 128 / kWARP_SIZE, 0);

    auto waitFull = [&](int load) { barrierWait(shared.slotFull(load), Shared<V>::slotPhase(load)); };
    auto release = [&](bool condition, uint32_t empty)
    {
        if (condition && leader)
        {
            barrierArrive(empty);
        }
    };

    float s[kKEYS / 2]; // scores, then exponentials, of one key tile
    uint32_t p[kKEYS / 4]; // the exponentials as the first operand of the second product
    float o[kHEAD_DIM / 2];
    float maxima[2];
    float sums[2];

    int passLoad = 0; // the pass's first load
    int mine = group; // this group's next tile, counted from blockBegin
    for (int begin = blockBegin, end; begin < blockEnd; begin = end, passLoad += 2 * keyTiles)
    {
        end = passEnd(arguments, begin, blockEnd, V::kGROUPS);
        int const passTiles = end - blockBegin;
        if (mine >= passTiles)
        {
            for (int load = passLoad; load < passLoad + 2 * keyTiles; ++load)
            {
                waitFull(load); // else the arrival could count for the slot's use before
                release(true, shared.slotEmpty(load));
            }
            continue;
        }

        barrierWait(shared.queryFull(mine), Shared<V>::queryPhase(mine));
        waitFull(passLoad);
        wgmmaFence();
        multiplyScores<T, kKEYS>(s, shared.query(mine), shared.slot(passLoad));
        wgmmaCommit();
        wgmmaWait<0>();
        wgmmaResult(s);
        for (; mine < passTiles; mine += V::kGROUPS)
        {
            bool const last = mine + V::kGROUPS >= passTiles;
            // This warp's rows are all beyond the sequence: its part of the products is computed and dropped.
            int const firstRow = (blockBegin + mine) % arguments.queryTiles * kQUERIES + warp * 16;
            bool const idle = firstRow >= arguments.sequenceLength;
            release(last, shared.slotEmpty(passLoad));
            if constexpr (kTAIL == kKEYS)
            {
                if (keyTiles == 1)
                {
                    release(true, shared.queryEmpty(mine));
                    mask<kKEYS>(s, tailColumns);
                }
            }
            maxima[0] = maxima[1] = 0.0F;
            sums[0] = sums[1] = 0.0F;
            if (!idle)
            {
                threadMaxima<kKEYS>(s, maxima);
                maxima[0] = groupMax<4>(maxima[0]);
                maxima[1] = groupMax<4>(maxima[1]);
                exponentials<kKEYS>(s, scale, maxima, sums);
            }
            pack<T, kKEYS>(p, s);
#pragma unroll
            for (int i = 0; i < kHEAD_DIM / 2; ++i)
            {
                o[i] = 0.0F;
            }

            // Scores of tile j while the values of tile j - 1 are added up.
            auto step = [&](int j, auto tail)
            {
                constexpr bool kIS_TAIL = decltype(tail)::value;
                constexpr int N = kIS_TAIL ? kTAIL : kKEYS;
                int const load = passLoad + 2 * j;
                waitFull(load);
                waitFull(load - 1);
                wgmmaFence();
                multiplyScores<T, N>(s, shared.query(mine), shared.slot(load));
                wgmmaCommit();
                multiplyValues<T, kKEYS>(o, p, shared.slot(load - 1));
                wgmmaCommit();

                wgmmaWait<1>();
                wgmmaResult(s);
                release(last, shared.slotEmpty(load));
                if constexpr (kIS_TAIL)
                {
                    release(true, shared.queryEmpty(mine));
                }
                bool rescale = false;
                float factors[2];
                // In the tail, which is short, one branch more leaves ptxas without the registers it needs.
                if (kIS_TAIL || !idle)
                {
                    if constexpr (kIS_TAIL)
                    {
                        mask<N>(s, tailColumns);
                    }
                    float tops[2];
                    threadMaxima<N>(s, tops);
                    // Exact maxima: a row's largest probability is then 1, which rounding leaves as it is.
                    rescale = __any_sync(kFULL_WARP, tops[0] > maxima[0] || tops[1] > maxima[1]);
                    if (rescale)
                    {
#pragma unroll
                        for (int h = 0; h < 2; ++h)
                        {
                            float const maximum = fmaxf(maxima[h], groupMax<4>(tops[h]));
                            factors[h] = exp2Approx((maxima[h] - maximum) * scale);
                            sums[h] *= factors[h];
                            maxima[h] = maximum;
                        }
                    }
                    exponentials<N>(s, scale, maxima, sums);
                }

                // The wait stands in both branches: in one line with the exponentials, ptxas moves it above them, and
                // then nothing overlaps with the second product.
                if (rescale)
                {
                    wgmmaWait<0>();
                    wgmmaResult(o);
#pragma unroll
                    for (int i = 0; i < kHEAD_DIM / 2; ++i)
                    {
                        o[i] *= factors[i / 2 % 2];
                    }
                }
                else
                {
                    wgmmaWait<0>();
                    wgmmaResult(o);
                }
                release(last, shared.slotEmpty(load - 1));
                pack<T, N>(p, s);
            };
            for (int j = 1; j < keyTiles - 1; ++j)
            {
                step(j, std::false_type{});
            }
            if (keyTiles > 1)
            {
                step(keyTiles - 1, std::true_type{});
            }

            int const lastLoad = passLoad + 2 * keyTiles - 1;
            waitFull(lastLoad);
            int const next = mine + V::kGROUPS;
            if (!last)
            {
                barrierWait(shared.queryFull(next), Shared<V>::queryPhase(next));
            }
            wgmmaFence();
            multiplyValues<T, kTAIL>(o, p, shared.slot(lastLoad));
            wgmmaCommit();
            if (last)
            {
                wgmmaWait<0>();
                wgmmaResult(o);
                release(true, shared.slotEmpty(lastLoad));
                store<T>(arguments, o, sums, blockBegin + mine);
            }
            else // the next tile's first scores run while this one's output is written
            {
                wgmmaFence();
                multiplyScores<T, kKEYS>(s, shared.query(next), shared.slot(passLoad));
                wgmmaCommit();
                wgmmaWait<1>();
                wgmmaResult(o);
                store<T>(arguments, o, sums, blockBegin + mine);
                wgmmaWait<0>();
                wgmmaResult(s);
            }
        }
    }
}

template <typename T, typename V>
__global__ void __launch_bounds__(V::kTHREADS, 1) encoderAttentionKernel(__grid_constant__ CUtensorMap const queryMap,
    __grid_constant__ CUtensorMap const keyValueMap, __grid_constant__ Arguments const arguments)
{
    extern __shared__ uint8_t dynamicShared[];
    Shared<V> const shared{(sharedAddress(dynamicShared) + 1023) / 1024 * 1024};

    if (threadIdx.x == 0)
    {
        for (int i = 0; i < V::kSLOTS; ++i)
        {
            barrierInit(shared.slotFull(i), 1);
            barrierInit(shared.slotEmpty(i), V::kGROUPS * kCONSUMER_WARPS);
        }
        for (int i = 0; i < V::kQUERY_BUFFERS; ++i)
        {
            barrierInit(shared.queryFull(i), 1);
            barrierInit(shared.queryEmpty(i), kCONSUMER_WARPS);
        }
        barrierInitFence();
        prefetchTensorMap(&queryMap);
        prefetchTensorMap(&keyValueMap);
    }
    __syncthreads();
    launchDependents();

    // Uniform in a warp, and known to be so.
    int const group = __shfl_sync(kFULL_WARP, static_cast<int>(threadIdx.x) / 128, 0);
    if (group == V::kGROUPS)
    {
        shrinkRegisters<V::kPRODUCER_REGISTERS>();
        if (threadIdx.x == 128 * V::kGROUPS)
        {
            produce<V>(&queryMap, &keyValueMap, arguments, shared);
        }
    }
    else
    {
        growRegisters<V::kCONSUMER_REGISTERS>();
        consume<T, V>(arguments, shared, group);
    }
}

//! The driver's cuTensorMapEncodeTiled, found without linking to the driver's library; null where there is none.
PFN_cuTensorMapEncodeTiled_v12000 tensorMapEncoder()
{
    static PFN_cuTensorMapEncodeTiled_v12000 const encoder = []
    {
        void* function{};
        cudaDriverEntryPointQueryResult found{};
        cudaError_t const status
            = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
        return status == cudaSuccess && found == cudaDriverEntryPointSuccess
            ? reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function)
            : nullptr;
    }();
    return encoder;
}

//! qkv [B, S, 3, H, 64] as [B, 3 H, S, 64], in boxes of `rows` rows of one head: what a box has beyond S is zero, not
//! the next image.
cudaError_t makeMap(EncoderAttentionParams const& params, int rows, CUtensorMap& map)
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
    CUresult const result = encode(&map,
        params.dataType == DataType::kHALF ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4,
        const_cast<void*>(params.qkv), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

//! A block's consumer groups work side by side: more than one round of theirs is filled up to a whole number of rounds.
int tilesPerBlock(int tiles, int groups, int processors)
{
    int const even = ceilDiv(tiles, processors);
    return even <= groups ? even : ceilDiv(even, groups) * groups;
}

template <typename T, typename V>
cudaError_t run(EncoderAttentionParams const& params, cudaStream_t stream, int processors)
{
    CUtensorMap queryMap{};
    CUtensorMap keyValueMap{};
    cudaError_t status = makeMap(params, kQUERIES, queryMap);
    if (status == cudaSuccess)
    {
        status = makeMap(params, V::kKEYS, keyValueMap);
    }
    auto* const kernel = encoderAttentionKernel<T, V>;
    if (status == cudaSuccess)
    {
        status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, V::kSHARED_BYTES);
    }
    if (status != cudaSuccess)
    {
        return status;
    }

    Arguments arguments{};
    arguments.context = params.context;
    arguments.sequenceLength = params.sequenceLength;
    arguments.heads = params.numHeads;
    arguments.queryTiles = ceilDiv(params.sequenceLength, kQUERIES);
    arguments.keyTiles = ceilDiv(params.sequenceLength, V::kKEYS);
    arguments.tiles = params.batch * params.numHeads * arguments.queryTiles;
    arguments.tilesPerBlock = tilesPerBlock(arguments.tiles, V::kGROUPS, processors);
    arguments.resident = 2 * arguments.keyTiles <= V::kSLOTS;
    arguments.scale = kLOG2_E / std::sqrt(static_cast<float>(kHEAD_DIM));

    cudaLaunchConfig_t config{};
    config.gridDim = ceilDiv(arguments.tiles, arguments.tilesPerBlock);
    config.blockDim = V::kTHREADS;
    config.dynamicSmemBytes = V::kSHARED_BYTES;
    config.stream = stream;
    // Programmatic dependent launch: barriers, maps and registers are set up while the predecessor ends. The producer
    // waits for that end before it reads qkv, and a consumer writes only after it has read what the producer loaded.
    // That the producer of every block waits also keeps the order transitive: this grid ends after its predecessor.
    cudaLaunchAttribute dependent{};
    dependent.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    dependent.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &dependent;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, queryMap, keyValueMap, arguments);
}

template <typename T, int kGROUPS, int kSLOTS>
cudaError_t run(EncoderAttentionParams const& params, cudaStream_t stream, int processors)
{
    using Short = Variant<kGROUPS, 128, 80, kSLOTS>; // 577 and 578 tokens: 4 x 128 + 65 or 66
    using Full = Variant<kGROUPS, 128, 128, kSLOTS>;
    int const tail = (params.sequenceLength - 1) % Short::kKEYS + 1;
    bool const isShort = params.sequenceLength > Short::kKEYS && tail <= Short::kTAIL;
    return isShort ? run<T, Short>(params, stream, processors) : run<T, Full>(params, stream, processors);
}

//! The path of the lower cost: rounds of the fullest block, at what a round takes. Measured on an H200 at 578 tokens
//! (SM90.md): 6.8 us for a round of two query tiles, 9.3 us for one of three.
EncoderAttentionPath choosePath(EncoderAttentionParams const& params, int processors)
{
    int const tiles = params.batch * params.numHeads * ceilDiv(params.sequenceLength, kQUERIES);
    auto const cost = [&](int groups, double microseconds)
    { return ceilDiv(tilesPerBlock(tiles, groups, processors), groups) * microseconds; };
    return cost(3, 9.3) < cost(2, 6.8) ? EncoderAttentionPath::kHOPPER_3 : EncoderAttentionPath::kHOPPER_2;
}

template <typename T>
cudaError_t run(EncoderAttentionParams const& params, cudaStream_t stream)
{
    int processors{};
    cudaError_t const status = deviceAttribute(cudaDevAttrMultiProcessorCount, processors);
    if (status != cudaSuccess)
    {
        return status;
    }
    bool const isForced
        = params.path != EncoderAttentionPath::kAUTO && params.path != EncoderAttentionPath::kHOPPER;
    switch (isForced ? params.path : choosePath(params, processors))
    {
    case EncoderAttentionPath::kHOPPER_2: return run<T, 2, 12>(params, stream, processors);
    case EncoderAttentionPath::kHOPPER_3: return run<T, 3, 11>(params, stream, processors);
    default: return cudaErrorInvalidValue;
    }
}

} // namespace

bool canImplementEncoderAttentionSm90(EncoderAttentionParams const& params, char const** reason)
{
    if (params.dataType == DataType::kFLOAT)
    {
        return refuse(reason, "the Hopper path takes float16 and bfloat16 only");
    }
    if (params.headDim != kHEAD_DIM)
    {
        return refuse(reason, "the Hopper path takes head size 64 only");
    }
    int64_t const rows = static_cast<int64_t>(params.sequenceLength) + kQUERIES;
    if (rows * params.batch * params.numHeads > std::numeric_limits<int32_t>::max())
    {
        return refuse(reason, "the Hopper path takes batch * heads * sequence length below 2^31 only");
    }
    return true;
}

cudaError_t encoderAttentionSm90(EncoderAttentionParams const& params, cudaStream_t stream)
{
    return params.dataType == DataType::kHALF ? run<__half>(params, stream) : run<__nv_bfloat16>(params, stream);
}

} // namespace trocr
