#pragma once

#include "encoder_attention/kernel.h"

namespace trocr
{

//! Whether encoderAttentionSm90 takes these sizes and this type: fp16 or bf16, head size 64. Neither the pointers nor
//! the device (compute capability 9.0) are looked at.
bool canImplementEncoderAttentionSm90(EncoderAttentionParams const& params, char const** reason = nullptr);

//! Enqueues the op on a Hopper GPU; params as for encoderAttention. With overlapPredecessor (programmatic dependent
//! launch) the grid may start while its predecessor in the stream ends; it touches qkv and context only after that.
cudaError_t encoderAttentionSm90(
    EncoderAttentionParams const& params, cudaStream_t stream, bool overlapPredecessor = false);

} // namespace trocr
