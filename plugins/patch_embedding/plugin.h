#pragma once

#include <array>

#include "common/plugin_base.h"
#include "patch_embedding/kernel.h"

namespace trocr
{

struct PatchEmbeddingAttributes
{
    float scale;
    int32_t emitStatistics;  //!< 1: y's statistics are a second output, for the LayerNorm that follows; 0: they are not

    template <class Self, class Visitor>
    static void visit(Self& self, Visitor& visitor)
    {
        visitor("scale", self.scale);
        visitor("emit_statistics", self.emitStatistics);
    }

    void validate() const;
};

//! Pixels int32 [B, 3, height, width / 4], four bytes each (TensorRT gives plugins no uint8), weight T [N, 768], bias
//! float32 [N], positions T [S, N] -> y T [B, S, N] (, statistics of y float32 [B, S, N / 64, 2]).
class TrOCRPatchEmbeddingPlugin final : public PluginBase<TrOCRPatchEmbeddingPlugin, PatchEmbeddingAttributes>
{
public:
    static constexpr char const* kNAME = "TrOCRPatchEmbedding";
    static constexpr std::array<char const*, 4> kINPUTS{"pixels", "weight", "bias", "positions"};

    enum Input : int32_t
    {
        kIN_PIXELS_IDX = 0,
        kIN_WEIGHT_IDX,
        kIN_BIAS_IDX,
        kIN_POSITIONS_IDX,
    };
    enum Output : int32_t
    {
        kOUT_Y_IDX = 0,
        kOUT_STATISTICS_IDX,
    };
    static constexpr int32_t kTYPED_INPUT = kIN_WEIGHT_IDX;
    static constexpr uint32_t kINT32_INPUTS = 1U << kIN_PIXELS_IDX;
    static constexpr uint32_t kFLOAT_INPUTS = 1U << kIN_BIAS_IDX;
    static constexpr uint32_t kFLOAT_OUTPUTS = 1U << kOUT_STATISTICS_IDX;

    using PluginBase::PluginBase;

    int32_t nbOutputs() const
    {
        return attributes().emitStatistics ? 2 : 1;
    }

    PatchEmbeddingParams describe(nvinfer1::Dims const* inputs, nvinfer1::DataType type) const;
    cudaError_t launch(PatchEmbeddingParams& params, void const* const* inputs, void* const* outputs,
                       cudaStream_t stream) const;
    void outputShapes(nvinfer1::DimsExprs const* inputs, nvinfer1::DimsExprs* outputs,
                      nvinfer1::IExprBuilder& exprBuilder) const;
};

using TrOCRPatchEmbeddingPluginCreator = PluginCreator<TrOCRPatchEmbeddingPlugin>;

}  // namespace trocr
