#pragma once

#include <NvInferRuntime.h>

//! Shapes of e4m3 tensors. TensorRT sees these as float16 with half of the columns, the same bytes two at a time: it
//! has no say in what is in them, and no plugin of another library reads them.

namespace trocr
{

//! The real shape of an e4m3 tensor.
inline nvinfer1::Dims doubled(nvinfer1::Dims dims)
{
    if (dims.nbDims > 0)
    {
        dims.d[dims.nbDims - 1] *= 2;
    }
    return dims;
}

//! What TensorRT sees of an e4m3 tensor of this shape.
inline nvinfer1::DimsExprs halved(nvinfer1::DimsExprs dims, nvinfer1::IExprBuilder& exprBuilder)
{
    nvinfer1::IDimensionExpr const*& last = dims.d[dims.nbDims - 1];
    last = exprBuilder.operation(nvinfer1::DimensionOperation::kFLOOR_DIV, *last, *exprBuilder.constant(2));
    return dims;
}

}  // namespace trocr
