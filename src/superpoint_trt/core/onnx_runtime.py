"""Imports onnxruntime so that it sends nothing and writes nothing of its own."""

from __future__ import annotations

import os
from types import ModuleType


def import_onnxruntime() -> ModuleType:
    """Imports onnxruntime with its telemetry switched off, unless the user set ORT_DISABLE_TELEMETRY.

    From 1.32 on, onnxruntime keeps telemetry files in the home folder and the temporary folder, on Linux too, and
    writes to stderr where it has no home. It reads the variable when it is imported.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    module: ModuleType = onnxruntime
    return module
