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

//! Rows x columns of a tile, or columns of a panel; README.md says when each is best.
enum class Sm90Tile : int32_t
{
    kPERSISTENT_128X192,
    kPERSISTENT_128X128,
    kPERSISTENT_192X128,
    kPERSISTENT_128X128_OF_3,
    kPANEL_192,
    kSPLIT_64X64,
    kSPLIT_64X128,
    kSPLIT_128X128,
    kPERSISTENT_128X192_OF_4,
    kPERSISTENT_128X128_OF_4,
    kPANEL_128,
};

enum class Sm90Kernel : int32_t
{
    kPERSISTENT,
    kPANEL,
    kSPLIT,
};

struct Sm90Tactic
{
    Sm90Tile tile;
    Sm90Kernel kernel;
    int32_t rows;
    int32_t columns;
    int32_t tall;   //!< tiles of a cluster, one below the other
    int32_t wide;   //!< and side by side
    int32_t split;  //!< blocks of a cluster that share the products of one tile

    // Microseconds, fitted to the committed times (README.md):
    float startTime;  //!< of a launch
    float tileTime;   //!< of a block's tile beside its products: to begin and to finish it
    float stepTime;   //!< of 64 of K of a block's tile
};

constexpr int kSTEP_INPUTS = 64;  //!< of two bytes; twice as many of one
//! Most K of a panel of so many columns.
constexpr int panelInputs(int columns)
{
    return (columns == 128 ? 8 : 6) * kSTEP_INPUTS;
}

constexpr Sm90Tactic kSM90_TACTICS[] = {
    {Sm90Tile::kPERSISTENT_128X192, Sm90Kernel::kPERSISTENT, 128, 192, 2, 1, 1, 0.050F, 4.610F, 0.650F},
    {Sm90Tile::kPERSISTENT_128X128, Sm90Kernel::kPERSISTENT, 128, 128, 2, 1, 1, 0.725F, 2.530F, 0.481F},
    {Sm90Tile::kPERSISTENT_192X128, Sm90Kernel::kPERSISTENT, 192, 128, 2, 1, 1, 0.050F, 4.631F, 0.669F},
    {Sm90Tile::kPERSISTENT_128X128_OF_3, Sm90Kernel::kPERSISTENT, 128, 128, 1, 3, 1, 1.566F, 2.090F, 0.440F},
    {Sm90Tile::kPANEL_192, Sm90Kernel::kPANEL, 64, 192, 1, 2, 1, 1.223F, 1.458F, 0.346F},
    {Sm90Tile::kSPLIT_64X64, Sm90Kernel::kSPLIT, 64, 64, 1, 1, 1, 0.074F, 2.286F, 0.257F},
    {Sm90Tile::kSPLIT_64X64, Sm90Kernel::kSPLIT, 64, 64, 1, 1, 2, 0.746F, 2.633F, 0.365F},
    {Sm90Tile::kSPLIT_64X64, Sm90Kernel::kSPLIT, 64, 64, 1, 1, 4, 0.053F, 3.001F, 0.828F},
    {Sm90Tile::kSPLIT_64X128, Sm90Kernel::kSPLIT, 64, 128, 1, 1, 1, 0.050F, 2.548F, 0.242F},
    {Sm90Tile::kSPLIT_64X128, Sm90Kernel::kSPLIT, 64, 128, 1, 1, 2, 0.081F, 3.503F, 0.310F},
    {Sm90Tile::kSPLIT_64X128, Sm90Kernel::kSPLIT, 64, 128, 1, 1, 4, 0.210F, 3.133F, 0.724F},
    {Sm90Tile::kSPLIT_128X128, Sm90Kernel::kSPLIT, 128, 128, 1, 1, 1, 0.050F, 3.463F, 0.446F},
    {Sm90Tile::kSPLIT_128X128, Sm90Kernel::kSPLIT, 128, 128, 1, 1, 2, 0.050F, 5.871F, 0.379F},
    {Sm90Tile::kSPLIT_128X128, Sm90Kernel::kSPLIT, 128, 128, 1, 1, 4, 1.339F, 3.547F, 0.579F},
    {Sm90Tile::kPERSISTENT_128X192_OF_4, Sm90Kernel::kPERSISTENT, 128, 192, 2, 2, 1, 1.0F, 4.6F, 0.65F},
    {Sm90Tile::kPERSISTENT_128X128_OF_4, Sm90Kernel::kPERSISTENT, 128, 128, 2, 2, 1, 1.0F, 2.5F, 0.48F},
    {Sm90Tile::kPANEL_128, Sm90Kernel::kPANEL, 64, 128, 1, 2, 1, 1.2F, 1.4F, 0.25F},
};
constexpr int32_t kNUM_SM90_TACTICS = sizeof(kSM90_TACTICS) / sizeof(kSM90_TACTICS[0]);

//! Clusters of so many blocks, one a multiprocessor, that find room at once, as seen on an H100 of 132: those of three
//! and four leave some multiprocessors of a group idle. For the estimate; a launch asks the device.
constexpr int clusterPlaces(int cluster, int multiprocessors)
{
    int const usable = cluster == 3 ? 117 : cluster == 4 ? 120 : 132;
    return multiprocessors * usable / (132 * cluster);
}

//! Whether the kernel computes the last round's tiles in halves: it does where halves of them find a cluster each.
#ifdef __CUDACC__
__host__ __device__
#endif
    constexpr bool
    halvesLast(int tiles, int clusters)
{
    return 2 * (tiles % clusters) <= clusters;
}

//! Estimated microseconds of y [rows, outputs] = x [rows, inputs] w^T; infinite where the tactic cannot do it.
inline float estimate(Sm90Tactic const& tactic, int rows, int outputs, int inputs, bool residual, int multiprocessors)
{
    int const steps = ceilDiv(inputs, kSTEP_INPUTS);
    if (tactic.split > steps || (tactic.kernel == Sm90Kernel::kPANEL && (residual || inputs > panelInputs(tactic.columns))))
    {
        return std::numeric_limits<float>::infinity();
    }
    int const across = ceilDiv(outputs, tactic.wide * tactic.columns);
    int const down = ceilDiv(rows, tactic.tall * tactic.rows);
    int const places = clusterPlaces(tactic.tall * tactic.wide * tactic.split, multiprocessors);
    float const products = tactic.stepTime * static_cast<float>(ceilDiv(steps, tactic.split));
    if (tactic.kernel == Sm90Kernel::kSPLIT)
    {
        int const resident = tactic.tile == Sm90Tile::kSPLIT_64X64 ? 2 : 1;  // blocks of a multiprocessor
        int const waves = ceilDiv(down * across, places * resident);
        return tactic.startTime + static_cast<float>(waves) * (products + tactic.tileTime);
    }
    // Finishing a tile hides behind the products of the next.
    float rounds = 0.0F;
    if (tactic.kernel == Sm90Kernel::kPANEL)
    {
        if (across > places)
        {
            return std::numeric_limits<float>::infinity();
        }
        rounds = static_cast<float>(ceilDiv(down, places / across));
    }
    else
    {
        int const tiles = down * across;
        int const clusters = std::min(tiles, places);
        bool const halves = tactic.rows == 128 && tiles % clusters != 0 && halvesLast(tiles, clusters);
        rounds = static_cast<float>(ceilDiv(tiles, clusters)) - (halves ? 0.5F : 0.0F);
    }
    return tactic.startTime + rounds * std::max(products, tactic.tileTime) + tactic.tileTime;
}

//! The tactic of the least estimate: 1 to kNUM_SM90_TACTICS.
inline int32_t cheapestSm90Tactic(int rows, int outputs, int inputs, bool residual, int multiprocessors)
{
    int32_t cheapest = 0;
    float least = std::numeric_limits<float>::infinity();
    for (int32_t i = 0; i < kNUM_SM90_TACTICS; ++i)
    {
        float const time = estimate(kSM90_TACTICS[i], rows, outputs, inputs, residual, multiprocessors);
        if (time < least)
        {
            cheapest = i;
            least = time;
        }
    }
    return cheapest + 1;
}

}  // namespace trocr::linear_detail
