#pragma once

// What the kernels of all device decoders share.

#include "common/fp8.cuh"
#include "common/sm90.cuh"

namespace trocr::decoder
{

constexpr float kNO_SCORE = -1e30F;  //!< below every score; finite, so that differences of two are 0

//! Two e4m3 numbers as two of float16, which has them all.
__device__ __forceinline__ uint32_t halvesOfE4m3(uint32_t pair)
{
    __half2_raw const halves = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(pair & 0xffffU), __NV_E4M3);
    return halves.x | static_cast<uint32_t>(halves.y) << 16;
}

//! Eight elements of the lines' keys or values in shared memory, C = e4m3 as float16, else as they are.
template <typename C>
__device__ __forceinline__ uint4 loadEight(uint32_t from)
{
    if constexpr (sizeof(C) == 1)
    {
        uint2 const bits = sm90::loadSharedPair(from);
        return {halvesOfE4m3(bits.x), halvesOfE4m3(bits.x >> 16), halvesOfE4m3(bits.y), halvesOfE4m3(bits.y >> 16)};
    }
    else
    {
        return sm90::loadShared(from);
    }
}

}  // namespace trocr::decoder
