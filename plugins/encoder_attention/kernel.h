#pragma once

#include <cuda_runtime_api.h>

#include "common/data_type.h"

namespace trocr
{

//! Which implementation serves a call. All but kAUTO are for tests and benchmarks.
enum class EncoderAttentionPath : int32_t
{
    kAUTO,      //!< Hopper's where device and sizes allow it, else the general one
    kGENERAL,   //!< mma.sync for float16 and bfloat16, plain float32: every device
    kHOPPER,    //!< wgmma and TMA: compute capability 9.0, head size 64, float16 and bfloat16; its cheaper variant
    kHOPPER_2,  //!< its variant of two consumer warpgroups (SM90.md)
    kHOPPER_3,  //!< and of three
    kHOPPER_DIVIDED,  //!< and that which divides a tile's keys among warpgroups: sequences up to 640
};

//! softmax(Q K^T / sqrt(d)) V for every image and head, without a mask, on the packed output of the QKV projection.
struct EncoderAttentionParams
{
    void const* qkv;         //!< T [B, S, 3, H, d], 16-byte aligned
    void* context;           //!< T [B, S, H * d], 16-byte aligned, not overlapping qkv
    int32_t batch;           //!< B, 1 to 65535
    int32_t sequenceLength;  //!< S, at least 1
    int32_t numHeads;        //!< H, 1 to 65535
    int32_t headDim;         //!< d, 32 or 64
    DataType dataType;       //!< T
    EncoderAttentionPath path = EncoderAttentionPath::kAUTO;
    //! Not 0: context is e4m3 [B, S, H * d] of the context divided by it, in the order of common/fp8.cuh; only for
    //! float16 on the Hopper path.
    float outputScale = 0.0F;
};

//! Whether the sizes and the type are supported; pointers are not looked at. When not, *reason (if given) says why.
bool canImplementEncoderAttention(EncoderAttentionParams const& params, char const** reason = nullptr);

//! Enqueues the op. Returns cudaErrorInvalidValue for what cannot be implemented and for null or misaligned pointers,
//! cudaErrorNotSupported for a forced Hopper path on another GPU. Programmatic dependent launch on Hopper: the grid may
//! start while its predecessor in the stream ends, and waits for that end before it touches qkv or context.
cudaError_t encoderAttention(EncoderAttentionParams const& params, cudaStream_t stream);

}  // namespace trocr
