#pragma once

// In place of plugins/common/sm90.cuh, as far as the decoders need it: what each wrapper's instruction does.

#include "common/mma.cuh"

#define TROCR_DYNAMIC_SHARED(NAME, ALIGNMENT) uint8_t* const NAME = cpu_cuda::running->block->shared

namespace trocr::sm90
{

// ---- mbarrier ----

//! 64 bits of shared memory.
struct BarrierState
{
    int32_t bytes;  //!< still to come
    uint8_t arrivals;
    uint8_t pending;
    uint8_t parity;

    void arrive()
    {
        if (pending == 0)
        {
            cpu_cuda::fail("more arrivals at an mbarrier than it counts");
        }
        --pending;
        check();
    }

    void check()
    {
        if (pending == 0 && bytes == 0)
        {
            parity ^= 1;
            pending = arrivals;
        }
    }
};

inline BarrierState& barrierAt(uint32_t address)
{
    return *reinterpret_cast<BarrierState*>(cpu_cuda::memory(address));
}

inline void barrierInit(uint32_t barrier, uint32_t arrivals)
{
    auto const count = static_cast<uint8_t>(arrivals);
    barrierAt(barrier) = {0, count, count, 0};
}

inline void barrierInitFence() {}

inline void barrierArriveExpect(uint32_t barrier, uint32_t bytes)
{
    barrierAt(barrier).bytes += static_cast<int32_t>(bytes);
    barrierAt(barrier).arrive();
}

//! On a GPU the copy engine, which may be let go on here, can overtake loads that have been issued.
inline void barrierArrive(uint32_t barrier)
{
    if (cpu_cuda::running->loading)
    {
        cpu_cuda::fail("an arrival while loads of shared memory are under way: the copy engine may write there before");
    }
    barrierAt(barrier).arrive();
}

inline void barrierWait(uint32_t barrier, uint32_t parity)
{
    cpu_cuda::waitWhile(barrierAt(barrier).parity, static_cast<uint8_t>(parity));
}

inline void endReads()
{
    cpu_cuda::running->loading = false;
    __syncwarp();
}

inline void waitForCluster(uint32_t barrier, uint32_t parity)
{
    barrierWait(barrier, parity);
}

// ---- block cluster and dependent launch ----

inline uint32_t mapToRank(uint32_t address, uint32_t rank)
{
    return (address & 0xffffff) | (rank + 1) << 24;
}

template <typename P>
P* atRank(P* pointer, int rank)
{
    return reinterpret_cast<P*>(cpu_cuda::running->block->cluster->blocks[rank].shared + cpu_cuda::offsetOf(pointer));
}

inline void clusterSync()
{
    cpu_cuda::Cluster& cluster = *cpu_cuda::running->block->cluster;
    cluster.barrier.wait(cluster.alive);
}

inline void clusterSyncRelaxed()
{
    clusterSync();
}

// Kernels run one after another.
inline void waitForPriorGrids() {}
inline void launchDependents() {}

//! What `copy` copies arrives some time later, so many bytes of those that the barrier waits for.
template <typename Copy>
void deliver(uint32_t bytes, uint32_t barrier, Copy const& copy)
{
    BarrierState* const counted = &barrierAt(barrier);
    cpu_cuda::later(
        [=]()
        {
            copy();
            counted->bytes -= static_cast<int32_t>(bytes);
            counted->check();
        });
}

template <typename T>
void deliverValue(uint32_t remote, T const& value, uint32_t barrier)
{
    uint8_t* const to = cpu_cuda::memory(remote);
    deliver(sizeof(value), barrier, [=]() { std::memcpy(to, &value, sizeof(value)); });
}

inline void deliverBulk(uint8_t* to, void const* from, uint32_t bytes, uint32_t barrier)
{
    if (bytes % 16 != 0 || reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0)
    {
        cpu_cuda::fail("a bulk copy that is not of multiples of 16 bytes");
    }
    cpu_cuda::noteCopy(to, bytes);
    deliver(bytes, barrier, [=]() { std::memcpy(to, from, bytes); });
}

inline void send(uint32_t remote, float value, uint32_t barrier)
{
    deliverValue(remote, value, barrier);
}

inline void send(uint32_t remote, uint4 const& value, uint32_t barrier)
{
    deliverValue(remote, value, barrier);
}

// ---- bulk copies ----

inline void copyBulk(void* to, void const* from, uint32_t bytes, uint32_t barrier)
{
    deliverBulk(static_cast<uint8_t*>(to), from, bytes, barrier);
}

inline void copyBulk(uint32_t to, void const* from, uint32_t bytes, uint32_t barrier, uint64_t /*policy*/)
{
    deliverBulk(cpu_cuda::memory(to), from, bytes, barrier);
}

inline void prefetchBulk(void const* from, uint32_t bytes)
{
    if (bytes == 0 || bytes % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0)
    {
        cpu_cuda::fail("a bulk prefetch that is not of multiples of 16 bytes");
    }
}

struct CachePolicies
{
    uint64_t keep;
    uint64_t drop;

    static CachePolicies make()
    {
        return {};
    }
};

// ---- words between blocks, through global memory ----

inline int2 loadEarly(int2 const* address)
{
    return *address;
}

struct alignas(16) Quad
{
    uint64_t low;
    uint64_t high;
};

// A word may be there later than what its thread does next, and two words of one call in any order.

inline void publish(ulonglong2* to, uint64_t first, uint64_t second)
{
    cpu_cuda::later([=]() { to->x = first; });
    cpu_cuda::later([=]() { to->y = second; });
}

inline void publish(Quad* to, Quad const& value)
{
    cpu_cuda::later([=]() { *to = value; });
}

//! Who reads waits for others: they are to go on.
template <typename T>
T readPublished(T const* from)
{
    cpu_cuda::yield();
    return *from;
}

inline int countArrival(int* arrived)
{
    return atomicAdd(arrived, 1);
}

// ---- threads of a block ----

template <int kBARRIER, int kTHREADS>
void syncSome()
{
    cpu_cuda::running->block->barriers[kBARRIER].wait(kTHREADS);
}

template <int kBARRIER, int kTHREADS>
bool syncSomeAny(bool condition)
{
    cpu_cuda::Block& block = *cpu_cuda::running->block;
    cpu_cuda::Barrier& barrier = block.barriers[kBARRIER];
    bool& any = block.any[barrier.turn % 2];
    any = (barrier.arrived > 0 && any) || condition;
    barrier.wait(kTHREADS);
    return any;
}

inline unsigned threadIndexAnew()
{
    return threadIdx.x;
}

inline void keepHere(float& /*a*/, float& /*b*/) {}

template <typename Words>
Words loadSharedWords(uint32_t address)
{
    if (address % sizeof(Words) != 0)
    {
        cpu_cuda::fail("a load of shared memory that does not lie on a multiple of its size");
    }
    cpu_cuda::noteLoad(address);
    Words value;
    std::memcpy(&value, cpu_cuda::memory(address), sizeof(value));
    return value;
}

inline uint4 loadShared(uint32_t address)
{
    return loadSharedWords<uint4>(address);
}

inline uint2 loadSharedPair(uint32_t address)
{
    return loadSharedWords<uint2>(address);
}

template <int kREGISTERS>
void growRegisters()
{
}

template <int kREGISTERS>
void shrinkRegisters()
{
}

}  // namespace trocr::sm90
