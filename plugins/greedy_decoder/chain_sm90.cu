#include <algorithm>
#include <map>
#include <utility>

#include "common/launch.h"
#include "greedy_decoder/chain_kernels_sm90.cuh"
#include "greedy_decoder/kernel.h"

namespace trocr
{

namespace
{

using namespace greedy;

//! Tokens in one turn of the WHILE node: a turn costs 5 us by itself, and a text's end inside a turn the idle rest of
//! it.
constexpr int kTOKENS_A_TURN = 2;
constexpr size_t kMAX_GRAPHS = 64;

//! Where things lie in the workspace.
struct Workspace
{
    size_t sums[3], choices, states, scalars, keys, values, bytes;
    size_t layerCache;  //!< bytes of a layer's keys

    Workspace(GreedyDecoderConfig const& config, int32_t slots, int32_t capacity, int32_t blocks)
    {
        size_t at = 0;
        auto const take = [&](size_t size) { return std::exchange(at, at + align256(size)); };
        for (size_t& sum : sums)
        {
            sum = take(static_cast<size_t>(slots) * config.width * 4);
        }
        choices = take(sizeof(float4) * blocks * slots);
        states = take(sizeof(RowState) * slots);
        scalars = take(256);
        layerCache = align256(static_cast<size_t>(slots) * config.width * capacity * kELEMENT);
        keys = take(layerCache * config.layers);
        values = take(layerCache * config.layers);
        bytes = at;
    }
};

//! Launches a link of the chain, which may start while the one before still runs.
template <typename Params>
cudaError_t launchLink(void (*kernel)(Params), dim3 grid, unsigned cluster, size_t sharedBytes, cudaStream_t stream,
                       Params const& params)
{
    cudaError_t const status =
        cudaFuncSetAttribute(reinterpret_cast<void const*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(sharedBytes));
    if (status != cudaSuccess)
    {
        return status;
    }
    cudaLaunchAttribute attributes[2]{};
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1] = clusterOf(cluster);
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(kTHREADS);
    config.dynamicSmemBytes = sharedBytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = cluster > 1 ? 2 : 1;
    return cudaLaunchKernelEx(&config, kernel, params);
}

//! Adds a WHILE node that runs after all that is in `graph`; its body is empty so far.
cudaError_t addWhile(cudaGraph_t graph, cudaGraphConditionalHandle& conditional, cudaGraph_t& body)
{
    // 1 whenever the graph is launched: the first turn always runs.
    cudaError_t status = cudaGraphConditionalHandleCreate(&conditional, graph, 1, cudaGraphCondAssignDefault);
    size_t count = 0;
    if (status == cudaSuccess)
    {
        status = cudaGraphGetNodes(graph, nullptr, &count);
    }
    std::vector<cudaGraphNode_t> before(count);
    if (status == cudaSuccess)
    {
        status = cudaGraphGetNodes(graph, before.data(), &count);
    }
    if (status != cudaSuccess)
    {
        return status;
    }
    cudaGraphNodeParams params{};
    params.type = cudaGraphNodeTypeConditional;
    params.conditional.handle = conditional;
    params.conditional.type = cudaGraphCondTypeWhile;
    params.conditional.size = 1;
    cudaGraphNode_t node{};
#if CUDART_VERSION >= 13000
    status = cudaGraphAddNode(&node, graph, before.data(), nullptr, count, &params);
#else
    status = cudaGraphAddNode(&node, graph, before.data(), count, &params);
#endif
    if (status == cudaSuccess)
    {
        body = params.conditional.phGraph_out[0];
    }
    return status;
}

//! Captures what `enqueue` launches on `stream` into `graph`.
template <typename Enqueue>
cudaError_t captureInto(cudaGraph_t graph, cudaStream_t stream, Enqueue const& enqueue)
{
    cudaError_t status =
        cudaStreamBeginCaptureToGraph(stream, graph, nullptr, nullptr, 0, cudaStreamCaptureModeThreadLocal);
    if (status != cudaSuccess)
    {
        return status;
    }
    status = enqueue();
    cudaError_t const ended = cudaStreamEndCapture(stream, &graph);
    return status != cudaSuccess ? status : ended;
}

}  // namespace

ChainBytes chainBytes(GreedyDecoderConfig const& config)
{
    int32_t const headDim = config.width / config.heads;
    return {static_cast<size_t>(SelfLayout(headDim, config.width, 1, 1).blobBytes),
            static_cast<size_t>(CrossLayout(headDim, config.width, 1, 1).blobBytes),
            static_cast<size_t>(FeedForwardLayout(config.width, 1, 1).blobBytes)};
}

namespace
{

class ChainDecoder : public GreedyDecoder
{
public:
    ChainDecoder(GreedyDecoderConfig config, ChainWeights weights, int32_t maxSlots, int32_t capacity);
    ~ChainDecoder() override;

    cudaError_t run(GreedyRequest const& request, cudaStream_t stream) override;

private:
    struct Graph
    {
        cudaGraph_t graph{};
        cudaGraphExec_t executable{};

        ~Graph()
        {
            if (executable != nullptr)
            {
                cudaGraphExecDestroy(executable);
            }
            if (graph != nullptr)
            {
                cudaGraphDestroy(graph);
            }
        }
    };

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

    ChainWeights mWeights;
    int32_t mMultiprocessors{};
    uint8_t* mWorkspace{};
    cudaStream_t mCaptureStream{};
    std::map<std::vector<uintptr_t>, std::unique_ptr<Graph>> mGraphs;
};

ChainDecoder::ChainDecoder(GreedyDecoderConfig config, ChainWeights weights, int32_t maxSlots, int32_t capacity)
    : GreedyDecoder(std::move(config), maxSlots, capacity), mWeights(weights)
{
    mStatus = deviceAttribute(cudaDevAttrMultiProcessorCount, mMultiprocessors);
    mMultiprocessors = std::min(mMultiprocessors, kCHOOSERS_A_LANE * kWARP_SIZE);
    size_t const bytes = Workspace(mConfig, maxSlots, capacity, mMultiprocessors).bytes;
    if (mStatus == cudaSuccess)
    {
        mStatus = cudaMalloc(reinterpret_cast<void**>(&mWorkspace), bytes);
    }
    if (mStatus == cudaSuccess)
    {
        // The sums of rows that never had a line are read as well.
        mStatus = cudaMemset(mWorkspace, 0, bytes);
    }
    if (mStatus == cudaSuccess)
    {
        mStatus = cudaStreamCreateWithFlags(&mCaptureStream, cudaStreamNonBlocking);
    }
}

ChainDecoder::~ChainDecoder()
{
    mGraphs.clear();
    if (mCaptureStream != nullptr)
    {
        cudaStreamDestroy(mCaptureStream);
    }
    cudaFree(mWorkspace);
}

template <typename T>
cudaError_t ChainDecoder::enqueueNext(GreedyRequest const& request, bool first, unsigned long long conditional,
                                      bool last, cudaStream_t stream)
{
    Workspace const at(mConfig, mMaxSlots, mCapacity, mMultiprocessors);
    auto* const scalars = reinterpret_cast<int*>(mWorkspace + at.scalars);
    NextParams params{};
    params.state = {reinterpret_cast<RowState*>(mWorkspace + at.states), scalars, scalars + 1, scalars + 2};
    params.choices = reinterpret_cast<float4 const*>(mWorkspace + at.choices);
    params.choosers = mMultiprocessors;
    params.rows = request.slots;
    params.lines = request.lines;
    params.width = mConfig.width;
    params.maxNewTokens = request.maxNewTokens;
    params.startId = mConfig.startId;
    params.padId = mConfig.padId;
    std::copy(mConfig.endIds.begin(), mConfig.endIds.end(), params.endIds);
    params.ends = request.stops ? static_cast<int>(mConfig.endIds.size()) : 0;
    params.embedScale = mConfig.embedScale;
    params.embedding = mWeights.embedding;
    params.positions = mWeights.positionEmbedding;
    params.sums = reinterpret_cast<SumPair*>(mWorkspace + at.sums[0]);
    params.cleared = reinterpret_cast<SumPair*>(mWorkspace + at.sums[1]);
    params.tokens = request.tokens;
    params.logProbs = request.logProbs;
    params.lengths = request.lengths;
    params.conditional = conditional;
    params.decides = last;
    return launchLink(first ? begin<T> : next<T>, dim3(request.slots), 1, 0, stream, params);
}

template <typename T, int kHEAD_DIM, int kROWS>
cudaError_t ChainDecoder::enqueueToken(GreedyRequest const& request, unsigned long long conditional, bool last,
                                       cudaStream_t stream)
{
    Workspace const at(mConfig, mMaxSlots, mCapacity, mMultiprocessors);
    auto const sums = [&](int i) { return reinterpret_cast<SumPair*>(mWorkspace + at.sums[i % 3]); };
    int const width = mConfig.width;
    int const heads = mConfig.heads;
    int const passes = ceilDiv(request.slots, kROWS);
    int const rows = std::min(request.slots, kROWS);
    constexpr unsigned kCLUSTER = kHEAD_DIM / 8;
    unsigned const headBlocks = heads * kCLUSTER;
    unsigned const innerBlocks = mConfig.ffnWidth / kCHUNK;
    // Where one pass of rows leaves multiprocessors idle, several go side by side.
    auto const sideBySide = [&](unsigned blocks)
    { return std::clamp<unsigned>(mMultiprocessors / blocks, 1U, passes); };
    ChainBytes const blob = chainBytes(mConfig);

    int index = 0;  // in the chain; also of the norm
    auto const link = [&]()
    {
        Link l{};
        l.rows = request.slots;
        l.width = width;
        l.input = sums(index);
        l.output = sums(index + 1);
        l.cleared = sums(index + 2);
        bool const identity = index == 0 && !mConfig.embeddingNorm;
        l.norm = identity
                     ? nullptr
                     : static_cast<uint8_t const*>(mWeights.norms) + static_cast<size_t>(index) * 2 * width * kELEMENT;
        l.epsilon = mConfig.epsilon;
        l.inverseWidth = 1.0F / static_cast<float>(width);
        l.states = reinterpret_cast<RowState const*>(mWorkspace + at.states);
        ++index;
        return l;
    };

    cudaError_t status = cudaSuccess;
    for (int layer = 0; layer < mConfig.layers && status == cudaSuccess; ++layer)
    {
        SelfParams const self{
            link(),
            static_cast<uint8_t const*>(mWeights.selfBlobs) + static_cast<size_t>(layer) * headBlocks * blob.self,
            mWorkspace + at.keys + layer * at.layerCache,
            mWorkspace + at.values + layer * at.layerCache,
            heads,
            mCapacity};
        status = launchLink(selfAttention<T, kHEAD_DIM, kROWS>, dim3(headBlocks, sideBySide(headBlocks)), kCLUSTER,
                            SelfLayout(kHEAD_DIM, width, rows, kROWS).bytes, stream, self);
        if (status != cudaSuccess)
        {
            break;
        }
        CrossParams const cross{
            link(),
            static_cast<uint8_t const*>(mWeights.crossBlobs) + static_cast<size_t>(layer) * headBlocks * blob.cross,
            request.crossKeys[layer],
            request.crossValues[layer],
            heads,
            mConfig.sourceLength};
        status = launchLink(crossAttention<T, kHEAD_DIM, kROWS>, dim3(headBlocks, sideBySide(headBlocks)), kCLUSTER,
                            CrossLayout(kHEAD_DIM, width, rows, kROWS).bytes, stream, cross);
        if (status != cudaSuccess)
        {
            break;
        }
        FeedForwardParams const inner{link(),
                                      static_cast<uint8_t const*>(mWeights.feedForwardBlobs) +
                                          static_cast<size_t>(layer) * innerBlocks * blob.feedForward,
                                      mWeights.feedForwardBias + static_cast<size_t>(layer) * width, mConfig.gelu};
        status = launchLink(feedForward<T, kHEAD_DIM, kROWS>, dim3(innerBlocks, sideBySide(innerBlocks)), 1,
                            FeedForwardLayout(width, rows, kROWS).bytes, stream, inner);
    }
    if (status == cudaSuccess)
    {
        HeadParams const params{link(), mWeights.head, mConfig.vocabulary,
                                reinterpret_cast<float4*>(mWorkspace + at.choices)};
        // Weights are read once for so many rows.
        int const headRows = request.slots <= 1 ? 1 : std::min(ceilDiv(request.slots, 16), 4) * 16;
        void (*const kernel)(HeadParams) = headRows == 1    ? head<T, kHEAD_DIM, 1>
                                           : headRows == 16 ? head<T, kHEAD_DIM, 16>
                                           : headRows == 32 ? head<T, kHEAD_DIM, 32>
                                                            : head<T, kHEAD_DIM, 64>;
        status = launchLink(kernel, dim3(mMultiprocessors), 1,
                            HeadLayout(width, std::min(request.slots, headRows)).bytes, stream, params);
    }
    return status != cudaSuccess ? status : enqueueNext<T>(request, false, conditional, last, stream);
}

template <typename T, int kHEAD_DIM>
cudaError_t ChainDecoder::enqueueRows(GreedyRequest const& request, unsigned long long conditional, bool last,
                                      cudaStream_t stream)
{
    // As few rows a block as still make one wave of blocks, at most 8: with 16, a block takes more than
    // half of a multiprocessor's shared memory, and with one block on each only 15 of base's 16 clusters find room.
    constexpr int kMOST = 8;
    int const sideBySide = std::max(1, mMultiprocessors / (mConfig.heads * kHEAD_DIM / 8));
    int const rows = ceilDiv(request.slots, sideBySide);
    return rows <= 1   ? enqueueToken<T, kHEAD_DIM, 1>(request, conditional, last, stream)
           : rows <= 4 ? enqueueToken<T, kHEAD_DIM, 4>(request, conditional, last, stream)
                       : enqueueToken<T, kHEAD_DIM, kMOST>(request, conditional, last, stream);
}

cudaError_t ChainDecoder::capture(GreedyRequest const& request, std::unique_ptr<Graph>& captured)
{
    auto graph = std::make_unique<Graph>();
    bool const half = mConfig.dataType == DataType::kHALF;
    cudaError_t status = cudaGraphCreate(&graph->graph, 0);
    if (status == cudaSuccess)
    {
        status = captureInto(graph->graph, mCaptureStream,
                             [&]()
                             {
                                 return half ? enqueueNext<__half>(request, true, 0, false, mCaptureStream)
                                             : enqueueNext<__nv_bfloat16>(request, true, 0, false, mCaptureStream);
                             });
    }
    cudaGraphConditionalHandle conditional{};
    cudaGraph_t body{};
    if (status == cudaSuccess)
    {
        status = addWhile(graph->graph, conditional, body);
    }
    if (status == cudaSuccess)
    {
        status = captureInto(body, mCaptureStream,
                             [&]()
                             {
                                 cudaError_t enqueued = cudaSuccess;
                                 for (int token = 0; token < kTOKENS_A_TURN && enqueued == cudaSuccess; ++token)
                                 {
                                     bool const last = token == kTOKENS_A_TURN - 1;
                                     if (half)
                                     {
                                         enqueued = enqueueRows<__half, 64>(request, conditional, last, mCaptureStream);
                                     }
                                     else
                                     {
                                         enqueued =
                                             enqueueRows<__nv_bfloat16, 64>(request, conditional, last, mCaptureStream);
                                     }
                                 }
                                 return enqueued;
                             });
    }
    if (status == cudaSuccess)
    {
        status = cudaGraphInstantiate(&graph->executable, graph->graph, 0);
    }
    if (status == cudaSuccess)
    {
        captured = std::move(graph);
    }
    return status;
}

cudaError_t ChainDecoder::run(GreedyRequest const& request, cudaStream_t stream)
{
    if (!isPossible(request))
    {
        return cudaErrorInvalidValue;
    }
    std::vector<uintptr_t> key = {
        static_cast<uintptr_t>(request.lines),        static_cast<uintptr_t>(request.slots),
        static_cast<uintptr_t>(request.maxNewTokens), static_cast<uintptr_t>(request.stops),
        reinterpret_cast<uintptr_t>(request.tokens),  reinterpret_cast<uintptr_t>(request.logProbs),
        reinterpret_cast<uintptr_t>(request.lengths)};
    for (auto const* pointers : {&request.crossKeys, &request.crossValues})
    {
        for (void const* pointer : *pointers)
        {
            key.push_back(reinterpret_cast<uintptr_t>(pointer));
        }
    }
    auto found = mGraphs.find(key);
    if (found == mGraphs.end())
    {
        if (mGraphs.size() >= kMAX_GRAPHS)
        {
            mGraphs.clear();
        }
        std::unique_ptr<Graph> graph;
        cudaError_t const status = capture(request, graph);
        if (status != cudaSuccess)
        {
            return status;
        }
        found = mGraphs.emplace(std::move(key), std::move(graph)).first;
    }
    return cudaGraphLaunch(found->second->executable, stream);
}

}  // namespace

std::unique_ptr<GreedyDecoder> makeChainDecoder(GreedyDecoderConfig config, ChainWeights const& weights,
                                                int32_t maxSlots, int32_t capacity)
{
    return std::make_unique<ChainDecoder>(std::move(config), weights, maxSlots, capacity);
}

}  // namespace trocr
