#pragma once

#include <array>

#include "common/heads.h"
#include "common/plugin_base.h"
#include "cross_attention/kernel.h"

namespace trocr
{

//! One decoder query a row over the encoder's keys and values:
//! query T [B, 1, D], key and value T [I, H, S, d] -> context T [B, 1, D]; B / I neighbouring rows an image.
class TrOCRCrossAttentionPlugin final : public PluginBase<TrOCRCrossAttentionPlugin, HeadsAttributes>
{
public:
    static constexpr char const* kNAME = "TrOCRCrossAttention";
    static constexpr std::array<char const*, 3> kINPUTS{"query", "key", "value"};

    enum Input : int32_t
    {
        kIN_QUERY_IDX = 0,
        kIN_KEY_IDX,
        kIN_VALUE_IDX,
    };
    enum Output : int32_t
    {
        kOUT_CONTEXT_IDX = 0,
    };

    using PluginBase::PluginBase;

    CrossAttentionParams describe(nvinfer1::Dims const* inputs, nvinfer1::DataType type) const;
    cudaError_t launch(CrossAttentionParams& params, void const* const* inputs, void* const* outputs,
                       cudaStream_t stream) const;
    void outputShapes(nvinfer1::DimsExprs const* inputs, nvinfer1::DimsExprs* outputs,
                      nvinfer1::IExprBuilder& exprBuilder) const;
};

using TrOCRCrossAttentionPluginCreator = PluginCreator<TrOCRCrossAttentionPlugin>;

}  // namespace trocr
