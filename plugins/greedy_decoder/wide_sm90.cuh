#pragma once

// The wide decoder: one persistent kernel for heads of 64 and widths up to 1024. README.md draws it.
//
// Every block has its columns of every product. What the blocks compute goes to boards in global memory, where whoever
// needs it reads until it is there: all bits set mean "not yet", which no rounded number is (NaN is 0x7fff). So data
// are their own signal, and an exchange is one store and one load.

#include "common/device.cuh"
#include "common/mma.cuh"
#include "common/sm90.cuh"
#include "greedy_decoder/common.cuh"
#include "greedy_decoder/kernel.h"
#include "greedy_decoder/wide_layout.h"

namespace trocr::greedy::wide
{

constexpr int kCOMPUTE = kWARPS * kWARP_SIZE;
// Registers: as in the team decoder.
constexpr int kTHREADS = kCOMPUTE + 4 * kWARP_SIZE;
constexpr int kCOMPUTE_REGISTERS = 112;
constexpr int kFETCH_REGISTERS = 32;

struct WideParams
{
    CUtensorMap crossKeys[kMAX_LAYERS];  //!< T [lines * heads * S, 64] in boxes of boxKeys rows
    CUtensorMap crossValues[kMAX_LAYERS];
    uint8_t const* layers;   //!< [L, 128] pieces of kLAYER_SLOTS slots
    float const* constants;  //!< [L, 128, kBIASES]
    uint8_t const* head;     //!< [ceil(V / 8)] slots
    void const* norms;       //!< T [1 + 3 L, 2, 1024]
    void const* embedding;   //!< T [V, 1024]
    void const* positions;   //!< T [positions, 1024]
    void* keys;              //!< T [L, slots, 16, capacity, 64]
    void* values;            //!< T [L, slots, 16, 64, capacity]
    uint8_t* exchange;       //!< boards; all bits set when the kernel starts
    int* tokens;             //!< [lines, maxNewTokens]
    float* logProbs;         //!< [lines]
    int* lengths;            //!< [lines]
    int layerCount;
    int heads;
    float inverseWidth;  //!< of the width without padding
    int lines;
    int slots;
    int capacity;  //!< a multiple of 16
    int maxNewTokens;
    int sourceLength;
    int boxKeys;
    int vocabulary;
    int startId;
    int padId;
    int endIds[kMAX_END_IDS];
    int ends;
    float embedScale;
    float epsilon;
    bool gelu;
    bool embeddingNorm;
};

// ---- boards ----

//! In constant memory, so that no register holds what belongs to a board.
__constant__ constexpr Boards kBOARD = makeBoards();

//! A sublayer: which boards its two products write and clear, what the second reads, and places of the biases. A board
//! is cleared two exchanges after it was read: then all have answered to what they read there.
struct Sublayer
{
    int hidden;
    int hiddenClears;
    int biases;
    int rows;
    int sumsClear;
    int sumsBiases;
};

__constant__ constexpr Sublayer kSUBLAYER[3] = {
    {kQKV, kINNERS, 0, kCONTEXTS, kQKV, 3 * kUNIT},
    {kQUERIES, kSUMS + 2, 4 * kUNIT, kCROSS_CONTEXTS, kQUERIES, 5 * kUNIT},
    {kINNERS, kSUMS, 6 * kUNIT, kINNERS, kSUMS + 1, (6 + kINNER_TILES) * kUNIT}};

__device__ __forceinline__ uint4 look(void const* at)
{
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(at)
                 : "memory");
    return v;
}

__device__ __forceinline__ unsigned lookPair(void const* at)
{
    unsigned v;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(at) : "memory");
    return v;
}

__device__ __forceinline__ void put(void* at, unsigned value)
{
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}

__device__ __forceinline__ void put(void* at, float2 value)
{
    asm volatile("st.relaxed.gpu.global.v2.f32 [%0], {%1, %2};" ::"l"(at), "f"(value.x), "f"(value.y) : "memory");
}

//! Takes a word of 16 bytes back, which all have read.
__device__ __forceinline__ void clear(void* at)
{
    asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %1, %1, %1};" ::"l"(at), "r"(0xffffffffU) : "memory");
}

//! What was cleared before is so to whoever sees what is put after this and the block's next barrier.
__device__ __forceinline__ void fenceCleared()
{
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
}

__device__ __forceinline__ bool missing(uint4 const& v)
{
    return max(max(v.x, v.y), max(v.z, v.w)) == 0xffffffffU;
}

//! A word that is missing, or one of zeros for which nobody waits.
__device__ __forceinline__ uint4 expected(bool is)
{
    unsigned const bits = is ? 0xffffffffU : 0U;
    return {bits, bits, bits, bits};
}

__device__ __forceinline__ bool missing(unsigned v)
{
    return v == 0xffffffffU;
}

//! Reads words, of which the missing ones have all bits set, until none is missing; all missing ones at once.
template <int kCOUNT, typename Word, typename Look>
__device__ __forceinline__ void receive(Word (&words)[kCOUNT], Look const& lookAt)
{
    bool waits = true;
#pragma unroll 1
    while (waits)
    {
#pragma unroll
        for (int i = 0; i < kCOUNT; ++i)
        {
            if (missing(words[i]))
            {
                words[i] = lookAt(i);
            }
        }
        waits = false;
#pragma unroll
        for (int i = 0; i < kCOUNT; ++i)
        {
            waits = waits || missing(words[i]);
        }
    }
}

//! A barrier of the warps that compute alone.
__device__ __forceinline__ void computeSync()
{
    asm volatile("bar.sync 1, %0;" ::"n"(kCOMPUTE) : "memory");
}

//! loadBox with an L2 policy.
__device__ __forceinline__ void loadKeys(uint32_t to, CUtensorMap const* map, int row, uint32_t barrier,
                                         uint64_t policy)
{
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
        "l"(map), "r"(barrier), "r"(0), "r"(row), "l"(policy)
        : "memory");
}

extern __shared__ __align__(1024) uint8_t wideShared[];

//! A place in the stream, for the lane that fetches and for the warps that read.
template <int kRING>
struct Ring
{
    uint32_t position{0};
    uint32_t parity{0};  //!< of the ring's turn

    static __device__ __forceinline__ uint32_t memory()
    {
        return sm90::sharedAddress(wideShared);
    }
    static __device__ __forceinline__ uint32_t full(uint32_t at)
    {
        return memory() + at * 8;
    }
    static __device__ __forceinline__ uint32_t empty(uint32_t at)
    {
        return memory() + kRING * 8 + at * 8;
    }
    static __device__ __forceinline__ uint32_t data(uint32_t at)
    {
        return memory() + 1024 + at * kSLOT_BYTES;
    }

    __device__ __forceinline__ void advance(uint32_t count)
    {
        position += count;
        if (position >= kRING)
        {
            position -= kRING;
            parity ^= 1;
        }
    }

    //! For the lane that fetches: waits until the next slot has been read, and announces `bytes`.
    __device__ __forceinline__ void open(uint32_t bytes)
    {
        sm90::barrierWait(empty(position), parity ^ 1);
        sm90::barrierArriveExpect(full(position), bytes);
    }

    __device__ __forceinline__ void fetch(uint8_t const* from, int slots, uint64_t policy)
    {
#pragma unroll 1
        for (int i = 0; i < slots; ++i)
        {
            open(kSLOT_BYTES);
            copyBulk(data(position), from + i * kSLOT_BYTES, kSLOT_BYTES, full(position), policy);
            advance(1);
        }
    }

    //! For the warps that read: the slot `ahead` of the next, once it is full. Every warp waits for every slot, so that
    //! none takes one turn of the ring for another.
    __device__ __forceinline__ uint32_t wait(uint32_t ahead) const
    {
        uint32_t at = position + ahead;
        uint32_t turn = parity;
        if (at >= kRING)
        {
            at -= kRING;
            turn ^= 1;
        }
        sm90::barrierWait(full(at), turn);
        return data(at);
    }

    //! This warp has read the next `count` slots.
    __device__ __forceinline__ void release(uint32_t count)
    {
        __syncwarp();
        uint32_t const lane = threadIdx.x % kWARP_SIZE;
        if (lane < count)
        {
            uint32_t const at = position + lane;
            sm90::barrierArrive(empty(at >= kRING ? at - kRING : at));
        }
        advance(count);
    }
};

//! Softmax in the making, of one warp, one query and groups of 16 keys. The query fills all rows of the left operand,
//! so that every lane has the scores of its four keys.
template <typename T>
struct Attention
{
    float maximum{kNO_SCORE};
    float total{0.0F};
    float context[4][4]{};  //!< [i][0] and [2]: elements 16 i + g and 8 behind; the others repeat them

    //! Exponents from products; keys of this lane: place(i), i < 4.
    template <typename Place>
    static __device__ __forceinline__ void mask(float (&scores)[4], int count, Place const& place)
    {
#pragma unroll
        for (int i = 0; i < 4; ++i)
        {
            scores[i] = place(i) < count ? scores[i] * (kLOG2_E * 0.125F) : kNO_SCORE;
        }
    }

    template <int kGROUPS>
    __device__ __forceinline__ void raise(float const (&scores)[kGROUPS][4])
    {
        float most = maximum;
#pragma unroll
        for (int group = 0; group < kGROUPS; ++group)
        {
#pragma unroll
            for (int i = 0; i < 4; ++i)
            {
                most = fmaxf(most, scores[group][i]);
            }
        }
        most = groupMax<4>(most);
        float const rescale = exp2Approx(maximum - most);
        maximum = most;
        total *= rescale;
#pragma unroll
        for (int i = 0; i < 4; ++i)
        {
#pragma unroll
            for (int e = 0; e < 4; ++e)
            {
                context[i][e] *= rescale;
            }
        }
    }

    //! The exponentials of a group, as the right operand of the product with its values.
    __device__ __forceinline__ uint2 weigh(float const (&scores)[4])
    {
        float p[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
        {
            p[i] = exp2Approx(scores[i] - maximum);
            total += p[i];
        }
        return {packPair<T>(p[0], p[1]), packPair<T>(p[2], p[3])};
    }

    //! Elements 16 i to 16 i + 15 of the values: keys of p.x and of p.y of the first eight, then of the others.
    __device__ __forceinline__ void add(int i, uint2 const& p, uint4 const& v)
    {
        multiplyAdd<T>(context[i], {v.x, v.z, v.y, v.w}, p.x, p.y);
    }

    //! contextOut [64], not divided by the total, and (maximum, total).
    __device__ __forceinline__ void finish(float* contextOut, float2* scaleOut)
    {
        int const lane = threadIdx.x % kWARP_SIZE;
        total = groupSum<4>(total);
        if (lane % 4 == 0)
        {
#pragma unroll
            for (int i = 0; i < 4; ++i)
            {
                contextOut[i * 16 + lane / 4] = context[i][0];
                contextOut[i * 16 + lane / 4 + 8] = context[i][2];
            }
            if (lane == 0)
            {
                *scaleOut = {maximum, total};
            }
        }
    }
};

template <typename T, int kHALVES>
struct Block
{
    using Layout = wide::Layout<kHALVES>;
    static constexpr int kROWS = Layout::kROWS;
    static constexpr int kRING = Layout::kRING;

    WideParams const& p;
    Ring<kRING> ring{};
    unsigned live{0};  //!< rows that have a line, a bit each
    int token{0};      //!< number of the token under way, for all rows
    unsigned thread{threadIdx.x};

    static __device__ __forceinline__ uint32_t base()
    {
        return sm90::sharedAddress(wideShared);
    }
    //! Makes the compiler compute anew what follows from the thread's place, instead of keeping it: registers are short.
    __device__ __forceinline__ void forget()
    {
        asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    }
    __device__ __forceinline__ int warp() const
    {
        return static_cast<int>(thread / kWARP_SIZE);
    }
    __device__ __forceinline__ int lane() const
    {
        return static_cast<int>(thread % kWARP_SIZE);
    }
    static __device__ __forceinline__ uint32_t decided()
    {
        return base() + 2 * kRING * 8;
    }
    template <typename P>
    static __device__ __forceinline__ P* at(int offset)
    {
        return reinterpret_cast<P*>(wideShared + offset);
    }

    // The rows' state, the same in every block.
    static __device__ __forceinline__ int* lines()
    {
        return at<int>(Layout::state);  // -1: idle
    }
    static __device__ __forceinline__ int* newest()
    {
        return lines() + kMAX_SLOTS;  // positions
    }
    static __device__ __forceinline__ int* inputs()
    {
        return lines() + 2 * kMAX_SLOTS;  // tokens
    }
    static __device__ __forceinline__ float* logProbs()
    {
        return at<float>(Layout::state) + 3 * kMAX_SLOTS;
    }
    static __device__ __forceinline__ int* nextLine()
    {
        return lines() + 4 * kMAX_SLOTS;
    }
    static __device__ __forceinline__ int* allEnded()
    {
        return nextLine() + 1;
    }

    //! Of a share among this block's, of which there are at most two.
    static __device__ __forceinline__ int numberOf(int share)
    {
        return share < static_cast<int>(gridDim.x) ? 0 : 1;
    }
    __device__ __forceinline__ bool isLive(int row) const
    {
        return (live >> row & 1) != 0;
    }
    //! Blocks that have columns and, by the way, heads.
    static __device__ __forceinline__ int workers()
    {
        return min(static_cast<int>(gridDim.x), kSHARES);
    }
    __device__ __forceinline__ uint8_t* place(int board, int row, int share) const
    {
        return p.exchange + kBOARD.of[board].offset + row * kBOARD.of[board].pitch + share * kBOARD.of[board].share;
    }
    //! The board of the last layer's sums, of a token.
    static __device__ __forceinline__ int lastSums(int of)
    {
        return kLAST_SUMS + of % 2;
    }

    //! Takes back what this block's share had put on a board. Warps 14 and 15, which have no sums to do.
    __device__ __forceinline__ void clearBoard(int board, int share) const
    {
        int const words = kBOARD.of[board].words;
        int const i = static_cast<int>(thread) - (kCOMPUTE - 64);
        if (i >= 0 && i < words * kROWS && isLive(i / words))
        {
            clear(place(board, i / words, share) + i % words * kBOARD.of[board].stride);
            fenceCleared();
        }
    }

    // ---- hidden ----

    //! Lane (g, t) = (lane / 4, lane % 4) has, of rows g and g + 8, inputs 8 t to 8 t + 7 of both chunks of 32 that are
    //! its warp's. x = LayerNorm(sums) of all rows; `sums` < 0: of the embedding. A barrier is inside.
    __device__ __forceinline__ void makeHidden(uint4 (&x)[kHALVES][2], int sums, int norm)
    {
        forget();
        int const column = warp() * 64 + lane() % 4 * 8;
        float v[kHALVES * 2][8];
        uint4 gammaBits[2];
        uint4 betaBits[2];
        T const* const norms = static_cast<T const*>(p.norms) + norm * 2 * kWIDTH + column;
#pragma unroll
        for (int c = 0; c < 2; ++c)
        {
            gammaBits[c] = __ldg(reinterpret_cast<uint4 const*>(norms + c * 32));
            betaBits[c] = __ldg(reinterpret_cast<uint4 const*>(norms + kWIDTH + c * 32));
        }
        if (sums < 0)
        {
#pragma unroll
            for (int i = 0; i < kHALVES * 2; ++i)
            {
                int const row = lane() / 4 + i / 2 * 8;
                int const offset = column + i % 2 * 32;
                bool const is = isLive(row);
                Pack<T> token{};
                Pack<T> position{};
                if (is)
                {
                    token = Pack<T>::fromBits(__ldg(reinterpret_cast<uint4 const*>(
                        static_cast<T const*>(p.embedding) + static_cast<size_t>(inputs()[row]) * kWIDTH + offset)));
                    position = Pack<T>::fromBits(__ldg(reinterpret_cast<uint4 const*>(
                        static_cast<T const*>(p.positions) + static_cast<size_t>(newest()[row]) * kWIDTH + offset)));
                }
#pragma unroll
                for (int e = 0; e < 8; ++e)
                {
                    v[i][e] = is ? token.values[e] * p.embedScale + position.values[e] : 0.0F;
                }
            }
        }
        else
        {
            uint8_t const* const from = place(sums, lane() / 4, 0) + column * 4;
            uint4 bits[kHALVES * 4];
#pragma unroll
            for (int i = 0; i < kHALVES * 4; ++i)
            {
                bits[i] = expected(isLive(lane() / 4 + i / 4 * 8));
            }
            receive(bits, [&](int i) { return look(from + i / 4 * (8 * kWIDTH * 4) + i / 2 % 2 * 128 + i % 2 * 16); });
#pragma unroll
            for (int i = 0; i < kHALVES * 4; ++i)
            {
                v[i / 2][i % 2 * 4] = __uint_as_float(bits[i].x);
                v[i / 2][i % 2 * 4 + 1] = __uint_as_float(bits[i].y);
                v[i / 2][i % 2 * 4 + 2] = __uint_as_float(bits[i].z);
                v[i / 2][i % 2 * 4 + 3] = __uint_as_float(bits[i].w);
            }
        }
#pragma unroll
        for (int half = 0; half < kHALVES; ++half)
        {
            float total = 0.0F;
            float squares = 0.0F;
#pragma unroll
            for (int i = 0; i < 16; ++i)
            {
                float const value = v[half * 2 + i / 8][i % 8];
                total += value;
                squares += value * value;
            }
            total = groupSum<4>(total);
            squares = groupSum<4>(squares);
            if (lane() % 4 == 0)
            {
                int const row = lane() / 4 + half * 8;
                at<float2>(Layout::statistics + row * Layout::kSTATISTICS_PITCH)[warp()] = {total, squares};
            }
        }
        computeSync();
        bool const normed = sums >= 0 || p.embeddingNorm;
#pragma unroll
        for (int half = 0; half < kHALVES; ++half)
        {
            int const row = lane() / 4 + half * 8;
            float4 const* const parts =
                at<float4>(Layout::statistics + row * Layout::kSTATISTICS_PITCH) + lane() % 4 * 2;
            float4 const first = parts[0];
            float4 const second = parts[1];
            float const total = groupSum<4>(first.x + first.z + second.x + second.z);
            float const squares = groupSum<4>(first.y + first.w + second.y + second.w);
            float mean = total * p.inverseWidth;
            float scale = rsqrtf(fmaxf(squares * p.inverseWidth - mean * mean, 0.0F) + p.epsilon);
            mean = normed ? mean : 0.0F;
            scale = normed ? scale : 1.0F;
#pragma unroll
            for (int c = 0; c < 2; ++c)
            {
                Pack<T> const gamma = Pack<T>::fromBits(gammaBits[c]);
                Pack<T> const beta = Pack<T>::fromBits(betaBits[c]);
                Pack<T> out;
#pragma unroll
                for (int e = 0; e < 8; ++e)
                {
                    out.values[e] = (v[half * 2 + c][e] - mean) * scale * gamma.values[e] + beta.values[e];
                }
                x[half][c] = out.toBits();
            }
        }
    }

    // ---- products: rows on the left, eight outputs on the right, a sixteenth of the inputs a warp ----

    //! c += this lane's rows times 32 inputs of eight outputs.
    static __device__ __forceinline__ void multiply(float (&c)[4], uint4 const (&x)[kHALVES], uint4 const& w)
    {
        uint4 const other = kHALVES == 2 ? x[kHALVES - 1] : uint4{0, 0, 0, 0};
        multiplyAdd<T>(c, {x[0].x, other.x, x[0].y, other.y}, w.x, w.y);
        multiplyAdd<T>(c, {x[0].z, other.z, x[0].w, other.w}, w.z, w.w);
    }

    //! This warp's part of a tile's product, to `partial` [warp][tile][row][8].
    __device__ __forceinline__ void leave(float const (&c)[4], int partial, int tile, int tiles) const
    {
        auto* const to = at<float2>(partial) + (warp() * tiles + tile) * (kROWS * 4) + lane();
        to[0] = {c[0], c[1]};
        if (kHALVES == 2)
        {
            to[kWARP_SIZE] = {c[2], c[3]};
        }
    }

    //! The warps' parts of two columns, in their order.
    __device__ __forceinline__ float2 addUp(float2 sum, int partial, int tiles) const
    {
        float2 const* from = at<float2>(partial) + thread;
#pragma unroll
        for (int i = 0; i < kWARPS; ++i)
        {
            float2 const part = from[i * tiles * (kROWS * 4)];
            sum.x += part.x;
            sum.y += part.y;
        }
        return sum;
    }

    //! This warp's weights of the next `count` slots.
    template <int kCOUNT>
    __device__ __forceinline__ void takeWeights(uint4 (&w)[kCOUNT][2], int count)
    {
        forget();
#pragma unroll
        for (int i = 0; i < kCOUNT; ++i)
        {
            if (i < count)
            {
                uint32_t const from = ring.wait(i) + warp() * 1024 + lane() * 16;
                w[i][0] = readShared(from);
                w[i][1] = readShared(from + 512);
            }
        }
        ring.release(count);
    }

    //! board = activation(hidden times the next slots + bias).
    __device__ __forceinline__ void multiplyHidden(int sums, int norm, int to, int toClear,
                                                   float const* biases, bool activated)
    {
        int const tiles = kBOARD.of[to].words;
#pragma unroll 1
        for (int share = blockIdx.x; share < kSHARES; share += gridDim.x)
        {
            uint4 w[kINNER_TILES][2];
            if (kHALVES == 1)
            {
                takeWeights(w, tiles);
            }
            float2 bias{};
            if (static_cast<int>(thread) < tiles * (kROWS * 4))
            {
                int const pair = thread / (kROWS * 4) * 4 + thread % 4;
                bias = __ldg(reinterpret_cast<float2 const*>(biases + share * kBIASES) + pair);
            }
            uint4 x[kHALVES][2];
            makeHidden(x, sums, norm);
            if (kHALVES == 2)
            {
                takeWeights(w, tiles);  // there are no registers to do so earlier
            }
            if (warp() == share / 8 && lane() % 4 == share % 4)
            {
                // These are the share's own columns, which the residual is.
#pragma unroll
                for (int half = 0; half < kHALVES; ++half)
                {
                    at<uint4>(Layout::residual)[numberOf(share) * kROWS + half * 8 + lane() / 4] =
                        share % 8 < 4 ? x[half][0] : x[half][1];
                }
            }
#pragma unroll
            for (int i = 0; i < kINNER_TILES; ++i)
            {
                if (i < tiles)
                {
                    float c[4] = {};
#pragma unroll
                    for (int chunk = 0; chunk < 2; ++chunk)
                    {
                        uint4 rows[kHALVES];
#pragma unroll
                        for (int half = 0; half < kHALVES; ++half)
                        {
                            rows[half] = x[half][chunk];
                        }
                        multiply(c, rows, w[i][chunk]);
                    }
                    leave(c, Layout::partial, i, tiles);
                }
            }
            computeSync();
            forget();
            int const tile = thread / (kROWS * 4);
            int const row = thread / 4 % kROWS;
            if (tile < tiles && isLive(row))
            {
                float2 sum = addUp(bias, Layout::partial, tiles);
                if (activated)
                {
                    sum = p.gelu ? float2{gelu(sum.x), gelu(sum.y)} : float2{fmaxf(sum.x, 0.0F), fmaxf(sum.y, 0.0F)};
                }
                put(place(to, row, share) + tile * kBOARD.of[to].stride + thread % 4 * 4,
                    packPair<T>(sum.x, sum.y));
            }
            clearBoard(toClear, share);
            if (share + gridDim.x < kSHARES)
            {
                computeSync();  // the parts have been added up
            }
        }
    }

    //! sums = hidden + bias + rows times the next slots, 1024 inputs of all rows each.
    __device__ __forceinline__ void multiplyRows(int rows, int to, int toClear,
                                                 float const* biases)
    {
        constexpr int kAT_ONCE = kHALVES == 1 ? 4 : 2;  // slots
        int const pitch = kBOARD.of[rows].pitch;
        int const slots = pitch / (kWIDTH * 2);
#pragma unroll 1
        for (int share = blockIdx.x; share < kSHARES; share += gridDim.x)
        {
            float2 sum = __ldg(reinterpret_cast<float2 const*>(biases + share * kBIASES) + thread % 4);
            float c[4] = {};
#pragma unroll 1
            for (int first = 0; first < slots; first += kAT_ONCE)
            {
                int const count = min(slots - first, kAT_ONCE);
                uint4 w[kAT_ONCE][2];
                takeWeights(w, count);
                uint4 x[kAT_ONCE * 2 * kHALVES];
#pragma unroll
                for (int i = 0; i < kAT_ONCE * 2 * kHALVES; ++i)
                {
                    bool const is = i / (2 * kHALVES) < count && isLive(lane() / 4 + i % kHALVES * 8);
                    x[i] = expected(is);
                }
                uint8_t const* const from = place(rows, lane() / 4, 0) + first * (kWIDTH * 2) +
                                            warp() * 128 + lane() % 4 * 16;
                receive(x,
                        [&](int i)
                        {
                            return look(from + i % kHALVES * (8 * pitch) + i / kHALVES % 2 * 64 +
                                        i / (2 * kHALVES) * (kWIDTH * 2));
                        });
#pragma unroll
                for (int i = 0; i < kAT_ONCE * 2; ++i)
                {
                    if (i / 2 < count)
                    {
                        uint4 part[kHALVES];
#pragma unroll
                        for (int half = 0; half < kHALVES; ++half)
                        {
                            part[half] = x[i * kHALVES + half];
                        }
                        multiply(c, part, w[i / 2][i % 2]);
                    }
                }
            }
            leave(c, Layout::outPartial, 0, 1);
            computeSync();
            forget();
            int const row = thread / 4;
            if (row < kROWS && isLive(row))
            {
                float2 const own =
                    unpackPair<T>(at<unsigned>(Layout::residual)[(numberOf(share) * kROWS + row) * 4 + thread % 4]);
                sum = addUp({sum.x + own.x, sum.y + own.y}, Layout::outPartial, 1);
                put(place(to, row, share) + thread % 4 * 8, sum);
            }
            clearBoard(toClear, share);
            if (share + gridDim.x < kSHARES)
            {
                computeSync();
            }
        }
    }

    // ---- attention: a row and a head are one worker's, always the same ----

    //! Puts the context of the task on the board: what `parts` warps and, if `extra` >= 0, one more part have left.
    //! One warp; two elements a lane.
    __device__ __forceinline__ void mergeContext(int to, int toClear, int task, int first, int parts,
                                                 int extra) const
    {
        auto const* const scales = at<float2>(Layout::scales);
        auto const* const contexts = at<float2>(Layout::contexts) + lane();
        float most = kNO_SCORE;
        if (extra >= 0)
        {
            most = scales[extra].x;
        }
#pragma unroll 4
        for (int i = first; i < first + parts; ++i)
        {
            most = fmaxf(most, scales[i].x);
        }
        float total = 0.0F;
        float2 sum{};
        auto const take = [&](int i)
        {
            float2 const scale = scales[i];
            float2 const context = contexts[i * (kHEAD / 2)];
            float const factor = exp2Approx(scale.x - most);
            total += factor * scale.y;
            sum.x += factor * context.x;
            sum.y += factor * context.y;
        };
#pragma unroll 4
        for (int i = first; i < first + parts; ++i)
        {
            take(i);
        }
        if (extra >= 0)
        {
            take(extra);
        }
        float const inverse = 1.0F / total;
        int const row = task / kHEADS;
        int const columns = task % kHEADS * (kHEAD * 2);
        put(place(to, row, 0) + columns + lane() * 4, packPair<T>(sum.x * inverse, sum.y * inverse));
        if (lane() < kHEAD / kUNIT)
        {
            clear(place(toClear, row, 0) + columns + lane() * 16);
        }
        fenceCleared();
    }

    //! Eight warps a task, two tasks at a time.
    __device__ __forceinline__ void attendToSelf(int layer)
    {
        forget();
        int const tasks = p.slots * kHEADS;
#pragma unroll 1
        for (int first = blockIdx.x; first < tasks; first += 2 * workers())
        {
            int const mine = warp() % 8;
            int const task = first + warp() / 8 * workers();
            int const row = min(task / kHEADS, kMAX_SLOTS - 1);
            int const head = task % kHEADS;
            bool const works = task < tasks && isLive(row);
            int const count = newest()[row];  // keys in the cache
            size_t const cache =
                ((static_cast<size_t>(layer) * p.slots + row) * kHEADS + head) * p.capacity * kHEAD;
            T* const keys = static_cast<T*>(p.keys) + cache;
            T* const values = static_cast<T*>(p.values) + cache;
            uint8_t const* const from = place(kQKV, row, 0) + head * (kHEAD * 2);
            int const g = lane() / 4;
            int const t = lane() % 4;
            if (works && mine * 16 < count)
            {
                // Of 16 keys this lane's scores are of keys 4 t to 4 t + 3, as are its exponentials and values.
                int const key = g / 2 * 4 + g % 2;
                Attention<T> attention;
                uint4 query[2] = {{~0U, ~0U, ~0U, ~0U}, {~0U, ~0U, ~0U, ~0U}};
#pragma unroll 1
                for (int group = mine * 16; group < count; group += 8 * 16)
                {
                    uint4 k[2][2];
                    uint2 v[8];
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                    {
                        k[i / 2][i % 2] = __ldcg(
                            reinterpret_cast<uint4 const*>(keys + (group + key + i / 2 * 2) * kHEAD + i % 2 * 32) + t);
                    }
#pragma unroll
                    for (int i = 0; i < 8; ++i)
                    {
                        v[i] = __ldcg(
                            reinterpret_cast<uint2 const*>(values + (i * 8 + g) * p.capacity + group + t * 4));
                    }
                    receive(query, [&](int i) { return look(from + i * 64 + t * 16); });
                    float scores[1][4];
#pragma unroll
                    for (int i = 0; i < 2; ++i)
                    {
                        float c[4] = {};
#pragma unroll
                        for (int half = 0; half < 2; ++half)
                        {
                            uint4 const& q = query[half];
                            multiplyAdd<T>(c, {q.x, q.x, q.y, q.y}, k[i][half].x, k[i][half].y);
                            multiplyAdd<T>(c, {q.z, q.z, q.w, q.w}, k[i][half].z, k[i][half].w);
                        }
                        scores[0][2 * i] = c[0];
                        scores[0][2 * i + 1] = c[1];
                    }
                    int const left = count - group - t * 4;  // of this lane's keys
                    attention.mask(scores[0], left, [](int i) { return i; });
                    attention.raise(scores);
                    uint2 const weights = attention.weigh(scores[0]);
                    // What lies behind the last value may be anything; times zero it must be zero.
                    unsigned const low = left >= 2 ? ~0U : left == 1 ? 0xffffU : 0U;
                    unsigned const high = left >= 4 ? ~0U : left == 3 ? 0xffffU : 0U;
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                    {
                        attention.add(i, weights, {v[2 * i].x & low, v[2 * i].y & high, v[2 * i + 1].x & low,
                                                   v[2 * i + 1].y & high});
                    }
                }
                attention.finish(at<float>(Layout::contexts) + warp() * kHEAD, at<float2>(Layout::scales) + warp());
            }
            if (works && mine == 7)
            {
                // The newest key and value: a part of their own, two elements a lane.
                unsigned words[3] = {~0U, ~0U, ~0U};
                receive(words, [&](int i) { return lookPair(from + i * (kWIDTH * 2) + lane() * 4); });
                float2 const query = unpackPair<T>(words[0]);
                float2 const key = unpackPair<T>(words[1]);
                float2 const value = unpackPair<T>(words[2]);
                float const score = groupSum(query.x * key.x + query.y * key.y) * (kLOG2_E * 0.125F);
                int const part = kWARPS + warp() / 8;
                at<float2>(Layout::contexts)[part * (kHEAD / 2) + lane()] = value;
                if (lane() == 0)
                {
                    at<float2>(Layout::scales)[part] = {score, 1.0F};
                }
                reinterpret_cast<unsigned*>(keys + count * kHEAD)[lane()] = words[1];
                auto* const column = reinterpret_cast<unsigned short*>(values) + 2 * lane() * p.capacity + count;
                column[0] = static_cast<unsigned short>(words[2] & 0xffffU);
                column[p.capacity] = static_cast<unsigned short>(words[2] >> 16);
            }
            computeSync();
            if (works && mine == 0)
            {
                mergeContext(kCONTEXTS, kCROSS_CONTEXTS, task, warp(), min(8, (count + 15) / 16), kWARPS + warp() / 8);
            }
            if (first + 2 * workers() < tasks)
            {
                computeSync();  // the parts have been merged
            }
        }
    }

    //! All warps a task. Eight share a slot of keys, the other eight the next.
    __device__ __forceinline__ void attendToLines()
    {
        forget();
        constexpr int kGROUPS = kTURN_SLOTS / 2;
        int const half = warp() / 8;
        int const mine = warp() % 8 * 16;
        int const slots = (p.sourceLength + kSLOT_KEYS - 1) / kSLOT_KEYS;
#pragma unroll 1
        for (int task = blockIdx.x; task < p.slots * kHEADS; task += workers())
        {
            if (!isLive(task / kHEADS))
            {
                continue;
            }
            uint8_t const* const from =
                place(kQUERIES, task / kHEADS, 0) + task % kHEADS * (kHEAD * 2) + lane() % 4 * 4;
            unsigned query[8] = {~0U, ~0U, ~0U, ~0U, ~0U, ~0U, ~0U, ~0U};
            receive(query, [&](int i) { return lookPair(from + i * 16); });
            Attention<T> attention;
#pragma unroll 1
            for (int turn = 0; turn < slots; turn += kTURN_SLOTS)
            {
                int const count = min(slots - turn, kTURN_SLOTS);
                float scores[kGROUPS][4];
                int present[kGROUPS];  // keys of this warp's group
#pragma unroll
                for (int i = 0; i < kGROUPS; ++i)
                {
                    scores[i][0] = scores[i][1] = scores[i][2] = scores[i][3] = kNO_SCORE;
                    int const slot = turn + 2 * i + half;
                    present[i] = min(p.boxKeys, p.sourceLength - slot * p.boxKeys) - mine;
                    present[i] = 2 * i + half < count ? present[i] : 0;
                    if (2 * i >= count)
                    {
                        continue;
                    }
                    uint32_t keys = ring.wait(2 * i);
                    if (2 * i + 1 < count)
                    {
                        uint32_t const second = ring.wait(2 * i + 1);
                        keys = half == 0 ? keys : second;
                    }
                    if (present[i] > 0)
                    {
                        // Matrices: keys 0 to 7 of elements 16 s to 16 s + 7, of the next eight; then keys 8 to 15.
                        int const row = lane() / 16 * 8 + lane() % 8;
                        uint32_t const at = keys + (mine + row) * (kHEAD * 2);
                        float c[2][4] = {};
#pragma unroll
                        for (int s = 0; s < 4; ++s)
                        {
                            uint32_t k[4];
                            loadMatrices(k, at + ((2 * s + lane() / 8 % 2) ^ (lane() % 8)) * 16);
                            uint32_t const a[4] = {query[2 * s], query[2 * s], query[2 * s + 1], query[2 * s + 1]};
                            multiplyAdd<T>(c[0], a, k[0], k[1]);
                            multiplyAdd<T>(c[1], a, k[2], k[3]);
                        }
                        scores[i][0] = c[0][0];
                        scores[i][1] = c[0][1];
                        scores[i][2] = c[1][0];
                        scores[i][3] = c[1][1];
                        attention.mask(scores[i], present[i], [&](int e)
                                       { return e / 2 * 8 + static_cast<int>(thread % 4 * 2) + e % 2; });
                    }
                }
                ring.release(count);
                attention.raise(scores);
#pragma unroll
                for (int i = 0; i < kGROUPS; ++i)
                {
                    if (2 * i >= count)
                    {
                        continue;
                    }
                    uint32_t values = ring.wait(2 * i);
                    if (2 * i + 1 < count)
                    {
                        uint32_t const second = ring.wait(2 * i + 1);
                        values = half == 0 ? values : second;
                    }
                    if (present[i] > 0)
                    {
                        uint2 const weights = attention.weigh(scores[i]);
                        uint32_t const at = values + (mine + lane() % 16) * (kHEAD * 2);
#pragma unroll
                        for (int pair = 0; pair < 4; ++pair)
                        {
                            // Matrices: keys 0 to 7 and 8 to 15 of eight elements, then of the next eight.
                            uint32_t v[4];
                            loadMatricesTransposed(v, at + ((2 * pair + lane() / 16) ^ (lane() % 8)) * 16);
                            if (present[i] < 16)
                            {
#pragma unroll
                                for (int e = 0; e < 4; ++e)
                                {
                                    int const behind =
                                        present[i] - (e % 2 * 8 + static_cast<int>(thread % 4 * 2));
                                    v[e] &= behind >= 2 ? 0xffffffffU : behind == 1 ? 0xffffU : 0U;
                                }
                            }
                            attention.add(pair, weights, {v[0], v[1], v[2], v[3]});
                        }
                    }
                }
                ring.release(count);
            }
            attention.finish(at<float>(Layout::contexts) + warp() * kHEAD, at<float2>(Layout::scales) + warp());
            computeSync();
            if (warp() == 0)
            {
                mergeContext(kCROSS_CONTEXTS, kCONTEXTS, task, 0, kWARPS, -1);
            }
            if (task + workers() < p.slots * kHEADS)
            {
                computeSync();  // the parts have been merged
            }
        }
    }

    __device__ __forceinline__ void decodeLayers()
    {
#pragma unroll 1
        for (int i = 0; i < 3 * p.layerCount; ++i)
        {
            int const layer = i / 3;
            int const part = i % 3;
            Sublayer const& of = kSUBLAYER[part];
            float const* const biases = p.constants + static_cast<size_t>(layer) * kSHARES * kBIASES;
            multiplyHidden(i == 0 ? -1 : kSUMS + (part + 2) % 3, i, of.hidden,
                           i == 1 ? lastSums(token + 1) : of.hiddenClears, biases + of.biases, part == 2);
            if (part == 0)
            {
                attendToSelf(layer);
            }
            else if (part == 1)
            {
                attendToLines();
            }
            multiplyRows(of.rows, i + 1 == 3 * p.layerCount ? lastSums(token) : kSUMS + part, of.sumsClear,
                         biases + of.sumsBiases);
        }
    }

    // ---- the lane that fetches ----

    __device__ __forceinline__ uint8_t const* piece(int layer, int share) const
    {
        return p.layers + (static_cast<size_t>(layer) * kSHARES + share) * (kLAYER_SLOTS * kSLOT_BYTES);
    }

    //! The slots of all shares of this block, one product after the other.
    __device__ __forceinline__ void fetchProduct(int layer, int first, int slots, uint64_t policy)
    {
#pragma unroll 1
        for (int share = blockIdx.x; share < kSHARES; share += gridDim.x)
        {
            ring.fetch(piece(layer, share) + first * kSLOT_BYTES, slots, policy);
        }
    }

    //! What a layer reads before the lines' keys. None of it depends on what was decided.
    __device__ __forceinline__ void fetchBeforeKeys(int layer, uint64_t policy)
    {
        fetchProduct(layer, 0, 3, policy);
        fetchProduct(layer, 3, 1, policy);
        fetchProduct(layer, 4, 1, policy);
    }

    __device__ __forceinline__ void fetchKeys(int layer, uint64_t policy)
    {
        int const slots = (p.sourceLength + kSLOT_KEYS - 1) / kSLOT_KEYS;
#pragma unroll 1
        for (int task = blockIdx.x; task < p.slots * kHEADS; task += workers())
        {
            int const line = static_cast<int volatile*>(lines())[task / kHEADS];
            int const head = min(task % kHEADS, p.heads - 1);  // of padding: any, its output is multiplied by zeros
            int const start = (line * p.heads + head) * p.sourceLength;
#pragma unroll 1
            for (int turn = 0; line >= 0 && turn < slots; turn += kTURN_SLOTS)
            {
                int const count = min(slots - turn, kTURN_SLOTS);
#pragma unroll 1
                for (int i = 0; i < 2 * count; ++i)
                {
                    ring.open(p.boxKeys * kHEAD * 2);
                    loadKeys(ring.data(ring.position), i < count ? &p.crossKeys[layer] : &p.crossValues[layer],
                             start + (turn + i % count) * p.boxKeys, ring.full(ring.position), policy);
                    ring.advance(1);
                }
            }
        }
    }

    __device__ __forceinline__ int headUnits() const
    {
        return (p.vocabulary + kUNIT - 1) / kUNIT;
    }

    __device__ __forceinline__ void produce()
    {
        uint64_t const policy = CachePolicies::make().drop;
        uint32_t parity = 0;
#pragma unroll 1
        while (true)
        {
            fetchBeforeKeys(0, policy);
            sm90::barrierWait(decided(), parity);
            parity ^= 1;
            if (*static_cast<int volatile*>(allEnded()) != 0)
            {
                return;
            }
#pragma unroll 1
            for (int layer = 0; layer < p.layerCount; ++layer)
            {
                if (layer > 0)
                {
                    fetchBeforeKeys(layer, policy);
                }
                fetchKeys(layer, policy);
                fetchProduct(layer, kFIRST_SLOTS, 1, policy);
                fetchProduct(layer, kFIRST_SLOTS + 1, kINNER_TILES, policy);
                fetchProduct(layer, kFIRST_SLOTS + 1 + kINNER_TILES, kINNER / kWIDTH, policy);
            }
#pragma unroll 1
            for (int unit = blockIdx.x; unit < headUnits(); unit += gridDim.x)
            {
                ring.fetch(p.head + static_cast<size_t>(unit) * kSLOT_BYTES, 1, policy);
            }
        }
    }

    // ---- the head ----

    __device__ __forceinline__ uint8_t* choiceAt(int row, int block) const
    {
        return p.exchange + kCHOICES + (((token % 2) * kMAX_SLOTS + row) * kMAX_BLOCKS + block) * 16;
    }

    //! Every row's best token among this block's share of the vocabulary. A warp takes 8 tokens, whole.
    __device__ __forceinline__ void chooseTokens()
    {
        forget();
        uint4 x[kHALVES][2];
        makeHidden(x, lastSums(token), 3 * p.layerCount);
        uint32_t const row = lane() / 4 * kPITCH + lane() % 4 * 16;
#pragma unroll
        for (int half = 0; half < kHALVES; ++half)
        {
            auto* const to = at<uint4>(Layout::partial + half * (8 * kPITCH) + row + warp() * 128);
            to[0] = x[half][0];
            to[4] = x[half][1];
        }
        computeSync();
        Choice best[kHALVES];
#pragma unroll
        for (int half = 0; half < kHALVES; ++half)
        {
            best[half] = {kNO_SCORE, 0, 0.0F};
        }
        int turn = warp();
#pragma unroll 1
        for (int unit = blockIdx.x; unit < headUnits(); unit += gridDim.x)
        {
            uint32_t const weights = ring.wait(0) + lane() * 16;
            if (turn == 0)
            {
                float c[2][4] = {};  // of even and odd chunks
#pragma unroll 4
                for (int chunk = 0; chunk < kWIDTH / 32; chunk += 2)
                {
#pragma unroll
                    for (int odd = 0; odd < 2; ++odd)
                    {
                        uint4 rows[kHALVES];
#pragma unroll
                        for (int half = 0; half < kHALVES; ++half)
                        {
                            rows[half] = readShared(base() + Layout::partial + half * (8 * kPITCH) + row +
                                                    (chunk + odd) * 64);
                        }
                        multiply(c[odd], rows, readShared(weights + (chunk + odd) * 512));
                    }
                }
                int const of = unit * kUNIT + lane() % 4 * 2;
#pragma unroll
                for (int i = 0; i < 2 * kHALVES; ++i)
                {
                    if (of + i % 2 < p.vocabulary)
                    {
                        best[i / 2].take(c[0][i] + c[1][i], of + i % 2);
                    }
                }
            }
            turn = turn == 0 ? kWARPS - 1 : turn - 1;
            ring.release(1);
        }
        auto* const choices = at<Choice>(Layout::choices);  // [row][warp]
#pragma unroll
        for (int half = 0; half < kHALVES; ++half)
        {
            best[half].reduce(1, 4);
            if (lane() % 4 == 0)
            {
                choices[(half * 8 + lane() / 4) * kWARPS + warp()] = best[half];
            }
        }
        computeSync();
        if (warp() < kROWS && isLive(warp()))
        {
            Choice choice = choices[warp() * kWARPS + lane() % kWARPS];
            choice.reduce(1, kWARPS);
            if (lane() == 0)
            {
                asm volatile("st.relaxed.gpu.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(choiceAt(warp(), blockIdx.x)),
                             "r"(__float_as_int(choice.best)), "r"(choice.token), "r"(__float_as_int(choice.total)),
                             "r"(token)
                             : "memory");
            }
        }
    }

    //! Ends the token of the warp's row, by the choices of all blocks.
    __device__ __forceinline__ void endToken()
    {
        constexpr int kMINE = kMAX_BLOCKS / kWARP_SIZE;
        int const row = warp();
        int const line = lines()[row];
        int const position = newest()[row];
        // The best of all first: what is added up then needs one exponential, and no order.
        uint4 of[kMINE];
        bool waits = true;
#pragma unroll 1
        while (waits)
        {
            waits = false;
#pragma unroll
            for (int i = 0; i < kMINE; ++i)
            {
                int const block = i * kWARP_SIZE + lane();
                of[i] = {__float_as_uint(kNO_SCORE), 0, 0, static_cast<unsigned>(token)};
                if (block < static_cast<int>(gridDim.x))
                {
                    of[i] = look(choiceAt(row, block));
                }
            }
#pragma unroll
            for (int i = 0; i < kMINE; ++i)
            {
                waits = waits || of[i].w != static_cast<unsigned>(token);
            }
        }
        Choice choice{kNO_SCORE, 0x7fffffff, 0.0F};
#pragma unroll
        for (int i = 0; i < kMINE; ++i)
        {
            float const best = __uint_as_float(of[i].x);
            int const candidate = static_cast<int>(of[i].y);
            // Of equals the lowest token, which need not be the first block's.
            bool const better = best > choice.best || (best == choice.best && candidate < choice.token);
            choice.token = better ? candidate : choice.token;
            choice.best = fmaxf(choice.best, best);
        }
#pragma unroll
        for (int i = 0; i < kMINE; ++i)
        {
            choice.total +=
                __uint_as_float(of[i].z) * exp2Approx((__uint_as_float(of[i].x) - choice.best) * kLOG2_E);
        }
        choice.reduce(1, kWARP_SIZE);
        bool const ends = lane() < p.ends && choice.token == p.endIds[min(lane(), kMAX_END_IDS - 1)];
        bool const ended = __any_sync(kFULL_WARP, ends) || position + 1 == p.maxNewTokens;
        float const logProb = logProbs()[row] - logf(choice.total);  // the chosen token's own exponent is 0
        if (blockIdx.x == 0)
        {
            int* const tokens = p.tokens + static_cast<size_t>(line) * p.maxNewTokens;
            if (lane() == 0)
            {
                tokens[position] = choice.token;
            }
            if (ended)
            {
                for (int i = position + 1 + lane(); i < p.maxNewTokens; i += kWARP_SIZE)
                {
                    tokens[i] = p.padId;
                }
                if (lane() == 0)
                {
                    p.lengths[line] = position + 1;
                    p.logProbs[line] = logProb;
                }
            }
        }
        __syncwarp();
        if (lane() == 0)
        {
            lines()[row] = ended ? -1 : line;
            newest()[row] = ended ? 0 : position + 1;
            inputs()[row] = ended ? p.startId : choice.token;
            logProbs()[row] = ended ? 0.0F : logProb;
        }
    }

    //! Rows without a line take the next ones, the same in every block. Then the lane that fetches may go on.
    __device__ __forceinline__ void decide()
    {
        if (thread == 0)
        {
            bool any = false;
#pragma unroll 1
            for (int row = 0; row < p.slots; ++row)
            {
                if (lines()[row] < 0 && *nextLine() < p.lines)
                {
                    lines()[row] = (*nextLine())++;
                }
                any = any || lines()[row] >= 0;
            }
            *allEnded() = !any;
            sm90::barrierArrive(decided());
        }
        computeSync();
        live = __ballot_sync(kFULL_WARP, lane() < kMAX_SLOTS && lines()[lane() % kMAX_SLOTS] >= 0);
    }

    //! The warps that compute.
    __device__ __forceinline__ void compute()
    {
        if (thread < kMAX_SLOTS)
        {
            lines()[thread] = -1;
            newest()[thread] = 0;
            inputs()[thread] = p.startId;
            logProbs()[thread] = 0.0F;
            *nextLine() = 0;
        }
        computeSync();
        decide();
#pragma unroll 1
        for (; live != 0; ++token)
        {
            if (static_cast<int>(blockIdx.x) < workers())
            {
                decodeLayers();
            }
            chooseTokens();
            if (warp() < kROWS && isLive(warp()))
            {
                endToken();
            }
            computeSync();
            decide();
        }
        // The next token's beginning is on its way, for nothing.
#pragma unroll 1
        for (int share = blockIdx.x; share < kSHARES; share += gridDim.x)
        {
#pragma unroll 1
            for (int i = 0; i < kFIRST_SLOTS; ++i)
            {
                ring.wait(0);
                ring.release(1);
            }
        }
    }
};

//! Decodes all lines. All blocks must run at once.
template <typename T, int kHALVES>
__global__ void __launch_bounds__(kTHREADS, 1) decodeWide(__grid_constant__ WideParams const p)
{
    Block<T, kHALVES> block{p};
    if (threadIdx.x == 0)
    {
        for (int slot = 0; slot < block.kRING; ++slot)
        {
            sm90::barrierInit(block.ring.full(slot), 1);
            sm90::barrierInit(block.ring.empty(slot), kWARPS);
        }
        sm90::barrierInit(block.decided(), 1);
        *block.allEnded() = 0;
        sm90::barrierInitFence();
    }
    __syncthreads();
    if (threadIdx.x < kCOMPUTE)
    {
        sm90::growRegisters<kCOMPUTE_REGISTERS>();
        block.compute();
    }
    else
    {
        sm90::shrinkRegisters<kFETCH_REGISTERS>();
        if (threadIdx.x == kCOMPUTE)
        {
            block.produce();
        }
    }
}

}  // namespace trocr::greedy::wide
