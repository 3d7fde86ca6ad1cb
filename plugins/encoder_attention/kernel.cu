#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/launch.h"
#include "encoder_attention/kernel.h"
#include "encoder_attention/launchers.h"

namespace trocr
{

namespace
{

bool isHopperForced(EncoderAttentionParams const& params)
{
    return params.path != EncoderAttentionPath::kAUTO && params.path != EncoderAttentionPath::kGENERAL;
}

cudaError_t encoderAttentionGeneral(EncoderAttentionParams const& params, cudaStream_t stream)
{
    bool const narrow = params.headDim == 32;
    switch (params.dataType)
    {
        case DataType::kFLOAT:
            return narrow ? encoderAttentionFloat<32>(params, stream) : encoderAttentionFloat<64>(params, stream);
        case DataType::kHALF:
            return narrow ? encoderAttentionMma<__half, 32>(params, stream)
                          : encoderAttentionMma<__half, 64>(params, stream);
        case DataType::kBF16:
            return narrow ? encoderAttentionMma<__nv_bfloat16, 32>(params, stream)
                          : encoderAttentionMma<__nv_bfloat16, 64>(params, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace

bool canImplementEncoderAttention(EncoderAttentionParams const& params, char const** reason)
{
    if (!canImplementAttention(params.dataType, params.headDim, params.batch, params.numHeads, params.sequenceLength,
                               reason))
    {
        return false;
    }
    if (params.outputScale != 0.0F)
    {
        if (!isPositive(params.outputScale))
        {
            return refuse(reason, "the output's scale must be finite and above 0");
        }
        if (params.dataType != DataType::kHALF || params.path == EncoderAttentionPath::kGENERAL)
        {
            return refuse(reason, "e4m3 outputs go with half, on the Hopper path");
        }
    }
    else if (!isHopperForced(params))
    {
        return true;
    }
    return canImplementEncoderAttentionSm90(params, reason);
}

cudaError_t encoderAttention(EncoderAttentionParams const& params, cudaStream_t stream)
{
    if (!canImplementEncoderAttention(params) || !areAligned(16, params.qkv, params.context))
    {
        return cudaErrorInvalidValue;
    }
    if (params.path == EncoderAttentionPath::kGENERAL || !canImplementEncoderAttentionSm90(params))
    {
        return encoderAttentionGeneral(params, stream);
    }
    int major{};
    int minor{};
    cudaError_t status = deviceAttribute(cudaDevAttrComputeCapabilityMajor, major);
    if (status == cudaSuccess)
    {
        status = deviceAttribute(cudaDevAttrComputeCapabilityMinor, minor);
    }
    if (status != cudaSuccess)
    {
        return status;
    }
    if (major == 9 && minor == 0)
    {
        return encoderAttentionSm90(params, stream);
    }
    return isHopperForced(params) || params.outputScale != 0.0F ? cudaErrorNotSupported
                                                                : encoderAttentionGeneral(params, stream);
}

}  // namespace trocr
