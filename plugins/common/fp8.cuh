#pragma once

#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cstdint>

//! e4m3, and the order in which e4m3 activations are stored: of each 16 columns, column 8 b + 2 t + i is at
//! 4 t + 2 b + i. So the four values that a lane holds of them (of two neighbouring groups of eight columns: Wgmma in
//! sm90.cuh) are one word. Weights have their inputs in the same order, and a product may sum in any.

namespace trocr
{

//! Two values rounded to e4m3, to ±448 what is beyond; the first in the low byte.
__device__ __forceinline__ uint32_t toE4m3(float first, float second)
{
    return __nv_cvt_float2_to_fp8x2(make_float2(first, second), __NV_SATFINITE, __NV_E4M3);
}

}  // namespace trocr
