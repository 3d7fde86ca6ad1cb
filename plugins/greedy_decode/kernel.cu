#include "greedy_decode/kernel.h"

#include <algorithm>

#include "common/launch.h"
#include "greedy_decode/decoder.cuh"
#include "greedy_decode/launch.h"

namespace trocr
{

namespace
{

using namespace greedy;

constexpr int kMAX_TEAMS = 32;
// Clusters of more than 8 blocks must be allowed for by cudaFuncAttributeNonPortableClusterSizeAllowed.
constexpr int kCLUSTER_SIZES[] = {16, 8};
// Up to this width a cluster streams a layer's weights fast enough, and its barriers cost a fifth of the grid's.
constexpr int kMAX_CLUSTER_D_MODEL = 512;

int teamsOf(GreedyDecodePlan const& plan)
{
    return plan.blocks / plan.teamBlocks;
}

int rowTilesOf(int rows)
{
    return rows <= 16 ? 1 : rows <= 32 ? 2 : 4;
}

Kernel kernelOf(DataType type, bool cluster, int batch)
{
    return type == DataType::kHALF ? kernelOfHalf(cluster, rowTilesOf(batch)) : kernelOfBf16(cluster, rowTilesOf(batch));
}

cudaError_t allow(Kernel const& kernel, int teamBlocks)
{
    cudaError_t status = cudaFuncSetAttribute(
        kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kernel.sharedBytes));
    if (status == cudaSuccess && teamBlocks > 8)
    {
        status = cudaFuncSetAttribute(kernel.function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    }
    return status;
}

//! The launch, and the attributes that it points to.
struct Launch
{
    cudaLaunchConfig_t config{};
    cudaLaunchAttribute attributes[2]{};

    Launch(Kernel const& kernel, int blocks, int clusterBlocks, cudaStream_t stream)
    {
        // All blocks at once or an error: they wait for each other.
        attributes[0].id = cudaLaunchAttributeCooperative;
        attributes[0].val.cooperative = 1;
        attributes[1].id = cudaLaunchAttributeClusterDimension;
        attributes[1].val.clusterDim = {static_cast<unsigned>(clusterBlocks), 1, 1};
        config.gridDim = dim3(blocks);
        config.blockDim = dim3(kBLOCK_THREADS);
        config.dynamicSmemBytes = kernel.sharedBytes;
        config.stream = stream;
        config.attrs = attributes;
        config.numAttrs = clusterBlocks > 1 ? 2 : 1;
    }
};

//! Lays the workspace out from `base` on, which may be null to measure it.
Workspace carve(GreedyDecodeParams const& params, void* base, size_t& bytes)
{
    GreedyDecoderShape const& shape = params.shape;
    size_t const b = params.batch;
    size_t const d = shape.dModel;
    size_t const size = sizeOf(shape.dataType);
    size_t const cache = shape.numLayers * b * params.maxSteps * d * size;
    size_t offset = 0;
    auto const take = [&](size_t count)
    {
        void* const at = static_cast<uint8_t*>(base) + offset;
        offset += ceilDiv<size_t>(count, 256) * 256;
        return at;
    };
    Workspace workspace{};
    workspace.counter = static_cast<unsigned*>(take(sizeof(unsigned)));
    workspace.teamActive = static_cast<int*>(take(kMAX_TEAMS * sizeof(int)));
    workspace.residual = take(b * d * size);
    workspace.query = take(b * d * size);
    workspace.context = take(b * d * size);
    workspace.hidden = take(b * shape.ffnDim * size);
    workspace.splitContext = static_cast<float*>(take(kMAX_SPLITS * b * d * sizeof(float)));
    workspace.splitScale = static_cast<float2*>(take(kMAX_SPLITS * b * shape.numHeads * sizeof(float2)));
    workspace.candidates = static_cast<Candidate*>(take(b * params.plan.blocks * sizeof(Candidate)));
    workspace.keys = take(cache);
    workspace.values = take(cache);
    bytes = offset;
    return workspace;
}

} // namespace

cudaError_t planGreedyDecode(GreedyDecoderShape const& shape, GreedyDecodePlan& plan)
{
    int major{};
    int multiprocessors{};
    cudaError_t status = deviceAttribute(cudaDevAttrComputeCapabilityMajor, major);
    if (status == cudaSuccess)
    {
        status = deviceAttribute(cudaDevAttrMultiProcessorCount, multiprocessors);
    }
    if (status != cudaSuccess || major != 9)
    {
        return status != cudaSuccess ? status : cudaErrorNotSupported;
    }
    plan = {multiprocessors, multiprocessors};
    if (shape.dModel > kMAX_CLUSTER_D_MODEL)
    {
        return cudaSuccess;
    }
    Kernel const kernel = kernelOf(shape.dataType, true, 1);
    for (int const clusterBlocks : kCLUSTER_SIZES)
    {
        int const replicas = clusterBlocks / shape.numHeads;
        if (clusterBlocks % shape.numHeads != 0 || replicas > kMAX_SPLITS)
        {
            continue;
        }
        int clusters{};
        status = allow(kernel, clusterBlocks);
        if (status == cudaSuccess)
        {
            Launch const launch(kernel, clusterBlocks, clusterBlocks, nullptr);
            status = cudaOccupancyMaxActiveClusters(&clusters, kernel.function, &launch.config);
        }
        if (status == cudaSuccess && clusters * kMAX_CLUSTER_ROWS >= kGREEDY_MAX_BATCH)
        {
            clusters = std::min(clusters, kMAX_TEAMS);
            plan = {clusters * clusterBlocks, clusterBlocks};
            return cudaSuccess;
        }
        cudaGetLastError(); // of a cluster size that this device does not have
    }
    return cudaSuccess;
}

bool canImplementGreedyDecode(GreedyDecodeParams const& params, char const** reason)
{
    GreedyDecoderShape const& shape = params.shape;
    GreedyDecodePlan const& plan = params.plan;
    if (shape.dataType != DataType::kHALF && shape.dataType != DataType::kBF16)
    {
        return refuse(reason, "the data type is neither float16 nor bfloat16");
    }
    if (shape.activation != Activation::kGELU && shape.activation != Activation::kRELU)
    {
        return refuse(reason, "the activation is neither gelu nor relu");
    }
    if ((shape.headDim != 32 && shape.headDim != 64) || shape.numHeads < 1
        || shape.dModel != shape.numHeads * shape.headDim)
    {
        return refuse(reason, "the head size is not 32 or 64, or d_model is not heads * head size");
    }
    if (shape.dModel % 64 != 0 || shape.dModel > kSLAB)
    {
        return refuse(reason, "d_model is no multiple of 64 up to 1024");
    }
    if (shape.ffnDim < kGROUP || shape.ffnDim % kGROUP != 0 || shape.vocabSize < 1 || shape.sequenceLength < 1)
    {
        return refuse(reason, "ffn_dim is no multiple of 32, or the vocabulary or the encoder's sequence is empty");
    }
    if (shape.numLayers < 1 || shape.numLayers > kGREEDY_MAX_LAYERS)
    {
        return refuse(reason, "the number of layers is not in 1 to 24");
    }
    if (params.batch < 1 || params.batch > kGREEDY_MAX_BATCH || params.maxSteps < 1)
    {
        return refuse(reason, "the batch is not in 1 to 64, or max_steps is not positive");
    }
    if (params.numEndIds < 0 || params.numEndIds > kGREEDY_MAX_END_IDS)
    {
        return refuse(reason, "there are more than 4 ids that end the text");
    }
    for (int const token : {params.startId, params.padId})
    {
        if (token < 0 || token >= shape.vocabSize)
        {
            return refuse(reason, "the start or padding id is not in the vocabulary");
        }
    }
    if (plan.teamBlocks < 1 || plan.blocks % plan.teamBlocks != 0 || teamsOf(plan) < 1 || teamsOf(plan) > kMAX_TEAMS)
    {
        return refuse(reason, "the plan is not one of planGreedyDecode");
    }
    int const rows = ceilDiv(params.batch, teamsOf(plan));
    int const ownColumns = Shares(shape, plan).selfOutput.tiles * kTILE;
    if (teamsOf(plan) > 1
        && (plan.teamBlocks % shape.numHeads != 0 || plan.teamBlocks / shape.numHeads > kMAX_SPLITS
            || plan.teamBlocks > kWARP_SIZE || rows > kMAX_CLUSTER_ROWS || shape.dModel > kMAX_CLUSTER_D_MODEL))
    {
        return refuse(reason, "the plan's clusters do not fit the decoder's heads or the batch");
    }
    if (ownColumns > kMAX_OWN_COLUMNS || ownColumns * rows > kMAX_OWN_VALUES)
    {
        return refuse(reason, "the plan has too few blocks for this width and batch");
    }
    return true;
}

size_t greedyLayerBytes(GreedyDecoderShape const& shape, GreedyDecodePlan const& plan)
{
    return shape.numLayers * Shares(shape, plan).layerBytes();
}

size_t greedyHeadBytes(GreedyDecoderShape const& shape, GreedyDecodePlan const& plan)
{
    return Shares(shape, plan).head.bytes();
}

size_t greedyDecodeWorkspace(GreedyDecodeParams const& params)
{
    size_t bytes{};
    carve(params, nullptr, bytes);
    return bytes;
}

cudaError_t greedyDecode(GreedyDecodeParams const& params, cudaStream_t stream)
{
    if (!canImplementGreedyDecode(params) || !areAligned(256, params.workspace)
        || !areAligned(16, params.layerWeights, params.headWeights, params.norms, params.embedding, params.positions)
        || !areAligned(4, params.tokenIds, params.logProbs, params.steps))
    {
        return cudaErrorInvalidValue;
    }
    for (int layer = 0; layer < params.shape.numLayers; ++layer)
    {
        if (!areAligned(16, params.crossKeys[layer], params.crossValues[layer]))
        {
            return cudaErrorInvalidValue;
        }
    }
    int const teams = teamsOf(params.plan);
    bool const cluster = teams > 1;
    Kernel const kernel = kernelOf(params.shape.dataType, cluster, params.batch);
    cudaError_t status = allow(kernel, params.plan.teamBlocks * cluster);
    size_t bytes{};
    Arguments arguments{params, carve(params, params.workspace, bytes), ceilDiv(params.batch, teams)};
    if (status == cudaSuccess)
    {
        status = cudaMemsetAsync(arguments.workspace.counter, 0, sizeof(unsigned), stream);
    }
    if (status == cudaSuccess)
    {
        Launch const launch(kernel, params.plan.blocks, cluster ? params.plan.teamBlocks : 1, stream);
        void* values[] = {&arguments};
        status = cudaLaunchKernelExC(&launch.config, kernel.function, values);
    }
    return status;
}

} // namespace trocr
