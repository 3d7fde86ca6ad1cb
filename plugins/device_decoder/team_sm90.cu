#include <algorithm>
#include <utility>

#include "common/launch.h"
#include "device_decoder/kernel.h"
#include "device_decoder/team_sm90.cuh"

namespace trocr
{

namespace
{

using namespace decoder;

using Kernel = void (*)(TeamParams);

template <typename T, typename C, bool kBEAMS>
Kernel kernelFor(int rows)
{
    return rows <= 1   ? decodeInTeams<T, C, 1, kBEAMS>
           : rows <= 2 ? decodeInTeams<T, C, 2, kBEAMS>
           : rows <= 4 ? decodeInTeams<T, C, 4, kBEAMS>
                       : decodeInTeams<T, C, kMAX_ROWS, kBEAMS>;
}

//! What a launch does.
enum class Form
{
    kSEARCH,
    kSEARCH_E4M3,  //!< by keys and values of e4m3
    kSTEP,         //!< of a beam search
};

//! Rows of the kernel that serves teams of so many.
int kernelRows(int rows)
{
    return rows <= 2 ? rows : rows <= 4 ? 4 : kMAX_ROWS;
}

class TeamDecoder : public DeviceDecoder
{
public:
    TeamDecoder(DeviceDecoderConfig config, TeamWeights weights, int32_t maxSlots, int32_t capacity)
        : DeviceDecoder(std::move(config), maxSlots, capacity), mWeights(weights)
    {
        size_t const slots = std::min(maxSlots, kMAX_SLOTS);
        size_t at = 0;
        auto const take = [&](size_t bytes) { return std::exchange(at, at + align256(bytes)); };
        mCounters = take(sizeof(TeamCounters));
        mHidden = take(slots * kWIDTH * 4);
        mChoices = take(slots * kMAX_BLOCKS * sizeof(sm90::Quad));
        mKeys = take(mConfig.layers * slots * kWIDTH * capacity * 2);
        mValues = take(mConfig.layers * slots * kWIDTH * capacity * 2);
        mStatus = cudaMalloc(reinterpret_cast<void**>(&mWorkspace), at);
        if (mStatus == cudaSuccess)
        {
            mStatus = cudaMemset(mWorkspace, 0, at);
        }
        for (int rows : {1, 2, 4, kMAX_ROWS})
        {
            for (Form form : {Form::kSEARCH, Form::kSEARCH_E4M3, Form::kSTEP})
            {
                if (mStatus == cudaSuccess)
                {
                    mStatus = findClusters(rows, form);
                }
            }
        }
    }

    ~TeamDecoder() override
    {
        cudaFree(mWorkspace);
    }

    cudaError_t run(SearchRequest const& request, cudaStream_t stream) override
    {
        if (!isPossible(request) || (request.crossIsE4m3 && !takesE4m3(request.slots)))
        {
            return cudaErrorInvalidValue;
        }
        int const slots = std::min(request.slots, mostRows());
        TeamParams params = paramsOf(slots, request.crossKeys, request.crossValues);
        setTexts(params, request, mConfig);
        return launch(params, request.crossIsE4m3 ? Form::kSEARCH_E4M3 : Form::kSEARCH, stream);
    }

    bool takesE4m3(int32_t /*slots*/) const override
    {
        return mConfig.dataType == DataType::kHALF;
    }

    bool runsAsAKernel(int32_t /*slots*/, bool /*states*/) const override
    {
        return true;
    }

    int32_t mostRows() const override
    {
        return std::min({mMaxSlots, kMAX_SLOTS, mClusters * kMAX_ROWS});
    }

private:
    cudaError_t enqueueStep(BeamRequest const& request, BeamSearch const& search, cudaStream_t stream) override
    {
        TeamParams params =
            paramsOf(search.images * search.beams, request.images.crossKeys, request.images.crossValues);
        params.beams = search.rows;
        params.inputs = search.inputs;
        params.owners = search.owners;
        params.logits = search.logits;
        return launch(params, Form::kSTEP, stream);
    }

    //! What a launch for so many rows is given, but for what is searched.
    TeamParams paramsOf(int slots, std::vector<void const*> const& crossKeys,
                        std::vector<void const*> const& crossValues) const
    {
        int const teams = std::min(mClusters, slots);
        TeamParams params{};
        params.weights = static_cast<uint8_t const*>(mWeights.layers);
        params.constants = static_cast<uint8_t const*>(mWeights.constants);
        params.head = static_cast<uint8_t const*>(mWeights.head);
        params.embeddingNorm = mConfig.embeddingNorm ? mWeights.embeddingNorm : nullptr;
        params.embedding = mWeights.embedding;
        params.positions = mWeights.positionEmbedding;
        std::copy(crossKeys.begin(), crossKeys.end(), params.crossKeys);
        std::copy(crossValues.begin(), crossValues.end(), params.crossValues);
        params.keys = mWorkspace + mKeys;
        params.values = mWorkspace + mValues;
        params.hidden = reinterpret_cast<ulonglong2*>(mWorkspace + mHidden);
        params.choices = reinterpret_cast<sm90::Quad*>(mWorkspace + mChoices);
        params.counters = reinterpret_cast<TeamCounters*>(mWorkspace + mCounters);
        params.layers = mConfig.layers;
        params.heads = mConfig.heads;
        params.inverseWidth = 1.0F / static_cast<float>(mConfig.width);
        params.slots = slots;
        params.teams = teams;
        params.teamRows = slots / teams;
        params.largerTeams = slots % teams;
        params.capacity = mCapacity;
        params.sourceLength = mConfig.sourceLength;
        params.vocabulary = mConfig.vocabulary;
        params.startId = mConfig.startId;
        params.padId = mConfig.padId;
        params.embedScale = mConfig.embedScale;
        params.epsilon = mConfig.epsilon;
        params.gelu = mConfig.gelu;
        // Blocks without rows have as much of the head as they can keep; the teams, whose blocks stream what they have,
        // the rest.
        int const pieces = ceilDiv(mConfig.vocabulary, kHEAD_TOKENS);
        int const idle = (mClusters - teams) * kTEAM_BLOCKS;
        params.idlePieces = idle > 0 ? std::min(ceilDiv(pieces, idle), HeadLayout::kPIECES) : 0;
        params.teamsPiece = std::min(idle * params.idlePieces, pieces);
        return params;
    }

    cudaError_t launch(TeamParams const& params, Form form, cudaStream_t stream) const
    {
        int const rows = kernelRows(ceilDiv(params.slots, params.teams));
        Launch launch(sharedBytes(rows), mClusters, stream);
        return cudaLaunchKernelEx(&launch.config, kernelOf(rows, form), params);
    }

    struct Launch
    {
        cudaLaunchAttribute attributes[2] = {clusterOf(kTEAM_BLOCKS), cooperativeLaunch()};
        cudaLaunchConfig_t config{};

        Launch(int sharedBytes, int clusters, cudaStream_t stream)
        {
            config.gridDim = dim3(clusters * kTEAM_BLOCKS);
            config.blockDim = dim3(kTEAM_THREADS);
            config.dynamicSmemBytes = sharedBytes;
            config.stream = stream;
            config.attrs = attributes;
            config.numAttrs = 2;
        }
    };

    Kernel kernelOf(int rows, Form form) const
    {
        if (mConfig.dataType == DataType::kHALF)
        {
            return form == Form::kSTEP          ? kernelFor<__half, __half, true>(rows)
                   : form == Form::kSEARCH_E4M3 ? kernelFor<__half, __nv_fp8_e4m3, false>(rows)
                                                : kernelFor<__half, __half, false>(rows);
        }
        return form == Form::kSTEP ? kernelFor<__nv_bfloat16, __nv_bfloat16, true>(rows)
                                   : kernelFor<__nv_bfloat16, __nv_bfloat16, false>(rows);
    }

    static int sharedBytes(int rows)
    {
        return rows == 1   ? std::max(TeamLayout<1>::bytes, HeadLayout::bytes)
               : rows == 2 ? TeamLayout<2>::bytes
               : rows == 4 ? TeamLayout<4>::bytes
                           : TeamLayout<kMAX_ROWS>::bytes;
    }

    //! Sets up the kernel for teams of `rows` and finds how many clusters of it run at once.
    cudaError_t findClusters(int rows, Form form)
    {
        auto const* const kernel = reinterpret_cast<void const*>(kernelOf(rows, form));
        cudaError_t status =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sharedBytes(rows));
        Launch launch(sharedBytes(rows), 1, nullptr);
        launch.config.numAttrs = 1;
        int clusters{};
        if (status == cudaSuccess)
        {
            status = cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch.config);
        }
        mClusters = std::min(mClusters, clusters);
        return status == cudaSuccess && mClusters == 0 ? cudaErrorLaunchOutOfResources : status;
    }

    TeamWeights mWeights;
    uint8_t* mWorkspace{};
    size_t mCounters{}, mHidden{}, mChoices{}, mKeys{}, mValues{};
    int mClusters{kMAX_TEAMS};
};

}  // namespace

TeamBytes teamBytes()
{
    return {size_t{kLAYER_SLOTS} * kSLOT_BYTES, size_t{kCONSTANT_BYTES}, size_t{kSLOT_BYTES}};
}

std::unique_ptr<DeviceDecoder> makeTeamDecoder(DeviceDecoderConfig config, TeamWeights const& weights, int32_t maxSlots,
                                               int32_t capacity)
{
    return std::make_unique<TeamDecoder>(std::move(config), weights, maxSlots, capacity);
}

}  // namespace trocr
