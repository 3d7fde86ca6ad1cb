#include "common/launch.h"
#include "device_decoder/kernel.h"
#include "device_decoder/team_layout.h"

namespace trocr
{

using namespace decoder;

bool canDecodeOnDevice(DeviceDecoderConfig const& config, char const** reason)
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
    if (decodesInTeams(config) && config.layers > kMAX_LAYERS)
    {
        return refuse(reason, "there are more than 16 layers with heads of 32");
    }
    if (decodesInTeams(config) && config.ffnWidth > config.heads * kINNER)
    {
        return refuse(reason, "the feed-forward width is more than 128 times the heads, with heads of 32");
    }
    if (config.width > (decodesInTeams(config) ? kWIDTH : 1024))
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

bool canAttendToStates(DeviceDecoderConfig const& config, char const** reason)
{
    if (config.width != config.heads * 64 || config.heads > 16 || config.width % 256 != 0)
    {
        return refuse(reason, "heads are not 4, 8, 12 or 16 of 64");
    }
    if (config.encoderWidth != 384 && config.encoderWidth != 768 && config.encoderWidth != 1024)
    {
        return refuse(reason, "the encoder's width is not 384, 768 or 1024");
    }
    return true;
}

}  // namespace trocr
