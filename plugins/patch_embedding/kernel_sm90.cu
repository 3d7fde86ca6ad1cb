// Hopper: a block keeps the weights of its columns in shared memory, all 768 inputs of them, and goes through the
// patches. Pixels go from global memory to registers, where they become operands of wgmma: README.md has the picture.

#include <algorithm>

#include "common/launch.h"
#include "common/sm90.cuh"
#include "common/tensor_map.h"
#include "patch_embedding/pieces.cuh"

namespace trocr::patch_embedding_detail
{
namespace
{

constexpr int kWARPGROUPS = 3;
constexpr int kWARPS = 4 * kWARPGROUPS;
constexpr int kTHREADS = 32 * kWARPS;
constexpr int kTILE_ROWS = 64;  //!< patches that a warpgroup multiplies at once
constexpr int kAHEAD = 3;       //!< groups of pixels on their way; four do not fit into the registers
constexpr int kROW_BYTES = 128;
constexpr int kCHUNK_BYTES = 16 * kROW_BYTES;  //!< of a warp: 16 rows, 64 columns

static_assert(kGROUPS % kAHEAD == 0 && kGROUPS % 2 == 0);

//! Shared memory, from a multiple of 1024: the weights, in slabs of 64 inputs; a chunk a warp; bias; barriers.
template <int kBN>
struct Layout
{
    static constexpr int kSLAB_BYTES = kBN * kROW_BYTES;
    static constexpr int kCHUNKS_AT = kGROUPS * kSLAB_BYTES;
    static constexpr int kBIAS_AT = kCHUNKS_AT + kWARPS * kCHUNK_BYTES;
    static constexpr int kBARRIERS_AT = kBIAS_AT + kBN * 4;
    static constexpr int kSHARED_BYTES = kBARRIERS_AT + kGROUPS * 8;

    static_assert(kSHARED_BYTES <= 227 * 1024);
};

//! 16 rows and 64 columns of one warp: v[4 j + 2 h + e] of lane l is the product of row 8 h + l / 4 and column
//! 8 j + 2 (l % 4) + e. `chunk` is the warp's buffer, `bias` that of the columns.
template <typename T>
__device__ __forceinline__ void finishChunk(Arguments<T> const& p, float const* v, uint8_t* chunk, float const* bias,
                                            int row, int column, int lane)
{
    // Memory is read and written eight lanes a row; the 16-byte pieces of row r are exchanged by r % 8.
    int const piece = lane % 8;
    TokenPlace places[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
    {
        places[i] = tokenPlace(p, row + lane / 8 + 4 * i);
    }
    auto const pieceOf = [&](int i)
    {
        int const r = lane / 8 + 4 * i;
        return reinterpret_cast<uint4*>(chunk + r * kROW_BYTES + ((piece ^ (r % 8)) << 4));
    };
#pragma unroll
    for (int i = 0; i < 4; ++i)
    {
        int64_t const at = static_cast<int64_t>(places[i].position) * p.outputs + column + 8 * piece;
        *pieceOf(i) = __ldg(reinterpret_cast<uint4 const*>(p.positions + at));
    }
    __syncwarp();

    // Lane l points at row l % 16 of the matrices of column group j + l / 16.
    uint32_t const at = sharedAddress(chunk) + lane % 16 * kROW_BYTES + (((lane / 16) ^ (lane % 8)) << 4);
    uint32_t out[16];
#pragma unroll
    for (int j = 0; j < 8; j += 2)
    {
        uint32_t position[4];
        loadMatrices(position, at ^ (j << 4));
#pragma unroll
        for (int i = 0; i < 2; ++i)
        {
            float2 const b = *reinterpret_cast<float2 const*>(bias + 8 * (j + i) + 2 * (lane % 4));
#pragma unroll
            for (int h = 0; h < 2; ++h)
            {
                float const* const product = v + 4 * (j + i) + 2 * h;
                float2 const added = unpackPair<T>(position[2 * i + h]);
                out[2 * (j + i) + h] =
                    packPair<T>(fmaf(p.scale, product[0], b.x) + added.x, fmaf(p.scale, product[1], b.y) + added.y);
            }
        }
        sm90::storeMatrices(at ^ (j << 4), {out[2 * j], out[2 * j + 1], out[2 * j + 2], out[2 * j + 3]});
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; ++i)
    {
        if (places[i].row >= 0)
        {
            int64_t const to = static_cast<int64_t>(places[i].row) * p.outputs + column + 8 * piece;
            *reinterpret_cast<uint4*>(p.y + to) = *pieceOf(i);
        }
    }
    if (p.statistics != nullptr)
    {
        TokenPlace const own[2] = {tokenPlace(p, row + lane / 4), tokenPlace(p, row + lane / 4 + 8)};
        storeStatistics<T>(p, out, own, column, lane);
    }
    __syncwarp();  // the chunk is free
}

//! Blocks of equal blockIdx.x % columnTiles have equal columns and share out the tiles of 64 patches; within a block
//! each warpgroup goes its own way, so that one's epilogue hides behind the others' products.
template <typename T, int kBN>
__global__ void __launch_bounds__(kTHREADS, 1)
    patchEmbeddingKernel(__grid_constant__ CUtensorMap const weight, __grid_constant__ Arguments<T> const p)
{
    using LAYOUT = Layout<kBN>;
    extern __shared__ __align__(1024) uint8_t sharedMemory[];
    uint32_t const slabs = sharedAddress(sharedMemory);
    uint32_t const barriers = slabs + LAYOUT::kBARRIERS_AT;
    auto* const bias = reinterpret_cast<float*>(sharedMemory + LAYOUT::kBIAS_AT);

    int const warp = __shfl_sync(kFULL_WARP, static_cast<int>(threadIdx.x) / 32, 0);
    int const lane = static_cast<int>(threadIdx.x) % 32;
    int const columnTiles = (p.outputs + kBN - 1) / kBN;
    int const column = static_cast<int>(blockIdx.x) % columnTiles * kBN;
    int const stream = static_cast<int>(blockIdx.x) / columnTiles;
    int const streams = static_cast<int>(gridDim.x) / columnTiles;

    if (threadIdx.x == 0)
    {
        for (int group = 0; group < kGROUPS; ++group)
        {
            sm90::barrierInit(barriers + group * 8, 1);
        }
        sm90::barrierInitFence();
        sm90::prefetchTensorMap(&weight);
    }
    __syncthreads();
    sm90::launchDependents();

    // Weight and bias do not depend on the preceding grid.
    if (threadIdx.x == 0)
    {
        for (int group = 0; group < kGROUPS; ++group)
        {
            sm90::barrierArriveExpect(barriers + group * 8, LAYOUT::kSLAB_BYTES);
            sm90::loadBox(slabs + group * LAYOUT::kSLAB_BYTES, &weight, group * kGROUP_INPUTS, column,
                          barriers + group * 8);
        }
    }
    static_assert(kBN <= kTHREADS);
    if (threadIdx.x < kBN)
    {
        int const n = column + static_cast<int>(threadIdx.x);
        bias[threadIdx.x] = n < p.outputs ? __ldg(p.bias + n) : 0.0F;
    }
    __syncthreads();
    sm90::waitForPriorGrids();

    int const tiles = (p.rows + kTILE_ROWS - 1) / kTILE_ROWS;
    int const step = kWARPGROUPS * streams;
    int tile = stream + warp / 4 * streams;
    auto const rowOf = [&](int t) { return t * kTILE_ROWS + warp % 4 * 16; };
    // The last tile is followed by itself: its pixels are fetched once more, for nothing.
    auto const following = [&](int t) { return t + step < tiles ? t + step : t; };

    LinePointers lines{};
    Lines ahead[kAHEAD];
    if (tile < tiles)
    {
        lines = linePointers(p, rowOf(tile), lane);
#pragma unroll
        for (int i = 0; i < kAHEAD; ++i)
        {
            ahead[i] = loadLines(p, lines, i);
        }
    }
    writeSpecialTokens(p, static_cast<int>(blockIdx.x) * kWARPS + warp, static_cast<int>(gridDim.x) * kWARPS, lane);

    for (; tile < tiles; tile += step)
    {
        LinePointers const next = linePointers(p, rowOf(following(tile)), lane);
        float acc[kBN / 2];
        uint32_t a[2][4][4];
#pragma unroll
        for (int group = 0; group < kGROUPS; ++group)
        {
            operands<T>(a[group % 2], ahead[group % kAHEAD]);
            ahead[group % kAHEAD] = group + kAHEAD < kGROUPS ? loadLines(p, lines, group + kAHEAD)
                                                             : loadLines(p, next, group + kAHEAD - kGROUPS);
            sm90::barrierWait(barriers + group * 8, 0);  // at once, from the second tile on
            uint64_t const b = sm90::operandDescriptor(slabs + group * LAYOUT::kSLAB_BYTES);
            sm90::wgmmaFence();
#pragma unroll
            for (int s = 0; s < 4; ++s)
            {
                sm90::Wgmma<T, kBN>::run(acc, a[group % 2][s], b + 2 * s, group + s != 0);
            }
            sm90::wgmmaCommit();
            if (group > 0)
            {
                sm90::wgmmaWait<1>();  // the other operands are free
            }
        }
        sm90::wgmmaWait<0>();
        sm90::wgmmaResult(acc);
        lines = next;

#pragma unroll
        for (int n = 0; n < kBN / kPART_COLUMNS; ++n)
        {
            if (column + n * kPART_COLUMNS < p.outputs)
            {
                finishChunk<T>(p, acc + n * 32, sharedMemory + LAYOUT::kCHUNKS_AT + warp * kCHUNK_BYTES,
                               bias + n * kPART_COLUMNS, rowOf(tile), column + n * kPART_COLUMNS, lane);
            }
        }
    }
}

template <typename T, int kBN>
cudaError_t launchColumns(PatchEmbeddingParams const& params, int multiprocessors, cudaStream_t stream)
{
    CUtensorMap weight;
    if (!encodeMap(weight, params.dataType, params.weight, params.outputs, kPATCH_INPUTS, kBN))
    {
        return cudaErrorInvalidValue;
    }
    auto const kernel = patchEmbeddingKernel<T, kBN>;
    cudaError_t const status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Layout<kBN>::kSHARED_BYTES);
    if (status != cudaSuccess)
    {
        return status;
    }
    Arguments<T> const args = arguments<T>(params);
    int const columnTiles = ceilDiv(params.outputs, kBN);
    int const streams = std::clamp(multiprocessors / columnTiles, 1, ceilDiv(args.rows, kTILE_ROWS));

    cudaLaunchAttribute dependent = dependentLaunch();
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(columnTiles * streams);
    config.blockDim = dim3(kTHREADS);
    config.dynamicSmemBytes = Layout<kBN>::kSHARED_BYTES;
    config.stream = stream;
    config.attrs = &dependent;
    config.numAttrs = params.overlapPredecessor ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, weight, args);
}

template <typename T>
cudaError_t launchType(PatchEmbeddingParams const& params, int multiprocessors, cudaStream_t stream)
{
    // Wide columns convert each pixel half as often, but take longer to fetch: for where there is much to do.
    int64_t const patches = static_cast<int64_t>(params.height / kPATCH_SIZE) * (params.width / kPATCH_SIZE);
    int64_t const wideTiles = ceilDiv<int64_t>(params.batch * patches, kTILE_ROWS) * (params.outputs / 128);
    bool const wide = params.outputs % 128 == 0 && wideTiles >= 4 * multiprocessors;
    return wide ? launchColumns<T, 128>(params, multiprocessors, stream)
                : launchColumns<T, 64>(params, multiprocessors, stream);
}

}  // namespace

cudaError_t patchEmbeddingSm90(PatchEmbeddingParams const& params, int multiprocessors, cudaStream_t stream)
{
    if (tensorMapEncoder() == nullptr)
    {
        return cudaErrorNotSupported;
    }
    return params.dataType == DataType::kHALF ? launchType<__half>(params, multiprocessors, stream)
                                              : launchType<__nv_bfloat16>(params, multiprocessors, stream);
}

}  // namespace trocr::patch_embedding_detail
