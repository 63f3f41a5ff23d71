"""What ships inside the package, so that everything works offline: this project's own weights, and a photograph."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent

WEIGHTS = _FOLDER / "superpoint_trt_v1.safetensors"
"""Trained from nothing by this repository's `training/`; Conv + ReLU, half-pixel sampling, stored in float16. MIT."""

MODEL_CARD = _FOLDER / "MODEL_CARD.md"
"""Data, protocol, figures, limits and licence of `WEIGHTS`."""

TRAINING_LOG = _FOLDER / "training_log.jsonl"
"""One JSON object a line, as `python -m training` wrote them."""

PHOTO = _FOLDER / "astronaut.jpg"
"""Eileen Collins, NASA, public domain; not among the training images. 512 x 512 px, RGB."""

MATCHER = _FOLDER / "superpoint_trt_matcher.safetensors"
"""Weights of the learned matcher (`checkpoint.matcher`); not part of every version."""
