#pragma once

#include <cstddef>
#include <cstdint>

//! Sizes of the wide decoder, for kernel and host alike: heads of 64, four inner columns for each of the width. T has
//! two bytes.

namespace trocr::decoder::wide
{

constexpr int kHEAD = 64;
constexpr int kHALF = 8;  //!< rows of a product's operand, which has two such halves; up to eight rows have one
constexpr int kMOST_ROWS = 16;
constexpr int kCOLUMNS = 8;  //!< of every product, that a block has: its share
constexpr int kMOST_LAYERS = 16;
constexpr int kMOST_BLOCKS = 160;
constexpr int kMOST_PARTS = 8;  //!< of a row's and head's keys

//! Slots of a share's weights in the order of the stream: query, key and value; output; query of cross-attention; then,
//! behind the lines' keys and values, output; both products of the feed-forward.
constexpr int kINNER_TILES = 4;
constexpr int kSLOTS_BEFORE_KEYS = 3 + 1 + 1;
constexpr int kLAYER_SLOTS = kSLOTS_BEFORE_KEYS + 1 + 2 * kINNER_TILES;

//! A share's float32 constants of a layer, for each of the three sublayers: biases of its first product's tiles, with
//! beta in them; sums of the weights of these tiles' columns, with gamma in them; bias of its output; gamma; beta.
constexpr int kCONSTANTS = (2 * (3 + 1 + kINNER_TILES) + 3 * 3) * kCOLUMNS;
constexpr int kCONSTANTS_BYTES = kCONSTANTS * 4;

//! Copies of the head that are on their way at most.
constexpr uint32_t kHEAD_COPIES = 2;

//! Boards are where blocks leave what others read, in words of 16 bytes. Offsets are in words, of a row.
template <int kWIDTH, int kROWS>
struct Boards
{
    static constexpr int kHEADS = kWIDTH / kHEAD;
    static constexpr int kPART_WORDS = kHEAD / 8 + 1;  //!< a context of T, its maximum and sum

    static constexpr int kQKV = 0;                                               //!< T [3, D]
    static constexpr int kCONTEXTS = kQKV + 3 * kWIDTH / 8;                      //!< T [D]
    static constexpr int kQUERIES = kCONTEXTS + kWIDTH / 8;                      //!< T [D]
    static constexpr int kPARTS = kQUERIES + kWIDTH / 8;                         //!< [H, kMOST_PARTS, kPART_WORDS]
    static constexpr int kINNERS = kPARTS + kHEADS * kMOST_PARTS * kPART_WORDS;  //!< T [4 D]
    static constexpr int kSUMS = kINNERS + kINNER_TILES * kWIDTH / 8;            //!< T [3, D]: after each sublayer
    static constexpr int kLAST_SUMS = kSUMS + 3 * kWIDTH / 8;                    //!< float32 [D]: after the last layer
    static constexpr int kROW_WORDS = kLAST_SUMS + kWIDTH / 4;

    static constexpr int kCHOICES = kROWS * kROW_WORDS;  //!< [2, kROWS, kMOST_BLOCKS]
    static constexpr int kWORDS = kCHOICES + 2 * kROWS * kMOST_BLOCKS;
};

//! Offsets in a block's shared memory.
template <int kWIDTH, int kHALVES>
struct Layout
{
    static constexpr int kROWS = kHALVES * kHALF;
    static constexpr int kWARPS = kWIDTH / 64;  //!< that compute: 64 inputs of a product each
    static constexpr int kSHARES = kWIDTH / kCOLUMNS;
    //! A warpgroup more: one lane of it fetches, and of its registers the others have some.
    static constexpr int kTHREADS = (kWARPS + 4) * 32;
    static constexpr int kSLOT_BYTES = kCOLUMNS * kWIDTH * 2;
    static constexpr int kSLOT_KEYS = kSLOT_BYTES / (kHEAD * 2);
    static constexpr int kRING = kHALVES == 1 ? 12 : 10;
    //! Copies of the layers that are on their way at most: words between blocks would queue behind more of them. 16
    //! rows have twice the keys and values, and as many words.
    static constexpr uint32_t kLAYER_COPIES = kHALVES;
    static constexpr int kPITCH =
        kWIDTH * 2 + 64;  //!< of rows: eight lanes that read 16 bytes of two meet no bank twice

    static constexpr int kBARRIERS = 0;  // full, empty, decided, constants
    static constexpr int kSTATE = 512;
    static constexpr int kSLOTS = 1024;
    static constexpr int kPARTIAL = kSLOTS + kRING * kSLOT_BYTES;  // of the products of hidden states; the head's rows
    static constexpr int kPARTIAL_BYTES = kWARPS * kINNER_TILES * kROWS * kCOLUMNS * 4;
    static constexpr int kROWS_BYTES = kROWS * kPITCH;
    static constexpr int kOUT_PARTIAL = kPARTIAL + (kPARTIAL_BYTES > kROWS_BYTES ? kPARTIAL_BYTES : kROWS_BYTES);
    static constexpr int kCONTEXTS = kOUT_PARTIAL + kWARPS * kROWS * kCOLUMNS * 4;
    static constexpr int kSCALES = kCONTEXTS + kHALVES * kWARPS * kHEAD * 4;
    static constexpr int kSTATISTICS = kSCALES + kHALVES * kWARPS * 8;
    static constexpr int kOWN = kSTATISTICS + kROWS * kWARPS * 8;
    static constexpr int kCONSTANTS_AT = kOWN + kHALVES * 2 * 32 * 8;
    static constexpr int kBYTES = kCONSTANTS_AT + 2 * kCONSTANTS_BYTES;
    static constexpr int kCHOICES = kOUT_PARTIAL;  // [row][warp] of 12 bytes

    static_assert(kBYTES <= 227 * 1024 && (2 * kRING + 3) * 8 <= kSTATE);
    static_assert(kROWS * kWARPS * 12 <= kSCALES - kOUT_PARTIAL && kSTATISTICS % 16 == 0);
};

}  // namespace trocr::decoder::wide
