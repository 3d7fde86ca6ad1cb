#pragma once

// What the kernels of both greedy decoders share.

#include "common/device.cuh"

namespace trocr::greedy
{

constexpr float kNO_SCORE = -1e30F;  //!< below every score; finite, so that differences of two are 0

//! Exact: by the error function.
__device__ __forceinline__ float gelu(float x)
{
    return 0.5F * x * (1.0F + erff(x * 0.70710678F));
}

__device__ __forceinline__ uint4 readShared(uint32_t address)
{
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}

//! How long L2 is to keep what a copy reads. Weights and the head are read again with every token, by several teams;
//! keys and values of many lines would drive them out.
struct CachePolicies
{
    uint64_t keep;
    uint64_t drop;

    static __device__ __forceinline__ CachePolicies make()
    {
        CachePolicies policies;
        asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policies.keep));
        asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policies.drop));
        return policies;
    }
};

//! cp.async.bulk: `bytes` (a multiple of 16) to this block's shared memory; they count on `barrier`.
__device__ __forceinline__ void copyBulk(uint32_t to, void const* from, uint32_t bytes, uint32_t barrier,
                                         uint64_t policy)
{
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
            "r"(to),
        "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
        : "memory");
}

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
};

}  // namespace trocr::greedy
