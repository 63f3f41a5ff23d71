"""Reads JSON that a stranger may have written: metadata of models, and the files beside engines and models.

Length and depth are limited before the text is parsed. Each value is then taken by a function that names the type and
the range it expects.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from enum import Enum
from typing import TypeVar

MOST_DEPTH = 32
"""Brackets within brackets. This project's own files need three."""

LONGEST_TEXT = 1 << 16
"""Characters of one text."""

_LONGEST_SHOWN = 80
"""Characters of a wrong value that an error repeats."""

_LONGEST_INTEGER = 20
"""Digits. Longer integers are read as float: Python takes long to read them, and no number here is so large."""

_Choice = TypeVar("_Choice", bound=Enum)


class JsonError(ValueError):
    """The JSON is not what was expected. The text names the key, the value found and what was expected."""


def parse(text: str | bytes, most_chars: int, most_depth: int = MOST_DEPTH) -> object:
    """Parses JSON.

    Args:
        text: the JSON; bytes are UTF-8.
        most_chars: length that is accepted.
        most_depth: brackets within brackets that are accepted.

    Returns:
        dict, list, str, int, float, bool or None.

    Raises:
        JsonError: too long, too deep, no UTF-8, or no JSON. NaN and Infinity are no JSON.
    """
    if len(text) > most_chars:
        raise JsonError(f"it has {len(text)} characters; expected {most_chars} at most")
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise JsonError(f"it is not UTF-8 text: {error.reason} at byte {error.start}") from None
    if _depth(text) > most_depth:
        raise JsonError(f"its brackets are nested more than {most_depth} deep")
    try:
        parsed: object = json.loads(text, parse_int=_integer, parse_constant=_refuse_constant)
    except JsonError:
        raise
    except ValueError as error:
        raise JsonError(f"it is not JSON: {error}") from None
    return parsed


def _depth(text: str) -> int:
    """The deepest nesting of brackets outside strings. Of a text that is no JSON: that or more."""
    bare = re.sub(r'"[^"]*"?', "", re.sub(r"\\.", "", text, flags=re.DOTALL))
    depth = deepest = 0
    for bracket in re.findall(r"[\[\]{}]", bare):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= _LONGEST_INTEGER else float(digits)


def _refuse_constant(name: str) -> object:
    raise JsonError(f"it holds {name}, which is no number in JSON")


def shown(value: object) -> str:
    """A value as an error repeats it, cut to 80 characters."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 3] + "..."


def member(values: Mapping[str, object], key: str) -> object:
    """A value that has to be there.

    Raises:
        JsonError: it is not.
    """
    if key not in values:
        raise JsonError(f"{key} is missing")
    return values[key]


def integer(value: object, key: str, low: int, high: int) -> int:
    """A whole number from `low` to `high`.

    Raises:
        JsonError: it is another value. true and false are no numbers.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise JsonError(f"{key} is {shown(value)}; expected a whole number from {low} to {high}")
    return value


def real(value: object, key: str, low: float, high: float) -> float:
    """A number from `low` to `high`, as float.

    Raises:
        JsonError: it is another value. true and false are no numbers.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise JsonError(f"{key} is {shown(value)}; expected a number from {low:g} to {high:g}")
    return float(value)


def flag(value: object, key: str) -> bool:
    """True or false.

    Raises:
        JsonError: it is another value.
    """
    if not isinstance(value, bool):
        raise JsonError(f"{key} is {shown(value)}; expected true or false")
    return value


def text(value: object, key: str) -> str:
    """A text of 65536 characters at most.

    Raises:
        JsonError: it is another value, or longer.
    """
    if not isinstance(value, str) or len(value) > LONGEST_TEXT:
        raise JsonError(f"{key} is {shown(value)}; expected a text of {LONGEST_TEXT} characters at most")
    return value


def choice(value: object, key: str, kind: type[_Choice]) -> _Choice:
    """A member of an enumeration, by its value.

    Raises:
        JsonError: it is no member's value; the text lists those.
    """
    try:
        return kind(value)
    except ValueError:
        known = ", ".join(str(one.value) for one in kind)
        raise JsonError(f"{key} is {shown(value)}; expected one of {known}") from None


def optional_text(value: object, key: str) -> str | None:
    """A text, or None.

    Raises:
        JsonError: it is another value.
    """
    return None if value is None else text(value, key)


def texts(value: object, key: str) -> tuple[str, ...]:
    """A list of texts.

    Raises:
        JsonError: it is another value.
    """
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise JsonError(f"{key} is {shown(value)}; expected a list of texts")
    return tuple(value)


def integers(value: object, key: str, count: int, low: int, high: int) -> tuple[int, ...]:
    """A list of `count` whole numbers from `low` to `high`.

    Raises:
        JsonError: it is another value.
    """
    if not isinstance(value, list) or len(value) != count:
        raise JsonError(f"{key} is {shown(value)}; expected a list of {count} whole numbers")
    return tuple(integer(one, key, low, high) for one in value)


def mapping(value: object, key: str) -> dict[str, object]:
    """An object: names with values.

    Raises:
        JsonError: it is another value.
    """
    if not isinstance(value, dict):
        raise JsonError(f"{key} is {shown(value)}; expected an object, {{...}}")
    return value
