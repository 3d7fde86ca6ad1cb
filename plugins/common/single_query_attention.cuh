#pragma once

#include <cfloat>

#include "common/device.cuh"

//! Attention of one query over many keys, the core of the decoder's two attentions. Each key and value is read once and
//! used once, so the work is bound by memory: what counts is 16-byte loads, many of them in flight.
//!
//! A key row of d elements is read by as few lanes as 16-byte loads allow (d = 64 in fp16: 8 lanes), so a warp holds
//! several such groups, each working through keys of its own with its own running softmax. The groups of a block are
//! merged at the end; the order is fixed, so results repeat bit for bit.

namespace trocr
{

//! Softmax over some of the keys, unnormalised. Scores are in units of log2: the query carries log2(e) / sqrt(d).
template <int kSIZE>
struct PartialSoftmax
{
    float maximum = -FLT_MAX;  // finite: an empty part then merges without inf - inf
    float sum = 0.0F;
    float values[kSIZE] = {};  // sum of 2^(score - maximum) * value

    __device__ __forceinline__ void rescale(float newMaximum)
    {
        float const factor = exp2Approx(maximum - newMaximum);
        maximum = newMaximum;
        sum *= factor;
#pragma unroll
        for (int i = 0; i < kSIZE; ++i)
        {
            values[i] *= factor;
        }
    }
};

//! What a warp leaves in shared memory for the merge.
template <int kHEAD_DIM>
struct WarpPartial
{
    float maximum;
    float sum;
    float values[kHEAD_DIM];
};

template <typename T, int kHEAD_DIM_, int kWARPS_, int kUNROLL_>
struct SingleQueryAttention
{
    static constexpr int kHEAD_DIM = kHEAD_DIM_;
    static constexpr int kWARPS = kWARPS_;
    static constexpr int kUNROLL = kUNROLL_;  //!< keys a group loads at once: 2 * kUNROLL loads in flight a lane
    static constexpr int kSIZE = 16 / sizeof(T);
    static constexpr int kLANES = kHEAD_DIM / kSIZE;  //!< lanes a key
    static constexpr int kGROUPS = kWARPS * kWARP_SIZE / kLANES;
    static constexpr int kKEYS_A_PASS = kGROUPS * kUNROLL;
    static constexpr int kTHREADS = kWARPS * kWARP_SIZE;
    static_assert(kLANES * kSIZE == kHEAD_DIM && kWARP_SIZE % kLANES == 0);

    using Partials = WarpPartial<kHEAD_DIM>[kWARPS];

    //! Attends from `query` [d] to keys [begin, end). `keyRow(i)` and `valueRow(i)` are the addresses of row i [d].
    //! Leaves one partial a warp in `partials`; the caller synchronises before reading them.
    template <typename KeyRow, typename ValueRow>
    static __device__ __forceinline__ void attend(T const* query, KeyRow const& keyRow, ValueRow const& valueRow,
                                                  int begin, int end, Partials& partials)
    {
        int const lane = threadIdx.x % kWARP_SIZE;
        int const warp = threadIdx.x / kWARP_SIZE;
        int const group = threadIdx.x / kLANES;
        int const column = threadIdx.x % kLANES * kSIZE;

        auto scaledQuery = Pack<T>::load(query + column);
        float const scale = kLOG2_E * rsqrtf(static_cast<float>(kHEAD_DIM));
#pragma unroll
        for (int i = 0; i < kSIZE; ++i)
        {
            scaledQuery.values[i] *= scale;
        }

        PartialSoftmax<kSIZE> state;
        // The bound is the same for all lanes: the shuffles below need whole warps.
        for (int first = begin; first < end; first += kKEYS_A_PASS)
        {
            uint4 keys[kUNROLL];
            uint4 values[kUNROLL];
#pragma unroll
            for (int u = 0; u < kUNROLL; ++u)
            {
                int const index = min(first + u * kGROUPS + group, end - 1);  // beyond the end: weight 0 below
                keys[u] = __ldg(reinterpret_cast<uint4 const*>(keyRow(index) + column));
                values[u] = __ldg(reinterpret_cast<uint4 const*>(valueRow(index) + column));
            }

            float scores[kUNROLL];
            float maximum = state.maximum;
#pragma unroll
            for (int u = 0; u < kUNROLL; ++u)
            {
                auto const key = Pack<T>::fromBits(keys[u]);
                float product = 0.0F;
#pragma unroll
                for (int i = 0; i < kSIZE; ++i)
                {
                    product += scaledQuery.values[i] * key.values[i];
                }
                product = groupSum<kLANES>(product);
                scores[u] = first + u * kGROUPS + group < end ? product : -INFINITY;
                maximum = fmaxf(maximum, scores[u]);
            }

            state.rescale(maximum);
#pragma unroll
            for (int u = 0; u < kUNROLL; ++u)
            {
                auto const value = Pack<T>::fromBits(values[u]);
                float const weight = exp2Approx(scores[u] - maximum);
                state.sum += weight;
#pragma unroll
                for (int i = 0; i < kSIZE; ++i)
                {
                    state.values[i] += weight * value.values[i];
                }
            }
        }

        // Merge the groups of the warp: lanes of the same columns are kLANES apart.
        float maximum = state.maximum;
#pragma unroll
        for (int offset = kLANES; offset < kWARP_SIZE; offset *= 2)
        {
            maximum = fmaxf(maximum, __shfl_xor_sync(kFULL_WARP, maximum, offset));
        }
        state.rescale(maximum);
#pragma unroll
        for (int offset = kLANES; offset < kWARP_SIZE; offset *= 2)
        {
            state.sum += __shfl_xor_sync(kFULL_WARP, state.sum, offset);
#pragma unroll
            for (int i = 0; i < kSIZE; ++i)
            {
                state.values[i] += __shfl_xor_sync(kFULL_WARP, state.values[i], offset);
            }
        }

        if (lane < kLANES)
        {
#pragma unroll
            for (int i = 0; i < kSIZE; ++i)
            {
                partials[warp].values[column + i] = state.values[i];
            }
            if (lane == 0)
            {
                partials[warp].maximum = state.maximum;
                partials[warp].sum = state.sum;
            }
        }
    }

    //! Merges the partials of kWARPS warps in each of `count` blocks (`partialsOf(i)`: those of block i) and returns
    //! element `column` of the context.
    template <typename PartialsOf>
    static __device__ __forceinline__ float merge(PartialsOf const& partialsOf, int count, int column)
    {
        float maximum = -FLT_MAX;
        for (int block = 0; block < count; ++block)
        {
            WarpPartial<kHEAD_DIM> const* const partials = partialsOf(block);
#pragma unroll
            for (int warp = 0; warp < kWARPS; ++warp)
            {
                maximum = fmaxf(maximum, partials[warp].maximum);
            }
        }
        float sum = 0.0F;
        float value = 0.0F;
        for (int block = 0; block < count; ++block)
        {
            WarpPartial<kHEAD_DIM> const* const partials = partialsOf(block);
#pragma unroll
            for (int warp = 0; warp < kWARPS; ++warp)
            {
                float const factor = exp2Approx(partials[warp].maximum - maximum);
                sum += factor * partials[warp].sum;
                value += factor * partials[warp].values[column];
            }
        }
        return value / sum;
    }
};

}  // namespace trocr
