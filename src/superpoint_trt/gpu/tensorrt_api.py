"""One interface to TensorRT 8.6, 10, 11 and TensorRT-RTX; every difference between them is decided here.

TensorRT's calls fail by returning None or False and write the reason to their log. So the log is collected, thread by
thread, and goes into the exception.
"""

from __future__ import annotations

import ctypes
import enum
import re
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module, util
from pathlib import Path
from typing import Any, Callable

from superpoint_trt.core.install import install_hint
from superpoint_trt.core.types import SuperPointError


class Flavor(str, enum.Enum):
    """NVIDIA's two TensorRTs; an engine belongs to one."""

    TENSORRT = "tensorrt"
    RTX = "rtx"
    """TensorRT-RTX: for RTX GPUs (Turing and newer); builds without one, in under a second."""


class Part(str, enum.Enum):
    """How much of TensorRT a library holds."""

    FULL = "full"
    """Builder and runtime."""
    DISPATCH = "dispatch"
    """1 MB: runs version-compatible plans that carry a lean runtime, by means of that runtime."""
    LEAN = "lean"
    """46 MB: runs version-compatible plans."""


MODULES = {Flavor.TENSORRT: "tensorrt", Flavor.RTX: "tensorrt_rtx"}
"""The full libraries' Python modules."""

RUNTIME_MODULES = {
    Part.DISPATCH: ("tensorrt_dispatch", "tensorrt_dispatch_bindings"),
    Part.LEAN: ("tensorrt_lean", "tensorrt_lean_bindings"),
}
"""Modules of the libraries that run plans and build none. NVIDIA's wheels of the second name need none of the first."""

_NAMES = {Flavor.TENSORRT: "TensorRT", Flavor.RTX: "TensorRT-RTX"}

_MAGIC = {b"ftrt": Flavor.TENSORRT, b"vtrt": Flavor.RTX}
"""The first four bytes of a plan."""

RTX_TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
"""GPU architectures that TensorRT-RTX 1.7 can build for."""

_CHANNELS_LAST = {"HWC": 1, "HWC8": 8, "HWC16": 16}
"""TensorRT's formats [B][H][W][C] by name, and the number whose multiple C is padded to."""

_MOST_MESSAGES = 400
"""Log messages kept for one exception; beyond, the oldest go."""

BuildProgress = Callable[[str, int, int], None]
"""Called with the phase's name, the steps done and the steps in all."""

LogMessage = tuple[int, str]
"""TensorRT's severity (0 is the worst) and the text."""


def installed() -> list[Flavor]:
    """The TensorRTs that can be imported here."""
    return [flavor for flavor, module in MODULES.items() if util.find_spec(module)]


def _missing(flavor: Flavor | None) -> str:
    """What to do if a TensorRT is not installed; None: if neither is."""
    if flavor:
        what = f"{_NAMES[flavor]} is not installed here: {install_hint(flavor.value)}."
        if flavor is Flavor.TENSORRT:
            what += f" For engines built with --version-compatible 50 MB do: {install_hint('lean')}."
    else:
        what = (
            f"TensorRT is not installed here: {install_hint(*(known.value for known in Flavor))} on a machine with an "
            "NVIDIA GPU (the second builds engines for RTX GPUs on any machine; superpoint doctor says what this one "
            "has)."
        )
    return f"{what} Without it the .onnx runs everywhere: superpoint infer --model MODEL.onnx --image IMAGE."


def installed_runtimes() -> dict[Part, str]:
    """The lean and dispatch runtimes that can be imported here, and their modules."""
    here = {part: [name for name in names if util.find_spec(name)] for part, names in RUNTIME_MODULES.items()}
    return {part: names[0] for part, names in here.items() if names}


def runtimes(flavor: Flavor | None = None) -> Iterator[TensorRT]:
    """Loads what can run a plan here, one after the other: the full TensorRT, then its dispatch and lean runtimes.

    Args:
        flavor: whose plan; None: the first flavor that is installed.

    Raises:
        SuperPointError: nothing is installed, or a library does not load.
    """
    parts = installed_runtimes() if flavor is not Flavor.RTX else {}
    if not parts or flavor in installed() or (flavor is None and installed()):
        yield load(flavor)
    for part, module in parts.items():
        yield _load(Flavor.TENSORRT, part, module)


def load(flavor: Flavor | None = None) -> TensorRT:
    """Loads a full TensorRT, once in a process.

    Args:
        flavor: the one to load; None: the first that is installed.

    Raises:
        SuperPointError: it is not installed, or its libraries do not load.
    """
    here = installed()
    if flavor is None and here:
        flavor = here[0]
    if flavor is None or flavor not in here:
        raise SuperPointError(_missing(flavor))
    return _load(flavor, Part.FULL, MODULES[flavor])


def _load(flavor: Flavor, part: Part, module: str) -> TensorRT:
    if (flavor, part) not in _loaded:
        try:
            _loaded[flavor, part] = TensorRT(flavor, import_module(module), part)
        except (ImportError, OSError, AttributeError) as error:  # AttributeError: another library of that name
            cause = _hidden_error(module, error) or error
            reason = " ".join(str(cause).split())
            hint = install_hint(flavor.value if part is Part.FULL else "lean")
            raise SuperPointError(
                f"{module} is installed but does not load: {reason}; reinstall it: {hint}. On a Jetson use JetPack's "
                "own, see docs/tensorrt.md."
            ) from cause
    return _loaded[flavor, part]


def _hidden_error(module: str, error: Exception) -> OSError | None:
    """Why a library of NVIDIA's package does not load, too little memory for example.

    The package ignores it and then reports that there is no such library. None if that is so.
    """
    library = re.match(r"(\S+): cannot open shared object file", str(error))
    package = util.find_spec(f"{module[: -len('_bindings')] if module.endswith('_bindings') else module}_libs")
    if library and package:
        for folder in package.submodule_search_locations or ():
            path = Path(folder) / library[1]
            if path.is_file():
                try:
                    ctypes.CDLL(str(path))
                except OSError as hidden:
                    return hidden
    return None


_loaded: dict[tuple[Flavor, Part], TensorRT] = {}


def flavor_of(plan: bytes) -> Flavor | None:
    """Which TensorRT made a plan, by the plan's first bytes; None if neither did."""
    return _MAGIC.get(plan[:4])


class TensorRT:
    """One TensorRT, loaded.

    Attributes:
        flavor: TensorRT or TensorRT-RTX.
        part: the full library, or its lean or dispatch runtime.
        module: its Python module.
        logger: the one logger of this process: TensorRT ignores a second one.
        version: "8.6.0", "10.13.3.9", "1.7.1.116", ...
    """

    def __init__(self, flavor: Flavor, module: Any, part: Part = Part.FULL) -> None:
        self.flavor = flavor
        self.part = part
        self.module = module
        self.version: str = module.__version__
        self._major = int(self.version.split(".")[0])
        self._log = _ThreadLog()
        self._monitors = threading.local()
        self.logger = _logger(module, self._log)

    def __str__(self) -> str:
        part = "" if self.part is Part.FULL else f" {self.part.value} runtime"
        return f"{_NAMES[self.flavor]}{part} {self.version}"

    # ---------------------------------------------------------------------------------------------------------- log

    @contextmanager
    def explaining(self, what: str) -> Iterator[FailureLog]:
        """Collects TensorRT's log messages of the work inside, for the exception in case it fails.

        Other threads may do the same at the same time: each gets the messages of its own calls.

        Args:
            what: what failed, if it fails: "building a.engine failed".

        Yields:
            The log; its `failed()` makes the exception.

        Raises:
            SuperPointError: TensorRT's bindings raised an exception inside.
        """
        log = FailureLog(self, what)
        with self._log.collecting(log):
            try:
                yield log
            except (RuntimeError, TypeError, ValueError, MemoryError) as error:
                raise log.failed(str(error)) from error

    # ------------------------------------------------------------------------------------------------------- builder

    @property
    def strongly_typed(self) -> bool:
        """Whether networks take their types from the graph. 8.6 does not: it needs precision flags and constraints."""
        return self.flavor is Flavor.RTX or self._major >= 10

    @property
    def newest_opset(self) -> int | None:
        """The newest ONNX opset that the parser takes; None: no limit is known."""
        return 17 if self.flavor is Flavor.TENSORRT and self._major < 10 else None

    @property
    def has_timing_cache(self) -> bool:
        """Whether builds use a timing cache. RTX times nothing when it builds."""
        return self.flavor is not Flavor.RTX

    def create_network(self, builder: Any) -> Any:
        """An empty network: strongly typed (10 and later, RTX), or with an explicit batch (8.6)."""
        flags = self.module.NetworkDefinitionCreationFlag
        flag = flags.STRONGLY_TYPED if self.strongly_typed else flags.EXPLICIT_BATCH
        return builder.create_network(1 << int(flag))  # bit 1 in 10.x, bit 0 in 11 and RTX

    def set_precision_flags(self, config: Any, tf32: bool, fp16: bool, int8: bool = False) -> None:
        """Sets the builder flags for what the graph itself does not say about precision."""
        flags = self.module.BuilderFlag
        (config.set_flag if tf32 else config.clear_flag)(flags.TF32)
        if fp16 and not self.strongly_typed:
            config.set_flag(flags.FP16)
            config.set_flag(flags.OBEY_PRECISION_CONSTRAINTS)
        if int8 and not self.strongly_typed:
            config.set_flag(flags.INT8)

    def set_builder_defaults(self, config: Any) -> None:
        """Sets what every build needs and only some versions do by themselves."""
        trt = self.module
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if not self.strongly_typed:
            # cuBLAS and cuDNN: deprecated, gone in 10 and 11, and without them an engine needs neither to run.
            wanted = (trt.TacticSource.EDGE_MASK_CONVOLUTIONS, trt.TacticSource.JIT_CONVOLUTIONS)
            config.set_tactic_sources(sum(1 << int(source) for source in wanted))
        if hasattr(trt.PreviewFeature, "PROFILE_SHARING_0806"):  # always on from 10
            config.set_preview_feature(trt.PreviewFeature.PROFILE_SHARING_0806, True)

    def set_version_compatible(self, config: Any, lean_runtime_inside: bool) -> None:
        """Has a plan run in later versions of TensorRT, too; with a lean runtime inside that does so."""
        flags = self.module.BuilderFlag
        config.set_flag(flags.VERSION_COMPATIBLE)
        if not lean_runtime_inside:
            config.set_flag(flags.EXCLUDE_LEAN_RUNTIME)

    @property
    def excludes_lean_runtime(self) -> bool:
        """Whether plans without a lean runtime inside can be built for use in the same version. 8.6's are refused."""
        return self.flavor is Flavor.TENSORRT and self._major >= 10

    def set_targets(self, config: Any, targets: tuple[str, ...]) -> None:
        """GPU architectures to build for; RTX only."""
        config.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            config.set_compute_capability(getattr(self.module.ComputeCapability, target.upper()), index)

    def set_progress(self, config: Any, report: BuildProgress) -> bool:
        """Has a build report its progress; False where TensorRT has no progress monitor (8.6)."""
        if not hasattr(self.module, "IProgressMonitor"):
            return False
        # In some versions the config does not keep the monitor alive. A build stays on one thread.
        self._monitors.latest = _progress_monitor(self.module, report)
        config.progress_monitor = self._monitors.latest
        return True

    # ------------------------------------------------------------------------------------------------------- formats

    def allow_channels_last(self, output: Any) -> None:
        """Has an engine write a 16-bit output channels-last, with the channels padded to a multiple of eight (HWC8)."""
        output.allowed_formats = 1 << int(self.module.TensorFormat.HWC8)

    def tensor_format(self, engine: Any, name: str, profile: int = 0, stated: str | None = None) -> str:
        """TensorRT's name of the format of an engine's tensor: "LINEAR", "HWC8".

        Args:
            engine: TensorRT's engine.
            name: the tensor's.
            profile: number of the optimization profile.
            stated: the format that the engine's .json states. None: there is no .json.

        Raises:
            SuperPointError: neither TensorRT nor a .json tells, or they contradict each other.
        """
        arguments = (name, profile) if profile else (name,)  # not every 8.6 takes a profile
        if self.part is Part.FULL:
            return str(engine.get_tensor_format(*arguments).name)
        # The lean and dispatch bindings lack the enumeration, so they can only tell in words: "... (kHWC8)".
        told = re.search(r"\(k([A-Z0-9_]+)\)", str(engine.get_tensor_format_desc(*arguments)))
        if told and stated not in (None, told[1]):
            raise SuperPointError(f"{name} has TensorRT's format {told[1]}, but the engine's .json says {stated}.")
        if told:
            return told[1]
        if stated is None:
            raise SuperPointError(
                f"{self} does not tell the format of {name}, and there is no .json that does: carry the engine's .json "
                "with it, or run it in the full TensorRT."
            )
        return stated

    def pixel_pitch(self, engine: Any, name: str, profile: int = 0, stated: str | None = None) -> int:
        """How an engine's tensor lies in memory; arguments as `tensor_format`.

        Returns:
            Values from one pixel to the next if the channels of a pixel lie together (NHWC); 0 for NCHW.

        Raises:
            SuperPointError: the tensor has any other of TensorRT's formats, or nothing tells which.
        """
        found = self.tensor_format(engine, name, profile, stated)
        shape = tuple(engine.get_tensor_shape(name))
        if found == "LINEAR":
            return 0
        if found not in _CHANNELS_LAST or len(shape) != 4:
            raise SuperPointError(
                f"{name} {list(shape)} has TensorRT's format {found}; expected one of LINEAR, "
                f"{', '.join(_CHANNELS_LAST)} (trtexec: leave --inputIOFormats and --outputIOFormats away)."
            )
        multiple = _CHANNELS_LAST[found]
        return -(-int(shape[1]) // multiple) * multiple

    # ------------------------------------------------------------------------------------------------------- runtime

    def deserialize(self, plan: bytes, allow_host_code: bool, log: FailureLog) -> tuple[Any, Any]:
        """Opens a plan.

        Args:
            plan: the plan.
            allow_host_code: whether code in the plan may run in this process.
            log: collects messages meanwhile.

        Returns:
            TensorRT's runtime, which must live as long as the engine, and the engine.

        Raises:
            SuperPointError: TensorRT refuses.
        """
        runtime = self.module.Runtime(self.logger)
        if self.part is not Part.FULL and log.has_errors:
            # These bindings return an empty object then, and end the process if it is used or freed.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(runtime))
            raise log.failed()
        if allow_host_code:
            runtime.engine_host_code_allowed = True
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise log.failed()
        return runtime, engine

    @property
    def captures(self) -> bool:
        """Whether runs can be recorded in a CUDA graph. RTX compiles while it runs, and records graphs itself."""
        return self.flavor is Flavor.TENSORRT

    def activation_bytes(self, engine: Any) -> int:
        """Bytes of scratch memory that an execution context needs."""
        size = engine.device_memory_size_v2 if hasattr(engine, "device_memory_size_v2") else engine.device_memory_size
        return int(size)

    def create_context(self, engine: Any, address: int, nbytes: int) -> Any:
        """An execution context that uses the scratch memory given; None if TensorRT refuses."""
        if hasattr(engine, "create_runtime_config"):
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(self._user_managed())
            if hasattr(self.module, "CudaGraphStrategy"):  # RTX, whose kernels are compiled while it runs
                config.cuda_graph_strategy = self.module.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            context = engine.create_execution_context(config)
        elif hasattr(self.module, "ExecutionContextAllocationStrategy"):
            context = engine.create_execution_context(self._user_managed())
        else:
            context = engine.create_execution_context_without_device_memory()
        if context is None:
            return None
        if hasattr(context, "set_device_memory"):
            context.set_device_memory(address, nbytes)
        else:
            context.device_memory = address
        return context

    def _user_managed(self) -> Any:
        return self.module.ExecutionContextAllocationStrategy.USER_MANAGED


class FailureLog:
    """TensorRT's log messages during one piece of work.

    Args:
        tensorrt: whose work it is, for the text.
        what: what failed, if it fails.
    """

    def __init__(self, tensorrt: TensorRT, what: str) -> None:
        self._tensorrt = tensorrt
        self._what = what
        self._severity = tensorrt.module.ILogger.Severity
        self.own: deque[LogMessage] = deque(maxlen=_MOST_MESSAGES)
        """Messages that came on the thread that does the work."""
        self.shared: deque[LogMessage] = deque(maxlen=_MOST_MESSAGES)
        """Messages from TensorRT's own threads meanwhile; they may belong to another thread's work."""

    @property
    def has_errors(self) -> bool:
        """Whether the working thread got an error."""
        return any(level <= int(self._severity.ERROR) for level, _ in tuple(self.own))

    def messages(self) -> list[str]:
        """The errors, else the warnings; each once, without TensorRT's prefixes.

        Messages from TensorRT's own threads count only if the working thread got none of that severity.
        """
        for worst in (int(self._severity.ERROR), int(self._severity.WARNING)):
            for source in (self.own, self.shared):
                found = [_tidy(text) for level, text in tuple(source) if level <= worst]
                if found:
                    return list(dict.fromkeys(found))
        return []

    def failed(self, reason: str = "") -> SuperPointError:
        """The exception: what failed, TensorRT's own messages, and what to do where that is known."""
        told = "; ".join([*([reason] if reason else []), *self.messages()]) or "TensorRT gave no reason"
        told = told if len(told) <= _LONGEST else told[:_LONGEST] + " ..."
        advice = next((text for pattern, text in _ADVICE if re.search(pattern, told, re.IGNORECASE)), "")
        return SuperPointError(f"{self._what}: {self._tensorrt} says: {told}{'. ' + advice if advice else ''}")


class _ThreadLog:
    """Sends each message of TensorRT's one logger to the work that caused it.

    TensorRT calls the logger on the thread that called TensorRT, or on a thread of its own.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a finalizer may write to the log while a message is being added
        self._collecting: dict[int, list[FailureLog]] = {}
        """Thread id -> logs of the work that this thread is in, one inside the other."""

    @contextmanager
    def collecting(self, log: FailureLog) -> Iterator[None]:
        """Sends this thread's messages to `log`, too, while inside."""
        thread = threading.get_ident()
        with self._lock:
            self._collecting.setdefault(thread, []).append(log)
        try:
            yield
        finally:
            with self._lock:
                logs = self._collecting[thread]
                logs.remove(log)
                if not logs:
                    del self._collecting[thread]

    def add(self, message: LogMessage) -> None:
        """Takes a message of TensorRT's."""
        with self._lock:
            own = self._collecting.get(threading.get_ident())
            for log in own or ():
                log.own.append(message)
            if not own:
                for logs in self._collecting.values():
                    for log in logs:
                        log.shared.append(message)


_LONGEST = 1500

# Patterns of TensorRT's messages, the most specific first, and what the user can do.
_ADVICE = (
    (
        r"plan\.header\.size == blobSize|Plan is truncated|blob size",
        "The file is not whole: copy or build it again.",
    ),
    (
        r"host code|engine_host_code_allowed|EngineHostCode|lean runtime.*not allowed",
        "The plan carries host code: if you trust who built it, open it with --allow-host-code.",
    ),
    (
        r"libnvinfer_lean",
        "Version-compatible engines need TensorRT's lean runtime of its own version beside its libraries: "
        "docs/tensorrt.md.",
    ),
    (
        r"magic ?tag|incompatible serialization|version tag|not compatible with this version|engine plan file",
        "The engine was made by another TensorRT: build it here again from its .onnx (superpoint build).",
    ),
    (
        r"Target GPU SM \d+ is not supported|does not support this compute capability|Unsupported SM",
        "This TensorRT does not know this GPU: Pascal (GTX 10) needs TensorRT 8.6, TensorRT 10 starts at Volta or "
        "Turing, TensorRT-RTX is for RTX GPUs only; or run the .onnx: superpoint infer --model MODEL.onnx.",
    ),
    (
        r"driver version is insufficient|no CUDA-capable device|CUDA initialization failure|cudaError 35|cudaError 100",
        "TensorRT finds no usable GPU: look at nvidia-smi; the driver must be there and new enough for its CUDA.",
    ),
    (
        r"OutOfMemory|out of memory|insufficient memory|workspace memory|Try increasing the workspace",
        "Give the builder more (--workspace, in GiB), free the GPU (nvidia-smi), or ask for less: a smaller "
        "--max-shape or --max-batch-size.",
    ),
    (
        r"Unsupported ONNX opset|opset.*not supported|No importer registered|UNSUPPORTED_NODE",
        "Export with an older opset: superpoint export --opset 17.",
    ),
    (
        r"does not match any profile|kOPT|profile.*(min|max)",
        "The sizes asked for do not fit the model: look at superpoint info MODEL.onnx.",
    ),
    (
        r"not found.*cudnn|libcudnn|libcublas|libnvinfer",
        "A library is missing: install TensorRT as docs/tensorrt.md says for this platform.",
    ),
)


def _tidy(line: str) -> str:
    """Removes the places in NVIDIA's source code that TensorRT puts around a message."""
    line = re.sub(r"^\s*\[?\S+\.(cpp|h)::\S+\]\s*", "", line.strip())
    line = re.sub(r"\s*\(?In \S+ at \S+:\d+\)?", "", line)
    return line.rstrip(". ")


def _logger(module: Any, log: _ThreadLog) -> Any:
    """A logger in TensorRT's sense that keeps warnings and errors."""

    class Log(module.ILogger):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= int(module.ILogger.Severity.WARNING):
                log.add((int(severity), message))

    return Log()


def _progress_monitor(module: Any, report: BuildProgress) -> Any:
    class Monitor(module.IProgressMonitor):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self._steps[phase] = steps

        def phase_finish(self, phase: str) -> None:
            self._steps.pop(phase, None)

        def step_complete(self, phase: str, step: int) -> bool:
            report(phase, step + 1, self._steps.get(phase, 0))
            return True  # go on; False would cancel

    return Monitor()
