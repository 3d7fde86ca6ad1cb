#include "bias_activation/plugin.h"

#include <stdexcept>

namespace trocr
{
namespace
{

Activation toActivation(std::string const& name)
{
    if (name == "gelu")
    {
        return Activation::kGELU;
    }
    if (name == "relu")
    {
        return Activation::kRELU;
    }
    throw std::invalid_argument{"attribute 'activation' is '" + name + "', expected 'gelu' or 'relu'"};
}

}  // namespace

void BiasActivationAttributes::validate() const
{
    toActivation(activation);
}

BiasActivationParams TrOCRBiasActivationPlugin::describe(nvinfer1::Dims const* inputs, nvinfer1::DataType type) const
{
    nvinfer1::Dims const& x = inputs[kIN_X_IDX];  // [..., N]

    BiasActivationParams params{};
    params.rows = leadingSize("x", x);
    params.width = dimension("x", x, x.nbDims - 1);
    params.activation = toActivation(attributes().activation);
    params.dataType = toDataType(type);

    expectShape("bias", inputs[kIN_BIAS_IDX], {1, {params.width}});

    char const* reason = nullptr;
    bool const implemented = canImplementBiasActivation(params, &reason);
    expectImplemented(implemented, reason, "x " + toString(x));
    return params;
}

cudaError_t TrOCRBiasActivationPlugin::launch(BiasActivationParams& params, void const* const* inputs,
                                              void* const* outputs, cudaStream_t stream) const
{
    params.x = inputs[kIN_X_IDX];
    params.bias = inputs[kIN_BIAS_IDX];
    params.y = outputs[kOUT_Y_IDX];
    return biasActivation(params, stream);
}

void TrOCRBiasActivationPlugin::outputShapes(nvinfer1::DimsExprs const* inputs, nvinfer1::DimsExprs* outputs,
                                             nvinfer1::IExprBuilder&) const
{
    expectRank("bias", inputs[kIN_BIAS_IDX].nbDims, 1);
    outputs[kOUT_Y_IDX] = inputs[kIN_X_IDX];
}

}  // namespace trocr
