// The decoders' part of the Python module.

#include "bindings.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "common/launch.h"
#include "device_decoder/kernel.h"

namespace py = pybind11;
using namespace py::literals;

namespace trocr
{

namespace
{

DeviceDecoderConfig parseConfig(py::dict const& config)
{
    std::string const op = "device_decoder";
    auto const integer = [&](char const* name) { return py::cast<int32_t>(config[name]); };
    DeviceDecoderConfig parsed{};
    parsed.dataType = parseDataType(op, py::cast<std::string>(config["dtype"]));
    parsed.layers = integer("num_layers");
    parsed.width = integer("hidden_size");
    parsed.heads = integer("num_heads");
    parsed.ffnWidth = integer("ffn_size");
    parsed.vocabulary = integer("vocab_size");
    parsed.sourceLength = integer("source_length");
    parsed.encoderWidth = config.contains("encoder_size") ? integer("encoder_size") : 0;
    parsed.positions = integer("max_positions");
    parsed.gelu = parseActivation(op, py::cast<std::string>(config["activation"])) == Activation::kGELU;
    parsed.embeddingNorm = integer("embedding_norm") != 0;
    parsed.embedScale = py::cast<float>(config["embed_scale"]);
    parsed.epsilon = py::cast<float>(config["epsilon"]);
    parsed.startId = integer("start_id");
    parsed.padId = integer("pad_id");
    parsed.endIds = config.contains("eos_ids") ? py::cast<std::vector<int32_t>>(config["eos_ids"])
                                               : std::vector<int32_t>{integer("eos_id")};
    return parsed;
}

std::unique_ptr<DeviceDecoder> makeDeviceDecoder(py::dict const& config, py::dict const& weights, int32_t maxSlots,
                                                 int32_t capacity)
{
    std::string const op = "device_decoder";
    DeviceDecoderConfig parsed = parseConfig(config);
    char const* reason = nullptr;
    if (!canDecodeOnDevice(parsed, &reason))
    {
        fail(op, reason);
    }
    bool const statesToo = weights.contains("cross_keys");
    if (!statesToo)
    {
        parsed.encoderWidth = 0;
    }
    else if (!canAttendToStates(parsed, &reason))
    {
        fail(op, "cannot attend to the encoder's states because " + std::string(reason));
    }
    if (maxSlots < 1 || capacity < 1)
    {
        fail(op, "max_slots and capacity must be at least 1");
    }
    auto const pointer = [&](char const* name)
    {
        auto const address = py::cast<uintptr_t>(weights[name]);
        if (address == 0 || address % 16 != 0)
        {
            fail(op, "the weights '" + std::string(name) + "' are null or not a multiple of 16 bytes");
        }
        return input(address);
    };
    auto const make = [&]()
    {
        if (decodesInTeams(parsed))
        {
            TeamWeights const packed{pointer("layers"),         pointer("constants"), pointer("head"),
                                     pointer("embedding_norm"), pointer("embedding"), pointer("position_embedding")};
            return makeTeamDecoder(parsed, packed, maxSlots, capacity);
        }
        auto const forStates = [&](char const* name) { return statesToo ? pointer(name) : nullptr; };
        auto const forWide = [&](char const* name) { return weights.contains(name) ? pointer(name) : nullptr; };
        ChainWeights const packed{pointer("self"),
                                  pointer("cross"),
                                  pointer("feed_forward"),
                                  static_cast<float const*>(pointer("feed_forward_bias")),
                                  forStates("cross_keys"),
                                  forStates("cross_values"),
                                  static_cast<float const*>(forStates("cross_value_bias")),
                                  pointer("head"),
                                  pointer("norms"),
                                  pointer("embedding"),
                                  pointer("position_embedding"),
                                  forWide("wide_layers"),
                                  static_cast<float const*>(forWide("wide_constants"))};
        return makeChainDecoder(parsed, packed, maxSlots, capacity);
    };
    std::unique_ptr<DeviceDecoder> decoder = make();
    if (decoder->status() != cudaSuccess)
    {
        throw std::runtime_error(op + " cannot be made: " + cudaGetErrorString(decoder->status()));
    }
    return decoder;
}

//! What a search of so many lines in so many rows is given; fails where it cannot be.
SearchRequest requestOf(DeviceDecoder const& decoder, int32_t lines, int32_t slots,
                        std::vector<uintptr_t> const& crossKeys, std::vector<uintptr_t> const& crossValues,
                        bool crossIsE4m3, uintptr_t states, uintptr_t tokens, uintptr_t logProbs, uintptr_t lengths,
                        int32_t maxNewTokens, bool stops)
{
    std::string const op = "device_decoder";
    auto const layers = static_cast<size_t>(decoder.config().layers);
    if (maxNewTokens < 1 || maxNewTokens > decoder.capacity() || maxNewTokens > decoder.config().positions)
    {
        fail(op, "max_new_tokens is not in 1 to the capacity and the number of positions");
    }
    if (states == 0 && (crossKeys.size() != layers || crossValues.size() != layers))
    {
        fail(op, "there is not one tensor of cross keys and of cross values a layer");
    }
    if (states != 0 && (!crossKeys.empty() || !crossValues.empty()))
    {
        fail(op, "there are both cross keys and values and the encoder's states");
    }
    if (states != 0 && (decoder.config().encoderWidth == 0 || slots > kMOST_STATE_ROWS))
    {
        fail(op, "the encoder's states want a decoder made with their weights, and slots 1 to " +
                     std::to_string(kMOST_STATE_ROWS));
    }
    if (crossIsE4m3 && (states != 0 || !decoder.takesE4m3(slots)))
    {
        fail(op, "keys and values of e4m3 are for float16, and for searches of so few slots that run as a kernel");
    }
    SearchRequest request{lines,
                          slots,
                          maxNewTokens,
                          stops,
                          {},
                          {},
                          crossIsE4m3,
                          input(states),
                          static_cast<int32_t*>(output(tokens)),
                          static_cast<float*>(output(logProbs)),
                          static_cast<int32_t*>(output(lengths))};
    bool right = areAligned(4, request.tokens, request.logProbs, request.lengths);
    right = right && (states == 0 || areAligned(16, request.states));
    for (size_t layer = 0; layer < crossKeys.size(); ++layer)
    {
        request.crossKeys.push_back(input(crossKeys[layer]));
        request.crossValues.push_back(input(crossValues[layer]));
        right = right && areAligned(16, input(crossKeys[layer]), input(crossValues[layer]));
    }
    if (!right)
    {
        fail(op, "a pointer is null or not aligned");
    }
    return request;
}

void checkSearch(cudaError_t status)
{
    if (status != cudaSuccess)
    {
        throw std::runtime_error(std::string("device_decoder failed: ") + cudaGetErrorString(status) + " (" +
                                 cudaGetErrorName(status) + ")");
    }
}

void runDeviceDecoder(DeviceDecoder& decoder, int32_t lines, int32_t slots, std::vector<uintptr_t> const& crossKeys,
                      std::vector<uintptr_t> const& crossValues, bool crossIsE4m3, uintptr_t states, uintptr_t tokens,
                      uintptr_t logProbs, uintptr_t lengths, int32_t maxNewTokens, bool stops, uintptr_t stream)
{
    if (lines < 1 || slots < 1 || slots > decoder.maxSlots())
    {
        fail("device_decoder", "lines must be at least 1, slots 1 to " + std::to_string(decoder.maxSlots()));
    }
    SearchRequest const request = requestOf(decoder, lines, slots, crossKeys, crossValues, crossIsE4m3, states, tokens,
                                            logProbs, lengths, maxNewTokens, stops);
    checkSearch(decoder.run(request, reinterpret_cast<cudaStream_t>(stream)));
}

void runBeamSearch(DeviceDecoder& decoder, int32_t images, int32_t beams, int32_t noRepeatNgram, bool stopsEarly,
                   bool hopesLong, uintptr_t penalties, std::vector<uintptr_t> const& crossKeys,
                   std::vector<uintptr_t> const& crossValues, uintptr_t states, uintptr_t tokens, uintptr_t logProbs,
                   uintptr_t lengths, int32_t maxNewTokens, bool stops, uintptr_t stream)
{
    std::string const op = "device_decoder";
    char const* reason = nullptr;
    if (!canSearchBeams(decoder.config(), beams, &reason))
    {
        fail(op, "cannot search because " + std::string(reason));
    }
    if (images < 1 || images > decoder.mostRows() / beams)
    {
        fail(op, "images must be 1 to " + std::to_string(decoder.mostRows() / beams) + " with so many beams");
    }
    if (noRepeatNgram < 0 || !areAligned(4, input(penalties)))
    {
        fail(op, "no_repeat_ngram is negative, or penalties are null or not aligned");
    }
    BeamRequest const request{requestOf(decoder, images, images * beams, crossKeys, crossValues, false, states, tokens,
                                        logProbs, lengths, maxNewTokens, stops),
                              beams,
                              noRepeatNgram,
                              stopsEarly,
                              hopesLong,
                              static_cast<float const*>(input(penalties))};
    checkSearch(decoder.search(request, reinterpret_cast<cudaStream_t>(stream)));
}

}  // namespace

void bindDeviceDecoder(py::module_& module)
{
    // Local, because trocr_cpu_kernels (tests/cpu_cuda) has one of its own.
    py::class_<DeviceDecoder> decoder(
        module, "DeviceDecoder", py::module_local(),
        "Search of a whole batch in one launch: config as runtime.decoder_weights.decoder_config makes it, "
        "weights: "
        "addresses of what runtime.device_decoder.pack_blobs makes. Owns its caches: one run at a time.");
    decoder.def(py::init(&makeDeviceDecoder), "config"_a, "weights"_a, py::kw_only(), "max_slots"_a, "capacity"_a)
        .def("run", &runDeviceDecoder, py::kw_only(), "lines"_a, "slots"_a, "cross_keys"_a = std::vector<uintptr_t>{},
             "cross_values"_a = std::vector<uintptr_t>{}, "cross_is_e4m3"_a = false, "states"_a = 0, "tokens"_a,
             "log_probs"_a, "lengths"_a, "max_new_tokens"_a, "stops"_a = true, "stream"_a,
             "Enqueues the search for `lines` lines, `slots` at a time. A layer's cross keys and values: [lines, H, S, "
             "d], of e4m3 if cross_is_e4m3, where takes_e4m3; or the encoder's states [lines, S, E], where the weights "
             "have cross_keys; "
             "tokens int32 [lines, max_new_tokens], padded; log_probs float32 [lines], sums; lengths int32 [lines]. "
             "Unless "
             "it `stops`, every line gets max_new_tokens. With heads of 64, a call with other addresses or sizes than "
             "earlier "
             "ones captures a graph first.");
    decoder
        .def(
            "search_beams", &runBeamSearch, py::kw_only(), "images"_a, "beams"_a, "no_repeat_ngram"_a = 0,
            "stops_early"_a = false, "hopes_long"_a = false, "penalties"_a, "cross_keys"_a = std::vector<uintptr_t>{},
            "cross_values"_a = std::vector<uintptr_t>{}, "states"_a = 0, "tokens"_a, "log_probs"_a, "lengths"_a,
            "max_new_tokens"_a, "stops"_a = true, "stream"_a,
            "Enqueues a beam search of `images` lines with `beams` rows each, most_rows together. penalties float32 [1 "
            "+ max_new_tokens]: a hypothesis of so many tokens is worth its log-probability divided by it. An image "
            "ends with its last complete hypothesis, if it stops_early, else when no running one is better, taken as "
            "if it had all tokens, if one hopes_long. The rest as in run.")
        .def("runs_as_a_kernel", &DeviceDecoder::runsAsAKernel, "slots"_a, "states"_a,
             "Whether `run` may be captured into a CUDA graph.")
        .def("takes_e4m3", &DeviceDecoder::takesE4m3, "slots"_a,
             "Whether `run` takes keys and values of e4m3 in so many slots.")
        .def_property_readonly("most_rows", &DeviceDecoder::mostRows, "Rows of a beam search.");
    module.def(
        "round_to_e4m3",
        [](std::vector<uintptr_t> const& from, std::vector<uintptr_t> const& to, int64_t count, uintptr_t stream)
        {
            std::vector<void const*> sources(from.size());
            std::vector<void*> destinations(to.size());
            std::transform(from.begin(), from.end(), sources.begin(), input);
            std::transform(to.begin(), to.end(), destinations.begin(), output);
            auto const isAligned = [](void const* pointer) { return areAligned(16, pointer); };
            if (!std::all_of(sources.begin(), sources.end(), isAligned) ||
                !std::all_of(destinations.begin(), destinations.end(), isAligned))
            {
                fail("round_to_e4m3", "a pointer is null or not a multiple of 16 bytes");
            }
            checkSearch(roundToE4m3(sources, destinations, count, reinterpret_cast<cudaStream_t>(stream)));
        },
        py::kw_only(), "from_"_a, "to"_a, "count"_a, "stream"_a,
        "Rounds up to 64 tensors of float16, `count` elements each, a multiple of 16, to e4m3; to ±448 what is "
        "beyond.");
    module.def(
        "beam_search_obstacle",
        [](py::dict const& config, int32_t beams) -> py::object
        {
            char const* reason = nullptr;
            bool const served = canSearchBeams(parseConfig(config), beams, &reason);
            return served ? py::object(py::none()) : py::object(py::str(reason));
        },
        "config"_a, "beams"_a, "Why the decoder cannot search with so many beams; None where it can.");
    auto const obstacle =
        [&module](char const* name, bool (*possible)(DeviceDecoderConfig const&, char const**), char const* what)
    {
        module.def(
            name,
            [possible](py::dict const& config) -> py::object
            {
                char const* reason = nullptr;
                bool const served = possible(parseConfig(config), &reason);
                return served ? py::object(py::none()) : py::object(py::str(reason));
            },
            "config"_a, what);
    };
    obstacle("device_decoder_obstacle", canDecodeOnDevice,
             "Why this GPU or these sizes are not served; None where they are.");
    obstacle("device_decoder_states_obstacle", canAttendToStates,
             "Why the decoder cannot attend to the encoder's states themselves; None where it can.");
    module.def(
        "device_decoder_blob_bytes",
        [](py::dict const& config)
        {
            DeviceDecoderConfig const parsed = parseConfig(config);
            py::dict sizes;
            if (decodesInTeams(parsed))
            {
                TeamBytes const bytes = teamBytes();
                sizes["layers"] = bytes.layer;
                sizes["constants"] = bytes.constants;
                sizes["head"] = bytes.head;
            }
            else
            {
                ChainBytes const bytes = chainBytes(parsed);
                sizes["self"] = bytes.self;
                sizes["cross"] = bytes.cross;
                sizes["feed_forward"] = bytes.feedForward;
            }
            return sizes;
        },
        "config"_a, "Bytes of the pieces of packed weights, by name.");
}

}  // namespace trocr
