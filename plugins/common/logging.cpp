#include "common/logging.h"

#include <atomic>
#include <cstdio>

// The library is not linked with libnvinfer, so that it loads into any major version. Both functions are there when the
// application has loaded TensorRT with global symbols, and null otherwise.
extern "C" __attribute__((weak)) nvinfer1::IPluginRegistry* getPluginRegistry() noexcept;
extern "C" __attribute__((weak)) nvinfer1::ILogger* getLogger() noexcept;

namespace trocr
{
namespace
{

std::atomic<nvinfer1::ILoggerFinder*> gLoggerFinder{nullptr};

nvinfer1::ILogger* findLogger() noexcept
{
    if (nvinfer1::ILoggerFinder* const finder = gLoggerFinder)
    {
        if (nvinfer1::ILogger* const logger = finder->findLogger())
        {
            return logger;
        }
    }
    return getLogger ? getLogger() : nullptr;
}

}  // namespace

void setLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept
{
    gLoggerFinder = finder;
}

void logError(std::string const& message) noexcept
{
    nvinfer1::ILogger* const logger = findLogger();
    nvinfer1::IErrorRecorder* const recorder = getPluginRegistry ? getPluginRegistry()->getErrorRecorder() : nullptr;
    if (logger != nullptr)
    {
        logger->log(nvinfer1::ILogger::Severity::kERROR, message.c_str());
    }
    if (recorder != nullptr)
    {
        recorder->reportError(nvinfer1::ErrorCode::kINVALID_ARGUMENT, message.c_str());
    }
    if (logger == nullptr && recorder == nullptr)
    {
        std::fprintf(stderr, "[trocr] error: %s\n", message.c_str());
    }
}

}  // namespace trocr
