#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/shapes.h"

namespace trocr
{

//! The attribute of the three attention ops.
struct HeadsAttributes
{
    int32_t numHeads;

    template <class Self, class Visitor>
    static void visit(Self& self, Visitor& visitor)
    {
        visitor("num_heads", self.numHeads);
    }

    void validate() const
    {
        if (numHeads < 1)
        {
            throw std::invalid_argument{"attribute 'num_heads' is " + std::to_string(numHeads) +
                                        ", expected at least 1"};
        }
    }
};

//! Size of one head in a tensor whose last dimension holds `parts` (3 for packed query, key, value) times all heads.
inline int32_t headDimOf(char const* tensor, nvinfer1::Dims const& dims, int32_t parts, int32_t numHeads)
{
    int64_t const width = dimension(tensor, dims, dims.nbDims - 1);
    int64_t const divisor = int64_t{parts} * numHeads;
    if (width % divisor != 0)
    {
        throw std::invalid_argument{std::string{tensor} + " has shape " + toString(dims) +
                                    ": its last dimension is not a multiple of " + std::to_string(divisor) + " (" +
                                    (parts > 1 ? std::to_string(parts) + " * " : std::string{}) + "num_heads)"};
    }
    return static_cast<int32_t>(width / divisor);
}

//! "head size 64 of qkv [1, 577, 1152]", for messages.
inline std::string describeHeads(int32_t headDim, char const* tensor, nvinfer1::Dims const& dims)
{
    return "head size " + std::to_string(headDim) + " of " + tensor + " " + toString(dims);
}

}  // namespace trocr
