#pragma once

// Hopper's own instructions, one thin wrapper each. Shared-memory operands are 32-bit shared-window addresses
// (sharedAddress, mma.cuh). PTX names stand in the comments; sm_90a only.

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "common/mma.cuh"

namespace trocr::sm90
{

// ---- mbarrier ----

//! mbarrier.init: a phase completes after `arrivals` arrivals and when no announced bytes are outstanding.
__device__ __forceinline__ void barrierInit(uint32_t barrier, uint32_t arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

//! fence.mbarrier_init: makes initialised barriers visible to cluster and copy engine; before a cluster barrier.
__device__ __forceinline__ void barrierInitFence()
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

//! mbarrier.arrive.expect_tx: one arrival, and `bytes` more to be delivered by the copy engine in this phase.
__device__ __forceinline__ void barrierArriveExpect(uint32_t barrier, uint32_t bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

//! mbarrier.arrive on a barrier of this block.
__device__ __forceinline__ void barrierArrive(uint32_t barrier)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

//! mapa: the address, in block `rank` of the cluster, of what lies at `address` in this block.
__device__ __forceinline__ uint32_t mapToRank(uint32_t address, uint32_t rank)
{
    uint32_t remote;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
    return remote;
}

//! mbarrier.arrive on the same barrier of block `rank` of the cluster. The default scope orders nothing between blocks
//! (a cluster-wide release costs a device-wide fence): for arrivals after completed wgmma reads, which need no order.
__device__ __forceinline__ void barrierArriveAtRank(uint32_t barrier, uint32_t rank)
{
    uint32_t const remote = mapToRank(barrier, rank);
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(remote) : "memory");
}

//! mbarrier.try_wait.parity: returns when the phase of this parity has completed; on a fresh barrier parity 1 has.
__device__ __forceinline__ void barrierWait(uint32_t barrier, uint32_t parity)
{
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// ---- block cluster and dependent launch ----

__device__ __forceinline__ uint32_t clusterRank()
{
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

__device__ __forceinline__ uint32_t clusterSize()
{
    uint32_t size;
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}

//! barrier.cluster: all threads of all blocks of the cluster; orders their shared memory.
__device__ __forceinline__ void clusterSync()
{
    asm volatile(
        "barrier.cluster.arrive.release;\n"
        "barrier.cluster.wait.acquire;\n" ::
            : "memory");
}

//! The same without ordering memory: after barrierInitFence, and where a block only waits for others' finished reads.
__device__ __forceinline__ void clusterSyncRelaxed()
{
    asm volatile(
        "barrier.cluster.arrive.relaxed;\n"
        "barrier.cluster.wait;\n" ::
            : "memory");
}

//! Pointer to the same place in block `rank` of the cluster.
template <typename P>
__device__ __forceinline__ P* atRank(P* pointer, int rank)
{
    uint64_t remote;
    asm volatile("mapa.u64 %0, %1, %2;" : "=l"(remote) : "l"(reinterpret_cast<uint64_t>(pointer)), "r"(rank));
    return reinterpret_cast<P*>(remote);
}

//! st.async: to another block's shared memory, whose barrier it counts on; both addresses from mapToRank.
__device__ __forceinline__ void send(uint32_t remote, float value, uint32_t barrier)
{
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(remote), "f"(value),
                 "r"(barrier)
                 : "memory");
}

__device__ __forceinline__ void send(uint32_t remote, uint4 const& value, uint32_t barrier)
{
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(remote),
        "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(barrier)
        : "memory");
}

//! barrierWait for what other blocks of the cluster sent.
__device__ __forceinline__ void waitForCluster(uint32_t barrier, uint32_t parity)
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

//! griddepcontrol.wait: until the grids this launch depends on have finished; returns at once in a plain launch.
__device__ __forceinline__ void waitForPriorGrids()
{
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

//! griddepcontrol.launch_dependents: lets the next grid's blocks start (they wait before they read our output).
__device__ __forceinline__ void launchDependents()
{
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// ---- tensor memory accelerator ----

__device__ __forceinline__ void prefetchTensorMap(CUtensorMap const* map)
{
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

//! cp.async.bulk.tensor.2d global -> shared: the box at (column, row) to `destination`; its bytes count on `barrier`.
__device__ __forceinline__ void loadBox(uint32_t destination, CUtensorMap const* map, int32_t column, int32_t row,
                                        uint32_t barrier)
{
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
            destination),
        "l"(map), "r"(barrier), "r"(column), "r"(row)
        : "memory");
}

//! The same, delivered to the same addresses (data and barrier) of every block of the cluster whose bit is in `blocks`.
__device__ __forceinline__ void loadBoxMulticast(uint32_t destination, CUtensorMap const* map, int32_t column,
                                                 int32_t row, uint32_t barrier, uint16_t blocks)
{
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%0], [%1, {%4, %5}], [%2], %3;" ::"r"(destination),
        "l"(map), "r"(barrier), "h"(blocks), "r"(column), "r"(row)
        : "memory");
}

//! cp.async.bulk.tensor.2d shared -> global: the box at (column, row) from `source`; what lies outside is not written.
__device__ __forceinline__ void storeBox(CUtensorMap const* map, int32_t column, int32_t row, uint32_t source)
{
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(source),
                 "r"(column), "r"(row)
                 : "memory");
}

//! cp.async.bulk.commit_group: closes the group of this thread's stores since the last one.
__device__ __forceinline__ void storeCommit()
{
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

//! cp.async.bulk.wait_group.read: until at most kPENDING of this thread's groups still read shared memory.
template <int kPENDING>
__device__ __forceinline__ void storeWaitRead()
{
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPENDING) : "memory");
}

//! fence.proxy.async: orders this thread's ordinary shared-memory accesses before later ones of the copy engine.
__device__ __forceinline__ void proxyFence()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

//! By a whole warp, before it arrives where the copy engine waits to write what its lanes have read. Their loads may
//! not have happened yet, and neither their order nor an arrival holds the copy engine back: without this it writes
//! into memory that is still to be read.
__device__ __forceinline__ void endReads()
{
    proxyFence();
    __syncwarp();
}

// ---- bulk copies ----

//! cp.async.bulk: `bytes` (a multiple of 16) to this block's shared memory; they count on `barrier`.
__device__ __forceinline__ void copyBulk(void* to, void const* from, uint32_t bytes, uint32_t barrier)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     sharedAddress(to)),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
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

//! The same, with a policy of L2.
__device__ __forceinline__ void copyBulk(uint32_t to, void const* from, uint32_t bytes, uint32_t barrier,
                                         uint64_t policy)
{
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
            "r"(to),
        "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
        : "memory");
}

//! cp.async.bulk.prefetch.L2: `bytes` (a multiple of 16, not 0) are soon to be read. Only a hint.
__device__ __forceinline__ void prefetchBulk(void const* from, uint32_t bytes)
{
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

// ---- words between blocks, through global memory ----

//! Reads 8 bytes that other kernels write, past L1. The compiler leaves it where it stands: early.
__device__ __forceinline__ int2 loadEarly(int2 const* address)
{
    int2 words;
    asm volatile("ld.global.cg.v2.s32 {%0, %1}, [%2];" : "=r"(words.x), "=r"(words.y) : "l"(address));
    return words;
}

//! 128 bits that are written at once.
struct __align__(16) Quad
{
    uint64_t low;
    uint64_t high;
};

//! Two words of 64 bits, each written at once.
__device__ __forceinline__ void publish(ulonglong2* to, uint64_t first, uint64_t second)
{
    asm volatile("st.relaxed.gpu.global.v2.u64 [%0], {%1, %2};" ::"l"(to), "l"(first), "l"(second) : "memory");
}

__device__ __forceinline__ ulonglong2 readPublished(ulonglong2 const* from)
{
    ulonglong2 v;
    asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(v.x), "=l"(v.y) : "l"(from) : "memory");
    return v;
}

__device__ __forceinline__ void publish(Quad* to, Quad const& value)
{
    asm volatile(
        "{\n"
        ".reg .b128 quad;\n"
        "mov.b128 quad, {%1, %2};\n"
        "st.relaxed.gpu.global.b128 [%0], quad;\n"
        "}\n" ::"l"(to),
        "l"(value.low), "l"(value.high)
        : "memory");
}

__device__ __forceinline__ Quad readPublished(Quad const* from)
{
    Quad v;
    asm volatile(
        "{\n"
        ".reg .b128 quad;\n"
        "ld.relaxed.gpu.global.b128 quad, [%2];\n"
        "mov.b128 {%0, %1}, quad;\n"
        "}\n"
        : "=l"(v.low), "=l"(v.high)
        : "l"(from)
        : "memory");
    return v;
}

//! atom.add.acq_rel: one more has arrived. Returns how many had before; the last sees what all others wrote.
__device__ __forceinline__ int countArrival(int* arrived)
{
    int before;
    asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;" : "=r"(before) : "l"(arrived) : "memory");
    return before;
}

// ---- threads of a block ----

//! threadIdx.x, asked for again: what follows from it is computed anew, and no register has kept it.
__device__ __forceinline__ unsigned threadIndexAnew()
{
    unsigned index;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
    return index;
}

//! Declares NAME, the block's dynamic shared memory.
#define TROCR_DYNAMIC_SHARED(NAME, ALIGNMENT) \
    extern __shared__ __align__(ALIGNMENT)    \
    uint8_t NAME[]

//! bar.sync: a barrier, number kBARRIER (0 is __syncthreads'), of kTHREADS threads.
template <int kBARRIER, int kTHREADS>
__device__ __forceinline__ void syncSome()
{
    asm volatile("bar.sync %0, %1;" ::"n"(kBARRIER), "n"(kTHREADS) : "memory");
}

//! bar.red.or: the same, and whether `condition` held for any thread.
template <int kBARRIER, int kTHREADS>
__device__ __forceinline__ bool syncSomeAny(bool condition)
{
    int any;
    asm volatile(
        "{\n"
        ".reg .pred mine, any;\n"
        "setp.ne.s32 mine, %1, 0;\n"
        "bar.red.or.pred any, %2, %3, mine;\n"
        "selp.s32 %0, 1, 0, any;\n"
        "}\n"
        : "=r"(any)
        : "r"(static_cast<int>(condition)), "n"(kBARRIER), "n"(kTHREADS)
        : "memory");
    return any != 0;
}

//! The compiler computes both here, not where they are needed.
__device__ __forceinline__ void keepHere(float& a, float& b)
{
    asm volatile("" : "+f"(a), "+f"(b));
}

// ---- 8x8 matrices between registers and shared memory ----

//! stmatrix.x4: the reverse of loadMatrices (mma.cuh).
__device__ __forceinline__ void storeMatrices(uint32_t row, uint32_t const (&r)[4])
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(r[0]), "r"(r[1]),
                 "r"(r[2]), "r"(r[3])
                 : "memory");
}

//! ld.shared.v4: 16 bytes.
__device__ __forceinline__ uint4 loadShared(uint32_t address)
{
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}

//! ld.shared.v2: 8 bytes.
__device__ __forceinline__ uint2 loadSharedPair(uint32_t address)
{
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
    return v;
}

//! ld.shared::cluster: four floats of another block's shared memory (address from mapToRank).
__device__ __forceinline__ float4 loadFromCluster(uint32_t address)
{
    float4 v;
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}

// ---- warpgroup matrix multiply ----

//! setmaxnreg: registers a thread of this warpgroup from here on.
template <int kREGISTERS>
__device__ __forceinline__ void growRegisters()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kREGISTERS));
}

template <int kREGISTERS>
__device__ __forceinline__ void shrinkRegisters()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kREGISTERS));
}

//! Descriptor of a K-major operand in rows of 128 bytes (64 elements of two bytes, 128 e4m3), as the copy engine leaves
//! them with CU_TENSOR_MAP_SWIZZLE_128B, at an address that is a multiple of 1024:
//!   bits 0-13   start >> 4; the next 32 bytes of K are + 2, the next 64 rows + 512
//!   bits 16-29  leading offset, unused with a swizzle
//!   bits 32-45  bytes from eight rows to the next eight >> 4: 1024 >> 4
//!   bits 62-63  1: 128-byte swizzle
__device__ __forceinline__ uint64_t operandDescriptor(uint32_t address)
{
    return static_cast<uint64_t>((address & 0x3FFFF) >> 4) | (uint64_t{1} << 16) | (uint64_t{1024 >> 4} << 32) |
           (uint64_t{1} << 62);
}

//! wgmma.fence: before the first wgmma, and where registers it uses were touched.
__device__ __forceinline__ void wgmmaFence()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmmaCommit()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int kPENDING>
__device__ __forceinline__ void wgmmaWait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPENDING) : "memory");
}

//! wgmma.m64nNk16: d[64, N] (+)= a[64, 16] b[N, 16]^T, for e4m3 k32. d[4 j + 2 h + e] of lane l of warp w is the
//! element of row 16 w + 8 h + l / 4 and column 8 j + 2 (l % 4) + e. `accumulate` 0 overwrites d. `a` comes from shared
//! memory, or (two-byte types) from registers: for each warp's 16 rows as in mma.m16n8k16.
template <typename T, int N>
struct Wgmma;

#define TROCR_D8(i)                                                                                             \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define TROCR_D32(i) TROCR_D8(i), TROCR_D8(i + 8), TROCR_D8(i + 16), TROCR_D8(i + 24)

// Places of the accumulators in the instruction's text: 0 to 31, 32 to 63, 64 to 95.
#define TROCR_P0                                            \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15" \
    ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define TROCR_P32                                                      \
    ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47" \
    ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define TROCR_P64                                                      \
    ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79" \
    ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"

// TYPES: K, and the types; LEFT: the parameter a; A, B, ACCUMULATE: its, b's and the flag's places; LAYOUT: which
// operands are transposed.
#define TROCR_RUN(TYPES, N, PLACES, LEFT, A, B, ACCUMULATE, LAYOUT, OPERANDS, ...)                     \
    static __device__ __forceinline__ void run(float(&d)[N / 2], LEFT, uint64_t b, int accumulate)     \
    {                                                                                                  \
        asm volatile(                                                                                  \
            "{\n"                                                                                      \
            ".reg .pred p;\n"                                                                          \
            "setp.ne.b32 p, " ACCUMULATE                                                               \
            ", 0;\n"                                                                                   \
            "wgmma.mma_async.sync.aligned.m64n" #N TYPES " {" PLACES "}, " A ", " B ", p, 1, 1" LAYOUT \
            ";\n"                                                                                      \
            "}\n"                                                                                      \
            : __VA_ARGS__                                                                              \
            : OPERANDS, "l"(b), "r"(accumulate));                                                      \
    }
// P0 to P5: the places behind those of the accumulators.
#define TROCR_REGISTERS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
#define TROCR_WGMMA(T, TYPES, N, PLACES, P0, P1, P2, P3, P4, P5, ...)                                       \
    template <>                                                                                             \
    struct Wgmma<T, N>                                                                                      \
    {                                                                                                       \
        TROCR_RUN(TYPES, N, PLACES, uint64_t a, P0, P1, P2, ", 0, 0", "l"(a), __VA_ARGS__)                  \
        TROCR_RUN(TYPES, N, PLACES, uint32_t const (&a)[4], "{" P0 "," P1 "," P2 "," P3 "}", P4, P5, ", 0", \
                  TROCR_REGISTERS, __VA_ARGS__)                                                             \
    };
#define TROCR_WGMMAS(T, TYPES)                                                                                         \
    TROCR_WGMMA(T, TYPES, 64, TROCR_P0, "%32", "%33", "%34", "%35", "%36", "%37", TROCR_D32(0))                        \
    TROCR_WGMMA(T, TYPES, 128, TROCR_P0 TROCR_P32, "%64", "%65", "%66", "%67", "%68", "%69", TROCR_D32(0),             \
                TROCR_D32(32))                                                                                         \
    TROCR_WGMMA(T, TYPES, 192, TROCR_P0 TROCR_P32 TROCR_P64, "%96", "%97", "%98", "%99", "%100", "%101", TROCR_D32(0), \
                TROCR_D32(32), TROCR_D32(64))
TROCR_WGMMAS(__half, "k16.f32.f16.f16")
TROCR_WGMMAS(__nv_bfloat16, "k16.f32.bf16.bf16")

#define TROCR_E4M3(N, PLACES, P0, P1, P2, ...)                                                     \
    template <>                                                                                    \
    struct Wgmma<__nv_fp8_e4m3, N>                                                                 \
    {                                                                                              \
        TROCR_RUN("k32.f32.e4m3.e4m3", N, PLACES, uint64_t a, P0, P1, P2, "", "l"(a), __VA_ARGS__) \
    };
TROCR_E4M3(64, TROCR_P0, "%32", "%33", "%34", TROCR_D32(0))
TROCR_E4M3(128, TROCR_P0 TROCR_P32, "%64", "%65", "%66", TROCR_D32(0), TROCR_D32(32))
TROCR_E4M3(192, TROCR_P0 TROCR_P32 TROCR_P64, "%96", "%97", "%98", TROCR_D32(0), TROCR_D32(32), TROCR_D32(64))

#undef TROCR_E4M3
#undef TROCR_WGMMAS
#undef TROCR_WGMMA
#undef TROCR_REGISTERS
#undef TROCR_RUN
#undef TROCR_P64
#undef TROCR_P32
#undef TROCR_P0
#undef TROCR_D32
#undef TROCR_D8

//! Keeps reads of the accumulators behind wgmmaWait: the compiler does not know that the wait finishes them.
template <int N>
__device__ __forceinline__ void wgmmaResult(float (&d)[N])
{
#pragma unroll
    for (int i = 0; i < N; ++i)
    {
        asm volatile("" : "+f"(d[i])::"memory");
    }
}

}  // namespace trocr::sm90
