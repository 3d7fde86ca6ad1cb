#pragma once

// What the kernels of both device decoders share.

namespace trocr::decoder
{

constexpr float kNO_SCORE = -1e30F;  //!< below every score; finite, so that differences of two are 0

//! Exact: by the error function.
__device__ __forceinline__ float gelu(float x)
{
    return 0.5F * x * (1.0F + erff(x * 0.70710678F));
}

}  // namespace trocr::decoder
