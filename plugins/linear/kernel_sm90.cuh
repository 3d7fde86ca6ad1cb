#pragma once

// Hopper kernels: the copy engine fills a ring of swizzled stages, wgmma reads them, outputs leave through the copy
// engine again. README.md has the pictures: pipeline, shared memory, tiles.

#include <algorithm>

#include "common/sm90.cuh"
#include "linear/epilogue.cuh"
#include "linear/tactics.h"

namespace trocr::linear_detail
{

constexpr int kBLOCK_K = kSTEP_INPUTS;                              //!< one 128-byte swizzled row
constexpr int kROW_BYTES = kBLOCK_K * 2;
constexpr int kCHUNK_BYTES = kCHUNK_ROWS * kCHUNK_COLUMNS * 2;
constexpr int kSHARED_LIMIT = 227 * 1024;

//! Boxes: x and weight [rows of a stage, 64], y and residual [16, 64]; all swizzled by 128 bytes.
struct TensorMaps
{
    CUtensorMap x;
    CUtensorMap weight;
    CUtensorMap y;
    CUtensorMap residual;
};

//! One tile size: kM64 times 64 rows, kBN columns, computed by one warpgroup; kGROUPS warpgroups take turns.
template <int kM64_, int kBN_, int kSTAGES_, int kGROUPS_, int kBUFFERS_>
struct Tile
{
    static constexpr int kM64 = kM64_;
    static constexpr int kBM = 64 * kM64;
    static constexpr int kBN = kBN_;
    static constexpr int kSTAGES = kSTAGES_;
    static constexpr int kGROUPS = kGROUPS_;
    static constexpr int kWARPS = 4 * kGROUPS;
    static constexpr int kBUFFERS = kBUFFERS_;          //!< output chunks in flight, a warp
    static constexpr int kCHUNKS_N = kBN / kCHUNK_COLUMNS;
    static constexpr int kCHUNKS = kM64 * kCHUNKS_N;    //!< chunks of a tile, a warp
    static constexpr int kX_BYTES = kBM * kROW_BYTES;
    static constexpr int kSTAGE_BYTES = kX_BYTES + kBN * kROW_BYTES;
    //! Split kernel: accumulators of one chunk of all four warps.
    static constexpr int kPARTIAL_BYTES = 4 * kCHUNK_ROWS * kCHUNK_COLUMNS * 4;

    // Shared memory, from a multiple of 1024: stages; for each warp its chunk buffers, columns' and rows' constants;
    // barriers.
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
        return base + stage * TILE::kSTAGE_BYTES;
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

//! acc = x tile . weight tile^T over `count` stages. release(stage) hands a stage back; issued() is called when the
//! last product is on its way.
template <typename T, typename TILE, typename RELEASE, typename ISSUED>
__device__ __forceinline__ void multiply(float (&acc)[TILE::kM64][TILE::kBN / 2], Shared<TILE> const& shared,
    RingPosition<TILE::kSTAGES>& ring, int count, RELEASE release, ISSUED issued)
{
    uint32_t previous = 0;
    for (int step = 0; step < count; ++step)
    {
        sm90::barrierWait(shared.full(ring.stage), ring.parity);
        uint64_t const x = sm90::operandDescriptor(shared.x(ring.stage));
        uint64_t const weight = sm90::operandDescriptor(shared.weight(ring.stage));
        sm90::wgmmaFence();
#pragma unroll
        for (int k = 0; k < kBLOCK_K / 16; ++k)
        {
#pragma unroll
            for (int m = 0; m < TILE::kM64; ++m)
            {
                sm90::Wgmma<T, TILE::kBN>::run(acc[m], x + 512 * m + 2 * k, weight + 2 * k, step != 0 || k != 0);
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
    for (int m = 0; m < TILE::kM64; ++m)
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
            sm90::barrierWait(
                shared.residual(warp, sequence % TILE::kBUFFERS), (sequence / TILE::kBUFFERS) & 1);
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
};

//! Accumulators v of one chunk -> y (and its row statistics).
template <typename T, Epilogue kEPILOGUE, typename TILE>
__device__ __forceinline__ void finishChunk(float const* v, ChunkPipe<TILE>& pipe, CUtensorMap const* y,
    EpilogueParams const& p, float2 const* scales, ColumnPair const* columns, int row, int column)
{
    RowScales const rowScales = laneScales(p, scales, pipe.lane);
    // Lane l points at row l % 16 of the matrices of column group j + l / 16; the 16-byte columns of row r are
    // exchanged by r % 8, as the copy engine's 128-byte swizzle has them.
    uint32_t const at = pipe.address(pipe.sequence) + (pipe.lane % 16) * kROW_BYTES
        + (((pipe.lane / 16) ^ (pipe.lane % 8)) << 4);
    pipe.template acquire<kEPILOGUE>();
    uint32_t out[16];
#pragma unroll
    for (int j = 0; j < 8; j += 2)
    {
        uint32_t residual[4];
        if constexpr (kEPILOGUE == Epilogue::kRESIDUAL)
        {
            sm90::loadMatrices(residual, at ^ (j << 4));
        }
        uint32_t r[2][2];
#pragma unroll
        for (int i = 0; i < 2; ++i)
        {
            finishGroup<T, kEPILOGUE>(r[i], v + 4 * (j + i), residual + 2 * i, rowScales,
                columns[4 * (j + i) + pipe.lane % 4], p);
            out[2 * (j + i)] = r[i][0];
            out[2 * (j + i) + 1] = r[i][1];
        }
        sm90::storeMatrices(at ^ (j << 4), {r[0][0], r[0][1], r[1][0], r[1][1]});
    }
    pipe.store(y, row, column);
    if constexpr (kEPILOGUE == Epilogue::kRESIDUAL)
    {
        if (p.outputStatistics != nullptr)
        {
            storeStatistics<T>(out, p, row, column, pipe.lane);
        }
    }
}

//! Large problems. A cluster of two blocks computes two tiles of the same columns, one below the other; each block
//! fetches half of the weight's stage for both. Blocks stay and take tile after tile; their two warpgroups take turns,
//! so that one finishes a tile while the other multiplies.
template <typename T, Epilogue kEPILOGUE, typename TILE>
__global__ void __launch_bounds__(384, 1)
    linearPersistent(__grid_constant__ TensorMaps const maps, __grid_constant__ EpilogueParams const p)
{
    constexpr int kBM = TILE::kBM;
    constexpr int kBN = TILE::kBN;
    extern __shared__ __align__(1024) uint8_t sharedMemory[];
    Shared<TILE> const shared{sm90::sharedAddress(sharedMemory)};

    uint32_t const warp = __shfl_sync(0xFFFFFFFFU, threadIdx.x / 32, 0);
    uint32_t const lane = threadIdx.x % 32;
    uint32_t const rank = sm90::clusterRank();

    int const steps = (p.inputs + kBLOCK_K - 1) / kBLOCK_K;
    int const columnTiles = (p.outputs + kBN - 1) / kBN;
    int const tilePairs = columnTiles * ((p.rows + 2 * kBM - 1) / (2 * kBM));
    int const clusters = gridDim.x / 2;
    int const cluster = blockIdx.x / 2;

    if (threadIdx.x == 0)
    {
        initBarriers(shared, 2);
        prefetchMaps(maps);
    }
    sm90::clusterSyncRelaxed();
    __syncthreads();
    sm90::launchDependents();

    if (warp >= TILE::kWARPS)
    {
        sm90::shrinkRegisters<24>();
        if (warp == TILE::kWARPS && lane == 0)
        {
            auto const fetchWeight = [&](RingPosition<TILE::kSTAGES> const& ring, int step, int column)
            {
                uint32_t const offset = rank * (kBN / 2);
                sm90::barrierArriveExpect(shared.full(ring.stage), TILE::kSTAGE_BYTES);
                sm90::loadBoxMulticast(shared.weight(ring.stage) + offset * kROW_BYTES, &maps.weight, step * kBLOCK_K,
                    column + offset, shared.full(ring.stage), 3);
            };
            // The weight does not depend on the preceding grid: fill the ring with it first.
            int const ahead = steps < TILE::kSTAGES ? steps : TILE::kSTAGES;
            {
                RingPosition<TILE::kSTAGES> ring;
                for (int step = 0; step < ahead; ++step, ring.advance())
                {
                    fetchWeight(ring, step, cluster % columnTiles * kBN);
                }
            }
            sm90::waitForPriorGrids();

            RingPosition<TILE::kSTAGES> ring;
            for (int pair = cluster; pair < tilePairs; pair += clusters)
            {
                int const row = (pair / columnTiles * 2 + rank) * kBM;
                int const column = pair % columnTiles * kBN;
                for (int step = 0; step < steps; ++step, ring.advance())
                {
                    if (pair != cluster || step >= ahead)
                    {
                        sm90::barrierWait(shared.empty(ring.stage), ring.parity ^ 1);
                        fetchWeight(ring, step, column);
                    }
                    sm90::loadBox(
                        shared.x(ring.stage), &maps.x, step * kBLOCK_K, row, shared.full(ring.stage));
                }
            }
            // The peer arrives at this block's barriers: the block must not leave before the last arrival.
            for (int i = 0; i < TILE::kSTAGES; ++i, ring.advance())
            {
                sm90::barrierWait(shared.empty(ring.stage), ring.parity ^ 1);
            }
        }
    }
    else
    {
        sm90::growRegisters<240>();
        sm90::waitForPriorGrids();
        uint32_t const group = warp / 4;
        ChunkPipe<TILE> pipe{shared, warp, lane};
        auto* const scales = rowScalesOf<TILE>(sharedMemory, warp);
        auto* const columns = columnPairsOf<TILE>(sharedMemory, warp);
        RingPosition<TILE::kSTAGES> ring;
        ring.advance(group * steps);
        uint32_t turnParity = group ^ 1; // group 0 begins

        for (int pair = cluster + group * clusters; pair < tilePairs; pair += 2 * clusters)
        {
            int const row = (pair / columnTiles * 2 + rank) * kBM + warp % 4 * kCHUNK_ROWS;
            int const column = pair % columnTiles * kBN;
            auto const chunkRow = [&](int chunk) { return row + chunk / TILE::kCHUNKS_N * 64; };
            auto const chunkColumn = [&](int chunk) { return column + chunk % TILE::kCHUNKS_N * kCHUNK_COLUMNS; };

            // What the epilogue will read is fetched while the other warpgroup multiplies.
            loadColumnPairs<kBN>(columns, p, column, lane);
            if (p.inputStatistics != nullptr)
            {
                loadRowScales<TILE::kM64>(scales, p, row, 64, lane);
            }
            if (kEPILOGUE == Epilogue::kRESIDUAL && lane == 0)
            {
                sm90::storeWaitRead<0>();
                for (int chunk = 0; chunk < TILE::kBUFFERS; ++chunk)
                {
                    pipe.fetch(&maps.residual, pipe.sequence + chunk, chunkRow(chunk), chunkColumn(chunk));
                }
            }

            sm90::barrierWait(shared.turn(group), turnParity);
            turnParity ^= 1;
            float acc[TILE::kM64][kBN / 2];
            multiply<T, TILE>(
                acc, shared, ring, steps,
                [&](uint32_t stage)
                {
                    if (lane < 2)
                    {
                        sm90::barrierArriveAtRank(shared.empty(stage), lane);
                    }
                },
                [&]
                {
                    if (lane == 0)
                    {
                        sm90::barrierArrive(shared.turn(group ^ 1));
                    }
                });
            ring.advance(steps); // the other warpgroup's tile

#pragma unroll
            for (int chunk = 0; chunk < TILE::kCHUNKS; ++chunk, ++pipe.sequence)
            {
                int const m = chunk / TILE::kCHUNKS_N;
                int const n = chunk % TILE::kCHUNKS_N;
                finishChunk<T, kEPILOGUE>(&acc[m][n * 32], pipe, &maps.y, p, scales + m * kCHUNK_ROWS,
                    columns + n * 32, chunkRow(chunk), chunkColumn(chunk));
                // The preceding chunk's buffer is drained by now: its next residual can come.
                int const next = chunk - 1 + TILE::kBUFFERS;
                if (kEPILOGUE == Epilogue::kRESIDUAL && chunk > 0 && next < TILE::kCHUNKS && lane == 0)
                {
                    sm90::storeWaitRead<1>();
                    pipe.fetch(&maps.residual, pipe.sequence - 1 + TILE::kBUFFERS, chunkRow(next), chunkColumn(next));
                }
            }
        }
        if (lane == 0)
        {
            sm90::storeWaitRead<0>();
        }
    }
}

//! Small problems. A cluster computes one tile: block r multiplies steps r, r + size, ..., leaves its accumulators in
//! its shared memory, and finishes chunks r, r + size, ... with everyone's, added in the order of the blocks.
template <typename T, Epilogue kEPILOGUE, typename TILE>
__global__ void __launch_bounds__(160, 1)
    linearSplit(__grid_constant__ TensorMaps const maps, __grid_constant__ EpilogueParams const p)
{
    extern __shared__ __align__(1024) uint8_t sharedMemory[];
    Shared<TILE> const shared{sm90::sharedAddress(sharedMemory)};

    uint32_t const warp = __shfl_sync(0xFFFFFFFFU, threadIdx.x / 32, 0);
    uint32_t const lane = threadIdx.x % 32;
    int const rank = static_cast<int>(sm90::clusterRank());
    int const size = static_cast<int>(sm90::clusterSize());

    int const allSteps = (p.inputs + kBLOCK_K - 1) / kBLOCK_K;
    int const steps = (allSteps - rank + size - 1) / size;
    int const columnTiles = (p.outputs + TILE::kBN - 1) / TILE::kBN;
    int const tile = static_cast<int>(blockIdx.x) / size;
    int const tileRow = tile / columnTiles * TILE::kBM;
    int const column = tile % columnTiles * TILE::kBN;

    if (threadIdx.x == 0)
    {
        initBarriers(shared, 1);
        prefetchMaps(maps);
    }
    __syncthreads();
    sm90::launchDependents();

    if (warp == TILE::kWARPS)
    {
        if (lane == 0)
        {
            auto const fetchWeight = [&](RingPosition<TILE::kSTAGES> const& ring, int step)
            {
                sm90::barrierArriveExpect(shared.full(ring.stage), TILE::kSTAGE_BYTES);
                sm90::loadBox(shared.weight(ring.stage), &maps.weight, (rank + step * size) * kBLOCK_K, column,
                    shared.full(ring.stage));
            };
            int const ahead = steps < TILE::kSTAGES ? steps : TILE::kSTAGES;
            {
                RingPosition<TILE::kSTAGES> ring;
                for (int step = 0; step < ahead; ++step, ring.advance())
                {
                    fetchWeight(ring, step);
                }
            }
            sm90::waitForPriorGrids();

            RingPosition<TILE::kSTAGES> ring;
            for (int step = 0; step < steps; ++step, ring.advance())
            {
                if (step >= ahead)
                {
                    sm90::barrierWait(shared.empty(ring.stage), ring.parity ^ 1);
                    fetchWeight(ring, step);
                }
                sm90::loadBox(shared.x(ring.stage), &maps.x, (rank + step * size) * kBLOCK_K, tileRow,
                    shared.full(ring.stage));
            }
        }
        __syncwarp();
        if (size > 1)
        {
            sm90::clusterSync(); // partial accumulators are written
            sm90::clusterSyncRelaxed(); // and read
        }
        return;
    }

    sm90::waitForPriorGrids();
    ChunkPipe<TILE> pipe{shared, warp, lane};
    auto* const scales = rowScalesOf<TILE>(sharedMemory, warp);
    auto* const columns = columnPairsOf<TILE>(sharedMemory, warp);
    int const row = tileRow + static_cast<int>(warp) * kCHUNK_ROWS;
    auto const chunkRow = [&](int chunk) { return row + chunk / TILE::kCHUNKS_N * 64; };
    auto const chunkColumn = [&](int chunk) { return column + chunk % TILE::kCHUNKS_N * kCHUNK_COLUMNS; };

    loadColumnPairs<TILE::kBN>(columns, p, column, lane);
    if (p.inputStatistics != nullptr)
    {
        loadRowScales<TILE::kM64>(scales, p, row, 64, lane);
    }
    if (kEPILOGUE == Epilogue::kRESIDUAL && lane == 0)
    {
        static_assert(TILE::kBUFFERS == TILE::kCHUNKS);
        for (int chunk = rank, number = 0; chunk < TILE::kCHUNKS; chunk += size, ++number)
        {
            pipe.fetch(&maps.residual, number, chunkRow(chunk), chunkColumn(chunk));
        }
    }

    float acc[TILE::kM64][TILE::kBN / 2];
    RingPosition<TILE::kSTAGES> ring;
    multiply<T, TILE>(
        acc, shared, ring, steps,
        [&](uint32_t stage)
        {
            if (lane == 0)
            {
                sm90::barrierArrive(shared.empty(stage));
            }
        },
        [] {});

    if (size > 1)
    {
        // All stages have been multiplied by all warps: they become float4 [chunk][register / 4][thread].
        asm volatile("bar.sync 1, 128;" ::: "memory");
        auto* const partials = reinterpret_cast<float4*>(sharedMemory);
#pragma unroll
        for (int chunk = 0; chunk < TILE::kCHUNKS; ++chunk)
        {
            float const* const v = &acc[chunk / TILE::kCHUNKS_N][chunk % TILE::kCHUNKS_N * 32];
#pragma unroll
            for (int i = 0; i < 8; ++i)
            {
                partials[(chunk * 8 + i) * 128 + threadIdx.x]
                    = make_float4(v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]);
            }
        }
        sm90::clusterSync();
    }
#pragma unroll
    for (int chunk = 0; chunk < TILE::kCHUNKS; ++chunk)
    {
        if (chunk % size != rank)
        {
            continue;
        }
        int const m = chunk / TILE::kCHUNKS_N;
        float* const v = &acc[m][chunk % TILE::kCHUNKS_N * 32];
        for (int other = 0; size > 1 && other < size; ++other)
        {
            uint32_t const partials = sm90::mapToRank(shared.base + (chunk * 8 * 128 + threadIdx.x) * 16, other);
#pragma unroll
            for (int i = 0; i < 8; ++i)
            {
                float4 const part = sm90::loadFromCluster(partials + i * 128 * 16);
                v[4 * i] = part.x + (other > 0 ? v[4 * i] : 0.0F);
                v[4 * i + 1] = part.y + (other > 0 ? v[4 * i + 1] : 0.0F);
                v[4 * i + 2] = part.z + (other > 0 ? v[4 * i + 2] : 0.0F);
                v[4 * i + 3] = part.w + (other > 0 ? v[4 * i + 3] : 0.0F);
            }
        }
        finishChunk<T, kEPILOGUE>(v, pipe, &maps.y, p, scales + m * kCHUNK_ROWS,
            columns + chunk % TILE::kCHUNKS_N * 32, chunkRow(chunk), chunkColumn(chunk));
        ++pipe.sequence;
    }
    if (lane == 0)
    {
        sm90::storeWaitRead<0>();
    }
    __syncwarp();
    if (size > 1)
    {
        sm90::clusterSyncRelaxed();
    }
}

using PersistentTile128x192 = Tile<2, 192, 4, 2, 3>;
using PersistentTile128x128 = Tile<2, 128, 5, 2, 3>;
using PersistentTile192x128 = Tile<3, 128, 4, 2, 3>;
using SplitTile64x64 = Tile<1, 64, 8, 1, 1>;
using SplitTile64x128 = Tile<1, 128, 6, 1, 2>;
using SplitTile128x128 = Tile<2, 128, 5, 1, 4>;

template <typename T, Epilogue kEPILOGUE>
cudaError_t launchTactic(Sm90Tactic const& tactic, TensorMaps const& maps, EpilogueParams const& p,
    bool overlapPredecessor, int multiprocessors, cudaStream_t stream)
{
    auto const launch = [&](auto kernel, int sharedBytes, int threads, int blocks, int cluster)
    {
        cudaError_t const status
            = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sharedBytes);
        if (status != cudaSuccess)
        {
            return status;
        }
        cudaLaunchAttribute attributes[2]{};
        attributes[0].id = cudaLaunchAttributeClusterDimension;
        attributes[0].val.clusterDim.x = cluster;
        attributes[0].val.clusterDim.y = 1;
        attributes[0].val.clusterDim.z = 1;
        attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[1].val.programmaticStreamSerializationAllowed = 1;
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(blocks);
        config.blockDim = dim3(threads);
        config.dynamicSmemBytes = sharedBytes;
        config.stream = stream;
        config.attrs = attributes;
        config.numAttrs = overlapPredecessor ? 2 : 1;
        return cudaLaunchKernelEx(&config, kernel, maps, p);
    };
    auto const persistent = [&](auto tile)
    {
        using TILE = decltype(tile);
        int const pairs = ceilDiv(p.rows, 2 * TILE::kBM) * ceilDiv(p.outputs, TILE::kBN);
        int const clusters = std::min(pairs, multiprocessors / 2);
        return launch(linearPersistent<T, kEPILOGUE, TILE>, TILE::kSHARED_BYTES, 384, 2 * clusters, 2);
    };
    auto const split = [&](auto tile)
    {
        using TILE = decltype(tile);
        int const tiles = ceilDiv(p.rows, TILE::kBM) * ceilDiv(p.outputs, TILE::kBN);
        return launch(
            linearSplit<T, kEPILOGUE, TILE>, TILE::kSHARED_BYTES, 160, tiles * tactic.split, tactic.split);
    };
    switch (tactic.tile)
    {
    case Sm90Tile::kPERSISTENT_128X192:
        return persistent(PersistentTile128x192{});
    case Sm90Tile::kPERSISTENT_128X128:
        return persistent(PersistentTile128x128{});
    case Sm90Tile::kPERSISTENT_192X128:
        return persistent(PersistentTile192x128{});
    case Sm90Tile::kSPLIT_64X64:
        return split(SplitTile64x64{});
    case Sm90Tile::kSPLIT_64X128:
        return split(SplitTile64x128{});
    case Sm90Tile::kSPLIT_128X128:
        return split(SplitTile128x128{});
    }
    return cudaErrorInvalidValue;
}

//! Instantiated in a file a type, to keep compile times short.
template <typename T>
cudaError_t launchSm90(Epilogue epilogue, Sm90Tactic const& tactic, TensorMaps const& maps, EpilogueParams const& p,
    bool overlapPredecessor, int multiprocessors, cudaStream_t stream)
{
    switch (epilogue)
    {
    case Epilogue::kBIAS:
        return launchTactic<T, Epilogue::kBIAS>(tactic, maps, p, overlapPredecessor, multiprocessors, stream);
    case Epilogue::kGELU:
        return launchTactic<T, Epilogue::kGELU>(tactic, maps, p, overlapPredecessor, multiprocessors, stream);
    case Epilogue::kRESIDUAL:
        return launchTactic<T, Epilogue::kRESIDUAL>(tactic, maps, p, overlapPredecessor, multiprocessors, stream);
    }
    return cudaErrorInvalidValue;
}

extern template cudaError_t launchSm90<__half>(
    Epilogue, Sm90Tactic const&, TensorMaps const&, EpilogueParams const&, bool, int, cudaStream_t);
extern template cudaError_t launchSm90<__nv_bfloat16>(
    Epilogue, Sm90Tactic const&, TensorMaps const&, EpilogueParams const&, bool, int, cudaStream_t);

} // namespace trocr::linear_detail
