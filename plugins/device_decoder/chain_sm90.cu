#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>

#include "common/launch.h"
#include "device_decoder/chain_kernels_sm90.cuh"
#include "device_decoder/chain_rows_sm90.cuh"
#include "device_decoder/kernel.h"
#include "device_decoder/while_graph.h"

namespace trocr
{

namespace
{

using namespace decoder;

//! Tokens in one turn of the WHILE node: a turn costs 5 us by itself, and a text's end inside a turn the idle rest of
//! it.
constexpr int kTOKENS_A_TURN = 2;

//! Where things lie in the workspace.
struct Workspace
{
    size_t sums[3], choices, states, scalars, keys, values;
    size_t layerCache;  //!< bytes of a layer's keys
    //! Of a step of many rows: hidden states; queries, keys and values, or inner columns; contexts; cross-attention's
    //! queries and contexts in terms of the encoder's states.
    size_t hidden, inner, context, stateQuery, stateContext;
    size_t bytes;

    Workspace(DeviceDecoderConfig const& config, int32_t slots, int32_t capacity, int32_t blocks)
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
    cudaLaunchAttribute attributes[2] = {dependentLaunch(), clusterOf(cluster)};
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
    int keys;   //!< of a stage

    template <typename T, int kSTEPS>
    static StatesKernel make()
    {
        using Layout = StatesLayout<kSTEPS>;
        return {attendStates<T, kSTEPS>, Layout::kBYTES, Layout::kKEYS};
    }

    template <typename T>
    static StatesKernel of(int encoderWidth)
    {
        switch (encoderWidth)
        {
            case 384:
                return make<T, 3>();
            case 768:
                return make<T, 6>();
            default:
                return make<T, 8>();
        }
    }

    //! As many blocks a row as take the least time: best are those of all rows at once, if they find room.
    int blocks(int rows, int length, int multiprocessors) const
    {
        int best = 1;
        int least = ceilDiv(rows, multiprocessors) * ceilDiv(length, keys);
        for (int of = 2; of <= kMOST_STATES_BLOCKS; ++of)
        {
            int const fit = clustersAtOnce(kernel, bytes, kTHREADS, of);
            // In stages; what a cluster adds up at its end costs about one.
            int const time = fit < 1 ? least : ceilDiv(rows, fit) * (ceilDiv(ceilDiv(length, of), keys) + 1);
            if (time < least)
            {
                least = time;
                best = of;
            }
        }
        return best;
    }
};

}  // namespace

ChainBytes chainBytes(DeviceDecoderConfig const& config)
{
    int32_t const headDim = config.width / config.heads;
    return {static_cast<size_t>(SelfLayout(headDim, config.width, 1, 1).blobBytes),
            static_cast<size_t>(CrossLayout(headDim, config.width, 1, 1).blobBytes),
            static_cast<size_t>(FeedForwardLayout(config.width, 1, 1).blobBytes)};
}

namespace
{

class ChainDecoder : public DeviceDecoder
{
public:
    ChainDecoder(DeviceDecoderConfig config, ChainWeights weights, int32_t maxSlots, int32_t capacity);
    ~ChainDecoder() override;

    cudaError_t run(SearchRequest const& request, cudaStream_t stream) override;

    bool runsAsAKernel(int32_t slots, bool states) const override
    {
        return mWide != nullptr && mWide->takes(slots, states);
    }

    bool takesE4m3(int32_t slots) const override
    {
        return runsAsAKernel(slots, false) && mConfig.dataType == DataType::kHALF;
    }

    int32_t mostRows() const override
    {
        return mMaxSlots;
    }

private:
    cudaError_t enqueueStep(BeamRequest const& request, BeamSearch const& search, cudaStream_t stream) override;

    //! A token's chain and what is behind it: of a greedy search `next`, of a beam search (`beams`) nothing.
    struct Token
    {
        SearchRequest const& request;
        BeamSearch const* beams;
        RowState const* states;  //!< [slots]
        unsigned long long conditional;
        bool last;  //!< of a turn
    };

    template <typename T, int kHEAD_DIM>
    cudaError_t enqueueRows(Token const& token, cudaStream_t stream);
    template <typename T, int kROW_TILES>
    cudaError_t enqueueRowsToken(Token const& token, cudaStream_t stream);
    template <typename T, int kHEAD_DIM, int kROWS>
    cudaError_t enqueueToken(Token const& token, cudaStream_t stream);
    template <typename T>
    cudaError_t enqueueEnd(Token const& token, Link const& link, cudaStream_t stream);
    template <typename T>
    cudaError_t enqueueNext(SearchRequest const& request, bool first, unsigned long long conditional, bool last,
                            cudaStream_t stream);
    template <typename T>
    cudaError_t enqueueEmbed(BeamSearch const& search, cudaStream_t stream);
    Link linkAt(Token const& token, int index) const;

    RowState* greedyStates() const
    {
        Workspace const at(mConfig, mMaxSlots, mCapacity, mMultiprocessors);
        return reinterpret_cast<RowState*>(mWorkspace + at.states);
    }

    ChainWeights mWeights;
    int32_t mMultiprocessors{};
    uint8_t* mWorkspace{};
    WhileGraphs mGraphs;
    std::unique_ptr<wide::WideSearch> mWide;
};

ChainDecoder::ChainDecoder(DeviceDecoderConfig config, ChainWeights weights, int32_t maxSlots, int32_t capacity)
    : DeviceDecoder(std::move(config), maxSlots, capacity), mWeights(weights)
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
    if (mStatus == cudaSuccess && mWeights.wideLayers != nullptr && wide::isServed(mConfig))
    {
        mWide = wide::makeWideSearch(mConfig, mWeights, capacity);
        mStatus = mWide->status();
    }
}

ChainDecoder::~ChainDecoder()
{
    cudaFree(mWorkspace);
}

template <typename T>
cudaError_t ChainDecoder::enqueueNext(SearchRequest const& request, bool first, unsigned long long conditional,
                                      bool last, cudaStream_t stream)
{
    Workspace const at(mConfig, mMaxSlots, mCapacity, mMultiprocessors);
    auto* const scalars = reinterpret_cast<int*>(mWorkspace + at.scalars);
    NextParams params{};
    params.state = {greedyStates(), scalars, scalars + 1, scalars + 2};
    params.choices = reinterpret_cast<float4 const*>(mWorkspace + at.choices);
    params.choosers = mMultiprocessors;
    params.rows = request.slots;
    params.width = mConfig.width;
    setTexts(params, request, mConfig);
    params.embedScale = mConfig.embedScale;
    params.embedding = mWeights.embedding;
    params.positions = mWeights.positionEmbedding;
    params.sums = reinterpret_cast<SumPair*>(mWorkspace + at.sums[0]);
    params.cleared = reinterpret_cast<SumPair*>(mWorkspace + at.sums[1]);
    params.conditional = conditional;
    params.decides = last;
    return launchLink(first ? begin<T> : next<T>, dim3(request.slots), 1, 0, stream, params);
}

//! Link `index` of a token's chain; also the number of its norm.
Link ChainDecoder::linkAt(Token const& token, int index) const
{
    Workspace const at(mConfig, mMaxSlots, mCapacity, mMultiprocessors);
    auto const sums = [&](int i) { return reinterpret_cast<SumPair*>(mWorkspace + at.sums[i % 3]); };
    bool const identity = index == 0 && !mConfig.embeddingNorm;
    Link link{};
    link.rows = token.request.slots;
    link.width = mConfig.width;
    link.input = sums(index);
    link.output = sums(index + 1);
    link.cleared = sums(index + 2);
    link.norm = identity ? nullptr
                         : static_cast<uint8_t const*>(mWeights.norms) +
                               static_cast<size_t>(index) * 2 * mConfig.width * kELEMENT;
    link.epsilon = mConfig.epsilon;
    link.inverseWidth = 1.0F / static_cast<float>(mConfig.width);
    link.states = token.states;
    return link;
}

//! The head's kernel for so many rows at once: so often are its weights read.
template <typename T, bool kBEAMS>
auto headOf(int rows) -> void (*)(HeadParams)
{
    constexpr int kHEAD_DIM = 64;
    return rows == 1    ? head<T, kHEAD_DIM, 1, kBEAMS>
           : rows == 16 ? head<T, kHEAD_DIM, 16, kBEAMS>
           : rows == 32 ? head<T, kHEAD_DIM, 32, kBEAMS>
                        : head<T, kHEAD_DIM, 64, kBEAMS>;
}

//! The head, and of a greedy search what ends the token.
template <typename T>
cudaError_t ChainDecoder::enqueueEnd(Token const& token, Link const& link, cudaStream_t stream)
{
    Workspace const at(mConfig, mMaxSlots, mCapacity, mMultiprocessors);
    int const slots = token.request.slots;
    HeadParams const params{link, mWeights.head, mConfig.vocabulary, reinterpret_cast<float4*>(mWorkspace + at.choices),
                            token.beams != nullptr ? token.beams->logits : nullptr};
    int const rows = slots <= 1 ? 1 : std::min(ceilDiv(slots, 16), 4) * 16;
    cudaError_t const status =
        launchLink(token.beams != nullptr ? headOf<T, true>(rows) : headOf<T, false>(rows), dim3(mMultiprocessors), 1,
                   HeadLayout(mConfig.width, std::min(slots, rows)).bytes, stream, params);
    return status != cudaSuccess || token.beams != nullptr
               ? status
               : enqueueNext<T>(token.request, false, token.conditional, token.last, stream);
}

//! The rows' newest tokens, to the first sums.
template <typename T>
cudaError_t ChainDecoder::enqueueEmbed(BeamSearch const& search, cudaStream_t stream)
{
    Workspace const at(mConfig, mMaxSlots, mCapacity, mMultiprocessors);
    auto const sums = [&](int i) { return reinterpret_cast<SumPair*>(mWorkspace + at.sums[i]); };
    EmbedParams const params{
        search.rows, search.inputs, mConfig.width, mConfig.embedScale, mWeights.embedding, mWeights.positionEmbedding,
        sums(0),     sums(1)};
    return launchLink(embedRows<T>, dim3(search.images * search.beams), 1, 0, stream, params);
}

//! A step of many rows: chain_rows_sm90.cuh.
template <typename T, int kROW_TILES>
cudaError_t ChainDecoder::enqueueRowsToken(Token const& token, cudaStream_t stream)
{
    SearchRequest const& request = token.request;
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
    auto const* const states = token.states;
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
        link = linkAt(token, index++);
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
        auto* const keys = mWorkspace + at.keys + layer * at.layerCache;
        auto* const values = mWorkspace + at.values + layer * at.layerCache;
        auto const* const owners = token.beams != nullptr ? token.beams->owners : nullptr;
        size_t const selfOutput = selfTiles + 24 * width * kELEMENT;
        if constexpr (kROW_TILES == 1)
        {
            launch(
                owners != nullptr ? attendSelfAndAdd<T, kHEAD_DIM, true> : attendSelfAndAdd<T, kHEAD_DIM, false>,
                dim3(heads * kCLUSTER),
                productBytes<1, 3>(p.blockChunks) + headRowsBytes<1, kHEAD_DIM>() + headOutputBytes<kHEAD_DIM>(width),
                SelfRowsParams{p,
                               {self + selfOutput, self + 24 * 4, blob.self, link.output, hidden, width},
                               keys,
                               values,
                               heads,
                               mCapacity,
                               owners},
                kCLUSTER);
        }
        else
        {
            store(Three{}, p, heads * kCLUSTER, wide, 3 * width);
            launch(owners != nullptr ? attendSelf<T, kHEAD_DIM, true> : attendSelf<T, kHEAD_DIM, false>,
                   dim3(rows, ceilDiv(heads, kWARPS)), 0,
                   AttendParams{rows, states, wide, keys, values, context, heads, mCapacity, owners});
            addOutput(self, blob.self, selfOutput, 24 * 4);
        }

        normalizeSums();
        p = productOf(hidden, width, cross, blob.cross, crossTiles, kTILE_BYTES);
        launch(queryStates<T, kHEAD_DIM, kROW_TILES>, dim3(heads * kCLUSTER),
               productBytes<kROW_TILES, 1>(p.blockChunks) + headRowsBytes<kROW_TILES, kHEAD_DIM>(),
               QueryParams{p, bytesOf(mWeights.crossKeys) + stateBytes, mWorkspace + at.stateQuery, heads, encoded},
               kCLUSTER);
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
    return status != cudaSuccess ? status : enqueueEnd<T>(token, linkAt(token, index), stream);
}

template <typename T, int kHEAD_DIM, int kROWS>
cudaError_t ChainDecoder::enqueueToken(Token const& token, cudaStream_t stream)
{
    SearchRequest const& request = token.request;
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
    auto const link = [&]() { return linkAt(token, index++); };

    cudaError_t status = cudaSuccess;
    for (int layer = 0; layer < mConfig.layers && status == cudaSuccess; ++layer)
    {
        SelfParams const self{
            link(),
            static_cast<uint8_t const*>(mWeights.selfBlobs) + static_cast<size_t>(layer) * headBlocks * blob.self,
            mWorkspace + at.keys + layer * at.layerCache,
            mWorkspace + at.values + layer * at.layerCache,
            heads,
            mCapacity,
            token.beams != nullptr ? token.beams->owners : nullptr};
        auto* const selfKernel = token.beams != nullptr ? selfAttention<T, kHEAD_DIM, kROWS, true>
                                                        : selfAttention<T, kHEAD_DIM, kROWS, false>;
        status = launchLink(selfKernel, dim3(headBlocks, sideBySide(headBlocks)), kCLUSTER,
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
    return status != cudaSuccess ? status : enqueueEnd<T>(token, link(), stream);
}

template <typename T, int kHEAD_DIM>
cudaError_t ChainDecoder::enqueueRows(Token const& token, cudaStream_t stream)
{
    SearchRequest const& request = token.request;
    if (request.states != nullptr)
    {
        return request.slots <= 16   ? enqueueRowsToken<T, 1>(token, stream)
               : request.slots <= 32 ? enqueueRowsToken<T, 2>(token, stream)
                                     : enqueueRowsToken<T, 4>(token, stream);
    }
    // As few rows a block as still make one wave of blocks, at most 8: with 16, a block takes more than
    // half of a multiprocessor's shared memory, and with one block on each only 15 of base's 16 clusters find room.
    constexpr int kMOST = 8;
    int const sideBySide = std::max(1, mMultiprocessors / (mConfig.heads * kHEAD_DIM / 8));
    int const rows = ceilDiv(request.slots, sideBySide);
    return rows <= 1   ? enqueueToken<T, kHEAD_DIM, 1>(token, stream)
           : rows <= 4 ? enqueueToken<T, kHEAD_DIM, 4>(token, stream)
                       : enqueueToken<T, kHEAD_DIM, kMOST>(token, stream);
}

cudaError_t ChainDecoder::enqueueStep(BeamRequest const& request, BeamSearch const& search, cudaStream_t stream)
{
    Token const token{request.images, &search, search.rows, 0, false};
    auto const enqueue = [&](auto type)
    {
        using T = decltype(type);
        cudaError_t const status = enqueueEmbed<T>(search, stream);
        return status != cudaSuccess ? status : enqueueRows<T, 64>(token, stream);
    };
    return mConfig.dataType == DataType::kHALF ? enqueue(__half{}) : enqueue(__nv_bfloat16{});
}

cudaError_t ChainDecoder::run(SearchRequest const& request, cudaStream_t stream)
{
    if (!isPossible(request) || (request.crossIsE4m3 && !takesE4m3(request.slots)))
    {
        return cudaErrorInvalidValue;
    }
    if (runsAsAKernel(request.slots, request.states != nullptr))
    {
        return mWide->run(request, stream);
    }
    bool const half = mConfig.dataType == DataType::kHALF;
    auto const begin = [&](cudaStream_t on)
    {
        return half ? enqueueNext<__half>(request, true, 0, false, on)
                    : enqueueNext<__nv_bfloat16>(request, true, 0, false, on);
    };
    auto const turn = [&](cudaGraphConditionalHandle conditional, cudaStream_t on)
    {
        cudaError_t enqueued = cudaSuccess;
        for (int token = 0; token < kTOKENS_A_TURN && enqueued == cudaSuccess; ++token)
        {
            bool const last = token == kTOKENS_A_TURN - 1;
            Token const of{request, nullptr, greedyStates(), conditional, last};
            enqueued = half ? enqueueRows<__half, 64>(of, on) : enqueueRows<__nv_bfloat16, 64>(of, on);
        }
        return enqueued;
    };
    return mGraphs.launch(keyOf(request), begin, turn, stream);
}

}  // namespace

std::unique_ptr<DeviceDecoder> makeChainDecoder(DeviceDecoderConfig config, ChainWeights const& weights,
                                                int32_t maxSlots, int32_t capacity)
{
    return std::make_unique<ChainDecoder>(std::move(config), weights, maxSlots, capacity);
}

}  // namespace trocr
