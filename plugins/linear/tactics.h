#pragma once

#include <cstdint>

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
};

constexpr Sm90Tactic kSM90_TACTICS[] = {
    {Sm90Tile::kPERSISTENT_128X192, 128, 192, 0},
    {Sm90Tile::kPERSISTENT_128X128, 128, 128, 0},
    {Sm90Tile::kPERSISTENT_192X128, 192, 128, 0},
    {Sm90Tile::kSPLIT_64X64, 64, 64, 1},
    {Sm90Tile::kSPLIT_64X64, 64, 64, 2},
    {Sm90Tile::kSPLIT_64X64, 64, 64, 4},
    {Sm90Tile::kSPLIT_64X128, 64, 128, 1},
    {Sm90Tile::kSPLIT_64X128, 64, 128, 2},
    {Sm90Tile::kSPLIT_64X128, 64, 128, 4},
    {Sm90Tile::kSPLIT_128X128, 128, 128, 1},
    {Sm90Tile::kSPLIT_128X128, 128, 128, 2},
    {Sm90Tile::kSPLIT_128X128, 128, 128, 4},
};
constexpr int32_t kNUM_SM90_TACTICS = sizeof(kSM90_TACTICS) / sizeof(kSM90_TACTICS[0]);

} // namespace trocr::linear_detail
