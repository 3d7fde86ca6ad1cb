#pragma once

#include <cuda_runtime_api.h>

#include "bias_activation/kernel.h"
#include "common/data_type.h"

namespace trocr
{

constexpr int32_t kGREEDY_MAX_LAYERS = 24;
constexpr int32_t kGREEDY_MAX_BATCH = 64;
constexpr int32_t kGREEDY_MAX_END_IDS = 4;

//! TrOCR's text decoder (post-LayerNorm, one token a step). Names as in Hugging Face's configuration.
struct GreedyDecoderShape
{
    int32_t dModel;         //!< D = H * d, a multiple of 64, at most 1024
    int32_t numLayers;      //!< at most kGREEDY_MAX_LAYERS
    int32_t numHeads;       //!< H
    int32_t headDim;        //!< d, 32 or 64
    int32_t ffnDim;         //!< F, a multiple of 32
    int32_t vocabSize;      //!< V
    int32_t sequenceLength; //!< S of the encoder's keys and values
    Activation activation;
    bool layernormEmbedding;
    float embedScale;
    DataType dataType; //!< T, kHALF or kBF16
};

//! How the work is spread over the GPU, which the layout of the weights follows (README.md).
struct GreedyDecodePlan
{
    int32_t blocks;     //!< of the launch, one a multiprocessor
    int32_t teamBlocks; //!< blocks that share the rows of a team: a cluster's, or all (then teamBlocks == blocks)
};

//! The plan for the current device: clusters where a head's weights are small, else the whole grid as one team.
//! cudaErrorNotSupported on anything but compute capability 9.0.
cudaError_t planGreedyDecode(GreedyDecoderShape const& shape, GreedyDecodePlan& plan);

//! Greedy search for a whole batch: from the start token until every row has ended or maxSteps tokens are made.
struct GreedyDecodeParams
{
    GreedyDecoderShape shape;
    GreedyDecodePlan plan;
    void const* layerWeights; //!< T, packed [teamBlocks][...], 128-byte aligned
    void const* headWeights;  //!< T, packed [blocks][...], 128-byte aligned
    void const* norms;        //!< T [1 + 3 L, 2, D]: gamma and beta of the embedding, then of each layer in order
    void const* embedding;    //!< T [V, D]
    void const* positions;    //!< T [at least maxSteps, D]
    void const* crossKeys[kGREEDY_MAX_LAYERS];   //!< T [B, H, S, d] each
    void const* crossValues[kGREEDY_MAX_LAYERS]; //!< T [B, H, S, d] each
    int32_t batch;                               //!< B, 1 to kGREEDY_MAX_BATCH
    int32_t maxSteps;
    int32_t startId;
    int32_t padId;
    int32_t endIds[kGREEDY_MAX_END_IDS];
    int32_t numEndIds; //!< 0: every row gets maxSteps tokens
    int32_t* tokenIds; //!< [B, maxSteps + 1]: the start token, the row's tokens with its end, padding
    float* logProbs;   //!< [B, maxSteps]: of the chosen tokens; 0 behind the end
    int32_t* steps;    //!< [1]: steps taken, the longest row's tokens
    void* workspace;   //!< greedyDecodeWorkspace() bytes, 256-byte aligned; its contents do not matter
};

//! Whether the sizes and the type are supported; pointers are not looked at. When not, *reason (if given) says why.
bool canImplementGreedyDecode(GreedyDecodeParams const& params, char const** reason = nullptr);

//! Bytes that a block's weights take in `layerWeights` and `headWeights`.
size_t greedyLayerBytes(GreedyDecoderShape const& shape, GreedyDecodePlan const& plan);
size_t greedyHeadBytes(GreedyDecoderShape const& shape, GreedyDecodePlan const& plan);

size_t greedyDecodeWorkspace(GreedyDecodeParams const& params);

//! Enqueues the search: one memset and one cooperative launch, so a CUDA graph can capture it. Needs the plan's blocks
//! resident at once: with another such launch on the GPU, one waits for the other.
cudaError_t greedyDecode(GreedyDecodeParams const& params, cudaStream_t stream);

} // namespace trocr
