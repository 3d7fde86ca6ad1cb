#include "common/launch.h"
#include "greedy_decoder/kernel.h"
#include "greedy_decoder/wide_layout.h"

namespace trocr
{

using namespace greedy;

bool canDecodeGreedily(GreedyDecoderConfig const& config, char const** reason)
{
    int major{};
    if (deviceAttribute(cudaDevAttrComputeCapabilityMajor, major) != cudaSuccess || major != 9)
    {
        return refuse(reason, "the GPU's compute capability is not 9.0");
    }
    if (config.dataType != DataType::kHALF && config.dataType != DataType::kBF16)
    {
        return refuse(reason, "the data type is neither float16 nor bfloat16");
    }
    if (config.layers < 1 || config.vocabulary < 1 || config.sourceLength < 8 || config.positions < 1)
    {
        return refuse(reason, "layers, vocabulary and positions must be at least 1, the encoder's states at least 8");
    }
    if (config.width < 64 || config.width % 64 != 0)
    {
        return refuse(reason, "the width is no multiple of 64");
    }
    if (config.heads < 1 || (config.width != config.heads * 32 && config.width != config.heads * 64))
    {
        return refuse(reason, "the head size is neither 32 nor 64");
    }
    if (config.layers > kMAX_LAYERS)
    {
        return refuse(reason, "there are more than 16 layers");
    }
    if (decodesInTeams(config) && config.ffnWidth > config.heads * kINNER)
    {
        return refuse(reason, "the feed-forward width is more than 128 times the heads, with heads of 32");
    }
    int blocks{};
    if (!decodesInTeams(config) &&
        (deviceAttribute(cudaDevAttrMultiProcessorCount, blocks) != cudaSuccess || blocks < wide::kMIN_BLOCKS))
    {
        return refuse(reason, "the GPU has fewer than 64 multiprocessors");
    }
    if (!decodesInTeams(config) && config.ffnWidth > wide::kINNER)
    {
        return refuse(reason, "the feed-forward width is above 4096, with heads of 64");
    }
    if (config.width > (decodesInTeams(config) ? kWIDTH : wide::kWIDTH))
    {
        return refuse(reason, "the width is above 256 with heads of 32, or above 1024");
    }
    if (config.ffnWidth < 32 || config.ffnWidth % 32 != 0)
    {
        return refuse(reason, "the feed-forward width is no multiple of 32");
    }
    if (config.endIds.size() > kMAX_END_IDS)
    {
        return refuse(reason, "there are more than 8 ids that end a text");
    }
    return true;
}

}  // namespace trocr
