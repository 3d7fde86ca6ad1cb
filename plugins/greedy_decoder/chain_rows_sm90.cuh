#pragma once

// The links of a decoder step of many rows, 16, 32 or 64 at once. Other than in chain_kernels_sm90.cuh a link is one
// operation, weights are read once for all rows, and cross-attention reads the encoder's states themselves: the weights
// of keys and values are multiplied with the query and the context instead (README.md, "Many rows").

#include <type_traits>

#include "greedy_decoder/chain_blocks_sm90.cuh"
#include "linear/kernel.h"

namespace trocr::greedy
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

// ---- LayerNorm in front of a product, of up to kROWS_A_TILE rows ----

struct RowsNormParams
{
    SumPair const* sums;  //!< [rows, D / 2]
    SumPair* added;       //!< [rows, D / 2]: the normalised rows and `bias` are added
    SumPair* cleared;     //!< [rows, D / 2]: for the LayerNorm behind
    void const* norm;     //!< T [2, D], gamma and beta; nullptr: rows are only rounded
    uint8_t const* bias;  //!< float32, biasColumns a piece
    size_t biasPiece;     //!< bytes from one to the next
    int biasColumns;
    int width;
    float epsilon;
};

//! Every block normalises all rows, in the registers of the warps that multiply with them; each is the one that adds
//! its chunk of them, the residual, to the sums.
template <typename T>
struct RowsNorm
{
    static constexpr int kCHUNKS = kMAX_WIDTH / kCHUNK / kWARPS;  //!< of a warp
    static constexpr int kPARTS = kWARPS * kROWS_A_TILE * 8;      //!< bytes: float2 [kWARPS, 16], sums and squares

    RowsNormParams const& p;
    uint8_t* shared;  //!< bytes(): parts; T [2, D], gamma and beta
    float4 bias[2];   //!< of the lane's columns

    __device__ __forceinline__ RowsNorm(RowsNormParams const& params, uint8_t* memory) : p(params), shared(memory) {}

    __host__ __device__ static constexpr int bytes(int width)
    {
        return kPARTS + 2 * width * static_cast<int>(sizeof(T));
    }

    //! Of what fetch() copies.
    __device__ __forceinline__ uint32_t fetchedBytes() const
    {
        return p.norm != nullptr ? 2 * p.width * sizeof(T) : 0;
    }
    __device__ __forceinline__ void fetch(uint32_t barrier) const
    {
        if (p.norm != nullptr)
        {
            sm90::copyBulk(shared + kPARTS, p.norm, fetchedBytes(), barrier);
        }
    }

    //! The bias of the block's chunk, on its way.
    __device__ __forceinline__ void prepare()
    {
        loadBias(blockIdx.x);
    }

    //! The warp's chunks, warp + i kWARPS; for all warps of the block, when what was fetched is there.
    __device__ __forceinline__ void run(Activations (&a)[kCHUNKS][1], int rows, RowLines const& lines)
    {
        int const warp = threadIdx.x / kWARP_SIZE;
        int const lane = threadIdx.x % kWARP_SIZE;
        int const t = lane % 4;
        int const chunks = p.width / kCHUNK;
        float values[kCHUNKS][2][8];
        load(values, rows);
        for (int i = blockIdx.x * kTHREADS + threadIdx.x; i < rows * p.width / 2; i += gridDim.x * kTHREADS)
        {
            p.cleared[i] = 0;
        }
        float scale[2] = {1.0F, 1.0F};
        float shift[2] = {};
        if (p.norm != nullptr)
        {
            statistics(values, scale, shift);
        }
        auto const* const norm = reinterpret_cast<uint4 const*>(shared + kPARTS);
#pragma unroll
        for (int i = 0; i < kCHUNKS; ++i)
        {
            int const chunk = warp + i * kWARPS;
            if (chunk >= chunks)
            {
                break;
            }
            uint4 bits[2];
            Pack<T> gamma{};
            Pack<T> beta{};
            if (p.norm != nullptr)
            {
                gamma = Pack<T>::fromBits(norm[chunk * 4 + t]);
                beta = Pack<T>::fromBits(norm[(chunks + chunk) * 4 + t]);
            }
#pragma unroll
            for (int half = 0; half < 2; ++half)
            {
                Pack<T> y;
#pragma unroll
                for (int e = 0; e < 8; ++e)
                {
                    y.values[e] = values[i][half][e] * scale[half] + shift[half];
                    if (p.norm != nullptr)
                    {
                        y.values[e] = y.values[e] * gamma.values[e] + beta.values[e];
                    }
                }
                bits[half] = y.toBits();
            }
            a[i][0] = {bits[0], bits[1]};
        }
        addResidual(a, rows, lines);
    }

private:
    //! Eight columns of rows g and g + 8 a chunk. Two lanes read the 64 bytes that both need, whole sectors at a time,
    //! and change.
    __device__ __forceinline__ void load(float (&values)[kCHUNKS][2][8], int rows) const
    {
        int const warp = threadIdx.x / kWARP_SIZE;
        int const lane = threadIdx.x % kWARP_SIZE;
        int const chunks = p.width / kCHUNK;
        bool const odd = lane % 2 != 0;
        int4 first[kCHUNKS][2];
        int4 second[kCHUNKS][2];
#pragma unroll
        for (int i = 0; i < kCHUNKS; ++i)
        {
            int const chunk = warp + i * kWARPS;
#pragma unroll
            for (int half = 0; half < 2; ++half)
            {
                first[i][half] = second[i][half] = {};
                if (chunk < chunks)
                {
                    int const row = min(half * 8 + lane / 4, rows - 1);
                    auto const* const at =
                        reinterpret_cast<int4 const*>(p.sums + static_cast<size_t>(row) * p.width / 2) + chunk * 8 +
                        lane % 4 / 2 * 4 + lane % 2;
                    first[i][half] = __ldcg(at);
                    second[i][half] = __ldcg(at + 2);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < kCHUNKS; ++i)
        {
#pragma unroll
            for (int half = 0; half < 2; ++half)
            {
                int4 const& one = first[i][half];
                int4 const& two = second[i][half];
                auto const change = [&](int mine, int others)
                { return __shfl_xor_sync(kFULL_WARP, odd ? mine : others, 1); };
                int4 const got = {change(one.x, two.x), change(one.y, two.y), change(one.z, two.z),
                                  change(one.w, two.w)};
                int4 const low = odd ? got : one;
                int4 const high = odd ? two : got;
                int2 const pairs[4] = {{low.x, low.y}, {low.z, low.w}, {high.x, high.y}, {high.z, high.w}};
#pragma unroll
                for (int pair = 0; pair < 4; ++pair)
                {
                    float2 const value = fromSum(pairs[pair]);
                    values[i][half][2 * pair] = value.x;
                    values[i][half][2 * pair + 1] = value.y;
                }
            }
        }
    }

    //! What normalises rows g and g + 8: x scale + shift.
    __device__ __forceinline__ void statistics(float const (&values)[kCHUNKS][2][8], float (&scale)[2],
                                               float (&shift)[2]) const
    {
        int const warp = threadIdx.x / kWARP_SIZE;
        int const lane = threadIdx.x % kWARP_SIZE;
        auto* const parts = reinterpret_cast<float2*>(shared);
#pragma unroll
        for (int half = 0; half < 2; ++half)
        {
            float2 sum{};
#pragma unroll
            for (int i = 0; i < kCHUNKS; ++i)
            {
#pragma unroll
                for (int e = 0; e < 8; ++e)
                {
                    sum.x += values[i][half][e];
                    sum.y += values[i][half][e] * values[i][half][e];
                }
            }
#pragma unroll
            for (int offset = 1; offset < 4; offset *= 2)
            {
                sum.x += __shfl_xor_sync(kFULL_WARP, sum.x, offset);
                sum.y += __shfl_xor_sync(kFULL_WARP, sum.y, offset);
            }
            if (lane % 4 == 0)
            {
                parts[warp * kROWS_A_TILE + half * 8 + lane / 4] = sum;
            }
        }
        __syncthreads();
#pragma unroll
        for (int half = 0; half < 2; ++half)
        {
            float2 sum{};
#pragma unroll
            for (int other = 0; other < kWARPS; ++other)
            {
                float2 const part = parts[other * kROWS_A_TILE + half * 8 + lane / 4];
                sum = {sum.x + part.x, sum.y + part.y};
            }
            float const inverse = 1.0F / static_cast<float>(p.width);
            float const mean = sum.x * inverse;
            scale[half] = rsqrtf(fmaxf(sum.y * inverse - mean * mean, 0.0F) + p.epsilon);
            shift[half] = -mean * scale[half];
        }
    }

    //! By their words: the compiler would choose between addresses, and put both into memory.
    static __device__ __forceinline__ uint4 chosen(bool first, uint4 a, uint4 b)
    {
        auto const word = [=](unsigned one, unsigned other) { return first ? one : other; };
        return {word(a.x, b.x), word(a.y, b.y), word(a.z, b.z), word(a.w, b.w)};
    }

    __device__ __forceinline__ void loadBias(int chunk)
    {
        int const column = min(chunk * kCHUNK, p.width - kCHUNK) + threadIdx.x % 4 * 8;
        auto const* const at = reinterpret_cast<float4 const*>(p.bias + column / p.biasColumns * p.biasPiece +
                                                               column % p.biasColumns * sizeof(float));
        bias[0] = __ldg(at);
        bias[1] = __ldg(at + 1);
    }

    //! Chunks are dealt over the blocks.
    __device__ __forceinline__ void addResidual(Activations const (&a)[kCHUNKS][1], int rows, RowLines const& lines)
    {
        int const warp = threadIdx.x / kWARP_SIZE;
        int const lane = threadIdx.x % kWARP_SIZE;
        auto const active = lines.active();
#pragma unroll 1
        for (int chunk = blockIdx.x; chunk < p.width / kCHUNK; chunk += gridDim.x)
        {
            if (chunk % kWARPS != warp)
            {
                continue;
            }
            if (chunk != static_cast<int>(blockIdx.x))
            {
                loadBias(chunk);
            }
            Activations mine = a[0][0];
#pragma unroll
            for (int i = 1; i < kCHUNKS; ++i)
            {
                bool const isIt = chunk / kWARPS == i;
                mine = {chosen(isIt, a[i][0].low, mine.low), chosen(isIt, a[i][0].high, mine.high)};
            }
#pragma unroll
            for (int half = 0; half < 2; ++half)
            {
                int const row = half * 8 + lane / 4;
                if (row >= rows || !active.has(row))
                {
                    continue;
                }
                uint4 const& bits = half == 0 ? mine.low : mine.high;
                SumPair* const to = p.added + (static_cast<size_t>(row) * p.width + chunk * kCHUNK + lane % 4 * 8) / 2;
                auto const add = [&](int pair, unsigned word, float low, float high)
                {
                    float2 const h = unpackPair<T>(word);
                    atomicAdd(to + pair, toSum(h.x + low, h.y + high));
                };
                add(0, bits.x, bias[0].x, bias[0].y);
                add(1, bits.y, bias[0].z, bias[0].w);
                add(2, bits.z, bias[1].x, bias[1].y);
                add(3, bits.w, bias[1].z, bias[1].w);
            }
        }
    }
};

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
    RowsNormParams norm;  //!< in place of `input`
    void const* input;    //!< T [rows, inputPitch]
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
    SumPair* sums;  //!< [rows, outputPitch / 2], instead of `output`
    void const*
        hidden;  //!< T [rows, outputPitch], the residual: it and the bias are added once, where not by a RowsNorm
};

//! Floats from one row of a block's partial sums to the next: so that eight rows meet no bank twice.
template <int kTILES>
constexpr int kPARTIAL_PITCH = kTILES % 4 == 0 ? 8 * kTILES + 8 : 8 * kTILES;

//! Parts of the rows that a product's warps deal, besides its inputs: so that a thread needs no more than half of a
//! multiprocessor's registers, and the blocks of the next product find room and fetch their weights.
template <int kROW_TILES>
constexpr int kROW_PARTS = kROW_TILES < 4 ? 1 : 2;

template <int kROW_TILES>
constexpr int kADDERS = kWARPS / kROW_PARTS<kROW_TILES> / 2;  //!< partial sums of a block that lie in shared memory

constexpr int kPRODUCT_BIAS = 128;  //!< behind the barrier: float32 [8 kTILES]
constexpr int kPRODUCT_WEIGHTS = 256;

template <int kROW_TILES, int kTILES>
__host__ __device__ constexpr int productBytes(int blockChunks)
{
    return kPRODUCT_WEIGHTS + blockChunks * kTILES * kTILE_BYTES +
           kADDERS<kROW_TILES> * kROW_TILES * kROWS_A_TILE * kPARTIAL_PITCH<kTILES> * 4;
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

//! A block's part of a product: 8 kTILES columns of all rows. Its warps deal the inputs, and many rows.
template <typename T, int kROW_TILES, int kTILES>
struct BlockProduct
{
    //! Chunks of a warp's activations on their way at once.
    static constexpr int kAHEAD = 4;
    static constexpr int kPARTS = kROW_PARTS<kROW_TILES>;
    static constexpr int kMINE = kROW_TILES / kPARTS;     //!< tiles of rows of a warp
    static constexpr int kINPUT_WARPS = kWARPS / kPARTS;  //!< that deal the inputs
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
        uint32_t const to = sharedAddress(weights());
        uint64_t const once = sm90::CachePolicies::make().drop;  // each weight is read once a token
        for (int i = lane; i < chunks; i += kWARP_SIZE)
        {
            int const chunk = firstChunk + i;
            sm90::copyBulk(
                to + i * kTILES * kTILE_BYTES,
                tiles + chunk / p.inner * p.outerStride + chunk % p.inner * static_cast<size_t>(p.innerStride),
                kTILES * kTILE_BYTES, barrier(), once);
        }
    }

    //! All that was fetched is there; for every warp, before the block ends.
    __device__ __forceinline__ void wait() const
    {
        sm90::barrierWait(barrier(), 0);
    }

    //! partial [adder][row][column], to be added up.
    __device__ __forceinline__ void multiply() const
    {
        int const warp = threadIdx.x / kWARP_SIZE;
        int const firstTile = warp / kINPUT_WARPS * kMINE;
        auto const* const input =
            static_cast<T const*>(p.input) + blockIdx.x / p.inputGroup * p.inputStride + firstChunk * kCHUNK;
        Sums c{};
#pragma unroll 1
        for (int first = warp % kINPUT_WARPS; first < chunks; first += kINPUT_WARPS * kAHEAD)
        {
            Inputs a;
#pragma unroll
            for (int i = 0; i < kAHEAD; ++i)
            {
                int const chunk = first + i * kINPUT_WARPS;
#pragma unroll
                for (int m = 0; m < kMINE; ++m)
                {
                    a[i][m] =
                        chunk < chunks ? loadRows(input, p.inputPitch, p.rows, firstTile + m, chunk) : Activations{};
                }
            }
            wait();
            multiplyAll(c, a, first);
        }
        addUp(c);
    }

    //! The same, of normalised rows.
    __device__ __forceinline__ void multiply(RowsNorm<T>& norm, RowLines const& lines) const
    {
        Inputs a;
        wait();
        norm.run(a, p.rows, lines);
        Sums c{};
        multiplyAll(c, a, threadIdx.x / kWARP_SIZE);
        addUp(c);
    }

    //! Columns 2 pair and 2 pair + 1 of a row.
    __device__ __forceinline__ float2 collect(int row, int pair, bool addsBias) const
    {
        float2 sum{};
#pragma unroll
        for (int adder = 0; adder < kADDERS<kROW_TILES>; ++adder)
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

private:
    using Inputs = Activations[kAHEAD][kMINE];  //!< chunks kINPUT_WARPS apart
    using Sums = float[kMINE][kTILES][4];

    __device__ __forceinline__ void multiplyAll(Sums& c, Inputs const& a, int first) const
    {
#pragma unroll
        for (int i = 0; i < kAHEAD; ++i)
        {
            int const chunk = first + i * kINPUT_WARPS;
            if (chunk < chunks)
            {
#pragma unroll
                for (int tile = 0; tile < kTILES; ++tile)
                {
                    uint4 const w = weightsOf(weights() + (chunk * kTILES + tile) * 8 * kCHUNK);
#pragma unroll
                    for (int m = 0; m < kMINE; ++m)
                    {
                        multiplyChunk<T>(c[m][tile], a[i][m], w);
                    }
                }
            }
        }
    }

    __device__ __forceinline__ void addUp(Sums const& c) const
    {
        int const warp = threadIdx.x / kWARP_SIZE;
        int const lane = threadIdx.x % kWARP_SIZE;
        // Sums over the warps, in a fixed order: the upper half's are stored, the lower half's added, the rest by
        // columns.
        constexpr int kHALF = kADDERS<kROW_TILES>;
        int const firstRow = (warp % kHALF * kROW_TILES + warp / kINPUT_WARPS * kMINE) * kROWS_A_TILE;
        float* const mine = partial() + (firstRow + lane / 4) * kPITCH + lane % 4 * 2;
#pragma unroll
        for (int turn = 0; turn < 2; ++turn)
        {
            if (warp % kINPUT_WARPS / kHALF != turn)
            {
#pragma unroll
                for (int m = 0; m < kMINE; ++m)
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
};

//! input weights^T of all rows for 8 kTILES columns a block: activated and written, or added to sums.
//! kNORM: of normalised rows.
template <typename T, int kROW_TILES, int kTILES, bool kTO_SUMS, bool kNORM = false>
__global__ void __launch_bounds__(kTHREADS, 2) product(ProductParams p)
{
    TROCR_DYNAMIC_SHARED(shared, 128);
    BlockProduct<T, kROW_TILES, kTILES> const mine(p, shared);
    constexpr int kPAIRS = 4 * kTILES;                                                     // of a row
    constexpr int kMINE = (kROW_TILES * kROWS_A_TILE * kPAIRS + kTHREADS - 1) / kTHREADS;  // of a thread
    // Adds bias and residual. Those of few rows have been added: RowsNorm.
    bool const isFirst = !kTO_SUMS || (kROW_TILES > 1 && blockIdx.y == 0);
    RowsNorm<T> norm(p.norm, shared + productBytes<kROW_TILES, kTILES>(p.blockChunks));
    sm90::launchDependents();
    if (threadIdx.x < kWARP_SIZE)
    {
        mine.fetch(isFirst, kNORM ? norm.fetchedBytes() : 0);
        if (kNORM && threadIdx.x == 0)
        {
            norm.fetch(mine.barrier());
        }
    }
    if constexpr (kNORM)
    {
        norm.prepare();
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
    if constexpr (kNORM)
    {
        mine.multiply(norm, lines);
    }
    else
    {
        mine.multiply();
        mine.wait();  // of a warp without inputs: for the bias; and no copy may be under way when the block ends
    }
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

// ---- a product of many rows whose inputs are dealt over a cluster ----

//! A cluster is a head: kHEAD_DIM columns of all rows. Each of its blocks multiplies an eighth of the inputs, so that
//! it reads an eighth of the activations; then each adds up some of the rows over the cluster.
template <typename T, int kHEAD_DIM, int kROW_TILES>
struct HeadProduct
{
    static constexpr int kBLOCKS = kHEAD_DIM / 8;
    static constexpr int kROWS = kROW_TILES * kROWS_A_TILE;
    static constexpr int kMOST = kMAX_WIDTH / kCHUNK / kBLOCKS;  //!< chunks of a block, a warp each...
    static constexpr int kHALVES = kWARPS / kMOST;               //!< ...for so many parts of the columns
    static constexpr int kTILES = kBLOCKS / kHALVES;             //!< of a warp
    static constexpr int kBIAS = 128;                            //!< after the barrier: float32 [kHEAD_DIM]
    static constexpr int kSUMS = kBIAS + kHEAD_DIM * 4;          //!< float [kROWS, kHEAD_DIM]
    static constexpr int kSUMS_BYTES = kROWS * kHEAD_DIM * 4;
    static constexpr int kWEIGHTS = kSUMS + kSUMS_BYTES;  //!< later the other sums
    static constexpr int kWEIGHTS_BYTES = kBLOCKS * kMOST * kTILE_BYTES;
    static constexpr int kBYTES = kWEIGHTS + (kWEIGHTS_BYTES > kSUMS_BYTES ? kWEIGHTS_BYTES : kSUMS_BYTES);
    static_assert(kMOST == 4);

    ProductParams const& p;
    uint8_t* shared;  //!< kBYTES
    int rank;
    int firstChunk;
    int chunks;

    __device__ __forceinline__ HeadProduct(ProductParams const& params, uint8_t* memory)
        : p(params),
          shared(memory),
          rank(blockIdx.x % kBLOCKS),
          firstChunk(p.chunks * rank / kBLOCKS),
          chunks(p.chunks * (rank + 1) / kBLOCKS - firstChunk)
    {
    }

    //! By one warp: bias and weights, which lie in the pieces of all of the cluster's blocks.
    __device__ __forceinline__ void fetch() const
    {
        constexpr int kBIAS_BYTES = 8 * 4;
        int const lane = threadIdx.x % kWARP_SIZE;
        int const bytes = chunks * kTILE_BYTES;
        uint32_t const barrier = sharedAddress(shared);
        if (lane == 0)
        {
            sm90::barrierInit(barrier, 1);
            sm90::barrierInitFence();
            sm90::barrierArriveExpect(barrier, kBLOCKS * (kBIAS_BYTES + bytes));
        }
        __syncwarp();
        if (lane < kBLOCKS)
        {
            int const block = blockIdx.x - rank + lane;
            sm90::copyBulk(shared + kBIAS + lane * kBIAS_BYTES, p.bias.of(block, 1), kBIAS_BYTES, barrier);
            if (bytes > 0)
            {
                sm90::copyBulk(sharedAddress(shared + kWEIGHTS + lane * bytes),
                               p.weights.of(block, 1) + firstChunk * kTILE_BYTES, bytes, barrier,
                               sm90::CachePolicies::make().drop);
            }
        }
    }

    //! Partial sums of all rows, for all of the cluster to read.
    __device__ __forceinline__ void multiply() const
    {
        int const warp = threadIdx.x / kWARP_SIZE;
        int const lane = threadIdx.x % kWARP_SIZE;
        int const chunk = warp % kMOST;
        int const firstTile = warp / kMOST * kTILES;
        bool const multiplies = chunk < chunks;
        auto const* const input = static_cast<T const*>(p.input) + blockIdx.x / p.inputGroup * p.inputStride;
        Activations a[kROW_TILES];
#pragma unroll
        for (int m = 0; m < kROW_TILES; ++m)
        {
            a[m] = multiplies ? loadRows(input, p.inputPitch, p.rows, m, firstChunk + chunk) : Activations{};
        }
        sm90::barrierWait(sharedAddress(shared), 0);
        float c[kROW_TILES][kTILES][4] = {};
        if (multiplies)
        {
            auto const* const weights = reinterpret_cast<T const*>(shared + kWEIGHTS);
#pragma unroll
            for (int tile = 0; tile < kTILES; ++tile)
            {
                uint4 const w = weightsOf(weights + ((firstTile + tile) * chunks + chunk) * 8 * kCHUNK);
#pragma unroll
                for (int m = 0; m < kROW_TILES; ++m)
                {
                    multiplyChunk<T>(c[m][tile], a[m], w);
                }
            }
        }
        __syncthreads();  // the weights' place is free
        // In a fixed order: chunks 2 and 3 are stored, 0 and 1 added, then the latter two.
        float* const mine = sums(chunk % 2);
#pragma unroll
        for (int turn = 0; turn < 2; ++turn)
        {
            if (chunk / 2 != turn)
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
                            int const row = m * kROWS_A_TILE + half * 8 + lane / 4;
                            auto* const at =
                                reinterpret_cast<float2*>(mine + indexOf(row, (firstTile + tile) * 8 + lane % 4 * 2));
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
        auto* const first = reinterpret_cast<float4*>(sums(0));
        auto const* const second = reinterpret_cast<float4 const*>(sums(1));
#pragma unroll
        for (int i = threadIdx.x; i < kSUMS_BYTES / 16; i += kTHREADS)
        {
            float4 const one = first[i];
            float4 const two = second[i];
            first[i] = {one.x + two.x, one.y + two.y, one.z + two.z, one.w + two.w};
        }
        sm90::clusterSync();
    }

    //! Calls take(row, column, four columns' bits in T) for what this block adds up of the active rows. The cluster's
    //! blocks read each other's memory: another clusterSync is to follow.
    template <typename Take>
    __device__ __forceinline__ void collect(ActiveRows const& active, Take const& take) const
    {
        constexpr int kPIECES = kHEAD_DIM / 4;
        static_assert(kROWS / kBLOCKS * kPIECES <= kTHREADS);
        int const row = static_cast<int>(threadIdx.x) / kPIECES * kBLOCKS + rank;
        int const column = static_cast<int>(threadIdx.x) % kPIECES * 4;
        if (row >= kROWS || row >= p.rows || !active.has(row))
        {
            return;
        }
        float4 parts[kBLOCKS];
#pragma unroll
        for (int other = 0; other < kBLOCKS; ++other)
        {
            parts[other] = *reinterpret_cast<float4 const*>(sm90::atRank(sums(0) + indexOf(row, column), other));
        }
        float4 sum = *reinterpret_cast<float4 const*>(shared + kBIAS + column * sizeof(float));
#pragma unroll
        for (int other = 0; other < kBLOCKS; ++other)
        {
            float4 const& part = parts[other];
            sum = {sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w};
        }
        take(row, column, uint2{packPair<T>(sum.x, sum.y), packPair<T>(sum.z, sum.w)});
    }

private:
    __device__ __forceinline__ float* sums(int which) const
    {
        return reinterpret_cast<float*>(shared + (which == 0 ? kSUMS : kWEIGHTS));
    }

    //! Eight columns of eight rows meet no bank twice.
    static __device__ __forceinline__ int indexOf(int row, int column)
    {
        return row * kHEAD_DIM + ((column / 8 ^ row % 8) * 8) + column % 8;
    }
};

//! output = input weights^T + b, a head's columns a cluster, its inputs from p.inputStride times the head on.
template <typename T, int kHEAD_DIM, int kROW_TILES>
__global__ void __launch_bounds__(kTHREADS, 2) multiplyHeads(ProductParams p)
{
    TROCR_DYNAMIC_SHARED(shared, 128);
    HeadProduct<T, kHEAD_DIM, kROW_TILES> const mine(p, shared);
    sm90::launchDependents();
    if (threadIdx.x < kWARP_SIZE)
    {
        mine.fetch();
    }
    __syncthreads();
    sm90::waitForPriorGrids();

    auto const lines = RowLines::load(p.states, p.rows);
    mine.multiply();
    int const firstColumn = blockIdx.x / mine.kBLOCKS * kHEAD_DIM;
    mine.collect(lines.active(),
                 [&](int row, int column, uint2 bits)
                 {
                     size_t const index = static_cast<size_t>(row) * p.outputPitch + firstColumn + column;
                     *reinterpret_cast<uint2*>(static_cast<T*>(p.output) + index) = bits;
                 });
    sm90::clusterSync();
}

struct QueryParams
{
    ProductParams product;  //!< of the queries
    void const* weights;    //!< T [H, 8, d / 32, E / 64, 8, 32]
    void* output;           //!< T [rows, H, E]
    int heads;
    int width;  //!< E
};

//! Of the queries' product in queryStates.
template <typename T, int kHEAD_DIM, int kROW_TILES>
__host__ __device__ constexpr int queryBytes(int blockChunks)
{
    return kROW_TILES == 1 ? productBytes<kROW_TILES, 1>(blockChunks) : HeadProduct<T, kHEAD_DIM, kROW_TILES>::kBYTES;
}

//! Queries in terms of the encoder's states: output[row, head] = W_k[head]^T (W_q[head] input[row] + b). The second
//! product's columns are dealt over the cluster, and over the warps of a block. Up to kROWS_A_TILE rows are normalised
//! here.
template <typename T, int kHEAD_DIM, int kROW_TILES>
__global__ void __launch_bounds__(kTHREADS, 2) queryStates(QueryParams p)
{
    constexpr int kCHUNKS = kHEAD_DIM / kCHUNK;
    constexpr int kMOST = kMAX_WIDTH / 64 / kWARPS;  // tiles of a warp
    TROCR_DYNAMIC_SHARED(shared, 128);
    constexpr bool kNORM = kROW_TILES == 1;
    using Product = std::conditional_t<kNORM, BlockProduct<T, kROW_TILES, 1>, HeadProduct<T, kHEAD_DIM, kROW_TILES>>;
    Product const queries(p.product, shared);
    HeadRows<T, kHEAD_DIM> const head{
        reinterpret_cast<T*>(shared + queryBytes<T, kHEAD_DIM, kROW_TILES>(p.product.blockChunks))};
    int const warp = threadIdx.x / kWARP_SIZE;
    int const lane = threadIdx.x % kWARP_SIZE;
    int const tiles = p.width / 64;
    int const rows = p.product.rows;
    RowsNorm<T> norm(p.product.norm, reinterpret_cast<uint8_t*>(head.rows) + headRowsBytes<kROW_TILES, kHEAD_DIM>());
    sm90::launchDependents();
    if constexpr (kNORM)
    {
        if (warp == 0)
        {
            queries.fetch(true, norm.fetchedBytes());
            if (lane == 0)
            {
                norm.fetch(queries.barrier());
            }
        }
        norm.prepare();
    }
    else if (warp == 0)
    {
        queries.fetch();
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
    ActiveRows active;
    if constexpr (kNORM)
    {
        queries.multiply(norm, lines);
        active = lines.active();
        head.exchange(queries, active);
    }
    else
    {
        queries.multiply();
        active = lines.active();
        queries.collect(active,
                        [&](int row, int column, uint2 bits)
                        {
#pragma unroll
                            for (int other = 0; other < head.kBLOCKS; ++other)
                            {
                                *reinterpret_cast<uint2*>(sm90::atRank(head.rows + row * head.kPITCH + column, other)) =
                                    bits;
                            }
                        });
        sm90::clusterSync();
    }
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

//! The second product of a head where it adds to s: W_o context, of each head its part, for up to kROWS_A_TILE rows. A
//! block has D / C columns.
struct OutputParams
{
    uint8_t const* weights;  //!< T [H, C] pieces [d / 32, D / C, 32]
    size_t pieceBytes;       //!< from one to the next
    SumPair* sums;           //!< [rows, D / 2]
    int width;               //!< D
};

template <typename T, int kHEAD_DIM>
struct HeadOutput
{
    static constexpr int kBLOCKS = kHEAD_DIM / 8;
    static constexpr int kCHUNKS = kHEAD_DIM / kCHUNK;

    OutputParams const& p;
    T* weights;  //!< in shared memory

    __device__ __forceinline__ int columns() const
    {
        return p.width / kBLOCKS;
    }
    __device__ __forceinline__ uint32_t bytes() const
    {
        return columns() * kHEAD_DIM * sizeof(T);
    }

    __device__ __forceinline__ void fetch(uint32_t barrier) const
    {
        sm90::copyBulk(sharedAddress(weights), p.weights + blockIdx.x * p.pieceBytes, bytes(), barrier,
                       sm90::CachePolicies::make().drop);
    }

    __device__ __forceinline__ void add(HeadRows<T, kHEAD_DIM> const& contexts, int rows,
                                        ActiveRows const& active) const
    {
        int const warp = threadIdx.x / kWARP_SIZE;
        int const lane = threadIdx.x % kWARP_SIZE;
#pragma unroll 1
        for (int tile = warp; tile < columns() / 8; tile += kWARPS)
        {
            float c[4] = {};
#pragma unroll
            for (int chunk = 0; chunk < kCHUNKS; ++chunk)
            {
                multiplyChunk<T>(c, contexts.load(0, rows, chunk),
                                 weightsOf(weights + (chunk * columns() + tile * 8) * kCHUNK));
            }
#pragma unroll
            for (int half = 0; half < 2; ++half)
            {
                int const row = half * 8 + lane / 4;
                if (row < rows && active.has(row))
                {
                    int const column = blockIdx.x % kBLOCKS * columns() + tile * 8 + lane % 4 * 2;
                    atomicAdd(p.sums + (static_cast<size_t>(row) * p.width + column) / 2,
                              toSum(c[2 * half], c[2 * half + 1]));
                }
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
    using HeadKeys = Keys<T, kHEAD_DIM, 1, 8>;
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
    int const offset = lane % HeadKeys::kLANES * 8;
    auto const* const newest =
        static_cast<T const*>(p.qkv) + (static_cast<size_t>(row) * 3 * p.heads + head) * kHEAD_DIM + offset;
    auto const part = [&](int i)
    { return __ldcg(reinterpret_cast<uint4 const*>(newest + static_cast<size_t>(i) * p.heads * kHEAD_DIM)); };
    uint4 const newKey = part(1);
    uint4 const newValue = part(2);
    Softmax<T, kHEAD_DIM> softmax;
    softmax.begin(part(0));
#pragma unroll 1
    for (int key = 0; key <= state.position; key += HeadKeys::kSPAN)
    {
        HeadKeys held;
        if constexpr (kBEAMS)
        {
            AncestorCaches const caches{p.owners + static_cast<size_t>(row) * p.capacity, row,
                                        static_cast<ptrdiff_t>(p.heads) * p.capacity * kHEAD_DIM};
            held.load(allKeys, allValues, key, state.position, caches);
        }
        else
        {
            held.load(allKeys, allValues, key, state.position);
        }
#pragma unroll
        for (int pass = 0; pass < 8; ++pass)
        {
            if (held.indexOf(key, pass) == state.position)
            {
                held.keys[pass] = newKey;
                held.values[pass] = newValue;
            }
        }
        softmax.add(held, key, state.position + 1);
    }
    if (lane < HeadKeys::kLANES)
    {
        size_t const at = static_cast<size_t>(state.position) * kHEAD_DIM + offset;
        *reinterpret_cast<uint4*>(allKeys + at) = newKey;
        *reinterpret_cast<uint4*>(allValues + at) = newValue;
    }
    softmax.finish(contexts[warp], &scales[warp]);
    __syncwarp();
    float const factor = 1.0F / scales[warp].y;
    float2 const pair = reinterpret_cast<float2 const*>(contexts[warp])[lane];
    static_cast<unsigned*>(p.context)[(static_cast<size_t>(row) * p.heads + head) * kHEAD_DIM / 2 + lane] =
        packPair<T>(pair.x * factor, pair.y * factor);
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

template <typename T, int kHEAD_DIM>
__host__ __device__ constexpr int attendSelfAndAddBytes(int width)
{
    constexpr int kBLOCKS = kHEAD_DIM / 8;
    int const output = width / kBLOCKS * kHEAD_DIM;
    int const qkv = kROWS_A_TILE / kBLOCKS * 3 * kHEAD_DIM;
    return productBytes<1, 3>(width / kCHUNK) + headRowsBytes<1, kHEAD_DIM>() +
           (output + qkv) * static_cast<int>(sizeof(T)) + RowsNorm<T>::bytes(width);
}

//! LayerNorm and the products around it as well: sums += W_o attention(W_qkv h + b). A cluster is a head; its blocks
//! deal the rows that they attend for, a warp a row. For up to kROWS_A_TILE rows: with more, a head's 8 blocks take
//! longer to attend, and each adds all of its columns' sums to those of the other heads, than kernels of their own do.
template <typename T, int kHEAD_DIM, bool kBEAMS>
__global__ void __launch_bounds__(kTHREADS, 2) attendSelfAndAdd(SelfRowsParams p)
{
    using HeadKeys = Keys<T, kHEAD_DIM, 1, 8>;
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
    // [row / C][query, key, value][d], of the rows that a block attends for.
    T* const qkv = output.weights + output.bytes() / sizeof(T);
    RowsNorm<T> norm(p.product.norm, reinterpret_cast<uint8_t*>(qkv + kROWS_A_TILE / kBLOCKS * 3 * kHEAD_DIM));
    sm90::launchDependents();
    if (warp == 0)
    {
        product.fetch(true, output.bytes() + norm.fetchedBytes());
        if (lane == 0)
        {
            output.fetch(product.barrier());
            norm.fetch(product.barrier());
        }
    }
    norm.prepare();
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
    product.multiply(norm, lines);
    auto const active = lines.active();
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
        int const offset = lane % HeadKeys::kLANES * 8;
        T const* const newest = qkv + warp * 3 * kHEAD_DIM + offset;
        Softmax<T, kHEAD_DIM> softmax;
        softmax.begin(*reinterpret_cast<uint4 const*>(newest));
#pragma unroll 1
        for (int key = 0; key <= position; key += HeadKeys::kSPAN)
        {
            HeadKeys held;
            if constexpr (kBEAMS)
            {
                AncestorCaches const caches{p.owners + static_cast<size_t>(row) * p.capacity, row,
                                            static_cast<ptrdiff_t>(p.heads) * p.capacity * kHEAD_DIM};
                held.load(allKeys, allValues, key, position, caches);
            }
            else
            {
                held.load(allKeys, allValues, key, position);
            }
            insertNewest(held, key, position, newest + kHEAD_DIM, newest + 2 * kHEAD_DIM);
            softmax.add(held, key, position + 1);
        }
        if (lane < HeadKeys::kLANES)
        {
            size_t const at = static_cast<size_t>(position) * kHEAD_DIM + offset;
            *reinterpret_cast<uint4*>(allKeys + at) = *reinterpret_cast<uint4 const*>(newest + kHEAD_DIM);
            *reinterpret_cast<uint4*>(allValues + at) = *reinterpret_cast<uint4 const*>(newest + 2 * kHEAD_DIM);
        }
        // Where the product's partial sums were: the context, then its scale.
        float* const attended = product.partial() + warp * (kHEAD_DIM + 4);
        auto* const scale = reinterpret_cast<float2*>(attended + kHEAD_DIM);
        softmax.finish(attended, scale);
        __syncwarp();
        float const factor = 1.0F / scale->y;
        float2 const pair = reinterpret_cast<float2 const*>(attended)[lane];
        unsigned const bits = packPair<T>(pair.x * factor, pair.y * factor);
        T* const to = contexts.rows + row * contexts.kPITCH + lane * 2;
#pragma unroll
        for (int other = 0; other < kBLOCKS; ++other)
        {
            *reinterpret_cast<unsigned*>(sm90::atRank(to, other)) = bits;
        }
    }
    sm90::clusterSync();
    output.add(contexts, rows, active);
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
    int keptStages;          //!< a block's last, that L2 is to keep for the next layer: the first come in time
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
            int const state = line * p.length + first + stage * Layout::kKEYS + lane;
            auto const policies = sm90::CachePolicies::make();
            sm90::copyBulk(ring + slot * Layout::kSTAGE + lane * Layout::kPITCH,
                           static_cast<uint8_t const*>(p.encoded) + static_cast<size_t>(state) * (Layout::kWIDTH * 2),
                           Layout::kWIDTH * 2, barriers + slot * 8,
                           stage + p.keptStages >= stages ? policies.keep : policies.drop);
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
    auto const keysOf = [&](int stage) { return min(Layout::kKEYS, count - stage * Layout::kKEYS); };
    auto const columnsOf = [&](int stage)  // the warp's, of key 0
    { return ring + stage % Layout::kSTAGES * Layout::kSTAGE + warp * 32 * kSTEPS; };
    // The warp's part of a stage's scores.
    auto const score = [&](int stage)
    {
        uint32_t const columns = columnsOf(stage);
        sm90::barrierWait(barriers + stage % Layout::kSTAGES * 8, (stage / Layout::kSTAGES + turns) & 1);
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
    };
    auto const addUp = [&](int stage)
    {
        static_assert(kTHREADS >= kROWS_A_TILE * Layout::kKEYS / 2);
        if (threadIdx.x < kROWS_A_TILE * Layout::kKEYS / 2)
        {
            int const key = threadIdx.x % (Layout::kKEYS / 2) * 2;
            int const at = threadIdx.x / (Layout::kKEYS / 2) * kPITCH + key;
            float2 sum{};
#pragma unroll
            for (int other = 0; other < kWARPS; ++other)
            {
                float2 const part = *reinterpret_cast<float2 const*>(partial + other * kROWS_A_TILE * kPITCH + at);
                sum = {sum.x + part.x, sum.y + part.y};
            }
            int const keys = keysOf(stage);
            *reinterpret_cast<float2*>(scores + at) = {key < keys ? sum.x * p.scale : kNO_SCORE,
                                                       key + 1 < keys ? sum.y * p.scale : kNO_SCORE};
        }
    };
    auto const weigh = [&](int stage)
    {
        // Every warp weighs all keys for itself.
        uint32_t const columns = columnsOf(stage);
        int const keys = keysOf(stage);
        if (keys < Layout::kKEYS)
        {
            // What lies there may be no number, and 0 times that none either.
#pragma unroll 1
            for (int i = lane; i < (Layout::kKEYS - keys) * 2 * kSTEPS; i += kWARP_SIZE)
            {
                int const key = keys + i / (2 * kSTEPS);
                *reinterpret_cast<uint4*>(shared + Layout::kRING + stage % Layout::kSTAGES * Layout::kSTAGE +
                                          key * Layout::kPITCH + warp * 32 * kSTEPS + i % (2 * kSTEPS) * 16) = uint4{};
            }
            __syncwarp();
        }
        float c[kTILES][4];
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
    };
    // Between two barriers a stage is weighed and the next one scored: what one waits for, the other fills.
#pragma unroll 1
    for (int stage = -1; stage < stages; ++stage)
    {
        if (stage >= 0)
        {
            weigh(stage);
        }
        if (stage + 1 < stages)
        {
            score(stage + 1);
        }
        __syncthreads();
        if (stage + 1 < stages)
        {
            // All warps are done with this stage: its slot is free.
            if (warp == 0 && stage >= 0 && stage + Layout::kSTAGES < stages)
            {
                fetch(line, stage + Layout::kSTAGES);
            }
            addUp(stage + 1);
            __syncthreads();
        }
    }
    // A context of the block's own softmax, in T: straight to its place, or where the cluster's blocks find it.
    constexpr int kPIECES = Layout::kWIDTH / 8;  // of 16 bytes, of a head
    auto* const output = static_cast<uint8_t*>(p.context) + static_cast<size_t>(row) * p.heads * Layout::kWIDTH * 2;
    uint8_t* const parts = shared + Layout::kRING;  // T [16], Layout::kPITCH apart
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

}  // namespace trocr::greedy
