#include "encoder_attention/plugin.h"

namespace trocr
{

EncoderAttentionParams TrOCREncoderAttentionPlugin::describe(nvinfer1::Dims const* inputs,
                                                             nvinfer1::DataType type) const
{
    nvinfer1::Dims const& qkv = inputs[kIN_QKV_IDX];  // [B, S, 3*D]
    expectRank("qkv", qkv.nbDims, 3);

    EncoderAttentionParams params{};
    params.batch = dimension("qkv", qkv, 0);
    params.sequenceLength = dimension("qkv", qkv, 1);
    params.numHeads = attributes().numHeads;
    params.headDim = headDimOf("qkv", qkv, 3, params.numHeads);
    params.dataType = toDataType(type);

    char const* reason = nullptr;
    bool const implemented = canImplementEncoderAttention(params, &reason);
    expectImplemented(implemented, reason, describeHeads(params.headDim, "qkv", qkv));
    return params;
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
    nvinfer1::DimsExprs const& qkv = inputs[kIN_QKV_IDX];
    expectRank("qkv", qkv.nbDims, 3);
    outputs[kOUT_CONTEXT_IDX] = qkv;
    outputs[kOUT_CONTEXT_IDX].d[2] =
        exprBuilder.operation(nvinfer1::DimensionOperation::kFLOOR_DIV, *qkv.d[2], *exprBuilder.constant(3));
}

}  // namespace trocr
