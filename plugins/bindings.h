#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "bias_activation/kernel.h"
#include "common/data_type.h"

//! What the parts of the Python module share.

namespace trocr
{

[[noreturn]] inline void fail(std::string const& op, std::string const& why)
{
    throw std::runtime_error("cannot implement " + op + " because " + why);
}

inline DataType parseDataType(std::string const& op, std::string const& name)
{
    if (name == "float32")
    {
        return DataType::kFLOAT;
    }
    if (name == "float16")
    {
        return DataType::kHALF;
    }
    if (name == "bfloat16")
    {
        return DataType::kBF16;
    }
    fail(op, "dtype '" + name + "' is none of 'float32', 'float16', 'bfloat16'");
}

inline Activation parseActivation(std::string const& op, std::string const& name)
{
    if (name == "gelu")
    {
        return Activation::kGELU;
    }
    if (name == "relu")
    {
        return Activation::kRELU;
    }
    fail(op, "activation '" + name + "' is neither 'gelu' nor 'relu'");
}

inline void const* input(uintptr_t address)
{
    return reinterpret_cast<void const*>(address);
}

inline void* output(uintptr_t address)
{
    return reinterpret_cast<void*>(address);
}

//! Adds the class DeviceDecoder and what belongs to it (device_decoder/bindings.cpp).
void bindDeviceDecoder(pybind11::module_& module);

}  // namespace trocr
