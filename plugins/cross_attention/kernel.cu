#include <cooperative_groups.h>

#include <algorithm>

#include "common/launch.h"
#include "common/single_query_attention.cuh"
#include "cross_attention/kernel.h"

namespace trocr
{

namespace
{

// 8 warps with 4 keys and values a lane in flight are 32 KiB of loads a block; 4.8 TB/s at 0.7 us of latency ask for
// about 25 KiB a multiprocessor at any time. Three blocks cover each other's arithmetic, and as a launch bound leave
// the compiler the registers to keep all loads in flight (else it saves registers and waits for every second load).
constexpr int kWARPS = 8;
constexpr int kUNROLL = 4;
constexpr int kBLOCKS_A_MULTIPROCESSOR = 3;

constexpr int kMAX_SPLITS = 8;  // the portable cluster size

// One block a head of a row. Those of the rows that share an image are neighbours in the grid, so that they run at the
// same time and all but the first find the keys and values in the cache. Where that leaves multiprocessors idle, the
// keys are split over the blocks of a cluster, and the first block merges the partial results out of the others' shared
// memory: no second kernel, no workspace, and a fixed order. Clusters need compute capability 9.0; before, there is one
// split.
template <typename T, int kHEAD_DIM>
__global__ void __launch_bounds__(kWARPS* kWARP_SIZE, kBLOCKS_A_MULTIPROCESSOR)
    crossAttentionKernel(T const* __restrict__ query, T const* __restrict__ key, T const* __restrict__ value,
                         T* __restrict__ context, int sequenceLength, int keysASplit, int rowsAnImage)
{
    using Attention = SingleQueryAttention<T, kHEAD_DIM, kWARPS, kUNROLL>;
    __shared__ typename Attention::Partials partials;

    // blockIdx = (split, head and row of the image, image); [I, H, S, d] and [B, 1, H * d]
    int const heads = gridDim.y / rowsAnImage;
    int const headOfRow = blockIdx.y / rowsAnImage;
    int64_t const row = static_cast<int64_t>(blockIdx.z) * rowsAnImage + blockIdx.y % rowsAnImage;
    int64_t const head = row * heads + headOfRow;
    int64_t const source = (static_cast<int64_t>(blockIdx.z) * heads + headOfRow) * sequenceLength * kHEAD_DIM;
    T const* const keys = key + source;
    T const* const values = value + source;
    int const begin = blockIdx.x * keysASplit;
    int const end = min(begin + keysASplit, sequenceLength);

    Attention::attend(
        query + head * kHEAD_DIM, [=](int row) { return keys + static_cast<int64_t>(row) * kHEAD_DIM; },
        [=](int row) { return values + static_cast<int64_t>(row) * kHEAD_DIM; }, begin, end, partials);

#if __CUDA_ARCH__ >= 900
    auto const cluster = cooperative_groups::this_cluster();
    cluster.sync();
    if (cluster.block_rank() == 0 && threadIdx.x < kHEAD_DIM)
    {
        float const element = Attention::merge([&](int block) { return cluster.map_shared_rank(partials, block); },
                                               cluster.num_blocks(), threadIdx.x);
        context[head * kHEAD_DIM + threadIdx.x] = fromFloat<T>(element);
    }
    cluster.sync();  // shared memory must outlive the first block's reading
#else
    __syncthreads();
    if (threadIdx.x < kHEAD_DIM)
    {
        float const element = Attention::merge([&](int) { return partials; }, 1, threadIdx.x);
        context[head * kHEAD_DIM + threadIdx.x] = fromFloat<T>(element);
    }
#endif
}

//! Into how many blocks to split the keys of a head: as many as fit the device at once, none without a full pass of
//! keys.
template <typename T, int kHEAD_DIM>
cudaError_t chooseSplits(CrossAttentionParams const& params, int& splits)
{
    constexpr int kKEYS_A_PASS = SingleQueryAttention<T, kHEAD_DIM, kWARPS, kUNROLL>::kKEYS_A_PASS;
    int multiprocessors{};
    if (cudaError_t const status = deviceAttribute(cudaDevAttrMultiProcessorCount, multiprocessors);
        status != cudaSuccess)
    {
        return status;
    }
    int64_t const heads = static_cast<int64_t>(params.batch) * params.numHeads;
    int64_t const wanted = multiprocessors * kBLOCKS_A_MULTIPROCESSOR / heads;
    int const useful = std::min(ceilDiv(params.sequenceLength, kKEYS_A_PASS), kMAX_SPLITS);
    splits = static_cast<int>(std::clamp<int64_t>(wanted, 1, useful));
    if (splits > 1)
    {
        // Not the device but the code counts: a library without sm_90 code may run there from older PTX.
        cudaFuncAttributes attributes{};
        if (cudaError_t const status = cudaFuncGetAttributes(&attributes, crossAttentionKernel<T, kHEAD_DIM>);
            status != cudaSuccess)
        {
            return status;
        }
        if (attributes.ptxVersion < 90)
        {
            splits = 1;
        }
    }
    return cudaSuccess;
}

template <typename T, int kHEAD_DIM>
cudaError_t launchSized(CrossAttentionParams const& params, cudaStream_t stream)
{
    using Attention = SingleQueryAttention<T, kHEAD_DIM, kWARPS, kUNROLL>;
    int splits{};
    if (cudaError_t const status = chooseSplits<T, kHEAD_DIM>(params, splits); status != cudaSuccess)
    {
        return status;
    }
    int const rowsAnImage = params.batch / params.images;
    dim3 const grid(splits, params.numHeads * rowsAnImage, params.images);
    return launch(crossAttentionKernel<T, kHEAD_DIM>, grid, dim3(Attention::kTHREADS), static_cast<unsigned>(splits),
                  stream, static_cast<T const*>(params.query), static_cast<T const*>(params.key),
                  static_cast<T const*>(params.value), static_cast<T*>(params.context), params.sequenceLength,
                  ceilDiv(params.sequenceLength, splits), rowsAnImage);
}

template <typename T>
cudaError_t launchTyped(CrossAttentionParams const& params, cudaStream_t stream)
{
    return params.headDim == 32 ? launchSized<T, 32>(params, stream) : launchSized<T, 64>(params, stream);
}

}  // namespace

bool canImplementCrossAttention(CrossAttentionParams const& params, char const** reason)
{
    if (!canImplementAttention(params.dataType, params.headDim, params.batch, params.numHeads, params.sequenceLength,
                               reason))
    {
        return false;
    }
    if (params.images < 1 || params.batch % params.images != 0)
    {
        return refuse(reason, "the rows are not a multiple of the images");
    }
    if (static_cast<int64_t>(params.batch / params.images) * params.numHeads > 65535)
    {
        return refuse(reason, "the rows of an image times heads must be at most 65535");
    }
    return true;
}

cudaError_t crossAttention(CrossAttentionParams const& params, cudaStream_t stream)
{
    if (!canImplementCrossAttention(params) || !areAligned(16, params.query, params.key, params.value, params.context))
    {
        return cudaErrorInvalidValue;
    }
    return dispatchType(params.dataType, [&](auto type) { return launchTyped<decltype(type)>(params, stream); });
}

}  // namespace trocr
