#pragma once

// What the kernels of all device decoders share.

namespace trocr::decoder
{

constexpr float kNO_SCORE = -1e30F;  //!< below every score; finite, so that differences of two are 0

}  // namespace trocr::decoder
