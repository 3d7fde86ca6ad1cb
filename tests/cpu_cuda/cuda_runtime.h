#pragma once

// So much of CUDA as the decoders' kernels and their launchers need, on a CPU. README.md says what it shows.

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#undef __global__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#undef __shared__
#define __shared__ static  // where it is not dynamic: blocks that have it run one after another
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

using std::max;
using std::min;

namespace cpu_cuda
{

constexpr int kLANES = 32;
constexpr int kMULTIPROCESSORS = 34;
constexpr int kCLUSTERS = 2;  //!< at once
constexpr size_t kSHARED_BYTES = 227 * 1024;

//! Rounds that slow warps, an eighth of all and other ones every now and then, take for what others do in one; at most.
extern unsigned slowestWarp;

struct Cluster;

//! Threads that wait until so many have come.
struct Barrier
{
    int arrived = 0;
    uint8_t turn = 0;

    void wait(int threads);
    //! Lets those go who wait, where fewer are left to come.
    void lose(int threads);
};

//! What the lanes of a warp show each other: twice, so that a lane may be one exchange ahead.
struct Warp
{
    Barrier barrier;
    uint64_t shown[2][kLANES];
};

struct Block
{
    dim3 index;
    Cluster* cluster;
    int rank;
    int alive;
    uint8_t* shared;
    std::vector<Warp> warps;
    Barrier barriers[4];
    bool any[2];                                                       //!< of barrier 1
    std::vector<bool> copied = std::vector<bool>(kSHARED_BYTES / 16);  //!< into shared memory, 16 bytes, by bulk copies
};

struct Cluster
{
    std::vector<Block> blocks;
    Barrier barrier;
    int alive;
};

struct Thread
{
    void* stack;  //!< its pointer, while it does not run
    Block* block;
    unsigned index;
    bool ended;
    //! What it waits for: that this is no more what it was. nullptr: nothing.
    uint8_t const* watched;
    uint8_t seen;
    bool loading;  //!< what bulk copies write, by loads that nothing has waited for
};

extern Thread* running;
extern dim3 gridSize;

//! Lets the other threads go on.
void yield();

//! Lets them go on until the byte is another. It is spared the switches that looking for itself would take.
void waitWhile(uint8_t const& byte, uint8_t value);

//! Ends the launch with an error, from one of its threads.
[[noreturn]] void fail(char const* why);

//! Runs `work` later, at any time: an asynchronous copy.
void later(std::function<void()> work);

//! Runs a kernel; `together`: all clusters at once.
cudaError_t run(dim3 blocks, unsigned threads, unsigned cluster, bool together, std::function<void()> kernel);

//! Runs a kernel, or records it in the graph that is captured.
cudaError_t launch(cudaLaunchConfig_t const& config, std::function<void()> kernel);

inline void Barrier::wait(int threads)
{
    uint8_t const mine = turn;
    ++arrived;
    lose(threads);
    waitWhile(turn, mine);
}

inline void Barrier::lose(int threads)
{
    if (arrived > 0 && arrived >= threads)
    {
        arrived = 0;
        ++turn;
    }
}

inline int lane()
{
    return static_cast<int>(running->index) % kLANES;
}

inline Warp& warp()
{
    return running->block->warps[running->index / kLANES];
}

template <typename T>
uint64_t bitsOf(T value)
{
    static_assert(sizeof(value) <= sizeof(uint64_t));
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(value));
    return bits;
}

template <typename T>
T valueOf(uint64_t bits)
{
    T value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

//! What every lane of the warp gives; valid until the lane shows something for the second time after.
template <typename T>
uint64_t const* show(T value)
{
    Warp& mine = warp();
    uint64_t* const shown = mine.shown[mine.barrier.turn % 2];
    shown[lane()] = bitsOf(value);
    mine.barrier.wait(kLANES);
    return shown;
}

//! Memory at an address as PTX has it for shared memory: rank in the cluster, plus one, and offset.
inline uint8_t* memory(uint32_t address)
{
    auto& blocks = running->block->cluster->blocks;
    size_t const rank = (address >> 24) - 1;
    size_t const offset = address & 0xffffff;
    if (rank >= blocks.size() || offset >= kSHARED_BYTES)
    {
        fail("an address outside of the cluster's shared memory");
    }
    return blocks[rank].shared + offset;
}

//! The offset of a pointer into this block's shared memory.
inline size_t offsetOf(void const* pointer)
{
    size_t const offset = static_cast<uint8_t const*>(pointer) - running->block->shared;
    if (offset >= kSHARED_BYTES)
    {
        fail("a pointer that is not into the block's shared memory");
    }
    return offset;
}

//! A bulk copy to this block's shared memory, of a multiple of 16 bytes.
inline void noteCopy(void const* to, size_t bytes)
{
    auto const first = running->block->copied.begin() + static_cast<ptrdiff_t>(offsetOf(to) / 16);
    std::fill_n(first, bytes / 16, true);
}

//! A load of 16 bytes of shared memory.
inline void noteLoad(uint32_t address)
{
    running->loading = running->loading || running->block->copied[(address & 0xffffff) / 16];
}

struct ThreadIndex
{
    struct X
    {
        operator unsigned() const
        {
            return running->index;
        }
    } x;
};

struct BlockIndex
{
    struct X
    {
        operator unsigned() const
        {
            return running->block->index.x;
        }
    } x;
    struct Y
    {
        operator unsigned() const
        {
            return running->block->index.y;
        }
    } y;
};

struct GridSize
{
    struct X
    {
        operator unsigned() const
        {
            return gridSize.x;
        }
    } x;
    struct Y
    {
        operator unsigned() const
        {
            return gridSize.y;
        }
    } y;
};

}  // namespace cpu_cuda

inline cpu_cuda::ThreadIndex threadIdx;
inline cpu_cuda::BlockIndex blockIdx;
inline cpu_cuda::GridSize gridDim;

inline void __syncthreads()
{
    cpu_cuda::Block& block = *cpu_cuda::running->block;
    block.barriers[0].wait(block.alive);
}

inline void __syncwarp()
{
    cpu_cuda::show(0);
}

inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector)
{
    uint64_t const bytes = low | static_cast<uint64_t>(high) << 32;
    unsigned chosen = 0;
    for (int i = 0; i < 4; ++i)
    {
        chosen |= static_cast<unsigned>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    }
    return chosen;
}

template <typename T>
T __shfl_sync(unsigned /*mask*/, T value, int from)
{
    return cpu_cuda::valueOf<T>(cpu_cuda::show(value)[from]);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int offset)
{
    return __shfl_sync(mask, value, cpu_cuda::lane() ^ offset);
}

inline unsigned __ballot_sync(unsigned /*mask*/, bool vote)
{
    uint64_t const* const votes = cpu_cuda::show(vote);
    unsigned all = 0;
    for (int lane = 0; lane < cpu_cuda::kLANES; ++lane)
    {
        all |= static_cast<unsigned>(votes[lane] & 1) << lane;
    }
    return all;
}

inline bool __any_sync(unsigned mask, bool vote)
{
    return __ballot_sync(mask, vote) != 0;
}

inline bool __all_sync(unsigned mask, bool vote)
{
    return __ballot_sync(mask, !vote) == 0;
}

inline unsigned __reduce_max_sync(unsigned /*mask*/, unsigned value)
{
    uint64_t const* const shown = cpu_cuda::show(value);
    return static_cast<unsigned>(*std::max_element(shown, shown + cpu_cuda::kLANES));
}

inline int __reduce_min_sync(unsigned /*mask*/, int value)
{
    uint64_t const* const shown = cpu_cuda::show(value);
    int least = value;
    for (int lane = 0; lane < cpu_cuda::kLANES; ++lane)
    {
        least = min(least, cpu_cuda::valueOf<int>(shown[lane]));
    }
    return least;
}

inline float __fdividef(float a, float b)
{
    return a / b;
}

inline int __popc(unsigned bits)
{
    return __builtin_popcount(bits);
}

inline int __ffs(int bits)
{
    return __builtin_ffs(bits);
}

inline unsigned __float_as_uint(float value)
{
    return cpu_cuda::valueOf<unsigned>(cpu_cuda::bitsOf(value));
}

inline int __float_as_int(float value)
{
    return cpu_cuda::valueOf<int>(cpu_cuda::bitsOf(value));
}

inline float __uint_as_float(unsigned bits)
{
    return cpu_cuda::valueOf<float>(bits);
}

inline float __int_as_float(int bits)
{
    return cpu_cuda::valueOf<float>(static_cast<unsigned>(bits));
}

inline int __float2int_rn(float value)
{
    return static_cast<int>(std::lrintf(value));
}

inline float rsqrtf(float value)
{
    return 1.0F / std::sqrt(value);
}

// Threads take turns, so that nothing can come between.

template <typename T, typename U>
T atomicAdd(T* to, U value)
{
    return std::exchange(*to, static_cast<T>(*to + value));
}

inline int atomicSub(int* from, int value)
{
    return atomicAdd(from, -value);
}

template <typename T>
T __ldg(T const* from)
{
    return *from;
}

template <typename T>
T __ldcg(T const* from)
{
    return *from;
}

inline void cudaGraphSetConditional(cudaGraphConditionalHandle handle, unsigned value)
{
    *reinterpret_cast<unsigned*>(handle) = value;  // its address
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(cudaLaunchConfig_t const* config, void (*kernel)(Parameters...), Arguments... arguments)
{
    return cpu_cuda::launch(*config, [=]() { kernel(arguments...); });
}

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* /*kernel*/, cudaFuncAttribute /*attribute*/, int /*value*/)
{
    return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel* /*kernel*/, cudaLaunchConfig_t const* /*config*/)
{
    *clusters = cpu_cuda::kCLUSTERS;
    return cudaSuccess;
}
