#pragma once

// Hopper: tile sizes, and the launch of a tactic.

#include <algorithm>

#include "common/launch.h"
#include "linear/panel_sm90.cuh"
#include "linear/persistent_sm90.cuh"
#include "linear/split_sm90.cuh"
#include "linear/tactics.h"

namespace trocr::linear_detail
{

using PersistentTile128x192 = Tile<2, 192, 4, 2, 3, 2, 1>;
using PersistentTile128x128 = Tile<2, 128, 5, 2, 3, 2, 1>;
using PersistentTile128x128Of3 = Tile<2, 128, 5, 2, 3, 1, 3>;
using PersistentTile128x192Of4 = Tile<2, 192, 4, 2, 3, 2, 2>;
using PersistentTile128x128Of4 = Tile<2, 128, 5, 2, 3, 2, 2>;
using Panel192 = Panel<192, 6, 6, 1, 2>;
using SplitTile64x64 = Tile<1, 64, 6, 1, 1>;
using SplitTile64x128 = Tile<1, 128, 6, 1, 2>;
using SplitTile128x128 = Tile<2, 128, 5, 2, 2>;
using SplitTile128x192 = Tile<2, 192, 4, 2, 3>;

template <typename T, Epilogue kEPILOGUE>
cudaError_t launchTactic(Sm90Tactic const& tactic, TensorMaps const& maps, EpilogueParams const& p,
                         bool overlapPredecessor, cudaStream_t stream)
{
    auto const launch = [&](auto kernel, int sharedBytes, int threads, int blocks, int cluster)
    {
        cudaError_t const status =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sharedBytes);
        if (status != cudaSuccess)
        {
            return status;
        }
        cudaLaunchAttribute attributes[2] = {clusterOf(cluster), dependentLaunch()};
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
        constexpr int kCLUSTER = TILE::kTALL * TILE::kWIDE;
        int const works = ceilDiv(p.rows, TILE::kTALL * TILE::kBM) * ceilDiv(p.outputs, TILE::kWIDE * TILE::kBN);
        static int const places =
            clustersAtOnce(linearPersistent<T, kEPILOGUE, TILE>, TILE::kSHARED_BYTES, 384, kCLUSTER);
        int const clusters = std::min(works, places);
        return launch(linearPersistent<T, kEPILOGUE, TILE>, TILE::kSHARED_BYTES, 384, kCLUSTER * clusters, kCLUSTER);
    };
    auto const split = [&](auto tile)
    {
        using TILE = decltype(tile);
        int const tiles = ceilDiv(p.rows, TILE::kBM) * ceilDiv(p.outputs, TILE::kBN);
        return launch(linearSplit<T, kEPILOGUE, TILE>, TILE::kSHARED_BYTES, 32 + 128 * TILE::kGROUPS,
                      tiles * tactic.split, tactic.split);
    };
    auto const panel = [&](auto tile)
    {
        using PANEL = decltype(tile);
        if constexpr (kEPILOGUE == Epilogue::kRESIDUAL && PANEL::kBUFFERS != PANEL::kCHUNKS)
        {
            return cudaErrorInvalidValue;
        }
        else
        {
            int const panelGroups = ceilDiv(p.outputs, PANEL::kCLUSTER * PANEL::kBN);
            static int const places =
                clustersAtOnce(linearPanel<T, kEPILOGUE, PANEL>, PANEL::kSHARED_BYTES, 512, PANEL::kCLUSTER);
            int const clusters = std::min(places / panelGroups, ceilDiv(p.rows, PANEL::kBM));
            if (clusters < 1 || p.inputs > PANEL::kSTEPS * kBLOCK_K<T>)
            {
                return cudaErrorInvalidValue;
            }
            return launch(linearPanel<T, kEPILOGUE, PANEL>, PANEL::kSHARED_BYTES, 512,
                          clusters * panelGroups * PANEL::kCLUSTER, PANEL::kCLUSTER);
        }
    };
    switch (tactic.tile)
    {
        case Sm90Tile::kPERSISTENT_128X192:
            return persistent(PersistentTile128x192{});
        case Sm90Tile::kPERSISTENT_128X128:
            return persistent(PersistentTile128x128{});
        case Sm90Tile::kPERSISTENT_128X128_OF_3:
            return persistent(PersistentTile128x128Of3{});
        case Sm90Tile::kPERSISTENT_128X192_OF_4:
            return persistent(PersistentTile128x192Of4{});
        case Sm90Tile::kPERSISTENT_128X128_OF_4:
            return persistent(PersistentTile128x128Of4{});
        case Sm90Tile::kPANEL_192:
            return panel(Panel192{});
        case Sm90Tile::kSPLIT_64X64:
            return split(SplitTile64x64{});
        case Sm90Tile::kSPLIT_64X128:
            return split(SplitTile64x128{});
        case Sm90Tile::kSPLIT_128X128:
            return split(SplitTile128x128{});
        case Sm90Tile::kSPLIT_128X192:
            return split(SplitTile128x192{});
    }
    return cudaErrorInvalidValue;
}

//! Instantiated in a file a type, to keep compile times short.
template <typename T>
cudaError_t launchSm90(Epilogue epilogue, Sm90Tactic const& tactic, TensorMaps const& maps, EpilogueParams const& p,
                       bool overlapPredecessor, cudaStream_t stream)
{
    switch (epilogue)
    {
        case Epilogue::kBIAS:
            return launchTactic<T, Epilogue::kBIAS>(tactic, maps, p, overlapPredecessor, stream);
        case Epilogue::kGELU:
            return launchTactic<T, Epilogue::kGELU>(tactic, maps, p, overlapPredecessor, stream);
        case Epilogue::kRESIDUAL:
            return launchTactic<T, Epilogue::kRESIDUAL>(tactic, maps, p, overlapPredecessor, stream);
    }
    return cudaErrorInvalidValue;
}

extern template cudaError_t launchSm90<__half>(Epilogue, Sm90Tactic const&, TensorMaps const&, EpilogueParams const&,
                                               bool, cudaStream_t);
extern template cudaError_t launchSm90<__nv_bfloat16>(Epilogue, Sm90Tactic const&, TensorMaps const&,
                                                      EpilogueParams const&, bool, cudaStream_t);
extern template cudaError_t launchSm90<E4m3>(Epilogue, Sm90Tactic const&, TensorMaps const&, EpilogueParams const&,
                                             bool, cudaStream_t);

}  // namespace trocr::linear_detail
