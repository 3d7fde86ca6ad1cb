#pragma once

#include <cstdint>

//! Sizes of the team decoder, for kernel and host alike. All are fixed: a narrower decoder is padded with zeros, so
//! that the kernel's addresses are constants. T has two bytes.

namespace trocr::decoder
{

constexpr int kTEAM_BLOCKS = 8;  //!< of a team, a cluster: one a head
constexpr int kHEAD = 32;        //!< head size
constexpr int kWIDTH = 256;      //!< of the hidden state
constexpr int kINNER = 128;      //!< feed-forward columns of a block
constexpr int kMAX_LAYERS = 16;
constexpr int kMAX_ROWS = 8;    //!< of a team
constexpr int kMAX_SLOTS = 64;  //!< rows of all teams
constexpr int kMAX_TEAMS = 16;
constexpr int kMAX_BLOCKS = kMAX_TEAMS * kTEAM_BLOCKS;

// Weights come in units of 16 outputs by 32 inputs, the ring's slots hold 16 units, or as many keys as values: 128 of
// T, 256 of e4m3.
constexpr int kUNIT_BYTES = 1024;
constexpr int kSLOT_UNITS = 16;
constexpr int kSLOT_BYTES = kSLOT_UNITS * kUNIT_BYTES;
constexpr int kRING = 8;            //!< slots, a power of two
constexpr int kRING_OFFSET = 1024;  //!< in shared memory
constexpr int kMAX_KEPT = 4;        //!< pieces of the head that a block may keep, each of a slot's size

//! Slots of a layer's products in the order of the stream: query, key and value; output; query of cross-attention;
//! output; both of the feed-forward.
constexpr int kQKV_SLOTS = 3 * kHEAD / 16 * (kWIDTH / 32) / kSLOT_UNITS;
constexpr int kOUT_SLOTS = kWIDTH / 16 / kSLOT_UNITS;
constexpr int kQUERY_SLOTS = kHEAD / 16 * (kWIDTH / 32) / kSLOT_UNITS;
constexpr int kINNER_SLOTS = kINNER / 16 * (kWIDTH / 32) / kSLOT_UNITS;
constexpr int kLAYER_SLOTS = kQKV_SLOTS + 2 * kOUT_SLOTS + kQUERY_SLOTS + 2 * kINNER_SLOTS;
constexpr int kHEAD_TOKENS = 2 * 16;  //!< of a slot of the head: two tiles of 16 tokens, all inputs

//! A layer's constants in a block: float32 biases of query, key and value [3, 32], of cross-attention's query [32], of
//! the first feed-forward product [128], of the three products that end in a residual [3, 256]; then T norms [3, 2,
//! 256].
constexpr int kCONSTANT_FLOATS = 4 * kHEAD + kINNER + 3 * kWIDTH;
constexpr int kCONSTANT_BYTES = kCONSTANT_FLOATS * 4 + 6 * kWIDTH * 2;

constexpr int kTEAM_WARPS = 16;  //!< that compute

//! Bytes from one row of activations to the next: 64 behind a multiple of 128, so that eight lanes that read 16 bytes
//! each of two rows meet no bank twice.
constexpr int pitchOf(int width)
{
    return (width * 2 + 63) / 128 * 128 + 64;
}

constexpr int kPITCH = pitchOf(kWIDTH);
constexpr int kCONTEXT_PITCH = pitchOf(kHEAD);
constexpr int kINNER_PITCH = pitchOf(kINNER);

//! Offsets in a block's shared memory for teams of up to kROWS rows. What the layers need and what the head needs share
//! their place.
template <int kROWS>
struct TeamLayout
{
    static constexpr int kHEAD_ROWS = kROWS * kMAX_TEAMS < kMAX_SLOTS ? kROWS * kMAX_TEAMS : kMAX_SLOTS;
    static constexpr int kSELF_WARPS = kROWS >= 4 ? kTEAM_WARPS / kROWS : 4;  //!< of a row in self-attention

    static constexpr int state = 512;  // behind the barriers
    static constexpr int ring = kRING_OFFSET;
    static constexpr int constants = ring + kRING * kSLOT_BYTES;  // of two layers
    static constexpr int hidden = constants + 2 * kCONSTANT_BYTES;
    static constexpr int stage = hidden + kROWS * kPITCH;
    static constexpr int statistics = stage + kWIDTH * 2;
    // One hop: from every block, every row, twice. Two hops: from every block, the row that is this block's.
    static constexpr int receive = statistics + kTEAM_WARPS * 8;
    static constexpr int qkv = receive + kTEAM_BLOCKS * kWIDTH * 4 * (kROWS <= 2 ? 2 * kROWS : 1);
    static constexpr int context = qkv + kROWS * 3 * kHEAD * 2;
    static constexpr int inner = context + kROWS * kCONTEXT_PITCH;
    static constexpr int partial = inner + kROWS * kINNER_PITCH;
    static constexpr int scales = partial + kROWS * kTEAM_WARPS * kHEAD * 4;
    static constexpr int scratch = scales + kROWS * kTEAM_WARPS * 8;  // 16 keys and values of a warp
    static constexpr int layersEnd = scratch + kROWS * kSELF_WARPS * 2 * 16 * kHEAD * 2;
    static constexpr int headRows = qkv;
    static constexpr int headChoices = headRows + kHEAD_ROWS * kPITCH;
    static constexpr int headEnd = headChoices + kHEAD_ROWS * kTEAM_WARPS * 12;
    static constexpr int kept = ((layersEnd > headEnd ? layersEnd : headEnd) + 127) / 128 * 128;
    static constexpr int kROOM = (227 * 1024 - kept) / kSLOT_BYTES;
    static constexpr int kKEPT = kROOM < kMAX_KEPT ? kROOM : kMAX_KEPT;  //!< pieces of the head
    static constexpr int bytes = kept + kKEPT * kSLOT_BYTES;

    static_assert(kROOM >= 0);
    static_assert(hidden % 16 == 0 && stage % 16 == 0 && receive % 16 == 0 && qkv % 16 == 0 && context % 16 == 0 &&
                  partial % 16 == 0 && scratch % 16 == 0);
};

//! Shared memory of a block that has a part of the head and nothing else: pieces that stay, in the place of the ring
//! and of what layers need, and the rows. As many more stay in the registers of its warps, half a piece each.
struct HeadLayout
{
    static constexpr int kCHOICE_BYTES = 12;
    static constexpr int kROW_BYTES = kPITCH + kTEAM_WARPS * kCHOICE_BYTES;
    static constexpr int kSHARED_PIECES = (227 * 1024 - kRING_OFFSET - kMAX_TEAMS * kROW_BYTES) / kSLOT_BYTES;
    static constexpr int kREGISTER_PIECES = kTEAM_WARPS / 2;
    static constexpr int kPIECES = kREGISTER_PIECES + kSHARED_PIECES;

    static constexpr int pieces = kRING_OFFSET;
    static constexpr int rows = pieces + kSHARED_PIECES * kSLOT_BYTES;
    static constexpr int choices = rows + kMAX_TEAMS * kPITCH;
    static constexpr int bytes = choices + kMAX_TEAMS * kTEAM_WARPS * kCHOICE_BYTES;
};

}  // namespace trocr::decoder
