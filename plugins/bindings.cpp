// Python module `trocr_kernels`: the kernels on raw device pointers, without TensorRT.

#include "bindings.h"

#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bias_activation/kernel.h"
#include "cache_reorder/kernel.h"
#include "common/launch.h"
#include "cross_attention/kernel.h"
#include "decoder_self_attention/kernel.h"
#include "encoder_attention/kernel.h"
#include "image_resize/kernel.h"
#include "linear/kernel.h"
#include "patch_embedding/kernel.h"
#include "residual_layernorm/kernel.h"

namespace py = pybind11;
using namespace py::literals;

namespace trocr
{

namespace
{

constexpr char kMODULE_DOC[] =
    R"(Fused TrOCR kernels on raw device pointers (`tensor.data_ptr()`), for numerics and micro-benchmarks.

Every function enqueues one op on `stream` (a cudaStream_t as an integer, `torch.cuda.current_stream().cuda_stream`;
0 is the default stream) of the current device and returns at once. Tensors are contiguous and of `dtype`: 'float32',
'float16' or 'bfloat16'. Shapes: B batch, S tokens, H heads of size d (32 or 64), C cache capacity, R rows, N width.
RuntimeError: an argument the op cannot implement, with the reason, or the error of the launch.)";

EncoderAttentionPath parsePath(std::string const& op, std::string const& name)
{
    constexpr std::pair<char const*, EncoderAttentionPath> kPATHS[] = {
        {"auto", EncoderAttentionPath::kAUTO},        {"mma", EncoderAttentionPath::kGENERAL},
        {"hopper", EncoderAttentionPath::kHOPPER},    {"hopper2", EncoderAttentionPath::kHOPPER_2},
        {"hopper3", EncoderAttentionPath::kHOPPER_3}, {"divided", EncoderAttentionPath::kHOPPER_DIVIDED},
    };
    std::string known;
    for (auto const& [path, value] : kPATHS)
    {
        if (name == path)
        {
            return value;
        }
        known += std::string(known.empty() ? "'" : ", '") + path + "'";
    }
    fail(op, "path '" + name + "' is none of " + known);
}

//! A tensor's address as Python has it, and what it must be a multiple of.
struct Pointer
{
    char const* name;
    uintptr_t address;
    size_t alignment = 16;
};

//! Checks, in this order, what the op can implement and the pointers; enqueues.
template <typename Params>
void enqueue(std::string const& op, Params const& params, bool (*canImplement)(Params const&, char const**),
             cudaError_t (*launcher)(Params const&, cudaStream_t), std::initializer_list<Pointer> pointers,
             uintptr_t stream)
{
    char const* reason = nullptr;
    if (!canImplement(params, &reason))
    {
        fail(op, reason);
    }
    for (auto const& pointer : pointers)
    {
        if (pointer.address == 0)
        {
            fail(op, "pointer '" + std::string(pointer.name) + "' is null");
        }
        if (pointer.address % pointer.alignment != 0)
        {
            fail(op, "pointer '" + std::string(pointer.name) + "' is not a multiple of " +
                         std::to_string(pointer.alignment) + " bytes");
        }
    }
    cudaError_t const status = launcher(params, reinterpret_cast<cudaStream_t>(stream));
    if (status != cudaSuccess)
    {
        throw std::runtime_error(op + " failed: " + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) + ")");
    }
}

void bindEncoderAttention(uintptr_t qkv, uintptr_t context, int32_t batch, int32_t sequenceLength, int32_t numHeads,
                          int32_t headDim, std::string const& dtype, float outputScale, uintptr_t stream,
                          std::string const& path)
{
    std::string const op = "encoder_attention";
    EncoderAttentionParams const params{
        input(qkv),          output(context), batch, sequenceLength, numHeads, headDim, parseDataType(op, dtype),
        parsePath(op, path), outputScale};
    enqueue(op, params, canImplementEncoderAttention, encoderAttention, {{"qkv", qkv}, {"context", context}}, stream);
}

void bindDecoderSelfAttention(uintptr_t qkv, uintptr_t pastKey, uintptr_t pastValue, uintptr_t positionIds,
                              uintptr_t context, uintptr_t presentKey, uintptr_t presentValue, int32_t batch,
                              int32_t capacity, int32_t numHeads, int32_t headDim, std::string const& dtype,
                              uintptr_t stream)
{
    std::string const op = "decoder_self_attention";
    DecoderSelfAttentionParams const params{input(qkv),
                                            input(pastKey),
                                            input(pastValue),
                                            reinterpret_cast<int64_t const*>(positionIds),
                                            output(context),
                                            output(presentKey),
                                            output(presentValue),
                                            batch,
                                            capacity,
                                            numHeads,
                                            headDim,
                                            parseDataType(op, dtype)};
    enqueue(op, params, canImplementDecoderSelfAttention, decoderSelfAttention,
            {{"qkv", qkv},
             {"past_key", pastKey},
             {"past_value", pastValue},
             {"position_ids", positionIds, sizeof(int64_t)},
             {"context", context},
             {"present_key", presentKey},
             {"present_value", presentValue}},
            stream);
}

void bindCrossAttention(uintptr_t query, uintptr_t key, uintptr_t value, uintptr_t context, int32_t batch,
                        int32_t images, int32_t sequenceLength, int32_t numHeads, int32_t headDim,
                        std::string const& dtype, uintptr_t stream)
{
    std::string const op = "cross_attention";
    CrossAttentionParams const params{
        input(query),   input(key), input(value), output(context),         batch, images == 0 ? batch : images,
        sequenceLength, numHeads,   headDim,      parseDataType(op, dtype)};
    enqueue(op, params, canImplementCrossAttention, crossAttention,
            {{"query", query}, {"key", key}, {"value", value}, {"context", context}}, stream);
}

void bindReorderCache(uintptr_t cache, uintptr_t rows, uintptr_t positionIds, int64_t tensorBytes, int32_t tensors,
                      int32_t batch, int32_t beams, int32_t numHeads, int32_t capacity, int32_t rowBytes,
                      uintptr_t stream)
{
    CacheReorderParams const params{output(cache),
                                    reinterpret_cast<int64_t const*>(rows),
                                    reinterpret_cast<int64_t const*>(positionIds),
                                    tensorBytes,
                                    tensors,
                                    batch,
                                    beams,
                                    numHeads,
                                    capacity,
                                    rowBytes};
    enqueue("reorder_cache", params, canImplementCacheReorder, cacheReorder,
            {{"cache", cache}, {"rows", rows, sizeof(int64_t)}, {"position_ids", positionIds, sizeof(int64_t)}},
            stream);
}

void bindResidualLayerNorm(uintptr_t x, uintptr_t residual, uintptr_t gamma, uintptr_t beta, uintptr_t normed,
                           uintptr_t sum, int64_t rows, int32_t width, float epsilon, std::string const& dtype,
                           bool overlapPredecessor, uintptr_t stream)
{
    std::string const op = "residual_layernorm";
    ResidualLayerNormParams const params{
        input(x), input(residual),          input(gamma),      input(beta), output(normed), output(sum), rows, width,
        epsilon,  parseDataType(op, dtype), overlapPredecessor};
    size_t const size = sizeOf(params.dataType);
    enqueue(op, params, canImplementResidualLayerNorm, residualLayerNorm,
            {{"x", x, size},
             {"residual", residual, size},
             {"gamma", gamma, size},
             {"beta", beta, size},
             {"normed", normed, size}},
            stream);
}

void bindLayerNorm(uintptr_t x, uintptr_t gamma, uintptr_t beta, uintptr_t normed, int64_t rows, int32_t width,
                   float epsilon, std::string const& dtype, bool overlapPredecessor, uintptr_t stream)
{
    std::string const op = "layernorm";
    ResidualLayerNormParams const params{
        input(x),          nullptr, input(gamma), input(beta), output(normed),
        nullptr,           rows,    width,        epsilon,     parseDataType(op, dtype),
        overlapPredecessor};
    size_t const size = sizeOf(params.dataType);
    enqueue(op, params, canImplementResidualLayerNorm, residualLayerNorm,
            {{"x", x, size}, {"gamma", gamma, size}, {"beta", beta, size}, {"normed", normed, size}}, stream);
}

void bindBiasActivation(uintptr_t x, uintptr_t bias, uintptr_t y, int64_t rows, int32_t width,
                        std::string const& activation, std::string const& dtype, uintptr_t stream)
{
    std::string const op = "bias_activation";
    BiasActivationParams const params{
        input(x), input(bias), output(y), rows, width, parseActivation(op, activation), parseDataType(op, dtype)};
    size_t const size = sizeOf(params.dataType);
    enqueue(op, params, canImplementBiasActivation, biasActivation,
            {{"x", x, size}, {"bias", bias, size}, {"y", y, size}}, stream);
}

LinearActivation parseLinearActivation(std::string const& op, std::string const& name)
{
    if (name == "none")
    {
        return LinearActivation::kNONE;
    }
    if (name == "gelu")
    {
        return LinearActivation::kGELU;
    }
    if (name == "relu")
    {
        return LinearActivation::kRELU;
    }
    fail(op, "activation '" + name + "' is none of 'none', 'gelu', 'relu'");
}

void bindLinear(uintptr_t x, uintptr_t weight, uintptr_t y, uintptr_t bias, uintptr_t residual,
                uintptr_t inputStatistics, uintptr_t weightSum, uintptr_t outputStatistics, uintptr_t values,
                int64_t rows, int32_t outputs, int32_t inputs, std::string const& dtype, float epsilon,
                std::string const& activation, int32_t tokens, int32_t headDim, int32_t tactic, bool overlapPredecessor,
                bool e4m3, uintptr_t quantized, float productScale, float outputScale, uintptr_t stream)
{
    std::string const op = "linear";
    LinearParams const params{input(x),
                              input(weight),
                              reinterpret_cast<float const*>(bias),
                              input(residual),
                              output(y),
                              reinterpret_cast<float const*>(inputStatistics),
                              reinterpret_cast<float const*>(weightSum),
                              reinterpret_cast<float*>(outputStatistics),
                              output(values),
                              tokens,
                              headDim,
                              epsilon,
                              rows,
                              outputs,
                              inputs,
                              parseLinearActivation(op, activation),
                              parseDataType(op, dtype),
                              tactic,
                              overlapPredecessor,
                              e4m3,
                              output(quantized),
                              productScale,
                              outputScale};
    bool const onlyQuantized = e4m3 && params.activation == LinearActivation::kGELU;
    Pointer const result = onlyQuantized ? Pointer{"quantized", quantized} : Pointer{"y", y};
    enqueue(op, params, canImplementLinear, linear, {{"x", x}, {"weight", weight}, result}, stream);
}

void bindRowStatistics(uintptr_t x, uintptr_t statistics, int64_t rows, int32_t width, std::string const& dtype,
                       uintptr_t quantized, float scale, uintptr_t stream)
{
    std::string const op = "row_statistics";
    RowStatisticsParams const params{input(x),
                                     reinterpret_cast<float*>(statistics),
                                     output(quantized),
                                     scale,
                                     rows,
                                     width,
                                     parseDataType(op, dtype)};
    enqueue(op, params, canImplementRowStatistics, rowStatistics,
            {{"x", x, 2 * sizeOf(params.dataType)}, {"statistics", statistics, 8}}, stream);
}

PatchEmbeddingPath parsePatchEmbeddingPath(std::string const& op, std::string const& name)
{
    if (name == "auto")
    {
        return PatchEmbeddingPath::kAUTO;
    }
    if (name == "mma")
    {
        return PatchEmbeddingPath::kGENERAL;
    }
    if (name == "hopper")
    {
        return PatchEmbeddingPath::kHOPPER;
    }
    fail(op, "path '" + name + "' is none of 'auto', 'mma', 'hopper'");
}

void bindPatchEmbedding(uintptr_t pixels, uintptr_t weight, uintptr_t bias, uintptr_t positions, uintptr_t y,
                        uintptr_t statistics, float scale, int32_t batch, int32_t height, int32_t width,
                        int32_t specialTokens, int32_t outputs, std::string const& dtype, bool overlapPredecessor,
                        std::string const& path, uintptr_t stream)
{
    std::string const op = "patch_embedding";
    PatchEmbeddingParams const params{input(pixels),
                                      input(weight),
                                      reinterpret_cast<float const*>(bias),
                                      input(positions),
                                      output(y),
                                      reinterpret_cast<float*>(statistics),
                                      scale,
                                      batch,
                                      height,
                                      width,
                                      specialTokens,
                                      outputs,
                                      parseDataType(op, dtype),
                                      parsePatchEmbeddingPath(op, path),
                                      overlapPredecessor};
    enqueue(op, params, canImplementPatchEmbedding, patchEmbedding,
            {{"pixels", pixels}, {"weight", weight}, {"bias", bias, 8}, {"positions", positions}, {"y", y}}, stream);
}

void bindImageResize(uintptr_t sources, uintptr_t images, uintptr_t weights, uintptr_t intermediate, uintptr_t out,
                     int32_t count, int32_t maxHeight, int32_t outHeight, int32_t outWidth, std::string const& filter,
                     uintptr_t stream)
{
    std::string const op = "image_resize";
    if (filter != "bilinear" && filter != "bicubic")
    {
        fail(op, "filter '" + filter + "' is neither 'bilinear' nor 'bicubic'");
    }
    ImageResizeParams const params{static_cast<uint8_t const*>(input(sources)),
                                   static_cast<ResizeSource const*>(input(images)),
                                   count,
                                   maxHeight,
                                   outHeight,
                                   outWidth,
                                   filter == "bilinear" ? ResizeFilter::kBILINEAR : ResizeFilter::kBICUBIC,
                                   static_cast<int32_t*>(output(weights)),
                                   static_cast<uint8_t*>(output(intermediate)),
                                   static_cast<uint8_t*>(output(out))};
    enqueue(op, params, canImplementImageResize, imageResize,
            {{"sources", sources, 1},
             {"images", images, 8},
             {"weights", weights, 4},
             {"intermediate", intermediate, 4},
             {"out", out, 4}},
            stream);
}

}  // namespace

PYBIND11_MODULE(trocr_kernels, module)
{
    module.doc() = kMODULE_DOC;

    module.def("encoder_attention", bindEncoderAttention, "qkv"_a, "context"_a, py::kw_only(), "batch"_a,
               "sequence_length"_a, "num_heads"_a, "head_dim"_a, "dtype"_a, "output_scale"_a = 0.0F, "stream"_a = 0,
               "path"_a = "auto",
               "context [B, S, H*d] = softmax(q k^T / sqrt(d)) v of the packed qkv [B, S, 3, H, d]. path forces an "
               "implementation: "
               "'mma' (mma.sync, any GPU), 'hopper' (wgmma; compute capability 9.0, d = 64, 16-bit types) or one of "
               "its variants "
               "(kernel.h).");

    module.def(
        "decoder_self_attention", bindDecoderSelfAttention, "qkv"_a, "past_key"_a, "past_value"_a, "position_ids"_a,
        "context"_a, "present_key"_a, "present_value"_a, py::kw_only(), "batch"_a, "capacity"_a, "num_heads"_a,
        "head_dim"_a, "dtype"_a, "stream"_a = 0,
        "One decoding step: the key and value of qkv [B, 1, 3, H, d] go to row position_ids[b] (int64 [B, 1]) of the "
        "cache [B, H, C, d]; context [B, 1, H*d] attends to rows 0 to position_ids[b]. present_* is past_* (only the "
        "new row is written) or apart from it (the whole cache is copied). A position outside [0, C) writes no row and "
        "a zero context.");

    module.def(
        "cross_attention", bindCrossAttention, "query"_a, "key"_a, "value"_a, "context"_a, py::kw_only(), "batch"_a,
        "images"_a = 0, "sequence_length"_a, "num_heads"_a, "head_dim"_a, "dtype"_a, "stream"_a = 0,
        "context [B, 1, H*d] of one query [B, 1, H*d] a row over key and value [I, H, S, d]; B / I neighbouring rows "
        "share an image; images 0: one a row.");

    module.def("reorder_cache", bindReorderCache, "cache"_a, "rows"_a, "position_ids"_a, py::kw_only(),
               "tensor_bytes"_a, "tensors"_a, "batch"_a, "beams"_a, "num_heads"_a, "capacity"_a, "row_bytes"_a,
               "stream"_a = 0,
               "In place, in each of the tensors [B, H, C, row_bytes]: row r becomes row rows[r] (int64 [B], of the "
               "same image's "
               "beams) up to position_ids[r] (int64 [B]).");

    module.def(
        "residual_layernorm", bindResidualLayerNorm, "x"_a, "residual"_a, "gamma"_a, "beta"_a, "normed"_a, "sum"_a,
        py::kw_only(), "rows"_a, "width"_a, "epsilon"_a, "dtype"_a, "overlap_predecessor"_a = false, "stream"_a = 0,
        "sum [R, N] = x + residual, rounded to dtype (0 for sum: not wanted); normed [R, N] = LayerNorm(sum) * gamma + "
        "beta.");

    module.def("layernorm", bindLayerNorm, "x"_a, "gamma"_a, "beta"_a, "normed"_a, py::kw_only(), "rows"_a, "width"_a,
               "epsilon"_a, "dtype"_a, "overlap_predecessor"_a = false, "stream"_a = 0,
               "normed [R, N] = LayerNorm(x [R, N]) * gamma + beta.");

    module.def("bias_activation", bindBiasActivation, "x"_a, "bias"_a, "y"_a, py::kw_only(), "rows"_a, "width"_a,
               "activation"_a, "dtype"_a, "stream"_a = 0,
               "y [R, N] = activation(x [R, N] + bias [N]); activation 'gelu' (exact, erf) or 'relu'.");

    module.def(
        "linear", bindLinear, "x"_a, "weight"_a, "y"_a, py::kw_only(), "bias"_a = 0, "residual"_a = 0,
        "input_statistics"_a = 0, "weight_sum"_a = 0, "output_statistics"_a = 0, "values"_a = 0, "rows"_a, "outputs"_a,
        "inputs"_a, "dtype"_a, "epsilon"_a = 0.0F, "activation"_a = "none", "tokens"_a = 0, "head_dim"_a = 0,
        "tactic"_a = 0, "overlap_predecessor"_a = false, "e4m3"_a = false, "quantized"_a = 0, "product_scale"_a = 0.0F,
        "output_scale"_a = 0.0F, "stream"_a = 0,
        "y [R, N] = activation(x' [R, K] weight [N, K]^T + bias) + residual [R, N]; x' is x, or, with input_statistics "
        "[R, K / 64, 2] and weight_sum [N], (x - mean) / sqrt(variance + epsilon). bias, weight_sum and statistics are "
        "float32; 0 for a tensor that is not there; activation 'none', 'gelu' (exact, erf) or 'relu'; tactic 0: by "
        "cost, else 1 to linear_tactic_count(). With tokens y and values are [R / tokens, N / 2 / head_dim, tokens, "
        "head_dim], of the first N / 2 columns and of the others. With e4m3, x and weight are that, in the order of "
        "common/fp8.cuh; quantized e4m3 [R, N] takes y / output_scale: in place of y (0) with a GELU, beside it with "
        "output_statistics.");
    module.def("linear_tactic_count", &linearTacticCount);
    module.def("linear_tactic_on_hopper", &linearTacticOnHopper, py::kw_only(), "rows"_a, "outputs"_a, "inputs"_a,
               "residual"_a, "e4m3"_a = false, "multiprocessors"_a, "What tactic 0 takes on Hopper; needs no GPU.");

    module.def("row_statistics", bindRowStatistics, "x"_a, "statistics"_a, py::kw_only(), "rows"_a, "width"_a,
               "dtype"_a, "quantized"_a = 0, "scale"_a = 0.0F, "stream"_a = 0,
               "statistics float32 [R, K / 64, 2]: mean, and sum of squared distances from it, of each 64 columns of x "
               "[R, K]; quantized e4m3 [R, K] takes x / scale.");

    module.def("image_resize", bindImageResize, "sources"_a, "images"_a, "weights"_a, "intermediate"_a, "out"_a,
               py::kw_only(), "count"_a, "max_height"_a, "out_height"_a, "out_width"_a, "filter"_a, "stream"_a = 0,
               "out uint8 [images, 3, out_height, out_width] of images uint8 [height, width, 3] of different sizes in "
               "one buffer. "
               "`images` is, for each, int64 offset in sources, int64 offset in intermediate (uint8 [3, height, "
               "out_width]), int64 "
               "offset in weights (int32, see kernel.h), int32 height, int32 width; on the device. filter 'bilinear' "
               "or 'bicubic', "
               "antialiased.");

    bindDeviceDecoder(module);

    module.def(
        "patch_embedding", bindPatchEmbedding, "pixels"_a, "weight"_a, "bias"_a, "positions"_a, "y"_a, py::kw_only(),
        "statistics"_a = 0, "scale"_a, "batch"_a, "height"_a, "width"_a, "special_tokens"_a, "outputs"_a, "dtype"_a,
        "overlap_predecessor"_a = false, "path"_a = "auto", "stream"_a = 0,
        "y [B, S, N]: the special tokens, which are the first rows of positions [S, N], then scale * (pixels - 128) "
        "weight^T + bias + positions for each patch of 16 x 16 of pixels uint8 [B, 3, height, width]. weight [N, 768] "
        "in the order of channel, y / 4, x / 4, x / 2 % 2, y % 4, x % 2; bias float32 [N]; statistics of y as in "
        "row_statistics (0: not wanted). path 'mma' (mma.sync) or 'hopper' (wgmma) forces an implementation.");
}

}  // namespace trocr
