#include "encoder_attention/mma.cuh"

namespace trocr
{

template cudaError_t encoderAttentionMma<__half, 64>(EncoderAttentionParams const&, cudaStream_t);

}  // namespace trocr
