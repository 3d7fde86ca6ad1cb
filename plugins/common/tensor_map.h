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

//! Map of [rows, columns] elements of `bytes` each in boxes of boxRows rows of 128 bytes, swizzled by as many; zeros
//! outside.
inline bool encodeMap(CUtensorMap& map, CUtensorMapDataType format, int bytes, void const* data, int rows, int columns,
                      int boxRows)
{
    cuuint64_t const sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
    cuuint64_t const strides[1] = {static_cast<cuuint64_t>(columns) * bytes};
    cuuint32_t const box[2] = {static_cast<cuuint32_t>(128 / bytes), static_cast<cuuint32_t>(boxRows)};
    cuuint32_t const steps[2] = {1, 1};
    return tensorMapEncoder()(&map, format, 2, const_cast<void*>(data), sizes, strides, box, steps,
                              CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                              CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

//! The same of float16 or bfloat16, boxes of [boxRows, 64].
inline bool encodeMap(CUtensorMap& map, DataType type, void const* data, int rows, int columns, int boxRows)
{
    auto const format = type == DataType::kHALF ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    return encodeMap(map, format, 2, data, rows, columns, boxRows);
}

//! The same of bytes, boxes of [boxRows, 128].
inline bool encodeByteMap(CUtensorMap& map, void const* data, int rows, int columns, int boxRows)
{
    return encodeMap(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, data, rows, columns, boxRows);
}

}  // namespace trocr
