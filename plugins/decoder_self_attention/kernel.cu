#include "common/launch.h"
#include "common/single_query_attention.cuh"
#include "decoder_self_attention/kernel.h"

namespace trocr
{

namespace
{

// A line of text is a few dozen tokens, so a pass of 32 keys (d = 64 in fp16; 64 at d = 32) is often the only one:
// latency counts, and more warps would only wait for each other in the merge.
constexpr int kWARPS = 4;
constexpr int kUNROLL = 2;
constexpr int kBLOCKS_A_MULTIPROCESSOR = 6;

template <typename T>
struct Arguments
{
    T const* qkv;
    T const* pastKey;
    T const* pastValue;
    int64_t const* positionIds;
    T* context;
    T* presentKey;
    T* presentValue;
    int capacity;
};

//! Copies a head's cache [C, d] with `token` [d] in row `newRow` (none if negative); when past and present are one
//! memory, writes that row only.
template <typename T, int kHEAD_DIM>
__device__ __forceinline__ void writeCache(T const* past, T* present, T const* token, int newRow, int capacity)
{
    constexpr int kPACKS_A_ROW = kHEAD_DIM * sizeof(T) / sizeof(uint4);
    auto const* const from = reinterpret_cast<uint4 const*>(past);
    auto const* const fromToken = reinterpret_cast<uint4 const*>(token);
    auto* const to = reinterpret_cast<uint4*>(present);

    bool const inPlace = past == present;
    int const firstRow = inPlace ? max(newRow, 0) : 0;
    int const endRow = inPlace ? newRow + 1 : capacity;
    for (int64_t i = static_cast<int64_t>(firstRow) * kPACKS_A_ROW + threadIdx.x;
         i < static_cast<int64_t>(endRow) * kPACKS_A_ROW; i += kWARPS * kWARP_SIZE)
    {
        to[i] = i / kPACKS_A_ROW == newRow ? fromToken[i % kPACKS_A_ROW] : from[i];
    }
}

//! A block a head of an image. Row `position` of the cache is never read: the new key and value come from qkv, so that
//! the order of writing and attending does not matter.
template <typename T, int kHEAD_DIM>
__global__ void __launch_bounds__(kWARPS* kWARP_SIZE, kBLOCKS_A_MULTIPROCESSOR)
    decoderSelfAttentionKernel(Arguments<T> args)
{
    using Attention = SingleQueryAttention<T, kHEAD_DIM, kWARPS, kUNROLL>;
    __shared__ typename Attention::Partials partials;

    // blockIdx = (head, image); qkv [B, 1, 3, H, d], cache [B, H, C, d], context [B, 1, H * d]
    int64_t const image = blockIdx.y;
    int64_t const heads = gridDim.x;
    int64_t const head = image * heads + blockIdx.x;
    T const* const query = args.qkv + (image * 3 * heads + blockIdx.x) * kHEAD_DIM;
    T const* const newKey = query + heads * kHEAD_DIM;
    T const* const newValue = newKey + heads * kHEAD_DIM;
    int64_t const cache = head * args.capacity * kHEAD_DIM;
    T const* const keys = args.pastKey + cache;
    T const* const values = args.pastValue + cache;
    T* const context = args.context + head * kHEAD_DIM;

    int64_t const requested = args.positionIds[image];
    bool const inside = requested >= 0 && requested < args.capacity;
    int const position = inside ? static_cast<int>(requested) : -1;

    if (inside)
    {
        Attention::attend(
            query, [=](int row) { return row == position ? newKey : keys + static_cast<int64_t>(row) * kHEAD_DIM; },
            [=](int row) { return row == position ? newValue : values + static_cast<int64_t>(row) * kHEAD_DIM; }, 0,
            position + 1, partials);
    }
    writeCache<T, kHEAD_DIM>(keys, args.presentKey + cache, newKey, position, args.capacity);
    writeCache<T, kHEAD_DIM>(values, args.presentValue + cache, newValue, position, args.capacity);
    __syncthreads();

    if (threadIdx.x < kHEAD_DIM)
    {
        float const element = inside ? Attention::merge([&](int) { return partials; }, 1, threadIdx.x) : 0.0F;
        context[threadIdx.x] = fromFloat<T>(element);
    }
}

template <typename T, int kHEAD_DIM>
cudaError_t launchSized(DecoderSelfAttentionParams const& params, cudaStream_t stream)
{
    Arguments<T> const args{static_cast<T const*>(params.qkv),       static_cast<T const*>(params.pastKey),
                            static_cast<T const*>(params.pastValue), params.positionIds,
                            static_cast<T*>(params.context),         static_cast<T*>(params.presentKey),
                            static_cast<T*>(params.presentValue),    params.capacity};
    return launch(decoderSelfAttentionKernel<T, kHEAD_DIM>, dim3(params.numHeads, params.batch),
                  dim3(kWARPS * kWARP_SIZE), stream, args);
}

template <typename T>
cudaError_t launchTyped(DecoderSelfAttentionParams const& params, cudaStream_t stream)
{
    return params.headDim == 32 ? launchSized<T, 32>(params, stream) : launchSized<T, 64>(params, stream);
}

}  // namespace

bool canImplementDecoderSelfAttention(DecoderSelfAttentionParams const& params, char const** reason)
{
    return canImplementAttention(params.dataType, params.headDim, params.batch, params.numHeads, params.capacity,
                                 reason);
}

cudaError_t decoderSelfAttention(DecoderSelfAttentionParams const& params, cudaStream_t stream)
{
    if (!canImplementDecoderSelfAttention(params) ||
        !areAligned(16, params.qkv, params.pastKey, params.pastValue, params.context, params.presentKey,
                    params.presentValue) ||
        !areAligned(sizeof(int64_t), params.positionIds))
    {
        return cudaErrorInvalidValue;
    }
    return dispatchType(params.dataType, [&](auto type) { return launchTyped<decltype(type)>(params, stream); });
}

}  // namespace trocr
