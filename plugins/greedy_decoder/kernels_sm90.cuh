#pragma once

// The kernels of one decoder step: `next` (end the token before, embed the new one), then for every layer `selfAttention`,
// `crossAttention` and `feedForward`, then `head`. README.md draws the chain.

#include "greedy_decoder/blocks_sm90.cuh"
#include "greedy_decoder/layout.h"

namespace trocr::greedy
{

//! What the search keeps in global memory besides caches and sums.
struct State
{
    int* lines;     //!< [slots]
    int* positions; //!< [slots]
    int* next;      //!< the first line that no row has taken yet
    int* remaining; //!< lines not yet ended
    int* arrived;   //!< blocks of `next` that are done
};

// ---- self-attention ----

struct SelfParams
{
    Link link;
    uint8_t const* blobs; //!< this layer's
    void* keys;           //!< T [slots, H, capacity, d]
    void* values;
    int heads;
    int capacity;
};

//! sums += W_out attention(W_qkv h) + b + h, h = LayerNorm(sums before). A cluster a head; a block computes eight columns
//! each of the head's query, key and value, and gives them to its cluster.
template <typename T, int kHEAD_DIM>
__global__ void __launch_bounds__(kTHREADS) selfAttention(SelfParams p)
{
    using HeadKeys = Keys<T, kHEAD_DIM, kHEAD_DIM / 32>;
    constexpr int kBLOCKS = kHEAD_DIM / 8;      // of a cluster
    constexpr int kMAX_MINE = kROWS / kBLOCKS;  // rows that a block attends for
    static_assert(kMAX_MINE >= 2);
    extern __shared__ __align__(128) uint8_t shared[];
    int const rank = blockIdx.x % kBLOCKS;
    int const head = blockIdx.x / kBLOCKS;
    int const warp = threadIdx.x / kWARP_SIZE;
    int const lane = threadIdx.x % kWARP_SIZE;
    int const width = p.link.width;
    int const chunks = width / kCHUNK;
    int const columns = width / kBLOCKS;

    SelfLayout const layout(kHEAD_DIM, width, min(kROWS, p.link.rows));
    auto* const norm = reinterpret_cast<T*>(shared + layout.norm);
    auto* const qkvBias = reinterpret_cast<float*>(shared + layout.blob);
    auto* const outBias = qkvBias + 24;
    auto* const qkvWeights = reinterpret_cast<T*>(outBias + columns);
    auto* const outWeights = qkvWeights + 24 * width;
    auto* const hidden = reinterpret_cast<T*>(shared + layout.hidden);
    auto* const partial = reinterpret_cast<float*>(shared + layout.partial); // products, then contexts
    auto* const scales = reinterpret_cast<float2*>(shared + layout.scales);  // [warp][row]
    auto* const qkv = reinterpret_cast<T*>(shared + layout.exchange);        // [row][3][d], written by the cluster
    auto* const context = reinterpret_cast<T*>(shared + layout.context);     // [row][d], likewise
    int const pitch = rowPitch<T>(width);
    constexpr int kCONTEXT_PITCH = rowPitch<T>(kHEAD_DIM);

    sm90::launchDependents();
    Constants const constants = Constants::fetch(reinterpret_cast<uint64_t*>(shared), norm, p.link.norm,
        2 * width * sizeof(T), qkvBias, p.blobs + blockIdx.x * layout.blobBytes, layout.blobBytes);
    clusterArriveRelaxed();
    sm90::waitForPriorGrids();
    bool const done = __ldcg(p.link.remaining) == 0;
    clusterWait(); // every block of the cluster runs: its shared memory may be written
    if (done)
    {
        constants.waitForNorm();
        constants.waitForBlob();
        return;
    }
    clearSums(p.link);

    for (int first = blockIdx.y * kROWS; first < p.link.rows; first += gridDim.y * kROWS)
    {
        Pass const pass = Pass::load(p.link, first);
        if (pass.active == 0)
        {
            continue;
        }
        // With few rows every block attends for all of them; with more they are dealt out to the cluster.
        bool const deal = pass.count > 2;
        int const firstRow = deal ? rank : 0;
        int const step = deal ? kBLOCKS : 1;
        size_t const headSize = static_cast<size_t>(p.capacity) * kHEAD_DIM;
        auto const cacheOf = [&](int row) { return ((first + row) * static_cast<size_t>(p.heads) + head) * headSize; };
        auto* const allKeys = static_cast<T*>(p.keys);
        auto* const allValues = static_cast<T*>(p.values);

        // The cache is on its way while the query is computed.
        HeadKeys held[kMAX_MINE];
#pragma unroll
        for (int mine = 0; mine < kMAX_MINE; ++mine)
        {
            int const row = firstRow + mine * step;
            if (row < pass.count)
            {
                held[mine].load(allKeys + cacheOf(row), allValues + cacheOf(row), 0, pass.positionOf(row));
            }
        }

        constants.waitForNorm();
        normRows<T>(p.link, first, pass.count, p.link.norm == nullptr ? nullptr : norm, hidden, pitch);
        __syncthreads();
        constants.waitForBlob();
        multiplySplit<T, 3>(hidden, pitch, pass.count, qkvWeights, chunks, partial);
        __syncthreads();
        for (int i = threadIdx.x; i < pass.count * 3 * kBLOCKS; i += kTHREADS)
        {
            int const to = i % kBLOCKS;
            int const part = i / kBLOCKS % 3;
            int const row = i / (3 * kBLOCKS);
            float sums[8];
            collectOutputs<3>(sums, partial, row, part, qkvBias);
            *reinterpret_cast<uint4*>(atRank(qkv + (row * 3 + part) * kHEAD_DIM + rank * 8, to)) = packEight<T>(sums);
        }
        sm90::clusterSync();

#pragma unroll
        for (int mine = 0; mine < kMAX_MINE; ++mine)
        {
            int const row = firstRow + mine * step;
            if (row >= pass.count || !pass.isActive(row))
            {
                continue;
            }
            int const position = pass.positionOf(row);
            size_t const cache = cacheOf(row);
            int const offset = lane % HeadKeys::kLANES * 8;
            T const* const newest = qkv + row * 3 * kHEAD_DIM + offset;
            auto const newKey = *reinterpret_cast<uint4 const*>(newest + kHEAD_DIM);
            auto const newValue = *reinterpret_cast<uint4 const*>(newest + 2 * kHEAD_DIM);
            Softmax<T, kHEAD_DIM> softmax;
            softmax.begin(*reinterpret_cast<uint4 const*>(newest));
            if (position > 0)
            {
                softmax.add(held[mine], 0, position);
            }
            for (int key = HeadKeys::kSPAN; key < position; key += HeadKeys::kSPAN)
            {
                HeadKeys more;
                more.load(allKeys + cache, allValues + cache, key, position);
                softmax.add(more, key, position);
            }
            if (warp == 0)
            {
                softmax.addOne(newKey, newValue);
            }
            softmax.finish(partial + (mine * kWARPS + warp) * kHEAD_DIM, scales + mine * kWARPS + warp);
            // The cache gets the new key and value once.
            if (warp == 1 && lane < HeadKeys::kLANES && row % kBLOCKS == rank)
            {
                size_t const at = cache + static_cast<size_t>(position) * kHEAD_DIM + offset;
                *reinterpret_cast<uint4*>(allKeys + at) = newKey;
                *reinterpret_cast<uint4*>(allValues + at) = newValue;
            }
        }
        __syncthreads();
        for (int i = threadIdx.x; i < kMAX_MINE * kHEAD_DIM / 4; i += kTHREADS)
        {
            int const mine = i / (kHEAD_DIM / 4);
            int const element = i % (kHEAD_DIM / 4) * 4;
            int const row = firstRow + mine * step;
            if (row >= pass.count || !pass.isActive(row))
            {
                continue;
            }
            float2 scale;
            float4 const sum = combine(partial + mine * kWARPS * kHEAD_DIM + element, kHEAD_DIM,
                scales + mine * kWARPS, 1, kWARPS, scale);
            float const factor = 1.0F / scale.y;
            uint2 const bits = {packPair<T>(sum.x * factor, sum.y * factor), packPair<T>(sum.z * factor, sum.w * factor)};
            T* const to = context + row * kCONTEXT_PITCH + element;
            if (deal)
            {
                for (int other = 0; other < kBLOCKS; ++other)
                {
                    *reinterpret_cast<uint2*>(atRank(to, other)) = bits;
                }
            }
            else
            {
                *reinterpret_cast<uint2*>(to) = bits;
            }
        }
        if (deal)
        {
            sm90::clusterSync();
        }
        else
        {
            __syncthreads();
        }
        multiplyToSums<T>(p.link, pass, context, kCONTEXT_PITCH, outWeights, kHEAD_DIM / kCHUNK, columns / 8,
            rank * columns, head == 0 ? outBias : nullptr, hidden, pitch);
        __syncthreads();
    }
}

// ---- cross-attention ----

struct CrossParams
{
    Link link;
    uint8_t const* blobs; //!< this layer's
    void const* keys;     //!< T [lines, H, S, d]
    void const* values;
    int heads;
    int length; //!< S
};

//! sums += W_out attention(W_q h) + b + h. A cluster a head; a block computes eight columns of the query, and attends to its
//! part of the keys for every row.
template <typename T, int kHEAD_DIM>
__global__ void __launch_bounds__(kTHREADS) crossAttention(CrossParams p)
{
    using HeadKeys = Keys<T, kHEAD_DIM, 3>; // all keys of a block at 577 tokens
    constexpr int kBLOCKS = kHEAD_DIM / 8;
    extern __shared__ __align__(128) uint8_t shared[];
    int const rank = blockIdx.x % kBLOCKS;
    int const head = blockIdx.x / kBLOCKS;
    int const warp = threadIdx.x / kWARP_SIZE;
    int const lane = threadIdx.x % kWARP_SIZE;
    int const width = p.link.width;
    int const chunks = width / kCHUNK;
    int const columns = width / kBLOCKS;

    CrossLayout const layout(kHEAD_DIM, width, min(kROWS, p.link.rows));
    auto* const norm = reinterpret_cast<T*>(shared + layout.norm);
    auto* const queryBias = reinterpret_cast<float*>(shared + layout.blob);
    auto* const outBias = queryBias + 8;
    auto* const queryWeights = reinterpret_cast<T*>(outBias + columns);
    auto* const outWeights = queryWeights + 8 * width;
    auto* const hidden = reinterpret_cast<T*>(shared + layout.hidden);
    auto* const partial = reinterpret_cast<float*>(shared + layout.partial); // products, then contexts [row][warp][d]
    auto* const scales = reinterpret_cast<float2*>(shared + layout.scales);  // [row][warp]
    auto* const query = reinterpret_cast<T*>(shared + layout.exchange);      // [row][d], written by the cluster
    auto* const parts = reinterpret_cast<float*>(shared + layout.parts);     // [row][block][d], likewise
    auto* const partScales = reinterpret_cast<float2*>(shared + layout.partScales); // [row][block], likewise
    auto* const context = reinterpret_cast<T*>(shared + layout.context);
    int const pitch = rowPitch<T>(width);
    constexpr int kCONTEXT_PITCH = rowPitch<T>(kHEAD_DIM);

    sm90::launchDependents();
    Constants const constants = Constants::fetch(reinterpret_cast<uint64_t*>(shared), norm, p.link.norm,
        2 * width * sizeof(T), queryBias, p.blobs + blockIdx.x * layout.blobBytes, layout.blobBytes);
    clusterArriveRelaxed();
    sm90::waitForPriorGrids();
    bool const done = __ldcg(p.link.remaining) == 0;
    clusterWait();
    if (done)
    {
        constants.waitForNorm();
        constants.waitForBlob();
        return;
    }
    clearSums(p.link);

    int const firstKey = p.length * rank / kBLOCKS;
    int const lastKey = p.length * (rank + 1) / kBLOCKS;
    for (int first = blockIdx.y * kROWS; first < p.link.rows; first += gridDim.y * kROWS)
    {
        Pass const pass = Pass::load(p.link, first);
        if (pass.active == 0)
        {
            continue;
        }
        auto const offsetOf = [&](int row) {
            return (static_cast<size_t>(pass.lineOf(row)) * p.heads + head) * p.length * kHEAD_DIM;
        };
        auto const nextRow = [&](int row) {
            do
            {
                ++row;
            } while (row < pass.count && !pass.isActive(row));
            return row;
        };
        auto const* const allKeys = static_cast<T const*>(p.keys);
        auto const* const allValues = static_cast<T const*>(p.values);

        // The keys of the first row are on their way while the query is computed, those of the next while a row is.
        int row = nextRow(-1);
        HeadKeys held;
        held.load(allKeys + offsetOf(row), allValues + offsetOf(row), firstKey, lastKey);

        constants.waitForNorm();
        normRows<T>(p.link, first, pass.count, norm, hidden, pitch);
        __syncthreads();
        constants.waitForBlob();
        multiplySplit<T, 1>(hidden, pitch, pass.count, queryWeights, chunks, partial);
        __syncthreads();
        for (int i = threadIdx.x; i < pass.count * kBLOCKS; i += kTHREADS)
        {
            float sums[8];
            collectOutputs<1>(sums, partial, i / kBLOCKS, 0, queryBias);
            *reinterpret_cast<uint4*>(atRank(query + i / kBLOCKS * kHEAD_DIM + rank * 8, i % kBLOCKS))
                = packEight<T>(sums);
        }
        sm90::clusterSync();

        while (row < pass.count)
        {
            int const next = nextRow(row);
            HeadKeys following;
            if (next < pass.count)
            {
                following.load(allKeys + offsetOf(next), allValues + offsetOf(next), firstKey, lastKey);
            }
            Softmax<T, kHEAD_DIM> softmax;
            softmax.begin(
                *reinterpret_cast<uint4 const*>(query + row * kHEAD_DIM + lane % HeadKeys::kLANES * 8));
            softmax.add(held, firstKey, lastKey);
            for (int key = firstKey + HeadKeys::kSPAN; key < lastKey; key += HeadKeys::kSPAN)
            {
                held.load(allKeys + offsetOf(row), allValues + offsetOf(row), key, lastKey);
                softmax.add(held, key, lastKey);
            }
            softmax.finish(partial + (row * kWARPS + warp) * kHEAD_DIM, scales + row * kWARPS + warp);
            held = following;
            row = next;
        }
        __syncthreads();
        // The block's context of its keys, to every block of the cluster.
        for (int i = threadIdx.x; i < pass.count * kHEAD_DIM / 4; i += kTHREADS)
        {
            int const of = i / (kHEAD_DIM / 4);
            int const element = i % (kHEAD_DIM / 4) * 4;
            if (!pass.isActive(of))
            {
                continue;
            }
            float2 scale;
            float4 const sum = combine(
                partial + of * kWARPS * kHEAD_DIM + element, kHEAD_DIM, scales + of * kWARPS, 1, kWARPS, scale);
            for (int other = 0; other < kBLOCKS; ++other)
            {
                *reinterpret_cast<float4*>(atRank(parts + (of * kBLOCKS + rank) * kHEAD_DIM + element, other)) = sum;
                if (element == 0)
                {
                    *atRank(partScales + of * kBLOCKS + rank, other) = scale;
                }
            }
        }
        sm90::clusterSync();
        for (int i = threadIdx.x; i < pass.count * kHEAD_DIM / 4; i += kTHREADS)
        {
            int const of = i / (kHEAD_DIM / 4);
            int const element = i % (kHEAD_DIM / 4) * 4;
            if (!pass.isActive(of))
            {
                continue;
            }
            float2 scale;
            float4 const sum = combine(parts + of * kBLOCKS * kHEAD_DIM + element, kHEAD_DIM,
                partScales + of * kBLOCKS, 1, kBLOCKS, scale);
            float const factor = 1.0F / scale.y;
            *reinterpret_cast<uint2*>(context + of * kCONTEXT_PITCH + element)
                = {packPair<T>(sum.x * factor, sum.y * factor), packPair<T>(sum.z * factor, sum.w * factor)};
        }
        __syncthreads();
        multiplyToSums<T>(p.link, pass, context, kCONTEXT_PITCH, outWeights, kHEAD_DIM / kCHUNK, columns / 8,
            rank * columns, head == 0 ? outBias : nullptr, hidden, pitch);
        __syncthreads();
    }
}

// ---- feed-forward ----

struct FeedForwardParams
{
    Link link;
    uint8_t const* blobs; //!< this layer's
    float const* bias;    //!< [D], of the second product
    bool gelu;
};

//! sums += W_2 activation(W_1 h + b_1) + b_2 + h. A block has 32 of the inner columns, from first to second product.
template <typename T>
__global__ void __launch_bounds__(kTHREADS) feedForward(FeedForwardParams p)
{
    extern __shared__ __align__(128) uint8_t shared[];
    int const width = p.link.width;
    int const chunks = width / kCHUNK;

    FeedForwardLayout const layout(width, min(kROWS, p.link.rows));
    auto* const norm = reinterpret_cast<T*>(shared + layout.norm);
    auto* const innerBias = reinterpret_cast<float*>(shared + layout.blob);
    auto* const firstWeights = reinterpret_cast<T*>(innerBias + kCHUNK);
    auto* const secondWeights = firstWeights + kCHUNK * width;
    auto* const hidden = reinterpret_cast<T*>(shared + layout.hidden);
    auto* const partial = reinterpret_cast<float*>(shared + layout.partial);
    auto* const inner = reinterpret_cast<T*>(shared + layout.inner); // [row][32]
    int const pitch = rowPitch<T>(width);
    constexpr int kINNER_PITCH = rowPitch<T>(kCHUNK);

    sm90::launchDependents();
    Constants const constants = Constants::fetch(reinterpret_cast<uint64_t*>(shared), norm, p.link.norm,
        2 * width * sizeof(T), innerBias, p.blobs + blockIdx.x * layout.blobBytes, layout.blobBytes);
    sm90::waitForPriorGrids();
    if (__ldcg(p.link.remaining) == 0)
    {
        constants.waitForNorm();
        constants.waitForBlob();
        return;
    }
    clearSums(p.link);

    for (int first = blockIdx.y * kROWS; first < p.link.rows; first += gridDim.y * kROWS)
    {
        Pass const pass = Pass::load(p.link, first);
        if (pass.active == 0)
        {
            continue;
        }
        constants.waitForNorm();
        normRows<T>(p.link, first, pass.count, norm, hidden, pitch);
        __syncthreads();
        constants.waitForBlob();
        multiplySplit<T, 4>(hidden, pitch, pass.count, firstWeights, chunks, partial);
        __syncthreads();
        for (int i = threadIdx.x; i < pass.count * 4; i += kTHREADS)
        {
            float sums[8];
            collectOutputs<4>(sums, partial, i / 4, i % 4, innerBias);
#pragma unroll
            for (int j = 0; j < 8; ++j)
            {
                sums[j] = p.gelu ? 0.5F * sums[j] * (1.0F + erff(sums[j] * 0.70710678F)) : fmaxf(sums[j], 0.0F);
            }
            *reinterpret_cast<uint4*>(inner + i / 4 * kINNER_PITCH + i % 4 * 8) = packEight<T>(sums);
        }
        __syncthreads();
        multiplyToSums<T>(p.link, pass, inner, kINNER_PITCH, secondWeights, 1, width / 8, 0,
            blockIdx.x == 0 ? p.bias : nullptr, hidden, pitch);
        __syncthreads();
    }
}

// ---- head ----

struct HeadParams
{
    Link link;
    void const* weights; //!< T [tiles, D / 32, 8, 32]
    int vocabulary;
    float4* choices; //!< [blocks, rows]: best logit, its token (bits), sum of exp(logit - best)
};

//! The best of some logits, the lowest token among equals, and what log softmax needs.
struct Choice
{
    float best;
    int token;
    float total;

    __device__ __forceinline__ void take(float logit, int of)
    {
        if (logit > best)
        {
            total = total * exp2Approx((best - logit) * kLOG2_E) + 1.0F;
            best = logit;
            token = of;
        }
        else
        {
            total += exp2Approx((logit - best) * kLOG2_E);
        }
    }

    __device__ __forceinline__ void merge(Choice const& other)
    {
        bool const better = other.best > best || (other.best == best && other.token < token);
        float const most = fmaxf(best, other.best);
        total = total * exp2Approx((best - most) * kLOG2_E) + other.total * exp2Approx((other.best - most) * kLOG2_E);
        best = most;
        token = better ? other.token : token;
    }

    __device__ __forceinline__ Choice shuffled(int offset) const
    {
        return {__shfl_xor_sync(kFULL_WARP, best, offset), __shfl_xor_sync(kFULL_WARP, token, offset),
            __shfl_xor_sync(kFULL_WARP, total, offset)};
    }
};

//! Every block chooses among its tokens, a tile of eight a warp. kTILES tiles of 16 rows at once: weights are read once.
template <typename T, int kTILES>
__global__ void __launch_bounds__(kTHREADS) head(HeadParams p)
{
    constexpr int kBATCH = 8; // chunks in registers, and as many on their way
    extern __shared__ __align__(128) uint8_t shared[];
    int const warp = threadIdx.x / kWARP_SIZE;
    int const lane = threadIdx.x % kWARP_SIZE;
    int const width = p.link.width;
    int const chunks = width / kCHUNK;
    int const tiles = (p.vocabulary + 7) / 8;
    int const stride = gridDim.x * kWARPS;

    HeadLayout const layout(width, min(kTILES * kROWS, p.link.rows));
    auto* const hidden = reinterpret_cast<T*>(shared + layout.hidden);
    auto* const choices = reinterpret_cast<Choice*>(shared + layout.choices); // [warp][row]
    int const pitch = rowPitch<T>(width);

    sm90::launchDependents();
    // Weights are constants: the first are fetched before the kernel before has ended.
    auto const* const weights = static_cast<uint4 const*>(p.weights);
    auto const fetch = [&](uint4(&to)[kBATCH], int tile, int batch) {
#pragma unroll
        for (int i = 0; i < kBATCH; ++i)
        {
            int const chunk = batch * kBATCH + i;
            if (tile < tiles && chunk < chunks)
            {
                to[i] = __ldg(weights + (static_cast<size_t>(tile) * chunks + chunk) * kWARP_SIZE + lane);
            }
        }
    };
    uint4 held[kBATCH];
    int const firstTile = blockIdx.x * kWARPS + warp;
    fetch(held, firstTile, 0);
    sm90::waitForPriorGrids();
    if (__ldcg(p.link.remaining) == 0)
    {
        return;
    }

    for (int first = 0; first < p.link.rows; first += kTILES * kROWS)
    {
        int const count = min(kTILES * kROWS, p.link.rows - first);
        if (first > 0)
        {
            fetch(held, firstTile, 0);
        }
        normRows<T>(p.link, first, count, static_cast<T const*>(p.link.norm), hidden, pitch);
        __syncthreads();

        Choice best[2 * kTILES];
#pragma unroll
        for (int i = 0; i < 2 * kTILES; ++i)
        {
            best[i] = {kNO_SCORE, 0, 0.0F};
        }
        for (int tile = firstTile; tile < tiles; tile += stride)
        {
            float c[kTILES][4] = {};
            for (int batch = 0; batch * kBATCH < chunks; ++batch)
            {
                uint4 following[kBATCH];
                bool const ends = (batch + 1) * kBATCH >= chunks;
                fetch(following, ends ? tile + stride : tile, ends ? 0 : batch + 1);
#pragma unroll
                for (int i = 0; i < kBATCH; ++i)
                {
                    int const chunk = batch * kBATCH + i;
                    if (chunk < chunks)
                    {
#pragma unroll
                        for (int m = 0; m < kTILES; ++m)
                        {
                            if (m * kROWS < count)
                            {
                                multiplyChunk<T>(c[m],
                                    Activations::load(hidden + m * kROWS * pitch, pitch, count - m * kROWS, chunk),
                                    held[i]);
                            }
                        }
                    }
                }
#pragma unroll
                for (int i = 0; i < kBATCH; ++i)
                {
                    held[i] = following[i];
                }
            }
            int const token = tile * 8 + lane % 4 * 2;
#pragma unroll
            for (int m = 0; m < kTILES; ++m)
            {
#pragma unroll
                for (int i = 0; i < 4; ++i)
                {
                    if (token + i % 2 < p.vocabulary)
                    {
                        best[2 * m + i / 2].take(c[m][i], token + i % 2);
                    }
                }
            }
        }
#pragma unroll
        for (int i = 0; i < 2 * kTILES; ++i)
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
            Choice choice = choices[row];
            for (int other = 1; other < kWARPS; ++other)
            {
                choice.merge(choices[other * count + row]);
            }
            p.choices[static_cast<size_t>(blockIdx.x) * p.link.rows + first + row]
                = {choice.best, __int_as_float(choice.token), choice.total, 0.0F};
        }
        __syncthreads();
    }
}

// ---- next token ----

constexpr int kMAX_END_IDS = 8;

struct NextParams
{
    State state;
    float4 const* choices; //!< of `head`
    int choosers;          //!< its blocks
    int rows;
    int lines;
    int width;
    int maxNewTokens;
    int startId;
    int padId;
    int endIds[kMAX_END_IDS];
    int ends;
    float embedScale;
    void const* embedding; //!< T [V, D]
    void const* positions; //!< T [positions, D]
    SumPair* sums;         //!< of the first layer
    SumPair* cleared;      //!< that the first layer adds to
    int* tokens;           //!< [lines, maxNewTokens]
    float* logProbs;       //!< [lines]
    int* lengths;          //!< [lines]
    cudaGraphConditionalHandle conditional;
    bool decides; //!< this launch ends a turn of the WHILE node
};

//! A block a row. kFIRST: gives every row a line and starts it. Else: ends the row's token; a row whose line has ended
//! takes the next line. Then embeds the row's newest token.
template <typename T, bool kFIRST>
__global__ void __launch_bounds__(kTHREADS) next(NextParams p)
{
    __shared__ Choice warpChoices[kWARPS];
    __shared__ int input;
    __shared__ int position;
    int const row = blockIdx.x;

    sm90::launchDependents();
    sm90::waitForPriorGrids();
    if constexpr (kFIRST)
    {
        for (int i = row * kTHREADS + threadIdx.x; i < p.lines * p.maxNewTokens; i += gridDim.x * kTHREADS)
        {
            p.tokens[i] = p.padId;
        }
        for (int line = row * kTHREADS + threadIdx.x; line < p.lines; line += gridDim.x * kTHREADS)
        {
            p.logProbs[line] = 0.0F;
            p.lengths[line] = 0;
        }
        if (threadIdx.x == 0)
        {
            p.state.lines[row] = row < p.lines ? row : -1;
            p.state.positions[row] = 0;
            position = 0;
            input = row < p.lines ? p.startId : -1;
            if (row == 0)
            {
                *p.state.next = p.rows;
                *p.state.remaining = p.lines;
                *p.state.arrived = 0;
            }
        }
    }
    else
    {
        if (__ldcg(p.state.remaining) == 0 && !p.decides)
        {
            return;
        }
        int const line = __ldcg(p.state.lines + row);
        if (line >= 0)
        {
            int const lane = threadIdx.x % kWARP_SIZE;
            Choice choice{kNO_SCORE, 0x7fffffff, 0.0F};
            for (int i = threadIdx.x; i < p.choosers; i += kTHREADS)
            {
                float4 const found = __ldcg(p.choices + static_cast<size_t>(i) * p.rows + row);
                choice.merge({found.x, __float_as_int(found.y), found.z});
            }
#pragma unroll
            for (int offset = kWARP_SIZE / 2; offset > 0; offset /= 2)
            {
                choice.merge(choice.shuffled(offset));
            }
            if (lane == 0)
            {
                warpChoices[threadIdx.x / kWARP_SIZE] = choice;
            }
        }
        __syncthreads();
        if (threadIdx.x == 0)
        {
            input = -1;
            position = 0;
            if (line >= 0)
            {
                Choice choice = warpChoices[0];
                for (int i = 1; i < kWARPS; ++i)
                {
                    choice.merge(warpChoices[i]);
                }
                int const at = __ldcg(p.state.positions + row);
                p.tokens[static_cast<size_t>(line) * p.maxNewTokens + at] = choice.token;
                p.logProbs[line] -= logf(choice.total); // its own exponent in the softmax is 0
                bool ended = at + 1 == p.maxNewTokens;
                for (int i = 0; i < p.ends; ++i)
                {
                    ended |= choice.token == p.endIds[i];
                }
                if (ended)
                {
                    p.lengths[line] = at + 1;
                    int const newLine = atomicAdd(p.state.next, 1);
                    bool const more = newLine < p.lines;
                    p.state.lines[row] = more ? newLine : -1;
                    input = more ? p.startId : -1;
                    atomicSub(p.state.remaining, 1);
                }
                else
                {
                    input = choice.token;
                    position = at + 1;
                }
                p.state.positions[row] = position;
            }
        }
    }
    __syncthreads();
    if (input >= 0)
    {
        auto const* const token = static_cast<T const*>(p.embedding) + static_cast<size_t>(input) * p.width;
        auto const* const place = static_cast<T const*>(p.positions) + static_cast<size_t>(position) * p.width;
        for (int pair = threadIdx.x; pair < p.width / 2; pair += kTHREADS)
        {
            float2 const a = unpackPair<T>(reinterpret_cast<unsigned const*>(token)[pair]);
            float2 const b = unpackPair<T>(reinterpret_cast<unsigned const*>(place)[pair]);
            p.sums[static_cast<size_t>(row) * p.width / 2 + pair]
                = toSum(a.x * p.embedScale + b.x, a.y * p.embedScale + b.y);
        }
    }
    if constexpr (kFIRST)
    {
        for (int pair = threadIdx.x; pair < p.width / 2; pair += kTHREADS)
        {
            p.cleared[static_cast<size_t>(row) * p.width / 2 + pair] = 0;
        }
    }
    else
    {
        if (p.decides && threadIdx.x == 0)
        {
            __threadfence();
            if (atomicAdd(p.state.arrived, 1) + 1 == static_cast<int>(gridDim.x))
            {
                *p.state.arrived = 0;
                __threadfence();
                cudaGraphSetConditional(p.conditional, __ldcg(p.state.remaining) > 0 ? 1U : 0U);
            }
        }
    }
}

} // namespace trocr::greedy
