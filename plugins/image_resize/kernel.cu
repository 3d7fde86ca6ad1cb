#include "common/launch.h"
#include "image_resize/kernel.h"

namespace trocr
{

namespace
{

constexpr int kTHREADS = 128;
constexpr int kROWS = 4;  //!< of a thread in the first pass: a weight is loaded once for all

//! One side of an image: how its output pixels are made of its source pixels. Where the image shrinks the filter is
//! stretched: antialiasing. In double precision, and in PyTorch's order, so that weights are rounded to the same
//! integers.
struct Side
{
    int inSize;
    int outSize;
    double ratio;
    double stretch;
    double support;

    __device__ __forceinline__ Side(ResizeFilter filter, int inSize, int outSize)
        : inSize(inSize),
          outSize(outSize),
          ratio(static_cast<double>(inSize) / static_cast<double>(outSize)),
          stretch(fmax(ratio, 1.0)),
          support((filter == ResizeFilter::kBILINEAR ? 1.0 : 2.0) * stretch)
    {
    }

    __device__ __forceinline__ int taps() const
    {
        return 2 * static_cast<int>(ceil(support)) + 1;
    }

    __device__ __forceinline__ int64_t elements() const
    {
        return 1 + static_cast<int64_t>(1 + taps()) * outSize;
    }

    // No multiply-add: the processor on the CPU rounds the product.
    __device__ __forceinline__ double center(int output) const
    {
        return __dmul_rn(ratio, output + 0.5);
    }

    __device__ __forceinline__ int first(int output) const
    {
        return max(static_cast<int>(center(output) - support + 0.5), 0);
    }

    __device__ __forceinline__ int last(int output) const  //!< one behind
    {
        return min(static_cast<int>(center(output) + support + 0.5), inSize);
    }

    //! The weight of a source pixel, before those of an output pixel are scaled to a sum of 1.
    __device__ __forceinline__ double weight(ResizeFilter filter, int output, int pixel) const
    {
        double const x = fabs(pixel - center(output) + 0.5) * (1.0 / stretch);
        if (filter == ResizeFilter::kBILINEAR)
        {
            return fmax(1.0 - x, 0.0);
        }
        constexpr double kA = -0.5;
        double const inner = ((kA + 2.0) * x - (kA + 3.0)) * x * x + 1.0;
        double const outer = (((x - 5.0) * x + 8.0) * x - 4.0) * kA;
        return x < 1.0 ? inner : x < 2.0 ? outer : 0.0;
    }
};

__device__ __forceinline__ Side widthOf(ImageResizeParams const& p, ResizeSource const& image)
{
    return Side(p.filter, image.width, p.outWidth);
}

__device__ __forceinline__ Side heightOf(ImageResizeParams const& p, ResizeSource const& image)
{
    return Side(p.filter, image.height, p.outHeight);
}

//! A side's table in memory (kernel.h).
struct Table
{
    int32_t* bits;
    int32_t* first;
    int32_t* weights;

    __device__ __forceinline__ Table(int32_t* memory, int outSize)
        : bits(memory), first(memory + 1), weights(memory + 1 + outSize)
    {
    }
};

//! A block a side. Weights have as many fraction bits as leave the largest of the side below 2^15.
__global__ void __launch_bounds__(kTHREADS) resizeWeights(ImageResizeParams p)
{
    ResizeSource const image = p.images[blockIdx.x / 2];
    bool const ofHeight = blockIdx.x % 2 == 1;
    Side const width = widthOf(p, image);
    Side const side = ofHeight ? heightOf(p, image) : width;
    Table const table(p.weights + image.weights + (ofHeight ? width.elements() : 0), side.outSize);

    auto const total = [&](int output, double& largest)
    {
        double sum = 0.0;
        for (int i = side.first(output); i < side.last(output); ++i)
        {
            double const weight = side.weight(p.filter, output, i);
            sum += weight;
            largest = fmax(largest, weight);
        }
        return sum;
    };
    __shared__ unsigned long long sideLargest;
    if (threadIdx.x == 0)
    {
        sideLargest = 0;
    }
    __syncthreads();
    for (int output = threadIdx.x; output < side.outSize; output += kTHREADS)
    {
        double largest = 0.0;
        double const sum = total(output, largest);
        // Doubles above 0 are ordered as their bits are.
        atomicMax(&sideLargest, static_cast<unsigned long long>(__double_as_longlong(largest / sum)));
    }
    __syncthreads();
    double const largest = __longlong_as_double(static_cast<long long>(sideLargest));
    int bits = 0;
    while (bits < 22 && static_cast<int>(0.5 + largest * (1 << (bits + 1))) < 1 << 15)
    {
        ++bits;
    }
    if (threadIdx.x == 0)
    {
        *table.bits = bits;
    }
    for (int output = threadIdx.x; output < side.outSize; output += kTHREADS)
    {
        double unused = 0.0;
        double const sum = total(output, unused);
        int const first = side.first(output);
        table.first[output] = first;
        for (int tap = 0; tap < side.taps(); ++tap)
        {
            int const pixel = first + tap;
            double const weight = pixel < side.last(output) ? side.weight(p.filter, output, pixel) / sum : 0.0;
            double const scaled = weight * (1 << bits);
            table.weights[tap * side.outSize + output] =
                static_cast<int32_t>(scaled < 0.0 ? scaled - 0.5 : scaled + 0.5);
        }
    }
}

//! Halves are rounded up.
__device__ __forceinline__ unsigned toByte(int sum, int bits)
{
    return static_cast<unsigned>(min(max((sum + (1 << bits >> 1)) >> bits, 0), 255));
}

//! A thread an output column of kROWS source rows.
__global__ void __launch_bounds__(kTHREADS) resizeRows(ImageResizeParams p)
{
    ResizeSource const image = p.images[blockIdx.z];
    int const x = blockIdx.x * kTHREADS + threadIdx.x;
    int const y = blockIdx.y * kROWS;
    if (x >= p.outWidth || y >= image.height)
    {
        return;
    }
    Side const side = widthOf(p, image);
    Table const table(p.weights + image.weights, side.outSize);
    int64_t const pitch = static_cast<int64_t>(image.width) * 3;
    uint8_t const* const source = p.sources + image.pixels;
    int sum[kROWS][3] = {};
    for (int tap = 0; tap < side.taps(); ++tap)
    {
        int const weight = table.weights[tap * side.outSize + x];
        int const pixel = min(table.first[x] + tap, image.width - 1);  // weights of those behind are 0
#pragma unroll
        for (int row = 0; row < kROWS; ++row)
        {
            uint8_t const* const from = source + min(y + row, image.height - 1) * pitch + pixel * 3;
#pragma unroll
            for (int channel = 0; channel < 3; ++channel)
            {
                sum[row][channel] += weight * from[channel];
            }
        }
    }
#pragma unroll
    for (int row = 0; row < kROWS; ++row)
    {
#pragma unroll
        for (int channel = 0; channel < 3; ++channel)
        {
            if (y + row < image.height)
            {
                int64_t const line = static_cast<int64_t>(channel) * image.height + y + row;
                p.intermediate[image.intermediate + line * p.outWidth + x] =
                    static_cast<uint8_t>(toByte(sum[row][channel], *table.bits));
            }
        }
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
    Side const side = heightOf(p, image);
    Table const table(p.weights + image.weights + widthOf(p, image).elements(), side.outSize);
    uint8_t const* const column =
        p.intermediate + image.intermediate + static_cast<int64_t>(channel) * image.height * p.outWidth + x;
    int const first = table.first[y];
    int sum[4] = {};
    for (int tap = 0; tap < side.taps(); ++tap)
    {
        int const weight = table.weights[tap * side.outSize + y];
        int64_t const row = min(first + tap, image.height - 1);
        uchar4 const pixels = *reinterpret_cast<uchar4 const*>(column + row * p.outWidth);
        sum[0] += weight * pixels.x;
        sum[1] += weight * pixels.y;
        sum[2] += weight * pixels.z;
        sum[3] += weight * pixels.w;
    }
    unsigned bytes = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i)
    {
        bytes |= toByte(sum[i], *table.bits) << (8 * i);
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
    bool const aligned = areAligned(4, params.intermediate, params.weights, params.out) &&
                         areAligned(8, params.images) && areAligned(1, params.sources);
    if (!canImplementImageResize(params) || !aligned)
    {
        return cudaErrorInvalidValue;
    }
    unsigned const width = params.outWidth;
    unsigned const count = params.count;
    dim3 const rows(ceilDiv<unsigned>(width, kTHREADS), ceilDiv<unsigned>(params.maxHeight, kROWS), count);
    dim3 const columns(ceilDiv<unsigned>(width / 4, kTHREADS), params.outHeight, count * 3);
    cudaError_t status = launch(resizeWeights, dim3(count * 2), dim3(kTHREADS), stream, params);
    status = status == cudaSuccess ? launch(resizeRows, rows, dim3(kTHREADS), stream, params) : status;
    return status == cudaSuccess ? launch(resizeColumns, columns, dim3(kTHREADS), stream, params) : status;
}

}  // namespace trocr
