#pragma once

// The team decoder: one persistent kernel for narrow decoders (heads of 32, widths up to 256). README.md draws it.
//
// A warp runs most instructions of a layer once a token, so their number is what time there is to save: sizes are
// constants, and what every warp would compute alike is computed by as few as possible.

#include "device_decoder/beams.h"
#include "device_decoder/kernel.h"
#include "device_decoder/team_pieces_sm90.cuh"

namespace trocr::decoder
{

// One thread more would do, which fetches; but it can hand its registers over only with a whole warpgroup. Not one may
// be spilled: beside so much shared memory there is no cache for it.
constexpr int kTEAM_THREADS = kTEAM_COMPUTE + 4 * kWARP_SIZE;
constexpr int kCOMPUTE_REGISTERS = 112;  // 4 x 112 + 32 = 5 x 96, with which the block starts
constexpr int kFETCH_REGISTERS = 32;

//! Of one launch, but for the tokens. The last block to leave prepares them for the next.
struct TeamCounters
{
    int taken;        //!< lines that rows took after their first
    int left;         //!< blocks that have ended
    unsigned tokens;  //!< of all launches: the number of a launch's first token is one more
};

struct TeamParams
{
    uint8_t const* weights;              //!< [L, 8] pieces of kLAYER_SLOTS slots
    uint8_t const* constants;            //!< [L, 8] pieces of kCONSTANT_BYTES
    uint8_t const* head;                 //!< [ceil(V / 32)] slots
    void const* embeddingNorm;           //!< T [2, 256]; nullptr: none
    void const* embedding;               //!< T [V, 256]
    void const* positions;               //!< T [positions, 256]
    void const* crossKeys[kMAX_LAYERS];  //!< C [lines, heads, S, 32]
    void const* crossValues[kMAX_LAYERS];
    void* keys;  //!< T [L, slots, 8, capacity, 32]
    void* values;
    ulonglong2* hidden;   //!< [slots, 64]: what the head multiplies; in each 64 bits two T and, above, a mark
    sm90::Quad* choices;  //!< [slots, blocks]: best logit, its token, sum of exp(logit - best), a mark
    TeamCounters* counters;
    int* tokens;      //!< [lines, maxNewTokens]
    float* logProbs;  //!< [lines]
    int* lengths;     //!< [lines]
    int layers;
    int heads;
    float inverseWidth;  //!< of the width without padding
    int lines;
    int slots;  //!< rows of all teams
    int teams;
    int teamRows;     //!< slots / teams
    int largerTeams;  //!< slots % teams: so many teams, the first, have one row more
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
    // Of one step of a beam search.
    RowState const* beams;  //!< [slots]
    int const* inputs;      //!< [slots], their newest tokens
    int const* owners;      //!< [slots, capacity]: the row whose cache has the key of a position
    float* logits;          //!< [slots, V]
    // Who has which pieces of the head, where teams have one row each.
    int idlePieces;  //!< of a block without rows, one behind the other
    int teamsPiece;  //!< the first of those that are dealt to the teams' blocks
};

// ---- the kernel ----

//! What a block works with: its place in the grid, its place in the stream, what it shares with its team. Every thread
//! has one. C: of the lines' keys and values, T or e4m3. kBEAMS: of one step of a beam search, which leaves logits,
//! else of a whole greedy search.
template <typename T, typename C, int kROWS, bool kBEAMS>
struct Block
{
    using Layout = TeamLayout<kROWS>;
    static constexpr bool kTWO_HOPS = kROWS > 2;
    // Teams of one row leave many blocks without any. These then keep what they have of the head on the chip, for which
    // they have a path of their own, and have more of it than the teams.
    static constexpr bool kUNEVEN = kROWS == 1 && !kBEAMS;
    // Weights go into registers one product ahead of their use. Behind the keys of many rows they arrive late, and a
    // warp would wait for them where it could normalise: 4 to 8 us a token at three and five rows.
    static constexpr bool kWEIGHTS_AHEAD = !kTWO_HOPS;
    static constexpr int kSELF_WARPS = Layout::kSELF_WARPS;  // of a row
    // Cross-attention of two rows is side by side, half of the warps each, so that one row's latencies are behind the
    // other's. More rows take all warps one after another: half of the warps would need two passes for a row's slots,
    // where all need one, and of an odd number of rows the last would have no neighbour.
    static constexpr bool kSIDE_BY_SIDE = kROWS == 2;
    static constexpr int kCROSS_WARPS = kSIDE_BY_SIDE ? kTEAM_WARPS / 2 : kTEAM_WARPS;  // of a row
    static constexpr int kKEY_BYTES = kHEAD * sizeof(C);
    static constexpr int kCROSS_KEYS = kSLOT_BYTES / 2 / kKEY_BYTES;  // of a slot, and as many values

    // Barriers behind the ring's.
    static constexpr int kCONSTANTS_FULL = 0;   // two
    static constexpr int kCONSTANTS_EMPTY = 2;  // two
    static constexpr int kEXCHANGE = 4;         // two
    static constexpr int kDECIDED = 6;          // the rows' lines of the next token are known, or all have ended
    static constexpr int kANSWERED = 7;         // the lane that fetches has seen that they are
    static constexpr int kLINES = 8;
    static constexpr int kKEPT_FULL = 9;  // kMAX_KEPT
    static constexpr int kBARRIERS = kKEPT_FULL + kMAX_KEPT;

    TeamParams const& p;
    Ring ring{};
    uint32_t layersSeen{0};

    // What follows from the thread's place is not kept: registers are short.

    static __device__ __forceinline__ uint8_t* shared()
    {
        return teamShared();
    }
    //! Its address.
    static __device__ __forceinline__ uint32_t base()
    {
        return sharedAddress(shared());
    }
    static __device__ __forceinline__ int warp()
    {
        return threadIdx.x / kWARP_SIZE;
    }
    static __device__ __forceinline__ int lane()
    {
        return threadIdx.x % kWARP_SIZE;
    }
    //! In the cluster: the head.
    static __device__ __forceinline__ int rank()
    {
        return blockIdx.x % kTEAM_BLOCKS;
    }
    static __device__ __forceinline__ int team()
    {
        return blockIdx.x / kTEAM_BLOCKS;
    }
    //! 0: the block has a part of the head only.
    __device__ __forceinline__ int teamRows() const
    {
        return team() >= p.teams ? 0 : team() < p.largerTeams ? p.teamRows + 1 : p.teamRows;
    }

    static __device__ __forceinline__ constexpr int barrier(int index)
    {
        return 8 * (2 * kRING + index);
    }

    template <typename P>
    __device__ __forceinline__ P* at(int offset) const
    {
        return reinterpret_cast<P*>(shared() + offset);
    }

    // The rows' state, the same in every block of the team.
    __device__ __forceinline__ int* lines() const
    {
        return at<int>(Layout::state);  // [kMAX_ROWS]; -1: idle
    }
    __device__ __forceinline__ int* positions() const
    {
        return lines() + kMAX_ROWS;  // of the newest token
    }
    __device__ __forceinline__ int* endedRows() const
    {
        return lines() + 2 * kMAX_ROWS;
    }
    __device__ __forceinline__ int* nextLines() const
    {
        return lines() + 3 * kMAX_ROWS;  // sent by rank 0
    }
    __device__ __forceinline__ int* inputs() const
    {
        return lines() + 4 * kMAX_ROWS;  // tokens
    }
    __device__ __forceinline__ float* logProbs() const
    {
        return at<float>(Layout::state) + 5 * kMAX_ROWS;  // sums of the lines'
    }
    __device__ __forceinline__ int* allEnded() const
    {
        return lines() + 6 * kMAX_ROWS;
    }
    //! The token's number, the mark of what is published.
    __device__ __forceinline__ unsigned* number() const
    {
        return at<unsigned>(Layout::state) + 6 * kMAX_ROWS + 1;
    }
    __device__ __forceinline__ unsigned* linesTaken() const
    {
        return number() + 1;  // how often
    }
    __device__ __forceinline__ unsigned* decisions() const
    {
        return number() + 2;  // that the lane that fetches was told of
    }

    __device__ __forceinline__ int rowOf(int teamRow) const
    {
        return teamRow * p.teams + team();
    }

    __device__ __forceinline__ bool anyLine() const
    {
        bool any = false;
#pragma unroll
        for (int row = 0; row < kROWS; ++row)
        {
            any = any || lines()[row] >= 0;
        }
        return any;
    }

    //! What this lane reads of rows of activations, as an offset. Columns of a product beyond the rows repeat them.
    __device__ __forceinline__ uint32_t inRows(int pitch) const
    {
        return lane() / 4 % kROWS * pitch + lane() % 4 * 16;
    }

    // ---- a layer ----

    using Qkv = Product<3 * kHEAD / 16, kWIDTH / 32, 2>;
    using Query = Product<kHEAD / 16, kWIDTH / 32, 8>;
    using Inner = Product<kINNER / 16, kWIDTH / 32, 2>;
    using Out = Product<kWIDTH / 16, kHEAD / 32>;  // of both attentions
    using InnerOut = Product<kWIDTH / 16, kINNER / 32>;
    // These follow each other without a barrier of the block. Warps need not wait for what they do not read, so none
    // may be a round ahead.
    static_assert(Inner::kSLOTS + InnerOut::kSLOTS <= kRING);

    //! This warp's weights of the product whose slots are next in the stream; the product gives them back.
    template <typename P>
    __device__ __forceinline__ Weights<P::kUNITS> take()
    {
        Weights<P::kUNITS> weights{};
        if (P::has(warp()))
        {
            int const unit = P::unit(warp());
            weights.read(ring.wait(unit / kSLOT_UNITS) + unit % kSLOT_UNITS * kUNIT_BYTES + lane() * 16);
        }
        return weights;
    }

    //! take, where weights are taken ahead of their product.
    template <typename P>
    __device__ __forceinline__ Weights<P::kUNITS> takeAhead()
    {
        return kWEIGHTS_AHEAD ? take<P>() : Weights<P::kUNITS>{};
    }

    //! What takeAhead has taken, or else now.
    template <typename P>
    __device__ __forceinline__ Weights<P::kUNITS> taken(Weights<P::kUNITS> const& ahead)
    {
        return kWEIGHTS_AHEAD ? ahead : take<P>();
    }

    //! partial [part][row][output] = the parts of hidden times the weights.
    template <typename P>
    __device__ __forceinline__ void multiplyHidden(Weights<P::kUNITS> const& ahead)
    {
        Weights<P::kUNITS> const weights = taken<P>(ahead);
        if (P::has(warp()))
        {
            int const part = P::part(warp());
            float c[4];
            multiply<T>(c, weights, base() + Layout::hidden + inRows(kPITCH) + part * P::kUNITS * 64);
            float* const to =
                at<float>(Layout::partial) + part * kROWS * P::kOUTPUTS + P::tile(warp()) * 16 + lane() / 4;
#pragma unroll
            for (int e = 0; e < 2; ++e)
            {
                int const row = lane() % 4 * 2 + e;
                if (row < kROWS)
                {
                    to[row * P::kOUTPUTS] = c[e];
                    to[row * P::kOUTPUTS + 8] = c[2 + e];
                }
            }
        }
        ring.releaseUsed<P::kSLOTS>();
    }

    //! out T [row][output] = activation(sum of the parts + bias).
    template <typename P, typename Activation>
    __device__ __forceinline__ void addParts(float const* bias, T* out, int outPitch, Activation const& activation)
    {
        computeSync();
        constexpr int kPAIRS = P::kOUTPUTS / 2;
        auto const* const partial = at<float2>(Layout::partial);
#pragma unroll 1
        for (int i = threadIdx.x; i < kROWS * kPAIRS; i += kTEAM_COMPUTE)
        {
            float2 sum = reinterpret_cast<float2 const*>(bias)[i % kPAIRS];
#pragma unroll
            for (int n = 0; n < P::kPARTS_OF_INPUTS; ++n)
            {
                float2 const of = partial[n * kROWS * kPAIRS + i];
                sum.x += of.x;
                sum.y += of.y;
            }
            reinterpret_cast<unsigned*>(out + i / kPAIRS * outPitch)[i % kPAIRS] =
                packPair<T>(activation(sum.x), activation(sum.y));
        }
        computeSync();
    }

    // How the blocks of a team add up their parts of a product. Two buffers where there is one hop: a block may send
    // its next part as soon as it has what it waits for itself.
    static constexpr int kSENT = kTWO_HOPS ? 1 : kROWS;  // rows that a block gets of another

    //! Number of the exchange, of a layer's three.
    __device__ __forceinline__ uint32_t exchange(int ofLayer) const
    {
        return layersSeen * 3 + ofLayer;
    }
    static __device__ __forceinline__ int received(uint32_t exchange)
    {
        return Layout::receive + (kTWO_HOPS ? 0 : exchange % 2) * (kTEAM_BLOCKS * kSENT * kWIDTH * 4);
    }
    static __device__ __forceinline__ int arrived(uint32_t exchange)
    {
        return barrier(kEXCHANGE) + (kTWO_HOPS ? 0 : exchange % 2) * 8;
    }
    //! Whether this block adds up what the others send.
    __device__ __forceinline__ bool adds() const
    {
        return !kTWO_HOPS || rank() < teamRows();
    }

    //! Multiplies rows (their offset and pitch) with the weights, and sends the result to the blocks that add it up.
    template <typename P>
    __device__ __forceinline__ void multiplyAndSend(Weights<P::kUNITS> const& ahead, int rows, int rowsPitch,
                                                    int ofLayer)
    {
        Weights<P::kUNITS> const weights = taken<P>(ahead);
        uint32_t const number = exchange(ofLayer);
        if (threadIdx.x == 0 && adds())
        {
            sm90::barrierArriveExpect(base() + arrived(number), kTEAM_BLOCKS * kSENT * kWIDTH * 4);
        }
        float c[4];
        multiply<T>(c, weights, base() + rows + inRows(rowsPitch));
        // Lane 4 b + q sends columns 4 q to 4 q + 3: of every row to block b, or of row b to its owner.
        int const quarter = lane() % 4;
        int const other = lane() / 4;
        uint32_t const remote = sm90::mapToRank(base(), other);
#pragma unroll
        for (int row = 0; row < kSENT; ++row)
        {
            float value[4];
#pragma unroll
            for (int i = 0; i < 4; ++i)
            {
                int const from = (quarter % 2 * 4 + i) * 4 + (kTWO_HOPS ? other / 2 : 0);
                float low = __shfl_sync(kFULL_WARP, c[row], from);
                float high = __shfl_sync(kFULL_WARP, c[2 + row], from);
                if constexpr (kTWO_HOPS)
                {
                    float const lowOdd = __shfl_sync(kFULL_WARP, c[1], from);
                    float const highOdd = __shfl_sync(kFULL_WARP, c[3], from);
                    low = other % 2 == 0 ? low : lowOdd;
                    high = other % 2 == 0 ? high : highOdd;
                }
                value[i] = quarter < 2 ? low : high;
            }
            if (!kTWO_HOPS || other < teamRows())
            {
                int const place = (rank() * kSENT + row) * kWIDTH + warp() * 16 + quarter * 4;
                sm90::send(remote + received(number) + place * 4,
                           {__float_as_uint(value[0]), __float_as_uint(value[1]), __float_as_uint(value[2]),
                            __float_as_uint(value[3])},
                           remote + arrived(number));
            }
        }
        ring.releaseUsed<P::kSLOTS>();
    }

    //! Adds up what multiplyAndSend has sent, and makes of it the next hidden state: hidden = LayerNorm(hidden + sum +
    //! bias).
    __device__ __forceinline__ void receiveHidden(int ofLayer, float const* bias, T const* norm)
    {
        uint32_t const number = exchange(ofLayer);
        if (adds())
        {
            // Eight warps a row, a column a thread.
            bool const works = warp() < 8 * kSENT;
            int const column = threadIdx.x % kWIDTH;
            T* const hidden = at<T>(Layout::hidden + (kTWO_HOPS ? rank() : warp() / 8) * kPITCH) + column;
            auto* const statistics = at<float2>(Layout::statistics) + warp() / 8 * 8;
            float sum = 0.0F;
            float gamma = 0.0F;
            float beta = 0.0F;
            if (works)
            {
                sum = bias[column] + toFloat(*hidden);
                gamma = toFloat(norm[column]);
                beta = toFloat(norm[kWIDTH + column]);
                sm90::waitForCluster(base() + arrived(number), kTWO_HOPS ? number % 2 : number / 2 % 2);
                float const* const part = at<float>(received(number)) + (kTWO_HOPS ? 0 : warp() / 8 * kWIDTH) + column;
#pragma unroll
                for (int from = 0; from < kTEAM_BLOCKS; ++from)
                {
                    sum += part[from * kSENT * kWIDTH];
                }
                float total = sum;
                float squares = sum * sum;
#pragma unroll
                for (int offset = kWARP_SIZE / 2; offset > 0; offset /= 2)
                {
                    total += __shfl_xor_sync(kFULL_WARP, total, offset);
                    squares += __shfl_xor_sync(kFULL_WARP, squares, offset);
                }
                if (lane() == 0)
                {
                    statistics[warp() % 8] = {total, squares};
                }
            }
            computeSync();
            if (works)
            {
                float total = 0.0F;
                float squares = 0.0F;
#pragma unroll
                for (int i = 0; i < 8; ++i)
                {
                    float2 const part = statistics[i];
                    total += part.x;
                    squares += part.y;
                }
                float const mean = total * p.inverseWidth;
                float const scale = rsqrtf(fmaxf(squares * p.inverseWidth - mean * mean, 0.0F) + p.epsilon);
                T* const to = kTWO_HOPS ? at<T>(Layout::stage) + column : hidden;
                *to = fromFloat<T>((sum - mean) * scale * gamma + beta);
            }
            computeSync();
            if (kTWO_HOPS && warp() < kTEAM_BLOCKS)
            {
                uint32_t const to = sm90::mapToRank(base(), warp());
                sm90::send(to + Layout::hidden + rank() * kPITCH + lane() * 16, at<uint4>(Layout::stage)[lane()],
                           to + barrier(kEXCHANGE + 1));
            }
        }
        if constexpr (kTWO_HOPS)
        {
            if (threadIdx.x == 0)
            {
                sm90::barrierArriveExpect(base() + barrier(kEXCHANGE + 1), teamRows() * kWIDTH * 2);
            }
            sm90::waitForCluster(base() + barrier(kEXCHANGE + 1), number % 2);
        }
    }

    //! The part of a row's cache that a lane copies to its warp's scratch: two pieces of 16 bytes of 16 keys, and of
    //! their values.
    struct Cached
    {
        uint4 keys[2];
        uint4 values[2];
    };

    //! Offset of this lane's first piece in the caches of the row and layer.
    __device__ __forceinline__ size_t inCache(int layer, int row) const
    {
        size_t const index = (static_cast<size_t>(layer) * p.slots + rowOf(row)) * kTEAM_BLOCKS + rank();
        return index * p.capacity * kHEAD + lane() * 8;
    }

    //! Keys `first` to first + 15, as far as they lie before the newest. A hypothesis has those of its ancestors from
    //! their rows' caches, which lie as this row's does.
    __device__ __forceinline__ void load(Cached& cached, size_t cache, int row, int first, int newest) const
    {
#pragma unroll
        for (int i = 0; i < 2; ++i)
        {
            int const key = first + i * 8 + lane() / 4;
            if (key < newest)
            {
                size_t offset = cache + (first + i * 8) * kHEAD;
                if constexpr (kBEAMS)
                {
                    int const behind = __ldg(p.owners + rowOf(row) * p.capacity + key) - rowOf(row);
                    offset += static_cast<ptrdiff_t>(behind) * (kTEAM_BLOCKS * kHEAD) * p.capacity;
                }
                cached.keys[i] = *reinterpret_cast<uint4 const*>(static_cast<T const*>(p.keys) + offset);
                cached.values[i] = *reinterpret_cast<uint4 const*>(static_cast<T const*>(p.values) + offset);
            }
        }
    }

    //! partial and scales of the rows' attention over their own caches, to which the newest keys and values are added.
    //! `cached`: the warp's first 16 keys.
    __device__ __forceinline__ void attendToSelf(int layer, Cached& cached)
    {
        int const row = warp() / kSELF_WARPS;
        int const mine = warp() % kSELF_WARPS * 16;
        if (row >= kROWS || lines()[row] < 0 || mine > positions()[row])
        {
            return;
        }
        int const newest = positions()[row];
        size_t const cache = inCache(layer, row);
        int const scratch = Layout::scratch + warp() * (2 * 16 * kHEAD * 2);
        uint4 const query = sm90::loadShared(base() + Layout::qkv + row * 3 * kHEAD * 2 + lane() % 4 * 16);
        Attention<T> attention;
        attention.begin();
#pragma unroll 1
        for (int first = mine; first <= newest; first += kSELF_WARPS * 16)
        {
            if (first > mine)
            {
                load(cached, cache, row, first, newest);
                __syncwarp();  // the scratch has been read
            }
#pragma unroll
            for (int i = 0; i < 2; ++i)
            {
                if (first + i * 8 + lane() / 4 == newest)
                {
                    // It is not in the cache yet.
                    uint4 const* const from = at<uint4>(Layout::qkv + (row * 3 + 1) * kHEAD * 2) + lane() % 4;
                    cached.keys[i] = from[0];
                    cached.values[i] = from[kHEAD * 2 / 16];
                    size_t const offset = cache + (first + i * 8) * kHEAD;
                    *reinterpret_cast<uint4*>(static_cast<T*>(p.keys) + offset) = cached.keys[i];
                    *reinterpret_cast<uint4*>(static_cast<T*>(p.values) + offset) = cached.values[i];
                }
                at<uint4>(scratch)[i * kWARP_SIZE + lane()] = cached.keys[i];
                at<uint4>(scratch)[(2 + i) * kWARP_SIZE + lane()] = cached.values[i];
            }
            __syncwarp();
            int const count = newest + 1 - first;
            float scores[1][4];
            attention.score(scores[0], query, attention.keysOfLane(base() + scratch), count);
            attention.raise(scores);
            attention.add(scores[0], attention.valuesOfLane(base() + scratch + 16 * attention.kKEY_BYTES), count);
        }
        attention.finish(at<float>(Layout::partial) + warp() * kHEAD, at<float2>(Layout::scales) + warp());
    }

    //! partial and scales of the rows' attention over the keys and values of their lines, which come with the stream.
    //! Eight warps share 128 keys. The other eight have the next 128, or the next row where rows are side by side.
    __device__ __forceinline__ void attendToLines()
    {
        constexpr int kSHARED_KEYS = 8 * 16;
        constexpr int kSTEP = kSIDE_BY_SIDE ? 1 : 2;
        constexpr int kGROUPS = kSIDE_BY_SIDE && sizeof(C) == 1 ? 2 : 3;  // of 16 keys, of a warp at a time
        constexpr int kSPAN = kSTEP * kGROUPS * kSHARED_KEYS;             // whole slots
        static_assert(kSPAN % kCROSS_KEYS == 0);
        int const half = warp() / 8;
        int const firstShare = kSIDE_BY_SIDE ? 0 : half;
        int const firstKey = warp() % 8 * 16;
#pragma unroll 1
        for (int row = 0; row < kROWS; ++row)
        {
            if (lines()[row] < 0)
            {
                continue;
            }
            bool const mine = !kSIDE_BY_SIDE || row == half;
            uint4 const query = sm90::loadShared(base() + Layout::qkv + row * kHEAD * 2 + lane() % 4 * 16);
            Attention<T, C> attention;
            attention.begin();
#pragma unroll 1
            for (int left = p.sourceLength; left > 0; left -= kSPAN)
            {
                if (mine)
                {
                    float scores[kGROUPS][4];
                    uint32_t keys[kGROUPS];
#pragma unroll
                    for (int i = 0; i < kGROUPS; ++i)
                    {
                        int const first = (firstShare + i * kSTEP) * kSHARED_KEYS;
                        scores[i][0] = scores[i][1] = scores[i][2] = scores[i][3] = kNO_SCORE;
                        if (first < left)
                        {
                            keys[i] = ring.wait(first / kCROSS_KEYS) + (first % kCROSS_KEYS + firstKey) * kKEY_BYTES;
                            attention.score(scores[i], query, attention.keysOfLane(keys[i]), left - first - firstKey);
                        }
                    }
                    attention.raise(scores);
#pragma unroll
                    for (int i = 0; i < kGROUPS; ++i)
                    {
                        int const count = left - (firstShare + i * kSTEP) * kSHARED_KEYS - firstKey;
                        if (count > 0)
                        {
                            attention.add(scores[i], attention.valuesOfLane(keys[i] + kSLOT_BYTES / 2), count);
                        }
                    }
                }
                ring.pass(min(kSPAN / kCROSS_KEYS, (left + kCROSS_KEYS - 1) / kCROSS_KEYS));
            }
            if (mine)
            {
                int const part = row * kCROSS_WARPS + warp() % kCROSS_WARPS;
                attention.finish(at<float>(Layout::partial) + part * kHEAD, at<float2>(Layout::scales) + part);
            }
        }
    }

    //! context T [row][32] from what the warps have left in partial and scales, kPARTS of a row; of these `parts`.
    template <int kPARTS>
    __device__ __forceinline__ void mergeContexts(bool self)
    {
        computeSync();
        // A warp a row; half of it takes half of the parts, two elements a lane.
        constexpr int kMINE = kPARTS / 2;
        if (warp() < kROWS && lines()[warp()] >= 0)
        {
            int const pair = lane() % 16;
            int const first = lane() / 16 * kMINE;
            int const parts = self ? min(kPARTS, positions()[warp()] / 16 + 1) : kPARTS;
            float2 const* const scales = at<float2>(Layout::scales) + warp() * kPARTS + first;
            auto const* const contexts = at<float2>(Layout::partial) + (warp() * kPARTS + first) * (kHEAD / 2) + pair;
            float2 scale[kMINE];
            float most = kNO_SCORE;
#pragma unroll
            for (int i = 0; i < kMINE; ++i)
            {
                scale[i] = first + i < parts ? scales[i] : float2{kNO_SCORE, 0.0F};
                most = fmaxf(most, scale[i].x);
            }
            most = fmaxf(most, __shfl_xor_sync(kFULL_WARP, most, 16));
            float total = 0.0F;
            float2 sum{};
#pragma unroll
            for (int i = 0; i < kMINE; ++i)
            {
                float const factor = exp2Approx(scale[i].x - most);
                float2 const c = first + i < parts ? contexts[i * (kHEAD / 2)] : float2{};
                total += factor * scale[i].y;
                sum.x += factor * c.x;
                sum.y += factor * c.y;
            }
            total += __shfl_xor_sync(kFULL_WARP, total, 16);
            sum.x += __shfl_xor_sync(kFULL_WARP, sum.x, 16);
            sum.y += __shfl_xor_sync(kFULL_WARP, sum.y, 16);
            float const inverse = 1.0F / total;
            if (lane() < 16)
            {
                at<unsigned>(Layout::context + warp() * kCONTEXT_PITCH)[pair] =
                    packPair<T>(sum.x * inverse, sum.y * inverse);
            }
        }
        computeSync();
    }

    __device__ __forceinline__ void decodeLayers()
    {
        auto const identity = [](float x) { return x; };
        int const selfRow = warp() / kSELF_WARPS;
        Weights<Qkv::kUNITS> qkv = takeAhead<Qkv>();
#pragma unroll 1
        for (int layer = 0; layer < p.layers; ++layer, ++layersSeen)
        {
            Cached cached{};
            if (selfRow < kROWS)
            {
                // On its way while the query is computed.
                load(cached, inCache(layer, selfRow), selfRow, warp() % kSELF_WARPS * 16, positions()[selfRow]);
            }
            int const buffer = layersSeen % 2;
            sm90::barrierWait(base() + barrier(kCONSTANTS_FULL) + buffer * 8, layersSeen / 2 % 2);
            float const* const constants = at<float>(Layout::constants + buffer * kCONSTANT_BYTES);
            float const* const outBias = constants + 4 * kHEAD + kINNER;
            auto const* const norms = reinterpret_cast<T const*>(outBias + 3 * kWIDTH);

            // Every product's weights are taken from the stream one step before it.
            multiplyHidden<Qkv>(qkv);
            Weights<Out::kUNITS> out = takeAhead<Out>();
            addParts<Qkv>(constants, at<T>(Layout::qkv), 3 * kHEAD, identity);
            attendToSelf(layer, cached);
            mergeContexts<kSELF_WARPS>(true);
            multiplyAndSend<Out>(out, Layout::context, kCONTEXT_PITCH, 0);
            Weights<Query::kUNITS> const query = takeAhead<Query>();
            receiveHidden(0, outBias, norms);

            multiplyHidden<Query>(query);
            addParts<Query>(constants + 3 * kHEAD, at<T>(Layout::qkv), kHEAD, identity);
            attendToLines();
            out = takeAhead<Out>();
            mergeContexts<kCROSS_WARPS>(false);
            multiplyAndSend<Out>(out, Layout::context, kCONTEXT_PITCH, 1);
            Weights<Inner::kUNITS> const inner = takeAhead<Inner>();
            receiveHidden(1, outBias + kWIDTH, norms + 2 * kWIDTH);

            multiplyHidden<Inner>(inner);
            Weights<InnerOut::kUNITS> const innerOut = takeAhead<InnerOut>();
            addParts<Inner>(constants + 4 * kHEAD, at<T>(Layout::inner), kINNER_PITCH / 2,
                            [&](float x) { return p.gelu ? gelu(x) : fmaxf(x, 0.0F); });
            multiplyAndSend<InnerOut>(innerOut, Layout::inner, kINNER_PITCH, 2);
            qkv = layer + 1 < p.layers ? takeAhead<Qkv>() : Weights<Qkv::kUNITS>{};
            receiveHidden(2, outBias + 2 * kWIDTH, norms + 4 * kWIDTH);
            // The exchange ended with a barrier. A warp that has none of the weights that have just been asked for.
            static_assert((kTEAM_WARPS - 1) / Qkv::kPARTS_OF_INPUTS * 16 >= Qkv::kOUTPUTS);
            if (threadIdx.x == kTEAM_COMPUTE - kWARP_SIZE)
            {
                sm90::barrierArrive(base() + barrier(kCONSTANTS_EMPTY) + buffer * 8);
            }
        }
    }

    // ---- the lane that fetches ----

    //! All that the layers and the head of one token need. works: the team has lines.
    __device__ __forceinline__ void fetchToken(bool works, sm90::CachePolicies const& policies)
    {
        int const head = min(rank(), p.heads - 1);  // of padding: any, its output is multiplied by zeros
        auto const startOf = [&](int line)
        { return (static_cast<size_t>(line) * p.heads + head) * p.sourceLength * kKEY_BYTES; };
#pragma unroll 1
        for (int layer = 0; works && layer < p.layers; ++layer, ++layersSeen)
        {
            uint32_t const buffer = layersSeen % 2;
            int const piece = layer * kTEAM_BLOCKS + rank();
            sm90::barrierWait(base() + barrier(kCONSTANTS_EMPTY) + buffer * 8, layersSeen / 2 % 2 ^ 1);
            uint32_t const full = base() + barrier(kCONSTANTS_FULL) + buffer * 8;
            sm90::barrierArriveExpect(full, kCONSTANT_BYTES);
            sm90::copyBulk(base() + Layout::constants + buffer * kCONSTANT_BYTES,
                           p.constants + static_cast<size_t>(piece) * kCONSTANT_BYTES, kCONSTANT_BYTES, full,
                           policies.keep);

            constexpr int kBEFORE = kQKV_SLOTS + kOUT_SLOTS + kQUERY_SLOTS;
            uint8_t const* const weights = p.weights + static_cast<size_t>(piece) * kLAYER_SLOTS * kSLOT_BYTES;
            ring.fetch(weights, kBEFORE, policies.keep);
#pragma unroll 1
            for (int row = 0; row < kROWS; ++row)
            {
                int const line = lines()[row];
                size_t const start = startOf(line);
                auto const* const keys = static_cast<uint8_t const*>(p.crossKeys[layer]) + start;
                auto const* const values = static_cast<uint8_t const*>(p.crossValues[layer]) + start;
#pragma unroll 1
                for (int first = 0; line >= 0 && first < p.sourceLength; first += kCROSS_KEYS, ++ring.next)
                {
                    uint32_t const bytes = min(kCROSS_KEYS, p.sourceLength - first) * kKEY_BYTES;
                    uint32_t const to = ring.open(2 * bytes);
                    sm90::copyBulk(to, keys + first * kKEY_BYTES, bytes, ring.fullBarrier(ring.next), policies.drop);
                    sm90::copyBulk(to + kSLOT_BYTES / 2, values + first * kKEY_BYTES, bytes,
                                   ring.fullBarrier(ring.next), policies.drop);
                }
            }
            ring.fetch(weights + kBEFORE * kSLOT_BYTES, kLAYER_SLOTS - kBEFORE, policies.keep);
        }
#pragma unroll 1
        for (int i = Layout::kKEPT; pieceOf(i) < headPieces(); ++i)
        {
            ring.fetch(headPiece(pieceOf(i)), 1, policies.keep);
        }
    }

    // The head's pieces, of kHEAD_TOKENS tokens and a slot's size: block i has number i and every gridDim.x-th from
    // there; or, behind those of the blocks without rows, every one that follows by the number of the teams' blocks.
    // The first few stay in shared memory, the others come with the stream.

    __device__ __forceinline__ int headPieces() const
    {
        return (p.vocabulary + kHEAD_TOKENS - 1) / kHEAD_TOKENS;
    }
    __device__ __forceinline__ uint8_t const* headPiece(int piece) const
    {
        return p.head + static_cast<size_t>(piece) * kSLOT_BYTES;
    }
    //! The i-th of this block.
    __device__ __forceinline__ int pieceOf(int i) const
    {
        if constexpr (kUNEVEN)
        {
            return p.teamsPiece + blockIdx.x + i * (p.teams * kTEAM_BLOCKS);
        }
        return blockIdx.x + i * gridDim.x;
    }

    __device__ __forceinline__ void fetchKept(sm90::CachePolicies const& policies) const
    {
#pragma unroll 1
        for (int i = 0; i < Layout::kKEPT && pieceOf(i) < headPieces(); ++i)
        {
            uint32_t const full = base() + barrier(kKEPT_FULL) + i * 8;
            sm90::barrierArriveExpect(full, kSLOT_BYTES);
            sm90::copyBulk(base() + Layout::kept + i * kSLOT_BYTES, headPiece(pieceOf(i)), kSLOT_BYTES, full,
                           policies.drop);
        }
    }

    __device__ __forceinline__ void produce()
    {
        sm90::CachePolicies const policies = sm90::CachePolicies::make();
        fetchKept(policies);
        uint32_t parity = 0;
#pragma unroll 1
        while (true)
        {
            sm90::barrierWait(base() + barrier(kDECIDED), parity);
            parity ^= 1;
            if (*static_cast<int volatile*>(allEnded()) != 0)
            {
                return;
            }
            bool const works = anyLine();
            sm90::barrierArrive(base() + barrier(kANSWERED));
            fetchToken(works, policies);
        }
    }

    // ---- the head ----

    //! Waits for the hidden states of all rows, to an offset. False: all lines have ended.
    __device__ __forceinline__ bool awaitHidden(int rows)
    {
        constexpr int kMINE = Layout::kHEAD_ROWS / kTEAM_WARPS;
        unsigned const token = *number();
        ulonglong2 words[kMINE][2]{};
        bool areThere = false;
        while (!__all_sync(kFULL_WARP, areThere))
        {
            areThere = true;
#pragma unroll
            for (int i = 0; i < kMINE; ++i)
            {
                int const row = i * kTEAM_WARPS + warp();
                if (row < p.slots)
                {
                    words[i][0] = sm90::readPublished(p.hidden + row * (kWIDTH / 4) + lane());
                    words[i][1] = sm90::readPublished(p.hidden + row * (kWIDTH / 4) + kWARP_SIZE + lane());
                }
            }
#pragma unroll
            for (int i = 0; i < kMINE; ++i)
            {
                bool const mine = i * kTEAM_WARPS + warp() < p.slots;
#pragma unroll
                for (int half = 0; half < 2; ++half)
                {
                    areThere =
                        areThere &&
                        (!mine || (isMarked(words[i][half].x >> 32, token) && isMarked(words[i][half].y >> 32, token)));
                }
            }
        }
        bool works = false;
#pragma unroll
        for (int i = 0; i < kMINE; ++i)
        {
            int const row = i * kTEAM_WARPS + warp();
            if (row < p.slots)
            {
                works = works || (words[i][0].x >> 32 & kIDLE) == 0;
                at<uint4>(rows + row * kPITCH)[lane()] = {
                    static_cast<unsigned>(words[i][0].x), static_cast<unsigned>(words[i][0].y),
                    static_cast<unsigned>(words[i][1].x), static_cast<unsigned>(words[i][1].y)};
            }
        }
        return computeAny(works);
    }

    //! Every row's best token among this block's share of the vocabulary, to p.choices; or all logits, to p.logits. A
    //! warp takes 16 tokens of a slot for eight rows, which it keeps in registers; where there are few rows, several
    //! slots are worked on at once.
    __device__ __forceinline__ void chooseTokens()
    {
        // Powers of two all, and no division by what the compiler does not know to be one.
        int const logGroups = p.slots <= 8 ? 0 : p.slots <= 16 ? 1 : p.slots <= 32 ? 2 : 3;  // of rows
        int const logParts = 4 - logGroups;
        int const parts = 1 << logParts;  // warps of a row
        int const turns = parts / 2;      // slots at once
        int const firstRow = (warp() / 2 & ((1 << logGroups) - 1)) * 8;
        int const part = (warp() / 2 >> logGroups) * 2 + warp() % 2;
        uint4 x[kWIDTH / 32];  // rows behind the last hold anything, and have no part in the others
        uint32_t const row = base() + Layout::headRows + (firstRow + lane() / 4) * kPITCH + lane() % 4 * 16;
#pragma unroll
        for (int chunk = 0; chunk < kWIDTH / 32; ++chunk)
        {
            x[chunk] = sm90::loadShared(row + chunk * 64);
        }
        Choice best[2] = {{kNO_SCORE, 0, 0.0F}, {kNO_SCORE, 0, 0.0F}};
        // All warps wait for all slots, so that none runs ahead of a round.
#pragma unroll 1
        for (int i = 0; pieceOf(i) < headPieces(); ++i)
        {
            bool const streamed = i >= Layout::kKEPT;
            uint32_t weights = base() + Layout::kept + i * kSLOT_BYTES;
            if (streamed)
            {
                weights = ring.wait(0);
            }
            else
            {
                sm90::barrierWait(base() + barrier(kKEPT_FULL) + i * 8, 0);  // filled once
            }
            if ((i & (turns - 1)) == part / 2)
            {
                weights += warp() % 2 * (kWIDTH / 32 * kUNIT_BYTES) + lane() * 16;
                float c[4] = {};
                float odd[4] = {};  // a chain of its own, half as long
#pragma unroll
                for (int chunk = 0; chunk < kWIDTH / 32; ++chunk)
                {
                    uint4 const first = sm90::loadShared(weights + chunk * kUNIT_BYTES);
                    uint4 const second = sm90::loadShared(weights + chunk * kUNIT_BYTES + kUNIT_BYTES / 2);
                    multiplyAdd<T>(c, {first.x, first.y, first.z, first.w}, x[chunk].x, x[chunk].y);
                    multiplyAdd<T>(odd, {second.x, second.y, second.z, second.w}, x[chunk].z, x[chunk].w);
                }
#pragma unroll
                for (int half = 0; half < 2; ++half)
                {
                    int const token = pieceOf(i) * kHEAD_TOKENS + warp() % 2 * 16 + half * 8 + lane() / 4;
                    if constexpr (kBEAMS)
                    {
#pragma unroll
                        for (int e = 0; e < 2; ++e)
                        {
                            int const mine = firstRow + lane() % 4 * 2 + e;
                            if (token < p.vocabulary && mine < p.slots)
                            {
                                p.logits[static_cast<size_t>(mine) * p.vocabulary + token] =
                                    c[2 * half + e] + odd[2 * half + e];
                            }
                        }
                    }
                    else if (token < p.vocabulary)
                    {
                        best[0].take(c[2 * half] + odd[2 * half], token);
                        best[1].take(c[2 * half + 1] + odd[2 * half + 1], token);
                    }
                }
            }
            if (streamed)
            {
                ring.release<1>();
            }
        }
        if constexpr (!kBEAMS)
        {
            publishChoices(best, firstRow, part, logParts);
        }
    }

    //! Each row's best token of the block from those of its warps: this one's rows are lane % 4 * 2 and the next from
    //! `firstRow`, and it is number `part` of 2^logParts.
    __device__ __forceinline__ void publishChoices(Choice (&best)[2], int firstRow, int part, int logParts)
    {
        int const parts = 1 << logParts;
        auto* const choices = at<Choice>(Layout::headChoices);  // [row][part]
#pragma unroll
        for (int e = 0; e < 2; ++e)
        {
            best[e].reduce(4, kWARP_SIZE);
            if (lane() < 4)
            {
                choices[(firstRow + lane() * 2 + e) * parts + part] = best[e];
            }
        }
        computeSync();
        // A lane a part; a warp takes as many rows at once as it has lanes for.
        int const step = kWARP_SIZE >> logParts;
#pragma unroll 1
        for (int first = warp() * step; first < p.slots; first += kTEAM_WARPS * step)
        {
            Choice choice = choices[first * parts + lane()];
            choice.reduce(1, parts);
            int const mine = first + (lane() >> logParts);
            if ((lane() & (parts - 1)) == 0 && mine < p.slots)
            {
                publishChoice(choice, mine);
            }
        }
        computeSync();
    }

    __device__ __forceinline__ void publishChoice(Choice const& choice, int row)
    {
        sm90::publish(p.choices + row * gridDim.x + blockIdx.x, {withMark(__float_as_uint(choice.best), choice.token),
                                                                 withMark(__float_as_uint(choice.total), *number())});
    }

    //! Reads the head's part of the stream without a use for it.
    __device__ __forceinline__ void drain()
    {
#pragma unroll 1
        for (int i = Layout::kKEPT; pieceOf(i) < headPieces(); ++i)
        {
            ring.wait(0);
            ring.release<1>();
        }
    }

    // ---- a block without rows, beside teams of one row ----
    //
    // It has `idlePieces` pieces of the head, a warp every kTEAM_WARPS-th half of one: the first in registers, the
    // others in shared memory, all from the first token to the last.

    static constexpr int kTILE_BYTES = kSLOT_BYTES / 2;  // half of a piece, 16 tokens

    __device__ __forceinline__ int firstIdlePiece() const
    {
        return (blockIdx.x - p.teams * kTEAM_BLOCKS) * p.idlePieces;
    }
    //! How many there are of it; the last blocks may have none.
    __device__ __forceinline__ int idlePieces() const
    {
        return max(min(p.idlePieces, headPieces() - firstIdlePiece()), 0);
    }

    //! The lane that fetches: once.
    __device__ __forceinline__ void fetchIdle() const
    {
        sm90::CachePolicies const policies = sm90::CachePolicies::make();
        int const inShared = max(idlePieces() - HeadLayout::kREGISTER_PIECES, 0);
        uint8_t const* const from = headPiece(firstIdlePiece() + HeadLayout::kREGISTER_PIECES);
        uint32_t const full = base() + barrier(kKEPT_FULL);
        sm90::barrierArriveExpect(full, inShared * kSLOT_BYTES);
#pragma unroll 1
        for (int i = 0; i < inShared; ++i)
        {
            sm90::copyBulk(base() + HeadLayout::pieces + i * kSLOT_BYTES, from + i * kSLOT_BYTES, kSLOT_BYTES, full,
                           policies.drop);
        }
    }

    //! The warps that compute. A tile's logits for eight rows, of which this lane has two.
    __device__ __forceinline__ void takeTile(Choice (&best)[2], float const (&logits)[4], int tile) const
    {
#pragma unroll
        for (int half = 0; half < 2; ++half)
        {
            int const token = firstIdlePiece() * kHEAD_TOKENS + tile * 16 + half * 8 + lane() / 4;
            if (token < p.vocabulary)
            {
                best[0].take(logits[2 * half], token);
                best[1].take(logits[2 * half + 1], token);
            }
        }
    }

    __device__ __forceinline__ void chooseIdle()
    {
        static_assert(kMAX_TEAMS <= kTEAM_WARPS && kTEAM_WARPS <= kWARP_SIZE);
        static_assert(HeadLayout::kPIECES <= 3 * HeadLayout::kREGISTER_PIECES);  // three tiles a warp
        int const tiles = 2 * idlePieces();
        Weights<kWIDTH / 32> mine{};
        if (warp() < tiles)
        {
            mine.load(headPiece(firstIdlePiece()) + warp() * kTILE_BYTES + lane() * 16);
        }
        sm90::barrierWait(base() + barrier(kKEPT_FULL), 0);
        auto* const choices = at<Choice>(HeadLayout::choices);  // [row][warp]
#pragma unroll 1
        while (true)
        {
            if (threadIdx.x == 0)
            {
                ++*number();
            }
            computeSync();
            if (!awaitHidden(HeadLayout::rows))
            {
                return;
            }
#pragma unroll 1
            for (int firstRow = 0; firstRow < p.slots; firstRow += 8)
            {
                Choice best[2] = {{kNO_SCORE, 0, 0.0F}, {kNO_SCORE, 0, 0.0F}};
                // Columns behind the last row repeat it: what lanes read alike is read once.
                uint32_t const row =
                    base() + HeadLayout::rows + min(firstRow + lane() / 4, p.slots - 1) * kPITCH + lane() % 4 * 16;
                uint32_t const shared = base() + HeadLayout::pieces + warp() * kTILE_BYTES + lane() * 16;
                float logits[4];
                if (kTEAM_WARPS + warp() < tiles)
                {
                    float second[4];
                    multiplyShared<T, true>(logits, second, mine, shared, row);
                    takeTile(best, logits, warp());
                    takeTile(best, second, kTEAM_WARPS + warp());
                }
                else if (warp() < tiles)
                {
                    multiply<T>(logits, mine, row);
                    takeTile(best, logits, warp());
                }
                if (2 * kTEAM_WARPS + warp() < tiles)
                {
                    float unused[4];
                    multiplyShared<T, false>(unused, logits, mine, shared + kTEAM_WARPS * kTILE_BYTES, row);
                    takeTile(best, logits, 2 * kTEAM_WARPS + warp());
                }
                reduceColumns(best);
                if (lane() < 4)
                {
                    choices[(firstRow + lane() * 2) * kTEAM_WARPS + warp()] = best[0];
                    choices[(firstRow + lane() * 2 + 1) * kTEAM_WARPS + warp()] = best[1];
                }
            }
            computeSync();
            if (warp() < p.slots)  // a warp a row
            {
                Choice choice{kNO_SCORE, 0x7fffffff, 0.0F};
                if (lane() < kTEAM_WARPS)
                {
                    choice = choices[warp() * kTEAM_WARPS + lane()];
                }
                choice.reduceWarp();
                choice.addTotals<kTEAM_WARPS>();
                if (lane() == 0)
                {
                    publishChoice(choice, warp());
                }
            }
            computeSync();
        }
    }

    // ---- from token to token ----

    //! A warp's row: hidden = LayerNorm(scale * embedding of its token + its position's).
    __device__ __forceinline__ void embed(int input)
    {
        auto const piece = [&](void const* of, int row)
        { return __ldg(static_cast<uint4 const*>(of) + static_cast<size_t>(row) * (kWIDTH / 8) + lane()); };
        uint4 const tokenBits = piece(p.embedding, input);
        uint4 const placeBits = piece(p.positions, positions()[warp()]);
        uint4 gammaBits{};
        uint4 betaBits{};
        if (p.embeddingNorm != nullptr)
        {
            gammaBits = piece(p.embeddingNorm, 0);
            betaBits = piece(p.embeddingNorm, 1);
        }
        Pack<T> row = Pack<T>::fromBits(tokenBits);
        Pack<T> const place = Pack<T>::fromBits(placeBits);
        float total = 0.0F;
#pragma unroll
        for (int i = 0; i < 8; ++i)
        {
            row.values[i] = row.values[i] * p.embedScale + place.values[i];
            total += row.values[i];
        }
        if (p.embeddingNorm != nullptr)
        {
            float const mean = groupSum(total) * p.inverseWidth;
            float squares = 0.0F;
#pragma unroll
            for (int i = 0; i < 8; ++i)
            {
                float const distance = row.values[i] - mean;
                squares += distance * distance;
            }
            squares = lane() < p.heads * (kHEAD / 8) ? squares : 0.0F;  // not of padding
            float const scale = rsqrtf(groupSum(squares) * p.inverseWidth + p.epsilon);
            Pack<T> const gamma = Pack<T>::fromBits(gammaBits);
            Pack<T> const beta = Pack<T>::fromBits(betaBits);
#pragma unroll
            for (int i = 0; i < 8; ++i)
            {
                row.values[i] = (row.values[i] - mean) * scale * gamma.values[i] + beta.values[i];
            }
        }
        at<uint4>(Layout::hidden + warp() * kPITCH)[lane()] = row.toBits();
    }

    //! Waits for the choices of all blocks for the warp's row, and returns the best.
    __device__ __forceinline__ Choice awaitChoices() const
    {
        constexpr int kMINE = kMAX_BLOCKS / kWARP_SIZE;
        sm90::Quad const* const from = p.choices + rowOf(warp()) * gridDim.x;
        unsigned const token = *number();
        Choice of[kMINE];
        bool areThere = false;
        while (!__all_sync(kFULL_WARP, areThere))
        {
            areThere = true;
#pragma unroll
            for (int i = 0; i < kMINE; ++i)
            {
                unsigned const block = i * kWARP_SIZE + lane();
                of[i] = {kNO_SCORE, 0, 0.0F};
                if (block < gridDim.x)
                {
                    sm90::Quad const quad = sm90::readPublished(from + block);
                    of[i] = {__uint_as_float(quad.low), static_cast<int>(quad.low >> 32), __uint_as_float(quad.high)};
                    areThere = areThere && isMarked(quad.high >> 32, token);
                }
            }
        }
        // The best of all first: what is added up then needs one exponential, and no order.
        Choice choice{of[0].best, of[0].token, 0.0F};
#pragma unroll
        for (int i = 1; i < kMINE; ++i)
        {
            // Of equals the lowest token, which need not be the first block's.
            bool const better = of[i].best > choice.best || (of[i].best == choice.best && of[i].token < choice.token);
            choice.token = better ? of[i].token : choice.token;
            choice.best = fmaxf(choice.best, of[i].best);
        }
#pragma unroll
        for (int i = 0; i < kMINE; ++i)
        {
            choice.total += of[i].total * exp2Approx((of[i].best - choice.best) * kLOG2_E);
        }
        if constexpr (kUNEVEN)
        {
            choice.reduceWarp();
            choice.addTotals<kWARP_SIZE>();
        }
        else
        {
            choice.reduce(1, kWARP_SIZE);
        }
        return choice;
    }

    //! Ends the token of the warp's row. Returns what the row goes on with; -1: its line
    //! has ended.
    __device__ __forceinline__ int endToken(Choice const& choice, int line, float& logProb)
    {
        int const position = positions()[warp()];
        bool const ends = lane() < p.ends && choice.token == p.endIds[min(lane(), kMAX_END_IDS - 1)];
        bool const ended = __any_sync(kFULL_WARP, ends) || position + 1 == p.maxNewTokens;
        logProb -= logf(choice.total);  // the chosen token's own exponent is 0
        if (rank() == 0)
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
        return ended ? -1 : choice.token;
    }

    //! Rows whose line has ended take the next lines. Rank 0 counts them, and tells the team.
    __device__ __forceinline__ void takeLines()
    {
        bool any = false;
#pragma unroll
        for (int row = 0; row < kROWS; ++row)
        {
            any = any || endedRows()[row] != 0;
        }
        if (!any)
        {
            return;
        }
        if (threadIdx.x == 0)
        {
            sm90::barrierArriveExpect(base() + barrier(kLINES), kROWS * 4);
        }
        if (rank() == 0 && warp() == 0 && lane() < kROWS)
        {
            int line = lines()[lane()];
            if (endedRows()[lane()] != 0)
            {
                int const next = p.slots + atomicAdd(&p.counters->taken, 1);
                line = next < p.lines ? next : -1;
            }
#pragma unroll 1
            for (int other = 0; other < kTEAM_BLOCKS; ++other)
            {
                uint32_t const to = sm90::mapToRank(base(), other);
                sm90::send(to + Layout::state + (3 * kMAX_ROWS + lane()) * 4, __int_as_float(line),
                           to + barrier(kLINES));
            }
        }
        sm90::waitForCluster(base() + barrier(kLINES), *linesTaken() % 2);
        if (warp() == 0 && lane() < kROWS)
        {
            lines()[lane()] = nextLines()[lane()];
        }
        computeSync();
        if (threadIdx.x == 0)
        {
            ++*linesTaken();
        }
    }

    //! A token's way from its embedding to the hidden states that the head multiplies, which are published.
    __device__ __forceinline__ void decodeHidden()
    {
        bool const works = anyLine();
        if (threadIdx.x == 0)
        {
            tellFetcher(false);
            ++*number();
        }
        if (warp() < kROWS && lines()[warp()] >= 0)
        {
            embed(inputs()[warp()]);
        }
        computeSync();
        if (works)
        {
            decodeLayers();
        }
        if (rank() == 0 && warp() < teamRows())
        {
            unsigned const mark = lines()[warp()] < 0 ? *number() | kIDLE : *number() & ~kIDLE;
            uint4 const bits = at<uint4>(Layout::hidden + warp() * kPITCH)[lane()];
            ulonglong2* const to = p.hidden + rowOf(warp()) * (kWIDTH / 4) + lane();
            sm90::publish(to, withMark(bits.x, mark), withMark(bits.y, mark));
            sm90::publish(to + kWARP_SIZE, withMark(bits.z, mark), withMark(bits.w, mark));
        }
    }

    //! One thread: the lane that fetches goes on, or leaves. It has to have seen the decision before: a barrier has two
    //! phases, and a lane with nothing to fetch, for which nobody waits otherwise, could miss both.
    __device__ __forceinline__ void tellFetcher(bool ended)
    {
        sm90::barrierWait(base() + barrier(kANSWERED), *decisions() % 2 ^ 1);
        ++*decisions();
        *allEnded() = ended;
        sm90::barrierArrive(base() + barrier(kDECIDED));
    }

    //! Lets the lane that fetches leave.
    __device__ __forceinline__ void endFetching()
    {
        if (threadIdx.x == 0)
        {
            tellFetcher(true);
        }
    }

    //! The warps that compute, in a step of a beam search.
    __device__ __forceinline__ void computeStep()
    {
        if (warp() == 0 && lane() < kMAX_ROWS)
        {
            RowState const state = lane() < teamRows() ? p.beams[rowOf(lane())] : RowState{-1, 0};
            lines()[lane()] = state.line;
            positions()[lane()] = state.line >= 0 ? state.position : 0;
            inputs()[lane()] = state.line >= 0 ? p.inputs[rowOf(lane())] : p.startId;
        }
        if (threadIdx.x == 0)
        {
            *number() = p.counters->tokens;
            *decisions() = 0;
        }
        computeSync();
        decodeHidden();
        awaitHidden(Layout::headRows);
        chooseTokens();
        endFetching();
    }

    //! The warps that compute, in a greedy search.
    __device__ __forceinline__ void compute()
    {
        if (warp() == 0 && lane() < kMAX_ROWS)
        {
            int const row = rowOf(lane());
            lines()[lane()] = lane() < teamRows() && row < p.lines ? row : -1;
            positions()[lane()] = 0;
            inputs()[lane()] = p.startId;
            logProbs()[lane()] = 0.0F;
        }
        if (threadIdx.x == 0)
        {
            *number() = p.counters->tokens;
            *linesTaken() = 0;
            *decisions() = 0;
        }
        computeSync();
        if (kUNEVEN && teamRows() == 0)
        {
            chooseIdle();
            return;
        }
#pragma unroll 1
        while (true)
        {
            decodeHidden();
            if (!awaitHidden(Layout::headRows))
            {
                endFetching();
                drain();
                return;
            }
            chooseTokens();
            if (warp() < kROWS)
            {
                int const line = lines()[warp()];
                bool ended = false;
                Choice choice{};
                // Rank 0 waits without a line too: its next word must not come before all have read this one. The
                // others do not: of an idle team, the next choices would not wait for them.
                if (line >= 0 || (rank() == 0 && warp() < teamRows()))
                {
                    choice = awaitChoices();
                }
                if (line >= 0)
                {
                    float logProb = logProbs()[warp()];
                    int const input = endToken(choice, line, logProb);
                    ended = input < 0;
                    if (lane() == 0)
                    {
                        positions()[warp()] = ended ? 0 : positions()[warp()] + 1;
                        lines()[warp()] = ended ? -1 : line;
                        inputs()[warp()] = ended ? p.startId : input;
                        logProbs()[warp()] = ended ? 0.0F : logProb;
                    }
                }
                if (lane() == 0)
                {
                    endedRows()[warp()] = ended;
                }
            }
            computeSync();
            if (p.lines > p.slots)
            {
                takeLines();
            }
        }
    }
};

//! Decodes all lines. Blocks 8 i to 8 i + 7 are a cluster and, while there are rows for it, a team; the rest take part
//! in the head. All blocks must run at once. kBEAMS: one step of a beam search, and no choice.
template <typename T, typename C, int kROWS, bool kBEAMS>
__global__ void __launch_bounds__(kTEAM_THREADS, 1) decodeInTeams(__grid_constant__ TeamParams const p)
{
    Block<T, C, kROWS, kBEAMS> block{p};
    if (threadIdx.x == 0)
    {
        for (int slot = 0; slot < kRING; ++slot)
        {
            sm90::barrierInit(block.ring.fullBarrier(slot), 1);
            sm90::barrierInit(block.ring.emptyBarrier(slot), kTEAM_WARPS);
        }
        for (int i = 0; i < block.kBARRIERS; ++i)
        {
            sm90::barrierInit(block.base() + block.barrier(i), 1);
        }
        *block.allEnded() = 0;
        sm90::barrierInitFence();
    }
    sm90::clusterSync();  // every block of the cluster runs, and its barriers are there
    if (threadIdx.x < kTEAM_COMPUTE)
    {
        sm90::growRegisters<kCOMPUTE_REGISTERS>();
        if constexpr (kBEAMS)
        {
            block.computeStep();
        }
        else
        {
            block.compute();
        }
        if (threadIdx.x == 0 && atomicAdd(&p.counters->left, 1) + 1 == static_cast<int>(gridDim.x))
        {
            *p.counters = {0, 0, *block.number()};
        }
    }
    else
    {
        sm90::shrinkRegisters<kFETCH_REGISTERS>();
        if (threadIdx.x == kTEAM_COMPUTE)
        {
            if (block.kUNEVEN && block.teamRows() == 0)
            {
                block.fetchIdle();
            }
            else
            {
                block.produce();
            }
        }
    }
}

}  // namespace trocr::decoder
