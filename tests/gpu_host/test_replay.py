"""When work is queued plainly, recorded, replayed. Needs no GPU: a stand-in for the stream notes what it is told."""

from __future__ import annotations

import logging
from contextlib import contextmanager

import pytest

from superpoint_trt.core.types import SuperPointError
from superpoint_trt.gpu import cuda


class Stream:
    """Notes graphs launched, closed and captured."""

    def __init__(self, refuses: bool = False) -> None:
        self.told: list[str] = []
        self.refuses = refuses

    @contextmanager
    def capture(self):
        self.told.append("capture")
        yield lambda: Graph(self)
        if self.refuses:
            raise SuperPointError("something inside cannot be recorded")


class Graph:
    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def launch(self, stream: Stream) -> None:
        assert stream is self.stream
        stream.told.append("launch")

    def close(self) -> None:
        self.stream.told.append("close")


@pytest.fixture()
def stream() -> Stream:
    return Stream()


def run(replay: cuda.Replay, stream: Stream, times: int) -> list[str]:
    """What the stream was told meanwhile."""
    stream.told.clear()
    for _ in range(times):
        replay.run(lambda: stream.told.append("queue"))
    return list(stream.told)


def test_plainly_then_recorded_then_replayed(stream):
    replay = cuda.Replay(stream, True, "it")
    assert run(replay, stream, 3) == ["queue", "capture", "queue", "launch", "launch"]


def test_once_forgotten_it_starts_anew(stream):
    replay = cuda.Replay(stream, True, "it")
    run(replay, stream, 3)
    replay.forget()
    assert stream.told[-1] == "close" and replay.graph is None
    assert run(replay, stream, 2) == ["queue", "capture", "queue", "launch"]


def test_where_nothing_may_be_recorded_each_run_is_plain(stream):
    replay = cuda.Replay(stream, False, "it")
    assert run(replay, stream, 4) == ["queue"] * 4


def test_what_cannot_be_recorded_is_said_once_and_runs_plainly(caplog):
    stream = Stream(refuses=True)
    replay = cuda.Replay(stream, True, "images of 64x64")
    with caplog.at_level(logging.WARNING):
        assert run(replay, stream, 4) == ["queue", "capture", "queue", "queue", "queue", "queue"]
    assert [record.message for record in caplog.records] == [
        "no CUDA graph for images of 64x64, each run is queued anew: something inside cannot be recorded"
    ]


def test_a_first_run_that_fails_readies_nothing(stream):
    replay = cuda.Replay(stream, True, "it")

    def fails() -> None:
        raise SuperPointError("no")

    with pytest.raises(SuperPointError):
        replay.run(fails)
    assert run(replay, stream, 1) == ["queue"]
