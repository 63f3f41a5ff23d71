"""The runtime on a real GPU: shapes, memory, threads, arrays of other libraries, and what it refuses."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from superpoint_trt.core.types import SuperPointError
from superpoint_trt.gpu import arrays, cuda
from superpoint_trt.gpu.engine_file import sidecar
from superpoint_trt.run.backends.tensorrt import MOST_LOANS, MOST_SHAPES, TensorRTBackend
from superpoint_trt.run.extractor import SuperPoint

CALLS = 10_000
PAGE = 2 << 20
"""Of GPU memory, bytes. cudaMemGetInfo counts for the whole GPU: nothing else may run on it."""


def upload(values: np.ndarray) -> arrays.DeviceArray:
    memory = cuda.DeviceMemory(values.nbytes)
    kind = cuda.runtime().cudaMemcpyKind.cudaMemcpyHostToDevice
    cuda.call("cudaMemcpy", memory.address, values.ctypes.data, values.nbytes, kind)
    return arrays.DeviceArray(memory.address, values.shape, values.dtype, 0, memory)


def download(array: arrays.DeviceArray) -> np.ndarray:
    values = np.empty(array.shape, array.dtype)
    kind = cuda.runtime().cudaMemcpyKind.cudaMemcpyDeviceToHost
    cuda.call("cudaMemcpy", values.ctypes.data, array.address, values.nbytes, kind)
    return values


def equal(a, b) -> bool:
    return all(np.array_equal(a[name], b[name]) for name in a)


def test_graph_gives_what_the_plain_run_gave(engine, reference):
    images = [truth["inputs"] for truth in reference()]
    with TensorRTBackend(engine("dense", "fp16")) as backend:
        first = {k: v.copy() for k, v in backend.infer(images[0]).items()}  # plain
        backend.infer(images[1])  # captured
        assert backend.runners[0].graph is not None
        assert equal(first, backend.infer(images[0]))
        assert not equal(first, backend.infer(images[1]))


def test_results_survive_later_calls(engine, reference):
    images = [truth["inputs"] for truth in reference()]
    with TensorRTBackend(engine("heads", "fp16")) as backend:
        alone = [{k: v.copy() for k, v in backend.infer(image).items()} for image in images]
        kept = [backend.infer(image) for image in images]  # more than are lent from page-locked memory
        assert len(kept) > MOST_LOANS
        assert all(equal(a, b) for a, b in zip(alone, kept))
    assert all(equal(a, b) for a, b in zip(alone, kept))  # closed, and still there


def test_uint8_is_the_float_image(engine):
    rng = np.random.default_rng(7)
    image = rng.integers(0, 256, (1, 1, 480, 640), dtype=np.uint8)
    with TensorRTBackend(engine("dense", "fp16")) as backend:
        as_float = {k: v.copy() for k, v in backend.infer(image.astype(np.float32) / np.float32(255)).items()}
        assert equal(as_float, backend.infer(image))


def test_capture_failure_is_said_and_survived(engine, reference, monkeypatch, caplog):
    image = reference()[0]["inputs"]
    with TensorRTBackend(engine("dense", "fp16")) as backend:
        first = {k: v.copy() for k, v in backend.infer(image).items()}

        class Broken:
            def __init__(self, graph):
                raise SuperPointError("cudaGraphInstantiate failed: out of memory")

        monkeypatch.setattr(cuda, "Graph", Broken)
        assert equal(first, backend.infer(image)) and equal(first, backend.infer(image))
    assert "no CUDA graph" in caplog.text


def test_many_shapes_stay_bounded(engine):
    rng = np.random.default_rng(8)
    with TensorRTBackend(engine("dense", "fp32", dynamic=True, batch=8)) as backend:
        for round_ in range(3):
            for step in range(MOST_SHAPES + 4):
                image = rng.random((1, 1, 240 + 8 * step, 320 + 16 * step), dtype=np.float32)
                assert np.isfinite(backend.infer(image)["scores"]).all()
            assert len(backend.runners) == MOST_SHAPES, round_


def test_outside_the_profile_is_refused_with_the_range(engine):
    with SuperPoint(engine("dense", "fp32", dynamic=True, batch=8)) as superpoint:
        for shape in ((1, 1, 232, 320), (1, 1, 968, 1280), (9, 1, 480, 640)):
            with pytest.raises(SuperPointError, match="320x240 to 1280x960 px, batch 1 to 8") as caught:
                superpoint.infer(np.zeros(shape, np.float32))
            remedy = "larger images" if shape[2] < 240 else "--max-side"
            assert remedy in str(caught.value) and "superpoint build" in str(caught.value)
        superpoint.infer(np.zeros((1, 1, 240, 320), np.float32))  # usable afterwards


def test_ten_thousand_calls_constant_memory(engine, reference):
    images = [truth["inputs"] for truth in reference()]
    with TensorRTBackend(engine("heads", "fp16")) as backend:
        expected = {k: v.copy() for k, v in backend.infer(images[0]).items()}
        for image in images:
            backend.infer(image)
        free_before, _ = cuda.call("cudaMemGetInfo")
        resident_before = _resident_kib()
        for index in range(CALLS):
            backend.infer(images[index % len(images)])
        free_after, _ = cuda.call("cudaMemGetInfo")
        assert free_after == free_before
        assert _resident_kib() - resident_before < 4096
        assert equal(expected, backend.infer(images[0]))


def _resident_kib() -> int:
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("VmRSS")).split()[1])


def test_opening_and_closing_leaves_nothing(engine, reference):
    """A hundred times, and at most one page of the driver's less: its own pools may grow once."""
    image = reference()[0]["inputs"]

    def once() -> int:
        with TensorRTBackend(engine("dense", "fp16")) as backend:
            backend.infer(image)
            backend.infer(image)
        return int(cuda.call("cudaMemGetInfo")[0])

    once()
    free = [once() for _ in range(100)]
    assert free[0] - free[-1] <= PAGE


def test_threads_share_the_engine_and_agree(engine, reference):
    images = [truth["inputs"] for truth in reference()]
    path = engine("dense", "fp16")
    with TensorRTBackend(path) as backend:
        alone = [{k: v.copy() for k, v in backend.infer(image).items()} for image in images]
    wrong: list[str] = []
    engines = []

    def work(offset: int) -> None:
        try:
            with TensorRTBackend(path) as backend:
                engines.append(backend.engine)
                for index in range(200):
                    which = (index + offset) % len(images)
                    if not equal(alone[which], backend.infer(images[which])):
                        wrong.append(f"thread {offset}, call {index}")
        except BaseException as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:3]
    assert all(engines[0].shares_weights_with(other) for other in engines)


def test_device_arrays_without_a_copy(engine, reference):
    image = reference()[0]["inputs"]
    with TensorRTBackend(engine("dense", "fp16")) as backend:
        on_host = {k: v.copy() for k, v in backend.infer(image).items()}
        source = upload(image)
        for _ in range(3):  # plain, captured, replayed
            found = backend.infer_device(source)
            assert equal(on_host, {name: download(array) for name, array in found.items()})
        mine = upload(np.zeros_like(on_host["scores"]))
        for _ in range(3):
            found = backend.infer_device(source, out={"scores": mine})
            assert found["scores"].address == mine.address
            assert np.array_equal(download(mine), on_host["scores"])
        with pytest.raises(SuperPointError, match="outputs are scores, descriptors"):
            backend.infer_device(source, out={"score": mine})
        with pytest.raises(SuperPointError, match=r"out\['descriptors'\] is float32 \(1, 480, 640\)"):
            backend.infer_device(source, out={"descriptors": mine})


class TestWhatIsRefused:
    @pytest.fixture()
    def copy(self, engine, tmp_path):
        path = tmp_path / "copy.engine"
        source = engine("heads", "fp16")
        path.write_bytes(source.read_bytes())
        sidecar(path).write_bytes(sidecar(source).read_bytes())
        return path

    def test_without_json_it_still_runs(self, copy, reference):
        image = reference()[0]["inputs"]
        with TensorRTBackend(copy) as backend:
            expected = {k: v.copy() for k, v in backend.infer(image).items()}
            described = backend.description
        sidecar(copy).unlink()
        with TensorRTBackend(copy) as backend:
            assert backend.description == described
            assert equal(expected, backend.infer(image))

    def test_truncated(self, copy):
        whole = copy.read_bytes()
        for share in (0.999, 0.5, 0.01):
            copy.write_bytes(whole[: int(len(whole) * share)])
            with pytest.raises(SuperPointError, match="cut short, or replaced"):
                TensorRTBackend(copy)
        sidecar(copy).unlink()
        with pytest.raises(SuperPointError, match="is not an engine that can be loaded here"):
            TensorRTBackend(copy)

    @pytest.mark.parametrize(
        ("field", "value", "told"),
        [
            ("tensorrt_version", "10.3.0", "was built by tensorrt 10.3.0, here is tensorrt"),
            ("targets", ["sm86"], "was built for sm86"),
        ],
    )
    def test_made_elsewhere(self, copy, field, value, told):
        import json

        beside = sidecar(copy)
        data = json.loads(beside.read_text())
        data[field] = value
        beside.write_text(json.dumps(data))
        with pytest.raises(SuperPointError, match=told) as caught:
            TensorRTBackend(copy)
        assert "superpoint build --onnx" in str(caught.value)

    def test_another_checkpoints_json(self, copy):
        import json

        beside = sidecar(copy)
        data = json.loads(beside.read_text())
        data["description"]["superpoint_trt.checkpoint_sha256"] = "0" * 64
        beside.write_text(json.dumps(data))
        with pytest.raises(SuperPointError, match="is of checkpoint"):
            TensorRTBackend(copy)

    def test_closed(self, copy):
        backend = TensorRTBackend(copy)
        backend.close()
        with pytest.raises(SuperPointError, match="closed"):
            backend.infer(np.zeros((1, 1, 480, 640), np.float32))
