"""Which device a model runs on, as users name it: "auto", "cpu", "cuda:1" or "openvino:GPU"."""

from __future__ import annotations

import re
from dataclasses import dataclass

from superpoint_trt.core.types import SuperPointError

DEVICE_NAMES = "auto, cpu, cuda, cuda:N, openvino, openvino:GPU or openvino:NPU (with :fp32 to compute in fp32)"
"""The names that `DeviceChoice.parse` takes, for messages."""

ALL_DEVICES = "all"
"""The name for every device of this machine, where several may be named (`superpoint bench`)."""

_NAME = re.compile(
    r"(?P<plain>auto|cpu|cuda)"
    r"|cuda:(?P<index>\d{1,4})"
    r"|openvino(?::(?P<unit>CPU|NPU|GPU(?:\.\d{1,4})?))?(?P<fp32>:fp32)?"
)


@dataclass(frozen=True)
class DeviceChoice:
    """A device that was asked for."""

    kind: str
    """"auto": the best that works; "cpu"; "cuda": a GPU or an error; "openvino": OpenVINO or an error."""
    index: int | None = None
    """Number of the GPU, of "cuda:N" only. None: the runtime's current one."""
    unit: str = ""
    """OpenVINO's name for its device ("CPU", "GPU", "GPU.1", "NPU"), of "openvino" only."""
    fp32: bool = False
    """Whether OpenVINO computes in float32, of "openvino" only. False: in what it takes for the fastest type."""

    @classmethod
    def parse(cls, text: str) -> DeviceChoice:
        """Reads "auto", "cpu", "cuda", "cuda:N", or "openvino", "openvino:CPU", "openvino:GPU:fp32" and so on.

        "openvino" alone means its CPU.

        Raises:
            SuperPointError: any other text.
        """
        found = _NAME.fullmatch(text)
        if not found:
            raise SuperPointError(f"device is {text!r}; expected {DEVICE_NAMES}.")
        if found["plain"]:
            return cls(found["plain"])
        if found["index"]:
            return cls("cuda", int(found["index"]))
        return cls("openvino", unit=found["unit"] or "CPU", fp32=bool(found["fp32"]))

    def __str__(self) -> str:
        if self.kind == "openvino":
            return f"openvino:{self.unit}{':fp32' if self.fp32 else ''}"
        return self.kind if self.index is None else f"{self.kind}:{self.index}"
