"""Which device a model runs on, as users name it: "auto", "cpu", "cuda" or "cuda:1"."""

from __future__ import annotations

import re
from dataclasses import dataclass

from superpoint_trt.core.types import SuperPointError

DEVICE_NAMES = "auto, cpu, cuda or cuda:N"
"""The names that `DeviceChoice.parse` takes, for messages."""


@dataclass(frozen=True)
class DeviceChoice:
    """A device that was asked for."""

    kind: str
    """"auto": the best that works; "cpu"; "cuda": a GPU or an error."""
    index: int | None = None
    """Number of the GPU, of "cuda:N" only. None: the runtime's current one."""

    @classmethod
    def parse(cls, text: str) -> DeviceChoice:
        """Reads "auto", "cpu", "cuda" or "cuda:N".

        Raises:
            SuperPointError: any other text.
        """
        found = re.fullmatch(r"(auto|cpu|cuda)|cuda:(\d{1,4})", text)
        if not found:
            raise SuperPointError(f"device is {text!r}; expected {DEVICE_NAMES}.")
        return cls(found[1]) if found[1] else cls("cuda", int(found[2]))

    def __str__(self) -> str:
        return self.kind if self.index is None else f"{self.kind}:{self.index}"
