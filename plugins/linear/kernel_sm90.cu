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
    if (tactic == 0)
    {
        tactic =
            cheapestSm90Tactic(params.rows, params.outputs, params.inputs, params.residual != nullptr, multiprocessors);
    }
    Sm90Tactic const* const chosen = &kSM90_TACTICS[tactic - 1];
    if (chosen->split > ceilDiv(params.inputs, kBLOCK_K) ||
        (chosen->kernel == Sm90Kernel::kPANEL && params.inputs > kPANEL_INPUTS))
    {
        return cudaErrorInvalidValue;
    }

    int const weightBox = chosen->columns / chosen->tall;  // blocks with the same columns share their fetching
    void const* const residual = params.residual != nullptr ? params.residual : params.y;
    TensorMaps maps;
    bool const encoded =
        encodeMap(maps.x, params.dataType, params.x, params.rows, params.inputs, 64) &&
        encodeMap(maps.weight, params.dataType, params.weight, params.outputs, params.inputs, weightBox) &&
        encodeMap(maps.y, params.dataType, params.y, params.rows, params.outputs, kCHUNK_ROWS) &&
        encodeMap(maps.residual, params.dataType, residual, params.rows, params.outputs, kCHUNK_ROWS);
    if (!encoded)
    {
        return cudaErrorInvalidValue;
    }
    auto const launch = params.dataType == DataType::kHALF ? launchSm90<__half> : launchSm90<__nv_bfloat16>;
    return launch(epilogueOf(params), *chosen, maps, epilogueParams(params), params.overlapPredecessor, stream);
}

}  // namespace trocr::linear_detail
