"""The gates of `verify`: what is measured, the limit of each measurement by precision, and the verdict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from superpoint_trt.core.types import Precision, SuperPointError
from superpoint_trt.prove.agreement import FOUND_WITHIN_PX


@dataclass(frozen=True)
class Gate:
    """A limit and what was measured."""

    name: str
    value: float | None
    """None: not defined for this model or these images. An undefined value does not fail."""
    limit: float
    at_least: bool
    """The value must be at least the limit; otherwise at most."""

    @property
    def passed(self) -> bool:
        """Whether the value keeps the limit."""
        if self.value is None:
            return True
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def to_json(self) -> dict[str, Any]:
        """The gate as plain data, with its verdict."""
        return {
            "name": self.name,
            "value": self.value,
            "limit": self.limit,
            "at_least": self.at_least,
            "passed": self.passed,
        }


@dataclass(frozen=True)
class Measurements:
    """What the gates look at: one field for each gate, under the gate's name. None: not defined."""

    score_error_max: float | None
    keypoints_found_share: float | None
    score_rank_correlation: float | None
    descriptor_cosine_median: float | None
    descriptor_cosine_p1: float | None
    matches_kept_share: float | None
    findings: float | None
    """How many known faults were found."""


@dataclass(frozen=True)
class _Rule:
    """One row of the table of limits."""

    meaning: str
    at_least: bool
    limits: Mapping[Precision, float]


# The one table of limits. Rows in the order of the report.
#
# The limits of int8 and fp8 lie between what sound models measure and what models with a planted fault measure. The
# faults (tests/prove/test_sensitivity.py): one range cut to an eighth, one scale for all channels of a layer, two
# ranges exchanged. Measured with AMD's weights on photographs that calibration did not see:
#
#                         sound model    mildest fault
#     points found        0.977          0.71
#     rank correlation    0.996          0.88
#     cosine, median      0.998          0.89
#     cosine, p1          0.985          0.81
#     matches kept        0.99           0.78
#     score error         0.12           0.48
#
# With 0.90 of the points, homographies and matches stay within 0.02 of fp32 (docs/int8.md). The limit of the score
# error is loose (0.6) because a few pixels of a sound model are far off: where two neighboring pixels are almost equal,
# rounding moves the cell's share from one to the other, and the point moves by one pixel.
# fp8 has the limits of int8 because it has the same use. Its three bits of mantissa round more coarsely than int8 does
# near the end of the range, so a network may need more layers in fp16 to meet them.
_P = Precision
_RULES: Mapping[str, _Rule] = {
    "score_error_max": _Rule(
        "largest difference of a detection score",
        False,
        # fp16: a TensorRT 8.6 engine whose points and descriptors were right measured 0.089 at the worst of 2.5 million
        # pixels (H100; its kernels accumulate in fp16). docs/tensorrt.md has the points.
        {_P.FP32: 1e-3, _P.TF32: 2e-2, _P.FP16: 0.15, _P.BF16: 0.3, _P.INT8: 0.6, _P.FP8: 0.6},
    ),
    "keypoints_found_share": _Rule(
        f"share of keypoints found again within {FOUND_WITHIN_PX:g} px, the worse of both directions",
        True,
        {_P.FP32: 0.999, _P.TF32: 0.99, _P.FP16: 0.98, _P.BF16: 0.93, _P.INT8: 0.90, _P.FP8: 0.90},
    ),
    "score_rank_correlation": _Rule(
        "Spearman correlation of the scores at common points: does the order survive?",
        True,
        {_P.FP32: 0.9999, _P.TF32: 0.999, _P.FP16: 0.995, _P.BF16: 0.98, _P.INT8: 0.90, _P.FP8: 0.90},
    ),
    "descriptor_cosine_median": _Rule(
        "cosine of both descriptors at common points, median",
        True,
        {_P.FP32: 0.99999, _P.TF32: 0.9999, _P.FP16: 0.999, _P.BF16: 0.995, _P.INT8: 0.97, _P.FP8: 0.97},
    ),
    "descriptor_cosine_p1": _Rule(
        "cosine of both descriptors at common points, first percentile: the worst hundredth",
        True,
        {_P.FP32: 0.9999, _P.TF32: 0.999, _P.FP16: 0.99, _P.BF16: 0.95, _P.INT8: 0.85, _P.FP8: 0.85},
    ),
    "matches_kept_share": _Rule(
        "right matches to a warped copy of each image: the model's over the reference's",
        True,
        {_P.FP32: 0.99, _P.TF32: 0.98, _P.FP16: 0.97, _P.BF16: 0.95, _P.INT8: 0.90, _P.FP8: 0.90},
    ),
    "findings": _Rule(
        "known conversion faults whose signature most images show",
        False,
        {precision: 0.0 for precision in Precision},
    ),
}
GATE_NAMES = tuple(_RULES)
MEANINGS: Mapping[str, str] = {name: rule.meaning for name, rule in _RULES.items()}
"""What each gate measures, in one line."""


def parse_limits(gates: Iterable[str]) -> dict[str, float]:
    """Reads limits from texts of the form NAME=NUMBER.

    Raises:
        SuperPointError: a text is not of that form, no gate has the name, or the number is not finite.
    """
    limits = {}
    for text in gates:
        name, _, number = text.partition("=")
        try:
            limits[name] = float(number)
        except ValueError:
            raise SuperPointError(f"--gate {text}: expected NAME=NUMBER; {_known()}") from None
    check_limits(limits)
    return limits


def check_limits(limits: Mapping[str, float]) -> None:
    """Checks limits before the work that is measured against them.

    Raises:
        SuperPointError: no gate has the name, or the limit is not finite. The message lists the gates.
    """
    for name, limit in limits.items():
        if name not in _RULES:
            raise SuperPointError(f"no gate is called {name!r}; {_known()}")
        if not np.isfinite(limit):
            raise SuperPointError(f"the limit of gate {name} is {limit:g}; expected a finite number; {_known()}")


def _known() -> str:
    return f"gates are: {', '.join(GATE_NAMES)}."


def judge(measured: Measurements, precision: Precision, limits: Mapping[str, float] | None = None) -> list[Gate]:
    """Compares measurements with the limits of a precision.

    Args:
        measured: one value for each gate.
        precision: the model's.
        limits: gate name -> limit, in place of the precision's own.

    Returns:
        All gates in the order of the report.
    """
    limits = limits or {}
    return [
        Gate(name, getattr(measured, name), limits.get(name, rule.limits[precision]), rule.at_least)
        for name, rule in _RULES.items()
    ]
