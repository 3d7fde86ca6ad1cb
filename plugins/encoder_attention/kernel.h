#pragma once

#include <cuda_runtime_api.h>

#include "common/data_type.h"

namespace trocr
{

//! softmax(Q K^T / sqrt(d)) V for every image and head, without a mask, on the packed output of the QKV projection.
struct EncoderAttentionParams
{
    void const* qkv; //!< T [B, S, 3, H, d], 16-byte aligned
    void* context;   //!< T [B, S, H * d], 16-byte aligned, not overlapping qkv
    int32_t batch;   //!< B, 1 to 65535
    int32_t sequenceLength; //!< S, at least 1
    int32_t numHeads;       //!< H, 1 to 65535
    int32_t headDim;        //!< d, 32 or 64
    DataType dataType;      //!< T
};

//! Whether the sizes and the type are supported; pointers are not looked at. When not, *reason (if given) says why.
bool canImplementEncoderAttention(EncoderAttentionParams const& params, char const** reason = nullptr);

//! Enqueues the op. Returns cudaErrorInvalidValue for what cannot be implemented and for null or misaligned pointers.
cudaError_t encoderAttention(EncoderAttentionParams const& params, cudaStream_t stream);

} // namespace trocr
