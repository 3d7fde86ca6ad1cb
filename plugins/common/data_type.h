#pragma once

#include <cstddef>
#include <cstdint>

namespace trocr
{

//! Element type of the tensors of an op. Everything is accumulated in float32.
enum class DataType : int32_t
{
    kFLOAT = 0,
    kHALF = 1,
    kBF16 = 2,
};

//! Bytes of one element; 0 for a value that is no DataType.
constexpr size_t sizeOf(DataType type)
{
    switch (type)
    {
        case DataType::kFLOAT:
            return 4;
        case DataType::kHALF:
        case DataType::kBF16:
            return 2;
    }
    return 0;
}

}  // namespace trocr
