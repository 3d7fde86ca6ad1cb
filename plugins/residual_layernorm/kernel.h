#pragma once

#include <cuda_runtime_api.h>

#include "common/data_type.h"

namespace trocr
{

//! sum = x + residual, rounded to T; normed = LayerNorm(sum) * gamma + beta over the last dimension, statistics in
//! float32 of the rounded sum (so that normed is the LayerNorm of what a reader of sum sees, as in PyTorch). Without a
//! residual the sum is x.
struct ResidualLayerNormParams
{
    void const* x;         //!< T [R, N]
    void const* residual;  //!< T [R, N], or null
    void const* gamma;     //!< T [N]
    void const* beta;      //!< T [N]
    void* normed;          //!< T [R, N]; may be x or residual
    void* sum;             //!< T [R, N], or null where it is not wanted or x; may be x or residual, but not normed
    int64_t rows;          //!< R, 1 to 2^31 - 1
    int32_t width;         //!< N, 1 to 2^30; multiples of 16 bytes are fastest
    float epsilon;         //!< added to the variance, at least 0
    DataType dataType;     //!< T
    //! Programmatic dependent launch, where the device has it: this grid may start while its predecessor in the stream
    //! ends. Before that end only gamma and beta are read, which the predecessor must not write.
    bool overlapPredecessor;
};

//! Whether the sizes and the type are supported; pointers are not looked at. When not, *reason (if given) says why.
bool canImplementResidualLayerNorm(ResidualLayerNormParams const& params, char const** reason = nullptr);

//! Enqueues the op. Returns cudaErrorInvalidValue for what cannot be implemented and for null pointers or pointers
//! that are not aligned to T. Pointers aligned to 16 bytes are fastest.
cudaError_t residualLayerNorm(ResidualLayerNormParams const& params, cudaStream_t stream);

}  // namespace trocr
