#pragma once

#include <type_traits>

#include "common/device.cuh"
#include "common/launch.h"
#include "common/mma.cuh"
#include "encoder_attention/launchers.h"

//! Encoder attention on tensor cores with mma.sync, after FlashAttention-2 (Dao, 2023): a block holds a tile of
//! queries, streams the keys and values through shared memory once, and keeps scores, softmax and context in registers.

namespace trocr
{

namespace encoder_attention
{

//! Tile shapes. kROW_TILES is the number of 16-row mma tiles a warp works on:
//!  * 2 (128 queries a block): every fragment of K and V read from shared memory feeds two mma, without which shared
//!    memory would be slower than Hopper's tensor cores. 64 + 64 + 16 * d / 16 accumulator and query registers leave
//!    two blocks a multiprocessor.
//!  * 1 (64 queries a block): twice the blocks, for batches too small to fill the device.
//! TrOCR's 577 or 578 tokens are 4.5 query tiles of 128; warps without a valid query skip the arithmetic, which rounds
//! to 608 rows. They are 9 key tiles of 64 and a last one of 1 or 2 keys, of which only 16 are computed: 592 keys.
template <int kHEAD_DIM_, int kROW_TILES_>
struct Shape
{
    static constexpr int kHEAD_DIM = kHEAD_DIM_;
    static constexpr int kROW_TILES = kROW_TILES_;
    static constexpr int kWARPS = 4;
    static constexpr int kTHREADS = kWARPS * kWARP_SIZE;
    static constexpr int kWARP_QUERIES = 16 * kROW_TILES;
    static constexpr int kQUERIES = kWARPS * kWARP_QUERIES;
    static constexpr int kKEYS = 64;
    static constexpr int kMIN_BLOCKS = kROW_TILES == 2 ? 2 : 3;  //!< a multiprocessor, bounding the registers

    static constexpr int kROW_BYTES = kHEAD_DIM * 2;
    static constexpr int kCHUNKS = kROW_BYTES / 16;  //!< 16-byte chunks a row
    static_assert(kHEAD_DIM == 32 || kHEAD_DIM == 64, "the swizzle below is made for rows of 64 and 128 bytes");

    //! Byte offset of a chunk in a tile [rows, d]. Chunks are swizzled so that the 8 rows of an 8x8 matrix, read at one
    //! chunk by ldmatrix, lie in 8 different groups of 4 banks: 128-byte rows take the row into the chunk's 3 bits;
    //! 64-byte rows lie in pairs on 128 bytes, and the pair goes into the chunk's 2 bits.
    static __device__ __forceinline__ int offset(int row, int chunk)
    {
        int const key = kCHUNKS == 8 ? row % 8 : row / 2 % 4;
        return row * kROW_BYTES + (chunk ^ key) * 16;
    }
};

//! Shared memory of a block: 48 KiB (d = 64, 128 queries), the most that needs no opting in.
template <typename Shape>
struct Shared
{
    using Row = uint4[Shape::kCHUNKS];

    Row queries[Shape::kQUERIES];  // later the context
    Row keys[2][Shape::kKEYS];
    Row values[2][Shape::kKEYS];
};

//! Starts copying rows [firstRow, firstRow + kROWS) of one head's matrix (rows `stride` elements apart) to a tile.
//! Rows from `endRow` on become zeros: a masked key has probability 0, and 0 times stale shared memory might be NaN.
template <typename Shape, int kROWS, typename T>
__device__ __forceinline__ void copyTile(uint32_t tile, T const* head, int64_t stride, int firstRow, int endRow)
{
    constexpr int kROWS_A_PASS = Shape::kTHREADS / Shape::kCHUNKS;
    static_assert(kROWS % kROWS_A_PASS == 0);
    int const chunk = threadIdx.x % Shape::kCHUNKS;
#pragma unroll
    for (int pass = 0; pass < kROWS / kROWS_A_PASS; ++pass)
    {
        int const row = pass * kROWS_A_PASS + threadIdx.x / Shape::kCHUNKS;
        bool const inside = firstRow + row < endRow;
        T const* const from = head + (inside ? firstRow + row : 0) * stride + chunk * 8;
        copyAsync16(tile + Shape::offset(row, chunk), from, inside);
    }
}

//! What a warp keeps in registers for its 16 * kROW_TILES queries. A lane holds, of every row tile, rows g = lane / 4
//! (half 0) and g + 8 (half 1), as mma lays them out.
template <typename T, typename Shape>
struct WarpState
{
    static constexpr int kROW_TILES = Shape::kROW_TILES;
    static constexpr int kDIM_STEPS = Shape::kHEAD_DIM / 16;

    uint32_t queries[kROW_TILES][kDIM_STEPS][4];
    float context[kROW_TILES][2 * kDIM_STEPS][4];  // of 8 columns each; unnormalised
    float maximum[kROW_TILES][2];                  // reference of the exponents, in raw scores; same in a row's 4 lanes
    float sum[kROW_TILES][2];                      // of the lane's own columns only

    __device__ __forceinline__ void initialise(uint32_t queryTile, int lane)
    {
        // A fragment: matrices (rows 0-7, 8-15) x (columns 0-7, 8-15), rows first.
        int const row = lane % 16;
#pragma unroll
        for (int m = 0; m < kROW_TILES; ++m)
        {
#pragma unroll
            for (int k = 0; k < kDIM_STEPS; ++k)
            {
                loadMatrices(queries[m][k], queryTile + Shape::offset(16 * m + row, 2 * k + lane / 16));
            }
#pragma unroll
            for (int n = 0; n < 2 * kDIM_STEPS; ++n)
            {
#pragma unroll
                for (int i = 0; i < 4; ++i)
                {
                    context[m][n][i] = 0.0F;
                }
            }
#pragma unroll
            for (int half = 0; half < 2; ++half)
            {
                maximum[m][half] = -INFINITY;
                sum[m][half] = 0.0F;
            }
        }
    }

    //! Takes in one tile of keys and values, of which the first `count` (at least 1) exist; kPARTIAL: count < kKEYS.
    //! `scale` turns a raw score into the exponent of 2.
    template <bool kPARTIAL>
    __device__ __forceinline__ void step(uint32_t keyTile, uint32_t valueTile, int count, float scale, int lane)
    {
        constexpr int kKEY_STEPS = Shape::kKEYS / 16;

        float scores[kROW_TILES][2 * kKEY_STEPS][4] = {};
#pragma unroll
        for (int k = 0; k < kDIM_STEPS; ++k)
        {
#pragma unroll
            for (int n = 0; n < kKEY_STEPS; ++n)
            {
                if (kPARTIAL && 16 * n >= count)
                {
                    continue;
                }
                // K is B transposed: matrices (keys 0-7, 8-15) x (columns 0-7, 8-15), columns first.
                uint32_t b[4];
                int const row = 16 * n + lane % 8 + lane / 16 * 8;
                loadMatrices(b, keyTile + Shape::offset(row, 2 * k + lane / 8 % 2));
#pragma unroll
                for (int m = 0; m < kROW_TILES; ++m)
                {
                    multiplyAdd<T>(scores[m][2 * n], queries[m][k], b[0], b[1]);
                    multiplyAdd<T>(scores[m][2 * n + 1], queries[m][k], b[2], b[3]);
                }
            }
        }

        if (kPARTIAL)
        {
#pragma unroll
            for (int n = 0; n < 2 * kKEY_STEPS; ++n)
            {
#pragma unroll
                for (int i = 0; i < 4; ++i)
                {
                    if (8 * n + lane % 4 * 2 + i % 2 >= count)
                    {
#pragma unroll
                        for (int m = 0; m < kROW_TILES; ++m)
                        {
                            scores[m][n][i] = -INFINITY;
                        }
                    }
                }
            }
        }

        raiseMaximum(scores, scale);

#pragma unroll
        for (int n = 0; n < kKEY_STEPS; ++n)
        {
            if (kPARTIAL && 16 * n >= count)
            {
                continue;
            }
            // Two 16x8 tiles of scores, as mma leaves them, are one 16x16 fragment A of probabilities.
            uint32_t probabilities[kROW_TILES][4];
#pragma unroll
            for (int m = 0; m < kROW_TILES; ++m)
            {
#pragma unroll
                for (int half = 0; half < 2; ++half)
                {
                    float const shift = maximum[m][half] * scale;
#pragma unroll
                    for (int tile = 0; tile < 2; ++tile)
                    {
                        float const(&raw)[4] = scores[m][2 * n + tile];
                        float const low = exp2Approx(raw[2 * half] * scale - shift);
                        float const high = exp2Approx(raw[2 * half + 1] * scale - shift);
                        sum[m][half] += low + high;
                        probabilities[m][2 * tile + half] = packPair<T>(low, high);
                    }
                }
            }
#pragma unroll
            for (int d = 0; d < kDIM_STEPS; ++d)
            {
                // V is B: matrices (keys 0-7, 8-15) x (columns 0-7, 8-15), keys first, transposed on the way.
                uint32_t b[4];
                loadMatricesTransposed(b, valueTile + Shape::offset(16 * n + lane % 16, 2 * d + lane / 16));
#pragma unroll
                for (int m = 0; m < kROW_TILES; ++m)
                {
                    multiplyAdd<T>(context[m][2 * d], probabilities[m], b[0], b[1]);
                    multiplyAdd<T>(context[m][2 * d + 1], probabilities[m], b[2], b[3]);
                }
            }
        }
    }

    //! Lets `maximum` follow the scores. It is exact: a row's largest probability is then 1, which rounding to T leaves
    //! as it is. A reference that lags behind would save most of the rescaling, but round the largest probability too,
    //! which where that one weighs most is three times the error. Where no row of the warp rises, nothing is rescaled.
    template <int kTILES>
    __device__ __forceinline__ void raiseMaximum(float const (&scores)[kROW_TILES][kTILES][4], float scale)
    {
        float raised[kROW_TILES][2];
        bool rises = false;
#pragma unroll
        for (int m = 0; m < kROW_TILES; ++m)
        {
#pragma unroll
            for (int half = 0; half < 2; ++half)
            {
                float highest = fmaxf(scores[m][0][2 * half], scores[m][0][2 * half + 1]);
#pragma unroll
                for (int n = 1; n < kTILES; ++n)
                {
                    highest = fmaxf(highest, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
                }
                raised[m][half] = fmaxf(maximum[m][half], groupMax<4>(highest));
                rises |= raised[m][half] > maximum[m][half];
            }
        }
        if (!__any_sync(kFULL_WARP, rises))
        {
            return;
        }
#pragma unroll
        for (int m = 0; m < kROW_TILES; ++m)
        {
#pragma unroll
            for (int half = 0; half < 2; ++half)
            {
                float const factor = exp2Approx((maximum[m][half] - raised[m][half]) * scale);
                maximum[m][half] = raised[m][half];
                sum[m][half] *= factor;
#pragma unroll
                for (int n = 0; n < 2 * kDIM_STEPS; ++n)
                {
                    context[m][n][2 * half] *= factor;
                    context[m][n][2 * half + 1] *= factor;
                }
            }
        }
    }

    //! Writes the normalised context, rounded, to the warp's rows of a tile.
    __device__ __forceinline__ void finish(unsigned char* tile, int lane)
    {
#pragma unroll
        for (int m = 0; m < kROW_TILES; ++m)
        {
#pragma unroll
            for (int half = 0; half < 2; ++half)
            {
                float const factor = 1.0F / groupSum<4>(sum[m][half]);
                int const row = 16 * m + 8 * half + lane / 4;
#pragma unroll
                for (int n = 0; n < 2 * kDIM_STEPS; ++n)
                {
                    *reinterpret_cast<uint32_t*>(tile + Shape::offset(row, n) + lane % 4 * 4) =
                        packPair<T>(context[m][n][2 * half] * factor, context[m][n][2 * half + 1] * factor);
                }
            }
        }
    }
};

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kTHREADS, Shape::kMIN_BLOCKS)
    mmaKernel(T const* __restrict__ qkv, T* __restrict__ context, int sequenceLength)
{
    __shared__ __align__(128) Shared<Shape> shared;
    static_assert(sizeof(shared) <= 48 * 1024);

    // blockIdx = (query tile, head, image): blocks that share keys and values run side by side.
    constexpr int kHEAD_DIM = Shape::kHEAD_DIM;
    int const lane = threadIdx.x % kWARP_SIZE;
    int const warpRow = threadIdx.x / kWARP_SIZE * Shape::kWARP_QUERIES;
    int const firstQuery = blockIdx.x * Shape::kQUERIES;
    int const width = gridDim.y * kHEAD_DIM;  // H * d
    int64_t const image = static_cast<int64_t>(blockIdx.z) * sequenceLength;

    // qkv [B, S, 3, H, d]: a token's query, key and value of a head are H * d apart, tokens 3 * H * d.
    int64_t const stride = 3 * static_cast<int64_t>(width);
    T const* const queries = qkv + image * stride + blockIdx.y * kHEAD_DIM;
    T const* const keys = queries + width;
    T const* const values = keys + width;

    auto const copyKeysAndValues = [&](int tile)
    {
        int const firstKey = tile * Shape::kKEYS;
        copyTile<Shape, Shape::kKEYS>(sharedAddress(shared.keys[tile % 2]), keys, stride, firstKey, sequenceLength);
        copyTile<Shape, Shape::kKEYS>(sharedAddress(shared.values[tile % 2]), values, stride, firstKey, sequenceLength);
        commitCopies();
    };
    copyTile<Shape, Shape::kQUERIES>(sharedAddress(shared.queries), queries, stride, firstQuery, sequenceLength);
    copyKeysAndValues(0);

    WarpState<T, Shape> state;
    bool const active = firstQuery + warpRow < sequenceLength;  // the same for the whole warp
    float const scale = kLOG2_E * rsqrtf(static_cast<float>(kHEAD_DIM));
    int const tiles = (sequenceLength + Shape::kKEYS - 1) / Shape::kKEYS;
    for (int tile = 0; tile < tiles; ++tile)
    {
        // After the barrier this tile is there for all warps, and all have left the buffer of the one before it.
        waitForCopies();
        __syncthreads();
        if (tile + 1 < tiles)
        {
            copyKeysAndValues(tile + 1);
        }
        if (!active)
        {
            continue;
        }
        if (tile == 0)
        {
            state.initialise(sharedAddress(shared.queries[warpRow]), lane);
        }
        uint32_t const keyTile = sharedAddress(shared.keys[tile % 2]);
        uint32_t const valueTile = sharedAddress(shared.values[tile % 2]);
        int const count = sequenceLength - tile * Shape::kKEYS;
        if (count >= Shape::kKEYS)
        {
            state.template step<false>(keyTile, valueTile, Shape::kKEYS, scale, lane);
        }
        else
        {
            state.template step<true>(keyTile, valueTile, count, scale, lane);
        }
    }
    if (!active)
    {
        return;
    }

    // Through shared memory, so that a row leaves in 16-byte pieces. Only this warp reads and writes these rows.
    auto* const tile = reinterpret_cast<unsigned char*>(shared.queries[warpRow]);
    __syncwarp();
    state.finish(tile, lane);
    __syncwarp();
#pragma unroll
    for (int i = lane; i < Shape::kWARP_QUERIES * Shape::kCHUNKS; i += kWARP_SIZE)
    {
        int const row = i / Shape::kCHUNKS;
        int const chunk = i % Shape::kCHUNKS;
        int const query = firstQuery + warpRow + row;
        if (query < sequenceLength)
        {
            T* const to = context + (image + query) * width + blockIdx.y * kHEAD_DIM + chunk * 8;
            *reinterpret_cast<uint4*>(to) = *reinterpret_cast<uint4 const*>(tile + Shape::offset(row, chunk));
        }
    }
}

template <typename T, typename Shape>
cudaError_t launchMma(EncoderAttentionParams const& params, cudaStream_t stream)
{
    dim3 const grid(ceilDiv(params.sequenceLength, Shape::kQUERIES), params.numHeads, params.batch);
    return launch(mmaKernel<T, Shape>, grid, dim3(Shape::kTHREADS), stream, static_cast<T const*>(params.qkv),
                  static_cast<T*>(params.context), params.sequenceLength);
}

}  // namespace encoder_attention

template <typename T, int kHEAD_DIM>
cudaError_t encoderAttentionMma(EncoderAttentionParams const& params, cudaStream_t stream)
{
    using Large = encoder_attention::Shape<kHEAD_DIM, 2>;
    using Small = encoder_attention::Shape<kHEAD_DIM, 1>;

    int multiprocessors{};
    if (cudaError_t const status = deviceAttribute(cudaDevAttrMultiProcessorCount, multiprocessors);
        status != cudaSuccess)
    {
        return status;
    }
    int64_t const largeBlocks =
        static_cast<int64_t>(ceilDiv(params.sequenceLength, Large::kQUERIES)) * params.numHeads * params.batch;
    return largeBlocks < multiprocessors ? encoder_attention::launchMma<T, Small>(params, stream)
                                         : encoder_attention::launchMma<T, Large>(params, stream);
}

}  // namespace trocr
