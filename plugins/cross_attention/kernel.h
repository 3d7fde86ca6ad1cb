#pragma once

#include <cuda_runtime_api.h>

#include "common/data_type.h"

namespace trocr
{

//! softmax(q K^T / sqrt(d)) V of one query a row over the encoder's keys and values, without a mask. Rows b * B / I to
//! (b + 1) * B / I - 1 share the keys and values of image b.
struct CrossAttentionParams
{
    void const* query;       //!< T [B, 1, H * d], 16-byte aligned
    void const* key;         //!< T [I, H, S, d], 16-byte aligned
    void const* value;       //!< T [I, H, S, d], 16-byte aligned
    void* context;           //!< T [B, 1, H * d], 16-byte aligned
    int32_t batch;           //!< B, 1 to 65535
    int32_t images;          //!< I, a divisor of B; H * B / I is at most 65535
    int32_t sequenceLength;  //!< S, at least 1
    int32_t numHeads;        //!< H, 1 to 65535
    int32_t headDim;         //!< d, 32 or 64
    DataType dataType;       //!< T
};

//! Whether the sizes and the type are supported; pointers are not looked at. When not, *reason (if given) says why.
bool canImplementCrossAttention(CrossAttentionParams const& params, char const** reason = nullptr);

//! Enqueues the op. Returns cudaErrorInvalidValue for what cannot be implemented and for null or misaligned pointers.
cudaError_t crossAttention(CrossAttentionParams const& params, cudaStream_t stream);

}  // namespace trocr
