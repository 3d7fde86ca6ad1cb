// Python module trocr_attention_sm90: encoderAttentionSm90 on raw device pointers.

#include <cstdint>
#include <stdexcept>
#include <string>

#include <pybind11/pybind11.h>

#include "encoder_attention/kernel_sm90.h"

namespace
{

trocr::DataType parseType(std::string const& name)
{
    if (name == "float16")
    {
        return trocr::DataType::kHALF;
    }
    if (name == "bfloat16")
    {
        return trocr::DataType::kBF16;
    }
    throw std::invalid_argument("dtype " + name + ": expected float16 or bfloat16");
}

void encoderAttention(uintptr_t qkv, uintptr_t context, int32_t batch, int32_t sequenceLength, int32_t numHeads,
    int32_t headDim, std::string const& dtype, uintptr_t stream, bool overlapPredecessor)
{
    trocr::EncoderAttentionParams params{};
    params.qkv = reinterpret_cast<void const*>(qkv);
    params.context = reinterpret_cast<void*>(context);
    params.batch = batch;
    params.sequenceLength = sequenceLength;
    params.numHeads = numHeads;
    params.headDim = headDim;
    params.dataType = parseType(dtype);
    char const* reason{};
    if (!trocr::canImplementEncoderAttentionSm90(params, &reason))
    {
        throw std::invalid_argument(reason);
    }
    cudaError_t const status
        = trocr::encoderAttentionSm90(params, reinterpret_cast<cudaStream_t>(stream), overlapPredecessor);
    if (status != cudaSuccess)
    {
        throw std::runtime_error(std::string("encoder attention on sm_90: ") + cudaGetErrorString(status));
    }
}

} // namespace

#ifndef TROCR_MODULE
#define TROCR_MODULE trocr_attention_sm90
#endif

PYBIND11_MODULE(TROCR_MODULE, module)
{
    namespace py = pybind11;
    module.doc() = "Encoder attention for Hopper on raw device pointers";
    module.def("encoder_attention", &encoderAttention,
        "context [B, S, H * d] = softmax(Q K^T / sqrt(d)) V of qkv [B, S, 3, H, d]; both contiguous, addresses as int",
        py::kw_only(), py::arg("qkv"), py::arg("context"), py::arg("batch"), py::arg("sequence_length"),
        py::arg("num_heads"), py::arg("head_dim"), py::arg("dtype"), py::arg("stream"),
        py::arg("overlap_predecessor") = false);
}
