"""A process that runs one command line after another and tells how each ended.

The judge (`judge.py`) starts it, because a command may crash the process, hang, or take memory without end. It keeps
what is slow to import, so that a command takes milliseconds. Both streams are replaced at file-descriptor level:
libpng, libjpeg and onnxruntime write there, past `sys.stderr`.

Requests are JSON lines on stdin: {"program": "superpoint", "arguments": [...], "folder": "..."}; answers are JSON lines
on the standard output that the process was started with.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import tempfile
import time
import traceback
import warnings

QUIET_BY_DEFAULT = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)
"""What Python does not show a user."""


def programs():
    from superpoint_trt.cli import guide
    from superpoint_trt.cli.main import cli

    return {
        "superpoint": cli,
        "convert_to_onnx": guide.convert_to_onnx,
        "convert_to_tensorrt": guide.convert_to_tensorrt,
        "tensorrt_inference": guide.tensorrt_inference,
    }


def preload() -> None:
    """What commands import when they need it: its time and memory are not the input's."""
    import cv2
    import onnxruntime
    import torch

    import superpoint_trt.convert.engine
    import superpoint_trt.prove.evaluate
    import superpoint_trt.prove.verify
    import superpoint_trt.run.extractor

    with contextlib.suppress(ImportError):
        import h5py  # noqa: F401

        import superpoint_trt.pipeline.extract
        import superpoint_trt.pipeline.match_pairs  # noqa: F401
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    onnxruntime.get_available_providers()


def memory_mib(field: str) -> float:
    """A line of /proc/self/status: VmRSS, VmHWM, VmSize; 0 where there is none."""
    try:
        with open("/proc/self/status") as status:
            return next((int(line.split()[1]) / 1024 for line in status if line.startswith(field + ":")), 0.0)
    except OSError:
        return 0.0


def reset_peak() -> None:
    """Has the kernel count VmHWM anew."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass


def innermost(error: BaseException) -> str:
    """Where an exception was raised, as far as this package is concerned: what tells one fault from another."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if f"{os.sep}superpoint_trt{os.sep}" in frame.filename] or frames[-1:]
    if not ours:
        return type(error).__name__
    last = ours[-1]
    name = last.filename.split(f"{os.sep}superpoint_trt{os.sep}")[-1]
    return f"{type(error).__name__} in {name}:{last.name}"


class Streams:
    """Files in place of both streams of the process."""

    def __init__(self) -> None:
        self.files = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115  (kept while the process lives)
        for file, descriptor in zip(self.files, (1, 2)):
            os.dup2(file.fileno(), descriptor)

    def take(self) -> list[str]:
        """What was written since the last time."""
        sys.stdout.flush()
        sys.stderr.flush()
        said = []
        for file in self.files:
            size = os.fstat(file.fileno()).st_size
            said.append(os.pread(file.fileno(), min(size, 100_000), 0).decode("utf-8", "replace"))
            os.ftruncate(file.fileno(), 0)
            os.lseek(file.fileno(), 0, os.SEEK_SET)
        return said


def main() -> None:
    memory_mib_allowed = int(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    commands = programs()
    from superpoint_trt.cli.main import run

    preload()
    streams = Streams()
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        request = json.loads(line)
        os.chdir(request["folder"])
        warnings.resetwarnings()
        warnings.simplefilter("always")
        for category in QUIET_BY_DEFAULT:
            warnings.simplefilter("ignore", category)
        reset_peak()
        before = memory_mib("VmRSS")
        # An allocation far beyond the limit fails at once instead of taking the machine with it.
        most = int((memory_mib("VmSize") + 2 * memory_mib_allowed) * 2**20)
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
        answer = {"code": None, "escaped": None, "trace": None}
        started = time.monotonic()
        try:
            answer["code"] = run(commands[request["program"]], request["arguments"])
        except BaseException as error:  # it is what we look for
            answer["escaped"] = innermost(error)
            answer["trace"] = "".join(traceback.format_exception(type(error), error, error.__traceback__))[-4000:]
        answer["seconds"] = time.monotonic() - started
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        answer["peak_mib"] = max(0.0, memory_mib("VmHWM") - before)
        answer["out"], answer["err"] = streams.take()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
