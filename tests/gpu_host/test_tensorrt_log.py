"""TensorRT's messages go to the work that caused them, whatever other threads do. Needs no GPU."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
from conftest import write_checkpoint

from superpoint_trt.convert.export import ExportOptions, export
from superpoint_trt.core.types import OutputType, SuperPointError
from superpoint_trt.gpu.tensorrt_api import FailureLog, Flavor, Part, TensorRT, _logger, _ThreadLog, installed, load

needs_rtx = pytest.mark.skipif(Flavor.RTX not in installed(), reason="tensorrt-rtx is not installed")

ERROR, WARNING = 1, 2


class StandIn(TensorRT):
    """A TensorRT without the library: its log takes what the test writes."""

    def __init__(self) -> None:
        class ILogger:
            Severity = SimpleNamespace(ERROR=ERROR, WARNING=WARNING)

        self.module = SimpleNamespace(ILogger=ILogger)
        self.flavor, self.version, self.part = Flavor.RTX, "0", Part.FULL
        self._log = _ThreadLog()
        self.logger = _logger(self.module, self._log)

    def says(self, text: str, severity: int = ERROR) -> None:
        self.logger.log(severity, text)


def in_thread(work) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_two_threads_do_not_mix():
    """Strictly interleaved: each has begun before the other writes."""
    tensorrt = StandIn()
    begun, written = threading.Barrier(2, timeout=30), threading.Barrier(2, timeout=30)
    told = {}

    def work(name: str) -> None:
        with tensorrt.explaining(f"{name} failed") as log:
            begun.wait()
            tensorrt.says(f"{name} is bad")
            written.wait()
            told[name] = str(log.failed())

    threads = [threading.Thread(target=work, args=(name,)) for name in ("first", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told == {
        "first": "first failed: TensorRT-RTX 0 says: first is bad",
        "second": "second failed: TensorRT-RTX 0 says: second is bad",
    }


def test_tensorrts_own_threads_speak_for_whoever_is_at_work():
    tensorrt = StandIn()
    with tensorrt.explaining("it failed") as log:
        in_thread(lambda: tensorrt.says("a worker failed"))
        assert log.messages() == ["a worker failed"]
        tensorrt.says("slow", WARNING)
        assert log.messages() == ["a worker failed"], "an error says more than a warning"
        tensorrt.says("the real reason")
        assert log.messages() == ["the real reason"], "what its own thread says is certain"


def test_what_lies_before_and_after_is_not_told():
    tensorrt = StandIn()
    tensorrt.says("before")
    with tensorrt.explaining("outer") as outer:
        with tensorrt.explaining("inner") as inner:
            tensorrt.says("inside")
        tensorrt.says("after")
        assert inner.messages() == ["inside"]
        assert outer.messages() == ["inside", "after"]
    assert tensorrt._log._collecting == {}


def test_an_exception_inside_carries_the_messages():
    tensorrt = StandIn()

    def work() -> None:
        with tensorrt.explaining("it failed"):
            tensorrt.says("the reason")
            raise RuntimeError("thrown")

    with pytest.raises(SuperPointError, match=r"^it failed: TensorRT-RTX 0 says: thrown; the reason$"):
        work()
    assert tensorrt._log._collecting == {}
    assert isinstance(FailureLog(tensorrt, "x").failed(), SuperPointError)


@needs_rtx
def test_two_builds_at_once_tell_their_own_faults(tmp_path):
    """Two threads parse models that TensorRT refuses, each for a weight of its own, many times over."""
    import onnx

    tensorrt = load(Flavor.RTX)
    checkpoint = write_checkpoint("magicleap", tmp_path)
    source = onnx.load(export(checkpoint, tmp_path / "m.onnx", ExportOptions(OutputType.HEADS, 64, 64)))
    convolutions = [node for node in source.graph.node if node.op_type == "Conv"]
    names = [convolutions[0].name, convolutions[-1].name]
    bad = {}
    for name in names:
        model = onnx.ModelProto()
        model.CopyFrom(source)
        next(node for node in model.graph.node if node.name == name).op_type = f"Nonsense_{name}"
        bad[name] = model.SerializeToString()
    start = threading.Barrier(2, timeout=60)
    told: dict[str, list[str]] = {name: [] for name in names}

    def parse(name: str) -> None:
        start.wait()
        for _ in range(10):
            with tensorrt.explaining(f"{name} failed") as log:
                builder = tensorrt.module.Builder(tensorrt.logger)
                network = tensorrt.create_network(builder)  # the bindings do not keep it alive
                parser = tensorrt.module.OnnxParser(network, tensorrt.logger)
                assert not parser.parse(bad[name])
                told[name].append(str(log.failed()))

    threads = [threading.Thread(target=parse, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, other in (names, names[::-1]):
        assert len(told[name]) == 10
        for text in told[name]:
            assert f"Nonsense_{name}" in text and f"Nonsense_{other}" not in text


@needs_rtx
def test_two_plans_at_once_tell_their_own_faults():
    tensorrt = load(Flavor.RTX)
    plans = {"foreign": b"ftrt" + bytes(2000), "garbage": b"garbage" * 100}
    alone, together = {}, {name: set() for name in plans}

    def explain(name: str) -> str:
        with tensorrt.explaining(f"{name} failed") as log:
            assert tensorrt.module.Runtime(tensorrt.logger).deserialize_cuda_engine(plans[name]) is None
            return str(log.failed())

    for name in plans:
        alone[name] = explain(name)
    start = threading.Barrier(2, timeout=60)

    def work(name: str) -> None:
        start.wait()
        for _ in range(10):
            together[name].add(explain(name))

    threads = [threading.Thread(target=work, args=(name,)) for name in plans]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == {name: {text} for name, text in alone.items()}
