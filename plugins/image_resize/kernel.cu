#include "common/launch.h"
#include "image_resize/kernel.h"

namespace trocr
{

namespace
{

constexpr int kTHREADS = 128;

//! The weight of a source pixel at distance x of the output pixel's centre, before they are scaled to a sum of 1.
__device__ __forceinline__ float filterWeight(ResizeFilter filter, float x)
{
    x = fabsf(x);
    if (filter == ResizeFilter::kBILINEAR)
    {
        return fmaxf(1.0F - x, 0.0F);
    }
    constexpr float kA = -0.5F;
    float const inner = ((kA + 2.0F) * x - (kA + 3.0F)) * x * x + 1.0F;
    float const outer = (((x - 5.0F) * x + 8.0F) * x - 4.0F) * kA;
    return x < 1.0F ? inner : x < 2.0F ? outer : 0.0F;
}

//! Source pixels of one output pixel along one side. Where the image shrinks the filter is stretched: antialiasing.
struct Taps
{
    int first;
    int last;      //!< one behind
    float offset;  //!< weight of pixel i: filterWeight((i + offset) * scale)
    float scale;

    __device__ __forceinline__ Taps(ResizeFilter filter, int output, int outSize, int inSize)
    {
        float const ratio = static_cast<float>(inSize) / static_cast<float>(outSize);
        float const stretch = fmaxf(ratio, 1.0F);
        float const support = (filter == ResizeFilter::kBILINEAR ? 1.0F : 2.0F) * stretch;
        float const center = ratio * (static_cast<float>(output) + 0.5F);
        first = max(static_cast<int>(center - support + 0.5F), 0);
        last = min(static_cast<int>(center + support + 0.5F), inSize);
        offset = 0.5F - center;
        scale = 1.0F / stretch;
    }

    __device__ __forceinline__ float weight(ResizeFilter filter, int pixel) const
    {
        return filterWeight(filter, (static_cast<float>(pixel) + offset) * scale);
    }
};

//! Halves are rounded up.
__device__ __forceinline__ unsigned toByte(float value)
{
    return static_cast<unsigned>(fminf(fmaxf(floorf(value + 0.5F), 0.0F), 255.0F));
}

//! A thread an output column of a source row.
__global__ void __launch_bounds__(kTHREADS) resizeRows(ImageResizeParams p)
{
    ResizeSource const image = p.images[blockIdx.z];
    int const x = blockIdx.x * kTHREADS + threadIdx.x;
    int const y = blockIdx.y;
    if (x >= p.outWidth || y >= image.height)
    {
        return;
    }
    Taps const taps(p.filter, x, p.outWidth, image.width);
    uint8_t const* const row = p.sources + image.pixels + static_cast<int64_t>(y) * image.width * 3;
    float sum[3] = {};
    float total = 0.0F;
    for (int i = taps.first; i < taps.last; ++i)
    {
        float const weight = taps.weight(p.filter, i);
        total += weight;
#pragma unroll
        for (int channel = 0; channel < 3; ++channel)
        {
            sum[channel] += weight * static_cast<float>(row[i * 3 + channel]);
        }
    }
#pragma unroll
    for (int channel = 0; channel < 3; ++channel)
    {
        p.intermediate[image.intermediate + (static_cast<int64_t>(channel) * image.height + y) * p.outWidth + x] =
            static_cast<uint8_t>(toByte(sum[channel] / total));
    }
}

//! A thread four neighbouring output pixels of one channel.
__global__ void __launch_bounds__(kTHREADS) resizeColumns(ImageResizeParams p)
{
    int const number = blockIdx.z / 3;
    int const channel = blockIdx.z % 3;
    ResizeSource const image = p.images[number];
    int const x = (blockIdx.x * kTHREADS + threadIdx.x) * 4;
    int const y = blockIdx.y;
    if (x >= p.outWidth)
    {
        return;
    }
    Taps const taps(p.filter, y, p.outHeight, image.height);
    uint8_t const* const column =
        p.intermediate + image.intermediate + static_cast<int64_t>(channel) * image.height * p.outWidth + x;
    float sum[4] = {};
    float total = 0.0F;
    for (int i = taps.first; i < taps.last; ++i)
    {
        float const weight = taps.weight(p.filter, i);
        uchar4 const pixels = *reinterpret_cast<uchar4 const*>(column + static_cast<int64_t>(i) * p.outWidth);
        total += weight;
        sum[0] += weight * static_cast<float>(pixels.x);
        sum[1] += weight * static_cast<float>(pixels.y);
        sum[2] += weight * static_cast<float>(pixels.z);
        sum[3] += weight * static_cast<float>(pixels.w);
    }
    unsigned bytes = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i)
    {
        bytes |= toByte(sum[i] / total) << (8 * i);
    }
    int64_t const plane = static_cast<int64_t>(number) * 3 + channel;
    *reinterpret_cast<unsigned*>(p.out + (plane * p.outHeight + y) * p.outWidth + x) = bytes;
}

}  // namespace

bool canImplementImageResize(ImageResizeParams const& params, char const** reason)
{
    if (params.count < 1 || params.count > 65535 / 3)
    {
        return refuse(reason, "the number of images is not in 1 to 21845");
    }
    if (params.maxHeight < 1 || params.maxHeight > 65535 || params.outHeight < 1 || params.outHeight > 65535)
    {
        return refuse(reason, "a height is not in 1 to 65535");
    }
    if (params.outWidth < 4 || params.outWidth % 4 != 0)
    {
        return refuse(reason, "the output's width is no multiple of 4");
    }
    return true;
}

cudaError_t imageResize(ImageResizeParams const& params, cudaStream_t stream)
{
    bool const aligned =
        areAligned(4, params.intermediate, params.out) && areAligned(8, params.images) && areAligned(1, params.sources);
    if (!canImplementImageResize(params) || !aligned)
    {
        return cudaErrorInvalidValue;
    }
    unsigned const width = params.outWidth;
    cudaError_t const status =
        launch(resizeRows, dim3(ceilDiv<unsigned>(width, kTHREADS), params.maxHeight, params.count), dim3(kTHREADS),
               stream, params);
    return status != cudaSuccess
               ? status
               : launch(resizeColumns, dim3(ceilDiv<unsigned>(width / 4, kTHREADS), params.outHeight, params.count * 3),
                        dim3(kTHREADS), stream, params);
}

}  // namespace trocr
