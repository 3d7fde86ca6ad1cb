#pragma once

#include <cuda_runtime_api.h>

#include "common/data_type.h"

namespace trocr
{

enum class Activation : int32_t
{
    kGELU = 0,  //!< exact: y = 0.5 v (1 + erf(v / sqrt(2)))
    kRELU = 1,  //!< y = max(v, 0); NaN stays NaN
};

//! y = activation(x + bias), computed in float32 and rounded once.
struct BiasActivationParams
{
    void const* x;     //!< T [R, N]
    void const* bias;  //!< T [N]
    void* y;           //!< T [R, N]; may be x
    int64_t rows;      //!< R, 1 to 2^31 - 1
    int32_t width;     //!< N, 1 to 2^30; multiples of 16 bytes are fastest
    Activation activation;
    DataType dataType;  //!< T
};

//! Whether the sizes and the type are supported; pointers are not looked at. When not, *reason (if given) says why.
bool canImplementBiasActivation(BiasActivationParams const& params, char const** reason = nullptr);

//! Enqueues the op. Returns cudaErrorInvalidValue for what cannot be implemented and for null pointers or pointers
//! that are not aligned to T. Pointers aligned to 16 bytes are fastest.
cudaError_t biasActivation(BiasActivationParams const& params, cudaStream_t stream);

}  // namespace trocr
