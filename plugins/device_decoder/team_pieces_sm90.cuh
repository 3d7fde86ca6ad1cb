#pragma once

// What the team decoder (team_sm90.cuh) is made of: words between blocks, the stream of weights and keys, products,
// attention of one query, the choice of a token.

#include "common/device.cuh"
#include "common/mma.cuh"
#include "common/sm90.cuh"
#include "device_decoder/common.cuh"
#include "device_decoder/team_layout.h"

namespace trocr::decoder
{

constexpr int kTEAM_COMPUTE = kTEAM_WARPS * kWARP_SIZE;  //!< threads that compute

// ---- between blocks ----

// Hidden states and choices go through global memory in words that carry a mark, the number of their token: who waits
// for them reads them until the mark is right, and then has them. No flag, no fence, one trip.

constexpr unsigned kIDLE = 0x80000000U;  //!< of a mark: the row has no line any more

__device__ __forceinline__ bool isMarked(unsigned mark, unsigned token)
{
    return (mark & ~kIDLE) == (token & ~kIDLE);
}

__device__ __forceinline__ uint64_t withMark(unsigned value, unsigned mark)
{
    return static_cast<uint64_t>(mark) << 32 | value;
}

//! A barrier of the warps that compute alone.
__device__ __forceinline__ void computeSync()
{
    sm90::syncSome<1, kTEAM_COMPUTE>();
}

//! The same, and whether `condition` held for any thread.
__device__ __forceinline__ bool computeAny(bool condition)
{
    return sm90::syncSomeAny<1, kTEAM_COMPUTE>(condition);
}

// ---- the stream ----
//
// Everything a block reads but its own cache of keys comes through one ring of slots, in an order known in advance:
// a layer's weights, with keys and values of the lines in between, and at the end the head's. One lane of the fifth
// warpgroup fetches as far ahead as there are slots; the warps of the other four read.

__device__ __forceinline__ uint8_t* teamShared()
{
    TROCR_DYNAMIC_SHARED(shared, 1024);
    return shared;
}

__device__ __forceinline__ uint32_t teamMemory()
{
    return sharedAddress(teamShared());
}

//! A place in the stream, for the lane that fetches and for the warps that read. Slot i of the stream is slot i % kRING
//! of the ring, in its round i / kRING.
struct Ring
{
    uint32_t next{0};  //!< slot of the stream

    static __device__ __forceinline__ uint32_t data()
    {
        return teamMemory() + kRING_OFFSET;
    }
    //! Barriers in front of all shared memory: the bytes have arrived.
    static __device__ __forceinline__ uint32_t fullBarrier(uint32_t slot)
    {
        return teamMemory() + slot % kRING * 8;
    }
    //! kTEAM_WARPS arrivals.
    static __device__ __forceinline__ uint32_t emptyBarrier(uint32_t slot)
    {
        return teamMemory() + kRING * 8 + slot % kRING * 8;
    }

    // For the lane that fetches.

    //! Waits until the next slot has been read, and announces `bytes`; the caller copies them to what is returned.
    __device__ __forceinline__ uint32_t open(uint32_t bytes)
    {
        sm90::barrierWait(emptyBarrier(next), next / kRING % 2 ^ 1);
        sm90::barrierArriveExpect(fullBarrier(next), bytes);
        return data() + next % kRING * kSLOT_BYTES;
    }

    __device__ __forceinline__ void fetch(uint8_t const* from, int slots, uint64_t policy)
    {
#pragma unroll 1
        for (int i = 0; i < slots; ++i, ++next)
        {
            uint32_t const to = open(kSLOT_BYTES);
            sm90::copyBulk(to, from + i * kSLOT_BYTES, kSLOT_BYTES, fullBarrier(next), policy);
        }
    }

    // For the warps that read.

    //! Address of the slot `ahead` of the next, once it is full.
    __device__ __forceinline__ uint32_t wait(uint32_t ahead) const
    {
        uint32_t const slot = next + ahead;
        sm90::barrierWait(fullBarrier(slot), slot / kRING % 2);
        return data() + slot % kRING * kSLOT_BYTES;
    }

    //! This warp has read, or does not need, the next kCOUNT slots.
    template <int kCOUNT>
    __device__ __forceinline__ void release()
    {
        sm90::endReads();
        releaseUsed<kCOUNT>();
    }

    //! The same where what was made of them has been stored: no load is under way any more, and there is no need for a
    //! fence, which took 4 us of a token's 56.
    template <int kCOUNT>
    __device__ __forceinline__ void releaseUsed()
    {
        __syncwarp();
        uint32_t const lane = threadIdx.x % kWARP_SIZE;
        if (lane < kCOUNT)
        {
            sm90::barrierArrive(emptyBarrier(next + lane));
        }
        next += kCOUNT;
    }

    //! This warp has read, or does not need, the next `count` slots, kRING at most. It waits for all of them: who has
    //! not is a round ahead when it comes to a slot again.
    __device__ __forceinline__ void pass(uint32_t count)
    {
        sm90::endReads();
        uint32_t const lane = threadIdx.x % kWARP_SIZE;
        if (lane < count)
        {
            wait(lane);
            sm90::barrierArrive(emptyBarrier(next + lane));
        }
        next += count;
    }
};

// ---- products ----
//
// A unit of weights is the left operand of two m16n8k16, stored as the lanes hold it: 16 outputs by 32 inputs. Rows are
// the right operand. An input's place in a step is free as long as both operands agree, so lane (g, t) = (lane / 4,
// lane % 4) takes inputs 8 t to 8 t + 7 of row g with one 16-byte read.

//! Which part of a product a warp has: one of kTILES tiles of 16 outputs, and of it one of kPARTS parts of the kCHUNKS
//! chunks of 32 inputs.
template <int kTILES, int kCHUNKS, int kPARTS = 1>
struct Product
{
    static constexpr int kOUTPUTS = kTILES * 16;
    static constexpr int kPARTS_OF_INPUTS = kPARTS;
    static constexpr int kUNITS = kCHUNKS / kPARTS;
    static constexpr int kSLOTS = kTILES * kCHUNKS / kSLOT_UNITS;

    // Both without a division: there is one part, or two, or eight.
    static __device__ __forceinline__ int tile(int warp)
    {
        return warp / kPARTS;
    }
    static __device__ __forceinline__ int part(int warp)
    {
        return warp % kPARTS;
    }
    static __device__ __forceinline__ bool has(int warp)
    {
        return tile(warp) < kTILES;
    }
    //! Number of the warp's first unit; the others follow.
    static __device__ __forceinline__ int unit(int warp)
    {
        return tile(warp) * kCHUNKS + part(warp) * kUNITS;
    }
};

//! A warp's weights of a product, in registers: they are read while the rows are still awaited.
template <int kUNITS>
struct Weights
{
    uint4 first[kUNITS];
    uint4 second[kUNITS];

    //! From a shared address of this lane.
    __device__ __forceinline__ void read(uint32_t from)
    {
#pragma unroll
        for (int unit = 0; unit < kUNITS; ++unit)
        {
            first[unit] = sm90::loadShared(from + unit * kUNIT_BYTES);
            second[unit] = sm90::loadShared(from + unit * kUNIT_BYTES + kUNIT_BYTES / 2);
        }
    }

    //! From a global address of this lane.
    __device__ __forceinline__ void load(uint8_t const* from)
    {
#pragma unroll
        for (int unit = 0; unit < kUNITS; ++unit)
        {
            first[unit] = __ldcg(reinterpret_cast<uint4 const*>(from + unit * kUNIT_BYTES));
            second[unit] = __ldcg(reinterpret_cast<uint4 const*>(from + unit * kUNIT_BYTES + kUNIT_BYTES / 2));
        }
    }
};

//! c [16 outputs, 8 rows] = the weights times as many chunks of 32 inputs of the rows at `rows`, a shared address of
//! this lane.
template <typename T, int kUNITS>
__device__ __forceinline__ void multiply(float (&c)[4], Weights<kUNITS> const& weights, uint32_t rows)
{
    float odd[4] = {};  // a chain of its own, half as long
    c[0] = c[1] = c[2] = c[3] = 0.0F;
#pragma unroll
    for (int unit = 0; unit < kUNITS; ++unit)
    {
        uint4 const first = weights.first[unit];
        uint4 const second = weights.second[unit];
        uint4 const x = sm90::loadShared(rows + unit * 64);
        multiplyAdd<T>(c, {first.x, first.y, first.z, first.w}, x.x, x.y);
        multiplyAdd<T>(odd, {second.x, second.y, second.z, second.w}, x.z, x.w);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
    {
        c[i] += odd[i];
    }
}

//! The same for weights in shared memory, at an address of this lane; and, kBOTH, for others in registers to `mine`.
template <typename T, bool kBOTH, int kUNITS>
__device__ __forceinline__ void multiplyShared(float (&mine)[4], float (&c)[4], Weights<kUNITS> const& weights,
                                               uint32_t shared, uint32_t rows)
{
    float odd[4] = {};
    float mineOdd[4] = {};
    c[0] = c[1] = c[2] = c[3] = 0.0F;
    mine[0] = mine[1] = mine[2] = mine[3] = 0.0F;
#pragma unroll
    for (int unit = 0; unit < kUNITS; ++unit)
    {
        uint4 const x = sm90::loadShared(rows + unit * 64);
        uint4 const first = sm90::loadShared(shared + unit * kUNIT_BYTES);
        uint4 const second = sm90::loadShared(shared + unit * kUNIT_BYTES + kUNIT_BYTES / 2);
        if constexpr (kBOTH)
        {
            uint4 const even = weights.first[unit];
            uint4 const uneven = weights.second[unit];
            multiplyAdd<T>(mine, {even.x, even.y, even.z, even.w}, x.x, x.y);
            multiplyAdd<T>(mineOdd, {uneven.x, uneven.y, uneven.z, uneven.w}, x.z, x.w);
        }
        multiplyAdd<T>(c, {first.x, first.y, first.z, first.w}, x.x, x.y);
        multiplyAdd<T>(odd, {second.x, second.y, second.z, second.w}, x.z, x.w);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
    {
        c[i] += odd[i];
        mine[i] += mineOdd[i];
    }
}

// ---- attention of one query a row ----

//! Softmax in the making, of one warp and groups of 16 keys, on the tensor cores. The query fills all rows of the left
//! operand, so that every lane has the scores of keys 2 t, 2 t + 1, and of those 8 behind. C: of keys and values, T or
//! e4m3.
template <typename T, typename C = T>
struct Attention
{
    static constexpr int kKEY_BYTES = kHEAD * sizeof(C);

    float maximum;
    float total;
    //! [i][0, 1]: elements 8 i + 2 t and the next; of e4m3 16 (i / 2) + 4 t + i % 2 and the second from there. Rows
    //! beyond the first eight are not used.
    float context[4][4];

    __device__ __forceinline__ void begin()
    {
        maximum = kNO_SCORE;
        total = 0.0F;
#pragma unroll
        for (int i = 0; i < 4; ++i)
        {
#pragma unroll
            for (int e = 0; e < 4; ++e)
            {
                context[i][e] = 0.0F;
            }
        }
    }

    //! Where of 16 keys that lie from `keys` on this lane's elements are: 8 t to 8 t + 7 of key lane / 4, two steps of
    //! 16 in any order, as those of the query.
    static __device__ __forceinline__ uint32_t keysOfLane(uint32_t keys)
    {
        return keys + threadIdx.x % kWARP_SIZE * (8 * sizeof(C));
    }

    //! What this lane points ldmatrix to, of 16 values from `values` on: of e4m3, a row's 32 bytes are two matrices.
    static __device__ __forceinline__ uint32_t valuesOfLane(uint32_t values)
    {
        return values + threadIdx.x % 16 * kKEY_BYTES + threadIdx.x % kWARP_SIZE / 16 * 16;
    }

    //! Exponents of two of 16 keys, of which the first `count` are there. `keys`: from keysOfLane.
    static __device__ __forceinline__ void score(float (&scores)[4], uint4 const& query, uint32_t keys, int count)
    {
        float const scale = kLOG2_E * 0.17677669F;  // 1 / sqrt(32)
#pragma unroll
        for (int half = 0; half < 2; ++half)
        {
            uint4 const key = loadEight<C>(keys + half * 8 * kKEY_BYTES);
            float c[4] = {};
            multiplyAdd<T>(c, {query.x, query.x, query.y, query.y}, key.x, key.y);
            multiplyAdd<T>(c, {query.z, query.z, query.w, query.w}, key.z, key.w);
            scores[2 * half] = c[0] * scale;
            scores[2 * half + 1] = c[1] * scale;
        }
        if (count < 16)
        {
#pragma unroll
            for (int i = 0; i < 4; ++i)
            {
                int const key = i / 2 * 8 + static_cast<int>(threadIdx.x % 4 * 2) + i % 2;
                scores[i] = key < count ? scores[i] : kNO_SCORE;
            }
        }
    }

    //! Raises the maximum to that of the scores of kGROUPS groups.
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
            context[i][0] *= rescale;
            context[i][1] *= rescale;
        }
    }

    //! Adds 16 values. `values`: from valuesOfLane.
    __device__ __forceinline__ void add(float const (&scores)[4], uint32_t values, int count)
    {
        float p[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
        {
            p[i] = exp2Approx(scores[i] - maximum);
            total += p[i];
        }
        uint32_t const weights[4] = {packPair<T>(p[0], p[1]), 0, packPair<T>(p[2], p[3]), 0};
        if constexpr (sizeof(C) == 1)
        {
            // Matrices: keys 0 to 7 and 8 to 15 of elements 0 to 15, then of 16 to 31. A lane has elements 2 g and
            // 2 g + 1 of keys 2 t and 2 t + 1.
            uint32_t v[4];
            loadMatricesTransposed(v, values);
            clearBehind(v, count);
#pragma unroll
            for (int pair = 0; pair < 2; ++pair)
            {
                uint32_t const first = v[2 * pair];
                uint32_t const second = v[2 * pair + 1];
                multiplyAdd<T>(context[2 * pair], weights, halvesOfE4m3(__byte_perm(first, 0, 0x4420)),
                               halvesOfE4m3(__byte_perm(second, 0, 0x4420)));
                multiplyAdd<T>(context[2 * pair + 1], weights, halvesOfE4m3(__byte_perm(first, 0, 0x4431)),
                               halvesOfE4m3(__byte_perm(second, 0, 0x4431)));
            }
            return;
        }
#pragma unroll
        for (int pair = 0; pair < 2; ++pair)
        {
            // Matrices: keys 0 to 7 and 8 to 15 of elements 16 pair to 16 pair + 7, then of the next eight.
            uint32_t v[4];
            loadMatricesTransposed(v, values + pair * 32);
            clearBehind(v, count);
            multiplyAdd<T>(context[2 * pair], weights, v[0], v[1]);
            multiplyAdd<T>(context[2 * pair + 1], weights, v[2], v[3]);
        }
    }

    //! What lies behind the last value may be anything; times zero it must be zero.
    static __device__ __forceinline__ void clearBehind(uint32_t (&v)[4], int count)
    {
        if (count < 16)
        {
#pragma unroll
            for (int i = 0; i < 4; ++i)
            {
                int const behind = count - (i % 2 * 8 + static_cast<int>(threadIdx.x % 4 * 2));
                v[i] &= behind >= 2 ? 0xffffffffU : behind == 1 ? 0xffffU : 0U;
            }
        }
    }

    //! contextOut [32], not divided by the total, and (maximum, total).
    __device__ __forceinline__ void finish(float* contextOut, float2* scaleOut)
    {
        int const lane = threadIdx.x % kWARP_SIZE;
        total = groupSum<4>(total);
        if (lane < 4)
        {
            if constexpr (sizeof(C) == 1)
            {
#pragma unroll
                for (int i = 0; i < 4; i += 2)
                {
                    reinterpret_cast<float4*>(contextOut)[i * 2 + lane] = {context[i][0], context[i + 1][0],
                                                                           context[i][1], context[i + 1][1]};
                }
            }
            else
            {
#pragma unroll
                for (int i = 0; i < 4; ++i)
                {
                    reinterpret_cast<float2*>(contextOut)[i * 4 + lane] = {context[i][0], context[i][1]};
                }
            }
            if (lane == 0)
            {
                *scaleOut = {maximum, total};
            }
        }
    }
};

// ---- the choice of a token ----

//! The best of some logits, the lowest token among equals, and what log softmax needs.
struct Choice
{
    float best;
    int token;
    float total;

    __device__ __forceinline__ void take(float logit, int of)
    {
        float const most = fmaxf(best, logit);
        total = total * exp2Approx((best - most) * kLOG2_E) + exp2Approx((logit - most) * kLOG2_E);
        token = logit > best ? of : token;
        best = most;
    }

    //! Of the lanes that differ in the bits `from` to `to` / 2 of their number, to each of them.
    __device__ __forceinline__ void reduce(int from, int to)
    {
        float most = best;
#pragma unroll 1
        for (int offset = from; offset < to; offset *= 2)
        {
            most = fmaxf(most, __shfl_xor_sync(kFULL_WARP, most, offset));
        }
        total *= exp2Approx((best - most) * kLOG2_E);
        token = best == most ? token : 0x7fffffff;
        best = most;
#pragma unroll 1
        for (int offset = from; offset < to; offset *= 2)
        {
            total += __shfl_xor_sync(kFULL_WARP, total, offset);
            token = min(token, __shfl_xor_sync(kFULL_WARP, token, offset));
        }
    }

    //! Of all lanes, to each of them, in fewer steps: but for `total`, which is added up by addTotals.
    __device__ __forceinline__ void reduceWarp()
    {
        // As whole numbers, in the order of the floats.
        unsigned const bits = __float_as_uint(best);
        unsigned const most = __reduce_max_sync(kFULL_WARP, bits ^ ((bits >> 31) != 0 ? 0xffffffffU : 0x80000000U));
        float const value = __uint_as_float(most ^ ((most >> 31) != 0 ? 0x80000000U : 0xffffffffU));
        token = __reduce_min_sync(kFULL_WARP, best == value ? token : 0x7fffffff);
        total *= exp2Approx((best - value) * kLOG2_E);
        best = value;
    }

    //! Of lanes that differ in the lower bits of their number, kLANES of them.
    template <int kLANES>
    __device__ __forceinline__ void addTotals()
    {
#pragma unroll
        for (int offset = 1; offset < kLANES; offset *= 2)
        {
            total += __shfl_xor_sync(kFULL_WARP, total, offset);
        }
    }
};

//! Choice::reduce of two choices side by side, over the lanes that share lane % 4.
__device__ __forceinline__ void reduceColumns(Choice (&choices)[2])
{
    float most[2] = {choices[0].best, choices[1].best};
#pragma unroll
    for (int offset = 4; offset < kWARP_SIZE; offset *= 2)
    {
        most[0] = fmaxf(most[0], __shfl_xor_sync(kFULL_WARP, most[0], offset));
        most[1] = fmaxf(most[1], __shfl_xor_sync(kFULL_WARP, most[1], offset));
    }
#pragma unroll
    for (int e = 0; e < 2; ++e)
    {
        choices[e].total *= exp2Approx((choices[e].best - most[e]) * kLOG2_E);
        choices[e].token = choices[e].best == most[e] ? choices[e].token : 0x7fffffff;
        choices[e].best = most[e];
    }
#pragma unroll
    for (int offset = 4; offset < kWARP_SIZE; offset *= 2)
    {
#pragma unroll
        for (int e = 0; e < 2; ++e)
        {
            choices[e].total += __shfl_xor_sync(kFULL_WARP, choices[e].total, offset);
            choices[e].token = min(choices[e].token, __shfl_xor_sync(kFULL_WARP, choices[e].token, offset));
        }
    }
}

}  // namespace trocr::decoder
