#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace trocr
{

//! Gives every row the self-attention cache of another row of the same image, in place.
struct CacheReorderParams
{
    void* cache;                 //!< [N] tensors [B, H, C, rowBytes], `tensorBytes` apart, 16-byte aligned
    int64_t const* rows;         //!< [B], where each row's cache comes from; outside of the image: stays
    int64_t const* positionIds;  //!< [B, 1], tokens in the cache
    int64_t tensorBytes;         //!< a multiple of 16
    int32_t tensors;             //!< N, 1 to 65535
    int32_t batch;               //!< B, a multiple of the beams
    int32_t beams;               //!< rows an image, 1 to 16
    int32_t numHeads;            //!< H, 1 to 65535
    int32_t capacity;            //!< C, at least 1
    int32_t rowBytes;            //!< d elements, a multiple of 16
};

//! Whether the sizes are supported; pointers are not looked at. When not, *reason (if given) says why.
bool canImplementCacheReorder(CacheReorderParams const& params, char const** reason = nullptr);

//! Enqueues it. Returns cudaErrorInvalidValue for what cannot be implemented and for null or misaligned pointers.
cudaError_t cacheReorder(CacheReorderParams const& params, cudaStream_t stream);

}  // namespace trocr
