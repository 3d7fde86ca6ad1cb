#pragma once

// What the kernels of all device decoders share.

#include "common/device.cuh"

namespace trocr::decoder
{

constexpr float kNO_SCORE = -1e30F;  //!< below every score; finite, so that differences of two are 0

//! By the error function, to 1e-6 of x: erfc(z) = exp(-z z) times a polynomial in 1 / (1 + 0.3275911 z), z not below 0
//! (Abramowitz and Stegun, 7.1.26). erff takes a branch, and twice as many instructions.
__device__ __forceinline__ float gelu(float x)
{
    float const z = fabsf(x) * 0.70710678F;
    float const t = __fdividef(1.0F, 1.0F + 0.3275911F * z);
    float polynomial = 1.061405429F;
    polynomial = polynomial * t - 1.453152027F;
    polynomial = polynomial * t + 1.421413741F;
    polynomial = polynomial * t - 0.284496736F;
    polynomial = polynomial * t + 0.254829592F;
    float const rest = polynomial * t * exp2Approx(-z * z * kLOG2_E);
    return fmaxf(x, 0.0F) - 0.5F * fabsf(x) * rest;
}

}  // namespace trocr::decoder
