#include "encoder_attention/mma.cuh"

namespace trocr
{

template cudaError_t encoderAttentionMma<__nv_bfloat16, 64>(EncoderAttentionParams const&, cudaStream_t);

}  // namespace trocr
