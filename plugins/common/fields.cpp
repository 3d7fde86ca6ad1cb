#include "common/fields.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <stdexcept>

namespace trocr
{
namespace
{

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

char const* nameOf(PluginFieldType type)
{
    switch (type)
    {
        case PluginFieldType::kFLOAT16:
            return "FLOAT16";
        case PluginFieldType::kFLOAT32:
            return "FLOAT32";
        case PluginFieldType::kFLOAT64:
            return "FLOAT64";
        case PluginFieldType::kINT8:
            return "INT8";
        case PluginFieldType::kINT16:
            return "INT16";
        case PluginFieldType::kINT32:
            return "INT32";
        case PluginFieldType::kINT64:
            return "INT64";
        case PluginFieldType::kCHAR:
            return "CHAR";
        default:
            return "another type";
    }
}

[[noreturn]] void fail(std::string const& message)
{
    throw std::invalid_argument{message};
}

template <class T>
T scalar(PluginField const& field)
{
    if (field.length != 1)
    {
        fail(std::string{"attribute '"} + field.name + "' has " + std::to_string(field.length) +
             " values, expected one");
    }
    T value;
    std::memcpy(&value, field.data, sizeof value);
    return value;
}

}  // namespace

FieldReader::FieldReader(nvinfer1::PluginFieldCollection const& collection)
{
    for (int32_t i = 0; i < collection.nbFields; ++i)
    {
        mUnread.push_back(&collection.fields[i]);
    }
}

PluginField const& FieldReader::find(char const* name, PluginFieldType type)
{
    auto const found = std::find_if(mUnread.begin(), mUnread.end(), [name](PluginField const* field)
                                    { return field->name != nullptr && std::strcmp(field->name, name) == 0; });
    if (found == mUnread.end())
    {
        fail(std::string{"attribute '"} + name + "' (" + nameOf(type) + ") is missing");
    }
    PluginField const& field = **found;
    mUnread.erase(found);
    if (field.type != type)
    {
        fail(std::string{"attribute '"} + name + "' has type " + nameOf(field.type) + ", expected " + nameOf(type));
    }
    if (field.data == nullptr)
    {
        fail(std::string{"attribute '"} + name + "' has no data");
    }
    return field;
}

void FieldReader::operator()(char const* name, int32_t& value)
{
    value = scalar<int32_t>(find(name, PluginFieldType::kINT32));
}

void FieldReader::operator()(char const* name, float& value)
{
    value = scalar<float>(find(name, PluginFieldType::kFLOAT32));
}

void FieldReader::operator()(char const* name, std::string& value)
{
    PluginField const& field = find(name, PluginFieldType::kCHAR);
    if (field.length < 1)
    {
        fail(std::string{"attribute '"} + name + "' is empty");
    }
    // TensorRT's ONNX parser passes the characters alone; callers in C often count the final zero in.
    auto const* const begin = static_cast<char const*>(field.data);
    value.assign(begin, std::find(begin, begin + field.length, '\0'));
}

void FieldReader::expectNoOthers() const
{
    if (!mUnread.empty())
    {
        char const* const name = mUnread.front()->name;
        fail(std::string{"attribute '"} + (name != nullptr ? name : "") + "' is unknown or given twice");
    }
}

void FieldWriter::operator()(char const* name, int32_t const& value)
{
    fields.emplace_back(name, &value, PluginFieldType::kINT32, 1);
}

void FieldWriter::operator()(char const* name, float const& value)
{
    fields.emplace_back(name, &value, PluginFieldType::kFLOAT32, 1);
}

void FieldWriter::operator()(char const* name, std::string const& value)
{
    fields.emplace_back(name, value.data(), PluginFieldType::kCHAR, static_cast<int32_t>(value.size()));
}

void TextWriter::operator()(char const* name, std::string const& value)
{
    text += (text.empty() ? "" : ",") + std::string{name} + "=" + value;
}

void TextWriter::operator()(char const* name, int32_t value)
{
    (*this)(name, std::to_string(value));
}

void TextWriter::operator()(char const* name, float value)
{
    char digits[32];
    std::snprintf(digits, sizeof digits, "%.*g", std::numeric_limits<float>::max_digits10, value);
    (*this)(name, std::string{digits});
}

void expectPositive(char const* attribute, float value)
{
    if (!std::isfinite(value) || value <= 0.0F)
    {
        throw std::invalid_argument{std::string{"attribute '"} + attribute + "' is " + std::to_string(value) +
                                    ", expected a finite number above 0"};
    }
}

}  // namespace trocr
