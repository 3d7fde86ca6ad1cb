#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <string>
#include <vector>

//! An op's attributes are one plain struct with two functions:
//!
//!     template <class Self, class Visitor>
//!     static void visit(Self& self, Visitor& visitor);   // calls visitor(name, member) for each attribute
//!     void validate() const;                              // throws std::invalid_argument for a bad value
//!
//! visit() is the only list of an op's attributes: what createPlugin reads, what the creator advertises, what is
//! serialised into an engine and what tells two plugins apart in the timing cache all come from it. Members are
//! int32_t (INT32), float (FLOAT32) or std::string (CHAR).
namespace trocr
{

//! Reads attributes from the fields that TensorRT hands to createPlugin. Throws std::invalid_argument for a field that
//! is missing, unknown, or of another type or length.
class FieldReader
{
public:
    explicit FieldReader(nvinfer1::PluginFieldCollection const& collection);

    void operator()(char const* name, int32_t& value);
    void operator()(char const* name, float& value);
    void operator()(char const* name, std::string& value);

    //! Throws if a field was given that no call has asked for.
    void expectNoOthers() const;

private:
    nvinfer1::PluginField const& find(char const* name, nvinfer1::PluginFieldType type);

    std::vector<nvinfer1::PluginField const*> mUnread;
};

//! Collects fields that point at the attributes visited: the attributes must outlive the fields.
class FieldWriter
{
public:
    void operator()(char const* name, int32_t const& value);
    void operator()(char const* name, float const& value);
    void operator()(char const* name, std::string const& value);

    std::vector<nvinfer1::PluginField> fields;
};

//! Writes attributes as "name=value,name=value", floats with all their digits.
class TextWriter
{
public:
    void operator()(char const* name, int32_t value);
    void operator()(char const* name, float value);
    void operator()(char const* name, std::string const& value);

    std::string text;
};

//! For validate(): throws std::invalid_argument for an attribute that is no finite number above 0.
void expectPositive(char const* attribute, float value);

//! Attributes read from fields, and validated. Throws std::invalid_argument.
template <class Attributes>
Attributes readAttributes(nvinfer1::PluginFieldCollection const& collection)
{
    Attributes attributes{};
    FieldReader reader{collection};
    Attributes::visit(attributes, reader);
    reader.expectNoOthers();
    attributes.validate();
    return attributes;
}

}  // namespace trocr
