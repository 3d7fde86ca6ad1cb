// Every architecture from sm_80: cp.async fills a ring of swizzled stages, ldmatrix and mma.sync read them. One tile a
// block; a warp computes kM16 x 16 rows by 64 columns, so that it holds whole chunks (epilogue.cuh).

#include <algorithm>

#include "linear/epilogue.cuh"
#include "linear/launch.h"
#include "linear/tactics.h"

namespace trocr::linear_detail
{
namespace
{

constexpr int kBLOCK_K = 64;
constexpr int kROW_BYTES = kBLOCK_K * 2;  //!< of a stage's row: eight pieces of 16 bytes, exchanged by row % 8

template <int kM16_, int kWARPS_M_, int kWARPS_N_, int kSTAGES_>
struct Tile
{
    static constexpr int kM16 = kM16_;
    static constexpr int kWARPS_M = kWARPS_M_;
    static constexpr int kTHREADS = 32 * kWARPS_M_ * kWARPS_N_;
    static constexpr int kSTAGES = kSTAGES_;
    static constexpr int kBM = kM16 * 16 * kWARPS_M;
    static constexpr int kBN = 64 * kWARPS_N_;
    static constexpr int kX_BYTES = kBM * kROW_BYTES;
    static constexpr int kSTAGE_BYTES = kX_BYTES + kBN * kROW_BYTES;
    static constexpr int kWARP_ROWS = kM16 * 16;
    static constexpr int kCOLUMNS_AT = kSTAGES * kSTAGE_BYTES;
    static constexpr int kSCALES_AT = kCOLUMNS_AT + kBN * 8;
    static constexpr int kSHARED_BYTES = kSCALES_AT + kTHREADS / 32 * kWARP_ROWS * 8;

    static_assert(kSHARED_BYTES <= 99 * 1024, "sm_86 and sm_89 have no more");
};

using Tile128x128 = Tile<2, 4, 2, 3>;
using Tile64x64 = Tile<1, 4, 1, 4>;

__device__ __forceinline__ uint32_t sharedAddress(void const* pointer)
{
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

//! cp.async: 16 bytes to shared memory; zeros where not `present`.
__device__ __forceinline__ void copyPiece(uint32_t destination, void const* source, bool present)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source), "r"(present ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ void loadMatrices(uint32_t (&r)[4], uint32_t row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}

//! mma.m16n8k16: d[16, 8] += a[16, 16] b[8, 16]^T.
__device__ __forceinline__ void multiply(float* d, uint32_t const (&a)[4], uint32_t b0, uint32_t b1, __half)
{
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void multiply(float* d, uint32_t const (&a)[4], uint32_t b0, uint32_t b1, __nv_bfloat16)
{
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

//! Rows [row, row + kROWS) and columns [column, column + 64) of T [rows, columns] to a stage.
template <int kROWS, int kTHREADS, typename T>
__device__ __forceinline__ void copyRows(uint32_t destination, T const* source, int row, int rows, int column,
                                         int columns)
{
    static_assert(kROWS * 8 % kTHREADS == 0);
#pragma unroll
    for (int i = 0; i < kROWS * 8 / kTHREADS; ++i)
    {
        int const piece = i * kTHREADS + static_cast<int>(threadIdx.x);
        int const r = piece / 8;
        int const c = piece % 8;
        bool const present = row + r < rows && column + 8 * c < columns;
        int64_t const at = present ? static_cast<int64_t>(row + r) * columns + column + 8 * c : 0;
        copyPiece(destination + r * kROW_BYTES + ((c ^ (r % 8)) << 4), source + at, present);
    }
}

template <typename T, Epilogue kEPILOGUE, typename TILE>
__global__ void __launch_bounds__(TILE::kTHREADS)
    linearSm80Kernel(T const* x, T const* weight, T const* residual, T* y, EpilogueParams const p)
{
    extern __shared__ __align__(1024) uint8_t sharedMemory[];
    uint32_t const stages = sharedAddress(sharedMemory);
    int const warp = static_cast<int>(threadIdx.x) / 32;
    int const lane = static_cast<int>(threadIdx.x) % 32;
    int const columnTiles = (p.outputs + TILE::kBN - 1) / TILE::kBN;
    int const tileRow = static_cast<int>(blockIdx.x) / columnTiles * TILE::kBM;
    int const tileColumn = static_cast<int>(blockIdx.x) % columnTiles * TILE::kBN;
    int const warpRow = warp % TILE::kWARPS_M * TILE::kWARP_ROWS;
    int const warpColumn = warp / TILE::kWARPS_M * 64;
    int const steps = (p.inputs + kBLOCK_K - 1) / kBLOCK_K;

    // One commit a step, also when nothing is left to fetch: the group count stays that of the steps.
    auto const fetch = [&](int step)
    {
        if (step < steps)
        {
            uint32_t const stage = stages + step % TILE::kSTAGES * TILE::kSTAGE_BYTES;
            copyRows<TILE::kBM, TILE::kTHREADS>(stage, x, tileRow, p.rows, step * kBLOCK_K, p.inputs);
            copyRows<TILE::kBN, TILE::kTHREADS>(stage + TILE::kX_BYTES, weight, tileColumn, p.outputs, step * kBLOCK_K,
                                                p.inputs);
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
#pragma unroll
    for (int step = 0; step < TILE::kSTAGES - 1; ++step)
    {
        fetch(step);
    }

    auto* const columns = reinterpret_cast<ColumnPair*>(sharedMemory + TILE::kCOLUMNS_AT) + warpColumn / 2;
    auto* const scales = reinterpret_cast<float2*>(sharedMemory + TILE::kSCALES_AT) + warp * TILE::kWARP_ROWS;
    if (warp % TILE::kWARPS_M == 0)
    {
        loadColumnPairs<64>(columns, p, tileColumn + warpColumn, lane);  // for all warps of these columns
    }
    if (p.inputStatistics != nullptr)
    {
        loadRowScales<TILE::kM16>(scales, p, tileRow + warpRow, 16, lane);
    }

    float acc[TILE::kM16][32]{};
    for (int step = 0; step < steps; ++step)
    {
        asm volatile("cp.async.wait_group %0;" ::"n"(TILE::kSTAGES - 2) : "memory");
        __syncthreads();
        fetch(step + TILE::kSTAGES - 1);
        uint32_t const xStage = stages + step % TILE::kSTAGES * TILE::kSTAGE_BYTES;
        uint32_t const weightStage = xStage + TILE::kX_BYTES;
#pragma unroll
        for (int k = 0; k < kBLOCK_K / 16; ++k)
        {
            uint32_t a[TILE::kM16][4];
#pragma unroll
            for (int m = 0; m < TILE::kM16; ++m)
            {
                int const row = warpRow + m * 16 + lane % 16;
                loadMatrices(a[m], xStage + row * kROW_BYTES + (((2 * k + lane / 16) ^ (lane % 8)) << 4));
            }
#pragma unroll
            for (int n = 0; n < 4; ++n)
            {
                uint32_t b[4];
                int const row = warpColumn + n * 16 + lane / 16 * 8 + lane % 8;
                loadMatrices(b, weightStage + row * kROW_BYTES + (((2 * k + lane / 8 % 2) ^ (lane % 8)) << 4));
#pragma unroll
                for (int m = 0; m < TILE::kM16; ++m)
                {
                    multiply(&acc[m][8 * n], a[m], b[0], b[1], T{});
                    multiply(&acc[m][8 * n + 4], a[m], b[2], b[3], T{});
                }
            }
        }
    }
    __syncthreads();  // the stages become the warps' buffers of one chunk

    uint8_t* const buffer = sharedMemory + warp * kCHUNK_ROWS * kROW_BYTES;
    int const column = tileColumn + warpColumn;
    int const piece = lane % 8;  // coalesced: eight lanes a row
    bool const pieceInside = column + 8 * piece < p.outputs;
    auto const pieceAt = [&](int r)
    { return reinterpret_cast<uint4*>(buffer + r * kROW_BYTES + ((piece ^ (r % 8)) << 4)); };
#pragma unroll
    for (int m = 0; m < TILE::kM16; ++m)
    {
        int const row = tileRow + warpRow + 16 * m;
        auto const offset = [&](int r) { return static_cast<int64_t>(row + r) * p.outputs + column + 8 * piece; };
        if constexpr (kEPILOGUE == Epilogue::kRESIDUAL)
        {
#pragma unroll
            for (int r = lane / 8; r < kCHUNK_ROWS; r += 4)
            {
                if (pieceInside && row + r < p.rows)
                {
                    *pieceAt(r) = *reinterpret_cast<uint4 const*>(residual + offset(r));
                }
            }
            __syncwarp();
        }
        RowScales const rowScales = laneScales<T>(p, scales + m * kCHUNK_ROWS, lane);
        uint32_t out[16];
#pragma unroll
        for (int j = 0; j < 8; ++j)
        {
            uint32_t* const pairs[2] = {
                reinterpret_cast<uint32_t*>(buffer + lane / 4 * kROW_BYTES + ((j ^ (lane / 4)) << 4)) + lane % 4,
                reinterpret_cast<uint32_t*>(buffer + (8 + lane / 4) * kROW_BYTES + ((j ^ (lane / 4)) << 4)) + lane % 4};
            uint32_t added[2] = {0, 0};
            if constexpr (kEPILOGUE == Epilogue::kRESIDUAL)
            {
                added[0] = *pairs[0];
                added[1] = *pairs[1];
            }
            uint32_t r[2];
            finishGroup<T, kEPILOGUE>(r, &acc[m][4 * j], added, rowScales, columns[4 * j + lane % 4], p);
            *pairs[0] = out[2 * j] = r[0];
            *pairs[1] = out[2 * j + 1] = r[1];
        }
        __syncwarp();
#pragma unroll
        for (int r = lane / 8; r < kCHUNK_ROWS; r += 4)
        {
            if (pieceInside && row + r < p.rows)
            {
                bool const inHeads = p.heads.tokens != 0;
                T* const to = inHeads ? HeadsCursor<T>(p, row + r, column + 8 * piece).get() : y + offset(r);
                *reinterpret_cast<uint4*>(to) = *pieceAt(r);
            }
        }
        if constexpr (kEPILOGUE == Epilogue::kRESIDUAL)
        {
            if (p.outputStatistics != nullptr)
            {
                storeStatistics<T>(out, p, row, column, lane);
            }
        }
        __syncwarp();
    }
}

template <typename T, Epilogue kEPILOGUE, typename TILE>
cudaError_t launchTile(LinearParams const& params, cudaStream_t stream)
{
    auto const kernel = linearSm80Kernel<T, kEPILOGUE, TILE>;
    cudaError_t const status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, TILE::kSHARED_BYTES);
    if (status != cudaSuccess)
    {
        return status;
    }
    int const blocks = ceilDiv(params.rows, TILE::kBM) * ceilDiv(params.outputs, TILE::kBN);
    kernel<<<blocks, TILE::kTHREADS, TILE::kSHARED_BYTES, stream>>>(
        static_cast<T const*>(params.x), static_cast<T const*>(params.weight), static_cast<T const*>(params.residual),
        static_cast<T*>(params.y), epilogueParams(params));
    return cudaGetLastError();
}

template <typename T, Epilogue kEPILOGUE>
cudaError_t launchEpilogue(LinearParams const& params, int32_t tactic, int multiprocessors, cudaStream_t stream)
{
    // Large tiles move half the bytes a product, once they give every multiprocessor work.
    int const largeTiles = ceilDiv(params.rows, Tile128x128::kBM) * ceilDiv(params.outputs, Tile128x128::kBN);
    bool const large = tactic == 0 ? 4 * largeTiles > 3 * multiprocessors : tactic == 1;
    return large ? launchTile<T, kEPILOGUE, Tile128x128>(params, stream)
                 : launchTile<T, kEPILOGUE, Tile64x64>(params, stream);
}

template <typename T>
cudaError_t launchType(LinearParams const& params, int32_t tactic, int multiprocessors, cudaStream_t stream)
{
    switch (epilogueOf(params))
    {
        case Epilogue::kBIAS:
            return launchEpilogue<T, Epilogue::kBIAS>(params, tactic, multiprocessors, stream);
        case Epilogue::kGELU:
            return launchEpilogue<T, Epilogue::kGELU>(params, tactic, multiprocessors, stream);
        case Epilogue::kRESIDUAL:
            return launchEpilogue<T, Epilogue::kRESIDUAL>(params, tactic, multiprocessors, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t linearSm80(LinearParams const& params, int32_t tactic, int multiprocessors, cudaStream_t stream)
{
    return params.dataType == DataType::kHALF ? launchType<__half>(params, tactic, multiprocessors, stream)
                                              : launchType<__nv_bfloat16>(params, tactic, multiprocessors, stream);
}

}  // namespace trocr::linear_detail
