#pragma once

#include <array>

#include "common/e4m3_shapes.h"
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

struct Fp8EncoderAttentionAttributes
{
    HeadsAttributes common;
    float outputScale;

    template <class Self, class Visitor>
    static void visit(Self& self, Visitor& visitor)
    {
        HeadsAttributes::visit(self.common, visitor);
        visitor("output_scale", self.outputScale);
    }

    void validate() const
    {
        common.validate();
        expectPositive("output_scale", outputScale);
    }
};

//! The same with context e4m3 [B, S, D], of the context divided by the scale (common/e4m3_shapes.h); T is float16.
class TrOCRFp8EncoderAttentionPlugin final
    : public PluginBase<TrOCRFp8EncoderAttentionPlugin, Fp8EncoderAttentionAttributes>
{
public:
    static constexpr char const* kNAME = "TrOCRFp8EncoderAttention";
    static constexpr bool kONLY_HALF = true;
    static constexpr auto kINPUTS = TrOCREncoderAttentionPlugin::kINPUTS;

    using PluginBase::PluginBase;

    EncoderAttentionParams describe(nvinfer1::Dims const* inputs, nvinfer1::DataType type) const;
    cudaError_t launch(EncoderAttentionParams& params, void const* const* inputs, void* const* outputs,
                       cudaStream_t stream) const;
    void outputShapes(nvinfer1::DimsExprs const* inputs, nvinfer1::DimsExprs* outputs,
                      nvinfer1::IExprBuilder& exprBuilder) const;
};

using TrOCREncoderAttentionPluginCreator = PluginCreator<TrOCREncoderAttentionPlugin>;
using TrOCRFp8EncoderAttentionPluginCreator = PluginCreator<TrOCRFp8EncoderAttentionPlugin>;

}  // namespace trocr
