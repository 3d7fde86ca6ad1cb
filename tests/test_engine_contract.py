"""Loading engines on a machine that cannot run them: every reason has a message of its own."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from runtime import tensorrt_loader
from runtime.backends import choice, tensorrt_backend
from runtime.backends.base import BackendError
from runtime.backends.tensorrt_backend import DeviceSearch, LeastRecentlyUsed, _bindable
from runtime.engine import ALIGNMENT, Engine, EngineError
from runtime.gpu import Gpu, current_gpu
from runtime.manifest import FILE_NAME

torch = pytest.importorskip("torch")


@pytest.mark.skipif(current_gpu() is not None, reason="there is a GPU")
def test_no_gpu(tmp_path: Path):
    with pytest.raises(EngineError, match="need an NVIDIA GPU, and none is here"):
        Engine.load(tmp_path, "encoder")


def test_engine_error_is_a_backend_error():
    """What the command lines catch."""
    assert issubclass(EngineError, BackendError)


def test_least_recently_used():
    cache = LeastRecentlyUsed(2)
    cache.add("a", 1)
    cache.add("b", 2)
    assert cache.use("a") == 1
    cache.add("c", 3)
    assert (cache.use("a"), cache.use("b"), cache.use("c")) == (1, None, 3)


def test_bindable_keeps_what_tensorrt_can_take():
    ids = torch.arange(4).reshape(4, 1)
    aligned = ids.data_ptr() % ALIGNMENT == 0
    assert (_bindable(ids, 4) is ids) == aligned


def test_bindable_copies_what_it_cannot():
    column = torch.arange(12).reshape(4, 3)[:, 1:2]
    bound = _bindable(column, 4)
    assert bound.is_contiguous() and bound.tolist() == column.tolist()


def test_bindable_pads_to_the_smallest_batch():
    assert _bindable(torch.tensor([[5], [6]]), 4).tolist() == [[5], [6], [0], [0]]


def test_fp8_is_hoppers_alone(tmp_path: Path, monkeypatch):
    """By itself the choice is ONNX Runtime there, with the reason; PyTorch has no fp8 anywhere."""
    (tmp_path / FILE_NAME).touch()
    manifest = SimpleNamespace(precision="fp8", engines={"encoder": 1.0})
    monkeypatch.setattr(choice.Manifest, "read", lambda folder: manifest)
    monkeypatch.setattr(tensorrt_loader, "load_tensorrt", lambda: None)
    for gpu, obstacle in (
        (Gpu("NVIDIA H200", "9.0", "13.0"), None),
        (Gpu("NVIDIA L4", "8.9", "13.0"), "fp8 is for compute capability 9.0, not 8.9"),
        (Gpu("NVIDIA B200", "10.0", "13.0"), "fp8 is for compute capability 9.0, not 10.0"),
    ):
        monkeypatch.setattr(choice, "current_gpu", lambda gpu=gpu: gpu)
        assert choice._tensorrt_obstacle(tmp_path) == obstacle
    with pytest.raises(BackendError, match=r"backend torch has no fp8.*--precision fp16"):
        choice.open_backend("models/nothing", "torch", precision="fp8")


def test_e4m3_is_handed_to_tensorrt_alone(monkeypatch):
    made = []

    def backend(folder, **options):
        made.append((folder, options))

    monkeypatch.setattr(tensorrt_backend, "TensorRTBackend", backend)
    for asked in (False, True):
        choice.open_backend("models/m", "tensorrt", e4m3_cross=asked)
    folder = Path("engines/m-fp16-fused")
    assert made == [(folder, {"e4m3_cross": False}), (folder, {"e4m3_cross": True})]
    for name in ("torch", "onnxruntime"):
        with pytest.raises(
            BackendError, match=rf"backend {name} has no e4m3_cross.*choose the backend tensorrt"
        ):
            choice.open_backend("models/m", name, e4m3_cross=True)
    monkeypatch.setattr(choice, "current_gpu", lambda: None)
    with pytest.raises(BackendError, match=r"backend onnxruntime \(no NVIDIA GPU\) has no e4m3_cross"):
        choice.open_backend("models/m", e4m3_cross=True)


def test_which_searches_read_e4m3():
    """Those by keys and values that the decoder takes so, where it is asked for."""

    def found(most_by_keys: int | None, states: bool, most_in_e4m3: int, asked: bool = True) -> list[bool]:
        decoder = SimpleNamespace(attends_to_states=states, takes_e4m3=lambda slots: slots <= most_in_e4m3)
        search = DeviceSearch(decoder, 2, most_by_keys, asked)
        return [search.reads_e4m3(images) for images in (1, 16, 17, 100)]

    assert found(None, False, 1000) == [True] * 4  # heads of 32
    assert found(None, False, 0) == [False] * 4  # in bfloat16
    assert found(None, False, 1000, asked=False) == [False] * 4
    assert found(16, True, 1000) == found(16, False, 16) == [True, True, False, False]  # heads of 64


def test_gpu_slug():
    assert Gpu("NVIDIA H200", "9.0", "13.0").slug == "nvidia-h200"
    assert Gpu("NVIDIA RTX 6000 (Ada)", "8.9", "13.0").slug == "nvidia-rtx-6000-ada"
