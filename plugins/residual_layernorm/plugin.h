#pragma once

#include <array>

#include "common/plugin_base.h"
#include "residual_layernorm/kernel.h"

namespace trocr
{

struct ResidualLayerNormAttributes
{
    float epsilon;
    int32_t emitSum;  //!< 1: the sum is a second output, as pre-LN layers need it; 0: it is not

    template <class Self, class Visitor>
    static void visit(Self& self, Visitor& visitor)
    {
        visitor("epsilon", self.epsilon);
        visitor("emit_sum", self.emitSum);
    }

    void validate() const;
};

//! LayerNorm(x + residual): x and residual T [..., N], gamma and beta T [N] -> normed T [..., N] (, sum T [..., N]).
class TrOCRResidualLayerNormPlugin final : public PluginBase<TrOCRResidualLayerNormPlugin, ResidualLayerNormAttributes>
{
public:
    static constexpr char const* kNAME = "TrOCRResidualLayerNorm";
    static constexpr std::array<char const*, 4> kINPUTS{"x", "residual", "gamma", "beta"};

    enum Input : int32_t
    {
        kIN_X_IDX = 0,
        kIN_RESIDUAL_IDX,
        kIN_GAMMA_IDX,
        kIN_BETA_IDX,
    };
    enum Output : int32_t
    {
        kOUT_NORMED_IDX = 0,
        kOUT_SUM_IDX,
    };

    using PluginBase::PluginBase;

    int32_t nbOutputs() const
    {
        return attributes().emitSum ? 2 : 1;
    }

    ResidualLayerNormParams describe(nvinfer1::Dims const* inputs, nvinfer1::DataType type) const;
    cudaError_t launch(ResidualLayerNormParams& params, void const* const* inputs, void* const* outputs,
                       cudaStream_t stream) const;
    void outputShapes(nvinfer1::DimsExprs const* inputs, nvinfer1::DimsExprs* outputs,
                      nvinfer1::IExprBuilder& exprBuilder) const;
};

struct LayerNormAttributes
{
    float epsilon;

    template <class Self, class Visitor>
    static void visit(Self& self, Visitor& visitor)
    {
        visitor("epsilon", self.epsilon);
    }

    void validate() const;
};

//! LayerNorm(x): x T [..., N], gamma and beta T [N] -> normed T [..., N].
class TrOCRLayerNormPlugin final : public PluginBase<TrOCRLayerNormPlugin, LayerNormAttributes>
{
public:
    static constexpr char const* kNAME = "TrOCRLayerNorm";
    static constexpr std::array<char const*, 3> kINPUTS{"x", "gamma", "beta"};

    enum Input : int32_t
    {
        kIN_X_IDX = 0,
        kIN_GAMMA_IDX,
        kIN_BETA_IDX,
    };

    using PluginBase::PluginBase;

    ResidualLayerNormParams describe(nvinfer1::Dims const* inputs, nvinfer1::DataType type) const;
    cudaError_t launch(ResidualLayerNormParams& params, void const* const* inputs, void* const* outputs,
                       cudaStream_t stream) const;
    void outputShapes(nvinfer1::DimsExprs const* inputs, nvinfer1::DimsExprs* outputs,
                      nvinfer1::IExprBuilder& exprBuilder) const;
};

using TrOCRLayerNormPluginCreator = PluginCreator<TrOCRLayerNormPlugin>;
using TrOCRResidualLayerNormPluginCreator = PluginCreator<TrOCRResidualLayerNormPlugin>;

}  // namespace trocr
