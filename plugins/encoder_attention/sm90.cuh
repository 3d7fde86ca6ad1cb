#pragma once

// What encoder attention needs of Hopper beyond common/sm90.cuh: four-dimensional boxes, and products whose second
// operand has any multiple of 16 columns (scores) or lies in memory with its columns together (values).

#include "common/sm90.cuh"

namespace trocr::sm90
{

//! cp.async.bulk.tensor.4d global -> shared: the box at (x, y, z, w) to `destination`; its bytes count on `barrier`.
//! What lies outside the tensor arrives as zeros, and counts.
__device__ __forceinline__ void loadBox4d(uint32_t destination, CUtensorMap const* map, int32_t x, int32_t y, int32_t z,
                                          int32_t w, uint32_t barrier)
{
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(destination),
        "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w)
        : "memory");
}

//! operandDescriptor of an operand with N together and more than 64 columns, `leading` bytes from 64 to the next.
__device__ __forceinline__ uint64_t operandDescriptor(uint32_t address, uint32_t leading)
{
    return operandDescriptor(address) - (uint64_t{1} << 16) + (static_cast<uint64_t>(leading >> 4) << 16);
}

//! wgmma.m64nNk16, four times: d[64, N] = a[64, 64] b[N, 64]^T, both in shared memory (operandDescriptor); d as in
//! Wgmma, its first N / 2 elements.
template <typename T, int N>
struct SharedProduct;

//! wgmma.m64n72k16: d[64, 72] += a[64, 16] b[16, 72]. a[r] of lane l of warp w holds the elements of row
//! 16 w + 8 (r % 2) + l / 4 and columns 8 (r / 2) + 2 (l % 4), + 1: what two neighbouring 8-column blocks of an
//! accumulator hold. b is in shared memory in rows of 64 elements: with N together, operandDescriptor's 1024 is the
//! step from eight rows (of K) to the next eight, and the leading offset that from 64 columns to the next, here eight.
template <typename T>
struct RegisterProduct;

#define TROCR_OUT4(i) "=f"(d[i]), "=f"(d[i + 1]), "=f"(d[i + 2]), "=f"(d[i + 3])
#define TROCR_OUT16(i) TROCR_OUT4(i), TROCR_OUT4(i + 4), TROCR_OUT4(i + 8), TROCR_OUT4(i + 12)
#define TROCR_INOUT4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define TROCR_INOUT8(i)                                                                                         \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])

// Operands %t0 to %t3 (to %t5, ...); t is empty for the first ten.
#define TROCR_P2(t) "%" #t "0,%" #t "1"
#define TROCR_P4(t) TROCR_P2(t) ",%" #t "2,%" #t "3"
#define TROCR_P6(t) TROCR_P4(t) ",%" #t "4,%" #t "5"
#define TROCR_P8(t) TROCR_P6(t) ",%" #t "6,%" #t "7"
#define TROCR_P10(t) TROCR_P8(t) ",%" #t "8,%" #t "9"

#define TROCR_STEP(N, TYPES, PLACES, A, B, ACCUMULATE)                                                 \
    "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPES " {" PLACES "}, " A ", " B ", " ACCUMULATE \
    ", 1, 1, 0, "                                                                                      \
    "0;\n"
// In a descriptor, + 2 is the next 16 elements of K.
#define TROCR_SHARED_PRODUCT(T, TYPES, N, PLACES, A, B, ...)                                                        \
    template <>                                                                                                     \
    struct SharedProduct<T, N>                                                                                      \
    {                                                                                                               \
        static __device__ __forceinline__ void run(float* d, uint64_t a, uint64_t b)                                \
        {                                                                                                           \
            asm volatile(                                                                                           \
                "{\n"                                                                                               \
                ".reg .pred no, yes;\n"                                                                             \
                ".reg .b64 a1, a2, a3, b1, b2, b3;\n"                                                               \
                "setp.ne.b32 no, 0, 0;\n"                                                                           \
                "setp.eq.b32 yes, 0, 0;\n"                                                                          \
                "add.s64 a1, " A                                                                                    \
                ", 2;\n"                                                                                            \
                "add.s64 b1, " B                                                                                    \
                ", 2;\n"                                                                                            \
                "add.s64 a2, " A                                                                                    \
                ", 4;\n"                                                                                            \
                "add.s64 b2, " B                                                                                    \
                ", 4;\n"                                                                                            \
                "add.s64 a3, " A                                                                                    \
                ", 6;\n"                                                                                            \
                "add.s64 b3, " B ", 6;\n" TROCR_STEP(N, TYPES, PLACES, A, B, "no")                                  \
                    TROCR_STEP(N, TYPES, PLACES, "a1", "b1", "yes") TROCR_STEP(N, TYPES, PLACES, "a2", "b2", "yes") \
                        TROCR_STEP(N, TYPES, PLACES, "a3", "b3", "yes") "}\n"                                       \
                : __VA_ARGS__                                                                                       \
                : "l"(a), "l"(b));                                                                                  \
        }                                                                                                           \
    };
#define TROCR_REGISTER_PRODUCT(T, TYPES)                                                                                 \
    template <>                                                                                                          \
    struct RegisterProduct<T>                                                                                            \
    {                                                                                                                    \
        static __device__ __forceinline__ void run(float* d, uint32_t const* a, uint64_t b)                              \
        {                                                                                                                \
            asm volatile("{\n"                                                                                         \
                         ".reg .pred p;\n"                                                                             \
                         "setp.ne.b32 p, 1, 0;\n"                                                                      \
                         "wgmma.mma_async.sync.aligned.m64n72k16.f32." TYPES                                           \
                         " {" TROCR_P10() "," TROCR_P10(1) "," TROCR_P10(2) "," TROCR_P6(3) "}, {%36,%37,%38,%39},"    \
                         " %40, p, 1, 1, 1;\n"                                                                         \
                         "}\n"                                                                                         \
                         : TROCR_INOUT8(0), TROCR_INOUT8(8), TROCR_INOUT8(16), TROCR_INOUT8(24), TROCR_INOUT4(32)      \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)); \
        }                                                                                                                \
    };
#define TROCR_PRODUCTS(T, TYPES)                                                                                     \
    TROCR_SHARED_PRODUCT(T, TYPES, 80, TROCR_P10() "," TROCR_P10(1) "," TROCR_P10(2) "," TROCR_P10(3), "%40", "%41", \
                         TROCR_OUT16(0), TROCR_OUT16(16), TROCR_OUT4(32), TROCR_OUT4(36))                            \
    TROCR_SHARED_PRODUCT(T, TYPES, 128,                                                                              \
                         TROCR_P10() "," TROCR_P10(1) "," TROCR_P10(2) "," TROCR_P10(3) "," TROCR_P10(               \
                             4) "," TROCR_P10(5) "," TROCR_P4(6),                                                    \
                         "%64", "%65", TROCR_OUT16(0), TROCR_OUT16(16), TROCR_OUT16(32), TROCR_OUT16(48))            \
    TROCR_REGISTER_PRODUCT(T, TYPES)
TROCR_PRODUCTS(__half, "f16.f16")
TROCR_PRODUCTS(__nv_bfloat16, "bf16.bf16")

#undef TROCR_PRODUCTS
#undef TROCR_REGISTER_PRODUCT
#undef TROCR_SHARED_PRODUCT
#undef TROCR_STEP
#undef TROCR_P10
#undef TROCR_P8
#undef TROCR_P6
#undef TROCR_P4
#undef TROCR_P2
#undef TROCR_INOUT8
#undef TROCR_INOUT4
#undef TROCR_OUT16
#undef TROCR_OUT4

}  // namespace trocr::sm90
