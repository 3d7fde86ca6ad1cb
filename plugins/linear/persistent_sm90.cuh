#pragma once

#include "linear/pieces_sm90.cuh"

namespace trocr::linear_detail
{

//! Large problems. A cluster of two blocks computes two tiles of the same columns, one below the other; each block
//! fetches half of the weight's stage for both. Blocks stay and take tile after tile; their two warpgroups take turns,
//! so that one finishes a tile while the other multiplies.
template <typename T, Epilogue kEPILOGUE, typename TILE>
__global__ void __launch_bounds__(384, 1)
    linearPersistent(__grid_constant__ TensorMaps const maps, __grid_constant__ EpilogueParams const p)
{
    constexpr int kBM = TILE::kBM;
    constexpr int kBN = TILE::kBN;
    constexpr int kWIDE = TILE::kWIDE;
    constexpr int kTALL = TILE::kTALL;
    constexpr int kCLUSTER = kTALL * kWIDE;
    constexpr int kSHARERS = kTALL + kWIDE - 1;  // blocks that read what a block fetches: those in its row and column
    extern __shared__ __align__(1024) uint8_t sharedMemory[];
    Shared<TILE> const shared{sharedAddress(sharedMemory)};

    uint32_t const warp = __shfl_sync(0xFFFFFFFFU, threadIdx.x / 32, 0);
    uint32_t const lane = threadIdx.x % 32;
    uint32_t const rank = sm90::clusterRank();
    uint32_t const rowRank = rank % kTALL;
    uint32_t const columnRank = rank / kTALL;

    int const steps = (p.inputs + kBLOCK_K<T> - 1) / kBLOCK_K<T>;
    int const across = (p.outputs + kWIDE * kBN - 1) / (kWIDE * kBN);
    int const whole = across * ((p.rows + kTALL * kBM - 1) / (kTALL * kBM));
    int const clusters = gridDim.x / kCLUSTER;
    int const cluster = blockIdx.x / kCLUSTER;
    // Tiles of the last round are halved, where halves of them find a cluster each.
    int const rest = whole % clusters;
    int const firstHalf = TILE::kM64 == 2 && 2 * rest <= clusters ? whole - rest : whole;
    int const works = whole + (whole - firstHalf);
    auto const isHalf = [&](int work) { return work >= firstHalf; };
    auto const tileOf = [&](int work) { return isHalf(work) ? firstHalf + (work - firstHalf) / 2 : work; };
    auto const rowOf = [&](int work)
    {
        int const at = tileOf(work) / across;
        int const half = isHalf(work) ? (work - firstHalf) % 2 : 0;
        return (at * kTALL + rowRank) * kBM + half * 64;
    };
    auto const columnOf = [&](int work) { return (tileOf(work) % across * kWIDE + columnRank) * kBN; };

    if (threadIdx.x == 0)
    {
        initBarriers(shared, kSHARERS);
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
            auto const fetchWeight = [&](RingPosition<TILE::kSTAGES> const& ring, int step, int work)
            {
                int const column = columnOf(work);
                sm90::barrierArriveExpect(shared.full(ring.stage),
                                          isHalf(work) ? TILE::kSTAGE_BYTES - TILE::kX_BYTES / 2 : TILE::kSTAGE_BYTES);
                uint32_t const offset = rowRank * (kBN / kTALL);
                uint32_t const destination = shared.weight(ring.stage) + offset * kROW_BYTES;
                if constexpr (kTALL == 1)
                {
                    sm90::loadBox(destination, &maps.weight, step * kBLOCK_K<T>, column, shared.full(ring.stage));
                }
                else
                {
                    constexpr uint32_t kCOLUMN = (1 << kTALL) - 1;
                    sm90::loadBoxMulticast(destination, &maps.weight, step * kBLOCK_K<T>, column + offset,
                                           shared.full(ring.stage), kCOLUMN << kTALL * columnRank);
                }
            };
            // The weight does not depend on the preceding grid; see linearSplit.
            int const ahead = steps < kWEIGHTS_AHEAD ? steps : kWEIGHTS_AHEAD;
            {
                RingPosition<TILE::kSTAGES> ring;
                for (int step = 0; step < ahead; ++step, ring.advance())
                {
                    fetchWeight(ring, step, cluster);
                }
            }
            sm90::waitForPriorGrids();

            RingPosition<TILE::kSTAGES> ring;
            uint32_t turn = 0;  // of the blocks of a row, to fetch x
            for (int work = cluster; work < works; work += clusters)
            {
                int const row = rowOf(work);
                int const m64 = isHalf(work) ? 1 : TILE::kM64;
                for (int step = 0; step < steps; ++step, ring.advance())
                {
                    if (work != cluster || step >= ahead)
                    {
                        sm90::barrierWait(shared.empty(ring.stage), ring.parity ^ 1);
                        fetchWeight(ring, step, work);
                    }
                    for (int m = 0; m < m64 && turn == columnRank; ++m)
                    {
                        uint32_t const destination = shared.x(ring.stage) + m * 64 * kROW_BYTES;
                        if constexpr (kWIDE == 1)
                        {
                            sm90::loadBox(destination, &maps.x, step * kBLOCK_K<T>, row + m * 64,
                                          shared.full(ring.stage));
                        }
                        else
                        {
                            constexpr uint32_t kROW = ((1 << kCLUSTER) - 1) / ((1 << kTALL) - 1);
                            sm90::loadBoxMulticast(destination, &maps.x, step * kBLOCK_K<T>, row + m * 64,
                                                   shared.full(ring.stage), kROW << rowRank);
                        }
                    }
                    turn = turn == kWIDE - 1 ? 0 : turn + 1;
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
        uint32_t turnParity = group ^ 1;  // group 0 begins

        for (int work = cluster + group * clusters; work < works; work += 2 * clusters)
        {
            int const row = rowOf(work) + warp % 4 * kCHUNK_ROWS;
            int const column = columnOf(work);
            int const chunks = isHalf(work) ? TILE::kCHUNKS_N : TILE::kCHUNKS;
            auto const chunkRow = [&](int chunk) { return row + chunk / TILE::kCHUNKS_N * 64; };
            auto const chunkColumn = [&](int chunk) { return column + chunk % TILE::kCHUNKS_N * kCHUNK_COLUMNS; };

            // What the epilogue will read is fetched while the other warpgroup multiplies.
            if (p.inputStatistics != nullptr && work == cluster)
            {
                prefetchStatistics<TILE::kM64>(p, row, 64, lane);  // of the first tile: nobody multiplies yet
            }
            loadColumnPairs<kBN>(columns, p, column, lane);
            if (p.inputStatistics != nullptr)
            {
                loadRowScales<TILE::kM64>(scales, p, row, 64, lane);
            }
            if (kEPILOGUE == Epilogue::kRESIDUAL && lane == 0)
            {
                sm90::storeWaitRead<0>();
                for (int chunk = 0; chunk < TILE::kBUFFERS && chunk < chunks; ++chunk)
                {
                    pipe.fetch(&maps.residual, pipe.sequence + chunk, chunkRow(chunk), chunkColumn(chunk));
                }
            }

            sm90::barrierWait(shared.turn(group), turnParity);
            turnParity ^= 1;
            float acc[TILE::kM64][kBN / 2];
            auto const release = [&](uint32_t stage)
            {
                if (lane < kSHARERS)
                {
                    sm90::barrierArriveAtRank(shared.empty(stage), lane < kWIDE ? rowRank + kTALL * lane : rank ^ 1);
                }
            };
            auto const issued = [&]
            {
                if (lane == 0)
                {
                    sm90::barrierArrive(shared.turn(group ^ 1));
                }
            };
            if (TILE::kM64 == 2 && isHalf(work))
            {
                multiply<T, TILE, 1>(acc, shared, ring, steps, release, issued);
            }
            else
            {
                multiply<T, TILE, TILE::kM64>(acc, shared, ring, steps, release, issued);
            }
            ring.advance(steps);  // the other warpgroup's tile

#pragma unroll
            for (int chunk = 0; chunk < TILE::kCHUNKS; ++chunk, ++pipe.sequence)
            {
                if (chunk == chunks)
                {
                    break;
                }
                int const m = chunk / TILE::kCHUNKS_N;
                int const n = chunk % TILE::kCHUNKS_N;
                finishChunk<T, kEPILOGUE>(&acc[m][n * 32], pipe, &maps.y, p, scales + m * kCHUNK_ROWS, columns + n * 32,
                                          chunkRow(chunk), chunkColumn(chunk));
                // The preceding chunk's buffer is drained by now: its next residual can come.
                int const next = chunk - 1 + TILE::kBUFFERS;
                if (kEPILOGUE == Epilogue::kRESIDUAL && chunk > 0 && next < chunks && lane == 0)
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

}  // namespace trocr::linear_detail
