#pragma once

#include <array>
#include <string>

#include "common/heads.h"
#include "common/plugin_base.h"
#include "linear/kernel.h"

namespace trocr
{

struct NoAttributes
{
    template <class Self, class Visitor>
    static void visit(Self&, Visitor&)
    {
    }

    void validate() const {}
};

//! x T [..., K] -> statistics float32 [..., K / 64, 2].
class TrOCRRowStatisticsPlugin final : public PluginBase<TrOCRRowStatisticsPlugin, NoAttributes>
{
public:
    static constexpr char const* kNAME = "TrOCRRowStatistics";
    static constexpr std::array<char const*, 1> kINPUTS{"x"};
    static constexpr uint32_t kFLOAT_OUTPUTS = 1U << 0;

    using PluginBase::PluginBase;

    RowStatisticsParams describe(nvinfer1::Dims const* inputs, nvinfer1::DataType type) const;
    cudaError_t launch(RowStatisticsParams& params, void const* const* inputs, void* const* outputs,
                       cudaStream_t stream) const;
    void outputShapes(nvinfer1::DimsExprs const* inputs, nvinfer1::DimsExprs* outputs,
                      nvinfer1::IExprBuilder& exprBuilder) const;
};

struct LayerNormLinearAttributes
{
    float epsilon;
    std::string activation;  //!< "none", "gelu" or "relu"

    template <class Self, class Visitor>
    static void visit(Self& self, Visitor& visitor)
    {
        visitor("epsilon", self.epsilon);
        visitor("activation", self.activation);
    }

    void validate() const;
};

//! activation(LayerNorm(x) W^T + b) with gamma and beta folded into weight and bias: x T [..., K], its statistics
//! float32 [..., K / 64, 2], weight T [N, K], weight_sum and bias float32 [N] -> y T [..., N].
class TrOCRLayerNormLinearPlugin final : public PluginBase<TrOCRLayerNormLinearPlugin, LayerNormLinearAttributes>
{
public:
    static constexpr char const* kNAME = "TrOCRLayerNormLinear";
    static constexpr std::array<char const*, 5> kINPUTS{"x", "statistics", "weight", "weight_sum", "bias"};

    enum Input : int32_t
    {
        kIN_X_IDX = 0,
        kIN_STATISTICS_IDX,
        kIN_WEIGHT_IDX,
        kIN_WEIGHT_SUM_IDX,
        kIN_BIAS_IDX,
    };
    static constexpr uint32_t kFLOAT_INPUTS = 1U << kIN_STATISTICS_IDX | 1U << kIN_WEIGHT_SUM_IDX | 1U << kIN_BIAS_IDX;

    using PluginBase::PluginBase;

    LinearParams describe(nvinfer1::Dims const* inputs, nvinfer1::DataType type) const;
    cudaError_t launch(LinearParams& params, void const* const* inputs, void* const* outputs,
                       cudaStream_t stream) const;
    void outputShapes(nvinfer1::DimsExprs const* inputs, nvinfer1::DimsExprs* outputs,
                      nvinfer1::IExprBuilder& exprBuilder) const;
};

struct LinearResidualAttributes
{
    int32_t emitStatistics;  //!< 1: y's statistics are a second output, for the LayerNorm that follows; 0: they are not

    template <class Self, class Visitor>
    static void visit(Self& self, Visitor& visitor)
    {
        visitor("emit_statistics", self.emitStatistics);
    }

    void validate() const;
};

//! x W^T + b + residual: x T [..., K], weight T [N, K], bias float32 [N], residual T [..., N] -> y T [..., N] (,
//! statistics of y float32 [..., N / 64, 2]).
class TrOCRLinearResidualPlugin final : public PluginBase<TrOCRLinearResidualPlugin, LinearResidualAttributes>
{
public:
    static constexpr char const* kNAME = "TrOCRLinearResidual";
    static constexpr std::array<char const*, 4> kINPUTS{"x", "weight", "bias", "residual"};

    enum Input : int32_t
    {
        kIN_X_IDX = 0,
        kIN_WEIGHT_IDX,
        kIN_BIAS_IDX,
        kIN_RESIDUAL_IDX,
    };
    enum Output : int32_t
    {
        kOUT_Y_IDX = 0,
        kOUT_STATISTICS_IDX,
    };
    static constexpr uint32_t kFLOAT_INPUTS = 1U << kIN_BIAS_IDX;
    static constexpr uint32_t kFLOAT_OUTPUTS = 1U << kOUT_STATISTICS_IDX;

    using PluginBase::PluginBase;

    int32_t nbOutputs() const
    {
        return attributes().emitStatistics ? 2 : 1;
    }

    LinearParams describe(nvinfer1::Dims const* inputs, nvinfer1::DataType type) const;
    cudaError_t launch(LinearParams& params, void const* const* inputs, void* const* outputs,
                       cudaStream_t stream) const;
    void outputShapes(nvinfer1::DimsExprs const* inputs, nvinfer1::DimsExprs* outputs,
                      nvinfer1::IExprBuilder& exprBuilder) const;
};

//! Keys and values of cross-attention: x T [B, S, K], weight T [2*D, K], bias float32 [2*D] -> key and value T
//! [B, H, S, D / H].
class TrOCRCrossKeyValuePlugin final : public PluginBase<TrOCRCrossKeyValuePlugin, HeadsAttributes>
{
public:
    static constexpr char const* kNAME = "TrOCRCrossKeyValue";
    static constexpr std::array<char const*, 3> kINPUTS{"x", "weight", "bias"};

    enum Input : int32_t
    {
        kIN_X_IDX = 0,
        kIN_WEIGHT_IDX,
        kIN_BIAS_IDX,
    };
    enum Output : int32_t
    {
        kOUT_KEY_IDX = 0,
        kOUT_VALUE_IDX,
    };
    static constexpr uint32_t kFLOAT_INPUTS = 1U << kIN_BIAS_IDX;

    using PluginBase::PluginBase;

    int32_t nbOutputs() const
    {
        return 2;
    }

    LinearParams describe(nvinfer1::Dims const* inputs, nvinfer1::DataType type) const;
    cudaError_t launch(LinearParams& params, void const* const* inputs, void* const* outputs,
                       cudaStream_t stream) const;
    void outputShapes(nvinfer1::DimsExprs const* inputs, nvinfer1::DimsExprs* outputs,
                      nvinfer1::IExprBuilder& exprBuilder) const;
};

// The same ops with e4m3 inputs and weights. TensorRT sees an e4m3 tensor [..., K] as float16 [..., K / 2], the same
// bytes two at a time; T is float16.

struct Fp8RowStatisticsAttributes
{
    float scale;

    template <class Self, class Visitor>
    static void visit(Self& self, Visitor& visitor)
    {
        visitor("scale", self.scale);
    }

    void validate() const;
};

//! x T [..., K] -> statistics float32 [..., K / 64, 2], quantized e4m3 [..., K] of x / scale.
class TrOCRFp8RowStatisticsPlugin final : public PluginBase<TrOCRFp8RowStatisticsPlugin, Fp8RowStatisticsAttributes>
{
public:
    static constexpr char const* kNAME = "TrOCRFp8RowStatistics";
    static constexpr bool kONLY_HALF = true;
    static constexpr std::array<char const*, 1> kINPUTS{"x"};

    enum Output : int32_t
    {
        kOUT_STATISTICS_IDX = 0,
        kOUT_QUANTIZED_IDX,
    };
    static constexpr uint32_t kFLOAT_OUTPUTS = 1U << kOUT_STATISTICS_IDX;

    using PluginBase::PluginBase;

    int32_t nbOutputs() const
    {
        return 2;
    }

    RowStatisticsParams describe(nvinfer1::Dims const* inputs, nvinfer1::DataType type) const;
    cudaError_t launch(RowStatisticsParams& params, void const* const* inputs, void* const* outputs,
                       cudaStream_t stream) const;
    void outputShapes(nvinfer1::DimsExprs const* inputs, nvinfer1::DimsExprs* outputs,
                      nvinfer1::IExprBuilder& exprBuilder) const;
};

struct Fp8LayerNormLinearAttributes
{
    LayerNormLinearAttributes common;
    float productScale;  //!< that of x times that of the weight
    float outputScale;   //!< of y, e4m3, with a GELU; 0: y is T

    template <class Self, class Visitor>
    static void visit(Self& self, Visitor& visitor)
    {
        LayerNormLinearAttributes::visit(self.common, visitor);
        visitor("product_scale", self.productScale);
        visitor("output_scale", self.outputScale);
    }

    void validate() const;
};

//! TrOCRLayerNormLinear with x and weight e4m3: y is e4m3 [..., N] behind a GELU, else T [..., N].
class TrOCRFp8LayerNormLinearPlugin final
    : public PluginBase<TrOCRFp8LayerNormLinearPlugin, Fp8LayerNormLinearAttributes>
{
public:
    static constexpr char const* kNAME = "TrOCRFp8LayerNormLinear";
    static constexpr bool kONLY_HALF = true;
    static constexpr auto kINPUTS = TrOCRLayerNormLinearPlugin::kINPUTS;
    static constexpr uint32_t kFLOAT_INPUTS = TrOCRLayerNormLinearPlugin::kFLOAT_INPUTS;

    using PluginBase::PluginBase;

    LinearParams describe(nvinfer1::Dims const* inputs, nvinfer1::DataType type) const;
    cudaError_t launch(LinearParams& params, void const* const* inputs, void* const* outputs,
                       cudaStream_t stream) const;
    void outputShapes(nvinfer1::DimsExprs const* inputs, nvinfer1::DimsExprs* outputs,
                      nvinfer1::IExprBuilder& exprBuilder) const;
};

struct Fp8LinearResidualAttributes
{
    LinearResidualAttributes common;  //!< with statistics there is a third output, quantized
    float productScale;
    float outputScale;  //!< of quantized; 0 where there is none

    template <class Self, class Visitor>
    static void visit(Self& self, Visitor& visitor)
    {
        LinearResidualAttributes::visit(self.common, visitor);
        visitor("product_scale", self.productScale);
        visitor("output_scale", self.outputScale);
    }

    void validate() const;
};

//! TrOCRLinearResidual with x and weight e4m3 -> y T [..., N] (, its statistics, quantized e4m3 [..., N] of y).
class TrOCRFp8LinearResidualPlugin final : public PluginBase<TrOCRFp8LinearResidualPlugin, Fp8LinearResidualAttributes>
{
public:
    static constexpr char const* kNAME = "TrOCRFp8LinearResidual";
    static constexpr bool kONLY_HALF = true;
    static constexpr auto kINPUTS = TrOCRLinearResidualPlugin::kINPUTS;
    static constexpr uint32_t kFLOAT_INPUTS = TrOCRLinearResidualPlugin::kFLOAT_INPUTS;
    static constexpr uint32_t kFLOAT_OUTPUTS = TrOCRLinearResidualPlugin::kFLOAT_OUTPUTS;
    static constexpr int32_t kOUT_QUANTIZED_IDX = 2;

    using PluginBase::PluginBase;

    int32_t nbOutputs() const
    {
        return attributes().common.emitStatistics ? 3 : 1;
    }

    LinearParams describe(nvinfer1::Dims const* inputs, nvinfer1::DataType type) const;
    cudaError_t launch(LinearParams& params, void const* const* inputs, void* const* outputs,
                       cudaStream_t stream) const;
    void outputShapes(nvinfer1::DimsExprs const* inputs, nvinfer1::DimsExprs* outputs,
                      nvinfer1::IExprBuilder& exprBuilder) const;
};

using TrOCRRowStatisticsPluginCreator = PluginCreator<TrOCRRowStatisticsPlugin>;
using TrOCRLayerNormLinearPluginCreator = PluginCreator<TrOCRLayerNormLinearPlugin>;
using TrOCRLinearResidualPluginCreator = PluginCreator<TrOCRLinearResidualPlugin>;
using TrOCRCrossKeyValuePluginCreator = PluginCreator<TrOCRCrossKeyValuePlugin>;
using TrOCRFp8RowStatisticsPluginCreator = PluginCreator<TrOCRFp8RowStatisticsPlugin>;
using TrOCRFp8LayerNormLinearPluginCreator = PluginCreator<TrOCRFp8LayerNormLinearPlugin>;
using TrOCRFp8LinearResidualPluginCreator = PluginCreator<TrOCRFp8LinearResidualPlugin>;

}  // namespace trocr
