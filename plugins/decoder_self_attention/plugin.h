#pragma once

#include <array>

#include "common/heads.h"
#include "common/plugin_base.h"
#include "decoder_self_attention/kernel.h"

namespace trocr
{

//! One step of the decoder's cached self-attention: qkv T [B, 1, 3*D], past_key and past_value T [B, H, C, d],
//! position_ids int64 [B, 1] -> context T [B, 1, D], present_key and present_value T [B, H, C, d].
//!
//! The cache is updated in place where the runtime binds present to past's address; nothing is aliased at build time,
//! since TensorRT may copy a whole cache to honour an alias.
class TrOCRDecoderSelfAttentionPlugin final : public PluginBase<TrOCRDecoderSelfAttentionPlugin, HeadsAttributes>
{
public:
    static constexpr char const* kNAME = "TrOCRDecoderSelfAttention";
    static constexpr std::array<char const*, 4> kINPUTS{"qkv", "past_key", "past_value", "position_ids"};

    enum Input : int32_t
    {
        kIN_QKV_IDX = 0,
        kIN_PAST_KEY_IDX,
        kIN_PAST_VALUE_IDX,
        kIN_POSITION_IDS_IDX,
    };
    enum Output : int32_t
    {
        kOUT_CONTEXT_IDX = 0,
        kOUT_PRESENT_KEY_IDX,
        kOUT_PRESENT_VALUE_IDX,
    };
    static constexpr uint32_t kINT64_INPUTS = 1U << kIN_POSITION_IDS_IDX;

    using PluginBase::PluginBase;

    int32_t nbOutputs() const
    {
        return 3;
    }

    DecoderSelfAttentionParams describe(nvinfer1::Dims const* inputs, nvinfer1::DataType type) const;
    cudaError_t launch(DecoderSelfAttentionParams& params, void const* const* inputs, void* const* outputs,
                       cudaStream_t stream) const;
    void outputShapes(nvinfer1::DimsExprs const* inputs, nvinfer1::DimsExprs* outputs,
                      nvinfer1::IExprBuilder& exprBuilder) const;
};

using TrOCRDecoderSelfAttentionPluginCreator = PluginCreator<TrOCRDecoderSelfAttentionPlugin>;

}  // namespace trocr
