#pragma once

#include <cstdint>

#include "common/sm90.cuh"

//! The instructions that the decoder needs beside those of common/sm90.cuh. PTX names stand in the comments.

namespace trocr::greedy
{

//! cp.async.bulk global -> shared: `bytes` (a multiple of 16); they count on `barrier`.
__device__ __forceinline__ void copyBulk(uint32_t destination, void const* source, uint32_t bytes, uint32_t barrier)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     destination),
                 "l"(source), "r"(bytes), "r"(barrier)
                 : "memory");
}

//! cp.async.bulk.prefetch.L2: `bytes` (a multiple of 16) at `source`.
__device__ __forceinline__ void prefetchBulk(void const* source, uint32_t bytes)
{
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(source), "r"(bytes) : "memory");
}

//! mbarrier.try_wait.parity, once: whether the phase of this parity has completed.
__device__ __forceinline__ bool barrierHasCompleted(uint32_t barrier, uint32_t parity)
{
    uint32_t done;
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n"
        "}\n"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
    return done != 0;
}

//! mbarrier.arrive.release.cluster on the same barrier of block `rank`: with the wait below, what this thread has seen
//! written, to global memory too, is seen there.
__device__ __forceinline__ void barrierArriveReleaseAtRank(uint32_t barrier, uint32_t rank)
{
    uint32_t const remote = sm90::mapToRank(barrier, rank);
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(remote) : "memory");
}

//! mbarrier.try_wait.parity.acquire.cluster, until it is true.
__device__ __forceinline__ void barrierWaitAcquire(uint32_t barrier, uint32_t parity)
{
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

//! red.release.gpu: adds 1.
__device__ __forceinline__ void incrementRelease(unsigned* counter)
{
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}

//! ld.acquire.gpu.
__device__ __forceinline__ unsigned loadAcquire(unsigned const* counter)
{
    unsigned value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
    return value;
}

//! bar.sync: the first `threads` threads of the block, the last warp apart.
__device__ __forceinline__ void syncThreads(int barrier, int threads)
{
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

} // namespace trocr::greedy
