// Python module `trocr_cpu_kernels`: the decoders of `trocr_kernels`, on a CPU and on its memory.

#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include "bindings.h"
#include "device_decoder/beams.h"

using trocr::decoder::BeamSearch;

PYBIND11_MODULE(trocr_cpu_kernels, module)
{
    trocr::bindDeviceDecoder(module);
    module.def("slow_warps", [](unsigned rounds) { cpu_cuda::slowestWarp = rounds; });

    // The kernels between two steps alone, on a struct BeamSearch that Python has made (tests/test_beams_on_cpu.py).
    auto const at = [](uintptr_t address) -> BeamSearch const& { return *reinterpret_cast<BeamSearch*>(address); };
    module.attr("beam_search_bytes") = sizeof(BeamSearch);
    module.def("begin_beams", [at](uintptr_t search) { trocr::decoder::beginBeams(at(search), nullptr); });
    module.def("advance_beams",
               [at](uintptr_t search)
               {
                   unsigned goesOn = 2;
                   trocr::decoder::rankTokens(at(search), nullptr);
                   trocr::decoder::advanceBeams(at(search), reinterpret_cast<uintptr_t>(&goesOn), nullptr);
                   return goesOn == 1;
               });
}
