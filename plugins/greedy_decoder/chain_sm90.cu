#include <algorithm>
#include <cmath>
#include <map>
#include <type_traits>
#include <utility>

#include "common/launch.h"
#include "greedy_decoder/chain_kernels_sm90.cuh"
#include "greedy_decoder/chain_rows_sm90.cuh"
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
    size_t sums[3], choices, states, scalars, keys, values;
    size_t layerCache;  //!< bytes of a layer's keys
    //! Of a step of many rows: hidden states; queries, keys and values, or inner columns; contexts; cross-attention's
    //! queries; these, and contexts, in terms of the encoder's states.
    size_t hidden, inner, context, query, stateQuery, stateContext;
    size_t bytes;

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
        auto const rows = [&](size_t columns)
        { return take(config.encoderWidth > 0 ? slots * columns * kELEMENT : 0); };
        hidden = rows(config.width);
        inner = rows(std::max(3 * config.width, config.ffnWidth));
        context = rows(config.width);
        query = rows(config.width);
        stateQuery = rows(static_cast<size_t>(config.heads) * config.encoderWidth);
        stateContext = rows(static_cast<size_t>(config.heads) * config.encoderWidth);
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

//! attendStates for one width of the encoder.
struct StatesKernel
{
    void (*kernel)(StatesParams);
    int bytes;  //!< of shared memory

    template <typename T>
    static StatesKernel of(int encoderWidth)
    {
        switch (encoderWidth)
        {
            case 384:
                return {attendStates<T, 3>, StatesLayout<3>::kBYTES};
            case 768:
                return {attendStates<T, 6>, StatesLayout<6>::kBYTES};
            default:
                return {attendStates<T, 8>, StatesLayout<8>::kBYTES};
        }
    }

    //! As many blocks a row as take the least time: best are those of all rows at once, if they find room.
    int blocks(int rows, int length, int multiprocessors) const
    {
        constexpr int kMOST = 8;
        constexpr int kSTAGE = 32;  // states
        int best = 1;
        int least = ceilDiv(rows, multiprocessors) * ceilDiv(length, kSTAGE);
        for (int of = 2; of <= kMOST; ++of)
        {
            int const fit = clustersAtOnce(kernel, bytes, kTHREADS, of);
            // In stages; what a cluster adds up at its end costs about one.
            int const time = fit < 1 ? least : ceilDiv(rows, fit) * (ceilDiv(ceilDiv(length, of), kSTAGE) + 1);
            if (time < least)
            {
                least = time;
                best = of;
            }
        }
        return best;
    }
};

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
    template <typename T, int kROW_TILES>
    cudaError_t enqueueRowsToken(GreedyRequest const& request, unsigned long long conditional, bool last,
                                 cudaStream_t stream);
    template <typename T>
    cudaError_t enqueueHead(GreedyRequest const& request, Link const& link, cudaStream_t stream);
    Link linkAt(GreedyRequest const& request, int index) const;
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

//! Link `index` of a token's chain; also the number of its norm.
Link ChainDecoder::linkAt(GreedyRequest const& request, int index) const
{
    Workspace const at(mConfig, mMaxSlots, mCapacity, mMultiprocessors);
    auto const sums = [&](int i) { return reinterpret_cast<SumPair*>(mWorkspace + at.sums[i % 3]); };
    bool const identity = index == 0 && !mConfig.embeddingNorm;
    Link link{};
    link.rows = request.slots;
    link.width = mConfig.width;
    link.input = sums(index);
    link.output = sums(index + 1);
    link.cleared = sums(index + 2);
    link.norm = identity ? nullptr
                         : static_cast<uint8_t const*>(mWeights.norms) +
                               static_cast<size_t>(index) * 2 * mConfig.width * kELEMENT;
    link.epsilon = mConfig.epsilon;
    link.inverseWidth = 1.0F / static_cast<float>(mConfig.width);
    link.states = reinterpret_cast<RowState const*>(mWorkspace + at.states);
    return link;
}

template <typename T>
cudaError_t ChainDecoder::enqueueHead(GreedyRequest const& request, Link const& link, cudaStream_t stream)
{
    Workspace const at(mConfig, mMaxSlots, mCapacity, mMultiprocessors);
    HeadParams const params{link, mWeights.head, mConfig.vocabulary,
                            reinterpret_cast<float4*>(mWorkspace + at.choices)};
    // Weights are read once for so many rows.
    constexpr int kHEAD_DIM = 64;
    int const rows = request.slots <= 1 ? 1 : std::min(ceilDiv(request.slots, 16), 4) * 16;
    void (*const kernel)(HeadParams) = rows == 1    ? head<T, kHEAD_DIM, 1>
                                       : rows == 16 ? head<T, kHEAD_DIM, 16>
                                       : rows == 32 ? head<T, kHEAD_DIM, 32>
                                                    : head<T, kHEAD_DIM, 64>;
    return launchLink(kernel, dim3(mMultiprocessors), 1, HeadLayout(mConfig.width, std::min(request.slots, rows)).bytes,
                      stream, params);
}

//! A step of many rows: chain_rows_sm90.cuh.
template <typename T, int kROW_TILES>
cudaError_t ChainDecoder::enqueueRowsToken(GreedyRequest const& request, unsigned long long conditional, bool last,
                                           cudaStream_t stream)
{
    constexpr int kHEAD_DIM = 64;
    constexpr int kCLUSTER = kHEAD_DIM / 8;  // blocks that share a head in the packed weights
    Workspace const at(mConfig, mMaxSlots, mCapacity, mMultiprocessors);
    ChainBytes const blob = chainBytes(mConfig);
    int const width = mConfig.width;
    int const heads = mConfig.heads;
    int const inner = mConfig.ffnWidth;
    int const encoded = mConfig.encoderWidth;
    int const columns = width / kCLUSTER;
    int const rows = request.slots;
    auto const* const states = reinterpret_cast<RowState const*>(mWorkspace + at.states);
    auto* const hidden = mWorkspace + at.hidden;
    auto* const wide = mWorkspace + at.inner;
    auto* const context = mWorkspace + at.context;

    cudaError_t status = cudaSuccess;
    auto const launch = [&](auto kernel, dim3 grid, size_t bytes, auto const& params, unsigned cluster = 1)
    {
        if (status == cudaSuccess)
        {
            status = launchLink(kernel, grid, cluster, bytes, stream, params);
        }
    };
    auto const attention = StatesKernel::of<T>(encoded);
    int const attentionBlocks = attention.blocks(rows, mConfig.sourceLength, mMultiprocessors);
    float const scale = kLOG2_E / std::sqrt(static_cast<float>(kHEAD_DIM));
    int index = 0;
    Link link{};
    auto const normalizeSums = [&]()
    {
        link = linkAt(request, index++);
        launch(normalize<T>, dim3(rows), 0,
               NormalizeParams{link.input, link.output, link.norm, hidden, states, width, link.epsilon});
    };
    // Of `pieces`, one a block, that begin with the bias; the tiles of a chunk of inputs are chunkBytes apart.
    auto const productOf =
        [&](void const* input, int inputs, uint8_t const* pieces, size_t pieceBytes, size_t tilesAt, int chunkBytes)
    {
        ProductParams p{};
        p.rows = rows;
        p.states = states;
        p.input = input;
        p.inputPitch = inputs;
        p.inputGroup = 1;
        p.chunks = p.blockChunks = p.inner = inputs / kCHUNK;
        p.group = 1;
        p.weights = {pieces + tilesAt, pieceBytes, 0};
        p.innerStride = chunkBytes;
        p.bias = {pieces, pieceBytes, 0};
        p.tileColumns = 8;
        return p;
    };
    auto const store = [&](auto tiles, ProductParams p, int blocks, void* output, int outputs)
    {
        constexpr int kTILES = decltype(tiles)::value;
        p.output = output;
        p.outputPitch = outputs;
        launch(product<T, kROW_TILES, kTILES, false>, dim3(blocks), productBytes<kROW_TILES, kTILES>(p.blockChunks), p);
    };
    auto const addToSums = [&](ProductParams p, int blockChunks)
    {
        p.blockChunks = std::min(p.chunks, blockChunks);
        p.outputPitch = width;
        p.blockColumns = 32;
        p.weights.stride = 4 * kTILE_BYTES;
        p.bias.stride = 32 * 4;
        p.sums = link.output;
        p.hidden = hidden;
        launch(product<T, kROW_TILES, 4, true>, dim3(width / 32, ceilDiv(p.chunks, p.blockChunks)),
               productBytes<kROW_TILES, 4>(p.blockChunks), p);
    };
    // Its inputs, contexts, lie in the pieces of their heads, and of those in the piece of its columns.
    auto const addOutput = [&](uint8_t const* pieces, size_t pieceBytes, size_t tilesAt, int biasAt)
    {
        ProductParams p = productOf(context, width, pieces, pieceBytes, tilesAt, columns / 8 * kTILE_BYTES);
        p.group = columns / 32;
        p.inner = kHEAD_DIM / kCHUNK;
        p.outerStride = kCLUSTER * pieceBytes;
        p.bias.base += biasAt;
        addToSums(p, 8);
    };
    using One = std::integral_constant<int, 1>;
    using Three = std::integral_constant<int, 3>;
    using Four = std::integral_constant<int, 4>;
    auto const bytesOf = [](void const* pointer) { return static_cast<uint8_t const*>(pointer); };
    for (size_t layer = 0; layer < static_cast<size_t>(mConfig.layers); ++layer)
    {
        auto const* const self = bytesOf(mWeights.selfBlobs) + layer * heads * kCLUSTER * blob.self;
        auto const* const cross = bytesOf(mWeights.crossBlobs) + layer * heads * kCLUSTER * blob.cross;
        auto const* const ffn = bytesOf(mWeights.feedForwardBlobs) + layer * (inner / kCHUNK) * blob.feedForward;
        size_t const stateBytes = layer * width * encoded * kELEMENT;
        size_t const selfTiles = (24 + columns) * 4;
        size_t const crossTiles = (8 + columns) * 4;
        size_t const layerBias = layer * width * 4;

        normalizeSums();
        ProductParams p = productOf(hidden, width, self, blob.self, selfTiles, 3 * kTILE_BYTES);
        p.blockColumns = 8;
        p.tileColumns = width;  // eight columns each of query, key and value
        store(Three{}, p, heads * kCLUSTER, wide, 3 * width);
        launch(attendSelf<T, kHEAD_DIM>, dim3(rows, ceilDiv(heads, kWARPS)), 0,
               AttendParams{rows, states, wide, mWorkspace + at.keys + layer * at.layerCache,
                            mWorkspace + at.values + layer * at.layerCache, context, heads, mCapacity});
        addOutput(self, blob.self, selfTiles + 24 * width * kELEMENT, 24 * 4);

        normalizeSums();
        p = productOf(hidden, width, cross, blob.cross, crossTiles, kTILE_BYTES);
        p.blockColumns = 8;
        store(One{}, p, heads * kCLUSTER, mWorkspace + at.query, width);
        launch(expandQuery<T, kHEAD_DIM, kROW_TILES>, dim3(heads * 8), 0,
               ExpandParams{rows, states, mWorkspace + at.query, bytesOf(mWeights.crossKeys) + stateBytes,
                            mWorkspace + at.stateQuery, heads, encoded});
        launch(attention.kernel, dim3(attentionBlocks, rows), attention.bytes,
               StatesParams{states, mWorkspace + at.stateQuery, request.states, mWorkspace + at.stateContext, heads,
                            mConfig.sourceLength, scale},
               attentionBlocks);
        // A head's values: its context in terms of the states, times its own weights.
        p = productOf(mWorkspace + at.stateContext, encoded, bytesOf(mWeights.crossValues) + stateBytes,
                      8 * encoded * kELEMENT, 0, kTILE_BYTES);
        p.inputPitch = heads * encoded;
        p.inputGroup = kCLUSTER;
        p.inputStride = encoded;
        p.bias = {bytesOf(mWeights.crossValueBias) + layerBias, 8 * 4, 0};
        p.blockColumns = 8;
        store(One{}, p, heads * kCLUSTER, context, width);
        addOutput(cross, blob.cross, crossTiles + 8 * width * kELEMENT, 8 * 4);

        normalizeSums();
        p = productOf(hidden, width, ffn, blob.feedForward, 32 * 4, 4 * kTILE_BYTES);
        p.blockColumns = 32;
        p.activation = mConfig.gelu ? LinearActivation::kGELU : LinearActivation::kRELU;
        store(Four{}, p, inner / 32, wide, inner);
        p = productOf(wide, inner, ffn, 0, 32 * 4 + 32 * width * kELEMENT, 0);
        p.group = width / 32;
        p.inner = 1;
        p.outerStride = blob.feedForward;
        p.bias.base = bytesOf(mWeights.feedForwardBias) + layerBias;
        addToSums(p, 32);
    }
    if (status == cudaSuccess)
    {
        status = enqueueHead<T>(request, linkAt(request, index), stream);
    }
    return status != cudaSuccess ? status : enqueueNext<T>(request, false, conditional, last, stream);
}

template <typename T, int kHEAD_DIM, int kROWS>
cudaError_t ChainDecoder::enqueueToken(GreedyRequest const& request, unsigned long long conditional, bool last,
                                       cudaStream_t stream)
{
    Workspace const at(mConfig, mMaxSlots, mCapacity, mMultiprocessors);
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
    auto const link = [&]() { return linkAt(request, index++); };

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
        status = enqueueHead<T>(request, link(), stream);
    }
    return status != cudaSuccess ? status : enqueueNext<T>(request, false, conditional, last, stream);
}

template <typename T, int kHEAD_DIM>
cudaError_t ChainDecoder::enqueueRows(GreedyRequest const& request, unsigned long long conditional, bool last,
                                      cudaStream_t stream)
{
    if (request.states != nullptr)
    {
        return request.slots <= 16   ? enqueueRowsToken<T, 1>(request, conditional, last, stream)
               : request.slots <= 32 ? enqueueRowsToken<T, 2>(request, conditional, last, stream)
                                     : enqueueRowsToken<T, 4>(request, conditional, last, stream);
    }
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
        reinterpret_cast<uintptr_t>(request.lengths), reinterpret_cast<uintptr_t>(request.states)};
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
