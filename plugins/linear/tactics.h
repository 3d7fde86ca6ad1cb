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

//! Rows x columns of a tile, or columns of a panel, and how many tiles a cluster has; README.md says when each is best.
enum class Sm90Tile : int32_t
{
    kPERSISTENT_128X192,
    kPERSISTENT_128X128,
    kPERSISTENT_128X128_OF_3,
    kPERSISTENT_128X192_OF_4,
    kPERSISTENT_128X128_OF_4,
    kPANEL_192,
    kSPLIT_64X64,
    kSPLIT_64X128,
    kSPLIT_128X128,
    kSPLIT_128X192,
};

enum class Sm90Kernel : int32_t
{
    kPERSISTENT,
    kPANEL,
    kSPLIT,
};

//! Microseconds, fitted to the committed times (README.md).
struct TacticTimes
{
    float start;         //!< of a launch
    float tile;          //!< of a block's tile beside its products: to begin and to finish it
    float residualTile;  //!< the same where a residual is added
    float step;          //!< of 128 bytes of K of a block's tile
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
    TacticTimes times;
    TacticTimes e4m3Times;
};

constexpr int kSTEP_INPUTS = 64;                 //!< of two bytes; twice as many of e4m3
constexpr float kBESIDE = 0.1F;                  //!< microseconds, see estimate
constexpr int kPANEL_INPUTS = 6 * kSTEP_INPUTS;  //!< most K of a panel

// clang-format off
constexpr Sm90Tactic kSM90_TACTICS[] = {
    {Sm90Tile::kPERSISTENT_128X192,      Sm90Kernel::kPERSISTENT, 128, 192, 2, 1, 1, {0.655F, 5.939F, 5.706F, 0.609F}, {0.256F, 3.448F, 5.779F, 0.811F}},
    {Sm90Tile::kPERSISTENT_128X128,      Sm90Kernel::kPERSISTENT, 128, 128, 2, 1, 1, {0.542F, 2.293F, 2.941F, 0.470F}, {0.282F, 2.569F, 3.554F, 0.558F}},
    {Sm90Tile::kPERSISTENT_128X128_OF_3, Sm90Kernel::kPERSISTENT, 128, 128, 1, 3, 1, {0.820F, 2.141F, 2.265F, 0.458F}, {0.225F, 2.508F, 2.920F, 0.553F}},
    {Sm90Tile::kPERSISTENT_128X192_OF_4, Sm90Kernel::kPERSISTENT, 128, 192, 2, 2, 1, {0.352F, 3.111F, 4.185F, 0.637F}, {0.245F, 3.054F, 6.523F, 0.753F}},
    {Sm90Tile::kPERSISTENT_128X128_OF_4, Sm90Kernel::kPERSISTENT, 128, 128, 2, 2, 1, {0.589F, 2.074F, 2.418F, 0.475F}, {0.298F, 2.244F, 2.741F, 0.559F}},
    {Sm90Tile::kPANEL_192,               Sm90Kernel::kPANEL,       64, 192, 1, 2, 1, {1.629F, 1.186F, 2.521F, 0.329F}, {2.277F, 0.964F, 1.803F, 0.384F}},
    {Sm90Tile::kSPLIT_64X64,             Sm90Kernel::kSPLIT,       64,  64, 1, 1, 1, {0.064F, 2.030F, 1.825F, 0.277F}, {0.075F, 2.042F, 2.205F, 0.320F}},
    {Sm90Tile::kSPLIT_64X128,            Sm90Kernel::kSPLIT,       64, 128, 1, 1, 1, {0.055F, 2.099F, 2.053F, 0.263F}, {0.073F, 2.395F, 2.787F, 0.244F}},
    {Sm90Tile::kSPLIT_64X128,            Sm90Kernel::kSPLIT,       64, 128, 1, 1, 2, {0.131F, 2.998F, 3.092F, 0.332F}, {0.164F, 3.097F, 3.144F, 0.325F}},
    {Sm90Tile::kSPLIT_128X128,           Sm90Kernel::kSPLIT,      128, 128, 1, 1, 1, {0.090F, 2.011F, 2.487F, 0.446F}, {0.109F, 2.460F, 3.231F, 0.482F}},
    {Sm90Tile::kSPLIT_128X128,           Sm90Kernel::kSPLIT,      128, 128, 1, 1, 2, {0.163F, 4.362F, 4.119F, 0.448F}, {0.127F, 4.463F, 4.469F, 0.469F}},
    {Sm90Tile::kSPLIT_128X192,           Sm90Kernel::kSPLIT,      128, 192, 1, 1, 1, {0.053F, 3.064F, 3.462F, 0.570F}, {0.064F, 3.142F, 5.022F, 0.633F}},
};
// clang-format on
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

//! What a tactic is chosen for: y [rows, outputs] = x [rows, inputs] w^T.
struct Sm90Problem
{
    int rows;
    int outputs;
    int inputs;
    bool residual;
    bool e4m3;

    int steps() const
    {
        return ceilDiv(inputs, e4m3 ? 2 * kSTEP_INPUTS : kSTEP_INPUTS);
    }

    bool suits(Sm90Tactic const& tactic) const
    {
        return tactic.split <= steps() &&
               (tactic.kernel != Sm90Kernel::kPANEL || (!residual && steps() * kSTEP_INPUTS <= kPANEL_INPUTS));
    }
};

//! Estimated microseconds; infinite where the tactic cannot do it.
inline float estimate(Sm90Tactic const& tactic, Sm90Problem const& problem, int multiprocessors)
{
    TacticTimes const& times = problem.e4m3 ? tactic.e4m3Times : tactic.times;
    float const tile = problem.residual ? times.residualTile : times.tile;
    if (!problem.suits(tactic))
    {
        return std::numeric_limits<float>::infinity();
    }
    int const across = ceilDiv(problem.outputs, tactic.wide * tactic.columns);
    int const down = ceilDiv(problem.rows, tactic.tall * tactic.rows);
    int const places = clusterPlaces(tactic.tall * tactic.wide * tactic.split, multiprocessors);
    float const products = times.step * static_cast<float>(ceilDiv(problem.steps(), tactic.split));
    if (tactic.kernel == Sm90Kernel::kSPLIT)
    {
        int const resident = tactic.tile == Sm90Tile::kSPLIT_64X64 ? 2 : 1;  // blocks of a multiprocessor
        int const waves = ceilDiv(down * across, places * resident);
        // Two blocks a multiprocessor: they begin beside the kernel before, which is seldom one like them. The times,
        // of a kernel after itself, do not show it; engines did.
        float const beside = resident == 2 && waves == 1 ? kBESIDE : 0.0F;
        return times.start + static_cast<float>(waves) * (products + tile) - beside;
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
    return times.start + rounds * std::max(products, tile) + tile;
}

//! The tactic of the least estimate: 1 to kNUM_SM90_TACTICS.
inline int32_t cheapestSm90Tactic(Sm90Problem const& problem, int multiprocessors)
{
    int32_t cheapest = 0;
    float least = std::numeric_limits<float>::infinity();
    for (int32_t i = 0; i < kNUM_SM90_TACTICS; ++i)
    {
        float const time = estimate(kSM90_TACTICS[i], problem, multiprocessors);
        if (time < least)
        {
            cheapest = i;
            least = time;
        }
    }
    return cheapest + 1;
}

}  // namespace trocr::linear_detail
