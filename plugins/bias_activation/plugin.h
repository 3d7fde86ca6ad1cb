#pragma once

#include <array>
#include <string>

#include "bias_activation/kernel.h"
#include "common/plugin_base.h"

namespace trocr
{

struct BiasActivationAttributes
{
    std::string activation;  //!< "gelu" (exact, erf) or "relu"

    template <class Self, class Visitor>
    static void visit(Self& self, Visitor& visitor)
    {
        visitor("activation", self.activation);
    }

    void validate() const;
};

//! activation(x + bias): x T [..., N], bias T [N] -> y T [..., N].
class TrOCRBiasActivationPlugin final : public PluginBase<TrOCRBiasActivationPlugin, BiasActivationAttributes>
{
public:
    static constexpr char const* kNAME = "TrOCRBiasActivation";
    static constexpr std::array<char const*, 2> kINPUTS{"x", "bias"};

    enum Input : int32_t
    {
        kIN_X_IDX = 0,
        kIN_BIAS_IDX,
    };
    enum Output : int32_t
    {
        kOUT_Y_IDX = 0,
    };

    using PluginBase::PluginBase;

    BiasActivationParams describe(nvinfer1::Dims const* inputs, nvinfer1::DataType type) const;
    cudaError_t launch(BiasActivationParams& params, void const* const* inputs, void* const* outputs,
                       cudaStream_t stream) const;
    void outputShapes(nvinfer1::DimsExprs const* inputs, nvinfer1::DimsExprs* outputs,
                      nvinfer1::IExprBuilder& exprBuilder) const;
};

using TrOCRBiasActivationPluginCreator = PluginCreator<TrOCRBiasActivationPlugin>;

}  // namespace trocr
