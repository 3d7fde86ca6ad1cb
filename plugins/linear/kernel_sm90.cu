#include <cudaTypedefs.h>

#include <limits>

#include "linear/kernel_sm90.cuh"
#include "linear/launch.h"

namespace trocr::linear_detail
{
namespace
{

PFN_cuTensorMapEncodeTiled_v12000 tensorMapEncoder()
{
    static auto const encode = []
    {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found{};
        cudaError_t const status = cudaGetDriverEntryPointByVersion(
            "cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
        bool const ok = status == cudaSuccess && found == cudaDriverEntryPointSuccess;
        return ok ? reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function) : nullptr;
    }();
    return encode;
}

//! Map of T [rows, columns] in boxes of [boxRows, 64], swizzled by 128 bytes; zeros outside.
bool encodeMap(CUtensorMap& map, DataType type, void const* data, int rows, int columns, int boxRows)
{
    auto const format = type == DataType::kHALF ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    cuuint64_t const sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
    cuuint64_t const strides[1] = {static_cast<cuuint64_t>(columns) * 2};
    cuuint32_t const box[2] = {kBLOCK_K, static_cast<cuuint32_t>(boxRows)};
    cuuint32_t const steps[2] = {1, 1};
    return tensorMapEncoder()(&map, format, 2, const_cast<void*>(data), sizes, strides, box, steps,
               CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE)
        == CUDA_SUCCESS;
}

//! Estimated clocks of a tactic. A multiprocessor multiplies 64 rows, N columns and 64 of K in 2 N clocks, and receives
//! about 40 bytes a clock from the L2 cache when all ask; a lone wave of few blocks gets up to 64. README.md.
float cost(Sm90Tactic const& tactic, LinearParams const& p, int multiprocessors)
{
    bool const paired = tactic.split == 0;
    int const split = paired ? 1 : tactic.split;
    int const steps = ceilDiv(p.inputs, kBLOCK_K);
    int const columnTiles = ceilDiv(p.outputs, tactic.columns);
    int const rowTiles = paired ? 2 * ceilDiv(p.rows, 2 * tactic.rows) : ceilDiv(p.rows, tactic.rows);
    int const blocks = rowTiles * columnTiles * split;
    if (split > steps)
    {
        return std::numeric_limits<float>::infinity();
    }
    // Clusters of four leave some multiprocessors of a cluster group idle.
    int const places = split == 4 ? multiprocessors * 120 / 132 : multiprocessors;
    int const waves = ceilDiv(blocks, places);

    float const busy = blocks < places ? static_cast<float>(blocks) / static_cast<float>(places) : 1.0F;
    float const bytesPerClock = 64.0F - 24.0F * busy;
    float const bytes = kROW_BYTES * (tactic.rows + (paired ? tactic.columns / 2 : tactic.columns));
    float const multiply = 2.0F * tactic.rows / 64 * tactic.columns;
    float const step = std::max(multiply, bytes / bytesPerClock);
    // Finishing one element takes about 16 clocks of one of the four warps; only the last tile's is not hidden
    // behind the other warpgroup's products.
    float const finish = tactic.rows * tactic.columns / 128 * 16.0F / split;
    float const tile = step * static_cast<float>(ceilDiv(steps, split));
    float const exchange = split > 1 ? 1500.0F : 0.0F;
    float const mainLoop
        = paired ? waves * std::max(tile, finish) + finish : waves * (tile + finish + exchange + 1000.0F);
    return mainLoop + (paired ? 1500.0F : 0.0F);
}

} // namespace

cudaError_t linearSm90(LinearParams const& params, int32_t tactic, int multiprocessors, cudaStream_t stream)
{
    if (tensorMapEncoder() == nullptr)
    {
        return cudaErrorNotSupported;
    }
    Sm90Tactic const* chosen = &kSM90_TACTICS[0];
    if (tactic > 0)
    {
        chosen = &kSM90_TACTICS[tactic - 1];
    }
    else
    {
        for (Sm90Tactic const& candidate : kSM90_TACTICS)
        {
            if (cost(candidate, params, multiprocessors) < cost(*chosen, params, multiprocessors))
            {
                chosen = &candidate;
            }
        }
    }
    if (chosen->split > ceilDiv(params.inputs, kBLOCK_K))
    {
        return cudaErrorInvalidValue;
    }

    // A pair of blocks shares the weight's columns: each fetches half of them.
    int const weightBox = chosen->split == 0 ? chosen->columns / 2 : chosen->columns;
    void const* const residual = params.residual != nullptr ? params.residual : params.y;
    TensorMaps maps;
    bool const encoded = encodeMap(maps.x, params.dataType, params.x, params.rows, params.inputs, chosen->rows)
        && encodeMap(maps.weight, params.dataType, params.weight, params.outputs, params.inputs, weightBox)
        && encodeMap(maps.y, params.dataType, params.y, params.rows, params.outputs, kCHUNK_ROWS)
        && encodeMap(maps.residual, params.dataType, residual, params.rows, params.outputs, kCHUNK_ROWS);
    if (!encoded)
    {
        return cudaErrorInvalidValue;
    }
    auto const launch = params.dataType == DataType::kHALF ? launchSm90<__half> : launchSm90<__nv_bfloat16>;
    return launch(epilogueOf(params), *chosen, maps, epilogueParams(params), params.overlapPredecessor, multiprocessors,
        stream);
}

} // namespace trocr::linear_detail
