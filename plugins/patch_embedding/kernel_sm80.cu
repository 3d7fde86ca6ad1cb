// Every architecture from sm_80: as on Hopper (kernel_sm90.cu) the weights stay in shared memory, of 64 columns, and
// pixels become operands in registers, here of mma.sync. A warp goes its own way, 16 patches at a time.

#include <algorithm>

#include "common/launch.h"
#include "common/mma.cuh"
#include "patch_embedding/pieces.cuh"

namespace trocr::patch_embedding_detail
{
namespace
{

constexpr int kWARPS = 8;
constexpr int kTHREADS = 32 * kWARPS;
constexpr int kTILE_ROWS = 16;
constexpr int kAHEAD = 4;  //!< groups of pixels on their way
constexpr int kCOLUMNS = kPART_COLUMNS;
constexpr int kROW_BYTES = 128;
constexpr int kSLAB_BYTES = kCOLUMNS * kROW_BYTES;  //!< of 64 inputs
constexpr int kBIAS_AT = kGROUPS * kSLAB_BYTES;
constexpr int kSHARED_BYTES = kBIAS_AT + kCOLUMNS * 4;

static_assert(kGROUPS % kAHEAD == 0);
static_assert(kSHARED_BYTES <= 99 * 1024, "sm_86 and sm_89 have no more");

//! The weights of the block's columns to slabs of 64 inputs; the eight 16-byte pieces of row r are exchanged by r % 8.
template <typename T>
__device__ __forceinline__ void copyWeight(uint32_t slabs, T const* weight)
{
    constexpr int kPIECES = kPATCH_INPUTS / 8;  // of a row
    static_assert(kCOLUMNS * kPIECES % kTHREADS == 0);
    for (int i = static_cast<int>(threadIdx.x); i < kCOLUMNS * kPIECES; i += kTHREADS)
    {
        int const row = i / kPIECES;
        int const piece = i % kPIECES;
        copyAsync16(slabs + piece / 8 * kSLAB_BYTES + row * kROW_BYTES + ((piece % 8 ^ row % 8) << 4),
                    weight + row * kPATCH_INPUTS + piece * 8, true);
    }
    commitCopies();
}

template <typename T>
__global__ void __launch_bounds__(kTHREADS, 1) patchEmbeddingKernel(Arguments<T> const p)
{
    extern __shared__ __align__(1024) uint8_t sharedMemory[];
    uint32_t const slabs = sharedAddress(sharedMemory);
    auto* const bias = reinterpret_cast<float*>(sharedMemory + kBIAS_AT);

    int const warp = static_cast<int>(threadIdx.x) / 32;
    int const lane = static_cast<int>(threadIdx.x) % 32;
    int const columnTiles = p.outputs / kCOLUMNS;
    int const column = static_cast<int>(blockIdx.x) % columnTiles * kCOLUMNS;
    int const stream = static_cast<int>(blockIdx.x) / columnTiles;
    int const streams = static_cast<int>(gridDim.x) / columnTiles;

    copyWeight(slabs, p.weight + static_cast<int64_t>(column) * kPATCH_INPUTS);
    if (threadIdx.x < kCOLUMNS)
    {
        bias[threadIdx.x] = p.bias[column + threadIdx.x];
    }

    int const tiles = (p.rows + kTILE_ROWS - 1) / kTILE_ROWS;
    int const step = kWARPS * streams;
    int tile = stream + warp * streams;
    // The last tile is followed by itself: its pixels are fetched once more, for nothing.
    auto const following = [&](int t) { return t + step < tiles ? t + step : t; };

    LinePointers lines{};
    Lines ahead[kAHEAD];
    if (tile < tiles)
    {
        lines = linePointers(p, tile * kTILE_ROWS, lane);
#pragma unroll
        for (int i = 0; i < kAHEAD; ++i)
        {
            ahead[i] = loadLines(p, lines, i);
        }
    }
    writeSpecialTokens(p, static_cast<int>(blockIdx.x) * kWARPS + warp, static_cast<int>(gridDim.x) * kWARPS, lane);
    waitForCopies();
    __syncthreads();

    for (; tile < tiles; tile += step)
    {
        LinePointers const next = linePointers(p, following(tile) * kTILE_ROWS, lane);
        float acc[8][4]{};
#pragma unroll
        for (int group = 0; group < kGROUPS; ++group)
        {
            uint32_t a[4][4];
            operands<T>(a, ahead[group % kAHEAD]);
            ahead[group % kAHEAD] = group + kAHEAD < kGROUPS ? loadLines(p, lines, group + kAHEAD)
                                                             : loadLines(p, next, group + kAHEAD - kGROUPS);
#pragma unroll
            for (int s = 0; s < 4; ++s)
            {
#pragma unroll
                for (int n = 0; n < 4; ++n)
                {
                    // Matrices: columns 16 n to + 7 of inputs 16 s to + 7, of the next 8 inputs; the next 8 columns.
                    int const row = n * 16 + lane / 16 * 8 + lane % 8;
                    uint32_t b[4];
                    loadMatrices(b, slabs + group * kSLAB_BYTES + row * kROW_BYTES +
                                        (((2 * s + lane / 8 % 2) ^ (lane % 8)) << 4));
                    multiplyAdd<T>(acc[2 * n], a[s], b[0], b[1]);
                    multiplyAdd<T>(acc[2 * n + 1], a[s], b[2], b[3]);
                }
            }
        }
        lines = next;

        TokenPlace const places[2] = {tokenPlace(p, tile * kTILE_ROWS + lane / 4),
                                      tokenPlace(p, tile * kTILE_ROWS + lane / 4 + 8)};
        uint32_t out[16];
#pragma unroll
        for (int j = 0; j < 8; ++j)
        {
            int const n = 8 * j + 2 * (lane % 4);
            float2 const b = *reinterpret_cast<float2 const*>(bias + n);
#pragma unroll
            for (int h = 0; h < 2; ++h)
            {
                int64_t const from = static_cast<int64_t>(places[h].position) * p.outputs + column + n;
                float2 const added = unpackPair<T>(__ldg(reinterpret_cast<uint32_t const*>(p.positions + from)));
                out[2 * j + h] = packPair<T>(fmaf(p.scale, acc[j][2 * h], b.x) + added.x,
                                             fmaf(p.scale, acc[j][2 * h + 1], b.y) + added.y);
                if (places[h].row >= 0)
                {
                    int64_t const to = static_cast<int64_t>(places[h].row) * p.outputs + column + n;
                    *reinterpret_cast<uint32_t*>(p.y + to) = out[2 * j + h];
                }
            }
        }
        if (p.statistics != nullptr)
        {
            storeStatistics<T>(p, out, places, column, lane);
        }
    }
}

template <typename T>
cudaError_t launchType(PatchEmbeddingParams const& params, int multiprocessors, cudaStream_t stream)
{
    auto const kernel = patchEmbeddingKernel<T>;
    cudaError_t const status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSHARED_BYTES);
    if (status != cudaSuccess)
    {
        return status;
    }
    Arguments<T> const args = arguments<T>(params);
    int const columnTiles = params.outputs / kCOLUMNS;
    int const streams = std::clamp(multiprocessors / columnTiles, 1, ceilDiv(args.rows, kTILE_ROWS));
    kernel<<<columnTiles * streams, kTHREADS, kSHARED_BYTES, stream>>>(args);
    return cudaGetLastError();
}

}  // namespace

cudaError_t patchEmbeddingSm80(PatchEmbeddingParams const& params, int multiprocessors, cudaStream_t stream)
{
    return params.dataType == DataType::kHALF ? launchType<__half>(params, multiprocessors, stream)
                                              : launchType<__nv_bfloat16>(params, multiprocessors, stream);
}

}  // namespace trocr::patch_embedding_detail
