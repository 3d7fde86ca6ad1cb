#include "common/tensor_map.h"
#include "linear/kernel_sm90.cuh"
#include "linear/launch.h"
#include "linear/tactics.h"

namespace trocr::linear_detail
{

cudaError_t linearSm90(LinearParams const& params, int32_t tactic, int multiprocessors, cudaStream_t stream)
{
    if (tensorMapEncoder() == nullptr)
    {
        return cudaErrorNotSupported;
    }
    Sm90Problem const problem{static_cast<int>(params.rows), params.outputs, params.inputs, params.residual != nullptr,
                              params.e4m3};
    if (tactic == 0)
    {
        tactic = cheapestSm90Tactic(problem, multiprocessors);
    }
    Sm90Tactic const* const chosen = &kSM90_TACTICS[tactic - 1];
    if (!problem.suits(*chosen))
    {
        return cudaErrorInvalidValue;
    }

    int const weightBox = chosen->columns / chosen->tall;  // blocks with the same columns share their fetching
    // Maps that a variant does not use describe what is there.
    void const* const y = params.y != nullptr ? params.y : params.quantized;
    void const* const residual = params.residual != nullptr ? params.residual : y;
    int32_t const yColumns = params.y != nullptr ? params.outputs : params.outputs / 2;
    TensorMaps maps;
    auto const operandMap = [&](CUtensorMap& map, void const* data, int rows, int boxRows)
    {
        return params.e4m3 ? encodeByteMap(map, data, rows, params.inputs, boxRows)
                           : encodeMap(map, params.dataType, data, rows, params.inputs, boxRows);
    };
    bool const encoded = operandMap(maps.x, params.x, params.rows, 64) &&
                         operandMap(maps.weight, params.weight, params.outputs, weightBox) &&
                         encodeMap(maps.y, params.dataType, y, params.rows, yColumns, kCHUNK_ROWS) &&
                         encodeMap(maps.residual, params.dataType, residual, params.rows, yColumns, kCHUNK_ROWS);
    if (!encoded)
    {
        return cudaErrorInvalidValue;
    }
    auto const launch = params.e4m3                          ? launchSm90<E4m3>
                        : params.dataType == DataType::kHALF ? launchSm90<__half>
                                                             : launchSm90<__nv_bfloat16>;
    return launch(epilogueOf(params), *chosen, maps, epilogueParams(params), params.overlapPredecessor, stream);
}

}  // namespace trocr::linear_detail
