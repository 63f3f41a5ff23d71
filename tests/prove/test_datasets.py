"""Homography files of strangers: what is no homography is a line of its own, without warnings of numpy."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from helpers import SAME, write_sequence

from superpoint_trt import SuperPointError
from superpoint_trt.prove import datasets, metrics
from superpoint_trt.prove.datasets import load_pairs

ODD = {
    "huge": b"1e300 0 0\n0 1e300 0\n0 0 1e-300\n",
    "all huge": b"1e308 1e308 1e308\n" * 3,
    "not finite": b"1 0 nan\n0 1 inf\n0 0 1\n",
    "text": b"one two three\n" * 3,
    "no UTF-8": b"\xff\xfe 0 0\n0 1 0\n0 0 1\n",
    "too many": b"1 0 0\n" * 100_000,
    "singular": b"1 2 3\n2 4 6\n0 0 1\n",
    "empty": b"",
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_no_homography_is_left_out_with_its_name(tmp_path, name):
    write_sequence(tmp_path / "v_a", homographies=(SAME, SAME))
    (tmp_path / "v_a" / "H_1_2").write_bytes(ODD[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = load_pairs(tmp_path)
    assert len(found.pairs) == 1
    (problem,) = found.problems
    assert str(tmp_path / "v_a" / "H_1_2") in problem and "\n" not in problem


def test_a_long_file_is_not_parsed(tmp_path, monkeypatch):
    write_sequence(tmp_path / "v_a", homographies=(SAME,))
    (tmp_path / "v_a" / "H_1_2").write_bytes(ODD["too many"])
    monkeypatch.setattr(datasets.np, "array", lambda *given, **options: pytest.fail("it was parsed"))
    with pytest.raises(SuperPointError, match="no image pairs"):
        load_pairs(tmp_path)


def test_points_that_leave_float64_become_infinite_in_silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moved = metrics.warp(np.array([[1.0, 2.0], [1e10, 1e10]]), np.diag([1e300, 1e300, 1e-300]))
    assert np.isinf(moved).all()
