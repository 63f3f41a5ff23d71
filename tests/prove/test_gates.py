"""The gates: which way each limit holds, what an undefined value means, and which limits can be given."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from superpoint_trt.core.types import Precision, SuperPointError
from superpoint_trt.prove.gates import GATE_NAMES, MEANINGS, Gate, Measurements, judge, parse_limits

PERFECT = Measurements(0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0)


def failed(measured, precision=Precision.FP16, limits=None):
    return [gate.name for gate in judge(measured, precision, limits) if not gate.passed]


def test_every_gate_has_a_measurement_a_meaning_and_a_limit_for_every_precision():
    assert tuple(field.name for field in fields(Measurements)) == GATE_NAMES == tuple(MEANINGS)
    for precision in Precision:
        assert failed(PERFECT, precision) == []


@pytest.mark.parametrize("at_least", [True, False])
def test_a_value_at_the_limit_passes(at_least):
    below, at, above = (Gate("g", value, 0.5, at_least).passed for value in (0.4999, 0.5, 0.5001))
    assert (below, at, above) == (not at_least, True, at_least)


def test_an_undefined_value_does_not_fail():
    assert failed(Measurements(*[None] * len(GATE_NAMES))) == []


@pytest.mark.parametrize("name", GATE_NAMES)
def test_each_gate_looks_at_its_own_measurement(name):
    """The worst value of one measurement alone: 1 for errors and faults, 0 for shares and cosines."""
    worst = 1.0 if name in ("score_error_max", "findings") else 0.0
    assert failed(replace(PERFECT, **{name: worst})) == [name]


def test_a_looser_precision_has_looser_limits_and_a_given_limit_comes_first():
    measured = replace(PERFECT, keypoints_found_share=0.95)
    assert failed(measured, Precision.FP32) == failed(measured, Precision.FP16) == ["keypoints_found_share"]
    assert failed(measured, Precision.INT8) == []
    assert failed(measured, Precision.INT8, {"keypoints_found_share": 0.96}) == ["keypoints_found_share"]
    assert failed(measured, Precision.FP32, {"keypoints_found_share": 0.95}) == []


def test_limits_as_they_are_typed():
    assert parse_limits(["findings=2", "score_error_max=1e-3", "findings=3"]) == {
        "findings": 3.0,
        "score_error_max": 0.001,
    }
    for text, words in (("findings", "NAME=NUMBER"), ("findings=few", "NAME=NUMBER"), ("speed=1", "no gate is called")):
        with pytest.raises(SuperPointError, match=words) as caught:
            parse_limits([text])
        assert all(name in str(caught.value) for name in GATE_NAMES)
