#pragma once

#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

#include "common/data_type.h"

//! Host side of Hopper's copy engine: descriptions of tensors. The driver's function is looked up at run time, so that
//! nothing links with the driver.

namespace trocr
{

//! cuTensorMapEncodeTiled; null where the driver is older than CUDA 12.
inline PFN_cuTensorMapEncodeTiled_v12000 tensorMapEncoder()
{
    static auto const encode = []
    {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found{};
        cudaError_t const status =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
        bool const ok = status == cudaSuccess && found == cudaDriverEntryPointSuccess;
        return ok ? reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function) : nullptr;
    }();
    return encode;
}

//! Map of T [rows, columns], float16 or bfloat16, in boxes of [boxRows, 64], swizzled by 128 bytes; zeros outside.
inline bool encodeMap(CUtensorMap& map, DataType type, void const* data, int rows, int columns, int boxRows)
{
    auto const format = type == DataType::kHALF ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    cuuint64_t const sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
    cuuint64_t const strides[1] = {static_cast<cuuint64_t>(columns) * 2};
    cuuint32_t const box[2] = {64, static_cast<cuuint32_t>(boxRows)};
    cuuint32_t const steps[2] = {1, 1};
    return tensorMapEncoder()(&map, format, 2, const_cast<void*>(data), sizes, strides, box, steps,
                              CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                              CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace trocr
