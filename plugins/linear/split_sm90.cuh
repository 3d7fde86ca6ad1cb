#pragma once

#include "linear/pieces_sm90.cuh"

namespace trocr::linear_detail
{

//! Small problems. A cluster computes one tile: block r multiplies steps r, r + size, ..., leaves its accumulators in
//! its shared memory, and finishes chunks r, r + size, ... with everyone's, added in the order of the blocks. A
//! warpgroup has 64 rows.
template <typename T, Epilogue kEPILOGUE, typename TILE>
__global__ void __launch_bounds__(32 + 128 * TILE::kGROUPS, 1)
    linearSplit(__grid_constant__ TensorMaps const maps, __grid_constant__ EpilogueParams const p)
{
    constexpr int kTHREADS = 128 * TILE::kGROUPS;  // that multiply
    constexpr int kCHUNKS = TILE::kCHUNKS_N;       // of a warp
    static_assert(TILE::kGROUPS == TILE::kM64 && TILE::kBUFFERS == kCHUNKS);
    extern __shared__ __align__(1024) uint8_t sharedMemory[];
    Shared<TILE> const shared{sharedAddress(sharedMemory)};

    uint32_t const warp = __shfl_sync(0xFFFFFFFFU, threadIdx.x / 32, 0);
    uint32_t const lane = threadIdx.x % 32;
    int const rank = static_cast<int>(sm90::clusterRank());
    int const size = static_cast<int>(sm90::clusterSize());

    int const allSteps = (p.inputs + kBLOCK_K<T> - 1) / kBLOCK_K<T>;
    int const steps = (allSteps - rank + size - 1) / size;
    int const columnTiles = (p.outputs + TILE::kBN - 1) / TILE::kBN;
    int const tile = static_cast<int>(blockIdx.x) / size;
    int const tileRow = tile / columnTiles * TILE::kBM;
    int const column = tile % columnTiles * TILE::kBN;

    // The weight does not depend on the preceding grid. A block that finds room beside one of that grid fetches all it
    // can of it meanwhile; one that begins when that grid ends, only what x's first stage can wait behind.
    constexpr int kAHEAD = 2 * TILE::kSHARED_BYTES <= kSHARED_LIMIT ? TILE::kSTAGES : kWEIGHTS_AHEAD;
    int const ahead = steps < kAHEAD ? steps : kAHEAD;
    auto const fetchWeight = [&](RingPosition<TILE::kSTAGES> const& ring, int step)
    {
        sm90::barrierArriveExpect(shared.full(ring.stage), TILE::kSTAGE_BYTES);
        sm90::loadBox(shared.weight(ring.stage), &maps.weight, (rank + step * size) * kBLOCK_K<T>, column,
                      shared.full(ring.stage));
    };
    if (warp == TILE::kWARPS && lane == 0)
    {
        initBarriers(shared, TILE::kGROUPS);
        RingPosition<TILE::kSTAGES> ring;
        for (int step = 0; step < ahead; ++step, ring.advance())
        {
            fetchWeight(ring, step);
        }
        prefetchMaps(maps);
    }
    __syncthreads();
    sm90::launchDependents();

    if (warp == TILE::kWARPS)
    {
        if (lane == 0)
        {
            sm90::waitForPriorGrids();
            RingPosition<TILE::kSTAGES> ring;
            for (int step = 0; step < steps; ++step, ring.advance())
            {
                if (step >= ahead)
                {
                    sm90::barrierWait(shared.empty(ring.stage), ring.parity ^ 1);
                    fetchWeight(ring, step);
                }
                for (int m = 0; m < TILE::kM64; ++m)
                {
                    sm90::loadBox(shared.x(ring.stage) + m * 64 * kROW_BYTES, &maps.x,
                                  (rank + step * size) * kBLOCK_K<T>, tileRow + m * 64, shared.full(ring.stage));
                }
            }
        }
        __syncwarp();
        if (size > 1)
        {
            sm90::clusterSync();         // partial accumulators are written
            sm90::clusterSyncRelaxed();  // and read
        }
        return;
    }

    ChunkPipe<TILE> pipe{shared, warp, lane};
    auto* const scales = rowScalesOf<TILE>(sharedMemory, warp);
    auto* const columns = columnPairsOf<TILE>(sharedMemory, warp);
    int const group = static_cast<int>(warp) / 4;
    int const row = tileRow + static_cast<int>(warp) * kCHUNK_ROWS;
    auto const chunkColumn = [&](int chunk) { return column + chunk * kCHUNK_COLUMNS; };
    auto const isMine = [&](int chunk) { return (group * kCHUNKS + chunk) % size == rank; };

    loadColumnPairs<TILE::kBN>(columns, p, column, lane);  // constants, as the weight
    sm90::waitForPriorGrids();
    // Statistics are on their way while the products are computed, and combined beside the last of them.
    constexpr int kMOST_PARTS = 16;
    bool const isFew = p.inputs <= kMOST_PARTS * kCHUNK_COLUMNS;
    PartialStatistics<kMOST_PARTS> statistics;
    if (isFew && lane < kCHUNK_ROWS)
    {
        statistics.load(p, row + static_cast<int>(lane));
    }
    if (kEPILOGUE == Epilogue::kRESIDUAL && lane == 0)
    {
        int number = 0;
        for (int chunk = 0; chunk < kCHUNKS; ++chunk)
        {
            if (isMine(chunk))
            {
                pipe.fetch(&maps.residual, number++, row, chunkColumn(chunk));
            }
        }
    }

    float acc[1][TILE::kBN / 2];
    RingPosition<TILE::kSTAGES> ring;
    multiply<T, TILE, 1>(
        acc, shared, ring, steps,
        [&](uint32_t stage)
        {
            if (lane == 0)
            {
                sm90::barrierArrive(shared.empty(stage));
            }
        },
        [&]
        {
            if (p.inputStatistics == nullptr)
            {
                return;
            }
            if (!isFew)
            {
                loadRowScales<1>(scales, p, row, 0, lane);
            }
            else if (lane < kCHUNK_ROWS)
            {
                scales[lane] = statistics.scale(p);
            }
            __syncwarp();
        },
        group);

    if (size > 1)
    {
        // All stages have been multiplied by all warps: they become float4 [chunk][register / 4][thread].
        sm90::syncSome<1, kTHREADS>();
        auto* const partials = reinterpret_cast<float4*>(sharedMemory);
#pragma unroll
        for (int chunk = 0; chunk < kCHUNKS; ++chunk)
        {
            float const* const v = &acc[0][chunk * 32];
#pragma unroll
            for (int i = 0; i < 8; ++i)
            {
                partials[(chunk * 8 + i) * kTHREADS + threadIdx.x] =
                    make_float4(v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]);
            }
        }
        sm90::clusterSync();
    }
#pragma unroll
    for (int chunk = 0; chunk < kCHUNKS; ++chunk)
    {
        if (!isMine(chunk))
        {
            continue;
        }
        float* const v = &acc[0][chunk * 32];
        auto const addParts = [&](auto sizeConstant)
        {
            uint32_t const partials = shared.base + (chunk * 8 * kTHREADS + threadIdx.x) * 16;
            float4 parts[decltype(sizeConstant)::value][8];
#pragma unroll
            for (int other = 0; other < decltype(sizeConstant)::value; ++other)
            {
                uint32_t const at = sm90::mapToRank(partials, other);
#pragma unroll
                for (int i = 0; i < 8; ++i)
                {
                    parts[other][i] = sm90::loadFromCluster(at + i * kTHREADS * 16);
                }
            }
#pragma unroll
            for (int other = 0; other < decltype(sizeConstant)::value; ++other)
            {
#pragma unroll
                for (int i = 0; i < 8; ++i)
                {
                    float4 const part = parts[other][i];
                    v[4 * i] = part.x + (other > 0 ? v[4 * i] : 0.0F);
                    v[4 * i + 1] = part.y + (other > 0 ? v[4 * i + 1] : 0.0F);
                    v[4 * i + 2] = part.z + (other > 0 ? v[4 * i + 2] : 0.0F);
                    v[4 * i + 3] = part.w + (other > 0 ? v[4 * i + 3] : 0.0F);
                }
            }
        };
        if (size == 2)
        {
            addParts(std::integral_constant<int, 2>{});
        }
        else if (size == 4)
        {
            addParts(std::integral_constant<int, 4>{});
        }
        finishChunk<T, kEPILOGUE>(v, pipe, &maps.y, p, scales, columns + chunk * 32, row, chunkColumn(chunk));
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

}  // namespace trocr::linear_detail
