#pragma once

#include "linear/pieces_sm90.cuh"

namespace trocr::linear_detail
{

//! kBN columns of the weight with all of K, up to kSTEPS steps, that stay in shared memory, and a ring of x's stages of
//! 64 rows. Three warpgroups take turns with tiles of 64 rows. kCLUSTER blocks have neighbouring panels and the same
//! rows: each fetches every kCLUSTER-th stage for all of them.
template <int kBN_, int kSTEPS_, int kSTAGES_, int kBUFFERS_, int kCLUSTER_>
struct Panel
{
    static constexpr int kBM = 64;
    static constexpr int kBN = kBN_;
    static constexpr int kSTEPS = kSTEPS_;
    static constexpr int kSTAGES = kSTAGES_;
    static constexpr int kGROUPS = 3;
    static constexpr int kWARPS = 4 * kGROUPS;
    static constexpr int kBUFFERS = kBUFFERS_;
    static constexpr int kCLUSTER = kCLUSTER_;
    static constexpr int kCHUNKS = kBN / kCHUNK_COLUMNS;
    static constexpr int kPANEL_STEP_BYTES = kBN * kROW_BYTES;
    static constexpr int kX_BYTES = kBM * kROW_BYTES;
    static constexpr int kSTAGE_BYTES = kX_BYTES;

    // Shared memory, from a multiple of 1024: panel; stages; chunk buffers and rows' constants of each warp; the
    // columns' constants, common to all; barriers.
    static constexpr int kSTAGES_AT = kSTEPS * kPANEL_STEP_BYTES;
    static constexpr int kBUFFERS_AT = kSTAGES_AT + kSTAGES * kSTAGE_BYTES;
    static constexpr int kCOLUMNS_AT = kBUFFERS_AT + kWARPS * kBUFFERS * kCHUNK_BYTES;
    static constexpr int kSCALES_AT = kCOLUMNS_AT + kBN * 8;
    static constexpr int kBARRIERS_AT = kSCALES_AT + kWARPS * 2 * kCHUNK_ROWS * 8;
    static constexpr int kBARRIERS = 2 * kSTAGES + kGROUPS + kWARPS * kBUFFERS + kSTEPS;
    static constexpr int kSHARED_BYTES = kBARRIERS_AT + kBARRIERS * 8;

    static_assert(kSHARED_BYTES <= kSHARED_LIMIT);
    static_assert(kSTAGES % kCLUSTER == 0, "a stage is always filled by the same block");
};

//! Many rows, K up to 384, of e4m3 768. Blocks keep their panel and go through rows; which rows, only the cluster's
//! number says, so that the blocks of a cluster do the same.
template <typename T, Epilogue kEPILOGUE, typename PANEL>
__global__ void __launch_bounds__(512, 1)
    linearPanel(__grid_constant__ TensorMaps const maps, __grid_constant__ EpilogueParams const p)
{
    constexpr uint32_t kCLUSTER = PANEL::kCLUSTER;
    constexpr uint16_t kEVERYONE = (1 << kCLUSTER) - 1;
    // A warp has either a buffer for each chunk, or no residual to fetch.
    static_assert(kEPILOGUE != Epilogue::kRESIDUAL || PANEL::kBUFFERS == PANEL::kCHUNKS);

    extern __shared__ __align__(1024) uint8_t sharedMemory[];
    Shared<PANEL> const shared{sharedAddress(sharedMemory)};
    auto const panel = [&](int step) { return shared.base + step * PANEL::kPANEL_STEP_BYTES; };
    auto const panelFull = [&](int step) { return shared.residual(PANEL::kWARPS, 0) + step * 8; };

    uint32_t const warp = __shfl_sync(0xFFFFFFFFU, threadIdx.x / 32, 0);
    uint32_t const lane = threadIdx.x % 32;
    uint32_t const rank = sm90::clusterRank();

    int const steps = (p.inputs + kBLOCK_K<T> - 1) / kBLOCK_K<T>;
    int const tiles = (p.rows + PANEL::kBM - 1) / PANEL::kBM;
    int const cluster = blockIdx.x / kCLUSTER;
    int const clusters = gridDim.x / kCLUSTER;
    int const panelGroups = (p.outputs + kCLUSTER * PANEL::kBN - 1) / (kCLUSTER * PANEL::kBN);
    int const column = (cluster % panelGroups * kCLUSTER + rank) * PANEL::kBN;
    int const firstTile = cluster / panelGroups;
    int const tileStride = clusters / panelGroups;

    if (threadIdx.x == 0)
    {
        initBarriers(shared, kCLUSTER);
        for (int step = 0; step < PANEL::kSTEPS; ++step)
        {
            sm90::barrierInit(panelFull(step), 1);
        }
        sm90::barrierInitFence();
        prefetchMaps(maps);
    }
    auto* const columns = reinterpret_cast<ColumnPair*>(sharedMemory + PANEL::kCOLUMNS_AT);
    if (warp == 0)
    {
        loadColumnPairs<PANEL::kBN>(columns, p, column, lane);
    }
    sm90::clusterSyncRelaxed();
    __syncthreads();
    sm90::launchDependents();

    if (warp >= PANEL::kWARPS)
    {
        sm90::shrinkRegisters<24>();
        if (warp == PANEL::kWARPS && lane == 0)
        {
            // The weight does not depend on the preceding grid.
            for (int step = 0; step < steps; ++step)
            {
                sm90::barrierArriveExpect(panelFull(step), PANEL::kPANEL_STEP_BYTES);
                sm90::loadBox(panel(step), &maps.weight, step * kBLOCK_K<T>, column, panelFull(step));
            }
            sm90::waitForPriorGrids();

            RingPosition<PANEL::kSTAGES> ring;
            for (int tile = firstTile; tile < tiles; tile += tileStride)
            {
                for (int step = 0; step < steps; ++step, ring.advance())
                {
                    bool const mine = ring.stage % kCLUSTER == rank;
                    // A fill is announced when the one before has come, and fetched when all have multiplied that.
                    sm90::barrierWait(mine ? shared.empty(ring.stage) : shared.full(ring.stage), ring.parity ^ 1);
                    sm90::barrierArriveExpect(shared.full(ring.stage), PANEL::kSTAGE_BYTES);
                    if constexpr (kCLUSTER == 1)
                    {
                        sm90::loadBox(shared.x(ring.stage), &maps.x, step * kBLOCK_K<T>, tile * PANEL::kBM,
                                      shared.full(ring.stage));
                    }
                    else if (mine)
                    {
                        sm90::loadBoxMulticast(shared.x(ring.stage), &maps.x, step * kBLOCK_K<T>, tile * PANEL::kBM,
                                               shared.full(ring.stage), kEVERYONE);
                    }
                }
            }
        }
    }
    else
    {
        sm90::growRegisters<160>();
        sm90::waitForPriorGrids();
        uint32_t const group = warp / 4;
        ChunkPipe<PANEL> pipe{shared, warp, lane};
        // Of this tile and of the next.
        auto* scales = reinterpret_cast<float2*>(sharedMemory + PANEL::kSCALES_AT) + warp * 2 * kCHUNK_ROWS;
        auto* nextScales = scales + kCHUNK_ROWS;
        RingPosition<PANEL::kSTAGES> ring;
        ring.advance(group * steps);
        uint32_t turnParity = group == 0 ? 1 : 0;  // group 0 begins

        if (p.inputStatistics != nullptr)
        {
            int const tile = firstTile + group * tileStride;
            loadRowScales<1>(scales, p, tile * PANEL::kBM + warp % 4 * kCHUNK_ROWS, 0, lane);
        }
        for (int tile = firstTile + group * tileStride; tile < tiles; tile += PANEL::kGROUPS * tileStride)
        {
            int const row = tile * PANEL::kBM + warp % 4 * kCHUNK_ROWS;
            // What the epilogue will read is fetched while the other warpgroups multiply.
            if (kEPILOGUE == Epilogue::kRESIDUAL && lane == 0)
            {
                sm90::storeWaitRead<0>();
                for (int chunk = 0; chunk < PANEL::kCHUNKS; ++chunk)
                {
                    pipe.fetch(&maps.residual, pipe.sequence + chunk, row, column + chunk * kCHUNK_COLUMNS);
                }
            }
            sm90::barrierWait(shared.turn(group), turnParity);
            turnParity ^= 1;
            // Statistics of this warpgroup's next tile are on their way while it multiplies.
            int const nextTile = tile + PANEL::kGROUPS * tileStride;
            PartialStatistics<PANEL::kSTEPS * kBLOCK_K<T> / kCHUNK_COLUMNS> nextStatistics;
            if (nextTile < tiles)
            {
                nextStatistics.load(p, nextTile * PANEL::kBM + warp % 4 * kCHUNK_ROWS + lane % kCHUNK_ROWS);
            }

            float acc[PANEL::kBN / 2];
            uint32_t previous = 0;
            auto const release = [&](uint32_t stage)
            {
                if (lane == 0)
                {
                    sm90::barrierArriveAtRank(shared.empty(stage), stage % kCLUSTER);
                }
            };
            for (int step = 0; step < steps; ++step)
            {
                sm90::barrierWait(panelFull(step), 0);
                sm90::barrierWait(shared.full(ring.stage), ring.parity);
                uint64_t const x = sm90::operandDescriptor(shared.x(ring.stage));
                uint64_t const weight = sm90::operandDescriptor(panel(step));
                sm90::wgmmaFence();
#pragma unroll
                for (int k = 0; k < kSTEP_PRODUCTS; ++k)
                {
                    sm90::Wgmma<typename TypesOf<T>::Operand, PANEL::kBN>::run(acc, x + 2 * k, weight + 2 * k,
                                                                               step != 0 || k != 0);
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
            if (lane == 0)
            {
                sm90::barrierArrive(shared.turn(group == PANEL::kGROUPS - 1 ? 0 : group + 1));
            }
            sm90::wgmmaWait<0>();
            release(previous);
            sm90::wgmmaResult(acc);
            ring.advance((PANEL::kGROUPS - 1) * steps);  // the other warpgroups' tiles

#pragma unroll
            for (int chunk = 0; chunk < PANEL::kCHUNKS; ++chunk, ++pipe.sequence)
            {
                finishChunk<T, kEPILOGUE>(&acc[chunk * 32], pipe, &maps.y, p, scales, columns + chunk * 32, row,
                                          column + chunk * kCHUNK_COLUMNS);
            }
            if (p.inputStatistics != nullptr && nextTile < tiles)
            {
                if (lane < kCHUNK_ROWS)
                {
                    nextScales[lane] = nextStatistics.scale(p);
                }
                float2* const done = scales;
                scales = nextScales;
                nextScales = done;
                __syncwarp();
            }
        }
        if (lane == 0)
        {
            sm90::storeWaitRead<0>();
        }
        __syncwarp();
    }
    // Blocks of the cluster arrive at each other's barriers, and write each other's stages: all leave together.
    sm90::clusterSyncRelaxed();
}

}  // namespace trocr::linear_detail
