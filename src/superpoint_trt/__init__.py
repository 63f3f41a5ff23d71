"""SuperPoint from a PyTorch checkpoint to ONNX to TensorRT.

    from superpoint_trt import SuperPoint
    with SuperPoint() as superpoint:
        keypoints = superpoint.extract("photo.jpg")

Importing this package costs numpy alone. The names below are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module

from superpoint_trt._version import __version__

TYPE_CHECKING = False  # type checkers know the name; importing typing would take most of this module's time
if TYPE_CHECKING:
    from superpoint_trt.checkpoint.layouts import load_descriptor_map
    from superpoint_trt.core.types import (
        DecodeOptions,
        Keypoints,
        ModelDescription,
        OutputType,
        Precision,
        Sampling,
        SuperPointError,
    )
    from superpoint_trt.match.images import ImageMatches, match_images
    from superpoint_trt.match.learned import LearnedMatcher
    from superpoint_trt.match.nearest import MatchOptions
    from superpoint_trt.run.decode import lift_descriptors
    from superpoint_trt.run.extractor import SuperPoint

_HOMES = {
    "DecodeOptions": "core.types",
    "ImageMatches": "match.images",
    "Keypoints": "core.types",
    "LearnedMatcher": "match.learned",
    "MatchOptions": "match.nearest",
    "ModelDescription": "core.types",
    "OutputType": "core.types",
    "Precision": "core.types",
    "Sampling": "core.types",
    "SuperPoint": "run.extractor",
    "SuperPointError": "core.types",
    "lift_descriptors": "run.decode",
    "load_descriptor_map": "checkpoint.layouts",
    "match_images": "match.images",
}
"""Public name -> the module that defines it."""

__all__ = [
    "DecodeOptions",
    "ImageMatches",
    "Keypoints",
    "LearnedMatcher",
    "MatchOptions",
    "ModelDescription",
    "OutputType",
    "Precision",
    "Sampling",
    "SuperPoint",
    "SuperPointError",
    "__version__",
    "lift_descriptors",
    "load_descriptor_map",
    "match_images",
]


if not TYPE_CHECKING:  # a type checker would take every name for a public one

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = found  # the next use does not come here
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
