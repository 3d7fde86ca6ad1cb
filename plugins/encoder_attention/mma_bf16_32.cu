#include "encoder_attention/mma.cuh"

namespace trocr
{

template cudaError_t encoderAttentionMma<__nv_bfloat16, 32>(EncoderAttentionParams const&, cudaStream_t);

}  // namespace trocr
