"""A TensorRT engine on torch tensors: load with every check, bind, enqueue.

Everything runs on torch's current stream and nothing here synchronises.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from runtime.backends.base import BackendError
from runtime.gpu import current_gpu
from runtime.manifest import Manifest, ManifestError
from runtime.tensorrt_loader import TensorRTError, load_plugin_library, load_tensorrt, tensorrt_logger

ALIGNMENT = 256  # bytes, of every address that TensorRT is given


class EngineError(BackendError):
    """An engine cannot be loaded or run as asked; the message names the file, the value and the remedy."""


class Engine:
    """One engine of an engine folder.

    Attributes:
        path: the plan file.
        inputs, outputs: tensor names in the graph's order.
        dtypes: of every tensor.
        max_batch, min_batch: of the optimisation profile.
    """

    def __init__(self, trt, plan: bytes, path: Path, rebuild: str):
        self.path = path
        self.rebuild = rebuild
        self._trt = trt
        self._runtime = trt.Runtime(tensorrt_logger(trt))  # has to outlive the engine
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise EngineError(
                f"{path}: TensorRT {trt.__version__} cannot read this plan (log above); rebuild: {rebuild}"
            )

        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        is_input = {name: self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        self.inputs = [name for name in names if is_input[name]]
        self.outputs = [name for name in names if not is_input[name]]
        to_torch = {
            trt.float32: torch.float32,
            trt.float16: torch.float16,
            trt.bfloat16: torch.bfloat16,
            trt.int32: torch.int32,
            trt.int64: torch.int64,
        }
        self.dtypes = {name: to_torch[self._engine.get_tensor_dtype(name)] for name in names}
        minimum, _, maximum = self.profile(self.inputs[0])
        self.min_batch, self.max_batch = minimum[0], maximum[0]
        # One scratch memory for all contexts: they run one after the other, on one stream.
        self._scratch = torch.empty(
            max(1, self._engine.device_memory_size_v2), dtype=torch.uint8, device="cuda"
        )

    @classmethod
    def load(cls, folder: Path | str, name: str) -> Engine:
        """The engine `name` ("encoder", "cross_kv" or "decoder") of an engine folder, on torch's current GPU.

        Checks the manifest, this machine and the file's hash before TensorRT sees a byte, and loads the
        plugin library where the folder's graphs need it.

        Raises:
            EngineError: no or a damaged manifest; an engine missing, damaged, or of another TensorRT or GPU;
                no TensorRT, no GPU, or no plugin library that has the ops.
        """
        folder = Path(folder)
        gpu = current_gpu()
        if gpu is None:
            raise EngineError(
                f"{folder}: TensorRT engines need an NVIDIA GPU, and none is here; use another backend"
            )
        try:
            manifest = Manifest.read(folder)
            trt = load_tensorrt()
            manifest.check_machine(folder, trt.__version__, gpu.name, gpu.compute_capability)
            manifest.check_file(folder, f"{name}.engine")
            if manifest.fused_ops:
                load_plugin_library([op.op for op in manifest.fused_ops])
        except (ManifestError, TensorRTError) as error:
            raise EngineError(str(error)) from error
        path = folder / f"{name}.engine"
        return cls(trt, path.read_bytes(), path, manifest.command)

    def profile(self, name: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The (min, opt, max) shapes of an input."""
        return tuple(tuple(shape) for shape in self._engine.get_tensor_profile_shape(name, 0))

    def check_batch(self, batch: int) -> None:
        """Raise EngineError for a batch above the profile's."""
        if batch > self.max_batch:
            raise EngineError(
                f"{self.path}: a batch of {batch} is above {self.max_batch}, the most the engine was built "
                f"for; give smaller batches, or rebuild with a larger --batch: {self.rebuild}"
            )

    def bind(self, tensors: Mapping[str, torch.Tensor]) -> BoundEngine:
        """An execution on these tensors: all inputs and outputs, contiguous, on the GPU.

        Raises:
            EngineError: a tensor missing, of another type, or of a shape outside the profile.
        """
        return BoundEngine(self, tensors)

    def empty_outputs(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Uninitialised output tensors of the sizes that these inputs lead to."""
        context = self.new_context()
        for name in self.inputs:
            self._set_shape(context, name, inputs[name])
        return {
            name: torch.empty(tuple(context.get_tensor_shape(name)), dtype=self.dtypes[name], device="cuda")
            for name in self.outputs
        }

    def new_context(self):
        context = self._engine.create_execution_context(
            self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        if context is None:
            raise EngineError(
                f"{self.path}: TensorRT cannot create a context (its log is above); free GPU memory"
            )
        context.set_device_memory(self._scratch.data_ptr(), self._scratch.numel())
        return context

    def _set_shape(self, context, name: str, tensor: torch.Tensor) -> None:
        low, _, high = self.profile(name)
        shape = tuple(tensor.shape)
        if len(shape) != len(low) or not all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True)):
            if len(shape) == len(low):
                self.check_batch(shape[0])
            raise EngineError(
                f"{self.path}: {name} has shape {list(shape)}, the engine takes {list(low)} to {list(high)}; "
                f"rebuild: {self.rebuild}"
            )
        context.set_input_shape(name, shape)


class BoundEngine:
    """An engine on fixed tensors: calling it enqueues one inference on torch's current stream.

    Has a context of its own: TensorRT keeps there what depends on the shapes, so that a CUDA graph captured
    from it stays valid only as long as the context lives and keeps its shapes.
    """

    def __init__(self, engine: Engine, tensors: Mapping[str, torch.Tensor]):
        self.engine = engine
        self.tensors: dict[str, torch.Tensor] = {}
        missing = [name for name in (*engine.inputs, *engine.outputs) if name not in tensors]
        if missing:
            raise EngineError(f"{engine.path}: no tensor for {', '.join(missing)}")
        self._context = engine.new_context()
        for name in engine.inputs:
            engine._set_shape(self._context, name, tensors[name])
            self.rebind(name, tensors[name])
        for name in engine.outputs:
            expected = tuple(self._context.get_tensor_shape(name))
            found = tuple(tensors[name].shape)
            if found != expected:
                raise EngineError(
                    f"{engine.path}: {name} has shape {list(found)}, the engine writes {list(expected)}"
                )
            self.rebind(name, tensors[name])

    def rebind(self, name: str, tensor: torch.Tensor) -> None:
        """Put another tensor of the same shape in the place of `name`'s."""
        bound = self.tensors.get(name)
        if bound is tensor:
            return
        # Of an empty tensor data_ptr() is null, which TensorRT refuses.
        address = tensor.untyped_storage().data_ptr() + tensor.storage_offset() * tensor.element_size()
        dtype = self.engine.dtypes[name]
        if tensor.dtype != dtype or not tensor.is_cuda or not tensor.is_contiguous() or address % ALIGNMENT:
            raise EngineError(
                f"{self.engine.path}: {name} is {tensor.dtype} on {tensor.device} at {address:#x}, strides "
                f"{tensor.stride()}; the engine takes {dtype} on the GPU, contiguous, aligned to {ALIGNMENT}"
            )
        self._context.set_tensor_address(name, address)
        self.tensors[name] = tensor  # keeps the memory

    def attach_profiler(self, report: Callable[[str, float], None]) -> None:
        """From now on TensorRT puts an event between any two layers, of calls and of graphs captured from
        them; `report_layers` hands their times to `report`: a layer's name and milliseconds.
        """
        trt = self.engine._trt

        class Profiler(trt.IProfiler):
            def __init__(self):
                trt.IProfiler.__init__(self)

            def report_layer_time(self, layer_name, ms):
                report(layer_name, ms)

        self._profiler = Profiler()  # TensorRT does not keep it
        self._context.enqueue_emits_profile = False  # it would wait for the end, which no capture can
        self._context.profiler = self._profiler

    def report_layers(self) -> None:
        """Report the layers' times of the last inference, enqueued or replayed, which must have ended."""
        if not self._context.report_to_profiler():
            raise EngineError(
                f"{self.engine.path}: TensorRT has no layers' times (its log is above); attach a profiler "
                "before the engine is enqueued or captured"
            )

    def layer_information(self) -> str:
        """TensorRT's description of the layers with these shapes: the JSON of its engine inspector."""
        inspector = self.engine._engine.create_engine_inspector()
        inspector.execution_context = self._context
        return inspector.get_engine_information(self.engine._trt.LayerInformationFormat.JSON)

    def __call__(self) -> None:
        if not self._context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise EngineError(f"{self.engine.path}: TensorRT cannot enqueue the engine (its log is above)")


def capture(run: Callable[[], object], pool=None) -> torch.cuda.CUDAGraph:
    """Record `run` as a CUDA graph, without executing it.

    TensorRT wants one enqueue with the same shapes before a capture: the caller has run it once.
    """
    graph = torch.cuda.CUDAGraph()
    # thread_local: a thread that loads images may pin memory meanwhile.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        run()
    return graph
