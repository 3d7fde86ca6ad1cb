#include <algorithm>
#include <utility>

#include "common/launch.h"
#include "common/tensor_map.h"
#include "greedy_decoder/kernel.h"
#include "greedy_decoder/wide_sm90.cuh"

namespace trocr
{

namespace
{

using namespace greedy::wide;
using greedy::kMAX_LAYERS;

using Kernel = void (*)(WideParams);

class WideDecoder : public GreedyDecoder
{
public:
    WideDecoder(GreedyDecoderConfig config, WideWeights weights, int32_t maxSlots, int32_t capacity)
        : GreedyDecoder(std::move(config), maxSlots, capacity),
          mWeights(weights),
          mPaddedCapacity(ceilDiv(capacity, 16) * 16)
    {
        size_t const slots = std::min(maxSlots, kMAX_SLOTS);
        size_t const cache = mConfig.layers * slots * kWIDTH * mPaddedCapacity * 2;
        mKeys = align256(kEXCHANGE_BYTES);
        mValues = mKeys + align256(cache);
        size_t const bytes = mValues + align256(cache);
        mStatus = cudaMalloc(reinterpret_cast<void**>(&mWorkspace), bytes);
        if (mStatus == cudaSuccess)
        {
            mStatus = cudaMemset(mWorkspace, 0, bytes);
        }
        if (mStatus == cudaSuccess)
        {
            mStatus = deviceAttribute(cudaDevAttrMultiProcessorCount, mBlocks);
            mBlocks = std::min(mBlocks, kMAX_BLOCKS);
        }
        for (bool many : {false, true})
        {
            if (mStatus == cudaSuccess)
            {
                mStatus = cudaFuncSetAttribute(reinterpret_cast<void const*>(kernel(many)),
                                               cudaFuncAttributeMaxDynamicSharedMemorySize, sharedBytes(many));
            }
        }
    }

    ~WideDecoder() override
    {
        cudaFree(mWorkspace);
    }

    cudaError_t run(GreedyRequest const& request, cudaStream_t stream) override
    {
        if (!isPossible(request))
        {
            return cudaErrorInvalidValue;
        }
        WideParams params{};
        int const keySlots = ceilDiv(mConfig.sourceLength, kSLOT_KEYS);
        params.boxKeys = ceilDiv(mConfig.sourceLength, keySlots);
        int const rows = request.lines * mConfig.heads * mConfig.sourceLength;
        for (int layer = 0; layer < mConfig.layers; ++layer)
        {
            if (!encodeMap(params.crossKeys[layer], mConfig.dataType, request.crossKeys[layer], rows, kHEAD,
                           params.boxKeys) ||
                !encodeMap(params.crossValues[layer], mConfig.dataType, request.crossValues[layer], rows, kHEAD,
                           params.boxKeys))
            {
                return cudaErrorInvalidValue;
            }
        }
        params.layers = static_cast<uint8_t const*>(mWeights.layers);
        params.constants = static_cast<float const*>(mWeights.constants);
        params.head = static_cast<uint8_t const*>(mWeights.head);
        params.norms = mWeights.norms;
        params.embedding = mWeights.embedding;
        params.positions = mWeights.positionEmbedding;
        params.keys = mWorkspace + mKeys;
        params.values = mWorkspace + mValues;
        params.exchange = mWorkspace;
        params.tokens = request.tokens;
        params.logProbs = request.logProbs;
        params.lengths = request.lengths;
        params.layerCount = mConfig.layers;
        params.heads = mConfig.heads;
        params.inverseWidth = 1.0F / static_cast<float>(mConfig.width);
        params.lines = request.lines;
        params.slots = std::min({request.slots, request.lines, kMAX_SLOTS});
        params.capacity = mPaddedCapacity;
        params.maxNewTokens = request.maxNewTokens;
        params.sourceLength = mConfig.sourceLength;
        params.vocabulary = mConfig.vocabulary;
        params.startId = mConfig.startId;
        params.padId = mConfig.padId;
        std::copy(mConfig.endIds.begin(), mConfig.endIds.end(), params.endIds);
        params.ends = request.stops ? static_cast<int>(mConfig.endIds.size()) : 0;
        params.embedScale = mConfig.embedScale;
        params.epsilon = mConfig.epsilon;
        params.gelu = mConfig.gelu;
        params.embeddingNorm = mConfig.embeddingNorm;

        // Nothing is on the boards.
        cudaError_t const status = cudaMemsetAsync(mWorkspace, 0xff, kEXCHANGE_BYTES, stream);
        if (status != cudaSuccess)
        {
            return status;
        }
        bool const many = params.slots > 8;
        cudaLaunchAttribute attribute{};
        attribute.id = cudaLaunchAttributeCooperative;  // all blocks run at once, or none does
        attribute.val.cooperative = 1;
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(mBlocks);
        config.blockDim = dim3(kTHREADS);
        config.dynamicSmemBytes = sharedBytes(many);
        config.stream = stream;
        config.attrs = &attribute;
        config.numAttrs = 1;
        return cudaLaunchKernelEx(&config, kernel(many), params);
    }

private:
    Kernel kernel(bool many) const
    {
        if (mConfig.dataType == DataType::kHALF)
        {
            return many ? decodeWide<__half, 2> : decodeWide<__half, 1>;
        }
        return many ? decodeWide<__nv_bfloat16, 2> : decodeWide<__nv_bfloat16, 1>;
    }

    static int sharedBytes(bool many)
    {
        return many ? Layout<2>::bytes : Layout<1>::bytes;
    }

    WideWeights mWeights;
    int mPaddedCapacity;
    uint8_t* mWorkspace{};
    size_t mKeys{}, mValues{};
    int mBlocks{};
};

}  // namespace

WideBytes wideBytes()
{
    return {size_t{kLAYER_SLOTS} * kSLOT_BYTES, size_t{kBIASES} * sizeof(float), size_t{kSLOT_BYTES}};
}

std::unique_ptr<GreedyDecoder> makeWideDecoder(GreedyDecoderConfig config, WideWeights const& weights, int32_t maxSlots,
                                               int32_t capacity)
{
    return std::make_unique<WideDecoder>(std::move(config), weights, maxSlots, capacity);
}

}  // namespace trocr
