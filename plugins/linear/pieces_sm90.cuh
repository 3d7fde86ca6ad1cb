#pragma once

// Hopper kernels: the copy engine fills a ring of swizzled stages, wgmma reads them, outputs leave through the copy
// engine again. README.md has the pictures: pipeline, shared memory, tiles.

#include <algorithm>

#include "common/device.cuh"
#include "common/sm90.cuh"
#include "linear/epilogue.cuh"
#include "linear/tactics.h"

namespace trocr::linear_detail
{

constexpr int kROW_BYTES = 128;  //!< of a stage: one swizzled row
//! Inputs of a step.
template <typename T>
constexpr int kBLOCK_K = kROW_BYTES / static_cast<int>(sizeof(typename TypesOf<T>::Operand));
constexpr int kWEIGHTS_AHEAD = 2;  //!< stages of the weight that are asked for before the preceding grid has ended
constexpr int kSTEP_PRODUCTS = kROW_BYTES / 32;  //!< wgmma instructions of a step, 32 bytes of K each
constexpr int kCHUNK_BYTES = kCHUNK_ROWS * kCHUNK_COLUMNS * 2;
constexpr int kSHARED_LIMIT = 227 * 1024;

//! Boxes, all swizzled by 128 bytes: x 64 rows of 128 bytes, weight the rows of a stage, y and residual T [16, 64].
struct TensorMaps
{
    CUtensorMap x;
    CUtensorMap weight;
    CUtensorMap y;
    CUtensorMap residual;
};

//! One tile size: kM64 times 64 rows, kBN columns. Persistent kernel: computed by one warpgroup, kGROUPS of them take
//! turns; split kernel: kGROUPS is kM64, a warpgroup for each 64 rows.
template <int kM64_, int kBN_, int kSTAGES_, int kGROUPS_, int kBUFFERS_, int kTALL_ = 1, int kWIDE_ = 1>
struct Tile
{
    static constexpr int kTALL = kTALL_;  //!< persistent kernel: tiles of a cluster, one below the other,
    static constexpr int kWIDE = kWIDE_;  //!< and side by side
    static constexpr int kM64 = kM64_;
    static constexpr int kBM = 64 * kM64;
    static constexpr int kBN = kBN_;
    static constexpr int kSTAGES = kSTAGES_;
    static constexpr int kGROUPS = kGROUPS_;
    static constexpr int kWARPS = 4 * kGROUPS;
    static constexpr int kBUFFERS = kBUFFERS_;  //!< output chunks in flight, a warp
    static constexpr int kCHUNKS_N = kBN / kCHUNK_COLUMNS;
    static constexpr int kCHUNKS = kM64 * kCHUNKS_N;  //!< chunks of a tile, a warp
    static constexpr int kX_BYTES = kBM * kROW_BYTES;
    static constexpr int kSTAGE_BYTES = kX_BYTES + kBN * kROW_BYTES;
    //! Split kernel: accumulators of one chunk of all four warps.
    static constexpr int kPARTIAL_BYTES = 4 * kCHUNK_ROWS * kCHUNK_COLUMNS * 4;

    // Shared memory, from a multiple of 1024: stages; for each warp its chunk buffers, columns' and rows' constants;
    // barriers.
    static constexpr int kSTAGES_AT = 0;
    static constexpr int kBUFFERS_AT = kSTAGES * kSTAGE_BYTES;
    static constexpr int kCOLUMNS_AT = kBUFFERS_AT + kWARPS * kBUFFERS * kCHUNK_BYTES;
    static constexpr int kSCALES_AT = kCOLUMNS_AT + kWARPS * kBN * 8;
    static constexpr int kBARRIERS_AT = kSCALES_AT + kWARPS * kM64 * kCHUNK_ROWS * 8;
    static constexpr int kBARRIERS = 2 * kSTAGES + kGROUPS + kWARPS * kBUFFERS;
    static constexpr int kSHARED_BYTES = kBARRIERS_AT + kBARRIERS * 8;

    static_assert(kSHARED_BYTES <= kSHARED_LIMIT);
    static_assert(kCHUNKS * kPARTIAL_BYTES <= kBUFFERS_AT, "partial accumulators lie in the stages");
};

//! Position in the ring of stages; the parity is that of the stage's fill.
template <int kSTAGES>
struct RingPosition
{
    uint32_t stage = 0;
    uint32_t parity = 0;

    __device__ __forceinline__ void advance(uint32_t steps = 1)
    {
        stage += steps;
        if (stage >= kSTAGES)
        {
            parity ^= (stage / kSTAGES) & 1;
            stage %= kSTAGES;
        }
    }
};

//! Addresses of a block's shared memory.
template <typename TILE>
struct Shared
{
    uint32_t base;

    __device__ __forceinline__ uint32_t x(uint32_t stage) const
    {
        return base + TILE::kSTAGES_AT + stage * TILE::kSTAGE_BYTES;
    }
    __device__ __forceinline__ uint32_t weight(uint32_t stage) const
    {
        return x(stage) + TILE::kX_BYTES;
    }
    __device__ __forceinline__ uint32_t chunk(uint32_t warp, uint32_t buffer) const
    {
        return base + TILE::kBUFFERS_AT + (warp * TILE::kBUFFERS + buffer) * kCHUNK_BYTES;
    }
    //! Completed by the copy engine: the stage holds data.
    __device__ __forceinline__ uint32_t full(uint32_t stage) const
    {
        return base + TILE::kBARRIERS_AT + stage * 8;
    }
    //! Completed by the consumers: the stage may be overwritten.
    __device__ __forceinline__ uint32_t empty(uint32_t stage) const
    {
        return full(TILE::kSTAGES + stage);
    }
    //! Completed by the other warpgroup: it has issued its tile's products.
    __device__ __forceinline__ uint32_t turn(uint32_t group) const
    {
        return full(2 * TILE::kSTAGES + group);
    }
    //! Completed by the copy engine: the residual's chunk is in the buffer.
    __device__ __forceinline__ uint32_t residual(uint32_t warp, uint32_t buffer) const
    {
        return full(2 * TILE::kSTAGES + TILE::kGROUPS + warp * TILE::kBUFFERS + buffer);
    }
};

//! Of a warp: scales [kM64 * 16 rows] and column pairs [kBN / 2].
template <typename TILE>
__device__ __forceinline__ float2* rowScalesOf(uint8_t* sharedMemory, uint32_t warp)
{
    return reinterpret_cast<float2*>(sharedMemory + TILE::kSCALES_AT) + warp * TILE::kM64 * kCHUNK_ROWS;
}

template <typename TILE>
__device__ __forceinline__ ColumnPair* columnPairsOf(uint8_t* sharedMemory, uint32_t warp)
{
    return reinterpret_cast<ColumnPair*>(sharedMemory + TILE::kCOLUMNS_AT) + warp * (TILE::kBN / 2);
}

//! By one thread. A stage is empty after an arrival of every warp that read it, in `sharers` blocks.
template <typename TILE>
__device__ __forceinline__ void initBarriers(Shared<TILE> const& shared, int sharers)
{
    for (int i = 0; i < TILE::kSTAGES; ++i)
    {
        sm90::barrierInit(shared.full(i), 1);
        sm90::barrierInit(shared.empty(i), 4 * sharers);
    }
    for (int i = 0; i < TILE::kGROUPS; ++i)
    {
        sm90::barrierInit(shared.turn(i), 4);
    }
    for (int i = 0; i < TILE::kWARPS * TILE::kBUFFERS; ++i)
    {
        sm90::barrierInit(shared.residual(0, i), 1);
    }
    sm90::barrierInitFence();
}

__device__ __forceinline__ void prefetchMaps(TensorMaps const& maps)
{
    sm90::prefetchTensorMap(&maps.weight);
    sm90::prefetchTensorMap(&maps.x);
    sm90::prefetchTensorMap(&maps.residual);
    sm90::prefetchTensorMap(&maps.y);
}

//! acc = x tile . weight tile^T over `count` stages, of kM64 times 64 rows from the `first` times 64th on.
//! release(stage) hands a stage back; issued() is called when the last product is on its way.
template <typename T, typename TILE, int kM64, int kMOST, typename RELEASE, typename ISSUED>
__device__ __forceinline__ void multiply(float (&acc)[kMOST][TILE::kBN / 2], Shared<TILE> const& shared,
                                         RingPosition<TILE::kSTAGES>& ring, int count, RELEASE release, ISSUED issued,
                                         uint32_t first = 0)
{
    uint32_t previous = 0;
    for (int step = 0; step < count; ++step)
    {
        sm90::barrierWait(shared.full(ring.stage), ring.parity);
        uint64_t const x = sm90::operandDescriptor(shared.x(ring.stage)) + 512 * first;
        uint64_t const weight = sm90::operandDescriptor(shared.weight(ring.stage));
        sm90::wgmmaFence();
#pragma unroll
        for (int k = 0; k < kSTEP_PRODUCTS; ++k)
        {
#pragma unroll
            for (int m = 0; m < kM64; ++m)
            {
                sm90::Wgmma<typename TypesOf<T>::Operand, TILE::kBN>::run(acc[m], x + 512 * m + 2 * k, weight + 2 * k,
                                                                          step != 0 || k != 0);
            }
        }
        sm90::wgmmaCommit();
        if (step > 0)
        {
            sm90::wgmmaWait<1>();
            release(previous);
        }
        previous = ring.stage;
        ring.advance();
    }
    issued();
    sm90::wgmmaWait<0>();
    release(previous);
#pragma unroll
    for (int m = 0; m < kM64; ++m)
    {
        sm90::wgmmaResult(acc[m]);
    }
}

//! One warp's chunks on their way through its buffers: residual in, output out, in place. Chunk numbers `sequence` run
//! on from tile to tile.
template <typename TILE>
struct ChunkPipe
{
    Shared<TILE> shared;
    uint32_t warp;
    uint32_t lane;
    uint32_t sequence = 0;

    __device__ __forceinline__ uint32_t address(uint32_t number) const
    {
        return shared.chunk(warp, number % TILE::kBUFFERS);
    }

    //! By lane 0: starts the load of the residual's chunk `number`, whose buffer must have been drained.
    __device__ __forceinline__ void fetch(CUtensorMap const* residual, uint32_t number, int row, int column) const
    {
        uint32_t const barrier = shared.residual(warp, number % TILE::kBUFFERS);
        sm90::barrierArriveExpect(barrier, kCHUNK_BYTES);
        sm90::loadBox(address(number), residual, column, row, barrier);
    }

    //! Before the buffer of chunk `sequence` is read (residual) or overwritten.
    template <Epilogue kEPILOGUE>
    __device__ __forceinline__ void acquire() const
    {
        if constexpr (kEPILOGUE == Epilogue::kRESIDUAL)
        {
            sm90::barrierWait(shared.residual(warp, sequence % TILE::kBUFFERS), (sequence / TILE::kBUFFERS) & 1);
        }
        else
        {
            if (lane == 0)
            {
                sm90::storeWaitRead<TILE::kBUFFERS - 1>();
            }
            __syncwarp();
        }
    }

    //! Sends the finished chunk off.
    __device__ __forceinline__ void store(CUtensorMap const* y, int row, int column) const
    {
        sm90::proxyFence();
        __syncwarp();
        if (lane == 0)
        {
            sm90::storeBox(y, column, row, address(sequence));
            sm90::storeCommit();
        }
    }

    //! The finished chunk of float16 as e4m3, to p.quantized. A lane has 16 columns of a row: it reads them in their
    //! order, and no value of the accumulators' order has to be kept for it.
    __device__ __forceinline__ void storeE4m3(EpilogueParams const& p, int row, int column) const
    {
#pragma unroll
        for (int n = 0; n < 2; ++n)
        {
            int const r = 8 * n + static_cast<int>(lane / 4);
            uint32_t const group = lane % 4;
            uint4 const low = sm90::loadShared(address(sequence) + r * kROW_BYTES + (((2 * group) ^ (r % 8)) << 4));
            uint4 const high =
                sm90::loadShared(address(sequence) + r * kROW_BYTES + (((2 * group + 1) ^ (r % 8)) << 4));
            auto const word = [&](uint32_t first, uint32_t second)
            {
                float2 const a = unpack(first, __half{});
                float2 const b = unpack(second, __half{});
                return toE4m3(a.x * p.outputFactor, a.y * p.outputFactor) |
                       toE4m3(b.x * p.outputFactor, b.y * p.outputFactor) << 16;
            };
            uint4 const piece{word(low.x, high.x), word(low.y, high.y), word(low.z, high.z), word(low.w, high.w)};
            if (row + r < p.rows && column < p.outputs)
            {
                auto* const to = p.quantized + static_cast<int64_t>(row + r) * p.outputs + column + group * 16;
                *reinterpret_cast<uint4*>(to) = piece;
            }
        }
        __syncwarp();
    }

    //! The chunk to keys and values: a row of the chunk is one head of 64 or several smaller ones, and rows of two
    //! images are far apart. Eight lanes a row, 16 bytes each.
    template <typename T>
    __device__ __forceinline__ void storeHeads(EpilogueParams const& p, int row, int column) const
    {
        __syncwarp();
        int const piece = static_cast<int>(lane % 8);
        int const first = static_cast<int>(lane / 8);
        HeadsCursor<T> to(p, row + first, column + 8 * piece);
#pragma unroll
        for (int r = first; r < kCHUNK_ROWS; r += 4, to.advance(4))
        {
            uint4 const v = sm90::loadShared(address(sequence) + r * kROW_BYTES + ((piece ^ (r % 8)) << 4));
            if (row + r < p.rows && column + 8 * piece < p.outputs)
            {
                *reinterpret_cast<uint4*>(to.get()) = v;
            }
        }
        __syncwarp();
    }
};

//! Accumulators v of one chunk -> y (and its row statistics, and e4m3).
template <typename T, Epilogue kEPILOGUE, typename TILE>
__device__ __forceinline__ void finishChunk(float const* v, ChunkPipe<TILE>& pipe, CUtensorMap const* y,
                                            EpilogueParams const& p, float2 const* scales, ColumnPair const* columns,
                                            int row, int column)
{
    RowScales const rowScales = laneScales<T>(p, scales, pipe.lane);
    if constexpr (kIS_E4M3<T> && kEPILOGUE == Epilogue::kGELU)
    {
        uint32_t words[8];
#pragma unroll
        for (int j = 0; j < 8; j += 2)
        {
            uint32_t first[2];
            uint32_t second[2];
            finishGroup<T, kEPILOGUE>(first, v + 4 * j, nullptr, rowScales, columns[4 * j + pipe.lane % 4], p);
            finishGroup<T, kEPILOGUE>(second, v + 4 * j + 4, nullptr, rowScales, columns[4 * j + 4 + pipe.lane % 4], p);
            words[j / 2] = first[0] | second[0] << 16;
            words[4 + j / 2] = first[1] | second[1] << 16;
        }
#pragma unroll
        for (int h = 0; h < 2; ++h)
        {
            uint4 const piece = transposeQuad(words[4 * h], words[4 * h + 1], words[4 * h + 2], words[4 * h + 3]);
            int const r = row + 8 * h + static_cast<int>(pipe.lane / 4);
            if (r < p.rows && column < p.outputs)
            {
                auto* const to = p.quantized + static_cast<int64_t>(r) * p.outputs + column + pipe.lane % 4 * 16;
                *reinterpret_cast<uint4*>(to) = piece;
            }
            __syncwarp();  // the next chunk is not to be begun before: there is no register for it
        }
        return;
    }
    // Lane l points at row l % 16 of the matrices of column group j + l / 16; the 16-byte columns of row r are
    // exchanged by r % 8, as the copy engine's 128-byte swizzle has them.
    uint32_t const at =
        pipe.address(pipe.sequence) + (pipe.lane % 16) * kROW_BYTES + (((pipe.lane / 16) ^ (pipe.lane % 8)) << 4);
    if constexpr (kEPILOGUE == Epilogue::kRESIDUAL)
    {
        pipe.template acquire<kEPILOGUE>();
    }
    uint32_t out[16];
#pragma unroll
    for (int j = 0; j < 8; j += 2)
    {
        uint32_t residual[4];
        if constexpr (kEPILOGUE == Epilogue::kRESIDUAL)
        {
            loadMatrices(residual, at ^ (j << 4));
        }
#pragma unroll
        for (int i = 0; i < 2; ++i)
        {
            uint32_t r[2];
            finishGroup<T, kEPILOGUE>(r, v + 4 * (j + i), residual + 2 * i, rowScales,
                                      columns[4 * (j + i) + pipe.lane % 4], p);
            out[2 * (j + i)] = r[0];
            out[2 * (j + i) + 1] = r[1];
        }
    }
    if constexpr (kEPILOGUE != Epilogue::kRESIDUAL)
    {
        pipe.template acquire<kEPILOGUE>();  // as late as possible: the buffer's last store may still read it
    }
#pragma unroll
    for (int j = 0; j < 8; j += 2)
    {
        sm90::storeMatrices(at ^ (j << 4), {out[2 * j], out[2 * j + 1], out[2 * j + 2], out[2 * j + 3]});
    }
    if (!kIS_E4M3<T> && kEPILOGUE == Epilogue::kBIAS && p.heads.tokens != 0)
    {
        pipe.template storeHeads<typename TypesOf<T>::Output>(p, row, column);
    }
    else
    {
        pipe.store(y, row, column);
    }
    if constexpr (kEPILOGUE == Epilogue::kRESIDUAL)
    {
        if (p.outputStatistics != nullptr)
        {
            storeStatistics<typename TypesOf<T>::Output>(out, p, row, column, pipe.lane);
            if constexpr (kIS_E4M3<T>)
            {
                pipe.storeE4m3(p, row, column);
            }
        }
    }
}

}  // namespace trocr::linear_detail
