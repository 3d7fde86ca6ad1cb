#pragma once

#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <exception>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/fields.h"
#include "common/logging.h"
#include "common/shapes.h"

namespace trocr
{

inline constexpr char const* kPLUGIN_NAMESPACE = "trocr";
inline constexpr char const* kPLUGIN_VERSION = "1";

//! What TensorRT asks of every plugin of this library: stateless ops on linear tensors, most of them of one type T,
//! that of the first input unless told otherwise, whose kernels need no workspace. A plugin is defined by its
//! attributes alone, and all sizes are read from the descriptions of each call: so a clone is complete when it has the
//! attributes, and there is nothing to configure.
//!
//! An op derives from PluginBase<Op, Attributes> and adds
//!
//!     static constexpr char const* kNAME;                  // as in graph_surgery/fused_ops.py
//!     static constexpr std::array<char const*, N> kINPUTS; // names of the inputs, for messages
//!     Params describe(Dims const* inputs, DataType) const; // sizes of a call; throws std::invalid_argument
//!     cudaError_t launch(Params&, void const* const* inputs, void* const* outputs, cudaStream_t) const;
//!     void outputShapes(DimsExprs const* inputs, DimsExprs* outputs, IExprBuilder&) const;
//!     int32_t nbOutputs() const;                           // where it is not 1
//!     static constexpr int32_t kTYPED_INPUT;               // the input whose type is T, where it is not the first
//!     static constexpr uint32_t kINT32_INPUTS;             // bit i: input i is int32 instead of T
//!     static constexpr uint32_t kINT64_INPUTS;             // bit i: input i is int64 instead of T
//!     static constexpr uint32_t kFLOAT_INPUTS;             // bit i: input i is float32 whatever T is
//!     static constexpr uint32_t kFLOAT_OUTPUTS;            // bit i: output i is float32 whatever T is
//!     static constexpr bool kONLY_HALF;                    // T is float16
template <class Op, class Attributes_>
class PluginBase : public nvinfer1::IPluginV3,
                   public nvinfer1::IPluginV3OneCore,
                   public nvinfer1::IPluginV3OneBuild,
                   public nvinfer1::IPluginV3OneRuntime
{
public:
    using Attributes = Attributes_;

    static constexpr int32_t kTYPED_INPUT = 0;
    static constexpr uint32_t kINT32_INPUTS = 0;
    static constexpr uint32_t kINT64_INPUTS = 0;
    static constexpr uint32_t kFLOAT_INPUTS = 0;
    static constexpr uint32_t kFLOAT_OUTPUTS = 0;
    static constexpr bool kONLY_HALF = false;

    explicit PluginBase(Attributes attributes) : mAttributes{std::move(attributes)}
    {
        FieldWriter fields;
        Attributes::visit(std::as_const(mAttributes), fields);
        mFields = std::move(fields.fields);
        mFieldCollection = {static_cast<int32_t>(mFields.size()), mFields.data()};

        TextWriter text;
        Attributes::visit(std::as_const(mAttributes), text);
        mText = std::move(text.text);
    }

    PluginBase(PluginBase const&) = delete;  // mFields points into mAttributes
    PluginBase& operator=(PluginBase const&) = delete;

    // IPluginV3

    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept final
    {
        switch (type)
        {
            case nvinfer1::PluginCapabilityType::kCORE:
                return static_cast<nvinfer1::IPluginV3OneCore*>(this);
            case nvinfer1::PluginCapabilityType::kBUILD:
                return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
            case nvinfer1::PluginCapabilityType::kRUNTIME:
                return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }

    nvinfer1::IPluginV3* clone() noexcept final
    {
        Op* copy = nullptr;
        guarded("clone", [&] { copy = new Op{mAttributes}; });
        return copy;
    }

    // IPluginV3OneCore

    nvinfer1::AsciiChar const* getPluginName() const noexcept final
    {
        return Op::kNAME;
    }

    nvinfer1::AsciiChar const* getPluginVersion() const noexcept final
    {
        return kPLUGIN_VERSION;
    }

    nvinfer1::AsciiChar const* getPluginNamespace() const noexcept final
    {
        return kPLUGIN_NAMESPACE;
    }

    // IPluginV3OneBuild

    int32_t getNbOutputs() const noexcept final
    {
        return op().nbOutputs();
    }

    int32_t getOutputDataTypes(nvinfer1::DataType* outputTypes, int32_t nbOutputs, nvinfer1::DataType const* inputTypes,
                               int32_t nbInputs) const noexcept final
    {
        return guarded("getOutputDataTypes",
                       [&]
                       {
                           expectCounts(nbInputs, nbOutputs);
                           expectSupported(inputTypes[Op::kTYPED_INPUT]);
                           for (int32_t i = 0; i < nbOutputs; ++i)
                           {
                               outputTypes[i] = outputType(i, inputTypes[Op::kTYPED_INPUT]);
                           }
                       });
    }

    int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nbInputs, nvinfer1::DimsExprs const*, int32_t,
                            nvinfer1::DimsExprs* outputs, int32_t nbOutputs,
                            nvinfer1::IExprBuilder& exprBuilder) noexcept final
    {
        return guarded("getOutputShapes",
                       [&]
                       {
                           expectCounts(nbInputs, nbOutputs);
                           op().outputShapes(inputs, outputs, exprBuilder);
                       });
    }

    bool supportsFormatCombination(int32_t pos, nvinfer1::DynamicPluginTensorDesc const* inOut, int32_t nbInputs,
                                   int32_t nbOutputs) noexcept final
    {
        // Entries beyond pos are not set yet.
        nvinfer1::PluginTensorDesc const& desc = inOut[pos].desc;
        if (nbInputs != inputCount() || nbOutputs != getNbOutputs() || desc.format != nvinfer1::TensorFormat::kLINEAR)
        {
            return false;
        }
        if (pos == Op::kTYPED_INPUT)
        {
            return supports(desc.type);
        }
        // Inputs before that have a type of their own.
        nvinfer1::DataType const type = inOut[std::min(pos, Op::kTYPED_INPUT)].desc.type;
        return desc.type == (pos < nbInputs ? inputType(pos, type) : outputType(pos - nbInputs, type));
    }

    int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, int32_t nbInputs,
                            nvinfer1::DynamicPluginTensorDesc const*, int32_t nbOutputs) noexcept final
    {
        return guarded("configurePlugin",
                       [&]
                       {
                           expectCounts(nbInputs, nbOutputs);
                           std::array<nvinfer1::Dims, Op::kINPUTS.size()> dims;
                           for (size_t i = 0; i < dims.size(); ++i)
                           {
                               dims[i] = in[i].max;
                           }
                           expectSupported(in[Op::kTYPED_INPUT].desc.type);
                           op().describe(dims.data(), in[Op::kTYPED_INPUT].desc.type);
                       });
    }

    char const* getTimingCacheID() noexcept final
    {
        return mText.c_str();
    }

    char const* getMetadataString() noexcept final
    {
        return mText.c_str();
    }

    // IPluginV3OneRuntime

    int32_t onShapeChange(nvinfer1::PluginTensorDesc const* in, int32_t nbInputs, nvinfer1::PluginTensorDesc const*,
                          int32_t nbOutputs) noexcept final
    {
        return guarded("onShapeChange",
                       [&]
                       {
                           expectCounts(nbInputs, nbOutputs);
                           describe(in);
                       });
    }

    int32_t enqueue(nvinfer1::PluginTensorDesc const* inputDesc, nvinfer1::PluginTensorDesc const*,
                    void const* const* inputs, void* const* outputs, void*, cudaStream_t stream) noexcept final
    {
        return guarded("enqueue",
                       [&]
                       {
                           auto params = describe(inputDesc);
                           cudaError_t const status = op().launch(params, inputs, outputs, stream);
                           if (status != cudaSuccess)
                           {
                               throw std::runtime_error{cudaGetErrorString(status)};
                           }
                       });
    }

    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept final
    {
        return clone();
    }

    nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept final
    {
        return &mFieldCollection;
    }

    int32_t nbOutputs() const
    {
        return 1;
    }

protected:
    Attributes const& attributes() const
    {
        return mAttributes;
    }

private:
    static constexpr int32_t inputCount()
    {
        return static_cast<int32_t>(Op::kINPUTS.size());
    }

    static constexpr bool has(uint32_t bits, int32_t i)
    {
        return (bits >> i & 1U) != 0;
    }

    static nvinfer1::DataType inputType(int32_t i, nvinfer1::DataType type)
    {
        if (has(Op::kINT32_INPUTS, i))
        {
            return nvinfer1::DataType::kINT32;
        }
        if (has(Op::kINT64_INPUTS, i))
        {
            return nvinfer1::DataType::kINT64;
        }
        return has(Op::kFLOAT_INPUTS, i) ? nvinfer1::DataType::kFLOAT : type;
    }

    static nvinfer1::DataType outputType(int32_t i, nvinfer1::DataType type)
    {
        return has(Op::kFLOAT_OUTPUTS, i) ? nvinfer1::DataType::kFLOAT : type;
    }

    Op const& op() const
    {
        return static_cast<Op const&>(*this);
    }

    static bool supports(nvinfer1::DataType type)
    {
        return Op::kONLY_HALF ? type == nvinfer1::DataType::kHALF : isSupported(type);
    }

    static void expectSupported(nvinfer1::DataType type)
    {
        toDataType(type);  // throws for what no op supports
        if (!supports(type))
        {
            throw std::invalid_argument{"the type must be float16"};
        }
    }

    auto describe(nvinfer1::PluginTensorDesc const* in) const
    {
        expectSupported(in[Op::kTYPED_INPUT].type);
        std::array<nvinfer1::Dims, Op::kINPUTS.size()> dims;
        for (size_t i = 0; i < dims.size(); ++i)
        {
            dims[i] = in[i].dims;
        }
        return op().describe(dims.data(), in[Op::kTYPED_INPUT].type);
    }

    void expectCounts(int32_t nbInputs, int32_t nbOutputs) const
    {
        if (nbInputs != inputCount() || nbOutputs != getNbOutputs())
        {
            throw std::invalid_argument{"got " + std::to_string(nbInputs) + " inputs and " + std::to_string(nbOutputs) +
                                        " outputs, expected " + std::to_string(inputCount()) + " and " +
                                        std::to_string(getNbOutputs())};
        }
    }

    //! Runs a body whose exceptions become a logged message and a status other than 0: none may reach TensorRT.
    template <class Body>
    static int32_t guarded(char const* method, Body&& body) noexcept
    {
        try
        {
            body();
            return 0;
        }
        catch (std::exception const& error)
        {
            logError(std::string{Op::kNAME} + "::" + method + ": " + error.what());
            return -1;
        }
    }

    Attributes const mAttributes;
    std::vector<nvinfer1::PluginField> mFields;
    nvinfer1::PluginFieldCollection mFieldCollection;
    std::string mText;
};

//! The creator of a plugin derived from PluginBase.
template <class Plugin>
class PluginCreator final : public nvinfer1::IPluginCreatorV3One
{
public:
    PluginCreator()
    {
        FieldWriter writer;
        typename Plugin::Attributes const attributes{};
        Plugin::Attributes::visit(attributes, writer);
        mFields = std::move(writer.fields);
        for (nvinfer1::PluginField& field : mFields)
        {
            field.data = nullptr;  // names and types only: there are no default values
        }
        mFieldCollection = {static_cast<int32_t>(mFields.size()), mFields.data()};
    }

    nvinfer1::IPluginV3* createPlugin(nvinfer1::AsciiChar const* name, nvinfer1::PluginFieldCollection const* fields,
                                      nvinfer1::TensorRTPhase) noexcept override
    {
        try
        {
            return new Plugin{
                readAttributes<typename Plugin::Attributes>(fields ? *fields : nvinfer1::PluginFieldCollection{})};
        }
        catch (std::exception const& error)
        {
            logError(std::string{Plugin::kNAME} + " (" + (name != nullptr ? name : "") + "): " + error.what());
            return nullptr;
        }
    }

    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override
    {
        return &mFieldCollection;
    }

    nvinfer1::AsciiChar const* getPluginName() const noexcept override
    {
        return Plugin::kNAME;
    }

    nvinfer1::AsciiChar const* getPluginVersion() const noexcept override
    {
        return kPLUGIN_VERSION;
    }

    nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override
    {
        return kPLUGIN_NAMESPACE;
    }

private:
    std::vector<nvinfer1::PluginField> mFields;
    nvinfer1::PluginFieldCollection mFieldCollection;
};

}  // namespace trocr
