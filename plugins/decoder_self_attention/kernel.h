#pragma once

#include <cuda_runtime_api.h>

#include "common/data_type.h"

namespace trocr
{

//! One decoding step of causal self-attention: appends the new token's key and value to the cache, at row
//! position_ids[b], and attends from the new query to rows 0 to position_ids[b].
//!
//! Past and present are either the same memory (only the new row is written) or do not overlap (the whole cache is
//! copied as well). A row of the batch whose position is not in [0, C) appends nothing and its context is zero.
struct DecoderSelfAttentionParams
{
    void const* qkv;             //!< T [B, 1, 3, H, d], 16-byte aligned
    void const* pastKey;         //!< T [B, H, C, d], 16-byte aligned
    void const* pastValue;       //!< T [B, H, C, d], 16-byte aligned
    int64_t const* positionIds;  //!< int64 [B, 1], on the device
    void* context;               //!< T [B, 1, H * d], 16-byte aligned
    void* presentKey;            //!< T [B, H, C, d], pastKey or apart from it
    void* presentValue;          //!< T [B, H, C, d], pastValue or apart from it
    int32_t batch;               //!< B, 1 to 65535
    int32_t capacity;            //!< C, at least 1
    int32_t numHeads;            //!< H, 1 to 65535
    int32_t headDim;             //!< d, 32 or 64
    DataType dataType;           //!< T
};

//! Whether the sizes and the type are supported; pointers are not looked at. When not, *reason (if given) says why.
bool canImplementDecoderSelfAttention(DecoderSelfAttentionParams const& params, char const** reason = nullptr);

//! Enqueues the op. Returns cudaErrorInvalidValue for what cannot be implemented and for null or misaligned pointers.
cudaError_t decoderSelfAttention(DecoderSelfAttentionParams const& params, cudaStream_t stream);

}  // namespace trocr
