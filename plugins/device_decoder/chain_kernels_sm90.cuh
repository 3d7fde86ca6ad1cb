#pragma once

// The kernels of one decoder step: `next` (end the token before, embed the new one), then for every layer
// `selfAttention`, `crossAttention` and `feedForward`, then `head`. README.md draws the chain.

#include "device_decoder/chain_blocks_sm90.cuh"
#include "device_decoder/chain_layout.h"
#include "device_decoder/kernel.h"

namespace trocr::decoder
{

//! What the search keeps in global memory besides caches and sums.
struct State
{
    RowState* rows;  //!< [slots]
    int* next;       //!< the first line that no row has taken yet
    int* remaining;  //!< lines not yet ended
    int* arrived;    //!< blocks of `next` that are done
};

// ---- self-attention ----

struct SelfParams
{
    Link link;
    uint8_t const* blobs;  //!< this layer's
    void* keys;            //!< T [slots, H, capacity, d]
    void* values;
    int heads;
    int capacity;
    int const* owners;  //!< [slots, capacity], of a beam search
};

//! sums += W_out attention(W_qkv h) + b + h, h = LayerNorm(sums before). A cluster a head; a block computes eight
//! columns each of the head's query, key and value, and gives them to its cluster. With more than one row the cluster's
//! blocks attend for a part of the rows each. kBEAMS: rows are running hypotheses.
template <typename T, int kHEAD_DIM, int kROWS, bool kBEAMS>
__global__ void __launch_bounds__(kTHREADS, 2) selfAttention(SelfParams p)
{
    constexpr int kBLOCKS = kHEAD_DIM / 8;  // of a cluster
    constexpr bool kDEAL = kROWS > 1;
    constexpr int kMINE = (kROWS + kBLOCKS - 1) / kBLOCKS;  // rows that a block attends for
    constexpr int kROW_WARPS = kWARPS / kMINE;
    constexpr int kPASSES = 64 * kHEAD_DIM / 8 / kWARP_SIZE / kROW_WARPS;  // 64 keys are held
    using HeadKeys = Keys<T, kHEAD_DIM, kROW_WARPS, kPASSES>;
    TROCR_DYNAMIC_SHARED(shared, 128);
    int const rank = blockIdx.x % kBLOCKS;
    int const head = blockIdx.x / kBLOCKS;
    int const warp = threadIdx.x / kWARP_SIZE;
    int const lane = threadIdx.x % kWARP_SIZE;
    int const width = p.link.width;
    int const chunks = width / kCHUNK;
    int const columns = width / kBLOCKS;

    SelfLayout const layout(kHEAD_DIM, width, min(kROWS, p.link.rows), kROWS);
    auto* const norm = reinterpret_cast<T*>(shared + layout.norm);
    auto* const qkvBias = reinterpret_cast<float*>(shared + layout.blob);
    auto* const outBias = qkvBias + 24;
    auto* const qkvWeights = reinterpret_cast<T*>(outBias + columns);
    auto* const outWeights = qkvWeights + 24 * width;
    auto* const hidden = reinterpret_cast<T*>(shared + layout.hidden);
    auto* const partial = reinterpret_cast<float*>(shared + layout.partial);  // products, then contexts [warp][d]
    auto* const scales = reinterpret_cast<float2*>(shared + layout.scales);   // [warp]; before that RowNorm's
    auto* const qkv = reinterpret_cast<T*>(shared + layout.exchange);         // [row][3][d], written by the cluster
    auto* const context = reinterpret_cast<T*>(shared + layout.context);      // [row][d], likewise
    int const pitch = rowPitch<T>(width);
    constexpr int kCONTEXT_PITCH = rowPitch<T>(kHEAD_DIM);

    sm90::launchDependents();
    Constants const constants =
        Constants::fetch(reinterpret_cast<uint64_t*>(shared), norm, p.link.norm, 2 * width * sizeof(T), qkvBias,
                         p.blobs + blockIdx.x * layout.blobBytes, layout.blobBytes);
    sm90::clusterSyncRelaxed();  // every block of the cluster runs: its shared memory may be written
    sm90::waitForPriorGrids();

#pragma unroll 1
    for (int first = blockIdx.y * kROWS; first < p.link.rows; first += gridDim.y * kROWS)
    {
        RowNorm<T, kROWS> rowNorm;
        rowNorm.load(p.link, first + rowNorm.firstRow(), p.link.rows);
        auto const pass = Pass<kROWS>::load(p.link, first);
        if (pass.active == 0)
        {
            continue;
        }
        rowNorm.take();
        size_t const headSize = static_cast<size_t>(p.capacity) * kHEAD_DIM;
        int const row = kDEAL ? warp / kROW_WARPS * kBLOCKS + rank : 0;
        bool const attends = row < pass.count && pass.isActive(row);
        int const position = pass.positionOf(attends ? row : 0);
        size_t const cache = ((first + row) * static_cast<size_t>(p.heads) + head) * headSize;
        T* const allKeys = static_cast<T*>(p.keys) + cache;
        T* const allValues = static_cast<T*>(p.values) + cache;
        auto const caches =
            cachesOf<kBEAMS>(p.owners, first + row, p.capacity, static_cast<ptrdiff_t>(headSize) * p.heads);
        // The cache is on its way while the query is computed.
        HeadKeys held;
        held.load(allKeys, allValues, 0, attends ? position : 0, caches);
        constants.waitForNorm();
        rowNorm.run(p.link, first, pass.count, p.link.norm == nullptr ? nullptr : norm, hidden, pitch, scales);
        constants.waitForBlob();
        multiplySplit<kROWS, 3>(hidden, pitch, pass.count, qkvWeights, chunks, partial);
        __syncthreads();
        spreadTiles<kROWS, 3, kHEAD_DIM>(partial, qkvBias, pass.count, rank, qkv);
        sm90::clusterSync();

        if (attends)
        {
            int const offset = lane % HeadKeys::kLANES * 8;
            auto const newest = [&](int i)
            { return reinterpret_cast<uint4 const*>(qkv + (row * 3 + i) * kHEAD_DIM + offset); };
            Softmax<T, kHEAD_DIM> softmax;
            softmax.begin(*newest(0));
#pragma unroll 1
            for (int key = 0; key <= position; key += HeadKeys::kSPAN)
            {
                if (key > 0)
                {
                    held.load(allKeys, allValues, key, position, caches);
                }
                insertNewest(held, key, position, newest(1), newest(2));
                softmax.add(held, key, position + 1);
            }
            softmax.finish(partial + warp * kHEAD_DIM, scales + warp);
            // The cache gets the new key and value once.
            if ((kDEAL || rank == 0) && warp % kROW_WARPS == 1 && lane < HeadKeys::kLANES)
            {
                size_t const at = static_cast<size_t>(position) * kHEAD_DIM + offset;
                *reinterpret_cast<uint4*>(allKeys + at) = *newest(1);
                *reinterpret_cast<uint4*>(allValues + at) = *newest(2);
            }
        }
        __syncthreads();
        if (threadIdx.x < kMINE * kHEAD_DIM / 4)
        {
            int const mine = threadIdx.x / (kHEAD_DIM / 4);
            int const element = threadIdx.x % (kHEAD_DIM / 4) * 4;
            int const of = kDEAL ? mine * kBLOCKS + rank : 0;
            if (of < pass.count && pass.isActive(of))
            {
                float2 scale;
                float4 const sum = combine<kROW_WARPS>(partial + mine * kROW_WARPS * kHEAD_DIM + element, kHEAD_DIM,
                                                       scales + mine * kROW_WARPS, scale);
                float const factor = 1.0F / scale.y;
                uint2 const bits = {packPair<T>(sum.x * factor, sum.y * factor),
                                    packPair<T>(sum.z * factor, sum.w * factor)};
                T* const to = context + of * kCONTEXT_PITCH + element;
#pragma unroll
                for (int other = 0; other < (kDEAL ? kBLOCKS : 1); ++other)
                {
                    *reinterpret_cast<uint2*>(kDEAL ? sm90::atRank(to, other) : to) = bits;
                }
            }
        }
        if constexpr (kDEAL)
        {
            sm90::clusterSync();
        }
        else
        {
            __syncthreads();
        }
        multiplyToSums<kROWS, kHEAD_DIM / kCHUNK>(p.link, pass, context, kCONTEXT_PITCH, outWeights, columns / 8,
                                                  rank * columns, head == 0 ? outBias : nullptr, hidden, pitch,
                                                  head % (columns / 8));
        __syncthreads();
    }
    clearSums(p.link);
    // Where nothing was left to do, copies may be under way into shared memory that soon belongs to another block.
    constants.waitForNorm();
    constants.waitForBlob();
}

// ---- cross-attention ----

struct CrossParams
{
    Link link;
    uint8_t const* blobs;  //!< this layer's
    void const* keys;      //!< T [lines, H, S, d]
    void const* values;
    int heads;
    int length;  //!< S
};

//! sums += W_out attention(W_q h) + b + h. A cluster a head; a block computes eight columns of the query, and attends
//! to its part of the keys for every row.
template <typename T, int kHEAD_DIM, int kROWS>
__global__ void __launch_bounds__(kTHREADS, 2) crossAttention(CrossParams p)
{
    constexpr int kBLOCKS = kHEAD_DIM / 8;
    constexpr int kAT_ONCE = kROWS < kWARPS ? kROWS : kWARPS;  // rows
    constexpr int kROW_WARPS = kWARPS / kAT_ONCE;
    // One row: all keys of a block at 577 tokens. More: a part, while the next part is on its way.
    using HeadKeys = Keys<T, kHEAD_DIM, kROW_WARPS, kROWS == 1 ? 3 : 4>;
    TROCR_DYNAMIC_SHARED(shared, 128);
    int const rank = blockIdx.x % kBLOCKS;
    int const head = blockIdx.x / kBLOCKS;
    int const warp = threadIdx.x / kWARP_SIZE;
    int const lane = threadIdx.x % kWARP_SIZE;
    int const width = p.link.width;
    int const chunks = width / kCHUNK;
    int const columns = width / kBLOCKS;

    CrossLayout const layout(kHEAD_DIM, width, min(kROWS, p.link.rows), kROWS);
    auto* const norm = reinterpret_cast<T*>(shared + layout.norm);
    auto* const queryBias = reinterpret_cast<float*>(shared + layout.blob);
    auto* const outBias = queryBias + 8;
    auto* const queryWeights = reinterpret_cast<T*>(outBias + columns);
    auto* const outWeights = queryWeights + 8 * width;
    auto* const hidden = reinterpret_cast<T*>(shared + layout.hidden);
    auto* const partial = reinterpret_cast<float*>(shared + layout.partial);  // products, then contexts [row, warp][d]
    auto* const scales = reinterpret_cast<float2*>(shared + layout.scales);   // [row, warp]; before that RowNorm's
    auto* const query = reinterpret_cast<T*>(shared + layout.exchange);       // [row][d], written by the cluster
    auto* const parts = reinterpret_cast<float*>(shared + layout.parts);      // [row][block][d], likewise
    auto* const partScales = reinterpret_cast<float2*>(shared + layout.partScales);  // [row][block], likewise
    auto* const context = reinterpret_cast<T*>(shared + layout.context);
    int const pitch = rowPitch<T>(width);
    constexpr int kCONTEXT_PITCH = rowPitch<T>(kHEAD_DIM);

    sm90::launchDependents();
    Constants const constants =
        Constants::fetch(reinterpret_cast<uint64_t*>(shared), norm, p.link.norm, 2 * width * sizeof(T), queryBias,
                         p.blobs + blockIdx.x * layout.blobBytes, layout.blobBytes);
    sm90::clusterSyncRelaxed();  // every block of the cluster runs: its shared memory may be written

    int const firstKey = p.length * rank / kBLOCKS;
    int const lastKey = p.length * (rank + 1) / kBLOCKS;
    if constexpr (kROWS == 1)
    {
        // Keys and values of the line that the row seems to have are to come before the next kernel's weights, all of
        // which are asked for as soon as blocks of that find room. Other lines' are too many to have any use of it.
        if (threadIdx.x == 0)
        {
            int const line = sm90::loadEarly(reinterpret_cast<int2 const*>(p.link.states) + blockIdx.y).x;
            if (line >= 0)
            {
                size_t const at = ((static_cast<size_t>(line) * p.heads + head) * p.length + firstKey) * kHEAD_DIM;
                uint32_t const bytes = (lastKey - firstKey) * kHEAD_DIM * sizeof(T);
                sm90::prefetchBulk(static_cast<T const*>(p.keys) + at, bytes);
                sm90::prefetchBulk(static_cast<T const*>(p.values) + at, bytes);
            }
        }
    }

    sm90::waitForPriorGrids();

#pragma unroll 1
    for (int first = blockIdx.y * kROWS; first < p.link.rows; first += gridDim.y * kROWS)
    {
        RowNorm<T, kROWS> rowNorm;
        rowNorm.load(p.link, first + rowNorm.firstRow(), p.link.rows);
        auto const pass = Pass<kROWS>::load(p.link, first);
        if (pass.active == 0)
        {
            continue;
        }
        rowNorm.take();
        auto const nextRow = [&](int row)
        {
            do
            {
                row += kAT_ONCE;
            } while (row < pass.count && !pass.isActive(row));
            return row;
        };
        auto const fetch = [&](HeadKeys& keys, int row, int key)
        {
            size_t const at = (static_cast<size_t>(pass.lineOf(row)) * p.heads + head) * p.length * kHEAD_DIM;
            keys.load(static_cast<T const*>(p.keys) + at, static_cast<T const*>(p.values) + at, key, lastKey);
        };
        // The warp's first keys are on their way while the query is computed, later ones while earlier are worked on.
        int row = nextRow(warp / kROW_WARPS - kAT_ONCE);
        int key = firstKey;
        HeadKeys held;
        if (row < pass.count)
        {
            fetch(held, row, key);
        }
        constants.waitForNorm();
        rowNorm.run(p.link, first, pass.count, norm, hidden, pitch, scales);
        constants.waitForBlob();
        multiplySplit<kROWS, 1>(hidden, pitch, pass.count, queryWeights, chunks, partial);
        __syncthreads();
        spreadTiles<kROWS, 1, kHEAD_DIM>(partial, queryBias, pass.count, rank, query);
        sm90::clusterSync();

        Softmax<T, kHEAD_DIM> softmax;
        auto const begin = [&](int of)
        { softmax.begin(*reinterpret_cast<uint4 const*>(query + of * kHEAD_DIM + lane % HeadKeys::kLANES * 8)); };
        if (row < pass.count)
        {
            begin(row);
        }
        if constexpr (kROWS == 1)
        {
#pragma unroll 1
            for (; key < lastKey; key += HeadKeys::kSPAN)
            {
                if (key > firstKey)
                {
                    fetch(held, 0, key);
                }
                softmax.add(held, key, lastKey);
            }
            softmax.finish(partial + warp * kHEAD_DIM, scales + warp);
        }
        else
        {
#pragma unroll 1
            while (row < pass.count)
            {
                bool const ends = key + HeadKeys::kSPAN >= lastKey;
                int const followingRow = ends ? nextRow(row) : row;
                int const followingKey = ends ? firstKey : key + HeadKeys::kSPAN;
                HeadKeys following;
                if (followingRow < pass.count)
                {
                    fetch(following, followingRow, followingKey);
                }
                softmax.add(held, key, lastKey);
                if (ends)
                {
                    int const at = row * kROW_WARPS + warp % kROW_WARPS;
                    softmax.finish(partial + at * kHEAD_DIM, scales + at);
                    if (followingRow < pass.count)
                    {
                        begin(followingRow);
                    }
                }
                held = following;
                row = followingRow;
                key = followingKey;
            }
        }
        __syncthreads();
        // The block's context of its keys, to every block of the cluster.
#pragma unroll 1
        for (int i = threadIdx.x; i < pass.count * kHEAD_DIM / 4; i += kTHREADS)
        {
            int const of = i / (kHEAD_DIM / 4);
            int const element = i % (kHEAD_DIM / 4) * 4;
            if (pass.isActive(of))
            {
                float2 scale;
                float4 const sum = combine<kROW_WARPS>(partial + of * kROW_WARPS * kHEAD_DIM + element, kHEAD_DIM,
                                                       scales + of * kROW_WARPS, scale);
#pragma unroll
                for (int other = 0; other < kBLOCKS; ++other)
                {
                    *reinterpret_cast<float4*>(
                        sm90::atRank(parts + (of * kBLOCKS + rank) * kHEAD_DIM + element, other)) = sum;
                    if (element == 0)
                    {
                        *sm90::atRank(partScales + of * kBLOCKS + rank, other) = scale;
                    }
                }
            }
        }
        sm90::clusterSync();
#pragma unroll 1
        for (int i = threadIdx.x; i < pass.count * kHEAD_DIM / 4; i += kTHREADS)
        {
            int const of = i / (kHEAD_DIM / 4);
            int const element = i % (kHEAD_DIM / 4) * 4;
            if (pass.isActive(of))
            {
                float2 scale;
                float4 const sum = combine<kBLOCKS>(parts + of * kBLOCKS * kHEAD_DIM + element, kHEAD_DIM,
                                                    partScales + of * kBLOCKS, scale);
                float const factor = 1.0F / scale.y;
                *reinterpret_cast<uint2*>(context + of * kCONTEXT_PITCH + element) = {
                    packPair<T>(sum.x * factor, sum.y * factor), packPair<T>(sum.z * factor, sum.w * factor)};
            }
        }
        __syncthreads();
        multiplyToSums<kROWS, kHEAD_DIM / kCHUNK>(p.link, pass, context, kCONTEXT_PITCH, outWeights, columns / 8,
                                                  rank * columns, head == 0 ? outBias : nullptr, hidden, pitch,
                                                  head % (columns / 8));
        __syncthreads();
    }
    clearSums(p.link);
    // Where nothing was left to do, copies may be under way into shared memory that soon belongs to another block.
    constants.waitForNorm();
    constants.waitForBlob();
}

// ---- feed-forward ----

struct FeedForwardParams
{
    Link link;
    uint8_t const* blobs;  //!< this layer's
    float const* bias;     //!< [D], of the second product
    bool gelu;
};

//! sums += W_2 activation(W_1 h + b_1) + b_2 + h. A block has 32 of the inner columns, from first to second product.
template <typename T, int kHEAD_DIM, int kROWS>
__global__ void __launch_bounds__(kTHREADS, kROWS == 1 ? 2 : 1) feedForward(FeedForwardParams p)
{
    TROCR_DYNAMIC_SHARED(shared, 128);
    int const width = p.link.width;
    int const chunks = width / kCHUNK;

    FeedForwardLayout const layout(width, min(kROWS, p.link.rows), kROWS);
    auto* const norm = reinterpret_cast<T*>(shared + layout.norm);
    auto* const innerBias = reinterpret_cast<float*>(shared + layout.blob);
    auto* const firstWeights = reinterpret_cast<T*>(innerBias + kCHUNK);
    auto* const secondWeights = firstWeights + kCHUNK * width;
    auto* const hidden = reinterpret_cast<T*>(shared + layout.hidden);
    auto* const partial = reinterpret_cast<float*>(shared + layout.partial);
    auto* const inner = reinterpret_cast<T*>(shared + layout.inner);       // [row][32]; before that RowNorm's
    auto* const outBias = reinterpret_cast<float*>(shared + layout.bias);  // of the one block that adds it
    int const pitch = rowPitch<T>(width);
    constexpr int kINNER_PITCH = rowPitch<T>(kCHUNK);

    sm90::launchDependents();
    Constants const constants =
        Constants::fetch(reinterpret_cast<uint64_t*>(shared), norm, p.link.norm, 2 * width * sizeof(T), innerBias,
                         p.blobs + blockIdx.x * layout.blobBytes, layout.blobBytes);
    for (int i = threadIdx.x; blockIdx.x == 0 && i < width; i += kTHREADS)
    {
        outBias[i] = p.bias[i];
    }
    sm90::waitForPriorGrids();

#pragma unroll 1
    for (int first = blockIdx.y * kROWS; first < p.link.rows; first += gridDim.y * kROWS)
    {
        RowNorm<T, kROWS> rowNorm;
        rowNorm.load(p.link, first + rowNorm.firstRow(), p.link.rows);
        auto const pass = Pass<kROWS>::load(p.link, first);
        if (pass.active == 0)
        {
            continue;
        }
        rowNorm.take();
        constants.waitForNorm();
        rowNorm.run(p.link, first, pass.count, norm, hidden, pitch, reinterpret_cast<float2*>(inner));
        constants.waitForBlob();
        multiplySplit<kROWS, 4>(hidden, pitch, pass.count, firstWeights, chunks, partial);
        __syncthreads();
#pragma unroll 1
        for (int i = threadIdx.x; i < pass.count * 16; i += kTHREADS)
        {
            float2 pair = collectPair<kROWS, 4>(partial, i / 16, i % 16, innerBias);
            pair.x = p.gelu ? gelu(pair.x) : fmaxf(pair.x, 0.0F);
            pair.y = p.gelu ? gelu(pair.y) : fmaxf(pair.y, 0.0F);
            *reinterpret_cast<unsigned*>(inner + i / 16 * kINNER_PITCH + i % 16 * 2) = packPair<T>(pair.x, pair.y);
        }
        __syncthreads();
        multiplyToSums<kROWS, 1>(p.link, pass, inner, kINNER_PITCH, secondWeights, width / 8, 0,
                                 blockIdx.x == 0 ? outBias : nullptr, hidden, pitch, blockIdx.x * 8 % (width / 8));
        __syncthreads();
    }
    clearSums(p.link);
    // Where nothing was left to do, copies may be under way into shared memory that soon belongs to another block.
    constants.waitForNorm();
    constants.waitForBlob();
}

// ---- head ----

struct HeadParams
{
    Link link;
    void const* weights;  //!< T [tiles, D / 32, 8, 32]
    int vocabulary;
    float4* choices;  //!< [blocks, rows]: best logit, its token (bits), sum of exp(logit - best)
    float* logits;    //!< [rows, V], of a beam search, in place of choices
};

//! Every block chooses among its tokens, a tile of eight a warp, for kROWS rows at once: so often are weights read.
//! kBEAMS: no choice, but all logits.
template <typename T, int kHEAD_DIM, int kROWS, bool kBEAMS>
__global__ void __launch_bounds__(kTHREADS, 1) head(HeadParams p)
{
    constexpr int kTILE_ROWS = kROWS < 16 ? kROWS : 16;
    constexpr int kTILES = kROWS / kTILE_ROWS;
    // Tiles of tokens at a time: what a warp reads of many rows, it multiplies with both.
    constexpr int kTOKEN_TILES = kTILES > 1 ? 2 : 1;
    constexpr int kBATCH = kTILES > 2 ? 4 : 8;  // chunks in registers, and as many on their way
    TROCR_DYNAMIC_SHARED(shared, 128);
    int const warp = threadIdx.x / kWARP_SIZE;
    int const lane = threadIdx.x % kWARP_SIZE;
    int const width = p.link.width;
    int const chunks = width / kCHUNK;
    int const tiles = (p.vocabulary + 7) / 8;
    int const stride = gridDim.x * kWARPS * kTOKEN_TILES;

    HeadLayout const layout(width, min(kROWS, p.link.rows));
    auto* const hidden = reinterpret_cast<T*>(shared + layout.hidden);
    auto* const norm = reinterpret_cast<unsigned*>(shared + layout.norm);
    auto* const choices = reinterpret_cast<BestLogit*>(shared + layout.choices);  // [warp][row]; before that RowNorm's
    int const pitch = rowPitch<T>(width);

    sm90::launchDependents();
    // Weights are constants: the first are fetched before the kernel before has ended.
    auto const* const weights = static_cast<uint4 const*>(p.weights);
    auto const fetch = [&](uint4(&to)[kTOKEN_TILES][kBATCH], int tile, int batch)
    {
#pragma unroll
        for (int n = 0; n < kTOKEN_TILES; ++n)
        {
#pragma unroll
            for (int i = 0; i < kBATCH; ++i)
            {
                int const chunk = batch * kBATCH + i;
                to[n][i] = tile + n < tiles && chunk < chunks
                               ? __ldg(weights + (static_cast<size_t>(tile + n) * chunks + chunk) * kWARP_SIZE + lane)
                               : uint4{};  // what it is multiplied with counts nothing
            }
        }
    };
    uint4 held[kTOKEN_TILES][kBATCH];
    int const firstTile = (blockIdx.x * kWARPS + warp) * kTOKEN_TILES;
    fetch(held, firstTile, 0);
    for (int i = threadIdx.x; i < width; i += kTHREADS)  // gamma and beta, two elements a word
    {
        norm[i] = static_cast<unsigned const*>(p.link.norm)[i];
    }
    __syncthreads();

    sm90::waitForPriorGrids();

#pragma unroll 1
    for (int first = 0; first < p.link.rows; first += kROWS)
    {
        RowNorm<T, kROWS> rowNorm;
        rowNorm.load(p.link, first + rowNorm.firstRow(), p.link.rows);
        int const count = kROWS == 1 ? 1 : min(kROWS, p.link.rows - first);
        bool active = false;
        for (int row = 0; row < count; row += kWARP_SIZE)
        {
            int const mine = row + threadIdx.x % kWARP_SIZE;
            active |= mine < count && __ldcg(&p.link.states[first + mine].line) >= 0;
        }
        if (!__any_sync(kFULL_WARP, active))
        {
            continue;
        }
        rowNorm.take();
        rowNorm.run(p.link, first, count, reinterpret_cast<T const*>(norm), hidden, pitch,
                    reinterpret_cast<float2*>(choices));
        __syncthreads();  // each warp reads whole rows

        // Rows g and g + 8 of each tile; those behind the last repeat it.
        uint4 const* rowAt[kTILES][2];
#pragma unroll
        for (int m = 0; m < kTILES; ++m)
        {
#pragma unroll
            for (int half = 0; half < 2; ++half)
            {
                int const row = kROWS == 1 ? 0 : min(m * kTILE_ROWS + half * 8 + lane / 4, count - 1);
                rowAt[m][half] = reinterpret_cast<uint4 const*>(hidden + row * pitch) + lane % 4;
            }
        }
        constexpr int kMINE = kROWS > 8 ? 2 * kTILES : 1;  // rows of a lane
        BestLogit best[kMINE];
#pragma unroll
        for (int i = 0; i < kMINE; ++i)
        {
            best[i] = {kNO_SCORE, 0, 0.0F};
        }
#pragma unroll 1
        for (int tile = firstTile; tile < tiles; tile += stride)
        {
            float c[kTILES][kTOKEN_TILES][4] = {};
#pragma unroll 1
            for (int batch = 0; batch * kBATCH < chunks; ++batch)
            {
                uint4 following[kTOKEN_TILES][kBATCH];
                bool const ends = (batch + 1) * kBATCH >= chunks;
                fetch(following, ends ? tile + stride : tile, ends ? 0 : batch + 1);
#pragma unroll
                for (int i = 0; i < kBATCH; ++i)
                {
                    // Without a branch, so that reads go ahead of products: behind the last chunk it is read again.
                    int const chunk = min(batch * kBATCH + i, chunks - 1);
#pragma unroll
                    for (int m = 0; m < kTILES; ++m)
                    {
                        Activations const rows{rowAt[m][0][chunk * (kCHUNK / 8)],
                                               kROWS > 8 ? rowAt[m][1][chunk * (kCHUNK / 8)] : uint4{}};
#pragma unroll
                        for (int n = 0; n < kTOKEN_TILES; ++n)
                        {
                            multiplyChunk<T>(c[m][n], rows, held[n][i]);
                        }
                    }
                }
#pragma unroll
                for (int n = 0; n < kTOKEN_TILES; ++n)
                {
#pragma unroll
                    for (int i = 0; i < kBATCH; ++i)
                    {
                        held[n][i] = following[n][i];
                    }
                }
            }
#pragma unroll
            for (int n = 0; n < kTOKEN_TILES; ++n)
            {
                int const token = (tile + n) * 8 + lane % 4 * 2;
#pragma unroll
                for (int m = 0; m < kTILES; ++m)
                {
#pragma unroll
                    for (int i = 0; i < (kROWS > 8 ? 4 : 2); ++i)
                    {
                        if constexpr (kBEAMS)
                        {
                            int const row = (2 * m + i / 2) * 8 + lane / 4;
                            if (token + i % 2 < p.vocabulary && row < count)
                            {
                                p.logits[static_cast<size_t>(first + row) * p.vocabulary + token + i % 2] = c[m][n][i];
                            }
                        }
                        else if (token + i % 2 < p.vocabulary)
                        {
                            best[2 * m + i / 2].take(c[m][n][i], token + i % 2);
                        }
                    }
                }
            }
        }
        if constexpr (!kBEAMS)
        {
#pragma unroll
            for (int i = 0; i < kMINE; ++i)
            {
                best[i].merge(best[i].shuffled(1));
                best[i].merge(best[i].shuffled(2));
                int const row = i * 8 + lane / 4;
                if (lane % 4 == 0 && row < count)
                {
                    choices[warp * count + row] = best[i];
                }
            }
            __syncthreads();
            for (int row = threadIdx.x; row < count; row += kTHREADS)
            {
                BestLogit choice = choices[row];
#pragma unroll 1
                for (int other = 1; other < kWARPS; ++other)
                {
                    choice.merge(choices[other * count + row]);
                }
                p.choices[static_cast<size_t>(blockIdx.x) * p.link.rows + first + row] = {
                    choice.best, __int_as_float(choice.token), choice.total, 0.0F};
            }
        }
        __syncthreads();
        if (first + kROWS < p.link.rows)
        {
            fetch(held, firstTile, 0);  // again
        }
    }
}

// ---- next token ----

constexpr int kCHOOSERS_A_LANE = 8;  //!< of `next`: up to 256 multiprocessors

struct NextParams
{
    State state;
    float4 const* choices;  //!< of `head`
    int choosers;           //!< its blocks
    int rows;
    int lines;
    int width;
    int maxNewTokens;
    int startId;
    int padId;
    int endIds[kMAX_END_IDS];
    int ends;
    float embedScale;
    void const* embedding;  //!< T [V, D]
    void const* positions;  //!< T [positions, D]
    SumPair* sums;          //!< of the first layer
    SumPair* cleared;       //!< that the first layer adds to
    int* tokens;            //!< [lines, maxNewTokens]
    float* logProbs;        //!< [lines]
    int* lengths;           //!< [lines]
    cudaGraphConditionalHandle conditional;
    bool decides;  //!< this launch ends a turn of the WHILE node
};

//! Sums of the row's newest token: its embedding and its place's.
template <typename T, typename Params>
__device__ __forceinline__ void embed(Params const& p, int row, int input, int position)
{
    auto const* const token = static_cast<T const*>(p.embedding) + static_cast<size_t>(input) * p.width;
    auto const* const place = static_cast<T const*>(p.positions) + static_cast<size_t>(position) * p.width;
#pragma unroll 1
    for (int pair = threadIdx.x; pair < p.width / 2; pair += kTHREADS)
    {
        float2 const a = unpackPair<T>(reinterpret_cast<unsigned const*>(token)[pair]);
        float2 const b = unpackPair<T>(reinterpret_cast<unsigned const*>(place)[pair]);
        p.sums[static_cast<size_t>(row) * p.width / 2 + pair] =
            toSum(a.x * p.embedScale + b.x, a.y * p.embedScale + b.y);
    }
}

//! Gives every row a line and embeds the start token; clears what the search counts and writes. A block a row.
template <typename T>
__global__ void __launch_bounds__(kTHREADS) begin(NextParams p)
{
    int const row = blockIdx.x;
    sm90::launchDependents();
    sm90::waitForPriorGrids();
    int const thread = row * kTHREADS + threadIdx.x;
    for (int i = thread; i < p.lines * p.maxNewTokens; i += gridDim.x * kTHREADS)
    {
        p.tokens[i] = p.padId;
    }
    for (int line = thread; line < p.lines; line += gridDim.x * kTHREADS)
    {
        p.logProbs[line] = 0.0F;
        p.lengths[line] = 0;
    }
    if (threadIdx.x == 0)
    {
        p.state.rows[row] = {row < p.lines ? row : -1, 0};
        if (row == 0)
        {
            *p.state.next = p.rows;
            *p.state.remaining = p.lines;
            *p.state.arrived = 0;
        }
    }
    embed<T>(p, row, p.startId, 0);
    for (int pair = threadIdx.x; pair < p.width / 2; pair += kTHREADS)
    {
        p.cleared[static_cast<size_t>(row) * p.width / 2 + pair] = 0;
    }
}

//! Ends every row's token; a row whose line has ended takes the next line. Then embeds the row's newest token. A block
//! a row.
template <typename T>
__global__ void __launch_bounds__(kTHREADS) next(NextParams p)
{
    __shared__ int input;
    __shared__ int position;
    int const row = blockIdx.x;

    sm90::launchDependents();
    sm90::waitForPriorGrids();
    if (threadIdx.x < kWARP_SIZE)
    {
        int const lane = threadIdx.x;
        int2 const words = sm90::loadEarly(reinterpret_cast<int2 const*>(p.state.rows + row));
        RowState const state{words.x, words.y};
        BestLogit of[kCHOOSERS_A_LANE];
#pragma unroll
        for (int i = 0; i < kCHOOSERS_A_LANE; ++i)
        {
            int const chooser = i * kWARP_SIZE + lane;
            of[i] = {kNO_SCORE, 0, 0.0F};
            if (chooser < p.choosers)
            {
                float4 const choice = __ldcg(p.choices + static_cast<size_t>(chooser) * p.rows + row);
                of[i] = {choice.x, __float_as_int(choice.y), choice.z};
            }
        }
        BestLogit const found = bestOfWarp(of);
        int const token = found.token;

        bool const ends = lane < p.ends && token == p.endIds[min(lane, kMAX_END_IDS - 1)];
        bool const ended = __any_sync(kFULL_WARP, ends) || state.position + 1 == p.maxNewTokens;
        if (lane == 0)
        {
            int newLine = state.line;
            int newInput = state.line < 0 ? -1 : token;
            int newPosition = state.position + 1;
            if (state.line >= 0)
            {
                p.tokens[static_cast<size_t>(state.line) * p.maxNewTokens + state.position] = token;
                atomicAdd(p.logProbs + state.line, -logf(found.total));  // the chosen token's own exponent is 0
                if (ended)
                {
                    p.lengths[state.line] = state.position + 1;
                    newLine = atomicAdd(p.state.next, 1);
                    newLine = newLine < p.lines ? newLine : -1;
                    newInput = newLine >= 0 ? p.startId : -1;
                    newPosition = 0;
                    atomicSub(p.state.remaining, 1);
                }
                p.state.rows[row] = {newLine, newPosition};
            }
            input = newInput;
            position = newPosition;
        }
    }
    __syncthreads();
    if (input >= 0)
    {
        embed<T>(p, row, input, position);
    }
    if (p.decides && threadIdx.x == 0)
    {
        // The block that arrives last knows what all have subtracted.
        if (sm90::countArrival(p.state.arrived) + 1 == static_cast<int>(gridDim.x))
        {
            *p.state.arrived = 0;
            cudaGraphSetConditional(p.conditional, __ldcg(p.state.remaining) > 0 ? 1U : 0U);
        }
    }
}

// ---- a step of a beam search ----

struct EmbedParams
{
    RowState const* rows;  //!< [rows]
    int const* inputs;     //!< [rows]
    int width;
    float embedScale;
    void const* embedding;  //!< T [V, D]
    void const* positions;  //!< T [positions, D]
    SumPair* sums;          //!< of the first layer
    SumPair* cleared;       //!< that the first layer adds to
};

//! Embeds every row's newest token. A block a row.
template <typename T>
__global__ void __launch_bounds__(kTHREADS) embedRows(EmbedParams p)
{
    int const row = blockIdx.x;
    sm90::launchDependents();
    sm90::waitForPriorGrids();
    int2 const words = sm90::loadEarly(reinterpret_cast<int2 const*>(p.rows + row));
    RowState const state{words.x, words.y};
    if (state.line >= 0)
    {
        embed<T>(p, row, __ldcg(p.inputs + row), state.position);
    }
    for (int pair = threadIdx.x; pair < p.width / 2; pair += kTHREADS)
    {
        p.cleared[static_cast<size_t>(row) * p.width / 2 + pair] = 0;
    }
}

}  // namespace trocr::decoder
