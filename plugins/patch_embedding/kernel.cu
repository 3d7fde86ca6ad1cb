#include "common/launch.h"
#include "patch_embedding/kernel.h"
#include "patch_embedding/pieces.cuh"

namespace trocr
{

bool canImplementPatchEmbedding(PatchEmbeddingParams const& params, char const** reason)
{
    if (sizeOf(params.dataType) == 0)
    {
        return refuse(reason, "the type must be float, half or bfloat16");
    }
    if (params.height < kPATCH_SIZE || params.height % kPATCH_SIZE != 0 || params.width < kPATCH_SIZE ||
        params.width % kPATCH_SIZE != 0)
    {
        return refuse(reason, "height and width must be multiples of 16");
    }
    if (static_cast<int64_t>(params.height) * params.width > 1 << 26)
    {
        return refuse(reason, "an image may have at most 2^26 pixels");
    }
    if (params.outputs < kPATCH_SIZE || params.outputs % patch_embedding_detail::kPART_COLUMNS != 0)
    {
        return refuse(reason, "outputs must be a multiple of 64");
    }
    int64_t const patches = static_cast<int64_t>(params.height / kPATCH_SIZE) * (params.width / kPATCH_SIZE);
    if (params.batch < 1 || params.specialTokens < 0 ||
        params.batch * (patches + params.specialTokens) > kPATCH_MAX_ROWS)
    {
        return refuse(reason, "batch must be at least 1, special tokens at least 0, and their rows at most 2^30");
    }
    bool const known = params.path == PatchEmbeddingPath::kAUTO || params.path == PatchEmbeddingPath::kGENERAL ||
                       params.path == PatchEmbeddingPath::kHOPPER;
    if (!known || (params.dataType == DataType::kFLOAT && params.path != PatchEmbeddingPath::kAUTO))
    {
        return refuse(reason, "the path is unknown, or one for 16-bit types");
    }
    return true;
}

cudaError_t patchEmbedding(PatchEmbeddingParams const& params, cudaStream_t stream)
{
    if (!canImplementPatchEmbedding(params) ||
        !areAligned(16, params.pixels, params.weight, params.positions, params.y) || !areAligned(8, params.bias) ||
        (params.statistics != nullptr && !areAligned(8, params.statistics)))
    {
        return cudaErrorInvalidValue;
    }
    if (params.dataType == DataType::kFLOAT)
    {
        return patch_embedding_detail::patchEmbeddingFloat(params, stream);
    }
    int major = 0;
    int multiprocessors = 0;
    cudaError_t status = deviceAttribute(cudaDevAttrComputeCapabilityMajor, major);
    if (status == cudaSuccess)
    {
        status = deviceAttribute(cudaDevAttrMultiProcessorCount, multiprocessors);
    }
    if (status != cudaSuccess)
    {
        return status;
    }
    bool const hopper =
        params.path == PatchEmbeddingPath::kHOPPER || (params.path == PatchEmbeddingPath::kAUTO && major == 9);
    if (hopper && major != 9)
    {
        return cudaErrorInvalidValue;
    }
    return hopper ? patch_embedding_detail::patchEmbeddingSm90(params, multiprocessors, stream)
                  : patch_embedding_detail::patchEmbeddingSm80(params, multiprocessors, stream);
}

}  // namespace trocr
