#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

//! Beam search on the device: what comes between two steps of a decoder that leaves logits for every row. The n rows
//! of an image are its running hypotheses; README.md, "Beams".

namespace trocr::decoder
{

constexpr int kMAX_BEAMS = 8;        //!< of an image
constexpr int kMAX_CANDIDATES = 32;  //!< of an image and step
constexpr int kLIST_TOKENS = 1024;   //!< of the vocabulary, ranked by one warp
constexpr int kMAX_LISTS = 128;      //!< of a row

//! What a row works on.
struct RowState
{
    int line;      //!< -1: idle
    int position;  //!< of its newest token
};

//! A token of a row, or a row's extension by it.
struct Candidate
{
    float score;
    int token;  //!< kNO_TOKEN: none
};

constexpr int kNO_TOKEN = 0x7fffffff;

//! One search and its state. Rows are images * beams, all at the same position.
struct BeamSearch
{
    int images;
    int beams;       //!< n
    int candidates;  //!< kept of an image and step: max(2, 1 + ends of text) * n
    int vocabulary;  //!< V
    int lists;       //!< ceil(V / kLIST_TOKENS)
    int capacity;    //!< tokens of a row of the cache
    int maxNewTokens;
    int noRepeatNgram;  //!< 0: any sequence may come again
    bool stopsEarly;    //!< an image ends with its n-th complete hypothesis
    bool hopesLong;     //!< a running hypothesis is compared as if it had maxNewTokens
    int startId;
    int padId;
    int endIds[8];
    int ends;
    float const* penalties;  //!< [1 + maxNewTokens]: a hypothesis of so many tokens is worth its score divided by it

    float* logits;          //!< [rows, V], what the step leaves
    Candidate* ranked;      //!< [rows, lists, candidates], best first; scores are logits
    float2* normalizers;    //!< [rows, lists]: most of the list's logits, sum of exp(logit - most)
    RowState* rows;         //!< [rows]: the image, -1 once its result is certain; the number of tokens so far
    int* inputs;            //!< [rows], the newest token
    int* owners;            //!< [rows, capacity]: the row whose cache has the hypothesis's key of a position
    int* running;           //!< [rows, 1 + maxNewTokens], tokens of the running hypotheses, the start token first
    float* runningScores;   //!< [rows], their log-probabilities, best first
    int* complete;          //!< [rows, maxNewTokens], tokens of the complete ones
    float* completeScores;  //!< [rows], log-probabilities divided by penalties, best first
    int* completeLengths;   //!< [rows]; 0: the place is free
    int* open;              //!< images whose result is not certain
    int* arrived;           //!< blocks that are done with a step

    int* tokens;      //!< [images, maxNewTokens], padded with padId
    float* logProbs;  //!< [images], log-probability of all tokens
    int* lengths;     //!< [images]
};

//! Every image at its start token.
cudaError_t beginBeams(BeamSearch const& search, cudaStream_t stream);

//! The best tokens of every part of every row's vocabulary, from its logits.
cudaError_t rankTokens(BeamSearch const& search, cudaStream_t stream);

//! Ends a step: the best of the ranked tokens extend their rows' hypotheses. Sets the WHILE node's condition: whether
//! an image is open.
cudaError_t advanceBeams(BeamSearch const& search, unsigned long long conditional, cudaStream_t stream);

}  // namespace trocr::decoder
