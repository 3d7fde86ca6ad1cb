#pragma once

#include <NvInferRuntime.h>

#include <string>

namespace trocr
{

//! Remembers where TensorRT says its logger is found; called once, when the library is loaded.
void setLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept;

//! Reports an error to TensorRT's logger and to the plugin registry's error recorder; to stderr if there is neither.
void logError(std::string const& message) noexcept;

}  // namespace trocr
