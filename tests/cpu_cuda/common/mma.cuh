#pragma once

// In place of plugins/common/mma.cuh.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace trocr
{

//! Rank in the cluster, plus one, and offset: see cpu_cuda::memory.
inline uint32_t sharedAddress(void const* pointer)
{
    return static_cast<uint32_t>(cpu_cuda::running->block->rank + 1) << 24 |
           static_cast<uint32_t>(cpu_cuda::offsetOf(pointer));
}

inline void loadMatrices(uint32_t (&matrices)[4], uint32_t row)
{
    cpu_cuda::noteLoad(row);
    uint64_t const* const rows = cpu_cuda::show(row);
    int const lane = cpu_cuda::lane();
    for (int i = 0; i < 4; ++i)
    {
        std::memcpy(&matrices[i], cpu_cuda::memory(rows[8 * i + lane / 4]) + lane % 4 * 4, 4);
    }
}

inline void loadMatricesTransposed(uint32_t (&matrices)[4], uint32_t row)
{
    cpu_cuda::noteLoad(row);
    uint64_t const* const rows = cpu_cuda::show(row);
    int const lane = cpu_cuda::lane();
    for (int i = 0; i < 4; ++i)
    {
        uint16_t element[2];
        for (int e = 0; e < 2; ++e)
        {
            std::memcpy(&element[e], cpu_cuda::memory(rows[8 * i + lane % 4 * 2 + e]) + lane / 4 * 2, 2);
        }
        std::memcpy(&matrices[i], element, 4);
    }
}

//! The values of all elements of type T, by their bits: conversions take most of the time else.
template <typename T>
float const* elementValues()
{
    static std::vector<float> const values = []()
    {
        std::vector<float> made(1 << 16);
        for (size_t bits = 0; bits < made.size(); ++bits)
        {
            auto const word = static_cast<uint16_t>(bits);
            T element;
            std::memcpy(&element, &word, 2);
            made[bits] = static_cast<float>(element);
        }
        return made;
    }();
    return values.data();
}

//! Two elements of type T.
template <typename T>
float2 unpackElements(uint32_t bits)
{
    float const* const values = elementValues<T>();
    return {values[bits & 0xffff], values[bits >> 16]};
}

//! A lane's operands of mma.m16n8k16.
struct MmaOperands
{
    float* c;
    uint32_t const* a;
    uint32_t b[2];
};

//! c += a b, by the lane that comes last for all of the warp.
template <typename T>
void multiplyAdd(float (&c)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1)
{
    cpu_cuda::running->loading = false;  // its operands have come
    MmaOperands const mine{c, a, {b0, b1}};
    cpu_cuda::Warp& warp = cpu_cuda::warp();
    uint64_t* const shown = warp.shown[warp.barrier.turn % 2];
    shown[cpu_cuda::lane()] = cpu_cuda::bitsOf(&mine);
    if (warp.barrier.arrived + 1 == cpu_cuda::kLANES)
    {
        float left[16][16];
        float right[8][16];
        auto const of = [&](int lane) { return *cpu_cuda::valueOf<MmaOperands const*>(shown[lane]); };
        for (int lane = 0; lane < cpu_cuda::kLANES; ++lane)
        {
            int const g = lane / 4;
            int const t = lane % 4;
            for (int i = 0; i < 4; ++i)
            {
                float2 const pair = unpackElements<T>(of(lane).a[i]);
                left[g + i % 2 * 8][i / 2 * 8 + 2 * t] = pair.x;
                left[g + i % 2 * 8][i / 2 * 8 + 2 * t + 1] = pair.y;
            }
            for (int i = 0; i < 2; ++i)
            {
                float2 const pair = unpackElements<T>(of(lane).b[i]);
                right[g][8 * i + 2 * t] = pair.x;
                right[g][8 * i + 2 * t + 1] = pair.y;
            }
        }
        for (int lane = 0; lane < cpu_cuda::kLANES; ++lane)
        {
            for (int i = 0; i < 4; ++i)
            {
                float sum = 0.0F;
                for (int k = 0; k < 16; ++k)
                {
                    sum += left[lane / 4 + i / 2 * 8][k] * right[lane % 4 * 2 + i % 2][k];
                }
                of(lane).c[i] += sum;
            }
        }
    }
    warp.barrier.wait(cpu_cuda::kLANES);
}

}  // namespace trocr
