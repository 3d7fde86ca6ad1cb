#pragma once

// What the kernels share: where a patch's pixels and its row of y are, pixels as operands of the matrix instructions,
// the special tokens.

#include <cstdint>

#include "common/device.cuh"
#include "patch_embedding/kernel.h"

namespace trocr::patch_embedding_detail
{

constexpr int kGROUP_INPUTS = 64;  //!< four lines of a patch in one channel: one step of the main loops
constexpr int kGROUPS = kPATCH_INPUTS / kGROUP_INPUTS;
constexpr int kPART_COLUMNS = 64;  //!< columns behind one pair of statistics

//! Division by a number that the host knows.
struct Divisor
{
    uint32_t value;
    uint32_t inverse;  //!< 2^32 / value, rounded down

    __device__ __forceinline__ uint32_t quotient(uint32_t number) const
    {
        uint32_t const below = __umulhi(number, inverse);  // the quotient, or one less
        return number - below * value >= value ? below + 1 : below;
    }
};

inline Divisor divisor(uint32_t value)
{
    return {value, value == 1 ? 0xFFFFFFFFU : static_cast<uint32_t>((uint64_t{1} << 32) / value)};
}

template <typename T>
struct Arguments
{
    uint8_t const* pixels;
    T const* weight;
    float const* bias;
    T const* positions;
    T* y;
    float2* statistics;  //!< or null
    float scale;
    int32_t rows;  //!< patches of all images
    int32_t batch;
    int32_t outputs;
    int32_t specialTokens;
    int32_t width;         //!< of an image
    int32_t plane;         //!< height * width
    Divisor patches;       //!< of an image
    Divisor patchColumns;  //!< of an image
};

template <typename T>
Arguments<T> arguments(PatchEmbeddingParams const& p)
{
    int32_t const patchColumns = p.width / kPATCH_SIZE;
    int32_t const patches = p.height / kPATCH_SIZE * patchColumns;
    return {static_cast<uint8_t const*>(p.pixels),
            static_cast<T const*>(p.weight),
            p.bias,
            static_cast<T const*>(p.positions),
            static_cast<T*>(p.y),
            reinterpret_cast<float2*>(p.statistics),
            p.scale,
            p.batch * patches,
            p.batch,
            p.outputs,
            p.specialTokens,
            p.width,
            p.height * p.width,
            divisor(patches),
            divisor(patchColumns)};
}

//! The top left pixel, in the first channel, of patch `row` of all images.
template <typename T>
__device__ __forceinline__ uint8_t const* patchPixels(Arguments<T> const& p, int row)
{
    uint32_t const image = p.patches.quotient(row);
    uint32_t const patch = row - image * p.patches.value;
    uint32_t const patchRow = p.patchColumns.quotient(patch);
    uint32_t const patchColumn = patch - patchRow * p.patchColumns.value;
    return p.pixels + static_cast<int64_t>(image) * 3 * p.plane +
           (patchRow * kPATCH_SIZE * static_cast<uint32_t>(p.width) + patchColumn * kPATCH_SIZE);
}

//! Where a patch goes.
struct TokenPlace
{
    int32_t row;       //!< of y as [B S, N]; -1 behind the last patch
    int32_t position;  //!< row of the positions
};

template <typename T>
__device__ __forceinline__ TokenPlace tokenPlace(Arguments<T> const& p, int row)
{
    int const clamped = min(row, p.rows - 1);
    int const image = static_cast<int>(p.patches.quotient(clamped));
    return {row < p.rows ? clamped + (image + 1) * p.specialTokens : -1,
            clamped - image * static_cast<int>(p.patches.value) + p.specialTokens};
}

//! What a lane holds of the four lines of one group of two patches: patch rows g and g + 8 of a warp's 16, with
//! g = lane / 4; of both line lane % 4.
struct Lines
{
    uint4 low;
    uint4 high;
};

//! The sources of a lane's lines.
struct LinePointers
{
    uint8_t const* low;
    uint8_t const* high;
};

//! Of the warp's 16 patches from `row` on. Behind the last patch it points at the last one, whose results are dropped.
template <typename T>
__device__ __forceinline__ LinePointers linePointers(Arguments<T> const& p, int row, int lane)
{
    int const last = p.rows - 1;
    int const offset = lane % 4 * p.width;
    return {patchPixels(p, min(row + lane / 4, last)) + offset, patchPixels(p, min(row + lane / 4 + 8, last)) + offset};
}

//! Eight neighbouring patches of four lines: a warp's load takes four whole 128-byte lines of memory.
template <typename T>
__device__ __forceinline__ Lines loadLines(Arguments<T> const& p, LinePointers const& from, int group)
{
    int const offset = group / 4 * p.plane + group % 4 * 4 * p.width;
    return {*reinterpret_cast<uint4 const*>(from.low + offset), *reinterpret_cast<uint4 const*>(from.high + offset)};
}

//! Four pixels v -> v - 128, two pairs; exact.
__device__ __forceinline__ void centre(uint32_t (&pairs)[2], uint32_t pixels, __half)
{
    // 0x6400 + v is 1024 + v.
    __half2 const offset = __half2half2(__ushort_as_half(0x6480));  // 1152
    uint32_t const low = __byte_perm(pixels, 0x64646464U, 0x4140);
    uint32_t const high = __byte_perm(pixels, 0x64646464U, 0x4342);
    __half2 const lowPair = __hsub2(reinterpret_cast<__half2 const&>(low), offset);
    __half2 const highPair = __hsub2(reinterpret_cast<__half2 const&>(high), offset);
    pairs[0] = reinterpret_cast<uint32_t const&>(lowPair);
    pairs[1] = reinterpret_cast<uint32_t const&>(highPair);
}

__device__ __forceinline__ void centre(uint32_t (&pairs)[2], uint32_t pixels, __nv_bfloat16)
{
#pragma unroll
    for (int i = 0; i < 2; ++i)
    {
        // bfloat16 has seven bits behind the first: 0x4300 + v % 128 is 128 + v % 128. Subtracted is 128 where v is at
        // least 128, else 256.
        uint32_t const v = __byte_perm(pixels, 0U, i == 0 ? 0x4140 : 0x4342);
        uint32_t const low = (v & 0x007F007FU) | 0x43004300U;
        uint32_t const offset = (v & 0x00800080U) ^ 0x43804380U;
        __nv_bfloat162 const pair =
            __hsub2(reinterpret_cast<__nv_bfloat162 const&>(low), reinterpret_cast<__nv_bfloat162 const&>(offset));
        pairs[i] = reinterpret_cast<uint32_t const&>(pair);
    }
}

//! Operands A of the four products m16n8k16 (or a warp's share of m64nNk16) of one group. The lines are used as they
//! come: of product s lane t of a quad has columns 2t, 2t + 1 (a[0], a[1]) and 2t + 8, 2t + 9 (a[2], a[3]), and puts
//! pixels 4s to 4s + 3 of its line there. That is the order of the weight's inputs.
template <typename T>
__device__ __forceinline__ void operands(uint32_t (&a)[4][4], Lines const& lines)
{
    uint32_t const low[4] = {lines.low.x, lines.low.y, lines.low.z, lines.low.w};
    uint32_t const high[4] = {lines.high.x, lines.high.y, lines.high.z, lines.high.w};
#pragma unroll
    for (int s = 0; s < 4; ++s)
    {
        uint32_t lowPairs[2];
        uint32_t highPairs[2];
        centre(lowPairs, low[s], T{});
        centre(highPairs, high[s], T{});
        a[s][0] = lowPairs[0];
        a[s][1] = highPairs[0];
        a[s][2] = lowPairs[1];
        a[s][3] = highPairs[1];
    }
}

//! Sum over the four lanes that share a row of an accumulator.
__device__ __forceinline__ float quadSum(float v)
{
    return groupSum<4>(v);
}

//! Statistics of the two rows that a lane has a part of: out[2 j + h] is the packed pair of row 8 h + lane / 4 and
//! columns 8 j + 2 (lane % 4), + 1 of one part.
template <typename T>
__device__ __forceinline__ void storeStatistics(Arguments<T> const& p, uint32_t const (&out)[16],
                                                TokenPlace const (&places)[2], int column, int lane)
{
#pragma unroll
    for (int h = 0; h < 2; ++h)
    {
        float sum = 0.0F;
#pragma unroll
        for (int j = 0; j < 8; ++j)
        {
            float2 const v = unpackPair<T>(out[2 * j + h]);
            sum += v.x + v.y;
        }
        float const mean = quadSum(sum) * (1.0F / kPART_COLUMNS);
        float m2 = 0.0F;
#pragma unroll
        for (int j = 0; j < 8; ++j)
        {
            float2 const v = unpackPair<T>(out[2 * j + h]);
            m2 = fmaf(v.x - mean, v.x - mean, m2);
            m2 = fmaf(v.y - mean, v.y - mean, m2);
        }
        m2 = quadSum(m2);
        if (lane % 4 == 0 && places[h].row >= 0)
        {
            int64_t const part = static_cast<int64_t>(places[h].row) * (p.outputs / kPART_COLUMNS);
            p.statistics[part + column / kPART_COLUMNS] = make_float2(mean, m2);
        }
    }
}

//! The special tokens of all images and their statistics, shared out among the grid's warps.
template <typename T>
__device__ __forceinline__ void writeSpecialTokens(Arguments<T> const& p, int warp, int warps, int lane)
{
    int const parts = p.outputs / kPART_COLUMNS;
    int const tokens = p.specialTokens + static_cast<int>(p.patches.value);
    int const items = p.batch * p.specialTokens * parts;
    for (int item = warp; item < items; item += warps)
    {
        int const part = item % parts;
        int const token = item / parts % p.specialTokens;
        int64_t const row = static_cast<int64_t>(item / parts / p.specialTokens) * tokens + token;
        int const column = part * kPART_COLUMNS + lane;
        T const* const from = p.positions + static_cast<int64_t>(token) * p.outputs + column;
        T* const to = p.y + row * p.outputs + column;
        T const values[2] = {from[0], from[32]};
        to[0] = values[0];
        to[32] = values[1];
        if (p.statistics != nullptr)
        {
            float const v[2] = {toFloat(values[0]), toFloat(values[1])};
            float const mean = groupSum(v[0] + v[1]) * (1.0F / kPART_COLUMNS);
            float const m2 = groupSum((v[0] - mean) * (v[0] - mean) + (v[1] - mean) * (v[1] - mean));
            if (lane == 0)
            {
                p.statistics[row * parts + part] = make_float2(mean, m2);
            }
        }
    }
}

// One file an architecture or type.
cudaError_t patchEmbeddingSm90(PatchEmbeddingParams const& params, int multiprocessors, cudaStream_t stream);
cudaError_t patchEmbeddingSm80(PatchEmbeddingParams const& params, int multiprocessors, cudaStream_t stream);
cudaError_t patchEmbeddingFloat(PatchEmbeddingParams const& params, cudaStream_t stream);

}  // namespace trocr::patch_embedding_detail
