#pragma once

#include <cuda_runtime_api.h>

#include "common/data_type.h"

namespace trocr
{

enum class LinearActivation : int32_t
{
    kNONE = 0,
    kGELU = 1,  //!< exact: y = 0.5 v (1 + erf(v / sqrt(2)))
    kRELU = 2,
};

//! Columns behind one pair of partial row statistics.
constexpr int32_t kLINEAR_STATISTICS_WIDTH = 64;

constexpr int32_t kLINEAR_MAX_ROWS = 1 << 30;

//! y = activation(x' w^T + bias) + residual, accumulated in float32 and rounded once.
//!
//! Without inputStatistics x' is x. With them x' is (x - mean) / sqrt(variance + epsilon), the normalisation of
//! LayerNorm; its gamma and beta are folded beforehand: w = gamma * W (rounded to T), bias = b + W beta, and
//! weightSum[n] = sum over k of the rounded w[n, k]:
//!
//!     sum_k w[n, k] (x[m, k] - mean[m]) rstd[m] = rstd[m] (x w^T - mean[m] weightSum[n])
//!
//! Row statistics are float32 [M, K / 64, 2]: for each 64 columns of a row their mean and the sum of the squared
//! distances from it, of the values rounded to T. They are combined in a fixed order (Chan, Golub, LeVeque 1983), so
//! results do not depend on the tile sizes of the kernel that wrote them, and are the same in every run.
//!
//! With `e4m3` the product is one of e4m3 values, x of x / scale and the weight of W / scale: `productScale` is both
//! scales' product, and weightSum that of the weights times theirs. Then `quantized` takes y / outputScale as e4m3: in
//! place of y with a GELU, in addition to it where output statistics are wanted. e4m3 columns are stored in the order
//! of common/fp8.cuh.
//!
//! With `tokens` the outputs are keys and values in heads: y, of the first N / 2 columns, and `values`, of the others,
//! are T [M / tokens, N / 2 / headDim, tokens, headDim].
struct LinearParams
{
    void const* x;                 //!< T (or e4m3) [M, K], 16-byte aligned
    void const* weight;            //!< T (or e4m3) [N, K], 16-byte aligned
    float const* bias;             //!< float32 [N], 8-byte aligned, or null
    void const* residual;          //!< T [M, N], 16-byte aligned, may be y, or null; not together with an activation
    void* y;                       //!< T [M, N], 16-byte aligned; null with e4m3 and a GELU
    float const* inputStatistics;  //!< of x, float32 [M, K / 64, 2], 8-byte aligned, or null: no LayerNorm
    float const* weightSum;        //!< float32 [N], 8-byte aligned; with inputStatistics
    float* outputStatistics;       //!< of y, float32 [M, N / 64, 2], 8-byte aligned, or null; only with residual
    void* values;                  //!< 16-byte aligned; with `tokens`, else null
    int32_t tokens;                //!< S, which divides M; 0: y is T [M, N]. Not with a residual or an activation
    int32_t headDim;               //!< d, a multiple of 8 that divides N / 2; with `tokens`
    float epsilon;                 //!< added to the variance; with inputStatistics
    int64_t rows;                  //!< M, 1 to 2^30
    int32_t outputs;               //!< N, a multiple of 8 (of 64 with outputStatistics)
    int32_t inputs;                //!< K, a multiple of 8 (of 64 with inputStatistics)
    LinearActivation activation;
    DataType dataType;  //!< T
    int32_t tactic;     //!< 0: by cost; else 1 to linearTacticCount(), see README.md; 0 for kFLOAT
    //! Programmatic dependent launch: this grid may start while its predecessor in the stream ends. Before that end
    //! only `weight` is read, which the predecessor must not write.
    bool overlapPredecessor;
    bool e4m3;           //!< x and weight are; T is kHALF, K a multiple of 16, N of 64; compute capability 9.0
    void* quantized;     //!< e4m3 [M, N], 16-byte aligned, or null; with `e4m3`
    float productScale;  //!< with `e4m3`
    float outputScale;   //!< with `quantized`
};

//! Whether the sizes, the type and the combination of options are supported; of the pointers only null or not is
//! looked at. When not, *reason (if given) says why.
bool canImplementLinear(LinearParams const& params, char const** reason = nullptr);

//! Enqueues the op. Returns cudaErrorInvalidValue for what cannot be implemented, for null or misaligned pointers and
//! for a tactic that this device or problem does not have, cudaErrorNotSupported for e4m3 on another GPU than Hopper.
cudaError_t linear(LinearParams const& params, cudaStream_t stream);

//! What tactic 0 takes on Hopper.
int32_t linearTacticOnHopper(int64_t rows, int32_t outputs, int32_t inputs, bool residual, bool e4m3,
                             int32_t multiprocessors);

//! Highest tactic number; some of them are refused by some devices and problems.
int32_t linearTacticCount();

//! Bytes of the partial statistics of `rows` rows of `width` columns.
constexpr size_t linearStatisticsBytes(int64_t rows, int64_t width)
{
    return static_cast<size_t>(rows * (width / kLINEAR_STATISTICS_WIDTH)) * 2 * sizeof(float);
}

//! Partial statistics of a tensor that no linear kernel produced (the embeddings that enter the first layer).
struct RowStatisticsParams
{
    void const* x;      //!< T [M, K], aligned to two elements
    float* statistics;  //!< float32 [M, K / 64, 2], 8-byte aligned
    void* quantized;    //!< x / scale as e4m3 [M, K] in the order of common/fp8.cuh, 2-byte aligned, or null
    float scale;        //!< with `quantized`
    int64_t rows;       //!< M, 1 to 2^30
    int32_t width;      //!< K, a multiple of 64
    DataType dataType;  //!< T
};

//! Whether sizes and type are supported. When not, *reason (if given) says why.
bool canImplementRowStatistics(RowStatisticsParams const& params, char const** reason = nullptr);

cudaError_t rowStatistics(RowStatisticsParams const& params, cudaStream_t stream);

}  // namespace trocr
