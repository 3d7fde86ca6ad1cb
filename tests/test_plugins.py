"""The plugin library with the real TensorRT: loading, creators, attributes, exports. No GPU is needed.

What Python cannot call on a C++ plugin (types, shapes, clones, serialisation) is tested in
tests/cpp/test_plugins.cpp, which is run from here.
"""

import _ctypes
import importlib.util
import os
import re
import shutil
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from graph_surgery.fused_ops import DOMAIN, FUSED_OPS, VERSION
from runtime import tensorrt_loader
from runtime.tensorrt_loader import TensorRTError, find_plugin_library, load_plugin_library, load_tensorrt

ROOT = Path(__file__).resolve().parent.parent
TENSORRT_MODULES = [name for name in ("tensorrt", "tensorrt_bindings") if importlib.util.find_spec(name)]
OPS = FUSED_OPS
NUM_HEADS = {"num_heads": np.int32(6)}
GOOD = {
    "TrOCREncoderAttention": NUM_HEADS,
    "TrOCRDecoderSelfAttention": NUM_HEADS,
    "TrOCRCrossAttention": NUM_HEADS,
    "TrOCRCrossKeyValue": NUM_HEADS,
    "TrOCRResidualLayerNorm": {"epsilon": np.float32(1e-5), "emit_sum": np.int32(0)},
    "TrOCRLayerNorm": {"epsilon": np.float32(1e-5)},
    "TrOCRBiasActivation": {"activation": "gelu"},
    "TrOCRRowStatistics": {},
    "TrOCRLayerNormLinear": {"epsilon": np.float32(1e-5), "activation": "none"},
    "TrOCRLinearResidual": {"emit_statistics": np.int32(0)},
    "TrOCRPatchEmbedding": {"scale": np.float32(1 / 255), "emit_statistics": np.int32(0)},
    "TrOCRFp8EncoderAttention": {**NUM_HEADS, "output_scale": np.float32(0.02)},
    "TrOCRFp8RowStatistics": {"scale": np.float32(0.05)},
    "TrOCRFp8LayerNormLinear": {
        "epsilon": np.float32(1e-5),
        "activation": "none",
        "product_scale": np.float32(1e-4),
        "output_scale": np.float32(0),
    },
    "TrOCRFp8LinearResidual": {
        "emit_statistics": np.int32(0),
        "product_scale": np.float32(1e-4),
        "output_scale": np.float32(0.05),
    },
}

needs_tensorrt = pytest.mark.skipif(
    not TENSORRT_MODULES, reason="no TensorRT Python module: python scripts/get_tensorrt.py"
)


@pytest.fixture(scope="module")
def trt():
    load_plugin_library(OPS)
    return load_tensorrt()


def create(trt, op: str, attributes: dict):
    """The plugin, or None where the attributes are refused."""
    field_types = {
        np.dtype(np.int32): trt.PluginFieldType.INT32,
        np.dtype(np.int64): trt.PluginFieldType.INT64,
        np.dtype(np.float32): trt.PluginFieldType.FLOAT32,
        np.dtype(np.float64): trt.PluginFieldType.FLOAT64,
        np.dtype(np.int8): trt.PluginFieldType.CHAR,
    }
    fields = []
    for name, value in attributes.items():
        data = np.frombuffer(value.encode(), np.int8) if isinstance(value, str) else np.atleast_1d(value)
        fields.append(trt.PluginField(name, data, field_types[data.dtype]))
    creator = trt.get_plugin_registry().get_creator(op, VERSION, DOMAIN)
    return creator.create_plugin("layer", trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD)


def build_property(trt, op: str, attributes: dict, name: str):
    plugin = create(trt, op, attributes)  # must outlive its capability
    return getattr(plugin.get_capability_interface(trt.PluginCapabilityType.BUILD), name)


@needs_tensorrt
@pytest.mark.tensorrt
def test_the_library_holds_exactly_the_fused_ops(trt):
    assert set(GOOD) == set(OPS)
    ours = [c for c in trt.get_plugin_registry().all_creators if c.plugin_namespace == DOMAIN]
    assert sorted(c.name for c in ours) == sorted(OPS)
    assert {c.plugin_version for c in ours} == {VERSION}
    assert (tensorrt_loader.PLUGIN_NAMESPACE, tensorrt_loader.PLUGIN_VERSION) == (DOMAIN, VERSION)


@needs_tensorrt
@pytest.mark.tensorrt
@pytest.mark.parametrize("op", OPS)
def test_attributes_are_those_of_the_table(trt, op):
    field_types = {
        int: trt.PluginFieldType.INT32,
        float: trt.PluginFieldType.FLOAT32,
        str: trt.PluginFieldType.CHAR,
    }
    fields = trt.get_plugin_registry().get_creator(op, VERSION, DOMAIN).field_names
    assert {field.name: field.type for field in fields} == {
        attribute.name: field_types[attribute.type]
        for attribute in OPS[op].attributes
        if attribute.for_plugin
    }


@needs_tensorrt
@pytest.mark.tensorrt
@pytest.mark.parametrize("op", OPS)
def test_good_attributes_make_a_plugin_of_the_tables_outputs(trt, op):
    attributes = {
        name: np.int32(1) if name.startswith("emit_") else value for name, value in GOOD[op].items()
    }
    assert build_property(trt, op, attributes, "num_outputs") == len(OPS[op].outputs)
    plugin = create(trt, op, attributes)
    core = plugin.get_capability_interface(trt.PluginCapabilityType.CORE)
    assert (core.plugin_name, core.plugin_version, core.plugin_namespace) == (op, VERSION, DOMAIN)


@needs_tensorrt
@pytest.mark.tensorrt
def test_the_sum_is_an_output_only_when_asked_for(trt):
    def outputs(emit_sum: int) -> int:
        attributes = {"epsilon": np.float32(1e-12), "emit_sum": np.int32(emit_sum)}
        return build_property(trt, "TrOCRResidualLayerNorm", attributes, "num_outputs")

    assert (outputs(0), outputs(1)) == (1, 2)


@needs_tensorrt
@pytest.mark.tensorrt
def test_statistics_are_an_output_only_when_asked_for(trt):
    def outputs(op: str, emit_statistics: int) -> int:
        attributes = GOOD[op] | {"emit_statistics": np.int32(emit_statistics)}
        return build_property(trt, op, attributes, "num_outputs")

    for op, emitted in (("TrOCRLinearResidual", 2), ("TrOCRFp8LinearResidual", 3)):
        assert (outputs(op, 0), outputs(op, 1)) == (1, emitted)


@needs_tensorrt
@pytest.mark.tensorrt
def test_every_attribute_changes_the_timing_cache_id(trt):
    def identity(op: str, **attributes) -> str:
        return build_property(trt, op, GOOD[op] | attributes, "timing_cache_id")

    others = {
        "num_heads": np.int32(8),
        "epsilon": np.float32(1e-12),
        "scale": np.float32(1),
        "product_scale": np.float32(1e-3),
        "output_scale": np.float32(0.5),
        "emit_sum": np.int32(1),
        "emit_statistics": np.int32(1),
        "activation": "relu",
    }
    for op, table in OPS.items():
        assert identity(op) == identity(op)
        for attribute in filter(lambda attribute: attribute.for_plugin, table.attributes):
            name = attribute.name
            assert identity(op) != identity(op, **{name: others[name]}), f"{op}.{name}"


BAD = [
    ("TrOCREncoderAttention", {}, "'num_heads' (INT32) is missing"),
    ("TrOCREncoderAttention", {"num_heads": np.int32(0)}, "'num_heads' is 0"),
    ("TrOCRCrossAttention", {"num_heads": np.int32(-8)}, "'num_heads' is -8"),
    ("TrOCRCrossKeyValue", {"num_heads": np.int32(0)}, "'num_heads' is 0"),
    ("TrOCRCrossAttention", {"num_heads": np.int64(8)}, "type INT64, expected INT32"),
    ("TrOCRDecoderSelfAttention", {"num_heads": np.int32([8, 8])}, "2 values, expected one"),
    ("TrOCRDecoderSelfAttention", {"num_heads": "8"}, "type CHAR, expected INT32"),
    ("TrOCREncoderAttention", {**NUM_HEADS, "scale": np.float32(1)}, "'scale' is unknown"),
    ("TrOCRResidualLayerNorm", {"epsilon": np.float32(1e-5)}, "'emit_sum' (INT32) is missing"),
    ("TrOCRResidualLayerNorm", {"emit_sum": np.int32(0)}, "'epsilon' (FLOAT32) is missing"),
    ("TrOCRResidualLayerNorm", {"epsilon": np.float32("nan"), "emit_sum": np.int32(0)}, "'epsilon' is "),
    ("TrOCRResidualLayerNorm", {"epsilon": np.float32(0), "emit_sum": np.int32(0)}, "'epsilon' is 0"),
    ("TrOCRResidualLayerNorm", {"epsilon": np.float64(1), "emit_sum": np.int32(0)}, "expected FLOAT32"),
    ("TrOCRResidualLayerNorm", {"epsilon": np.float32(1), "emit_sum": np.int32(2)}, "expected 0 or 1"),
    ("TrOCRBiasActivation", {"activation": "gelu_new"}, "'activation' is 'gelu_new'"),
    ("TrOCRBiasActivation", {"activation": np.int32(1)}, "type INT32, expected CHAR"),
    ("TrOCRRowStatistics", {"epsilon": np.float32(1e-5)}, "'epsilon' is unknown"),
    ("TrOCRLayerNormLinear", {"epsilon": np.float32(1e-5)}, "'activation' (CHAR) is missing"),
    ("TrOCRLayerNormLinear", {"epsilon": np.float32(0), "activation": "none"}, "'epsilon' is 0"),
    ("TrOCRLinearResidual", {"emit_statistics": np.int32(2)}, "expected 0 or 1"),
    ("TrOCRLayerNorm", {"epsilon": np.float32(0)}, "'epsilon' is 0"),
    ("TrOCRPatchEmbedding", {"scale": np.float32(0), "emit_statistics": np.int32(0)}, "'scale' is 0"),
    ("TrOCRFp8RowStatistics", {}, "'scale' (FLOAT32) is missing"),
    ("TrOCRFp8RowStatistics", {"scale": np.float32(0)}, "'scale' is 0"),
    ("TrOCRFp8EncoderAttention", {**NUM_HEADS}, "'output_scale' (FLOAT32) is missing"),
    ("TrOCRFp8EncoderAttention", {**NUM_HEADS, "output_scale": np.float32(0)}, "'output_scale' is 0"),
]


@needs_tensorrt
@pytest.mark.tensorrt
@pytest.mark.parametrize(("op", "attributes", "message"), BAD)
def test_a_bad_attribute_gives_a_message_and_no_plugin(trt, capfd, op, attributes, message):
    assert create(trt, op, attributes) is None
    printed = capfd.readouterr().err
    assert f"{op} (layer): attribute " in printed
    assert message in printed


@needs_tensorrt
@pytest.mark.tensorrt
def test_messages_reach_the_registrys_error_recorder(trt):
    class Recorder(trt.IErrorRecorder):
        def __init__(self):
            trt.IErrorRecorder.__init__(self)
            self.errors = []

        def clear(self):
            self.errors.clear()

        def num_errors(self):
            return len(self.errors)

        def get_error_code(self, i):
            return self.errors[i][0]

        def get_error_desc(self, i):
            return self.errors[i][1]

        def has_overflowed(self):
            return False

        def report_error(self, code, description):
            self.errors.append((code, description))
            return False

    registry = trt.get_plugin_registry()
    recorder = Recorder()
    registry.error_recorder = recorder
    try:
        assert create(trt, "TrOCRBiasActivation", {"activation": "tanh"}) is None
    finally:
        registry.error_recorder = None
    [(_, description)] = recorder.errors
    assert "attribute 'activation' is 'tanh', expected 'gelu' or 'relu'" in description


@needs_tensorrt
@pytest.mark.tensorrt
def test_loading_again_changes_nothing(trt):
    before = len(trt.get_plugin_registry().all_creators)
    assert load_plugin_library(OPS) == find_plugin_library()
    assert len(trt.get_plugin_registry().all_creators) == before


@needs_tensorrt
@pytest.mark.tensorrt
def test_a_library_without_the_needed_op_is_refused(trt):
    with pytest.raises(
        TensorRTError, match=r"libtrocr_plugins\.so has no plugin TrOCRWholeDecoder of namespace"
    ):
        load_plugin_library(["TrOCREncoderAttention", "TrOCRWholeDecoder"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU: a builder needs one")
@needs_tensorrt
def test_a_builder_infers_types_and_shapes(trt):
    """With a real builder: what the network says of a plugin layer's outputs."""
    network = trt.Builder(tensorrt_loader.tensorrt_logger(trt)).create_network(
        1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    )
    shapes = {"qkv": (-1, 1, 768), "past_key": (-1, 8, 64, 32), "past_value": (-1, 8, 64, 32)}
    inputs = [network.add_input(name, trt.bfloat16, shape) for name, shape in shapes.items()]
    inputs.append(network.add_input("position_ids", trt.int64, (-1, 1)))
    plugin = create(trt, "TrOCRDecoderSelfAttention", {"num_heads": np.int32(8)})
    layer = network.add_plugin_v3(inputs, [], plugin)
    outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
    assert [tuple(output.shape) for output in outputs] == [(-1, 1, 256), (-1, 8, 64, 32), (-1, 8, 64, 32)]
    assert {output.dtype for output in outputs} == {trt.bfloat16}


# The library as a file.


@pytest.fixture(scope="module")
def library() -> Path:
    try:
        return find_plugin_library()
    except TensorRTError as error:
        pytest.skip(str(error))


def test_only_two_symbols_are_exported(library):
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm is not installed (binutils)")
    symbols = subprocess.run(
        [nm, "-D", "--defined-only", library], capture_output=True, text=True, check=True
    )
    assert sorted(line.split()[-1] for line in symbols.stdout.splitlines()) == [
        "getCreators",
        "setLoggerFinder",
    ]


def test_no_library_of_cuda_or_tensorrt_is_linked(library):
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("readelf is not installed (binutils)")
    dynamic = subprocess.run([readelf, "-d", library], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.+?)\]", dynamic)
    assert needed
    assert not [name for name in needed if re.match(r"libnv|libcud", name)]


def device_code(library: Path) -> tuple[Counter, Counter]:
    """How many kernel files have real code, and PTX, for each architecture.

    Reads the headers of the fat binaries that nvcc puts into a library: a magic number, sizes, then for each
    architecture a kind (1 is PTX, 2 real code), the size of what follows, and the architecture at byte 28.
    """
    data = library.read_bytes()
    real, ptx = Counter(), Counter()
    for header in re.finditer(struct.pack("<IHH", 0xBA55ED50, 1, 16), data):
        (size,) = struct.unpack_from("<Q", data, header.end())
        position = header.start() + 16
        end = position + size
        while position < end:
            kind, _, header_size, payload = struct.unpack_from("<HHIQ", data, position)
            (architecture,) = struct.unpack_from("<I", data, position + 28)
            (ptx if kind == 1 else real)[architecture] += 1
            position += header_size + payload
    return real, ptx


@pytest.mark.parametrize("build", ["build", "build-all-archs"])
def test_every_kernel_is_there_for_every_architecture_asked_for(build):
    library = ROOT / build / tensorrt_loader.PLUGIN_LIBRARY
    if not library.is_file():
        pytest.skip(f"{library} is not built")
    cache = (library.parent / "CMakeCache.txt").read_text()
    asked = re.search(r"^CMAKE_CUDA_ARCHITECTURES:\w+=(.*)$", cache, re.M).group(1).split(";")
    everything = re.search(r"^TROCR_ALL_ARCHS:BOOL=ON$", cache, re.M) is not None

    def numbers(names: list[str]) -> list[int]:
        return [int(re.match(r"\d+", name).group()) for name in names]

    files = list((ROOT / "plugins").glob("*/*.cu"))
    hopper_files = [file for file in files if "sm90" in file.name]  # compiled for Hopper, always and only
    others = len(files) - len(hopper_files)
    expected = Counter(dict.fromkeys(numbers([n for n in asked if not n.endswith("-virtual")]), others))
    expected[90] += len(hopper_files)
    real, ptx = device_code(library)
    assert real == expected
    assert ptx == dict.fromkeys(numbers([n for n in asked if not n.endswith("-real")]), others)
    if everything:
        assert set(real) == {80, 86, 89, 90, 120}
        assert set(ptx) == {120}


def test_the_contract_tests_in_cpp_pass(library):
    binary = library.parent / "tests" / "cpp" / "test_plugins"
    if not binary.is_file():
        pytest.skip(f"{binary} is not built: GoogleTest (libgtest-dev) was not found")
    run = subprocess.run([binary, "--gtest_brief=1"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]


# Messages of the loader. Each in a process of its own: what is loaded stays loaded.


def load(root: Path, code: str, *flags: str, **environment: str) -> str:
    """The message of code run with a copy of the loader whose project is `root`, without an environment."""
    (root / "runtime").mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "runtime" / "tensorrt_loader.py", root / "runtime")
    run = subprocess.run(
        [
            sys.executable,
            *flags,
            "-c",
            f"import sys; sys.path.insert(0, {str(root)!r}); from runtime.tensorrt_loader import *; {code}",
        ],
        capture_output=True,
        text=True,
        env=environment,
        cwd=root,
    )
    assert run.returncode == 1, run.stdout + run.stderr
    return run.stderr.partition("TensorRTError: ")[2]


def test_without_tensorrt_the_message_says_what_is_missing(tmp_path):
    message = load(tmp_path, "load_tensorrt()", "-I", "-S")
    assert "Python module tensorrt: not installed" in message
    assert "Python module tensorrt_bindings: not installed" in message
    assert "scripts/get_tensorrt.py" in message


@pytest.mark.skipif(
    TENSORRT_MODULES != ["tensorrt_bindings"], reason="needs tensorrt_bindings and no tensorrt"
)
def test_without_libraries_the_message_says_where_they_were_looked_for(tmp_path):
    major = tensorrt_loader._bindings_major()
    on_the_path = f"import ctypes; ctypes.CDLL('libnvinfer.so.{major}')"
    if subprocess.run([sys.executable, "-c", on_the_path], capture_output=True).returncode == 0:
        pytest.skip("TensorRT is on the loader's path here")
    empty = tmp_path / "empty"
    message = load(tmp_path, "load_tensorrt()", TENSORRT_ROOT=str(empty))
    assert f"libnvinfer.so.{major}" in message
    assert f"TENSORRT_ROOT is {empty}" in message
    assert str(tmp_path / ".deps" / "tensorrt" / "lib") in message


def test_without_a_plugin_library_the_message_says_where_it_was_looked_for(tmp_path, monkeypatch):
    message = load(tmp_path, "find_plugin_library()")
    assert str(tmp_path / "build" / "libtrocr_plugins.so") in message
    assert "cmake --build build" in message

    monkeypatch.setenv("TROCR_PLUGIN_LIBRARY", str(tmp_path / "none.so"))
    with pytest.raises(TensorRTError, match=r"TROCR_PLUGIN_LIBRARY \(.*none\.so\)"):
        find_plugin_library()


@needs_tensorrt
@pytest.mark.tensorrt
def test_a_file_that_is_no_plugin_library_is_named(tmp_path):
    text = tmp_path / "text.so"
    text.write_text("no library")
    for file, message in [(text, "cannot be loaded"), (Path(_ctypes.__file__), "exports no plugins")]:
        run = subprocess.run(
            [
                sys.executable,
                "-c",
                "from runtime.tensorrt_loader import *; load_plugin_library(['TrOCREncoderAttention'])",
            ],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=os.environ | {"TROCR_PLUGIN_LIBRARY": str(file)},
        )
        assert run.returncode == 1
        assert str(file) in run.stderr
        assert message in run.stderr
