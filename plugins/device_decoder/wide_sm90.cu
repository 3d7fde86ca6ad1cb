#include <algorithm>
#include <utility>

#include "common/launch.h"
#include "device_decoder/kernel.h"
#include "device_decoder/wide_sm90.cuh"

namespace trocr::decoder::wide
{

namespace
{

template <int kWIDTH>
class Search : public WideSearch
{
    static constexpr int kSHARES = kWIDTH / kCOLUMNS;  //!< blocks that have some of the layers

public:
    Search(DeviceDecoderConfig config, ChainWeights weights, int32_t capacity)
        : mConfig(std::move(config)), mWeights(weights), mCapacity(capacity)
    {
        size_t const cache = static_cast<size_t>(mConfig.layers) * kMOST_ROWS * kWIDTH * capacity * 2;
        mKeys = align256(Boards<kWIDTH, kMOST_ROWS>::kWORDS * sizeof(sm90::Quad));
        mValues = mKeys + align256(cache);
        mStatus = cudaMalloc(reinterpret_cast<void**>(&mWorkspace), mValues + align256(cache));
        if (mStatus == cudaSuccess)
        {
            mStatus = deviceAttribute(cudaDevAttrMultiProcessorCount, mBlocks);
            mBlocks = std::min(mBlocks, kMOST_BLOCKS);
        }
        for (Kernel const& kernel : {kernelOf<1>(false), kernelOf<2>(false), kernelOf<1>(true), kernelOf<2>(true)})
        {
            if (mStatus == cudaSuccess)
            {
                mStatus = cudaFuncSetAttribute(reinterpret_cast<void const*>(kernel.function),
                                               cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.sharedBytes);
            }
        }
    }

    ~Search() override
    {
        cudaFree(mWorkspace);
    }

    cudaError_t status() const override
    {
        return mStatus;
    }

    bool takes(int32_t slots, bool states) const override
    {
        return !states && slots <= kMOST_ROWS && mBlocks >= kSHARES;
    }

    cudaError_t run(SearchRequest const& request, cudaStream_t stream) override
    {
        WideParams params{};
        params.layers = static_cast<uint8_t const*>(mWeights.wideLayers);
        params.constants = static_cast<float const*>(mWeights.wideConstants);
        params.head = static_cast<uint8_t const*>(mWeights.head);
        params.norms = mWeights.norms;
        params.embedding = mWeights.embedding;
        params.positions = mWeights.positionEmbedding;
        std::copy(request.crossKeys.begin(), request.crossKeys.end(), params.crossKeys);
        std::copy(request.crossValues.begin(), request.crossValues.end(), params.crossValues);
        params.keys = mWorkspace + mKeys;
        params.values = mWorkspace + mValues;
        params.boards = reinterpret_cast<sm90::Quad*>(mWorkspace);
        setTexts(params, request, mConfig);
        params.layerCount = mConfig.layers;
        params.slots = request.slots;
        params.rowMask = request.slots > kHALF ? 15
                         : request.slots > 4   ? 7
                         : request.slots > 2   ? 3
                         : request.slots > 1   ? 1
                                               : 0;
        params.parts = std::max(kHALF / (params.rowMask + 1), 1);
        params.capacity = mCapacity;
        params.sourceLength = mConfig.sourceLength;
        params.vocabulary = mConfig.vocabulary;
        params.embedScale = mConfig.embedScale;
        params.epsilon = mConfig.epsilon;
        params.gelu = mConfig.gelu;
        params.embeddingNorm = mConfig.embeddingNorm;

        Kernel const kernel =
            request.slots > kHALF ? kernelOf<2>(request.crossIsE4m3) : kernelOf<1>(request.crossIsE4m3);
        // No use of a board has been made.
        cudaError_t const status = cudaMemsetAsync(mWorkspace, 0, kernel.boardBytes, stream);
        if (status != cudaSuccess)
        {
            return status;
        }
        cudaLaunchAttribute attribute = cooperativeLaunch();
        cudaLaunchConfig_t config{};
        // Blocks with neither layers nor a share of the head would not wait for their lane that fetches: it could miss
        // the last token.
        config.gridDim = dim3(std::min(mBlocks, std::max(kSHARES, ceilDiv(mConfig.vocabulary, kCOLUMNS))));
        config.blockDim = dim3(kernel.threads);
        config.dynamicSmemBytes = kernel.sharedBytes;
        config.stream = stream;
        config.attrs = &attribute;
        config.numAttrs = 1;
        return cudaLaunchKernelEx(&config, kernel.function, params);
    }

private:
    struct Kernel
    {
        void (*function)(WideParams);
        int threads, sharedBytes;
        size_t boardBytes;
    };

    //! For up to eight rows, or for more. `e4m3`: of keys and values, beside float16.
    template <int kHALVES>
    Kernel kernelOf(bool e4m3) const
    {
        using L = Layout<kWIDTH, kHALVES>;
        auto const function = mConfig.dataType != DataType::kHALF
                                  ? decodeWide<__nv_bfloat16, __nv_bfloat16, kWIDTH, kHALVES>
                              : e4m3 ? decodeWide<__half, __nv_fp8_e4m3, kWIDTH, kHALVES>
                                     : decodeWide<__half, __half, kWIDTH, kHALVES>;
        return {function, L::kTHREADS, L::kBYTES, Boards<kWIDTH, L::kROWS>::kWORDS * sizeof(sm90::Quad)};
    }

    DeviceDecoderConfig mConfig;
    ChainWeights mWeights;
    int32_t mCapacity;
    uint8_t* mWorkspace{};
    size_t mKeys{}, mValues{};
    int32_t mBlocks{};
    cudaError_t mStatus{};
};

}  // namespace

bool isServed(DeviceDecoderConfig const& config)
{
    return (config.width == 256 || config.width == 1024) && config.heads * kHEAD == config.width &&
           config.ffnWidth == kINNER_TILES * config.width && config.layers <= kMOST_LAYERS;
}

std::unique_ptr<WideSearch> makeWideSearch(DeviceDecoderConfig const& config, ChainWeights const& weights,
                                           int32_t capacity)
{
    if (config.width == 256)
    {
        return std::make_unique<Search<256>>(config, weights, capacity);
    }
    return std::make_unique<Search<1024>>(config, weights, capacity);
}

}  // namespace trocr::decoder::wide
