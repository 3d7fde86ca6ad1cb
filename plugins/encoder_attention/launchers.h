#pragma once

#include <cuda_runtime_api.h>

#include "encoder_attention/kernel.h"

//! The implementations encoderAttention() chooses from, one file an element type and head size.

namespace trocr
{

//! On tensor cores (mma.sync); float16 and bfloat16; compute capability 8.0 and above.
template <typename T, int kHEAD_DIM>
cudaError_t encoderAttentionMma(EncoderAttentionParams const& params, cudaStream_t stream);

//! On float32 units, without rounding to TF32.
template <int kHEAD_DIM>
cudaError_t encoderAttentionFloat(EncoderAttentionParams const& params, cudaStream_t stream);

//! Whether encoderAttentionSm90 takes what canImplementEncoderAttention does: float16 or bfloat16 and head size 64.
bool canImplementEncoderAttentionSm90(EncoderAttentionParams const& params, char const** reason = nullptr);

//! With wgmma and TMA; compute capability 9.0 only, which the caller has checked.
cudaError_t encoderAttentionSm90(EncoderAttentionParams const& params, cudaStream_t stream);

//! Its variant for few query tiles (divided_sm90.cu): a warpgroup a key tile, of which a head has at most so many. C is
//! the context's type, T or e4m3.
constexpr int kDIVIDED_KEYS = 128;
constexpr int kDIVIDED_KEY_TILES = 5;
template <typename T, typename C>
cudaError_t encoderAttentionDivided(EncoderAttentionParams const& params, cudaStream_t stream);

}  // namespace trocr
