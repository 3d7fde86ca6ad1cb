#pragma once

// The pieces that the kernels of a decoder step share. Every kernel begins with the LayerNorm of the sums that the one
// before left, and ends by adding its product to the next sums.

#include <cstdint>

#include "common/device.cuh"
#include "common/mma.cuh"
#include "common/sm90.cuh"
#include "device_decoder/beams.h"
#include "device_decoder/common.cuh"

namespace trocr::decoder
{

constexpr int kTHREADS = 256;
constexpr int kWARPS = kTHREADS / kWARP_SIZE;
constexpr int kCHUNK = 32;  //!< inputs of a product that a lane reads with one 16-byte access (4 lanes a row)

constexpr int kMAX_WIDTH = 1024;

// ---- sums ----
//
// The blocks of a kernel add their parts of a row's new hidden state to one sum in global memory. Addition of integers
// is associative, so the result does not depend on the blocks' order, as that of float32 would. Numbers are fixed-point
// with kFRACTION_BITS; two neighbouring columns share one 64-bit word, whose value is low + 2^32 high with both signed,
// so that one atomic adds both and no carry is lost. A column's range is +-8192, its step 4e-6.

constexpr int kFRACTION_BITS = 18;
using SumPair = unsigned long long;

__device__ __forceinline__ SumPair toSum(float low, float high)
{
    constexpr float kSCALE = 1 << kFRACTION_BITS;
    int64_t const lowBits = __float2int_rn(low * kSCALE);
    int64_t const highBits = __float2int_rn(high * kSCALE);
    return static_cast<SumPair>(lowBits + (highBits << 32));
}

__device__ __forceinline__ float2 fromSum(int2 words)
{
    constexpr float kSTEP = 1.0F / (1 << kFRACTION_BITS);
    // A negative low half has borrowed one from the high half.
    return {words.x * kSTEP, (words.y + (words.x < 0 ? 1 : 0)) * kSTEP};
}

//! What every kernel of the chain is given.
struct Link
{
    int rows;              //!< slots
    int width;             //!< D
    SumPair const* input;  //!< [rows, D / 2], complete when the kernel before has ended
    SumPair* output;       //!< [rows, D / 2], zero
    SumPair* cleared;      //!< [rows, D / 2], set to zero for the next kernel
    void const* norm;      //!< T [2, D], gamma and beta; nullptr: the input is taken as it is
    float epsilon;
    float inverseWidth;      //!< 1 / D
    RowState const* states;  //!< [rows]
};

//! Up to kROWS rows that a block works on at once; each warp has the state of row `lane` in its lane.
template <int kROWS>
struct Pass
{
    int first;
    int count;        //!< rows in it
    RowState state;   //!< of row first + lane
    unsigned active;  //!< bit i: row first + i has a line

    __device__ __forceinline__ static Pass load(Link const& link, int first)
    {
        int const lane = threadIdx.x % kWARP_SIZE;
        Pass pass{first, kROWS == 1 ? 1 : min(kROWS, link.rows - first), {-1, 0}, 0};
        if (lane < pass.count)
        {
            int2 const words = sm90::loadEarly(reinterpret_cast<int2 const*>(link.states) + first + lane);
            pass.state = {words.x, words.y};
        }
        pass.active = __ballot_sync(kFULL_WARP, pass.state.line >= 0);
        return pass;
    }

    __device__ __forceinline__ bool isActive(int row) const
    {
        return kROWS == 1 || (active >> row & 1) != 0;  // a pass without an active row is not worked on
    }

    __device__ __forceinline__ int lineOf(int row) const
    {
        return __shfl_sync(kFULL_WARP, state.line, row);
    }

    __device__ __forceinline__ int positionOf(int row) const
    {
        return __shfl_sync(kFULL_WARP, state.position, row);
    }
};

//! Distance of two rows of `width` elements in shared memory: 64 bytes behind a multiple of 128, so that the eight
//! lanes of a phase, two rows of 64 bytes, meet no bank twice.
template <typename T>
__host__ __device__ constexpr int rowPitch(int width)
{
    int const bytes = width * static_cast<int>(sizeof(T));
    return ((bytes + 63) / 128 * 128 + 64) / static_cast<int>(sizeof(T));
}

//! Clears the block's share of link.cleared.
__device__ __forceinline__ void clearSums(Link const& link)
{
    int const blocks = gridDim.x * gridDim.y;
    int const block = blockIdx.y * gridDim.x + blockIdx.x;
    int const pairs = link.rows * link.width / 2;
#pragma unroll 1
    for (int i = block * kTHREADS + threadIdx.x; i < pairs; i += blocks * kTHREADS)
    {
        link.cleared[i] = 0;
    }
}

//! LayerNorm of a pass's rows, kROW_WARPS warps a row: few rows are spread over the block for their latency. In two
//! parts, so that other loads can be on their way with those of the first rows.
template <typename T, int kROWS>
struct RowNorm
{
    static constexpr int kROW_WARPS = kROWS >= kWARPS ? 1 : kWARPS / kROWS;
    static constexpr int kPAIRS = kMAX_WIDTH / 2 / kWARP_SIZE / kROW_WARPS;
    static constexpr int kAT_ONCE = kWARPS / kROW_WARPS;  //!< rows
    static_assert(kPAIRS >= 1);

    int2 raw[kPAIRS];
    float2 values[kPAIRS];
    float sum;
    float squares;

    static __device__ __forceinline__ int firstRow()
    {
        return threadIdx.x / kWARP_SIZE / kROW_WARPS;
    }

    static __device__ __forceinline__ int pairOf(int i)
    {
        return (i * kROW_WARPS + threadIdx.x / kWARP_SIZE % kROW_WARPS) * kWARP_SIZE + threadIdx.x % kWARP_SIZE;
    }

    __device__ __forceinline__ void load(Link const& link, int row, int end)
    {
        int const pairs = link.width / 2;
        auto const* const words = reinterpret_cast<int2 const*>(link.input) + static_cast<size_t>(row) * pairs;
#pragma unroll
        for (int i = 0; i < kPAIRS; ++i)
        {
            raw[i] = int2{};
            if (row < end && pairOf(i) < pairs)
            {
                raw[i] = sm90::loadEarly(words + pairOf(i));
            }
        }
    }

    //! Waits for what load() asked for. To be called before other loads are issued: those that a thread has under way
    //! may share one counter, and a wait for the first then is a wait for all.
    __device__ __forceinline__ void take()
    {
        sum = 0.0F;
        squares = 0.0F;
#pragma unroll
        for (int i = 0; i < kPAIRS; ++i)
        {
            values[i] = fromSum(raw[i]);
            sum += values[i].x + values[i].y;
            squares += values[i].x * values[i].x + values[i].y * values[i].y;
        }
        sm90::keepHere(sum, squares);  // not where they are needed
    }

    //! hidden [count, pitch] = LayerNorm(input) of rows first to first + count, of which load(first + firstRow()) and
    //! take() have been called; ready for multiplySplit, and after the next barrier for all. `norm` is gamma and beta;
    //! nullptr: rows are only rounded. `scratch`: [kWARPS].
    __device__ __forceinline__ void run(Link const& link, int first, int count, T const* norm, T* hidden, int pitch,
                                        float2* scratch)
    {
        int const pairs = link.width / 2;
        int const warp = threadIdx.x / kWARP_SIZE;
#pragma unroll 1
        for (int from = 0; from < count; from += kAT_ONCE)
        {
            int const row = from + firstRow();
            bool const more = from + kAT_ONCE < count;
            if (more)
            {
                load(link, first + row + kAT_ONCE, first + count);
            }
            float scale = 1.0F;
            float shift = 0.0F;
            if (norm != nullptr)
            {
#pragma unroll 1
                for (int offset = kWARP_SIZE / 2; offset > 0; offset /= 2)
                {
                    sum += __shfl_xor_sync(kFULL_WARP, sum, offset);
                    squares += __shfl_xor_sync(kFULL_WARP, squares, offset);
                }
                if constexpr (kROW_WARPS > 1)
                {
                    if (threadIdx.x % kWARP_SIZE == 0)
                    {
                        scratch[warp] = {sum, squares};
                    }
                    __syncthreads();
                    sum = squares = 0.0F;
#pragma unroll
                    for (int i = 0; i < kROW_WARPS; ++i)
                    {
                        float2 const part = scratch[warp / kROW_WARPS * kROW_WARPS + i];
                        sum += part.x;
                        squares += part.y;
                    }
                }
                float const mean = sum * link.inverseWidth;
                scale = rsqrtf(fmaxf(squares * link.inverseWidth - mean * mean, 0.0F) + link.epsilon);
                shift = -mean * scale;
            }
            auto* const out = reinterpret_cast<unsigned*>(hidden + row * pitch);
#pragma unroll
            for (int i = 0; i < kPAIRS; ++i)
            {
                int const pair = pairOf(i);
                if (row < count && pair < pairs)
                {
                    float x = values[i].x * scale + shift;
                    float y = values[i].y * scale + shift;
                    if (norm != nullptr)
                    {
                        float2 const gamma = unpackPair<T>(reinterpret_cast<unsigned const*>(norm)[pair]);
                        float2 const beta = unpackPair<T>(reinterpret_cast<unsigned const*>(norm)[pairs + pair]);
                        x = x * gamma.x + beta.x;
                        y = y * gamma.y + beta.y;
                    }
                    out[pair] = packPair<T>(x, y);
                }
            }
            if (more)
            {
                take();
            }
        }
        __syncthreads();
    }
};

// ---- products ----
//
// A product's inputs are summed in any order, so the k of an m16n8k16 step need not be neighbours: lane (g, t) =
// (lane / 4, lane % 4) reads 16 bytes, inputs 8 t to 8 t + 7 of a chunk of 32, of its row of activations and of its row
// of weights, and feeds them to two steps. Both operands then are plain 16-byte reads.

//! Rows g and g + 8 of a chunk of activations.
struct Activations
{
    uint4 low;
    uint4 high;

    //! kROWS: the most that `count` can be.
    template <int kROWS, typename T>
    __device__ __forceinline__ static Activations load(T const* rows, int pitch, int count, int chunk)
    {
        int const lane = threadIdx.x % kWARP_SIZE;
        int const g = lane / 4;
        T const* const at = rows + chunk * kCHUNK + lane % 4 * 8;
        // Rows beyond `count` repeat the last: their results are dropped.
        Activations a{};
        a.low = *reinterpret_cast<uint4 const*>(at + (kROWS == 1 ? 0 : min(g, count - 1) * pitch));
        if (kROWS > 8 && count > 8)
        {
            a.high = *reinterpret_cast<uint4 const*>(at + min(g + 8, count - 1) * pitch);
        }
        return a;
    }
};

//! c [16, 8] += activations weights^T over one chunk.
template <typename T>
__device__ __forceinline__ void multiplyChunk(float (&c)[4], Activations const& a, uint4 const& w)
{
    uint32_t const first[4] = {a.low.x, a.high.x, a.low.y, a.high.y};
    uint32_t const second[4] = {a.low.z, a.high.z, a.low.w, a.high.w};
    multiplyAdd<T>(c, first, w.x, w.y);
    multiplyAdd<T>(c, second, w.z, w.w);
}

//! The lane's 16 bytes of a packed tile [8 outputs, 32 inputs].
template <typename T>
__device__ __forceinline__ uint4 weightsOf(T const* tile)
{
    return reinterpret_cast<uint4 const*>(tile)[threadIdx.x % kWARP_SIZE];
}

//! partial [warp][kROWS][8 kTILES] = the warp's part of the inputs of rows x weights^T; weights [chunks, kTILES, 8,
//! 32]. The sum over the warps is the caller's.
template <int kROWS, int kTILES, typename T>
__device__ __forceinline__ void multiplySplit(T const* rows, int pitch, int count, T const* weights, int chunks,
                                              float* partial)
{
    int const warp = threadIdx.x / kWARP_SIZE;
    int const lane = threadIdx.x % kWARP_SIZE;
    float c[kTILES][4] = {};
#pragma unroll 1
    for (int chunk = warp; chunk < chunks; chunk += kWARPS)
    {
        Activations const a = Activations::load<kROWS>(rows, pitch, count, chunk);
#pragma unroll
        for (int tile = 0; tile < kTILES; ++tile)
        {
            multiplyChunk<T>(c[tile], a, weightsOf(weights + (chunk * kTILES + tile) * 8 * kCHUNK));
        }
    }
    float* const out = partial + (warp * kROWS + lane / 4) * (8 * kTILES) + lane % 4 * 2;
#pragma unroll
    for (int tile = 0; tile < kTILES; ++tile)
    {
        if (kROWS >= 8 || lane / 4 < kROWS)
        {
            *reinterpret_cast<float2*>(out + tile * 8) = {c[tile][0], c[tile][1]};
        }
        if (kROWS > 8 && count > 8)
        {
            *reinterpret_cast<float2*>(out + 8 * (8 * kTILES) + tile * 8) = {c[tile][2], c[tile][3]};
        }
    }
}

//! Two neighbouring outputs of multiplySplit, added up over the warps, plus the bias.
template <int kROWS, int kTILES>
__device__ __forceinline__ float2 collectPair(float const* partial, int row, int pair, float const* bias)
{
    float2 sum = {bias[2 * pair], bias[2 * pair + 1]};
    auto const* const at = reinterpret_cast<float2 const*>(partial + row * (8 * kTILES)) + pair;
#pragma unroll
    for (int warp = 0; warp < kWARPS; ++warp)
    {
        float2 const part = at[warp * kROWS * 4 * kTILES];
        sum.x += part.x;
        sum.y += part.y;
    }
    return sum;
}

//! Writes the products of a block's tiles, each 8 columns of a head's query, key or value, to every block of its
//! cluster: `to` [count][kTILES][kHEAD_DIM].
template <int kROWS, int kTILES, int kHEAD_DIM, typename T>
__device__ __forceinline__ void spreadTiles(float const* partial, float const* bias, int count, int rank, T* to)
{
    constexpr int kPAIRS = 4 * kTILES;  // of a row
#pragma unroll 1
    for (int i = threadIdx.x; i < count * kPAIRS; i += kTHREADS)
    {
        float2 const pair = collectPair<kROWS, kTILES>(partial, i / kPAIRS, i % kPAIRS, bias);
        unsigned const bits = packPair<T>(pair.x, pair.y);
        T* const at = to + i / 4 * kHEAD_DIM + rank * 8 + i % 4 * 2;
#pragma unroll
        for (int other = 0; other < kHEAD_DIM / 8; ++other)
        {
            *reinterpret_cast<unsigned*>(sm90::atRank(at, other)) = bits;
        }
    }
}

//! Adds rows x weights^T to the sums; weights [kCHUNKS, tiles, 8, 32] give columns firstColumn on. With `bias` the
//! block also adds that and the residual, the rows of `hidden`: exactly one block a column does. Blocks that add to the
//! same columns begin at different tiles, `firstTile`: else each would wait for the other's atomics.
template <int kROWS, int kCHUNKS, typename T>
__device__ __forceinline__ void multiplyToSums(Link const& link, Pass<kROWS> const& pass, T const* rows, int pitch,
                                               T const* weights, int tiles, int firstColumn, float const* bias,
                                               T const* hidden, int hiddenPitch, int firstTile)
{
    int const warp = threadIdx.x / kWARP_SIZE;
    int const lane = threadIdx.x % kWARP_SIZE;
    Activations a[kCHUNKS];
#pragma unroll
    for (int chunk = 0; chunk < kCHUNKS; ++chunk)
    {
        a[chunk] = Activations::load<kROWS>(rows, pitch, pass.count, chunk);
    }
#pragma unroll 4
    for (int i = warp; i < tiles; i += kWARPS)
    {
        int const tile = firstTile + i < tiles ? firstTile + i : firstTile + i - tiles;
        float c[4] = {};
#pragma unroll
        for (int chunk = 0; chunk < kCHUNKS; ++chunk)
        {
            multiplyChunk<T>(c, a[chunk], weightsOf(weights + (chunk * tiles + tile) * 8 * kCHUNK));
        }
        int const inTile = tile * 8 + lane % 4 * 2;
        int const column = firstColumn + inTile;
#pragma unroll
        for (int half = 0; half < (kROWS > 8 ? 2 : 1); ++half)
        {
            int const row = lane / 4 + half * 8;
            if (row < pass.count && pass.isActive(row))
            {
                float2 sum = {c[2 * half], c[2 * half + 1]};
                if (bias != nullptr)
                {
                    float2 const h =
                        unpackPair<T>(*reinterpret_cast<unsigned const*>(hidden + row * hiddenPitch + column));
                    sum.x += bias[inTile] + h.x;
                    sum.y += bias[inTile + 1] + h.y;
                }
                size_t const index = (static_cast<size_t>(pass.first + row) * link.width + column) / 2;
                atomicAdd(link.output + index, toSum(sum.x, sum.y));
            }
        }
    }
}

// ---- attention of one query a row ----

//! Where a row's keys lie: in its own cache.
struct OwnCache
{
    static __device__ __forceinline__ int behind(int /*index*/)
    {
        return 0;
    }
};

//! Where a running hypothesis's keys lie: in its ancestors' rows, whose caches are those of its own row so far behind.
struct AncestorCaches
{
    int const* owners;  //!< of the row
    int row;
    ptrdiff_t cacheSize;  //!< elements of a row's keys

    __device__ __forceinline__ ptrdiff_t behind(int index) const
    {
        return (__ldcg(owners + index) - row) * cacheSize;
    }
};

//! Where row `row` finds its keys: in a beam search `owners` [rows, capacity] say it, `cacheSize` elements a row.
template <bool kBEAMS>
__device__ __forceinline__ auto cachesOf(int const* owners, int row, int capacity, ptrdiff_t cacheSize)
{
    if constexpr (kBEAMS)
    {
        return AncestorCaches{owners + static_cast<size_t>(row) * capacity, row, cacheSize};
    }
    else
    {
        return OwnCache{};
    }
}

//! Keys and values that one lane holds. A key is shared by kLANES neighbouring lanes, eight elements each; kROW_WARPS
//! warps take turns at a row's keys.
template <typename T, int kHEAD_DIM, int kROW_WARPS, int kPASSES>
struct Keys
{
    static constexpr int kLANES = kHEAD_DIM / 8;
    static constexpr int kGROUPS = kWARP_SIZE / kLANES;
    static constexpr int kSPAN = kPASSES * kROW_WARPS * kGROUPS;  //!< keys that a row's warps hold

    uint4 keys[kPASSES];
    uint4 values[kPASSES];

    static __device__ __forceinline__ int indexOf(int first, int pass)
    {
        int const warp = threadIdx.x / kWARP_SIZE % kROW_WARPS;
        int const group = threadIdx.x % kWARP_SIZE / kLANES;
        return first + (pass * kROW_WARPS + warp) * kGROUPS + group;
    }

    //! Keys first to first + kSPAN of [keys, kHEAD_DIM], as far as they lie before `last`.
    template <typename Caches = OwnCache>
    __device__ __forceinline__ void load(T const* allKeys, T const* allValues, int first, int last,
                                         Caches const& caches = {})
    {
        int const offset = threadIdx.x % kLANES * 8;
#pragma unroll
        for (int pass = 0; pass < kPASSES; ++pass)
        {
            int const index = indexOf(first, pass);
            keys[pass] = values[pass] = uint4{};
            if (index < last)
            {
                auto const at = caches.behind(index) + index * kHEAD_DIM + offset;
                keys[pass] = __ldcg(reinterpret_cast<uint4 const*>(allKeys + at));
                values[pass] = __ldcg(reinterpret_cast<uint4 const*>(allValues + at));
            }
        }
    }
};

//! The row's newest key and value, at index `position`; `key` and `value`: the lane's eight elements.
template <typename T, int kHEAD_DIM, int kROW_WARPS, int kPASSES>
__device__ __forceinline__ void insertNewest(Keys<T, kHEAD_DIM, kROW_WARPS, kPASSES>& held, int first, int position,
                                             uint4 const* key, uint4 const* value)
{
#pragma unroll
    for (int pass = 0; pass < kPASSES; ++pass)
    {
        if (held.indexOf(first, pass) == position)
        {
            held.keys[pass] = *key;
            held.values[pass] = *value;
        }
    }
}

//! Softmax in the making: the maximum (of the whole warp), and this lane's sums.
template <typename T, int kHEAD_DIM>
struct Softmax
{
    static constexpr int kLANES = kHEAD_DIM / 8;

    float query[8];  //!< times log2(e) / sqrt(kHEAD_DIM)
    float maximum;
    float total;
    float context[8];

    __device__ __forceinline__ void begin(uint4 const& bits)
    {
        float const scale = kLOG2_E * rsqrtf(static_cast<float>(kHEAD_DIM));
        Pack<T> const q = Pack<T>::fromBits(bits);
#pragma unroll
        for (int i = 0; i < 8; ++i)
        {
            query[i] = q.values[i] * scale;
            context[i] = 0.0F;
        }
        maximum = kNO_SCORE;
        total = 0.0F;
    }

    __device__ __forceinline__ float score(uint4 const& key) const
    {
        Pack<T> const k = Pack<T>::fromBits(key);
        float s = 0.0F;
#pragma unroll
        for (int i = 0; i < 8; ++i)
        {
            s += query[i] * k.values[i];
        }
        return groupSum<kLANES>(s);
    }

    __device__ __forceinline__ void raiseTo(float newMaximum)
    {
        float const scale = exp2Approx(maximum - newMaximum);
        maximum = newMaximum;
        total *= scale;
#pragma unroll
        for (int i = 0; i < 8; ++i)
        {
            context[i] *= scale;
        }
    }

    __device__ __forceinline__ void take(float s, uint4 const& value)
    {
        float const weight = exp2Approx(s - maximum);
        Pack<T> const v = Pack<T>::fromBits(value);
        total += weight;
#pragma unroll
        for (int i = 0; i < 8; ++i)
        {
            context[i] += weight * v.values[i];
        }
    }

    template <int kROW_WARPS, int kPASSES>
    __device__ __forceinline__ void add(Keys<T, kHEAD_DIM, kROW_WARPS, kPASSES> const& held, int first, int last)
    {
        float scores[kPASSES];
        float most = maximum;
#pragma unroll
        for (int pass = 0; pass < kPASSES; ++pass)
        {
            float const s = score(held.keys[pass]);
            scores[pass] = held.indexOf(first, pass) < last ? s : kNO_SCORE;
            most = fmaxf(most, scores[pass]);
        }
#pragma unroll
        for (int offset = kLANES; offset < kWARP_SIZE; offset *= 2)
        {
            most = fmaxf(most, __shfl_xor_sync(kFULL_WARP, most, offset));
        }
        raiseTo(most);
#pragma unroll
        for (int pass = 0; pass < kPASSES; ++pass)
        {
            if (held.indexOf(first, pass) < last)
            {
                take(scores[pass], held.values[pass]);
            }
        }
    }

    //! Adds up the warp; its first kLANES lanes write context [kHEAD_DIM] and (maximum, total).
    __device__ __forceinline__ void finish(float* contextOut, float2* scaleOut)
    {
#pragma unroll
        for (int offset = kLANES; offset < kWARP_SIZE; offset *= 2)
        {
            total += __shfl_xor_sync(kFULL_WARP, total, offset);
#pragma unroll
            for (int i = 0; i < 8; ++i)
            {
                context[i] += __shfl_xor_sync(kFULL_WARP, context[i], offset);
            }
        }
        int const lane = threadIdx.x % kWARP_SIZE;
        if (lane < kLANES)
        {
            auto* const out = reinterpret_cast<float4*>(contextOut + lane * 8);
            out[0] = {context[0], context[1], context[2], context[3]};
            out[1] = {context[4], context[5], context[6], context[7]};
            if (lane == 0)
            {
                *scaleOut = {maximum, total};
            }
        }
    }
};

//! Four elements of a context from kPARTS partial ones, contexts [kPARTS, stride] and scales [kPARTS]; not yet divided
//! by the total.
template <int kPARTS>
__device__ __forceinline__ float4 combine(float const* contexts, int stride, float2 const* scales, float2& scale)
{
    float2 of[kPARTS];
    float maximum = kNO_SCORE;
#pragma unroll
    for (int part = 0; part < kPARTS; ++part)
    {
        of[part] = scales[part];
        maximum = fmaxf(maximum, of[part].x);
    }
    float total = 0.0F;
    float4 sum{};
#pragma unroll
    for (int part = 0; part < kPARTS; ++part)
    {
        float const factor = exp2Approx(of[part].x - maximum);
        float4 const c = *reinterpret_cast<float4 const*>(contexts + part * stride);
        total += factor * of[part].y;
        sum.x += factor * c.x;
        sum.y += factor * c.y;
        sum.z += factor * c.z;
        sum.w += factor * c.w;
    }
    scale = {maximum, total};
    return sum;
}

// ---- the head ----

//! The best of some logits, the lowest token among equals, and what log softmax needs.
struct BestLogit
{
    float best;
    int token;
    float total;

    __device__ __forceinline__ void take(float logit, int of)
    {
        if (logit > best)
        {
            total = total * exp2Approx((best - logit) * kLOG2_E) + 1.0F;
            best = logit;
            token = of;
        }
        else
        {
            total += exp2Approx((logit - best) * kLOG2_E);
        }
    }

    __device__ __forceinline__ void merge(BestLogit const& other)
    {
        float const most = fmaxf(best, other.best);
        int const mine = best == most ? token : 0x7fffffff;
        int const others = other.best == most ? other.token : 0x7fffffff;
        total = total * exp2Approx((best - most) * kLOG2_E) + other.total * exp2Approx((other.best - most) * kLOG2_E);
        best = most;
        token = min(mine, others);
    }

    __device__ __forceinline__ BestLogit shuffled(int offset) const
    {
        return {__shfl_xor_sync(kFULL_WARP, best, offset), __shfl_xor_sync(kFULL_WARP, token, offset),
                __shfl_xor_sync(kFULL_WARP, total, offset)};
    }
};

//! The best of what a warp's lanes hold, each kCOUNT; total is of all. The best first: what is added up then needs one
//! exponential, and no order.
template <int kCOUNT>
__device__ __forceinline__ BestLogit bestOfWarp(BestLogit const (&of)[kCOUNT])
{
    BestLogit found = {of[0].best, 0x7fffffff, 0.0F};
#pragma unroll
    for (int i = 1; i < kCOUNT; ++i)
    {
        found.best = fmaxf(found.best, of[i].best);
    }
    found.best = groupMax(found.best);
#pragma unroll
    for (int i = 0; i < kCOUNT; ++i)
    {
        found.total += of[i].total * exp2Approx((of[i].best - found.best) * kLOG2_E);
        found.token = of[i].best == found.best ? min(found.token, of[i].token) : found.token;
    }
    found.total = groupSum(found.total);
    found.token = __reduce_min_sync(kFULL_WARP, found.token);
    return found;
}

// ---- constants ----

//! The block's constants, on their way into shared memory since before the kernel before has ended: first the norm,
//! then the blob.
struct Constants
{
    uint32_t normBarrier;
    uint32_t blobBarrier;

    //! By all threads, first thing in the kernel. `barriers`: 16 bytes.
    __device__ __forceinline__ static Constants fetch(uint64_t* barriers, void* normTo, void const* norm,
                                                      uint32_t normBytes, void* blobTo, void const* blob,
                                                      uint32_t blobBytes)
    {
        Constants const constants{sharedAddress(barriers), sharedAddress(barriers + 1)};
        if (threadIdx.x == 0)
        {
            sm90::barrierInit(constants.normBarrier, 1);
            sm90::barrierInit(constants.blobBarrier, 1);
            sm90::barrierInitFence();
            sm90::barrierArriveExpect(constants.normBarrier, norm == nullptr ? 0 : normBytes);
            if (norm != nullptr)
            {
                sm90::copyBulk(normTo, norm, normBytes, constants.normBarrier);
            }
            sm90::barrierArriveExpect(constants.blobBarrier, blobBytes);
            sm90::copyBulk(blobTo, blob, blobBytes, constants.blobBarrier);
        }
        __syncthreads();
        return constants;
    }

    __device__ __forceinline__ void waitForNorm() const
    {
        sm90::barrierWait(normBarrier, 0);
    }

    __device__ __forceinline__ void waitForBlob() const
    {
        sm90::barrierWait(blobBarrier, 0);
    }
};

}  // namespace trocr::decoder
