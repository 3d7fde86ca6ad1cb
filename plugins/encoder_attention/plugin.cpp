#include "encoder_attention/plugin.h"

namespace trocr
{
namespace
{

EncoderAttentionParams describeAttention(nvinfer1::Dims const& qkv, nvinfer1::DataType type, int32_t numHeads,
                                         float outputScale)
{
    expectRank("qkv", qkv.nbDims, 3);  // [B, S, 3*D]

    EncoderAttentionParams params{};
    params.batch = dimension("qkv", qkv, 0);
    params.sequenceLength = dimension("qkv", qkv, 1);
    params.numHeads = numHeads;
    params.headDim = headDimOf("qkv", qkv, 3, params.numHeads);
    params.dataType = toDataType(type);
    params.outputScale = outputScale;

    char const* reason = nullptr;
    bool const implemented = canImplementEncoderAttention(params, &reason);
    expectImplemented(implemented, reason, describeHeads(params.headDim, "qkv", qkv));
    return params;
}

nvinfer1::DimsExprs contextShape(nvinfer1::DimsExprs qkv, nvinfer1::IExprBuilder& exprBuilder)
{
    expectRank("qkv", qkv.nbDims, 3);
    qkv.d[2] = exprBuilder.operation(nvinfer1::DimensionOperation::kFLOOR_DIV, *qkv.d[2], *exprBuilder.constant(3));
    return qkv;
}

}  // namespace

EncoderAttentionParams TrOCREncoderAttentionPlugin::describe(nvinfer1::Dims const* inputs,
                                                             nvinfer1::DataType type) const
{
    return describeAttention(inputs[kIN_QKV_IDX], type, attributes().numHeads, 0.0F);
}

cudaError_t TrOCREncoderAttentionPlugin::launch(EncoderAttentionParams& params, void const* const* inputs,
                                                void* const* outputs, cudaStream_t stream) const
{
    params.qkv = inputs[kIN_QKV_IDX];
    params.context = outputs[kOUT_CONTEXT_IDX];
    return encoderAttention(params, stream);
}

void TrOCREncoderAttentionPlugin::outputShapes(nvinfer1::DimsExprs const* inputs, nvinfer1::DimsExprs* outputs,
                                               nvinfer1::IExprBuilder& exprBuilder) const
{
    outputs[kOUT_CONTEXT_IDX] = contextShape(inputs[kIN_QKV_IDX], exprBuilder);
}

EncoderAttentionParams TrOCRFp8EncoderAttentionPlugin::describe(nvinfer1::Dims const* inputs,
                                                                nvinfer1::DataType type) const
{
    return describeAttention(inputs[0], type, attributes().common.numHeads, attributes().outputScale);
}

cudaError_t TrOCRFp8EncoderAttentionPlugin::launch(EncoderAttentionParams& params, void const* const* inputs,
                                                   void* const* outputs, cudaStream_t stream) const
{
    params.qkv = inputs[0];
    params.context = outputs[0];
    return encoderAttention(params, stream);
}

void TrOCRFp8EncoderAttentionPlugin::outputShapes(nvinfer1::DimsExprs const* inputs, nvinfer1::DimsExprs* outputs,
                                                  nvinfer1::IExprBuilder& exprBuilder) const
{
    outputs[0] = halved(contextShape(inputs[0], exprBuilder), exprBuilder);
}

}  // namespace trocr
