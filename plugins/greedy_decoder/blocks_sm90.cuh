#pragma once

// The pieces that the kernels of a decoder step share. Every kernel begins with the LayerNorm of the sums that the one
// before left, and ends by adding its product to the next sums.

#include <cstdint>

#include "common/device.cuh"
#include "common/mma.cuh"
#include "common/sm90.cuh"

namespace trocr::greedy
{

constexpr int kTHREADS = 256;
constexpr int kWARPS = kTHREADS / kWARP_SIZE;
constexpr int kROWS = 16;      //!< rows of a pass: those of one tensor-core tile
constexpr int kCHUNK = 32;     //!< inputs of a product that a lane reads with one 16-byte access (4 lanes a row)
constexpr int kMAX_WIDTH = 1024;
constexpr float kNO_SCORE = -1e30F; //!< below every score; finite, so that differences of two are 0

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
    int rows;               //!< slots
    int width;              //!< D
    SumPair const* input;   //!< [rows, D / 2], complete when the kernel before has ended
    SumPair* output;        //!< [rows, D / 2], zero
    SumPair* cleared;       //!< [rows, D / 2], set to zero for the next kernel
    void const* norm;       //!< T [2, D], gamma and beta; nullptr: the input is taken as it is
    float epsilon;
    int const* lines;       //!< [rows], the line a row works on; -1: idle
    int const* positions;   //!< [rows], of the row's newest token
    int const* remaining;   //!< lines not yet ended; 0: nothing is left to do
};

//! A pass's rows: each warp has the state of row `lane` in its lane.
struct Pass
{
    int first;       //!< of kROWS rows
    int count;       //!< rows in it, at most kROWS
    int line;        //!< of row first + lane, or -1
    int position;    //!< likewise
    unsigned active; //!< bit i: row first + i has a line

    __device__ __forceinline__ static Pass load(Link const& link, int first)
    {
        int const lane = threadIdx.x % kWARP_SIZE;
        Pass pass{first, min(kROWS, link.rows - first), -1, 0, 0};
        if (lane < pass.count)
        {
            pass.line = __ldcg(link.lines + first + lane);
            pass.position = __ldcg(link.positions + first + lane);
        }
        pass.active = __ballot_sync(kFULL_WARP, pass.line >= 0);
        return pass;
    }

    __device__ __forceinline__ bool isActive(int row) const
    {
        return (active >> row & 1) != 0;
    }

    __device__ __forceinline__ int lineOf(int row) const
    {
        return __shfl_sync(kFULL_WARP, line, row);
    }

    __device__ __forceinline__ int positionOf(int row) const
    {
        return __shfl_sync(kFULL_WARP, position, row);
    }
};

//! Distance of two rows of `width` elements in shared memory: 64 bytes behind a multiple of 128, so that the eight lanes
//! of a phase, two rows of 64 bytes, meet no bank twice.
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
    for (int i = block * kTHREADS + threadIdx.x; i < pairs; i += blocks * kTHREADS)
    {
        link.cleared[i] = 0;
    }
}

//! hidden [count, pitch] = LayerNorm(input) of rows first to first + count, a warp a row. `norm` is gamma and beta in
//! shared memory; nullptr: only rounded.
template <typename T>
__device__ __forceinline__ void normRows(Link const& link, int first, int count, T const* norm, T* hidden, int pitch)
{
    constexpr int kPAIRS = kMAX_WIDTH / 2 / kWARP_SIZE;
    int const warp = threadIdx.x / kWARP_SIZE;
    int const lane = threadIdx.x % kWARP_SIZE;
    int const pairs = link.width / 2;
    for (int row = warp; row < count; row += kWARPS)
    {
        auto const* const words = reinterpret_cast<int2 const*>(link.input) + static_cast<size_t>(first + row) * pairs;
        int2 raw[kPAIRS];
#pragma unroll
        for (int i = 0; i < kPAIRS; ++i)
        {
            int const pair = i * kWARP_SIZE + lane;
            raw[i] = pair < pairs ? __ldcg(words + pair) : int2{0, 0};
        }
        float2 values[kPAIRS];
        float sum = 0.0F;
#pragma unroll
        for (int i = 0; i < kPAIRS; ++i)
        {
            values[i] = fromSum(raw[i]);
            sum += values[i].x + values[i].y;
        }
        float scale = 1.0F;
        float shift = 0.0F;
        if (norm != nullptr)
        {
            float const mean = groupSum(sum) / link.width;
            float squares = 0.0F;
#pragma unroll
            for (int i = 0; i < kPAIRS; ++i)
            {
                if (i * kWARP_SIZE + lane < pairs)
                {
                    float const x = values[i].x - mean;
                    float const y = values[i].y - mean;
                    squares += x * x + y * y;
                }
            }
            scale = rsqrtf(groupSum(squares) / link.width + link.epsilon);
            shift = -mean * scale;
        }
        auto* const out = reinterpret_cast<unsigned*>(hidden + row * pitch);
#pragma unroll
        for (int i = 0; i < kPAIRS; ++i)
        {
            int const pair = i * kWARP_SIZE + lane;
            if (pair < pairs)
            {
                float x = values[i].x * scale + shift;
                float y = values[i].y * scale + shift;
                if (norm != nullptr)
                {
                    float2 const gamma = unpackPair<T>(reinterpret_cast<unsigned const*>(norm)[pair]);
                    float2 const beta = unpackPair<T>(reinterpret_cast<unsigned const*>(norm + link.width)[pair]);
                    x = x * gamma.x + beta.x;
                    y = y * gamma.y + beta.y;
                }
                out[pair] = packPair<T>(x, y);
            }
        }
    }
}

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

    template <typename T>
    __device__ __forceinline__ static Activations load(T const* rows, int pitch, int count, int chunk)
    {
        int const lane = threadIdx.x % kWARP_SIZE;
        int const g = lane / 4;
        T const* const at = rows + chunk * kCHUNK + lane % 4 * 8;
        // Rows beyond `count` repeat the last: their results are dropped.
        Activations a;
        a.low = *reinterpret_cast<uint4 const*>(at + min(g, count - 1) * pitch);
        a.high = count > 8 ? *reinterpret_cast<uint4 const*>(at + min(g + 8, count - 1) * pitch) : uint4{};
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

//! partial [warp][row][8 kTILES] = the warp's part of the inputs of rows x weights^T; weights [chunks, kTILES, 8, 32].
//! The sum over the warps is the caller's.
template <typename T, int kTILES>
__device__ __forceinline__ void multiplySplit(
    T const* rows, int pitch, int count, T const* weights, int chunks, float* partial)
{
    int const warp = threadIdx.x / kWARP_SIZE;
    int const lane = threadIdx.x % kWARP_SIZE;
    float c[kTILES][4] = {};
    for (int chunk = warp; chunk < chunks; chunk += kWARPS)
    {
        Activations const a = Activations::load(rows, pitch, count, chunk);
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
        *reinterpret_cast<float2*>(out + tile * 8) = {c[tile][0], c[tile][1]};
        if (count > 8)
        {
            *reinterpret_cast<float2*>(out + 8 * (8 * kTILES) + tile * 8) = {c[tile][2], c[tile][3]};
        }
    }
}

//! Eight neighbouring outputs of multiplySplit, added up over the warps, plus the bias.
template <int kTILES>
__device__ __forceinline__ void collectOutputs(float (&sums)[8], float const* partial, int row, int tile, float const* bias)
{
#pragma unroll
    for (int i = 0; i < 8; ++i)
    {
        sums[i] = bias[tile * 8 + i];
    }
    for (int warp = 0; warp < kWARPS; ++warp)
    {
        auto const* const at = reinterpret_cast<float4 const*>(partial + (warp * kROWS + row) * (8 * kTILES) + tile * 8);
        float4 const a = at[0];
        float4 const b = at[1];
        sums[0] += a.x;
        sums[1] += a.y;
        sums[2] += a.z;
        sums[3] += a.w;
        sums[4] += b.x;
        sums[5] += b.y;
        sums[6] += b.z;
        sums[7] += b.w;
    }
}

template <typename T>
__device__ __forceinline__ uint4 packEight(float const (&v)[8])
{
    return {packPair<T>(v[0], v[1]), packPair<T>(v[2], v[3]), packPair<T>(v[4], v[5]), packPair<T>(v[6], v[7])};
}

//! Adds rows x weights^T to the sums; weights [chunks, tiles, 8, 32] give columns firstColumn on. With `bias` the block
//! also adds that and the residual, the rows of `hidden`: exactly one block a column does.
template <typename T>
__device__ __forceinline__ void multiplyToSums(Link const& link, Pass const& pass, T const* rows, int pitch,
    T const* weights, int chunks, int tiles, int firstColumn, float const* bias, T const* hidden, int hiddenPitch)
{
    int const warp = threadIdx.x / kWARP_SIZE;
    int const lane = threadIdx.x % kWARP_SIZE;
    for (int tile = warp; tile < tiles; tile += kWARPS)
    {
        float c[4] = {};
        for (int chunk = 0; chunk < chunks; ++chunk)
        {
            Activations const a = Activations::load(rows, pitch, pass.count, chunk);
            multiplyChunk<T>(c, a, weightsOf(weights + (chunk * tiles + tile) * 8 * kCHUNK));
        }
        int const inTile = tile * 8 + lane % 4 * 2;
        int const column = firstColumn + inTile;
#pragma unroll
        for (int half = 0; half < 2; ++half)
        {
            int const row = lane / 4 + half * 8;
            if (row < pass.count && pass.isActive(row))
            {
                float2 sum = {c[2 * half], c[2 * half + 1]};
                if (bias != nullptr)
                {
                    float2 const h
                        = unpackPair<T>(*reinterpret_cast<unsigned const*>(hidden + row * hiddenPitch + column));
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

//! Keys and values that one lane holds. A key is shared by kLANES neighbouring lanes, eight elements each; the warps of a
//! block take turns.
template <typename T, int kHEAD_DIM, int kPASSES>
struct Keys
{
    static constexpr int kLANES = kHEAD_DIM / 8;
    static constexpr int kGROUPS = kWARP_SIZE / kLANES;
    static constexpr int kSPAN = kPASSES * kWARPS * kGROUPS; //!< keys that a block holds

    uint4 keys[kPASSES];
    uint4 values[kPASSES];

    static __device__ __forceinline__ int indexOf(int first, int pass)
    {
        int const warp = threadIdx.x / kWARP_SIZE;
        int const group = threadIdx.x % kWARP_SIZE / kLANES;
        return first + (pass * kWARPS + warp) * kGROUPS + group;
    }

    //! Keys first to first + kSPAN of [keys, kHEAD_DIM], as far as they lie before `last`.
    __device__ __forceinline__ void load(T const* allKeys, T const* allValues, int first, int last)
    {
        int const offset = threadIdx.x % kLANES * 8;
#pragma unroll
        for (int pass = 0; pass < kPASSES; ++pass)
        {
            int const index = indexOf(first, pass);
            keys[pass] = values[pass] = uint4{};
            if (index < last)
            {
                keys[pass] = __ldcg(reinterpret_cast<uint4 const*>(allKeys + index * kHEAD_DIM + offset));
                values[pass] = __ldcg(reinterpret_cast<uint4 const*>(allValues + index * kHEAD_DIM + offset));
            }
        }
    }
};

//! Softmax in the making: the maximum (of the whole warp), and this lane's sums.
template <typename T, int kHEAD_DIM>
struct Softmax
{
    static constexpr int kLANES = kHEAD_DIM / 8;

    float query[8]; //!< times log2(e) / sqrt(kHEAD_DIM)
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

    template <int kPASSES>
    __device__ __forceinline__ void add(Keys<T, kHEAD_DIM, kPASSES> const& held, int first, int last)
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

    //! One key more, that every lane group has; it counts once.
    __device__ __forceinline__ void addOne(uint4 const& key, uint4 const& value)
    {
        float const s = score(key);
        raiseTo(fmaxf(maximum, s));
        if (threadIdx.x % kWARP_SIZE < kLANES)
        {
            take(s, value);
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

//! Four elements of a context from `parts` partial ones, [part * partStride] apart: not yet divided by the total.
__device__ __forceinline__ float4 combine(
    float const* contexts, int contextStride, float2 const* scales, int scaleStride, int parts, float2& scale)
{
    float maximum = kNO_SCORE;
    for (int part = 0; part < parts; ++part)
    {
        maximum = fmaxf(maximum, scales[part * scaleStride].x);
    }
    float total = 0.0F;
    float4 sum{};
    for (int part = 0; part < parts; ++part)
    {
        float2 const s = scales[part * scaleStride];
        float const factor = exp2Approx(s.x - maximum);
        float4 const c = *reinterpret_cast<float4 const*>(contexts + part * contextStride);
        total += factor * s.y;
        sum.x += factor * c.x;
        sum.y += factor * c.y;
        sum.z += factor * c.z;
        sum.w += factor * c.w;
    }
    scale = {maximum, total};
    return sum;
}

// ---- block cluster ----

__device__ __forceinline__ void clusterArriveRelaxed()
{
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}

__device__ __forceinline__ void clusterWait()
{
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

//! Pointer to the same place in block `rank` of the cluster.
template <typename P>
__device__ __forceinline__ P* atRank(P* pointer, int rank)
{
    uint64_t remote;
    asm volatile("mapa.u64 %0, %1, %2;" : "=l"(remote) : "l"(reinterpret_cast<uint64_t>(pointer)), "r"(rank));
    return reinterpret_cast<P*>(remote);
}

//! cp.async.bulk: `bytes` (a multiple of 16) to this block's shared memory; they count on `barrier`.
__device__ __forceinline__ void copyBulk(void* to, void const* from, uint32_t bytes, uint32_t barrier)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     sm90::sharedAddress(to)),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

//! The block's constants, on their way into shared memory since before the kernel before has ended: first the norm, then
//! the blob.
struct Constants
{
    uint32_t normBarrier;
    uint32_t blobBarrier;

    //! By all threads, first thing in the kernel. `barriers`: 16 bytes.
    __device__ __forceinline__ static Constants fetch(uint64_t* barriers, void* normTo, void const* norm,
        uint32_t normBytes, void* blobTo, void const* blob, uint32_t blobBytes)
    {
        Constants const constants{sm90::sharedAddress(barriers), sm90::sharedAddress(barriers + 1)};
        if (threadIdx.x == 0)
        {
            sm90::barrierInit(constants.normBarrier, 1);
            sm90::barrierInit(constants.blobBarrier, 1);
            sm90::barrierInitFence();
            sm90::barrierArriveExpect(constants.normBarrier, norm == nullptr ? 0 : normBytes);
            if (norm != nullptr)
            {
                copyBulk(normTo, norm, normBytes, constants.normBarrier);
            }
            sm90::barrierArriveExpect(constants.blobBarrier, blobBytes);
            copyBulk(blobTo, blob, blobBytes, constants.blobBarrier);
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

} // namespace trocr::greedy
