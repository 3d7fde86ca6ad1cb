#include <cudaTypedefs.h>

#include "linear/kernel_sm90.cuh"
#include "linear/launch.h"
#include "linear/tactics.h"

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

} // namespace

cudaError_t linearSm90(LinearParams const& params, int32_t tactic, int multiprocessors, cudaStream_t stream)
{
    if (tensorMapEncoder() == nullptr)
    {
        return cudaErrorNotSupported;
    }
    if (tactic == 0)
    {
        tactic = cheapestSm90Tactic(params.rows, params.outputs, params.inputs, multiprocessors);
    }
    Sm90Tactic const* const chosen = &kSM90_TACTICS[tactic - 1];
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
