#pragma once

#include "greedy_decode/kernel.h"

//! How the weights lie in memory; runtime/greedy_weights.py packs them so.
//!
//! A tile is the weights of 8 outputs: for each group of 32 inputs 512 bytes, of which lane 4 g + t has the 16 bytes
//! w[output g][inputs 8 t .. 8 t + 7], and then 8 float biases. A block's tiles lie in the order in which it uses them.

#if defined(__CUDACC__)
#define TROCR_HOST_DEVICE __host__ __device__
#else
#define TROCR_HOST_DEVICE
#endif

namespace trocr::greedy
{

constexpr int kTILE = 8;                     // outputs
constexpr int kGROUP = 32;                   // inputs
constexpr int kGROUP_BYTES = kTILE * kGROUP * 2;
constexpr int kBIAS_BYTES = kTILE * 4;
constexpr int kSLAB = 1024;                  // inputs of a stage: longer tiles come in several
constexpr int kSTAGE_BYTES = kSLAB * kTILE * 2 + 128; // a slab and its biases, or as many tiles as fit

TROCR_HOST_DEVICE constexpr int divideUp(int numerator, int denominator)
{
    return (numerator + denominator - 1) / denominator;
}

//! One block's share of a product: `tiles` tiles of `depth` inputs.
struct Share
{
    int tiles;
    int depth;

    TROCR_HOST_DEVICE constexpr int tileBytes() const
    {
        return depth / kGROUP * kGROUP_BYTES + kBIAS_BYTES;
    }

    TROCR_HOST_DEVICE constexpr int slabs() const
    {
        return divideUp(depth, kSLAB);
    }

    //! Tiles that a stage holds; 1 when a tile takes several stages.
    TROCR_HOST_DEVICE constexpr int stageTiles() const
    {
        return slabs() > 1 ? 1 : kSTAGE_BYTES / tileBytes();
    }

    TROCR_HOST_DEVICE constexpr int stages() const
    {
        return divideUp(tiles, stageTiles()) * slabs();
    }

    //! Bytes of stage `index` of the share.
    TROCR_HOST_DEVICE constexpr int stageBytes(int index) const
    {
        if (slabs() == 1)
        {
            int const rest = tiles - index * stageTiles();
            return (rest < stageTiles() ? rest : stageTiles()) * tileBytes();
        }
        int const slab = index % slabs();
        return slab < slabs() - 1 ? kSLAB / kGROUP * kGROUP_BYTES
                                  : tileBytes() - (slabs() - 1) * (kSLAB / kGROUP * kGROUP_BYTES);
    }

    TROCR_HOST_DEVICE constexpr size_t bytes() const
    {
        return static_cast<size_t>(tiles) * tileBytes();
    }
};

//! The products of a layer in order, and the head, as one block of a plan sees them.
//!
//! In a cluster (several teams) a block computes whole heads' queries, keys and values, so that attention needs no barrier
//! before it; teamBlocks / H blocks compute the same. In the grid as one team, tiles are dealt out evenly.
struct Shares
{
    Share qkv, selfOutput, query, fc1, fc2, head; // the output of cross-attention has the shares of self-attention's

    TROCR_HOST_DEVICE Shares(GreedyDecoderShape const& shape, GreedyDecodePlan const& plan)
    {
        int const d = shape.dModel;
        int const blocks = plan.teamBlocks;
        bool const byHead = plan.teamBlocks < plan.blocks;
        auto const even = [blocks](int outputs) { return divideUp(outputs / kTILE, blocks); };
        qkv = {byHead ? 3 * shape.headDim / kTILE : even(3 * d), d};
        selfOutput = {even(d), d};
        query = {byHead ? shape.headDim / kTILE : even(d), d};
        fc1 = {even(shape.ffnDim), d};
        fc2 = {even(d), shape.ffnDim};
        head = {divideUp(divideUp(shape.vocabSize, kTILE), plan.blocks), d};
    }

    TROCR_HOST_DEVICE size_t layerBytes() const
    {
        return qkv.bytes() + 2 * selfOutput.bytes() + query.bytes() + fc1.bytes() + fc2.bytes();
    }
};

} // namespace trocr::greedy
