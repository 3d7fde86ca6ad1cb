class TensorRTError(RuntimeError): pass
def find_plugin_library(): raise TensorRTError("none")
def load_tensorrt(): raise TensorRTError("none")
def load_plugin_library(ops): pass
def tensorrt_logger(): pass
