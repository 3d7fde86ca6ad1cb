#pragma once

// The wide decoder: one persistent kernel for up to 16 rows, a block on every multiprocessor. README.md draws it.
//
// Every block has its columns of every product. What it computes goes to boards in global memory, in words of 16 bytes
// that are written and read at once. The lowest bit of a word changes with each use of its board: who needs a word
// reads it until the bit is the use's. So data are their own signal, and an exchange is a store and a load, with
// neither flag, fence nor clearing. A board is written again only when everyone has answered to what they read there.

#include "device_decoder/chain_blocks_sm90.cuh"
#include "device_decoder/wide_layout.h"

namespace trocr::decoder::wide
{

struct WideParams
{
    uint8_t const* layers;                //!< [L, kLAYER_SLOTS, shares] slots
    float const* constants;               //!< [L, shares, kCONSTANTS]
    uint8_t const* head;                  //!< [ceil(V / 8)] slots
    void const* norms;                    //!< T [1 + 3 L, 2, D], of which the last is read
    void const* embedding;                //!< T [V, D]
    void const* positions;                //!< T [positions, D]
    void const* crossKeys[kMOST_LAYERS];  //!< C [lines, H, S, 64]
    void const* crossValues[kMOST_LAYERS];
    void* keys;          //!< T [L, rows, H, capacity, 64]
    void* values;        //!< likewise
    sm90::Quad* boards;  //!< zeros when the kernel starts
    int* tokens;         //!< [lines, maxNewTokens]
    float* logProbs;     //!< [lines]
    int* lengths;        //!< [lines]
    int layerCount;
    int lines;
    int slots;
    int rowMask;  //!< least power of two that is not below slots, less one
    int parts;    //!< 8 / (rowMask + 1), at least 1: of a row's and head's keys, each a block's; and copies of a row
    int capacity;
    int maxNewTokens;
    int sourceLength;
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

//! A place in the stream, for the lane that fetches and for the warps that read.
template <typename L>
struct Ring
{
    uint32_t base;
    uint32_t position{0};
    uint32_t parity{0};  //!< of the ring's turn

    __device__ __forceinline__ uint32_t full(uint32_t at) const
    {
        return base + L::kBARRIERS + at * 8;
    }
    __device__ __forceinline__ uint32_t empty(uint32_t at) const
    {
        return full(L::kRING + at);
    }
    __device__ __forceinline__ uint32_t data(uint32_t at) const
    {
        return base + L::kSLOTS + at * L::kSLOT_BYTES;
    }

    __device__ __forceinline__ void advance(uint32_t count)
    {
        position += count;
        if (position >= L::kRING)
        {
            position -= L::kRING;
            parity ^= 1;
        }
    }

    //! For the lane that fetches: `bytes` to the next slot, once that has been read and less than `most` copies are on
    //! their way.
    __device__ __forceinline__ void fetch(void const* from, uint32_t bytes, uint32_t most, uint64_t policy)
    {
        open(bytes, most);
        sm90::copyBulk(data(position), from, bytes, full(position), policy);
        advance(1);
    }

    //! The same from two places, `bytes` each, to the halves of the slot.
    __device__ __forceinline__ void fetchBoth(void const* first, void const* second, uint32_t bytes, uint32_t most,
                                              uint64_t policy)
    {
        open(2 * bytes, most);
        sm90::copyBulk(data(position), first, bytes, full(position), policy);
        sm90::copyBulk(data(position) + L::kSLOT_BYTES / 2, second, bytes, full(position), policy);
        advance(1);
    }

    __device__ __forceinline__ void open(uint32_t bytes, uint32_t most) const
    {
        bool const wraps = position < most;
        sm90::barrierWait(full(wraps ? position + L::kRING - most : position - most), parity ^ wraps);
        sm90::barrierWait(empty(position), parity ^ 1);
        sm90::barrierArriveExpect(full(position), bytes);
    }

    //! For the warps that read: the slot `ahead` of the next, once it is full. Every warp waits for every slot, so that
    //! none takes one turn of the ring for another.
    __device__ __forceinline__ uint32_t wait(uint32_t ahead) const
    {
        bool const wraps = position + ahead >= L::kRING;
        uint32_t const at = position + ahead - (wraps ? L::kRING : 0);
        sm90::barrierWait(full(at), parity ^ wraps);
        return data(at);
    }

    //! This warp has read the next `count` slots.
    __device__ __forceinline__ void release(uint32_t count)
    {
        sm90::endReads();
        uint32_t const lane = threadIdx.x % kWARP_SIZE;
        if (lane < count)
        {
            uint32_t const at = position + lane;
            sm90::barrierArrive(empty(at >= L::kRING ? at - L::kRING : at));
        }
        advance(count);
    }
};

//! Leaves a word on a board; its lowest bit is the use's.
__device__ __forceinline__ void put(sm90::Quad* to, uint4 word, unsigned turn)
{
    word.x = (word.x & ~1U) | turn;
    sm90::publish(to, {word.x | static_cast<uint64_t>(word.y) << 32, word.z | static_cast<uint64_t>(word.w) << 32});
}

//! Reads words until all are those of the use; `at(i)` is where word i lies, nullptr: it is not waited for, and zero.
//! The use's bit is cleared: which use it is depends on other rows' lines, and a row's result must not.
//! The warp stays together: lanes that went on as soon as they have theirs would go separate ways for long.
template <int kCOUNT, typename At>
__device__ __forceinline__ void receive(uint4 (&words)[kCOUNT], unsigned turn, At const& at)
{
    unsigned missing = 0;
#pragma unroll
    for (int i = 0; i < kCOUNT; ++i)
    {
        words[i] = uint4{};
        missing |= at(i) != nullptr ? 1U << i : 0U;
    }
#pragma unroll 1
    while (__any_sync(kFULL_WARP, missing != 0))
    {
#pragma unroll
        for (int i = 0; i < kCOUNT; ++i)
        {
            if ((missing >> i & 1) != 0)
            {
                sm90::Quad const word = sm90::readPublished(at(i));
                words[i] = {static_cast<unsigned>(word.low), static_cast<unsigned>(word.low >> 32),
                            static_cast<unsigned>(word.high), static_cast<unsigned>(word.high >> 32)};
            }
        }
#pragma unroll
        for (int i = 0; i < kCOUNT; ++i)
        {
            missing &= (words[i].x & 1) == turn ? ~(1U << i) : ~0U;
        }
    }
#pragma unroll
    for (uint4& word : words)
    {
        word.x &= ~1U;
    }
}

//! C: of the lines' keys and values, T or e4m3.
template <typename T, typename C, int kWIDTH, int kHALVES>
struct Block
{
    using L = Layout<kWIDTH, kHALVES>;
    static constexpr bool kE4M3 = sizeof(C) == 1;
    static constexpr int kCROSS_SLOTS = kE4M3 ? 1 : 2;  //!< of L::kSLOT_KEYS keys, and their values
    static constexpr int kROWS = L::kROWS;
    using B = Boards<kWIDTH, kROWS>;
    static constexpr int kWARPS = L::kWARPS;
    static constexpr int kHEADS = B::kHEADS;
    static constexpr int kCOMPUTE = kWARPS * kWARP_SIZE;
    // A lane is (g, t) = (lane / 4, lane % 4). As a row's it has row g, with two halves g + 8 too, and of its warp's 64
    // inputs 8 t to 8 t + 7 of both chunks of 32. There are always eight rows: few slots have copies, rows g of the
    // same g & rowMask, which are computed alike, each for an eighth, a quarter or half of the blocks, that read no
    // other's words. All blocks ask for the same words at the same time, and what lies in one place would be asked for
    // by 128 of them.

    WideParams const& p;
    uint8_t* shared;
    Ring<L> ring;
    int token{0};     //!< number of the token under way, for all rows
    unsigned use{0};  //!< layers that have been decoded, of all tokens: boards have been used so often
    unsigned thread{threadIdx.x};

    template <typename P>
    __device__ __forceinline__ P* at(int offset) const
    {
        return reinterpret_cast<P*>(shared + offset);
    }
    __device__ __forceinline__ int warp() const
    {
        return static_cast<int>(thread) / kWARP_SIZE;
    }
    __device__ __forceinline__ int lane() const
    {
        return static_cast<int>(thread) % kWARP_SIZE;
    }
    __device__ __forceinline__ void forget()
    {
        thread = sm90::threadIndexAnew();
    }
    static __device__ __forceinline__ void sync()
    {
        sm90::syncSome<1, kCOMPUTE>();
    }
    // Barriers behind the ring's.
    __device__ __forceinline__ uint32_t decided() const
    {
        return ring.full(2 * L::kRING);
    }
    __device__ __forceinline__ uint32_t constantsFull(int buffer) const
    {
        return decided() + 8 + buffer * 8;
    }
    //! Of a warp, columns 2 t and 2 t + 1 of the share, of a half's row g: what the sublayer before left.
    __device__ __forceinline__ float2& own(int half) const
    {
        return at<float2>(L::kOWN)[half * 2 * kWARP_SIZE + lane()];
    }
    //! LayerNorm of it, and the bias of this sublayer's output.
    __device__ __forceinline__ float2& residual(int half) const
    {
        return at<float2>(L::kOWN)[(half * 2 + 1) * kWARP_SIZE + lane()];
    }
    __device__ __forceinline__ static bool works()
    {
        return blockIdx.x < L::kSHARES;
    }

    // The rows' state, the same in every block.
    __device__ __forceinline__ int* lines() const
    {
        return at<int>(L::kSTATE);  // -1: idle
    }
    __device__ __forceinline__ int* newest() const
    {
        return lines() + kROWS;  // positions
    }
    __device__ __forceinline__ int* inputs() const
    {
        return lines() + 2 * kROWS;  // tokens
    }
    __device__ __forceinline__ float* logProbs() const
    {
        return at<float>(L::kSTATE) + 3 * kROWS;
    }
    __device__ __forceinline__ int* nextLine() const
    {
        return lines() + 4 * kROWS;
    }
    __device__ __forceinline__ int* allEnded() const
    {
        return nextLine() + 1;
    }
    //! Row g of a half.
    __device__ __forceinline__ int rowOf(int half) const
    {
        return half * kHALF + lane() / 4;
    }
    __device__ __forceinline__ int slotOf(int row) const
    {
        return row & p.rowMask;
    }
    __device__ __forceinline__ bool isRow(int row) const
    {
        return slotOf(row) < p.slots;
    }
    //! The copy of the row that this block reads.
    __device__ __forceinline__ int copyOf(int row) const
    {
        return slotOf(row) | (static_cast<int>(blockIdx.x) * (p.rowMask + 1) & (kROWS - 1));
    }
    __device__ __forceinline__ bool isLive(int row) const
    {
        return lines()[slotOf(row)] >= 0;
    }

    __device__ __forceinline__ sm90::Quad* board(int of, int row) const
    {
        return p.boards + row * B::kROW_WORDS + of;
    }
    //! Of the boards that are used once a layer.
    __device__ __forceinline__ unsigned turn() const
    {
        return (use + 1) & 1;
    }
    __device__ __forceinline__ int layer() const
    {
        return static_cast<int>(use) - token * p.layerCount;
    }
    __device__ __forceinline__ unsigned tokenTurn() const
    {
        return static_cast<unsigned>(token + 1) & 1;
    }

    // ---- LayerNorm ----

    //! This warp's part of a row's total and squares to shared memory. Every lane has 16 columns of its half's row g.
    __device__ __forceinline__ void leaveStatistics(float const* v, int half) const
    {
        float total = 0.0F;
        float squares = 0.0F;
#pragma unroll
        for (int i = 0; i < 16; ++i)
        {
            total += v[i];
            squares += v[i] * v[i];
        }
        total = groupSum<4>(total);
        squares = groupSum<4>(squares);
        if (lane() % 4 == 0)
        {
            at<float2>(L::kSTATISTICS)[rowOf(half) * kWARPS + warp()] = {total, squares};
        }
    }

    //! The row's mean and 1 / standard deviation, of what all warps have left.
    __device__ __forceinline__ float2 meanAndScale(int half) const
    {
        auto const* const from = at<float2>(L::kSTATISTICS) + rowOf(half) * kWARPS + lane() % 4 * (kWARPS / 4);
        float total = 0.0F;
        float squares = 0.0F;
#pragma unroll
        for (int i = 0; i < kWARPS / 4; ++i)
        {
            total += from[i].x;
            squares += from[i].y;
        }
        float const mean = groupSum<4>(total) * (1.0F / kWIDTH);
        float const square = groupSum<4>(squares) * (1.0F / kWIDTH);
        return {mean, rsqrtf(fmaxf(square - mean * mean, 0.0F) + p.epsilon)};
    }

    //! Columns `column` and `column` + 1 of the embedding of a half's row g, not normalised.
    __device__ __forceinline__ float2 embed(int column, int half) const
    {
        int const slot = slotOf(rowOf(half));
        if (slot >= p.slots)
        {
            return {};
        }
        auto const pairOf = [&](void const* table, int at)
        {
            auto const* const from = static_cast<T const*>(table) + static_cast<size_t>(at) * kWIDTH + column;
            return unpackPair<T>(__ldg(reinterpret_cast<unsigned const*>(from)));
        };
        float2 const word = pairOf(p.embedding, inputs()[slot]);
        float2 const place = pairOf(p.positions, newest()[slot]);
        return {word.x * p.embedScale + place.x, word.y * p.embedScale + place.y};
    }

    // ---- products: rows on the left, eight outputs on the right, 64 inputs a warp ----

    //! x of both halves, kSTRIDE apart.
    template <int kSTRIDE>
    static __device__ __forceinline__ void multiply(float (&c)[4], uint4 const* x, uint4 const& w)
    {
        multiplyChunk<T>(c, {x[0], kHALVES == 1 ? uint4{} : x[(kHALVES - 1) * kSTRIDE]}, w);
    }

    static __device__ __forceinline__ void multiplyHalf(float (&c)[4], uint4 const& x, uint4 const& w, int half)
    {
        multiplyChunk<T>(c, {half == 0 ? x : uint4{}, half == 0 ? uint4{} : x}, w);
    }

    //! Of two chains of products, neither of which waits for the other.
    static __device__ __forceinline__ void addTo(float (&c)[4], float const (&other)[4])
    {
#pragma unroll
        for (int i = 0; i < 2 * kHALVES; ++i)
        {
            c[i] += other[i];
        }
    }

    //! This warp's part of a tile's product, to `partial` [half][warp][kTILES][row][8].
    template <int kTILES>
    __device__ __forceinline__ void leave(float const (&c)[4], int partial, int tile) const
    {
#pragma unroll
        for (int half = 0; half < kHALVES; ++half)
        {
            at<float2>(partial)[((half * kWARPS + warp()) * kTILES + tile) * kWARP_SIZE + lane()] = {c[2 * half],
                                                                                                     c[2 * half + 1]};
        }
    }

    //! The warps' parts of columns 2 t and 2 t + 1 of the row. Two sums, as each addition waits for the one before.
    template <int kTILES>
    __device__ __forceinline__ float2 addUp(int partial, int tile, int half) const
    {
        auto const* const from = at<float2>(partial) + (half * kWARPS * kTILES + tile) * kWARP_SIZE + lane();
        float2 sums[2] = {};
#pragma unroll
        for (int i = 0; i < kWARPS; ++i)
        {
            float2 const part = from[i * kTILES * kWARP_SIZE];
            sums[i % 2].x += part.x;
            sums[i % 2].y += part.y;
        }
        return {sums[0].x + sums[1].x, sums[0].y + sums[1].y};
    }

    //! Four lanes' pairs of columns, for the first of them a word.
    __device__ __forceinline__ uint4 gatherWord(float2 pair) const
    {
        unsigned const mine = packPair<T>(pair.x, pair.y);
        uint4 word;
        word.x = mine;
        word.y = __shfl_sync(kFULL_WARP, mine, lane() + 1);
        word.z = __shfl_sync(kFULL_WARP, mine, lane() + 2);
        word.w = __shfl_sync(kFULL_WARP, mine, lane() + 3);
        return word;
    }

    //! This warp's weights of the next `count` slots.
    template <int kMOST>
    __device__ __forceinline__ void takeWeights(uint4 (&w)[kMOST][2], int count)
    {
#pragma unroll
        for (int i = 0; i < kMOST; ++i)
        {
            if (i < count)
            {
                uint32_t const from = ring.wait(i) + warp() * 1024 + lane() * 16;
                w[i][0] = sm90::loadShared(from);
                w[i][1] = sm90::loadShared(from + 512);
            }
        }
        ring.release(count);
    }

    //! Board `to`, word first + tile * tileStride = activation(LayerNorm(x) times the next slots + bias), where x is
    //! what the sublayer before left on board `of`, in the first layer the embedding.
    //!
    //! gamma is in the weights and beta in the bias, so that x is multiplied as it is, and mean and deviation are known
    //! when the products are: y = (x W - mean sum(W)) / deviation + bias. There is no barrier for the statistics alone.
    __device__ __forceinline__ void multiplyHidden(int part, int of, int tiles, int constants, int to, int tileStride,
                                                   int first)
    {
        forget();
        uint4 w[kINNER_TILES][2];
        takeWeights(w, tiles);
        uint4 x[2 * kHALVES];  // chunks of a half, and of the other
        float v[16 * kHALVES];
        bool const embeds = part == 0 && layer() == 0;
        int const column = warp() * 64 + lane() % 4 * 8;
        if (embeds)
        {
#pragma unroll
            for (int c = 0; c < 2 * kHALVES; ++c)
            {
                unsigned pairs[4];
#pragma unroll
                for (int i = 0; i < 4; ++i)
                {
                    float2 const pair = embed(column + c % 2 * 32 + 2 * i, c / 2);
                    pairs[i] = packPair<T>(pair.x, pair.y);
                }
                x[c] = {pairs[0], pairs[1], pairs[2], pairs[3]};
            }
            if (warp() < kHALVES)
            {
                own(warp()) = embed(static_cast<int>(blockIdx.x) * kCOLUMNS + lane() % 4 * 2, warp());
            }
        }
        else
        {
            // The last sublayer's was left in the layer before.
            receive(x, part == 0 ? turn() ^ 1 : turn(),
                    [&](int i)
                    {
                        int const row = rowOf(i / 2);
                        return isRow(row) ? board(of, copyOf(row)) + column / 8 + i % 2 * 4 : nullptr;
                    });
        }
#pragma unroll
        for (int c = 0; c < 2 * kHALVES; ++c)
        {
            Pack<T> const values = Pack<T>::fromBits(x[c]);
#pragma unroll
            for (int e = 0; e < 8; ++e)
            {
                v[c * 8 + e] = values.values[e];
            }
        }
#pragma unroll
        for (int i = 0; i < kINNER_TILES; ++i)
        {
            if (i < tiles)
            {
                float c[2][4] = {};
                multiply<2>(c[0], x, w[i][0]);
                multiply<2>(c[1], x + 1, w[i][1]);
                addTo(c[0], c[1]);
                leave<kINNER_TILES>(c[0], L::kPARTIAL, i);
            }
        }
#pragma unroll
        for (int half = 0; half < kHALVES; ++half)
        {
            leaveStatistics(v + 16 * half, half);
        }
        sync();
        auto const finishTile = [&](int job)
        {
            int const half = kHALVES == 1 || job < tiles ? 0 : 1;
            int const mine = job - half * tiles;
            auto const constant = [&](int tile)
            { return at<float2>(constants + tile * kCOLUMNS * static_cast<int>(sizeof(float)))[lane() % 4]; };
            float2 const bias = constant(mine);
            float2 const columnSum = constant(tiles + mine);
            float2 const norm = embeds && !p.embeddingNorm ? float2{0.0F, 1.0F} : meanAndScale(half);
            float2 sum = addUp<kINNER_TILES>(L::kPARTIAL, mine, half);
            sum = {(sum.x - norm.x * columnSum.x) * norm.y + bias.x, (sum.y - norm.x * columnSum.y) * norm.y + bias.y};
            if (part == 2)
            {
                sum = p.gelu ? float2{gelu(sum.x), gelu(sum.y)} : float2{fmaxf(sum.x, 0.0F), fmaxf(sum.y, 0.0F)};
            }
            uint4 const word = gatherWord(sum);
            int const row = rowOf(half);
            if (lane() % 4 == 0 && isRow(row))
            {
                put(board(to, row) + first + mine * tileStride, word, turn());
            }
            if (mine == 0)
            {
                float2 const outBias = constant(2 * tiles);
                float2 const gamma = constant(2 * tiles + 1);
                float2 const beta = constant(2 * tiles + 2);
                float2 const raw = own(half);
                residual(half) = {(raw.x - norm.x) * norm.y * gamma.x + beta.x + outBias.x,
                                  (raw.y - norm.x) * norm.y * gamma.y + beta.y + outBias.y};
            }
        };
        if constexpr (kWARPS >= kHALVES * kINNER_TILES)
        {
            if (warp() < kHALVES * tiles)
            {
                finishTile(warp());
            }
        }
        else
        {
#pragma unroll 1
            for (int job = warp(); job < kHALVES * tiles; job += kWARPS)
            {
                finishTile(job);
            }
        }
    }

    //! c = the rows on board `of` times the next kSLOTS slots, kWIDTH inputs each.
    template <int kSLOTS>
    __device__ __forceinline__ void multiplyRows(float (&c)[4], int of)
    {
        forget();
        uint4 w[kSLOTS][2];
        takeWeights(w, kSLOTS);
        constexpr int kWORDS = 2 * kSLOTS;                   // of a row
        constexpr int kAT_ONCE = kSLOTS == 1 ? kHALVES : 1;  // halves: there are no registers for more
        float other[4] = {};
#pragma unroll
        for (int half = 0; half < kHALVES; half += kAT_ONCE)
        {
            uint4 x[kAT_ONCE * kWORDS];
            receive(x, turn(),
                    [&](int i)
                    {
                        int const row = rowOf(half + i / kWORDS);
                        auto const* const from = board(of, copyOf(row)) + warp() * 8 + lane() % 4;
                        return isRow(row) ? from + i % kWORDS / 2 * (kWIDTH / 8) + i % 2 * 4 : nullptr;
                    });
#pragma unroll
            for (int i = 0; i < kSLOTS; ++i)
            {
                if constexpr (kAT_ONCE == kHALVES)
                {
                    multiply<kWORDS>(c, x + 2 * i, w[i][0]);
                    multiply<kWORDS>(other, x + 2 * i + 1, w[i][1]);
                }
                else
                {
                    multiplyHalf(c, x[2 * i], w[i][0], half);
                    multiplyHalf(other, x[2 * i + 1], w[i][1], half);
                }
            }
        }
        addTo(c, other);
    }

    //! The same of cross-attention's contexts, of which blocks have left parts: each part is multiplied as a row would
    //! be, and the products are added by the parts' weights.
    __device__ __forceinline__ void multiplyParts(float (&c)[4])
    {
        uint4 w[1][2];
        takeWeights(w, 1);
        int const g = lane() / 4;
        int const t = lane() % 4;
        if constexpr (kHALVES > 1)  // nothing is in parts
        {
            uint4 x[2 * kHALVES];
            receive(x, turn(),
                    [&](int i)
                    {
                        int const row = rowOf(i / 2);
                        auto const* const from = board(B::kPARTS, row) + warp() * kMOST_PARTS * B::kPART_WORDS;
                        return isRow(row) ? from + i % 2 * 4 + t : nullptr;
                    });
            float other[4] = {};
            multiply<2>(c, x, w[0][0]);
            multiply<2>(other, x + 1, w[0][1]);
            addTo(c, other);
            return;
        }
        uint4 words[3];
        sm90::Quad const* const from =
            board(B::kPARTS, g / p.parts) + (warp() * kMOST_PARTS + g % p.parts) * B::kPART_WORDS;
        bool const is = g < p.slots * p.parts;
        receive(words, turn(), [&](int i) { return is ? from + (i == 2 ? kHEAD / 8 : 4 * i + t) : nullptr; });
        float other[4] = {};
        multiply<0>(c, words, w[0][0]);
        multiply<0>(other, words + 1, w[0][1]);
        addTo(c, other);
        if (p.parts == 1)
        {
            return;
        }
        float const maximum = __uint_as_float(words[2].x);
        float most = maximum;
#pragma unroll 1
        for (int offset = 4; offset < 4 * p.parts; offset *= 2)
        {
            most = fmaxf(most, __shfl_xor_sync(kFULL_WARP, most, offset));
        }
        float weight = exp2Approx(maximum - most) * __uint_as_float(words[2].y);
        c[0] *= weight;
        c[1] *= weight;
#pragma unroll 1
        for (int offset = 4; offset < 4 * p.parts; offset *= 2)
        {
            weight += __shfl_xor_sync(kFULL_WARP, weight, offset);
            c[0] += __shfl_xor_sync(kFULL_WARP, c[0], offset);
            c[1] += __shfl_xor_sync(kFULL_WARP, c[1], offset);
        }
        float const factor = is ? __fdividef(1.0F, weight) : 0.0F;
        int const source = min(slotOf(g), p.slots - 1) * p.parts * 4 + t;
        c[0] = __shfl_sync(kFULL_WARP, c[0] * factor, source);
        c[1] = __shfl_sync(kFULL_WARP, c[1] * factor, source);
    }

    //! Board `to` = the residual + the warps' c. `isLast`: so is the board of the last sums, of float32, which is used
    //! once a token; the other is written for its bit.
    __device__ __forceinline__ void leaveSums(float const (&c)[4], int to, bool isLast)
    {
        forget();
        leave<1>(c, L::kOUT_PARTIAL, 0);
        sync();
        if (warp() < kHALVES)
        {
            int const half = warp();
            float2 const rest = residual(half);
            float2 sum = addUp<1>(L::kOUT_PARTIAL, 0, half);
            sum = {sum.x + rest.x, sum.y + rest.y};
            uint4 const word = gatherWord(sum);
            int const row = rowOf(half);
            int const share = static_cast<int>(blockIdx.x);
            if (lane() % 4 == 0 && isRow(row))
            {
                put(board(to, row) + share, word, turn());
            }
            own(half) = sum;
            if (isLast)
            {
                float const x2 = __shfl_xor_sync(kFULL_WARP, sum.x, 1);
                float const y2 = __shfl_xor_sync(kFULL_WARP, sum.y, 1);
                if (lane() % 2 == 0 && isRow(row))
                {
                    put(board(B::kLAST_SUMS, row) + share * 2 + lane() % 4 / 2,
                        {__float_as_uint(sum.x), __float_as_uint(sum.y), __float_as_uint(x2), __float_as_uint(y2)},
                        tokenTurn());
                }
            }
        }
    }

    // ---- attention: a row and a head are one block's, of the lines' keys a part ----

    //! What the warps' softmaxes have left, of one warp: in lanes 8 q + i columns 8 i to 8 i + 7, not divided by the
    //! total. Returns (maximum, total).
    __device__ __forceinline__ float2 mergeWarps(float (&sums)[8], int half) const
    {
        constexpr int kEACH = kWARPS / 4;  // warps' results that a lane adds up
        float2 scales[kEACH];
        float most = kNO_SCORE;
#pragma unroll
        for (int i = 0; i < kEACH; ++i)
        {
            scales[i] = at<float2>(L::kSCALES)[half * kWARPS + 4 * i + lane() / 8];
            most = fmaxf(most, scales[i].x);
        }
        most = fmaxf(most, __shfl_xor_sync(kFULL_WARP, most, 8));
        most = fmaxf(most, __shfl_xor_sync(kFULL_WARP, most, 16));
        float total = 0.0F;
#pragma unroll
        for (float& sum : sums)
        {
            sum = 0.0F;
        }
#pragma unroll
        for (int i = 0; i < kEACH; ++i)
        {
            float const factor = exp2Approx(scales[i].x - most);
            total += factor * scales[i].y;
            int const warp = half * kWARPS + 4 * i + lane() / 8;
            auto const* const from = at<float4>(L::kCONTEXTS) + warp * (kHEAD / 4) + lane() % 8 * 2;
            float4 const a = from[0];
            float4 const b = from[1];
            sums[0] += factor * a.x;
            sums[1] += factor * a.y;
            sums[2] += factor * a.z;
            sums[3] += factor * a.w;
            sums[4] += factor * b.x;
            sums[5] += factor * b.y;
            sums[6] += factor * b.z;
            sums[7] += factor * b.w;
        }
#pragma unroll
        for (int offset = 8; offset <= 16; offset *= 2)
        {
            total += __shfl_xor_sync(kFULL_WARP, total, offset);
#pragma unroll
            for (float& sum : sums)
            {
                sum += __shfl_xor_sync(kFULL_WARP, sum, offset);
            }
        }
        return {most, total};
    }

    //! One warp: the context that the warps' softmaxes have left, or of a row without a line zeros, to the words from
    //! `to` on; behind them maximum and total, if `scaled`.
    __device__ __forceinline__ void leaveContext(sm90::Quad* to, bool is, bool scaled, int half) const
    {
        Pack<T> out{};
        float2 scale = {0.0F, 1.0F};
        if (is)
        {
            float sums[8];
            scale = mergeWarps(sums, half);
            float const factor = __fdividef(1.0F, scale.y);
#pragma unroll
            for (int i = 0; i < 8; ++i)
            {
                out.values[i] = sums[i] * factor;
            }
        }
        if (lane() < kHEAD / 8)
        {
            put(to + lane(), out.toBits(), turn());
        }
        else if (scaled && lane() == kHEAD / 8)
        {
            put(to + lane(), {__float_as_uint(scale.x), __float_as_uint(scale.y), 0, 0}, turn());
        }
    }

    __device__ __forceinline__ void attendToSelf()
    {
        forget();
        using HeadKeys = Keys<T, kHEAD, kWARPS, 1>;
        int const firstRow = static_cast<int>(blockIdx.x) / kHEADS;  // of the half; the other's is behind it
        int const head = static_cast<int>(blockIdx.x) % kHEADS;
        if (!isRow(firstRow))
        {
            return;
        }
#pragma unroll 1
        for (int half = 0; half < kHALVES; ++half)
        {
            int const row = half * kHALF + firstRow;
            if (!isRow(row) || !isLive(row))
            {
                continue;
            }
            int const position = newest()[slotOf(row)];  // keys in the cache
            size_t const cache = ((static_cast<size_t>(layer()) * kROWS + row) * kHEADS + head) * p.capacity * kHEAD;
            T* const keys = static_cast<T*>(p.keys) + cache;
            T* const values = static_cast<T*>(p.values) + cache;
            HeadKeys held;
            held.load(keys, values, 0, position);
            uint4 words[3];
            sm90::Quad const* const from = board(B::kQKV, row) + head * (kHEAD / 8) + lane() % HeadKeys::kLANES;
            receive(words, turn(), [&](int i) { return from + i * (kWIDTH / 8); });
            Softmax<T, kHEAD> softmax;
            softmax.begin(words[0]);
#pragma unroll 1
            for (int key = 0; key <= position; key += HeadKeys::kSPAN)
            {
                if (key > 0)
                {
                    held.load(keys, values, key, position);
                }
                insertNewest(held, key, position, &words[1], &words[2]);
                softmax.add(held, key, position + 1);
            }
            finish(softmax, half);
            if (warp() == kWARPS - 1 && lane() < HeadKeys::kLANES)
            {
                size_t const to = static_cast<size_t>(position) * kHEAD + lane() * 8;
                *reinterpret_cast<uint4*>(keys + to) = words[1];
                *reinterpret_cast<uint4*>(values + to) = words[2];
            }
        }
        sync();
        int const row = warp() * kHALF + firstRow;
        if (warp() < kHALVES && isRow(row))
        {
            leaveContext(board(B::kCONTEXTS, row) + head * (kHEAD / 8), isLive(row), false, warp());
        }
    }

    //! What this warp's softmax of a half's row has come to, to shared memory.
    __device__ __forceinline__ void finish(Softmax<T, kHEAD>& softmax, int half) const
    {
        int const at = half * kWARPS + warp();
        softmax.finish(this->at<float>(L::kCONTEXTS) + at * kHEAD, this->at<float2>(L::kSCALES) + at);
    }

    //! This block's part of the lines' keys: those of a row and head from first to last. False: it has none.
    struct Part
    {
        int row, head, part, first, last;
    };

    __device__ __forceinline__ bool partOf(Part& mine, int half) const
    {
        int const task = half * L::kSHARES + static_cast<int>(blockIdx.x) / p.parts;
        mine.part = static_cast<int>(blockIdx.x) % p.parts;
        mine.row = task / kHEADS;
        mine.head = task % kHEADS;
        mine.first = p.sourceLength * mine.part / p.parts;
        mine.last = p.sourceLength * (mine.part + 1) / p.parts;
        return mine.row < p.slots;
    }

    __device__ __forceinline__ void attendToLines()
    {
        forget();
        using SlotKeys = Keys<T, kHEAD, kWARPS, L::kSLOT_KEYS / (kWARPS * 4)>;
        static_assert(SlotKeys::kSPAN == L::kSLOT_KEYS);
        Part mine;
        if (!partOf(mine, 0))
        {
            return;
        }
#pragma unroll 1
        for (int half = 0; half < kHALVES; ++half)
        {
            if (!partOf(mine, half) || !isLive(mine.row))
            {
                continue;
            }
            uint4 query[1];
            sm90::Quad const* const from =
                board(B::kQUERIES, copyOf(mine.row)) + mine.head * (kHEAD / 8) + lane() % SlotKeys::kLANES;
            receive(query, turn(), [&](int) { return from; });
            Softmax<T, kHEAD> softmax;
            softmax.begin(query[0]);
#pragma unroll 1
            for (int key = mine.first; key < mine.last; key += L::kSLOT_KEYS)
            {
                int const count = min(L::kSLOT_KEYS, mine.last - key);
                uint32_t const keys = ring.wait(0);
                uint32_t const values = kE4M3 ? keys + L::kSLOT_BYTES / 2 : ring.wait(1);
                SlotKeys held;
#pragma unroll
                for (int pass = 0; pass < L::kSLOT_KEYS / (kWARPS * 4); ++pass)
                {
                    int const index = held.indexOf(0, pass);
                    held.keys[pass] = held.values[pass] = uint4{};
                    if (index < count)
                    {
                        uint32_t const offset = (index * kHEAD + lane() % SlotKeys::kLANES * 8) * sizeof(C);
                        held.keys[pass] = loadEight<C>(keys + offset);
                        held.values[pass] = loadEight<C>(values + offset);
                    }
                }
                ring.release(kCROSS_SLOTS);
                softmax.add(held, 0, count);
            }
            finish(softmax, half);
        }
        sync();
        if (warp() < kHALVES && partOf(mine, warp()))
        {
            leaveContext(board(B::kPARTS, mine.row) + (mine.head * kMOST_PARTS + mine.part) * B::kPART_WORDS,
                         isLive(mine.row), true, warp());
        }
    }

    __device__ __forceinline__ void decodeLayers()
    {
        int const share = static_cast<int>(blockIdx.x);
#pragma unroll 1
        for (; layer() < p.layerCount; ++use)
        {
            sm90::barrierWait(constantsFull(use % 2), use / 2 % 2);
            int constants = L::kCONSTANTS_AT + static_cast<int>(use % 2) * kCONSTANTS_BYTES;
#pragma unroll 1
            for (int part = 0; part < 3; ++part)
            {
                // First products of: query, key, value; query; the feed-forward.
                int const tiles = part == 0 ? 3 : part == 1 ? 1 : kINNER_TILES;
                int const to = part == 0 ? B::kQKV : part == 1 ? B::kQUERIES : B::kINNERS;
                multiplyHidden(part, B::kSUMS + (part + 2) % 3 * (kWIDTH / 8), tiles, constants, to,
                               part == 0 ? kWIDTH / 8 : 1, part == 2 ? share * kINNER_TILES : share);
                constants += (2 * tiles + 3) * kCOLUMNS * static_cast<int>(sizeof(float));
                float c[4] = {};
                if (part == 0)
                {
                    attendToSelf();
                    multiplyRows<1>(c, B::kCONTEXTS);
                }
                else if (part == 1)
                {
                    attendToLines();
                    multiplyParts(c);
                }
                else
                {
                    multiplyRows<kINNER_TILES>(c, B::kINNERS);
                }
                leaveSums(c, B::kSUMS + part * (kWIDTH / 8), part == 2 && layer() + 1 == p.layerCount);
            }
        }
    }

    // ---- the lane that fetches ----

    __device__ __forceinline__ void fetchWeights(int of, int first, int count, uint64_t policy)
    {
        if (works())
        {
            // All blocks' pieces of a slot lie side by side, as all fetch them at about the same time.
            constexpr size_t kALL = static_cast<size_t>(L::kSHARES) * L::kSLOT_BYTES;
            uint8_t const* from = p.layers + (of * kLAYER_SLOTS + first) * kALL + blockIdx.x * L::kSLOT_BYTES;
#pragma unroll 1
            for (int i = 0; i < count; ++i, from += kALL)
            {
                ring.fetch(from, L::kSLOT_BYTES, L::kLAYER_COPIES, policy);
            }
        }
    }

    //! The constants of layer `of`, the stream's `use`th. Its weights' first slot has been fetched, so all warps have
    //! begun the layer before: nobody needs what is in the buffer.
    __device__ __forceinline__ void fetchConstants(int of, unsigned use, uint64_t policy)
    {
        if (works())
        {
            size_t const from = (static_cast<size_t>(of) * L::kSHARES + blockIdx.x) * kCONSTANTS;
            sm90::barrierArriveExpect(constantsFull(use % 2), kCONSTANTS_BYTES);
            sm90::copyBulk(ring.base + L::kCONSTANTS_AT + use % 2 * kCONSTANTS_BYTES, p.constants + from,
                           kCONSTANTS_BYTES, constantsFull(use % 2), policy);
        }
    }

    __device__ __forceinline__ void fetchKeys(int of, uint64_t policy)
    {
#pragma unroll 1
        for (int half = 0; half < kHALVES; ++half)
        {
            Part mine;
            int const line = works() && partOf(mine, half) ? static_cast<int volatile*>(lines())[mine.row] : -1;
            if (line < 0)
            {
                continue;
            }
            size_t const start = (static_cast<size_t>(line) * kHEADS + mine.head) * p.sourceLength;
#pragma unroll 1
            for (int key = mine.first; key < mine.last; key += L::kSLOT_KEYS)
            {
                uint32_t const bytes = min(L::kSLOT_KEYS, mine.last - key) * kHEAD * sizeof(C);
                C const* const keys = static_cast<C const*>(p.crossKeys[of]) + (start + key) * kHEAD;
                C const* const values = static_cast<C const*>(p.crossValues[of]) + (start + key) * kHEAD;
                if constexpr (kE4M3)
                {
                    ring.fetchBoth(keys, values, bytes, L::kLAYER_COPIES, policy);
                }
                else
                {
                    ring.fetch(keys, bytes, L::kLAYER_COPIES, policy);
                    ring.fetch(values, bytes, L::kLAYER_COPIES, policy);
                }
            }
        }
    }

    __device__ __forceinline__ int headUnits() const
    {
        return (p.vocabulary + kCOLUMNS - 1) / kCOLUMNS;
    }

    __device__ __forceinline__ void produce()
    {
        uint64_t const policy = sm90::CachePolicies::make().drop;
        uint32_t parity = 0;
        unsigned use = 0;
#pragma unroll 1
        while (true)
        {
            fetchWeights(0, 0, kSLOTS_BEFORE_KEYS, policy);  // none of it depends on what is decided
            fetchConstants(0, use++, policy);
            sm90::barrierWait(decided(), parity);
            parity ^= 1;
            if (*static_cast<int volatile*>(allEnded()) != 0)
            {
                return;
            }
#pragma unroll 1
            for (int of = 0; of < p.layerCount; ++of)
            {
                if (of > 0)
                {
                    fetchWeights(of, 0, kSLOTS_BEFORE_KEYS, policy);
                    fetchConstants(of, use++, policy);
                }
                fetchKeys(of, policy);
                fetchWeights(of, kSLOTS_BEFORE_KEYS, kLAYER_SLOTS - kSLOTS_BEFORE_KEYS, policy);
            }
#pragma unroll 1
            for (int unit = static_cast<int>(blockIdx.x); unit < headUnits(); unit += static_cast<int>(gridDim.x))
            {
                ring.fetch(p.head + static_cast<size_t>(unit) * L::kSLOT_BYTES, L::kSLOT_BYTES, kHEAD_COPIES, policy);
            }
        }
    }

    // ---- the head ----

    __device__ __forceinline__ sm90::Quad* choiceAt(int row, int block) const
    {
        return p.boards + B::kCHOICES + (token % 2 * kROWS + row) * kMOST_BLOCKS + block;
    }

    //! The last LayerNorm of rows, chunks of 32 columns 64 bytes apart in shared memory from `to` on, the other half's
    //! behind.
    __device__ __forceinline__ void makeLast(int to)
    {
        int const column = warp() * 64 + lane() % 4 * 8;
        T const* const norms = static_cast<T const*>(p.norms) + 3 * p.layerCount * 2 * kWIDTH + column;
        uint4 bits[4 * kHALVES];
        receive(bits, tokenTurn(),
                [&](int i)
                {
                    int const row = rowOf(i / 4);
                    auto const* const from = board(B::kLAST_SUMS, copyOf(row)) + column / 4;
                    return isRow(row) ? from + i % 4 / 2 * 8 + i % 2 : nullptr;
                });
        float v[16 * kHALVES];
#pragma unroll
        for (int i = 0; i < 4 * kHALVES; ++i)
        {
            v[4 * i] = __uint_as_float(bits[i].x);
            v[4 * i + 1] = __uint_as_float(bits[i].y);
            v[4 * i + 2] = __uint_as_float(bits[i].z);
            v[4 * i + 3] = __uint_as_float(bits[i].w);
        }
#pragma unroll
        for (int half = 0; half < kHALVES; ++half)
        {
            leaveStatistics(v + 16 * half, half);
        }
        sync();
#pragma unroll
        for (int c = 0; c < 2; ++c)
        {
            auto const gamma = Pack<T>::fromBits(__ldg(reinterpret_cast<uint4 const*>(norms + c * 32)));
            auto const beta = Pack<T>::fromBits(__ldg(reinterpret_cast<uint4 const*>(norms + kWIDTH + c * 32)));
#pragma unroll
            for (int half = 0; half < kHALVES; ++half)
            {
                float2 const norm = meanAndScale(half);
                Pack<T> out;
#pragma unroll
                for (int e = 0; e < 8; ++e)
                {
                    float const value = v[half * 16 + c * 8 + e];
                    out.values[e] = (value - norm.x) * norm.y * gamma.values[e] + beta.values[e];
                }
                *at<uint4>(to + half * kHALF * L::kPITCH + c * 64) = out.toBits();
            }
        }
    }

    //! Every row's best token among this block's share of the vocabulary. A warp takes eight tokens, whole.
    __device__ __forceinline__ void chooseTokens()
    {
        forget();
        int const rowAt = L::kPARTIAL + lane() / 4 * L::kPITCH + lane() % 4 * 16;
        makeLast(rowAt + warp() * 128);
        sync();
        BestLogit best[kHALVES];
#pragma unroll
        for (BestLogit& one : best)
        {
            one = {kNO_SCORE, 0, 0.0F};
        }
        int turn = warp();
#pragma unroll 1
        for (int unit = static_cast<int>(blockIdx.x); unit < headUnits(); unit += static_cast<int>(gridDim.x))
        {
            uint32_t const weights = ring.wait(0) + lane() * 16;
            if (turn == 0)
            {
                float c[2][4] = {};  // of even and odd chunks
#pragma unroll 2
                for (int chunk = 0; chunk < kWIDTH / 32; chunk += 2)
                {
                    multiply<kHALF * L::kPITCH / 16>(c[0], at<uint4>(rowAt + chunk * 64),
                                                     sm90::loadShared(weights + chunk * 512));
                    multiply<kHALF * L::kPITCH / 16>(c[1], at<uint4>(rowAt + chunk * 64 + 64),
                                                     sm90::loadShared(weights + chunk * 512 + 512));
                }
                int const of = unit * kCOLUMNS + lane() % 4 * 2;
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
        auto* const choices = at<BestLogit>(L::kCHOICES);  // [row][warp]
#pragma unroll
        for (int half = 0; half < kHALVES; ++half)
        {
            best[half].merge(best[half].shuffled(1));
            best[half].merge(best[half].shuffled(2));
            if (lane() % 4 == 0)
            {
                choices[rowOf(half) * kWARPS + warp()] = best[half];
            }
        }
        sync();
#pragma unroll 1
        for (int row = warp(); row < p.slots; row += kWARPS)
        {
            BestLogit choice = choices[row * kWARPS + lane() % kWARPS];
#pragma unroll 1
            for (int offset = 1; offset < kWARPS; offset *= 2)
            {
                choice.merge(choice.shuffled(offset));
            }
            if (lane() == 0)
            {
                sm90::publish(
                    choiceAt(row, static_cast<int>(blockIdx.x)),
                    {__float_as_uint(choice.best) | static_cast<uint64_t>(static_cast<unsigned>(choice.token)) << 32,
                     __float_as_uint(choice.total) | static_cast<uint64_t>(token + 1) << 32});
            }
        }
    }

    //! Ends the row's token, by the choices of all blocks. One warp.
    __device__ __forceinline__ void endToken(int row)
    {
        forget();
        constexpr int kMINE = kMOST_BLOCKS / kWARP_SIZE;
        int const line = lines()[row];
        int const position = newest()[row];
        BestLogit of[kMINE];
        unsigned missing = (1U << kMINE) - 1;
#pragma unroll 1
        while (__any_sync(kFULL_WARP, missing != 0))
        {
#pragma unroll
            for (int i = 0; i < kMINE; ++i)
            {
                int const block = i * kWARP_SIZE + lane();
                if (block >= static_cast<int>(gridDim.x))
                {
                    of[i] = {kNO_SCORE, 0x7fffffff, 0.0F};
                    missing &= ~(1U << i);
                }
                else if ((missing >> i & 1) != 0)
                {
                    sm90::Quad const word = sm90::readPublished(choiceAt(row, block));
                    of[i] = {__uint_as_float(static_cast<unsigned>(word.low)), static_cast<int>(word.low >> 32),
                             __uint_as_float(static_cast<unsigned>(word.high))};
                    missing &= static_cast<int>(word.high >> 32) == token + 1 ? ~(1U << i) : ~0U;
                }
            }
        }
        BestLogit const found = bestOfWarp(of);
        int const chosen = found.token;
        bool const ends = lane() < p.ends && chosen == p.endIds[min(lane(), kMAX_END_IDS - 1)];
        bool const ended = __any_sync(kFULL_WARP, ends) || position + 1 == p.maxNewTokens;
        float const logProb = logProbs()[row] - logf(found.total);  // the chosen token's own exponent is 0
        if (blockIdx.x == 0)
        {
            int* const tokens = p.tokens + static_cast<size_t>(line) * p.maxNewTokens;
            if (lane() == 0)
            {
                tokens[position] = chosen;
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
            inputs()[row] = ended ? p.startId : chosen;
            logProbs()[row] = ended ? 0.0F : logProb;
        }
    }

    //! Rows without a line take the next ones, the same in every block. Then the lane that fetches may go on.
    __device__ __forceinline__ void decide()
    {
        if (warp() == 0)
        {
            int const next = *nextLine();
            int line = lane() < p.slots ? lines()[lane()] : 0;
            unsigned const idle = __ballot_sync(kFULL_WARP, line < 0);
            int const mine = next + __popc(idle & ((1U << lane()) - 1));
            if (line < 0 && mine < p.lines)
            {
                line = mine;
                lines()[lane()] = mine;
            }
            bool const any = __any_sync(kFULL_WARP, lane() < p.slots && line >= 0);
            __syncwarp();
            if (lane() == 0)
            {
                *nextLine() = min(next + __popc(idle), p.lines);
                *allEnded() = !any;
            }
            __syncwarp();
            if (lane() == 0)
            {
                sm90::barrierArrive(decided());
            }
        }
        sync();
    }

    //! The warps that compute.
    __device__ __forceinline__ void compute()
    {
        if (threadIdx.x < kROWS)
        {
            lines()[threadIdx.x] = -1;
            newest()[threadIdx.x] = 0;
            inputs()[threadIdx.x] = p.startId;
            logProbs()[threadIdx.x] = 0.0F;
            *nextLine() = 0;
        }
        sync();
        decide();
#pragma unroll 1
        for (; *allEnded() == 0; ++token)
        {
            if (works())
            {
                decodeLayers();
            }
            chooseTokens();
#pragma unroll 1
            for (int row = warp(); row < p.slots; row += kWARPS)
            {
                if (isLive(row))
                {
                    endToken(row);
                }
            }
            sync();
            decide();
        }
        if (works())  // the next token's beginning is on its way, for nothing
        {
#pragma unroll 1
            for (int i = 0; i < kSLOTS_BEFORE_KEYS; ++i)
            {
                ring.wait(0);
                ring.release(1);
            }
            sm90::barrierWait(constantsFull(use % 2), use / 2 % 2);
        }
    }
};

//! Decodes all lines. All blocks must run at once.
template <typename T, typename C, int kWIDTH, int kHALVES>
__global__ void __launch_bounds__(Layout<kWIDTH, kHALVES>::kTHREADS, 1) decodeWide(__grid_constant__ WideParams const p)
{
    TROCR_DYNAMIC_SHARED(shared, 128);
    using L = Layout<kWIDTH, kHALVES>;
    Block<T, C, kWIDTH, kHALVES> block{p, shared, {sharedAddress(shared)}};
    if (threadIdx.x == 0)
    {
        for (int slot = 0; slot < L::kRING; ++slot)
        {
            sm90::barrierInit(block.ring.full(slot), 1);
            sm90::barrierInit(block.ring.empty(slot), L::kWARPS);
        }
        sm90::barrierInit(block.decided(), 1);
        sm90::barrierInit(block.constantsFull(0), 1);
        sm90::barrierInit(block.constantsFull(1), 1);
        *block.allEnded() = 0;
        sm90::barrierInitFence();
    }
    __syncthreads();
    constexpr bool kMOVES = L::kTHREADS > 512;  // registers, of which a thread has fewer than it needs
    if (threadIdx.x < decltype(block)::kCOMPUTE)
    {
        if constexpr (kMOVES)
        {
            sm90::growRegisters<112>();
        }
        block.compute();
    }
    else
    {
        if constexpr (kMOVES)
        {
            sm90::shrinkRegisters<32>();
        }
        if (threadIdx.x == decltype(block)::kCOMPUTE)
        {
            block.produce();
        }
    }
}

}  // namespace trocr::decoder::wide
