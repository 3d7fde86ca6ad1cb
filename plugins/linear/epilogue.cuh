#pragma once

// What both kernels do with an accumulated chunk of 16 rows and 64 columns, which one warp holds as the matrix
// instructions leave it: v[4 j + 2 h + e] of lane l is the element of row 8 h + l / 4, column 8 j + 2 (l % 4) + e.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "common/device.cuh"
#include "common/fp8.cuh"
#include "linear/kernel.h"

namespace trocr::linear_detail
{

constexpr int kCHUNK_ROWS = 16;
constexpr int kCHUNK_COLUMNS = kLINEAR_STATISTICS_WIDTH;

//! In place of a type: the operands are e4m3, all else is float16.
struct E4m3
{
};

template <typename T>
constexpr bool kIS_E4M3 = std::is_same_v<T, E4m3>;

//! What a kernel of `T` multiplies, and what it reads and writes around the product.
template <typename T>
struct TypesOf
{
    using Operand = T;
    using Output = T;
};

template <>
struct TypesOf<E4m3>
{
    using Operand = __nv_fp8_e4m3;
    using Output = __half;
};

//! The compiled variants. kBIAS covers no activation and ReLU (a lower bound of -inf or 0).
enum class Epilogue
{
    kBIAS,
    kGELU,
    kRESIDUAL,
};

//! Keys and values in heads, in place of y [M, N]; see LinearParams. tokens is 0 where y is as it is.
struct HeadSplit
{
    void* keys;
    void* values;
    int32_t tokens;
    int32_t headDim;
};

//! The part of LinearParams that the epilogue reads on the device.
struct EpilogueParams
{
    float const* bias;
    float const* weightSum;
    float const* inputStatistics;
    float* outputStatistics;
    uint8_t* quantized;
    HeadSplit heads;
    float productScale;
    float outputFactor;  //!< 1 / outputScale
    float epsilon;
    float lowerBound;
    int32_t rows;
    int32_t outputs;
    int32_t inputs;
};

inline Epilogue epilogueOf(LinearParams const& p)
{
    if (p.residual != nullptr)
    {
        return Epilogue::kRESIDUAL;
    }
    return p.activation == LinearActivation::kGELU ? Epilogue::kGELU : Epilogue::kBIAS;
}

inline EpilogueParams epilogueParams(LinearParams const& p)
{
    float const lowerBound = p.activation == LinearActivation::kRELU ? 0.0F : -__builtin_huge_valf();
    return {p.bias,
            p.weightSum,
            p.inputStatistics,
            p.outputStatistics,
            static_cast<uint8_t*>(p.quantized),
            {p.y, p.values, p.tokens, p.headDim},
            p.productScale,
            1.0F / p.outputScale,
            p.epsilon,
            lowerBound,
            static_cast<int32_t>(p.rows),
            p.outputs,
            p.inputs};
}

//! Where columns `column` to `column` + 7 of a row go, in heads. Divisions are long: one for the row, which then
//! advances, one for the columns.
template <typename T>
class HeadsCursor
{
public:
    __device__ __forceinline__ HeadsCursor(EpilogueParams const& p, int row, int column)
        : mTokens(p.heads.tokens), mRowSize(p.heads.headDim)
    {
        bool const ofValues = 2 * column >= p.outputs;
        unsigned const width = p.outputs / 2;
        unsigned const at = ofValues ? column - width : column;
        unsigned const head = at / static_cast<unsigned>(mRowSize);
        unsigned const image = static_cast<unsigned>(row) / static_cast<unsigned>(mTokens);
        mToken = row - static_cast<int>(image) * mTokens;
        // The same head of the next image is all heads further, less the one that has been passed.
        mToNextImage = static_cast<int64_t>(width - mRowSize) * mTokens;
        mAt = static_cast<T*>(ofValues ? p.heads.values : p.heads.keys) +
              static_cast<int64_t>(image) * width * mTokens +
              (static_cast<int64_t>(head) * mTokens + mToken) * mRowSize + (at - head * mRowSize);
    }

    __device__ __forceinline__ T* get() const
    {
        return mAt;
    }

    __device__ __forceinline__ void advance(int rows)
    {
        mAt += rows * mRowSize;
        mToken += rows;
        while (mToken >= mTokens)
        {
            mToken -= mTokens;
            mAt += mToNextImage;
        }
    }

private:
    T* mAt;
    int64_t mToNextImage;
    int mToken;
    int mTokens;
    int mRowSize;
};

__device__ __forceinline__ uint32_t pack(float low, float high, __half)
{
    __half2 const v = __floats2half2_rn(low, high);
    return reinterpret_cast<uint32_t const&>(v);
}

__device__ __forceinline__ uint32_t pack(float low, float high, __nv_bfloat16)
{
    __nv_bfloat162 const v = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<uint32_t const&>(v);
}

__device__ __forceinline__ float2 unpack(uint32_t v, __half)
{
    return __half22float2(reinterpret_cast<__half2 const&>(v));
}

__device__ __forceinline__ float2 unpack(uint32_t v, __nv_bfloat16)
{
    return __bfloat1622float2(reinterpret_cast<__nv_bfloat162 const&>(v));
}

//! max(x, bound), NaN if x is.
__device__ __forceinline__ float boundBelow(float x, float bound)
{
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(bound));
    return y;
}

//! Partial statistics of one row, or of kMOST parts of it: loaded together, combined later.
template <int kMOST>
struct PartialStatistics
{
    float2 parts[kMOST];

    //! Nothing where there are no statistics, and for rows beyond the last.
    __device__ __forceinline__ void load(EpilogueParams const& p, int row, int from = 0)
    {
        int const count = p.inputs / kCHUNK_COLUMNS;
        auto const* const statistics =
            reinterpret_cast<float2 const*>(p.inputStatistics) + static_cast<int64_t>(row) * count;
#pragma unroll
        for (int i = 0; i < kMOST; ++i)
        {
            if (p.inputStatistics != nullptr && row < p.rows && from + i < count)
            {
                parts[i] = statistics[from + i];
            }
        }
    }

    //! Chan's combination, in order, of the parts from `from` on with what came before.
    __device__ __forceinline__ void combine(EpilogueParams const& p, float& mean, float& m2, int from = 0) const
    {
        int const count = p.inputs / kCHUNK_COLUMNS;
#pragma unroll
        for (int i = 0; i < kMOST; ++i)
        {
            if (from + i < count)
            {
                float const share = __fdividef(1.0F, static_cast<float>(from + i + 1));
                float const delta = parts[i].x - mean;
                mean = fmaf(delta, share, mean);
                m2 += fmaf(delta * delta, kCHUNK_COLUMNS * (1.0F - share), parts[i].y);
            }
        }
    }

    //! (rstd, -mean rstd) of a row of kMOST parts at most.
    __device__ __forceinline__ float2 scale(EpilogueParams const& p) const
    {
        float mean = 0.0F;
        float m2 = 0.0F;
        combine(p, mean, m2);
        return normalisation(p, mean, m2);
    }

    static __device__ __forceinline__ float2 normalisation(EpilogueParams const& p, float mean, float m2)
    {
        float const rstd = rsqrtf(m2 / static_cast<float>(p.inputs) + p.epsilon);
        return make_float2(rstd, -mean * rstd);
    }
};

//! (rstd, -mean rstd) of one row.
__device__ __forceinline__ float2 rowScale(EpilogueParams const& p, int row)
{
    constexpr int kAT_ONCE = 8;  // latency is all that this costs
    float mean = 0.0F;
    float m2 = 0.0F;
    PartialStatistics<kAT_ONCE> statistics;
    for (int from = 0; from < p.inputs / kCHUNK_COLUMNS; from += kAT_ONCE)
    {
        statistics.load(p, row, from);
        statistics.combine(p, mean, m2, from);
    }
    return statistics.normalisation(p, mean, m2);
}

//! Scales of a warp's kBLOCKS blocks of 16 rows, `stride` rows apart, to `scales` in shared memory. Rows beyond the
//! last are left alone: what is computed with them is never stored.
template <int kBLOCKS>
__device__ __forceinline__ void loadRowScales(float2* scales, EpilogueParams const& p, int row, int stride, int lane)
{
    for (int i = lane; i < kBLOCKS * kCHUNK_ROWS; i += 32)
    {
        int const r = row + i / kCHUNK_ROWS * stride + i % kCHUNK_ROWS;
        if (r < p.rows)
        {
            scales[i] = rowScale(p, r);
        }
    }
    __syncwarp();
}

//! Brings what loadRowScales will read into the first cache.
template <int kBLOCKS>
__device__ __forceinline__ void prefetchStatistics(EpilogueParams const& p, int row, int stride, int lane)
{
    int const bytes = p.inputs / kCHUNK_COLUMNS * static_cast<int>(sizeof(float2));
    for (int i = lane; i < kBLOCKS * kCHUNK_ROWS; i += 32)
    {
        int const r = row + i / kCHUNK_ROWS * stride + i % kCHUNK_ROWS;
        auto const* const at = reinterpret_cast<uint8_t const*>(p.inputStatistics) + static_cast<int64_t>(r) * bytes;
        for (int offset = 0; r < p.rows && offset < bytes; offset += 32)
        {
            asm volatile("prefetch.global.L1 [%0];" ::"l"(at + offset));
        }
    }
}

//! (rstd, -mean rstd) of a lane's two rows; e4m3: the first times the scale of the product.
struct RowScales
{
    float2 row[2];
};

template <typename T>
__device__ __forceinline__ RowScales laneScales(EpilogueParams const& p, float2 const* scales, int lane)
{
    RowScales rows{{make_float2(1.0F, 0.0F), make_float2(1.0F, 0.0F)}};
    if (p.inputStatistics != nullptr)
    {
        rows = {{scales[lane / 4], scales[lane / 4 + 8]}};
    }
    if constexpr (kIS_E4M3<T>)
    {
        rows.row[0].x *= p.productScale;
        rows.row[1].x *= p.productScale;
    }
    return rows;
}

//! Bias and weight sum of two neighbouring columns.
struct ColumnPair
{
    float2 bias;
    float2 sum;
};

//! The column pairs from `column` on, to `pairs` in shared memory; zeros for what is absent.
template <int kCOLUMNS>
__device__ __forceinline__ void loadColumnPairs(ColumnPair* pairs, EpilogueParams const& p, int column, int lane)
{
    auto const load = [&](float const* values, int at)
    {
        bool const present = values != nullptr && at < p.outputs;
        return present ? __ldg(reinterpret_cast<float2 const*>(values + at)) : make_float2(0.0F, 0.0F);
    };
#pragma unroll
    for (int i = lane; i < kCOLUMNS / 2; i += 32)
    {
        float2 const bias = load(p.bias, column + 2 * i);
        float2 const sum = load(p.weightSum, column + 2 * i);
        reinterpret_cast<float4&>(pairs[i]) = make_float4(bias.x, bias.y, sum.x, sum.y);
    }
    __syncwarp();
}

//! Column group j (8 columns) of a chunk: v[0..3] of the lane -> two packed pairs (rows l / 4 and 8 + l / 4), of e4m3
//! where that is all that a GELU leaves.
//! `residual` holds the same elements of the residual, packed; `columns` the lane's pair.
template <typename T, Epilogue kEPILOGUE>
__device__ __forceinline__ void finishGroup(uint32_t (&out)[2], float const* v, uint32_t const* residual,
                                            RowScales const& scales, ColumnPair const& columns, EpilogueParams const& p)
{
    float4 const c = reinterpret_cast<float4 const&>(columns);
    float2 const bias{c.x, c.y};
    float2 const sum{c.z, c.w};
#pragma unroll
    for (int h = 0; h < 2; ++h)
    {
        float2 const scale = scales.row[h];
        float low = fmaf(scale.x, v[2 * h], fmaf(scale.y, sum.x, bias.x));
        float high = fmaf(scale.x, v[2 * h + 1], fmaf(scale.y, sum.y, bias.y));
        if constexpr (kEPILOGUE == Epilogue::kBIAS)
        {
            low = boundBelow(low, p.lowerBound);
            high = boundBelow(high, p.lowerBound);
        }
        else if constexpr (kEPILOGUE == Epilogue::kGELU)
        {
            low = gelu(low);
            high = gelu(high);
        }
        else
        {
            float2 const r = unpack(residual[h], typename TypesOf<T>::Output{});
            low += r.x;
            high += r.y;
        }
        if constexpr (kIS_E4M3<T> && kEPILOGUE == Epilogue::kGELU)
        {
            out[h] = toE4m3(low * p.outputFactor, high * p.outputFactor);
        }
        else
        {
            out[h] = pack(low, high, typename TypesOf<T>::Output{});
        }
    }
}

//! Sum over the four lanes that share a row.
__device__ __forceinline__ float quadSum(float v)
{
    v += __shfl_xor_sync(0xFFFFFFFFU, v, 1);
    return v + __shfl_xor_sync(0xFFFFFFFFU, v, 2);
}

//! Mean and sum of squared distances of each row of a finished chunk; out[2 j + h] as finishGroup leaves it.
template <typename T>
__device__ __forceinline__ void storeStatistics(uint32_t const (&out)[16], EpilogueParams const& p, int row, int column,
                                                int lane)
{
    int const parts = p.outputs / kCHUNK_COLUMNS;
    auto* statistics = reinterpret_cast<float2*>(p.outputStatistics);
#pragma unroll
    for (int h = 0; h < 2; ++h)
    {
        float sum = 0.0F;
#pragma unroll
        for (int j = 0; j < 8; ++j)
        {
            float2 const v = unpack(out[2 * j + h], T{});
            sum += v.x + v.y;
        }
        float const mean = quadSum(sum) * (1.0F / kCHUNK_COLUMNS);
        float m2 = 0.0F;
#pragma unroll
        for (int j = 0; j < 8; ++j)
        {
            float2 const v = unpack(out[2 * j + h], T{});
            m2 = fmaf(v.x - mean, v.x - mean, m2);
            m2 = fmaf(v.y - mean, v.y - mean, m2);
        }
        m2 = quadSum(m2);
        int const r = row + 8 * h + lane / 4;
        if (lane % 4 == 0 && r < p.rows && column < p.outputs)
        {
            statistics[static_cast<int64_t>(r) * parts + column / kCHUNK_COLUMNS] = make_float2(mean, m2);
        }
    }
}

}  // namespace trocr::linear_detail
