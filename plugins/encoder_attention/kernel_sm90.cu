// Encoder attention on Hopper: wgmma, TMA, keys and values of one head resident in shared memory. SM90.md has the
// arithmetic behind the sizes below.

#include <cmath>
#include <limits>
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

constexpr int kCONSUMER_WARPS = 4;  // of one consumer group, a warpgroup

//! Sizes of one variant of the kernel. The last key tile of a head takes kTAIL columns, the others kKEYS.
template <int kGROUPS_, int kKEYS_, int kTAIL_>
struct Variant
{
    static constexpr int kGROUPS = kGROUPS_;  // consumer warpgroups
    static constexpr int kKEYS = kKEYS_;
    static constexpr int kTAIL = kTAIL_;
    static constexpr int kPAIRS = 5;  // slots, each of a tile of keys and one of values

    static constexpr int kTHREADS = 128 * (kGROUPS + 1);
    static constexpr int kQUERY_BUFFERS = 2 * kGROUPS;
    static constexpr int kTILE_BYTES = kKEYS * kROW_BYTES;
    static constexpr int kPAIR_BYTES = 2 * kTILE_BYTES;
    static constexpr int kBARRIERS = 4 * kPAIRS + 2 * kQUERY_BUFFERS;

    // Shared memory, from an address that is a multiple of 1024.
    static constexpr int kQUERIES_AT = kPAIRS * kPAIR_BYTES;
    static constexpr int kONES_AT = kQUERIES_AT + kQUERY_BUFFERS * kQUERY_BYTES;
    static constexpr int kBARRIERS_AT = kONES_AT + kONES_BYTES;
    static constexpr int kSHARED_BYTES = kBARRIERS_AT + kBARRIERS * 8 + 1024 /* alignment */;
    // 64 K registers: what the launch gives every thread is moved from the producer's warpgroup to the others.
    static constexpr int kPRODUCER_REGISTERS = kGROUPS == 2 ? 24 : 32;
    static constexpr int kCONSUMER_REGISTERS = kGROUPS == 2 ? 240 : 160;

    static_assert(kKEYS % 16 == 0 && kTAIL % 16 == 0 && kTAIL <= kKEYS && kKEYS <= 256);
    static_assert(kTILE_BYTES % 1024 == 0, "the swizzle's pattern repeats every 1024 bytes");
    static_assert(kSHARED_BYTES <= 227 * 1024);
};

//! How far, in powers of two, a row's maximum may pass what its exponentials refer to before they are scaled anew.
constexpr float kLAG = 8.0F;

//! Query tiles are numbered over all images and heads: tile = (image * heads + head) * queryTiles + tile of the head.
struct Arguments
{
    void* context;  // C [B, S, H, 64]
    int sequenceLength;
    int heads;
    int queryTiles;      // of a head
    int keyTiles;        // of a head
    int tiles;           // query tiles in all
    int tilesPerBlock;   // block b computes tiles from b * tilesPerBlock
    bool resident;       // a head's keys and values fit in the slots: they are loaded once for all its tiles
    float scale;         // log2(e) / sqrt(d)
    float outputFactor;  // of e4m3, 1 / outputScale
};

//! Tiles [begin, end) of one head for which keys and values pass through the slots once.
__device__ __forceinline__ int passEnd(Arguments const& arguments, int begin, int blockEnd, int groups)
{
    int const headEnd = (begin / arguments.queryTiles + 1) * arguments.queryTiles;
    int const end = min(headEnd, blockEnd);
    return arguments.resident ? end : min(end, begin + groups);
}

//! Place in the ring of slots: the slot, and the parity of its use.
template <typename V>
struct Place
{
    int slot = 0;
    uint32_t phase = 0;

    __device__ __forceinline__ void advance()
    {
        if (++slot == V::kPAIRS)
        {
            slot = 0;
            phase ^= 1;
        }
    }
};

//! Shared memory: slots, query buffers, ones, and barriers.
template <typename V>
struct Shared
{
    uint32_t base;

    __device__ __forceinline__ uint32_t keys(int slot) const
    {
        return base + slot * V::kPAIR_BYTES;
    }
    __device__ __forceinline__ uint32_t values(int slot) const
    {
        return keys(slot) + V::kTILE_BYTES;
    }
    __device__ __forceinline__ uint32_t ones() const
    {
        return base + V::kONES_AT;
    }
    __device__ __forceinline__ uint32_t barrier(int i) const
    {
        return base + V::kBARRIERS_AT + 8 * i;
    }
    __device__ __forceinline__ uint32_t keysFull(int slot) const
    {
        return barrier(slot);
    }
    __device__ __forceinline__ uint32_t valuesFull(int slot) const
    {
        return barrier(V::kPAIRS + slot);
    }
    __device__ __forceinline__ uint32_t keysEmpty(int slot) const
    {
        return barrier(2 * V::kPAIRS + slot);
    }
    __device__ __forceinline__ uint32_t valuesEmpty(int slot) const
    {
        return barrier(3 * V::kPAIRS + slot);
    }

    // Query tiles by their number in the block.
    __device__ __forceinline__ uint32_t query(int tile) const
    {
        return base + V::kQUERIES_AT + tile % V::kQUERY_BUFFERS * kQUERY_BYTES;
    }
    __device__ __forceinline__ uint32_t queryFull(int tile) const
    {
        return barrier(4 * V::kPAIRS + tile % V::kQUERY_BUFFERS);
    }
    __device__ __forceinline__ uint32_t queryEmpty(int tile) const
    {
        return barrier(4 * V::kPAIRS + V::kQUERY_BUFFERS + tile % V::kQUERY_BUFFERS);
    }
    static __device__ __forceinline__ uint32_t queryPhase(int tile)
    {
        return tile / V::kQUERY_BUFFERS & 1;
    }
};

//! One thread: loads, in the order in which the consumers need them.
template <typename V>
__device__ __forceinline__ void produce(CUtensorMap const* queryMap, CUtensorMap const* keyValueMap,
                                        Arguments const& arguments, Shared<V> shared)
{
    int const heads = arguments.heads;
    int const blockBegin = blockIdx.x * arguments.tilesPerBlock;
    int const blockEnd = min(blockBegin + arguments.tilesPerBlock, arguments.tiles);

    auto loadQuery = [&](int tile, int head, int image)
    {
        int const i = tile - blockBegin;
        barrierWait(shared.queryEmpty(i), Shared<V>::queryPhase(i) ^ 1);
        int const row = tile % arguments.queryTiles * kQUERIES;
        loadRows(shared.query(i), queryMap, row, head, image, shared.queryFull(i), kQUERY_BYTES);
    };
    auto loadTile =
        [&](uint32_t destination, int keyTile, int row, int image, uint32_t full, uint32_t empty, uint32_t phase)
    {
        barrierWait(empty, phase ^ 1);
        loadRows(destination, keyValueMap, keyTile * V::kKEYS, row, image, full, V::kTILE_BYTES);
    };

    // The consumers write only after they have read what is loaded from here on: they need not wait themselves.
    waitForPriorGrids();
    Place<V> place;
    for (int begin = blockBegin, end; begin < blockEnd; begin = end)
    {
        end = passEnd(arguments, begin, blockEnd, V::kGROUPS);
        int const head = begin / arguments.queryTiles % heads;
        int const image = begin / arguments.queryTiles / heads;
        int const firstRound = min(end, begin + V::kGROUPS);

        for (int keyTile = 0; keyTile < arguments.keyTiles; ++keyTile, place.advance())
        {
            loadTile(shared.keys(place.slot), keyTile, heads + head, image, shared.keysFull(place.slot),
                     shared.keysEmpty(place.slot), place.phase);
            if (keyTile == 0)
            {
                for (int tile = begin; tile < firstRound; ++tile)
                {
                    loadQuery(tile, head, image);
                }
            }
            loadTile(shared.values(place.slot), keyTile, 2 * heads + head, image, shared.valuesFull(place.slot),
                     shared.valuesEmpty(place.slot), place.phase);
        }
        for (int tile = firstRound; tile < end; ++tile)
        {
            loadQuery(tile, head, image);
        }
    }
}

//! context = o / sum for the rows of this warp that exist; the sum is in the column of ones. C: its type, T or e4m3.
template <typename C>
__device__ __forceinline__ void store(Arguments const& arguments, float const* o, int tile)
{
    int const lane = threadIdx.x % kWARP_SIZE;
    int const row = tile % arguments.queryTiles * kQUERIES + threadIdx.x % 128 / kWARP_SIZE * 16 + lane / 4;
    int const head = tile / arguments.queryTiles % arguments.heads;
    int const image = tile / arguments.queryTiles / arguments.heads;
    size_t const rowStride = static_cast<size_t>(arguments.heads) * kHEAD_DIM;
    constexpr bool kIS_E4M3 = std::is_same_v<C, __nv_fp8_e4m3>;
    C* const context = static_cast<C*>(arguments.context) +
                       (static_cast<size_t>(image) * arguments.sequenceLength + row) * rowStride + head * kHEAD_DIM +
                       lane % 4 * (16 / sizeof(C));
#pragma unroll
    for (int h = 0; h < 2; ++h)
    {
        bool const exists = row + 8 * h < arguments.sequenceLength;
        C* const destination = context + 8 * h * rowStride;
        if constexpr (kIS_E4M3)
        {
            float const factor = arguments.outputFactor / o[kHEAD_DIM / 2 + 2 * h];
            uint32_t w[4];
#pragma unroll
            for (int i = 0; i < 4; ++i)
            {
                float const* const v = o + 8 * i + 2 * h;
                w[i] = toE4m3(v[0] * factor, v[1] * factor) | toE4m3(v[4] * factor, v[5] * factor) << 16;
            }
            uint4 const piece = transposeQuad(w[0], w[1], w[2], w[3]);
            if (exists)
            {
                *reinterpret_cast<uint4*>(destination) = piece;
            }
        }
        else
        {
            float const inverse = 1.0F / o[kHEAD_DIM / 2 + 2 * h];
            uint32_t w[8];
#pragma unroll
            for (int block = 0; block < 8; ++block)
            {
                w[block] = packPair<C>(o[4 * block + 2 * h] * inverse, o[4 * block + 2 * h + 1] * inverse);
            }
            uint4 const left = transposeQuad(w[0], w[1], w[2], w[3]);
            uint4 const right = transposeQuad(w[4], w[5], w[6], w[7]);
            if (exists)
            {
                *reinterpret_cast<uint4*>(destination) = left;
                *reinterpret_cast<uint4*>(destination + 32) = right;
            }
        }
    }
}

//! One warpgroup: every kGROUPS-th query tile of the block.
template <typename T, typename C, typename V>
__device__ __forceinline__ void consume(Arguments const& arguments, Shared<V> shared, int group)
{
    constexpr int kKEYS = V::kKEYS;
    constexpr int kTAIL = V::kTAIL;

    int const blockBegin = blockIdx.x * arguments.tilesPerBlock;
    int const blockEnd = min(blockBegin + arguments.tilesPerBlock, arguments.tiles);
    int const keyTiles = arguments.keyTiles;
    int const tailColumns = arguments.sequenceLength - (keyTiles - 1) * kKEYS;
    float const scale = arguments.scale;
    float const lag = kLAG / scale;
    bool const leader = threadIdx.x % kWARP_SIZE == 0;
    int const warp = __shfl_sync(kFULL_WARP, static_cast<int>(threadIdx.x) % 128 / kWARP_SIZE, 0);

    auto release = [&](bool condition, uint32_t empty)
    {
        if (condition && leader)
        {
            barrierArrive(empty);
        }
    };

    float s[kKEYS / 2];     // scores, then exponentials, of one key tile
    uint32_t p[kKEYS / 4];  // the exponentials as the first operand of the second product
    float o[kOUTPUTS / 2];
    float maxima[2];  // what the exponentials of a row refer to: its maximum, or up to 2^kLAG less

    Place<V> passPlace;  // the slot of the pass's first key tile
    int mine = group;    // this group's next tile, counted from blockBegin
    for (int begin = blockBegin, end; begin < blockEnd; begin = end)
    {
        end = passEnd(arguments, begin, blockEnd, V::kGROUPS);
        int const passTiles = end - blockBegin;
        if (mine >= passTiles)
        {
            for (int j = 0; j < keyTiles; ++j, passPlace.advance())
            {
                // Else the arrival could count for the slot's use before.
                barrierWait(shared.keysFull(passPlace.slot), passPlace.phase);
                release(true, shared.keysEmpty(passPlace.slot));
                barrierWait(shared.valuesFull(passPlace.slot), passPlace.phase);
                release(true, shared.valuesEmpty(passPlace.slot));
            }
            continue;
        }

        barrierWait(shared.queryFull(mine), Shared<V>::queryPhase(mine));
        barrierWait(shared.keysFull(passPlace.slot), passPlace.phase);
        wgmmaFence();
        multiplyScores<T, kKEYS>(s, shared.query(mine), shared.keys(passPlace.slot));
        wgmmaCommit();
        wgmmaWait<0>();
        wgmmaResult(s);
        int const passFirst = mine;
        Place<V> place;
        for (; mine < passTiles; mine += V::kGROUPS)
        {
            bool const last = mine + V::kGROUPS >= passTiles;
            // This warp's rows are all beyond the sequence: its part of the products is computed and dropped.
            int const firstRow = (blockBegin + mine) % arguments.queryTiles * kQUERIES + warp * 16;
            bool const idle = firstRow >= arguments.sequenceLength;
            // Later tiles of the pass find keys and values where the first has waited for them.
            auto waitFull = [&](uint32_t full, uint32_t phase)
            {
                if (mine == passFirst)
                {
                    barrierWait(full, phase);
                }
            };

            place = passPlace;
            release(last, shared.keysEmpty(place.slot));
            if constexpr (kTAIL == kKEYS)
            {
                if (keyTiles == 1)
                {
                    release(true, shared.queryEmpty(mine));
                    mask<kKEYS>(s, tailColumns);
                }
            }
            maxima[0] = maxima[1] = 0.0F;
            if (!idle)
            {
                threadMaxima<kKEYS>(s, maxima);
                maxima[0] = groupMax<4>(maxima[0]);
                maxima[1] = groupMax<4>(maxima[1]);
                exponentials<kKEYS>(s, scale, maxima);
            }
            pack<T, kKEYS>(p, s);
#pragma unroll
            for (int i = 0; i < kOUTPUTS / 2; ++i)
            {
                o[i] = 0.0F;
            }

            // Scores of tile j while the values of tile j - 1 are added up.
            auto step = [&](auto tail)
            {
                constexpr bool kIS_TAIL = decltype(tail)::value;
                constexpr int N = kIS_TAIL ? kTAIL : kKEYS;
                Place<V> const before = place;
                place.advance();
                waitFull(shared.keysFull(place.slot), place.phase);
                waitFull(shared.valuesFull(before.slot), before.phase);
                wgmmaFence();
                multiplyScores<T, N>(s, shared.query(mine), shared.keys(place.slot));
                wgmmaCommit();
                multiplyValues<T, kKEYS>(o, p, shared.values(before.slot), shared.ones());
                wgmmaCommit();

                wgmmaWait<1>();
                wgmmaResult(s);
                release(last, shared.keysEmpty(place.slot));
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
                    rescale = __any_sync(kFULL_WARP, tops[0] > maxima[0] + lag || tops[1] > maxima[1] + lag);
                    if (rescale)
                    {
#pragma unroll
                        for (int h = 0; h < 2; ++h)
                        {
                            float const maximum = fmaxf(maxima[h], groupMax<4>(tops[h]));
                            factors[h] = exp2Approx((maxima[h] - maximum) * scale);
                            maxima[h] = maximum;
                        }
                    }
                    exponentials<N>(s, scale, maxima);
                }

                // The wait stands in both branches: in one line with the exponentials, ptxas moves it above them, and
                // then nothing overlaps with the second product.
                if (rescale)
                {
                    wgmmaWait<0>();
                    wgmmaResult(o);
#pragma unroll
                    for (int i = 0; i < kOUTPUTS / 2; ++i)
                    {
                        o[i] *= factors[i / 2 % 2];
                    }
                }
                else
                {
                    wgmmaWait<0>();
                    wgmmaResult(o);
                }
                release(last, shared.valuesEmpty(before.slot));
                pack<T, N>(p, s);
            };
            for (int j = 1; j < keyTiles - 1; ++j)
            {
                step(std::false_type{});
            }
            if (keyTiles > 1)
            {
                step(std::true_type{});
            }

            waitFull(shared.valuesFull(place.slot), place.phase);
            int const next = mine + V::kGROUPS;
            if (!last)
            {
                barrierWait(shared.queryFull(next), Shared<V>::queryPhase(next));
            }
            wgmmaFence();
            multiplyValues<T, kTAIL>(o, p, shared.values(place.slot), shared.ones());
            wgmmaCommit();
            if (last)
            {
                wgmmaWait<0>();
                wgmmaResult(o);
                release(true, shared.valuesEmpty(place.slot));
                store<C>(arguments, o, blockBegin + mine);
            }
            else  // the next tile's first scores run while this one's output is written
            {
                wgmmaFence();
                multiplyScores<T, kKEYS>(s, shared.query(next), shared.keys(passPlace.slot));
                wgmmaCommit();
                wgmmaWait<1>();
                wgmmaResult(o);
                store<C>(arguments, o, blockBegin + mine);
                wgmmaWait<0>();
                wgmmaResult(s);
            }
        }
        passPlace = place;
        passPlace.advance();
    }
}

template <typename T, typename C, typename V>
__global__ void __launch_bounds__(V::kTHREADS, 1)
    encoderAttentionKernel(__grid_constant__ CUtensorMap const queryMap,
                           __grid_constant__ CUtensorMap const keyValueMap, __grid_constant__ Arguments const arguments)
{
    extern __shared__ uint8_t dynamicShared[];
    Shared<V> const shared{tileMemory(dynamicShared)};

    if (threadIdx.x == 0)
    {
        for (int i = 0; i < 2 * V::kPAIRS; ++i)
        {
            barrierInit(shared.barrier(i), 1);
            barrierInit(shared.barrier(2 * V::kPAIRS + i), V::kGROUPS * kCONSUMER_WARPS);
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
    fillOnes<T>(shared.ones());
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
        consume<T, C, V>(arguments, shared, group);
    }
}

//! A block's consumer groups work side by side: more than one round of theirs is filled up to a whole number of rounds.
int tilesPerBlock(int tiles, int groups, int processors)
{
    int const even = ceilDiv(tiles, processors);
    return even <= groups ? even : ceilDiv(even, groups) * groups;
}

template <typename T, typename C, typename V>
cudaError_t run(EncoderAttentionParams const& params, cudaStream_t stream, int processors)
{
    Arguments arguments{};
    arguments.context = params.context;
    arguments.sequenceLength = params.sequenceLength;
    arguments.heads = params.numHeads;
    arguments.queryTiles = ceilDiv(params.sequenceLength, kQUERIES);
    arguments.keyTiles = ceilDiv(params.sequenceLength, V::kKEYS);
    arguments.tiles = params.batch * params.numHeads * arguments.queryTiles;
    arguments.tilesPerBlock = tilesPerBlock(arguments.tiles, V::kGROUPS, processors);
    arguments.resident = arguments.keyTiles <= V::kPAIRS;
    arguments.outputFactor = 1.0F / params.outputScale;
    arguments.scale = kLOG2_E / std::sqrt(static_cast<float>(kHEAD_DIM));

    return launchTiles(encoderAttentionKernel<T, C, V>, params, V::kKEYS,
                       ceilDiv(arguments.tiles, arguments.tilesPerBlock), V::kTHREADS, V::kSHARED_BYTES, arguments,
                       stream);
}

template <typename T, typename C, int kGROUPS>
cudaError_t run(EncoderAttentionParams const& params, cudaStream_t stream, int processors)
{
    using Short = Variant<kGROUPS, 128, 80>;  // 577 and 578 tokens: 4 x 128 + 65 or 66
    using Full = Variant<kGROUPS, 128, 128>;
    int const tail = (params.sequenceLength - 1) % Short::kKEYS + 1;
    bool const isShort = params.sequenceLength > Short::kKEYS && tail <= Short::kTAIL;
    return isShort ? run<T, C, Short>(params, stream, processors) : run<T, C, Full>(params, stream, processors);
}

constexpr int kDIVIDED_LENGTH = kDIVIDED_KEYS * kDIVIDED_KEY_TILES;

bool canDivide(EncoderAttentionParams const& params)
{
    return params.sequenceLength <= kDIVIDED_LENGTH;
}

//! Where every query tile finds a multiprocessor, the one that divides its keys. Else the path of the lower cost:
//! rounds of the fullest block, at what a round takes. Measured on an H100 at 578 tokens (SM90.md), without what does
//! not grow with rounds: 6.0 us for a round of two query tiles, 8.5 us for one of three.
EncoderAttentionPath choosePath(EncoderAttentionParams const& params, int processors)
{
    int const tiles = params.batch * params.numHeads * ceilDiv(params.sequenceLength, kQUERIES);
    if (tiles <= processors && canDivide(params))
    {
        return EncoderAttentionPath::kHOPPER_DIVIDED;
    }
    auto const cost = [&](int groups, double microseconds)
    { return ceilDiv(tilesPerBlock(tiles, groups, processors), groups) * microseconds; };
    return cost(3, 8.5) < cost(2, 6.0) ? EncoderAttentionPath::kHOPPER_3 : EncoderAttentionPath::kHOPPER_2;
}

template <typename T, typename C>
cudaError_t run(EncoderAttentionParams const& params, cudaStream_t stream)
{
    int processors{};
    cudaError_t const status = deviceAttribute(cudaDevAttrMultiProcessorCount, processors);
    if (status != cudaSuccess)
    {
        return status;
    }
    bool const isForced = params.path != EncoderAttentionPath::kAUTO && params.path != EncoderAttentionPath::kHOPPER;
    switch (isForced ? params.path : choosePath(params, processors))
    {
        case EncoderAttentionPath::kHOPPER_2:
            return run<T, C, 2>(params, stream, processors);
        case EncoderAttentionPath::kHOPPER_3:
            return run<T, C, 3>(params, stream, processors);
        case EncoderAttentionPath::kHOPPER_DIVIDED:
            return encoderAttentionDivided<T, C>(params, stream);
        default:
            return cudaErrorInvalidValue;
    }
}

}  // namespace

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
    if (params.path == EncoderAttentionPath::kHOPPER_DIVIDED && !canDivide(params))
    {
        static_assert(kDIVIDED_LENGTH == 640);
        return refuse(reason, "keys are divided among warpgroups in sequences up to 640 only");
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
    if (params.outputScale != 0.0F)
    {
        return run<__half, __nv_fp8_e4m3>(params, stream);
    }
    return params.dataType == DataType::kHALF ? run<__half, __half>(params, stream)
                                              : run<__nv_bfloat16, __nv_bfloat16>(params, stream);
}

}  // namespace trocr
