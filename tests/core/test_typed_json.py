"""Typed JSON: what is refused, and what the message says."""

from __future__ import annotations

import enum

import pytest

from superpoint_trt.core import typed_json
from superpoint_trt.core.typed_json import JsonError, parse


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


def test_ordinary_json_is_read():
    assert parse(b'{"a": [1, 2.5, "\xc3\xa4", true, null, -3e2]}', 100) == {"a": [1, 2.5, "ä", True, None, -300.0]}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 33 + "]" * 33, "nested"),
        ("[" * 100_000, "nested"),
        ('{"a":' * 20_000, "nested"),
        ('"\\' * 40_000, "not JSON"),
        ("1" * 100_001, "100001 characters"),
        ("NaN", "NaN"),
        ("[-Infinity]", "Infinity"),
        ("{", "not JSON"),
        ("", "not JSON"),
        (b"\xff\xfe", "UTF-8"),
    ],
)
def test_other_text_is_refused(text, says):
    with pytest.raises(JsonError, match=says) as error:
        parse(text, 100_000)
    assert len(str(error.value)) < 200


def test_brackets_in_strings_are_no_nesting():
    assert parse('["' + "[" * 100 + '\\"[[["]', 1000) == ["[" * 100 + '"[[[']
    assert parse("[" * 32 + "]" * 32, 1000)


def test_gigantic_integers_are_no_integers():
    """Python refuses to read more than 4,300 digits; before that it takes long."""
    assert parse("9" * 5000, 10_000) == float("inf")
    with pytest.raises(JsonError, match=r"side is 1e\+30; expected a whole number from 1 to 9"):
        typed_json.integer(parse(str(10**30), 100), "side", 1, 9)


@pytest.mark.parametrize("value", [True, 1.0, "1", None, 0, 10, [1]])
def test_what_is_no_integer_is_refused(value):
    with pytest.raises(JsonError, match=r"side is .*; expected a whole number from 1 to 9"):
        typed_json.integer(value, "side", 1, 9)


@pytest.mark.parametrize("value", [True, "1", None, float("nan"), float("inf"), -0.1, 1.1, {}])
def test_what_is_no_number_is_refused(value):
    with pytest.raises(JsonError, match=r"share is .*; expected a number from 0 to 1"):
        typed_json.real(value, "share", 0.0, 1.0)


def test_other_types_are_refused():
    for read, value in (
        (typed_json.flag, 1),
        (typed_json.text, 3),
        (typed_json.text, "x" * 70_000),
        (typed_json.optional_text, 3),
        (typed_json.texts, "sm89"),
        (typed_json.texts, [1]),
        (typed_json.mapping, [1]),
        (lambda value, key: typed_json.integers(value, key, 3, 1, 9), [1, 2]),
        (lambda value, key: typed_json.choice(value, key, Color), "green"),
        (lambda value, key: typed_json.choice(value, key, Color), [1]),
        (lambda value, key: typed_json.member({}, key), None),
    ):
        with pytest.raises(JsonError, match="key is ") as error:
            read(value, "key")
        assert len(str(error.value)) < 200


def test_right_values_come_back():
    assert typed_json.integer(3, "k", 1, 9) == 3
    assert typed_json.real(1, "k", 0.0, 1.0) == 1.0
    assert typed_json.choice("red", "k", Color) is Color.RED
    assert typed_json.texts(["a"], "k") == ("a",)
    assert typed_json.integers([1, 2, 3], "k", 3, 1, 9) == (1, 2, 3)
    assert typed_json.optional_text(None, "k") is None
