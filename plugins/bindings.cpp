// Python module `trocr_kernels`: the kernels on raw device pointers, without TensorRT.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bias_activation/kernel.h"
#include "cross_attention/kernel.h"
#include "decoder_self_attention/kernel.h"
#include "encoder_attention/kernel.h"
#include "greedy_decode/kernel.h"
#include "residual_layernorm/kernel.h"

namespace py = pybind11;
using namespace py::literals;

namespace trocr
{

namespace
{

constexpr char kMODULE_DOC[] = R"(Fused TrOCR kernels on raw device pointers (`tensor.data_ptr()`), for numerics and micro-benchmarks.

Every function enqueues one op on `stream` (a cudaStream_t as an integer, `torch.cuda.current_stream().cuda_stream`; 0 is the
default stream) of the current device and returns at once. Tensors are contiguous and of `dtype`: 'float32', 'float16' or
'bfloat16'. Shapes: B batch, S tokens, H heads of size d (32 or 64), C cache capacity, R rows, N width.
RuntimeError: an argument the op cannot implement, with the reason, or the error of the launch.)";

[[noreturn]] void fail(std::string const& op, std::string const& why)
{
    throw std::runtime_error("cannot implement " + op + " because " + why);
}

DataType parseDataType(std::string const& op, std::string const& name)
{
    if (name == "float32")
    {
        return DataType::kFLOAT;
    }
    if (name == "float16")
    {
        return DataType::kHALF;
    }
    if (name == "bfloat16")
    {
        return DataType::kBF16;
    }
    fail(op, "dtype '" + name + "' is none of 'float32', 'float16', 'bfloat16'");
}

Activation parseActivation(std::string const& op, std::string const& name)
{
    if (name == "gelu")
    {
        return Activation::kGELU;
    }
    if (name == "relu")
    {
        return Activation::kRELU;
    }
    fail(op, "activation '" + name + "' is neither 'gelu' nor 'relu'");
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
    cudaError_t (*launcher)(Params const&, cudaStream_t), std::initializer_list<Pointer> pointers, uintptr_t stream)
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
            fail(op, "pointer '" + std::string(pointer.name) + "' is not a multiple of "
                    + std::to_string(pointer.alignment) + " bytes");
        }
    }
    cudaError_t const status = launcher(params, reinterpret_cast<cudaStream_t>(stream));
    if (status != cudaSuccess)
    {
        throw std::runtime_error(op + " failed: " + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) + ")");
    }
}

void const* input(uintptr_t address)
{
    return reinterpret_cast<void const*>(address);
}

void* output(uintptr_t address)
{
    return reinterpret_cast<void*>(address);
}

void bindEncoderAttention(uintptr_t qkv, uintptr_t context, int32_t batch, int32_t sequenceLength, int32_t numHeads,
    int32_t headDim, std::string const& dtype, uintptr_t stream)
{
    std::string const op = "encoder_attention";
    EncoderAttentionParams const params{
        input(qkv), output(context), batch, sequenceLength, numHeads, headDim, parseDataType(op, dtype)};
    enqueue(op, params, canImplementEncoderAttention, encoderAttention, {{"qkv", qkv}, {"context", context}},
        stream);
}

void bindDecoderSelfAttention(uintptr_t qkv, uintptr_t pastKey, uintptr_t pastValue, uintptr_t positionIds,
    uintptr_t context, uintptr_t presentKey, uintptr_t presentValue, int32_t batch, int32_t capacity, int32_t numHeads,
    int32_t headDim, std::string const& dtype, uintptr_t stream)
{
    std::string const op = "decoder_self_attention";
    DecoderSelfAttentionParams const params{input(qkv), input(pastKey), input(pastValue),
        reinterpret_cast<int64_t const*>(positionIds), output(context), output(presentKey), output(presentValue), batch,
        capacity, numHeads, headDim, parseDataType(op, dtype)};
    enqueue(op, params, canImplementDecoderSelfAttention, decoderSelfAttention,
        {{"qkv", qkv}, {"past_key", pastKey}, {"past_value", pastValue},
            {"position_ids", positionIds, sizeof(int64_t)}, {"context", context}, {"present_key", presentKey},
            {"present_value", presentValue}},
        stream);
}

void bindCrossAttention(uintptr_t query, uintptr_t key, uintptr_t value, uintptr_t context, int32_t batch,
    int32_t sequenceLength, int32_t numHeads, int32_t headDim, std::string const& dtype, uintptr_t stream)
{
    std::string const op = "cross_attention";
    CrossAttentionParams const params{input(query), input(key), input(value), output(context), batch, sequenceLength,
        numHeads, headDim, parseDataType(op, dtype)};
    enqueue(op, params, canImplementCrossAttention, crossAttention,
        {{"query", query}, {"key", key}, {"value", value}, {"context", context}}, stream);
}

void bindResidualLayerNorm(uintptr_t x, uintptr_t residual, uintptr_t gamma, uintptr_t beta, uintptr_t normed,
    uintptr_t sum, int64_t rows, int32_t width, float epsilon, std::string const& dtype, uintptr_t stream)
{
    std::string const op = "residual_layernorm";
    ResidualLayerNormParams const params{input(x), input(residual), input(gamma), input(beta), output(normed),
        output(sum), rows, width, epsilon, parseDataType(op, dtype)};
    size_t const size = sizeOf(params.dataType);
    enqueue(op, params, canImplementResidualLayerNorm, residualLayerNorm,
        {{"x", x, size}, {"residual", residual, size}, {"gamma", gamma, size}, {"beta", beta, size},
            {"normed", normed, size}},
        stream);
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

void check(std::string const& op, cudaError_t status)
{
    if (status != cudaSuccess)
    {
        throw std::runtime_error(op + " failed: " + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) + ")");
    }
}

std::string const kGREEDY = "greedy_decode";

GreedyDecoderShape greedyShape(int32_t dModel, int32_t numLayers, int32_t numHeads, int32_t ffnDim, int32_t vocabSize,
    int32_t sequenceLength, std::string const& activation, bool layernormEmbedding, float embedScale,
    std::string const& dtype)
{
    return {dModel, numLayers, numHeads, dModel / std::max(1, numHeads), ffnDim, vocabSize, sequenceLength,
        parseActivation(kGREEDY, activation), layernormEmbedding, embedScale, parseDataType(kGREEDY, dtype)};
}

void requireGreedy(GreedyDecodeParams const& params)
{
    char const* reason = nullptr;
    if (!canImplementGreedyDecode(params, &reason))
    {
        fail(kGREEDY, reason);
    }
}

std::tuple<int32_t, int32_t> bindPlanGreedyDecode(int32_t dModel, int32_t numLayers, int32_t numHeads, int32_t ffnDim,
    int32_t vocabSize, int32_t sequenceLength, std::string const& activation, bool layernormEmbedding, float embedScale,
    std::string const& dtype)
{
    GreedyDecodePlan plan{};
    check(kGREEDY, planGreedyDecode(greedyShape(dModel, numLayers, numHeads, ffnDim, vocabSize, sequenceLength,
                                        activation, layernormEmbedding, embedScale, dtype),
                       plan));
    return {plan.blocks, plan.teamBlocks};
}

std::tuple<size_t, size_t, size_t> bindGreedyDecodeSizes(int32_t dModel, int32_t numLayers, int32_t numHeads,
    int32_t ffnDim, int32_t vocabSize, int32_t sequenceLength, std::string const& activation, bool layernormEmbedding,
    float embedScale, std::string const& dtype, int32_t blocks, int32_t teamBlocks, int32_t batch, int32_t maxSteps)
{
    GreedyDecodeParams params{};
    params.shape = greedyShape(dModel, numLayers, numHeads, ffnDim, vocabSize, sequenceLength, activation,
        layernormEmbedding, embedScale, dtype);
    params.plan = {blocks, teamBlocks};
    params.batch = batch;
    params.maxSteps = maxSteps;
    requireGreedy(params);
    return {greedyDecodeWorkspace(params), greedyLayerBytes(params.shape, params.plan),
        greedyHeadBytes(params.shape, params.plan)};
}

void bindGreedyDecode(int32_t dModel, int32_t numLayers, int32_t numHeads, int32_t ffnDim, int32_t vocabSize,
    int32_t sequenceLength, std::string const& activation, bool layernormEmbedding, float embedScale,
    std::string const& dtype, int32_t blocks, int32_t teamBlocks, int32_t batch, int32_t maxSteps,
    uintptr_t layerWeights, uintptr_t headWeights, uintptr_t norms, uintptr_t embedding, uintptr_t positions,
    std::vector<uintptr_t> const& crossKeys, std::vector<uintptr_t> const& crossValues, int32_t startId, int32_t padId,
    std::vector<int32_t> const& endIds, uintptr_t tokenIds, uintptr_t logProbs, uintptr_t steps, uintptr_t workspace,
    uintptr_t stream)
{
    GreedyDecodeParams params{};
    params.shape = greedyShape(dModel, numLayers, numHeads, ffnDim, vocabSize, sequenceLength, activation,
        layernormEmbedding, embedScale, dtype);
    params.plan = {blocks, teamBlocks};
    params.layerWeights = input(layerWeights);
    params.headWeights = input(headWeights);
    params.norms = input(norms);
    params.embedding = input(embedding);
    params.positions = input(positions);
    params.batch = batch;
    params.maxSteps = maxSteps;
    params.startId = startId;
    params.padId = padId;
    params.numEndIds = static_cast<int32_t>(endIds.size());
    requireGreedy(params);
    std::copy(endIds.begin(), endIds.end(), params.endIds);
    if (crossKeys.size() != static_cast<size_t>(numLayers) || crossValues.size() != crossKeys.size())
    {
        fail(kGREEDY, "there is not one cross-attention key and value a layer");
    }
    for (int32_t layer = 0; layer < numLayers; ++layer)
    {
        params.crossKeys[layer] = input(crossKeys[layer]);
        params.crossValues[layer] = input(crossValues[layer]);
    }
    params.tokenIds = static_cast<int32_t*>(output(tokenIds));
    params.logProbs = static_cast<float*>(output(logProbs));
    params.steps = static_cast<int32_t*>(output(steps));
    params.workspace = output(workspace);
    check(kGREEDY, greedyDecode(params, reinterpret_cast<cudaStream_t>(stream)));
}

} // namespace

PYBIND11_MODULE(trocr_kernels, module)
{
    module.doc() = kMODULE_DOC;

    module.def("encoder_attention", bindEncoderAttention, "qkv"_a, "context"_a, py::kw_only(), "batch"_a,
        "sequence_length"_a, "num_heads"_a, "head_dim"_a, "dtype"_a, "stream"_a = 0,
        "context [B, S, H*d] = softmax(q k^T / sqrt(d)) v of the packed qkv [B, S, 3, H, d].");

    module.def("decoder_self_attention", bindDecoderSelfAttention, "qkv"_a, "past_key"_a, "past_value"_a,
        "position_ids"_a, "context"_a, "present_key"_a, "present_value"_a, py::kw_only(), "batch"_a, "capacity"_a,
        "num_heads"_a, "head_dim"_a, "dtype"_a, "stream"_a = 0,
        "One decoding step: the key and value of qkv [B, 1, 3, H, d] go to row position_ids[b] (int64 [B, 1]) of the cache "
        "[B, H, C, d]; context [B, 1, H*d] attends to rows 0 to position_ids[b]. present_* is past_* (only the new row is "
        "written) or apart from it (the whole cache is copied). A position outside [0, C) writes no row and a zero "
        "context.");

    module.def("cross_attention", bindCrossAttention, "query"_a, "key"_a, "value"_a, "context"_a, py::kw_only(),
        "batch"_a, "sequence_length"_a, "num_heads"_a, "head_dim"_a, "dtype"_a, "stream"_a = 0,
        "context [B, 1, H*d] of one query [B, 1, H*d] a row over key and value [B, H, S, d].");

    module.def("residual_layernorm", bindResidualLayerNorm, "x"_a, "residual"_a, "gamma"_a, "beta"_a, "normed"_a,
        "sum"_a, py::kw_only(), "rows"_a, "width"_a, "epsilon"_a, "dtype"_a, "stream"_a = 0,
        "sum [R, N] = x + residual, rounded to dtype (0 for sum: not wanted); normed [R, N] = LayerNorm(sum) * gamma + "
        "beta.");

    module.def("bias_activation", bindBiasActivation, "x"_a, "bias"_a, "y"_a, py::kw_only(), "rows"_a, "width"_a,
        "activation"_a, "dtype"_a, "stream"_a = 0,
        "y [R, N] = activation(x [R, N] + bias [N]); activation 'gelu' (exact, erf) or 'relu'.");

    module.def("plan_greedy_decode", bindPlanGreedyDecode, py::kw_only(), "d_model"_a, "num_layers"_a, "num_heads"_a,
        "ffn_dim"_a, "vocab_size"_a, "sequence_length"_a, "activation"_a, "layernorm_embedding"_a, "embed_scale"_a,
        "dtype"_a, "(blocks, team_blocks) for the current device; the packed weights follow it.");

    module.def("greedy_decode_sizes", bindGreedyDecodeSizes, py::kw_only(), "d_model"_a, "num_layers"_a, "num_heads"_a,
        "ffn_dim"_a, "vocab_size"_a, "sequence_length"_a, "activation"_a, "layernorm_embedding"_a, "embed_scale"_a,
        "dtype"_a, "blocks"_a, "team_blocks"_a, "batch"_a, "max_steps"_a,
        "Bytes of the workspace, of a block's layer weights and of its head weights.");

    module.def("greedy_decode", bindGreedyDecode, py::kw_only(), "d_model"_a, "num_layers"_a, "num_heads"_a, "ffn_dim"_a,
        "vocab_size"_a, "sequence_length"_a, "activation"_a, "layernorm_embedding"_a, "embed_scale"_a, "dtype"_a,
        "blocks"_a, "team_blocks"_a, "batch"_a, "max_steps"_a, "layer_weights"_a, "head_weights"_a, "norms"_a,
        "embedding"_a, "positions"_a, "cross_keys"_a, "cross_values"_a, "start_id"_a, "pad_id"_a, "end_ids"_a,
        "token_ids"_a, "log_probs"_a, "steps"_a, "workspace"_a, "stream"_a = 0,
        "Greedy search for a whole batch in one launch: token_ids int32 [B, max_steps + 1], log_probs float32 "
        "[B, max_steps], steps int32 [1]. runtime/greedy_weights.py packs the weights and holds the buffers.");
}

} // namespace trocr
