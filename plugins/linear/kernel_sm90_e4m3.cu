#include "linear/kernel_sm90.cuh"

namespace trocr::linear_detail
{

template cudaError_t launchSm90<E4m3>(Epilogue, Sm90Tactic const&, TensorMaps const&, EpilogueParams const&, bool,
                                      cudaStream_t);

}  // namespace trocr::linear_detail
