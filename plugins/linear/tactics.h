#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

namespace trocr::linear_detail
{

constexpr int ceilDiv(int a, int b)
{
    return (a + b - 1) / b;
}

//! Rows x columns of a tile; README.md says when each is best.
enum class Sm90Tile : int32_t
{
    kPERSISTENT_128X192,
    kPERSISTENT_128X128,
    kPERSISTENT_192X128,
    kSPLIT_64X64,
    kSPLIT_64X128,
    kSPLIT_128X128,
};

struct Sm90Tactic
{
    Sm90Tile tile;
    int32_t rows;
    int32_t columns;
    int32_t split; //!< blocks that share the products of one tile; 0: persistent kernel, in pairs

    // Microseconds on an H200, fitted to tactics-h200.csv:
    float startTime; //!< of a launch
    float tileTime;  //!< of a block's tile beside its products: to begin and to finish it
    float stepTime;  //!< of 64 of K of a block's tile
};

constexpr int kSTEP_INPUTS = 64;

constexpr Sm90Tactic kSM90_TACTICS[] = {
    {Sm90Tile::kPERSISTENT_128X192, 128, 192, 0, 1.80F, 3.08F, 0.61F},
    {Sm90Tile::kPERSISTENT_128X128, 128, 128, 0, 1.82F, 2.32F, 0.45F},
    {Sm90Tile::kPERSISTENT_192X128, 192, 128, 0, 1.68F, 3.31F, 0.66F},
    {Sm90Tile::kSPLIT_64X64, 64, 64, 1, 1.04F, 2.02F, 0.14F},
    {Sm90Tile::kSPLIT_64X64, 64, 64, 2, 0.71F, 3.09F, 0.22F},
    {Sm90Tile::kSPLIT_64X64, 64, 64, 4, 0.84F, 3.96F, 0.20F},
    {Sm90Tile::kSPLIT_64X128, 64, 128, 1, 0.48F, 3.04F, 0.24F},
    {Sm90Tile::kSPLIT_64X128, 64, 128, 2, 1.44F, 2.76F, 0.26F},
    {Sm90Tile::kSPLIT_64X128, 64, 128, 4, 0.56F, 4.60F, 0.42F},
    {Sm90Tile::kSPLIT_128X128, 128, 128, 1, 0.72F, 4.39F, 0.40F},
    {Sm90Tile::kSPLIT_128X128, 128, 128, 2, 0.19F, 6.01F, 0.35F},
    {Sm90Tile::kSPLIT_128X128, 128, 128, 4, 0.65F, 5.89F, 0.38F},
};
constexpr int32_t kNUM_SM90_TACTICS = sizeof(kSM90_TACTICS) / sizeof(kSM90_TACTICS[0]);

//! Estimated microseconds of y [rows, outputs] = x [rows, inputs] w^T; infinite where the tactic cannot do it.
inline float estimate(Sm90Tactic const& tactic, int rows, int outputs, int inputs, int multiprocessors)
{
    bool const persistent = tactic.split == 0;
    int const split = persistent ? 1 : tactic.split;
    int const steps = ceilDiv(inputs, kSTEP_INPUTS);
    if (split > steps)
    {
        return std::numeric_limits<float>::infinity();
    }
    int const columnTiles = ceilDiv(outputs, tactic.columns);
    float const products = tactic.stepTime * static_cast<float>(ceilDiv(steps, split));
    if (persistent) // a pair of blocks takes two tiles, one above the other; finishing hides behind the next products
    {
        int const tiles = ceilDiv(ceilDiv(rows, 2 * tactic.rows) * columnTiles, multiprocessors / 2);
        return tactic.startTime + tiles * std::max(products, tactic.tileTime) + tactic.tileTime;
    }
    // Clusters of four leave some multiprocessors of a group idle.
    int const places = split == 4 ? multiprocessors * 120 / 132 : multiprocessors;
    int const waves = ceilDiv(ceilDiv(rows, tactic.rows) * columnTiles * split, places);
    return tactic.startTime + waves * (products + tactic.tileTime);
}

//! The tactic of the least estimate: 1 to kNUM_SM90_TACTICS.
inline int32_t cheapestSm90Tactic(int rows, int outputs, int inputs, int multiprocessors)
{
    int32_t cheapest = 0;
    float least = std::numeric_limits<float>::infinity();
    for (int32_t i = 0; i < kNUM_SM90_TACTICS; ++i)
    {
        float const time = estimate(kSM90_TACTICS[i], rows, outputs, inputs, multiprocessors);
        if (time < least)
        {
            cheapest = i;
            least = time;
        }
    }
    return cheapest + 1;
}

} // namespace trocr::linear_detail
