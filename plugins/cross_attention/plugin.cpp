#include "cross_attention/plugin.h"

namespace trocr
{

CrossAttentionParams TrOCRCrossAttentionPlugin::describe(nvinfer1::Dims const* inputs, nvinfer1::DataType type) const
{
    nvinfer1::Dims const& query = inputs[kIN_QUERY_IDX];  // [B, 1, D]
    nvinfer1::Dims const& key = inputs[kIN_KEY_IDX];      // [I, H, S, d]
    expectRank("query", query.nbDims, 3);
    expectRank("key", key.nbDims, 4);

    CrossAttentionParams params{};
    params.batch = dimension("query", query, 0);
    params.images = dimension("key", key, 0);
    params.sequenceLength = dimension("key", key, 2);
    params.numHeads = attributes().numHeads;
    params.headDim = headDimOf("query", query, 1, params.numHeads);
    params.dataType = toDataType(type);

    nvinfer1::Dims const cache{4, {key.d[0], params.numHeads, key.d[2], params.headDim}};
    expectShape("query", query, {3, {query.d[0], 1, query.d[2]}});
    expectShape("key", key, cache);
    expectShape("value", inputs[kIN_VALUE_IDX], cache);

    char const* reason = nullptr;
    bool const implemented = canImplementCrossAttention(params, &reason);
    expectImplemented(implemented, reason, describeHeads(params.headDim, "key", key) + ", query " + toString(query));
    return params;
}

cudaError_t TrOCRCrossAttentionPlugin::launch(CrossAttentionParams& params, void const* const* inputs,
                                              void* const* outputs, cudaStream_t stream) const
{
    params.query = inputs[kIN_QUERY_IDX];
    params.key = inputs[kIN_KEY_IDX];
    params.value = inputs[kIN_VALUE_IDX];
    params.context = outputs[kOUT_CONTEXT_IDX];
    return crossAttention(params, stream);
}

void TrOCRCrossAttentionPlugin::outputShapes(nvinfer1::DimsExprs const* inputs, nvinfer1::DimsExprs* outputs,
                                             nvinfer1::IExprBuilder&) const
{
    expectRank("query", inputs[kIN_QUERY_IDX].nbDims, 3);
    expectRank("key", inputs[kIN_KEY_IDX].nbDims, 4);
    expectRank("value", inputs[kIN_VALUE_IDX].nbDims, 4);
    outputs[kOUT_CONTEXT_IDX] = inputs[kIN_QUERY_IDX];
}

}  // namespace trocr
