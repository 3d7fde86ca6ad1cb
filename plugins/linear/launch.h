#pragma once

// Between kernel.cu, which checks and chooses, and the files of the two architectures.

#include <cuda_runtime_api.h>

#include "linear/kernel.h"

namespace trocr::linear_detail
{

//! Hopper: `tactic` is 0 (by cost) or 1 to kNUM_SM90_TACTICS.
cudaError_t linearSm90(LinearParams const& params, int32_t tactic, int multiprocessors, cudaStream_t stream);

constexpr int32_t kNUM_SM80_TACTICS = 2;

//! Ampere and later: `tactic` is 0 (by cost) or 1 to kNUM_SM80_TACTICS.
cudaError_t linearSm80(LinearParams const& params, int32_t tactic, int multiprocessors, cudaStream_t stream);

//! float32, on any architecture.
cudaError_t linearFloat(LinearParams const& params, cudaStream_t stream);

}  // namespace trocr::linear_detail
