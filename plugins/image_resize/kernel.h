#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace trocr
{

enum class ResizeFilter : int32_t
{
    kBILINEAR = 0,
    kBICUBIC = 1,  //!< a = -0.5
};

//! Where an image lies in the buffers.
struct ResizeSource
{
    int64_t pixels;        //!< offset of its uint8 [height, width, 3] in `sources`
    int64_t intermediate;  //!< offset of its uint8 [3, height, outWidth] in `intermediate`
    int64_t weights;       //!< offset of its two tables in `weights`, in elements: for width, then for height
    int32_t height;
    int32_t width;
};

//! Images of different sizes -> uint8 [images, 3, outHeight, outWidth], antialiased as PyTorch and Pillow do it, to the
//! bit: rows first, rounded to uint8, then columns, with integer weights.
//!
//! A table of a side of `in` pixels that becomes `out` is 1 + out + taps * out elements: the number of fraction bits,
//! each output's first source pixel, and weights [taps, out], where taps = 2 ceil(support max(in / out, 1)) + 1 and
//! support is 1 (bilinear) or 2 (bicubic).
struct ImageResizeParams
{
    uint8_t const* sources;
    ResizeSource const* images;  //!< [count], on the device
    int32_t count;               //!< 1 to 65535
    int32_t maxHeight;           //!< of the images, at most 65535
    int32_t outHeight;           //!< at most 65535
    int32_t outWidth;            //!< a multiple of 4
    ResizeFilter filter;
    int32_t* weights;
    uint8_t* intermediate;
    uint8_t* out;  //!< a multiple of 4 bytes
};

//! Whether the sizes are supported; pointers are not looked at. When not, *reason (if given) says why.
bool canImplementImageResize(ImageResizeParams const& params, char const** reason = nullptr);

//! Enqueues the tables and both passes. Returns cudaErrorInvalidValue for what cannot be implemented and for null
//! pointers.
cudaError_t imageResize(ImageResizeParams const& params, cudaStream_t stream);

}  // namespace trocr
