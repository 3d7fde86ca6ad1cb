#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

//! Thin wrappers of the PTX that tensor-core kernels for compute capability 8.0 and above are made of.
//!
//! Fragments of m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16"), with g = lane / 4 and t = lane % 4; every
//! register of A and B is a pair of elements, neighbours along k:
//!   A [16, 16]: a0 (g, 2t), a1 (g + 8, 2t), a2 (g, 2t + 8), a3 (g + 8, 2t + 8)
//!   B [16, 8]:  b0 (2t, g), b1 (2t + 8, g)
//!   C [16, 8]:  c0 (g, 2t), c1 (g, 2t + 1), c2 (g + 8, 2t), c3 (g + 8, 2t + 1)

namespace trocr
{

//! Address of shared memory as PTX takes it.
__device__ __forceinline__ uint32_t sharedAddress(void const* pointer)
{
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

//! Copies 16 bytes from global to shared memory without registers, past L1; writes zeros when not `inside`.
__device__ __forceinline__ void copyAsync16(uint32_t to, void const* from, bool inside)
{
    int const bytes = inside ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void commitCopies()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

//! Waits for all copies this thread committed; other threads see them after a barrier.
__device__ __forceinline__ void waitForCopies()
{
    asm volatile("cp.async.wait_group 0;" ::: "memory");
}

//! Four 8x8 matrices of 2-byte elements; lanes 8i to 8i + 7 give the rows of matrix i. Of each matrix a lane gets
//! elements (g, 2t) and (g, 2t + 1).
__device__ __forceinline__ void loadMatrices(uint32_t (&matrices)[4], uint32_t row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(row)
                 : "memory");
}

//! The same, transposed: of each matrix a lane gets elements (2t, g) and (2t + 1, g).
__device__ __forceinline__ void loadMatricesTransposed(uint32_t (&matrices)[4], uint32_t row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(row)
                 : "memory");
}

//! c += a b
template <typename T>
__device__ __forceinline__ void multiplyAdd(float (&c)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void multiplyAdd<__half>(float (&c)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1)
{
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void multiplyAdd<__nv_bfloat16>(float (&c)[4], uint32_t const (&a)[4], uint32_t b0,
                                                           uint32_t b1)
{
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace trocr
