#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <string>

#include "common/data_type.h"

//! Checks of what TensorRT hands to a plugin. All throw std::invalid_argument with a message that names the values.
namespace trocr
{

//! Whether T may be this type: float32, float16 or bfloat16.
bool isSupported(nvinfer1::DataType type);

//! The kernels' name of a type.
DataType toDataType(nvinfer1::DataType type);

//! "[2, 577, 1152]"
std::string toString(nvinfer1::Dims const& dims);

//! Checks the number of dimensions.
void expectRank(char const* tensor, int32_t rank, int32_t expected);

//! Checks all dimensions.
void expectShape(char const* tensor, nvinfer1::Dims const& dims, nvinfer1::Dims const& expected);

//! Dimension i, which must fit into an int32.
int32_t dimension(char const* tensor, nvinfer1::Dims const& dims, int32_t i);

//! The product of all dimensions but the last, of a tensor with at least one dimension.
int64_t leadingSize(char const* tensor, nvinfer1::Dims const& dims);

//! Checks the answer of a canImplement... function.
void expectImplemented(bool implemented, char const* reason, std::string const& what);

}  // namespace trocr
