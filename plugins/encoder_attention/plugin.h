#pragma once

#include <array>

#include "common/heads.h"
#include "common/plugin_base.h"
#include "encoder_attention/kernel.h"

namespace trocr
{

//! Self-attention of the encoder on packed query, key and value: qkv T [B, S, 3*D] -> context T [B, S, D].
class TrOCREncoderAttentionPlugin final : public PluginBase<TrOCREncoderAttentionPlugin, HeadsAttributes>
{
public:
    static constexpr char const* kNAME = "TrOCREncoderAttention";
    static constexpr std::array<char const*, 1> kINPUTS{"qkv"};

    enum Input : int32_t
    {
        kIN_QKV_IDX = 0,
    };
    enum Output : int32_t
    {
        kOUT_CONTEXT_IDX = 0,
    };

    using PluginBase::PluginBase;

    EncoderAttentionParams describe(nvinfer1::Dims const* inputs, nvinfer1::DataType type) const;
    cudaError_t launch(EncoderAttentionParams& params, void const* const* inputs, void* const* outputs,
                       cudaStream_t stream) const;
    void outputShapes(nvinfer1::DimsExprs const* inputs, nvinfer1::DimsExprs* outputs,
                      nvinfer1::IExprBuilder& exprBuilder) const;
};

using TrOCREncoderAttentionPluginCreator = PluginCreator<TrOCREncoderAttentionPlugin>;

}  // namespace trocr
