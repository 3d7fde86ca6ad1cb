#include <algorithm>
#include <utility>

#include "common/launch.h"
#include "device_decoder/kernel.h"

namespace trocr
{

using namespace decoder;

namespace
{

//! Places in the workspace of beam searches for so many rows, whose sum is its size.
struct Layout
{
    size_t logits, ranked, normalizers, rows, inputs, owners, running, runningScores, complete, completeScores,
        completeLengths, counters, bytes;

    Layout(size_t count, size_t vocabulary, size_t capacity)
    {
        size_t at = 0;
        auto const take = [&](size_t perRow) { return std::exchange(at, at + align256(count * perRow)); };
        size_t const lists = ceilDiv<size_t>(vocabulary, kLIST_TOKENS);
        logits = take(vocabulary * sizeof(float));
        ranked = take(lists * kMAX_CANDIDATES * sizeof(Candidate));
        normalizers = take(lists * sizeof(float2));
        rows = take(sizeof(RowState));
        inputs = take(sizeof(int));
        owners = take(capacity * sizeof(int));
        running = take((1 + capacity) * sizeof(int));
        runningScores = take(sizeof(float));
        complete = take(capacity * sizeof(int));
        completeScores = take(sizeof(float));
        completeLengths = take(sizeof(int));
        counters = take(2 * sizeof(int));
        bytes = at;
    }
};

//! Candidates that a search of so many beams keeps of a step: enough for n to run on if the best of every row end.
int candidatesOf(DeviceDecoderConfig const& config, int beams)
{
    return std::max(2, 1 + static_cast<int>(config.endIds.size())) * beams;
}

}  // namespace

bool canSearchBeams(DeviceDecoderConfig const& config, int32_t beams, char const** reason)
{
    if (beams < 2 || beams > kMAX_BEAMS)
    {
        return refuse(reason, "there are fewer than 2 beams or more than 8");
    }
    if (candidatesOf(config, beams) > std::min(kMAX_CANDIDATES, config.vocabulary))
    {
        return refuse(reason,
                      "the candidates of a step, beams * (1 + ids that end a text), are more than 32 or than "
                      "the vocabulary has tokens");
    }
    if (config.vocabulary > kMAX_LISTS * kLIST_TOKENS)
    {
        return refuse(reason, "the vocabulary has more than 131072 tokens");
    }
    return true;
}

DeviceDecoder::~DeviceDecoder()
{
    cudaFree(mBeams);
}

cudaError_t DeviceDecoder::search(BeamRequest const& request, cudaStream_t stream)
{
    SearchRequest const& images = request.images;
    int const rows = images.lines * request.beams;
    if (!isPossible(images) || !canSearchBeams(mConfig, request.beams, nullptr) || images.slots != rows ||
        rows > mostRows() || request.noRepeatNgram < 0 || request.penalties == nullptr)
    {
        return cudaErrorInvalidValue;
    }
    Layout const at(mostRows(), mConfig.vocabulary, mCapacity);
    if (mBeams == nullptr)
    {
        cudaError_t const status = cudaMalloc(reinterpret_cast<void**>(&mBeams), at.bytes);
        if (status != cudaSuccess)
        {
            return status;
        }
    }
    auto const floats = [&](size_t offset) { return reinterpret_cast<float*>(mBeams + offset); };
    auto const integers = [&](size_t offset) { return reinterpret_cast<int*>(mBeams + offset); };
    BeamSearch search{};
    search.images = images.lines;
    search.beams = request.beams;
    search.candidates = candidatesOf(mConfig, request.beams);
    search.vocabulary = mConfig.vocabulary;
    search.lists = ceilDiv(mConfig.vocabulary, kLIST_TOKENS);
    search.capacity = mCapacity;
    search.maxNewTokens = images.maxNewTokens;
    search.noRepeatNgram = request.noRepeatNgram;
    search.stopsEarly = request.stopsEarly;
    search.hopesLong = request.hopesLong;
    search.startId = mConfig.startId;
    search.padId = mConfig.padId;
    std::copy(mConfig.endIds.begin(), mConfig.endIds.end(), search.endIds);
    search.ends = images.stops ? static_cast<int>(mConfig.endIds.size()) : 0;
    search.penalties = request.penalties;
    search.logits = floats(at.logits);
    search.ranked = reinterpret_cast<Candidate*>(mBeams + at.ranked);
    search.normalizers = reinterpret_cast<float2*>(mBeams + at.normalizers);
    search.rows = reinterpret_cast<RowState*>(mBeams + at.rows);
    search.inputs = integers(at.inputs);
    search.owners = integers(at.owners);
    search.running = integers(at.running);
    search.runningScores = floats(at.runningScores);
    search.complete = integers(at.complete);
    search.completeScores = floats(at.completeScores);
    search.completeLengths = integers(at.completeLengths);
    search.open = integers(at.counters);
    search.arrived = search.open + 1;
    search.tokens = images.tokens;
    search.logProbs = images.logProbs;
    search.lengths = images.lengths;

    auto const begin = [&](cudaStream_t on) { return beginBeams(search, on); };
    auto const turn = [&](cudaGraphConditionalHandle conditional, cudaStream_t on)
    {
        cudaError_t status = enqueueStep(request, search, on);
        if (status == cudaSuccess)
        {
            status = rankTokens(search, on);
        }
        return status != cudaSuccess ? status : advanceBeams(search, conditional, on);
    };
    std::vector<uintptr_t> key = keyOf(images);
    key.insert(key.end(), {static_cast<uintptr_t>(request.beams), static_cast<uintptr_t>(request.noRepeatNgram),
                           static_cast<uintptr_t>(request.stopsEarly), static_cast<uintptr_t>(request.hopesLong),
                           reinterpret_cast<uintptr_t>(request.penalties)});
    return mBeamGraphs.launch(std::move(key), begin, turn, stream);
}

}  // namespace trocr
