//! The plugins' contract with TensorRT, but for enqueue: creation from fields, types, shapes, clones, serialisation.
//! Needs neither a GPU nor TensorRT's libraries.

#include <NvInferRuntime.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <deque>
#include <initializer_list>
#include <limits>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/logging.h"

extern "C" nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& nbCreators);
extern "C" void setLoggerFinder(nvinfer1::ILoggerFinder* finder);

namespace
{

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::IPluginV3OneBuild;
using nvinfer1::IPluginV3OneCore;
using nvinfer1::IPluginV3OneRuntime;
using nvinfer1::PluginCapabilityType;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;
using nvinfer1::TensorFormat;
using nvinfer1::TensorRTPhase;

//! Collects what the plugins log.
class RecordingLogger : public nvinfer1::ILogger, public nvinfer1::ILoggerFinder
{
public:
    void log(Severity severity, char const* message) noexcept override
    {
        EXPECT_EQ(severity, Severity::kERROR);
        text += std::string{message} + "\n";
    }

    nvinfer1::ILogger* findLogger() override
    {
        return this;
    }

    std::string text;
};

//! TensorRT's expressions can be made by a builder only, which needs a GPU. This one evaluates: every dimension is a
//! constant, and an operation has its value at once.
class Expression : public nvinfer1::IDimensionExpr, private nvinfer1::apiv::VDimensionExpr
{
public:
    explicit Expression(int64_t value) : mValue{value}
    {
        mImpl = this;
    }

private:
    bool isConstant() const override
    {
        return true;
    }
    int64_t getConstantValue() const override
    {
        return mValue;
    }
    bool isSizeTensor() const override
    {
        return false;
    }

    int64_t mValue;
};

class Evaluator : public nvinfer1::IExprBuilder, private nvinfer1::apiv::VExprBuilder
{
public:
    Evaluator()
    {
        mImpl = this;
    }

    DimsExprs dims(std::vector<int64_t> const& sizes)
    {
        DimsExprs result{};
        result.nbDims = static_cast<int32_t>(sizes.size());
        for (size_t i = 0; i < sizes.size(); ++i)
        {
            result.d[i] = constant(sizes[i]);
        }
        return result;
    }

    nvinfer1::IDimensionExpr const* constant(int64_t value) override
    {
        return &mExpressions.emplace_back(value);
    }

private:
    nvinfer1::IDimensionExpr const* operation(nvinfer1::DimensionOperation op, nvinfer1::IDimensionExpr const& first,
                                              nvinfer1::IDimensionExpr const& second) override
    {
        if (op != nvinfer1::DimensionOperation::kFLOOR_DIV)
        {
            throw std::logic_error{"the plugins are expected to divide only"};
        }
        return constant(first.getConstantValue() / second.getConstantValue());
    }

    nvinfer1::IDimensionExpr const* declareSizeTensor(int32_t, nvinfer1::IDimensionExpr const&,
                                                      nvinfer1::IDimensionExpr const&) override
    {
        throw std::logic_error{"the plugins have no size tensors"};
    }

    std::deque<Expression> mExpressions;  // addresses stay valid
};

using Shape = std::vector<int64_t>;

//! One way to use an op: its attributes, and the shapes of a call.
struct Case
{
    std::string op;
    std::vector<PluginField> fields;
    std::vector<Shape> inputs;
    std::vector<Shape> outputs;
    std::map<size_t, DataType> fixedTypes;  //!< of inputs and then outputs, where it is not that of the first input

    //! The ops with e4m3 tensors, which pass for float16 of half the columns, are of float16 only.
    bool supports(DataType type) const
    {
        bool const isOther = type == DataType::kFLOAT || type == DataType::kBF16;
        return type == DataType::kHALF || (isOther && op.find("Fp8") == std::string::npos);
    }
};

void PrintTo(Case const& c, std::ostream* stream)
{
    *stream << c.op;
}

int32_t const kHEADS_6 = 6;
int32_t const kHEADS_8 = 8;
float const kEPSILON = 1e-5F;
float const kNO_SCALE = 0.0F;
int32_t const kZERO = 0;
int32_t const kONE = 1;

PluginField const kNUM_HEADS_6{"num_heads", &kHEADS_6, PluginFieldType::kINT32, 1};
PluginField const kNUM_HEADS_8{"num_heads", &kHEADS_8, PluginFieldType::kINT32, 1};
PluginField const kEPSILON_FIELD{"epsilon", &kEPSILON, PluginFieldType::kFLOAT32, 1};
PluginField const kWITHOUT_SUM{"emit_sum", &kZERO, PluginFieldType::kINT32, 1};
PluginField const kWITH_SUM{"emit_sum", &kONE, PluginFieldType::kINT32, 1};
PluginField const kGELU{"activation", "gelu", PluginFieldType::kCHAR, 4};
PluginField const kNO_ACTIVATION{"activation", "none", PluginFieldType::kCHAR, 4};
PluginField const kWITHOUT_STATISTICS{"emit_statistics", &kZERO, PluginFieldType::kINT32, 1};
PluginField const kWITH_STATISTICS{"emit_statistics", &kONE, PluginFieldType::kINT32, 1};
PluginField const kSCALE{"scale", &kEPSILON, PluginFieldType::kFLOAT32, 1};
PluginField const kPRODUCT_SCALE{"product_scale", &kEPSILON, PluginFieldType::kFLOAT32, 1};
PluginField const kOUTPUT_SCALE{"output_scale", &kEPSILON, PluginFieldType::kFLOAT32, 1};
PluginField const kNO_OUTPUT_SCALE{"output_scale", &kNO_SCALE, PluginFieldType::kFLOAT32, 1};
PluginField const kRELU{"activation", "relu", PluginFieldType::kCHAR, 4};

std::vector<Case> const kCASES{
    {"TrOCREncoderAttention", {kNUM_HEADS_6}, {{2, 578, 1152}}, {{2, 578, 384}}},
    {"TrOCRDecoderSelfAttention",
     {kNUM_HEADS_8},
     {{3, 1, 768}, {3, 8, 40, 32}, {3, 8, 40, 32}, {3, 1}},
     {{3, 1, 256}, {3, 8, 40, 32}, {3, 8, 40, 32}},
     {{3, DataType::kINT64}}},
    {"TrOCRCrossAttention", {kNUM_HEADS_8}, {{3, 1, 256}, {3, 8, 578, 32}, {3, 8, 578, 32}}, {{3, 1, 256}}},
    {"TrOCRCrossAttention", {kNUM_HEADS_8}, {{12, 1, 256}, {3, 8, 578, 32}, {3, 8, 578, 32}}, {{12, 1, 256}}},
    {"TrOCRResidualLayerNorm",
     {kEPSILON_FIELD, kWITHOUT_SUM},
     {{2, 577, 768}, {2, 577, 768}, {768}, {768}},
     {{2, 577, 768}}},
    {"TrOCRResidualLayerNorm",
     {kWITH_SUM, kEPSILON_FIELD},
     {{2, 577, 768}, {2, 577, 768}, {768}, {768}},
     {{2, 577, 768}, {2, 577, 768}}},
    {"TrOCRLayerNorm", {kEPSILON_FIELD}, {{2, 577, 768}, {768}, {768}}, {{2, 577, 768}}},
    {"TrOCRBiasActivation", {kGELU}, {{2, 577, 3072}, {3072}}, {{2, 577, 3072}}},
    {"TrOCRBiasActivation", {kRELU}, {{16, 1024}, {1024}}, {{16, 1024}}},
    {"TrOCRRowStatistics", {}, {{2, 577, 768}}, {{2, 577, 12, 2}}, {{1, DataType::kFLOAT}}},
    {"TrOCRLayerNormLinear",
     {kEPSILON_FIELD, kGELU},
     {{2, 577, 768}, {2, 577, 12, 2}, {3072, 768}, {3072}, {3072}},
     {{2, 577, 3072}},
     {{1, DataType::kFLOAT}, {3, DataType::kFLOAT}, {4, DataType::kFLOAT}}},
    {"TrOCRLayerNormLinear",
     {kNO_ACTIVATION, kEPSILON_FIELD},
     {{578, 64}, {578, 1, 2}, {192, 64}, {192}, {192}},
     {{578, 192}},
     {{1, DataType::kFLOAT}, {3, DataType::kFLOAT}, {4, DataType::kFLOAT}}},
    {"TrOCRLinearResidual",
     {kWITHOUT_STATISTICS},
     {{2, 577, 3072}, {768, 3072}, {768}, {2, 577, 768}},
     {{2, 577, 768}},
     {{2, DataType::kFLOAT}}},
    {"TrOCRLinearResidual",
     {kWITH_STATISTICS},
     {{2, 577, 3072}, {768, 3072}, {768}, {2, 577, 768}},
     {{2, 577, 768}, {2, 577, 12, 2}},
     {{2, DataType::kFLOAT}, {5, DataType::kFLOAT}}},
    {"TrOCRCrossKeyValue",
     {kNUM_HEADS_8},
     {{3, 578, 384}, {512, 384}, {512}},
     {{3, 8, 578, 32}, {3, 8, 578, 32}},
     {{2, DataType::kFLOAT}}},
    {"TrOCRPatchEmbedding",
     {kSCALE, kWITH_STATISTICS},
     {{3, 3, 384, 96}, {384, 768}, {384}, {578, 384}},
     {{3, 578, 384}, {3, 578, 6, 2}},
     {{0, DataType::kINT32}, {2, DataType::kFLOAT}, {5, DataType::kFLOAT}}},
    {"TrOCRPatchEmbedding",
     {kWITHOUT_STATISTICS, kSCALE},
     {{1, 3, 32, 24}, {64, 768}, {64}, {13, 64}},
     {{1, 13, 64}},
     {{0, DataType::kINT32}, {2, DataType::kFLOAT}}},
    {"TrOCRFp8EncoderAttention", {kNUM_HEADS_6, kOUTPUT_SCALE}, {{2, 578, 1152}}, {{2, 578, 192}}},
    {"TrOCRFp8RowStatistics", {kSCALE}, {{2, 577, 768}}, {{2, 577, 12, 2}, {2, 577, 384}}, {{1, DataType::kFLOAT}}},
    {"TrOCRFp8LayerNormLinear",
     {kEPSILON_FIELD, kGELU, kPRODUCT_SCALE, kOUTPUT_SCALE},
     {{2, 577, 384}, {2, 577, 12, 2}, {3072, 384}, {3072}, {3072}},
     {{2, 577, 1536}},
     {{1, DataType::kFLOAT}, {3, DataType::kFLOAT}, {4, DataType::kFLOAT}}},
    {"TrOCRFp8LayerNormLinear",
     {kEPSILON_FIELD, kNO_ACTIVATION, kPRODUCT_SCALE, kNO_OUTPUT_SCALE},
     {{578, 32}, {578, 1, 2}, {192, 32}, {192}, {192}},
     {{578, 192}},
     {{1, DataType::kFLOAT}, {3, DataType::kFLOAT}, {4, DataType::kFLOAT}}},
    {"TrOCRFp8LinearResidual",
     {kWITHOUT_STATISTICS, kPRODUCT_SCALE, kOUTPUT_SCALE},
     {{2, 577, 1536}, {768, 1536}, {768}, {2, 577, 768}},
     {{2, 577, 768}},
     {{2, DataType::kFLOAT}}},
    {"TrOCRFp8LinearResidual",
     {kWITH_STATISTICS, kPRODUCT_SCALE, kOUTPUT_SCALE},
     {{2, 577, 1536}, {768, 1536}, {768}, {2, 577, 768}},
     {{2, 577, 768}, {2, 577, 12, 2}, {2, 577, 384}},
     {{2, DataType::kFLOAT}, {5, DataType::kFLOAT}}},
};

nvinfer1::IPluginCreatorV3One& creatorOf(std::string const& op)
{
    int32_t count = 0;
    nvinfer1::IPluginCreatorInterface* const* const creators = getCreators(count);
    for (int32_t i = 0; i < count; ++i)
    {
        auto* const creator = static_cast<nvinfer1::IPluginCreatorV3One*>(creators[i]);
        if (op == creator->getPluginName())
        {
            return *creator;
        }
    }
    throw std::invalid_argument{"no creator of " + op};
}

std::unique_ptr<nvinfer1::IPluginV3> create(std::string const& op, std::vector<PluginField> const& fields,
                                            TensorRTPhase phase = TensorRTPhase::kBUILD)
{
    PluginFieldCollection const collection{static_cast<int32_t>(fields.size()), fields.data()};
    return std::unique_ptr<nvinfer1::IPluginV3>{creatorOf(op).createPlugin("layer", &collection, phase)};
}

IPluginV3OneCore& coreOf(nvinfer1::IPluginV3& plugin)
{
    return *static_cast<IPluginV3OneCore*>(plugin.getCapabilityInterface(PluginCapabilityType::kCORE));
}

IPluginV3OneBuild& buildOf(nvinfer1::IPluginV3& plugin)
{
    return *static_cast<IPluginV3OneBuild*>(plugin.getCapabilityInterface(PluginCapabilityType::kBUILD));
}

IPluginV3OneRuntime& runtimeOf(nvinfer1::IPluginV3& plugin)
{
    return *static_cast<IPluginV3OneRuntime*>(plugin.getCapabilityInterface(PluginCapabilityType::kRUNTIME));
}

Dims toDims(Shape const& shape)
{
    Dims dims{};
    dims.nbDims = static_cast<int32_t>(shape.size());
    std::copy(shape.begin(), shape.end(), dims.d);
    return dims;
}

Shape toShape(DimsExprs const& dims)
{
    Shape shape;
    for (int32_t i = 0; i < dims.nbDims; ++i)
    {
        shape.push_back(dims.d[i]->getConstantValue());
    }
    return shape;
}

DataType typeAt(Case const& c, DataType type, size_t pos)
{
    auto const fixed = c.fixedTypes.find(pos);
    return fixed != c.fixedTypes.end() ? fixed->second : type;
}

//! Descriptions of inputs and then outputs, all of type T but those of a fixed type.
std::vector<DynamicPluginTensorDesc> describe(Case const& c, DataType type)
{
    std::vector<Shape> shapes = c.inputs;
    shapes.insert(shapes.end(), c.outputs.begin(), c.outputs.end());
    std::vector<DynamicPluginTensorDesc> descs;
    for (Shape const& shape : shapes)
    {
        Dims const dims = toDims(shape);
        descs.push_back({{dims, typeAt(c, type, descs.size()), TensorFormat::kLINEAR, 1.0F}, dims, dims, dims});
    }
    return descs;
}

std::vector<nvinfer1::PluginTensorDesc> staticOf(std::vector<DynamicPluginTensorDesc> const& descs)
{
    std::vector<nvinfer1::PluginTensorDesc> result;
    for (DynamicPluginTensorDesc const& desc : descs)
    {
        result.push_back(desc.desc);
    }
    return result;
}

int32_t configure(Case const& c, DataType type)
{
    auto const plugin = create(c.op, c.fields);
    std::vector<DynamicPluginTensorDesc> const descs = describe(c, type);
    auto const nbInputs = static_cast<int32_t>(c.inputs.size());
    return buildOf(*plugin).configurePlugin(descs.data(), nbInputs, descs.data() + nbInputs,
                                            static_cast<int32_t>(c.outputs.size()));
}

class Plugins : public testing::Test
{
protected:
    Plugins()
    {
        setLoggerFinder(&mLogger);
    }
    ~Plugins() override
    {
        setLoggerFinder(nullptr);
    }

    //! What was logged since the last call.
    std::string logged()
    {
        return std::exchange(mLogger.text, {});
    }

private:
    RecordingLogger mLogger;
};

class EachCase : public Plugins, public testing::WithParamInterface<Case>
{
};

std::string nameOf(testing::TestParamInfo<Case> const& info)
{
    return info.param.op + std::to_string(info.index);
}

INSTANTIATE_TEST_SUITE_P(Plugins, EachCase, testing::ValuesIn(kCASES), nameOf);

TEST_P(EachCase, HasNameVersionAndNamespaceOfItsCreator)
{
    auto const plugin = create(GetParam().op, GetParam().fields);
    ASSERT_NE(plugin, nullptr) << logged();
    EXPECT_EQ(coreOf(*plugin).getPluginName(), GetParam().op);
    EXPECT_STREQ(coreOf(*plugin).getPluginVersion(), "1");
    EXPECT_STREQ(coreOf(*plugin).getPluginNamespace(), "trocr");
    EXPECT_STREQ(creatorOf(GetParam().op).getPluginVersion(), "1");
    EXPECT_STREQ(creatorOf(GetParam().op).getPluginNamespace(), "trocr");
}

TEST_P(EachCase, CapabilitiesReportTheirInterfaces)
{
    auto const plugin = create(GetParam().op, GetParam().fields);
    EXPECT_STREQ(plugin->getCapabilityInterface(PluginCapabilityType::kCORE)->getInterfaceInfo().kind,
                 "PLUGIN_V3ONE_CORE");
    EXPECT_STREQ(plugin->getCapabilityInterface(PluginCapabilityType::kBUILD)->getInterfaceInfo().kind,
                 "PLUGIN_V3ONE_BUILD");
    EXPECT_STREQ(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME)->getInterfaceInfo().kind,
                 "PLUGIN_V3ONE_RUNTIME");
}

TEST_P(EachCase, SupportsExactlyOneTypeEverywhere)
{
    Case const& c = GetParam();
    auto const plugin = create(c.op, c.fields);
    auto const nbInputs = static_cast<int32_t>(c.inputs.size());
    auto const nbOutputs = static_cast<int32_t>(c.outputs.size());
    EXPECT_EQ(buildOf(*plugin).getNbOutputs(), nbOutputs);

    // The input that tells T: the first one without a fixed type.
    int32_t typed = 0;
    while (c.fixedTypes.count(typed) != 0)
    {
        ++typed;
    }
    std::vector<DataType> const all{DataType::kFLOAT, DataType::kHALF, DataType::kBF16,  DataType::kINT8,
                                    DataType::kINT32, DataType::kBOOL, DataType::kINT64, DataType::kFP8};
    for (DataType const type : all)
    {
        bool const isFloat = c.supports(type);
        for (int32_t pos = 0; pos < nbInputs + nbOutputs; ++pos)
        {
            std::vector<DynamicPluginTensorDesc> descs = describe(c, type);
            // What follows pos is not set yet when TensorRT asks: nothing may depend on it.
            for (size_t later = pos + 1; later < descs.size(); ++later)
            {
                std::memset(&descs[later], 0xA5, sizeof descs[later]);
            }
            auto const supported = [&]
            { return buildOf(*plugin).supportsFormatCombination(pos, descs.data(), nbInputs, nbOutputs); };

            if (pos == typed)
            {
                EXPECT_EQ(supported(), isFloat) << "type " << static_cast<int32_t>(type);
            }
            if (!isFloat)
            {
                continue;
            }
            for (DataType const here : all)
            {
                descs[pos].desc.type = here;
                bool const expected = pos == typed ? c.supports(here) : here == typeAt(c, type, pos);
                EXPECT_EQ(supported(), expected) << "at " << pos << ", type " << static_cast<int32_t>(here);
            }
            descs[pos].desc.type = typeAt(c, type, pos);
            descs[pos].desc.format = TensorFormat::kCHW32;
            EXPECT_FALSE(supported()) << "at " << pos;
        }
    }
    std::vector<DynamicPluginTensorDesc> const descs = describe(c, DataType::kHALF);
    EXPECT_FALSE(buildOf(*plugin).supportsFormatCombination(0, descs.data(), nbInputs + 1, nbOutputs));
    EXPECT_FALSE(buildOf(*plugin).supportsFormatCombination(0, descs.data(), nbInputs, nbOutputs + 1));
}

TEST_P(EachCase, OutputsHaveTheTypeOfTheFirstInputOrTheirOwn)
{
    Case const& c = GetParam();
    auto const plugin = create(c.op, c.fields);
    for (DataType const type : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16})
    {
        if (!c.supports(type))
        {
            continue;
        }
        std::vector<DataType> inputs;
        for (size_t i = 0; i < c.inputs.size(); ++i)
        {
            inputs.push_back(typeAt(c, type, i));
        }
        std::vector<DataType> outputs(c.outputs.size(), DataType::kBOOL);
        EXPECT_EQ(buildOf(*plugin).getOutputDataTypes(outputs.data(), static_cast<int32_t>(outputs.size()),
                                                      inputs.data(), static_cast<int32_t>(inputs.size())),
                  0);
        for (size_t i = 0; i < outputs.size(); ++i)
        {
            EXPECT_EQ(outputs[i], typeAt(c, type, c.inputs.size() + i)) << "output " << i;
        }
    }
    DataType const integer = DataType::kINT32;
    DataType output{};
    EXPECT_NE(buildOf(*plugin).getOutputDataTypes(&output, 1, &integer, 1), 0);
    EXPECT_NE(logged().find(c.op), std::string::npos);
}

TEST_P(EachCase, OutputsHaveTheExpectedShapes)
{
    Case const& c = GetParam();
    auto const plugin = create(c.op, c.fields);
    Evaluator evaluator;
    std::vector<DimsExprs> inputs;
    for (Shape const& shape : c.inputs)
    {
        inputs.push_back(evaluator.dims(shape));
    }
    std::vector<DimsExprs> outputs(c.outputs.size());
    auto const shapes = [&]
    {
        return buildOf(*plugin).getOutputShapes(inputs.data(), static_cast<int32_t>(inputs.size()), nullptr, 0,
                                                outputs.data(), static_cast<int32_t>(outputs.size()), evaluator);
    };
    ASSERT_EQ(shapes(), 0) << logged();
    for (size_t i = 0; i < outputs.size(); ++i)
    {
        EXPECT_EQ(toShape(outputs[i]), c.outputs[i]) << "output " << i;
    }

    inputs.back().nbDims = 0;
    EXPECT_NE(shapes(), 0);
    EXPECT_NE(logged().find("dimensions, expected"), std::string::npos);
}

TEST_P(EachCase, AcceptsItsShapes)
{
    Case const& c = GetParam();
    auto const plugin = create(c.op, c.fields);
    auto const nbInputs = static_cast<int32_t>(c.inputs.size());
    auto const nbOutputs = static_cast<int32_t>(c.outputs.size());
    for (DataType const type : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16})
    {
        if (!c.supports(type))
        {
            EXPECT_NE(configure(c, type), 0);
            EXPECT_NE(logged().find("the type must be float16"), std::string::npos);
            continue;
        }
        EXPECT_EQ(configure(c, type), 0) << logged();
        std::vector<nvinfer1::PluginTensorDesc> const descs = staticOf(describe(c, type));
        EXPECT_EQ(runtimeOf(*plugin).onShapeChange(descs.data(), nbInputs, descs.data() + nbInputs, nbOutputs), 0)
            << logged();
    }
    std::vector<DynamicPluginTensorDesc> const descs = describe(c, DataType::kHALF);
    EXPECT_EQ(buildOf(*plugin).getWorkspaceSize(descs.data(), nbInputs, descs.data() + nbInputs, nbOutputs), 0U);
}

TEST_P(EachCase, RefusesAnInputOfAnotherShape)
{
    for (size_t i = 0; i < GetParam().inputs.size(); ++i)
    {
        Case c = GetParam();
        c.inputs[i].back() += 1;
        EXPECT_NE(configure(c, DataType::kHALF), 0) << "input " << i;
        EXPECT_NE(logged().find(c.op + "::configurePlugin: "), std::string::npos);
    }
}

//! Serialised fields, with values copied out.
std::map<std::string, std::string> serialised(nvinfer1::IPluginV3& plugin)
{
    std::map<PluginFieldType, size_t> const sizes{
        {PluginFieldType::kINT32, 4}, {PluginFieldType::kFLOAT32, 4}, {PluginFieldType::kCHAR, 1}};
    std::map<std::string, std::string> values;
    PluginFieldCollection const& fields = *runtimeOf(plugin).getFieldsToSerialize();
    for (int32_t i = 0; i < fields.nbFields; ++i)
    {
        PluginField const& field = fields.fields[i];
        values[field.name].assign(static_cast<char const*>(field.data), field.length * sizes.at(field.type));
    }
    return values;
}

TEST_P(EachCase, SerialisedFieldsMakeTheSamePlugin)
{
    Case const& c = GetParam();
    auto plugin = create(c.op, c.fields);
    auto const expected = serialised(*plugin);
    EXPECT_EQ(expected.size(), c.fields.size());
    for (PluginField const& field : c.fields)
    {
        size_t const size = field.type == PluginFieldType::kCHAR ? 1 : 4;
        std::string const value{static_cast<char const*>(field.data), field.length * size};
        EXPECT_EQ(expected.at(field.name), value) << field.name;
    }

    PluginFieldCollection const* const fields = runtimeOf(*plugin).getFieldsToSerialize();
    std::unique_ptr<nvinfer1::IPluginV3> const copy{
        creatorOf(c.op).createPlugin("layer", fields, TensorRTPhase::kRUNTIME)};
    ASSERT_NE(copy, nullptr) << logged();
    std::string const id = buildOf(*plugin).getTimingCacheID();
    plugin.reset();  // the copy must not lean on it
    EXPECT_EQ(serialised(*copy), expected);
    EXPECT_EQ(buildOf(*copy).getTimingCacheID(), id);
}

TEST_P(EachCase, ClonesAreCompleteAndIndependent)
{
    Case const& c = GetParam();
    auto plugin = create(c.op, c.fields);
    auto const expected = serialised(*plugin);
    std::string const id = buildOf(*plugin).getTimingCacheID();
    std::unique_ptr<nvinfer1::IPluginV3> const clone{plugin->clone()};
    std::unique_ptr<nvinfer1::IPluginV3> const attached{runtimeOf(*plugin).attachToContext(nullptr)};
    plugin.reset();
    for (nvinfer1::IPluginV3* const copy : {clone.get(), attached.get()})
    {
        ASSERT_NE(copy, nullptr);
        EXPECT_EQ(coreOf(*copy).getPluginName(), c.op);
        EXPECT_EQ(buildOf(*copy).getNbOutputs(), static_cast<int32_t>(c.outputs.size()));
        EXPECT_EQ(serialised(*copy), expected);
        EXPECT_EQ(buildOf(*copy).getTimingCacheID(), id);
    }
}

TEST_F(Plugins, TimingCacheIdsNameTheAttributes)
{
    auto const id = [](std::string const& op, std::vector<PluginField> const& fields)
    { return std::string{buildOf(*create(op, fields)).getTimingCacheID()}; };
    EXPECT_EQ(id("TrOCREncoderAttention", {kNUM_HEADS_6}), "num_heads=6");
    EXPECT_EQ(id("TrOCREncoderAttention", {kNUM_HEADS_8}), "num_heads=8");
    EXPECT_EQ(id("TrOCRBiasActivation", {kGELU}), "activation=gelu");
    EXPECT_EQ(id("TrOCRResidualLayerNorm", {kWITH_SUM, kEPSILON_FIELD}), "epsilon=9.99999975e-06,emit_sum=1");
}

TEST_F(Plugins, GetCreatorsIsStable)
{
    int32_t first = 0;
    int32_t second = 0;
    EXPECT_EQ(getCreators(first), getCreators(second));
    EXPECT_EQ(first, 15);
    EXPECT_EQ(second, 15);
}

TEST_F(Plugins, BadFieldsGiveAMessageAndNoPlugin)
{
    int32_t const minusOne = -1;
    int64_t const heads64 = 6;
    int32_t const two[]{6, 6};
    float const nan = std::numeric_limits<float>::quiet_NaN();
    float const infinity = std::numeric_limits<float>::infinity();
    float const negative = -1e-5F;
    float const zero = 0.0F;
    struct Bad
    {
        std::string op;
        std::vector<PluginField> fields;
        std::string message;
    };
    std::vector<Bad> const bad{
        {"TrOCREncoderAttention", {}, "attribute 'num_heads' (INT32) is missing"},
        {"TrOCREncoderAttention", {{"num_heads", &kZERO, PluginFieldType::kINT32, 1}}, "'num_heads' is 0"},
        {"TrOCRCrossAttention", {{"num_heads", &minusOne, PluginFieldType::kINT32, 1}}, "'num_heads' is -1"},
        {"TrOCRCrossAttention", {{"num_heads", &heads64, PluginFieldType::kINT64, 1}}, "type INT64, expected INT32"},
        {"TrOCRDecoderSelfAttention", {{"num_heads", two, PluginFieldType::kINT32, 2}}, "2 values, expected one"},
        {"TrOCRDecoderSelfAttention", {{"num_heads", two, PluginFieldType::kINT32, 0}}, "0 values, expected one"},
        {"TrOCRDecoderSelfAttention", {{"num_heads", nullptr, PluginFieldType::kINT32, 1}}, "no data"},
        {"TrOCREncoderAttention", {kNUM_HEADS_6, kGELU}, "'activation' is unknown"},
        {"TrOCREncoderAttention", {kNUM_HEADS_6, kNUM_HEADS_6}, "'num_heads' is unknown or given twice"},
        {"TrOCREncoderAttention", {{nullptr, &kONE, PluginFieldType::kINT32, 1}}, "'num_heads' (INT32) is missing"},
        {"TrOCRResidualLayerNorm", {kEPSILON_FIELD}, "'emit_sum' (INT32) is missing"},
        {"TrOCRResidualLayerNorm", {kWITH_SUM}, "'epsilon' (FLOAT32) is missing"},
        {"TrOCRResidualLayerNorm", {{"epsilon", &nan, PluginFieldType::kFLOAT32, 1}, kWITH_SUM}, "'epsilon' is nan"},
        {"TrOCRResidualLayerNorm",
         {{"epsilon", &infinity, PluginFieldType::kFLOAT32, 1}, kWITH_SUM},
         "'epsilon' is inf"},
        {"TrOCRResidualLayerNorm", {{"epsilon", &zero, PluginFieldType::kFLOAT32, 1}, kWITH_SUM}, "'epsilon' is 0"},
        {"TrOCRResidualLayerNorm", {{"epsilon", &negative, PluginFieldType::kFLOAT32, 1}, kWITH_SUM}, "'epsilon' is -"},
        {"TrOCRResidualLayerNorm",
         {kEPSILON_FIELD, {"emit_sum", &kHEADS_6, PluginFieldType::kINT32, 1}},
         "'emit_sum' is 6, expected 0 or 1"},
        {"TrOCRBiasActivation", {{"activation", "tanh", PluginFieldType::kCHAR, 4}}, "'activation' is 'tanh'"},
        {"TrOCRBiasActivation", {{"activation", "gelu", PluginFieldType::kCHAR, 0}}, "'activation' is empty"},
        {"TrOCRBiasActivation", {{"activation", &kONE, PluginFieldType::kINT32, 1}}, "type INT32, expected CHAR"},
        {"TrOCRRowStatistics", {kGELU}, "'activation' is unknown"},
        {"TrOCRLayerNormLinear", {kGELU}, "'epsilon' (FLOAT32) is missing"},
        {"TrOCRLayerNormLinear", {kEPSILON_FIELD}, "'activation' (CHAR) is missing"},
        {"TrOCRLayerNormLinear", {kGELU, {"epsilon", &zero, PluginFieldType::kFLOAT32, 1}}, "'epsilon' is 0"},
        {"TrOCRLayerNormLinear",
         {kEPSILON_FIELD, {"activation", "tanh", PluginFieldType::kCHAR, 4}},
         "'activation' is 'tanh', expected 'none', 'gelu' or 'relu'"},
        {"TrOCRLayerNorm", {{"epsilon", &zero, PluginFieldType::kFLOAT32, 1}}, "'epsilon' is 0"},
        {"TrOCRPatchEmbedding", {kWITH_STATISTICS}, "'scale' (FLOAT32) is missing"},
        {"TrOCRPatchEmbedding", {{"scale", &nan, PluginFieldType::kFLOAT32, 1}, kWITH_STATISTICS}, "'scale' is nan"},
        {"TrOCRPatchEmbedding",
         {kSCALE, {"emit_statistics", &kHEADS_6, PluginFieldType::kINT32, 1}},
         "'emit_statistics' is 6, expected 0 or 1"},
        {"TrOCRFp8RowStatistics", {{"scale", &zero, PluginFieldType::kFLOAT32, 1}}, "'scale' is 0"},
        {"TrOCRFp8EncoderAttention",
         {kNUM_HEADS_6, {"output_scale", &infinity, PluginFieldType::kFLOAT32, 1}},
         "'output_scale' is inf"},
        {"TrOCRFp8LayerNormLinear",
         {kEPSILON_FIELD, kGELU, {"product_scale", &nan, PluginFieldType::kFLOAT32, 1}, kOUTPUT_SCALE},
         "'product_scale' is nan"},
        {"TrOCRFp8LinearResidual", {kWITH_STATISTICS, kPRODUCT_SCALE, kNO_OUTPUT_SCALE}, "'output_scale' is 0"},
        {"TrOCRLinearResidual", {}, "'emit_statistics' (INT32) is missing"},
        {"TrOCRLinearResidual",
         {{"emit_statistics", &minusOne, PluginFieldType::kINT32, 1}},
         "'emit_statistics' is -1, expected 0 or 1"},
    };
    for (Bad const& b : bad)
    {
        EXPECT_EQ(create(b.op, b.fields), nullptr) << b.message;
        std::string const message = logged();
        EXPECT_NE(message.find(b.op + " (layer): "), std::string::npos) << message;
        EXPECT_NE(message.find(b.message), std::string::npos) << message;
    }
    EXPECT_EQ(creatorOf("TrOCREncoderAttention").createPlugin(nullptr, nullptr, TensorRTPhase::kBUILD), nullptr);
}

TEST_F(Plugins, StringsMayCountTheirFinalZero)
{
    EXPECT_NE(create("TrOCRBiasActivation", {{"activation", "relu", PluginFieldType::kCHAR, 5}}), nullptr) << logged();
}

TEST_F(Plugins, RefusedShapesAreNamed)
{
    struct Bad
    {
        Case c;
        std::string message;
    };
    std::vector<Bad> const bad{
        {{"TrOCREncoderAttention", {kNUM_HEADS_8}, {{1, 577, 960}}, {{1, 577, 320}}}, "head size 40"},
        {{"TrOCREncoderAttention", {kNUM_HEADS_8}, {{1, 577, 100}}, {{1, 577, 33}}}, "not a multiple of 24"},
        {{"TrOCREncoderAttention", {kNUM_HEADS_8}, {{577, 768}}, {{577, 256}}}, "qkv has 2 dimensions, expected 3"},
        {{"TrOCRCrossKeyValue",
          {kNUM_HEADS_8},
          {{3, 578, 384}, {520, 384}, {520}},
          {{3, 8, 578, 32}, {3, 8, 578, 32}},
          {{2, DataType::kFLOAT}}},
         "weight [520, 384] is not that of keys and values of 8 heads"},
        {{"TrOCRCrossKeyValue",
          {kNUM_HEADS_8},
          {{3, 578, 384}, {64, 384}, {64}},
          {{3, 8, 578, 4}, {3, 8, 578, 4}},
          {{2, DataType::kFLOAT}}},
         "the size of a head must be a multiple of 8"},
        {{"TrOCRCrossAttention", {kNUM_HEADS_8}, {{1, 1, 1024}, {1, 8, 577, 128}, {1, 8, 577, 128}}, {{1, 1, 1024}}},
         "head size 128"},
        {{"TrOCRCrossAttention", {kNUM_HEADS_8}, {{1, 2, 256}, {1, 8, 577, 32}, {1, 8, 577, 32}}, {{1, 2, 256}}},
         "query has shape [1, 2, 256], expected [1, 1, 256]"},
        {{"TrOCRCrossAttention", {kNUM_HEADS_8}, {{1, 1, 256}, {1, 4, 577, 64}, {1, 4, 577, 64}}, {{1, 1, 256}}},
         "key has shape [1, 4, 577, 64], expected [1, 8, 577, 32]"},
        {{"TrOCRCrossAttention", {kNUM_HEADS_8}, {{4, 1, 256}, {3, 8, 577, 32}, {3, 8, 577, 32}}, {{4, 1, 256}}},
         "the rows are not a multiple of the images"},
        {{"TrOCRCrossAttention", {kNUM_HEADS_8}, {{4, 1, 256}, {2, 8, 577, 32}, {4, 8, 577, 32}}, {{4, 1, 256}}},
         "value has shape [4, 8, 577, 32], expected [2, 8, 577, 32]"},
        {{"TrOCRDecoderSelfAttention",
          {kNUM_HEADS_8},
          {{1, 1, 768}, {1, 8, 40, 32}, {1, 8, 41, 32}, {1, 1}},
          {{1, 1, 256}, {1, 8, 40, 32}, {1, 8, 41, 32}},
          {{3, DataType::kINT64}}},
         "past_value has shape [1, 8, 41, 32], expected [1, 8, 40, 32]"},
        {{"TrOCRDecoderSelfAttention",
          {kNUM_HEADS_8},
          {{2, 1, 768}, {2, 8, 40, 32}, {2, 8, 40, 32}, {1, 1}},
          {{2, 1, 256}, {2, 8, 40, 32}, {2, 8, 40, 32}},
          {{3, DataType::kINT64}}},
         "position_ids has shape [1, 1], expected [2, 1]"},
        {{"TrOCRBiasActivation", {kRELU}, {{4, 1024}, {1023}}, {{4, 1024}}}, "bias has shape [1023], expected [1024]"},
        {{"TrOCRBiasActivation", {kRELU}, {{int64_t{1} << 40}, {1}}, {{int64_t{1} << 40}}}, "is out of range"},
        {{"TrOCRResidualLayerNorm", {kEPSILON_FIELD, kWITHOUT_SUM}, {{}, {}, {1}, {1}}, {{}}}, "x is a scalar"},
        {{"TrOCRRowStatistics", {}, {{4, 96}}, {{4, 1, 2}}, {{1, DataType::kFLOAT}}}, "a multiple of 64"},
        {{"TrOCRLayerNormLinear",
          {kEPSILON_FIELD, kGELU},
          {{4, 96}, {4, 1, 2}, {64, 96}, {64}, {64}},
          {{4, 64}},
          {{1, DataType::kFLOAT}, {3, DataType::kFLOAT}, {4, DataType::kFLOAT}}},
         "inputs must be a multiple of 64"},
        {{"TrOCRLayerNormLinear",
          {kEPSILON_FIELD, kGELU},
          {{4, 128}, {4, 1, 2}, {64, 128}, {64}, {64}},
          {{4, 64}},
          {{1, DataType::kFLOAT}, {3, DataType::kFLOAT}, {4, DataType::kFLOAT}}},
         "statistics has shape [4, 1, 2], expected [4, 2, 2]"},
        {{"TrOCRLinearResidual",
          {kWITH_STATISTICS},
          {{4, 128}, {72, 128}, {72}, {4, 72}},
          {{4, 72}, {4, 1, 2}},
          {{2, DataType::kFLOAT}, {5, DataType::kFLOAT}}},
         "outputs must be a multiple of 64"},
        {{"TrOCRLinearResidual",
          {kWITHOUT_STATISTICS},
          {{4, 128}, {64, 128}, {64}, {1, 64}},
          {{4, 64}},
          {{2, DataType::kFLOAT}}},
         "residual has shape [1, 64], expected [4, 64]"},
        {{"TrOCRLinearResidual",
          {kWITHOUT_STATISTICS},
          {{int64_t{1} << 31, 64}, {64, 64}, {64}, {int64_t{1} << 31, 64}},
          {{int64_t{1} << 31, 64}},
          {{2, DataType::kFLOAT}}},
         "rows at most 2^30"},
        {{"TrOCRFp8LayerNormLinear",
          {kEPSILON_FIELD, kNO_ACTIVATION, kPRODUCT_SCALE, kOUTPUT_SCALE},
          {{4, 64}, {4, 2, 2}, {64, 64}, {64}, {64}},
          {{4, 32}},
          {{1, DataType::kFLOAT}, {3, DataType::kFLOAT}, {4, DataType::kFLOAT}}},
         "e4m3 outputs go with a GELU"},
        {{"TrOCRFp8EncoderAttention", {kNUM_HEADS_6, kOUTPUT_SCALE}, {{1, 577, 576}}, {{1, 577, 96}}}, "head size 32"},
        {{"TrOCRLayerNorm", {kEPSILON_FIELD}, {{4, 64}, {64}, {1}}, {{4, 64}}}, "beta has shape [1], expected [64]"},
        {{"TrOCRPatchEmbedding",
          {kSCALE, kWITHOUT_STATISTICS},
          {{1, 3, 32, 10}, {64, 768}, {64}, {13, 64}},
          {{1, 13, 64}},
          {{0, DataType::kINT32}, {2, DataType::kFLOAT}}},
         "height and width must be multiples of 16"},
        {{"TrOCRPatchEmbedding",
          {kSCALE, kWITHOUT_STATISTICS},
          {{1, 3, 32, 24}, {64, 768}, {64}, {11, 64}},
          {{1, 11, 64}},
          {{0, DataType::kINT32}, {2, DataType::kFLOAT}}},
         "special tokens at least 0"},
        {{"TrOCRPatchEmbedding",
          {kSCALE, kWITHOUT_STATISTICS},
          {{1, 1, 32, 24}, {64, 768}, {64}, {13, 64}},
          {{1, 13, 64}},
          {{0, DataType::kINT32}, {2, DataType::kFLOAT}}},
         "pixels has shape [1, 1, 32, 24], expected [1, 3, 32, 24]"},
    };
    for (Bad const& b : bad)
    {
        EXPECT_NE(configure(b.c, DataType::kHALF), 0) << b.message;
        std::string const message = logged();
        EXPECT_NE(message.find(b.message), std::string::npos) << message;

        auto const plugin = create(b.c.op, b.c.fields);
        std::vector<nvinfer1::PluginTensorDesc> const descs = staticOf(describe(b.c, DataType::kHALF));
        auto const nbInputs = static_cast<int32_t>(b.c.inputs.size());
        auto const nbOutputs = static_cast<int32_t>(b.c.outputs.size());
        EXPECT_NE(runtimeOf(*plugin).onShapeChange(descs.data(), nbInputs, descs.data() + nbInputs, nbOutputs), 0);
        EXPECT_NE(logged().find(b.message), std::string::npos);
    }
    Case wrongType = kCASES.front();
    EXPECT_NE(configure(wrongType, DataType::kINT8), 0);
    EXPECT_NE(logged().find("must be float32, float16 or bfloat16"), std::string::npos);
}

TEST_F(Plugins, WithoutALoggerErrorsGoToStderr)
{
    setLoggerFinder(nullptr);
    testing::internal::CaptureStderr();
    EXPECT_EQ(create("TrOCREncoderAttention", {}), nullptr);
    EXPECT_EQ(testing::internal::GetCapturedStderr(),
              "[trocr] error: TrOCREncoderAttention (layer): attribute 'num_heads' (INT32) is missing\n");
}

}  // namespace
