"""How commands end, what they say on the way, and what becomes of streams that fail."""

from __future__ import annotations

import os
import signal
import sys
import time

import click
import pytest

from superpoint_trt import SuperPointError
from superpoint_trt.cli import progress
from superpoint_trt.cli.options import RuntimeArgs
from superpoint_trt.cli.progress import phase_bar, progress_bar
from superpoint_trt.cli.terminal import run


def command_of(function) -> click.Command:
    return click.command()(function)


def raising(error: BaseException) -> click.Command:
    def work() -> None:
        raise error

    return command_of(work)


# ----------------------------------------------------------------------------------------------------------------- ends


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        ImportError("/x/libonnx.so: failed to map segment from shared object"),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("std::bad_alloc"),
        SystemError("error return without exception set"),
    ],
)
def test_a_lack_of_memory_is_one_line(error, capfd):
    assert run(raising(error), []) == 2
    assert capfd.readouterr().err.startswith("error: memory ran out")


def test_a_lack_of_memory_behind_another_error_is_said(capfd):
    def work() -> None:
        try:
            raise MemoryError
        except MemoryError as error:
            raise SuperPointError("m.onnx cannot be opened") from error

    assert run(command_of(work), []) == 2
    assert "memory ran out" in capfd.readouterr().err


def test_a_lack_of_gpu_memory_keeps_its_own_words(capfd):
    assert run(raising(SuperPointError("CUDA error 2: failed to allocate memory on the GPU; ...")), []) == 2
    assert "CUDA error 2" in capfd.readouterr().err


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ImportError("no module named x"), OSError(2, "No such file")])
def test_a_bug_of_ours_is_not_hidden(error):
    with pytest.raises(type(error)):
        run(raising(error), [])


def test_a_long_error_is_cut_in_the_middle(capfd):
    assert run(raising(SuperPointError("what is wrong\n" + "x " * 5000 + "what to do")), []) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert len(line) < 1000
    assert line.startswith("error: what is wrong") and line.endswith("what to do")


@pytest.fixture
def interruptible():
    """Python's own handler of SIGINT: a process that was started in the background, or another test, may have none."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_that_a_library_turns_into_another_error_is_an_interrupt(capfd):
    """An extension module whose initialization is interrupted raises ImportError."""

    def work() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("initialization failed") from None

    assert run(command_of(work), []) == 130
    assert "initialization" not in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# -------------------------------------------------------------------------------------------------------------- streams


def test_the_streams_come_back_after_an_error():
    before = sys.stdout, sys.stderr
    with pytest.raises(RuntimeError):
        run(raising(RuntimeError("a bug")), [])
    assert (sys.stdout, sys.stderr) == before


@pytest.mark.parametrize(("encoding", "shown"), [("utf-8", "\\udcff"), ("latin-1", "\\u20ac")])
def test_what_the_encoding_lacks_is_printed_as_a_number(encoding, shown, monkeypatch, tmp_path):
    with (tmp_path / "out").open("w", encoding=encoding, errors="strict") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert run(command_of(lambda: click.echo("a \udcff \u20ac")), []) == 0
        assert out.errors == "strict"
    assert shown in (tmp_path / "out").read_text(encoding)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_work_goes_on_though_a_stream_fails(stream, monkeypatch, capfd):
    done = []

    def work() -> None:
        for number in range(100):
            click.echo(f"line {number} " * 1000, err=stream == "stderr")
            done.append(number)

    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, stream, full)
        code = run(command_of(work), [])
    assert len(done) == 100
    assert code == (2 if stream == "stdout" else 0)
    assert ("No space left" in capfd.readouterr().err) == (stream == "stdout")


def test_a_failed_gate_stays_a_failed_gate_without_a_reader(monkeypatch):
    def work() -> None:
        click.echo("FAILED")
        raise click.exceptions.Exit(1)

    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert run(command_of(work), []) == 1


# -------------------------------------------------------------------------------------------------------------- threads


def with_threads(function) -> click.Command:
    return click.command()(RuntimeArgs.declare("runtime")(function))


def test_fewer_threads_are_noted_at_the_end(capfd, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    taken = []
    assert run(with_threads(lambda runtime: taken.append(runtime.threads)), ["--threads", "64"]) == 0
    assert taken == [4]
    assert capfd.readouterr().err == "note: 64 threads were asked for, this machine has 4\n"


def test_an_error_stands_alone(capfd, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)

    def work(runtime: RuntimeArgs) -> None:
        raise SuperPointError("no such model")

    assert run(with_threads(work), ["--threads", "64"]) == 2
    assert capfd.readouterr().err == "error: no such model\n"


# ------------------------------------------------------------------------------------------------------------- progress


def test_short_work_says_nothing(capsys):
    with progress_bar("timing") as told:
        told(1, 2)
    assert capsys.readouterr().err == ""


def test_long_work_says_how_far_it_is(capsys, monkeypatch):
    monkeypatch.setattr(progress, "FIRST_LINE_S", 0.01)
    monkeypatch.setattr(progress, "LINES_EVERY_S", 0.01)
    said = ""
    with phase_bar("preparing") as told:
        for phase, done, total, words in (
            ("preparing", 0, 0, "preparing ("),
            ("calibrating", 3, 40, "calibrating: 3 of 40 ("),
            ("building: kernels", 0, 0, "building: kernels ("),
        ):
            told(phase, done, total)
            deadline = time.monotonic() + 20
            while words not in said and time.monotonic() < deadline:
                time.sleep(0.01)
                said += capsys.readouterr().err
            assert words in said
    capsys.readouterr()
    time.sleep(0.05)
    assert capsys.readouterr().err == "", "nothing is said after the end"
    assert "\x1b" not in said and "\r" not in said
