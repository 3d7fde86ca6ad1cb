#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

//! Device-side helpers of the kernels: conversions, 16-byte packs, warp reductions.

namespace trocr
{

constexpr int kWARP_SIZE = 32;
constexpr unsigned kFULL_WARP = 0xffffffffU;
constexpr float kLOG2_E = 1.4426950408889634F;

template <typename T>
__device__ __forceinline__ float toFloat(T value)
{
    return static_cast<float>(value);
}

//! Rounds to nearest even.
template <typename T>
__device__ __forceinline__ T fromFloat(float value)
{
    return static_cast<T>(value);
}

//! Two neighbouring elements in one register, and their conversions.
template <typename T>
struct PairOf;

template <>
struct PairOf<__half>
{
    using Type = __half2;

    static __device__ __forceinline__ float2 unpack(__half2 pair)
    {
        return __half22float2(pair);
    }

    static __device__ __forceinline__ __half2 pack(float low, float high)
    {
        return __floats2half2_rn(low, high);
    }
};

template <>
struct PairOf<__nv_bfloat16>
{
    using Type = __nv_bfloat162;

    static __device__ __forceinline__ float2 unpack(__nv_bfloat162 pair)
    {
        return __bfloat1622float2(pair);
    }

    static __device__ __forceinline__ __nv_bfloat162 pack(float low, float high)
    {
        return __floats2bfloat162_rn(low, high);
    }
};

template <typename T>
__device__ __forceinline__ unsigned packPair(float low, float high)
{
    typename PairOf<T>::Type const pair = PairOf<T>::pack(low, high);
    static_assert(sizeof(pair) == sizeof(unsigned));
    return reinterpret_cast<unsigned const&>(pair);
}

template <typename T>
__device__ __forceinline__ float2 unpackPair(unsigned bits)
{
    return PairOf<T>::unpack(reinterpret_cast<typename PairOf<T>::Type const&>(bits));
}

//! kSIZE neighbouring elements, read and written by one access and held as float32: 16 bytes of them (Pack<T>), or
//! one element where sizes or addresses allow no more (Pack<T, 1>).
template <typename T, int kSIZE = 16 / sizeof(T)>
struct Pack
{
    static_assert(kSIZE == 1 || kSIZE * sizeof(T) == 16);

    float values[kSIZE];

    static __device__ __forceinline__ Pack load(T const* address)
    {
        if constexpr (kSIZE == 1)
        {
            return {toFloat(*address)};
        }
        else
        {
            return fromBits(*reinterpret_cast<uint4 const*>(address));
        }
    }

    __device__ __forceinline__ void store(T* address) const
    {
        if constexpr (kSIZE == 1)
        {
            *address = fromFloat<T>(values[0]);
        }
        else
        {
            *reinterpret_cast<uint4*>(address) = toBits();
        }
    }

    static __device__ __forceinline__ Pack fromBits(uint4 bits)
    {
        if constexpr (sizeof(T) == 4)
        {
            return {__uint_as_float(bits.x), __uint_as_float(bits.y), __uint_as_float(bits.z), __uint_as_float(bits.w)};
        }
        else
        {
            float2 const a = unpackPair<T>(bits.x);
            float2 const b = unpackPair<T>(bits.y);
            float2 const c = unpackPair<T>(bits.z);
            float2 const d = unpackPair<T>(bits.w);
            return {a.x, a.y, b.x, b.y, c.x, c.y, d.x, d.y};
        }
    }

    __device__ __forceinline__ uint4 toBits() const
    {
        if constexpr (sizeof(T) == 4)
        {
            return {__float_as_uint(values[0]), __float_as_uint(values[1]), __float_as_uint(values[2]),
                    __float_as_uint(values[3])};
        }
        else
        {
            return {packPair<T>(values[0], values[1]), packPair<T>(values[2], values[3]),
                    packPair<T>(values[4], values[5]), packPair<T>(values[6], values[7])};
        }
    }
};

//! Sum over groups of kLANES neighbouring lanes, a power of two; every lane gets it, in the same order of addition.
template <int kLANES = kWARP_SIZE>
__device__ __forceinline__ float groupSum(float value)
{
#pragma unroll
    for (int offset = kLANES / 2; offset > 0; offset /= 2)
    {
        value += __shfl_xor_sync(kFULL_WARP, value, offset);
    }
    return value;
}

template <int kLANES = kWARP_SIZE>
__device__ __forceinline__ float groupMax(float value)
{
#pragma unroll
    for (int offset = kLANES / 2; offset > 0; offset /= 2)
    {
        value = fmaxf(value, __shfl_xor_sync(kFULL_WARP, value, offset));
    }
    return value;
}

//! 2^x in one instruction, relative error at most 2^-22; 0 for -inf. exp2f would add a rescaling of denormal results.
__device__ __forceinline__ float exp2Approx(float x)
{
#ifdef __CUDA_ARCH__
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#else
    return exp2f(x);  // tests/cpu_cuda
#endif
}

//! x Phi(x) = max(x, 0) - |x| Phi(-|x|), with log2 Phi(-t) a polynomial of degree 5 in t: eight instructions. Fitted
//! (weighted minimax on [0, 6.5]) so that the result is within 0.21 half-ulps of float16, subnormals included;
//! beyond 6.5 the polynomial keeps falling, and the second term is below 3e-9. tests/test_linear.py checks the figures.
__device__ __forceinline__ float gelu(float x)
{
    float const t = fabsf(x);
    float p = -0.00030645227525383234F;
    p = fmaf(p, t, 0.0056864055804908276F);
    p = fmaf(p, t, -0.04774897173047066F);
    p = fmaf(p, t, -0.4648023247718811F);
    p = fmaf(p, t, -1.1488468647003174F);
    p = fmaf(p, t, -1.0001472234725952F);
    return fmaf(-t, exp2Approx(p), fmaxf(x, 0.0F));  // exp2(p) is Phi(-t)
}

//! Lane q of four holds word q of blocks 0 to 3; afterwards it holds words 0 to 3 of block q.
__device__ __forceinline__ uint4 transposeQuad(uint32_t w0, uint32_t w1, uint32_t w2, uint32_t w3)
{
    bool const high = threadIdx.x & 2;
    bool const odd = threadIdx.x & 1;
    uint32_t const a = __shfl_xor_sync(kFULL_WARP, high ? w0 : w2, 2);
    uint32_t const b = __shfl_xor_sync(kFULL_WARP, high ? w1 : w3, 2);
    w0 = high ? a : w0;
    w1 = high ? b : w1;
    w2 = high ? w2 : a;
    w3 = high ? w3 : b;
    uint32_t const c = __shfl_xor_sync(kFULL_WARP, odd ? w0 : w1, 1);
    uint32_t const d = __shfl_xor_sync(kFULL_WARP, odd ? w2 : w3, 1);
    return {odd ? c : w0, odd ? w1 : c, odd ? d : w2, odd ? w3 : d};
}

}  // namespace trocr
