#pragma once

// The links of a decoder step of many rows, 16, 32 or 64 at once. Other than in chain_kernels_sm90.cuh a link is one
// operation, weights are read once for all rows, and cross-attention reads the encoder's states themselves: the weights
// of keys and values are multiplied with the query and the context instead (README.md, "Many rows").

#include "device_decoder/chain_blocks_sm90.cuh"
#include "linear/kernel.h"

namespace trocr::decoder
{

constexpr int kROWS_A_TILE = 16;
constexpr int kTILE_BYTES = 8 * kCHUNK * 2;  //!< of weights: 8 outputs, 32 inputs

//! Which rows have a line, of up to 64.
struct ActiveRows
{
    uint64_t mask;

    __device__ __forceinline__ bool has(int row) const
    {
        return (mask >> row & 1) != 0;
    }
};

//! The lines of rows `lane` and `lane` + 32, on their way from memory: with what else a kernel reads first.
struct RowLines
{
    int low;
    int high;

    __device__ __forceinline__ static RowLines load(RowState const* states, int rows)
    {
        int const lane = threadIdx.x % kWARP_SIZE;
        auto const lineOf = [&](int row) { return row < rows ? __ldcg(&states[row].line) : -1; };
        return {lineOf(lane), lineOf(kWARP_SIZE + lane)};
    }

    __device__ __forceinline__ ActiveRows active() const
    {
        uint64_t const first = __ballot_sync(kFULL_WARP, low >= 0);
        return {first | static_cast<uint64_t>(__ballot_sync(kFULL_WARP, high >= 0)) << kWARP_SIZE};
    }
};

// ---- LayerNorm ----

struct NormalizeParams
{
    SumPair const* sums;     //!< [rows, D / 2]
    SumPair* cleared;        //!< [rows, D / 2]: what the next product adds to
    void const* norm;        //!< T [2, D], gamma and beta; nullptr: rows are only rounded
    void* hidden;            //!< T [rows, D]
    RowState const* states;  //!< [rows]
    int width;
    float epsilon;
};

//! hidden = LayerNorm(sums). A block a row.
template <typename T>
__global__ void __launch_bounds__(kTHREADS) normalize(NormalizeParams p)
{
    constexpr int kPAIRS = kMAX_WIDTH / 2 / kTHREADS;  // of a thread
    __shared__ float2 parts[kWARPS];
    int const row = blockIdx.x;
    int const pairs = p.width / 2;
    sm90::launchDependents();
    float2 gamma[kPAIRS];
    float2 beta[kPAIRS];
#pragma unroll
    for (int i = 0; i < kPAIRS; ++i)
    {
        int const pair = i * kTHREADS + threadIdx.x;
        gamma[i] = beta[i] = {};
        if (p.norm != nullptr && pair < pairs)
        {
            gamma[i] = unpackPair<T>(static_cast<unsigned const*>(p.norm)[pair]);
            beta[i] = unpackPair<T>(static_cast<unsigned const*>(p.norm)[pairs + pair]);
        }
    }
    sm90::waitForPriorGrids();

    size_t const offset = static_cast<size_t>(row) * pairs;
    float2 values[kPAIRS];
    float2 sum{};
#pragma unroll
    for (int i = 0; i < kPAIRS; ++i)
    {
        int const pair = i * kTHREADS + threadIdx.x;
        values[i] = {};
        if (pair < pairs)
        {
            values[i] = fromSum(sm90::loadEarly(reinterpret_cast<int2 const*>(p.sums) + offset + pair));
            p.cleared[offset + pair] = 0;
        }
        sum.x += values[i].x + values[i].y;
        sum.y += values[i].x * values[i].x + values[i].y * values[i].y;
    }
    if (__ldcg(&p.states[row].line) < 0)
    {
        return;
    }
    float scale = 1.0F;
    float shift = 0.0F;
    if (p.norm != nullptr)
    {
        sum = {groupSum(sum.x), groupSum(sum.y)};
        if (threadIdx.x % kWARP_SIZE == 0)
        {
            parts[threadIdx.x / kWARP_SIZE] = sum;
        }
        __syncthreads();
        sum = {};
#pragma unroll
        for (int warp = 0; warp < kWARPS; ++warp)
        {
            sum.x += parts[warp].x;
            sum.y += parts[warp].y;
        }
        float const inverse = 1.0F / static_cast<float>(p.width);
        float const mean = sum.x * inverse;
        scale = rsqrtf(fmaxf(sum.y * inverse - mean * mean, 0.0F) + p.epsilon);
        shift = -mean * scale;
    }
#pragma unroll
    for (int i = 0; i < kPAIRS; ++i)
    {
        int const pair = i * kTHREADS + threadIdx.x;
        if (pair < pairs)
        {
            float2 y = {values[i].x * scale + shift, values[i].y * scale + shift};
            if (p.norm != nullptr)
            {
                y = {y.x * gamma[i].x + beta[i].x, y.y * gamma[i].y + beta[i].y};
            }
            static_cast<unsigned*>(p.hidden)[offset + pair] = packPair<T>(y.x, y.y);
        }
    }
}

// ---- products ----

//! Where a block finds something: blocks of a group have it `stride` bytes apart, groups `groupStride`.
struct BlockMap
{
    uint8_t const* base;
    size_t groupStride;
    int stride;

    __device__ __forceinline__ uint8_t const* of(int block, int group) const
    {
        return base + block / group * groupStride + block % group * static_cast<size_t>(stride);
    }
};

struct ProductParams
{
    int rows;
    RowState const* states;
    void const* input;  //!< T [rows, inputPitch]
    int inputPitch;
    int inputGroup;   //!< blocks that read the same inputs
    int inputStride;  //!< elements from a group's inputs to the next one's
    int chunks;       //!< of all inputs
    int blockChunks;  //!< that a block multiplies: the grid's y splits the inputs
    //! Blocks of a group share a packed piece. Chunk i of a block's tiles lies at i / inner * outerStride + i % inner *
    //! innerStride from its first.
    int group;
    BlockMap weights;
    int inner;
    size_t outerStride;
    int innerStride;
    BlockMap bias;  //!< float32, in the order of the block's outputs
    //! The block's tile i gives columns block * blockColumns + i * tileColumns on.
    int blockColumns;
    int tileColumns;
    int outputPitch;
    void* output;  //!< T [rows, outputPitch]
    LinearActivation activation;
    SumPair* sums;       //!< [rows, outputPitch / 2], instead of `output`; bias and residual are added once
    void const* hidden;  //!< T [rows, outputPitch], the residual
};

//! Floats from one row of a block's partial sums to the next: so that eight rows meet no bank twice.
template <int kTILES>
constexpr int kPARTIAL_PITCH = kTILES % 4 == 0 ? 8 * kTILES + 8 : 8 * kTILES;

constexpr int kADDERS = kWARPS / 2;  //!< partial sums of a block that lie in shared memory

constexpr int kPRODUCT_BIAS = 128;  //!< behind the barrier: float32 [8 kTILES]
constexpr int kPRODUCT_WEIGHTS = 256;

template <int kROW_TILES, int kTILES>
__host__ __device__ constexpr int productBytes(int blockChunks)
{
    return kPRODUCT_WEIGHTS + blockChunks * kTILES * kTILE_BYTES +
           kADDERS * kROW_TILES * kROWS_A_TILE * kPARTIAL_PITCH<kTILES> * 4;
}

//! Rows g and g + 8 of a tile of 16, in global memory, past L1; rows behind the last repeat it.
template <typename T>
__device__ __forceinline__ Activations loadRows(T const* input, int pitch, int rows, int tile, int chunk)
{
    int const lane = threadIdx.x % kWARP_SIZE;
    int const row = tile * kROWS_A_TILE + lane / 4;
    T const* const at = input + chunk * kCHUNK + lane % 4 * 8;
    return {__ldcg(reinterpret_cast<uint4 const*>(at + static_cast<size_t>(min(row, rows - 1)) * pitch)),
            __ldcg(reinterpret_cast<uint4 const*>(at + static_cast<size_t>(min(row + 8, rows - 1)) * pitch))};
}

//! A block's part of a product: 8 kTILES columns of all rows. Its warps deal the inputs.
template <typename T, int kROW_TILES, int kTILES>
struct BlockProduct
{
    //! Chunks of a warp's activations on their way at once.
    static constexpr int kAHEAD = kROW_TILES < 4 ? 4 : 2;
    static constexpr int kPITCH = kPARTIAL_PITCH<kTILES>;

    ProductParams const& p;
    uint8_t* shared;  //!< productBytes
    int firstChunk;
    int chunks;

    __device__ __forceinline__ BlockProduct(ProductParams const& params, uint8_t* memory)
        : p(params),
          shared(memory),
          firstChunk(blockIdx.y * p.blockChunks),
          chunks(min(p.blockChunks, p.chunks - firstChunk))
    {
    }

    __device__ __forceinline__ uint32_t barrier() const
    {
        return sharedAddress(shared);
    }
    __device__ __forceinline__ T* weights() const
    {
        return reinterpret_cast<T*>(shared + kPRODUCT_WEIGHTS);
    }
    __device__ __forceinline__ float* partial() const
    {
        return reinterpret_cast<float*>(shared + kPRODUCT_WEIGHTS + p.blockChunks * kTILES * kTILE_BYTES);
    }

    //! By one warp: its bias, if it adds one, and weights, and then `moreBytes` that the caller copies, on their way.
    __device__ __forceinline__ void fetch(bool addsBias, uint32_t moreBytes = 0) const
    {
        constexpr int kBIAS_BYTES = 8 * kTILES * 4;
        int const lane = threadIdx.x % kWARP_SIZE;
        if (lane == 0)
        {
            sm90::barrierInit(barrier(), 1);
            sm90::barrierInitFence();
            sm90::barrierArriveExpect(barrier(),
                                      (addsBias ? kBIAS_BYTES : 0) + chunks * kTILES * kTILE_BYTES + moreBytes);
            if (addsBias)
            {
                sm90::copyBulk(shared + kPRODUCT_BIAS, p.bias.of(blockIdx.x, p.group), kBIAS_BYTES, barrier());
            }
        }
        __syncwarp();
        uint8_t const* const tiles = p.weights.of(blockIdx.x, p.group);
        for (int i = lane; i < chunks; i += kWARP_SIZE)
        {
            int const chunk = firstChunk + i;
            sm90::copyBulk(
                weights() + i * kTILES * kTILE_BYTES / 2,
                tiles + chunk / p.inner * p.outerStride + chunk % p.inner * static_cast<size_t>(p.innerStride),
                kTILES * kTILE_BYTES, barrier());
        }
    }

    //! All that was fetched is there; for every warp, before the block ends.
    __device__ __forceinline__ void wait() const
    {
        sm90::barrierWait(barrier(), 0);
    }

    //! partial [adder][row][column], kADDERS of them to be added up.
    __device__ __forceinline__ void multiply() const
    {
        int const warp = threadIdx.x / kWARP_SIZE;
        int const lane = threadIdx.x % kWARP_SIZE;
        auto const* const input =
            static_cast<T const*>(p.input) + blockIdx.x / p.inputGroup * p.inputStride + firstChunk * kCHUNK;
        float c[kROW_TILES][kTILES][4] = {};
#pragma unroll 1
        for (int first = warp; first < chunks; first += kWARPS * kAHEAD)
        {
            Activations a[kAHEAD][kROW_TILES];
#pragma unroll
            for (int i = 0; i < kAHEAD; ++i)
            {
                int const chunk = first + i * kWARPS;
#pragma unroll
                for (int m = 0; m < kROW_TILES; ++m)
                {
                    a[i][m] = chunk < chunks ? loadRows(input, p.inputPitch, p.rows, m, chunk) : Activations{};
                }
            }
            wait();
#pragma unroll
            for (int i = 0; i < kAHEAD; ++i)
            {
                int const chunk = first + i * kWARPS;
                if (chunk < chunks)
                {
#pragma unroll
                    for (int tile = 0; tile < kTILES; ++tile)
                    {
                        uint4 const w = weightsOf(weights() + (chunk * kTILES + tile) * 8 * kCHUNK);
#pragma unroll
                        for (int m = 0; m < kROW_TILES; ++m)
                        {
                            multiplyChunk<T>(c[m][tile], a[i][m], w);
                        }
                    }
                }
            }
        }

        // Sums over the warps, in a fixed order: the upper half's are stored, the lower half's added, the rest by
        // columns.
        float* const mine = partial() + (warp % kADDERS * kROW_TILES * kROWS_A_TILE + lane / 4) * kPITCH + lane % 4 * 2;
#pragma unroll
        for (int turn = 0; turn < 2; ++turn)
        {
            if (warp / kADDERS != turn)
            {
#pragma unroll
                for (int m = 0; m < kROW_TILES; ++m)
                {
#pragma unroll
                    for (int tile = 0; tile < kTILES; ++tile)
                    {
#pragma unroll
                        for (int half = 0; half < 2; ++half)
                        {
                            auto* const at =
                                reinterpret_cast<float2*>(mine + (m * kROWS_A_TILE + half * 8) * kPITCH + tile * 8);
                            float2 sum = {c[m][tile][2 * half], c[m][tile][2 * half + 1]};
                            if (turn == 1)
                            {
                                float2 const other = *at;
                                sum = {sum.x + other.x, sum.y + other.y};
                            }
                            *at = sum;
                        }
                    }
                }
            }
            __syncthreads();
        }
    }

    //! Columns 2 pair and 2 pair + 1 of a row.
    __device__ __forceinline__ float2 collect(int row, int pair, bool addsBias) const
    {
        float2 sum{};
#pragma unroll
        for (int adder = 0; adder < kADDERS; ++adder)
        {
            float2 const part = *reinterpret_cast<float2 const*>(
                partial() + (adder * kROW_TILES * kROWS_A_TILE + row) * kPITCH + pair * 2);
            sum = {sum.x + part.x, sum.y + part.y};
        }
        if (addsBias)
        {
            float2 const bias = reinterpret_cast<float2 const*>(shared + kPRODUCT_BIAS)[pair];
            sum = {sum.x + bias.x, sum.y + bias.y};
        }
        return sum;
    }
};

//! input weights^T of all rows for 8 kTILES columns a block: activated and written, or added to sums.
template <typename T, int kROW_TILES, int kTILES, bool kTO_SUMS>
__global__ void __launch_bounds__(kTHREADS, kROW_TILES < 4 ? 2 : 1) product(ProductParams p)
{
    TROCR_DYNAMIC_SHARED(shared, 128);
    BlockProduct<T, kROW_TILES, kTILES> const mine(p, shared);
    constexpr int kPAIRS = 4 * kTILES;                                                     // of a row
    constexpr int kMINE = (kROW_TILES * kROWS_A_TILE * kPAIRS + kTHREADS - 1) / kTHREADS;  // of a thread
    bool const isFirst = !kTO_SUMS || blockIdx.y == 0;                                     // adds bias and residual
    sm90::launchDependents();
    if (threadIdx.x < kWARP_SIZE)
    {
        mine.fetch(isFirst);
    }
    __syncthreads();
    sm90::waitForPriorGrids();

    auto const lines = RowLines::load(p.states, p.rows);
    auto const rowOf = [](int i) { return static_cast<int>(i * kTHREADS + threadIdx.x) / kPAIRS; };
    auto const pairOf = [](int i) { return static_cast<int>(i * kTHREADS + threadIdx.x) % kPAIRS; };
    auto const indexOf = [&](int i)
    {
        int const column = blockIdx.x * p.blockColumns + pairOf(i) / 4 * p.tileColumns + pairOf(i) % 4 * 2;
        return (static_cast<size_t>(rowOf(i)) * p.outputPitch + column) / 2;
    };
    unsigned residual[kMINE] = {};
    if (kTO_SUMS && isFirst)
    {
#pragma unroll
        for (int i = 0; i < kMINE; ++i)
        {
            residual[i] = rowOf(i) < p.rows ? __ldcg(static_cast<unsigned const*>(p.hidden) + indexOf(i)) : 0;
        }
    }
    mine.multiply();
    mine.wait();  // of a warp without inputs: for the bias; and no copy may be under way when the block ends
    auto const active = lines.active();
#pragma unroll(kTO_SUMS ? kMINE : 1)
    for (int i = 0; i < kMINE; ++i)
    {
        if (rowOf(i) >= p.rows || !active.has(rowOf(i)))
        {
            continue;
        }
        float2 sum = mine.collect(rowOf(i), pairOf(i), isFirst);
        if constexpr (kTO_SUMS)
        {
            float2 const h = unpackPair<T>(residual[i]);
            atomicAdd(p.sums + indexOf(i), toSum(sum.x + h.x, sum.y + h.y));
        }
        else
        {
            if (p.activation != LinearActivation::kNONE)
            {
                bool const isGelu = p.activation == LinearActivation::kGELU;
                sum = {isGelu ? gelu(sum.x) : fmaxf(sum.x, 0.0F), isGelu ? gelu(sum.y) : fmaxf(sum.y, 0.0F)};
            }
            static_cast<unsigned*>(p.output)[indexOf(i)] = packPair<T>(sum.x, sum.y);
        }
    }
}

// ---- two products of a head in one kernel ----
//
// A cluster is a head. Its blocks compute eight columns each of the head's first product, write them into all of their
// shared memories, and multiply all of the head's columns with their part of the second product's weights.

//! T [row][kHEAD_DIM], kPITCH elements apart, behind what the first product needs.
template <typename T, int kHEAD_DIM>
struct HeadRows
{
    static constexpr int kBLOCKS = kHEAD_DIM / 8;
    static constexpr int kPITCH = rowPitch<T>(kHEAD_DIM);

    T* rows;

    //! This block's columns of every active row, to all blocks of the cluster.
    template <typename Product>
    __device__ __forceinline__ void exchange(Product const& product, ActiveRows const& active) const
    {
#pragma unroll 1
        for (int i = threadIdx.x; i < product.p.rows * 4; i += kTHREADS)
        {
            int const row = i / 4;
            if (!active.has(row))
            {
                continue;
            }
            float2 const pair = product.collect(row, i % 4, true);
            unsigned const bits = packPair<T>(pair.x, pair.y);
            T* const to = rows + row * kPITCH + blockIdx.x % kBLOCKS * 8 + i % 4 * 2;
#pragma unroll
            for (int other = 0; other < kBLOCKS; ++other)
            {
                *reinterpret_cast<unsigned*>(sm90::atRank(to, other)) = bits;
            }
        }
        sm90::clusterSync();
    }

    __device__ __forceinline__ Activations load(int tile, int count, int chunk) const
    {
        return Activations::load<kROWS_A_TILE>(rows + tile * kROWS_A_TILE * kPITCH, kPITCH, count - tile * kROWS_A_TILE,
                                               chunk);
    }
};

template <int kROW_TILES, int kHEAD_DIM>
__host__ __device__ constexpr int headRowsBytes()
{
    return kROW_TILES * kROWS_A_TILE * rowPitch<__half>(kHEAD_DIM) * 2;
}

struct QueryParams
{
    ProductParams product;  //!< of the queries
    void const* weights;    //!< T [H, 8, d / 32, E / 64, 8, 32]
    void* output;           //!< T [rows, H, E]
    int heads;
    int width;  //!< E
};

//! Queries in terms of the encoder's states: output[row, head] = W_k[head]^T (W_q[head] input[row] + b). The second
//! product's columns are dealt over the cluster, and over the warps of a block.
template <typename T, int kHEAD_DIM, int kROW_TILES>
__global__ void __launch_bounds__(kTHREADS, 2) queryStates(QueryParams p)
{
    constexpr int kCHUNKS = kHEAD_DIM / kCHUNK;
    constexpr int kMOST = kMAX_WIDTH / 64 / kWARPS;  // tiles of a warp
    TROCR_DYNAMIC_SHARED(shared, 128);
    BlockProduct<T, kROW_TILES, 1> const queries(p.product, shared);
    HeadRows<T, kHEAD_DIM> const head{
        reinterpret_cast<T*>(shared + productBytes<kROW_TILES, 1>(p.product.blockChunks))};
    int const warp = threadIdx.x / kWARP_SIZE;
    int const lane = threadIdx.x % kWARP_SIZE;
    int const tiles = p.width / 64;
    int const rows = p.product.rows;
    sm90::launchDependents();
    if (warp == 0)
    {
        queries.fetch(true);
    }
    uint4 w[kMOST][kCHUNKS];
    auto const* const weights =
        static_cast<uint4 const*>(p.weights) + static_cast<size_t>(blockIdx.x) * kCHUNKS * tiles * kWARP_SIZE + lane;
#pragma unroll
    for (int i = 0; i < kMOST; ++i)
    {
#pragma unroll
        for (int chunk = 0; chunk < kCHUNKS; ++chunk)
        {
            w[i][chunk] = __ldg(weights + (chunk * tiles + min(warp + i * kWARPS, tiles - 1)) * kWARP_SIZE);
        }
    }
    sm90::clusterSync();  // every block of the cluster runs: its shared memory may be written
    sm90::waitForPriorGrids();

    auto const lines = RowLines::load(p.product.states, rows);
    queries.multiply();
    queries.wait();
    auto const active = lines.active();
    head.exchange(queries, active);
#pragma unroll
    for (int i = 0; i < kMOST; ++i)
    {
        int const tile = warp + i * kWARPS;
        if (tile >= tiles)
        {
            break;
        }
#pragma unroll
        for (int m = 0; m < kROW_TILES; ++m)
        {
            float c[4] = {};
#pragma unroll
            for (int chunk = 0; chunk < kCHUNKS; ++chunk)
            {
                multiplyChunk<T>(c, head.load(m, rows, chunk), w[i][chunk]);
            }
#pragma unroll
            for (int half = 0; half < 2; ++half)
            {
                int const row = m * kROWS_A_TILE + half * 8 + lane / 4;
                if (row < rows && active.has(row))
                {
                    size_t const column = blockIdx.x * (p.width / 8) + tile * 8 + lane % 4 * 2;
                    size_t const index = (static_cast<size_t>(row) * p.heads * p.width + column) / 2;
                    static_cast<unsigned*>(p.output)[index] = packPair<T>(c[2 * half], c[2 * half + 1]);
                }
            }
        }
    }
}

//! The second product of a head where it adds to s: W_o context + b + hidden, of each head its part, for up to
//! kROWS_A_TILE rows. A block has D / C columns.
struct OutputParams
{
    uint8_t const* weights;  //!< T [H, C] pieces [d / 32, D / C, 32]
    uint8_t const* bias;     //!< float32 [C] pieces [D / C]
    size_t pieceBytes;       //!< from one to the next
    SumPair* sums;           //!< [rows, D / 2]
    void const* hidden;      //!< T [rows, D]
    int width;               //!< D
};

//! Weights, and float32 bias.
template <int kHEAD_DIM>
__host__ __device__ constexpr int headOutputBytes(int width)
{
    return width / (kHEAD_DIM / 8) * (kHEAD_DIM * 2 + 4);
}

template <typename T, int kHEAD_DIM>
struct HeadOutput
{
    static constexpr int kBLOCKS = kHEAD_DIM / 8;
    static constexpr int kCHUNKS = kHEAD_DIM / kCHUNK;
    static constexpr int kMOST = kMAX_WIDTH / kBLOCKS / 8 / kWARPS;  //!< tiles of a warp

    OutputParams const& p;
    T* weights;  //!< in shared memory

    __device__ __forceinline__ int columns() const
    {
        return p.width / kBLOCKS;
    }
    //! Of what fetch() copies.
    __device__ __forceinline__ uint32_t bytes() const
    {
        return headOutputBytes<kHEAD_DIM>(p.width);
    }
    __device__ __forceinline__ float* bias() const
    {
        return reinterpret_cast<float*>(weights + columns() * kHEAD_DIM);
    }

    __device__ __forceinline__ void fetch(uint32_t barrier) const
    {
        sm90::copyBulk(weights, p.weights + blockIdx.x * p.pieceBytes, columns() * kHEAD_DIM * sizeof(T), barrier);
        sm90::copyBulk(bias(), p.bias + blockIdx.x * p.pieceBytes, columns() * sizeof(float), barrier);
    }

    //! Of the sums, in pairs of columns: those of lane (g, t) for tile i of its warp, and row g + 8 half.
    __device__ __forceinline__ size_t indexOf(int i, int half) const
    {
        int const lane = threadIdx.x % kWARP_SIZE;
        int const column = (threadIdx.x / kWARP_SIZE + i * kWARPS) * 8 + lane % 4 * 2;
        return (static_cast<size_t>(half * 8 + lane / 4) * p.width + blockIdx.x % kBLOCKS * columns() + column) / 2;
    }

    //! The first head's blocks add bias and residual.
    __device__ __forceinline__ bool isFirst() const
    {
        return blockIdx.x < kBLOCKS;
    }

    __device__ __forceinline__ void loadResidual(unsigned (&residual)[kMOST][2], int rows) const
    {
        int const warp = threadIdx.x / kWARP_SIZE;
        int const lane = threadIdx.x % kWARP_SIZE;
#pragma unroll
        for (int i = 0; i < kMOST; ++i)
        {
#pragma unroll
            for (int half = 0; half < 2; ++half)
            {
                bool const isMine = isFirst() && half * 8 + lane / 4 < rows && (warp + i * kWARPS) * 8 < columns();
                residual[i][half] = isMine ? __ldcg(static_cast<unsigned const*>(p.hidden) + indexOf(i, half)) : 0;
            }
        }
    }

    __device__ __forceinline__ void add(HeadRows<T, kHEAD_DIM> const& contexts, int rows, ActiveRows const& active,
                                        unsigned const (&residual)[kMOST][2]) const
    {
        int const warp = threadIdx.x / kWARP_SIZE;
        int const lane = threadIdx.x % kWARP_SIZE;
#pragma unroll
        for (int i = 0; i < kMOST; ++i)
        {
            int const tile = warp + i * kWARPS;
            if (tile >= columns() / 8)
            {
                break;
            }
            uint4 w[kCHUNKS];
#pragma unroll
            for (int chunk = 0; chunk < kCHUNKS; ++chunk)
            {
                w[chunk] = weightsOf(weights + (chunk * columns() + tile * 8) * kCHUNK);
            }
            int const column = tile * 8 + lane % 4 * 2;
            float c[4] = {};
#pragma unroll
            for (int chunk = 0; chunk < kCHUNKS; ++chunk)
            {
                multiplyChunk<T>(c, contexts.load(0, rows, chunk), w[chunk]);
            }
#pragma unroll
            for (int half = 0; half < 2; ++half)
            {
                int const row = half * 8 + lane / 4;
                if (row >= rows || !active.has(row))
                {
                    continue;
                }
                float2 sum = {c[2 * half], c[2 * half + 1]};
                if (isFirst())
                {
                    float2 const h = unpackPair<T>(residual[i][half]);
                    sum = {sum.x + bias()[column] + h.x, sum.y + bias()[column + 1] + h.y};
                }
                atomicAdd(p.sums + indexOf(i, half), toSum(sum.x, sum.y));
            }
        }
    }
};

// ---- self-attention ----

//! Keys and values of a row's head [capacity, kHEAD_DIM], as far as it seems to have them, to L2: the weights of all
//! other layers have passed since they were read. By one lane; the position may be that of the token before.
template <typename T, int kHEAD_DIM>
__device__ __forceinline__ void prefetchCache(T const* keys, T const* values, RowState const& state, int capacity)
{
    uint32_t const bytes = min(__ldcg(&state.position), capacity) * kHEAD_DIM * sizeof(T);
    if (bytes > 0)
    {
        sm90::prefetchBulk(keys, bytes);
        sm90::prefetchBulk(values, bytes);
    }
}

//! A warp attends for a row and head, over its cache and the newest key and value, which go into the cache. Of query,
//! newest key and value, the lane's eight elements; `context` [kHEAD_DIM] and `scale` are the warp's scratch in shared
//! memory. Returns columns 2 lane and 2 lane + 1 of the context.
template <typename T, int kHEAD_DIM, typename Caches>
__device__ __forceinline__ unsigned attendRow(uint4 const* query, uint4 const* newKey, uint4 const* newValue, T* keys,
                                              T* values, int position, Caches const& caches, float* context,
                                              float2* scale)
{
    using HeadKeys = Keys<T, kHEAD_DIM, 1, 8>;
    int const lane = threadIdx.x % kWARP_SIZE;
    Softmax<T, kHEAD_DIM> softmax;
    softmax.begin(*query);
#pragma unroll 1
    for (int key = 0; key <= position; key += HeadKeys::kSPAN)
    {
        HeadKeys held;
        held.load(keys, values, key, position, caches);
        insertNewest(held, key, position, newKey, newValue);
        softmax.add(held, key, position + 1);
    }
    if (lane < HeadKeys::kLANES)
    {
        size_t const at = static_cast<size_t>(position) * kHEAD_DIM + lane * 8;
        *reinterpret_cast<uint4*>(keys + at) = *newKey;
        *reinterpret_cast<uint4*>(values + at) = *newValue;
    }
    softmax.finish(context, scale);
    __syncwarp();
    float const factor = 1.0F / scale->y;
    float2 const pair = reinterpret_cast<float2 const*>(context)[lane];
    return packPair<T>(pair.x * factor, pair.y * factor);
}

struct AttendParams
{
    int rows;
    RowState const* states;
    void const* qkv;  //!< T [rows, 3, H, d]
    void* keys;       //!< T [rows, H, capacity, d]
    void* values;
    void* context;  //!< T [rows, H, d]
    int heads;
    int capacity;
    int const* owners;  //!< [rows, capacity], of a beam search
};

//! A warp a row and head; the newest key and value go into the cache. kBEAMS: rows are running hypotheses.
template <typename T, int kHEAD_DIM, bool kBEAMS>
__global__ void __launch_bounds__(kTHREADS) attendSelf(AttendParams p)
{
    __shared__ float contexts[kWARPS][kHEAD_DIM];
    __shared__ float2 scales[kWARPS];
    int const warp = threadIdx.x / kWARP_SIZE;
    int const lane = threadIdx.x % kWARP_SIZE;
    int const row = blockIdx.x;
    int const head = blockIdx.y * kWARPS + warp;
    size_t const cache = (static_cast<size_t>(row) * p.heads + head) * p.capacity * kHEAD_DIM;
    T* const allKeys = static_cast<T*>(p.keys) + cache;
    T* const allValues = static_cast<T*>(p.values) + cache;
    sm90::launchDependents();
    if (!kBEAMS && lane == 0 && head < p.heads)
    {
        prefetchCache<T, kHEAD_DIM>(allKeys, allValues, p.states[row], p.capacity);
    }
    sm90::waitForPriorGrids();

    int2 const words = sm90::loadEarly(reinterpret_cast<int2 const*>(p.states + row));
    RowState const state{words.x, words.y};
    if (state.line < 0 || head >= p.heads)
    {
        return;
    }
    int const offset = lane % (kHEAD_DIM / 8) * 8;
    auto const* const newest =
        static_cast<T const*>(p.qkv) + (static_cast<size_t>(row) * 3 * p.heads + head) * kHEAD_DIM + offset;
    auto const part = [&](int i)
    { return __ldcg(reinterpret_cast<uint4 const*>(newest + static_cast<size_t>(i) * p.heads * kHEAD_DIM)); };
    uint4 const newKey = part(1);
    uint4 const newValue = part(2);
    uint4 const query = part(0);
    auto const caches =
        cachesOf<kBEAMS>(p.owners, row, p.capacity, static_cast<ptrdiff_t>(p.heads) * p.capacity * kHEAD_DIM);
    static_cast<unsigned*>(p.context)[(static_cast<size_t>(row) * p.heads + head) * kHEAD_DIM / 2 + lane] =
        attendRow<T, kHEAD_DIM>(&query, &newKey, &newValue, allKeys, allValues, state.position, caches, contexts[warp],
                                &scales[warp]);
}

struct SelfRowsParams
{
    ProductParams product;  //!< of queries, keys and values
    OutputParams output;
    void* keys;  //!< T [rows, H, capacity, d]
    void* values;
    int heads;
    int capacity;
    int const* owners;  //!< [rows, capacity], of a beam search
};

//! The products around it as well: sums += W_o attention(W_qkv input + b) + b + hidden. A cluster is a head; its blocks
//! deal the rows that they attend for, a warp a row. For up to kROWS_A_TILE rows: with more, a head's 8 blocks take
//! longer to attend, and each adds all of its columns' sums to those of the other heads, than kernels of their own do.
template <typename T, int kHEAD_DIM, bool kBEAMS>
__global__ void __launch_bounds__(kTHREADS, 2) attendSelfAndAdd(SelfRowsParams p)
{
    constexpr int kBLOCKS = kHEAD_DIM / 8;
    TROCR_DYNAMIC_SHARED(shared, 128);
    BlockProduct<T, 1, 3> const product(p.product, shared);
    int const exchanged = productBytes<1, 3>(p.product.blockChunks);
    HeadRows<T, kHEAD_DIM> const contexts{reinterpret_cast<T*>(shared + exchanged)};
    HeadOutput<T, kHEAD_DIM> const output{p.output,
                                          reinterpret_cast<T*>(shared + exchanged + headRowsBytes<1, kHEAD_DIM>())};
    int const warp = threadIdx.x / kWARP_SIZE;
    int const lane = threadIdx.x % kWARP_SIZE;
    int const rank = blockIdx.x % kBLOCKS;
    int const head = blockIdx.x / kBLOCKS;
    int const rows = p.product.rows;
    sm90::launchDependents();
    if (warp == 0)
    {
        product.fetch(true, output.bytes());
        if (lane == 0)
        {
            output.fetch(product.barrier());
        }
    }
    int const row = warp * kBLOCKS + rank;
    size_t const cache = (static_cast<size_t>(row) * p.heads + head) * p.capacity * kHEAD_DIM;
    T* const allKeys = static_cast<T*>(p.keys) + cache;
    T* const allValues = static_cast<T*>(p.values) + cache;
    if (!kBEAMS && lane == 0 && row < rows)
    {
        prefetchCache<T, kHEAD_DIM>(allKeys, allValues, p.product.states[row], p.capacity);
    }
    sm90::clusterSync();  // every block of the cluster runs
    sm90::waitForPriorGrids();

    auto const lines = RowLines::load(p.product.states, rows);
    product.multiply();
    product.wait();
    auto const active = lines.active();
    // Where the weights were, [row / C][query, key, value][d], of the rows that a block attends for.
    T* const qkv = product.weights();
    sm90::clusterSync();  // all blocks are done with their weights
#pragma unroll 1
    for (int i = threadIdx.x; i < rows * 12; i += kTHREADS)
    {
        int const row = i / 12;
        int const pair = i % 12;
        if (active.has(row))
        {
            float2 const sum = product.collect(row, pair, true);
            T* const to = qkv + (row / kBLOCKS * 3 + pair / 4) * kHEAD_DIM + rank * 8 + pair % 4 * 2;
            *reinterpret_cast<unsigned*>(sm90::atRank(to, row % kBLOCKS)) = packPair<T>(sum.x, sum.y);
        }
    }
    sm90::clusterSync();

    if (row < rows && active.has(row))
    {
        int const position = __ldcg(&p.product.states[row].position);
        auto const newest = [&](int i)
        { return reinterpret_cast<uint4 const*>(qkv + (warp * 3 + i) * kHEAD_DIM + lane % (kHEAD_DIM / 8) * 8); };
        auto const caches =
            cachesOf<kBEAMS>(p.owners, row, p.capacity, static_cast<ptrdiff_t>(p.heads) * p.capacity * kHEAD_DIM);
        // Where the product's partial sums were: the context, then its scale.
        float* const attended = product.partial() + warp * (kHEAD_DIM + 4);
        unsigned const bits =
            attendRow<T, kHEAD_DIM>(newest(0), newest(1), newest(2), allKeys, allValues, position, caches, attended,
                                    reinterpret_cast<float2*>(attended + kHEAD_DIM));
        T* const to = contexts.rows + row * contexts.kPITCH + lane * 2;
#pragma unroll
        for (int other = 0; other < kBLOCKS; ++other)
        {
            *reinterpret_cast<unsigned*>(sm90::atRank(to, other)) = bits;
        }
    }
    unsigned residual[output.kMOST][2];
    output.loadResidual(residual, rows);
    sm90::clusterSync();
    output.add(contexts, rows, active, residual);
}

// ---- cross-attention to the encoder's states ----

struct StatesParams
{
    RowState const* states;  //!< [rows]
    void const* query;       //!< T [rows, H, E]
    void const* encoded;     //!< T [lines, S, E]
    void* context;           //!< T [rows, H, E]
    int heads;               //!< at most kROWS_A_TILE
    int length;              //!< S
    float scale;             //!< log2(e) / sqrt(d)
};

constexpr int kMOST_STATES_BLOCKS = 8;  //!< of a row: as many as every GPU allows a cluster

//! A block's shared memory; E = 128 kSTEPS. As much as leaves room beside it for the blocks of the kernel before,
//! while which the first stages are on their way, and of the kernel behind.
template <int kSTEPS>
struct StatesLayout
{
    static constexpr int kWIDTH = 128 * kSTEPS;
    static constexpr int kKEYS = kSTEPS <= 6 ? 32 : 16;  //!< of a stage
    static constexpr int kPITCH = kWIDTH * 2 + 16;       //!< bytes: eight rows meet no bank twice
    static constexpr int kSCORE_PITCH = kKEYS + 8;       //!< floats, likewise
    static constexpr int kSTAGE = kKEYS * kPITCH;
    static constexpr int kLINE = 120;                                           //!< int, after the barriers
    static constexpr int kSCALES = 128;                                         //!< float2 [16]
    static constexpr int kSCORES = kSCALES + 128;                               //!< float [16, kSCORE_PITCH]
    static constexpr int kPARTIAL = kSCORES + kROWS_A_TILE * kSCORE_PITCH * 4;  //!< float [kWARPS, 16, kSCORE_PITCH]
    static constexpr int kRING = kPARTIAL + kWARPS * kROWS_A_TILE * kSCORE_PITCH * 4;
    static constexpr int kROOM = (180 * 1024 - kRING) / kSTAGE;
    static constexpr int kSTAGES = kROOM < 6 ? kROOM : 6;
    static constexpr int kBYTES = kRING + kSTAGES * kSTAGE;
    static_assert(kSTAGES >= 3 && kSTAGES * kSTAGE >= kROWS_A_TILE * kPITCH);
};

//! context[row] = softmax(scale query[row] states^T) states, all heads of a row at once: they are the 16 rows of the
//! tensor cores' left operand. A cluster a row, whose blocks deal the states. A warp has an eighth of the states'
//! columns: of scores it has a part of the sum, of the context those columns.
template <typename T, int kSTEPS>
__global__ void __launch_bounds__(kTHREADS, kSTEPS <= 6 ? 2 : 1) attendStates(StatesParams p)
{
    using Layout = StatesLayout<kSTEPS>;
    constexpr int kTILES = Layout::kKEYS / 8;  // of scores
    constexpr int kPITCH = Layout::kSCORE_PITCH;
    TROCR_DYNAMIC_SHARED(shared, 128);
    int const warp = threadIdx.x / kWARP_SIZE;
    int const lane = threadIdx.x % kWARP_SIZE;
    int const g = lane / 4;
    int const t = lane % 4;
    int const rank = blockIdx.x;
    int const blocks = gridDim.x;
    int const row = blockIdx.y;
    uint32_t const barriers = sharedAddress(shared);
    uint32_t const ring = sharedAddress(shared + Layout::kRING);
    auto* const scales = reinterpret_cast<float2*>(shared + Layout::kSCALES);
    auto* const scores = reinterpret_cast<float*>(shared + Layout::kSCORES);
    auto* const partial = reinterpret_cast<float*>(shared + Layout::kPARTIAL);

    int const first = p.length * rank / blocks;
    int const count = p.length * (rank + 1) / blocks - first;
    int const stages = (count + Layout::kKEYS - 1) / Layout::kKEYS;
    int const stagesAtFirst = min(stages, Layout::kSTAGES);
    // By one warp, a state a lane.
    auto const fetch = [&](int line, int stage)
    {
        int const keys = min(Layout::kKEYS, count - stage * Layout::kKEYS);
        int const slot = stage % Layout::kSTAGES;
        if (lane == 0)
        {
            sm90::barrierArriveExpect(barriers + slot * 8, keys * Layout::kWIDTH * 2);
        }
        __syncwarp();
        if (lane < keys)
        {
            size_t const state = static_cast<size_t>(line) * p.length + first + stage * Layout::kKEYS + lane;
            sm90::copyBulk(shared + Layout::kRING + slot * Layout::kSTAGE + lane * Layout::kPITCH,
                           static_cast<uint8_t const*>(p.encoded) + state * Layout::kWIDTH * 2, Layout::kWIDTH * 2,
                           barriers + slot * 8);
        }
    };
    auto const fetchFirst = [&](int line)
    {
#pragma unroll 1
        for (int stage = 0; stage < stagesAtFirst; ++stage)
        {
            fetch(line, stage);
        }
    };

    sm90::launchDependents();
    // States are constants, and a row seldom has another line than at the token before: the first stages of the one
    // that it seems to have are asked for before the kernels before have ended. `next` may be among those.
    auto& hoped = *reinterpret_cast<int*>(shared + Layout::kLINE);
    if (warp == 0)
    {
        if (lane == 0)
        {
            for (int stage = 0; stage < Layout::kSTAGES; ++stage)
            {
                sm90::barrierInit(barriers + stage * 8, 1);
            }
            sm90::barrierInitFence();
            hoped = __ldcg(&p.states[row].line);
        }
        __syncwarp();
        if (hoped >= 0)
        {
            fetchFirst(hoped);
        }
    }
    __syncthreads();
    sm90::waitForPriorGrids();

    int const line = __ldcg(&p.states[row].line);
    int turns = 0;  // that the barriers of the first stages have behind them
    if (line != hoped)
    {
        turns = hoped >= 0 ? 1 : 0;
        // No slot is asked for again, and no block ends, while a copy is under way.
        for (int stage = 0; stage < turns * stagesAtFirst; ++stage)
        {
            sm90::barrierWait(barriers + stage * 8, 0);
        }
        __syncthreads();
        if (warp == 0 && line >= 0)
        {
            fetchFirst(line);
        }
    }
    if (line < 0)
    {
        return;  // with all of its cluster
    }
    // The warp's columns of the query, as the left operand.
    uint32_t q[kSTEPS][4];
    auto const* const query = static_cast<unsigned const*>(p.query) +
                              (static_cast<size_t>(row) * p.heads * Layout::kWIDTH + warp * 16 * kSTEPS) / 2;
#pragma unroll
    for (int step = 0; step < kSTEPS; ++step)
    {
#pragma unroll
        for (int i = 0; i < 4; ++i)
        {
            int const head = g + i % 2 * 8;
            q[step][i] = head < p.heads ? __ldcg(query + head * Layout::kWIDTH / 2 + step * 8 + i / 2 * 4 + t) : 0;
        }
    }

    float context[2 * kSTEPS][4] = {};
    float maximum[2] = {kNO_SCORE, kNO_SCORE};
    float total[2] = {};
#pragma unroll 1
    for (int stage = 0; stage < stages; ++stage)
    {
        int const slot = stage % Layout::kSTAGES;
        int const keys = min(Layout::kKEYS, count - stage * Layout::kKEYS);
        uint32_t const columns = ring + slot * Layout::kSTAGE + warp * 32 * kSTEPS;  // the warp's, of key 0
        sm90::barrierWait(barriers + slot * 8, (stage / Layout::kSTAGES + turns) & 1);
        if (keys < Layout::kKEYS)
        {
            // What lies there may be no number, and 0 times that none either.
#pragma unroll 1
            for (int i = lane; i < (Layout::kKEYS - keys) * 2 * kSTEPS; i += kWARP_SIZE)
            {
                int const key = keys + i / (2 * kSTEPS);
                *reinterpret_cast<uint4*>(shared + Layout::kRING + slot * Layout::kSTAGE + key * Layout::kPITCH +
                                          warp * 32 * kSTEPS + i % (2 * kSTEPS) * 16) = uint4{};
            }
            __syncwarp();
        }
        float c[kTILES][4] = {};
#pragma unroll
        for (int step = 0; step < kSTEPS; ++step)
        {
#pragma unroll
            for (int two = 0; two < kTILES / 2; ++two)
            {
                uint32_t k[4];
                int const key = two * 16 + lane / 16 * 8 + lane % 8;
                loadMatrices(k, columns + key * Layout::kPITCH + step * 32 + lane / 8 % 2 * 16);
                multiplyAdd<T>(c[2 * two], q[step], k[0], k[1]);
                multiplyAdd<T>(c[2 * two + 1], q[step], k[2], k[3]);
            }
        }
#pragma unroll
        for (int tile = 0; tile < kTILES; ++tile)
        {
            float* const at = partial + (warp * kROWS_A_TILE + g) * kPITCH + tile * 8 + 2 * t;
            *reinterpret_cast<float2*>(at) = {c[tile][0], c[tile][1]};
            *reinterpret_cast<float2*>(at + 8 * kPITCH) = {c[tile][2], c[tile][3]};
        }
        __syncthreads();
        // All warps are done with the stage before: its slot is free.
        if (warp == 0 && stage >= 1 && stage - 1 + Layout::kSTAGES < stages)
        {
            fetch(line, stage - 1 + Layout::kSTAGES);
        }
        static_assert(kTHREADS >= kROWS_A_TILE * Layout::kKEYS / 2);
        if (threadIdx.x < kROWS_A_TILE * Layout::kKEYS / 2)
        {
            int const at = threadIdx.x / (Layout::kKEYS / 2) * kPITCH + threadIdx.x % (Layout::kKEYS / 2) * 2;
            int const key = threadIdx.x % (Layout::kKEYS / 2) * 2;
            float2 sum{};
#pragma unroll
            for (int other = 0; other < kWARPS; ++other)
            {
                float2 const part = *reinterpret_cast<float2 const*>(partial + other * kROWS_A_TILE * kPITCH + at);
                sum = {sum.x + part.x, sum.y + part.y};
            }
            *reinterpret_cast<float2*>(scores + at) = {key < keys ? sum.x * p.scale : kNO_SCORE,
                                                       key + 1 < keys ? sum.y * p.scale : kNO_SCORE};
        }
        __syncthreads();
        // Every warp weighs all keys for itself.
        float most[2] = {maximum[0], maximum[1]};
#pragma unroll
        for (int tile = 0; tile < kTILES; ++tile)
        {
#pragma unroll
            for (int half = 0; half < 2; ++half)
            {
                float2 const pair =
                    *reinterpret_cast<float2 const*>(scores + (g + half * 8) * kPITCH + tile * 8 + 2 * t);
                c[tile][2 * half] = pair.x;
                c[tile][2 * half + 1] = pair.y;
                most[half] = fmaxf(most[half], fmaxf(pair.x, pair.y));
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half)
        {
            most[half] = fmaxf(most[half], __shfl_xor_sync(kFULL_WARP, most[half], 1));
            most[half] = fmaxf(most[half], __shfl_xor_sync(kFULL_WARP, most[half], 2));
            float const scale = exp2Approx(maximum[half] - most[half]);
            maximum[half] = most[half];
            total[half] *= scale;
#pragma unroll
            for (int tile = 0; tile < 2 * kSTEPS; ++tile)
            {
                context[tile][2 * half] *= scale;
                context[tile][2 * half + 1] *= scale;
            }
        }
        uint32_t weights[kTILES / 2][4];
#pragma unroll
        for (int tile = 0; tile < kTILES; ++tile)
        {
#pragma unroll
            for (int half = 0; half < 2; ++half)
            {
                float const low = exp2Approx(c[tile][2 * half] - maximum[half]);
                float const high = exp2Approx(c[tile][2 * half + 1] - maximum[half]);
                total[half] += low + high;
                weights[tile / 2][tile % 2 * 2 + half] = packPair<T>(low, high);
            }
        }
#pragma unroll
        for (int tile = 0; tile < kSTEPS; ++tile)  // of 16 columns
        {
#pragma unroll
            for (int step = 0; step < kTILES / 2; ++step)  // of 16 keys
            {
                uint32_t v[4];
                int const key = step * 16 + lane / 8 % 2 * 8 + lane % 8;
                loadMatricesTransposed(v, columns + key * Layout::kPITCH + tile * 32 + lane / 16 * 16);
                multiplyAdd<T>(context[2 * tile], weights[step], v[0], v[1]);
                multiplyAdd<T>(context[2 * tile + 1], weights[step], v[2], v[3]);
            }
        }
    }
    // A context of the block's own softmax, in T: straight to its place, or where the cluster's blocks find it.
    constexpr int kPIECES = Layout::kWIDTH / 8;  // of 16 bytes, of a head
    auto* const output = static_cast<uint8_t*>(p.context) + static_cast<size_t>(row) * p.heads * Layout::kWIDTH * 2;
    uint8_t* const parts = shared + Layout::kRING;  // T [16], Layout::kPITCH apart
    __syncthreads();                                // all warps are done with the ring
#pragma unroll
    for (int half = 0; half < 2; ++half)
    {
        int const head = g + half * 8;
        total[half] += __shfl_xor_sync(kFULL_WARP, total[half], 1);
        total[half] += __shfl_xor_sync(kFULL_WARP, total[half], 2);
        float const factor = 1.0F / total[half];
        uint8_t* const to =
            (blocks == 1 ? output + head * Layout::kWIDTH * 2 : parts + head * Layout::kPITCH) + warp * 32 * kSTEPS;
        if (head < p.heads)
        {
#pragma unroll
            for (int tile = 0; tile < 2 * kSTEPS; ++tile)
            {
                reinterpret_cast<unsigned*>(to)[tile * 4 + t] =
                    packPair<T>(context[tile][2 * half] * factor, context[tile][2 * half + 1] * factor);
            }
        }
        if (warp == 0 && t == 0)
        {
            scales[head] = {maximum[half], total[half]};
        }
    }
    if (blocks == 1)
    {
        return;
    }

    // Each block adds up a share of the row, a piece a thread.
    sm90::clusterSync();
    int const end = p.heads * kPIECES * (rank + 1) / blocks;
#pragma unroll 1
    for (int piece = p.heads * kPIECES * rank / blocks + threadIdx.x; piece < end; piece += kTHREADS)
    {
        int const head = piece / kPIECES;
        uint8_t* const mine = parts + head * Layout::kPITCH + piece % kPIECES * 16;
        float2 scale[kMOST_STATES_BLOCKS];
        uint4 part[kMOST_STATES_BLOCKS];
#pragma unroll
        for (int other = 0; other < kMOST_STATES_BLOCKS; ++other)
        {
            scale[other] = {kNO_SCORE, 0.0F};
            part[other] = {};
            if (other < blocks)
            {
                scale[other] = *sm90::atRank(scales + head, other);
                part[other] = *reinterpret_cast<uint4 const*>(sm90::atRank(mine, other));
            }
        }
        float most = scale[0].x;
#pragma unroll
        for (int other = 1; other < kMOST_STATES_BLOCKS; ++other)
        {
            most = fmaxf(most, scale[other].x);
        }
        float all = 0.0F;
        float sum[8] = {};
#pragma unroll
        for (int other = 0; other < kMOST_STATES_BLOCKS; ++other)
        {
            float const weight = scale[other].y * exp2Approx(scale[other].x - most);
            Pack<T> const values = Pack<T>::fromBits(part[other]);
            all += weight;
#pragma unroll
            for (int i = 0; i < 8; ++i)
            {
                sum[i] += weight * values.values[i];
            }
        }
        float const factor = 1.0F / all;
        reinterpret_cast<uint4*>(output)[piece] = {
            packPair<T>(sum[0] * factor, sum[1] * factor), packPair<T>(sum[2] * factor, sum[3] * factor),
            packPair<T>(sum[4] * factor, sum[5] * factor), packPair<T>(sum[6] * factor, sum[7] * factor)};
    }
    sm90::clusterSync();  // no block ends while another reads its memory
}

}  // namespace trocr::decoder
