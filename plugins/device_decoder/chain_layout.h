#pragma once

#include <cstddef>
#include <cstdint>

//! Where things lie in a block's shared memory and in its packed constants ("blob"), for kernels and host alike.
//! T has two bytes. Offsets are multiples of 16; the first 16 bytes hold two mbarriers. `rows` is the most that a pass
//! has, at most `kernelRows`, the kernel's kROWS.

namespace trocr::decoder
{

constexpr int32_t kELEMENT = 2;  //!< bytes

#ifdef __CUDACC__
#define TROCR_BOTH __host__ __device__
#else
#define TROCR_BOTH
#endif

TROCR_BOTH constexpr int32_t alignUp(int32_t bytes)
{
    return (bytes + 127) / 128 * 128;
}

//! Bytes of `rows` rows in the pitch of rowPitch (chain_blocks_sm90.cuh).
TROCR_BOTH constexpr int32_t rowsBytes(int32_t rows, int32_t width)
{
    return rows * ((width * kELEMENT + 63) / 128 * 128 + 64);
}

TROCR_BOTH constexpr int32_t larger(int32_t a, int32_t b)
{
    return a > b ? a : b;
}

//! Blob: float32 bias [24], float32 output bias [D / C], T [D / 32, 24, 32], T [d / 32, D / C, 32].
struct SelfLayout
{
    int32_t blobBytes, norm, blob, hidden, partial, scales, exchange, context, bytes;

    TROCR_BOTH constexpr SelfLayout(int32_t headDim, int32_t width, int32_t rows, int32_t kernelRows)
        : blobBytes((24 + width / (headDim / 8)) * 4 + (24 * width + width / (headDim / 8) * headDim) * kELEMENT),
          norm(128),
          blob(norm + alignUp(2 * width * kELEMENT)),
          hidden(blob + alignUp(blobBytes)),
          partial(hidden + alignUp(rowsBytes(rows, width))),
          scales(partial + larger(8 * kernelRows * 24 * 4, 8 * headDim * 4)),
          exchange(scales + 128),
          context(exchange + alignUp(rows * 3 * headDim * kELEMENT)),
          bytes(context + alignUp(rowsBytes(rows, headDim)))
    {
    }
};

//! Blob: float32 bias [8], float32 output bias [D / C], T [D / 32, 8, 32], T [d / 32, D / C, 32].
struct CrossLayout
{
    int32_t blobBytes, norm, blob, hidden, partial, scales, exchange, parts, partScales, context, bytes;

    TROCR_BOTH constexpr CrossLayout(int32_t headDim, int32_t width, int32_t rows, int32_t kernelRows)
        : blobBytes((8 + width / (headDim / 8)) * 4 + (8 * width + width / (headDim / 8) * headDim) * kELEMENT),
          norm(128),
          blob(norm + alignUp(2 * width * kELEMENT)),
          hidden(blob + alignUp(blobBytes)),
          partial(hidden + alignUp(rowsBytes(rows, width))),
          scales(partial + larger(8 * kernelRows * 8 * 4, larger(8, rows) * headDim * 4)),
          exchange(scales + alignUp(larger(8, rows) * 8)),
          parts(exchange + alignUp(rows * headDim * kELEMENT)),
          partScales(parts + alignUp(rows * (headDim / 8) * headDim * 4)),
          context(partScales + alignUp(rows * (headDim / 8) * 8)),
          bytes(context + alignUp(rowsBytes(rows, headDim)))
    {
    }
};

//! Blob: float32 bias [32], T [D / 32, 32, 32], T [D, 32].
struct FeedForwardLayout
{
    int32_t blobBytes, norm, blob, hidden, partial, inner, bias, bytes;

    TROCR_BOTH constexpr FeedForwardLayout(int32_t width, int32_t rows, int32_t kernelRows)
        : blobBytes(32 * 4 + 2 * 32 * width * kELEMENT),
          norm(128),
          blob(norm + alignUp(2 * width * kELEMENT)),
          hidden(blob + alignUp(blobBytes)),
          partial(hidden + alignUp(rowsBytes(rows, width))),
          inner(partial + 8 * kernelRows * 32 * 4),
          bias(inner + alignUp(rowsBytes(rows, 32))),
          bytes(bias + alignUp(width * 4))
    {
    }
};

struct HeadLayout
{
    int32_t hidden, norm, choices, bytes;

    TROCR_BOTH constexpr HeadLayout(int32_t width, int32_t rows)
        : hidden(0),
          norm(alignUp(rowsBytes(rows, width))),
          choices(norm + alignUp(2 * width * kELEMENT)),
          bytes(choices + alignUp(larger(128, 8 * rows * 12)))
    {
    }
};

#undef TROCR_BOTH

}  // namespace trocr::decoder
