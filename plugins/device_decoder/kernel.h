#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <memory>
#include <utility>
#include <vector>

#include "common/data_type.h"
#include "device_decoder/beams.h"
#include "device_decoder/while_graph.h"

//! Search of a whole batch in one launch: a CUDA graph whose WHILE node repeats a chain of fused kernels until
//! every line has ended. See README.md for the design.

namespace trocr
{

namespace decoder
{
constexpr int kMAX_END_IDS = 8;
}

//! Sizes of a TrOCR decoder, and what its search starts and ends with.
struct DeviceDecoderConfig
{
    DataType dataType;     //!< kHALF or kBF16
    int32_t layers;        //!< L
    int32_t width;         //!< D, a multiple of 64 up to 1024
    int32_t heads;         //!< H; D / H is 32 or 64
    int32_t ffnWidth;      //!< F, a multiple of 32
    int32_t vocabulary;    //!< V
    int32_t sourceLength;  //!< S, encoder states a line
    int32_t encoderWidth;  //!< E, of these states; 0: they are not attended to themselves
    int32_t positions;     //!< rows of the position embedding
    bool gelu;             //!< activation: GELU (of the error function), else ReLU
    bool embeddingNorm;    //!< LayerNorm after the embedding
    float embedScale;      //!< the token embedding is multiplied by it
    float epsilon;         //!< of every LayerNorm
    int32_t startId;
    int32_t padId;
    std::vector<int32_t> endIds;  //!< at most kMAX_END_IDS; empty: every text has its full length
};

//! Device pointers, T = dataType, all multiples of 16 bytes. Products' weights are packed a block: every block of a
//! kernel copies one contiguous piece, in which the weights stand as the tensor cores read them (README.md, "Packed
//! weights").
struct ChainWeights
{
    void const* selfBlobs;         //!< [L, H, C] pieces of selfBlobBytes; C = head size / 8
    void const* crossBlobs;        //!< [L, H, C] pieces of crossBlobBytes
    void const* feedForwardBlobs;  //!< [L, F / 32] pieces of feedForwardBlobBytes
    float const* feedForwardBias;  //!< [L, D], of the second product
    void const* crossKeys;         //!< T [L, H, 8, d / 32, E / 64, 8, 32]; with encoderWidth, like the next two
    void const* crossValues;       //!< T [L, H, C, E / 32, 8, 32]
    float const* crossValueBias;   //!< [L, D]
    void const* head;              //!< T [ceil(V / 8), D / 32, 8, 32], rows from V on are zero
    void const* norms;      //!< T [1 + 3 L, 2, D]: gamma and beta of the embedding and, a layer, self, cross, final
    void const* embedding;  //!< T [V, D]
    void const* positionEmbedding;  //!< T [positions, D]; row p is added to the token after p others
    void const* wideLayers;         //!< T [L, 14, D / 8, 8 D] of the wide decoder, or nullptr: it is not used
    float const* wideConstants;     //!< [L, D / 8, 200]
};

//! The same of the team decoder: what a block streams, in the order in which it does.
struct TeamWeights
{
    void const* layers;             //!< [L, H] pieces of units
    void const* constants;          //!< [L, H] pieces of biases and norms
    void const* head;               //!< [ceil(V / 32)] pieces of units, rows from V on are zero
    void const* embeddingNorm;      //!< T [2, D]; not read without `embeddingNorm`
    void const* embedding;          //!< T [V, D]
    void const* positionEmbedding;  //!< T [positions, D]
};

//! One batch: `lines` lines decoded in `slots` rows. Buffers must stay where they are: the graph is kept a request.
struct SearchRequest
{
    int32_t lines;
    int32_t slots;                       //!< rows at a time; a row whose line has ended takes the next line
    int32_t maxNewTokens;                //!< at most the capacity and `positions`
    bool stops;                          //!< false: no id ends a text, every line gets maxNewTokens (for measurements)
    std::vector<void const*> crossKeys;  //!< a layer: T [lines, H, S, D / H]
    std::vector<void const*> crossValues;  //!< likewise
    bool crossIsE4m3;                      //!< both, in place of T; where takesE4m3
    void const* states;                    //!< T [lines, S, E], instead of keys and values; else nullptr
    int32_t* tokens;                       //!< [lines, maxNewTokens], padded with padId
    float* logProbs;                       //!< [lines]: sum over the line's tokens of log softmax(logits)[token]
    int32_t* lengths;                      //!< [lines]: tokens, the end of text included
};

//! What every kernel that ends texts is told of them, by the names that its parameters have for it.
template <typename Params>
void setTexts(Params& params, SearchRequest const& request, DeviceDecoderConfig const& config)
{
    params.tokens = request.tokens;
    params.logProbs = request.logProbs;
    params.lengths = request.lengths;
    params.lines = request.lines;
    params.maxNewTokens = request.maxNewTokens;
    params.startId = config.startId;
    params.padId = config.padId;
    std::copy(config.endIds.begin(), config.endIds.end(), params.endIds);
    params.ends = request.stops ? static_cast<int>(config.endIds.size()) : 0;
}

//! A beam search of one batch.
struct BeamRequest
{
    SearchRequest images;  //!< a greedy search of them; a line is an image, `slots` all rows, images * beams
    int32_t beams;         //!< n, rows of an image
    int32_t noRepeatNgram;
    bool stopsEarly;
    bool hopesLong;
    float const* penalties;  //!< [1 + maxNewTokens], see BeamSearch
};

//! Whether the current device and these sizes are served; the reason where not.
bool canDecodeOnDevice(DeviceDecoderConfig const& config, char const** reason);

//! The most rows at a time of a request with `states`.
constexpr int32_t kMOST_STATE_ROWS = 64;

//! Whether so many beams are served, where canDecodeOnDevice; the reason where not.
bool canSearchBeams(DeviceDecoderConfig const& config, int32_t beams, char const** reason);

//! Whether requests may have `states` in place of keys and values, where canDecodeOnDevice; the reason where not.
bool canAttendToStates(DeviceDecoderConfig const& config, char const** reason);

//! Which of the two decoders serves these sizes: the team decoder takes heads of 32.
inline bool decodesInTeams(DeviceDecoderConfig const& config)
{
    return config.width == config.heads * 32;
}

//! Bytes of one block's piece of the chain's packed weights.
struct ChainBytes
{
    size_t self;
    size_t cross;
    size_t feedForward;
};

ChainBytes chainBytes(DeviceDecoderConfig const& config);

//! Bytes of a piece of the team decoder's packed weights.
struct TeamBytes
{
    size_t layer;
    size_t constants;
    size_t head;
};

TeamBytes teamBytes();

//! Owns the workspace: caches for `maxSlots` rows of `capacity` tokens. Check `status()` before use.
class DeviceDecoder
{
public:
    virtual ~DeviceDecoder();
    DeviceDecoder(DeviceDecoder const&) = delete;
    DeviceDecoder& operator=(DeviceDecoder const&) = delete;

    //! Enqueues the search on `stream`; returns at once.
    virtual cudaError_t run(SearchRequest const& request, cudaStream_t stream) = 0;

    //! Whether `run` enqueues no more than a kernel and what clears memory for it, which a stream that is captured can
    //! take; a graph with a WHILE node is launched.
    virtual bool runsAsAKernel(int32_t slots, bool states) const = 0;

    //! Whether `run` takes keys and values of e4m3 in so many slots.
    virtual bool takesE4m3(int32_t slots) const = 0;

    //! Enqueues a beam search: a graph of steps, see WhileGraphs.
    cudaError_t search(BeamRequest const& request, cudaStream_t stream);

    //! The most rows of a beam search.
    virtual int32_t mostRows() const = 0;

    cudaError_t status() const
    {
        return mStatus;
    }

    int32_t maxSlots() const
    {
        return mMaxSlots;
    }

    int32_t capacity() const
    {
        return mCapacity;
    }

    DeviceDecoderConfig const& config() const
    {
        return mConfig;
    }

protected:
    DeviceDecoder(DeviceDecoderConfig config, int32_t maxSlots, int32_t capacity)
        : mConfig(std::move(config)), mMaxSlots(maxSlots), mCapacity(capacity)
    {
    }

    //! Enqueues a step of a beam search: logits of every row whose image is open.
    virtual cudaError_t enqueueStep(BeamRequest const& request, decoder::BeamSearch const& search,
                                    cudaStream_t stream) = 0;

    bool isPossible(SearchRequest const& request) const
    {
        auto const layers = static_cast<size_t>(mConfig.layers);
        bool const attends = request.states != nullptr
                                 ? mConfig.encoderWidth > 0 && request.slots <= kMOST_STATE_ROWS
                                 : request.crossKeys.size() == layers && request.crossValues.size() == layers;
        return request.lines >= 1 && request.slots >= 1 && request.slots <= mMaxSlots && request.maxNewTokens >= 1 &&
               request.maxNewTokens <= mCapacity && request.maxNewTokens <= mConfig.positions && attends;
    }

    //! All of a request, for WhileGraphs.
    static std::vector<uintptr_t> keyOf(SearchRequest const& request)
    {
        auto const word = [](void const* pointer) { return reinterpret_cast<uintptr_t>(pointer); };
        std::vector<uintptr_t> key = {static_cast<uintptr_t>(request.lines),
                                      static_cast<uintptr_t>(request.slots),
                                      static_cast<uintptr_t>(request.maxNewTokens),
                                      static_cast<uintptr_t>(request.stops),
                                      word(request.tokens),
                                      word(request.logProbs),
                                      word(request.lengths),
                                      word(request.states)};
        for (auto const* pointers : {&request.crossKeys, &request.crossValues})
        {
            std::transform(pointers->begin(), pointers->end(), std::back_inserter(key), word);
        }
        return key;
    }

    DeviceDecoderConfig mConfig;
    int32_t mMaxSlots;
    int32_t mCapacity;
    cudaError_t mStatus{cudaSuccess};

private:
    uint8_t* mBeams{};  //!< what a beam search keeps, from the first on
    decoder::WhileGraphs mBeamGraphs;
};

//! Rounds tensors of float16 to e4m3, to ±448 what is beyond: `count` elements each, a multiple of 16.
cudaError_t roundToE4m3(std::vector<void const*> const& from, std::vector<void*> const& to, int64_t count,
                        cudaStream_t stream);

namespace decoder::wide
{

//! Greedy searches of up to 16 rows by keys and values, in one persistent kernel. Check `status()` before use.
class WideSearch
{
public:
    virtual ~WideSearch() = default;
    virtual cudaError_t status() const = 0;
    virtual bool takes(int32_t slots, bool states) const = 0;
    virtual cudaError_t run(SearchRequest const& request, cudaStream_t stream) = 0;
};

//! Whether it serves such a decoder.
bool isServed(DeviceDecoderConfig const& config);

std::unique_ptr<WideSearch> makeWideSearch(DeviceDecoderConfig const& config, ChainWeights const& weights,
                                           int32_t capacity);

}  // namespace decoder::wide

//! A CUDA graph whose WHILE node repeats a chain of fused kernels. A request that differs in any member from earlier
//! ones is captured first (about a millisecond); the last few graphs are kept. With `wideLayers`, requests that the
//! wide decoder takes go to that.
std::unique_ptr<DeviceDecoder> makeChainDecoder(DeviceDecoderConfig config, ChainWeights const& weights,
                                                int32_t maxSlots, int32_t capacity);

//! One persistent kernel, in which a cluster decodes up to eight rows.
std::unique_ptr<DeviceDecoder> makeTeamDecoder(DeviceDecoderConfig config, TeamWeights const& weights, int32_t maxSlots,
                                               int32_t capacity);

}  // namespace trocr
