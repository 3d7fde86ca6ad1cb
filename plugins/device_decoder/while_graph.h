#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <utility>
#include <vector>

//! CUDA graphs in which a WHILE node repeats what a step of a search launches.

namespace trocr::decoder
{

//! Captures what `enqueue` launches on `stream` into `graph`.
template <typename Enqueue>
cudaError_t captureInto(cudaGraph_t graph, cudaStream_t stream, Enqueue const& enqueue)
{
    cudaError_t status =
        cudaStreamBeginCaptureToGraph(stream, graph, nullptr, nullptr, 0, cudaStreamCaptureModeThreadLocal);
    if (status != cudaSuccess)
    {
        return status;
    }
    status = enqueue();
    cudaError_t const ended = cudaStreamEndCapture(stream, &graph);
    return status != cudaSuccess ? status : ended;
}

//! Adds a WHILE node that runs after all that is in `graph`; its body is empty so far.
inline cudaError_t addWhile(cudaGraph_t graph, cudaGraphConditionalHandle& conditional, cudaGraph_t& body)
{
    // 1 whenever the graph is launched: the first turn always runs.
    cudaError_t status = cudaGraphConditionalHandleCreate(&conditional, graph, 1, cudaGraphCondAssignDefault);
    size_t count = 0;
    if (status == cudaSuccess)
    {
        status = cudaGraphGetNodes(graph, nullptr, &count);
    }
    std::vector<cudaGraphNode_t> before(count);
    if (status == cudaSuccess)
    {
        status = cudaGraphGetNodes(graph, before.data(), &count);
    }
    if (status != cudaSuccess)
    {
        return status;
    }
    cudaGraphNodeParams params{};
    params.type = cudaGraphNodeTypeConditional;
    params.conditional.handle = conditional;
    params.conditional.type = cudaGraphCondTypeWhile;
    params.conditional.size = 1;
    cudaGraphNode_t node{};
#if CUDART_VERSION >= 13000
    status = cudaGraphAddNode(&node, graph, before.data(), nullptr, count, &params);
#else
    status = cudaGraphAddNode(&node, graph, before.data(), count, &params);
#endif
    if (status == cudaSuccess)
    {
        body = params.conditional.phGraph_out[0];
    }
    return status;
}

//! The graphs of a decoder's requests, one for each that differs in any word of its key; the last few are kept.
class WhileGraphs
{
public:
    WhileGraphs() = default;
    WhileGraphs(WhileGraphs const&) = delete;
    WhileGraphs& operator=(WhileGraphs const&) = delete;

    ~WhileGraphs()
    {
        if (mStream != nullptr)
        {
            cudaStreamDestroy(mStream);
        }
    }

    //! Launches the graph of `key`, which is captured first (about a millisecond) if it is new: what begin(stream)
    //! launches once, then what turn(conditional, stream) launches until that sets the conditional to 0.
    template <typename Begin, typename Turn>
    cudaError_t launch(std::vector<uintptr_t> key, Begin const& begin, Turn const& turn, cudaStream_t stream)
    {
        auto found = mGraphs.find(key);
        if (found == mGraphs.end())
        {
            if (mGraphs.size() >= kMOST)
            {
                mGraphs.clear();
            }
            std::unique_ptr<Graph> graph;
            cudaError_t const status = capture(begin, turn, graph);
            if (status != cudaSuccess)
            {
                return status;
            }
            found = mGraphs.emplace(std::move(key), std::move(graph)).first;
        }
        return cudaGraphLaunch(found->second->executable, stream);
    }

private:
    static constexpr size_t kMOST = 64;

    struct Graph
    {
        cudaGraph_t graph{};
        cudaGraphExec_t executable{};

        ~Graph()
        {
            if (executable != nullptr)
            {
                cudaGraphExecDestroy(executable);
            }
            if (graph != nullptr)
            {
                cudaGraphDestroy(graph);
            }
        }
    };

    template <typename Begin, typename Turn>
    cudaError_t capture(Begin const& begin, Turn const& turn, std::unique_ptr<Graph>& captured)
    {
        auto graph = std::make_unique<Graph>();
        cudaError_t status =
            mStream != nullptr ? cudaSuccess : cudaStreamCreateWithFlags(&mStream, cudaStreamNonBlocking);
        if (status == cudaSuccess)
        {
            status = cudaGraphCreate(&graph->graph, 0);
        }
        if (status == cudaSuccess)
        {
            status = captureInto(graph->graph, mStream, [&]() { return begin(mStream); });
        }
        cudaGraphConditionalHandle conditional{};
        cudaGraph_t body{};
        if (status == cudaSuccess)
        {
            status = addWhile(graph->graph, conditional, body);
        }
        if (status == cudaSuccess)
        {
            status = captureInto(body, mStream, [&]() { return turn(conditional, mStream); });
        }
        if (status == cudaSuccess)
        {
            status = cudaGraphInstantiate(&graph->executable, graph->graph, 0);
        }
        if (status == cudaSuccess)
        {
            captured = std::move(graph);
        }
        return status;
    }

    cudaStream_t mStream{};
    std::map<std::vector<uintptr_t>, std::unique_ptr<Graph>> mGraphs;
};

}  // namespace trocr::decoder
