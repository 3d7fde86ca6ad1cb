#pragma once

#include <cfloat>
#include <climits>

#include "common/device.cuh"
#include "common/mma.cuh"
#include "greedy_decode/layout.h"
#include "greedy_decode/ptx.cuh"

//! The whole greedy search as one kernel. README.md explains the division of labour and the arithmetic behind it.

namespace trocr::greedy
{

constexpr int kWARPS = 8; // that compute: two warpgroups
constexpr int kTHREADS = kWARPS * kWARP_SIZE;
constexpr int kBLOCK_THREADS = kTHREADS + 128; // a third one streams the weights, and leaves the others its registers
constexpr int kSTREAM_REGISTERS = 24;
constexpr int kSEARCH_REGISTERS = 240;
constexpr int kSTAGES = 11;
constexpr int kPARTIALS = 4;          // tiles of 16 rows x 8 outputs that are summed over the warps at once
constexpr int kSLAB_GROUPS = kSLAB / kGROUP / kWARPS; // of a warp
constexpr int kMAX_SPLITS = 8;        // blocks that share one row's keys in cross-attention
constexpr int kMAX_HEAD_DIM = 64;
constexpr int kMAX_OWN_COLUMNS = 128; // of the residual stream, a block
constexpr int kMAX_OWN_VALUES = 1024;
constexpr int kMAX_CLUSTER_ROWS = 16; // of a team that is a cluster

//! Arg-max and sum of exponentials over some of a row's logits: enough for the choice and its log-probability.
struct Candidate
{
    float maximum;
    int token;
    float sum; // of e^(logit - maximum)
    int unused;

    static __device__ __forceinline__ Candidate none()
    {
        return {-FLT_MAX, INT_MAX, 0.0F, 0};
    }

    //! Of equal logits the first token wins, as in torch.argmax.
    __device__ __forceinline__ void merge(float otherMaximum, int otherToken, float otherSum)
    {
        float const merged = fmaxf(maximum, otherMaximum);
        sum = sum * exp2Approx((maximum - merged) * kLOG2_E) + otherSum * exp2Approx((otherMaximum - merged) * kLOG2_E);
        if (otherMaximum > maximum || (otherMaximum == maximum && otherToken < token))
        {
            token = otherToken;
        }
        maximum = merged;
    }

    template <int kOFFSET>
    __device__ __forceinline__ void mergeAcross()
    {
        float const otherMaximum = __shfl_xor_sync(kFULL_WARP, maximum, kOFFSET);
        int const otherToken = __shfl_xor_sync(kFULL_WARP, token, kOFFSET);
        float const otherSum = __shfl_xor_sync(kFULL_WARP, sum, kOFFSET);
        merge(otherMaximum, otherToken, otherSum);
    }
};

//! A warp's part of one row's attention to some keys, unnormalised; scores are in units of log2.
struct AttentionPartial
{
    float maximum;
    float sum;
    float values[kMAX_HEAD_DIM];
};

//! Where everything lies in the workspace; every pointer is a multiple of 256 bytes.
struct Workspace
{
    unsigned* counter;      // arrivals at the grid's barrier, zero at launch
    int* teamActive;        // [teams]
    void* residual;         // T [B, D]: x before LayerNorm
    void* query;            // T [B, D]
    void* context;          // T [B, D]
    void* hidden;           // T [B, F]
    float* splitContext;    // [kMAX_SPLITS, B, D]
    float2* splitScale;     // [kMAX_SPLITS, B, H]: maximum and sum
    Candidate* candidates;  // [B, blocks]
    void* keys;             // T [L, B, H, maxSteps, d]
    void* values;           // T [L, B, H, maxSteps, d]
};

struct Arguments
{
    GreedyDecodeParams params;
    Workspace workspace;
    int rowsPerTeam;
};

template <typename T>
struct Shared
{
    alignas(128) uint8_t stages[kSTAGES][kSTAGE_BYTES];
    alignas(16) float partials[2][kWARPS][kPARTIALS][kWARP_SIZE][4];
    float2 statistics[kGREEDY_MAX_BATCH][kWARPS]; // of each warp's inputs: mean, sum of squared distances from it
    float own[kMAX_OWN_VALUES];                   // this block's columns of the residual stream [rows, columns]
    float ownScale[kMAX_OWN_COLUMNS][2];          // gamma and beta there
    AttentionPartial attention[kWARPS];
    alignas(16) T query[kMAX_CLUSTER_ROWS * kMAX_HEAD_DIM];
    int tokens[kGREEDY_MAX_BATCH];
    int ended[kGREEDY_MAX_BATCH];
    int activeRows[kGREEDY_MAX_BATCH];
    int numActive;
    int stop;
    alignas(8) uint64_t full[kSTAGES];
    uint64_t empty[kSTAGES];
    uint64_t team;
};

template <typename T>
__device__ __forceinline__ float rounded(float value)
{
    return toFloat(fromFloat<T>(value));
}

__device__ __forceinline__ uint4 zeros()
{
    return make_uint4(0, 0, 0, 0);
}

//! Eight neighbouring elements, past L1: other blocks write them while this kernel runs.
template <typename T>
__device__ __forceinline__ uint4 loadFresh(T const* address)
{
    return __ldcg(reinterpret_cast<uint4 const*>(address));
}

template <typename T>
__device__ __forceinline__ uint4 loadConstant(T const* address)
{
    return __ldg(reinterpret_cast<uint4 const*>(address));
}

//! The weight stream's reading end. Every warp takes every stage in turn, and releases it.
struct StreamReader
{
    uint32_t full;
    uint32_t empty;
    int stage = 0;
    uint32_t parity = 0;

    __device__ __forceinline__ void wait() const
    {
        sm90::barrierWait(full + stage * 8, parity);
    }

    __device__ __forceinline__ int offset() const
    {
        return stage * kSTAGE_BYTES;
    }

    __device__ __forceinline__ void release()
    {
        __syncwarp();
        if (threadIdx.x % kWARP_SIZE == 0)
        {
            sm90::barrierArrive(empty + stage * 8);
        }
        if (++stage == kSTAGES)
        {
            stage = 0;
            parity ^= 1;
        }
    }
};

//! Rows of activations as the A operand of m16n8k16. Lane 4 g + t holds, of rows g and g + 8 and of each group of 32 inputs,
//! inputs 8 t to 8 t + 7: the same four pairs that the packed weights hold, so both agree on the order of the inputs, which
//! is all that a product asks for. Warp w has groups w, w + 8, ... of each slab.
template <int kROW_TILES, int kSLABS>
struct Fragments
{
    static constexpr int kGROUPS = kSLABS * kSLAB_GROUPS;
    uint4 rows[kROW_TILES][2][kGROUPS];
};

//! kCLUSTER: teams are clusters (Shares). kROW_TILES: tiles of 16 rows of a team. kHEAD_ROW_TILES: of the batch.
template <typename T, bool kCLUSTER, int kROW_TILES, int kHEAD_ROW_TILES>
class Decoder
{
public:
    __device__ Decoder(Arguments const& arguments, Shared<T>& shared)
        : mParams(arguments.params)
        , mShape(arguments.params.shape)
        , mWorkspace(arguments.workspace)
        , mShared(shared)
        , mShares(arguments.params.shape, arguments.params.plan)
        , mTeam(blockIdx.x / arguments.params.plan.teamBlocks)
        , mRank(blockIdx.x % arguments.params.plan.teamBlocks)
        , mRow0(mTeam * arguments.rowsPerTeam)
        , mRows(max(0, min(arguments.rowsPerTeam, arguments.params.batch - mRow0)))
        , mThread(threadIdx.x)
        , mWarp(threadIdx.x / kWARP_SIZE)
        , mLane(threadIdx.x % kWARP_SIZE)
    {
        mReader.full = sharedAddress(shared.full);
        mReader.empty = sharedAddress(shared.empty);
    }

    __device__ __forceinline__ void run()
    {
        if (mThread == 0)
        {
            for (int i = 0; i < kSTAGES; ++i)
            {
                sm90::barrierInit(mReader.full + i * 8, 1);
                sm90::barrierInit(mReader.empty + i * 8, kWARPS);
            }
            sm90::barrierInit(sharedAddress(&mShared.team), mParams.plan.teamBlocks);
            sm90::barrierInitFence();
            mShared.stop = 0;
            mShared.numActive = mRows;
        }
        if (mThread < mRows)
        {
            mShared.tokens[mThread] = mParams.startId;
            mShared.ended[mThread] = 0;
            mShared.activeRows[mThread] = mThread;
        }
        sm90::clusterSync();

        if (mWarp >= kWARPS)
        {
            sm90::shrinkRegisters<kSTREAM_REGISTERS>();
            if (mThread == kTHREADS)
            {
                stream();
            }
            __syncwarp();
        }
        else
        {
            sm90::growRegisters<kSEARCH_REGISTERS>();
            search();
        }
        sm90::clusterSync(); // no block leaves while others may still arrive at its barrier
    }

private:
    // ---- the weight stream ----

    //! One thread copies this block's weights into the ring, over and over, as stages fall free: it needs to know nothing of
    //! the phases, and runs ahead of them while the others wait at barriers.
    __device__ __forceinline__ void stream()
    {
        auto const* const layers
            = static_cast<uint8_t const*>(mParams.layerWeights) + mRank * mShape.numLayers * mShares.layerBytes();
        auto const* const head = static_cast<uint8_t const*>(mParams.headWeights) + blockIdx.x * mShares.head.bytes();
        int issued = 0;
        for (bool more = true; more;)
        {
            uint8_t const* source = layers;
            int const products = mRows > 0 ? mShape.numLayers * kPHASES : 0;
#pragma unroll 1
            for (int product = 0; more && product <= products; ++product)
            {
                if (product == products)
                {
                    source = head;
                }
                more = copy(product == products ? mShares.head : shareOf(product % kPHASES), source, issued);
            }
        }
        // A block must not end while copies into its memory are under way.
#pragma unroll 1
        for (int i = max(0, issued - kSTAGES); i < issued; ++i)
        {
            sm90::barrierWait(mReader.full + i % kSTAGES * 8, i / kSTAGES & 1);
        }
    }

    //! Streams one share and moves `source` behind it; false when the search has ended.
    __device__ __forceinline__ bool copy(Share const& share, uint8_t const*& source, int& issued)
    {
        int const stages = share.stages();
#pragma unroll 1
        for (int i = 0; i < stages; ++i)
        {
            int const stage = issued % kSTAGES;
            while (!barrierHasCompleted(mReader.empty + stage * 8, (issued / kSTAGES & 1) ^ 1))
            {
                if (*static_cast<int volatile*>(&mShared.stop) != 0)
                {
                    return false;
                }
            }
            uint32_t const bytes = share.stageBytes(i);
            sm90::barrierArriveExpect(mReader.full + stage * 8, bytes);
            copyBulk(sharedAddress(mShared.stages[stage]), source, bytes, mReader.full + stage * 8);
            source += bytes;
            ++issued;
        }
        return true;
    }

    //! Passes over the weights of one share.
    __device__ __forceinline__ void skip(Share const& share)
    {
        int const stages = share.stages();
#pragma unroll 1
        for (int i = 0; i < stages; ++i)
        {
            mReader.wait();
            mReader.release();
        }
    }

    // ---- barriers ----

    __device__ __forceinline__ void sync() const
    {
        syncThreads(1, kTHREADS);
    }

    //! What the block has written so far is for the others to read after their wait...(). Between the two, a phase fetches
    //! what does not depend on others.
    __device__ __forceinline__ void arriveTeam()
    {
        if constexpr (kCLUSTER)
        {
            sync();
            if (mWarp == 0 && mLane < mParams.plan.teamBlocks)
            {
                barrierArriveReleaseAtRank(sharedAddress(&mShared.team), mLane);
            }
        }
        else
        {
            arriveGrid();
        }
    }

    __device__ __forceinline__ void waitTeam()
    {
        if constexpr (kCLUSTER)
        {
            barrierWaitAcquire(sharedAddress(&mShared.team), mTeamParity);
            mTeamParity ^= 1;
        }
        else
        {
            waitGrid();
        }
    }

    __device__ __forceinline__ void arriveGrid()
    {
        sync();
        if (mThread == 0)
        {
            __threadfence();
            incrementRelease(mWorkspace.counter);
        }
    }

    __device__ __forceinline__ void waitGrid()
    {
        mGridTarget += gridDim.x;
        if (mThread == 0)
        {
            // The difference, so that the counter may wrap.
            while (static_cast<int>(loadAcquire(mWorkspace.counter) - mGridTarget) < 0)
            {
            }
        }
        sync();
    }

    // ---- the search ----

    __device__ __forceinline__ void search()
    {
        int const teams = gridDim.x / mParams.plan.teamBlocks;
        int step = 0;
        for (; step < mParams.maxSteps; ++step)
        {
            bool const active = mShared.numActive > 0;
            if (active)
            {
                runLayers(step);
            }
            else if (mRows > 0)
            {
#pragma unroll 1
                for (int product = 0; product < mShape.numLayers * kPHASES; ++product)
                {
                    skip(shareOf(product % kPHASES));
                }
            }
            if (mRank == 0 && mThread == 0)
            {
                mWorkspace.teamActive[mTeam] = active;
            }
            arriveGrid();
            auto const norm = loadNorm(3 * mShape.numLayers);
            waitGrid();
            bool anyActive = active;
            if constexpr (kCLUSTER)
            {
                int const mine = mLane < teams ? __ldcg(mWorkspace.teamActive + mLane) : 0;
                anyActive = __any_sync(kFULL_WARP, mine);
            }
            if (!anyActive)
            {
                break;
            }
            scoreVocabulary(norm);
            arriveGrid();
            waitGrid();
            choose(step);
        }

        if (mRank == 0)
        {
            if (mTeam == 0 && mThread == 0)
            {
                *mParams.steps = step;
            }
#pragma unroll 1
            for (int row = 0; row < mRows; ++row)
            {
                if (mThread == 0)
                {
                    tokenIds(row)[0] = mParams.startId;
                }
#pragma unroll 1
                for (int i = step + mThread; i < mParams.maxSteps; i += kTHREADS)
                {
                    tokenIds(row)[i + 1] = mParams.padId;
                    logProbs(row)[i] = 0.0F;
                }
            }
        }
        sync();
        if (mThread == 0)
        {
            *static_cast<int volatile*>(&mShared.stop) = 1;
        }
    }

    __device__ __forceinline__ int32_t* tokenIds(int row) const
    {
        return mParams.tokenIds + static_cast<int64_t>(mRow0 + row) * (mParams.maxSteps + 1);
    }

    __device__ __forceinline__ float* logProbs(int row) const
    {
        return mParams.logProbs + static_cast<int64_t>(mRow0 + row) * mParams.maxSteps;
    }

    //! The products of a layer, in order. All but the last have inputs of length D, and are one loop for the sake of its
    //! size: a layer's code, run through again and again, must stay in the instruction cache.
    enum Phase
    {
        kQKV,
        kSELF_OUTPUT,
        kQUERY,
        kCROSS_OUTPUT,
        kFC1,
        kFC2,
        kPHASES
    };

    __device__ __forceinline__ void runLayers(int step)
    {
#pragma unroll 1
        for (int layer = 0; layer < mShape.numLayers; ++layer)
        {
#pragma unroll 1
            for (int phase = kQKV; phase < kFC2; ++phase)
            {
                Fragments<kROW_TILES, 1> rows;
                if (phase == kSELF_OUTPUT || phase == kCROSS_OUTPUT)
                {
                    waitTeam();
                    if (phase == kCROSS_OUTPUT && splits() > 1)
                    {
                        mergeSplits(rows);
                    }
                    else
                    {
                        loadRows(rows, teamRows(mWorkspace.context, mShape.dModel), mShape.dModel, mRows);
                    }
                }
                else
                {
                    bool const isFirst = layer == 0 && phase == kQKV;
                    auto const norm = loadNorm(3 * layer + phase / 2);
                    if (isFirst)
                    {
                        embed(rows, step);
                    }
                    else
                    {
                        waitTeam();
                        loadRows(rows, teamRows(mWorkspace.residual, mShape.dModel), mShape.dModel, mRows);
                    }
                    if (!isFirst || mShape.layernormEmbedding)
                    {
                        normalize(rows, norm, mRows);
                        normalizeOwn();
                    }
                }

                productOf<1>(
                    rows, mRows, shareOf(phase), [](int) {},
                    [&](int row, int column, float value, int) { store(phase, layer, step, row, column, value); });

                if (phase == kQKV || phase == kQUERY)
                {
                    if constexpr (kCLUSTER)
                    {
                        sync(); // the block attends with the queries that it made itself
                    }
                    else
                    {
                        arriveTeam();
                        waitTeam();
                    }
                    attend(phase == kQKV, layer, step);
                }
                arriveTeam();
            }

            waitTeam();
            productOfHidden();
            if (layer + 1 < mShape.numLayers)
            {
                arriveTeam();
            }
        }
    }

    __device__ __forceinline__ Share shareOf(int phase) const
    {
        return phase == kQKV ? mShares.qkv
            : phase == kQUERY ? mShares.query
            : phase == kFC1   ? mShares.fc1
            : phase == kFC2   ? mShares.fc2
                              : mShares.selfOutput;
    }

    __device__ __forceinline__ void store(int phase, int layer, int step, int row, int column, float value)
    {
        if (phase == kQKV)
        {
            storeQkv(layer, step, row, column, value);
        }
        else if (phase == kQUERY)
        {
            storeQuery(row, column, value);
        }
        else if (phase == kFC1)
        {
            storeHidden(row, column, value);
        }
        else
        {
            storeResidual(row, column, value);
        }
    }

    // ---- rows of activations ----

    __device__ __forceinline__ static T* pointer(void* address)
    {
        return static_cast<T*>(address);
    }

    //! The team's part of a buffer [B, width].
    __device__ __forceinline__ T* teamRows(void* buffer, int width) const
    {
        return pointer(buffer) + static_cast<int64_t>(mRow0) * width;
    }

    //! The first of the eight inputs that this lane has in group `index` of its fragments, which begin at slab `slab`.
    __device__ __forceinline__ int inputOf(int index, int slab) const
    {
        int const group = index % kSLAB_GROUPS * kWARPS + mWarp;
        return (slab + index / kSLAB_GROUPS) * kSLAB + group * kGROUP + mLane % 4 * 8;
    }

    //! Fills fragments from `source(row, input)`, with zeros outside of [numRows, inputs].
    template <int kTILES, int kSLABS, typename Source>
    __device__ __forceinline__ void fill(
        Fragments<kTILES, kSLABS>& fragments, int inputs, int numRows, int slab, Source const& source) const
    {
#pragma unroll
        for (int m = 0; m < kTILES; ++m)
        {
#pragma unroll
            for (int half = 0; half < 2; ++half)
            {
                int const row = m * 16 + half * 8 + mLane / 4;
#pragma unroll
                for (int i = 0; i < Fragments<kTILES, kSLABS>::kGROUPS; ++i)
                {
                    int const input = inputOf(i, slab);
                    fragments.rows[m][half][i] = row < numRows && input < inputs ? source(row, input) : zeros();
                }
            }
        }
    }

    //! `x` [numRows, inputs], written by any block.
    template <int kTILES, int kSLABS>
    __device__ __forceinline__ void loadRows(
        Fragments<kTILES, kSLABS>& fragments, T const* x, int inputs, int numRows, int slab = 0) const
    {
        fill(fragments, inputs, numRows, slab,
            [&](int row, int input) { return loadFresh(x + static_cast<int64_t>(row) * inputs + input); });
    }

    //! Token embedding and position, rounded where Hugging Face's model in T rounds.
    __device__ __forceinline__ Pack<T> embedding(int row, int step, int input) const
    {
        int64_t const d = mShape.dModel;
        auto token = Pack<T>::load(static_cast<T const*>(mParams.embedding) + mShared.tokens[row] * d + input);
        auto const position = Pack<T>::load(static_cast<T const*>(mParams.positions) + step * d + input);
#pragma unroll
        for (int i = 0; i < 8; ++i)
        {
            token.values[i] = rounded<T>(token.values[i] * mShape.embedScale) + position.values[i];
        }
        return token;
    }

    __device__ __forceinline__ void embed(Fragments<kROW_TILES, 1>& rows, int step)
    {
        fill(rows, mShape.dModel, mRows, 0,
            [&](int row, int input) { return embedding(row, step, input).toBits(); });

        int const packs = ownColumns() / kTILE;
#pragma unroll 1
        for (int i = mThread; i < mRows * packs; i += kTHREADS)
        {
            int const row = i / packs;
            int const column = i % packs * kTILE;
            int const input = mRank * ownColumns() + column;
            if (input < mShape.dModel)
            {
                auto const pack = embedding(row, step, input);
#pragma unroll
                for (int k = 0; k < kTILE; ++k)
                {
                    mShared.own[row * ownColumns() + column + k] = rounded<T>(pack.values[k]);
                }
            }
        }
    }

    // ---- LayerNorm ----

    struct Norm
    {
        uint4 gamma[kSLAB_GROUPS];
        uint4 beta[kSLAB_GROUPS];
    };

    //! Columns of the residual stream that this block computes.
    __device__ __forceinline__ int ownColumns() const
    {
        return mShares.selfOutput.tiles * kTILE;
    }

    //! Fetches gamma and beta: for the fragments into registers, for the own columns into shared memory.
    __device__ __forceinline__ Norm loadNorm(int index)
    {
        int const d = mShape.dModel;
        T const* const gamma = static_cast<T const*>(mParams.norms) + static_cast<int64_t>(index) * 2 * d;
        T const* const beta = gamma + d;
        Norm norm;
#pragma unroll
        for (int i = 0; i < kSLAB_GROUPS; ++i)
        {
            int const input = inputOf(i, 0);
            norm.gamma[i] = input < d ? loadConstant(gamma + input) : zeros();
            norm.beta[i] = input < d ? loadConstant(beta + input) : zeros();
        }
        int const column = mRank * ownColumns() + mThread;
        if (mThread < ownColumns() && column < d)
        {
            mShared.ownScale[mThread][0] = toFloat(gamma[column]);
            mShared.ownScale[mThread][1] = toFloat(beta[column]);
        }
        return norm;
    }

    //! Inputs of a row that `warp` holds.
    __device__ __forceinline__ int inputsOf(int warp) const
    {
        return max(0, mShape.dModel / kGROUP - warp + kWARPS - 1) / kWARPS * kGROUP;
    }

    //! Mean and 1 / standard deviation of a row, out of the warps' parts; in a fixed order, so equal in all blocks.
    __device__ __forceinline__ float2 moments(int row) const
    {
        float const inverseWidth = 1.0F / static_cast<float>(mShape.dModel);
        float mean = 0.0F;
#pragma unroll
        for (int warp = 0; warp < kWARPS; ++warp)
        {
            mean += static_cast<float>(inputsOf(warp)) * mShared.statistics[row][warp].x;
        }
        mean *= inverseWidth;
        float squares = 0.0F;
#pragma unroll
        for (int warp = 0; warp < kWARPS; ++warp)
        {
            float2 const part = mShared.statistics[row][warp];
            float const distance = part.x - mean;
            squares += part.y + static_cast<float>(inputsOf(warp)) * distance * distance;
        }
        return make_float2(mean, rsqrtf(squares * inverseWidth + kEPSILON));
    }

    template <int kTILES>
    __device__ __forceinline__ void normalize(Fragments<kTILES, 1>& rows, Norm const& norm, int numRows)
    {
        int const inputs = inputsOf(mWarp);
        float const inverse = inputs > 0 ? 1.0F / static_cast<float>(inputs) : 0.0F;
#pragma unroll
        for (int m = 0; m < kTILES; ++m)
        {
#pragma unroll
            for (int half = 0; half < 2; ++half)
            {
                int const row = m * 16 + half * 8 + mLane / 4;
                float sum = 0.0F;
#pragma unroll
                for (int i = 0; i < kSLAB_GROUPS; ++i)
                {
                    auto const x = Pack<T>::fromBits(rows.rows[m][half][i]);
#pragma unroll
                    for (int k = 0; k < 8; ++k)
                    {
                        sum += x.values[k];
                    }
                }
                float const mean = groupSum<4>(sum) * inverse;
                float squares = 0.0F;
#pragma unroll
                for (int i = 0; i < kSLAB_GROUPS; ++i)
                {
                    auto const x = Pack<T>::fromBits(rows.rows[m][half][i]);
                    if (inputOf(i, 0) < mShape.dModel)
                    {
#pragma unroll
                        for (int k = 0; k < 8; ++k)
                        {
                            squares += (x.values[k] - mean) * (x.values[k] - mean);
                        }
                    }
                }
                squares = groupSum<4>(squares);
                if (mLane % 4 == 0 && row < numRows)
                {
                    mShared.statistics[row][mWarp] = make_float2(mean, squares);
                }
            }
        }
        sync();
#pragma unroll
        for (int m = 0; m < kTILES; ++m)
        {
#pragma unroll
            for (int half = 0; half < 2; ++half)
            {
                int const row = m * 16 + half * 8 + mLane / 4;
                if (row >= numRows)
                {
                    continue;
                }
                float2 const moment = moments(row);
#pragma unroll
                for (int i = 0; i < kSLAB_GROUPS; ++i)
                {
                    auto x = Pack<T>::fromBits(rows.rows[m][half][i]);
                    auto const gamma = Pack<T>::fromBits(norm.gamma[i]);
                    auto const beta = Pack<T>::fromBits(norm.beta[i]);
#pragma unroll
                    for (int k = 0; k < 8; ++k)
                    {
                        x.values[k] = (x.values[k] - moment.x) * moment.y * gamma.values[k] + beta.values[k];
                    }
                    rows.rows[m][half][i] = inputOf(i, 0) < mShape.dModel ? x.toBits() : zeros();
                }
            }
        }
    }

    //! What the next residual sum adds to; after normalize(), whose statistics it uses.
    __device__ __forceinline__ void normalizeOwn()
    {
        int const columns = ownColumns();
#pragma unroll 1
        for (int i = mThread; i < mRows * columns; i += kTHREADS)
        {
            float2 const moment = moments(i / columns);
            float const(&scale)[2] = mShared.ownScale[i % columns];
            mShared.own[i] = rounded<T>((mShared.own[i] - moment.x) * moment.y * scale[0] + scale[1]);
        }
    }

    // ---- products ----

    //! sums += rows * this warp's groups of the slab at `weights`, which is slab `slab` of the fragments.
    template <int kTILES, int kSLABS>
    __device__ __forceinline__ void multiply(float (&sums)[kTILES][4], Fragments<kTILES, kSLABS> const& fragments,
        int slab, uint8_t const* weights, int groups) const
    {
#pragma unroll
        for (int s = 0; s < kSLABS; ++s)
        {
            if (s != slab)
            {
                continue; // picks registers by a compile-time index
            }
            uint4 w[kSLAB_GROUPS];
#pragma unroll
            for (int i = 0; i < kSLAB_GROUPS; ++i)
            {
                int const group = i * kWARPS + mWarp;
                w[i] = group < groups ? reinterpret_cast<uint4 const*>(weights)[group * kWARP_SIZE + mLane] : zeros();
            }
#pragma unroll
            for (int i = 0; i < kSLAB_GROUPS; ++i)
            {
                if (i * kWARPS + mWarp < groups)
                {
#pragma unroll
                    for (int m = 0; m < kTILES; ++m)
                    {
                        uint4 const low = fragments.rows[m][0][s * kSLAB_GROUPS + i];
                        uint4 const high = fragments.rows[m][1][s * kSLAB_GROUPS + i];
                        multiplyAdd<T>(sums[m], {low.x, high.x, low.y, high.y}, w[i].x, w[i].y);
                        multiplyAdd<T>(sums[m], {low.z, high.z, low.w, high.w}, w[i].z, w[i].w);
                    }
                }
            }
        }
    }

    //! This block's share of rows * weights^T + biases. The warps share out the inputs, so every activation is loaded once a
    //! block; their sums are added in order. `store(row, column, value, slot)` gets each result: `column` counts the outputs
    //! of the share; a thread's `slot`, 0 or 1, always has the same row.
    //! `load(slab)` fetches the fragments from that slab on, again for each tile when they do not hold all slabs.
    template <int kSLOT_UNROLL, int kTILES, int kSLABS, typename Load, typename Store>
    __device__ __forceinline__ void productOf(Fragments<kTILES, kSLABS> const& fragments, int numRows, Share const& share,
        Load const& load, Store const& store)
    {
        constexpr int kPASS = kPARTIALS / kTILES;
        int const slabs = share.slabs();
        int const stageTiles = share.stageTiles();
        int const tileBytes = share.tileBytes();
        int inStage = 0;
#pragma unroll 1
        for (int first = 0; first < share.tiles; first += kPASS)
        {
            int const count = min(kPASS, share.tiles - first);
#pragma unroll 1
            for (int i = 0; i < count; ++i)
            {
                float sums[kTILES][4] = {};
#pragma unroll 1
                for (int slab = 0; slab < slabs; ++slab)
                {
                    if (slab % kSLABS == 0 && (slabs > kSLABS || first + i == 0))
                    {
                        load(slab);
                    }
                    if (inStage == 0)
                    {
                        mReader.wait();
                    }
                    int const groups = min(kSLAB, share.depth - slab * kSLAB) / kGROUP;
                    uint8_t const* const weights = mShared.stages[0] + mReader.offset() + inStage * tileBytes;
                    multiply(sums, fragments, slab % kSLABS, weights, groups);
                    if (mWarp == 0 && slab == slabs - 1)
                    {
                        float2 const bias
                            = reinterpret_cast<float2 const*>(weights + groups * kGROUP_BYTES)[mLane % 4];
#pragma unroll
                        for (int m = 0; m < kTILES; ++m)
                        {
                            sums[m][0] += bias.x;
                            sums[m][1] += bias.y;
                            sums[m][2] += bias.x;
                            sums[m][3] += bias.y;
                        }
                    }
                    if (++inStage == stageTiles || first + i + 1 == share.tiles)
                    {
                        mReader.release();
                        inStage = 0;
                    }
                }
#pragma unroll
                for (int m = 0; m < kTILES; ++m)
                {
                    *reinterpret_cast<float4*>(mShared.partials[mBuffer][mWarp][i * kTILES + m][mLane])
                        = make_float4(sums[m][0], sums[m][1], sums[m][2], sums[m][3]);
                }
            }
            // One barrier a pass: the next pass writes the other buffer, and the one after it waits at the next barrier.
            sync();
#pragma unroll kSLOT_UNROLL
            for (int slot = 0; slot < kPARTIALS * 128 / kTHREADS; ++slot)
            {
                int const element = slot * kTHREADS + mThread;
                int const tile = element / 128;
                int const lane = element % 128 / 4;
                int const row = tile % kTILES * 16 + element % 4 / 2 * 8 + lane / 4;
                if (tile < count * kTILES && row < numRows)
                {
                    float value = 0.0F;
#pragma unroll
                    for (int warp = 0; warp < kWARPS; ++warp)
                    {
                        value += mShared.partials[mBuffer][warp][tile][lane][element % 4];
                    }
                    store(row, (first + tile / kTILES) * kTILE + lane % 4 * 2 + element % 2, value, slot);
                }
            }
            mBuffer ^= 1;
        }
    }

    //! The feed-forward's second product, whose rows are as long as F: as many slabs at once as registers allow.
    __device__ __forceinline__ void productOfHidden()
    {
        constexpr int kSLABS = kCLUSTER ? 2 : kPARTIALS / kROW_TILES;
        T const* const hidden = teamRows(mWorkspace.hidden, mShape.ffnDim);
        Fragments<kROW_TILES, kSLABS> rows;
        auto const load = [&](int slab) { loadRows(rows, hidden, mShape.ffnDim, mRows, slab); };
        productOf<1>(rows, mRows, mShares.fc2, load,
            [&](int row, int column, float value, int) { storeResidual(row, column, value); });
    }

    // ---- where results go ----

    //! Column `column` of this block's share among all outputs.
    __device__ __forceinline__ int outputOf(Share const& share, int column) const
    {
        return mRank * share.tiles * kTILE + column;
    }

    //! In a cluster: the head whose queries, keys and values this block computes, and which of the blocks that do it is.
    __device__ __forceinline__ int replicas() const
    {
        return mParams.plan.teamBlocks / mShape.numHeads;
    }

    __device__ __forceinline__ int ownHead() const
    {
        return mRank / replicas();
    }

    __device__ __forceinline__ int64_t cacheRow(int layer, int row, int head) const
    {
        return ((static_cast<int64_t>(layer) * mParams.batch + mRow0 + row) * mShape.numHeads + head)
            * mParams.maxSteps;
    }

    __device__ __forceinline__ void storeQkv(int layer, int step, int row, int column, float value)
    {
        int part;
        int head;
        int index; // within the head
        if constexpr (kCLUSTER)
        {
            part = column / mShape.headDim;
            head = ownHead();
            index = column % mShape.headDim;
        }
        else
        {
            int const output = outputOf(mShares.qkv, column);
            if (output >= 3 * mShape.dModel)
            {
                return;
            }
            part = output / mShape.dModel;
            head = output % mShape.dModel / mShape.headDim;
            index = output % mShape.headDim;
        }
        T const result = fromFloat<T>(value);
        if (part == 0)
        {
            queryOf(row, head)[index] = result;
        }
        else
        {
            T* const cache = pointer(part == 1 ? mWorkspace.keys : mWorkspace.values);
            cache[(cacheRow(layer, row, head) + step) * mShape.headDim + index] = result;
        }
    }

    //! The query [d] of one row and head: with the block that computed it, or for all to read.
    __device__ __forceinline__ T* queryOf(int row, int head) const
    {
        if constexpr (kCLUSTER)
        {
            return mShared.query + row * mShape.headDim;
        }
        else
        {
            return teamRows(mWorkspace.query, mShape.dModel) + row * mShape.dModel + head * mShape.headDim;
        }
    }

    __device__ __forceinline__ void storeQuery(int row, int column, float value)
    {
        if constexpr (kCLUSTER)
        {
            mShared.query[row * mShape.headDim + column] = fromFloat<T>(value);
        }
        else
        {
            int const output = outputOf(mShares.query, column);
            if (output < mShape.dModel)
            {
                queryOf(row, 0)[output] = fromFloat<T>(value);
            }
        }
    }

    //! x = normalised x + the product, both rounded to T as the model's addition has them.
    __device__ __forceinline__ void storeResidual(int row, int column, float value)
    {
        int const output = outputOf(mShares.selfOutput, column);
        if (output < mShape.dModel)
        {
            float& own = mShared.own[row * ownColumns() + column];
            own = rounded<T>(own + rounded<T>(value));
            teamRows(mWorkspace.residual, mShape.dModel)[row * mShape.dModel + output] = fromFloat<T>(own);
        }
    }

    __device__ __forceinline__ void storeHidden(int row, int column, float value)
    {
        int const output = outputOf(mShares.fc1, column);
        if (output < mShape.ffnDim)
        {
            float const x = rounded<T>(value);
            float const y = mShape.activation == Activation::kRELU ? (x < 0.0F ? 0.0F : x)
                                                                  : 0.5F * x * (1.0F + erff(x * kSQRT_HALF));
            teamRows(mWorkspace.hidden, mShape.ffnDim)[row * mShape.ffnDim + output] = fromFloat<T>(y);
        }
    }

    // ---- attention ----

    //! Blocks that share one row's keys in cross-attention. Depends on the batch alone, not on who has ended: a row's result
    //! does not change with its neighbours.
    __device__ __forceinline__ int splits() const
    {
        if constexpr (kCLUSTER)
        {
            return replicas();
        }
        else
        {
            return max(1, min(kMAX_SPLITS, mParams.plan.teamBlocks / (mRows * mShape.numHeads)));
        }
    }

    //! Attention of one row and head, a unit, falls to 1, 2, 4 or all 8 warps of a block: as many as leave none idle when a
    //! block has `units` of them.
    __device__ __forceinline__ static int warpsPerUnit(int units)
    {
        return units >= 8 ? 1 : units >= 4 ? 2 : units >= 2 ? 4 : 8;
    }

    struct Unit
    {
        int row;
        int head;
        int split;
    };

    //! Self-attention to the text so far, or cross-attention to the image.
    __device__ __forceinline__ void attend(bool text, int layer, int step)
    {
        int const headDim = mShape.headDim;
        int const heads = mShape.numHeads;
        int const active = mShared.numActive;
        int const numSplits = text ? 1 : splits();
        int const length = text ? step + 1 : mShape.sequenceLength;
        int const splitLength = divideUp(length, numSplits);
        int const capacity = text ? mParams.maxSteps : mShape.sequenceLength;
        T const* const keys = text ? pointer(mWorkspace.keys) + cacheRow(layer, -mRow0, 0) * headDim
                                   : static_cast<T const*>(mParams.crossKeys[layer]);
        T const* const values = text ? pointer(mWorkspace.values) + cacheRow(layer, -mRow0, 0) * headDim
                                     : static_cast<T const*>(mParams.crossValues[layer]);

        // This block's units are first, first + stride, ...; in a cluster its own head's, shared with the other blocks that
        // have it: by rows in the text, by keys in the image.
        int first = mRank;
        int stride = mParams.plan.teamBlocks;
        int units = active * heads * numSplits;
        int allUnits = mRows * heads * numSplits;
        if constexpr (kCLUSTER)
        {
            first = text ? mRank % replicas() : 0;
            stride = text ? replicas() : 1;
            units = active;
            allUnits = mRows;
        }
        auto const unitAt = [&](int unit)
        {
            return kCLUSTER ? Unit{mShared.activeRows[unit], ownHead(), text ? 0 : mRank % replicas()}
                            : Unit{mShared.activeRows[unit % active], unit / active % heads, unit / active / heads};
        };

        int const unitWarps = warpsPerUnit(divideUp(allUnits, stride));
        int const unitsAtOnce = kWARPS / unitWarps;
#pragma unroll 1
        for (int base = first; base < units; base += stride * unitsAtOnce)
        {
            int const mine = base + mWarp / unitWarps * stride;
            if (mine < units)
            {
                Unit const unit = unitAt(mine);
                int64_t const offset
                    = (static_cast<int64_t>(mRow0 + unit.row) * heads + unit.head) * capacity * headDim;
                int const begin = unit.split * splitLength;
                int const end = min(length, begin + splitLength);
                T const* const query = queryOf(unit.row, unit.head);
                if (headDim == 32)
                {
                    attendWarp<32>(query, keys + offset, values + offset, begin, end, mWarp % unitWarps, unitWarps);
                }
                else
                {
                    attendWarp<64>(query, keys + offset, values + offset, begin, end, mWarp % unitWarps, unitWarps);
                }
            }
            sync();
#pragma unroll 1
            for (int i = mThread; i < unitsAtOnce * headDim; i += kTHREADS)
            {
                int const slot = i / headDim;
                if (base + slot * stride < units)
                {
                    mergeWarps(unitAt(base + slot * stride), slot * unitWarps, unitWarps, i % headDim, numSplits);
                }
            }
            if (base + stride * unitsAtOnce < units)
            {
                sync();
            }
        }
    }

    //! One warp's part of a unit: keys `begin` + part, `begin` + part + parts, ... in sets of as many as the warp takes at
    //! once. A key's elements lie with kHEAD_DIM / 8 lanes, so a warp works on several keys, each with a running softmax of
    //! its own.
    template <int kHEAD_DIM>
    __device__ __forceinline__ void attendWarp(
        T const* query, T const* keys, T const* values, int begin, int end, int part, int parts)
    {
        constexpr int kLANES = kHEAD_DIM / 8;
        constexpr int kKEYS = kWARP_SIZE / kLANES; // a warp's at once
        constexpr int kUNROLL = 4;
        int const column = mLane % kLANES * 8;
        int const group = part * kKEYS + mLane / kLANES;
        int const stride = parts * kKEYS;

        uint4 queryBits;
        if constexpr (kCLUSTER)
        {
            queryBits = *reinterpret_cast<uint4 const*>(query + column);
        }
        else
        {
            queryBits = loadFresh(query + column);
        }
        auto scaledQuery = Pack<T>::fromBits(queryBits);
        float const scale = kLOG2_E * rsqrtf(static_cast<float>(kHEAD_DIM));
#pragma unroll
        for (int i = 0; i < 8; ++i)
        {
            scaledQuery.values[i] *= scale;
        }

        float maximum = -FLT_MAX;
        float sum = 0.0F;
        float context[8] = {};
        for (int base = begin; base < end; base += stride * kUNROLL)
        {
            uint4 keyBits[kUNROLL];
            uint4 valueBits[kUNROLL];
#pragma unroll
            for (int u = 0; u < kUNROLL; ++u)
            {
                // Beyond the end any key will do: it gets no weight.
                int64_t const row = min(base + u * stride + group, end - 1);
                keyBits[u] = loadFresh(keys + row * kHEAD_DIM + column);
                valueBits[u] = loadFresh(values + row * kHEAD_DIM + column);
            }
            float scores[kUNROLL];
            float newMaximum = maximum;
#pragma unroll
            for (int u = 0; u < kUNROLL; ++u)
            {
                auto const key = Pack<T>::fromBits(keyBits[u]);
                float score = 0.0F;
#pragma unroll
                for (int i = 0; i < 8; ++i)
                {
                    score += scaledQuery.values[i] * key.values[i];
                }
                score = groupSum<kLANES>(score);
                scores[u] = base + u * stride + group < end ? score : -INFINITY;
                newMaximum = fmaxf(newMaximum, scores[u]);
            }
            float const factor = exp2Approx(maximum - newMaximum);
            maximum = newMaximum;
            sum *= factor;
#pragma unroll
            for (int i = 0; i < 8; ++i)
            {
                context[i] *= factor;
            }
#pragma unroll
            for (int u = 0; u < kUNROLL; ++u)
            {
                auto const value = Pack<T>::fromBits(valueBits[u]);
                float const weight = exp2Approx(scores[u] - maximum);
                sum += weight;
#pragma unroll
                for (int i = 0; i < 8; ++i)
                {
                    context[i] += weight * value.values[i];
                }
            }
        }

        float warpMaximum = maximum;
#pragma unroll
        for (int offset = kLANES; offset < kWARP_SIZE; offset *= 2)
        {
            warpMaximum = fmaxf(warpMaximum, __shfl_xor_sync(kFULL_WARP, warpMaximum, offset));
        }
        float const factor = exp2Approx(maximum - warpMaximum);
        sum *= factor;
#pragma unroll
        for (int i = 0; i < 8; ++i)
        {
            context[i] *= factor;
        }
#pragma unroll
        for (int offset = kLANES; offset < kWARP_SIZE; offset *= 2)
        {
            sum += __shfl_xor_sync(kFULL_WARP, sum, offset);
#pragma unroll
            for (int i = 0; i < 8; ++i)
            {
                context[i] += __shfl_xor_sync(kFULL_WARP, context[i], offset);
            }
        }
        AttentionPartial& partial = mShared.attention[mWarp];
        if (mLane < kLANES)
        {
#pragma unroll
            for (int i = 0; i < 8; ++i)
            {
                partial.values[column + i] = context[i];
            }
        }
        if (mLane == 0)
        {
            partial.maximum = warpMaximum;
            partial.sum = sum;
        }
    }

    //! Adds up element `index` of a unit over its warps; leaves the context, or this block's part of it.
    __device__ __forceinline__ void mergeWarps(Unit unit, int firstWarp, int warps, int index, int numSplits)
    {
        float maximum = -FLT_MAX;
        for (int i = 0; i < warps; ++i)
        {
            maximum = fmaxf(maximum, mShared.attention[firstWarp + i].maximum);
        }
        float sum = 0.0F;
        float value = 0.0F;
        for (int i = 0; i < warps; ++i)
        {
            AttentionPartial const& partial = mShared.attention[firstWarp + i];
            float const factor = exp2Approx(partial.maximum - maximum);
            sum += factor * partial.sum;
            value += factor * partial.values[index];
        }
        int64_t const row = mRow0 + unit.row;
        int64_t const column = unit.head * mShape.headDim + index;
        if (numSplits == 1)
        {
            pointer(mWorkspace.context)[row * mShape.dModel + column] = fromFloat<T>(value / sum);
            return;
        }
        int64_t const splitRow = static_cast<int64_t>(unit.split) * mParams.batch + row;
        mWorkspace.splitContext[splitRow * mShape.dModel + column] = value;
        if (index == 0)
        {
            mWorkspace.splitScale[splitRow * mShape.numHeads + unit.head] = make_float2(maximum, sum);
        }
    }

    //! The context of cross-attention out of the blocks' parts: the block merges all rows in shared memory, then every warp
    //! takes its fragments. They lie in the half of `partials` that the next pass does not write.
    __device__ __forceinline__ void mergeSplits(Fragments<kROW_TILES, 1>& rows)
    {
        int const d = mShape.dModel;
        T* const merged = reinterpret_cast<T*>(mShared.partials[mBuffer ^ 1]);
        int const numSplits = splits();
#pragma unroll 1
        for (int i = mThread; i < mRows * d / 4; i += kTHREADS)
        {
            int const row = i * 4 / d;
            int const column = i * 4 % d;
            float2 scales[kMAX_SPLITS];
            float4 parts[kMAX_SPLITS];
            float maximum = -FLT_MAX;
#pragma unroll
            for (int split = 0; split < kMAX_SPLITS; ++split)
            {
                if (split < numSplits)
                {
                    int64_t const splitRow = static_cast<int64_t>(split) * mParams.batch + mRow0 + row;
                    scales[split] = __ldcg(
                        mWorkspace.splitScale + splitRow * mShape.numHeads + column / mShape.headDim);
                    parts[split]
                        = __ldcg(reinterpret_cast<float4 const*>(mWorkspace.splitContext + splitRow * d + column));
                }
            }
#pragma unroll
            for (int split = 0; split < kMAX_SPLITS; ++split)
            {
                if (split < numSplits)
                {
                    maximum = fmaxf(maximum, scales[split].x);
                }
            }
            float sum = 0.0F;
            float4 context = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
#pragma unroll
            for (int split = 0; split < kMAX_SPLITS; ++split)
            {
                if (split < numSplits)
                {
                    float const factor = exp2Approx(scales[split].x - maximum);
                    sum += factor * scales[split].y;
                    context.x += factor * parts[split].x;
                    context.y += factor * parts[split].y;
                    context.z += factor * parts[split].z;
                    context.w += factor * parts[split].w;
                }
            }
            *reinterpret_cast<uint2*>(merged + i * 4)
                = make_uint2(packPair<T>(context.x / sum, context.y / sum), packPair<T>(context.z / sum, context.w / sum));
        }
        sync();
        fill(rows, d, mRows, 0,
            [&](int row, int input) { return *reinterpret_cast<uint4 const*>(merged + row * d + input); });
    }

    // ---- the head ----

    //! This block's part of the vocabulary, for all rows of the batch: leaves one candidate a row.
    __device__ __forceinline__ void scoreVocabulary(Norm const& norm)
    {
        int const batch = mParams.batch;
        int const firstToken = blockIdx.x * mShares.head.tiles * kTILE;
        Fragments<kHEAD_ROW_TILES, 1> rows;
        loadRows(rows, pointer(mWorkspace.residual), mShape.dModel, batch);
        normalize(rows, norm, batch);

        Candidate best[2] = {Candidate::none(), Candidate::none()};
        productOf<2>(
            rows, batch, mShares.head, [](int) {},
            [&](int, int column, float logit, int slot)
            {
                int const token = firstToken + column;
                if (token < mShape.vocabSize)
                {
                    best[slot].merge(logit, token, 1.0F);
                }
            });

        // Lanes with the same row differ in bits 0 (the column's parity), 2 and 3 (the column).
        auto* const elements = reinterpret_cast<Candidate*>(mShared.partials[mBuffer]); // which no warp reads any more
#pragma unroll
        for (int slot = 0; slot < 2; ++slot)
        {
            best[slot].mergeAcross<1>();
            best[slot].mergeAcross<4>();
            best[slot].mergeAcross<8>();
            elements[slot * kTHREADS + mThread] = best[slot];
        }
        sync();
        if (mThread < batch)
        {
            constexpr int kPASS = kPARTIALS / kHEAD_ROW_TILES;
            Candidate result = Candidate::none();
#pragma unroll
            for (int i = 0; i < kPASS; ++i)
            {
                int const tile = i * kHEAD_ROW_TILES + mThread / 16;
                Candidate const part = elements[tile * 128 + mThread % 8 * 16 + mThread % 16 / 8 * 2];
                result.merge(part.maximum, part.token, part.sum);
            }
            mWorkspace.candidates[static_cast<int64_t>(mThread) * gridDim.x + blockIdx.x] = result;
        }
    }

    //! The next token of each of the team's rows. All blocks of a team come to the same result; its first writes it out.
    __device__ __forceinline__ void choose(int step)
    {
        int const blocks = gridDim.x;
#pragma unroll 1
        for (int row = mWarp; row < mRows; row += kWARPS)
        {
            Candidate result = Candidate::none();
            auto const* const candidates
                = reinterpret_cast<float4 const*>(mWorkspace.candidates) + static_cast<int64_t>(mRow0 + row) * blocks;
#pragma unroll 1
            for (int block = mLane; block < blocks; block += kWARP_SIZE)
            {
                float4 const part = __ldcg(candidates + block);
                result.merge(part.x, __float_as_int(part.y), part.z);
            }
            result.mergeAcross<1>();
            result.mergeAcross<2>();
            result.mergeAcross<4>();
            result.mergeAcross<8>();
            result.mergeAcross<16>();
            if (mLane == 0)
            {
                bool const ended = mShared.ended[row] != 0;
                // Without any candidate (all logits NaN) the row goes on with padding.
                int const token = ended || result.token >= mShape.vocabSize ? mParams.padId : result.token;
                bool ends = ended;
                for (int i = 0; i < mParams.numEndIds; ++i)
                {
                    ends = ends || token == mParams.endIds[i];
                }
                mShared.tokens[row] = token;
                mShared.ended[row] = ends;
                if (mRank == 0)
                {
                    tokenIds(row)[step + 1] = token;
                    logProbs(row)[step] = ended ? 0.0F : -logf(result.sum);
                }
            }
        }
        sync();
        if (mThread < mRows)
        {
            int before = 0;
            for (int row = 0; row < mThread; ++row)
            {
                before += mShared.ended[row] == 0;
            }
            bool const active = mShared.ended[mThread] == 0;
            if (active)
            {
                mShared.activeRows[before] = mThread;
            }
            if (mThread == mRows - 1)
            {
                mShared.numActive = before + active;
            }
        }
        sync();
    }

    static constexpr float kEPSILON = 1e-5F; // of torch.nn.LayerNorm
    static constexpr float kSQRT_HALF = 0.70710678F;

    GreedyDecodeParams const& mParams;
    GreedyDecoderShape const& mShape;
    Workspace const& mWorkspace;
    Shared<T>& mShared;
    Shares const mShares;
    int const mTeam;
    int const mRank; // in the team
    int const mRow0; // of the team in the batch
    int const mRows; // of the team
    int const mThread;
    int const mWarp;
    int const mLane;
    StreamReader mReader{};
    int mBuffer = 0; // of `partials`, for the next pass
    uint32_t mTeamParity = 0;
    unsigned mGridTarget = 0;
};

template <typename T, bool kCLUSTER, int kROW_TILES, int kHEAD_ROW_TILES>
__global__ void __launch_bounds__(kBLOCK_THREADS, 1) greedyDecodeKernel(__grid_constant__ Arguments const arguments)
{
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ __align__(128) uint8_t memory[];
    Decoder<T, kCLUSTER, kROW_TILES, kHEAD_ROW_TILES>(arguments, *reinterpret_cast<Shared<T>*>(memory)).run();
#endif
}

} // namespace trocr::greedy
