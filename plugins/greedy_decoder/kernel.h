#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "common/data_type.h"

//! Greedy decoding of a whole batch in one launch: a CUDA graph whose WHILE node repeats a chain of fused kernels until
//! every line has ended. See README.md for the design.

namespace trocr
{

//! Sizes of a TrOCR decoder, and what its search starts and ends with.
struct GreedyDecoderConfig
{
    DataType dataType;     //!< kHALF or kBF16
    int32_t layers;        //!< L
    int32_t width;         //!< D, a multiple of 64 up to 1024
    int32_t heads;         //!< H; D / H is 32 or 64
    int32_t ffnWidth;      //!< F, a multiple of 32
    int32_t vocabulary;    //!< V
    int32_t sourceLength;  //!< S, encoder states a line
    int32_t positions;     //!< rows of the position embedding
    bool gelu;             //!< activation: GELU (exact), else ReLU
    bool embeddingNorm;    //!< LayerNorm after the embedding
    float embedScale;      //!< the token embedding is multiplied by it
    float epsilon;         //!< of every LayerNorm
    int32_t startId;
    int32_t padId;
    std::vector<int32_t> endIds;  //!< at most 8; empty: every text has its full length
};

//! Device pointers, T = dataType, all multiples of 16 bytes. Products' weights are packed a block: every block of a
//! kernel copies one contiguous piece, in which the weights stand as the tensor cores read them (README.md, "Packed
//! weights").
struct GreedyDecoderWeights
{
    void const* selfBlobs;         //!< [L, H, C] pieces of selfBlobBytes; C = head size / 8
    void const* crossBlobs;        //!< [L, H, C] pieces of crossBlobBytes
    void const* feedForwardBlobs;  //!< [L, F / 32] pieces of feedForwardBlobBytes
    float const* feedForwardBias;  //!< [L, D], of the second product
    void const* head;              //!< T [ceil(V / 8), D / 32, 8, 32], rows from V on are zero
    void const* norms;      //!< T [1 + 3 L, 2, D]: gamma and beta of the embedding and, a layer, self, cross, final
    void const* embedding;  //!< T [V, D]
    void const* positionEmbedding;  //!< T [positions, D]; row p is added to the token after p others
};

//! One batch: `lines` lines decoded in `slots` rows. Buffers must stay where they are: the graph is kept a request.
struct GreedyRequest
{
    int32_t lines;
    int32_t slots;                       //!< rows at a time; a row whose line has ended takes the next line
    int32_t maxNewTokens;                //!< at most the capacity and `positions`
    bool stops;                          //!< false: no id ends a text, every line gets maxNewTokens (for measurements)
    std::vector<void const*> crossKeys;  //!< a layer: T [lines, H, S, D / H]
    std::vector<void const*> crossValues;  //!< likewise
    int32_t* tokens;                       //!< [lines, maxNewTokens], padded with padId
    float* logProbs;                       //!< [lines]: sum over the line's tokens of log softmax(logits)[token]
    int32_t* lengths;                      //!< [lines]: tokens, the end of text included
};

//! Whether the current device and these sizes are served; the reason where not.
bool canDecodeGreedily(GreedyDecoderConfig const& config, char const** reason);

//! Bytes of one block's piece of packed weights.
struct GreedyBlobBytes
{
    size_t self;
    size_t cross;
    size_t feedForward;
};

GreedyBlobBytes greedyBlobBytes(GreedyDecoderConfig const& config);

class GreedyDecoder
{
public:
    //! Allocates the workspace: caches and sums for `maxSlots` rows of `capacity` tokens.
    //! Check `status()` before use.
    GreedyDecoder(GreedyDecoderConfig config, GreedyDecoderWeights weights, int32_t maxSlots, int32_t capacity);
    ~GreedyDecoder();
    GreedyDecoder(GreedyDecoder const&) = delete;
    GreedyDecoder& operator=(GreedyDecoder const&) = delete;

    cudaError_t status() const
    {
        return mStatus;
    }

    //! Enqueues the search on `stream`; returns at once. A request that differs in any member from the earlier ones is
    //! captured first (about a millisecond). The last few graphs are kept.
    cudaError_t run(GreedyRequest const& request, cudaStream_t stream);

    int32_t maxSlots() const
    {
        return mMaxSlots;
    }

    int32_t capacity() const
    {
        return mCapacity;
    }

    GreedyDecoderConfig const& config() const
    {
        return mConfig;
    }

private:
    struct Graph;

    cudaError_t capture(GreedyRequest const& request, std::unique_ptr<Graph>& graph);
    template <typename T, int kHEAD_DIM>
    cudaError_t enqueueRows(GreedyRequest const& request, unsigned long long conditional, bool last,
                            cudaStream_t stream);
    template <typename T, int kHEAD_DIM, int kROWS>
    cudaError_t enqueueToken(GreedyRequest const& request, unsigned long long conditional, bool last,
                             cudaStream_t stream);
    template <typename T>
    cudaError_t enqueueNext(GreedyRequest const& request, bool first, unsigned long long conditional, bool last,
                            cudaStream_t stream);

    GreedyDecoderConfig mConfig;
    GreedyDecoderWeights mWeights;
    int32_t mMaxSlots;
    int32_t mCapacity;
    int32_t mMultiprocessors{};
    cudaError_t mStatus{cudaSuccess};
    uint8_t* mWorkspace{};
    cudaStream_t mCaptureStream{};
    std::map<std::vector<uintptr_t>, std::unique_ptr<Graph>> mGraphs;
};

}  // namespace trocr
