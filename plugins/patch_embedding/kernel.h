#pragma once

#include <cuda_runtime_api.h>

#include "common/data_type.h"

namespace trocr
{

//! Pixels of a patch's side.
constexpr int32_t kPATCH_SIZE = 16;

//! Inputs of the product: three channels of a patch.
constexpr int32_t kPATCH_INPUTS = 3 * kPATCH_SIZE * kPATCH_SIZE;

//! What pixels are counted from. v - 128 is exact in every type, and half the size of v.
constexpr int32_t kPIXEL_CENTRE = 128;

constexpr int32_t kPATCH_MAX_ROWS = 1 << 30;

enum class PatchEmbeddingPath : int32_t
{
    kAUTO = 0,     //!< the fastest that the type and the device allow
    kGENERAL = 1,  //!< mma.sync, compute capability 8.0 and above
    kHOPPER = 2,   //!< wgmma, compute capability 9.0
};

//! What enters the first encoder layer, straight from pixels:
//!
//!     y[b, special + p] = scale * (pixels of patch p - 128) w^T + bias + positions[special + p]
//!     y[b, s]           = positions[s]       for the special tokens s, which are in the positions already
//!
//! accumulated in float32 and rounded once. Patches are counted row by row. The normalisation of the pixels is folded
//! beforehand into weight, scale and bias (README.md).
//!
//! A row of w holds a patch's pixels in the order in which the kernels read them: channel, y / 4, x / 4, x / 2 % 2, y %
//! 4, x % 2, the last running fastest.
struct PatchEmbeddingParams
{
    void const* pixels;     //!< uint8 [B, 3, height, width], 16-byte aligned
    void const* weight;     //!< T [N, 768], 16-byte aligned
    float const* bias;      //!< float32 [N], 8-byte aligned
    void const* positions;  //!< T [S, N], 16-byte aligned
    void* y;                //!< T [B, S, N], 16-byte aligned
    float* statistics;      //!< of y, float32 [B, S, N / 64, 2] as in linear/kernel.h, 8-byte aligned, or null
    float scale;
    int32_t batch;          //!< B; B S at most 2^30
    int32_t height;         //!< a multiple of 16
    int32_t width;          //!< a multiple of 16; height * width at most 2^26
    int32_t specialTokens;  //!< S - height / 16 * width / 16, at least 0
    int32_t outputs;        //!< N, a multiple of 64
    DataType dataType;      //!< T
    PatchEmbeddingPath path;
    //! Programmatic dependent launch: this grid may start while its predecessor in the stream ends. Before that end
    //! only `weight` and `bias` are read, which the predecessor must not write.
    bool overlapPredecessor;
};

//! Whether sizes, type and path are supported; pointers are not looked at. When not, *reason (if given) says why.
bool canImplementPatchEmbedding(PatchEmbeddingParams const& params, char const** reason = nullptr);

//! Enqueues the op. Returns cudaErrorInvalidValue for what cannot be implemented, for null or misaligned pointers, and
//! for a path that this device does not have.
cudaError_t patchEmbedding(PatchEmbeddingParams const& params, cudaStream_t stream);

}  // namespace trocr
