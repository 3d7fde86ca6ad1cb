#include "decoder_self_attention/plugin.h"

namespace trocr
{

DecoderSelfAttentionParams TrOCRDecoderSelfAttentionPlugin::describe(nvinfer1::Dims const* inputs,
                                                                     nvinfer1::DataType type) const
{
    nvinfer1::Dims const& qkv = inputs[kIN_QKV_IDX];           // [B, 1, 3*D]
    nvinfer1::Dims const& pastKey = inputs[kIN_PAST_KEY_IDX];  // [B, H, C, d]
    expectRank("qkv", qkv.nbDims, 3);
    expectRank("past_key", pastKey.nbDims, 4);

    DecoderSelfAttentionParams params{};
    params.batch = dimension("qkv", qkv, 0);
    params.capacity = dimension("past_key", pastKey, 2);
    params.numHeads = attributes().numHeads;
    params.headDim = headDimOf("qkv", qkv, 3, params.numHeads);
    params.dataType = toDataType(type);

    nvinfer1::Dims const cache{4, {qkv.d[0], params.numHeads, pastKey.d[2], params.headDim}};
    expectShape("qkv", qkv, {3, {qkv.d[0], 1, qkv.d[2]}});
    expectShape("past_key", pastKey, cache);
    expectShape("past_value", inputs[kIN_PAST_VALUE_IDX], cache);
    expectShape("position_ids", inputs[kIN_POSITION_IDS_IDX], {2, {qkv.d[0], 1}});

    char const* reason = nullptr;
    bool const implemented = canImplementDecoderSelfAttention(params, &reason);
    expectImplemented(implemented, reason, describeHeads(params.headDim, "past_key", pastKey));
    return params;
}

cudaError_t TrOCRDecoderSelfAttentionPlugin::launch(DecoderSelfAttentionParams& params, void const* const* inputs,
                                                    void* const* outputs, cudaStream_t stream) const
{
    params.qkv = inputs[kIN_QKV_IDX];
    params.pastKey = inputs[kIN_PAST_KEY_IDX];
    params.pastValue = inputs[kIN_PAST_VALUE_IDX];
    params.positionIds = static_cast<int64_t const*>(inputs[kIN_POSITION_IDS_IDX]);
    params.context = outputs[kOUT_CONTEXT_IDX];
    params.presentKey = outputs[kOUT_PRESENT_KEY_IDX];
    params.presentValue = outputs[kOUT_PRESENT_VALUE_IDX];
    return decoderSelfAttention(params, stream);
}

void TrOCRDecoderSelfAttentionPlugin::outputShapes(nvinfer1::DimsExprs const* inputs, nvinfer1::DimsExprs* outputs,
                                                   nvinfer1::IExprBuilder& exprBuilder) const
{
    nvinfer1::DimsExprs const& qkv = inputs[kIN_QKV_IDX];
    expectRank("qkv", qkv.nbDims, 3);
    expectRank("past_key", inputs[kIN_PAST_KEY_IDX].nbDims, 4);
    expectRank("past_value", inputs[kIN_PAST_VALUE_IDX].nbDims, 4);
    expectRank("position_ids", inputs[kIN_POSITION_IDS_IDX].nbDims, 2);
    outputs[kOUT_CONTEXT_IDX] = qkv;
    outputs[kOUT_CONTEXT_IDX].d[2] =
        exprBuilder.operation(nvinfer1::DimensionOperation::kFLOOR_DIV, *qkv.d[2], *exprBuilder.constant(3));
    outputs[kOUT_PRESENT_KEY_IDX] = inputs[kIN_PAST_KEY_IDX];
    outputs[kOUT_PRESENT_VALUE_IDX] = inputs[kIN_PAST_VALUE_IDX];
}

}  // namespace trocr
