#pragma once

#include <cstdint>

#include "greedy_decoder/team_layout.h"

//! Sizes of the wide decoder, for kernel and host alike. All are fixed, as the team decoder's: narrower decoders are
//! padded with zeros. T has two bytes.

namespace trocr::greedy::wide
{

constexpr int kWIDTH = 1024;
constexpr int kHEADS = 16;
constexpr int kHEAD = 64;
constexpr int kINNER = 4096;
constexpr int kSHARES = 128;    //!< of a layer's products: 8 columns each of the width
constexpr int kMIN_BLOCKS = 64;
constexpr int kMAX_BLOCKS = 160;
constexpr int kMAX_SLOTS = 16;  //!< rows at a time

//! A slot of the ring: the weights of 8 outputs and 1024 inputs, or keys or values of one head and line.
constexpr int kUNIT = 8;
constexpr int kSLOT_BYTES = kUNIT * kWIDTH * 2;
constexpr int kSLOT_KEYS = 128;
constexpr int kTURN_SLOTS = 6;  //!< of keys that are scored before their values are read

//! Slots of a share's weights in the order of the stream: query, key and value; output; query of cross-attention;
//! then, behind its keys and values, output; both products of the feed-forward.
constexpr int kINNER_TILES = kINNER / kSHARES / kUNIT;
constexpr int kFIRST_SLOTS = 3 + 1 + 1;
constexpr int kLAYER_SLOTS = kFIRST_SLOTS + 1 + kINNER_TILES + kINNER / kWIDTH;

//! A share's float32 biases, in the same order.
constexpr int kBIASES = (kFIRST_SLOTS + 1 + kINNER_TILES + 1) * kUNIT;

constexpr int kWARPS = 16;  //!< that compute
constexpr int kPITCH = pitchOf(kWIDTH);

//! A board is where the blocks leave what others are to read: of each row and share `words` words of 16 bytes. All
//! bits of a word are set until it is there.
struct Board
{
    int offset;  //!< in the exchange memory
    int pitch;   //!< bytes from row to row
    int share;   //!< from share to share
    int stride;  //!< from word to word
    int words;
};

//! Names of the boards. Of sums, float32, there are those of self-attention, cross-attention and feed-forward, and, of
//! the last layer, two in turn.
enum BoardName
{
    kQKV,
    kCONTEXTS,
    kCROSS_CONTEXTS,
    kQUERIES,
    kINNERS,
    kSUMS,
    kLAST_SUMS = kSUMS + 3,
    kBOARDS = kLAST_SUMS + 2
};

struct Boards
{
    Board of[kBOARDS];
    int end;
};

constexpr Boards makeBoards()
{
    Boards boards{};
    boards.of[kQKV] = {0, 3 * kWIDTH * 2, kUNIT * 2, kWIDTH * 2, 3};
    boards.of[kCONTEXTS] = {0, kWIDTH * 2, kUNIT * 2, 0, 1};
    boards.of[kCROSS_CONTEXTS] = boards.of[kCONTEXTS];
    boards.of[kQUERIES] = boards.of[kCONTEXTS];
    boards.of[kINNERS] = {0, kINNER * 2, kINNER_TILES * kUNIT * 2, kUNIT * 2, kINNER_TILES};
    for (int i = kSUMS; i < kBOARDS; ++i)
    {
        boards.of[i] = {0, kWIDTH * 4, kUNIT * 4, 16, 2};
    }
    for (Board& board : boards.of)
    {
        board.offset = boards.end;
        boards.end += board.pitch * kMAX_SLOTS;
    }
    return boards;
}

constexpr int kCHOICES = makeBoards().end;  //!< [2, slots, blocks] of 16 bytes
constexpr int kEXCHANGE_BYTES = kCHOICES + 2 * kMAX_SLOTS * kMAX_BLOCKS * 16;

//! Offsets in a block's shared memory for up to 8 * kHALVES rows.
template <int kHALVES>
struct Layout
{
    static constexpr int kROWS = 8 * kHALVES;
    static constexpr int kRING = kHALVES == 1 ? 12 : 11;

    static constexpr int state = 512;  // behind the barriers
    static constexpr int ring = 1024;
    static constexpr int partial = ring + kRING * kSLOT_BYTES;  // of the products of hidden; the head: hidden
    static constexpr int outPartial = partial + kROWS * (kWARPS * kINNER_TILES * kUNIT * 4 > kPITCH
                                                             ? kWARPS * kINNER_TILES * kUNIT * 4
                                                             : kPITCH);
    static constexpr int contexts = outPartial + kROWS * kWARPS * kUNIT * 4;
    static constexpr int scales = contexts + (kWARPS + 2) * kHEAD * 4;
    static constexpr int kSTATISTICS_PITCH = kWARPS * 8 + 16;
    static constexpr int statistics = scales + (kWARPS + 2) * 8;
    static constexpr int residual = statistics + kROWS * kSTATISTICS_PITCH;  // two shares
    static constexpr int bytes = residual + 2 * kROWS * kUNIT * 2;
    static constexpr int choices = outPartial;  // [row][warp] of 12 bytes

    static_assert(bytes <= 227 * 1024);
    static_assert(kROWS * kWARPS * 12 <= scales - outPartial);
    static_assert(statistics % 16 == 0 && residual % 16 == 0 && kFIRST_SLOTS * 2 <= kRING);
};

}  // namespace trocr::greedy::wide
