"""Ways to damage bytes, JSON and protobuf messages, as hypothesis strategies."""

from __future__ import annotations

import copy
import json
import struct
import zlib
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

NASTY_INTS = (0, 1, -1, 2, 3, 7, 8, 9, 16, 65, 255, 256, 1 << 15, 1 << 16, (1 << 31) - 1, 1 << 31, 1 << 32)
NASTY_INTS += (1 << 40, 1 << 62, (1 << 63) - 1, -(1 << 31), -(1 << 63))
HUGE_INT = 10**30
NASTY_FLOATS = (0.0, -0.0, 0.5, -1.5, 1e-300, 1e38, 1e39, 1e300, float("inf"), float("-inf"), float("nan"))
NASTY_TEXT = (
    "",
    " ",
    "x",
    "\x00",
    "\n",
    "é",
    "\U0001f600",
    "\ud800",
    "../../x",
    "/dev/zero",
    "nan",
    "1e999",
    "x" * 70_000,
)
DEEP = "[" * 100_000


@st.composite
def bytes_like(draw: st.DrawFn, seeds: Sequence[bytes], most: int = 6) -> bytes:
    """A good file with a few places damaged."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, most)))):
        data = _damage(draw, data, seeds)
    if data.startswith(b"\x89PNG") and draw(st.booleans()):
        data = with_png_checksums(data)
    return bytes(data)


def _damage(draw: st.DrawFn, data: bytearray, seeds: Sequence[bytes]) -> bytearray:
    if not data:
        return bytearray(draw(st.binary(max_size=64)))
    place = draw(st.integers(-len(data), len(data) - 1)) % len(data)
    kind = draw(st.sampled_from(("flip", "set", "number", "insert", "delete", "repeat", "cut", "splice", "swap")))
    if kind == "flip":
        data[place] ^= 1 << draw(st.integers(0, 7))
    elif kind == "set":
        data[place] = draw(st.sampled_from((0, 1, 0x7F, 0x80, 0xFF)) | st.integers(0, 255))
    elif kind == "number":
        size = draw(st.sampled_from((2, 4, 8)))
        order = draw(st.sampled_from(("little", "big")))
        value = draw(st.sampled_from(NASTY_INTS)) & ((1 << 8 * size) - 1)
        data[place : place + size] = value.to_bytes(size, order)
    elif kind == "insert":
        data[place:place] = draw(st.binary(min_size=1, max_size=16))
    elif kind == "delete":
        del data[place : place + draw(st.integers(1, 64))]
    elif kind == "repeat":
        piece = data[place : place + draw(st.integers(1, 64))]
        data[place:place] = piece * draw(st.integers(1, 40))
    elif kind == "cut":
        del data[place:]
    elif kind == "splice":
        other = draw(st.sampled_from(seeds))
        start = draw(st.integers(0, max(0, len(other) - 1)))
        data[place:] = other[start:]
    else:
        length = draw(st.integers(1, 32))
        there = draw(st.integers(0, len(data) - 1))
        one, two = data[place : place + length], data[there : there + length]
        data[place : place + len(two)] = two
        data[there : there + len(one)] = one
    return data


def with_png_checksums(data: bytes | bytearray) -> bytearray:
    """The checksum of every chunk made right again, so that what is inside is read."""
    mended, place = bytearray(data), 8
    while place + 12 <= len(mended):
        (length,) = struct.unpack(">I", mended[place : place + 4])
        end = place + 8 + length
        if end + 4 > len(mended):
            break
        mended[end : end + 4] = struct.pack(">I", zlib.crc32(bytes(mended[place + 4 : end])))
        place = end + 4
    return mended


# --------------------------------------------------------------------------------------------------------------- JSON

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from((*NASTY_INTS, HUGE_INT)),
    st.integers(-1000, 1000),
    st.sampled_from(NASTY_FLOATS),
    st.floats(),
    st.sampled_from(NASTY_TEXT),
    st.text(max_size=8),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)


@st.composite
def json_like(draw: st.DrawFn, seeds: Sequence[Any]) -> bytes:
    """A good document with a few values exchanged; sometimes no document any more."""
    value = copy.deepcopy(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.sampled_from((1, 1, 2, 3)))):
        value = _change(draw, value)
    text = json.dumps(value)
    if draw(st.integers(0, 19)) == 19:
        text = text.replace("1", draw(st.sampled_from((DEEP, "1e999", "-0", "0" * 5000, "9" * 5000))), 1)
    data = text.encode("utf-8", "surrogatepass")
    return draw(bytes_like([data], 2)) if draw(st.integers(0, 9)) == 9 else data


def _change(draw: st.DrawFn, value: Any) -> Any:
    """One value somewhere below, exchanged, taken away or added."""
    if isinstance(value, dict) and value and draw(st.integers(0, 9)):
        key = draw(st.sampled_from(sorted(value)))
        kind = draw(st.sampled_from(("inside", "inside", "inside", "inside", "delete", "rename", "add")))
        if kind == "inside":
            value[key] = _change(draw, value[key])
        elif kind == "delete":
            del value[key]
        elif kind == "rename":
            value[draw(st.sampled_from(NASTY_TEXT) | st.text(max_size=5))] = value.pop(key)
        else:
            value[draw(st.text(max_size=5))] = draw(VALUES)
        return value
    if isinstance(value, list) and value and draw(st.integers(0, 4)):
        index = draw(st.integers(0, len(value) - 1))
        kind = draw(st.sampled_from(("inside", "delete", "repeat")))
        if kind == "inside":
            value[index] = _change(draw, value[index])
        elif kind == "delete":
            del value[index]
        else:
            value[index:index] = [value[index]] * draw(st.integers(1, 5))
        return value
    return draw(VALUES)


# ----------------------------------------------------------------------------------------------------------- protobuf


@st.composite
def message_like(draw: st.DrawFn, seeds: Sequence[Any]) -> bytes:
    """A good protobuf message with a few fields changed: it parses, and says something else."""
    message = copy.deepcopy(draw(st.sampled_from(seeds)))
    names = _texts(message)
    for _ in range(draw(st.integers(1, 4))):
        _change_message(draw, message, names)
    data = message.SerializeToString()
    if draw(st.integers(0, 14)) == 14:  # a text that is no UTF-8: protobuf writes none, other programs do
        name = draw(st.sampled_from(names)).encode()
        if name:
            data = data.replace(name, b"\xff" * len(name))
    return data


def _texts(message: Any) -> list[str]:
    """Every string below: a changed one is often another of these, so that a graph is rewired, not only torn."""
    found: dict[str, None] = {}

    def walk(part: Any) -> None:
        for field, value in part.ListFields():
            for one in _several(field, value):
                if field.type == field.TYPE_STRING:
                    found[one] = None
                elif field.type == field.TYPE_MESSAGE:
                    walk(one)

    walk(message)
    return list(found)


def _several(field: Any, value: Any) -> Any:
    return value if _repeated(field) else [value]


def _repeated(field: Any) -> bool:
    return bool(field.is_repeated if hasattr(field, "is_repeated") else field.label == field.LABEL_REPEATED)


def _change_message(draw: st.DrawFn, message: Any, names: list[str]) -> None:
    there = [field for field, _ in message.ListFields()]
    every = list(message.DESCRIPTOR.fields)
    field = draw(st.sampled_from(there if there and draw(st.integers(0, 9)) else every))
    if _repeated(field):
        _change_repeated(draw, message, field, names)
    elif field.type == field.TYPE_MESSAGE:
        if draw(st.integers(0, 7)):
            _change_message(draw, getattr(message, field.name), names)
        else:
            message.ClearField(field.name)
    elif draw(st.integers(0, 7)):
        _set(message, field, _scalar(draw, field, names, getattr(message, field.name)))
    else:
        message.ClearField(field.name)


def _change_repeated(draw: st.DrawFn, message: Any, field: Any, names: list[str]) -> None:
    values = getattr(message, field.name)
    kind = draw(st.sampled_from(("inside", "inside", "inside", "delete", "repeat", "add", "clear")))
    index = draw(st.integers(0, len(values) - 1)) if len(values) else 0
    if kind == "clear" and draw(st.integers(0, 3)) == 3:
        message.ClearField(field.name)
    elif kind == "add" or not len(values):
        if field.type == field.TYPE_MESSAGE:
            values.add()
        else:
            _append(values, _scalar(draw, field, names, None))
    elif kind == "delete":
        del values[index]
    elif kind == "repeat":
        if field.type == field.TYPE_MESSAGE:
            values.add().CopyFrom(values[index])
        else:
            values.append(values[index])
    elif field.type == field.TYPE_MESSAGE:
        _change_message(draw, values[index], names)
    else:
        rest = list(values)
        changed = _scalar(draw, field, names, rest[index])
        del values[index:]
        _append(values, changed)
        values.extend(rest[index + 1 :])


def _append(values: Any, value: Any) -> None:
    try:
        values.append(value)
    except (ValueError, TypeError):  # out of the field's range
        values.append(0)


def _set(message: Any, field: Any, value: Any) -> None:
    try:
        setattr(message, field.name, value)
    except (ValueError, TypeError):
        message.ClearField(field.name)


def _scalar(draw: st.DrawFn, field: Any, names: list[str], now: Any) -> Any:
    if field.type == field.TYPE_STRING:
        return draw(st.sampled_from(names) if names and draw(st.integers(0, 2)) else st.text(max_size=5))
    if field.type == field.TYPE_BYTES:
        data = bytearray(now or b"\0\0\0\0")
        return bytes(
            draw(st.sampled_from((data[: len(data) // 2], data * 2, data + b"\0", b"")) | st.binary(max_size=9))
        )
    if field.type in (field.TYPE_FLOAT, field.TYPE_DOUBLE):
        return draw(st.sampled_from((*NASTY_FLOATS, 1e30, -1e30)))
    if field.type == field.TYPE_BOOL:
        return not now
    return draw(st.sampled_from(NASTY_INTS) | st.integers(-3, 40))
