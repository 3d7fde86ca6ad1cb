#include "common/device.cuh"
#include "common/launch.h"
#include "common/sm90.cuh"
#include "device_decoder/beams.h"

namespace trocr::decoder
{

namespace
{

constexpr int kBLOCK = 256;
constexpr int kBLOCK_WARPS = kBLOCK / kWARP_SIZE;
constexpr int kMINE = kLIST_TOKENS / kWARP_SIZE;  // tokens of a lane
constexpr float kIMPOSSIBLE = -1.0e9F;            // as in Hugging Face's search

__device__ __forceinline__ float impossibleLogit()
{
    return __int_as_float(static_cast<int>(0xff800000U));  // -infinity
}

//! Floats in the order of unsigned integers; none is 0, which stands for no token.
__device__ __forceinline__ unsigned orderOf(float value)
{
    unsigned const bits = __float_as_uint(value);
    return (bits & 0x80000000U) != 0 ? ~bits : bits | 0x80000000U;
}

__device__ __forceinline__ float valueOf(unsigned order)
{
    return __uint_as_float((order & 0x80000000U) != 0 ? order & 0x7fffffffU : ~order);
}

//! The best of a warp's candidates, the lowest token among equals; kNO_TOKEN where no lane has any (order 0).
__device__ __forceinline__ Candidate bestOf(unsigned order, int token)
{
    unsigned const best = __reduce_max_sync(kFULL_WARP, order);
    int const lowest = __reduce_min_sync(kFULL_WARP, order == best ? token : kNO_TOKEN);
    return {best == 0 ? impossibleLogit() : valueOf(best), best == 0 ? kNO_TOKEN : lowest};
}

__global__ void __launch_bounds__(kBLOCK) begin(BeamSearch const s)
{
    int const image = blockIdx.x;
    if (threadIdx.x < s.beams)
    {
        int const row = image * s.beams + threadIdx.x;
        s.rows[row] = {image, 0};
        s.inputs[row] = s.startId;
        s.running[static_cast<size_t>(row) * (1 + s.maxNewTokens)] = s.startId;
        s.runningScores[row] = threadIdx.x == 0 ? 0.0F : kIMPOSSIBLE;  // they are equal: one is to branch
        s.completeScores[row] = kIMPOSSIBLE;
        s.completeLengths[row] = 0;
    }
    // Every step moves the tokens of all places, those that are free too.
    int const places = s.beams * s.maxNewTokens;
    for (int i = threadIdx.x; i < places; i += kBLOCK)
    {
        s.complete[static_cast<size_t>(image) * places + i] = s.padId;
    }
    if (image == 0 && threadIdx.x == 0)
    {
        *s.open = s.images;
        *s.arrived = 0;
    }
}

//! A warp ranks one list: tokens lane, lane + 32, ... from the list's first.
__global__ void __launch_bounds__(kBLOCK) rank(BeamSearch const s)
{
    int const lane = threadIdx.x % kWARP_SIZE;
    int const list = blockIdx.x * kBLOCK_WARPS + threadIdx.x / kWARP_SIZE;
    int const row = blockIdx.y;
    RowState const state = s.rows[row];
    if (list >= s.lists || state.line < 0)
    {
        return;
    }
    int const first = list * kLIST_TOKENS + lane;
    float const* const logits = s.logits + static_cast<size_t>(row) * s.vocabulary;
    unsigned orders[kMINE];
    float most = impossibleLogit();
#pragma unroll
    for (int i = 0; i < kMINE; ++i)
    {
        int const token = first + i * kWARP_SIZE;
        float const logit = token < s.vocabulary ? logits[token] : impossibleLogit();
        orders[i] = token < s.vocabulary ? orderOf(logit) : 0;
        most = fmaxf(most, logit);
    }
    most = groupMax(most);
    float total = 0.0F;
#pragma unroll
    for (int i = 0; i < kMINE; ++i)
    {
        total += orders[i] == 0 ? 0.0F : exp2f((valueOf(orders[i]) - most) * kLOG2_E);
    }
    total = groupSum(total);
    size_t const at = static_cast<size_t>(row) * s.lists + list;
    if (lane == 0)
    {
        s.normalizers[at] = {most, total};
    }

    // Tokens that would repeat a sequence of noRepeatNgram tokens: behind every place where its others stand.
    int const others = s.noRepeatNgram - 1;
    if (others >= 0)
    {
        int const* const text = s.running + static_cast<size_t>(row) * (1 + s.maxNewTokens);
        int const* const newest = text + state.position + 1 - others;
#pragma unroll 1
        for (int start = 0; start + others <= state.position; start += kWARP_SIZE)
        {
            int const mine = start + lane;
            bool repeats = mine + others <= state.position;
            for (int i = 0; i < others && repeats; ++i)
            {
                repeats = text[mine + i] == newest[i];
            }
            int const token = repeats ? text[mine + others] : 0;
            for (unsigned found = __ballot_sync(kFULL_WARP, repeats); found != 0; found &= found - 1)
            {
                int const banned = __shfl_sync(kFULL_WARP, token, __ffs(static_cast<int>(found)) - 1) - first;
#pragma unroll
                for (int i = 0; i < kMINE; ++i)
                {
                    orders[i] = banned == i * kWARP_SIZE ? orderOf(impossibleLogit()) : orders[i];
                }
            }
        }
    }

#pragma unroll 1
    for (int i = 0; i < s.candidates; ++i)
    {
        unsigned order = 0;
        int token = kNO_TOKEN;
#pragma unroll
        for (int j = 0; j < kMINE; ++j)
        {
            token = orders[j] > order ? first + j * kWARP_SIZE : token;
            order = max(order, orders[j]);
        }
        Candidate const best = bestOf(order, token);
        if (lane == 0)
        {
            s.ranked[at * s.candidates + i] = best;
        }
#pragma unroll
        for (int j = 0; j < kMINE; ++j)
        {
            orders[j] = best.token == first + j * kWARP_SIZE ? 0 : orders[j];
        }
    }
}

//! What a step of one image leads to, in the order of Hugging Face's search (runtime/beam_search.py).
struct BeamStep
{
    int parents[kMAX_BEAMS];  //!< of the next running hypotheses: a beam, and the token that extends it
    int tokens[kMAX_BEAMS];
    float scores[kMAX_BEAMS];

    int sources[kMAX_BEAMS];  //!< of the next complete ones: place i for i < n, the beam i - n, which ends with
    int endTokens[kMAX_BEAMS];
    float completeScores[kMAX_BEAMS];
    int lengths[kMAX_BEAMS];  //!< 0: free
    bool closed;              //!< the first complete one is the result
};

//! A step of one image from its rows' extensions, best first; `length`: tokens with the new one.
__device__ void step(BeamStep& next, BeamSearch const& s, Candidate const (*extensions)[kMAX_CANDIDATES], int length,
                     float const* completeScores, int const* completeLengths)
{
    int const beams = s.beams;
    int at[kMAX_BEAMS] = {};
    int running = 0;
    bool const isLast = length >= s.maxNewTokens;
    float const penalty = s.penalties[length];
    int complete = 0;
    for (int i = 0; i < beams; ++i)
    {
        next.lengths[i] = completeLengths[i];
        next.completeScores[i] = completeScores[i];
        next.sources[i] = i;
        next.parents[i] = i;  // where all end, none runs on
        next.tokens[i] = s.padId;
        next.scores[i] = kIMPOSSIBLE;
        complete += completeLengths[i] > 0 ? 1 : 0;
    }
    for (int i = 0; i < s.candidates; ++i)
    {
        int beam = 0;
        for (int other = 1; other < beams; ++other)
        {
            if (at[other] < s.candidates &&
                (at[beam] >= s.candidates || extensions[other][at[other]].score > extensions[beam][at[beam]].score))
            {
                beam = other;
            }
        }
        Candidate const best = extensions[beam][at[beam]++];
        bool ends = isLast;
        for (int end = 0; end < s.ends; ++end)
        {
            ends = ends || best.token == s.endIds[end];
        }
        if (!ends && running < beams)
        {
            next.parents[running] = beam;
            next.tokens[running] = best.token;
            next.scores[running] = best.score;
            ++running;
        }
        if (ends && i < beams)
        {
            // Into its place among the complete ones, behind equals; the last of n falls out.
            float const score = best.score / penalty;
            int place = beams;
            while (place > 0 && (next.lengths[place - 1] == 0 || score > next.completeScores[place - 1]))
            {
                --place;
            }
            for (int moved = beams - 1; moved > place; --moved)
            {
                next.lengths[moved] = next.lengths[moved - 1];
                next.completeScores[moved] = next.completeScores[moved - 1];
                next.sources[moved] = next.sources[moved - 1];
                next.endTokens[moved] = next.endTokens[moved - 1];
            }
            if (place < beams)
            {
                next.lengths[place] = length;
                next.completeScores[place] = score;
                next.sources[place] = beams + beam;
                next.endTokens[place] = best.token;
            }
            complete = min(beams, complete + 1);
        }
    }
    bool const isFull = complete == beams;
    float const hope = next.scores[0] / (s.hopesLong ? s.penalties[s.maxNewTokens] : penalty);
    next.closed = isLast || (isFull && (s.stopsEarly || !(hope > next.completeScores[beams - 1])));
}

//! A block an image.
__global__ void __launch_bounds__(kBLOCK) advance(BeamSearch const s, cudaGraphConditionalHandle conditional)
{
    __shared__ Candidate extensions[kMAX_BEAMS][kMAX_CANDIDATES];
    __shared__ BeamStep next;
    int const lane = threadIdx.x % kWARP_SIZE;
    int const beam = threadIdx.x / kWARP_SIZE;
    int const image = blockIdx.x;
    int const first = image * s.beams;
    RowState const state = s.rows[first];
    if (state.line >= 0)
    {
        if (beam < s.beams)
        {
            // A lane has up to four lists, and of each what is next in it.
            constexpr int kOF_A_LANE = kMAX_LISTS / kWARP_SIZE;
            size_t const lists = static_cast<size_t>(first + beam) * s.lists;
            Candidate heads[kOF_A_LANE];
            int places[kOF_A_LANE] = {};
            float most = impossibleLogit();
            float2 normalizers[kOF_A_LANE];
#pragma unroll
            for (int i = 0; i < kOF_A_LANE; ++i)
            {
                int const list = i * kWARP_SIZE + lane;
                bool const isThere = list < s.lists;
                heads[i] = isThere ? s.ranked[(lists + list) * s.candidates] : Candidate{0.0F, kNO_TOKEN};
                normalizers[i] = isThere ? s.normalizers[lists + list] : float2{impossibleLogit(), 0.0F};
                most = fmaxf(most, normalizers[i].x);
            }
            most = groupMax(most);
            float total = 0.0F;
#pragma unroll
            for (int i = 0; i < kOF_A_LANE; ++i)
            {
                total += normalizers[i].y * exp2f((normalizers[i].x - most) * kLOG2_E);
            }
            float const normalizer = most + logf(groupSum(total));
            float const score = s.runningScores[first + beam];
#pragma unroll 1
            for (int i = 0; i < s.candidates; ++i)
            {
                unsigned order = 0;
                int token = kNO_TOKEN;
                // Lists ascend with their tokens, so that of equals the lowest comes first.
#pragma unroll
                for (int j = 0; j < kOF_A_LANE; ++j)
                {
                    unsigned const its = heads[j].token == kNO_TOKEN ? 0 : orderOf(heads[j].score);
                    token = its > order ? heads[j].token : token;
                    order = max(order, its);
                }
                Candidate const best = bestOf(order, token);
                if (lane == 0)
                {
                    extensions[beam][i] = {best.score - normalizer + score, best.token};
                }
#pragma unroll
                for (int j = 0; j < kOF_A_LANE; ++j)
                {
                    if (best.token != kNO_TOKEN && heads[j].token == best.token)
                    {
                        ++places[j];
                        heads[j] = places[j] < s.candidates
                                       ? s.ranked[(lists + j * kWARP_SIZE + lane) * s.candidates + places[j]]
                                       : Candidate{0.0F, kNO_TOKEN};
                    }
                }
            }
        }
        __syncthreads();
        if (threadIdx.x == 0)
        {
            step(next, s, extensions, state.position + 1, s.completeScores + first, s.completeLengths + first);
        }
        __syncthreads();
        // Column by column: a thread reads all rows of one before it writes them.
        int const text = 1 + s.maxNewTokens;
        for (int column = threadIdx.x; column <= state.position; column += kBLOCK)
        {
            bool const isNew = column == state.position;
            int owners[kMAX_BEAMS];
            int running[kMAX_BEAMS];
            int complete[kMAX_BEAMS];
#pragma unroll
            for (int i = 0; i < kMAX_BEAMS; ++i)
            {
                if (i < s.beams)
                {
                    size_t const parent = first + next.parents[i];
                    owners[i] = isNew ? static_cast<int>(parent) : s.owners[parent * s.capacity + column];
                    running[i] = isNew ? next.tokens[i] : s.running[parent * text + column + 1];
                    int const from = next.sources[i];
                    size_t const row = first + (from < s.beams ? from : from - s.beams);
                    complete[i] = from < s.beams ? s.complete[row * s.maxNewTokens + column]
                                  : isNew        ? next.endTokens[i]
                                                 : s.running[row * text + column + 1];
                }
            }
#pragma unroll
            for (int i = 0; i < kMAX_BEAMS; ++i)
            {
                if (i < s.beams)
                {
                    size_t const row = first + i;
                    s.owners[row * s.capacity + column] = owners[i];
                    s.running[row * text + column + 1] = running[i];
                    s.complete[row * s.maxNewTokens + column] = complete[i];
                }
            }
        }
        __syncthreads();
        if (threadIdx.x < s.beams)
        {
            int const row = first + threadIdx.x;
            s.rows[row] = {next.closed ? -1 : state.line, state.position + 1};
            s.inputs[row] = next.tokens[threadIdx.x];
            s.runningScores[row] = next.scores[threadIdx.x];
            s.completeScores[row] = next.completeScores[threadIdx.x];
            s.completeLengths[row] = next.lengths[threadIdx.x];
        }
        if (next.closed)
        {
            int const length = next.lengths[0];
            for (int i = threadIdx.x; i < s.maxNewTokens; i += kBLOCK)
            {
                s.tokens[image * s.maxNewTokens + i] =
                    i < length ? s.complete[static_cast<size_t>(first) * s.maxNewTokens + i] : s.padId;
            }
            if (threadIdx.x == 0)
            {
                s.lengths[image] = length;
                s.logProbs[image] = next.completeScores[0] * s.penalties[length];
                atomicSub(s.open, 1);
            }
        }
    }
    if (threadIdx.x == 0)
    {
        // The block that arrives last knows what all have subtracted.
        if (sm90::countArrival(s.arrived) + 1 == static_cast<int>(gridDim.x))
        {
            *s.arrived = 0;
            cudaGraphSetConditional(conditional, __ldcg(s.open) > 0 ? 1U : 0U);
        }
    }
}

}  // namespace

cudaError_t beginBeams(BeamSearch const& search, cudaStream_t stream)
{
    return launch(begin, dim3(search.images), dim3(kBLOCK), stream, search);
}

cudaError_t rankTokens(BeamSearch const& search, cudaStream_t stream)
{
    return launch(rank, dim3(ceilDiv(search.lists, kBLOCK_WARPS), search.images * search.beams), dim3(kBLOCK), stream,
                  search);
}

cudaError_t advanceBeams(BeamSearch const& search, unsigned long long conditional, cudaStream_t stream)
{
    return launch(advance, dim3(search.images), dim3(kBLOCK), stream, search, conditional);
}

}  // namespace trocr::decoder
