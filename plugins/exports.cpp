//! The two functions that TensorRT looks up in a plugin library (IPluginRegistry::loadLibrary, trtexec
//! --dynamicPlugins). They are the library's only exported symbols: see exports.map.

#include <NvInferRuntime.h>

#include "bias_activation/plugin.h"
#include "common/logging.h"
#include "cross_attention/plugin.h"
#include "decoder_self_attention/plugin.h"
#include "encoder_attention/plugin.h"
#include "linear/plugin.h"
#include "patch_embedding/plugin.h"
#include "residual_layernorm/plugin.h"

extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(
    int32_t& nbCreators)
{
    static trocr::TrOCREncoderAttentionPluginCreator encoderAttention;
    static trocr::TrOCRDecoderSelfAttentionPluginCreator decoderSelfAttention;
    static trocr::TrOCRCrossAttentionPluginCreator crossAttention;
    static trocr::TrOCRResidualLayerNormPluginCreator residualLayerNorm;
    static trocr::TrOCRLayerNormPluginCreator layerNorm;
    static trocr::TrOCRBiasActivationPluginCreator biasActivation;
    static trocr::TrOCRRowStatisticsPluginCreator rowStatistics;
    static trocr::TrOCRLayerNormLinearPluginCreator layerNormLinear;
    static trocr::TrOCRLinearResidualPluginCreator linearResidual;
    static trocr::TrOCRCrossKeyValuePluginCreator crossKeyValue;
    static trocr::TrOCRPatchEmbeddingPluginCreator patchEmbedding;
    static trocr::TrOCRFp8EncoderAttentionPluginCreator fp8EncoderAttention;
    static trocr::TrOCRFp8RowStatisticsPluginCreator fp8RowStatistics;
    static trocr::TrOCRFp8LayerNormLinearPluginCreator fp8LayerNormLinear;
    static trocr::TrOCRFp8LinearResidualPluginCreator fp8LinearResidual;
    static nvinfer1::IPluginCreatorInterface* const creators[]{
        &encoderAttention, &decoderSelfAttention, &crossAttention,   &residualLayerNorm,  &layerNorm,
        &biasActivation,   &rowStatistics,        &layerNormLinear,  &linearResidual,     &crossKeyValue,
        &patchEmbedding,   &fp8EncoderAttention,  &fp8RowStatistics, &fp8LayerNormLinear, &fp8LinearResidual};
    nbCreators = static_cast<int32_t>(std::size(creators));
    return creators;
}

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder* finder)
{
    trocr::setLoggerFinder(finder);
}
