// Coroutines that stand for a GPU's threads, and the CUDA runtime's functions that the decoders call.

#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>

// Saves the registers that a function must keep on the stack that is left, and goes on on the other.
extern "C" void switchStack(void** left, void* entered);
asm(R"(
.text
.hidden switchStack
.globl switchStack
switchStack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

namespace cpu_cuda
{

Thread* running;
dim3 gridSize;
unsigned slowestWarp = 1;

namespace
{

constexpr size_t kSTACK_BYTES = 64 * 1024;
constexpr int kROUNDS_OF_PACE = 512;   // until other warps are slow
constexpr int kMOST_ROUNDS = 1000000;  // of a launch: a search that waits for what never comes

void* scheduler;  // its stack
std::function<void()> const* kernel;
std::vector<std::function<void()>> copies;
std::vector<std::unique_ptr<char[]>> stacks;
std::vector<uint8_t*> sharedMemories;
uint32_t randomState = 1;
bool failed;  // the launch under way

uint32_t randomNumber()
{
    randomState = randomState * 1664525 + 1013904223;
    return randomState >> 16;
}

void enter()
{
    (*kernel)();
    Block& block = *running->block;
    Cluster& cluster = *block.cluster;
    running->ended = true;
    block.barriers[0].lose(--block.alive);
    cluster.barrier.lose(--cluster.alive);
    yield();
    std::abort();
}

//! A stack from which switchStack goes into `enter`.
void* freshStack(char* bottom)
{
    auto** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(bottom + kSTACK_BYTES) / 16 * 16);
    *--top = nullptr;  // where `enter` would return to
    *--top = reinterpret_cast<void*>(&enter);
    for (int i = 0; i < 6; ++i)
    {
        *--top = nullptr;
    }
    return top;
}

//! Each of the copies under way arrives in a third of the rounds.
void deliverSome(bool all)
{
    for (size_t i = 0; i < copies.size();)
    {
        if (all || randomNumber() % 3 == 0)
        {
            auto const copy = std::move(copies[i]);
            copies[i] = std::move(copies.back());
            copies.pop_back();
            copy();
        }
        else
        {
            ++i;
        }
    }
}

void runTogether(std::vector<Cluster>& clusters, unsigned threads)
{
    std::vector<Thread> all;
    for (Cluster& cluster : clusters)
    {
        cluster.alive = static_cast<int>(cluster.blocks.size() * threads);
        for (Block& block : cluster.blocks)
        {
            block.cluster = &cluster;
            block.alive = static_cast<int>(threads);
            block.warps.resize((threads + kLANES - 1) / kLANES);
            for (unsigned i = 0; i < threads; ++i)
            {
                if (stacks.size() == all.size())
                {
                    stacks.emplace_back(new char[kSTACK_BYTES]);
                }
                all.push_back({freshStack(stacks[all.size()].get()), &block, i, false, nullptr, 0});
            }
        }
    }
    std::vector<unsigned> paces((all.size() + kLANES - 1) / kLANES, 1);
    bool goesOn = true;
    for (int round = 0; goesOn; ++round)
    {
        goesOn = false;
        bool waits = false;
        for (size_t i = 0; i < all.size(); ++i)
        {
            Thread& thread = all[i];
            if (i % kLANES == 0 && slowestWarp > 1)
            {
                unsigned& pace = paces[i / kLANES];
                if (round % kROUNDS_OF_PACE == 0)
                {
                    pace = randomNumber() % 8 == 0 ? 1 + randomNumber() % slowestWarp : 1;
                }
                waits = randomNumber() % pace != 0;
            }
            if (thread.ended || failed)
            {
                continue;
            }
            goesOn = true;
            if (waits)
            {
                continue;
            }
            if (thread.watched != nullptr && *thread.watched == thread.seen)
            {
                continue;
            }
            thread.watched = nullptr;
            running = &thread;
            switchStack(&scheduler, thread.stack);
        }
        deliverSome(false);
        if (round == kMOST_ROUNDS)
        {
            std::fprintf(stderr, "a kernel does not end: %u blocks of %u threads\n", gridSize.x, threads);
            failed = true;
        }
    }
    if (failed)
    {
        copies.clear();
    }
    deliverSome(true);
}

struct Graph
{
    //! A launch, or a WHILE node.
    struct Node
    {
        std::function<void()> kernel;
        std::unique_ptr<Graph> body;
        unsigned* condition;
    };

    std::vector<Node> nodes;
    std::vector<std::unique_ptr<unsigned>> conditions;

    cudaError_t run() const
    {
        for (Node const& node : nodes)
        {
            if (node.kernel)
            {
                node.kernel();
                continue;
            }
            for (*node.condition = 1; *node.condition != 0 && !failed;)
            {
                node.body->run();
            }
        }
        return failed ? cudaErrorLaunchFailure : cudaSuccess;
    }
};

Graph* captured;

Graph& graphOf(void* handle)
{
    return *static_cast<Graph*>(handle);
}

}  // namespace

void yield()
{
    switchStack(&running->stack, scheduler);
}

void waitWhile(uint8_t const& byte, uint8_t value)
{
    if (byte == value)
    {
        running->watched = &byte;
        running->seen = value;
        yield();
    }
}

void fail(char const* why)
{
    std::fprintf(stderr, "thread %u of block (%u, %u): %s\n", running->index, running->block->index.x,
                 running->block->index.y, why);
    failed = true;
    yield();
    std::abort();
}

void later(std::function<void()> work)
{
    copies.push_back(std::move(work));
}

cudaError_t run(dim3 blocks, unsigned threads, unsigned cluster, bool together, std::function<void()> run)
{
    failed = false;
    gridSize = blocks;
    kernel = &run;
    std::vector<Cluster> clusters;
    size_t memories = 0;
    for (unsigned y = 0; y < blocks.y && !failed; ++y)
    {
        for (unsigned x = 0; x < blocks.x && !failed; x += cluster)
        {
            Cluster made{};
            for (unsigned rank = 0; rank < cluster; ++rank)
            {
                if (sharedMemories.size() == memories)
                {
                    sharedMemories.push_back(
                        static_cast<uint8_t*>(std::aligned_alloc(1024, (kSHARED_BYTES + 1023) / 1024 * 1024)));
                }
                uint8_t* const shared = sharedMemories[memories++];
                std::memset(shared, 0xff, kSHARED_BYTES);  // NaN
                Block block{};
                block.index = dim3{x + rank, y, 0};
                block.rank = static_cast<int>(rank);
                block.shared = shared;
                made.blocks.push_back(std::move(block));
            }
            clusters.push_back(std::move(made));
            if (!together)
            {
                runTogether(clusters, threads);
                clusters.clear();
                memories = 0;
            }
        }
    }
    if (together)
    {
        runTogether(clusters, threads);
    }
    return failed ? cudaErrorLaunchFailure : cudaSuccess;
}

cudaError_t launch(cudaLaunchConfig_t const& config, std::function<void()> kernel)
{
    unsigned cluster = 1;
    bool together = false;
    for (unsigned i = 0; i < config.numAttrs; ++i)
    {
        cudaLaunchAttribute const& attribute = config.attrs[i];
        cluster = attribute.id == cudaLaunchAttributeClusterDimension ? attribute.val.clusterDim.x : cluster;
        together = together || (attribute.id == cudaLaunchAttributeCooperative && attribute.val.cooperative != 0);
    }
    if (config.dynamicSmemBytes > kSHARED_BYTES || config.gridDim.x % cluster != 0)
    {
        return cudaErrorInvalidValue;
    }
    auto run = [=, blocks = config.gridDim, threads = config.blockDim.x]()
    { return cpu_cuda::run(blocks, threads, cluster, together, kernel); };
    if (captured == nullptr)
    {
        return run();
    }
    captured->nodes.push_back({std::move(run), nullptr, nullptr});
    return cudaSuccess;
}

}  // namespace cpu_cuda

using cpu_cuda::Graph;
using cpu_cuda::graphOf;

extern "C"
{
    cudaError_t cudaMalloc(void** pointer, size_t bytes)
    {
        size_t const whole = (bytes + 255) / 256 * 256;
        *pointer = std::aligned_alloc(256, whole);
        std::memset(*pointer, 0xff, whole);
        return cudaSuccess;
    }

    cudaError_t cudaFree(void* pointer)
    {
        std::free(pointer);
        return cudaSuccess;
    }

    cudaError_t cudaMemset(void* pointer, int value, size_t bytes)
    {
        std::memset(pointer, value, bytes);
        return cudaSuccess;
    }

    cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t /*stream*/)
    {
        return cudaMemset(pointer, value, bytes);
    }

    cudaError_t cudaGetDevice(int* device)
    {
        *device = 0;
        return cudaSuccess;
    }

    cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int /*device*/)
    {
        std::map<cudaDeviceAttr, int> const values = {{cudaDevAttrComputeCapabilityMajor, 9},
                                                      {cudaDevAttrMultiProcessorCount, cpu_cuda::kMULTIPROCESSORS}};
        auto const found = values.find(attribute);
        *value = found != values.end() ? found->second : 0;
        return found != values.end() ? cudaSuccess : cudaErrorInvalidValue;
    }

    char const* cudaGetErrorString(cudaError_t error)
    {
        return error == cudaSuccess ? "no error" : "an error";
    }

    char const* cudaGetErrorName(cudaError_t error)
    {
        return cudaGetErrorString(error);
    }

    cudaError_t cudaFuncSetAttribute(void const* /*kernel*/, cudaFuncAttribute /*attribute*/, int /*value*/)
    {
        return cudaSuccess;
    }

    cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, void const* /*kernel*/,
                                               cudaLaunchConfig_t const* /*config*/)
    {
        *clusters = cpu_cuda::kCLUSTERS;
        return cudaSuccess;
    }

    cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned /*flags*/)
    {
        *stream = nullptr;
        return cudaSuccess;
    }

    cudaError_t cudaStreamDestroy(cudaStream_t /*stream*/)
    {
        return cudaSuccess;
    }

    cudaError_t cudaGraphCreate(cudaGraph_t* graph, unsigned /*flags*/)
    {
        *graph = reinterpret_cast<cudaGraph_t>(new Graph);
        return cudaSuccess;
    }

    cudaError_t cudaGraphDestroy(cudaGraph_t graph)
    {
        delete &graphOf(graph);
        return cudaSuccess;
    }

    cudaError_t cudaGraphGetNodes(cudaGraph_t /*graph*/, cudaGraphNode_t* /*nodes*/, size_t* count)
    {
        *count = 0;
        return cudaSuccess;
    }

    cudaError_t cudaGraphConditionalHandleCreate(cudaGraphConditionalHandle* handle, cudaGraph_t graph,
                                                 unsigned /*value*/, unsigned /*flags*/)
    {
        auto& conditions = graphOf(graph).conditions;
        conditions.push_back(std::make_unique<unsigned>(1));
        *handle = reinterpret_cast<cudaGraphConditionalHandle>(conditions.back().get());
        return cudaSuccess;
    }

#if CUDART_VERSION >= 13000
    cudaError_t cudaGraphAddNode(cudaGraphNode_t* /*node*/, cudaGraph_t graph, cudaGraphNode_t const* /*before*/,
                                 cudaGraphEdgeData const* /*edges*/, size_t /*count*/, cudaGraphNodeParams* params)
#else
    cudaError_t cudaGraphAddNode(cudaGraphNode_t* /*node*/, cudaGraph_t graph, cudaGraphNode_t const* /*before*/,
                                 size_t /*count*/, cudaGraphNodeParams* params)
#endif
    {
        static cudaGraph_t body;
        auto made = std::make_unique<Graph>();
        body = reinterpret_cast<cudaGraph_t>(made.get());
        params->conditional.phGraph_out = &body;
        graphOf(graph).nodes.push_back(
            {nullptr, std::move(made), reinterpret_cast<unsigned*>(params->conditional.handle)});
        return cudaSuccess;
    }

    cudaError_t cudaStreamBeginCaptureToGraph(cudaStream_t /*stream*/, cudaGraph_t graph,
                                              cudaGraphNode_t const* /*before*/, cudaGraphEdgeData const* /*edges*/,
                                              size_t /*count*/, cudaStreamCaptureMode /*mode*/)
    {
        cpu_cuda::captured = &graphOf(graph);
        return cudaSuccess;
    }

    cudaError_t cudaStreamEndCapture(cudaStream_t /*stream*/, cudaGraph_t* /*graph*/)
    {
        cpu_cuda::captured = nullptr;
        return cudaSuccess;
    }

    cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long /*flags*/)
    {
        *executable = reinterpret_cast<cudaGraphExec_t>(graph);
        return cudaSuccess;
    }

    cudaError_t cudaGraphExecDestroy(cudaGraphExec_t /*executable*/)
    {
        return cudaSuccess;  // the graph's own
    }

    cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t /*stream*/)
    {
        return graphOf(executable).run();
    }
}
