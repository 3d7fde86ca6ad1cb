#include "residual_layernorm/plugin.h"

#include <stdexcept>
#include <string>

namespace trocr
{
namespace
{

//! The sizes of a LayerNorm of x T [..., N] with gamma and beta T [N].
ResidualLayerNormParams describeNorm(nvinfer1::Dims const& x, nvinfer1::Dims const& gamma, nvinfer1::Dims const& beta,
                                     float epsilon, nvinfer1::DataType type)
{
    ResidualLayerNormParams params{};
    params.rows = leadingSize("x", x);
    params.width = dimension("x", x, x.nbDims - 1);
    params.epsilon = epsilon;
    params.dataType = toDataType(type);
    // Only gamma and beta, constants of the engine, are read before griddepcontrol.wait: see linear/README.md.
    params.overlapPredecessor = true;

    expectShape("gamma", gamma, {1, {params.width}});
    expectShape("beta", beta, {1, {params.width}});

    char const* reason = nullptr;
    bool const implemented = canImplementResidualLayerNorm(params, &reason);
    expectImplemented(implemented, reason, "x " + toString(x));
    return params;
}

}  // namespace

void ResidualLayerNormAttributes::validate() const
{
    expectPositive("epsilon", epsilon);
    if (emitSum != 0 && emitSum != 1)
    {
        throw std::invalid_argument{"attribute 'emit_sum' is " + std::to_string(emitSum) + ", expected 0 or 1"};
    }
}

ResidualLayerNormParams TrOCRResidualLayerNormPlugin::describe(nvinfer1::Dims const* inputs,
                                                               nvinfer1::DataType type) const
{
    nvinfer1::Dims const& x = inputs[kIN_X_IDX];  // [..., N]

    ResidualLayerNormParams const params =
        describeNorm(x, inputs[kIN_GAMMA_IDX], inputs[kIN_BETA_IDX], attributes().epsilon, type);
    expectShape("residual", inputs[kIN_RESIDUAL_IDX], x);
    return params;
}

cudaError_t TrOCRResidualLayerNormPlugin::launch(ResidualLayerNormParams& params, void const* const* inputs,
                                                 void* const* outputs, cudaStream_t stream) const
{
    params.x = inputs[kIN_X_IDX];
    params.residual = inputs[kIN_RESIDUAL_IDX];
    params.gamma = inputs[kIN_GAMMA_IDX];
    params.beta = inputs[kIN_BETA_IDX];
    params.normed = outputs[kOUT_NORMED_IDX];
    params.sum = attributes().emitSum ? outputs[kOUT_SUM_IDX] : nullptr;
    return residualLayerNorm(params, stream);
}

void TrOCRResidualLayerNormPlugin::outputShapes(nvinfer1::DimsExprs const* inputs, nvinfer1::DimsExprs* outputs,
                                                nvinfer1::IExprBuilder&) const
{
    expectRank("residual", inputs[kIN_RESIDUAL_IDX].nbDims, inputs[kIN_X_IDX].nbDims);
    expectRank("gamma", inputs[kIN_GAMMA_IDX].nbDims, 1);
    expectRank("beta", inputs[kIN_BETA_IDX].nbDims, 1);
    for (int32_t i = 0; i < nbOutputs(); ++i)
    {
        outputs[i] = inputs[kIN_X_IDX];
    }
}

// Without a residual

void LayerNormAttributes::validate() const
{
    expectPositive("epsilon", epsilon);
}

ResidualLayerNormParams TrOCRLayerNormPlugin::describe(nvinfer1::Dims const* inputs, nvinfer1::DataType type) const
{
    return describeNorm(inputs[kIN_X_IDX], inputs[kIN_GAMMA_IDX], inputs[kIN_BETA_IDX], attributes().epsilon, type);
}

cudaError_t TrOCRLayerNormPlugin::launch(ResidualLayerNormParams& params, void const* const* inputs,
                                         void* const* outputs, cudaStream_t stream) const
{
    params.x = inputs[kIN_X_IDX];
    params.gamma = inputs[kIN_GAMMA_IDX];
    params.beta = inputs[kIN_BETA_IDX];
    params.normed = outputs[0];
    return residualLayerNorm(params, stream);
}

void TrOCRLayerNormPlugin::outputShapes(nvinfer1::DimsExprs const* inputs, nvinfer1::DimsExprs* outputs,
                                        nvinfer1::IExprBuilder&) const
{
    expectRank("gamma", inputs[kIN_GAMMA_IDX].nbDims, 1);
    expectRank("beta", inputs[kIN_BETA_IDX].nbDims, 1);
    outputs[0] = inputs[kIN_X_IDX];
}

}  // namespace trocr
