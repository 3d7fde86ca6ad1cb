// pybind11 module `trocr_linear`: the launchers of kernel.h on raw device pointers (0: null).

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "linear/kernel.h"

namespace py = pybind11;

namespace
{

template <typename P>
P* pointer(uintptr_t address)
{
    return reinterpret_cast<P*>(address);
}

void check(cudaError_t status, char const* what, char const* reason)
{
    if (status != cudaSuccess)
    {
        std::string const detail = reason != nullptr ? std::string(": ") + reason : "";
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status) + detail);
    }
}

} // namespace

PYBIND11_MODULE(trocr_linear, module)
{
    using namespace trocr;
    py::enum_<DataType>(module, "DataType")
        .value("HALF", DataType::kHALF)
        .value("BF16", DataType::kBF16)
        .value("FLOAT", DataType::kFLOAT);
    py::enum_<LinearActivation>(module, "Activation")
        .value("NONE", LinearActivation::kNONE)
        .value("GELU", LinearActivation::kGELU)
        .value("RELU", LinearActivation::kRELU);

    module.def(
        "linear",
        [](uintptr_t x, uintptr_t weight, uintptr_t y, int32_t rows, int32_t outputs, int32_t inputs, DataType dataType,
            uintptr_t bias, uintptr_t residual, uintptr_t inputStatistics, uintptr_t weightSum,
            uintptr_t outputStatistics, float epsilon, LinearActivation activation, int32_t tactic,
            bool overlapPredecessor, uintptr_t stream)
        {
            LinearParams const params{pointer<void const>(x), pointer<void const>(weight), pointer<float const>(bias),
                pointer<void const>(residual), pointer<void>(y), pointer<float const>(inputStatistics),
                pointer<float const>(weightSum), pointer<float>(outputStatistics), epsilon, rows, outputs, inputs,
                activation, dataType, tactic, overlapPredecessor};
            char const* reason = nullptr;
            canImplementLinear(params, &reason);
            check(linear(params, pointer<CUstream_st>(stream)), "linear", reason);
        },
        py::kw_only(), py::arg("x"), py::arg("weight"), py::arg("y"), py::arg("rows"), py::arg("outputs"),
        py::arg("inputs"), py::arg("data_type"), py::arg("bias") = 0, py::arg("residual") = 0,
        py::arg("input_statistics") = 0, py::arg("weight_sum") = 0, py::arg("output_statistics") = 0,
        py::arg("epsilon") = 0.0F, py::arg("activation") = LinearActivation::kNONE, py::arg("tactic") = 0,
        py::arg("overlap_predecessor") = false, py::arg("stream") = 0);
    module.def("linear_tactic_count", &linearTacticCount);

    module.def(
        "row_statistics",
        [](uintptr_t x, uintptr_t statistics, int32_t rows, int32_t width, DataType dataType, uintptr_t stream)
        {
            RowStatisticsParams const params{
                pointer<void const>(x), pointer<float>(statistics), rows, width, dataType};
            check(rowStatistics(params, pointer<CUstream_st>(stream)), "row_statistics", nullptr);
        },
        py::kw_only(), py::arg("x"), py::arg("statistics"), py::arg("rows"), py::arg("width"), py::arg("data_type"),
        py::arg("stream") = 0);
}
