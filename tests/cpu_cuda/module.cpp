// Python module `trocr_cpu_kernels`: the decoders of `trocr_kernels`, on a CPU and on its memory.

#include "bindings.h"

PYBIND11_MODULE(trocr_cpu_kernels, module)
{
    trocr::bindGreedyDecoder(module);
}
