#include "common/shapes.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

namespace trocr
{

bool isSupported(nvinfer1::DataType type)
{
    return type == nvinfer1::DataType::kFLOAT || type == nvinfer1::DataType::kHALF || type == nvinfer1::DataType::kBF16;
}

DataType toDataType(nvinfer1::DataType type)
{
    switch (type)
    {
        case nvinfer1::DataType::kFLOAT:
            return DataType::kFLOAT;
        case nvinfer1::DataType::kHALF:
            return DataType::kHALF;
        case nvinfer1::DataType::kBF16:
            return DataType::kBF16;
        default:
            throw std::invalid_argument{"the tensors' type must be float32, float16 or bfloat16, not DataType(" +
                                        std::to_string(static_cast<int32_t>(type)) + ")"};
    }
}

std::string toString(nvinfer1::Dims const& dims)
{
    std::string text = "[";
    for (int32_t i = 0; i < dims.nbDims; ++i)
    {
        text += (i > 0 ? ", " : "") + std::to_string(dims.d[i]);
    }
    return text + "]";
}

void expectRank(char const* tensor, int32_t rank, int32_t expected)
{
    if (rank != expected)
    {
        throw std::invalid_argument{std::string{tensor} + " has " + std::to_string(rank) + " dimensions, expected " +
                                    std::to_string(expected)};
    }
}

void expectShape(char const* tensor, nvinfer1::Dims const& dims, nvinfer1::Dims const& expected)
{
    if (dims.nbDims != expected.nbDims || !std::equal(dims.d, dims.d + dims.nbDims, expected.d))
    {
        throw std::invalid_argument{std::string{tensor} + " has shape " + toString(dims) + ", expected " +
                                    toString(expected)};
    }
}

int32_t dimension(char const* tensor, nvinfer1::Dims const& dims, int32_t i)
{
    if (dims.d[i] < 0 || dims.d[i] > std::numeric_limits<int32_t>::max())
    {
        throw std::invalid_argument{std::string{tensor} + " has shape " + toString(dims) + ": dimension " +
                                    std::to_string(i) + " is out of range"};
    }
    return static_cast<int32_t>(dims.d[i]);
}

int64_t leadingSize(char const* tensor, nvinfer1::Dims const& dims)
{
    if (dims.nbDims < 1)
    {
        throw std::invalid_argument{std::string{tensor} + " is a scalar, expected at least one dimension"};
    }
    int64_t size = 1;
    for (int32_t i = 0; i + 1 < dims.nbDims; ++i)
    {
        size *= dims.d[i];
    }
    return size;
}

void expectImplemented(bool implemented, char const* reason, std::string const& what)
{
    if (!implemented)
    {
        throw std::invalid_argument{what + " is not implemented: " + (reason != nullptr ? reason : "unknown reason")};
    }
}

}  // namespace trocr
