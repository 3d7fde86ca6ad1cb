#include "linear/plugin.h"

#include <stdexcept>

#include "common/e4m3_shapes.h"

namespace trocr
{
namespace
{

using nvinfer1::Dims;
using nvinfer1::DimsExprs;
using nvinfer1::IExprBuilder;

//! Stands for a tensor that a call has: canImplementLinear asks of pointers only whether they are null.
float gPresent{};

LinearActivation toActivation(std::string const& name)
{
    if (name == "none")
    {
        return LinearActivation::kNONE;
    }
    if (name == "gelu")
    {
        return LinearActivation::kGELU;
    }
    if (name == "relu")
    {
        return LinearActivation::kRELU;
    }
    throw std::invalid_argument{"attribute 'activation' is '" + name + "', expected 'none', 'gelu' or 'relu'"};
}

//! The shape of a tensor with another last dimension.
Dims withLast(Dims dims, int64_t last)
{
    dims.d[dims.nbDims - 1] = last;
    return dims;
}

//! The shape of the statistics of a tensor: [..., N] -> [..., N / 64, 2].
Dims statisticsOf(Dims dims)
{
    dims.d[dims.nbDims - 1] /= kLINEAR_STATISTICS_WIDTH;
    dims.d[dims.nbDims++] = 2;
    return dims;
}

DimsExprs statisticsOf(char const* tensor, DimsExprs dims, IExprBuilder& exprBuilder)
{
    if (dims.nbDims < 1)
    {
        throw std::invalid_argument{std::string{tensor} + " has 0 dimensions, expected at least 1"};
    }
    nvinfer1::IDimensionExpr const*& last = dims.d[dims.nbDims - 1];
    last = exprBuilder.operation(nvinfer1::DimensionOperation::kFLOOR_DIV, *last,
                                 *exprBuilder.constant(kLINEAR_STATISTICS_WIDTH));
    dims.d[dims.nbDims++] = exprBuilder.constant(2);
    return dims;
}

//! The sizes of y T [..., N] = x T [..., K] times weight T [N, K], and the bias float32 [N].
LinearParams describeProduct(Dims const& x, Dims const& weight, Dims const& bias, nvinfer1::DataType type)
{
    expectRank("weight", weight.nbDims, 2);

    LinearParams params{};
    params.bias = &gPresent;
    params.rows = leadingSize("x", x);
    params.outputs = dimension("weight", weight, 0);
    params.inputs = dimension("x", x, x.nbDims - 1);
    params.dataType = toDataType(type);
    // Only the weight, a constant of the engine, is read before griddepcontrol.wait. That returns when the preceding
    // grid, whoever's it is, has ended and what it wrote is visible. Each of our grids ends after its own wait, so by
    // induction all earlier work has ended too: what is overwritten has no readers left. README.md.
    params.overlapPredecessor = true;

    expectShape("weight", weight, {2, {params.outputs, params.inputs}});
    expectShape("bias", bias, {1, {params.outputs}});
    return params;
}

//! Of an e4m3 product; x [..., K] and weight [N, K] are the real sizes, not TensorRT's.
LinearParams describeE4m3Product(Dims const& x, Dims const& weight, Dims const& bias, nvinfer1::DataType type)
{
    LinearParams params = describeProduct(x, weight, bias, type);
    params.e4m3 = true;
    return params;
}

void expectImplementedLinear(LinearParams const& params, Dims const& x)
{
    char const* reason = nullptr;
    bool const implemented = canImplementLinear(params, &reason);
    expectImplemented(implemented, reason,
                      "x " + toString(x) + " times weight [" + std::to_string(params.outputs) + ", " +
                          std::to_string(params.inputs) + "]^T");
}

// What an op and its e4m3 form have in common. x is the tensor of the real size.

//! `quantized`: whether an e4m3 copy by this scale is wanted.
RowStatisticsParams describeRowStatistics(Dims const& x, nvinfer1::DataType type, bool quantized, float scale)
{
    RowStatisticsParams params{};
    params.rows = leadingSize("x", x);
    params.width = dimension("x", x, x.nbDims - 1);
    params.dataType = toDataType(type);
    params.quantized = quantized ? &gPresent : nullptr;
    params.scale = scale;

    char const* reason = nullptr;
    bool const implemented = canImplementRowStatistics(params, &reason);
    expectImplemented(implemented, reason, "x " + toString(x));
    return params;
}

using Normalised = TrOCRLayerNormLinearPlugin;

//! `params` of the product -> with LayerNorm and activation.
LinearParams describeNormalised(LinearParams params, Dims const& x, Dims const* inputs,
                                LayerNormLinearAttributes const& attributes)
{
    params.inputStatistics = &gPresent;
    params.weightSum = &gPresent;
    params.epsilon = attributes.epsilon;
    params.activation = toActivation(attributes.activation);

    expectShape("weight_sum", inputs[Normalised::kIN_WEIGHT_SUM_IDX], {1, {params.outputs}});
    expectImplementedLinear(params, x);
    expectShape("statistics", inputs[Normalised::kIN_STATISTICS_IDX], statisticsOf(x));
    return params;
}

void takeNormalised(LinearParams& params, void const* const* inputs)
{
    params.x = inputs[Normalised::kIN_X_IDX];
    params.inputStatistics = static_cast<float const*>(inputs[Normalised::kIN_STATISTICS_IDX]);
    params.weight = inputs[Normalised::kIN_WEIGHT_IDX];
    params.weightSum = static_cast<float const*>(inputs[Normalised::kIN_WEIGHT_SUM_IDX]);
    params.bias = static_cast<float const*>(inputs[Normalised::kIN_BIAS_IDX]);
}

DimsExprs normalisedShape(DimsExprs const* inputs)
{
    DimsExprs y = inputs[Normalised::kIN_X_IDX];
    expectRank("statistics", inputs[Normalised::kIN_STATISTICS_IDX].nbDims, y.nbDims + 1);
    expectRank("weight", inputs[Normalised::kIN_WEIGHT_IDX].nbDims, 2);
    expectRank("weight_sum", inputs[Normalised::kIN_WEIGHT_SUM_IDX].nbDims, 1);
    expectRank("bias", inputs[Normalised::kIN_BIAS_IDX].nbDims, 1);
    y.d[y.nbDims - 1] = inputs[Normalised::kIN_WEIGHT_IDX].d[0];
    return y;
}

using Residual = TrOCRLinearResidualPlugin;

//! `params` of the product -> with residual and statistics.
LinearParams describeResidual(LinearParams params, Dims const& x, Dims const* inputs, bool emitStatistics)
{
    params.residual = &gPresent;
    params.outputStatistics = emitStatistics ? &gPresent : nullptr;

    expectShape("residual", inputs[Residual::kIN_RESIDUAL_IDX], withLast(x, params.outputs));
    expectImplementedLinear(params, x);
    return params;
}

void takeResidual(LinearParams& params, void const* const* inputs, void* const* outputs, bool emitStatistics)
{
    params.x = inputs[Residual::kIN_X_IDX];
    params.weight = inputs[Residual::kIN_WEIGHT_IDX];
    params.bias = static_cast<float const*>(inputs[Residual::kIN_BIAS_IDX]);
    params.residual = inputs[Residual::kIN_RESIDUAL_IDX];
    params.y = outputs[Residual::kOUT_Y_IDX];
    params.outputStatistics = emitStatistics ? static_cast<float*>(outputs[Residual::kOUT_STATISTICS_IDX]) : nullptr;
}

void residualShapes(DimsExprs const* inputs, DimsExprs* outputs, bool emitStatistics, IExprBuilder& exprBuilder)
{
    DimsExprs const& residual = inputs[Residual::kIN_RESIDUAL_IDX];
    expectRank("weight", inputs[Residual::kIN_WEIGHT_IDX].nbDims, 2);
    expectRank("bias", inputs[Residual::kIN_BIAS_IDX].nbDims, 1);
    expectRank("residual", residual.nbDims, inputs[Residual::kIN_X_IDX].nbDims);
    outputs[Residual::kOUT_Y_IDX] = residual;
    if (emitStatistics)
    {
        outputs[Residual::kOUT_STATISTICS_IDX] = statisticsOf("residual", residual, exprBuilder);
    }
}

}  // namespace

// Row statistics

RowStatisticsParams TrOCRRowStatisticsPlugin::describe(Dims const* inputs, nvinfer1::DataType type) const
{
    return describeRowStatistics(inputs[0], type, false, 0.0F);
}

cudaError_t TrOCRRowStatisticsPlugin::launch(RowStatisticsParams& params, void const* const* inputs,
                                             void* const* outputs, cudaStream_t stream) const
{
    params.x = inputs[0];
    params.statistics = static_cast<float*>(outputs[0]);
    return rowStatistics(params, stream);
}

void TrOCRRowStatisticsPlugin::outputShapes(DimsExprs const* inputs, DimsExprs* outputs,
                                            IExprBuilder& exprBuilder) const
{
    outputs[0] = statisticsOf("x", inputs[0], exprBuilder);
}

// LayerNorm and product

void LayerNormLinearAttributes::validate() const
{
    expectPositive("epsilon", epsilon);
    toActivation(activation);
}

LinearParams TrOCRLayerNormLinearPlugin::describe(Dims const* inputs, nvinfer1::DataType type) const
{
    Dims const& x = inputs[kIN_X_IDX];
    return describeNormalised(describeProduct(x, inputs[kIN_WEIGHT_IDX], inputs[kIN_BIAS_IDX], type), x, inputs,
                              attributes());
}

cudaError_t TrOCRLayerNormLinearPlugin::launch(LinearParams& params, void const* const* inputs, void* const* outputs,
                                               cudaStream_t stream) const
{
    takeNormalised(params, inputs);
    params.y = outputs[0];
    return linear(params, stream);
}

void TrOCRLayerNormLinearPlugin::outputShapes(DimsExprs const* inputs, DimsExprs* outputs, IExprBuilder&) const
{
    outputs[0] = normalisedShape(inputs);
}

// Product and residual

void LinearResidualAttributes::validate() const
{
    if (emitStatistics != 0 && emitStatistics != 1)
    {
        throw std::invalid_argument{"attribute 'emit_statistics' is " + std::to_string(emitStatistics) +
                                    ", expected 0 or 1"};
    }
}

LinearParams TrOCRLinearResidualPlugin::describe(Dims const* inputs, nvinfer1::DataType type) const
{
    Dims const& x = inputs[kIN_X_IDX];
    return describeResidual(describeProduct(x, inputs[kIN_WEIGHT_IDX], inputs[kIN_BIAS_IDX], type), x, inputs,
                            attributes().emitStatistics);
}

cudaError_t TrOCRLinearResidualPlugin::launch(LinearParams& params, void const* const* inputs, void* const* outputs,
                                              cudaStream_t stream) const
{
    takeResidual(params, inputs, outputs, attributes().emitStatistics);
    return linear(params, stream);
}

void TrOCRLinearResidualPlugin::outputShapes(DimsExprs const* inputs, DimsExprs* outputs,
                                             IExprBuilder& exprBuilder) const
{
    residualShapes(inputs, outputs, attributes().emitStatistics, exprBuilder);
}

// Keys and values

LinearParams TrOCRCrossKeyValuePlugin::describe(Dims const* inputs, nvinfer1::DataType type) const
{
    Dims const& x = inputs[kIN_X_IDX];
    Dims const& weight = inputs[kIN_WEIGHT_IDX];
    expectRank("x", x.nbDims, 3);
    LinearParams params = describeProduct(x, weight, inputs[kIN_BIAS_IDX], type);
    params.values = &gPresent;
    params.tokens = dimension("x", x, 1);
    int32_t const heads = 2 * attributes().numHeads;
    if (params.outputs % heads != 0)
    {
        throw std::invalid_argument{"weight " + toString(weight) + " is not that of keys and values of " +
                                    std::to_string(attributes().numHeads) + " heads"};
    }
    params.headDim = params.outputs / heads;
    expectImplementedLinear(params, x);
    return params;
}

cudaError_t TrOCRCrossKeyValuePlugin::launch(LinearParams& params, void const* const* inputs, void* const* outputs,
                                             cudaStream_t stream) const
{
    params.x = inputs[kIN_X_IDX];
    params.weight = inputs[kIN_WEIGHT_IDX];
    params.bias = static_cast<float const*>(inputs[kIN_BIAS_IDX]);
    params.y = outputs[kOUT_KEY_IDX];
    params.values = outputs[kOUT_VALUE_IDX];
    return linear(params, stream);
}

void TrOCRCrossKeyValuePlugin::outputShapes(DimsExprs const* inputs, DimsExprs* outputs,
                                            IExprBuilder& exprBuilder) const
{
    DimsExprs const& x = inputs[kIN_X_IDX];
    expectRank("x", x.nbDims, 3);
    expectRank("weight", inputs[kIN_WEIGHT_IDX].nbDims, 2);
    expectRank("bias", inputs[kIN_BIAS_IDX].nbDims, 1);
    nvinfer1::IDimensionExpr const* const heads = exprBuilder.constant(attributes().numHeads);
    nvinfer1::IDimensionExpr const* const twice = exprBuilder.constant(2 * attributes().numHeads);
    nvinfer1::IDimensionExpr const* const headDim =
        exprBuilder.operation(nvinfer1::DimensionOperation::kFLOOR_DIV, *inputs[kIN_WEIGHT_IDX].d[0], *twice);
    for (int32_t const i : {kOUT_KEY_IDX, kOUT_VALUE_IDX})
    {
        outputs[i].nbDims = 4;
        outputs[i].d[0] = x.d[0];
        outputs[i].d[1] = heads;
        outputs[i].d[2] = x.d[1];
        outputs[i].d[3] = headDim;
    }
}

// e4m3

void Fp8RowStatisticsAttributes::validate() const
{
    expectPositive("scale", scale);
}

RowStatisticsParams TrOCRFp8RowStatisticsPlugin::describe(Dims const* inputs, nvinfer1::DataType type) const
{
    return describeRowStatistics(inputs[0], type, true, attributes().scale);
}

cudaError_t TrOCRFp8RowStatisticsPlugin::launch(RowStatisticsParams& params, void const* const* inputs,
                                                void* const* outputs, cudaStream_t stream) const
{
    params.x = inputs[0];
    params.statistics = static_cast<float*>(outputs[kOUT_STATISTICS_IDX]);
    params.quantized = outputs[kOUT_QUANTIZED_IDX];
    return rowStatistics(params, stream);
}

void TrOCRFp8RowStatisticsPlugin::outputShapes(DimsExprs const* inputs, DimsExprs* outputs,
                                               IExprBuilder& exprBuilder) const
{
    outputs[kOUT_STATISTICS_IDX] = statisticsOf("x", inputs[0], exprBuilder);
    outputs[kOUT_QUANTIZED_IDX] = halved(inputs[0], exprBuilder);
}

void Fp8LayerNormLinearAttributes::validate() const
{
    common.validate();
    expectPositive("product_scale", productScale);
    if (outputScale != 0.0F)
    {
        expectPositive("output_scale", outputScale);
    }
}

LinearParams TrOCRFp8LayerNormLinearPlugin::describe(Dims const* inputs, nvinfer1::DataType type) const
{
    Dims const x = doubled(inputs[Normalised::kIN_X_IDX]);
    LinearParams params =
        describeE4m3Product(x, doubled(inputs[Normalised::kIN_WEIGHT_IDX]), inputs[Normalised::kIN_BIAS_IDX], type);
    params.quantized = attributes().outputScale != 0.0F ? &gPresent : nullptr;
    params.productScale = attributes().productScale;
    params.outputScale = attributes().outputScale;
    return describeNormalised(params, x, inputs, attributes().common);
}

cudaError_t TrOCRFp8LayerNormLinearPlugin::launch(LinearParams& params, void const* const* inputs, void* const* outputs,
                                                  cudaStream_t stream) const
{
    takeNormalised(params, inputs);
    (params.quantized != nullptr ? params.quantized : params.y) = outputs[0];
    return linear(params, stream);
}

void TrOCRFp8LayerNormLinearPlugin::outputShapes(DimsExprs const* inputs, DimsExprs* outputs,
                                                 IExprBuilder& exprBuilder) const
{
    DimsExprs const y = normalisedShape(inputs);
    outputs[0] = attributes().outputScale != 0.0F ? halved(y, exprBuilder) : y;
}

void Fp8LinearResidualAttributes::validate() const
{
    common.validate();
    expectPositive("product_scale", productScale);
    if (common.emitStatistics)
    {
        expectPositive("output_scale", outputScale);
    }
}

LinearParams TrOCRFp8LinearResidualPlugin::describe(Dims const* inputs, nvinfer1::DataType type) const
{
    Dims const x = doubled(inputs[Residual::kIN_X_IDX]);
    LinearParams params =
        describeE4m3Product(x, doubled(inputs[Residual::kIN_WEIGHT_IDX]), inputs[Residual::kIN_BIAS_IDX], type);
    params.quantized = attributes().common.emitStatistics ? &gPresent : nullptr;
    params.productScale = attributes().productScale;
    params.outputScale = attributes().outputScale;
    return describeResidual(params, x, inputs, attributes().common.emitStatistics);
}

cudaError_t TrOCRFp8LinearResidualPlugin::launch(LinearParams& params, void const* const* inputs, void* const* outputs,
                                                 cudaStream_t stream) const
{
    takeResidual(params, inputs, outputs, attributes().common.emitStatistics);
    if (attributes().common.emitStatistics)
    {
        params.quantized = outputs[kOUT_QUANTIZED_IDX];
    }
    return linear(params, stream);
}

void TrOCRFp8LinearResidualPlugin::outputShapes(DimsExprs const* inputs, DimsExprs* outputs,
                                                IExprBuilder& exprBuilder) const
{
    residualShapes(inputs, outputs, attributes().common.emitStatistics, exprBuilder);
    if (attributes().common.emitStatistics)
    {
        outputs[kOUT_QUANTIZED_IDX] = halved(inputs[Residual::kIN_RESIDUAL_IDX], exprBuilder);
    }
}

}  // namespace trocr
