#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "common/data_type.h"

//! Host-side helpers of the launchers.

namespace trocr
{

//! The `false` of canImplement..., with its reason.
inline bool refuse(char const** reason, char const* why)
{
    if (reason != nullptr)
    {
        *reason = why;
    }
    return false;
}

//! What every attention kernel asks of its sizes; `length` counts the keys.
inline bool canImplementAttention(DataType dataType, int headDim, int batch, int numHeads, int length,
                                  char const** reason)
{
    if (sizeOf(dataType) == 0)
    {
        return refuse(reason, "the data type is none of float32, float16, bfloat16");
    }
    if (headDim != 32 && headDim != 64)
    {
        return refuse(reason, "the head size is neither 32 nor 64");
    }
    if (batch < 1 || numHeads < 1 || length < 1)
    {
        return refuse(reason, "batch, heads and sequence length or cache capacity must be at least 1");
    }
    if (batch > 65535 || numHeads > 65535)
    {
        return refuse(reason, "batch and heads must be at most 65535");
    }
    return true;
}

//! Calls `launchTyped` with a value of the C++ type that `dataType` names; only its type matters.
template <typename LaunchTyped>
cudaError_t dispatchType(DataType dataType, LaunchTyped const& launchTyped)
{
    switch (dataType)
    {
        case DataType::kFLOAT:
            return launchTyped(float{});
        case DataType::kHALF:
            return launchTyped(__half{});
        case DataType::kBF16:
            return launchTyped(__nv_bfloat16{});
    }
    return cudaErrorInvalidValue;
}

//! Whether it can be divided by, as scales of e4m3 tensors are.
inline bool isPositive(float scale)
{
    return std::isfinite(scale) && scale > 0.0F;
}

//! Whether every pointer is there and on a multiple of `bytes`.
template <typename... Pointers>
bool areAligned(size_t bytes, Pointers const*... pointers)
{
    return ((pointers != nullptr && reinterpret_cast<uintptr_t>(pointers) % bytes == 0) && ...);
}

template <typename Integer>
constexpr Integer ceilDiv(Integer numerator, Integer denominator)
{
    return (numerator + denominator - 1) / denominator;
}

//! So that what follows begins where cudaMalloc's own memory may.
constexpr size_t align256(size_t bytes)
{
    return (bytes + 255) / 256 * 256;
}

//! An attribute of the current device; a cached look-up, allowed during stream capture.
inline cudaError_t deviceAttribute(cudaDeviceAttr attribute, int& value)
{
    int device{};
    cudaError_t const status = cudaGetDevice(&device);
    return status != cudaSuccess ? status : cudaDeviceGetAttribute(&value, attribute, device);
}

//! The launch attribute by which so many blocks along x share their memory.
inline cudaLaunchAttribute clusterOf(unsigned blocks)
{
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = blocks;
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
    return attribute;
}

//! The launch attribute by which a grid may start while its predecessor in the stream ends (programmatic dependent
//! launch, compute capability 9.0 and above); it waits itself before it touches what the predecessor may.
inline cudaLaunchAttribute dependentLaunch()
{
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    return attribute;
}

//! The launch attribute by which all blocks run at once, or none does.
inline cudaLaunchAttribute cooperativeLaunch()
{
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    return attribute;
}

//! Clusters of a kernel that the device holds at once: fewer than its multiprocessors would make, where the groups they
//! come in are no multiples of the cluster; 0 where that cannot be told.
template <typename KERNEL>
int clustersAtOnce(KERNEL* kernel, int sharedBytes, int threads, int cluster)
{
    cudaLaunchAttribute attribute = clusterOf(cluster);
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(cluster);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = sharedBytes;
    config.attrs = &attribute;
    config.numAttrs = 1;
    int clusters = 0;
    bool const known =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sharedBytes) == cudaSuccess &&
        cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess;
    return known ? clusters : 0;
}

//! Launches without dynamic shared memory; the error returned is this launch's, not an earlier one's. With
//! `clusterX` above 1, that many blocks along x share their memory (compute capability 9.0 and above only).
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, unsigned clusterX, cudaStream_t stream,
                   Arguments... arguments)
{
    cudaLaunchAttribute cluster = clusterOf(clusterX);

    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = clusterX > 1 ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t stream, Arguments... arguments)
{
    return launch(kernel, grid, block, 1U, stream, arguments...);
}

}  // namespace trocr
