#include "patch_embedding/plugin.h"

#include <stdexcept>
#include <string>

#include "linear/kernel.h"

namespace trocr
{
namespace
{

constexpr int32_t kPIXELS_A_WORD = 4;

}  // namespace

void PatchEmbeddingAttributes::validate() const
{
    expectPositive("scale", scale);
    if (emitStatistics != 0 && emitStatistics != 1)
    {
        throw std::invalid_argument{"attribute 'emit_statistics' is " + std::to_string(emitStatistics) +
                                    ", expected 0 or 1"};
    }
}

PatchEmbeddingParams TrOCRPatchEmbeddingPlugin::describe(nvinfer1::Dims const* inputs, nvinfer1::DataType type) const
{
    nvinfer1::Dims const& pixels = inputs[kIN_PIXELS_IDX];
    nvinfer1::Dims const& weight = inputs[kIN_WEIGHT_IDX];
    nvinfer1::Dims const& positions = inputs[kIN_POSITIONS_IDX];
    expectRank("pixels", pixels.nbDims, 4);
    expectRank("weight", weight.nbDims, 2);
    expectRank("positions", positions.nbDims, 2);

    PatchEmbeddingParams params{};
    params.scale = attributes().scale;
    params.batch = dimension("pixels", pixels, 0);
    params.height = dimension("pixels", pixels, 2);
    int32_t const words = dimension("pixels", pixels, 3);
    if (words > (1 << 26) / kPIXELS_A_WORD)
    {
        throw std::invalid_argument{"pixels has shape " + toString(pixels) + ": dimension 3 is out of range"};
    }
    params.width = words * kPIXELS_A_WORD;
    params.outputs = dimension("weight", weight, 0);
    params.dataType = toDataType(type);
    int64_t const patches = int64_t{params.height / kPATCH_SIZE} * (params.width / kPATCH_SIZE);
    int64_t const special = dimension("positions", positions, 0) - patches;
    // Images that are no multiples of a patch are refused by their own name below.
    params.specialTokens = static_cast<int32_t>(special);
    // Only weight and bias, constants of the engine, are read before griddepcontrol.wait: see linear/README.md.
    params.overlapPredecessor = true;

    expectShape("pixels", pixels, {4, {params.batch, 3, params.height, words}});
    expectShape("weight", weight, {2, {params.outputs, kPATCH_INPUTS}});
    expectShape("bias", inputs[kIN_BIAS_IDX], {1, {params.outputs}});
    expectShape("positions", positions, {2, {positions.d[0], params.outputs}});

    char const* reason = nullptr;
    bool const implemented = canImplementPatchEmbedding(params, &reason);
    expectImplemented(
        implemented, reason,
        "pixels " + toString(pixels) + " with weight " + toString(weight) + " and positions " + toString(positions));
    return params;
}

cudaError_t TrOCRPatchEmbeddingPlugin::launch(PatchEmbeddingParams& params, void const* const* inputs,
                                              void* const* outputs, cudaStream_t stream) const
{
    params.pixels = inputs[kIN_PIXELS_IDX];
    params.weight = inputs[kIN_WEIGHT_IDX];
    params.bias = static_cast<float const*>(inputs[kIN_BIAS_IDX]);
    params.positions = inputs[kIN_POSITIONS_IDX];
    params.y = outputs[kOUT_Y_IDX];
    params.statistics = attributes().emitStatistics ? static_cast<float*>(outputs[kOUT_STATISTICS_IDX]) : nullptr;
    return patchEmbedding(params, stream);
}

void TrOCRPatchEmbeddingPlugin::outputShapes(nvinfer1::DimsExprs const* inputs, nvinfer1::DimsExprs* outputs,
                                             nvinfer1::IExprBuilder& exprBuilder) const
{
    expectRank("pixels", inputs[kIN_PIXELS_IDX].nbDims, 4);
    expectRank("weight", inputs[kIN_WEIGHT_IDX].nbDims, 2);
    expectRank("bias", inputs[kIN_BIAS_IDX].nbDims, 1);
    expectRank("positions", inputs[kIN_POSITIONS_IDX].nbDims, 2);
    nvinfer1::IDimensionExpr const* const batch = inputs[kIN_PIXELS_IDX].d[0];
    nvinfer1::IDimensionExpr const* const tokens = inputs[kIN_POSITIONS_IDX].d[0];
    nvinfer1::IDimensionExpr const* const width = inputs[kIN_WEIGHT_IDX].d[0];
    outputs[kOUT_Y_IDX] = {3, {batch, tokens, width}};
    if (attributes().emitStatistics)
    {
        nvinfer1::IDimensionExpr const* const parts = exprBuilder.operation(
            nvinfer1::DimensionOperation::kFLOOR_DIV, *width, *exprBuilder.constant(kLINEAR_STATISTICS_WIDTH));
        outputs[kOUT_STATISTICS_IDX] = {4, {batch, tokens, parts, exprBuilder.constant(2)}};
    }
}

}  // namespace trocr
